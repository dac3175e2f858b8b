"""A formula found on one model, applied to another one without a search."""

import json

import numpy as np
import pytest
from cli_runs import MODEL, TEXT, allocator, load, search, succeed

from allocator.plan import load_plan
from allocator.searches.expression import Formula

READ = ("--text", TEXT, "--sequence-length", 64, "--num-statistics", 4, "--device", "cpu")
READ = (*READ, "--dtype", "float32", "--threads", 1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The run of a formula search on the tiny model."""
    runs = tmp_path_factory.mktemp("runs")
    return search(runs, search="formula", trials=9, num_statistics=2, num_guard=2, num_heldout=2)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model than the formula was found on: more blocks, wider, with other weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig.from_pretrained(MODEL)
    config.num_hidden_layers += 2
    config.intermediate_size += 64
    config.layer_types = None
    folder = tmp_path_factory.mktemp("models") / "other"
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # blocks that differ, so that a formula has something to tell apart
        for number, block in enumerate(model.model.layers):
            block.mlp.down_proj.weight *= 1 + number
            block.self_attn.o_proj.weight[: 1 + number] *= 9
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


def test_a_formula_serves_another_model(found, other, tmp_path):
    words = ("transfer", found, other, "--budget", "3bpw", *READ)
    said = json.loads(succeed(*words, "-o", tmp_path / "first", "--json"))
    plan = load_plan(tmp_path / "first" / "plan.json")
    assert said["plan"] == str(tmp_path / "first" / "plan.json")
    assert plan.achieved_bytes == said["achieved_bytes"] <= plan.budget_bytes
    assert plan.bits_per_weight > 2.9, "the budget is used"
    assert {unit.depth for unit in plan.units} == set(range(2 + _depth(MODEL)))
    assert plan.heldout_nats == {}
    assert (plan.returned, plan.predicted_nats, plan.gap_nats) == ("formula", None, None)
    assert "nothing was measured" in plan.solver_status
    assert "nothing was measured" in succeed("show", tmp_path / "first")
    assert "wrote" not in succeed(*words, "-o", tmp_path / "second")
    assert load(tmp_path / "second" / "plan.json") == load(tmp_path / "first" / "plan.json")
    succeed("apply", other, tmp_path / "first", "-o", tmp_path / "applied")


def _depth(folder):
    return load(folder / "config.json")["num_hidden_layers"]


def test_the_formula_decides_what_is_removed_where(tmp_path, other):
    """A sign turned round, and the ratios of blocks turn round with it."""
    kept = []
    for sign in (-1, 1):
        path = tmp_path / f"{sign}.json"
        formula = Formula((), "l1_mean", ("identity",), sign=sign, spread=0.3, group="block")
        path.write_text(json.dumps(formula.to_json()))
        words = ("transfer", path, other, "--budget", "4bpw", *READ)
        succeed(*words, "-o", tmp_path / f"plan{sign}")
        units = load_plan(tmp_path / f"plan{sign}" / "plan.json").units
        depths = sorted({unit.depth for unit in units})
        kept.append([sum(unit.bytes for unit in units if unit.depth == d) for d in depths])
    assert np.corrcoef(kept)[0, 1] < -0.5


def test_operators_that_compress_with_statistics_get_them(found, tmp_path):
    words = ("transfer", found, MODEL, "--budget", "60%", "--space", "sparsity", *READ)
    succeed(*words, "-o", tmp_path / "plan")
    succeed("apply", MODEL, tmp_path / "plan", "-o", tmp_path / "applied")


def test_a_transfer_that_fails_leaves_nothing_behind(tmp_path):
    """It fails at the formula, after the statistics were written."""
    path = tmp_path / "formula.json"
    formula = Formula(("minmax", "log"), "mean", ("identity",))  # the logarithm of 0
    path.write_text(json.dumps(formula.to_json()))
    words = ("transfer", path, MODEL, "--budget", "60%", "--space", "sparsity", *READ)
    result = allocator(*words, "-o", tmp_path / "plan")
    assert result.code == 2
    assert "is infinite on these importances" in result.err
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds no formula"),
        ('{"pre": []}', "holds no formula"),
        ("null", "holds no formula"),
        ('{"pre": 3, "reduction": "mean"}', "holds no formula"),
        (
            '{"pre": ["no"], "reduction": "mean", "post": ["abs"], "sign": -1, "spread": 0.1, '
            '"group": "unit"}',
            "expected 0 to 2 operators as pre",
        ),
        (
            '{"pre": [], "reduction": "mean", "post": ["abs"], "sign": -1, "spread": "wide", '
            '"group": "unit"}',
            "expected a number as spread, got 'wide'",
        ),
        (
            '{"pre": "abs", "reduction": "mean", "post": ["abs"], "sign": -1, "spread": 0.1, '
            '"group": "unit"}',
            "expected a list as pre, got 'abs'",
        ),
    ],
)
def test_a_damaged_formula_is_refused_in_one_sentence(content, sentence, tmp_path):
    path = tmp_path / "formula.json"
    path.write_text(content)
    result = allocator("transfer", path, MODEL, "--budget", "3bpw", "-o", tmp_path / "x", *READ)
    assert (result.code, result.out) == (2, "")
    assert sentence in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_mistakes_are_told_before_a_model_is_loaded(found, tmp_path):
    def said(*words):
        result = allocator(*words, *READ)
        assert result.code == 2
        return result.err

    begin = ("transfer", found, MODEL, "-o", tmp_path / "x", "--budget")
    assert "cannot read the formula" in said("transfer", tmp_path / "no", *begin[2:], "3bpw")
    taken = said("transfer", found, MODEL, "-o", found, "--budget", "3bpw")
    assert "choose another output" in taken
    assert "0.1bpw" in said(*begin, "0.1bpw")
    assert "searches the model's cache" in said(*begin, "60%", "--space", "kv")
    assert not (tmp_path / "x").exists()
