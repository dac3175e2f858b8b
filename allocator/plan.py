"""The plan: the exported artefact, plain data that rebuilds an allocation and lets it be checked.

Loading a plan never imports or runs anything it names outside our own registries, and needs no
torch. Every byte count in it is recomputed on loading.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from search_spaces.operators import AnyOperator, operator_from_json
from search_spaces.space import Member, Unit
from search_spaces.storage import ELEMENT_BYTES, StoredTensor, safetensors_bytes
from search_spaces.whole_file import write_whole

_MOST_PLAN_BYTES = 64 * 2**20
# Objectives whose likelihood is the next token's, so that statistics serve all of them.
_NEXT_TOKEN = ("kl", "cross_entropy", "perplexity")
_LOSS_UNITS = {"hidden_state": "relative squared error", "embedding": "1 - cosine"}
CONTAINER_METADATA = {"format": "model-allocator"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Measured(_Strict):
    """A measured loss: mean nats per token and its standard error over sequences."""

    nats: float
    standard_error_nats: float
    num_tokens: int
    cross_entropy_nats: float | None = None
    perplexity: float | None = None


class Paired(_Strict):
    """Difference of two measured losses on the same sequences, and its standard error."""

    nats: float
    standard_error_nats: float


class ModelIdentity(_Strict):
    """Which model a plan is for."""

    name: str
    architecture: str
    config_sha256: str
    weights_sha256: str


class PlanMember(_Strict):
    """One parameter of a unit, or the keys or values that a layer caches.

    ``shape`` is (rows, columns) or (matrices, rows, columns); of a cache (batch, tokens, channels).
    """

    module: str
    parameter: str
    shape: tuple[int, ...]
    transposed: bool = False
    cache: bool = False


class PlanUnit(_Strict):
    """One choice: the parameters that share it and the operator with its parameters."""

    name: str
    kind: str
    depth: int | None
    members: tuple[PlanMember, ...]
    operator: dict[str, Any]
    bytes: int

    @property
    def unit(self) -> Unit:
        """The unit of the search space that this entry was made from."""
        members = tuple(
            Member(m.module, m.parameter, m.shape, m.transposed, m.cache) for m in self.members
        )
        return Unit(self.name, members, self.depth, self.kind)

    @property
    def choice(self) -> AnyOperator:
        """The chosen operator."""
        return operator_from_json(self.operator)


class FixedTensor(_Strict):
    """A dense tensor that was not up for choice."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in ELEMENT_BYTES:
            raise ValueError(f"unknown stored type {dtype!r}; known: {', '.join(ELEMENT_BYTES)}")
        return dtype


class SplitRecord(_Strict):
    """One calibration split: its size and the hash of its token ids."""

    num_sequences: int
    sequence_length: int
    sha256: str


class TextRecord(_Strict):
    """One text: where its tokens came from, and how much its loss counts beside the others'."""

    source: str
    splits: dict[str, SplitRecord]
    weight: Annotated[float, Field(gt=0)] = 1.0


class CalibrationRecord(TextRecord):
    """Where the tokens came from; ``also`` are further texts that were measured on."""

    also: tuple[TextRecord, ...] = ()

    @property
    def texts(self) -> tuple[TextRecord, ...]:
        """All texts, the first of them first."""
        return (self, *self.also)

    def identity(self, split: str) -> str:
        """What a split is, over all texts: its token hash, or hashes with their weights."""
        if not self.also:
            return self.splits[split].sha256
        return " + ".join(f"{text.weight!r} {text.splits[split].sha256}" for text in self.texts)

    def statistics_identity(self, objective: str) -> str:
        """What the statistics of a run depend on besides the weights: text and likelihood."""
        text = self.identity("statistics")
        return text if objective in _NEXT_TOKEN else f"{text} {objective}"


class SearchRecord(_Strict):
    """How the search was run; the history hash covers every told result in order."""

    name: str
    seed: int
    window: int
    num_evaluations: int
    num_failed: int
    history_sha256: str
    stopped: str


class Plan(_Strict):
    """An allocation with its proof.

    Bytes: ``achieved_bytes`` is the exact size of the packed safetensors file, header included,
    and of the caches where they are searched; ``searched_bytes`` the payload of the searched
    units. Losses are nats per token, lower is better, measured in ``dtype``. ``lower_bound_nats``
    and ``gap_nats`` speak of the additive model of ``scorer`` and its solver's plan; they and
    ``predicted_nats`` are ``None`` where a formula made the plan or a measured front holds it. The
    measured entries speak for themselves.
    """

    schema_version: Literal[1] = 1
    model: ModelIdentity
    space: str
    ties: str
    budget_text: str
    budget_bytes: Annotated[int, Field(ge=0)]
    achieved_bytes: int
    slack_bytes: Annotated[int, Field(ge=0)]
    searched_budget_bytes: int
    searched_bytes: int
    bits_per_weight: float
    dense_bytes: int
    units: tuple[PlanUnit, ...]
    fixed: tuple[FixedTensor, ...]
    returned: Annotated[str, Field(pattern=r"^(uniform|dp(:.+)?|search|formula)$")]
    scorer: str
    objective: str = "kl"
    dtype: str = "float32"
    predicted_nats: float | None
    lower_bound_nats: float | None
    gap_nats: float | None
    solver_status: str
    search_nats: dict[str, Measured] = {}
    guard_nats: dict[str, Measured] = {}
    heldout_nats: dict[str, Measured] = {}
    heldout_differences_nats: dict[str, Paired] = {}
    calibration: CalibrationRecord | None = None
    search: SearchRecord | None = None
    tokens: dict[str, int] = {}
    block_tokens: dict[str, int] = {}
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        """Recompute every byte count from shapes and operators."""
        for entry in self.units:
            exact = entry.unit.bytes(entry.choice)
            if exact != entry.bytes:
                raise ValueError(
                    f"unit {entry.name!r} says {entry.bytes} bytes, its operator stores {exact}"
                )
        if sum(entry.bytes for entry in self.units) != self.searched_bytes:
            raise ValueError("searched_bytes is not the sum of the units' bytes")
        stored = self.stored_tensors()
        if len({tensor.name for tensor in stored}) != len(stored):
            raise ValueError("two units or fixed tensors store a tensor of the same name")
        exact = safetensors_bytes(stored, CONTAINER_METADATA) + self.cache_bytes
        if exact != self.achieved_bytes:
            raise ValueError(f"achieved_bytes says {self.achieved_bytes}, there are {exact}")
        if self.achieved_bytes > self.budget_bytes:
            raise ValueError(f"{self.achieved_bytes} bytes exceed the budget {self.budget_bytes}")
        if self.slack_bytes != self.budget_bytes - self.achieved_bytes:
            raise ValueError("slack_bytes is not budget_bytes - achieved_bytes")
        return self

    @property
    def loss_unit(self) -> str:
        """Of every measured loss, and of what a scorer predicts in nats: ``nats`` for most."""
        return _LOSS_UNITS.get(self.objective, "nats")

    @property
    def loss_unit_text(self) -> str:
        """The same for axes and captions, per what it is counted."""
        return "nats per token" if self.loss_unit == "nats" else self.loss_unit

    def stored_tensors(self) -> tuple[StoredTensor, ...]:
        """Every tensor of the packed file."""
        fixed = tuple(StoredTensor(t.name, t.dtype, t.shape) for t in self.fixed)
        return fixed + tuple(
            tensor
            for entry in self.units
            if not entry.unit.is_cache
            for tensor in entry.unit.layout(entry.choice)
        )

    @property
    def cache_bytes(self) -> int:
        """Memory of the caches that the plan decides, at its context and batch."""
        return sum(entry.bytes for entry in self.units if entry.unit.is_cache)

    @property
    def file_bytes(self) -> int:
        """Exact size of the packed safetensors file, header included."""
        return self.achieved_bytes - self.cache_bytes


def load_plan(path: Path) -> Plan:
    """Read and check a plan.

    Raises:
        ValueError: Not a plan: unreadable, not JSON, unknown or missing fields, an unknown
            operator, or byte counts that do not add up. One sentence.
    """
    try:
        if path.stat().st_size > _MOST_PLAN_BYTES:
            raise ValueError(f"{path}: larger than {_MOST_PLAN_BYTES} bytes, not a plan")
        data = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except OSError as error:
        raise ValueError(f"cannot read the plan {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a plan: not valid JSON ({error})") from error
    try:
        return Plan.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{path} is not a valid plan: {_first_error(error)}") from error


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan so that a reader sees the old file or the whole new one, never half."""
    text = json.dumps(plan.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
    write_whole(path, text)


def plan_json_schema() -> dict[str, Any]:
    """The JSON Schema of a plan file, generated from the model."""
    return {"title": "model-allocator plan", **Plan.model_json_schema()}


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed in a plan")


def _first_error(error: ValidationError) -> str:
    """The first problem as one line: where, what, and the offending value when short."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
