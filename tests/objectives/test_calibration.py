import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from objectives.calibration import (
    SPLITS,
    Calibration,
    CalibrationRequest,
    build_calibration,
    hash_tokens,
)

ASSETS = Path(__file__).parents[1] / "assets"
REQUEST = CalibrationRequest(
    str(ASSETS / "persuasion.txt"),
    sequence_length=64,
    num_statistics=24,
    num_search=20,
    num_guard=12,
    num_heldout=16,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny_llama", local_files_only=True)


@pytest.fixture(scope="module")
def calibration(tokenizer):
    return build_calibration(REQUEST, tokenizer)


def grams(tokens, length=32):
    flat = tokens.flatten().tolist()
    return {tuple(flat[i : i + length]) for i in range(len(flat) - length + 1)}


def tensors(**changed):
    splits = {name: torch.arange(8).reshape(2, 4) + 8 * i for i, name in enumerate(SPLITS)}
    return {**splits, **changed}


def write_documents(path, documents):
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents), "utf-8")
    return str(path)


def test_shapes(calibration):
    shapes = {name: tuple(tokens.shape) for name, tokens in calibration.splits.items()}
    expected = {"statistics": (24, 64), "search": (20, 64), "guard": (12, 64), "heldout": (16, 64)}
    assert shapes == expected
    assert all(tokens.dtype == torch.int64 for tokens in calibration.splits.values())


def test_splits_share_no_text(calibration):
    found = [grams(calibration.splits[name]) for name in SPLITS]
    for i, one in enumerate(found):
        assert len(one) > 500
        assert all(one.isdisjoint(other) for other in found[i + 1 :])


def test_repeated_documents_land_in_one_split(tmp_path, tokenizer):
    text = (ASSETS / "persuasion.txt").read_text("utf-8")
    documents = [text[i : i + 1500] for i in range(0, 150_000, 1500)]
    repeated = [f" {document.replace(' ', '  ', 3)}\n" for document in documents]
    once = write_documents(tmp_path / "once.jsonl", documents)
    thrice = write_documents(tmp_path / "thrice.jsonl", documents + repeated + documents)
    request = replace(REQUEST, source=thrice)
    calibration = build_calibration(request, tokenizer)
    assert calibration.hashes.keys() == set(SPLITS)
    found = [grams(calibration.splits[name]) for name in SPLITS]
    assert all(a.isdisjoint(b) for i, a in enumerate(found) for b in found[i + 1 :])
    sizes = [len(one) for one in found]
    single = build_calibration(replace(REQUEST, source=once), tokenizer)
    assert sizes == [len(grams(single.splits[name])) for name in SPLITS]


def test_the_same_request_gives_the_same_tokens(calibration, tokenizer):
    assert build_calibration(REQUEST, tokenizer).hashes == calibration.hashes
    other = build_calibration(replace(REQUEST, seed=1), tokenizer)
    assert all(other.hashes[name] != calibration.hashes[name] for name in SPLITS)


def test_more_search_text_changes_neither_heldout_nor_guard(calibration, tokenizer):
    more = build_calibration(replace(REQUEST, num_search=60, num_statistics=40), tokenizer)
    assert more.hashes["heldout"] == calibration.hashes["heldout"]
    assert more.hashes["guard"] == calibration.hashes["guard"]
    assert more.splits["search"][:20].equal(calibration.splits["search"])


def test_documents_are_whole_and_joined_by_the_end_token(tmp_path, tokenizer):
    words = ["alpha", "beta", "gamma", "delta", "omega", "kappa", "sigma", "theta"]
    source = write_documents(tmp_path / "x.jsonl", words)
    request = CalibrationRequest(source, 2, 1, 1, 1, 1)
    calibration = build_calibration(request, tokenizer)
    starts = {name: tokens[0].tolist() for name, tokens in calibration.splits.items()}
    encoded = {tuple(tokenizer(word)["input_ids"] + [tokenizer.eos_token_id])[:2] for word in words}
    assert all(tuple(start) in encoded for start in starts.values())
    assert len({tuple(start) for start in starts.values()}) == 4


def test_an_opening_token_opens_every_sequence(tmp_path, tokenizer):
    from tokenizers.processors import TemplateProcessing

    opening = AutoTokenizer.from_pretrained(ASSETS / "tiny_llama", local_files_only=True)
    opening.add_tokens(["<start>"], special_tokens=True)
    start = opening.convert_tokens_to_ids("<start>")
    opening.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", start)]
    )
    opened = build_calibration(REQUEST, opening)
    for name, tokens in opened.splits.items():
        assert tokens.shape == (REQUEST.num_sequences[name], 64)
        assert (tokens[:, 0] == start).all()
        assert not (tokens[:, 1:] == start).any()
    plain = build_calibration(REQUEST, tokenizer)
    flat = opened.splits["heldout"][:, 1:].flatten()
    assert flat.equal(plain.splits["heldout"].flatten()[: len(flat)])


def test_too_short_says_the_numbers(tmp_path, tokenizer):
    text = "It was a fine morning, and they walked to the sea.\n\n" * 3
    path = tmp_path / "short.txt"
    path.write_text(text, encoding="utf-8")
    found = len(tokenizer(text.strip())["input_ids"]) + 1
    request = CalibrationRequest(str(path), 32, 4, 3, 2, 1)
    expected = (
        f"{path} is too short: its 1 different documents hold {found} tokens, 320 are needed, and "
        "a document serves one split only (heldout 32 of 32, guard 0 of 64, search 0 of 96, "
        "statistics 0 of 128); ask for fewer guard or search or statistics sequences or shorter "
        "ones, or give more text"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        build_calibration(request, tokenizer)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sequence_length": 1}, "sequence_length must be at least 2, got 1"),
        ({"num_guard": 0}, "num_guard must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_bad_requests(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(REQUEST, **changed)


def test_hash_covers_content_and_shape():
    tokens = torch.arange(12).reshape(3, 4)
    assert hash_tokens(tokens) == hash_tokens(tokens.clone())
    assert hash_tokens(tokens) != hash_tokens(tokens.reshape(4, 3))
    assert hash_tokens(tokens) != hash_tokens(tokens.flip(0))
    assert hash_tokens(tokens.t()) == hash_tokens(tokens.t().contiguous())


def test_from_tensors_keeps_a_copy():
    given = tensors()
    calibration = Calibration.from_tensors(given, source="mine")
    before = calibration.hashes["search"]
    given["search"].zero_()
    assert hash_tokens(calibration.splits["search"]) == before
    assert calibration.source == "mine"


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"search": torch.ones(1, 2)}, "expected the splits statistics, search, guard, heldout"),
        (tensors(extra=torch.ones(1, 2)), "got statistics, search, guard, heldout, extra"),
        (tensors(guard=torch.ones(2, 4)), r"'guard': expected int64 .*, got float32 \(2, 4\)"),
        (tensors(guard=torch.arange(4)), r"got int64 \(4,\)"),
        (tensors(guard=torch.ones(0, 4, dtype=torch.int64)), r"got int64 \(0, 4\)"),
        (tensors(guard=torch.arange(8, 16).reshape(2, 4)), "'search' and 'guard' share a sequence"),
    ],
)
def test_bad_tensors(splits, message):
    with pytest.raises(ValueError, match=message):
        Calibration.from_tensors(splits)


def test_save_and_load(tmp_path, calibration):
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    loaded = Calibration.load(path)
    assert loaded.source == calibration.source
    assert loaded.hashes == calibration.hashes
    assert all(loaded.splits[name].equal(calibration.splits[name]) for name in SPLITS)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_changed_tokens_are_refused(tmp_path, calibration):
    path = tmp_path / "calibration.safetensors"
    calibration.save(path)
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="do not match their recorded hashes"):
        Calibration.load(path)


def test_other_files_are_refused(tmp_path, calibration):
    path = tmp_path / "calibration.safetensors"
    with pytest.raises(ValueError, match="cannot read the calibration tokens"):
        Calibration.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot read the calibration tokens"):
        Calibration.load(path)
    calibration.save(path)
    save_file(load_file(path), path)
    with pytest.raises(ValueError, match="names no source and hashes"):
        Calibration.load(path)
