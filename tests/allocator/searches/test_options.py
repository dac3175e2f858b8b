"""Options of searches by name: what each search offers, what becomes of words, what is refused."""

from __future__ import annotations

import pytest

from allocator.searches import SEARCHES, check_options, make_search
from allocator.searches.descent import DescentOptions
from allocator.searches.evolution_options import EvolutionOptions
from allocator.searches.options import configured, options_of, parse_options
from allocator.searches.surrogate_nsga2 import SurrogateNSGA2Options

from .zoo import get_animal


def made(name, **values):
    return configured(name, SEARCHES[name], values)


@pytest.mark.parametrize("name", SEARCHES)
def test_every_default_can_be_said_and_changes_nothing(name):
    options = options_of(SEARCHES[name])
    assert bool(options) == (name != "random")
    words = [f"{key}={option}" for key, option in options.items() if not option.published]
    values = parse_options(w.replace("default|published", "default") for w in words)
    for found in configured(name, SEARCHES[name], values).values():
        assert found == type(found)()
    check_options(name, values)


def test_values_arrive_as_the_dataclass_wants_them():
    found = made(
        "evolution", survivors="4,1", batches="1,2", same_size_only=True, num_generations=3
    )
    assert found == {
        "options": EvolutionOptions(survivors=(4, 1), same_size_only=True, num_generations=3)
    }
    assert made("evolution", survivors=1, batches=2)["options"].survivors == (1,)
    assert made("surrogate_nsga2", mutated_units="none")["options"].mutated_units is None
    assert made("surrogate_nsga2", smoothing=1)["options"].smoothing == 1.0
    assert made("formula", spreads="0.1,0.2", groups="unit")["options"].groups == ("unit",)


def test_a_search_of_two_parts_takes_its_options_by_part():
    found = configured("model_guided", SEARCHES["model_guided"], {"descent.attempts": 3})
    assert found == {"descent": DescentOptions(attempts=3)}
    deep = {"sampling.spreads.kind": 0.7, "sampling.patience": 9}
    sampling = configured("model_guided", SEARCHES["model_guided"], deep)["sampling"]
    assert (sampling.spreads.kind, sampling.patience) == (0.7, 9)


def test_published_schedules_have_a_name():
    assert made("surrogate_nsga2", schedule="published")["options"] == (
        SurrogateNSGA2Options.published()
    )
    published = EvolutionOptions.published("sparsity", tokens_per_batch=4096)
    asked = {"schedule": "published", "kind": "sparsity", "tokens_per_batch": 4096}
    assert made("evolution", **asked)["options"] == published
    assert made("evolution", **asked, num_batches=500)["options"] == published.rescaled(500)
    assert made("evolution", **asked, rounds=4)["options"].rounds == 4


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("evolution", {"same_size": True}, "did you mean 'same_size_only'.*known: num_offspring"),
        ("evolution", {"num_offspring": "many"}, "num_offspring: expected a whole number, got 'm"),
        ("evolution", {"num_offspring": True}, "expected a whole number, got 'true'"),
        ("evolution", {"num_offspring": 2.5}, "expected a whole number, got '2.5'"),
        ("evolution", {"same_size_only": 1}, "expected true or false"),
        ("evolution", {"survivors": "2,x"}, "expected a whole number or several with commas"),
        ("evolution", {"num_generations": "x"}, "expected a whole number or none"),
        ("evolution", {"num_offspring": 0}, "evolution: expected at least one offspring"),
        ("evolution", {"kind": "bits"}, "add schedule=published"),
        ("evolution", {"schedule": "published"}, r"needs kind=bits\|sparsity\|drop"),
        ("evolution", {"schedule": "publishd"}, "expected default or published"),
        ("surrogate_nsga2", {"smoothing": float("inf")}, "expected a number"),
        ("nsga2", {"latency": "1,2"}, "unknown option"),
        ("random", {"seed": 1}, "random has no options"),
        ("model_guided", {"attempts": 1}, "known: opening.first_sequences"),
        ("evolution,random", {"rounds": 2}, "such as evolution.rounds"),
        ("evolution", {"rounds": 2, "evolution.rounds": 3}, "given twice"),
    ],
)
def test_what_a_search_cannot_take_is_refused(name, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_options(name, values)


def test_both_forms_make_the_same_search():
    setting = get_animal("plain").seeded(0)
    asked = [
        make_search("evolution", setting, options).ask(20, [])
        for options in ({"num_initial": 3}, {"evolution.num_initial": 3}, {})
    ]
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]


def test_words_are_numbers_truth_values_or_words():
    found = parse_options(["a=1", "b = 0.5", "c=true", "d=1,2", "e=null", "f=x=y", "g=NaN"])
    assert found == {"a": 1, "b": 0.5, "c": True, "d": "1,2", "e": "null", "f": "x=y"} | {
        "g": found["g"]
    }
    for wrong in (["a"], ["=1"], ["a="], ["a=1", "a=2"]):
        with pytest.raises(ValueError, match="--search-option"):
            parse_options(wrong)


@pytest.mark.parametrize(
    ("name", "option", "sentence"),
    [
        ("model_guided", "sampling.spreads.noise=0", "noise must be at least 0.001"),
        ("model_guided", "sampling.spreads.unit=-1", "unit must be finite and at least 0"),
        ("model_guided", "sampling.temperature=-1", "temperature must be finite"),
        ("model_guided", "sampling.shrink=0", "shrink must be above 0"),
        ("model_guided", "sampling.first_changes=0.05", "least_changes <= first_changes"),
        ("model_guided", "descent.damping=0", "damping must be positive"),
        ("model_guided", "descent.race_sequences=-3", "race_sequences must be at least 1"),
        ("model_guided", "descent.level=5", "level must be 0 to below 0.5"),
        ("model_guided", "descent.most_sequences=1", "at least first_sequences"),
        ("formula", "spreads=-1", "spreads above 0"),
        ("formula", "crossover=7", "crossover of 0 to 1"),
        ("tpe", "log_range=500", "log range of 0 to 50"),
    ],
)
def test_values_out_of_range_are_refused_before_a_search(name, option, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_options(name, parse_options([option]))
