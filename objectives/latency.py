"""Seconds, measured: of a whole model with an assignment swapped in, and of single matrices.

The problem: fewer bytes are not less time. A format is as fast as its kernel on this machine, at
this shape, for this many tokens, so time has to be measured, matrix by matrix and in the format
that will run. :func:`measure_latencies` does so for formats of torch and torchao; other runtimes'
tables come from their own benchmarks.

:class:`AssignmentLatency` times the live model. It holds compressed weights as dense tensors, so
its time depends on what changes the shapes of the computation (quantized caches, removed blocks)
and not on bits: a plan's speed in a runtime must be measured there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from search_spaces.quiet import quiet_transformers
from search_spaces.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from objectives.bank import Bank
    from search_spaces.space import Assignment

Shape = tuple[int, int]
"""(rows, columns) of a matrix; rows are outputs."""

Format = Callable[[nn.Linear], nn.Module]
"""Makes a linear layer over; a ``ValueError`` says why it does not run here."""

NUM_RUNS = 20
_WARM_UP = 3
_GROUP = 64  # columns that share a scale in the packed 4-bit format


class AssignmentLatency:
    """Seconds per token of a live model: a second objective beside the loss.

    Args:
        model: The model of the bank.
        bank: Swaps assignments in.
        tokens: (batch, length) int64, what is run.
        num_runs: Timed forward passes; their median counts.
    """

    def __init__(
        self, model: nn.Module, bank: Bank, tokens: Tensor, *, num_runs: int = NUM_RUNS
    ) -> None:
        self._model = model
        self._bank = bank
        self._tokens = tokens.to(next(model.parameters()).device)
        self._num_runs = num_runs

    def __call__(self, assignment: Assignment) -> float:
        """Median seconds per token of one assignment."""
        self._bank.swap(assignment)
        return seconds_per_token(self._model, self._tokens, num_runs=self._num_runs)


def seconds_per_token(model: nn.Module, tokens: Tensor, *, num_runs: int = NUM_RUNS) -> float:
    """Median over forward passes of their time, per token; its inverse is the throughput.

    Args:
        model: As it stands; called as ``model(input_ids=tokens)``.
        tokens: (batch, length) int64 on the model's device.
        num_runs: Timed passes, after a few that are not.
    """
    return median_seconds(lambda: model(input_ids=tokens), tokens.device, num_runs) / tokens.numel()


def measure_latencies(
    shapes: Collection[Shape],
    formats: Mapping[str, str | Format],
    *,
    num_tokens: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    num_runs: int = NUM_RUNS,
) -> dict[tuple[Shape, str], float]:
    """Median seconds of one matrix product, for every shape in every format.

    Args:
        shapes: (rows, columns) of the matrices.
        formats: By the operator label that each stands for (``{"int8-row": "torchao-int8"}``), a
            name in ``FORMATS`` or a function of one's own.
        num_tokens: Rows of the input: 1 as in decoding one sequence, many as in reading a prompt.
        dtype: Of the input and of what is not compressed.
        device: Where it runs.
        num_runs: Timed products, after a few that are not.

    Returns:
        Seconds by (shape, label).

    Raises:
        ValueError: An unknown format, or one that does not run here or at one of the shapes.
    """
    makers = {label: FORMATS[f] if isinstance(f, str) else f for label, f in formats.items()}
    found = {}
    for shape in dict.fromkeys(shapes):
        for label, make in makers.items():
            rows, columns = shape
            linear = nn.Linear(columns, rows, bias=False, dtype=dtype, device=device)
            inputs = torch.randn(num_tokens, columns, dtype=dtype, device=device)
            with torch.inference_mode(), _refused(label, shape):
                module = make(linear.requires_grad_(False))
                module(inputs)
            found[shape, label] = median_seconds(partial(module, inputs), device, num_runs)
    return found


def median_seconds(
    run: Callable[[], object], device: torch.device | str, num_runs: int = NUM_RUNS
) -> float:
    """Median time of a call, waiting for the device; the first few calls are not counted.

    Raises:
        ValueError: Less than one run.
    """
    if num_runs < 1:
        raise ValueError(f"expected at least one timed run, got {num_runs}")
    device = torch.device(device)
    times = []
    with torch.inference_mode():
        for _ in range(_WARM_UP + num_runs):
            _wait(device)
            begin = time.perf_counter()
            run()
            _wait(device)
            times.append(time.perf_counter() - begin)
    return statistics.median(times[_WARM_UP:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _refused(label: str, shape: Shape) -> Iterator[None]:
    """What a kernel cannot do, in one sentence."""
    try:
        yield
    except (RuntimeError, NotImplementedError, AssertionError, ImportError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the format of {label!r} does not run here at {shape[0]}x{shape[1]}: {reason}"
        ) from error


def _dense(linear: nn.Linear) -> nn.Module:
    """The layer as it is, in the measuring dtype."""
    return linear


class _PackedInt8(nn.Module):
    """torch's 8-bit weight-only product: one scale a row, bfloat16 kernels on the CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.float()
        scales = weight.abs().amax(1).clamp_min(1e-12) / 127
        self._codes = (weight / scales[:, None]).round().to(torch.int8)
        self._scales = scales.to(linear.weight.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(inputs, self._codes, self._scales)  # type: ignore[no-any-return]


class _PackedInt4(nn.Module):
    """torch's 4-bit weight-only product on the CPU: asymmetric groups of 64 columns."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        if columns % _GROUP or linear.weight.device.type != "cpu":
            raise ValueError(f"it runs on the CPU, on columns that {_GROUP} divides")
        groups = linear.weight.float().view(rows, -1, _GROUP)
        low = groups.amin(-1, keepdim=True)
        scales = ((groups.amax(-1, keepdim=True) - low) / 15).clamp_min(1e-12)
        codes = ((groups - low) / scales).round().clamp(0, 15).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(rows, columns), 1)
        self._packed: Tensor = packed
        # The kernel computes (code - 8) * scale + zero.
        pairs = torch.cat([scales, low + 8 * scales], -1).transpose(0, 1)
        self._scales_and_zeros = pairs.contiguous().to(linear.weight.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(  # type: ignore[no-any-return]
            inputs, self._packed, _GROUP, self._scales_and_zeros
        )


def _torchao_int8(linear: nn.Linear) -> nn.Module:
    """8-bit weights of torchao, one scale a row, multiplied in the inputs' dtype."""
    return _torchao(linear, "Int8WeightOnlyConfig")


def _torchao_dynamic_int8(linear: nn.Linear) -> nn.Module:
    """8-bit weights and inputs of torchao, the latter scaled token by token as they come."""
    return _torchao(linear, "Int8DynamicActivationInt8WeightConfig")


def _torchao(linear: nn.Linear, config: str) -> nn.Module:
    with quiet_transformers():
        try:
            from torchao import quantization
        except ImportError as error:
            raise ValueError("it needs torchao: pip install 'model-allocator[torchao]'") from error

        holder = nn.Sequential(linear)  # what is replaced must have a parent
        quantization.quantize_(holder, getattr(quantization, config)())
    return holder


FORMATS: Registry[Format] = Registry(
    "format",
    {
        "dense": _dense,
        "int8": _PackedInt8,
        "int4-g64": _PackedInt4,
        "torchao-int8": _torchao_int8,
        "torchao-dynamic-int8": _torchao_dynamic_int8,
    },
    entry_point_group="model_allocator.formats",
)
"""What :func:`measure_latencies` can time, by name."""
