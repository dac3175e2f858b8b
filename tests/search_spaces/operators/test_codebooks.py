"""Codebooks against the optimum, and sparse parts beside dense ones against a slow reference."""

import math

import numpy as np
import pytest
import torch
from matrices import NONE, SQUARE, bits_per_weight, draws, squared_error

from search_spaces.operators import (
    GPTQ,
    Codebook,
    DenseAndSparse,
    RoundToNearest,
    Statistics,
)


def fisher_like(matrix):
    """Heavy-tailed, as squared gradients are."""
    draw = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(8))
    return draw**8 * 1e-9


# Codebook


def least_error(row, counts, clusters):
    """Optimal one-dimensional k-means by dynamic programming over the sorted row."""
    order = np.argsort(row)
    x, w = row[order], counts[order]
    sums = [np.concatenate([[0], np.cumsum(term)]) for term in (w, w * x, w * x * x)]
    count, total, squares = (s[None, :] - s[:, None] for s in sums)
    inside = squares - np.divide(total**2, count, out=np.zeros_like(count), where=count > 0)
    begin, end = np.indices(inside.shape)
    cost = np.where(end > begin, np.maximum(inside, 0), np.where(end == begin, 0, np.inf))
    best = cost[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + cost).min(0)
    return best[-1]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebook_is_close_to_the_optimum_of_dynamic_programming(trained, bits, weighted):
    matrix = trained[:6].contiguous()
    counts = fisher_like(matrix) if weighted else torch.ones_like(matrix)
    found = Codebook(bits, weighted).apply(matrix, Statistics(fisher=counts))
    error = ((found - matrix).double().square() * counts).sum().item()
    best = sum(
        least_error(row, count, 2**bits)
        for row, count in zip(matrix.double().numpy(), counts.double().numpy(), strict=True)
    )
    assert 0.999 * best <= error <= 1.08 * best


def test_codebook_beats_quantiles_and_more_rounds_beat_fewer(trained):
    stats = Statistics(fisher=fisher_like(trained))
    places = (torch.arange(16) + 0.5) / 16
    quantiles = torch.quantile(trained, places, dim=1).T.contiguous()
    nearest = (trained.unsqueeze(-1) - quantiles.unsqueeze(1)).square().amin(-1)
    assert squared_error(Codebook(4, weighted=False), trained) < 0.5 * nearest.sum()

    def error(rounds):
        found = Codebook(4, iterations=rounds).apply(trained, stats)
        return ((found - trained).square() * stats.fisher).sum()

    assert error(10) < error(1)


def test_weighting_lowers_the_weighted_error_and_raises_the_plain_one(trained):
    stats = Statistics(fisher=fisher_like(trained))
    errors = {
        weighted: (Codebook(3, weighted).apply(trained, stats) - trained).square()
        for weighted in (True, False)
    }
    assert (errors[True] * stats.fisher).sum() < 0.8 * (errors[False] * stats.fisher).sum()
    assert errors[False].sum() < errors[True].sum()


def test_codebook_of_a_row_without_fisher_is_the_plain_one():
    matrix = draws(3, 200)
    fisher = fisher_like(matrix)
    fisher[1] = 0
    found = Codebook(3).apply(matrix, Statistics(fisher=fisher))
    plain = Codebook(3, weighted=False).apply(matrix, NONE)
    assert torch.equal(found[1], plain[1])
    assert not torch.equal(found[0], plain[0])


def test_codebook_does_not_depend_on_the_unit_of_the_fisher():
    matrix = draws(4, 300)
    fisher = fisher_like(matrix)
    found = [Codebook(4).apply(matrix, Statistics(fisher=fisher * 2.0**p)) for p in (0, -60, 40)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_codebook_keeps_rows_of_few_distinct_weights():
    matrix = draws(5, 1).half().float() * torch.tensor([-512.0, -1, 0, 0, 1, 1, 2, 4])
    for operator in (Codebook(3, weighted=False), Codebook(8, weighted=False)):
        assert torch.equal(operator.apply(matrix, NONE), matrix)
    assert not torch.equal(Codebook(2, weighted=False).apply(matrix, NONE), matrix)


def test_codebook_fits_every_row_alone_whatever_the_block():
    matrix = draws(2100, 512)  # more than one block of 2**20 weights
    found = Codebook(2, weighted=False).apply(matrix, NONE)
    for row in (0, 2047, 2048, 2099):
        alone = Codebook(2, weighted=False).apply(matrix[row : row + 1], NONE)
        assert torch.equal(found[row], alone[0])


def test_codebook_bytes():
    assert bits_per_weight(Codebook(3)) == 3 + 16 * 8 / 4096 == 3.03125
    assert bits_per_weight(Codebook(4)) == 4.0625
    assert Codebook(3).bytes((7, 13)) == math.ceil(7 * 13 * 3 / 8) + 2 * 7 * 8


# Dense and sparse


def test_dense_and_sparse_bytes_are_the_nested_ones_and_compressed_rows():
    num_weights = math.prod(SQUARE)
    for outliers, sensitive in ((0.0, 0.0005), (0.0045, 0.0), (0.0045, 0.0005)):
        nnz = round(num_weights * outliers) + round(num_weights * sensitive)
        for dense in (Codebook(3), RoundToNearest(4)):
            expected = dense.bytes(SQUARE) + 4 * 4097 + 4 * nnz
            assert DenseAndSparse(outliers, sensitive, dense).bytes(SQUARE) == expected
    # SqueezeLLM's own packing, 32-bit tables, values and indices: 3.102 and 3.358 bits.
    assert bits_per_weight(DenseAndSparse(0, 0.0005, Codebook(3))) == pytest.approx(
        3.0551, abs=1e-4
    )
    assert bits_per_weight(DenseAndSparse(0.0045, 0, Codebook(3))) == pytest.approx(
        3.1831, abs=1e-4
    )
    assert DenseAndSparse(0, 0, Codebook(3)).bytes(SQUARE) == Codebook(3).bytes(SQUARE)


def test_dense_and_sparse_against_taking_the_largest_one_by_one():
    matrix = draws(20, 96) ** 3
    stats = Statistics(fisher=fisher_like(matrix))
    found = DenseAndSparse(0.01, 0.005, RoundToNearest(3, 32)).apply(matrix, stats)

    left = matrix.clone().flatten()
    fisher = stats.fisher.clone().flatten()
    taken = []
    for _ in range(19):  # 1 % of 1920 weights
        taken.append(int(left.abs().argmax()))
        left[taken[-1]] = fisher[taken[-1]] = 0
    for _ in range(10):  # half a per cent, 9.6
        taken.append(int(fisher.argmax()))
        left[taken[-1]] = fisher[taken[-1]] = 0
    expected = RoundToNearest(3, 32).apply(left.reshape(20, 96), NONE).flatten()
    expected[taken] = matrix.flatten()[taken].half().float()
    assert torch.equal(found.flatten(), expected)
    assert len(set(taken)) == 29


def test_a_few_outliers_kept_apart_halve_the_error_of_heavy_tails():
    matrix = draws(64, 512) ** 3
    plain = squared_error(RoundToNearest(3, 128), matrix)
    assert squared_error(DenseAndSparse(0.01, 0, RoundToNearest(3, 128)), matrix) < 0.5 * plain


def test_what_is_taken_out_does_not_pull_the_codebook():
    matrix = draws(8, 256)
    fisher = fisher_like(matrix)
    operator = DenseAndSparse(0.02, 0.01, Codebook(3))
    packed = operator.pack(matrix, Statistics(fisher=fisher))
    taken = packed["columns"].long(), packed["row_pointers"].long().diff()
    rows = torch.arange(8).repeat_interleave(taken[1])
    rest, counts = matrix.clone(), fisher.clone()
    rest[rows, taken[0]] = counts[rows, taken[0]] = 0
    alone = Codebook(3).pack(rest, Statistics(fisher=counts))
    assert torch.equal(packed["dense.table"], alone["table"])
    assert not torch.equal(
        packed["dense.table"], Codebook(3).pack(rest, Statistics(fisher=fisher))["table"]
    )
    error = (operator.apply(matrix, Statistics(fisher=fisher)) - matrix)[rows, taken[0]]
    assert (error.abs() <= 2.0**-10 * matrix[rows, taken[0]].abs()).all()


def test_dense_and_sparse_with_gptq_is_exact_where_sparse():
    inputs = draws(400, 64, seed=4)
    matrix = draws(16, 64)
    matrix[3, 7], matrix[9, 40] = 30.0, -25.0
    stats = Statistics(hessian=inputs.T @ inputs / 400)
    operator = DenseAndSparse(0.002, 0.0, GPTQ(3, 32))
    found = operator.apply(matrix, stats)
    assert found[3, 7] == pytest.approx(30.0, rel=2**-10)
    assert found[9, 40] == pytest.approx(-25.0, rel=2**-10)
    assert squared_error(operator, matrix, stats) < squared_error(GPTQ(3, 32), matrix, stats)


def test_columns_beyond_16_bits_take_32_bit_indices():
    matrix = draws(2, 70_000)
    matrix[1, 69_999] = 50.0
    operator = DenseAndSparse(0.001, 0, RoundToNearest(2, 0))
    assert {t.name: t.dtype for t in operator.layout((2, 70_000))}["columns"] == "U32"
    assert operator.apply(matrix, NONE)[1, 69_999] == 50.0
    narrow = DenseAndSparse(0.001, 0, RoundToNearest(2, 0)).layout((2, 65_536))
    assert {t.name: t.dtype for t in narrow}["columns"] == "U16"


def test_dense_and_sparse_asks_only_for_what_it_uses():
    assert DenseAndSparse(0.01, 0, RoundToNearest(3)).needs == set()
    assert DenseAndSparse(0.01, 0.01, RoundToNearest(3)).needs == {"fisher"}
    assert DenseAndSparse(0.01, 0, Codebook(3)).needs == {"fisher"}
    assert DenseAndSparse(0.01, 0.01, GPTQ(3)).needs == {"fisher", "hessian"}
    assert Codebook(3, weighted=False).needs == set()
    matrix = draws(4, 64)
    DenseAndSparse(0.01, 0, RoundToNearest(3)).apply(matrix, NONE)
    for operator in (DenseAndSparse(0, 0.01, RoundToNearest(3)), Codebook(3)):
        with pytest.raises(ValueError, match=f"{operator.name} needs the fisher"):
            operator.apply(matrix, NONE)


# Messages


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Codebook(9), "codebook: bits must be 1 to 8, got 9"),
        (lambda: Codebook(3, iterations=0), "codebook: iterations must be >= 1, got 0"),
        (lambda: DenseAndSparse(-0.1, 0, Codebook(3)), "outliers must be 0 to 1, got -0.1"),
        (lambda: DenseAndSparse(0, 1.5, Codebook(3)), "sensitive must be 0 to 1, got 1.5"),
        (lambda: DenseAndSparse(0.6, 0.6, Codebook(3)), "at most 1, got 0.6 \\+ 0.6"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_labels():
    assert Codebook(3).label == "kmeans3-fisher"
    assert Codebook(3, weighted=False, iterations=4).label == "kmeans3-i4"
    nested = DenseAndSparse(0.0045, 0.0005, Codebook(3))
    assert nested.label == "kmeans3-fisher+out0.45%+sens0.05%"
