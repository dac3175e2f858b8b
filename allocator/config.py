"""The configuration of a run: everything that decides its history, in one validated record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from search_spaces.whole_file import write_whole

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Objective = Literal["kl", "cross_entropy", "perplexity", "hidden_state", "embedding"]
DEFAULT_SCORER = "correlated_blend"
"""Whose table a search starts from."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SpaceConfig(_Strict):
    """What may be chosen.

    Attributes:
        space: A preset's name or a YAML file.
        ties: Runtime whose fused kernels tie units together; ``None`` leaves it to the space.
        pins: (glob, operator label) pairs.
        exclude: Globs of units to leave dense.
        open_units: ``embeddings`` and ``head`` may be searched too.
        bar_keep: Take the dense option out of every menu.
        context: Tokens for which the model's cache counts in the budget; 0 leaves it out.
        batch: Sequences of the cache.
        apart: Choose for keys and values apart.
    """

    space: str = "bits"
    ties: str | None = None
    pins: tuple[tuple[str, str], ...] = ()
    exclude: tuple[str, ...] = ()
    open_units: tuple[str, ...] = ()
    bar_keep: bool = False
    context: Annotated[int, Field(ge=0)] = 0
    batch: Positive = 1
    apart: bool = False


class DataConfig(_Strict):
    """Which text, cut how. Counts are sequences, of every text.

    Attributes:
        text: What is measured on; where there are several, the one whose perplexity is reported.
        also: Further texts, cut alike, whose losses are measured too.
        weights: How much ``text`` and each of ``also`` counts. Empty where there are several:
            settled before the search by how each text's loss reacts to compression.
        seed: Orders the documents.
    """

    text: str = "wiki-summaries"
    also: tuple[str, ...] = ()
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    sequence_length: Annotated[int, Field(ge=2)] = 256
    statistics: Positive = 64
    search: Positive = 64
    guard: Positive = 32
    heldout: Positive = 32
    seed: Seed = 0

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts, ``text`` first."""
        return (self.text, *self.also)

    @model_validator(mode="after")
    def _weigh_all(self) -> DataConfig:
        if self.weights and len(self.weights) != len(self.texts):
            raise ValueError(f"{len(self.weights)} weights for {len(self.texts)} texts")
        return self


class MeasureConfig(_Strict):
    """How losses are measured.

    Attributes:
        objective: What is minimised; see :mod:`objectives.language_objectives`.
        top_k: Outcomes per position that the teacher cache keeps; 0 keeps the vocabulary.
        batch_size: Sequences per forward pass.
        dtype: Of the model while it is measured, or ``auto``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        device_map: Spread the model over several devices instead; see
            :mod:`objectives.device_map`.
        threads: Torch threads of every process that measures; 0 is all cores of the machine.
    """

    objective: Objective = "kl"
    top_k: Annotated[int, Field(ge=0)] = 2048
    batch_size: Positive = 4
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    device_map: str | dict[str, int | str] | None = None
    threads: Annotated[int, Field(ge=0)] = 0


class SearchConfig(_Strict):
    """How the search runs.

    Attributes:
        name: Of the search, or of several with commas between them.
        scorer: Whose table it starts from.
        scorers: Whose tables and plans are shown beside it; a search may begin from theirs too.
        seed: Of the search.
        window: Proposals under way at once.
        batch: Sequences per evaluation; ``None`` for what the search does best with.
        slopes: Whether the search may differentiate the loss, where it can be.
        warm_start: Run or study whose measurements it starts from.
        options: Of the search by name, of several as ``SEARCH.OPTION``; see
            :mod:`allocator.searches.options`.
        latencies: Table of latencies to minimise too, where the search can; the journal keeps what
            the run needs of it.
    """

    name: str = "model_guided"
    scorer: str = DEFAULT_SCORER
    scorers: tuple[str, ...] = (
        DEFAULT_SCORER,
        "fisher",
        "correlated_fisher",
        "reconstruction",
        "relative_error",
    )
    seed: Seed = 0
    window: Positive = 4
    batch: Positive | None = None
    slopes: bool = True
    warm_start: str | None = None
    options: dict[str, bool | int | float | str] = {}
    latencies: str | None = None


class CapsConfig(_Strict):
    """Where the search stops.

    Attributes:
        trials: Most evaluations.
        tokens: Most forward tokens of statistics, dense model and search together.
        seconds: Longest time of the search in one session; where it cuts is not reproducible.
    """

    trials: Positive | None = None
    tokens: Positive | None = None
    seconds: Annotated[float, Field(gt=0)] | None = None


class ExecutionConfig(_Strict):
    """Where measurements run.

    Attributes:
        executor: ``in-process`` or ``ray``.
        workers: Processes that measure.
        address: Of a running Ray cluster; without one, a local one is started.
        gpus_per_worker: That Ray reserves for each worker.
    """

    executor: str = "in-process"
    workers: Positive = 1
    address: str | None = None
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0


class RunConfig(_Strict):
    """One complete run. ``caps`` and ``execution`` say how long and where, not what comes out."""

    model: str
    budget: str
    space: SpaceConfig = SpaceConfig()
    data: DataConfig = DataConfig()
    measure: MeasureConfig = MeasureConfig()
    search: SearchConfig = SearchConfig()
    caps: CapsConfig = CapsConfig(trials=150)
    execution: ExecutionConfig = ExecutionConfig()

    @property
    def identity(self) -> dict[str, Any]:
        """The part that decides the history: what a resumed run must agree on."""
        found = self.model_dump(mode="json", exclude={"caps", "execution"})
        if self.measure.device_map is None:  # as it was before there could be one
            del found["measure"]["device_map"]
        if not self.data.also:  # as it was before there could be several texts
            del found["data"]["also"], found["data"]["weights"]
        if not self.search.options:  # as it was before there could be options
            del found["search"]["options"]
        if self.search.latencies is None:  # as it was before there could be latencies
            del found["search"]["latencies"]
        return found


def save_config(config: RunConfig, path: Path) -> None:
    """Write a configuration as YAML; a reader sees the old content or the whole new one."""
    write_whole(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def load_config(path: Path) -> RunConfig:
    """Read a configuration.

    Raises:
        ValueError: Unreadable, not YAML, or fields that are unknown or wrong.
    """
    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"{path} holds no configuration of a run: put it back")
        return RunConfig.model_validate(data)
    except OSError as error:
        raise ValueError(f"cannot read the run's configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {where}: {first['msg']}") from error
