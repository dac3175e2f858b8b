"""Options of searches as a user gives them: to one search, to a portfolio, and told by ``list``."""

import json

import pytest
from cli_runs import allocator, load, measured_keys, search, search_arguments, succeed

from allocator.config import load_config
from allocator.journal import read_journal

SMALL = {"num_statistics": 2, "num_search": 4, "num_guard": 2, "num_heldout": 2, "trials": 8}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A finished evolution whose generations are smaller than usual."""
    options = ["num_offspring=2", "survivors=1", "batches=1", "same_size_only=true"]
    runs = tmp_path_factory.mktemp("runs")
    return search(runs, search="evolution", search_option=options, **SMALL)


def test_options_change_the_search_and_are_kept_with_the_run(tuned):
    expected = {"num_offspring": 2, "survivors": 1, "batches": 1, "same_size_only": True}
    assert load_config(tuned / "config.yaml").search.options == expected
    header = read_journal(tuned / "journal.jsonl").header
    assert header["config"]["search"]["options"] == expected
    usual = search(tuned.parent, "usual", search="evolution", **SMALL)
    assert measured_keys(usual) != measured_keys(tuned)
    assert "options" not in read_journal(usual / "journal.jsonl").header["config"]["search"]
    page = (tuned / "report.html").read_text()
    assert "num_offspring=2" in page
    assert "Search options" not in (usual / "report.html").read_text()


def test_a_run_with_options_resumes_with_them(tuned):
    plan = load(tuned / "plan.json")
    lines = (tuned / "journal.jsonl").read_text().splitlines(keepends=True)
    copy = tuned.parent / "cut"
    copy.mkdir()
    for path in tuned.iterdir():
        if path.is_file() and path.name != "plan.json":
            (copy / path.name).write_bytes(path.read_bytes())
    kinds = [record["type"] for record in read_journal(tuned / "journal.jsonl").records]
    (copy / "journal.jsonl").write_text("".join(lines[: kinds.index("evaluation") + 4]))
    succeed("resume", copy)
    again = load(copy / "plan.json")
    assert (again["units"], again["search"]) == (plan["units"], plan["search"])


def test_options_of_a_portfolio_carry_the_name_of_their_search(tmp_path):
    options = ["evolution.num_offspring=2", "model_guided.descent.attempts=1"]
    portfolio = {"search": "model_guided,evolution"}
    run = search(tmp_path, search_option=options, **portfolio, **SMALL)
    assert load(run / "plan.json")["search"]["num_evaluations"] == 8
    words = search_arguments(runs=tmp_path, name="x", search_option="num_offspring=2", **portfolio)
    result = allocator(*words)
    assert result.code == 2
    assert "such as model_guided.num_offspring" in result.err


def test_the_published_schedule_by_its_name(tmp_path):
    options = ["schedule=published", "pin_multiple=none", "num_initial=4"]
    run = search(tmp_path, search="surrogate_nsga2", search_option=options, **SMALL)
    assert load(run / "plan.json")["search"]["num_evaluations"] == 8


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("same_size=true", "did you mean 'same_size_only'"),
        ("num_offspring=many", "expected a whole number, got 'many'"),
        ("num_offspring", "expects KEY=VALUE"),
        (["rounds=2", "rounds=3"], "given twice"),
        ("num_offspring=-1", "expected at least one offspring"),
        ("schedule=published", "needs kind="),
    ],
)
def test_faulty_options_are_refused_before_anything_is_written(options, sentence, tmp_path):
    words = search_arguments(runs=tmp_path, name="x", search="evolution", search_option=options)
    result = allocator(*words)
    assert (result.code, result.out) == (2, "")
    assert sentence in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_the_list_of_searches_shows_their_options():
    rows = {row["name"]: row for row in json.loads(succeed("list", "searches", "--json"))}
    assert rows["random"]["options"] == {}
    assert rows["evolution"]["options"]["survivors"] == "2,1"
    assert rows["evolution"]["options"]["kind"] == "bits|sparsity|drop"
    assert rows["model_guided"]["options"]["descent.attempts"] == "2"
    table = succeed("list", "searches")
    for text in ("same_size_only=false", "schedule=default|published", "sampling.patience=32"):
        assert text in table
