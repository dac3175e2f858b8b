"""Fronts of loss, bytes and latency, as a user asks for them."""

import csv
import itertools
import json
import shutil

import numpy as np
import pytest
from cli_runs import MODEL, allocator, records, search, search_arguments, succeed

from allocator.config import SpaceConfig
from allocator.journal import read_journal
from allocator.latencies import LatencyTable, load_latencies, save_latencies
from allocator.run_folder import load_space
from allocator.session import price_space

SMALL = {"num_statistics": 2, "num_search": 4, "num_guard": 2, "num_heldout": 2}


@pytest.fixture(scope="module")
def latencies(tmp_path_factory):
    """A table for the tiny model in which options of fewer bits take longer."""
    space = price_space(str(MODEL), SpaceConfig())
    shapes = {m.matrix_shape for unit in space.units for m in unit.members}
    labels = {o.operator.label for menu in space.menus for o in menu}
    seconds = {
        (shape, label): 1e-9 * shape[0] * shape[1] / (20 if label == "keep" else int(label[3]))
        for shape, label in itertools.product(sorted(shapes), sorted(labels))
    }
    path = tmp_path_factory.mktemp("tables") / "latencies.csv"
    save_latencies(LatencyTable(seconds), path)
    return path


def test_a_front_of_three_objectives_outlives_its_table(latencies, tmp_path):
    table = tmp_path / "table.csv"
    shutil.copy(latencies, table)
    run = search(tmp_path, search="nsga3", latencies=table, trials=20, **SMALL)
    table.unlink()
    space, seconds = load_space(run / "space.json"), load_latencies(latencies)
    with (run / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = ("loss_nats", "standard_error_nats", "sequences")
    heads = ["searched_bytes", "bits_per_weight", *measured, "latency_seconds", "assignment"]
    assert list(rows[0]) == heads
    for row in rows:
        choice = tuple(map(int, row["assignment"].split()))
        assert float(row["latency_seconds"]) == pytest.approx(seconds.total(space, choice), 1e-5)
    objectives = ("searched_bytes", "loss_nats", "latency_seconds")
    values = np.array([[float(row[key]) for key in objectives] for row in rows])
    beaten = (values[:, None] <= values[None]).all(-1) & (values[:, None] < values[None]).any(-1)
    assert not beaten.any()
    assert len(records(run, "latencies")) == 1
    middle = sorted(float(row["latency_seconds"]) for row in rows)[len(rows) // 2]
    picked = ("pick", run, "--budget", "100%", "--limit", f"{1e3 * middle}ms", "--json")
    (plan,) = json.loads(succeed(*picked))
    assert plan["latency_seconds"] <= middle
    faster = allocator("pick", run, "--budget", "100%", "--limit", "1us")
    assert (faster.code, faster.out) == (2, "")
    assert "within 100% and 1us" in faster.err
    front = (run / "front.csv").read_bytes()
    succeed("report", run)
    assert (run / "front.csv").read_bytes() == front
    lines = (run / "journal.jsonl").read_text().splitlines(keepends=True)
    kinds = [record["type"] for record in read_journal(run / "journal.jsonl").records]
    (run / "journal.jsonl").write_text("".join(lines[: kinds.index("evaluation") + 5]))
    succeed("resume", run)
    assert (run / "front.csv").read_bytes() == front


def test_latencies_that_a_search_cannot_use_are_refused(latencies, tmp_path):
    gap = tmp_path / "gap.csv"
    gap.write_text("\n".join(latencies.read_text().splitlines()[:-3]))
    for method, table, sentence in (
        ("model_guided", latencies, "nsga2 or nsga3; model_guided does not"),
        ("nsga2,tpe", latencies, "tpe does not"),
        ("nsga2", gap, "the latencies lack"),
        ("nsga2", tmp_path / "absent.csv", "cannot read the latencies"),
    ):
        words = search_arguments(runs=tmp_path, name="x", search=method, latencies=table)
        result = allocator(*words)
        assert (result.code, result.out) == (2, "")
        assert sentence in result.err
        assert len(result.err.strip().splitlines()) == 1
        assert not (tmp_path / "x").exists()
