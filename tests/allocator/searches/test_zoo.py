"""The zoo keeps its promises, so that passing on it means something."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from allocator.solvers.dynamic import DynamicProgram

from .zoo import ZOO, get_animal


@pytest.mark.parametrize("name", ZOO)
def test_table_is_wrong_and_truth_would_gain(name):
    animal = get_animal(name)
    problem = replace(animal.setting.problem, losses=animal.truth)
    ideal = DynamicProgram().solve(problem).choice
    assert animal.true_loss(animal.dp) == pytest.approx(1)
    assert animal.true_loss(ideal) < 0.85
    assert 30 <= len(animal.truth) <= 60


def test_zoo_is_varied():
    ragged = get_animal("ragged").setting
    assert {len(cost) for cost in ragged.problem.bytes} >= {1, 3, 4, 5}
    assert -1 in ragged.depths
    broken = get_animal("broken")
    assert not broken.is_broken(broken.dp)
    whole = get_animal("whole").setting
    assert whole.batch_sequences == whole.num_sequences


def test_measuring_repeats_and_is_noisy_between_sequences():
    animal = get_animal("plain")
    one = animal.measure(animal.dp, animal.setting.fidelity(0))
    assert one == animal.measure(animal.dp, animal.setting.fidelity(0))
    assert np.std(one.sequence_nats) > 0.05
