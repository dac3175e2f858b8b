"""What ``apply`` and ``export`` write holds the plan: the same numbers, the same bytes."""

import json
import math
import shutil

import pytest
import torch
from cli_runs import MODEL, TEXT, allocator, load, search, succeed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from allocator.apply import read_packed
from allocator.exporters import EXPORTERS
from allocator.plan import load_plan
from objectives.calibration import Calibration, CalibrationRequest, build_calibration


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run in groups that divide every matrix, as toolkits want them."""
    runs = tmp_path_factory.mktemp("runs")
    return search(runs, space="bits-g32", budget="3.4bpw", trials=6, bar_keep=True)


@pytest.fixture(scope="module")
def checkpoint(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("applied") / "checkpoint"
    succeed("apply", MODEL, run, "-o", folder)
    return folder


@torch.inference_mode()
def cross_entropy(model, tokens):
    """Mean next-token cross-entropy, computed by transformers alone."""
    return float(model(input_ids=tokens, labels=tokens).loss)


def test_checkpoint_has_the_held_out_perplexity_of_the_plan(run, checkpoint):
    plan = load_plan(run / "plan.json")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = Calibration.load(run / "calibration.safetensors").splits["heldout"]
    measured = plan.heldout_nats["returned"]
    assert cross_entropy(model, tokens) == pytest.approx(measured.cross_entropy_nats, rel=1e-5)
    assert math.exp(measured.cross_entropy_nats) == pytest.approx(measured.perplexity)
    assert load(checkpoint / "plan.json") == load(run / "plan.json")


def test_evaluate_agrees_with_the_checkpoint(run, checkpoint):
    words = ["--text", TEXT, "--num-sequences", 6, "--sequence-length", 128, "--threads", 1]
    measured = json.loads(succeed("evaluate", MODEL, run, *words, "--json"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    request = CalibrationRequest(
        str(TEXT), sequence_length=128, num_statistics=1, num_search=1, num_guard=1, num_heldout=6
    )
    tokens = build_calibration(request, tokenizer).splits["heldout"]
    for name, folder in (("plan", checkpoint), ("dense", MODEL)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found = cross_entropy(model, tokens)
        assert measured[name]["cross_entropy_nats"] == pytest.approx(found, rel=1e-5)
        assert measured[name]["perplexity"] == pytest.approx(math.exp(found), rel=1e-4)
    assert measured["dense"]["nats"] == pytest.approx(0, abs=1e-5)
    assert measured["plan"]["nats"] > 0.01
    table = succeed("evaluate", MODEL, run, *words)
    assert "perplexity" in table


@pytest.mark.parametrize(
    ("num_sequences", "length", "seed", "text", "said"),
    [
        (4, 128, 0, TEXT, False),  # the run's own held-out sequences
        (2, 128, 0, TEXT, False),
        (5, 128, 0, TEXT, True),  # the fifth was the guard's
        (4, 128, 1, TEXT, True),
        (2, 64, 0, TEXT, True),
        (8, 64, 1, "wiki-summaries", False),
    ],
)
def test_evaluate_says_where_the_search_may_have_read_the_text(
    run, num_sequences, length, seed, text, said
):
    words = ["--num-sequences", num_sequences, "--sequence-length", length, "--data-seed", seed]
    found = allocator("evaluate", MODEL, run, "--text", text, *words, "--threads", 1)
    assert found.code == 0, found.err
    assert ("may have read some of these sequences" in found.err) is said


def test_packed_file_has_the_plans_bytes_and_numbers(run, checkpoint, tmp_path):
    plan = load_plan(run / "plan.json")
    text = succeed("apply", MODEL, run, "-o", tmp_path / "packed", "--packed")
    path = tmp_path / "packed" / "model.packed.safetensors"
    assert path.stat().st_size == plan.achieved_bytes
    assert f"{plan.achieved_bytes:,} bytes" in text
    unpacked = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    read_packed(path, plan, unpacked)
    applied = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    for name, tensor in unpacked.state_dict().items():
        assert torch.equal(tensor, applied[name]), name


@pytest.mark.parametrize("toolkit", ["evopress", "gptqmodel", "torchao"])  # of rounded matrices
def test_exports_are_read_back_and_equal_to_the_plan(run, tmp_path, toolkit):
    plan = load_plan(run / "plan.json")
    folder = tmp_path / toolkit
    receipt = json.loads(succeed("export", run, "--to", toolkit, "-o", folder, "--json"))
    assert receipt["num_units"] == len(plan.units)
    assert EXPORTERS[toolkit]().verify(plan, folder) == []
    wrong = plan.model_copy(
        update={"units": tuple(u.model_copy(update={"operator": other(u)}) for u in plan.units)}
    )
    assert len(EXPORTERS[toolkit]().verify(wrong, folder)) >= len(plan.units)
    assert "read back and equal" in succeed("export", run, "--to", toolkit, "-o", tmp_path / "b")


def other(unit):
    """Another operator than the unit's."""
    return {**unit.operator, "bits": 8 if unit.operator["bits"] != 8 else 4}


def test_other_models_are_refused_and_leave_nothing(run, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "out"
    words = ["--text", TEXT, "--num-sequences", 2, "--sequence-length", 128]
    for refused in (
        ["apply", model, run, "-o", output],
        ["apply", model, run, "-o", output, "--packed"],
        ["evaluate", model, run, *words],
    ):
        result = allocator(*refused)
        assert result.code == 2
        assert "this model has other weights" in result.err
        assert not output.exists()


def test_a_full_output_folder_is_refused_and_kept(run, tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    result = allocator("apply", MODEL, run, "-o", tmp_path)
    assert result.code == 2
    assert "not an empty folder" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
