"""Weights and caches in one budget, from the command line, on the tiny trained model."""

import json
import shutil
from unittest.mock import patch

import numpy as np
import pytest
from cli_runs import MODEL, TEXT, allocator, records, search, search_arguments, succeed

from allocator.budget import resolve_budget
from allocator.config import load_config
from allocator.journal import read_journal
from allocator.plan import Plan, load_plan, save_plan
from allocator.run_folder import load_losses, load_space
from objectives.kv_cache import NUM_SEQUENCES
from search_spaces.operators import Keep, KVQuantize, operator_to_json

CONTEXT = 512
DENSE_CACHE = 2 * 6 * CONTEXT * 64 * 2  # keys and values, layers, tokens, channels, bytes
SPACE = """
name: weights-and-caches
menu:
  - {name: round_to_nearest, bits: 3, group_size: 32}
  - {name: round_to_nearest, bits: 6, group_size: 32}
kv: true
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run; tests may add to its folder and change nothing."""
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "space.yaml"
    path.write_text(SPACE)
    return search(folder, space=path, budget="35%", context=CONTEXT, trials=8)


@pytest.fixture(scope="module")
def plan(run):
    return load_plan(run / "plan.json")


def test_the_budget_covers_weights_and_caches(run, plan):
    space = load_space(run / "space.json")
    caches = [entry for entry in plan.units if entry.unit.is_cache]
    assert len(caches) == 6
    assert plan.achieved_bytes <= plan.budget_bytes
    assert plan.achieved_bytes == plan.file_bytes + plan.cache_bytes
    assert 0 < plan.cache_bytes == sum(entry.bytes for entry in caches) < DENSE_CACHE / 2
    assert any(isinstance(entry.choice, KVQuantize) for entry in caches)
    weights = [entry for entry in plan.units if not entry.unit.is_cache]
    assert plan.bits_per_weight == pytest.approx(
        8 * sum(entry.bytes for entry in weights) / space.num_weights
    )
    assert load_config(run / "config.yaml").space.context == CONTEXT


def test_every_scorers_table_has_the_caches(run):
    space = load_space(run / "space.json")
    tables = load_losses(run / "losses.npz", space)
    assert set(tables) == {
        "correlated_blend",
        "correlated_fisher",
        "fisher",
        "reconstruction",
        "relative_error",
        "refit",
    }
    for table in (tables[name] for name in tables if name != "refit"):
        for unit, row in zip(space.units, table.losses, strict=True):
            assert np.isfinite(row).all()
            if unit.is_cache:
                assert (np.diff(row) <= 0).all()
                assert row[0] > row[-1] == 0.0


def test_the_plan_beats_the_uniform_one_and_accounts_for_what_caches_cost(run, plan):
    assert plan.heldout_nats["returned"].nats < plan.heldout_nats["uniform"].nats
    options = 6 * 5  # five widths; keeping a cache dense is free
    expected = (4 + options * min(NUM_SEQUENCES, 4)) * 128
    assert plan.tokens["statistics_caches"] == expected


def test_a_run_cut_anywhere_ends_the_same(run, plan, tmp_path):
    lines = (run / "journal.jsonl").read_text().splitlines(keepends=True)
    kinds = [record["type"] for record in read_journal(run / "journal.jsonl").records]
    space = load_space(run / "space.json")
    first_cache = next(i for i, unit in enumerate(space.units) if unit.is_cache)
    cells = records(run, "cell")
    in_caches = (
        1
        + kinds.index("cell")
        + next(i for i, record in enumerate(cells) if record["unit"] == first_cache)
    )
    evaluated = 1 + kinds.index("evaluation")
    for cut in (in_caches + 3, evaluated + 5):
        folder = tmp_path / str(cut)
        shutil.copytree(run, folder)
        (folder / "journal.jsonl").write_text("".join(lines[: cut + 1]))
        succeed("resume", folder)
        again = load_plan(folder / "plan.json")
        assert again.units == plan.units
        assert again.heldout_nats == plan.heldout_nats
        assert again.search == plan.search


def test_evaluating_a_plan_runs_its_caches(run, plan, tmp_path):
    """The same weights with one-bit caches lose more, which only the caches can show."""
    data = plan.model_dump(mode="json")
    for entry, known in zip(data["units"], plan.units, strict=True):
        if known.unit.is_cache:
            entry["operator"] = operator_to_json(KVQuantize(1, 1, 64))
            saved = entry["bytes"] - known.unit.bytes(KVQuantize(1, 1, 64))
            entry["bytes"] -= saved
            data["searched_bytes"] -= saved
            data["achieved_bytes"] -= saved
            data["slack_bytes"] += saved
    worse = tmp_path / "worse.json"
    save_plan(Plan.model_validate(data), worse)

    def measured(path):
        words = ("--text", TEXT, "--num-sequences", 4, "--sequence-length", 128, "--threads", 1)
        return json.loads(succeed("evaluate", MODEL, path, *words, "--json"))["plan"]["nats"]

    nats = measured(run)
    assert nats == pytest.approx(plan.heldout_nats["returned"].nats, rel=0.5)
    assert measured(worse) > 2 * nats


def test_a_preset_that_searches_no_caches_counts_them_dense(tmp_path):
    plain = search(tmp_path, "plain", trials=2)
    run = search(tmp_path, "run", trials=2, context=CONTEXT, batch=2)
    plan, without = load_plan(run / "plan.json"), load_plan(plain / "plan.json")
    assert plan.cache_bytes == 2 * DENSE_CACHE
    assert {e.choice for e in plan.units if e.unit.is_cache} == {Keep()}
    # Bits per weight speak of the weights, and the caches come on top.
    assert plan.budget_bytes == without.budget_bytes + 2 * DENSE_CACHE
    assert [e for e in plan.units if not e.unit.is_cache] == list(without.units)
    assert "statistics_caches" not in plan.tokens


def test_pins_reach_caches(tmp_path):
    run = search(
        tmp_path, trials=2, budget="40%", context=CONTEXT, apart=True, pin="*.keys.cache=kv8-g64"
    )
    found = {
        entry.name.rpartition("self_attn.")[2]: entry.choice.label
        for entry in load_plan(run / "plan.json").units
        if entry.unit.is_cache
    }
    assert found == {"keys.cache": "kv8-g64", "values.cache": "keep"}


def test_mistakes_are_told_before_anything_is_measured(tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    common = ("search", MODEL, "--runs", tmp_path, "--budget")
    for words, message in (
        (("3bpw", "--space", space, "--context", 512), "says nothing of the cache"),
        (("40%", "--space", space), "say for how many tokens"),
        (("40%", "--context", -1), "--context: Input should be greater than or equal to 0"),
        (("40%", "--context", 5, "--batch", 0), "--batch: Input should be"),
        (("40%", "--batch", 3), "give its context too"),
        (("1%", "--context", 512), "of weights and caches"),
    ):
        result = allocator(*common, *words)
        assert result.code == 2
        assert message in result.err, result.err


def test_a_budget_in_bits_per_weight_leaves_fixed_caches_out_of_the_weights(run):
    space = load_space(run / "space.json")
    with pytest.raises(ValueError, match="give bytes or per cent"):
        resolve_budget("4bpw", space)


@pytest.mark.parametrize("packed", [[], ["--packed"]])
def test_apply_says_that_caches_are_not_in_it(run, plan, tmp_path, packed):
    out = succeed("apply", MODEL, run, "-o", tmp_path / "out", *packed)
    assert "caches are not in it: export them with --to transformers-cache" in out
    if packed:
        size = (tmp_path / "out" / "model.packed.safetensors").stat().st_size
        assert size == plan.achieved_bytes - plan.cache_bytes


def test_a_search_that_reads_weights_is_refused_before_anything_is_loaded(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(SPACE)
    wish = {"space": path, "budget": "35%", "context": CONTEXT, "search": "tpe,formula"}
    with patch("allocator.session.BenchPool.load", side_effect=AssertionError("loaded")):
        result = allocator(*search_arguments(runs=tmp_path / "runs", name="run", **wish))
    assert result.code != 0
    assert "search formula reads the weights of every unit, and caches" in result.err
    assert not (tmp_path / "runs" / "run").exists()
