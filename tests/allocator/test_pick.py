"""``allocator pick``: plans of a measured front, as a user asks for them."""

import csv
import json
import shutil

import pytest
from cli_runs import MODEL, TEXT, allocator, search, succeed

from allocator.front import FrontRow, best_within
from allocator.plan import load_plan
from allocator.searches.base import FrontPoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of nsga2, and the rows of its front."""
    return search(tmp_path_factory.mktemp("runs"), search="nsga2", trials=24)


@pytest.fixture(scope="module")
def rows(run):
    with (run / "front.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def refusal(*words):
    result = allocator(*words)
    assert (result.code, result.out) == (2, "")
    assert len(result.err.strip().splitlines()) == 1
    return result.err


def test_each_budget_gets_the_best_point_that_fits(run, rows, tmp_path):
    budgets = [f"{float(row['bits_per_weight']) + 0.002:.4f}bpw" for row in rows[:2]]
    words = ("pick", run, "--budget", ",".join(budgets), "-o", tmp_path, "--json")
    found = json.loads(succeed(*words))
    assert [plan["budget_text"] for plan in found] == budgets
    for plan in found:
        fitting = [r for r in rows if int(r["searched_bytes"]) <= plan["searched_budget_bytes"]]
        upper = [float(r["loss_nats"]) + float(r["standard_error_nats"]) for r in fitting]
        row = fitting[upper.index(min(upper))]
        assert plan["achieved_bytes"] <= plan["budget_bytes"]
        assert plan["searched_bytes"] == int(row["searched_bytes"])
        assert plan["num_sequences"] == int(row["sequences"])
        measured = plan["search_nats"]["search"]
        assert measured["nats"] == float(row["loss_nats"])
        assert measured["num_tokens"] == int(row["sequences"]) * 128
        assert plan["gap_nats"] is None
        assert plan["search"]["name"] == "nsga2"


def test_a_picked_plan_is_shown_exported_and_measured(run, tmp_path):
    shown = succeed("pick", run, "--budget", "100%")
    assert "search's own text" in shown
    path = run / "plan-front-100pct.json"
    assert f"100%: {path}" in shown
    (name,) = (row for row in load_plan(path).search_nats)
    facts = succeed("show", path)
    assert f"search text, {name}" in facts
    assert "nothing is proved" in facts
    succeed("export", path, "--to", "evopress", "-o", tmp_path / "out")
    words = ("evaluate", MODEL, path, "--text", TEXT, "--num-sequences", "2")
    measured = json.loads(succeed(*words, "--sequence-length", "64", "--json"))
    assert all(entry["nats"] >= 0 for entry in measured.values())


def test_what_the_front_cannot_answer(run, copy):
    (copy / "front.csv").unlink()
    assert "make one; 'allocator solve' answers" in refusal("pick", copy, "--budget", "3bpw")
    assert "knows no latencies" in refusal("pick", run, "--budget", "3bpw", "--limit", "1ms")
    assert "cannot be met" in refusal("pick", run, "--budget", "1bpw")
    before = sorted(run.iterdir())
    assert "is not a budget" in refusal("pick", run, "--budget", "100%,much")
    assert sorted(run.iterdir()) == before


def test_a_budget_between_the_cheapest_assignment_and_the_front(copy, rows):
    path = copy / "front.csv"
    path.write_text("\n".join([",".join(rows[0]), *path.read_text().splitlines()[-1:]]) + "\n")
    bits = float(rows[-1]["bits_per_weight"]) - 0.05
    said = refusal("pick", copy, "--budget", f"99%,{bits}bpw")
    assert f"no measured point of the front is within {bits}bpw: it reaches down to" in said
    assert not (copy / "plan-front-99pct.json").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [("assignment", "choice"), (" 1 ", " x "), (" 1 ", " 99 "), (" 1 ", " "), (" 1 ", " -1 ")],
)
def test_a_damaged_front_is_named_and_written_again(copy, old, new):
    path = copy / "front.csv"
    before = path.read_text()
    path.write_text(before.replace(old, new, 1))
    assert "front.csv is no front of this run" in refusal("pick", copy, "--budget", "100%")
    succeed("report", copy)
    assert path.read_text() == before


def test_latencies_count_where_they_are_asked_for():
    points = [FrontPoint((i,), 10 * i, 5.0 - i, 0.1, 4) for i in range(4)]
    rows = [FrontRow(point, seconds) for point, seconds in zip(points, (3, 4, 2, 9), strict=True)]
    assert best_within(rows, 30) == rows[3]
    assert best_within(rows, 30, 4) == rows[2]
    assert best_within(rows, 15, 4) == rows[1]
    assert best_within(rows, 15, 1) is None
    noisy = FrontRow(points[2]._replace(loss_nats=1.9, standard_error_nats=2.3), 1.0)
    assert best_within([*rows[:2], noisy], 30) == rows[1]
    assert best_within([FrontRow(points[0])], 30, 4) is None
