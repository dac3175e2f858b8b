"""Measure on a pool of Ray actors, on one machine or many, whatever dies meanwhile.

Ray promises little: a call may have run although its error comes back, a restarting actor may be
handed work for ever without having a node, and nothing bounds how long a call takes. So the queue
stays here and Ray restarts nothing. A dead actor is replaced by a new one, which gets work only
after it has answered once; each actor has one measurement at a time, so that a death is blamed on
the right candidate; a candidate that loses three workers is a failed evaluation; a measurement far
slower than the others loses its worker. Measuring is pure, so running one twice is harmless: that
each is *recorded* once is the journal's business.

Ray's ports run code for whoever reaches them: keep clusters on trusted networks, with its token
authentication on. This is the only file that imports ray, and only when a pool is made.
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from allocator.executors.base import MeasureFactory
from allocator.executors.in_process import safe_measure
from objectives.evaluation import Evaluation, Fidelity
from search_spaces.space import Assignment

logger = logging.getLogger(__name__)

_MOST_DEATHS = 3
_SLOWEST_FACTOR = 10
_UNKNOWN_SECONDS = 3600.0  # allowed while nothing has finished: there is nothing to compare with
_POLL_SECONDS = 1.0
_REMINDER_SECONDS = 60.0


@dataclass
class _Job:
    """One measurement, and how its workers fared."""

    key: str
    assignment: Assignment
    fidelity: Fidelity
    num_deaths: int = 0
    started: float = 0.0
    overdue: bool = False


class RayPool:
    """Actors that each build the measure once and then measure one assignment after another.

    Uses the Ray session of this process if there is one; otherwise starts one, and only that is
    shut down by :meth:`close`. Ray's workers must be able to import this package.

    Args:
        make: Builds the measure inside each actor; pickled by Ray. It sets torch's threads itself.
        workers: Number of actors.
        address: Of a running cluster, as ``ray.init`` takes it; ``None`` starts a local one.
        num_gpus: GPUs per actor; fractions share one without dividing its memory.
        threads: CPUs reserved per actor, and its ``OMP_NUM_THREADS``.
        patience_seconds: A measurement may always take this long, and longer only within ten times
            the median (per sequence and pass).

    Raises:
        ValueError: Nonsensical numbers, a cluster that cannot be reached, or a local one with
            fewer GPUs than asked for.
    """

    def __init__(
        self,
        make: MeasureFactory,
        workers: int,
        *,
        address: str | None = None,
        num_gpus: float = 0.0,
        threads: int = 1,
        patience_seconds: float = 60.0,
    ) -> None:
        if workers < 1 or threads < 1 or num_gpus < 0:
            raise ValueError(
                "expected at least 1 worker, 1 thread and 0 GPUs, "
                f"got {workers} workers, {threads} threads and {num_gpus} GPUs"
            )
        self._ray = import_ray()
        self._workers = workers
        self._patience_seconds = patience_seconds
        self._queue: deque[_Job] = deque()
        self._idle: list[Any] = []
        # what each pending call is about: its actor, and its job or None for the first answer
        self._running: dict[Any, tuple[Any, _Job | None]] = {}
        self._seconds_per_sequence: list[float] = []
        self._failed_starts = 0
        self._owns_session = self._connect(address, num_cpus=workers * threads)
        try:
            self._require_gpus(workers * num_gpus, local=address is None)
            self._actor_class = self._define_actor(make, num_gpus, threads)
            for _ in range(workers):
                self._spawn()
        except BaseException:
            self.close()
            raise

    def submit(self, key: str, assignment: Assignment, fidelity: Fidelity) -> None:
        """Queue one measurement under its content address."""
        self._queue.append(_Job(key, assignment, fidelity))
        self._dispatch()

    def next(self) -> tuple[str, Evaluation]:
        """Block until some measurement is finished; a failed one is a result too.

        Raises:
            RuntimeError: Workers keep failing to start; the cause is attached.
        """
        assert self._queue or any(job for _, job in self._running.values()), "nothing was submitted"
        reminded = time.monotonic()
        while True:
            self._dispatch()
            calls = list(self._running)
            done, _ = self._ray.wait(calls, num_returns=1, timeout=_POLL_SECONDS)
            if done and (result := self._collect(done[0])) is not None:
                return result
            self._kill_overdue()
            waiting = self._queue and not any(job for _, job in self._running.values())
            if waiting and time.monotonic() - reminded > _REMINDER_SECONDS:
                reminded = time.monotonic()
                logger.warning(
                    "still waiting for a worker to start; the cluster has %s free",
                    self._ray.available_resources(),
                )

    def drop_queued(self) -> None:
        """Forget what no actor has begun; what is under way still arrives."""
        self._queue.clear()

    def close(self) -> None:
        """Kill the actors, and shut Ray down if this pool started it; closing twice is fine."""
        if self._owns_session:
            self._owns_session = False
            self._ray.shutdown()
        elif self._ray.is_initialized():
            for actor in [*self._idle, *(actor for actor, _ in self._running.values())]:
                self._ray.kill(actor)
        self._idle.clear()
        self._running.clear()
        self._queue.clear()

    def _connect(self, address: str | None, *, num_cpus: int) -> bool:
        """Start or join a cluster unless this process has a session; says whether it did."""
        if self._ray.is_initialized():
            return False
        quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
        if address is None:
            self._ray.init("local", num_cpus=num_cpus, include_dashboard=False, **quiet)
            return True
        try:
            _require_listener(address)
            self._ray.init(address, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"cannot join the Ray cluster at {address!r}: {error}") from error
        return True

    def _require_gpus(self, wanted: float, *, local: bool) -> None:
        """A local cluster does not grow, so waiting for GPUs it lacks would be for ever."""
        available = self._ray.cluster_resources().get("GPU", 0.0)
        if wanted <= available:
            return
        message = f"the workers ask for {wanted:g} GPUs, the cluster has {available:g}"
        if local:
            raise ValueError(f"{message}; use fewer workers or a smaller share per worker")
        logger.warning("%s; going on with the workers that find room", message)

    def _define_actor(self, make: MeasureFactory, num_gpus: float, threads: int) -> Any:
        """The actor class; local, so that importing this file needs no ray."""

        class MeasuringActor:
            def __init__(self) -> None:
                # Ray says this too, unless the driver's environment does; a runtime_env would
                # double the time to start
                os.environ["OMP_NUM_THREADS"] = str(threads)
                self._measure = make()

            def ready(self) -> None:
                """Answer once the measure is built."""

            def measure(self, assignment: Assignment, fidelity: Fidelity) -> Evaluation:
                return safe_measure(self._measure, assignment, fidelity)

        return self._ray.remote(
            num_cpus=threads,
            num_gpus=num_gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )(MeasuringActor)

    def _spawn(self) -> None:
        actor = self._actor_class.remote()
        self._running[actor.ready.remote()] = (actor, None)

    def _dispatch(self) -> None:
        """Give queued measurements to idle actors."""
        while self._queue and self._idle:
            actor, job = self._idle.pop(), self._queue.popleft()
            job.started, job.overdue = time.monotonic(), False
            call = actor.measure.remote(job.assignment, job.fidelity)
            self._running[call] = (actor, job)

    def _collect(self, call: Any) -> tuple[str, Evaluation] | None:
        """The result of a finished call, if it is one to hand back."""
        actor, job = self._running.pop(call)
        try:
            evaluation: Evaluation = self._ray.get(call)
        # any RayError: a node gone, memory gone and a worker gone are different classes
        except self._ray.exceptions.RayError as error:
            return self._replace(actor, job, error)
        self._idle.append(actor)
        self._failed_starts = 0
        if job is None:
            return None
        seconds = time.monotonic() - job.started
        self._seconds_per_sequence.append(seconds / job.fidelity.num_passes)
        return job.key, evaluation

    def _replace(
        self, actor: Any, job: _Job | None, error: Exception
    ) -> tuple[str, Evaluation] | None:
        """Replace a dead actor; its job is tried again first, or has failed for good.

        Raises:
            RuntimeError: This was one of many actors in a row that did not even start.
        """
        self._ray.kill(actor)
        if job is None:
            self._failed_starts += 1
            if self._failed_starts > 2 * self._workers:
                raise RuntimeError(f"workers fail to start: {error}") from error
        self._spawn()
        if job is None:
            return None
        job.num_deaths += 1
        logger.warning("lost a worker (%s); it was measuring %s", type(error).__name__, job.key)
        if job.num_deaths < _MOST_DEATHS:
            self._queue.appendleft(job)
            return None
        how = "hung" if job.overdue else "died"
        text = f"worker {how} {job.num_deaths} times"
        return job.key, Evaluation(job.assignment, job.fidelity, error=text)

    def _kill_overdue(self) -> None:
        """Kill actors that take far too long; their calls then end as a death."""
        now = time.monotonic()
        for actor, job in self._running.values():
            if job and not job.overdue and now - job.started > self._most_seconds(job.fidelity):
                job.overdue = True
                self._ray.kill(actor)

    def _most_seconds(self, fidelity: Fidelity) -> float:
        if not self._seconds_per_sequence:
            return max(self._patience_seconds, _UNKNOWN_SECONDS)
        median = statistics.median(self._seconds_per_sequence)
        return max(self._patience_seconds, _SLOWEST_FACTOR * median * fidelity.num_passes)


def _require_listener(address: str) -> None:
    """Fail at once where Ray would knock for minutes; ``auto`` and the like it answers itself."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def import_ray() -> Any:
    """Import ray with its telemetry off and GPUs left visible to actors that reserve none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    return ray
