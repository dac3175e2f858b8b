"""What model_guided alone promises: little text first, an end with a reason, local proposals."""

from dataclasses import replace

import pytest

from allocator.search_build import build_search
from allocator.searches.model_guided import ModelGuided, ModelGuidedOptions
from objectives.sensitivity import LossTable

from .zoo import drive, get_animal


def single_sequences():
    animal = get_animal("plain")
    return animal, replace(animal.setting, batch_sequences=1)


def test_the_reference_is_read_on_little_text_first_and_on_all_in_the_end():
    animal, setting = single_sequences()
    history = drive(ModelGuided(setting), animal.measure, 300, 1)
    first = setting.starts[0]
    read = [len({e.fidelity for e in history[:n] if e.assignment == first}) for n in (12, 60, 300)]
    assert read[0] == 8
    assert 8 < read[1] < setting.num_sequences
    assert read[2] == setting.num_sequences
    for index, evaluation in enumerate(history):  # nothing waits for its reference for long
        known = {e.fidelity for e in history[: index + 40] if e.assignment == first}
        assert evaluation.fidelity in known


def test_it_ends_when_nothing_is_expected_and_says_so():
    animal, setting = single_sequences()
    search = ModelGuided(setting, ModelGuidedOptions(patience=12))
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
        ModelGuidedOptions(patience=0)
    with pytest.raises(ValueError, match="first_sequences must be at least 1"):
        ModelGuidedOptions(first_sequences=0)
