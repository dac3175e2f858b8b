"""The command line as a user types it, on the tiny trained model: in this process or in its own."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from allocator.journal import read_journal

ASSETS = Path(__file__).parents[1] / "assets"
MODEL = ASSETS / "tiny_llama"
TEXT = ASSETS / "persuasion.txt"
COMMAND = [sys.executable, "-c", "from allocator.cli import main; main()"]
TINY = {
    "--text": TEXT,
    "--sequence-length": 128,
    "--dtype": "float32",
    "--device": "cpu",
    "--threads": 1,
    "--num-statistics": 4,
    "--num-search": 8,
    "--num-guard": 4,
    "--num-heldout": 4,
    "--sequences": 4,
    "--trials": 12,
    "--budget": "2.6bpw",
}


class Result(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


def search_arguments(model=MODEL, **options):
    """``allocator search`` with tiny defaults; ``None`` leaves an option out, a list repeats it."""
    chosen = TINY | {"--" + name.replace("_", "-"): value for name, value in options.items()}
    words = ["search", model]
    for name, value in chosen.items():
        if value is True:
            words.append(name)
        elif value is not None:
            words += [
                w for one in (value if isinstance(value, list) else [value]) for w in (name, one)
            ]
    return words


def allocator(*words):
    """Run ``allocator WORDS`` in this process."""
    from allocator import cli
    from allocator.cli import terminal

    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        patch.object(sys, "argv", ["allocator", *map(str, words)]),
        patch.object(terminal.console, "_file", out),
        patch.object(terminal.errors, "_file", err),
        patch.object(terminal.console, "_width", 200),
        patch.object(terminal.errors, "_width", 1000),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def succeed(*words):
    """Run ``allocator WORDS`` in this process; its output, if it succeeds."""
    result = allocator(*words)
    assert result.code == 0, result.err
    return result.out


def search(runs, name="run", **options):
    """Run a search that succeeds; its folder."""
    succeed(*search_arguments(runs=runs, name=name, **options))
    return Path(runs) / name


def start(*words):
    """Start ``allocator WORDS`` as a process of its own, with a log beside nothing else's."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [*COMMAND, *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_interrupts,
    )


def _heed_interrupts():
    """Tests that run in a shell's background were told to ignore them, and so would be theirs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def load(path):
    """A JSON file."""
    return json.loads(Path(path).read_text())


def records(folder, kind=None):
    """The journal's records, of one type if asked."""
    found = read_journal(folder / "journal.jsonl").records
    return [record for record in found if kind in (None, record["type"])]


def measured_keys(folder):
    """What was measured, in the journal's order."""
    evaluations = [record["evaluation"] for record in records(folder, "evaluation")]
    return [json.dumps([e["assignment"], e["fidelity"]]) for e in evaluations]


def run_alone(words, log, largest_file):
    """Be the process of ``allocator WORDS``, with its output in a file."""
    from allocator import cli

    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["allocator", *map(str, words)]
    cli.main()
