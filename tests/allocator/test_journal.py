"""The journal under kills, bit flips, full disks, second writers and other headers."""

import errno
import json
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from allocator.journal import Journal, read_journal

HEADER = {"format": 1, "seed": 7, "space": {"bits": [2, 4], "ties": "none"}}
RECORDS = [{"key": f"k{i}", "loss": i / 3, "text": "ä\nß\r"} for i in range(6)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


@pytest.fixture
def whole(path):
    """The bytes of a journal with all records."""
    with Journal.create(path, HEADER) as journal:
        journal.append_many(RECORDS)
    return path.read_bytes()


def test_a_journal_reads_back_what_was_appended(path):
    with Journal.create(path, HEADER) as journal:
        journal.append({"assignment": (1, 2), "loss": 0.1})
        journal.append_many(RECORDS)
        kept = list(journal.records)
    assert kept == [{"assignment": [1, 2], "loss": 0.1}, *RECORDS]
    assert read_journal(path) == (HEADER, kept)
    with Journal.open(path, HEADER) as journal:
        assert (journal.header, journal.records) == (HEADER, kept)


def test_lines_are_checksum_space_json(path, whole):
    for line in whole.splitlines():
        assert line[:8] == f"{zlib.crc32(line[9:]):08x}".encode()
        assert line[8:9] == b" "
        json.loads(line[9:])


def test_cut_at_every_byte_keeps_exactly_the_whole_records(path, whole, caplog):
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        num_whole = sum(end <= size for end in ends)
        if num_whole == 0:
            with pytest.raises(ValueError, match="no whole header"):
                Journal.open(path)
            with Journal.create(path, HEADER) as journal:
                assert journal.records == []
            assert read_journal(path) == (HEADER, [])
            continue
        caplog.clear()
        kept = RECORDS[: num_whole - 1]
        assert read_journal(path).records == kept
        assert path.stat().st_size == size, "reading must not touch the file"
        with Journal.open(path, HEADER) as journal:
            assert journal.records == kept
            assert bool(caplog.records) == (size not in ends)
            journal.append({"after": size})
        assert read_journal(path) == (HEADER, [*kept, {"after": size}])


def test_a_flipped_bit_in_any_byte_is_refused_with_its_line(path, whole):
    rng = np.random.default_rng(0)
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        if position == len(whole) - 1:  # without its newline the last line looks torn
            assert read_journal(path) == (HEADER, RECORDS[:-1])
            continue
        number = whole[:position].count(b"\n") + 1
        for reader in (Journal.open, read_journal):
            with pytest.raises(ValueError, match=f"line {number} is damaged"):
                reader(path)
        assert path.read_bytes() == flipped, "refusing must not touch the file"


@pytest.mark.parametrize("body", [b"[1]", b"nonsense", b"\xff"])
def test_a_right_checksum_over_something_else_is_refused(path, whole, body):
    path.write_bytes(whole + b"%08x %s\n" % (zlib.crc32(body), body))
    with pytest.raises(ValueError, match=f"line {len(RECORDS) + 2} is damaged"):
        read_journal(path)


def test_a_second_process_is_refused_until_the_first_is_killed(path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from allocator.journal import Journal;"
            "j = Journal.create(Path(sys.argv[1]), {}); print('held', flush=True); time.sleep(60)",
            str(path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        for attempt in (lambda: Journal.open(path), lambda: Journal.create(path, {})):
            with pytest.raises(ValueError, match=r"run folder .* is in use by another process"):
                attempt()
        assert read_journal(path) == ({}, []), "readers need no lock"
        holder.kill()
        holder.wait()
        Journal.open(path).close()


def test_a_forked_child_does_not_keep_the_lock_of_a_closed_journal(path):
    journal = Journal.create(path, HEADER)
    inherited = os.dup(journal._descriptor)  # what fork hands to a child
    journal.close()
    Journal.open(path).close()
    os.close(inherited)


def test_another_header_is_refused_by_the_fields_that_differ(path, whole):
    other = {"format": 1, "seed": 8, "space": {"bits": [2, 4], "ties": "vllm"}, "extra": None}
    with pytest.raises(ValueError, match="other settings") as caught:
        Journal.open(path, other)
    message = str(caught.value)
    assert "seed was 7, now 8" in message
    assert 'space.ties was "none", now "vllm"' in message
    assert "extra was absent, now null" in message
    assert "format" not in message
    assert "bits" not in message
    Journal.open(path, {**HEADER, "space": {"ties": "none", "bits": (2, 4)}}).close()


def test_create_does_not_overwrite_a_journal(path, whole):
    with pytest.raises(ValueError, match="exists already"):
        Journal.create(path, HEADER)
    assert path.read_bytes() == whole
    Journal.open(path).close()


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_numbers_are_refused(path, whole, loss):
    with Journal.open(path) as journal:
        with pytest.raises(ValueError, match="JSON compliant"):
            journal.append_many([{"loss": 1.0}, {"loss": loss}])
        assert journal.records == RECORDS
    assert path.read_bytes() == whole


def test_missing_file_and_missing_folder_are_named(path):
    with pytest.raises(ValueError, match=r"journal\.jsonl: No such file"):
        Journal.open(path)
    with pytest.raises(ValueError, match=r"journal\.jsonl: No such file"):
        read_journal(path)
    with pytest.raises(ValueError, match=r"none/journal\.jsonl: No such file"):
        Journal.create(path.parent / "none" / path.name, {})


def test_read_only_folder_is_refused():
    """As root nothing is read-only, so root becomes nobody for a moment."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o555)
        me = os.geteuid()
        try:
            if me == 0:
                os.seteuid(65534)
            with pytest.raises(ValueError, match=r"journal\.jsonl: Permission denied"):
                Journal.create(Path(folder) / "journal.jsonl", HEADER)
        finally:
            os.seteuid(me)
        assert os.listdir(folder) == []


def test_short_writes_are_completed(path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    with Journal.create(path, HEADER) as journal:
        journal.append_many(RECORDS)
    assert read_journal(path) == (HEADER, RECORDS)


def full_after(room, failure):
    """An ``os.write`` that takes ``room`` bytes in all, then fails."""
    write = os.write

    def limited(descriptor, data):
        nonlocal room
        if not room:
            raise failure
        written = write(descriptor, data[:room])
        room -= written
        return written

    return limited


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failure_at_every_byte_of_an_append_leaves_the_file_as_it_was(
    path, whole, monkeypatch, failure
):
    line_size = len(whole) - whole[:-1].rindex(b"\n") - 1
    with Journal.open(path) as journal:
        for room in range(line_size):
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", full_after(room, failure))
                with pytest.raises(type(failure)) as caught:
                    journal.append(RECORDS[-1])
            if isinstance(failure, OSError):
                assert caught.value.errno == errno.ENOSPC
                assert caught.value.filename == str(path)
            assert path.read_bytes() == whole
        journal.append({"room": "again"})
        assert journal.records == [*RECORDS, {"room": "again"}]
    assert read_journal(path).records == [*RECORDS, {"room": "again"}]


def test_a_failed_fsync_is_an_error_and_leaves_no_record(path, whole, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    with Journal.open(path) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(OSError, match=r"Input/output error: .*journal\.jsonl"):
                journal.append({"lost": True})
        assert journal.records == RECORDS
    assert path.read_bytes() == whole


def test_where_even_cutting_back_fails_nothing_more_is_appended(path, whole, monkeypatch):
    def fail(descriptor, size):
        raise OSError(errno.EIO, "Input/output error")

    journal = Journal.open(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_after(5, OSError(errno.ENOSPC, "No space left")))
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(OSError, match="No space left"):
            journal.append({"torn": True})
    with pytest.raises(AssertionError, match="closed"):
        journal.append({"behind": "half a line"})
    assert read_journal(path).records == RECORDS


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from allocator.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
journal = Journal.create(Path(sys.argv[1]), {})
while True:
    try:
        journal.append({"number": len(journal.records), "text": "x" * 100})
    except OSError as error:
        sys.exit(f"{len(journal.records)} {error}")
"""


def test_a_file_at_its_size_limit_keeps_every_acknowledged_record(path):
    ended = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    acknowledged, message = ended.stderr.split(" ", 1)
    assert str(path) in message
    assert [r["number"] for r in read_journal(path).records] == list(range(int(acknowledged)))
    assert int(acknowledged) > 10
