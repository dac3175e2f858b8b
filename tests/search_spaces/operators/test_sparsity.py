"""Pruning: what is stored where, which weights go, SparseGPT's update, and structured removal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import output_error
from operator_cases.sparsity import attention, mlp
from torch.nn.functional import silu

from search_spaces.operators import (
    Codebook,
    Keep,
    Prune,
    PruneNM,
    RoundToNearest,
    Shrink,
    SparseGPT,
    Statistics,
)
from search_spaces.operators.prune import keep_highest
from search_spaces.operators.sparse_storage import SparseStorage
from search_spaces.space import Member, Unit
from search_spaces.storage import payload_bytes

LARGE = (4096, 4096)
NONE = Statistics()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def observed(columns, *, seed=1, correlated=True, rows=0):
    """Statistics of random inputs, three features of which never fire."""
    inputs = randn(4 * columns, columns, seed=seed)
    if correlated:
        few = columns // 6
        inputs = inputs[:, :few] @ randn(few, columns, seed=seed + 1) + inputs
    inputs[:, 1::7][:, :3] = 0.0
    hessian = inputs.T @ inputs / len(inputs)
    if not correlated:
        hessian = hessian.diagonal().diag()
    fisher = randn(rows, columns, seed=seed + 2).square() if rows else None
    return Statistics(hessian.diagonal().clone(), hessian, fisher)


# Storage


@pytest.mark.parametrize(
    ("sparsity", "bitmap", "rows_16"),
    [
        (0.5, 9.0, 16.008),
        (0.6, 7.4, 12.808),
        (0.7, 5.8, 9.608),
        (0.8, 4.2, 6.408),
        (0.9, 2.6, 3.208),
    ],
)
def test_bits_per_weight_of_a_large_matrix(sparsity, bitmap, rows_16):
    operator = Prune(sparsity, pattern="matrix")
    storage = operator.storage(LARGE)
    bits = {
        form: 8 * payload_bytes(storage.layout_as(form)) / (LARGE[0] * LARGE[1])
        for form in ("dense", "bitmap", "compressed_rows")
    }
    assert bits["dense"] == 16
    assert bits["bitmap"] == pytest.approx(bitmap, abs=1e-3)
    assert bits["compressed_rows"] == pytest.approx(rows_16, abs=1e-3)
    assert 8 * operator.bytes(LARGE) / (LARGE[0] * LARGE[1]) == min(bits.values())


def test_wide_matrices_need_wide_indices():
    narrow, wide = (SparseStorage((4, n), 100, Keep()) for n in (2**16, 2**16 + 1))
    assert narrow.form == wide.form == "compressed_rows"
    assert payload_bytes(narrow.layout()) == 4 * 5 + 100 * (2 + 2)
    assert payload_bytes(wide.layout()) == 4 * 5 + 100 * (4 + 2)


def test_two_of_four_takes_nine_bits():
    assert 8 * PruneNM(2, 4).bytes(LARGE) / (LARGE[0] * LARGE[1]) == 9.0
    assert PruneNM(3, 8).bytes((10, 16)) == 10 * 6 * 2 + (10 * 6 * 3 + 7) // 8


@pytest.mark.parametrize(
    ("sparsity", "form"),
    [
        (0.0, "dense"),
        (1 / 16, "dense"),
        (0.07, "bitmap"),
        (0.93, "bitmap"),
        (0.94, "compressed_rows"),
        (1.0, "none"),
    ],
)
@pytest.mark.parametrize("pattern", ["row", "matrix"])
def test_the_smallest_form_is_chosen(sparsity, form, pattern):
    storage = Prune(sparsity, pattern=pattern).storage((512, 4096))
    assert storage.form == form
    if form == "dense":  # honest: nothing is saved
        assert payload_bytes(storage.layout()) == 512 * 4096 * 2


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    density=st.floats(0, 1),
    even=st.booleans(),
    values=st.sampled_from([Keep(), Keep("float16"), RoundToNearest(8, 4)]),
)
def test_what_is_kept_comes_back(rows, columns, density, even, values):
    if even:
        mask = keep_highest(randn(rows, columns), int(density * columns))
    else:
        mask = randn(rows, columns).sigmoid() < density  # some rows may be empty
    storage = SparseStorage((rows, columns), int(mask.sum()), values, even)
    weight = (randn(rows, columns, seed=1) * 8).round() / 8
    packed = storage.encode(weight, mask, None)
    layout = storage.layout()
    assert {n: tuple(t.shape) for n, t in packed.items()} == {t.name: t.shape for t in layout}
    decoded = storage.decode(packed)
    assert torch.equal(decoded[~mask], torch.zeros(int((~mask).sum())))
    assert (decoded - weight * mask).abs().max() <= (0.04 if storage.num_kept else 0)
    if values == Keep("float16"):
        assert torch.equal(decoded, weight * mask)
    forms = ["bitmap", "compressed_rows"]
    if isinstance(values, Keep) or mask.all():
        forms.append("dense")
    sizes = [payload_bytes(storage.layout_as(form)) for form in forms]
    assert payload_bytes(layout) == (min(sizes) if storage.num_kept else 0)


def test_zeros_stay_zeros_even_where_dense_codes_would_be_smaller():
    two = RoundToNearest(2, 64)
    operator = Prune(0.1, values=two)
    assert operator.storage((8, 512)).form == "bitmap"
    assert operator.bytes((8, 512)) > two.bytes((8, 512))
    assert Prune(0.0, values=two).bytes((8, 512)) == two.bytes((8, 512))


def test_even_rows_keep_a_matrix_of_values():
    """Each row of the values has scales of its own, as in prune then quantize."""
    shape, inner = (6, 64), RoundToNearest(4, 0)
    operator = Prune(0.5, values=inner)
    assert operator.storage(shape).values_shape == (6, 32)
    assert operator.bytes(shape) == 6 * 64 // 8 + inner.bytes((6, 32))
    weight = randn(*shape)
    mask, _ = operator.select(weight, NONE)
    compact = inner.apply(weight[mask].reshape(6, 32), NONE)
    applied = operator.apply(weight, NONE)
    assert torch.equal(applied[mask].reshape(6, 32), compact)
    assert not applied[~mask].any()


@pytest.mark.parametrize("operator", [Prune(0.5, "wanda"), PruneNM(2, 4, "wanda"), SparseGPT(0.5)])
def test_the_values_get_the_fisher_of_what_is_kept(operator):
    weight, stats = randn(6, 64), observed(64, rows=6)
    inner = Codebook(2)
    nested = type(operator)(**{**vars(operator), "values": inner})
    assert nested.needs == operator.needs | {"fisher"}
    mask, kept = operator.select(weight, stats)
    compact = Statistics(fisher=stats.fisher[mask].reshape(6, 32))
    expected = inner.apply(kept[mask].reshape(6, 32), compact)
    assert torch.equal(nested.apply(weight, stats)[mask].reshape(6, 32), expected)
    blind = inner.apply(kept[mask].reshape(6, 32), Statistics(fisher=torch.ones(6, 32)))
    assert not torch.equal(blind, expected)


def test_a_shape_that_the_values_do_not_fit_is_unfit():
    class Fussy(Keep):
        def unfit(self, shape):
            return "" if shape[1] % 32 == 0 else f"{shape[1]} columns"

    assert not Prune(0.5, values=Fussy()).unfit((4, 64))
    assert Prune(0.75, values=Fussy()).unfit((4, 64)) == "16 columns"
    assert PruneNM(1, 4, values=Fussy()).unfit((4, 64)) == "16 columns"
    assert not Prune(1.0, values=Fussy()).unfit((4, 33))


# Scores


def slow_scores(score, weight, stats):
    """The formulas, one weight at a time."""
    rows, columns = weight.shape
    w, out = weight.double(), torch.empty(rows, columns, dtype=torch.float64)
    moment, fisher = stats.second_moment.double(), stats.fisher.double()
    general = sum(w[i, j] ** 2 * moment[j] / 2 for i in range(rows) for j in range(columns))
    for i in range(rows):
        for j in range(columns):
            if score == "magnitude":
                out[i, j] = abs(w[i, j])
            elif score == "wanda":
                out[i, j] = abs(w[i, j]) * moment[j] ** 0.5
            elif score == "fisher":
                out[i, j] = fisher[i, j] * w[i, j] ** 2 / 2
            else:
                share = w[i, j] ** 2 * moment[j] / 2 * rows * columns / general
                change = fisher[i, j] ** 0.5 * (1 + 0.1 * share) * abs(w[i, j])
                out[i, j] = change + change**2 / 2
    return out


@pytest.mark.parametrize("score", ["magnitude", "wanda", "fisher", "d_pruner"])
def test_each_score_keeps_what_its_formula_says(score):
    weight, stats = randn(5, 24), observed(24, rows=5)
    scores = slow_scores(score, weight, stats)
    rows = torch.zeros(5, 24, dtype=torch.bool)
    rows.scatter_(1, scores.argsort(dim=1, descending=True, stable=True)[:, :10], True)
    assert torch.equal(Prune(7 / 12, score).select(weight, stats)[0], rows)
    whole = torch.zeros(120, dtype=torch.bool)
    whole[scores.flatten().argsort(descending=True, stable=True)[:37]] = True
    operator = Prune(1 - 37 / 120, score, "matrix")
    assert torch.equal(operator.select(weight, stats)[0].flatten(), whole)
    groups = PruneNM(1, 3, score).select(weight, stats)[0].reshape(-1, 3)
    assert torch.equal(groups.int().argmax(1), scores.reshape(-1, 3).argmax(1))
    assert (groups.sum(1) == 1).all()


def test_scores_differ():
    weight, stats = randn(20, 64), observed(64, rows=20)
    scores = ("magnitude", "wanda", "fisher", "d_pruner")
    masks = [Prune(0.5, score).select(weight, stats)[0] for score in scores]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 20), st.data())
def test_ties_are_broken_to_the_exact_number(rows, columns, data):
    """In both precisions: they are selected by different libraries."""
    num_kept = data.draw(st.integers(0, columns))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores = torch.randint(3, (rows, columns), generator=generator).float()
    mask = keep_highest(scores, num_kept)
    assert torch.equal(mask, keep_highest(scores.half(), num_kept))
    expected = scores.argsort(dim=1, descending=True, stable=True)[:, :num_kept]
    assert torch.equal(mask, torch.zeros_like(mask).scatter_(1, expected, True))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.58, 0.7, 1.0])
def test_rows_lose_the_nearest_whole_number(sparsity):
    """Truncation would lose up to a weight in every row: int(100 * 0.29) is 28."""
    mask, _ = Prune(sparsity).select(randn(3, 100), NONE)
    assert ((~mask).sum(1) == round(100 * sparsity)).all()


# SparseGPT


def slow_sparse_gpt(weight, hessian, keep, block, damping):
    """The optimal brain surgeon from its definition: a fresh inverse for every column."""
    rows, columns = weight.shape
    made, mask = weight.double().clone(), torch.ones(rows, columns, dtype=torch.bool)
    damped = hessian.double().clone()
    dead = damped.diagonal() == 0
    damped[dead, dead] = 1
    damped += damping * damped.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    for j in range(columns):
        if j % block == 0:
            end = min(columns, j + block)
            scores = torch.stack(
                [made[:, i] ** 2 / damped[i:, i:].inverse()[0, 0] for i in range(j, end)], 1
            )
            scores[:, dead[j:end]] = 0
            order = scores.argsort(dim=1, descending=True, stable=True)[:, : keep(j, end)]
            mask[:, j:end] = torch.zeros(rows, end - j, dtype=torch.bool).scatter_(1, order, True)
        inverse = damped[j:, j:].inverse()
        error = made[:, j] * ~mask[:, j] / inverse[0, 0]
        made[:, j:] -= error[:, None] * inverse[0]
        made[:, j] *= mask[:, j]
    return mask, (made * mask).float()


@pytest.mark.parametrize("block", [8, 13, 64])
def test_sparse_gpt_is_the_optimal_brain_surgeon(block):
    weight, stats = randn(6, 40), observed(40)
    operator = SparseGPT(0.6, block=block)

    def keep(start, end):
        return (end - int(0.6 * end + 0.5)) - (start - int(0.6 * start + 0.5))

    mask, made = operator._compensated(weight, stats.hessian)
    slow_mask, slow = slow_sparse_gpt(weight, stats.hessian, keep, block, 0.01)
    assert torch.equal(mask, slow_mask)
    assert torch.allclose(made, slow, atol=1e-4)
    assert (mask.sum(1) == 16).all()


def test_sparse_gpt_with_groups_is_the_optimal_brain_surgeon():
    weight, stats = randn(6, 40), observed(40)
    operator = SparseGPT(0.75, block=8, n=1, m=4)
    mask, made = operator._compensated(weight, stats.hessian)
    slow_mask, slow = slow_sparse_gpt(weight, stats.hessian, lambda j, end: 1, 4, 0.01)
    assert torch.equal(mask, slow_mask)
    assert torch.allclose(made, slow, atol=1e-4)


@pytest.mark.parametrize("correlated", [True, False], ids=["correlated", "independent"])
@pytest.mark.parametrize(
    ("operator", "wanda"),
    [
        (SparseGPT(0.5), Prune(0.5, "wanda")),
        (SparseGPT(0.8, block=16), Prune(0.8, "wanda")),
        (SparseGPT(0.5, n=2, m=4), PruneNM(2, 4, "wanda")),
    ],
    ids=lambda operator: operator.label,
)
def test_sparse_gpt_is_never_worse_than_wanda(operator, wanda, correlated):
    weight, stats = randn(24, 96), observed(96, correlated=correlated)
    mask, made = operator.select(weight, stats)
    error = made * mask - weight
    plain_mask, _ = wanda.select(weight, stats)
    plain = weight * plain_mask - weight
    by_row = torch.stack(
        [torch.tensor([output_error(row[None], stats) for row in rows]) for rows in (error, plain)]
    )
    assert (by_row[0] <= by_row[1] * (1 + 1e-5)).all()
    assert (mask.sum(1) == plain_mask.sum(1)).all()
    if correlated:
        assert by_row[0].sum() < 0.8 * by_row[1].sum()


def test_without_the_guard_blocks_can_lose_to_wanda():
    """Why the guard is there: independent inputs, and rows whose weights lie in one block."""
    weight = randn(24, 96) * torch.linspace(0.1, 2, 96)
    stats = observed(96, correlated=False)
    operator = SparseGPT(0.8, block=16)
    mask, made = operator._compensated(weight, stats.hessian)
    plain, _ = Prune(0.8, "wanda").select(weight, stats)
    loss = output_error(made - weight, stats)
    assert loss > 1.1 * output_error(weight * plain - weight, stats)
    mask, made = operator.select(weight, stats)
    assert torch.equal(mask, plain)


def test_dead_inputs_go_first_and_change_nothing():
    weight, stats = randn(8, 48), observed(48)
    dead = stats.second_moment == 0
    assert dead.sum() == 3
    mask, made = SparseGPT(0.5).select(weight, stats)
    assert not mask[:, dead].any()
    mask, made = SparseGPT(0.0).select(weight, stats)
    assert mask.all()
    assert torch.equal(made, weight)
    silent = Statistics(hessian=torch.zeros(48, 48))
    mask, made = SparseGPT(0.5).select(weight, silent)
    assert torch.equal(made[mask], weight[mask])


# Structured removal


def compress(operator, members, weights, stats):
    operator_unit = Unit("block", members, 0, "block")
    packed = operator.pack_unit(weights, members, stats)
    assert {n: t.numel() * t.element_size() for n, t in packed.items()} == {
        t.name: t.bytes for t in operator_unit.layout(operator)
    }
    return operator.unpack_unit(packed, members)


def unit(members, seed=3):
    weights = [randn(*m.shape, seed=seed + i) for i, m in enumerate(members)]
    stats = [observed(m.shape[1], seed=seed + i, rows=m.shape[0]) for i, m in enumerate(members)]
    return weights, stats


def test_a_shrunk_mlp_is_a_smaller_one():
    members = mlp("gate_proj", "up_proj", "down_proj", hidden=24, channels=40)
    weights, stats = unit(members)
    gate, up, down = compress(Shrink(0.5, values=Keep("float16")), members, weights, stats)
    importance = weights[2].square().sum(0) * stats[2].second_moment
    kept = torch.zeros(40, dtype=torch.bool)
    kept[importance.argsort(descending=True)[:24]] = True  # 20 rounded to a multiple of 8
    for made, whole in ((gate, weights[0]), (up, weights[1]), (down.T, weights[2].T)):
        assert torch.equal(made[kept], whole[kept].half().float())
        assert not made[~kept].any()
    inputs = randn(7, 24, seed=9)
    dense = (silu(inputs @ gate.T) * (inputs @ up.T)) @ down.T
    small = (silu(inputs @ gate[kept].T) * (inputs @ up[kept].T)) @ down[:, kept].T
    assert torch.allclose(dense, small, atol=1e-5)


def test_shrunk_bytes_are_those_of_the_new_shapes():
    members = mlp("fc1", "fc2", hidden=24, channels=41)
    block = Unit("mlp", members, 0, "mlp")
    assert block.bytes(Shrink(1.0)) == 2 * 24 * 41 * 2
    assert block.bytes(Shrink(0.5)) == 2 * 24 * 24 * 2 + 6  # 20.5 channels -> 24, 41 bits
    assert block.bytes(Shrink(0.01)) == 2 * 24 * 8 * 2 + 6
    assert block.bytes(Shrink(0.5, multiple=1)) == 2 * 24 * 21 * 2 + 6
    assert block.bytes(Shrink(0.5, multiple=64)) == 2 * 24 * 41 * 2
    assert block.bytes(Shrink(0.0)) == 0
    four = RoundToNearest(4, 8)
    expected = four.bytes((24, 24)) + four.bytes((24, 24)) + 6
    assert block.bytes(Shrink(0.5, values=four)) == expected


def test_head_groups_go_together():
    members = attention(heads=6, groups=3, head_dim=4, hidden=24)
    weights, stats = unit(members)
    operator = Shrink(0.67, head_dim=4)
    names = [member.module for member in members]
    made = dict(zip(names, compress(operator, members, weights, stats), strict=True))
    out = weights[0].square().sum(0) * stats[0].second_moment
    lost = int(out.reshape(3, 8).sum(1).argmin())
    for name, width in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4), ("o_proj", 8)):
        matrix = made[f"block.attn.{name}"]
        groups = (matrix.T if name == "o_proj" else matrix).reshape(3, width, -1)
        assert [bool(group.any()) for group in groups] == [index != lost for index in range(3)]
    sizes = [24 * 16, 16 * 24, 8 * 24, 8 * 24]
    assert Unit("attn", members, 0, "attn").bytes(operator) == 2 * sum(sizes) + 1


def test_removing_a_block_needs_nothing():
    for members in (mlp("c_fc", "c_proj"), attention()):
        operator = Shrink(0.0)
        assert not operator.needs
        assert not operator.unfit_unit(members)
        weights, _ = unit(members)
        made = compress(operator, members, weights, [NONE] * len(members))
        assert all(not matrix.any() for matrix in made)
        assert [m.shape for m in made] == [m.shape for m in weights]


def test_shrunk_values_get_the_statistics_of_what_is_left():
    members = mlp("up_proj", "down_proj", hidden=16, channels=32)
    weights, stats = unit(members)
    inner = Codebook(2)
    operator = Shrink(0.5, values=inner)
    assert operator.needs == {"second_moment", "fisher"}
    up, down = compress(operator, members, weights, stats)
    kept = down.any(0)
    assert kept.sum() == 16
    expected = inner.apply(weights[1][:, kept], Statistics(fisher=stats[1].fisher[:, kept]))
    assert torch.equal(down[:, kept], expected)
    expected = inner.apply(weights[0][kept], Statistics(fisher=stats[0].fisher[kept]))
    assert torch.equal(up[kept], expected)


@pytest.mark.parametrize(
    ("operator", "members", "says"),
    [
        (Shrink(0.5), attention(), "head_dim is 0"),
        (Shrink(0.5, head_dim=5), attention(), "not whole heads of 5"),
        (Shrink(0.5), mlp("fc1", "fc2")[:1], "fc1 are neither"),
        (Shrink(0.5), (*mlp("fc1", "fc2"), *mlp("c_fc", "c_proj")), "neither an MLP"),
        (Shrink(0.5), (Member("a.up_proj", "weight", (3, 8, 4)),), "stacked experts"),
        (
            Shrink(0.5),
            (mlp("up_proj", "down_proj")[0], mlp("up_proj", "down_proj", channels=48)[1]),
            "not an MLP of 48",
        ),
    ],
)
def test_units_that_cannot_shrink_say_why(operator, members, says):
    assert says in operator.unfit_unit(members)


# Messages


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Prune(1.5), "prune: sparsity must be 0 to 1, got 1.5"),
        (lambda: Prune(float("nan")), "sparsity must be 0 to 1"),
        (lambda: Prune(0.5, "size"), "prune: score must be .*, got 'size'"),
        (lambda: Prune(0.5, pattern="column"), "pattern must be row or matrix, got 'column'"),
        (lambda: Prune(0.5, values=SparseGPT(0.5)), "needs hessian of whole columns"),
        (lambda: PruneNM(2, 4, "fisher", Prune(0.5, "wanda")), "needs second_moment"),
        (lambda: PruneNM(4, 4), "prune_n_m: n must be 1 to m - 1 = 3, got 4"),
        (lambda: PruneNM(1, 300), "m must be 2 to 256, got 300"),
        (lambda: SparseGPT(-0.1), "sparse_gpt: sparsity must be 0 to 1"),
        (lambda: SparseGPT(0.5, block=0), "block must be at least 1, got 0"),
        (lambda: SparseGPT(0.5, damping=0.0), "damping must be positive"),
        (lambda: SparseGPT(0.6, n=2, m=4), "sparsity must be 0.5 for 2:4, got 0.6"),
        (lambda: SparseGPT(0.5, block=6, n=2, m=4), "whole groups of m = 4, got 6"),
        (lambda: Shrink(1.5), "shrink: keep must be 0 to 1, got 1.5"),
        (lambda: Shrink(0.5, head_dim=-1), "head_dim must be >= 0"),
        (lambda: Shrink(0.5, multiple=0), "multiple must be at least 1"),
    ],
)
def test_fields_are_checked(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        (Prune(0.5, "wanda"), "second_moment"),
        (Prune(0.5, "fisher"), "fisher"),
        (PruneNM(2, 4, "d_pruner"), "fisher"),
        (SparseGPT(0.5), "hessian"),
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_missing_statistics_are_named(operator, kind):
    assert kind in operator.needs
    with pytest.raises(ValueError, match=f"{operator.name} needs the {kind}"):
        operator.apply(randn(4, 8), NONE)
    assert not PruneNM(2, 4).unfit((4, 8))
    assert PruneNM(2, 4).unfit((4, 9)) == "9 columns are not whole groups of 4"


def test_statistics_that_make_no_scores_are_refused():
    weight, stats = torch.zeros(4, 8), Statistics(torch.full((8,), torch.inf))
    with pytest.raises(ValueError, match="must be numbers"):
        Prune(0.5, "wanda").apply(weight, stats)


def test_shrinking_needs_what_the_projection_out_reads():
    members = mlp("fc1", "fc2")
    weights, _ = unit(members)
    with pytest.raises(ValueError, match="shrink needs the second_moment"):
        Shrink(0.5).pack_unit(weights, members, [NONE, NONE])


def test_labels_are_distinct():
    operators = [
        Prune(0.5),
        Prune(0.5, pattern="matrix"),
        Prune(0.5, "wanda"),
        Prune(0.5, values=RoundToNearest(4)),
        Prune(0.5, values=Keep("float16")),
        PruneNM(),
        PruneNM(score="wanda"),
        PruneNM(1, 4),
        SparseGPT(0.5),
        SparseGPT(0.5, block=64),
        SparseGPT(0.5, damping=0.1),
        SparseGPT(0.5, n=2, m=4),
        Shrink(0.5),
        Shrink(0.5, multiple=1),
        Shrink(0.5, values=RoundToNearest(4)),
    ]
    labels = [operator.label for operator in operators]
    assert len(set(labels)) == len(labels)
    assert not any(" " in label for label in labels)
