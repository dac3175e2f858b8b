"""The loop: one history for any executor, any worker's death, any kill of the driver."""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import toy_measure
from toy_measure import (
    HEADER,
    NUM_UNITS,
    TOKENS_PER_SEQUENCE,
    MakeToyMeasure,
    ScriptedSearch,
    ToySearch,
    run,
)

from allocator.executors import InProcess, RayPool
from allocator.journal import Journal, read_journal
from allocator.loop import Limits, run_search
from objectives.evaluation import Evaluation, Fidelity

FIDELITY = Fidelity("search", 0, 2)
NUM_KILLS = 6
PRICE = 2 * TOKENS_PER_SEQUENCE


def limits(window=4, **stops):
    return Limits(window, TOKENS_PER_SEQUENCE, **stops)


def assignment(number):
    return (number,) + (0,) * (NUM_UNITS - 1)


def started(folder):
    """How many measurements were begun."""
    return len((folder / "started").read_text().splitlines())


@pytest.fixture
def in_process(tmp_path):
    return InProcess(MakeToyMeasure(tmp_path))


@pytest.fixture
def undisturbed(tmp_path_factory):
    """The history of the default toy run."""
    return run(InProcess(MakeToyMeasure(tmp_path_factory.mktemp("undisturbed"))))


class LateExecutor(InProcess):
    """Finishes what is queued in an order of its own; counts the queue."""

    def __init__(self, make, seed):
        super().__init__(make)
        self._order = np.random.default_rng(seed)
        self.longest = 0

    def next(self):
        self.longest = max(self.longest, len(self._queue))
        chosen = int(self._order.integers(len(self._queue)))
        self._queue.insert(0, self._queue.pop(chosen))  # what is measured next lies in front
        first, *others = self._queue
        self._queue[:] = [first]
        try:
            return super().next()
        finally:
            self._queue[:] = others


class Recording(ToySearch):
    """Notes what was told before each ask."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.told, self.told_at_ask, self.pending_at_ask = 0, [], []

    def ask(self, count, pending):
        self.told_at_ask.append(self.told)
        self.pending_at_ask.append(list(pending))
        return super().ask(count, pending)

    def tell(self, evaluations):
        super().tell(evaluations)
        self.told += len(evaluations)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_completion_changes_nothing(tmp_path, undisturbed, seed):
    executor = LateExecutor(MakeToyMeasure(tmp_path), seed)
    history = run(executor)
    assert history == undisturbed
    assert history.sha256 == undisturbed.sha256
    assert executor.longest == 4


def test_proposal_i_is_asked_right_after_result_i_minus_window(in_process):
    search = Recording()
    history = run(in_process, search=search, limits=limits(window=5, trials=20))
    assert search.told_at_ask == [max(0, i - 4) for i in range(20)]
    told = [e.assignment for e in history.evaluations]
    assert search.pending_at_ask == [told[max(0, i - 4) : i] for i in range(20)]


def test_history_depends_on_seed_window_and_losses(in_process, undisturbed):
    other_seed = run(in_process, search=ToySearch(seed=1))
    other_window = run(in_process, limits=limits(window=5, trials=40))
    assert len({undisturbed.sha256, other_seed.sha256, other_window.sha256}) == 3
    assert undisturbed.stopped == "all 40 trials are done"
    assert undisturbed.num_failed == 0


def test_more_trials_continue_the_same_history(tmp_path, undisturbed):
    with Journal.create(tmp_path / "journal", HEADER) as journal:
        executor = InProcess(MakeToyMeasure(tmp_path))
        short = run(executor, journal=journal, limits=limits(trials=17))
        assert short.evaluations == undisturbed.evaluations[:17]
        assert run(executor, journal=journal, limits=limits(trials=40)) == undisturbed
    assert started(tmp_path) == len({e.key for e in undisturbed.evaluations})


def test_nothing_is_measured_twice(tmp_path, in_process):
    repeated = [assignment(i) for i in (1, 1, 2, 1, 3, 2, 1, 3, 3)]
    with Journal.create(tmp_path / "journal", HEADER) as journal:
        for _ in range(2):
            history = run(in_process, search=ScriptedSearch(repeated), journal=journal)
            assert [e.assignment for e in history.evaluations] == repeated
            assert history.stopped == "the search has nothing more to propose"
            assert history.num_tokens == 3 * PRICE
        assert len(journal.records) == 3
    assert started(tmp_path) == 3


def test_a_search_may_wait_for_what_is_under_way(in_process):
    class Generations(ScriptedSearch):
        num_open = 0
        is_closed = False

        def ask(self, count, pending):
            if self.is_closed:
                return []
            self.num_open += 1
            self.is_closed = self.num_open == 3
            return super().ask(count, pending)

        def tell(self, evaluations):
            self.num_open -= 1
            self.is_closed &= self.num_open > 0

    assignments = [assignment(i) for i in range(9)]
    history = run(in_process, search=Generations(assignments))
    assert [e.assignment for e in history.evaluations] == assignments
    assert history.stopped == "the search has nothing more to propose"


@pytest.mark.parametrize("window", [1, 4, 16])
def test_the_token_limit_is_used_up_and_never_exceeded(tmp_path, in_process, window):
    search = ScriptedSearch([assignment(i) for i in (1, 1, 2, 3, 3, 4, 5, 1)])
    for spare in (0, PRICE - 1):
        stop = limits(window=window, tokens=4 * PRICE + spare)
        history = run(in_process, search=search, limits=stop)
        assert [e.assignment[0] for e in history.evaluations] == [1, 1, 2, 3, 3, 4]
        assert history.num_tokens == sum(e.num_tokens for e in set(history.evaluations))
        assert history.stopped == f"one more measurement would exceed {4 * PRICE + spare} tokens"
        search = ScriptedSearch([assignment(i) for i in (1, 1, 2, 3, 3, 4, 5, 1)])
    assert "5" not in {line[1] for line in (tmp_path / "started").read_text().splitlines()}


def test_the_token_limit_stops_a_resumed_run_where_it_stopped_the_first(tmp_path, in_process):
    stop = limits(tokens=20 * PRICE)
    first = run(in_process, limits=stop)
    for size in (0, 5, 11):
        with Journal.create(tmp_path / f"journal-{size}", HEADER) as journal:
            journal.append_many(e.to_json() for e in list(dict.fromkeys(first.evaluations))[:size])
            assert run(in_process, journal=journal, limits=stop) == first


def test_failed_measurements_are_charged_so_that_the_token_limit_ends_them(tmp_path):
    poison = {assignment(i): "raise" for i in range(100)}
    executor = InProcess(MakeToyMeasure(tmp_path, poison=poison))
    history = run(executor, search=ScriptedSearch(poison), limits=limits(tokens=7 * PRICE))
    assert (history.num_failed, len(history.evaluations)) == (7, 7)


def test_what_another_run_paid_for_is_not_charged(tmp_path, in_process):
    known = [assignment(i) for i in (1, 2)]
    asked = [assignment(i) for i in (1, 3, 2, 1, 4, 5)]
    with Journal.create(tmp_path / "journal", HEADER) as journal:
        run(in_process, search=ScriptedSearch(known), journal=journal)
        paid = frozenset(Evaluation.from_json(record).key for record in journal.records)
        stop = limits(tokens=2 * PRICE, free=paid)
        history = run(in_process, search=ScriptedSearch(asked), journal=journal, limits=stop)
    assert [e.assignment for e in history.evaluations] == asked[:-1]
    assert history.num_tokens == 2 * PRICE
    assert started(tmp_path) == 4


def test_a_search_that_repeats_itself_for_ever_is_stopped(in_process):
    search = ScriptedSearch([assignment(1)] * 1000)
    history = run(in_process, search=search, limits=limits(tokens=10**9))
    assert history.stopped == "the last 200 proposals were all known already"
    assert len(history.evaluations) == 201


def test_the_time_limit_drops_what_is_under_way(tmp_path, in_process, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("allocator.loop.time", SimpleNamespace(monotonic=lambda: now[0]))

    def pass_time(progress):
        now[0] += 10

    search = ScriptedSearch([assignment(i) for i in range(9)])
    history = run(in_process, search=search, limits=limits(seconds=25), after=pass_time)
    assert history.stopped == "the 25 seconds are over"
    assert len(history.evaluations) == started(tmp_path) == 3


def test_the_time_limit_still_tells_what_is_known(in_process, monkeypatch, undisturbed):
    now = [100.0]
    monkeypatch.setattr("allocator.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    cached = {e.key: e for e in undisturbed.evaluations}

    def end_time(progress):
        now[0] += 10

    history = run_search(
        ToySearch(),
        in_process,
        limits=limits(seconds=1),
        cache=cached,
        record=cached.pop,
        progress=end_time,
    )
    assert history.evaluations == undisturbed.evaluations[:4]
    assert history.stopped == "the 1 seconds are over"


def test_progress_tells_where_the_run_stands(in_process):
    reports = []
    history = run(in_process, limits=limits(trials=9), after=reports.append)
    assert [p.evaluation for p in reports] == list(history.evaluations)
    assert [p.num_told for p in reports] == list(range(1, 10))
    assert reports[-1].num_tokens == history.num_tokens
    assert reports[-1].num_measured == len(set(history.evaluations))
    assert all(a.seconds <= b.seconds for a, b in pairwise(reports))


def test_poisoned_candidates_are_recorded_as_failed_and_the_run_goes_on(tmp_path, undisturbed):
    first = [e.assignment for e in undisturbed.evaluations]
    poison = {first[1]: "raise", first[2]: "nan", first[3]: "inf"}
    with Journal.create(tmp_path / "journal", HEADER) as journal:
        executor = InProcess(MakeToyMeasure(tmp_path, poison=poison))
        history = run(executor, journal=journal)
        records = [Evaluation.from_json(record) for record in journal.records]
    failed = {e.assignment: e.error for e in records if not e.ok}
    assert failed == {
        first[1]: "ValueError: bad layer on two lines",
        first[2]: "non-finite loss nan",
        first[3]: "non-finite loss inf",
    }
    assert len(history.evaluations) == 40
    assert history.num_failed == sum(e.assignment in poison for e in history.evaluations)
    assert history.sha256 != undisturbed.sha256


def test_an_interrupt_leaves_a_whole_journal_to_go_on_from(tmp_path, undisturbed):
    poison = {undisturbed.evaluations[10].assignment: "interrupt"}
    with (
        Journal.create(tmp_path / "journal", HEADER) as journal,
        pytest.raises(KeyboardInterrupt),
    ):
        run(InProcess(MakeToyMeasure(tmp_path, poison=poison)), journal=journal)
    with Journal.open(tmp_path / "journal", HEADER) as journal:
        assert 0 < len(journal.records) < 40
        assert run(InProcess(MakeToyMeasure(tmp_path)), journal=journal) == undisturbed


@pytest.mark.parametrize("name", ["window", "tokens_per_sequence", "trials", "tokens", "seconds"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_limits_must_be_positive_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive number, got {value}"):
        Limits(**{"window": 1, "tokens_per_sequence": 1, name: value})


def test_a_driver_killed_at_random_moments_ends_with_the_same_history(tmp_path):
    """Kill -9 six times: nothing is lost, twice in the journal or different."""
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    def drive(folder):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, toy_measure.__file__, str(folder / "journal")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)

    with drive(tmp_path / "undisturbed") as driver:
        expected = driver.stdout.read()
    rng = np.random.default_rng()
    folder, num_kills = tmp_path / "killed", 0
    journal, records = folder / "journal", []
    while num_kills < NUM_KILLS:
        with drive(folder) as driver:
            goal = len(records) + int(rng.integers(1, 8))
            while driver.poll() is None and count_lines(journal) <= goal:
                time.sleep(0.001)
            time.sleep(0.01 * rng.random())
            driver.kill()
        assert driver.returncode == -signal.SIGKILL
        num_kills += 1
        kept, records = records, read_journal(journal).records
        assert records[: len(kept)] == kept
    with drive(folder) as driver:
        assert driver.stdout.read() == expected
    records = read_journal(journal).records
    assert len(expected.strip()) == 64
    keys = [Evaluation.from_json(record).key for record in records]
    assert len(set(keys)) == len(keys)
    assert started(folder) <= len(keys) + num_kills


def count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_workers_give_the_history_of_one_process(ray_session, tmp_path, undisturbed, workers):
    pool = RayPool(MakeToyMeasure(tmp_path, seconds=0.02), workers)
    try:
        assert run(pool).sha256 == undisturbed.sha256
    finally:
        pool.close()


@pytest.mark.ray
def test_killed_workers_change_nothing_but_the_time(ray_session, tmp_path, undisturbed):
    """One worker dies of a candidate, two are killed from outside in mid-run."""
    poison = {undisturbed.evaluations[5].assignment: "die once"}
    killed = []

    def kill_one(progress):
        if progress.num_told in (12, 25):
            born = (tmp_path / "processes").read_text().split()
            living = [p for p in born if p not in (*killed, (tmp_path / "died").read_text())]
            killed.append(living[-1])
            os.kill(int(killed[-1]), signal.SIGKILL)

    pool = RayPool(MakeToyMeasure(tmp_path, seconds=0.02, poison=poison), 2)
    try:
        with Journal.create(tmp_path / "journal", HEADER) as journal:
            assert run(pool, journal=journal, after=kill_one) == undisturbed
            assert len(journal.records) == len({e.key for e in undisturbed.evaluations})
    finally:
        pool.close()
    assert len(killed) == 2
    assert len((tmp_path / "processes").read_text().split()) >= 4
