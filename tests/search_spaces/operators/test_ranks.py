"""Low rank, Kronecker, dictionary and MoDeGPT against the formulas of their papers."""

import pytest
import torch
from operator_cases import output_error, squared_error
from operator_cases.ranks import attention, input_fisher_error, mlp, strong_input_error

from search_spaces.operators import (
    GPTQ,
    Dictionary,
    Keep,
    Kronecker,
    LowRank,
    MoDeGPT,
    RoundToNearest,
    Statistics,
)
from search_spaces.operators.kronecker import kronecker_rank, middle_divisor, rearrange
from search_spaces.operators.modegpt import shrink_query_key, shrink_value_out
from search_spaces.space import Member

HALF = Keep("float16")
WEIGHTINGS = {
    "plain": squared_error,
    "fisher": input_fisher_error,
    "whitened": output_error,
    "corda": strong_input_error,
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(rows=40, columns=32):
    """A matrix with its statistics; inputs are correlated and of very different sizes."""
    sizes = torch.logspace(0, -2, columns)
    inputs = random(300, columns, seed=1) @ (random(columns, columns, seed=2) * sizes)
    fisher = random(rows, columns, seed=3).square() * sizes.flip(0)
    return random(rows, columns), Statistics(
        inputs.square().mean(0), inputs.T @ inputs / len(inputs), fisher
    )


def root(matrix):
    """Symmetric square root."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


# Low rank


def published(weighting, weight, stats, rank):
    """Factors as the papers write them, with the inverse of the root, in float64."""
    weight = weight.double()
    if weighting == "output":  # LoRD: principal components of the outputs
        basis = torch.linalg.eigh(weight @ stats.hessian.double() @ weight.T)[1][:, -rank:]
        return basis @ (basis.T @ weight)
    hessian = stats.hessian.double()
    scaling = {
        "plain": torch.eye(weight.shape[1], dtype=torch.float64),
        "fisher": torch.diag(stats.fisher.double().sum(0).sqrt()),
        "whitened": torch.linalg.cholesky(hessian),
        "corda": hessian,
    }[weighting]
    left, values, right = torch.linalg.svd(weight @ scaling, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank] @ torch.linalg.inv(scaling)


@pytest.mark.parametrize("shape", [(40, 32), (32, 40)], ids=str)
@pytest.mark.parametrize("weighting", [*WEIGHTINGS, "output"])
def test_low_rank_is_what_its_paper_writes(weighting, shape):
    weight, stats = example(*shape)
    operator = LowRank(0.5, weighting, multiple=1, factors=HALF)
    made = operator.apply(weight, stats)
    expected = published(weighting, weight, stats, operator.rank(shape))
    torch.testing.assert_close(made.double(), expected, rtol=0, atol=6e-3)
    assert (made - weight).abs().max() > 0.3


def test_each_weighting_is_the_best_by_its_own_measure():
    weight, stats = example()
    made = {name: LowRank(0.4, name).apply(weight, stats) for name in WEIGHTINGS}
    for name, objective in WEIGHTINGS.items():
        losses = {other: objective(weight - made[other], stats) for other in made}
        assert min(losses, key=losses.get) == name
        assert losses[name] < 0.97 * min(v for other, v in losses.items() if other != name)


def test_lord_without_means_is_whitening():
    weight, stats = example()
    made = [LowRank(0.4, name).apply(weight, stats) for name in ("whitened", "output")]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("keep", "shape", "multiple", "rank"),
    [
        (1 / 32, (4096, 4096), 8, 64),
        (0.5, (1536, 576), 8, 208),
        (0.5, (1536, 576), 1, 209),
        (0.3, (20, 20), 1, 3),  # 0.3 * 10 is 3, whatever floats make of it
        (0.9, (4, 512), 8, 3),  # no room for a multiple
        (0.01, (64, 64), 8, 8),  # one multiple at least
        (0.01, (1, 65), 8, 1),
    ],
)
def test_ranks_are_rounded_down_to_the_multiple(keep, shape, multiple, rank):
    operator = LowRank(keep, multiple=multiple)
    assert operator.rank(shape) == rank
    assert operator.bytes(shape) == 2 * rank * sum(shape)


def test_worked_bits_of_rank_64():
    rank_64 = LowRank(64 * (4096 + 14336) / (4096 * 14336))
    assert 8 * LowRank(1 / 32).bytes((4096, 4096)) / 4096**2 == 0.5
    assert 8 * rank_64.bytes((4096, 14336)) / (4096 * 14336) == pytest.approx(0.3214, abs=5e-5)


def test_singular_values_are_split_evenly():
    weight, stats = example()
    operator = LowRank(0.5, factors=HALF)
    left, right = operator.unpack_factors(operator.pack(weight, stats), weight.shape)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=2e-3, atol=0)
    values = torch.linalg.svdvals(weight)[: left.shape[1]]
    torch.testing.assert_close(left.norm(dim=0).square(), values, rtol=2e-3, atol=0)


def test_the_right_factor_makes_up_for_the_left_ones_rounding():
    _, stats = example(96, 64)
    weight = random(96, 16) @ random(16, 64, seed=1)  # of the rank that is stored
    coarse = RoundToNearest(3, 8)
    operator = LowRank(0.5, factors=coarse)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    rank = operator.rank(weight.shape)
    halves = left[:, :rank] * values[:rank].sqrt(), values[:rank, None].sqrt() * right[:rank]
    apart = coarse.apply(halves[0], stats) @ coarse.apply(halves[1], stats)
    error = squared_error(weight - operator.apply(weight, stats), stats)
    assert error < 0.95 * squared_error(weight - apart, stats)


def test_factors_that_need_statistics_get_those_of_their_own_inputs():
    weight, stats = example(96, 64)
    operator = LowRank(0.5, "whitened", factors=GPTQ(3, 8))
    assert operator.needs == {"hessian"}
    assert LowRank(0.5, factors=GPTQ(3, 8)).needs == {"hessian"}
    blind = LowRank(0.5, "whitened", factors=RoundToNearest(3, 8))
    errors = [output_error(weight - o.apply(weight, stats), stats) for o in (operator, blind)]
    assert errors[0] < 0.85 * errors[1]


@pytest.mark.parametrize("weighting", ["fisher", "whitened", "output", "corda"])
def test_low_rank_survives_statistics_of_nothing(weighting):
    weight, _ = example()
    nothing = Statistics(None, torch.zeros(32, 32), torch.zeros(40, 32))
    made = LowRank(0.5, weighting).apply(weight, nothing)
    torch.testing.assert_close(made, LowRank(0.5).apply(weight, nothing), rtol=0, atol=2e-2)


# Kronecker


def test_kronecker_recovers_a_sum_of_products():
    pairs = [(random(4, 6, seed=i), random(5, 8, seed=10 + i)) for i in range(2)]
    weight = sum(torch.kron(a, b) for a, b in pairs)
    two, one = (Kronecker(terms, rows_a=4, columns_a=6, factors=HALF) for terms in (2, 1))
    torch.testing.assert_close(two.apply(weight, Statistics()), weight, rtol=0, atol=2e-2)
    assert (one.apply(weight, Statistics()) - weight).norm() > 0.3 * weight.norm()
    assert torch.linalg.matrix_rank(weight) > 2
    assert two.bytes((20, 48)) == 2 * 2 * (24 + 40)


def test_rearranging_lays_blocks_out_as_rows():
    weight = random(6, 8)
    blocks = rearrange(weight, (3, 2))
    for i in range(3):
        for j in range(2):
            block = weight[2 * i : 2 * i + 2, 4 * j : 4 * j + 4]
            assert torch.equal(blocks[2 * i + j], block.flatten())


def test_kronecker_picks_middle_divisors():
    assert [middle_divisor(n) for n in (1, 7, 9, 48, 576, 1536)] == [1, 1, 3, 6, 24, 32]
    assert Kronecker(1).shape_a((1536, 576)) == (32, 24)
    operator = Kronecker(keep=0.25)
    assert operator.num_terms((1536, 576)) == 115
    assert operator.bytes((1536, 576)) == 2 * 115 * (768 + 1152)
    assert Kronecker(10**6).num_terms((1536, 576)) == 768


@pytest.mark.parametrize(
    ("operator", "shape", "says"),
    [
        (Kronecker(1), (7, 13), "7 rows and 13 columns have no divisors"),
        (Kronecker(1, rows_a=4), (7, 8), "4 does not divide 7 rows"),
        (Kronecker(1, columns_a=3), (7, 8), "3 does not divide 8 columns"),
        (Kronecker(1, rows_a=1, columns_a=1), (8, 8), "no divisors"),
    ],
)
def test_kronecker_says_what_does_not_fit(operator, shape, says):
    assert says in operator.unfit(shape)


def test_kronecker_rank_takes_energy_or_elbow_whichever_comes_first():
    steep = [10.0, 9.0, 0.5, 0.4, 0.3]
    assert kronecker_rank(steep, 0.5) == 1
    assert kronecker_rank(steep, 0.9999) == 2  # the elbow
    assert kronecker_rank(steep, 0.9999, least=3) == 3
    assert kronecker_rank(steep, 0.9999, most=1) == 1
    assert kronecker_rank([1.0] * 10, 0.55) == 6  # flat: no elbow
    assert kronecker_rank([0.0, 0.0], 0.5) == 1
    spectrum = torch.linalg.svdvals(random(16, 16)).tolist()
    ranks = [kronecker_rank(spectrum, energy / 20) for energy in range(1, 21)]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1] < 16


@pytest.mark.parametrize(("values", "energy"), [([1.0], 0), ([1.0], 1.1), ([], 0.5), ([1, 2], 0.5)])
def test_kronecker_rank_refuses_nonsense(values, energy):
    with pytest.raises(ValueError, match=r"energy|singular values"):
        kronecker_rank(values, energy)


# Dictionary


@pytest.mark.parametrize(("removed", "saved"), [(0.2, 0.167), (0.3, 0.271), (0.4, 0.375)])
def test_worked_bytes_of_dictionaries(removed, saved):
    """With 16-bit values the bitmap takes back part of the nominal saving."""
    operator = Dictionary(1 - removed)
    atoms, nonzeros = operator.num_atoms((4096, 4096)), operator.num_nonzeros((4096, 4096))
    exact = 2 * 4096 * atoms + 2 * nonzeros * 4096 + 4096 * atoms // 8
    assert operator.bytes((4096, 4096)) == exact
    assert 1 - exact / (2 * 4096**2) == pytest.approx(saved, abs=5e-4)


def pursued(weight, stats, operator, rounds):
    """K-SVD's coding step as the paper has it: orthogonal matching pursuit from nothing, by row."""
    signals = (weight.double() @ root(stats.hessian)).float()
    num_atoms, nonzeros = operator.num_atoms(weight.shape), operator.num_nonzeros(weight.shape)
    atoms = torch.linalg.svd(signals, full_matrices=False)[2][:num_atoms]
    for _ in range(rounds):
        codes = torch.zeros(len(signals), num_atoms)
        for signal, code in zip(signals, codes, strict=True):
            chosen, rest = [], signal
            for _ in range(nonzeros):
                products = (atoms @ rest).abs()
                products[chosen] = -1
                chosen.append(products.argmax().item())
                fit = torch.linalg.lstsq(atoms[chosen].T, signal.unsqueeze(1)).solution
                rest = signal - (atoms[chosen].T @ fit).squeeze(1)
            code[chosen] = fit.squeeze(1)
        atoms = torch.linalg.lstsq(codes, signals).solution
        atoms = atoms / atoms.norm(dim=1, keepdim=True)
    lengths = torch.linalg.lstsq(codes, signals).solution
    return (signals - codes @ lengths).square().sum().item()


def test_dictionary_is_no_worse_than_matching_pursuit_and_better_than_low_rank():
    weight, stats = example(60, 32)
    operator = Dictionary(0.6)
    error = output_error(weight - operator.apply(weight, stats), stats)
    assert error < 1.05 * pursued(weight, stats, operator, rounds=10)
    low_rank = LowRank(0.65, "whitened", multiple=1)
    assert low_rank.bytes((60, 32)) > operator.bytes((60, 32)) * 0.95
    assert error < 0.8 * output_error(weight - low_rank.apply(weight, stats), stats)


def test_more_rounds_of_a_dictionary_err_less():
    weight, stats = example(60, 32)
    errors = [
        output_error(weight - Dictionary(0.6, iterations=n).apply(weight, stats), stats)
        for n in (1, 4, 16)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_rows_have_as_many_atoms_as_priced():
    from search_spaces.operators.packing import unpack_bits

    weight, stats = example(60, 32)
    operator = Dictionary(0.6)
    packed = operator.pack(weight, stats)
    num_atoms = operator.num_atoms((60, 32))
    support = unpack_bits(packed["support"], 1, 60 * num_atoms).reshape(60, num_atoms)
    assert (support.sum(1) == operator.num_nonzeros((60, 32))).all()
    assert packed["values"].shape == (60, operator.num_nonzeros((60, 32)))


# MoDeGPT


def weights_and_stats(members):
    return [random(*member.shape, seed=i) for i, member in enumerate(members)], [
        example(1, member.shape[1])[1] for member in members
    ]


def test_nystroem_is_what_the_paper_writes():
    members = mlp("gate_proj", "up_proj", "down_proj")
    weights, stats = weights_and_stats(members)
    operator = MoDeGPT(0.5, values=HALF)
    gate, up, down = operator.unpack_unit(operator.pack_unit(weights, members, stats), members)
    covariance = stats[2].hessian.double()
    ridge = covariance.diagonal().mean() * torch.eye(40)
    leverage = (covariance @ torch.linalg.inv(covariance + ridge)).diagonal()
    kept = leverage.topk(16).indices  # 20 of 40, rounded down to a multiple of 8
    assert set(gate.any(1).nonzero().flatten().tolist()) == set(kept.tolist())
    torch.testing.assert_close(gate[kept], weights[0][kept], rtol=1e-3, atol=1e-3)
    assert torch.equal(gate.any(1), up.any(1))
    assert torch.equal(gate.any(1), down.any(0))
    inner = torch.linalg.inv(covariance[kept][:, kept])
    expected = weights[2].double() @ covariance[:, kept] @ inner
    torch.testing.assert_close(down[:, kept].double(), expected, rtol=2e-3, atol=2e-2)


def test_query_key_scores_are_those_of_whole_rotary_pairs_and_groups():
    queries, keys = random(6, 8, 24).double(), random(3, 8, 24, seed=1).double()
    hessian = example(1, 24)[1].hessian.double()
    kept, cut_queries, cut_keys = shrink_query_key(
        queries, keys, {"q_proj": hessian, "k_proj": hessian}, 4
    )
    covariance = root(hessian)
    for group in range(3):
        scores = []
        for pair in range(4):
            scores.append(0.0)
            for i in (pair, pair + 4):
                for head in (2 * group, 2 * group + 1):
                    of_query = (covariance @ queries[head, i]).norm()
                    scores[-1] += (of_query * (covariance @ keys[group, i]).norm()).item()
        best = sorted(range(4), key=lambda p: -scores[p])[:2]
        assert kept[group].nonzero().flatten().tolist() == sorted(best)
        rows = sorted(best) + [p + 4 for p in sorted(best)]
        assert torch.equal(cut_keys.reshape(3, 4, 24)[group], keys[group, rows])
        for head in (2 * group, 2 * group + 1):
            assert torch.equal(cut_queries.reshape(6, 4, 24)[head], queries[head, rows])


@pytest.mark.parametrize("num_sharing", [1, 2])
def test_value_out_is_what_the_paper_writes(num_sharing):
    """Two decompositions per head; the first alone where query heads share a value head."""
    values, out = random(3, 8, 24).double(), random(3 * num_sharing, 8, 20, seed=1).double()
    hessian = example(1, 24)[1].hessian.double()
    new_values, new_out = shrink_value_out(values, out, hessian, 5)
    covariance = root(hessian)
    for head in range(3 * num_sharing):
        value = values[head // num_sharing]  # the paper's W_v is its transpose
        left, sizes, right = torch.linalg.svd(covariance @ value.T, full_matrices=False)
        if num_sharing == 1:
            inner, sizes, outer = torch.linalg.svd(sizes[:, None] * right @ out[head])
            left, to_out = left @ inner[:, :5], sizes[:5, None] * outer[:5]
        else:
            left, to_out = left[:, :5], sizes[:5, None] * right[:5] @ out[head]
        expected = torch.linalg.inv(covariance) @ left @ to_out
        made = new_values[head // num_sharing].T @ new_out[head]
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)
        assert (made - value.T @ out[head]).abs().max() > 0.1


def test_dense_attention_computes_what_is_stored():
    """The unpacked matrices hold the products of the smaller ones, and keep pairs together."""
    members = attention()
    weights, stats = weights_and_stats(members)
    operator = MoDeGPT(0.5, head_dim=8, multiple=2)
    out, keys, queries, values = operator.unpack_unit(
        operator.pack_unit(weights, members, stats), members
    )
    pairs = keys.any(1).reshape(3, 2, 4)
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    assert (pairs[:, 0].sum(1) == 2).all()
    of_queries = queries.any(1).reshape(3, 2, 2, 4)
    assert torch.equal(of_queries, pairs[:, None].expand(3, 2, 2, 4))
    new_values, new_out = shrink_value_out(
        weights[3].double().reshape(3, 8, 24),
        weights[0].double().T.reshape(6, 8, 24),
        stats[3].hessian.double(),
        4,
    )
    for head in range(6):
        product = out[:, 8 * head : 8 * head + 8] @ values.reshape(3, 8, 24)[head // 2]
        expected = new_out[head].T @ new_values[head // 2]
        torch.testing.assert_close(product.double(), expected, rtol=0, atol=0.1)
        assert product.abs().max() > 1


def test_modegpt_stores_the_new_shapes_and_a_bit_per_channel_or_pair():
    layout = MoDeGPT(0.5).layout_unit(mlp("gate_proj", "up_proj", "down_proj"))
    assert [(t.name, t.shape) for t in layout] == [
        ("block.mlp.gate_proj.weight", (16, 24)),
        ("block.mlp.up_proj.weight", (16, 24)),
        ("block.mlp.down_proj.weight", (24, 16)),
        ("block.mlp.down_proj.weight.kept", (5,)),
    ]
    layout = MoDeGPT(0.7, head_dim=8, multiple=1).layout_unit(attention())  # 5 of 8: made even
    assert [(t.name.split(".")[2], t.shape) for t in layout] == [
        ("o_proj", (24, 24)),
        ("k_proj", (12, 24)),
        ("q_proj", (24, 24)),
        ("v_proj", (12, 24)),
        ("k_proj", (2,)),
    ]


@pytest.mark.parametrize(
    ("operator", "members", "says"),
    [
        (MoDeGPT(0.5), attention(), "size of a head is unknown"),
        (MoDeGPT(0.5, head_dim=10), attention(), "not whole heads of 10"),
        (MoDeGPT(0.5, head_dim=8), attention()[:3], "neither an MLP nor"),
        (MoDeGPT(0.5), mlp("gate_proj", "down_proj"), "neither an MLP nor"),
        (MoDeGPT(0.5), mlp("up_proj", "up_proj", "down_proj"), "neither an MLP nor"),
        (
            MoDeGPT(0.5),
            (*mlp("up_proj", channels=16), *mlp("down_proj")),
            "not an MLP of 40 channels",
        ),
        (
            MoDeGPT(0.5),
            (Member("mlp.up_proj", "weight", (2, 8, 8)), Member("mlp.down_proj", "weight", (8, 8))),
            "stacked experts",
        ),
    ],
)
def test_modegpt_says_what_does_not_fit(operator, members, says):
    assert says in operator.unfit_unit(members)


# Refusals


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LowRank(0.0), r"low_rank: keep .* got 0\.0"),
        (lambda: LowRank(1.5), "low_rank: keep"),
        (lambda: LowRank(0.5, "hessian"), "weighting must be one of plain, fisher.* 'hessian'"),
        (lambda: LowRank(0.5, multiple=0), "low_rank: multiple"),
        (lambda: Kronecker(), "either terms .* terms=0 and keep=0"),
        (lambda: Kronecker(2, 0.5), "either terms"),
        (lambda: Kronecker(2, rows_a=-1), "kronecker: rows_a"),
        (lambda: Kronecker(2, factors=GPTQ(4)), "kronecker: factors"),
        (lambda: Dictionary(2), "dictionary: keep"),
        (lambda: Dictionary(0.5, 0.5), "dictionary: ratio"),
        (lambda: Dictionary(0.5, iterations=0), "dictionary: iterations"),
        (lambda: Dictionary(0.5, factors=GPTQ(4)), "dictionary: factors"),
        (lambda: MoDeGPT(0), "modegpt: keep"),
        (lambda: MoDeGPT(0.5, 63), "modegpt: head_dim"),
        (lambda: MoDeGPT(0.5, multiple=0), "modegpt: multiple"),
        (lambda: MoDeGPT(0.5, values=GPTQ(4)), "modegpt: values"),
    ],
)
def test_fields_are_checked(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    "operator", [LowRank(0.5, "fisher"), LowRank(0.5, "corda"), Dictionary(0.5)]
)
def test_missing_statistics_are_named(operator):
    (kind,) = operator.needs
    with pytest.raises(ValueError, match=f"{operator.name} needs the {kind}"):
        operator.apply(random(16, 16), Statistics())
    members = mlp("up_proj", "down_proj")
    with pytest.raises(ValueError, match="modegpt needs the hessian"):
        MoDeGPT(0.5).pack_unit([random(*m.shape) for m in members], members, [Statistics()] * 2)


def test_labels_tell_operators_apart():
    operators = [
        LowRank(0.5),
        LowRank(0.25),
        LowRank(0.5, "corda"),
        LowRank(0.5, multiple=1),
        LowRank(0.5, factors=HALF),
        LowRank(0.5, factors=RoundToNearest(4)),
        Kronecker(2),
        Kronecker(keep=1),
        Kronecker(1),
        Kronecker(2, rows_a=2),
        Kronecker(2, columns_a=2),
        Dictionary(0.5),
        Dictionary(0.5, 3),
        Dictionary(0.5, iterations=3),
        MoDeGPT(0.5),
        MoDeGPT(0.5, multiple=4),
        MoDeGPT(0.5, values=RoundToNearest(4)),
    ]
    labels = {operator.label for operator in operators}
    assert len(labels) == len(operators)
    assert not any(" " in label for label in labels)
