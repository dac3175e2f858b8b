"""Runs on other objectives and on several texts, and plans under a limit of time."""

import itertools
import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from cli_runs import TEXT, allocator, load, records, search, search_arguments, succeed

from allocator.config import Objective, load_config
from allocator.journal import read_journal
from allocator.latencies import LatencyTable, latency_constraint, load_latencies, save_latencies
from allocator.plan import load_plan
from allocator.run_folder import load_losses, load_space
from objectives.calibration import Calibration
from objectives.evaluation import mean
from objectives.language_objectives import OBJECTIVES

SMALL = {"trials": 4, "sequence_length": 64, "num_statistics": 2, "num_guard": 2, "num_heldout": 2}


def refusal(*words):
    result = allocator(*words)
    assert result.code == 2, result.out
    assert "Traceback" not in result.err
    return result.err


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
    """A second text: the end of the first, with its words in another order."""
    words = TEXT.read_text().split("\n\n")
    lines = [" ".join(reversed(part.split())) for part in words]
    path = tmp_path_factory.mktemp("texts") / "domain.txt"
    path.write_text("\n\n".join(lines))
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, domain):
    """A finished run on two texts; tests may add to its folder and change nothing."""
    return search(tmp_path_factory.mktemp("runs"), also=f"{domain}=3", **SMALL)


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """A finished run, and a table of latencies for its space in which more bytes take longer."""
    folder = search(tmp_path_factory.mktemp("runs"), **SMALL)
    space = load_space(folder / "space.json")
    shapes = {m.matrix_shape for unit in space.units for m in unit.members}
    labels = {o.operator.label for menu in space.menus for o in menu}
    seconds = {
        ((rows, columns), label): 1e-9 * rows * columns * (20 if label == "keep" else int(label[3]))
        for (rows, columns), label in itertools.product(sorted(shapes), sorted(labels))
    }
    path = folder.parent / "latencies.csv"
    save_latencies(LatencyTable(seconds), path)
    return folder, path


# Objectives


def test_the_configuration_names_every_objective():
    assert set(get_args(Objective)) == set(OBJECTIVES)


@pytest.fixture(scope="module")
def run_on(tmp_path_factory):
    """Finished runs by objective, each made once: (folder, what it printed)."""
    runs = tmp_path_factory.mktemp("objectives")

    @cache
    def run(objective):
        words = search_arguments(runs=runs, name=objective, objective=objective, **SMALL)
        said = succeed(*words)
        return runs / objective, said

    return run


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "kl"])
def test_a_run_on_every_objective(objective, run_on):
    folder, said = run_on(objective)
    plan = load_plan(folder / "plan.json")
    assert plan.objective == objective
    heldout = plan.heldout_nats["returned"]
    next_token = objective in ("cross_entropy", "perplexity")
    unit = "nats per token" if next_token else plan.loss_unit
    assert f"{unit} ± standard error" in said
    assert (heldout.perplexity is not None) == next_token
    if not next_token:
        assert 0 < heldout.nats < 1
    page = (folder / "report.html").read_text()
    assert f"Measured losses, {unit}" in page
    assert ("nats per token" in page) == next_token
    succeed("report", folder)
    assert load_plan(folder / "plan.json") == plan


def test_perplexity_searches_as_cross_entropy_does(run_on):
    plans = [load_plan(run_on(name)[0] / "plan.json") for name in ("perplexity", "cross_entropy")]
    assert plans[0].search == plans[1].search
    assert plans[0].heldout_nats == plans[1].heldout_nats


def test_another_objective_is_another_run(run_on, tmp_path):
    """Its tables too: gradients are those of the objective's own likelihood."""
    tables = []
    for name in ("hidden_state", "cross_entropy"):
        folder, _ = run_on(name)
        tables.append(load_losses(folder / "losses.npz", load_space(folder / "space.json")))
    felt = [np.concatenate(table["correlated_blend"].losses) for table in tables]
    assert not np.allclose(felt[0], felt[1], rtol=0.05)
    assert np.allclose(
        *(np.concatenate(table["relative_error"].losses) for table in tables), rtol=1e-6
    )
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    text = (folder / "config.yaml").read_text()
    assert "objective: cross_entropy" in text
    text = text.replace("objective: cross_entropy", "objective: hidden_state")
    (changed / "config.yaml").write_text(text)
    assert "was started otherwise (config." in refusal("resume", changed)


# Several texts


def test_a_run_on_two_texts_minimises_their_weighted_mean(mixed, domain, timed, tmp_path):
    plan = load_plan(mixed / "plan.json")
    assert [text.source for text in plan.calibration.texts] == [str(TEXT), str(domain)]
    assert [text.weight for text in plan.calibration.texts] == [1.0, 3.0]
    files = ["calibration.safetensors", "calibration-2.safetensors"]
    for text, name in zip(plan.calibration.texts, files, strict=True):
        found = Calibration.load(mixed / name)
        assert {k: v.sha256 for k, v in text.splits.items()} == found.hashes
    # What the uniform plan loses on each text alone, measured on the same held-out sequences.
    runs = [timed[0], search(tmp_path, text=domain, **SMALL)]
    losses = [load_plan(run / "plan.json").heldout_nats["uniform"] for run in runs]
    expected = mean([0.5 * losses[0].nats, 1.5 * losses[1].nats])
    both = plan.heldout_nats["uniform"]
    assert both.nats == pytest.approx(expected, rel=1e-3)
    assert both.perplexity == pytest.approx(losses[0].perplexity, rel=1e-3)
    assert both.num_tokens == 2 * losses[0].num_tokens == 2 * 2 * 64
    assert plan.tokens["teacher"] == 2 * (8 + 2 + 2) * 64


def test_the_report_names_every_text_and_its_weight(mixed, domain):
    page = (mixed / "report.html").read_text()
    assert f"Calibration text: {TEXT}, weight 1" in page
    assert f"Calibration text: {domain}, weight 3" in page


def test_a_run_on_two_texts_resumes(mixed, tmp_path):
    plan = load_plan(mixed / "plan.json")
    folder = tmp_path / "cut"
    shutil.copytree(mixed, folder)
    shutil.rmtree(folder / "cache")
    lines = (mixed / "journal.jsonl").read_text().splitlines(keepends=True)
    kinds = [record["type"] for record in read_journal(mixed / "journal.jsonl").records]
    (folder / "journal.jsonl").write_text("".join(lines[: kinds.index("evaluation") + 4]))
    succeed("resume", folder)
    again = load_plan(folder / "plan.json")
    assert (again.units, again.search, again.heldout_nats) == (
        plan.units,
        plan.search,
        plan.heldout_nats,
    )
    (folder / "calibration-2.safetensors").unlink()
    assert "calibration-2" in refusal("resume", folder)


def test_other_weights_or_texts_are_another_run(mixed):
    text = (mixed / "config.yaml").read_text()
    changed = re.sub(r"- 3\.0", "- 2.0", text)
    assert changed != text
    copy = mixed.parent / "changed"
    shutil.copytree(mixed, copy)
    (copy / "config.yaml").write_text(changed)
    assert "config.data.weights was [1.0, 3.0], now [1.0, 2.0]" in refusal("resume", copy)


def test_weights_that_are_left_out_are_settled_before_the_search(domain, tmp_path):
    run = search(tmp_path, also=str(domain), **SMALL)
    weights = load_config(run / "config.yaml").data.weights
    assert sum(weights) == pytest.approx(2, rel=1e-4)
    assert len(weights) == 2
    plan = load_plan(run / "plan.json")
    assert tuple(text.weight for text in plan.calibration.texts) == weights
    assert plan.tokens["probes"] == 2 * (2 + 6 * 2) * 64
    assert records(run)[0]["counts"].keys() >= {"probes"}


def test_a_run_on_one_text_is_described_as_before(timed):
    folder, _ = timed
    header = read_journal(folder / "journal.jsonl").header
    assert "also" not in header["config"]["data"]
    assert header["calibration"] == Calibration.load(folder / "calibration.safetensors").hashes


def test_mistakes_about_texts_are_told(domain, tmp_path):
    def said(*also):
        return refusal(*search_arguments(runs=tmp_path, name="run", also=list(also), **SMALL))

    assert "every text a weight (TEXT=WEIGHT) or none" in said(f"{domain}=2", TEXT)
    assert "greater than 0" in said(f"{domain}=-1")
    assert "nothing.txt" in said(f"{tmp_path}/nothing.txt=1")
    assert not (tmp_path / "run").exists()


# Limits of time


def test_a_limit_of_time_is_kept_and_costs_loss(timed, tmp_path):
    folder, path = timed
    words = ("solve", folder, "--budget", "6bpw", "--json", "-o", tmp_path)
    free = json.loads(succeed(*words))[0]
    space, table = load_space(folder / "space.json"), load_latencies(path)
    chosen = {unit.name: unit.choice.label for unit in load_plan(Path(free["plan"])).units}
    choice = tuple(
        [o.operator.label for o in menu].index(chosen[unit.name])
        for unit, menu in zip(space.units, space.menus, strict=True)
    )
    before = table.total(space, choice)
    limit = f"{1e6 * before * 0.8:.3f}us"
    found = json.loads(succeed(*words, "--latencies", path, "--limit", limit))[0]
    assert found["latency_seconds"] <= 0.8 * before
    assert found["predicted_nats"] > free["predicted_nats"]
    assert found["achieved_bytes"] <= found["budget_bytes"]
    assert found["plan"].endswith(f"-6bpw-{limit}.json")
    assert load_plan(Path(found["plan"])).lower_bound_nats <= found["predicted_nats"]
    loose = json.loads(succeed(*words, "--latencies", path, "--limit", "1s"))[0]
    assert loose["predicted_nats"] == pytest.approx(free["predicted_nats"], abs=1e-6)
    shown = succeed(*words[:4], "-o", tmp_path, "--latencies", path, "--limit", limit)
    assert "latency" in shown
    assert " ms" in shown


def test_the_table_travels_as_csv_and_as_json(timed, tmp_path):
    table = load_latencies(timed[1])
    save_latencies(table, tmp_path / "table.json")
    assert load_latencies(tmp_path / "table.json") == table
    assert load(tmp_path / "table.json")[0].keys() == {"rows", "columns", "operator", "seconds"}


def test_latencies_of_a_unit_are_those_of_its_matrices(timed):
    folder, path = timed
    space, table = load_space(folder / "space.json"), load_latencies(path)
    constraint = latency_constraint(space, table, 1.0)
    for unit, menu, costs in zip(space.units, space.menus, constraint.costs, strict=True):
        for option, cost in zip(menu, costs, strict=True):
            bits = 20 if option.operator.label == "keep" else int(option.operator.label[3])
            assert cost == pytest.approx(1e-9 * unit.num_weights * bits)


def test_mistakes_about_latencies_are_told(timed, tmp_path):
    folder, path = timed
    words = ("solve", folder, "--budget", "3bpw", "-o", tmp_path)
    limited = (*words, "--latencies", path)
    assert "go together" in refusal(*limited)
    assert "go together" in refusal(*words, "--limit", "1ms")
    assert "not a latency" in refusal(*limited, "--limit", "1 hour")
    assert "cannot be met" in refusal(*limited, "--limit", "1us")
    assert "use 'milp'" in refusal(*limited, "--limit", "1s", "--solver", "dynamic")
    lines = path.read_text().splitlines()
    (tmp_path / "gap.csv").write_text("\n".join(lines[:-3]))
    said = refusal(*words, "--latencies", tmp_path / "gap.csv", "--limit", "1s")
    assert "the latencies lack" in said
    assert lines[-1].split(",")[2] in said
    for name, text, sentence in (
        ("twice.csv", "\n".join([*lines, lines[-1]]), "a second latency of"),
        ("faulty.csv", "rows,columns,operator,seconds\n4,4,keep,soon", "and a number; got"),
        ("negative.csv", "rows,columns,operator,seconds\n4,4,keep,-1", "expected seconds, got -1"),
        ("other.csv", "a,rows\n1,2", "it lacks columns, operator, seconds"),
        ("empty.json", "[]", "holds no latencies"),
        ("broken.json", "[", "cannot read"),
        ("numbers.json", "[3]", "and a number; got 3"),
    ):
        (tmp_path / name).write_text(text)
        assert sentence in refusal(*words, "--latencies", tmp_path / name, "--limit", "1s")
    refusal(*words, "--latencies", tmp_path / "absent.csv", "--limit", "1s")


def test_bytes_and_time_that_cannot_be_met_together(timed, tmp_path):
    """Each limit can be met alone: here the small options are the slow ones."""
    folder, path = timed
    slow = load_latencies(path)
    seconds = {key: 1.0 / value for key, value in slow.seconds.items()}
    save_latencies(LatencyTable(seconds), tmp_path / "slow.csv")
    space = load_space(folder / "space.json")
    costs = LatencyTable(seconds).costs(space)
    least = 1.001 * sum(cost.min() for cost in costs)
    said = refusal(
        *("solve", folder, "--budget", "2.3bpw", "-o", tmp_path),
        *("--latencies", tmp_path / "slow.csv", "--limit", f"{least:.6f}s"),
    )
    assert "raise one of them" in said
