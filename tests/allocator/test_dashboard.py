"""A run in optuna-dashboard: the real server on an exported study, asked as its page asks it."""

import json
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from cli_runs import load, search, succeed

pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")

_PATIENCE_S = 60


@contextmanager
def dashboard(storage):
    """The address of a server on a storage."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-c", "from optuna_dashboard._cli import main; main()"]
    server = subprocess.Popen(
        [*command, storage, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}/api"
    finally:
        server.terminate()
        server.wait(_PATIENCE_S)


def ask(address):
    """What the server says, once it is up."""
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            with urlopen(address, timeout=_PATIENCE_S) as answer:
                return json.load(answer)
        except URLError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


@pytest.mark.parametrize("storage", ["sqlite:///{}/study.db", "journal:{}/study.log"])
def test_a_run_in_the_dashboard(storage, tmp_path):
    run = search(tmp_path, trials=16)
    plan = load(run / "plan.json")
    storage = storage.format(tmp_path)
    succeed("export-study", run, "--storage", storage)
    with dashboard(storage.removeprefix("journal:")) as address:
        (summary,) = ask(f"{address}/studies")["study_summaries"]
        assert summary["study_name"] == "run"
        study = ask(f"{address}/studies/{summary['study_id']}?after=0")
        (importances,) = ask(f"{address}/studies/{summary['study_id']}/param_importances")[
            "param_importances"
        ]
    told = {entry["key"]: entry["value"] for entry in study["user_attrs"]}
    assert told["budget_bytes"] == str(plan["budget_bytes"])
    trials = study["trials"]
    assert 3 < len(trials) <= plan["search"]["num_evaluations"]
    assert {trial["state"] for trial in trials} == {"Complete"}
    best = min(trial["values"][0] for trial in trials)
    (front,) = (trial for trial in study["best_trials"])
    assert front["values"] == [best]
    assert len(importances) == len(trials[0]["params"])
    assert sum(entry["importance"] for entry in importances) == pytest.approx(1)
