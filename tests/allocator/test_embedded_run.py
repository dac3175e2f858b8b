"""The README's job on the embedded real model, with very little text."""

import math

import pytest
import torch
from cli_runs import search, succeed
from transformers import AutoModelForCausalLM

from allocator.plan import load_plan
from objectives.calibration import Calibration

pytestmark = pytest.mark.embedded


def test_main_job_on_the_embedded_model(tmp_path):
    folder = search(
        tmp_path,
        model="smollm2-135m",
        text="wiki-summaries",
        budget="3.25bpw",
        sequences=2,
        trials=6,
    )
    plan = load_plan(folder / "plan.json")
    assert plan.achieved_bytes <= plan.budget_bytes
    assert plan.bits_per_weight <= 3.25
    assert plan.guard_nats["returned"].nats <= plan.guard_nats["uniform"].nats
    assert plan.search.num_failed == 0
    succeed("apply", "smollm2-135m", folder, "-o", tmp_path / "applied")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "applied", dtype=torch.float32)
    tokens = Calibration.load(folder / "calibration.safetensors").splits["heldout"]
    with torch.inference_mode():
        found = math.exp(float(model(input_ids=tokens, labels=tokens).loss))
    assert found == pytest.approx(plan.heldout_nats["returned"].perplexity, rel=1e-4)
