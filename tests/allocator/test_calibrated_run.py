"""Runs whose operators need statistics of the text: measured, applied and exported alike."""

import json
import re

import pytest
import torch
from cli_runs import MODEL, TEXT, allocator, records, search, search_arguments, succeed

from allocator.apply import apply_plan, read_packed
from allocator.plan import load_plan
from objectives.calibration import Calibration
from objectives.language_task import LanguageTask
from objectives.loading import load_model
from objectives.statistics_file import StatisticsFile, statistics_identity

SPACE = """
name: calibrated
menu:
  - {name: gptq, bits: 2, group_size: 32}
  - {name: gptq, bits: 3, group_size: 32}
  - {name: sparse_gpt, sparsity: 0.5, values: {name: round_to_nearest, bits: 4, group_size: 32}}
  - {name: round_to_nearest, bits: 6, group_size: 32}
"""


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    path = tmp_path_factory.mktemp("space") / "space.yaml"
    path.write_text(SPACE)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, space):
    return search(tmp_path_factory.mktemp("runs"), space=space, budget="3.3bpw", trials=8)


@pytest.fixture(scope="module")
def plan(run):
    plan = load_plan(run / "plan.json")
    assert any(entry.choice.needs for entry in plan.units)
    return plan


def load(path):
    return load_model(str(path), dtype="float32", device="cpu").model


def heldout_loss(run, model):
    """Held-out KL of a model, as the run measures it, to the run's own teacher."""
    calibration = Calibration.load(run / "calibration.safetensors")
    task = LanguageTask(calibration, batch_size=4, cache_folder=run / "cache")
    assert task.prepare(model, "heldout") == 0, "the teacher must come from the run"
    losses = task.sequence_losses(model, "heldout", range(4)).nats
    return sum(losses) / len(losses)


def test_statistics_are_kept_for_everyone_who_compresses(run):
    assert (run / "cache" / "statistics.safetensors").exists()
    spent = [record["counts"] for record in records(run, "tokens")]
    assert sum(counts.get("statistics", 0) for counts in spent) == (4 + 1) * 128  # 1: other text


def test_checkpoint_has_the_measured_loss(run, plan, tmp_path):
    succeed("apply", MODEL, run, "-o", tmp_path / "made")
    measured = heldout_loss(run, load(tmp_path / "made"))
    assert measured == pytest.approx(plan.heldout_nats["returned"].nats, rel=1e-5)


def test_packed_file_has_the_planned_bytes_and_the_same_numbers(run, plan, tmp_path):
    succeed("apply", MODEL, run, "-o", tmp_path, "--packed")
    path = tmp_path / "model.packed.safetensors"
    assert path.stat().st_size == plan.file_bytes == plan.achieved_bytes
    identity = statistics_identity(
        plan.model.weights_sha256, plan.calibration.splits["statistics"].sha256
    )
    kept = StatisticsFile(run / "cache" / "statistics.safetensors", identity)
    applied, unpacked = load(MODEL), load(MODEL)
    apply_plan(applied, plan, kept.load()[1])
    read_packed(path, plan, unpacked)
    for name, tensor in applied.state_dict().items():
        assert torch.equal(tensor, unpacked.state_dict()[name]), name


def test_evaluate_uses_the_runs_statistics(run):
    words = ("evaluate", MODEL, run, "--text", TEXT, "--sequence-length", 128, "--threads", 1)
    measured = json.loads(succeed(*words, "--num-sequences", 4, "--json"))
    assert 0 < measured["plan"]["nats"] < 5


def test_a_plan_away_from_its_run_says_what_is_missing(run, tmp_path):
    alone = tmp_path / "plan.json"
    alone.write_bytes((run / "plan.json").read_bytes())
    result = allocator("apply", MODEL, alone, "-o", tmp_path / "out")
    assert result.code == 2
    assert re.search(r"statistics of its calibration text, and \S+ is missing", result.err)


def test_several_budgets_share_statistics_and_measurements(tmp_path, space, run):
    budgets = "3.0bpw,3.3bpw"
    succeed(*search_arguments(space=space, budget=budgets, trials=8, runs=tmp_path, name="two"))
    first, second = tmp_path / "two-3.0bpw", tmp_path / "two-3.3bpw"
    assert not records(second, "tokens") or all(
        "statistics" not in record["counts"] for record in records(second, "tokens")
    )
    assert (second / "cache" / "statistics.safetensors").read_bytes() == (
        first / "cache" / "statistics.safetensors"
    ).read_bytes()
    alone, shared = load_plan(run / "plan.json"), load_plan(second / "plan.json")
    assert shared.heldout_nats == alone.heldout_nats
    assert shared.search == alone.search
