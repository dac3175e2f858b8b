"""Measuring of candidates in a run: through one executor, journalled, never twice."""

from __future__ import annotations

from collections.abc import Mapping

from allocator.accounts import inherited_evaluations, recorded_evaluations, spending
from allocator.executors import Executor
from allocator.stage import Stage
from objectives.evaluation import Evaluation, Fidelity, evaluation_key
from search_spaces.space import Assignment


class Measuring:
    """Measures through one executor, never twice, and records what came out."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._executor: Executor | None = None
        recorded = recorded_evaluations(stage.records.records)
        succeeded = {e.fidelity.split for e in recorded.values() if e.ok}
        # One failure is a result like others; where all failed nothing followed, so try again.
        self.cache = {e.key: e for e in inherited_evaluations(stage.records.records)} | {
            key: e for key, e in recorded.items() if e.ok or e.fidelity.split in succeeded
        }

    @property
    def executor(self) -> Executor:
        """What measures, started when first needed."""
        self.start()
        assert self._executor is not None
        return self._executor

    def start(self) -> None:
        """Run the dense model on what will be measured, then start what measures."""
        if self._executor is None:
            self._prepare()
            self._executor = self._stage.executor()

    def record(self, evaluation: Evaluation) -> None:
        """Make a measurement durable."""
        self._stage.records.append({"type": "evaluation", "evaluation": evaluation.to_json()})

    def all(self, candidates: Mapping[str, Assignment], split: str) -> dict[str, Evaluation]:
        """Measure candidates on every sequence of a split."""
        fidelity = Fidelity(split, 0, self._stage.num_sequences[split])
        keys = {name: evaluation_key(a, fidelity) for name, a in candidates.items()}
        todo = {keys[name]: candidates[name] for name in candidates if keys[name] not in self.cache}
        for key, assignment in todo.items():
            self.executor.submit(key, assignment, fidelity)
        advance = self._stage.reporter.stage(f"measuring on {split} text", len(todo))
        while any(key not in self.cache for key in todo):
            # What a stopped search left under way may arrive first; it is worth recording too.
            key, evaluation = self.executor.next()
            if key not in self.cache:
                self.record(evaluation)
                self.cache[key] = evaluation
            advance(sum(key in self.cache for key in todo), "")
        return {name: self.cache[key] for name, key in keys.items()}

    def close(self) -> None:
        """Release the executor."""
        if self._executor is not None:
            self._executor.close()

    def _prepare(self) -> None:
        """Run the dense model on what will be measured, once, before workers start."""
        bench = self._stage.bench()
        with spending(bench.meter, self._stage.records, "operators"):
            bench.observe()
        advance = self._stage.reporter.stage("dense model", len(self._stage.num_sequences))
        for done, split in enumerate(self._stage.num_sequences, start=1):
            with spending(bench.meter, self._stage.records, f"dense {split}"):
                bench.evaluator.prepare(split)
            advance(done, split)


class Lazy:
    """An executor that starts when something is first submitted: replaying needs no model."""

    def __init__(self, measuring: Measuring) -> None:
        self._measuring = measuring

    def submit(self, key: str, assignment: Assignment, fidelity: Fidelity) -> None:
        """Start what measures if it has not, and queue."""
        self._measuring.executor.submit(key, assignment, fidelity)

    def next(self) -> tuple[str, Evaluation]:
        """The next result."""
        return self._measuring.executor.next()

    def drop_queued(self) -> None:
        """Forget what was not begun."""
        self._measuring.executor.drop_queued()

    def close(self) -> None:
        """Release what measures."""
        self._measuring.close()
