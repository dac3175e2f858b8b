"""What the searches on Optuna's samplers have in common, and each sampler once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from allocator.searches.cma import CMA, CMAOptions
from allocator.searches.gp import GP, GPOptions
from objectives.evaluation import Evaluation

from .zoo import drive, get_animal


def test_dearest_sampler_improves_resumes_and_keeps_the_threads():
    """The conformance tests of ``gp`` are slow; this is what they would show first."""
    animal = get_animal("plain")
    threads = torch.get_num_threads()
    search = GP(animal.setting)
    whole = drive(search, animal.measure, 28, 4)
    assert tuple(e.assignment for e in whole[:2]) == animal.setting.starts
    assert torch.get_num_threads() == threads
    assert animal.true_loss(search.best) < 0.98 * animal.true_loss(animal.dp)
    problem = animal.setting.problem
    assert all(problem.total_bytes(e.assignment) <= problem.budget_bytes for e in whole)
    journal = {evaluation.key: evaluation for evaluation in whole}
    again = GP(animal.setting)
    assert drive(again, lambda a, f: journal[Evaluation(a, f).key], 20, 4) == whole[:20]


def test_gaussian_process_ends_after_its_trials():
    animal = get_animal("plain")
    search = GP(animal.setting, GPOptions(most_trials=6, remeasure_every=0))
    # 6 trials, one of them the first start; the other start has no point
    assert len(drive(search, animal.measure, 100)) == 7
    assert search.ask(1, []) == []


def test_one_multiplier_is_drawn_at_random_by_cma():
    animal = get_animal("plain")
    depths = tuple(-1 if depth else 0 for depth in animal.setting.depths)
    setting = replace(animal.setting, kinds=("all",) * len(depths), depths=depths)
    search = CMA(setting, CMAOptions(num_bands=1))
    assert len({e.assignment for e in drive(search, animal.measure, 30)}) > 3


def test_messages_of_optuna_stay_away():
    """In a process of its own: one message comes while a module is first imported."""
    code = (
        "from tests.allocator.searches.zoo import drive, get_animal\n"
        "from allocator.searches import SEARCHES\n"
        "animal = get_animal('plain')\n"
        "for name in ('cma', 'gp', 'nsga2', 'nsga3', 'optspa', 'tpe'):\n"
        "    drive(SEARCHES[name](animal.setting), animal.measure, 16)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (CMAOptions, {"population": 2}, "population of at least 4"),
        (CMAOptions, {"log_range": -1.0}, "log range"),
        (GPOptions, {"most_trials": 0}, "at least one startup trial"),
        (GPOptions, {"num_bands": 0}, "depth band"),
    ],
)
def test_impossible_options_are_refused(options, changes, message):
    with pytest.raises(ValueError, match=message):
        options(**changes)
