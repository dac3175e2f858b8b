"""Both executors: measurements come back, whatever goes wrong in them; Ray's workers may die."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toy_measure import MakeToyMeasure, ToyMeasure, toy_nats

from allocator.executors import EXECUTORS, InProcess, RayPool, WorkerSetting
from objectives.evaluation import Evaluation, Fidelity, evaluation_key

FIDELITY = Fidelity("search", 3, 2)
GOOD = [(i, 1, 2, 0, 1, 3) for i in range(6)]
EXECUTOR_NAMES = ["in-process", pytest.param("ray", marks=pytest.mark.ray)]


@pytest.fixture(params=EXECUTOR_NAMES)
def start(request):
    """Starts an executor of either kind and closes it afterwards."""
    if request.param == "ray":
        request.getfixturevalue("ray_session")
    started = []

    def start(make):
        started.append(EXECUTORS[request.param](make, WorkerSetting()))
        return started[-1]

    yield start
    for executor in started:
        executor.close()
        executor.close()


@pytest.fixture
def pool(ray_session):
    """Starts Ray pools and closes them afterwards."""
    started = []

    def start(make, workers=2, **options):
        started.append(RayPool(make, workers, **options))
        return started[-1]

    yield start
    for executor in started:
        executor.close()


def measure_all(executor, assignments, fidelity=FIDELITY):
    """Error or losses by assignment."""
    for assignment in assignments:
        executor.submit(evaluation_key(assignment, fidelity), assignment, fidelity)
    results = [executor.next() for _ in assignments]
    assert all(key == evaluation.key for key, evaluation in results)
    evaluations = {evaluation.assignment: evaluation for _, evaluation in results}
    assert evaluations.keys() == set(assignments)
    return {a: e.error or e.sequence_nats for a, e in evaluations.items()}


def right(assignments):
    return {a: tuple(toy_nats(a, i) for i in FIDELITY.indices(100)) for a in assignments}


def test_poisoned_measurements_fail_and_the_others_do_not(start, tmp_path):
    kinds = {
        "raise": "ValueError: bad layer on two lines",
        "memory": "MemoryError",
        "nan": "non-finite loss nan",
        "inf": "non-finite loss inf",
    }
    poison = {(9, 9, i): kind for i, kind in enumerate(kinds)}
    executor = start(MakeToyMeasure(tmp_path, poison=poison))
    results = measure_all(executor, [GOOD[0], *poison, *GOOD[1:]])
    assert results == {**right(GOOD), **dict(zip(poison, kinds.values(), strict=True))}


def test_a_non_finite_cross_entropy_fails_too_and_keeps_its_tokens():
    def measure(assignment, fidelity):
        return Evaluation(assignment, fidelity, (1.0,), (float("-inf"),), 7)

    executor = InProcess(lambda: measure)
    executor.submit("k", (1,), FIDELITY)
    assert executor.next() == (
        "k",
        Evaluation((1,), FIDELITY, num_tokens=7, error="non-finite cross-entropy -inf"),
    )


def test_an_interrupt_is_not_a_failed_measurement(tmp_path):
    executor = InProcess(lambda: ToyMeasure(tmp_path, poison={GOOD[0]: "interrupt"}))
    executor.submit("k", GOOD[0], FIDELITY)
    with pytest.raises(KeyboardInterrupt):
        executor.next()


def test_in_process_builds_the_measure_at_once_and_forgets_on_close(tmp_path):
    with pytest.raises(ImportError, match="no model file"):
        InProcess(MakeToyMeasure(tmp_path, broken=True))
    executor = InProcess(MakeToyMeasure(tmp_path))
    executor.submit("k", GOOD[0], FIDELITY)
    executor.close()
    with pytest.raises(AssertionError, match="nothing was submitted"):
        executor.next()


def test_the_table_starts_executors_and_refuses_what_they_cannot(tmp_path):
    make = MakeToyMeasure(tmp_path)
    assert list(EXECUTORS) == ["in-process", "ray"]
    assert isinstance(EXECUTORS["in-process"](make, WorkerSetting()), InProcess)
    with pytest.raises(ValueError, match=r"got 2 workers.*use the ray executor"):
        EXECUTORS["in-process"](make, WorkerSetting(workers=2))
    with pytest.raises(ValueError, match=r"unknown executor 'rya' \(did you mean 'ray'\?\)"):
        EXECUTORS["rya"]
    with pytest.raises(ValueError, match="at least 1 worker"):
        RayPool(make, 0)


def test_importing_the_executors_and_the_loop_imports_neither_ray_nor_torch():
    code = (
        "import sys, allocator.executors, allocator.journal, allocator.loop;"
        "sys.exit(str({'ray', 'torch'} & sys.modules.keys() or ''))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr.strip() == ""


@pytest.mark.ray
def test_candidates_that_cost_three_workers_fail_and_the_others_do_not(pool, tmp_path):
    poison = {(9,): "die", (8,): "hang"}
    executor = pool(MakeToyMeasure(tmp_path, poison=poison), patience_seconds=2)
    results = measure_all(executor, [*poison, *GOOD])
    assert results == {**right(GOOD), (9,): "worker died 3 times", (8,): "worker hung 3 times"}
    started = (tmp_path / "started").read_text().splitlines()
    assert [started.count("(9,)"), started.count("(8,)")] == [3, 3]


@pytest.mark.ray
def test_idle_workers_that_were_killed_are_replaced(pool, tmp_path):
    executor = pool(MakeToyMeasure(tmp_path))
    assert measure_all(executor, GOOD[:3]) == right(GOOD[:3])
    for process in set((tmp_path / "processes").read_text().split()):
        os.kill(int(process), signal.SIGKILL)
    assert measure_all(executor, GOOD[3:]) == right(GOOD[3:])


@pytest.mark.ray
def test_workers_that_never_start_end_the_run_with_the_cause(pool, tmp_path):
    executor = pool(MakeToyMeasure(tmp_path, broken=True), workers=1)
    executor.submit("k", GOOD[0], FIDELITY)
    with pytest.raises(RuntimeError, match="workers fail to start") as caught:
        executor.next()
    assert "ImportError: no model file" in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.ray
def test_workers_have_the_threads_they_were_given(pool):
    def make():
        import os

        def measure(assignment, fidelity):
            return Evaluation(assignment, fidelity, (float(os.environ["OMP_NUM_THREADS"]),))

        return measure

    executor = pool(make, workers=1, threads=2)
    assert measure_all(executor, [(1,)]) == {(1,): (2.0,)}


@pytest.mark.ray
def test_gpus_that_a_local_cluster_lacks_are_refused(ray_session, tmp_path):
    gpus = ray_session.cluster_resources().get("GPU", 0.0)
    with pytest.raises(ValueError, match=f"ask for {gpus + 2:g} GPUs, the cluster has {gpus:g}"):
        RayPool(MakeToyMeasure(tmp_path), 2, num_gpus=gpus / 2 + 1)
    assert ray_session.is_initialized(), "a pool shuts down only what it started"


OTHER_DRIVER = """
import sys
from pathlib import Path
import toy_measure
from allocator.executors import EXECUTORS, WorkerSetting
from allocator.executors.ray_pool import import_ray
from objectives.evaluation import Fidelity
ray = import_ray()
ray.cloudpickle.register_pickle_by_value(toy_measure)
make = toy_measure.MakeToyMeasure(Path(sys.argv[1]))
for address in (sys.argv[2], None):
    pool = EXECUTORS["ray"](make, WorkerSetting(address=address))
    assert ray.is_initialized()
    pool.submit("k", (1, 2), Fidelity("search", 0, 2))
    print(pool.next()[1].sequence_nats)
    pool.close()
    assert not ray.is_initialized()
try:
    EXECUTORS["ray"](make, WorkerSetting(address="127.0.0.1:1"))
except ValueError as error:
    print(error)
"""


@pytest.mark.ray
def test_a_pool_joins_a_running_cluster_or_starts_its_own(ray_session, tmp_path):
    paths = [str(Path(__file__).parent), *sys.path]
    address = ray_session.get_runtime_context().gcs_address
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", OTHER_DRIVER, str(tmp_path), address],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    losses = str(tuple(toy_nats((1, 2), i) for i in range(2)))
    *measured, refused = ended.stdout.splitlines() or [ended.stderr]
    assert measured == [losses, losses], ended.stderr
    assert refused.startswith("cannot join the Ray cluster at '127.0.0.1:1': [Errno 111]")
    assert ray_session.nodes()[0]["Alive"], "leaving a cluster does not stop it"
