"""What every operator promises, on odd shapes and every float type."""

import json
import struct
from dataclasses import fields, replace

import pytest
import torch
from operator_cases import CASES, case_id
from safetensors.torch import save_file

from search_spaces.operators import OPERATORS, Statistics, operator_from_json, operator_to_json
from search_spaces.space import Member
from search_spaces.storage import payload_bytes, safetensors_bytes

SHAPES = ((24, 64), (7, 13), (1, 65), (5, 1), (3, 7, 130))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_operator = pytest.mark.parametrize("operator", CASES, ids=case_id)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def weights(shape, dtype=torch.float32):
    """(matrices, rows, columns) with an outlier, a zero row and a constant row where they fit."""
    generator = torch.Generator().manual_seed(17)
    stack = torch.randn(shape, generator=generator).reshape(-1, *shape[-2:])
    stack[:, 0, 0] = 9.0
    if shape[-2] > 2:
        stack[:, 1] = 0.0
        stack[:, 2] = 0.25
    return stack.to(dtype)


def statistics(matrix):
    """Plausible statistics of every sort."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(200, matrix.shape[1], generator=generator)
    return Statistics(
        second_moment=inputs.square().mean(0),
        hessian=inputs.T @ inputs / len(inputs),
        fisher=torch.rand(matrix.shape, generator=generator),
    )


def test_every_operator_has_a_case():
    assert {operator.name for operator in CASES} >= set(OPERATORS)


def test_cases_are_distinct():
    assert len(set(CASES)) == len(CASES)


@every_dtype
@every_shape
@every_operator
def test_file_holds_exactly_the_priced_tensors(operator, shape, dtype, tmp_path):
    member = Member("block.mlp", "weight", shape)
    packed = [operator.pack(m, statistics(m)) for m in weights(shape, dtype)]
    layout = member.layout(operator)
    relative = [tensor.name for tensor in operator.layout(member.matrix_shape)]
    stored = {}
    for tensor, name in zip(layout, relative, strict=True):
        parts = [one[name] for one in packed]
        stored[tensor.name] = torch.stack(parts) if len(shape) == 3 else parts[0]
    path = tmp_path / "packed.safetensors"
    save_file(stored, path)

    assert all(set(one) == set(relative) for one in packed)
    assert path.stat().st_size == safetensors_bytes(layout)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert {n: (e["dtype"], tuple(e["shape"])) for n, e in header.items()} == {
        tensor.name: (tensor.dtype, tensor.shape) for tensor in layout
    }
    assert operator.bytes(member.matrix_shape) * member.num_matrices == payload_bytes(layout)


@every_dtype
@every_shape
@every_operator
def test_apply_keeps_shape_and_type_and_is_what_unpack_returns(operator, shape, dtype):
    for matrix in weights(shape, dtype):
        stats, before = statistics(matrix), matrix.clone()
        applied = operator.apply(matrix, stats)
        assert applied.shape == matrix.shape
        assert applied.dtype == dtype
        assert torch.isfinite(applied).all()
        assert torch.equal(matrix, before), "apply must not write to its input"
        assert torch.equal(applied, operator.apply(matrix, stats)), "apply must be deterministic"
        unpacked = operator.unpack(operator.pack(matrix, stats), tuple(matrix.shape))
        assert unpacked.dtype == torch.float32
        assert torch.equal(unpacked.to(dtype), applied)


@every_operator
def test_a_matrix_of_zeros_stays_one(operator):
    zeros = torch.zeros(4, 70)
    assert torch.equal(operator.apply(zeros, statistics(zeros)), zeros)


@every_operator
def test_json_round_trip(operator):
    data = json.loads(json.dumps(operator_to_json(operator)))
    again = operator_from_json(data)
    assert again == operator
    assert hash(again) == hash(operator)


@every_operator
def test_json_refuses_unknown_and_mistyped_parameters(operator):
    data = operator_to_json(operator)
    with pytest.raises(ValueError, match="no parameter 'colour'"):
        operator_from_json({**data, "colour": 1})
    for field in fields(operator):
        with pytest.raises(ValueError, match=field.name):
            operator_from_json({**data, field.name: [1]})


@pytest.mark.parametrize("operator", [c for c in CASES if getattr(c, "bits", 8) < 8], ids=case_id)
def test_more_bits_cost_more_and_never_err_more(operator):
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(48, 200, generator=generator)
    stats = statistics(matrix)
    finer = replace(operator, bits=operator.bits + 1)
    errors = [
        (matrix - one.apply(matrix, stats)).square().sum().item() for one in (operator, finer)
    ]
    assert errors[1] <= errors[0]
    assert operator.bytes((48, 200)) < finer.bytes((48, 200))
