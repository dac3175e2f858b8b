"""What a run measured on its search text, and what those losses depend on; read without the model.

The problem this file solves: losses outlive their run, as a study to look at and as the start of
the next search. But a loss says something only about the same weights, text and objective, and an
option's index only about the same menu. So measurements travel with both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allocator.accounts import inherited_evaluations, recorded_evaluations
from allocator.journal import JournalContents, read_journal
from allocator.run_folder import RunFolder, load_space
from allocator.searches.ledger import Ledger
from objectives.evaluation import Evaluation
from search_spaces.space import Assignment, SearchSpace

# These change speed and the last digits only.
_SAME_LOSSES = {"batch_size", "device", "device_map", "threads"}


@dataclass(frozen=True)
class MeasuredRun:
    """Measurements of a run, or of a study made from one.

    Attributes:
        conditions: What a loss depends on besides the assignment and the sequences, by name. Losses
            under equal conditions may be compared.
        options: Labels of each unit's menu in its order, by the unit's name.
        num_sequences: Sequences in the search split.
        evaluations: On the search split, in the order of measuring; those that a warm start
            brought along come first.
        others: On the guard and held-out splits; to be shown, never to be searched with.
        inherited: Keys of the evaluations that a warm start brought along.
    """

    conditions: dict[str, Any]
    options: dict[str, tuple[str, ...]]
    num_sequences: int
    evaluations: tuple[Evaluation, ...]
    others: tuple[Evaluation, ...] = ()
    inherited: frozenset[str] = frozenset()

    def losses(self) -> dict[Assignment, tuple[float, float]]:
        """Loss and standard error in nats of each measured assignment, in order of measuring.

        Losses are adjusted for the sequences that an assignment happened to meet; see
        :class:`~allocator.searches.ledger.Ledger`. Assignments that only failed are left out.
        """
        ledger = Ledger(self.num_sequences)
        for evaluation in self.evaluations:
            ledger.add(evaluation)
        measured = dict.fromkeys(e.assignment for e in self.evaluations if e.ok)
        return {assignment: ledger.adjusted(assignment) for assignment in measured}


def read_measured_run(folder: RunFolder) -> MeasuredRun:
    """The measurements of a run, finished or not, also while it is being written.

    Raises:
        ValueError: The journal or the space cannot be read.
    """
    return gather_measured_run(read_journal(folder.journal), load_space(folder.space))


def gather_measured_run(journal: JournalContents, space: SearchSpace) -> MeasuredRun:
    """The measurements in a run's journal."""
    inherited = {e.key: e for e in inherited_evaluations(journal.records)}
    recorded = recorded_evaluations(journal.records)
    evaluations = (inherited | recorded).values()
    return MeasuredRun(
        conditions=loss_conditions(journal.header, space),
        options=option_labels(space),
        num_sequences=journal.header["config"]["data"]["search"],
        evaluations=tuple(e for e in evaluations if e.fidelity.split == "search"),
        others=tuple(e for e in evaluations if e.fidelity.split != "search"),
        inherited=frozenset(inherited) - frozenset(recorded),
    )


def loss_conditions(header: Mapping[str, Any], space: SearchSpace) -> dict[str, Any]:
    """What the losses of a run depend on besides the assignment and the sequences.

    Args:
        header: Of the run's journal.
        space: Of the run. The text of the statistics matters only where an operator needs them.
    """
    measure: Mapping[str, Any] = header["config"]["measure"]
    found = {
        "weights": header["model"]["weights_sha256"],
        "space": header["space"],
        "search text": header["calibration"]["search"],
        **{name: value for name, value in measure.items() if name not in _SAME_LOSSES},
    }
    if space.needs:
        found["statistics text"] = header["calibration"]["statistics"]
    return found


def option_labels(space: SearchSpace) -> dict[str, tuple[str, ...]]:
    """Labels of each unit's menu, by the unit's name."""
    return {unit.name: names for unit, names in zip(space.units, space.labels, strict=True)}
