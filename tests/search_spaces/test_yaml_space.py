"""Space files: what they may say, and one clear sentence for everything else."""

import json

import jsonschema
import pytest

from search_spaces.operators import Keep, RoundToNearest
from search_spaces.presets import PRESETS
from search_spaces.yaml_space import load_space_file, space_json_schema

FULL = """
name: attention-first
menu: bits
keep: false
menus:
  - units: "*.down_proj"
    menu:
      - {name: round_to_nearest, bits: 4, group_size: 32}
      - name: keep
pins:
  "*.layers.0.*": int8-g64
  "*.layers.1.*": {name: keep, dtype: float16}
exclude: ["*.layers.2.*"]
open: [embeddings]
ties: vllm
"""


@pytest.fixture
def write(tmp_path):
    def writer(text):
        path = tmp_path / "space.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return writer


def test_everything_a_file_may_say(write):
    space = load_space_file(write(FULL))
    assert space.name == "attention-first"
    assert space.menu == PRESETS["bits"].operators
    assert space.keep is False
    assert space.menus[0].units == "*.down_proj"
    assert space.menus[0].menu == (RoundToNearest(4, 32), Keep())
    assert space.pins == {"*.layers.0.*": "int8-g64", "*.layers.1.*": Keep("float16")}
    assert (space.exclude, space.open, space.ties) == (["*.layers.2.*"], ["embeddings"], "vllm")


def test_the_least_a_file_may_say(write):
    space = load_space_file(write("{name: a, menu: [{name: keep}]}"))
    assert (space.menu, space.keep, space.ties) == ((Keep(),), True, "none")
    assert (space.menus, space.pins, space.exclude, space.open) == ([], {}, [], [])


HEAD = "name: a\nmenu: bits\n"
FAULTS = {
    "empty": ("", 1, "expected a mapping"),
    "list": ("- a", 1, "expected a mapping"),
    "no menu": ("name: a", 1, "menu: Field required"),
    "unknown field": (HEAD + "colour: 1", 3, "colour: Extra inputs are not permitted"),
    "unknown nested field": (
        HEAD + "menus:\n - units: a\n   menu: bits\n   x: 1",
        6,
        "menus.0.x: Extra",
    ),
    "repeated key": (HEAD + "pins:\n  a: keep\n  a: keep", 5, "'a' is given twice"),
    "alias": ("name: &x a\nmenu: *x", 2, "aliases are not allowed"),
    "bare glob": (HEAD + "exclude: [*.down_proj]", 3, "quote patterns that begin with *"),
    "merge": ("<<: {name: a}\nmenu: bits", 1, "expected a word or quoted text as key"),
    "boolean key": (HEAD + "pins: {yes: keep}", 3, "expected a word or quoted text as key"),
    "list as key": (HEAD + "? [a]\n: b", 3, "expected a word or quoted text as key"),
    "python object": ("name: !!python/object/apply:os.getcwd []\nmenu: bits", 1, "constructor"),
    "two documents": (HEAD + "---\nname: b", 3, "but found another document"),
    "unclosed": (HEAD + "exclude: [", 3, "expected the node content"),
    "unknown preset": ("name: a\nmenu: bitts", 2, "unknown space 'bitts' .did you mean 'bits'"),
    "empty menu": ("name: a\nmenu: []", 2, "preset or a list of operators"),
    "unknown operator": ("name: a\nmenu:\n - name: kep", 2, "unknown operator 'kep'"),
    "nameless operator": ("name: a\nmenu:\n - {bits: 3}", 2, "expected a mapping with a 'name'"),
    "label in menu": ("name: a\nmenu: [int3-g64]", 2, "expected an operator"),
    "bad parameter": ("name: a\nmenu: [{name: round_to_nearest, bits: 9}]", 2, "2 to 8, got 9"),
    "mistyped": ("name: a\nmenu: [{name: round_to_nearest, bits: '3'}]", 2, "bits must be int"),
    "bad pin": (HEAD + "pins:\n  '*': 3", 4, "expected an operator"),
    "number as name": ("name: 3\nmenu: bits", 1, "name: Input should be a valid string"),
    "word as truth": (HEAD + "keep: 'no'", 3, "keep: Input should be a valid boolean"),
    "unknown end": (HEAD + "open:\n - embeddings\n - tail", 5, "'embeddings' or 'head'"),
    "unknown runtime": (HEAD + "ties: vlm", 3, "unknown runtime 'vlm'"),
}


@pytest.mark.parametrize(("text", "line", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_one_sentence_with_file_and_line(text, line, message, write):
    path = write(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_space_file(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b"name: \x00", b"[" * 100_000, b"name: " + b"1" * 5000, b"a: 2026-99-99"],
    ids=["not utf-8", "control character", "deep", "endless number", "no such day"],
)
def test_hostile_content_is_refused(content, write):
    path = write(content)
    with pytest.raises(ValueError, match="not plain YAML") as caught:
        load_space_file(path)
    assert str(path) in str(caught.value)


def test_large_files_are_refused_unread(write):
    with pytest.raises(ValueError, match="larger than 1048576 bytes"):
        load_space_file(write(b"#" * (2**20 + 1)))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the space file .*No such file"):
        load_space_file(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"cannot read the space file .*directory"):
        load_space_file(tmp_path)


def test_errors_quote_the_line_with_its_comment(write):
    path = write("name: x\nmenu: bits\nkeep: 3  # no dense ones\n")
    with pytest.raises(ValueError, match=r"line 3: keep: .* \(in 'keep: 3  # no dense ones'\)"):
        load_space_file(path)


def test_json_schema_agrees_with_the_reader(write):
    schema = space_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    good = {"name": "x", "menu": [{"name": "round_to_nearest", "bits": 4}], "pins": {"a": "keep"}}
    jsonschema.validate(good, schema)
    jsonschema.validate({"name": "x", "menu": "bits"}, schema)
    for bad in (
        {"name": "x", "menu": "bts"},
        {"name": "x", "menu": []},
        {"name": "x", "menu": [{"name": "round_to_nearest"}]},
        {"name": "x", "menu": [{"name": "round_to_nearest", "bits": 4, "colour": 1}]},
        {"name": "x", "menu": "bits", "colour": 1},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)
        with pytest.raises(ValueError, match="line"):
            load_space_file(write(json.dumps(bad)))
