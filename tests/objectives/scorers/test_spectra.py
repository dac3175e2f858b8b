"""Spectra: tail exponents and ranks against plain loops and known laws."""

from math import log, log10

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import normal, toy_context, with_spectrum

from objectives.sensitivity.spectral_tail import SpectralTail, tail_exponent
from objectives.sensitivity.spectrum_energy import SpectrumEnergy, elbow_rank, energy_rank


def slow_exponent(eigenvalues):
    """AlphaPruning's exponent in loops, of ascending eigenvalues."""
    logs = [log10(e) for e in eigenvalues]
    width = (logs[-1] - logs[0]) / 100
    counts = [0] * 100
    for value in logs:
        counts[min(int((value - logs[0]) / width), 99)] += 1
    peak = 10 ** (logs[0] + width * counts.index(max(counts)))
    best = None
    for start, cut in enumerate(eigenvalues[:-1]):
        if not 0.95 * peak <= cut <= 1.5 * peak:
            continue
        tail = eigenvalues[start:]
        exponent = 1 + len(tail) / sum(log(e / cut) for e in tail)
        distance = max(
            abs(1 - (e / cut) ** (1 - exponent) - i / len(tail)) for i, e in enumerate(tail)
        )
        if best is None or distance < best[0]:
            best = (distance, exponent)
    return best[1]


def test_exponents_are_those_of_the_definition():
    blocks = [
        [normal(40, 24, seed=s) ** 3, 0.1 * normal(20, 50, seed=s + 50)] for s in range(0, 8, 2)
    ]
    found = SpectralTail().importances(toy_context(blocks))
    means = [
        np.mean(
            [slow_exponent(torch.linalg.svdvals(w.double()).square().flip(0).tolist()) for w in b]
        )
        for b in blocks
    ]
    assert 1 / found[::2] == pytest.approx(means, rel=1e-6)
    assert len({round(mean, 3) for mean in means}) == 4


@pytest.mark.parametrize("seed", range(30))
def test_the_cut_is_that_of_the_least_distance(seed):
    eigenvalues = np.sort(np.random.default_rng(seed).lognormal(0, 1.5, 300))
    assert tail_exponent(eigenvalues) == pytest.approx(slow_exponent(eigenvalues.tolist()))


@pytest.mark.parametrize("exponent", [2.0, 3.0, 5.0])
def test_exponent_of_a_power_law_is_recovered(exponent):
    share = (np.arange(4000) + 0.5) / 4000
    eigenvalues = 7 * (1 - share) ** (-1 / (exponent - 1))
    assert tail_exponent(eigenvalues) == pytest.approx(exponent, rel=0.05)


def test_exponents_do_not_depend_on_scale_or_rounding_errors():
    eigenvalues = np.sort(np.random.default_rng(0).pareto(2, 200) + 1)
    expected = tail_exponent(eigenvalues)
    assert tail_exponent(1e-6 * eigenvalues) == pytest.approx(expected)
    noise = np.full(500, 1e-14)
    assert tail_exponent(np.concatenate([noise, eigenvalues])) == pytest.approx(expected)


@pytest.mark.parametrize("eigenvalues", [[0.0, 0.0], [0.0, 3.0], [2.0, 2.0, 2.0], [1.0, 2.0, 2.0]])
def test_spectra_without_a_tail_are_refused(eigenvalues):
    assert np.isnan(tail_exponent(np.array(eigenvalues)))


def test_what_has_no_tail_is_named():
    context = toy_context([[normal(8, 8)], [torch.zeros(8, 8)]])
    with pytest.raises(ValueError, match=r"spectrum of blocks\.1\.0\.weight has no tail"):
        SpectralTail().importances(context)


def test_ratios_are_linear_in_the_exponent():
    space = toy_context([[normal(8, 8)], [normal(8, 8)], [normal(8, 24)]]).space
    ratios = SpectralTail(epsilon=0.2).ratios([1 / 2, 1 / 3, 1 / 6], space, 0.5)
    raw = np.array([0.8, 0.8 + 0.4 / 4, 1.2])
    assert ratios == pytest.approx(raw * 0.5 * 5 / (raw @ [1, 1, 3]))


spectra = st.lists(st.floats(0, 100), min_size=1, max_size=12).filter(lambda x: max(x) > 1e-3)


@given(spectra, st.floats(0.05, 0.999))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_energy_rank_is_the_least_that_suffices(values, share):
    eigenvalues = np.array(sorted(values, reverse=True))
    rank = energy_rank(eigenvalues, share)
    total = eigenvalues.sum()
    assert eigenvalues[:rank].sum() >= (share - 1e-12) * total
    assert rank == 1 or eigenvalues[: rank - 1].sum() < (share + 1e-12) * total


@given(spectra)
@settings(derandomize=True, max_examples=100, deadline=None)
def test_elbow_lies_farthest_from_the_chord(values):
    eigenvalues = np.array(sorted(values, reverse=True))
    count, total = len(values), eigenvalues.sum()
    # Distance of (rank / count, energy) from the line between (0, 0) and (1, 1), up to sqrt(2).
    heights = [eigenvalues[:r].sum() / total - r / count for r in range(count + 1)]
    assert heights[elbow_rank(eigenvalues)] == pytest.approx(max(heights[1:]), abs=1e-12)


@pytest.mark.parametrize(
    ("rule", "ranks"), [("energy", (2, 4)), ("elbow", (1, 3)), ("both", (1, 3))]
)
def test_importance_is_the_share_of_two_factors(rule, ranks):
    # Energies of 0.81, 0.16, 0.02, 0.01 and of 0.29, 0.28, 0.27, 0.16.
    steep, even = [0.9, 0.4, 0.02**0.5, 0.1], [0.29**0.5, 0.28**0.5, 0.27**0.5, 0.4]
    wide = torch.cat([with_spectrum(steep), torch.zeros(4, 8)], dim=1)
    context = toy_context([[wide], [with_spectrum(even)]])
    importances = SpectrumEnergy(rule, 0.9).importances(context)
    assert importances == pytest.approx([ranks[0] * 16 / 48, ranks[1] * 8 / 16])


def test_wrong_fields_are_refused():
    with pytest.raises(ValueError, match="rule must be energy, elbow, both, got 'knee'"):
        SpectrumEnergy("knee")
    with pytest.raises(ValueError, match="energy must be above 0 to 1, got 0"):
        SpectrumEnergy(energy=0)
