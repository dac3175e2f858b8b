"""What is measured on the bench is what applying the plan gives."""

import numpy as np
import pytest
import torch
from plan_factory import in_turn, make_plan, tiny_gpt2, tiny_llama

from allocator.apply import apply_plan
from allocator.bench import Bench
from objectives.calibration import Calibration
from objectives.evaluation import Fidelity
from objectives.language_task import LanguageTask
from search_spaces.build import SpaceRequest, build_space


def make_tokens():
    generator = torch.Generator().manual_seed(2)
    names = ("statistics", "search", "guard", "heldout")
    return Calibration.from_tensors(
        {name: torch.randint(0, 80, (3, 10), generator=generator) for name in names}
    )


@pytest.mark.parametrize("open_units", [(), ("embeddings",)])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_swapped_model_is_the_applied_plan(make, open_units):
    """The same weights bit by bit, and so the same losses."""
    live, task = make(), LanguageTask(make_tokens(), top_k=0)
    space = build_space(live, SpaceRequest(open_units=open_units))
    bench = Bench.build(live, task, space)
    rng = np.random.default_rng(0)
    for _ in range(3):
        assignment = tuple(int(rng.integers(len(menu))) for menu in space.menus)
        measured = bench.evaluator(assignment, Fidelity("search", 0, 3))
        applied, choose = make(), in_turn(*space.operators(assignment))
        apply_plan(applied, make_plan(applied, choose, open_units=open_units))
        theirs = applied.state_dict()
        for name, tensor in live.state_dict().items():
            assert torch.equal(tensor, theirs[name]), name
        direct = task.sequence_losses(applied, "search", (0, 1, 2))
        assert measured.sequence_nats == pytest.approx(direct.nats, rel=1e-5, abs=1e-9)


def test_what_is_not_searched_is_rounded_to_its_stored_type_once():
    live, before = tiny_llama(), tiny_llama().state_dict()
    space = build_space(live, SpaceRequest())
    Bench.build(live, LanguageTask(make_tokens()), space)
    fixed = {tensor.name for tensor in space.fixed}
    assert fixed
    for name, tensor in live.named_parameters():
        expected = before[name].bfloat16().float() if name in fixed else before[name]
        assert torch.equal(tensor, expected), name
