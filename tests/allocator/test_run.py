"""Runs from the command line, end to end: what is written, what is spent, what comes again."""

import csv
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from cli_runs import (
    MODEL,
    TINY,
    allocator,
    load,
    measured_keys,
    records,
    search,
    search_arguments,
    start,
    succeed,
)

from allocator.config import SearchConfig
from allocator.executors import EXECUTORS
from allocator.exporters import EXPORTERS
from allocator.journal import read_journal
from allocator.plan import load_plan, plan_json_schema
from allocator.run_folder import load_losses, load_space
from allocator.searches import SEARCHES
from allocator.solvers import SOLVERS
from objectives.calibration import Calibration
from objectives.sensitivity import SCORERS
from search_spaces.operators import OPERATORS
from search_spaces.presets import PRESETS
from search_spaces.ties import TIES

KINDS = {
    "executors": EXECUTORS,
    "exporters": EXPORTERS,
    "operators": OPERATORS,
    "scorers": SCORERS,
    "searches": SEARCHES,
    "solvers": SOLVERS,
    "spaces": PRESETS,
    "ties": TIES,
}
FILES = {
    "config.yaml",
    "journal.jsonl",
    "space.json",
    "calibration.safetensors",
    "losses.npz",
    "plan.json",
    "frontier.csv",
    "report.html",
    "cache",
}
SCORED = SearchConfig().scorers


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run; tests may add to its folder and change nothing."""
    return search(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def plan(run):
    return load_plan(run / "plan.json")


# What a run leaves


def test_run_folder_holds_what_its_readme_says(run):
    assert {path.name for path in run.iterdir()} == FILES
    space = load_space(run / "space.json")
    assert set(load_losses(run / "losses.npz", space)) == {*SCORED, "refit"}
    assert Calibration.load(run / "calibration.safetensors").splits["search"].shape == (8, 128)
    assert len(list((run / "cache").iterdir())) == 4  # three teachers and the memory used


def test_plan_keeps_the_budget_and_returns_the_guards_choice(plan):
    assert plan.achieved_bytes <= plan.budget_bytes
    assert plan.slack_bytes == plan.budget_bytes - plan.achieved_bytes
    assert plan.searched_bytes == sum(unit.bytes for unit in plan.units)
    assert plan.bits_per_weight <= 2.6
    guard = {name: entry.nats for name, entry in plan.guard_nats.items() if name != "returned"}
    assert {name for name in guard if ":" not in name} == {"uniform", "dp", "search"}
    distinct = {plan.heldout_nats[name].nats for name in guard}
    assert all(plan.heldout_nats[f"dp:{scorer}"].nats in distinct for scorer in SCORED)
    assert len([name for name in guard if name.startswith("dp:")]) >= 2
    assert guard[plan.returned] == min(guard.values())
    assert plan.guard_nats["returned"].nats == guard[plan.returned]


def test_plan_reports_held_out_losses_with_their_errors(plan):
    for name in ("uniform", "dp", "returned", *(f"dp:{scorer}" for scorer in SCORED)):
        entry = plan.heldout_nats[name]
        assert entry.nats > 0
        assert entry.standard_error_nats > 0
        assert entry.perplexity > 1
        assert entry.num_tokens == 4 * 128
    difference = plan.heldout_differences_nats["returned - uniform"]
    expected = plan.heldout_nats["returned"].nats - plan.heldout_nats["uniform"].nats
    assert difference.nats == pytest.approx(expected, abs=1e-5)
    assert plan.lower_bound_nats + plan.gap_nats <= plan.predicted_nats


def test_plan_accounts_for_every_token(run, plan):
    by_split = {}
    for record in records(run, "evaluation"):
        split = record["evaluation"]["fidelity"]["split"]
        by_split[split] = by_split.get(split, 0) + record["evaluation"]["num_tokens"]
    spent = dict(plan.tokens)
    assert spent.pop("statistics") == 4 * 128
    assert spent.pop("statistics_backward") == 2 * 4 * 128
    assert spent.pop("teacher") == (8 + 4 + 4) * 128
    assert by_split["search"] == spent["search"] + spent.pop("search_backward")
    assert spent.keys() == {"search", "guard", "heldout"}
    assert plan.search.num_evaluations == TINY["--trials"]


def test_frontier_is_monotone_and_convex(run):
    rows = list(csv.DictReader((run / "frontier.csv").read_text().splitlines()))
    sizes = [int(row["searched_bytes"]) for row in rows]
    losses = [float(row["predicted_loss"]) for row in rows]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)
    space = load_space(run / "space.json")
    assert (sizes[0], sizes[-1]) == (space.least_bytes, space.most_bytes)
    slopes = [(losses[i] - losses[i + 1]) / (sizes[i + 1] - sizes[i]) for i in range(len(rows) - 1)]
    assert all(a >= b * (1 - 1e-6) for a, b in pairwise(slopes))


def test_report_is_one_file_that_needs_no_network(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 2_000_000
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", page)
    assert "@import" not in page
    assert not re.search(r"url\((?!#|[\"']?data:)", page)


def test_users_see_no_chatter_of_libraries(tmp_path):
    process = start(*search_arguments(runs=tmp_path, name="run", trials=4))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    for word in (
        "torchao",
        "triton",
        "pytree",
        "Failed to load",
        "Warning",
        "WARNING",
        "tensorflow",
    ):
        assert word not in out + err
    assert "stored" in out


# The same again


def test_equal_seeds_give_equal_journals_and_others_do_not(run, tmp_path):
    same = search(tmp_path / "same")
    other = search(tmp_path / "other", seed=3)  # reads the two windows in the other order
    journal = (run / "journal.jsonl").read_bytes()
    assert (same / "journal.jsonl").read_bytes() == journal
    assert (same / "plan.json").read_bytes() == (run / "plan.json").read_bytes()
    assert (same / "report.html").read_text().count("</html>") == 1
    assert (other / "journal.jsonl").read_bytes() != journal
    assert measured_keys(other) != measured_keys(run)


def test_report_regenerates_the_results_from_the_journal(run):
    before = {name: (run / name).read_bytes() for name in ("plan.json", "frontier.csv")}
    journal = (run / "journal.jsonl").read_bytes()
    for name in before:
        (run / name).unlink()
    (run / "report.html").unlink()
    assert str(run / "report.html") in succeed("report", run)
    assert {name: (run / name).read_bytes() for name in before} == before
    assert (run / "report.html").is_file()
    assert (run / "journal.jsonl").read_bytes() == journal


def test_a_second_budget_reuses_the_loss_tables(run):
    second = search(run.parent, "second", budget="3bpw")
    kinds = {record["type"] for record in records(second)}
    assert kinds == {"table", "tokens", "evaluation", "searched"}
    assert {record["scorer"] for record in records(second, "table")} == set(SCORED)
    spent = load_plan(second / "plan.json").tokens
    assert spent.keys() == {"teacher", "search", "search_backward", "guard", "heldout"}
    space = load_space(run / "space.json")
    ours, theirs = (load_losses(folder / "losses.npz", space) for folder in (run, second))
    for name in SCORED:
        assert all(
            (a == b).all() for a, b in zip(ours[name].losses, theirs[name].losses, strict=True)
        )


def test_new_budgets_are_solved_without_the_model(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    folder = search(tmp_path / "runs", model=model)
    shutil.rmtree(model)
    (folder / "cache").rename(tmp_path / "elsewhere")
    rows = json.loads(succeed("solve", folder, "--budget", "2.5bpw,700kB,40%", "--json"))
    made = [load_plan(Path(row["plan"])) for row in rows]
    assert [plan.budget_text for plan in made] == ["2.5bpw", "700kB", "40%"]
    for plan in made:
        assert plan.achieved_bytes <= plan.budget_bytes
        assert plan.gap_nats == 0
        assert plan.heldout_nats == {}
    losses = [plan.predicted_nats for plan in sorted(made, key=lambda plan: plan.achieved_bytes)]
    assert losses == sorted(losses, reverse=True)
    fisher = succeed(
        "solve", folder.name, "--runs", folder.parent, "--budget", "3bpw", "--scorer", "fisher",
        "--solver", "lagrangian", "-o", tmp_path / "plans",
    )  # fmt: skip
    assert "fisher" in fisher
    path = tmp_path / "plans" / "plan-fisher-3bpw-lagrangian.json"
    assert load_plan(path).scorer == "fisher"
    assert str(path) in fisher
    shown = succeed("show", folder)
    assert "nats" in shown
    whose = "" if load_plan(folder / "plan.json").returned == "dp" else "the solver's own plan is "
    assert f"; {whose}proved optimal for the additive model" in shown
    assert str(folder / "report.html") in succeed("report", folder)


# What can be asked for


def test_several_budgets_make_several_runs(tmp_path):
    budgets = "2.5bpw, 40%, 2.5bpw"
    words = search_arguments(runs=tmp_path, name="many", budget=budgets, trials=4)
    text = succeed(*words, "--json")
    found = json.loads(text)
    assert [entry["budget_text"] for entry in found] == ["2.5bpw", "40%"]
    assert {path.name for path in tmp_path.iterdir()} == {"many-2.5bpw", "many-40pct", "losses"}
    for entry in found:
        plan = load_plan(Path(entry["plan"]))
        assert plan.achieved_bytes == entry["achieved_bytes"] <= plan.budget_bytes
    assert "table" in {record["type"] for record in records(tmp_path / "many-40pct")}


@pytest.mark.parametrize("name", ["tpe", "evolution", "random"])
def test_other_searches(run, name):
    folder = search(run.parent, name, search=name)
    plan = load_plan(folder / "plan.json")
    assert plan.search.name == name
    assert plan.search.num_evaluations == TINY["--trials"]
    assert plan.achieved_bytes <= plan.budget_bytes


def test_token_cap_holds(tmp_path):
    cap = 12_000
    folder = search(tmp_path, trials=None, tokens=cap)
    plan = load_plan(folder / "plan.json")
    spent = sum(plan.tokens.values()) - plan.tokens["guard"] - plan.tokens["heldout"]
    assert cap - 4 * 128 < spent <= cap
    assert "tokens" in plan.search.stopped


def test_time_limited_run_can_be_reported_and_extended(tmp_path):
    folder = search(tmp_path, trials=None, time="0.3s")
    first = load_plan(folder / "plan.json")
    assert "seconds" in first.search.stopped
    before = (folder / "plan.json").read_bytes()
    (folder / "plan.json").unlink()
    succeed("report", folder)
    assert (folder / "plan.json").read_bytes() == before
    trials = first.search.num_evaluations + 6
    succeed("resume", folder, "--trials", trials)
    longer = load_plan(folder / "plan.json")
    assert longer.search.num_evaluations == trials
    assert longer.search.stopped == f"all {trials} trials are done"
    keys = measured_keys(folder)
    assert len(set(keys)) == len(keys)


def test_a_longer_run_is_as_if_it_had_been_so_from_the_start(run, tmp_path):
    folder = search(tmp_path, trials=5)
    shutil.rmtree(folder / "cache")
    succeed("resume", folder, "--trials", TINY["--trials"])
    ours, theirs = load(folder / "plan.json"), load(run / "plan.json")
    assert ours["search"] == theirs["search"]
    assert ours["units"] == theirs["units"]


def test_pins_exclusions_ties_and_openings(tmp_path):
    folder = search(
        tmp_path,
        budget="3.5bpw",
        trials=4,
        ties="vllm",
        pin=["*.layers.1.mlp.down_proj=int6-g64", "*.layers.2.*=int3-g64"],
        exclude=["*.layers.5.*"],
        open=["embeddings"],
    )
    plan = load_plan(folder / "plan.json")
    units = {unit.name: unit for unit in plan.units}
    assert plan.ties == "vllm"
    assert units["model.layers.1.mlp.down_proj"].choice.label == "int6-g64"
    assert not any(".layers.5." in name for name in units)
    assert any(".layers.5." in tensor.name for tensor in plan.fixed)
    assert any("embed_tokens" in member.module for u in plan.units for member in u.members)
    tied = {
        m.module.rsplit(".", 1)[1] for u in plan.units if len(u.members) == 3 for m in u.members
    }
    assert tied == {"q_proj", "k_proj", "v_proj"}


def test_space_file(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(
        "name: mine\n"
        "menu:\n"
        "  - {name: round_to_nearest, bits: 3, group_size: 32}\n"
        "  - {name: round_to_nearest, bits: 4, group_size: 32}\n"
        "keep: false\n"
        "ties: vllm\n"
        "pins:\n"
        '  "*.layers.0.mlp.down_proj": int4-g32\n'
    )
    folder = search(tmp_path / "runs", space=file, budget="4bpw", trials=4)
    plan = load_plan(folder / "plan.json")
    assert (plan.space, plan.ties) == ("mine", "vllm")
    labels = {unit.name: unit.choice.label for unit in plan.units}
    assert labels["model.layers.0.mlp.down_proj"] == "int4-g32"
    assert set(labels.values()) <= {"int3-g32", "int4-g32"}


# Looking at it


def test_show(run, plan):
    text = succeed("show", run)
    for word in ("int2-g64", "down_proj", f"{plan.budget_bytes:,}", f"{plan.achieved_bytes:,}"):
        assert word in text
    assert json.loads(succeed("show", run / "plan.json", "--json")) == load(run / "plan.json")
    assert json.loads(succeed("show", "--schema")) == plan_json_schema()


@pytest.mark.parametrize("kind", KINDS)
def test_list(kind):
    rows = json.loads(succeed("list", kind, "--json"))
    assert [row["name"] for row in rows] == sorted(KINDS[kind])
    assert all(len(row["summary"]) > 10 for row in rows)
    table = succeed("list", kind)
    assert all(row["name"] in table for row in rows)


def test_finished_run_is_left_as_it_is_by_resume(run):
    before = {
        path.name: path.read_bytes()
        for path in run.iterdir()
        if path.suffix != ".html" and path.is_file()
    }
    succeed("resume", run)
    after = {name: (run / name).read_bytes() for name in before if name != "losses.npz"}
    assert after == {name: data for name, data in before.items() if name != "losses.npz"}
    assert read_journal(run / "journal.jsonl").header["format"] == 1
    assert allocator("resume", run, "--json").code == 0
