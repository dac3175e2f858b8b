"""Files that appear whole or not at all, whoever else writes them."""

import multiprocessing

import pytest

from search_spaces.whole_file import replacing, write_whole

ROUNDS = 60


def test_the_old_file_stays_where_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_that_nobody_wrote_replaces_nothing(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"


def _write(path, letter):
    for _ in range(ROUNDS):
        write_whole(path, letter * 100_000)


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "shared.txt"
    write_whole(path, "a" * 100_000)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, letter)) for letter in "abc"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        text = path.read_text()
        assert len(text) == 100_000
        assert len(set(text)) == 1
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["shared.txt"]
