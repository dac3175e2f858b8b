"""The local table and the descent, against numbers by hand and on a problem with known slopes."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from allocator.problem import Problem
from allocator.search_build import refit
from allocator.searches.descent import Descent, DescentOptions
from allocator.searches.local_table import LocalTable
from allocator.searches.thinning import Thinned
from objectives.evaluation import Evaluation, Fidelity, Slopes

from .zoo import get_animal, make_animal, sloped

PROBLEM = Problem(
    (np.array([1, 2, 4]), np.array([1, 3]), np.array([2, 5])),
    (np.array([4.0, 2.0, 0.0]), np.array([2.0, 0.0]), np.array([1.0, 0.5])),
    9,
)
CENTRE = (1, 0, 0)


def told(assignment=CENTRE, nats=((1.0, 0.0, -2.0), (0.0, -1.0), ()), first=0, loss=2.5):
    slopes = Slopes(nats, ((0.5, 0.0, 1.0), (0.0, 1.0), ()))
    return Evaluation(assignment, Fidelity("search", first, 1, slopes=True), (loss,), slopes=slopes)


def test_changes_are_slopes_and_damped_curvature():
    table = LocalTable(PROBLEM, trust=0.0)
    table.tell(told())
    rows = table.changes(damping=2.0)
    scale = 2.5 / (2.0 + 2.0 + 1.0)  # the measured loss over the prior's at the centre
    assert rows[0] == pytest.approx([1 + 2 * 4 * scale * 0.5, 0.0, -2 + 2 * 2 * scale * 1.0])
    assert rows[1] == pytest.approx([0.0, -1 + 2 * 2 * scale])
    assert rows[2] == pytest.approx([0.0, -0.5 * scale])  # no slopes: the prior's difference
    trusting = LocalTable(PROBLEM, trust=0.5)
    trusting.tell(told())
    more = trusting.changes(damping=2.0)
    assert more[0] - rows[0] == pytest.approx([0.5 * 2 * scale, 0.0, -0.5 * 2 * scale])
    assert more[2] == pytest.approx(rows[2])


def test_slopes_at_one_centre_are_averaged_and_earlier_ones_fade():
    table = LocalTable(PROBLEM, memory=0.5, trust=0.0)
    table.tell(told())
    table.tell(told(nats=((3.0, 0.0, 0.0), (0.0, -3.0), ()), first=1))
    rows = table.changes(damping=0.0)
    assert rows[0] == pytest.approx([2.0, 0.0, -1.0])
    assert rows[1] == pytest.approx([0.0, -2.0])
    moved = (2, 0, 0)
    table.tell(told(moved, nats=((0.0, 0.0, 0.0), (0.0, -1.0), ())))
    assert table.centre == moved
    rows = table.changes(damping=0.0)
    # two earlier sequences count as one; counted from the new centre's option
    assert rows[0] == pytest.approx([(2.0 + 1.0) / 2, (0.0 + 1.0) / 2, 0.0])
    assert rows[1] == pytest.approx([0.0, (-2.0 - 1.0) / 2])


def test_losses_around_the_centre_are_positive_and_add_up_there():
    animal = get_animal("sloped")
    table = LocalTable(animal.setting.problem)
    fidelity = Fidelity("search", 0, 8, slopes=True)
    measured = animal.measure(animal.dp, fidelity)
    table.tell(measured)
    around = table.around(animal.setting)
    assert around.starts[0] == animal.dp
    assert all((row > 0).all() for row in around.problem.losses)
    at_centre = around.problem.total_loss(animal.dp)
    assert measured.loss_nats <= at_centre < 1.5 * measured.loss_nats


def run(animal, setting, options, passes):
    """Drive a descent until it ends or has read so much; its centres' true losses."""
    descent, spent, losses = Descent(setting, options), 0, []
    while spent < passes and (proposal := descent.ask()) is not None:
        spent += proposal.fidelity.num_passes
        assert setting.problem.total_bytes(proposal.assignment) <= setting.problem.budget_bytes
        descent.tell(animal.measure(proposal.assignment, proposal.fidelity))
        if descent.table.centre is not None:
            losses.append(animal.true_loss(descent.table.centre))
    return descent, losses


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_it_descends_and_ends(batch):
    animal = get_animal("sloped")
    setting = replace(animal.setting, batch_sequences=batch)
    descent, losses = run(animal, setting, DescentOptions(), 5000)
    assert descent.ended
    assert descent.ask() is None
    assert losses[-1] < 0.87 * losses[0]


def test_it_begins_at_the_best_start():
    animal = get_animal("sloped")
    first, *others = animal.setting.starts
    setting = replace(animal.setting, starts=(*others, first), batch_sequences=1)
    assert animal.true_loss(others[0]) > animal.true_loss(first)
    descent, losses = run(animal, setting, DescentOptions(), 60)
    assert losses[-1] <= animal.true_loss(first)
    assert descent.table.centre not in others


def test_a_failed_candidate_shortens_the_step():
    animal = get_animal("sloped")
    setting = replace(animal.setting, batch_sequences=1)
    descent = Descent(setting)
    while (proposal := descent.ask()).fidelity.slopes or proposal.assignment in setting.starts:
        descent.tell(animal.measure(proposal.assignment, proposal.fidelity))
    before, first = descent.damping, proposal.assignment
    for _ in range(4):
        descent.tell(Evaluation(proposal.assignment, proposal.fidelity, error="OutOfMemoryError"))
        proposal = descent.ask() or proposal
    assert descent.damping > before
    assert proposal.assignment != first

    def changed(assignment):
        pairs = zip(assignment, descent.table.centre, strict=True)
        return sum(a != b for a, b in pairs)

    assert changed(proposal.assignment) <= changed(first)


def races(animal, options, offset, most=200):
    """Drive a descent whose candidates all lose so much more than the truth; sequences of each.

    ``offset`` is added to what candidates lose on each sequence; none of them is ever a start.
    """
    setting = replace(animal.setting, batch_sequences=1)
    descent, read = Descent(setting, options), {}
    for _ in range(most):
        if (proposal := descent.ask()) is None:
            break
        found = animal.measure(proposal.assignment, proposal.fidelity)
        if not proposal.fidelity.slopes and proposal.assignment not in setting.starts:
            read[proposal.assignment] = read.get(proposal.assignment, 0) + 1
            values = tuple(nats + next(offset) for nats in found.sequence_nats)
            found = replace(found, sequence_nats=values)
        descent.tell(found)
    return descent, list(read.values())


def test_a_candidate_is_dropped_as_soon_as_it_is_clearly_worse():
    animal = get_animal("sloped")
    options = DescentOptions(first_sequences=16, rung_sequences=4, patience=1)
    _, dropped = races(animal, options, itertools.repeat(100.0))
    assert dropped == [4, 4]  # both attempts, one rung each
    _, read = races(animal, replace(options, level=0.0), itertools.repeat(100.0))
    assert read == [16, 16]
    _, close = races(animal, options, itertools.cycle([90.0, -80.0]))
    assert close == [16, 16]  # worse in the mean, never significantly


def test_a_candidate_is_taken_as_soon_as_it_is_clearly_better():
    animal = get_animal("sloped")
    options = DescentOptions(first_sequences=16, rung_sequences=4)
    slopes = options.first_sequences
    descent, read = races(animal, options, itertools.repeat(-100.0), most=slopes + 2 * 4)
    assert read == [4]
    following = descent.ask()
    assert following.fidelity.slopes
    assert following.assignment not in animal.setting.starts


def test_what_others_measured_is_ignored():
    animal = get_animal("sloped")
    descent = Descent(animal.setting)
    asked = descent.ask()
    descent.tell(animal.measure(animal.dp, Fidelity("search", 3, 2)))
    descent.tell(animal.measure(asked.assignment, asked.fidelity))
    assert not descent.ended


def test_a_thinned_search_hears_slopes_of_what_is_left():
    animal = get_animal("sloped")
    kept = tuple((0, *range(2, len(row))) for row in animal.setting.problem.bytes)
    heard = []

    class Listening:
        def tell(self, evaluations):
            heard.extend(evaluations)

    assignment = tuple(0 for _ in kept)
    full = animal.measure(assignment, Fidelity("search", 0, 1, slopes=True))
    Thinned(Listening(), kept).tell([full])
    assert heard[0].slopes.nats[0] == full.slopes.nats[0][:1] + full.slopes.nats[0][2:]


def test_refit_is_around_the_last_slopes():
    animal = get_animal("sloped")
    setting = animal.setting
    at = setting.starts[1]
    evaluations = [
        animal.measure(at, Fidelity("search", 0, 8, slopes=True)),
        animal.measure(setting.starts[0], Fidelity("search", 0, 8)),
    ]
    rows = refit(setting, evaluations)
    assert sum(float(row[i]) for row, i in zip(rows, at, strict=True)) == pytest.approx(
        evaluations[0].loss_nats, rel=0.2
    )
    plain = refit(setting, [replace(e, slopes=None) for e in evaluations])
    assert plain is not None
    assert not np.allclose(rows[0], plain[0])


def test_options_have_to_make_sense():
    with pytest.raises(ValueError, match="attempts must be at least 1, got 0"):
        DescentOptions(attempts=0)
    with pytest.raises(ValueError, match="bolder < 1 < calmer"):
        DescentOptions(bolder=1.5)


@pytest.mark.parametrize("num_sequences", [1, 2, 4, 7])
@pytest.mark.parametrize("batch", [1, 4])
def test_it_ends_on_little_text(num_sequences, batch):
    """Nothing is left to measure when both sides of a race are known on its text."""
    for seed in range(4):
        animal = sloped(make_animal(seed, 1, num_sequences=num_sequences, batch_sequences=1))
        setting = replace(animal.setting, batch_sequences=min(batch, num_sequences))
        descent = Descent(setting)
        while (proposal := descent.ask()) is not None:
            descent.tell(animal.measure(proposal.assignment, proposal.fidelity))
        assert descent.ended


def test_every_sequence_of_the_split_is_read():
    animal = sloped(make_animal(0, 1, num_sequences=7, batch_sequences=1))
    descent, read = Descent(replace(animal.setting, batch_sequences=4)), set()
    while (proposal := descent.ask()) is not None:
        read.update(proposal.fidelity.indices(7))
        descent.tell(animal.measure(proposal.assignment, proposal.fidelity))
    assert read == set(range(7))
