"""Killed runs go on: nothing is measured twice, and the end is as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from cli_runs import (
    allocator,
    load,
    measured_keys,
    records,
    search,
    search_arguments,
    start,
    succeed,
)

from allocator.journal import Journal, read_journal

TRIALS = 24
NUM_KILLS = 9


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run that nobody disturbed."""
    return search(tmp_path_factory.mktemp("undisturbed"), trials=TRIALS)


def size(path):
    return path.stat().st_size if path.exists() else 0


def kill_at(process, journal, num_bytes, delay=0.0):
    """Kill -9 once the journal has grown to so many bytes; whether the process still ran then."""
    deadline = time.monotonic() + 120
    while process.is_alive() and size(journal) < num_bytes:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def stage_of(folder):
    """Where a run stands, from the last of its records."""
    journal = folder / "journal.jsonl"
    if not journal.exists() or b"\n" not in journal.read_bytes():
        return "start"
    found = read_journal(journal).records
    if not found:
        return "start"
    last = found[-1]
    return last["evaluation"]["fidelity"]["split"] if last["type"] == "evaluation" else last["type"]


def moments(folder, rng):
    """Journal sizes at which to kill: the very start, and points inside every stage."""
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    ends, total = [], 0
    for line in lines:
        total += len(line)
        ends.append(total)
    kinds = ["header", *(record["type"] for record in records(folder))]
    splits = [
        record["evaluation"]["fidelity"]["split"] if record["type"] == "evaluation" else None
        for record in [{"type": "header"}, *records(folder)]
    ]
    cells = [end for end, kind in zip(ends, kinds, strict=True) if kind == "cell"]
    searched = [end for end, split in zip(ends, splits, strict=True) if split == "search"]
    guarded = [end for end, split in zip(ends, splits, strict=True) if split == "guard"]
    chosen = [1, ends[1], *rng.sample(cells, 2), *rng.sample(searched[:-4], 4), guarded[0]]
    assert len(chosen) == NUM_KILLS
    return sorted(chosen)


def assert_same_end(folder, undisturbed):
    """Equal but for passes that a kill made the run repeat, and what each session could share."""
    ours, theirs = load(folder / "plan.json"), load(undisturbed / "plan.json")
    for plan in (ours, theirs):
        plan.pop("tokens")
        plan.pop("block_tokens")
    keys = measured_keys(folder)
    assert len(set(keys)) == len(keys), "something was measured twice"
    # A run that once ended early also measured its guard and held-out candidates of then.
    wanted = set(measured_keys(undisturbed))
    missing = wanted - set(keys)
    if ours != theirs:  # one of those may be better than what the search ended with
        assert ours["search"] == theirs["search"]
        assert ours["guard_nats"]["search"]["nats"] < theirs["guard_nats"]["search"]["nats"]
        assert any('"split": "guard"' in key for key in set(keys) - wanted)
        missing = {key for key in missing if '"split": "heldout"' not in key}
    assert not missing
    assert not any('"split": "search"' in key for key in set(keys) - wanted)
    cells = [json.dumps([r["scorer"], r["unit"], r["option"]]) for r in records(folder, "cell")]
    assert len(set(cells)) == len(cells)
    for name in ("frontier.csv", "space.json"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_random_moments(undisturbed, spawn, tmp_path, seed):
    rng = random.Random(seed)
    folder = tmp_path / "run"
    journal = folder / "journal.jsonl"
    words = search_arguments(runs=tmp_path, name="run", trials=TRIALS)
    stages = []
    for num_bytes in moments(undisturbed, rng):
        if kill_at(spawn(*words), journal, num_bytes, rng.uniform(0, 0.02)):
            stages.append(stage_of(folder))
        words = ["resume", folder]
    assert len(stages) >= 5
    assert {"cell", "search"} <= set(stages)
    last = spawn(*words)
    last.join(120)
    assert last.exitcode == 0
    assert_same_end(folder, undisturbed)


@pytest.mark.slow
def test_killed_by_the_clock(undisturbed, tmp_path):
    """Nothing shared with the process: the command alone, killed after random times."""
    rng = random.Random(7)
    folder = tmp_path / "run"
    words = search_arguments(runs=tmp_path, name="run", trials=TRIALS)
    began = time.monotonic()
    succeeded = start(*search_arguments(runs=tmp_path / "timed", trials=TRIALS, name="run"))
    succeeded.communicate()
    longest = time.monotonic() - began
    num_killed = num_tries = 0
    while num_tries < 8 or (num_killed < 5 and num_tries < 24):  # a busy machine kills late
        num_tries += 1
        process = start(*words)
        time.sleep(rng.uniform(0.2, 1.0) * longest)
        process.kill()
        process.communicate()
        num_killed += process.returncode == -signal.SIGKILL
        if (folder / "config.yaml").exists():
            words = ["resume", folder]
    assert num_killed >= 5
    process = start(*words)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert_same_end(folder, undisturbed)


@pytest.mark.parametrize("left", [None, b"", b'1234abcd {"config": {"bu'])
@pytest.mark.parametrize("verb", ["resume", "search"])
def test_killed_before_the_journal_begins(undisturbed, tmp_path, left, verb):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "space.json", "calibration.safetensors"):
        shutil.copy(undisturbed / name, folder)
    shutil.copytree(undisturbed.parent / "losses", tmp_path / "losses")
    if left is not None:
        (folder / "journal.jsonl").write_bytes(left)
    for refused in (["report", folder], ["solve", folder, "--budget", "3bpw"]):
        result = allocator(*refused)
        assert result.code == 2
        assert "allocator resume" in result.err
    if verb == "resume":
        succeed("resume", folder)
    else:
        search(tmp_path, trials=TRIALS)
    ours, theirs = load(folder / "plan.json"), load(undisturbed / "plan.json")
    assert (ours["search"], ours["units"]) == (theirs["search"], theirs["units"])


def test_a_run_in_use_is_refused(undisturbed):
    before = (undisturbed / "journal.jsonl").read_bytes()
    with Journal.open(undisturbed / "journal.jsonl"):
        for words in (["resume", undisturbed], ["report", undisturbed]):
            result = allocator(*words)
            assert result.code == 2
            assert "in use by another process" in result.err
    assert (undisturbed / "journal.jsonl").read_bytes() == before


def test_a_damaged_journal_is_refused_with_its_line(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b":", b";", 1)
    (folder / "journal.jsonl").write_bytes(b"".join(lines))
    result = allocator("resume", folder)
    assert result.code == 2
    assert "line 5 is damaged" in result.err


def test_a_changed_model_is_refused(tmp_path):
    from cli_runs import MODEL
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    folder = search(tmp_path, trials=4, model=model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    before = (folder / "plan.json").read_bytes()
    result = allocator("resume", folder, "--trials", 8)
    assert result.code == 2
    assert "has changed since the run was started" in result.err
    assert (folder / "plan.json").read_bytes() == before


# Ray


def workers():
    """Process ids of this session's actors that are measuring something."""
    parents, actors = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if (path / "cmdline").read_bytes().startswith(b"ray::MeasuringActor.measure"):
                actors.append(int(path.name))
        except OSError:  # it has ended
            continue

    def ours(number):
        while number not in (0, os.getpid()):
            number = parents.get(number, 0)
        return number == os.getpid()

    return [number for number in actors if ours(number)]


@pytest.mark.ray
@pytest.mark.parametrize("num", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ray_workers_give_the_same_run(ray_session, undisturbed, tmp_path, num):
    folder = search(tmp_path, trials=TRIALS, executor="ray", workers=num)
    ours, theirs = load(folder / "plan.json"), load(undisturbed / "plan.json")
    if num > 1:  # forward passes that two workers cannot share
        del ours["block_tokens"], theirs["block_tokens"]
    assert ours == theirs
    if num == 1:
        assert (folder / "plan.json").read_bytes() == (undisturbed / "plan.json").read_bytes()


@pytest.mark.ray
def test_resuming_with_workers_that_die_gives_the_same_run(
    ray_session, undisturbed, tmp_path, caplog
):
    folder = search(tmp_path, trials=6)
    num_before = len(records(folder))
    killed = []
    over = threading.Event()

    def kill_one():
        while not killed and not over.is_set():
            if len(records(folder)) > num_before + 2 and (found := workers()):
                os.kill(found[0], signal.SIGKILL)
                killed.append(found[0])
            time.sleep(0.002)

    thread = threading.Thread(target=kill_one)
    thread.start()
    try:
        succeed("resume", folder, "--trials", TRIALS, "--executor", "ray", "--workers", 2)
    finally:
        over.set()
        thread.join()
    assert killed
    assert "lost a worker" in caplog.text
    assert_same_end(folder, undisturbed)
