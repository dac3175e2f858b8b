"""Quantiles of Wanda's scores against sorting them by hand, on models of several families."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from language import random_model, random_tokens

from objectives.bank import Bank
from objectives.importance_samples import importance_samples
from objectives.language_task import LanguageTask
from objectives.statistics import collect_statistics
from objectives.task import TokenMeter
from search_spaces.build import SpaceRequest, build_space


def scene(family, **request):
    model = random_model(family)
    space = build_space(model, SpaceRequest(**request))
    task = LanguageTask(random_tokens())
    statistics = collect_statistics(
        model, task, space, needs=("second_moment",), meter=TokenMeter()
    )
    return model, space, Bank(model, space), statistics


@pytest.mark.parametrize(
    ("family", "ties"), [("llama", "none"), ("llama", "vllm"), ("gpt2", "none")]
)
def test_samples_are_the_quantiles_of_all_scores_of_a_unit(family, ties):
    model, space, bank, statistics = scene(family, ties=ties)
    samples = importance_samples(space, bank, statistics, num_samples=16)
    assert len(samples) == len(space.units)
    assert max(len(unit.members) for unit in space.units) == (3 if ties == "vllm" else 1)
    for unit, sample in zip(space.units, samples, strict=True):
        scores = []
        for member in unit.members:
            weight = model.get_parameter(member.name).detach()
            weight = weight.T if member.transposed else weight
            norms = statistics[member.name].second_moment.sqrt()
            scores.extend((weight.abs() * norms).flatten().tolist())
        ordered = np.sort(scores)
        expected = [ordered[int((i + 0.5) / 16 * len(ordered))] for i in range(16)]
        assert sample.dtype == np.float64
        assert sample == pytest.approx(expected, rel=1e-6)
        assert (np.diff(sample) >= 0).all()


def test_small_units_repeat_their_scores():
    _, space, bank, statistics = scene("llama")
    samples = importance_samples(space, bank, statistics)
    assert {len(sample) for sample in samples} == {1024}
    assert len(set(samples[0].tolist())) <= space.units[0].num_weights


def test_model_is_left_as_it_was():
    model, space, bank, statistics = scene("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    importance_samples(space, bank, statistics, num_samples=4)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


def test_caches_and_hidden_inputs_are_refused():
    _, space, bank, statistics = scene("llama")
    name = space.units[1].members[0].name
    blind = statistics | {name: replace(statistics[name], second_moment=None)}
    with pytest.raises(ValueError, match=f"inputs of {name} cannot be observed"):
        importance_samples(space, bank, blind)
    _, cached, bank, statistics = scene("llama", space="kv", context=16)
    with pytest.raises(ValueError, match="is a cache"):
        importance_samples(cached, bank, statistics)
