"""The universal stack: every prefix is a model, the plan is one of them, the bytes are exact."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cli_runs import MODEL, search, succeed
from plan_factory import as_loaded, in_turn, make_plan, tiny_gpt2, tiny_llama
from safetensors.torch import load_file, save_file
from test_apply import state, tiny_mixtral
from transformers import AutoModelForCausalLM

from allocator.apply import apply_plan, read_packed, write_packed
from allocator.exporters import EXPORTERS, Exporter, Mismatch
from allocator.exporters.base import ModelExporter
from allocator.exporters.bitstack import read_order, read_stack, write_stack
from allocator.plan import load_plan
from search_spaces.operators import Keep, LowRankPlus, ResidualStack, RoundToNearest, Statistics

# Levels of every height, two ranks, and units that are stored otherwise.
STACKS = (
    ResidualStack(3, 4),
    ResidualStack(1, 4),
    RoundToNearest(4, 32),
    ResidualStack(2, 8),
    Keep(),
)
NUM_LEVELS = 5


@pytest.fixture
def exporter():
    return EXPORTERS["bitstack"]()


def rule(plan):
    """The plan's operator by unit name."""
    return {entry.name: entry.choice for entry in plan.units}


def plan_at(model, plan, levels, **options):
    """The plan that one would have made at these levels."""
    chosen = rule(plan)

    def choose(unit):
        operator = chosen[unit.name]
        if not isinstance(operator, ResidualStack):
            return operator
        return ResidualStack(levels[unit.name], operator.rank, operator.scaled)

    return make_plan(model, choose, **options)


def rewrite(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_is_an_exporter_of_models(exporter):
    assert isinstance(exporter, Exporter)
    assert isinstance(exporter, ModelExporter)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mixtral])
def test_every_prefix_is_the_plan_of_its_levels(make, exporter, tmp_path):
    dense = make()
    before = state(dense)
    plan = make_plan(dense, in_turn(*STACKS), ties="vllm")
    receipt = write_stack(plan, dense, tmp_path / "new", statistics={}, num_levels=NUM_LEVELS)
    assert [path.name for path in receipt.files] == ["stack.json", "stack.safetensors"]
    assert sorted((tmp_path / "new").iterdir()) == sorted(receipt.files)
    assert_equal(state(dense), before)
    assert exporter.verify(plan, tmp_path / "new") == []
    stack = read_order(tmp_path / "new")
    stacked = [o for o in rule(plan).values() if isinstance(o, ResidualStack)]
    assert len(stack.blocks) == (NUM_LEVELS - 1) * len(stacked)
    sizes = [stack.stored_bytes(n) for n in range(len(stack.blocks) + 1)]
    assert all(less < more for less, more in pairwise(sizes))
    for num_blocks in range(0, len(stack.blocks) + 1, 3):
        loaded, applied = make(seed=1), make()
        found = read_stack(tmp_path / "new", loaded, num_blocks=num_blocks)
        smaller = plan_at(dense, plan, found.levels, ties="vllm")
        assert found.stored_bytes == sizes[num_blocks] == smaller.achieved_bytes
        apply_plan(applied, smaller)
        assert_equal(state(loaded), state(applied))


def test_the_plan_is_a_prefix_and_serves_its_own_budget(tmp_path):
    dense = tiny_llama()
    plan = make_plan(dense, in_turn(*STACKS))
    write_stack(plan, dense, tmp_path, statistics={}, num_levels=NUM_LEVELS)
    stack = read_order(tmp_path)
    assert stack.plan == plan
    assert stack.stored_bytes(stack.plan_num_blocks) == plan.achieved_bytes
    by_blocks, by_bytes, applied = tiny_llama(seed=1), tiny_llama(seed=2), tiny_llama()
    read_stack(tmp_path, by_blocks, num_blocks=stack.plan_num_blocks)
    found = read_stack(tmp_path / "stack.json", by_bytes, budget_bytes=plan.achieved_bytes)
    assert found.num_blocks == stack.plan_num_blocks
    assert found.levels == {
        name: o.levels for name, o in rule(plan).items() if isinstance(o, ResidualStack)
    }
    apply_plan(applied, plan)
    for model in (by_blocks, by_bytes):
        assert_equal(state(model), state(applied))


def test_a_prefix_is_the_packed_file_to_the_byte(tmp_path):
    """What is loaded for a budget weighs what the packed file of that plan weighs."""
    dense = tiny_llama()
    plan = make_plan(dense, in_turn(*STACKS))
    write_stack(plan, dense, tmp_path, statistics={}, num_levels=NUM_LEVELS)
    stack = read_order(tmp_path)
    sizes = [stack.stored_bytes(n) for n in range(len(stack.blocks) + 1)]
    for num_blocks in (0, 7, len(stack.blocks)):
        for budget in (sizes[num_blocks], sizes[num_blocks] + 1, (*sizes, 2**40)[num_blocks + 1]):
            found = read_stack(tmp_path, tiny_llama(), budget_bytes=budget)
            assert found.num_blocks == num_blocks + (budget in sizes[num_blocks + 1 :])
        smaller = plan_at(dense, plan, stack.levels(num_blocks))
        path = tmp_path / "packed.safetensors"
        write_packed(dense, smaller, path)
        assert path.stat().st_size == sizes[num_blocks]
        packed, loaded = tiny_llama(seed=1), tiny_llama(seed=2)
        read_packed(path, smaller, packed)
        read_stack(tmp_path, loaded, num_blocks=num_blocks)
        assert_equal(state(packed), state(loaded))


def test_more_blocks_come_closer(tmp_path):
    dense = tiny_llama()
    plan = make_plan(dense, lambda unit: ResidualStack(2, 8))
    write_stack(plan, dense, tmp_path, statistics={})
    stack = read_order(tmp_path)
    assert stack.num_levels == 16
    errors = []
    for num_blocks in (0, stack.plan_num_blocks, 3 * stack.plan_num_blocks, len(stack.blocks)):
        loaded = tiny_llama(seed=1)
        read_stack(tmp_path, loaded, num_blocks=num_blocks)
        weights = zip(state(loaded).values(), state(dense).values(), strict=True)
        errors.append(sum((a - b).square().sum().item() for a, b in weights))
    assert all(more < less for less, more in pairwise(errors)), errors
    assert errors[-1] < 0.01 * errors[0]


def test_scaled_levels_go_through_statistics(tmp_path):
    dense = tiny_llama()
    plan = make_plan(dense, lambda unit: ResidualStack(2, 4, scaled=True))
    with pytest.raises(ValueError, match="needs statistics of the calibration text"):
        write_stack(plan, dense, tmp_path / "none", statistics={})
    assert not list((tmp_path / "none").iterdir())
    members = [member for entry in plan.units for member in entry.unit.members]
    statistics = {
        m.name: Statistics(torch.rand(m.shape[1], generator=torch.Generator().manual_seed(i)))
        for i, m in enumerate(members)
    }
    write_stack(plan, dense, tmp_path, statistics=statistics, num_levels=4)
    loaded, applied = tiny_llama(seed=1), tiny_llama()
    read_stack(tmp_path, loaded, budget_bytes=plan.achieved_bytes)
    apply_plan(applied, plan, statistics)
    assert_equal(state(loaded), state(applied))


# Order


def blocks(folder):
    return [(block.unit, block.level) for block in read_order(folder).blocks]


def test_blocks_go_level_by_level_to_the_plan_and_on(exporter, tmp_path):
    plan = make_plan(tiny_llama(), in_turn(*STACKS))
    exporter.write(plan, tmp_path)
    stack, order = read_order(tmp_path), blocks(tmp_path)
    levels = [level for _, level in order]
    assert stack.num_levels == 16
    to_the_plan = levels[: stack.plan_num_blocks]
    assert to_the_plan == sorted(to_the_plan)
    assert set(to_the_plan) == {2, 3}
    assert levels[stack.plan_num_blocks :] == sorted(levels[stack.plan_num_blocks :])
    assert len(set(order)) == len(order)


def test_losses_decide_the_order(tmp_path):
    """Always the block that saves most per byte among those whose turn it is."""
    dense = tiny_llama(layers=1)
    plan = make_plan(dense, in_turn(ResidualStack(3, 4), ResidualStack(1, 4)))
    generator = torch.Generator().manual_seed(0)
    losses = {
        entry.name: sorted(torch.rand(6, generator=generator).tolist(), reverse=True)
        for entry in plan.units
    }
    write_stack(plan, dense, tmp_path, statistics={}, num_levels=6, losses=losses)
    stack = read_order(tmp_path)
    sizes = [stack.stored_bytes(n) for n in range(len(stack.blocks) + 1)]
    levels = dict.fromkeys(losses, 1)
    top = {entry.name: entry.choice.levels for entry in plan.units}
    for num_blocks, block in enumerate(stack.blocks):
        if num_blocks == stack.plan_num_blocks:
            assert levels == top
            top = dict.fromkeys(losses, 6)
        payload = {
            entry.name: entry.unit.bytes(ResidualStack(2, 4))
            - entry.unit.bytes(ResidualStack(1, 4))
            for entry in plan.units
        }
        savings = {
            name: (losses[name][level - 1] - losses[name][level]) / payload[name]
            for name, level in levels.items()
            if level < top[name]
        }
        assert savings[block.unit] == max(savings.values())
        levels[block.unit] += 1
        assert sizes[num_blocks + 1] > sizes[num_blocks]
    assert EXPORTERS["bitstack"]().verify(plan, tmp_path) == []
    other = tmp_path / "other"
    write_stack(plan, dense, other, statistics={}, num_levels=6)
    assert blocks(other) != blocks(tmp_path)
    assert sorted(blocks(other)) == sorted(blocks(tmp_path))


def test_missing_losses_are_named(tmp_path):
    dense = tiny_llama(layers=1)
    plan = make_plan(dense, lambda unit: ResidualStack(2, 4))
    name = plan.units[0].name
    short = {entry.name: [1.0, 0.5, 0.2] for entry in plan.units}
    with pytest.raises(ValueError, match=f"loss of '{name}' at 1 to 4 levels, got 3"):
        write_stack(plan, dense, tmp_path, statistics={}, num_levels=4, losses=short)
    with pytest.raises(ValueError, match="levels, got 0"):
        write_stack(plan, dense, tmp_path, statistics={}, num_levels=4, losses={})


def test_a_plan_deeper_than_asked_is_stored_whole(tmp_path):
    dense = tiny_llama(layers=1)
    plan = make_plan(dense, in_turn(ResidualStack(4, 4), ResidualStack(1, 4)))
    write_stack(plan, dense, tmp_path, statistics={}, num_levels=2)
    assert read_order(tmp_path).num_levels == 4
    flat = make_plan(dense, lambda unit: ResidualStack(1, 4))
    write_stack(flat, dense, tmp_path / "flat", statistics={}, num_levels=1)
    assert blocks(tmp_path / "flat") == []
    read_stack(tmp_path / "flat", dense, budget_bytes=flat.achieved_bytes)


# Refusals


def test_refuses_a_plan_without_stacks(exporter, tmp_path):
    """A stack inside another operator is that operator's own and does not count."""
    nested = LowRankPlus(4, ResidualStack(2, 4))
    plan = make_plan(tiny_llama(), in_turn(RoundToNearest(4, 32), nested))
    with pytest.raises(ValueError, match="nothing to stack"):
        exporter.write(plan, tmp_path)
    assert not list(tmp_path.iterdir())


def test_refuses_another_model(exporter, tmp_path):
    plan = make_plan(tiny_llama(), in_turn(*STACKS))
    with pytest.raises(ValueError, match=r"layers\.2"):
        exporter.write_model(plan, as_loaded(tiny_llama(layers=3)), tmp_path, {})
    assert not list(tmp_path.iterdir())
    write_stack(plan, tiny_llama(), tmp_path, statistics={}, num_levels=3)
    with pytest.raises(ValueError, match=r"layers\.2"):
        read_stack(tmp_path, tiny_llama(layers=3), num_blocks=0)


def test_says_what_it_cannot_write_or_read(exporter, tmp_path):
    dense = tiny_llama(layers=1)
    plan = make_plan(dense, in_turn(*STACKS))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write"):
        exporter.write(plan, tmp_path / "file")
    with pytest.raises(ValueError, match="cannot write"):
        write_stack(plan, dense, tmp_path / "file", statistics={})
    with pytest.raises(ValueError, match="cannot read"):
        exporter.verify(plan, tmp_path)
    exporter.write(plan, tmp_path)
    with pytest.raises(ValueError, match=r"cannot read the stack .*stack\.safetensors"):
        read_stack(tmp_path, dense, num_blocks=0)
    (tmp_path / "stack.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot read the stack"):
        exporter.verify(plan, tmp_path)
    (tmp_path / "stack.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a stack"):
        exporter.verify(plan, tmp_path)


def test_refuses_what_no_prefix_serves(tmp_path):
    dense = tiny_llama(layers=1)
    plan = make_plan(dense, in_turn(*STACKS))
    write_stack(plan, dense, tmp_path, statistics={}, num_levels=3)
    stack = read_order(tmp_path)
    before = state(dense)
    for options, says in (
        ({"budget_bytes": stack.least_bytes - 1}, f"it starts at {stack.least_bytes}"),
        ({"num_blocks": -1}, f"num_blocks must be 0 to {len(stack.blocks)}, got -1"),
        ({"num_blocks": len(stack.blocks) + 1}, "num_blocks must be 0 to"),
        ({}, "either budget_bytes or num_blocks"),
        ({"num_blocks": 1, "budget_bytes": 1}, "either budget_bytes or num_blocks"),
    ):
        with pytest.raises(ValueError, match=says):
            read_stack(tmp_path, dense, **options)
    assert_equal(state(dense), before)


def swap(data):
    first = next(i for i, b in enumerate(data["blocks"]) if b["level"] == 3)
    unit = data["blocks"][first]["unit"]
    second = next(i for i, b in enumerate(data["blocks"]) if b["unit"] == unit)
    data["blocks"][first]["level"], data["blocks"][second]["level"] = 2, 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swap, "is out of order"),
        (lambda data: data["blocks"].pop(), "has 15 of 16 levels"),
        (lambda data: data["blocks"][0].update(unit="nobody"), "'nobody' is out of order"),
        (lambda data: data.update(plan_num_blocks=10**6), "there are no 1000000 blocks"),
        (lambda data: data.update(colour=1), "Extra inputs"),
        (lambda data: data["plan"].update(achieved_bytes=1), "achieved_bytes says 1"),
    ],
)
def test_refuses_orders_that_cannot_be_loaded(exporter, tmp_path, change, says):
    plan = make_plan(tiny_llama(), in_turn(*STACKS))
    (path,) = exporter.write(plan, tmp_path).files
    rewrite(path, change)
    with pytest.raises(ValueError, match=says):
        exporter.verify(plan, path)


# Verifying


def test_finds_every_unit_that_differs(exporter, tmp_path):
    dense = tiny_llama()
    plan = make_plan(dense, in_turn(*STACKS))
    exporter.write(plan, tmp_path)
    for index in range(len(plan.units)):
        turn = iter(range(len(plan.units)))
        operators = [STACKS[i % 5] if i != index else RoundToNearest(3, 32) for i in turn]
        (mismatch,) = exporter.verify(make_plan(dense, in_turn(*operators)), tmp_path)
        assert mismatch == Mismatch(plan.units[index].name, "int3-g32", STACKS[index % 5].label)


def test_finds_units_that_only_one_of_the_two_has(exporter, tmp_path):
    dense = tiny_llama()
    exporter.write(make_plan(dense, lambda unit: ResidualStack(2, 4)), tmp_path)
    name = "model.layers.1.self_attn.q_proj"
    plan = make_plan(dense, lambda unit: ResidualStack(2, 4), exclude=[name])
    assert set(exporter.verify(plan, tmp_path)) == {
        Mismatch(name, "not in the plan", "stack2-r4"),
        Mismatch(f"{name}.weight", "stored", "absent"),
    }


def test_finds_wrong_bytes_and_a_wrong_place_of_the_plan(exporter, tmp_path):
    plan = make_plan(tiny_llama(), in_turn(*STACKS))
    (path,) = exporter.write(plan, tmp_path).files
    stack = read_order(path)
    right = stack.stored_bytes(4)
    rewrite(path, lambda data: data["blocks"][3].update(stored_bytes=right - 1))
    assert exporter.verify(plan, path) == [
        Mismatch("4 blocks", f"{right} bytes", f"{right - 1} bytes")
    ]
    with pytest.raises(ValueError, match="for 4 blocks, there are"):
        read_stack(path, tiny_llama(), num_blocks=4)
    exporter.write(plan, tmp_path)
    rewrite(path, lambda data: data.update(plan_num_blocks=stack.plan_num_blocks - 1))
    last = stack.blocks[stack.plan_num_blocks - 1]
    (mismatch,) = exporter.verify(plan, path)
    assert mismatch.unit == last.unit


def test_finds_weights_that_are_not_the_stack(exporter, tmp_path):
    dense = tiny_llama(layers=1)
    plan = make_plan(dense, in_turn(*STACKS))
    write_stack(plan, dense, tmp_path, statistics={}, num_levels=4)
    assert exporter.verify(plan, tmp_path / "stack.json") == []
    path = tmp_path / "stack.safetensors"
    tensors = load_file(path)
    name = f"{plan.units[0].members[0].module}.weight.left"
    save_file({**tensors, name: tensors[name][:3].clone()}, path)
    (mismatch,) = exporter.verify(plan, tmp_path)
    assert mismatch == Mismatch(name, "F16 [4, 64, 4]", "F16 [3, 64, 4]")
    with pytest.raises(ValueError, match="was written with another plan"):
        read_stack(tmp_path, dense, num_blocks=len(read_order(tmp_path).blocks))
    del tensors[name]
    save_file(tensors, path)
    assert exporter.verify(plan, tmp_path) == [Mismatch(name, "F16 [4, 64, 4]", "absent")]
    with pytest.raises(ValueError, match="cannot read the stack"):
        read_stack(tmp_path, dense, num_blocks=0)


def test_writes_the_same_files_again(exporter, tmp_path):
    dense = tiny_llama(layers=1)
    plan = make_plan(dense, in_turn(*STACKS))
    first = [
        path.read_bytes()
        for path in write_stack(plan, dense, tmp_path, statistics={}, num_levels=3).files
    ]
    again = write_stack(plan, dense, tmp_path, statistics={}, num_levels=3)
    assert [path.read_bytes() for path in again.files] == first
    assert all(note.endswith(".") for note in again.notes)
    assert again.num_units == len(plan.units)


def test_verifying_loads_no_torch(exporter, tmp_path):
    dense = tiny_llama(layers=1)
    write_stack(make_plan(dense, in_turn(*STACKS)), dense, tmp_path, statistics={}, num_levels=3)
    code = (
        "import sys; from pathlib import Path\n"
        "from allocator.exporters.bitstack import BitStackExporter, read_order\n"
        f"path = Path({str(tmp_path)!r})\n"
        "found = BitStackExporter().verify(read_order(path).plan, path)\n"
        "sys.exit(str(found) if found or 'torch' in sys.modules else 0)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_from_search_to_a_smaller_budget(tmp_path):
    """A searched plan of scaled stacks is exported with its weights and serves other budgets."""
    menu = "\n".join(
        f"  - {{name: residual_stack, levels: {levels}, rank: 4, scaled: true}}"
        for levels in (1, 2, 3, 4)
    )
    space = tmp_path / "stacks.yaml"
    space.write_text(f"name: stacks\nkeep: false\nmenu:\n{menu}\n")
    run = search(tmp_path, space=space, budget="4bpw", trials=3)
    plan = load_plan(run / "plan.json")
    assert len({entry.choice for entry in plan.units}) > 1
    out = tmp_path / "out"
    words = ["export", run, "--to", "bitstack", "-o", out, "--model", MODEL]
    assert "read back and equal to the plan" in succeed(*words)
    succeed("apply", MODEL, run, "-o", tmp_path / "applied")
    applied, loaded = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (tmp_path / "applied", MODEL)
    )
    read_stack(out, loaded, budget_bytes=plan.budget_bytes)
    assert_equal(state(loaded), state(applied))
    stack = read_order(out)
    found = read_stack(out, loaded, budget_bytes=(stack.least_bytes + plan.achieved_bytes) // 2)
    assert 0 < found.num_blocks < stack.plan_num_blocks
    assert found.stored_bytes <= (stack.least_bytes + plan.achieved_bytes) // 2
    tokens = torch.arange(64).reshape(1, 64)
    assert torch.isfinite(loaded(tokens).logits).all()
