"""The plan file: a golden one, round trips, and every way in which a file can be wrong."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from plan_factory import MIXED, in_turn, make_plan, tiny_llama

import allocator.plan as plan_module
from allocator.plan import load_plan, plan_json_schema, save_plan
from search_spaces.operators import RoundToNearest

GOLDEN = Path(__file__).parent / "golden_plan.json"
SCHEMA = Path(plan_module.__file__).with_name("plan.schema.json")


@pytest.fixture
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.fixture
def refuse(tmp_path):
    """Write data as a plan and return the one sentence with which it is refused."""

    def refused(data):
        path = tmp_path / "plan.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        with pytest.raises(ValueError) as error:
            load_plan(path)
        assert type(error.value) is ValueError
        message = str(error.value)
        assert "\n" not in message
        return message

    return refused


def test_the_golden_plan_is_priced_by_hand():
    plan = load_plan(GOLDEN)
    by_name = {unit.name: unit for unit in plan.units}
    # 8 x 32 weights, 4 bits: 128 bytes; 8 rows x 2 groups x 2 bytes of scale: 32 bytes.
    assert by_name["layers.0.q_proj"].bytes == 128 + 32
    # (16 + 8) x 32 weights, 3 bits: 192 + 96 bytes; one group a row: 24 scales, 48 bytes; zero
    # points at 3 bits: ceil(16 x 3 / 8) + ceil(8 x 3 / 8) = 9 bytes.
    assert by_name["layers.0.mlp.{gate,up}_proj"].bytes == 288 + 48 + 9
    # A stack of 2 matrices of 4 x 8 at 16 bits.
    assert by_name["layers.0.experts.down_proj"].bytes == 2 * 2 * 4 * 8
    assert plan.searched_bytes == 160 + 345 + 128
    payload = plan.searched_bytes + 2 * 50 * 32 + 2 * 32
    assert plan.achieved_bytes > payload  # the header of the file
    assert (plan.achieved_bytes - payload) % 8 == 0
    assert by_name["layers.0.q_proj"].choice == RoundToNearest(4, 16)


def test_golden_plan_is_written_byte_for_byte(tmp_path):
    path = tmp_path / "plan.json"
    save_plan(load_plan(GOLDEN), path)
    assert path.read_bytes() == GOLDEN.read_bytes(), (
        "the format changed: if it is meant, save_plan(load_plan(GOLDEN), GOLDEN) and raise "
        "schema_version unless old plans still load"
    )
    assert list(tmp_path.iterdir()) == [path]


def test_round_trip(tmp_path):
    plan = make_plan(tiny_llama(), in_turn(*MIXED), ties="vllm")
    path = tmp_path / "plan.json"
    save_plan(plan, path)
    assert load_plan(path) == plan
    save_plan(plan, path)  # over an old one
    assert load_plan(path) == plan


def test_schema_file_is_current():
    assert json.loads(SCHEMA.read_text()) == plan_json_schema(), (
        f"regenerate {SCHEMA.name}: json.dump(plan_json_schema(), file, indent=1)"
    )


def test_schema_describes_the_golden_plan(golden):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(golden, plan_json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**golden, "extra": 1}, plan_json_schema())


def test_loads_without_torch():
    code = (
        "import sys, pathlib\n"
        "from allocator.plan import load_plan, plan_json_schema\n"
        "load_plan(pathlib.Path(sys.argv[1])); plan_json_schema()\n"
        "heavy = {'torch', 'transformers', 'ray', 'optuna', 'torchao'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(GOLDEN)],
        cwd=Path(plan_module.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_refuses_unknown_fields(golden, refuse):
    assert "budgets" in refuse({**golden, "budgets": 1})
    golden["units"][0]["colour"] = "red"
    assert "units.0.colour" in refuse(golden)


def test_refuses_missing_fields(golden, refuse):
    del golden["units"]
    assert "units: Field required" in refuse(golden)


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_refuses_other_schema_versions(golden, refuse, version):
    assert "schema_version" in refuse({**golden, "schema_version": version})


@pytest.mark.parametrize(
    ("operator", "says"),
    [
        ({"name": "round_to_neares", "bits": 4}, "did you mean 'round_to_nearest'"),
        ({"name": "os.system"}, "unknown operator 'os.system'"),
        ({"bits": 4}, "expected a mapping with a 'name'"),
        ({"name": "round_to_nearest", "bit": 4}, "no parameter 'bit'"),
        ({"name": "round_to_nearest"}, "bits"),
        ({"name": "round_to_nearest", "bits": 9}, "2 to 8"),
        ({"name": "round_to_nearest", "bits": "4"}, "bits must be int"),
        ({"name": "round_to_nearest", "bits": 4, "group_size": -1}, "group_size"),
        ({"name": "round_to_nearest", "bits": 4, "symmetric": 1}, "symmetric must be bool"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_operators_that_are_none_of_ours(golden, refuse, operator, says):
    golden["units"][0]["operator"] = operator
    assert says in refuse(golden)


def test_refuses_wrong_bytes(golden, refuse):
    for field in ("achieved_bytes", "searched_bytes", "slack_bytes"):
        wrong = copy.deepcopy(golden)
        wrong[field] += 1
        assert field in refuse(wrong)
    golden["units"][0]["bytes"] -= 1
    assert "'layers.0.q_proj' says 159 bytes, its operator stores 160" in refuse(golden)


def test_refuses_to_be_over_budget(golden, refuse):
    golden["budget_bytes"] = golden["achieved_bytes"] - 1
    assert "exceed the budget" in refuse(golden)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_refuses_numbers_that_are_not_finite(golden, refuse, number):
    text = json.dumps({**golden, "predicted_nats": "HERE"}).replace('"HERE"', number)
    assert refuse(text)


@pytest.mark.parametrize("shape", [[8], [8, 0], [8, -32], [1, 2, 3, 4], [2.5, 32], "8x32", None])
def test_refuses_shapes_that_are_no_matrix(golden, refuse, shape):
    golden["units"][0]["members"][0]["shape"] = shape
    assert "units.0" in refuse(golden) or "expected a matrix" in refuse(golden)


def test_refuses_an_unknown_stored_type(golden, refuse):
    golden["fixed"][0]["dtype"] = "F17"
    assert "F17" in refuse(golden)


def test_refuses_to_store_a_tensor_twice(golden, refuse):
    golden["fixed"].append(golden["fixed"][0])
    assert "same name" in refuse(golden)


def test_refuses_files_cut_short(refuse):
    text = GOLDEN.read_text()
    for end in range(0, len(text) - 2, 97):
        assert "not valid JSON" in refuse(text[:end])


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", '"plan"', "[" * 100_000, "\ufeff{}", "{} {}"],
    ids=["empty", "null", "list", "string", "deep", "mark", "twice"],
)
def test_refuses_other_files(refuse, text):
    assert "plan" in refuse(text)


def test_refuses_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b'{"name": "\xff\xfe"}')
    with pytest.raises(ValueError, match="not valid JSON"):
        load_plan(path)


def test_refuses_huge_files(tmp_path):
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(65 * 2**20)  # sparse: it takes no room
    with pytest.raises(ValueError, match="not a plan"):
        load_plan(path)


def test_refuses_what_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match="cannot read the plan"):
            load_plan(path)
