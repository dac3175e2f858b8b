"""Pooled pairs: features by their definition, slopes exact for one change, learned if planted."""

from itertools import combinations

import numpy as np
import pytest

from allocator.searches.interactions import Interactions
from allocator.searches.surrogate import Observation, Relatives, Spreads, Surrogate

CLASSES = ("q", "k", "down")
NUM_BLOCKS = 4
KINDS = (*CLASSES * NUM_BLOCKS, "embed")
DEPTHS = (*(unit // 3 for unit in range(3 * NUM_BLOCKS)), -1)
NUM_OPTIONS = 4
REFERENCE = (1,) * len(KINDS)


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    return [rng.uniform(0.5, 1.5) * 4.0 ** -np.arange(NUM_OPTIONS) for _ in KINDS]


def draw(rng):
    return tuple(int(i) for i in rng.integers(NUM_OPTIONS, size=len(KINDS)))


def pair_value(cells, assignment, one, other):
    """A product of two deviations, each in roots of its unit's smallest step, by definition."""
    value = 1.0
    for unit in (one, other):
        away = cells[unit] - cells[unit][REFERENCE[unit]]
        value *= away[assignment[unit]] / np.sqrt(np.abs(away[away != 0]).min())
    return value


def test_features_are_the_pooled_products(cells):
    assignment = draw(np.random.default_rng(1))
    found = Interactions(cells, KINDS, DEPTHS, REFERENCE).features(assignment)
    names = sorted(CLASSES)
    within = dict.fromkeys(combinations(names, 2), 0.0)
    blocks, between = np.zeros(NUM_BLOCKS), np.zeros(NUM_BLOCKS - 1)
    ordered = {(a, b): 0.0 for a in names for b in names}
    for one, other in combinations(range(len(KINDS)), 2):
        if min(DEPTHS[one], DEPTHS[other]) < 0:
            continue
        value = pair_value(cells, assignment, one, other)
        if DEPTHS[one] == DEPTHS[other]:
            within[tuple(sorted((KINDS[one], KINDS[other])))] += value
            blocks[DEPTHS[one]] += value
        elif DEPTHS[other] == DEPTHS[one] + 1:
            ordered[KINDS[one], KINDS[other]] += value
            between[DEPTHS[one]] += value
    expected = [*within.values(), *blocks, *ordered.values(), *between]
    assert np.allclose(found, expected, atol=1e-12)


def test_nothing_at_the_reference_and_across_gaps(cells):
    near = Interactions(cells, KINDS, DEPTHS, REFERENCE)
    assert not near.features(REFERENCE).any()
    far = Interactions(cells, KINDS, [3 * d for d in DEPTHS], REFERENCE)
    count = len(CLASSES)
    assert near.num_features == far.num_features == count * (count - 1) // 2 + 4 + count**2 + 3
    assignment = draw(np.random.default_rng(2))
    assert near.features(assignment)[-3:].any()
    assert not far.features(assignment)[-3 - count**2 :].any()


@pytest.mark.parametrize("seed", range(3))
def test_slopes_are_exact_for_one_change(cells, seed):
    rng = np.random.default_rng(seed)
    interactions = Interactions(cells, KINDS, DEPTHS, REFERENCE)
    weights, centre = rng.normal(size=interactions.num_features), draw(rng)
    slopes = interactions.slopes(weights, centre)
    at_centre = interactions.features(centre) @ weights
    for unit in range(len(KINDS)):
        for option in range(NUM_OPTIONS):
            changed = (*centre[:unit], option, *centre[unit + 1 :])
            expected = interactions.features(changed) @ weights - at_centre
            assert slopes[unit][option] - slopes[unit][centre[unit]] == pytest.approx(expected)


def test_a_planted_interaction_is_learned(cells):
    """Blocks lose more than the sum of their parts; a change is then dearer where others are."""
    rng = np.random.default_rng(0)
    interactions = Interactions(cells, KINDS, DEPTHS, REFERENCE)
    weights = np.zeros(interactions.num_features)
    weights[3 : 3 + NUM_BLOCKS] = 0.3  # after the pairs of three classes

    def loss(assignment):
        additive = sum(row[i] for row, i in zip(cells, assignment, strict=True))
        return additive + float(interactions.features(assignment) @ weights)

    errors = {}
    unseen = [draw(rng) for _ in range(50)]
    chosen = [draw(rng) for _ in range(120)]
    for pair in (0.0, 0.1):
        surrogate = Surrogate(
            cells,
            Relatives(KINDS, DEPTHS),
            reference=REFERENCE,
            reference_loss=4.0,
            spreads=Spreads(pair=pair, misfit=0.005),
        )
        for assignment in chosen:
            surrogate.add(Observation(assignment, loss(assignment), 1e-6))
        surrogate.tune()
        miss = []
        for centre in unseen:
            table = surrogate.table(centre=centre)
            unit = int(rng.integers(len(KINDS)))
            changed = (*centre[:unit], 0, *centre[unit + 1 :])
            step = table[unit][0] - table[unit][centre[unit]]
            miss.append(step - (loss(changed) - loss(centre)))
        errors[pair] = float(np.sqrt(np.mean(np.square(miss))))
    assert errors[0.1] < 0.5 * errors[0.0]


def test_pairs_stay_out_where_the_truth_is_a_sum(cells):
    """Noise must not be explained by pairs: the table is then the same around every assignment."""
    rng = np.random.default_rng(0)
    surrogate = Surrogate(
        cells, Relatives(KINDS, DEPTHS), reference=REFERENCE, reference_loss=4.0, spreads=Spreads()
    )
    for assignment in [draw(rng) for _ in range(80)]:
        total = sum(row[i] for row, i in zip(cells, assignment, strict=True))
        surrogate.add(Observation(assignment, total + 0.2 * rng.normal(), 0.2**2))
        if surrogate.num_observations % 20 == 0:
            surrogate.tune()
            for plain, around in zip(
                surrogate.table(), surrogate.table(centre=draw(rng)), strict=True
            ):
                assert np.array_equal(plain, around)
