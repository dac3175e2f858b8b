"""Prefix reuse gives the numbers of a full forward, bit by bit, and runs no block it need not."""

import logging

import pytest
import torch
from language import MENU, offering, random_model, random_tokens
from tiny_models import FAMILIES
from torch import nn

from objectives.bank import Bank
from objectives.evaluation import Fidelity
from objectives.evaluator import Evaluator
from objectives.function_task import FunctionTask
from objectives.language_task import LanguageTask
from objectives.output_head import OutputHead, log_normaliser
from objectives.prefix import find_blocks
from objectives.task import TokenMeter
from search_spaces.build import SpaceRequest, build_space
from search_spaces.models.kv_layers import cache_units
from search_spaces.operators import Keep, KVQuantize
from search_spaces.space import SearchSpace, build_menu

ALL = Fidelity("search", 0, 4)
LENGTH = 12
TOKENS = 4 * LENGTH


def evaluators(model, space=None, **options):
    """The space, and an evaluator with and one without reuse on the same model."""
    space = space or offering(build_space(model, SpaceRequest()), *MENU)
    task, bank = LanguageTask(random_tokens(), batch_size=2), Bank(model, space)
    meter = TokenMeter(len(find_blocks(model, space)))
    return (
        space,
        Evaluator(model, task, bank, meter, **options),
        Evaluator(model, task, bank, meter, prefix_bytes=0),
    )


def stream(space, count, seed=0):
    """Assignments as a search would ask for them: one unit or a few changed, some far apart."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most):
        return int(torch.randint(most, (1,), generator=generator))

    current = [draw(len(menu)) for menu in space.menus]
    for index in range(count):
        child = list(current)
        for _ in range(len(child) if index % 7 == 6 else 1 + draw(3)):
            unit = draw(len(child))
            child[unit] = draw(len(space.menus[unit]))
        yield tuple(child)
        if index % 3 == 2:
            current = child


@pytest.mark.parametrize("family", list(FAMILIES))
def test_losses_are_those_of_a_full_forward_bit_by_bit(family):
    model = random_model(family, num_hidden_layers=4)
    space, reusing, plain = evaluators(model)
    ran = full = 0
    for assignment in stream(space, 20):
        ours, theirs = reusing(assignment, ALL), plain(assignment, ALL)
        assert ours == theirs  # rounded losses, and everything else
        ran, full = ran + ours.num_block_tokens, full + theirs.num_block_tokens
    assert full == 20 * TOKENS * 4
    assert ran < 0.85 * full, "these models pass nothing but outputs from block to block"


def test_unrounded_numbers_are_equal_too():
    model = random_model("llama", num_hidden_layers=4)
    space = offering(build_space(model, SpaceRequest()), *MENU)
    task, bank = LanguageTask(random_tokens(), batch_size=4), Bank(model, space)
    seen = []
    task_losses = task.sequence_losses
    task.sequence_losses = lambda *args: seen.append(task_losses(*args)) or seen[-1]
    for options in ({}, {"prefix_bytes": 0}):
        evaluate = Evaluator(model, task, bank, TokenMeter(), **options)
        for assignment in stream(space, 12):
            evaluate(assignment, ALL)
    assert seen[:12] == seen[12:]


@pytest.mark.parametrize("block", range(4))
def test_a_change_in_one_block_runs_that_block_and_those_after_it(block):
    model = random_model("llama", num_hidden_layers=4)
    space, evaluate, _ = evaluators(model)
    base = (0,) * len(space.units)
    evaluate(base, ALL)
    for unit, found in enumerate(space.units):
        if found.depth == block:
            changed = (*base[:unit], 1, *base[unit + 1 :])
            assert evaluate(changed, ALL).num_block_tokens == (4 - block) * TOKENS
    assert evaluate(base, ALL).num_block_tokens == 0


def test_other_tokens_share_nothing_and_other_batches_of_them_neither():
    model = random_model("llama", num_hidden_layers=2)
    space, evaluate, _ = evaluators(model)
    base = (0,) * len(space.units)
    evaluate(base, Fidelity("search", 0, 2))
    assert evaluate(base, Fidelity("search", 2, 2)).num_block_tokens == 2 * 2 * LENGTH
    assert evaluate(base, Fidelity("search", 1, 2)).num_block_tokens == 2 * 2 * LENGTH
    assert evaluate(base, ALL).num_block_tokens == 0  # the two batches of before


def test_opened_embeddings_invalidate_everything():
    model = random_model("llama", tie_word_embeddings=True)
    space = offering(build_space(model, SpaceRequest(open_units=("embeddings",))), *MENU)
    _, evaluate, plain = evaluators(model, space)
    unit = next(i for i, found in enumerate(space.units) if found.depth is None)
    base = (2,) * len(space.units)
    evaluate(base, ALL)
    changed = (*base[:unit], 0, *base[unit + 1 :])
    found = evaluate(changed, ALL)
    assert found == plain(changed, ALL)
    assert found.num_block_tokens == 2 * TOKENS


def test_caches_are_part_of_their_block():
    model = random_model("llama", num_hidden_layers=4)
    units = cache_units(model, LENGTH, apart=False)
    menus = tuple(build_menu(u, (KVQuantize(2, 2, 8), KVQuantize(4, 4, 8), Keep())) for u in units)
    _, evaluate, plain = evaluators(model, SearchSpace("caches", units, menus, ()))
    for assignment in [(0, 0, 0, 0), (0, 0, 1, 0), (0, 0, 1, 2), (2, 2, 2, 2), (0, 0, 0, 1)]:
        assert evaluate(assignment, ALL) == plain(assignment, ALL)
    assert evaluate((0, 0, 0, 2), ALL).num_block_tokens == TOKENS


@pytest.mark.parametrize("most_bytes", [1, 2_000, 20_000, 60_000])
def test_little_memory_costs_blocks_but_changes_no_number(most_bytes):
    model = random_model("llama", num_hidden_layers=4)
    space, evaluate, plain = evaluators(model, prefix_bytes=most_bytes)
    found = [evaluate(assignment, ALL) for assignment in stream(space, 20)]
    assert found == [plain(assignment, ALL) for assignment in stream(space, 20)]
    held = evaluate._prefix._boundaries
    assert held._held_bytes <= most_bytes
    assert held._held_bytes == sum(sum(path.values()) for path in held._paths.values())
    if most_bytes == 60_000:
        assert sum(e.num_block_tokens for e in found) < 20 * TOKENS * 4


def test_incumbent_outlives_many_offspring():
    """Its boundaries are used now and then, each other one only once."""
    model = random_model("llama", num_hidden_layers=4)
    one_path = 4 * TOKENS * 32 * 4
    space, evaluate, _ = evaluators(model, prefix_bytes=8 * one_path)
    base = (2,) * len(space.units)
    evaluate(base, ALL)
    first = next(i for i, unit in enumerate(space.units) if unit.depth == 0)
    last = next(i for i, unit in enumerate(space.units) if unit.depth == 3)
    for unit in [i for i, found in enumerate(space.units) if found.depth == 1]:
        for option in (0, 1, 3):
            evaluate((*base[:unit], option, *base[unit + 1 :]), ALL)
            evaluate((*base[:first], option, *base[first + 1 : unit], 0, *base[unit + 1 :]), ALL)
    changed = (*base[:last], 0, *base[last + 1 :])
    assert evaluate(changed, ALL).num_block_tokens == TOKENS


class Sharing(nn.Module):
    """A stack whose last block reads what its first one computed, past the outputs."""

    class Block(nn.Module):
        def __init__(self, shared, index):
            super().__init__()
            self.proj = nn.Linear(8, 8, bias=False)
            self.shared, self.index = shared, index

        def forward(self, x):
            if self.index == 0:
                self.shared["first"] = self.shared.get("first", 0) + x.detach().abs().mean()
            return x + self.proj(x) * (self.shared["first"] if self.index == 3 else 1.0)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shared = {}
        self.layers = nn.ModuleList(self.Block(shared, index) for index in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_model_that_shares_more_than_outputs_is_measured_in_full(caplog):
    model = Sharing()
    batches = [torch.randn(2, 5, 8) for _ in range(4)]
    splits = dict.fromkeys(("statistics", "search", "guard", "heldout"), batches)
    task = FunctionTask(lambda model, x: model(x).square().mean(), splits)
    space = offering(build_space(model, SpaceRequest()), *MENU)
    assert [unit.depth for unit in space.units] == [0, 1, 2, 3]
    evaluate = Evaluator(model, task, Bank(model, space), TokenMeter(4))
    with caplog.at_level(logging.WARNING):
        for assignment in ((0, 0, 0, 0), (0, 0, 0, 1)):
            assert evaluate(assignment, ALL).num_block_tokens == 4 * 4
    assert "no reuse" in caplog.text


def test_model_is_left_without_a_trace():
    model = random_model("llama")
    space, evaluate, _ = evaluators(model)
    evaluate((0,) * len(space.units), ALL)
    assert not model._forward_pre_hooks
    assert all("forward" not in vars(module) for module in model.modules())


def test_two_stacks_or_none_have_no_blocks_to_skip():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
            self.decoder = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})

    two = Two()
    assert find_blocks(two, build_space(two, SpaceRequest())) == ()
    flat = nn.Sequential(nn.Linear(4, 4))
    assert find_blocks(flat, build_space(flat, SpaceRequest())) == ()
    model = random_model("gpt2")
    assert find_blocks(model, build_space(model, SpaceRequest())) == tuple(model.transformer.h)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_logits_in_chunks_are_the_models_own(family, monkeypatch):
    """Gemma 2 caps its logits after the head, which is noticed."""
    model = random_model(family)
    tokens = random_tokens().splits["search"]
    monkeypatch.setattr("objectives.output_head._MOST_BYTES", 61 * 4 * 10)
    head = OutputHead(model)
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits.flatten(0, 1)
        for _ in range(2):
            parts = list(head.chunks(tokens))
            assert [rows.start for rows, _ in parts] == [0, 10, 20, 30, 40]
            torch.testing.assert_close(torch.cat([part for _, part in parts]), expected)
    assert (head._head is None) is (family == "gemma2")


def test_normaliser_needs_no_copy_of_all_logits():
    logits = 30 * torch.randn(300, 4096).bfloat16()
    torch.testing.assert_close(log_normaliser(logits), logits.float().logsumexp(-1))
