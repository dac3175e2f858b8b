"""The texts of a run: read, cut alike, weighed against each other, and recorded.

The problem: a run may measure on several texts at once, general and domain text for example. They
must be cut alike, share nothing across splits, and count by weights that are fixed before anything
is searched, since a search compares losses and a resumed run must measure the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from allocator.accounts import Records
from allocator.bench import Bench
from allocator.config import DataConfig, MeasureConfig
from allocator.plan import CalibrationRecord, SplitRecord, TextRecord
from allocator.run_folder import RunFolder
from objectives.calibration import SPLITS, Calibration, CalibrationRequest, build_calibration
from objectives.language_objectives import TaskOptions, language_task, refuse_shared_text
from objectives.loading import LoadedModel, check_length
from objectives.multi_task import MultiTask, probe_weights
from objectives.task import TokenMeter
from search_spaces.space import SearchSpace


def build_texts(data: DataConfig, loaded: LoadedModel) -> tuple[Calibration, ...]:
    """Every text of a run, tokenized and cut into splits.

    Raises:
        ValueError: A text cannot be read or is too short, or two of them share text across splits.
    """
    check_length(loaded.model, data.sequence_length)
    texts = tuple(
        build_calibration(calibration_request(data, source), loaded.tokenizer)
        for source in data.texts
    )
    refuse_shared_text(texts)
    return texts


def calibration_request(data: DataConfig, source: str) -> CalibrationRequest:
    """How one text of a run is cut."""
    return CalibrationRequest(
        source,
        sequence_length=data.sequence_length,
        num_statistics=data.statistics,
        num_search=data.search,
        num_guard=data.guard,
        num_heldout=data.heldout,
        seed=data.seed,
    )


def load_texts(data: DataConfig, folder: RunFolder) -> tuple[Calibration, ...]:
    """What a run's folder holds of its texts.

    Raises:
        ValueError: A file is missing or damaged.
    """
    return tuple(Calibration.load(folder.text(number)) for number in range(len(data.texts)))


def find_weights(
    measure: MeasureConfig, loaded: LoadedModel, space: SearchSpace, texts: Sequence[Calibration]
) -> tuple[tuple[float, ...], TokenMeter]:
    """How much each text should count, by how its loss reacts to compression; and what it cost.

    Raises:
        ValueError: A text's loss does not react.
    """
    options = TaskOptions(measure.top_k, measure.batch_size)
    tasks = [language_task(measure.objective, text, options) for text in texts]
    bench = Bench.build(loaded.model, MultiTask(tasks), space)
    bench.observe()
    return probe_weights(bench.model, tasks, bench.bank, bench.meter), bench.meter


def record_weighing(meter: TokenMeter, records: Records) -> None:
    """Record what finding the weights cost, if they were found."""
    if meter.counts:
        counts = {"counts": dict(meter.counts), "block_counts": dict(meter.block_counts)}
        records.append({"type": "tokens", "purpose": "weights"} | counts)


def text_record(data: DataConfig, texts: Sequence[Calibration]) -> CalibrationRecord:
    """What a plan says of its texts."""
    weights = data.weights or (1.0,) * len(texts)
    first, *others = [
        TextRecord(source=text.source, splits=calibration_splits(text), weight=weight)
        for text, weight in zip(texts, weights, strict=True)
    ]
    return CalibrationRecord(**dict(first), also=tuple(others))


def calibration_splits(calibration: Calibration) -> dict[str, SplitRecord]:
    """Size and hash of each split."""
    return {
        name: SplitRecord(
            num_sequences=len(calibration.splits[name]),
            sequence_length=int(calibration.splits[name].shape[1]),
            sha256=calibration.hashes[name],
        )
        for name in SPLITS
    }
