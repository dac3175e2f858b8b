"""The surrogate against planted truths and against the textbook posterior."""

from dataclasses import replace

import numpy as np
import pytest

from allocator.searches.surrogate import Observation, Relatives, Spreads, Surrogate

NUM_UNITS, NUM_OPTIONS = 12, 4
KINDS = ("q", "k", "v") * 4
DEPTHS = tuple(unit // 3 for unit in range(NUM_UNITS))
CELLS = [(unit, option) for unit in range(NUM_UNITS) for option in range(NUM_OPTIONS)]
MIDDLE = (1,) * NUM_UNITS
SPREADS = Spreads(pair=0.0)
# Small enough that the table's clipping of factors never acts.
NARROW = Spreads(0.05, 0.05, 0.05, 0.05, 0.05, 0.05, pair=0.0, offset=0.05, misfit=0.02)


def prior_cells(seed=0):
    """Losses that fall with the option, as bits rise."""
    rng = np.random.default_rng(seed)
    return [rng.uniform(0.5, 1.5) * 4.0 ** -np.arange(NUM_OPTIONS) for _ in range(NUM_UNITS)]


def make(cells, spreads=SPREADS, reference=4.0):
    return Surrogate(
        cells, Relatives(KINDS, DEPTHS), reference=MIDDLE, reference_loss=reference, spreads=spreads
    )


def assignments(rng, count):
    return [tuple(int(i) for i in rng.integers(NUM_OPTIONS, size=NUM_UNITS)) for _ in range(count)]


def total(cells, assignment):
    return float(sum(row[i] for row, i in zip(cells, assignment, strict=True)))


def observe(surrogate, cells, chosen, *, noise=0.0, rng=None):
    for assignment in chosen:
        loss = total(cells, assignment) + (noise * rng.normal() if noise else 0.0)
        surrogate.add(Observation(assignment, loss, noise**2 + 1e-8))


def log_error(table, truth):
    """Root mean square error of the logarithm of each cell."""
    ratios = np.log(np.concatenate(table) / np.concatenate(truth))
    return float(np.sqrt((ratios**2).mean()))


def sum_error(table, truth, chosen):
    """Deviation of the error of whole assignments; a constant error decides nothing."""
    return float(np.std([total(table, a) - total(truth, a) for a in chosen]))


def test_without_data_the_table_is_the_prior():
    cells = prior_cells()
    for found, row in zip(make(cells).table(), cells, strict=True):
        assert np.allclose(found, row, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_more_measurements_recover_planted_corrections_better(seed):
    """Factors of a kind, of a unit and of single cells, none of which the prior knows."""
    rng = np.random.default_rng(seed)
    cells = prior_cells(seed)
    of_kind = dict(zip("qkv", rng.lognormal(0, 0.4, size=(3, NUM_OPTIONS)), strict=True))
    truth = [
        row * of_kind[kind] * rng.lognormal(0, 0.3) * rng.lognormal(0, 0.2, size=NUM_OPTIONS)
        for row, kind in zip(cells, KINDS, strict=True)
    ]
    surrogate = make(cells, replace(SPREADS, misfit=1e-3))
    chosen = assignments(rng, 150)
    unseen = assignments(rng, 100)
    cell_errors, sum_errors = [log_error(cells, truth)], [sum_error(cells, truth, unseen)]
    for batch in (chosen[:15], chosen[15:50], chosen[50:]):
        observe(surrogate, truth, batch, noise=0.01, rng=rng)
        table = surrogate.table()
        cell_errors.append(log_error(table, truth))
        sum_errors.append(sum_error(table, truth, unseen))
    assert cell_errors[0] > cell_errors[1] > cell_errors[2] > cell_errors[3]
    assert cell_errors[3] < 0.75 * cell_errors[0]
    assert sum_errors[0] > sum_errors[1] > sum_errors[2] > sum_errors[3]
    assert sum_errors[3] < 0.1 * sum_errors[0]


def test_one_cell_is_learned_through_its_relatives():
    """Units of one kind are measured; the unmeasured unit of that kind follows, others do not."""
    cells = prior_cells()
    truth = [row * (2.0 if kind == "q" else 1.0) for row, kind in zip(cells, KINDS, strict=True)]
    surrogate = make(cells)
    base = (NUM_OPTIONS - 1,) * NUM_UNITS
    measured = [unit for unit, kind in enumerate(KINDS) if kind == "q"][:3]
    singles = [tuple(0 if u == unit else i for u, i in enumerate(base)) for unit in measured]
    observe(surrogate, truth, [base, *singles])
    factors = [found[0] / row[0] for found, row in zip(surrogate.table(), cells, strict=True)]
    (last,) = (u for u, kind in enumerate(KINDS) if kind == "q" and u not in measured)
    others = [factor for factor, kind in zip(factors, KINDS, strict=True) if kind != "q"]
    assert min(factors[unit] for unit in measured) > 1.5
    assert factors[last] > 1.25
    assert factors[last] > max(others)


def test_an_option_is_learned_by_its_name_wherever_it_stands():
    """What two units showed of an option is known of all, also where menus are in other orders."""
    cells = [np.array([1.0, 0.5]) for _ in range(6)]
    labels = [("coarse", "fine") if unit % 2 else ("fine", "coarse") for unit in range(6)]
    kinds, depths = [str(unit) for unit in range(6)], list(range(6))
    surrogate = Surrogate(
        cells,
        Relatives(kinds, depths, labels),
        reference=(0,) * 6,
        reference_loss=6.0,
        spreads=SPREADS,
    )
    coarse = [names.index("coarse") for names in labels]
    fine = tuple(names.index("fine") for names in labels)
    for unit in (0, 1):
        choice = tuple(coarse[u] if u == unit else i for u, i in enumerate(fine))
        for assignment, factor in ((fine, 1.0), (choice, 2.0)):
            loss = total(cells, assignment) + (factor - 1) * cells[unit][coarse[unit]]
            surrogate.add(Observation(assignment, loss, 1e-6))
    factors = [found / row for found, row in zip(surrogate.table(), cells, strict=True)]
    for unit in range(2, 6):
        assert factors[unit][coarse[unit]] > 1.1
        assert factors[unit][coarse[unit]] > 1.1 * factors[unit][fine[unit]]


def dense_posterior(cells, spreads, reference, observations):
    """Mean and covariance of the cells, written out over all weights at once."""
    levels = [
        (spreads.overall, lambda u, o: 0),
        (spreads.option, lambda u, o: o),
        (spreads.kind, lambda u, o: (KINDS[u], o)),
        (spreads.depth, lambda u, o: (DEPTHS[u], o)),
        (spreads.unit, lambda u, o: u),
        (spreads.cell, lambda u, o: (u, o)),
    ]
    places, variances = [], []  # of each cell at each level, and of each weight
    for spread, key in levels:
        index = {}
        for unit, option in CELLS:
            place = index.setdefault(key(unit, option), len(variances))
            if place == len(variances):
                variances.append(spread**2)
            places.append(place)
    offset = len(variances)
    variances.append((spreads.offset * reference) ** 2)
    prior = np.concatenate(cells)
    loading = np.zeros((len(CELLS), len(variances)))
    loading[np.tile(np.arange(len(CELLS)), len(levels)), places] = np.tile(prior, len(levels))
    chosen = np.zeros((len(observations), len(prior)))
    for row, observation in enumerate(observations):
        chosen[row, np.arange(NUM_UNITS) * NUM_OPTIONS + observation.assignment] = 1
    features = chosen @ loading
    features[:, offset] = 1
    same = np.array([[a.assignment == b.assignment for b in observations] for a in observations])
    noise = np.diag([o.variance for o in observations])
    noise = noise + same * (spreads.misfit * reference) ** 2
    weights = np.diag(variances)
    gain = weights @ features.T @ np.linalg.inv(features @ weights @ features.T + noise)
    losses = np.array([o.loss for o in observations])
    mean = prior + loading @ gain @ (losses - chosen @ prior)
    return mean, loading @ (weights - gain @ features @ weights) @ loading.T


@pytest.fixture
def informed():
    """A surrogate after 12 noisy measurements, two of them of one assignment."""
    rng = np.random.default_rng(5)
    cells = prior_cells()
    truth = [row * rng.normal(1.0, 0.08, size=NUM_OPTIONS) for row in cells]
    chosen = assignments(rng, 11)
    observations = [
        Observation(a, total(truth, a) + 0.05 * rng.normal(), 0.05**2) for a in [*chosen, chosen[0]]
    ]
    surrogate = make(cells, NARROW)
    for observation in observations:
        surrogate.add(observation)
    return surrogate, dense_posterior(cells, NARROW, 4.0, observations)


def test_posterior_mean_is_the_textbooks(informed):
    surrogate, (mean, _) = informed
    assert np.allclose(np.concatenate(surrogate.table()), mean, rtol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_posteriors_mean_and_covariance(informed, temperature):
    surrogate, (mean, covariance) = informed
    rng = np.random.default_rng(0)
    count = 4000
    drawn = np.array(
        [np.concatenate(surrogate.table(rng, temperature=temperature)) for _ in range(count)]
    )
    deviations = temperature * np.sqrt(covariance.diagonal())
    # Five standard errors of a mean, and of a standard deviation, of so many samples.
    assert (np.abs(drawn.mean(0) - mean) < 5 * deviations / np.sqrt(count)).all()
    assert np.allclose(drawn.std(0), deviations, rtol=5 / np.sqrt(2 * count))
    correlated = np.corrcoef(drawn.T)
    exact = covariance / np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal()))
    assert np.abs(correlated - exact).max() < 5 / np.sqrt(count)
    assert np.abs(exact - np.eye(len(exact))).max() > 0.2, "nothing to get wrong"


def test_measuring_narrows_the_posterior(informed):
    _, (_, covariance) = informed
    surrogate = make(prior_cells(), NARROW)
    rng = np.random.default_rng(0)
    wide = np.array([np.concatenate(surrogate.table(rng)) for _ in range(500)]).var(0)
    assert covariance.diagonal().sum() < 0.9 * wide.sum()
    for level in (surrogate.table(np.random.default_rng(3)), surrogate.table()):
        assert all((row > 0).all() for row in level)


def test_cells_stay_positive_and_bounded_whatever_is_measured():
    cells = prior_cells()
    surrogate = make(cells)
    low, high = assignments(np.random.default_rng(0), 2)
    surrogate.add(Observation(low, -50.0, 1e-6))
    surrogate.add(Observation(high, 500.0, 1e-6))
    for rng in (None, np.random.default_rng(0)):
        for found, row in zip(surrogate.table(rng), cells, strict=True):
            assert (found >= 0.05 * row).all()
            assert (found <= 20 * row).all()


def test_equal_seeds_draw_equal_tables(informed):
    surrogate, _ = informed
    first, second, other = (
        np.concatenate(surrogate.table(np.random.default_rng(seed))) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_confirmed_is_preferred_to_lucky():
    """One glance at little text saw a slightly smaller loss than many looks at the other."""
    cells = prior_cells()
    rng = np.random.default_rng(1)
    confirmed, lucky = (1,) * NUM_UNITS, (1,) * (NUM_UNITS - 1) + (2,)
    surrogate = make(cells, replace(SPREADS, misfit=0.1))
    for _ in range(8):
        surrogate.add(Observation(confirmed, 3.0 + 0.01 * rng.normal(), 0.2**2))
    surrogate.add(Observation(lucky, 2.9, 0.5**2))
    assignment, mean, deviation = surrogate.best()
    assert assignment == confirmed
    assert mean == pytest.approx(3.0, abs=0.05)
    assert 0 < deviation < 0.2
    # Enough more looks at the other that agree with the first, and it is the best.
    for _ in range(12):
        surrogate.add(Observation(lucky, 2.6, 0.1**2))
    assert surrogate.best()[0] == lucky


def test_a_clearly_better_newcomer_is_best_at_once():
    surrogate = make(prior_cells())
    old, new = (1,) * NUM_UNITS, (2,) * NUM_UNITS
    for _ in range(5):
        surrogate.add(Observation(old, 3.0, 0.1**2))
    surrogate.add(Observation(new, 1.0, 0.1**2))
    assert surrogate.best()[0] == new
    assert surrogate.ranked() == [new, old]


def test_best_of_nothing_is_nothing():
    assert make(prior_cells()).best() is None


def test_units_with_menus_of_different_length():
    cells = [np.array([1.0]), np.array([2.0, 0.5, 0.1]), np.array([1.0, 0.3])]
    surrogate = Surrogate(
        cells,
        Relatives("qkv", (-1, 0, 0)),
        reference=(0, 0, 0),
        reference_loss=3.0,
        spreads=SPREADS,
    )
    surrogate.add(Observation((0, 1, 0), 5.0, 1e-4))
    table = surrogate.table(np.random.default_rng(0))
    assert [len(row) for row in table] == [1, 3, 2]
    assert sum(row[i] for row, i in zip(surrogate.table(), (0, 1, 0), strict=True)) > 2.5
