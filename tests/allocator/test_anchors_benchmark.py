"""The benchmark of published methods, run as its user does, on a tiny model with few tokens."""

import json
import math
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import charges
import lab
import pytest
import records
import run
import table_errors

ASSETS = Path(__file__).parent.parent / "assets"

TINY = (
    *("--model", str(ASSETS / "tiny_llama"), "--text", str(ASSETS / "persuasion.txt")),
    *("--dtype", "float32", "--device", "cpu", "--length", "16"),
    *("--statistics", "2", "--search", "8", "--heldout", "2"),
)
CELL = ("--spaces", "sparsity", "--budgets", "60 %", "--tokens", "1000")
METHODS = ("outlier ratio (OWL)", "influence (LayerIF)", "random", "tpe, blend")
DEAR = ("one at a time + solver", "marginal perplexity cut (ASVD)")
ON_REQUEST = ("evolution B, truncated", "amq, whole front")
TOO_DEAR = ("evolution B", "tpe, blend")


def bench(folder, *words):
    run.main([*TINY, "--folder", str(folder), *words])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anchors")
    with pytest.MonkeyPatch.context() as patch:  # Wanda's weights are made faster
        patch.setitem(run.SPACES, "sparsity", ("sparsity", run.SPACES["sparsity"][1]))
        bench(folder, *CELL, "--methods", "uniform", *METHODS)
    return folder


@pytest.fixture(scope="module")
def starved(tmp_path_factory):
    """Both spaces with hardly any tokens: a budget that only one has, and what was printed."""
    folder = tmp_path_factory.mktemp("starved")
    words = ("--spaces", "sparsity", "bits-g32", "--budgets", "3 bit", "--tokens", "100")
    with redirect_stdout(StringIO()) as printed:
        bench(folder, *words, "--methods", *DEAR, *ON_REQUEST, *TOO_DEAR)
    return {r["method"]: r for r in records.read_folder(folder)}, printed.getvalue()


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "anchors")


def test_every_plan_is_measured_within_the_budget(finished):
    results = records.read_folder(finished)
    assert [result["method"] for result in results] == ["uniform", *METHODS]
    shares = {result["method"]: len(result["points"]) for result in results}
    assert shares == dict(zip(["uniform", *METHODS], [1, 1, 1, 5, 4], strict=True))
    sizes = [point["bytes"] for result in results for point in result["points"]]
    assert 0 < min(sizes) <= max(sizes) <= 7.4 * 1_105_920 / 8
    for name in ("results.csv", "results.md", "curves.svg"):
        assert (finished / name).stat().st_size, name


def test_a_plan_can_be_measured_again(finished):
    """Each point holds its plan, and the cross-entropy that the table's perplexity is made of."""
    last = {r["method"]: r["points"][-1] for r in records.read_folder(finished)}
    table = (finished / "results.md").read_text()
    for method, point in last.items():
        perplexity = math.exp(sum(point["cross_entropy"]) / len(point["cross_entropy"]))
        row = next(line for line in table.splitlines() if line.startswith(f"| {method} | B"))
        assert f" {perplexity:.2f} |" in row
        assert len(point["plan"]) == 42
    assert last["random"]["plan"] != last["uniform"]["plan"]


def test_published_rules_are_charged_what_they_read(finished):
    tokens = {r["method"]: r["points"][-1]["tokens"] for r in records.read_folder(finished)}
    assert tokens["outlier ratio (OWL)"] == 2 * 16  # one pass over the statistics
    assert tokens["influence (LayerIF)"] >= 2 * 16 * 3  # each backward as two forwards
    assert tokens["uniform"] == 0
    assert tokens["random"] == tokens["tpe, blend"] == 1000


class TwoSplits:
    """What collecting statistics asks of a task."""

    tokens_per_sequence = 10

    def num_sequences(self, split):
        return {"statistics": 8, "search": 5}[split]


@pytest.mark.parametrize(
    ("needs", "passes"),
    [
        ((), 0),
        (("hessian",), 8),
        (("fisher",), 3 * 8),
        (("fisher", "weighted_inputs"), 3 * (8 + 2)),  # a quarter as many of other text
        (("weighted_inputs",), 3 * 2),
    ],
)
def test_tokens_of_statistics(needs, passes):
    assert charges.collected(needs, TwoSplits()) == 10 * passes


def test_what_another_method_measured_counts_again(starved):
    found, _ = starved
    first, second = (found[name]["points"][0]["tokens"] for name in DEAR)
    assert first == second
    per_measurement = 2 * 16
    assert first % per_measurement == 0
    assert first > 2 * 42 * per_measurement  # each matrix has more than two cheaper options


def test_a_second_run_does_nothing(copy, monkeypatch):
    monkeypatch.setattr(run, "Lab", None)
    before = (copy / "sparsity-seed0.jsonl").read_bytes()
    bench(copy, *CELL, "--methods", "uniform", *METHODS)
    assert (copy / "sparsity-seed0.jsonl").read_bytes() == before


def test_nothing_begins_when_time_is_up(copy, capsys):
    """And nobody is told to go on where everything is there."""
    everything = copy / "sparsity-seed0.jsonl"
    bench(copy, *CELL, "--methods", "uniform", *METHODS, "--minutes", "1e-9")
    assert "minutes are up" not in capsys.readouterr().out
    lines = everything.read_text().splitlines(keepends=True)
    everything.write_text("".join(lines[:-1]))
    bench(copy, *CELL, "--methods", "uniform", *METHODS, "--minutes", "1e-9")
    assert "1e-09 minutes are up: the same command goes on" in capsys.readouterr().out
    assert everything.read_text() == "".join(lines[:-1])


def test_time_is_up_before_the_longest_work_would_end(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    clock = run.Clock(1)
    for seconds, allowed in ((25, True), (25, False)):
        with clock.work():
            now[0] += seconds
        assert clock.allows() == allowed
    assert run.Clock(0).allows()


def test_a_folder_goes_on_where_a_csv_ended(finished, tmp_path, monkeypatch):
    """Nothing of it is measured again; table and CSV are those of the folder that it is from."""
    monkeypatch.setattr(run, "Lab", None)
    earlier = ("--earlier", str(finished / "results.csv"))
    bench(tmp_path, *CELL, "--methods", "uniform", *METHODS, *earlier)
    for name in ("results.csv", "results.md"):
        assert (tmp_path / name).read_text() == (finished / name).read_text()


def test_what_is_measured_here_stands_for_what_a_csv_says(copy, tmp_path):
    path, results = tmp_path / "results.csv", copy / "results.csv"
    text = results.read_text().replace(",random,B,0,", ",random,B,7,")
    path.write_text(text.replace(",uniform,B,0,0,", ",uniform,B,0,9,"))
    bench(copy, "--table", "--earlier", str(path))
    rows = records.read_csv(results)
    assert len(rows) == len(records.read_folder(copy)) + 1
    assert ",random,B,7," in results.read_text()
    assert ",uniform,B,0,9," not in results.read_text()


@pytest.mark.parametrize("text", [None, "a,b\n1,2\n", "space,budget\n1,2\n"])
def test_a_csv_of_something_else_is_refused(copy, tmp_path, capsys, text):
    path = tmp_path / "other.csv"
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        bench(copy, "--table", "--earlier", str(path))
    assert stop.value.code == 2
    assert "other.csv is no results.csv of this benchmark" in capsys.readouterr().err


@pytest.mark.parametrize("torn", [b'{"space": "spars', b'{"space": "spars\n', b"{}"])
def test_a_torn_last_line_is_measured_again(copy, torn):
    path = copy / "sparsity-seed0.jsonl"
    *kept, last = before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept) + torn)
    bench(copy, "--table")
    assert len(records.read_results(path)) == len(kept)
    records.append_result(path, json.loads(last))
    assert path.read_bytes().splitlines(keepends=True) == before


def test_results_that_do_not_say_how_they_were_made_are_taken(copy, monkeypatch):
    monkeypatch.setattr(run, "Lab", None)
    path = copy / "sparsity-seed0.jsonl"
    old = [{k: v for k, v in r.items() if k != "settings"} for r in records.read_results(path)]
    path.write_text("".join(json.dumps(result) + "\n" for result in old))
    bench(copy, *CELL, "--tokens", "2000", "--methods", "uniform", *METHODS)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--tokens", "2000"), "holds results of other options (tokens 1000, now 2000)"),
        (("--dtype", "bfloat16"), "(dtype float32, now bfloat16)"),
        (("--budgets", "3 bit"), "no budgets of sparsity: '3 bit'; known: '50 %', '60 %', '70 %'"),
        (("--methods", "owl"), "no methods of sparsity: 'owl'; known: 'uniform', "),
    ],
)
def test_refusals(finished, capsys, words, sentence):
    with pytest.raises(SystemExit) as stop:
        bench(finished, *CELL, *words)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_damaged_line_is_named(copy, capsys):
    path = copy / "sparsity-seed0.jsonl"
    path.write_bytes(b"nonsense\n" + path.read_bytes())
    with pytest.raises(SystemExit):
        bench(copy, "--table")
    assert "line 1: not a result" in capsys.readouterr().err


def test_each_space_runs_the_budgets_it_has(starved):
    found, _ = starved
    assert set(found) == {*DEAR, *ON_REQUEST}
    assert {result["space"] for result in found.values()} == {"bits-g32"}


def test_an_evolution_that_is_cut_off_at_once_returns_its_parent(starved):
    found, _ = starved
    points = found["evolution B, truncated"]["points"]
    assert len(points) == len(lab.FRACTIONS)
    assert len({json.dumps(point["heldout"]) for point in points}) == 1


def test_too_few_tokens_skip_a_method(starved):
    _, printed = starved
    assert "tpe, blend: skipped, 4 tokens, after its statistics, do not hold" in printed
    assert "evolution B: skipped, 1 batches do not hold one generation" in printed


def test_curves_are_drawn_where_no_search_has_all_seeds(copy):
    first, *_ = records.read_results(copy / "sparsity-seed0.jsonl")
    assert first["method"] == "uniform"
    records.append_result(copy / "sparsity-seed1.jsonl", {**first, "seed": 1})
    (copy / "curves.svg").unlink()
    bench(copy, "--table")
    assert (copy / "curves.svg").stat().st_size


def test_tables_are_held_against_measured_losses(capsys):
    table_errors.main([*TINY, "--space", "bits-g32", "--seeds", "1"])
    _, _, *lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert [row[:2] for row in rows] == [[scorer, "1"] for scorer in table_errors.NAMES]
    spreads = {row[0]: [float(word) for word in row[2:]] for row in rows}
    for whole, between, within in spreads.values():
        assert whole**2 == pytest.approx(between**2 + within**2, abs=0.02)
    assert spreads["fisher"][0] < 0.5 * spreads["relative_error"][0]
