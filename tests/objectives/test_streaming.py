"""A streamed model against the loaded one: losses, statistics, tables, memory, refusals."""

import json
import subprocess
import sys
from pathlib import Path

import language
import pytest
import torch
from language import (
    ASSETS,
    MENU,
    offering,
    random_model,
    random_tokens,
)
from safetensors.torch import load_file, save_file
from scoring import context_of, table
from transformers import AutoModelForCausalLM, T5Config
from transformers.utils import logging as transformers_logging

from allocator.apply import round_fixed
from objectives.bank import Bank
from objectives.calibration import Calibration
from objectives.evaluation import Fidelity
from objectives.evaluator import Evaluator
from objectives.hidden_states import HiddenStates
from objectives.language_task import LanguageTask
from objectives.loading import load_model
from objectives.sensitivity import SCORERS, Scorer
from objectives.statistics import collect_statistics, text_of
from objectives.streamed_evaluator import StreamedEvaluator
from objectives.streamed_profile import StreamSettings, profile_streamed
from objectives.streamed_statistics import StreamedStatistics
from objectives.streaming import StreamedModel
from objectives.task import TokenMeter
from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import GPTQ, Keep, RoundToNearest

TINY = ASSETS / "tiny_llama"
NUM_SEQUENCES, LENGTH = 5, 64
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "streaming.py"
# Threaded, tied, positional, tuples, masks by layer, scaled embeddings, stacked experts.
FAMILIES = ["qwen3", "mistral", "gpt2", "gemma2", "gemma3_text", "bloom", "opt", "gpt_oss"]
SCORER_NAMES = (
    "blend",
    "correlated_blend",
    "correlated_fisher",
    "fisher",
    "reconstruction",
    "relative_error",
)


@pytest.fixture(autouse=True)
def _quiet():
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def trained():
    """The trained model and a little text: what is compared bit by bit needs no more."""
    model, calibration = language.trained()
    splits = {name: tokens[:NUM_SEQUENCES] for name, tokens in calibration.splits.items()}
    return model, Calibration.from_tensors(splits)


def streamed(folder=TINY):
    return StreamedModel(str(folder), dtype="float32", device="cpu")


def save(model, folder, shards="1GB"):
    """Write a model as a checkpoint; the loaded twin of what is streamed from it."""
    model.save_pretrained(folder, max_shard_size=shards)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def space_of(model, *menu, **request):
    """A space, and the model rounded as the space stores it."""
    space = offering(build_space(model, SpaceRequest(**request)), *(menu or MENU))
    round_fixed(model, space.fixed)
    return space


def collected(stream, task, space, needs, meter=None, **options):
    """Everything that visits hand over, and the parts in the order they came."""
    found, parts = {}, []

    def act(visit):
        found.update(visit.statistics)
        parts.append(visit.part)

    statistics = StreamedStatistics(stream, task, space, meter or TokenMeter(), **options)
    statistics.visit(needs, act)
    return found, parts


def assert_same_statistics(found, expected, kinds):
    assert found.keys() == expected.keys()
    for name, stats in expected.items():
        for kind in kinds:
            ours, theirs = getattr(found[name], kind), getattr(stats, kind)
            assert (ours is None) == (theirs is None)
            assert theirs is None or torch.equal(ours, theirs), (name, kind)


def assignments(space, count=3):
    generator = torch.Generator().manual_seed(0)
    sizes = [len(menu) for menu in space.menus]
    drawn = [
        tuple(int(torch.randint(n, (1,), generator=generator)) for n in sizes) for _ in range(count)
    ]
    half = len(sizes) // 2
    return [*drawn, drawn[0][:half] + drawn[1][half:]]


def assert_same_evaluations(stream, model, space, calibration, fidelity):
    meter, twin = TokenMeter(), LanguageTask(calibration)
    evaluate = StreamedEvaluator(stream, LanguageTask(calibration), space, meter)
    bank = Bank(model, space)
    ordinary = Evaluator(model, twin, bank, TokenMeter())
    chosen = assignments(space)
    found = evaluate.measure(chosen, fidelity)
    assert found == [ordinary(one, fidelity) for one in chosen]
    assert all(one.ok for one in found)
    assert evaluate(chosen[-1], fidelity) == found[-1]
    bank.restore()
    return meter


def test_losses_of_assignments_are_those_of_the_loaded_model():
    model, calibration = trained()
    space = space_of(model)
    meter = assert_same_evaluations(streamed(), model, space, calibration, Fidelity("search", 2, 5))
    assert meter.counts == {"teacher": NUM_SEQUENCES * LENGTH, "search": 5 * 5 * LENGTH}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_streams_exactly(family, tmp_path):
    model = save(random_model(family), tmp_path, shards="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    stream, calibration = streamed(tmp_path), random_tokens(search=6)
    space = space_of(model)
    assert_same_evaluations(stream, model, space, calibration, Fidelity("search", 0, 6))
    task, kinds = LanguageTask(calibration), ("fisher", "hessian")
    expected = collect_statistics(model, task, space, needs=kinds, meter=TokenMeter())
    found, _ = collected(stream, task, space, kinds)
    assert_same_statistics(found, expected, kinds)


def test_assignments_that_agree_share_the_blocks_before_they_differ():
    model, calibration = trained()
    space = space_of(model)
    meter = TokenMeter(6)
    evaluate = StreamedEvaluator(streamed(), LanguageTask(calibration), space, meter)
    dense = tuple(len(menu) - 1 for menu in space.menus)
    last = (*dense[:-1], 0)
    evaluate.measure([dense, last], Fidelity("search", 0, 2))
    assert meter.counts["search"] == 2 * 2 * LENGTH
    assert meter.block_counts["search"] == (5 + 2) * 2 * LENGTH
    with pytest.raises(ValueError, match="gives no slopes"):
        evaluate(dense, Fidelity("search", 0, 2, slopes=True))


def test_teacher_of_an_earlier_process_is_not_computed_again(tmp_path):
    model, calibration = trained()
    space, fidelity = space_of(model), Fidelity("search", 0, 2)
    LanguageTask(calibration, cache_folder=tmp_path).prepare(model, "search")
    meter = TokenMeter()
    task = LanguageTask(calibration, cache_folder=tmp_path)
    StreamedEvaluator(streamed(), task, space, meter)(assignments(space)[0], fidelity)
    assert meter.counts["teacher"] == 0


@pytest.mark.parametrize("opened", [(), ("embeddings",)])
@pytest.mark.parametrize("hidden_bytes", [10**9, 100_000])
@pytest.mark.parametrize(
    "needs",
    [
        ("second_moment",),
        ("hessian", "second_moment"),
        ("fisher", "second_moment", "weighted_inputs"),
    ],
)
def test_statistics_are_those_of_the_loaded_model(needs, hidden_bytes, opened):
    """With the hidden states in memory or mostly in files; with tied embeddings searched or not."""
    model, calibration = trained()
    space, task, meter = (
        space_of(model, open_units=opened),
        LanguageTask(calibration),
        TokenMeter(6),
    )
    expected = collect_statistics(model, task, space, needs=needs, meter=TokenMeter())
    found, parts = collected(streamed(), task, space, needs, meter, hidden_bytes=hidden_bytes)
    assert_same_statistics(found, expected, needs)
    blocks = list(range(6))
    if "fisher" in needs:
        read = sum(map(len, text_of(task, needs).values()))
        assert read > NUM_SEQUENCES
        assert meter.counts == {
            "statistics": 2 * read * LENGTH,
            "statistics_backward": 2 * read * LENGTH,
        }
        blocks.reverse()
    else:
        assert meter.counts == {"statistics": NUM_SEQUENCES * LENGTH}
    assert parts == ([*blocks, None] if opened else blocks)


def test_head_apart_from_the_embeddings_is_observed(tmp_path):
    model = save(random_model("llama", tie_word_embeddings=False), tmp_path)
    space, task = space_of(model, open_units=("head", "embeddings")), LanguageTask(random_tokens())
    for needs in (("second_moment",), ("fisher", "hessian")):
        expected = collect_statistics(model, task, space, needs=needs, meter=TokenMeter())
        found, _ = collected(streamed(tmp_path), task, space, needs)
        assert_same_statistics(found, expected, needs)
        assert found["lm_head.weight"].hessian is not None or needs == ("second_moment",)


@pytest.mark.parametrize("menu", [MENU, (GPTQ(3, 16), RoundToNearest(4, 16), Keep())])
def test_tables_and_statistics_file_are_those_of_the_loaded_model(menu, tmp_path):
    model, calibration = trained()
    space = space_of(model, *menu)
    path = tmp_path / "cache" / "statistics.safetensors"
    settings = StreamSettings("float32", "cpu", statistics=path)
    told = []
    profile = profile_streamed(
        str(TINY),
        space,
        SCORER_NAMES,
        text=calibration,
        settings=settings,
        progress=lambda done, total: told.append((done, total)),
    )
    needs = space.needs.union(*(SCORERS[name]().needs_for(space) for name in SCORER_NAMES))
    assert ("weighted_inputs" in needs) is bool(space.needs)
    context = context_of(model, space, LanguageTask(calibration), needs=needs)
    context.bank.use_statistics(context.statistics)
    assert list(profile.tables) == list(SCORER_NAMES)
    for name, own in profile.tables.items():
        assert own.unit == SCORERS[name].unit
        assert [row.tolist() for row in own.losses] == table(name, context)
    assert told == [(done, 12) for done in range(1, 13)]
    assert profile.memory.host_bytes > 2**27
    assert profile.memory.device_bytes == 0
    assert {"read", "front", "forward", "backward", "scoring"} == profile.seconds.keys()
    read = sum(map(len, text_of(LanguageTask(calibration), needs).values()))
    assert profile.tokens["statistics"] == 2 * read * LENGTH
    if not space.needs:
        assert profile.statistics is None
        assert not path.exists()
        return
    kinds, kept = profile.statistics.load()
    assert kinds == {"hessian"}
    assert_same_statistics(kept, context.statistics, kinds)
    loaded = load_model(str(TINY), dtype="float32", device="cpu")
    assert profile.statistics.identity.split() == [
        loaded.weights_sha256,
        calibration.hashes["statistics"],
    ]
    assert load_file(path).keys() == {f"{name}|hessian" for name in kept}


def test_scorer_without_data_runs_no_token():
    model, calibration = trained()
    space = space_of(model)
    settings = StreamSettings("float32", "cpu")
    profile = profile_streamed(
        str(TINY), SpaceRequest(), ["relative_error"], text=calibration, settings=settings
    )
    assert profile.tokens == {}
    assert profile.space.units == space.units


def test_precision_is_that_of_the_resident_block():
    _, calibration = trained()
    stream = StreamedModel(str(TINY), dtype="bfloat16", device="cpu")
    model = load_model(str(TINY), dtype="bfloat16", device="cpu").model
    space, fidelity = space_of(model), Fidelity("search", 0, 4)
    assert_same_evaluations(stream, model, space, calibration, fidelity)


def test_only_the_resident_part_has_weights():
    stream = streamed()
    loaded = load_model(str(TINY), dtype="float32", device="cpu").model
    names = dict(loaded.named_parameters())
    for part in stream.parts:
        with stream.resident(part):
            real = {n: p for n, p in stream.model.named_parameters() if not p.is_meta}
            assert real.keys() == {n for n in names if stream.part(n) == part}
            for name, parameter in real.items():
                assert torch.equal(parameter, names[name])
    with pytest.raises(ZeroDivisionError), stream.resident(0):
        1 / 0  # noqa: B018
    assert all(parameter.is_meta for parameter in stream.model.parameters())
    assert not any("forward" in vars(module) for module in stream.model.modules())


def test_failure_inside_a_visit_leaves_no_weights_behind():
    model, calibration = trained()
    stream, space = streamed(), space_of(model)

    def fail(visit):
        raise ZeroDivisionError

    statistics = StreamedStatistics(stream, LanguageTask(calibration), space, TokenMeter())
    with pytest.raises(ZeroDivisionError):
        statistics.visit(("fisher",), fail)
    assert all(parameter.is_meta for parameter in stream.model.parameters())
    assert not any(module._forward_pre_hooks for module in stream.model.modules())


def test_model_is_identified_without_loading_it():
    loaded = load_model(str(TINY), dtype="float32", device="cpu")
    assert streamed().weights_sha256 == loaded.weights_sha256


def test_hidden_states_come_back_from_memory_and_from_files(tmp_path):
    cpu = torch.device("cpu")
    with HiddenStates(most_bytes=100, folder=tmp_path) as states:
        for number in range(4):
            states.put(number, torch.full((2, 5), float(number), dtype=torch.bfloat16) + 0.5)
        states.put("wide", torch.arange(30.0).view(5, 6))
        assert len(list(tmp_path.glob("*/*"))) == 1
        for number in range(4):
            assert states.get(number, cpu).unique().tolist() == [number + 0.5]
        assert torch.equal(states.get("wide", cpu), torch.arange(30.0).view(5, 6))
        states.put("wide", torch.zeros(1))
        states.drop(0)
        states.drop("unknown")
        assert not list(tmp_path.glob("*/*"))
        with pytest.raises(KeyError):
            states.get(0, cpu)
    assert not list(tmp_path.iterdir())


def test_models_that_are_no_single_stack_are_refused(tmp_path):
    T5Config(num_layers=2, d_model=8, d_ff=8, num_heads=2, d_kv=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot build .* as a causal language model"):
        streamed(tmp_path)


def test_weights_that_loading_would_convert_are_refused(tmp_path):
    random_model("mixtral").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks .* as the model names them, such as .*experts"):
        streamed(tmp_path)


def tampered(folder, change):
    """The tiny checkpoint with other weights."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    state = change(load_file(TINY / "model.safetensors"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_damaged_checkpoints_are_refused(tmp_path):
    norm, head = "model.norm.weight", "lm_head.weight"
    for change, message in (
        (lambda s: {k: v for k, v in s.items() if k != norm}, f"lacks 1 weights .* {norm}"),
        (lambda s: {**s, norm: torch.ones(5)}, r"the shape \(5,\), expected \(128,\)"),
        (
            lambda s: {**s, head: s["model.embed_tokens.weight"] + 1},
            "tied by config.json but differ",
        ),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            streamed(tampered(tmp_path, change))
        assert "\n" not in str(caught.value)
    again = tampered(tmp_path, lambda s: {**s, head: s["model.embed_tokens.weight"].clone()})
    assert streamed(again).weights_sha256 == streamed().weights_sha256
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot read"):
        streamed(tmp_path)


def test_caches_are_refused():
    _, calibration = trained()
    stream = streamed()
    space = build_space(stream.model, SpaceRequest(context=64))
    with pytest.raises(ValueError, match=r"is a cache, which is measured on the whole model"):
        StreamedEvaluator(stream, LanguageTask(calibration), space, TokenMeter())


class WholePass(Scorer):
    """A scorer that does not know single cells."""

    name, unit, needs = "whole_pass", "nats", frozenset()

    def losses(self, context, cells):
        raise AssertionError("never asked")


def test_scorers_with_passes_of_their_own_are_refused():
    _, calibration = trained()
    with pytest.raises(ValueError, match=r"whole_pass: it runs passes of its own"):
        profile_streamed(str(TINY), SpaceRequest(), [WholePass()], text=calibration)


def test_scorer_that_cannot_serve_the_space_is_left_out_unless_it_is_the_first():
    model, calibration = trained()
    space = space_of(model, open_units=("embeddings",))
    settings = StreamSettings("float32", "cpu")
    names = ["relative_error", "reconstruction"]
    profile = profile_streamed(str(TINY), space, names, text=calibration, settings=settings)
    assert list(profile.tables) == ["relative_error"]
    assert "embed_tokens.weight cannot be observed" in profile.left_out["reconstruction"]
    with pytest.raises(ValueError, match="cannot be observed"):
        profile_streamed(str(TINY), space, ["reconstruction"], text=calibration, settings=settings)


def measured(blocks):
    """What a streamed profile of a random checkpoint took, in a process of its own."""
    shape = ["--blocks", blocks, "--width", 768, "--vocabulary", 1024]
    data = ["--sequences", 2, "--length", 64, "--hidden-bytes", 1_000_000, "--json"]
    command = [sys.executable, BENCHMARK, *shape, *data]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_peak_memory_does_not_depend_on_depth():
    """Four times the file: a full load would hold 24 blocks more, streaming not half of one."""
    block_bytes = 4 * (4 * 768**2 + 3 * 768 * 2064)
    shallow, middle, deep = (measured(blocks) for blocks in (8, 16, 32))
    assert deep["file_bytes"] > 3.5 * shallow["file_bytes"]
    assert deep["file_bytes"] - shallow["file_bytes"] == pytest.approx(12 * block_bytes, rel=0.01)
    own = [one["peak_bytes"] - one["before_bytes"] for one in (shallow, middle, deep)]
    assert max(own) - min(own) < block_bytes / 2
    assert max(own) < 6 * block_bytes
