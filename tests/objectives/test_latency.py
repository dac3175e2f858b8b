"""Measured time: of single matrices in formats that run here, and of whole assignments."""

import time

import pytest
import torch
from language import offering, random_model, random_tokens

from objectives.bank import Bank
from objectives.latency import (
    FORMATS,
    AssignmentLatency,
    measure_latencies,
    median_seconds,
    seconds_per_token,
)
from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import Keep, RoundToNearest

SHAPES = ((48, 128), (128, 64))
# What each format may lose of a random matrix, as a share of its outputs' size.
ERRORS = {
    "dense": 0.0,
    "int8": 0.01,
    "int4-g64": 0.1,
    "torchao-int8": 0.01,
    "torchao-dynamic-int8": 0.02,
}


class Clock:
    """A clock that only a measured call moves."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def needed(name):
    if name.startswith("torchao"):
        pytest.importorskip("torchao")


def test_every_format_is_tested():
    assert set(FORMATS) == set(ERRORS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ERRORS)
def test_formats_compute_the_product(name, dtype):
    """A format that computes something else would be timed in vain."""
    needed(name)
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 48, bias=False, dtype=dtype).requires_grad_(False)
    inputs = torch.randn(3, 128, dtype=dtype)
    with torch.inference_mode():
        expected = linear(inputs).float()
        found = FORMATS[name](linear)(inputs).float()
    rounding = 0.01 if dtype == torch.bfloat16 else 1e-6
    assert (found - expected).norm() <= (ERRORS[name] + rounding) * expected.norm()
    if ERRORS[name]:
        assert not torch.equal(found, expected)


def test_a_table_has_every_shape_under_every_label():
    formats = {"keep": "dense", "int4-g64": "int4-g64", "own": lambda linear: torch.nn.Identity()}
    found = measure_latencies(SHAPES, formats, num_tokens=2, num_runs=3)
    assert found.keys() == {(shape, label) for shape in SHAPES for label in formats}
    assert all(0 < seconds < 1 for seconds in found.values())


def test_the_median_of_the_runs_counts_and_the_first_do_not(monkeypatch):
    clock = Clock(monkeypatch)
    durations = iter([100.0, 50.0, 25.0, 3.0, 1.0, 2.0, 9.0, 4.0])

    def run():
        clock.now += next(durations)

    assert median_seconds(run, "cpu", num_runs=5) == 3.0
    assert next(durations, None) is None
    with pytest.raises(ValueError, match="at least one"):
        median_seconds(run, "cpu", num_runs=0)


def test_seconds_are_per_token_of_the_batch(monkeypatch):
    clock = Clock(monkeypatch)
    tokens = random_tokens().splits["search"]

    def model(input_ids):
        assert input_ids is tokens
        assert not torch.is_grad_enabled()
        clock.now += 4.8

    assert seconds_per_token(model, tokens, num_runs=2) == pytest.approx(4.8 / 48)


def test_an_assignment_is_timed_with_its_weights_swapped_in(monkeypatch):
    """As much time as there are matrices that are not dense, by a clock that knows."""
    clock = Clock(monkeypatch)
    model = random_model("llama")
    space = build_space(model, SpaceRequest())
    space = offering(space, RoundToNearest(2, 16), Keep())
    bank = Bank(model, space)
    names = [unit.members[0].name for unit in space.units]
    dense = {name: model.get_parameter(name).data.bfloat16().float() for name in names}

    def tick(module, args, output):
        live = [model.get_parameter(name) for name in names]
        changed = zip(live, dense.values(), strict=True)
        clock.now += 24 * sum(not torch.equal(now, before) for now, before in changed)

    model.register_forward_hook(tick)
    timed = AssignmentLatency(model, bank, random_tokens().splits["guard"], num_runs=2)
    assert timed((1,) * len(space.units)) == 0.0
    assert timed((0, 0) + (1,) * (len(space.units) - 2)) == pytest.approx(2.0)


def test_a_real_model_takes_time():
    model = random_model("llama")
    space = offering(build_space(model, SpaceRequest()), RoundToNearest(2, 16), Keep())
    timed = AssignmentLatency(model, Bank(model, space), random_tokens().splits["guard"])
    assert 0 < timed((0,) * len(space.units)) < 10


def test_what_does_not_run_here_is_refused_in_a_sentence():
    def broken(linear):
        raise NotImplementedError("no kernel\nfor this")

    with pytest.raises(ValueError, match=r"format of 'x' does not run here at 48x128: no kernel$"):
        measure_latencies(SHAPES, {"x": broken})
    with pytest.raises(ValueError, match="columns that 64 divides"):
        measure_latencies([(48, 100)], {"int4-g64": "int4-g64"})
    with pytest.raises(ValueError, match="unknown format 'int5'"):
        measure_latencies(SHAPES, {"int5": "int5"})
