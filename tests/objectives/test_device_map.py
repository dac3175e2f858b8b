"""A model spread over devices is measured as on one, and no tensor meets another's device."""

import json
from importlib.util import find_spec

import pytest
import torch
from devices import Devices, place_of, put_module, several_devices, spread
from language import MENU, VOCABULARY, offering, random_model, random_tokens
from scoring import make_context, table
from torch import nn

from objectives.bank import Bank
from objectives.device_map import check_blocks, check_device_map, devices_of, parse_device_map
from objectives.evaluation import Fidelity
from objectives.evaluator import Evaluator
from objectives.language_task import LanguageTask
from objectives.loading import load_model
from objectives.output_head import OutputHead
from objectives.sensitivity import SCORERS
from objectives.statistics import KINDS
from objectives.statistics_file import StatisticsFile
from objectives.task import TokenMeter
from objectives.tensor_store import plan_memory
from search_spaces.build import SpaceRequest, build_space
from search_spaces.models.kv_layers import cache_units
from search_spaces.operators import GPTQ, Keep, KVQuantize, NormalFloat, RoundToNearest
from search_spaces.space import SearchSpace, build_menu

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
BY_BLOCKS = {
    "model.embed_tokens": "cuda:0",
    "model.rotary_emb": "cuda:0",
    "model.layers.0": "cuda:0",
    "model.layers.1": "cuda:1",
    "model.norm": "cuda:1",
    "lm_head": "cuda:1",
}
# To and fro, with the head apart from the norm before it.
TO_AND_FRO = {
    "model.embed_tokens": "cuda:0",
    "model.rotary_emb": "cuda:0",
    "model.layers.0": "cuda:1",
    "model.layers.1": "cuda:0",
    "model.norm": "cuda:1",
    "lm_head": "cuda:0",
}
both_maps = pytest.mark.parametrize(
    "places", [BY_BLOCKS, TO_AND_FRO], ids=["by_blocks", "to_and_fro"]
)
SHORT = (RoundToNearest(2, 16), RoundToNearest(4, 16))


def with_accelerate(model, places):
    """The hooks that transformers has accelerate attach for such a map."""
    from accelerate.hooks import attach_align_device_hook_on_blocks

    for name, place in places.items():
        put_module(model.get_submodule(name), place)
    attach_align_device_hook_on_blocks(
        model,
        execution_device={**places, "": next(iter(places.values()))},
        offload=dict.fromkeys(places, False),
        skip_keys="past_key_values",
    )
    return model


def evaluations(model, operators=MENU, **options):
    """Of a few assignments, from one that is known on; the blocks that ran are part of them."""
    space = offering(build_space(model, SpaceRequest()), *operators)
    bank = Bank(model, space)
    evaluate = Evaluator(
        model, LanguageTask(random_tokens(), batch_size=2), bank, TokenMeter(2), **options
    )
    low, high = (tuple(choice for _ in space.menus) for choice in (0, 1))
    half = tuple(int(unit.depth == 1) for unit in space.units)
    found = [evaluate(choice, Fidelity("search", 0, 4)) for choice in (low, half, high, low)]
    return [*found, evaluate(half, Fidelity("search", 0, 2, slopes=True))], bank


def test_the_devices_of_these_tests_refuse_what_real_ones_would():
    with Devices():
        here, there = torch.ones(2, 2), torch.ones(2, 2).to("cuda:1")
        assert (here.device.type, there.device, (there @ there).device) == ("cpu", SECOND, SECOND)
        assert (there * torch.tensor(2.0)).device == SECOND, "scalars go with any"
        assert torch.zeros(3, device=there.device).device == SECOND
        assert there.cpu().device.type == "cpu"
        assert there[torch.tensor([0])].device == SECOND, "an index may be on the CPU"
        assert here.copy_(there).device.type == "cpu"
        for mix in (lambda: here @ there, lambda: torch.cat([here, there]), lambda: here + there):
            with pytest.raises(RuntimeError, match="on the same device, but found cpu and cuda:1"):
                mix()
        with pytest.raises(TypeError, match="can't convert cuda:1"):
            there.numpy()
        weight = nn.Parameter(there)
        weight.data = there
        seen = []
        weight.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.device))
        (weight * 2).sum().backward()
        assert seen == [SECOND]


def test_they_refuse_a_model_whose_inputs_are_not_brought_along():
    model = random_model("llama")
    with Devices():
        put_module(model.model.layers[1], "cuda:1")
        with pytest.raises(RuntimeError, match="on the same device, but found cpu and cuda:1"):
            model(input_ids=random_tokens().splits["search"])


@both_maps
@pytest.mark.parametrize("options", [{}, {"prefix_bytes": 0}], ids=["reuse", "full"])
def test_assignments_are_measured_as_on_one_device(places, options):
    expected, _ = evaluations(random_model("llama"), **options)
    with spread(random_model("llama"), places) as model:
        found, bank = evaluations(model, **options)
        assert found == expected
        assert set(devices_of(model)) == {FIRST, SECOND}
        assert {place for place, _ in bank.plan.each_bytes} == {FIRST, SECOND}
        for unit in range(len(bank.space.units)):
            for live, dense in zip(bank.parameters(unit), bank.dense(unit), strict=True):
                assert place_of(live) == place_of(dense)
    assert options or found[1].num_block_tokens < found[0].num_block_tokens


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
@both_maps
def test_accelerates_own_hooks_give_the_same(places):
    expected, _ = evaluations(random_model("llama"))
    with several_devices():
        assert evaluations(with_accelerate(random_model("llama"), places))[0] == expected


def test_operators_work_where_their_weights_are():
    operators = (NormalFloat(3), GPTQ(3, 16), Keep())
    expected = losses_with_statistics(random_model("llama"), operators)
    with spread(random_model("llama"), TO_AND_FRO) as model:
        assert losses_with_statistics(model, operators) == expected


def losses_with_statistics(model, operators):
    """Of every uniform assignment, compressed with statistics of the model."""
    context = make_context(model, random_tokens(), operators)
    context.bank.use_statistics(context.statistics)
    choices = [(option,) * len(context.space.units) for option in range(len(operators))]
    return [context.evaluator(choice, Fidelity("search", 0, 2)) for choice in choices]


def test_caches_stay_with_their_blocks():
    def losses(model):
        units = cache_units(model, 12, apart=False)
        menus = tuple(build_menu(unit, (KVQuantize(2, 2, 8), Keep())) for unit in units)
        space = SearchSpace("caches", units, menus, ())
        evaluate = Evaluator(
            model, LanguageTask(random_tokens()), Bank(model, space), TokenMeter(2)
        )
        return [evaluate(choice, Fidelity("search", 0, 2)) for choice in ((0, 1), (0, 0))]

    expected = losses(random_model("llama"))
    with spread(random_model("llama"), BY_BLOCKS) as model:
        assert losses(model) == expected


def scored(name, model):
    """A scorer's table with the head searched too, or why it has none."""
    needs = SCORERS[name].needs
    open_head = {"open_units": ("head",)}
    context = make_context(model, random_tokens(), SHORT, needs, 2, **open_head)
    try:
        return table(name, context)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", list(SCORERS))
def test_scorers_give_the_same_table(name):
    expected = scored(name, random_model("llama"))
    for places in (BY_BLOCKS, TO_AND_FRO):
        with spread(random_model("llama"), places) as model:
            assert scored(name, model) == expected


def test_statistics_lie_with_their_modules_also_when_read_from_a_file(tmp_path):
    file = StatisticsFile(tmp_path / "statistics.safetensors", "weights and text")
    with spread(random_model("llama"), BY_BLOCKS) as model:
        context = make_context(model, random_tokens(), SHORT)
        file.save(context.statistics, KINDS)
        _, read = file.load(lambda name: model.get_parameter(name).device)
        for name, kept in context.statistics.items():
            home = model.get_parameter(name).device
            assert home == (FIRST if "layers.0" in name else SECOND)
            for kind in KINDS - {"weighted_inputs"}:
                assert place_of(getattr(kept, kind)) == place_of(getattr(read[name], kind)) == home
            assert kept.weighted_inputs.device.type == "cpu"  # on the host, whatever observed them


def test_the_head_is_applied_in_chunks_where_the_model_copies_its_logits_elsewhere():
    tokens = random_tokens().splits["search"]
    with spread(random_model("llama"), BY_BLOCKS) as model, torch.inference_mode():
        states, head = OutputHead(model).hidden(tokens)
        assert (states.device, states.shape[-1]) == (SECOND, model.config.hidden_size)
        logits = model(input_ids=tokens.to(FIRST)).logits
        assert (logits.device, logits.shape[-1]) == (FIRST, VOCABULARY)
        assert torch.equal(head(states).to(FIRST), logits)


def test_each_device_has_its_own_cap():
    menu = (NormalFloat(2), NormalFloat(3))
    with spread(random_model("llama"), BY_BLOCKS) as model:
        space = offering(build_space(model, SpaceRequest()), *menu)
        plan = plan_memory(model, space, most_bytes=2**30, folder=None)
        each = dict(plan.each_bytes)
        block = sum(4 * 2 * unit.num_weights for unit in space.units if unit.depth == 0)
        assert each == {FIRST: block, SECOND: plan.all_bytes - block}
        assert plan.device_bytes == plan.all_bytes
        assert "on cuda:0" in str(plan)


@pytest.mark.parametrize("text", ["auto", "balanced", "balanced_low_0", "sequential", "cuda:1"])
def test_words_are_device_maps(text):
    assert parse_device_map(text) == text


def test_devices_by_name_are_json():
    found = {"model.layers.0": 0, "": "cpu"}
    assert parse_device_map(json.dumps(found)) == found
    for wrong in ('{"model"', '{"model": 1.5}', '{"model": true}', '{"model": null}'):
        with pytest.raises(ValueError, match="--device-map: expected devices by module name"):
            parse_device_map(wrong)


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match=r"device map auto, balanced, .* got 'evenly'"):
        check_device_map("evenly", "auto")


def test_a_map_that_splits_a_block_is_refused():
    model = random_model("llama")
    check_blocks({"": 0, "model.layers.0": 1, "model.layers.0.mlp": "cuda:1"}, model)
    check_blocks("auto", model)
    with pytest.raises(ValueError, match=r"splits model\.layers\.1 between .* cuda:0, cuda:1"):
        check_blocks({"": 0, "model.layers.1.mlp": 1}, model)


def test_a_split_block_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("objectives.device_map.find_spec", lambda name: True)  # never gets to it
    random_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"splits model\.layers\.0 between .* cpu, disk"):
        load_model(str(tmp_path), device_map={"": "cpu", "model.layers.0.mlp": "disk"})
