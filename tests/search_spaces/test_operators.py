"""What every operator promises, on odd shapes and every float type."""

import json
import struct
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from operator_cases import CASES, LADDERS, UNIT_LADDERS, case_id
from safetensors.torch import save_file

from search_spaces.operators import OPERATORS, Statistics, operator_from_json, operator_to_json
from search_spaces.operators.members import compress_unit, pack_unit, unpack_unit
from search_spaces.space import Member, Unit
from search_spaces.storage import payload_bytes, safetensors_bytes

SHAPES = ((24, 64), (7, 13), (1, 65), (5, 1), (3, 7, 130), (9, 512))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT_CASES = tuple(operator for ladder in UNIT_LADDERS for operator in ladder.steps)
every_operator = pytest.mark.parametrize("operator", CASES, ids=case_id)
every_unit_case = pytest.mark.parametrize(
    ("operator", "members"),
    [(operator, ladder.members) for ladder in UNIT_LADDERS for operator in ladder.steps],
    ids=lambda value: case_id(value) if hasattr(value, "label") else "",
)
any_operator = pytest.mark.parametrize("operator", [*CASES, *UNIT_CASES], ids=case_id)
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
    """Plausible statistics of every sort; one input feature never fires."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(200, matrix.shape[1], generator=generator)
    if matrix.shape[1] > 8:
        inputs[:, 5] = 0.0
    return Statistics(
        second_moment=inputs.square().mean(0),
        hessian=inputs.T @ inputs / len(inputs),
        fisher=torch.rand(matrix.shape, generator=generator),
    )


def skip_unfit(operator, shape):
    reason = operator.unfit((shape[-2], shape[-1]))
    if reason:
        pytest.skip(reason)


def test_every_operator_has_a_case():
    assert {operator.name for operator in (*CASES, *UNIT_CASES)} >= set(OPERATORS)


def test_cases_are_distinct():
    assert len(set(CASES)) == len(CASES)


@every_operator
def test_every_operator_fits_some_shapes(operator):
    assert any(not operator.unfit((shape[-2], shape[-1])) for shape in SHAPES)


@every_dtype
@every_shape
@every_operator
def test_file_holds_exactly_the_priced_tensors(operator, shape, dtype, tmp_path):
    skip_unfit(operator, shape)
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
    skip_unfit(operator, shape)
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
    zeros = torch.zeros(4, 512)
    assert torch.equal(operator.apply(zeros, statistics(zeros)), zeros)


@any_operator
def test_json_round_trip(operator):
    data = json.loads(json.dumps(operator_to_json(operator)))
    again = operator_from_json(data)
    assert again == operator
    assert hash(again) == hash(operator)


@any_operator
def test_json_refuses_unknown_and_mistyped_parameters(operator):
    data = operator_to_json(operator)
    with pytest.raises(ValueError, match="no parameter 'colour'"):
        operator_from_json({**data, "colour": 1})
    for field in fields(operator):
        with pytest.raises(ValueError, match=field.name):
            operator_from_json({**data, field.name: [1]})


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: case_id(ladder.steps[0]))
def test_a_step_up_costs_more_and_never_errs_more(ladder):
    shape = (48, 512)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    stats = statistics(matrix)
    sizes = [operator.bytes(shape) for operator in ladder.steps]
    losses = [ladder.objective(matrix - o.apply(matrix, stats), stats) for o in ladder.steps]
    assert sizes == sorted(set(sizes))
    assert all(dear <= cheap for cheap, dear in pairwise(losses)), losses
    assert len(losses) == 1 or losses[-1] < losses[0]


# Operators that take a whole unit


def unit_of(members, *, transposed=False):
    return Unit("block", tuple(replace(m, transposed=transposed) for m in members), 0, "block")


def unit_weights(unit, dtype=torch.float32):
    """The parameters of a unit as a model holds them, and statistics by member name."""
    generator = torch.Generator().manual_seed(29)
    parameters, stats = [], {}
    for member in unit.members:
        matrix = torch.randn(member.shape, generator=generator)
        matrix[0, 0] = 9.0
        parameters.append((matrix.T if member.transposed else matrix).contiguous().to(dtype))
        stats[member.name] = statistics(matrix)
    return parameters, stats


@every_dtype
@every_unit_case
def test_file_holds_exactly_the_priced_tensors_of_a_unit(operator, members, dtype, tmp_path):
    unit = unit_of(members)
    assert not operator.unfit_unit(members)
    parameters, stats = unit_weights(unit, dtype)
    path = tmp_path / "packed.safetensors"
    save_file(pack_unit(parameters, unit, operator, stats), path)
    layout = operator.layout_unit(members)
    assert path.stat().st_size == safetensors_bytes(layout)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert {n: (e["dtype"], tuple(e["shape"])) for n, e in header.items()} == {
        tensor.name: (tensor.dtype, tensor.shape) for tensor in layout
    }
    assert all(n.startswith(tuple(member.name for member in members)) for n in header)
    assert unit.bytes(operator) == payload_bytes(layout)


@every_dtype
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@every_unit_case
def test_compressing_a_unit_keeps_its_shapes_and_types(operator, members, transposed, dtype):
    unit = unit_of(members, transposed=transposed)
    parameters, stats = unit_weights(unit, dtype)
    before = [parameter.clone() for parameter in parameters]
    made = compress_unit(parameters, unit, operator, stats)
    again = compress_unit(parameters, unit, operator, stats)
    unpacked = unpack_unit(pack_unit(parameters, unit, operator, stats), unit, operator)
    assert len(made) == len(unpacked) == len(parameters)
    for index, parameter in enumerate(parameters):
        assert made[index].shape == parameter.shape
        assert made[index].dtype == dtype
        assert torch.isfinite(made[index]).all()
        assert torch.equal(parameter, before[index]), "compressing must not write to its input"
        assert torch.equal(made[index], again[index]), "compressing must be deterministic"
        assert unpacked[index].dtype == torch.float32
        assert torch.equal(unpacked[index].to(dtype), made[index])


@every_unit_case
def test_a_unit_of_zeros_stays_one(operator, members):
    unit = unit_of(members)
    parameters, stats = unit_weights(unit)
    zeros = [torch.zeros_like(parameter) for parameter in parameters]
    for made in compress_unit(zeros, unit, operator, stats):
        assert torch.equal(made, torch.zeros_like(made))


@pytest.mark.parametrize("ladder", UNIT_LADDERS, ids=lambda ladder: case_id(ladder.steps[0]))
def test_a_step_up_of_a_unit_costs_more_and_never_errs_more(ladder):
    unit = unit_of(ladder.members)
    parameters, stats = unit_weights(unit)
    sizes = [unit.bytes(operator) for operator in ladder.steps]
    losses = []
    for operator in ladder.steps:
        made = compress_unit(parameters, unit, operator, stats)
        errors = [old - new for old, new in zip(parameters, made, strict=True)]
        losses.append(ladder.objective(errors, [stats[member.name] for member in unit.members]))
    assert sizes == sorted(set(sizes))
    assert all(dear <= cheap for cheap, dear in pairwise(losses)), losses
    assert len(losses) == 1 or losses[-1] < losses[0]
