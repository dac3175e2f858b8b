from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import optuna
import pytest

from allocator.searches.reduced import ReducedOptions, ReducedSpace
from allocator.searches.tpe import TPE, TPEOptions

from .zoo import drive, get_animal


def test_factors_are_kinds_and_bands_of_free_units():
    setting = get_animal("ragged").setting
    space = ReducedSpace.from_setting(setting, ReducedOptions(num_bands=4))
    kinds = [f"kind {kind}" for kind in sorted(set(setting.kinds))]
    assert space.factors == ("band 0", "band 1", "band 2", "band 3", *kinds)
    pinned = next(u for u, cost in enumerate(setting.problem.bytes) if len(cost) == 1)
    embedding = setting.depths.index(-1)
    per_unit = space.members.sum(1)
    assert per_unit[pinned] == 0
    assert per_unit[embedding] == 1
    assert np.delete(per_unit, [pinned, embedding]).tolist() == [2] * (len(per_unit) - 2)


def test_one_kind_or_one_band_is_no_factor():
    setting = get_animal("plain").setting
    setting = replace(setting, kinds=("all",) * len(setting.kinds))
    assert ReducedSpace.from_setting(setting, ReducedOptions(num_bands=1)).factors == ()
    assert ReducedSpace.from_setting(setting, ReducedOptions(num_bands=2)).factors == (
        "band 0",
        "band 1",
    )


def test_zero_decodes_to_the_dp_plan_and_a_factor_moves_bytes_to_its_units():
    animal = get_animal("plain")
    space = ReducedSpace.from_setting(animal.setting, ReducedOptions(num_bands=4))
    zero = np.zeros(len(space.factors))
    assert space.decode(zero) == animal.dp
    factor = space.factors.index("kind gate")
    zero[factor] = 1.5
    gates = np.flatnonzero(space.members[:, factor])
    assert sum(np.take(space.decode(zero), gates)) > sum(np.take(animal.dp, gates))


def test_best_is_measured_again_on_further_windows():
    animal = get_animal("plain")
    num_again = {}
    for every in (4, 0):
        search = TPE(animal.setting, TPEOptions(remeasure_every=every))
        history = drive(search, animal.measure, 40)
        num_again[every] = len({e.key for e in history}) - len({e.assignment for e in history})
    assert num_again[4] >= num_again[0] + 4


def test_small_space_is_exhausted():
    animal = get_animal("plain")
    problem = animal.setting.problem
    small = replace(
        problem,
        bytes=tuple(c[: 2 if u < 3 else 1] for u, c in enumerate(problem.bytes)),
        losses=tuple(t[: 2 if u < 3 else 1] for u, t in enumerate(problem.losses)),
    )
    setting = replace(animal.setting, problem=small, starts=((0,) * len(small.bytes),))
    assert 4 <= len(drive(TPE(setting), animal.measure, 300)) < 300


def test_optuna_is_left_as_it_was(capsys):
    before = optuna.logging.get_verbosity()
    animal = get_animal("plain")
    drive(TPE(animal.setting), animal.measure, 5)
    assert optuna.logging.get_verbosity() == before
    assert capsys.readouterr() == ("", "")


def test_importing_the_searches_does_not_import_optuna():
    code = "import sys, allocator.searches; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bands": 0}, "depth band"),
        ({"log_range": 0.0}, "log range"),
        ({"log_range": float("inf")}, "log range"),
        ({"remeasure_every": -1}, "must not be negative"),
        ({"num_ei_candidates": 0}, "one candidate"),
    ],
)
def test_impossible_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TPEOptions(**changes)
