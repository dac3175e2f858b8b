"""The verb profile: tables, costs, a comparison with measured losses; resumed and streamed."""

import csv
import json

import numpy as np
import pytest
from cli_runs import ASSETS, allocator

from allocator.journal import read_journal
from allocator.run_folder import load_losses, load_space

MODEL = str(ASSETS / "tiny_llama")
TEXT = ("--text", str(ASSETS / "persuasion.txt"), "--sequence-length", "64")
SMALL = ("--num-statistics", "4", "--num-search", "2", "--space", "bits-g32")
SCORERS = "relative_error,fisher,one_at_a_time,arithmetic_progression"


def profiled(runs, *words, name="p"):
    return allocator("profile", MODEL, *TEXT, *SMALL, "--runs", str(runs), "--name", name, *words)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    words = ("--compare", "--scorer", SCORERS, "--budget", "3.5bpw", "--random", "8")
    done = profiled(runs, *words)
    assert done.code == 0, done.err
    return runs, done


def test_comparison_names_every_scorer_with_its_cost(compared):
    runs, done = compared
    with (runs / "p" / "comparison.csv").open() as file:
        rows = {row["scorer"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(SCORERS.split(","))
    for row in rows.values():
        assert all(-1 <= float(row[key]) <= 1 for key in row if key.endswith(("man", "ll")))
    assert int(rows["fisher"]["tokens"]) == 3 * 4 * 64
    assert int(rows["relative_error"]["tokens"]) == 0
    assert int(rows["one_at_a_time"]["tokens"]) > 42 * 64
    assert float(rows["one_at_a_time"]["units_spearman"]) > 0.7
    assert "random rho" in done.out
    assert "| fisher | nats |" in (runs / "p" / "comparison.md").read_text()
    assert "<svg" in (runs / "p" / "comparison.svg").read_text()


def test_again_measures_nothing_and_adds_what_is_new(compared):
    runs, _ = compared
    before = read_journal(runs / "p" / "journal.jsonl").records
    table = (runs / "p" / "comparison.csv").read_text()
    words = ("--compare", "--scorer", SCORERS, "--budget", "3.5bpw", "--random", "8")
    assert profiled(runs, *words).code == 0
    assert read_journal(runs / "p" / "journal.jsonl").records == before
    assert (runs / "p" / "comparison.csv").read_text() == table


def test_tables_are_those_of_the_scorers_in_any_order(compared, tmp_path):
    runs, _ = compared
    done = profiled(tmp_path, "--scorer", "fisher", "--budget", "3.5bpw", "--json", name="one")
    assert done.code == 0, done.err
    shown = json.loads(done.out)
    space = load_space(tmp_path / "one" / "space.json")
    ours = load_losses(tmp_path / "one" / "losses.npz", space)["fisher"]
    theirs = load_losses(runs / "p" / "losses.npz", space)["fisher"]
    for row, other in zip(ours.losses, theirs.losses, strict=True):
        assert row == pytest.approx(other, rel=1e-6)
    kinds = shown["tables"]["fisher"]["kinds"]
    total = sum(values[0] for values in kinds.values())
    assert total == pytest.approx(sum(float(row[0]) for row in ours.losses), rel=1e-4)


def test_streamed_tables_are_the_same(compared, tmp_path):
    runs, _ = compared
    done = profiled(tmp_path, "--scorer", "fisher,relative_error", "--stream", name="streamed")
    assert done.code == 0, done.err
    assert "peak memory" in done.out
    space = load_space(tmp_path / "streamed" / "space.json")
    ours = load_losses(tmp_path / "streamed" / "losses.npz", space)
    theirs = load_losses(runs / "p" / "losses.npz", space)
    for name in ("fisher", "relative_error"):
        flat = [np.concatenate(tables[name].losses) for tables in (ours, theirs)]
        assert flat[0] == pytest.approx(flat[1], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--scorer", "fishr"), "did you mean 'fisher'"),
        (("--compare", "--stream"), "drop one"),
        (("--scorer", "one_at_a_time_incumbent", "--stream"), "one_at_a_time_incumbent"),
    ],
)
def test_mistakes_cost_one_sentence(tmp_path, words, said):
    done = profiled(tmp_path, *words)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
