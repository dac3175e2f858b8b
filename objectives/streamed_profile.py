"""Profile a model larger than memory: loss tables and statistics, one block at a time.

The problem: scorers read one unit's weights, its options and its statistics, but a full profile
loads the whole model for that. Here every cell of a block is computed while the block is resident
and its statistics are known; then both are dropped. What operators need later (Hessians of GPTQ) is
written as it comes. Scorers that run passes of their own over the whole model cannot be served.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from objectives.bank import Bank
from objectives.calibration import Calibration, CalibrationRequest, build_calibration
from objectives.evaluator import Evaluator
from objectives.hidden_states import DEFAULT_HIDDEN_BYTES
from objectives.language_task import LanguageTask
from objectives.loading import check_length, load_tokenizer
from objectives.peak_memory import PeakMemory
from objectives.sensitivity import SCORERS, CellScorer, LossTable, Scorer, ScoringContext
from objectives.statistics import Progress
from objectives.statistics_file import StatisticsFile, statistics_identity
from objectives.streamed_statistics import StreamedStatistics, Visit
from objectives.streaming import StreamedModel, part_of_space
from objectives.task import Task, TokenMeter
from search_spaces.build import SpaceRequest, build_space
from search_spaces.operators import Statistics
from search_spaces.space import SearchSpace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamSettings:
    """How a streamed profile runs.

    Attributes:
        dtype: ``float32``, ``bfloat16`` or ``auto``.
        device: Of the resident block: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        hidden_bytes: Most host memory of the hidden states between blocks; the rest is in files.
        statistics: Where the statistics that operators need are written; ``None``: nowhere.
    """

    dtype: str = "auto"
    device: str = "auto"
    hidden_bytes: int = DEFAULT_HIDDEN_BYTES
    statistics: Path | None = None


@dataclass(frozen=True)
class StreamedProfile:
    """What a streamed pass found.

    Attributes:
        space: Units and menus.
        tables: By scorer, in the order they were asked for.
        left_out: Why a scorer, not the first, could not serve the space.
        statistics: The file of what operators need, if it was asked for and they need any.
        tokens: Sent through the model, by kind.
        seconds: By kind of work.
        memory: The process's peak.
    """

    space: SearchSpace
    tables: Mapping[str, LossTable]
    left_out: Mapping[str, str]
    statistics: StatisticsFile | None
    tokens: Mapping[str, int]
    seconds: Mapping[str, float]
    memory: PeakMemory


def profile_streamed(
    checkpoint: str,
    request: SpaceRequest | SearchSpace,
    scorers: Sequence[str | Scorer],
    *,
    text: Calibration | CalibrationRequest,
    settings: StreamSettings = StreamSettings(),
    progress: Progress = lambda done, total: None,
) -> StreamedProfile:
    """The loss tables of a model that need not fit in memory.

    Args:
        checkpoint: A folder, an embedded model or a hub id.
        request: What may be chosen, or the space itself.
        scorers: Scorers that know each cell by itself, or their names.
        text: Tokens, or which text to make them from; the splits for statistics and searches are
            read.
        settings: Precision, device, memory.
        progress: Told (passes over a block done, in all).

    Raises:
        ValueError: The model cannot be streamed, a scorer is unknown or runs passes of its own, the
            space has caches, sequences are longer than the model reads, the first scorer cannot
            serve it, or a loss is not finite.
    """
    chosen = {scorer.name: scorer for scorer in map(_cell_scorer, scorers)}
    stream = StreamedModel(checkpoint, dtype=settings.dtype, device=settings.device)
    space = request if isinstance(request, SearchSpace) else build_space(stream.model, request)
    if isinstance(text, CalibrationRequest):
        check_length(stream.model, text.sequence_length)
        text = build_calibration(text, load_tokenizer(stream.folder))
    file = None
    if settings.statistics is not None and space.needs:
        identity = statistics_identity(stream.weights_sha256, text.hashes["statistics"])
        file = StatisticsFile(settings.statistics, identity)
    task, meter = LanguageTask(text), TokenMeter(stream.num_blocks)
    statistics = StreamedStatistics(stream, task, space, meter, hidden_bytes=settings.hidden_bytes)
    filling = StreamedTables(stream, task, space, chosen, meter)
    needs = space.needs.union(*(scorer.needs_for(space) for scorer in chosen.values()))
    with ExitStack() as stack:
        write: Callable[[Mapping[str, Statistics]], None] | None = None
        if file is not None:
            members = [member.name for unit in space.units for member in unit.members]
            write = stack.enter_context(file.writing(members, space.needs))

        def act(visit: Visit) -> None:
            if write is not None:
                write(visit.statistics)
            with stream.timing("scoring"):
                filling.fill(visit)

        statistics.visit(needs, act, progress)
    return StreamedProfile(
        space,
        filling.tables(),
        filling.left_out,
        file,
        meter.as_dict(),
        dict(stream.seconds),
        PeakMemory.measure(stream.device),
    )


class StreamedTables:
    """Loss tables, filled cell by cell with the units of whichever part is resident.

    Args:
        stream: The model.
        task: For scorers.
        space: Units and menus.
        scorers: By name; the first must be able to serve the space.
        meter: Where tokens are counted.

    Attributes:
        left_out: Why a scorer, not the first, could not serve the space.
    """

    def __init__(
        self,
        stream: StreamedModel,
        task: Task,
        space: SearchSpace,
        scorers: Mapping[str, Scorer],
        meter: TokenMeter,
    ) -> None:
        self.left_out: dict[str, str] = {}
        self._stream = stream
        self._task = task
        self._space = space
        self._scorers = scorers
        self._meter = meter
        self._rows = {
            name: [np.full(len(menu), np.nan) for menu in space.menus] for name in scorers
        }

    def tables(self) -> dict[str, LossTable]:
        """The finished tables."""
        return {
            name: LossTable(name, scorer.unit, tuple(self._rows[name]))
            for name, scorer in self._scorers.items()
            if name not in self.left_out
        }

    def fill(self, visit: Visit) -> None:
        """Compute all cells of a part that is resident.

        Raises:
            ValueError: The first scorer cannot serve a unit, or a loss is not finite.
        """
        space, model = part_of_space(self._space, visit.units), self._stream.model
        # room for one cell, so that scorers share what was compressed
        largest = max(unit.num_weights for unit in space.units) * self._stream.dtype.itemsize
        bank = Bank(
            model,
            space,
            statistics=_only(visit.statistics, self._space.needs),
            most_bytes=largest,
        )
        context = ScoringContext(
            space=space,
            bank=bank,
            statistics=visit.statistics,
            model=model,
            task=self._task,
            meter=self._meter,
            evaluator=Evaluator(model, self._task, bank, self._meter),
        )
        for unit, menu in enumerate(space.menus):
            for option in range(len(menu)):
                for name, scorer in self._scorers.items():
                    if name not in self.left_out:
                        loss = self._cell(context, scorer, unit, option)
                        self._rows[name][visit.units[unit]][option] = loss

    def _cell(self, context: ScoringContext, scorer: Scorer, unit: int, option: int) -> float:
        """One loss; NaN where a scorer turns out to be unable, which is then left out."""
        try:
            (loss,) = scorer.losses(context, [(unit, option)])
        except ValueError as error:
            if scorer.name == next(iter(self._scorers)):
                raise
            logger.warning("the %s scorer is left out: %s", scorer.name, error)
            self.left_out[scorer.name] = str(error)
            return math.nan
        if not math.isfinite(loss):
            raise ValueError(
                f"the {scorer.name} loss of {context.space.units[unit].name} is {loss}; "
                "its weights or statistics are not finite"
            )
        return loss


def _only(statistics: Mapping[str, Statistics], kinds: Collection[str]) -> dict[str, Statistics]:
    """What operators are shown: nothing but what they need, so that they make the same of it."""
    return {
        name: Statistics(**{kind: getattr(found, kind) for kind in kinds})
        for name, found in statistics.items()
    }


def _cell_scorer(wanted: str | Scorer) -> Scorer:
    """A scorer, by name or itself, if it knows each cell by itself."""
    scorer = SCORERS[wanted]() if isinstance(wanted, str) else wanted
    if CellScorer not in type(scorer).__mro__:
        raise ValueError(
            f"scorer {scorer.name}: it runs passes of its own over the whole model, which is not "
            "loaded when streaming; choose one that scores each matrix by itself"
        )
    return scorer
