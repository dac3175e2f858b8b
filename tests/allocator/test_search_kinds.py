"""Searches as a user asks for them: portfolios, fronts, formulas, warm starts, corrected tables."""

import csv
import json

import numpy as np
import optuna
import pytest
from cli_runs import allocator, load, measured_keys, records, search, search_arguments, succeed

from allocator.measured_run import read_measured_run
from allocator.run_folder import RunFolder, load_losses, load_space
from objectives.evaluation import Evaluation


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return search(tmp_path_factory.mktemp("runs"), "first")


def test_a_portfolio_shares_one_budget(tmp_path):
    run = search(tmp_path, search="model_guided,evolution", trials=16)
    plan = load(run / "plan.json")
    assert plan["search"]["name"] == "model_guided,evolution"
    assert plan["search"]["num_evaluations"] == 16
    before = (run / "plan.json").read_bytes()
    succeed("report", run)
    assert (run / "plan.json").read_bytes() == before


def test_an_unknown_member_of_a_portfolio_is_named(tmp_path):
    result = allocator(*search_arguments(runs=tmp_path, search="model_guided,evolutoin"))
    assert result.code == 2
    assert "did you mean 'evolution'" in result.err


def test_nsga2_leaves_a_front_within_the_budget(tmp_path):
    run = search(tmp_path, search="nsga2", trials=24)
    with (run / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    sizes = [int(row["searched_bytes"]) for row in rows]
    losses = [float(row["loss_nats"]) for row in rows]
    assert len(rows) > 2
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    (ended,) = records(run, "searched")
    assert ended["notes"]["num_front"] == len(rows)
    assert ended["notes"]["hypervolume_nats"] > 0


def test_a_formula_is_saved_and_replayed(tmp_path):
    run = search(tmp_path, search="formula", trials=12)
    formula = load(run / "formula.json")
    assert formula["reduction"]
    assert len(records(run, "importances")) == 1
    journal = (run / "journal.jsonl").read_bytes()
    succeed("report", run)
    assert load(run / "formula.json") == formula
    assert (run / "journal.jsonl").read_bytes() == journal


def test_a_corrected_table_solves_other_budgets(first, tmp_path):
    space = load_space(first / "space.json")
    tables = load_losses(first / "losses.npz", space)
    assert tables["refit"].unit == "nats"
    uniform = space.uniform(int(load(first / "plan.json")["searched_bytes"]))
    predicted = sum(float(row[i]) for row, i in zip(tables["refit"].losses, uniform, strict=True))
    measured = load(first / "plan.json")["search_nats"]["uniform"]["nats"]
    assert predicted == pytest.approx(measured, rel=0.5)
    assert not np.allclose(tables["refit"].losses[0], tables["correlated_blend"].losses[0])
    words = ("solve", first, "--budget", "3bpw", "--scorer", "refit", "-o", tmp_path, "--json")
    (plan,) = json.loads(succeed(*words))
    assert plan["achieved_bytes"] <= plan["budget_bytes"]


def test_warm_start_knows_what_the_first_run_measured(first):
    second = search(first.parent, "second", warm_start="first", seed=3)
    (record,) = records(second, "warm_start")
    assert record["differs"] == []
    assert len(record["evaluations"]) == len(
        [
            e
            for e in records(first, "evaluation")
            if e["evaluation"]["fidelity"]["split"] == "search"
        ]
    )
    best = load(second / "plan.json")["search_nats"]["returned"]["nats"]
    assert best <= 1.05 * load(first / "plan.json")["search_nats"]["returned"]["nats"]
    assert not set(measured_keys(first)[:2]) & set(measured_keys(second)[:2])
    known = [nats for nats, _ in read_measured_run(RunFolder(second)).losses().values()]
    reported = load(second / "plan.json")["search_nats"]["returned"]["nats"]
    assert any(reported == pytest.approx(nats) for nats in known), "with what was inherited"


def test_warm_start_on_other_text_carries_assignments(first):
    other = search(first.parent, "other", warm_start="first", data_seed=5)
    (record,) = records(other, "warm_start")
    assert "search text" in " ".join(record["differs"])
    assert record["evaluations"] == []
    assert record["starts"]


def test_warm_start_from_nowhere_says_so(first):
    result = allocator(*search_arguments(runs=first.parent, name="x", warm_start="missing"))
    assert result.code == 2
    assert "missing" in result.err


def test_a_chain_of_warm_starts_loses_nothing(first):
    """What the first run measured comes to the third through the second, and to its study."""
    second = search(first.parent, "chained", warm_start="first", search="evolution", trials=20)
    third = search(first.parent, "third", warm_start="chained", search="random")
    of_first, of_second, carried = (
        {e.key for e in read_measured_run(RunFolder(run)).evaluations}
        for run in (first, second, third)
    )
    assert of_first < of_second < carried
    (record,) = records(third, "warm_start")
    assert {Evaluation.from_json(e).key for e in record["evaluations"]} == of_second
    storage = f"sqlite:///{first.parent / 'chain.db'}"
    succeed("export-study", second, "--storage", storage)
    study = optuna.load_study(study_name="chained", storage=storage)
    inherited = [t for t in study.trials if t.user_attrs.get("inherited")]
    assert 0 < len(inherited) < len(study.trials)
    assert "returned" in study.user_attrs["candidates"]


def test_a_portfolio_keeps_what_its_members_found(tmp_path):
    run = search(tmp_path, search="nsga2,formula", trials=24)
    assert load(run / "formula.json")["reduction"]
    with (run / "front.csv").open() as file:
        assert len(list(csv.DictReader(file))) > 1
    (ended,) = records(run, "searched")
    assert ended["notes"]["nsga2: num_front"] > 0


def test_parts_of_blocks_are_dropped_within_the_budget(tmp_path):
    """Depth, as EvoPress and others search it: an option that leaves no byte of a unit."""
    run = search(tmp_path, space="depth", budget="80%", search="evolution", trials=16)
    plan = load(run / "plan.json")
    assert plan["achieved_bytes"] <= plan["budget_bytes"]
    labels = [unit["operator"] for unit in plan["units"]]
    dropped = [operator for operator in labels if operator["name"] == "prune"]
    assert 0 < len(dropped) < len(labels)
    assert "drop" in succeed("list", "spaces")
    assert (run / "report.html").stat().st_size > 10_000
