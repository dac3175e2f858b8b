"""Errors of blocks' outputs against blocks that are copied, compressed and run apart."""

from copy import deepcopy

import pytest
import torch
from dense_gradients import storable_model, with_caches
from language import random_tokens
from scoring import cells_of, context_of, make_context, table
from torch import nn

from objectives.function_task import FunctionTask
from objectives.sensitivity import SCORERS
from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import Keep, RoundToNearest

MENU = (RoundToNearest(2, 16), RoundToNearest(4, 16), Keep())
STACKS = {"llama": "model.layers", "gpt2": "transformer.h", "mixtral": "model.layers"}


def calls_of(model, path, task, sequences):
    """What a block is given and gives, for each sequence."""
    calls = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output)),
        with_kwargs=True,
    )
    with torch.no_grad():
        for index in sequences:
            task.likelihood_loss(model, "statistics", index)
    handle.remove()
    return calls


def hidden(output):
    return (output if isinstance(output, torch.Tensor) else output[0]).double()


@pytest.mark.parametrize(
    ("family", "ties"), [("llama", "vllm"), ("gpt2", "none"), ("mixtral", "vllm")]
)
def test_is_the_error_of_a_copy_of_the_block_with_one_unit_compressed(family, ties):
    context = make_context(storable_model(family), random_tokens(), MENU, needs=(), ties=ties)
    rows = table("block_output", context)
    model, stack = context.model, STACKS[family]
    for depth in (0, 1):
        path = f"{stack}.{depth}"
        calls = calls_of(model, path, context.task, context.sequences)
        for unit, row in enumerate(rows):
            if context.space.units[unit].depth != depth:
                continue
            for option in range(3):
                copy = deepcopy(model.get_submodule(path))
                made = context.bank.compressed(unit, option)
                for member, tensor in zip(context.space.units[unit].members, made, strict=True):
                    inside = member.name.removeprefix(f"{path}.")
                    copy.get_parameter(inside).data = tensor
                error = energy = 0.0
                for args, kwargs, output in calls:
                    with torch.no_grad():
                        wrong = hidden(copy(*args, **kwargs)) - hidden(output)
                    error += wrong.square().sum().item()
                    energy += hidden(output).square().sum().item()
                assert row[option] == pytest.approx(error / energy, rel=1e-4)
            assert row[2] == 0.0 < row[1] < row[0]


def test_tokens_of_the_blocks_that_run_again_are_counted():
    context = make_context(storable_model("llama"), random_tokens(), MENU, needs=())
    context.meter.num_blocks = 2
    list(SCORERS["block_output"]().losses(context, [(0, 0), (0, 1), (1, 0), (13, 0)]))
    assert context.meter.as_dict() == {"statistics": 3 * (12 + 4 * 12 // 2)}
    assert context.meter.block_counts["statistics"] == 3 * (2 * 12 + 4 * 12)


def test_units_outside_blocks_and_caches_are_refused():
    model, calibration = storable_model("llama"), random_tokens()
    context = make_context(model, calibration, MENU, needs=(), open_units=("embeddings",))
    unit = next(i for i, u in enumerate(context.space.units) if u.kind == "embeddings")
    with pytest.raises(ValueError, match=r"embed_tokens lies in no single decoder block; exclude"):
        list(SCORERS["block_output"]().losses(context, [(unit, 0)]))
    cached = with_caches(model, calibration, *MENU)
    with pytest.raises(ValueError, match=r"block_output: .* is a cache, which has no weights"):
        list(SCORERS["block_output"]().losses(cached, cells_of(cached)))


class Blocks(nn.Module):
    """Plain layers in a list, the last of which never runs and the first of which gives zeros."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3))
        nn.init.zeros_(self.layers[0].weight)

    def forward(self, inputs):
        return self.layers[1](inputs + self.layers[0](inputs))


def test_silent_blocks_lose_nothing_and_blocks_that_never_run_are_refused():
    model, batches = Blocks(), torch.randn(2, 5, 16)
    splits = dict.fromkeys(("statistics", "search", "guard", "heldout"), batches)
    task = FunctionTask(lambda m, b: m(b).square().mean(), splits)
    context = context_of(model, build_space(model, SpaceRequest()), task, needs=())
    score = SCORERS["block_output"]().losses
    silent, loss = score(context, [(0, 0), (1, 0)])
    assert silent == 0.0
    (made,), (dense,) = context.bank.compressed(1, 0), context.bank.dense(1)
    x = batches.flatten(0, 1).double()
    expected = (x @ (made - dense).double().T).square().sum() / (
        x @ dense.double().T
    ).square().sum()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"the model never runs layers\.2"):
        list(score(context, [(0, 0), (2, 0)]))
