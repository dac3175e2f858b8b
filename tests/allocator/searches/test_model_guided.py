"""What model_guided alone promises: slopes first, little text first, an end with a reason."""

from dataclasses import replace

import pytest

from allocator.search_build import build_search
from allocator.searches.descent import DescentOptions
from allocator.searches.model_guided import ModelGuided
from allocator.searches.posterior_sampling import SamplingOptions
from objectives.evaluation import Evaluation
from objectives.sensitivity import LossTable

from .zoo import drive, get_animal


def single_sequences():
    animal = get_animal("plain")
    return animal, replace(animal.setting, batch_sequences=1)


def test_the_reference_is_read_on_little_text_first_and_on_all_in_the_end():
    animal, setting = single_sequences()
    history = drive(ModelGuided(setting), animal.measure, 300, 1)
    first = setting.starts[0]
    read = [len({e.fidelity for e in history[:n] if e.assignment == first}) for n in (16, 80, 300)]
    assert read[0] == 8
    assert 8 < read[1] < setting.num_sequences
    assert read[2] == setting.num_sequences
    for index, evaluation in enumerate(history):  # nothing waits for its reference for long
        known = {e.fidelity for e in history[: index + 40] if e.assignment == first}
        assert evaluation.fidelity in known


def test_it_ends_when_nothing_is_expected_and_says_so():
    animal, setting = single_sequences()
    search = ModelGuided(setting, sampling=SamplingOptions(patience=12))
    assert search.ended == ""
    assert search.notes() == {}
    history = drive(search, animal.measure, 2000, 4)
    assert 100 < len(history) < 1500
    gain, noise = search.notes().values()
    assert gain < noise / 2
    assert "below the noise" in search.ended
    assert animal.true_loss(search.best) < 0.95  # of the start's


def test_a_run_hears_why_it_ended():
    animal, setting = single_sequences()
    table = LossTable("prior", "nats", setting.problem.losses)
    built = build_search("model_guided", setting, [table], records=NoRecords(), reporter=Silent())
    assert built.found().ended == ""
    drive(built.search, animal.measure, 2000, 4)
    assert "below the noise" in built.found().ended


class NoRecords:
    records = ()


class Silent:
    def note(self, text):
        """Nobody listens."""


def test_options_are_whole_and_positive():
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        SamplingOptions(patience=0)
    with pytest.raises(ValueError, match="first_sequences must be at least 1"):
        SamplingOptions(first_sequences=0)


def sloped_sequences():
    animal = get_animal("sloped")
    return animal, replace(animal.setting, batch_sequences=1)


def test_slopes_take_it_further_on_less_text():
    animal, setting = sloped_sequences()
    passes = {}
    for slopes in (True, False):
        search = ModelGuided(replace(setting, slopes=slopes))
        history, spent = [], 0
        while spent < 150:
            (proposal,) = search.ask(1, [])
            history.append(animal.measure(proposal.assignment, proposal.fidelity))
            search.tell(history[-1:])
            spent += proposal.fidelity.num_passes
        passes[slopes] = animal.true_loss(search.best)
    assert passes[True] < passes[False] < animal.true_loss(animal.dp)


def test_after_the_descent_it_samples_around_its_end():
    animal, setting = sloped_sequences()
    search = ModelGuided(setting, descent=DescentOptions(most_sequences=4))
    history = drive(search, animal.measure, 400, 4)
    with_slopes = [i for i, e in enumerate(history) if e.fidelity.slopes]
    assert 0 < max(with_slopes) < 350
    centre = history[max(with_slopes)].assignment
    later = [e.assignment for e in history[max(with_slopes) + 1 :]]
    assert later.count(centre) >= 4  # the new reference
    assert len(set(later)) > 20
    assert animal.true_loss(search.best) <= 1.02 * animal.true_loss(centre)


@pytest.mark.parametrize("how", ["failed", "ignored"])
def test_without_slopes_where_they_were_promised_it_samples(how):
    animal, setting = sloped_sequences()

    def measure(assignment, fidelity):
        if fidelity.slopes and how == "failed":
            return Evaluation(assignment, fidelity, error="OutOfMemoryError")
        return replace(animal.measure(assignment, fidelity), slopes=None)

    search = ModelGuided(setting)
    history = drive(search, measure, 100, 4)
    assert len(history) == 100
    assert sum(e.fidelity.slopes for e in history) <= 4  # what was under way
    assert animal.true_loss(search.best) < 1


def test_what_was_measured_before_is_where_the_descent_begins():
    animal, setting = sloped_sequences()
    good = drive(ModelGuided(setting), animal.measure, 120)[-1].assignment
    search = ModelGuided(setting)
    for assignment in (*setting.starts, good):
        search.tell([animal.measure(assignment, setting.fidelity(w)) for w in range(4)])
    assert search.ask(1, [])[0].assignment == good


def test_any_window_waits_between_rounds():
    animal, setting = sloped_sequences()
    search = ModelGuided(setting)
    asked = search.ask(50, [])
    assert len(asked) == 4  # two starts on two sequences
    assert search.ask(1, [p.assignment for p in asked]) == []
    search.tell([animal.measure(p.assignment, p.fidelity) for p in asked])
    asked = search.ask(50, [])
    assert len(asked) == 4  # slopes of the winner
    assert all(proposal.fidelity.slopes for proposal in asked)
    assert search.ask(1, []) == []
    search.tell([animal.measure(p.assignment, p.fidelity) for p in asked])
    step = search.ask(50, [])
    assert len(step) == 8  # the centre and a candidate, on the next four
    assert {p.fidelity.first for p in step}.isdisjoint(p.fidelity.first for p in asked)
