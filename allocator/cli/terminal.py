"""What the terminal shows: progress with remaining time, tables, JSON for machines."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)

from allocator.reporter import Advance, Reporter, Silent

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

_SECONDS_BETWEEN_LINES = 60
_SHORT = re.compile(r"^(\d+(?:\.\d+)?)(s|ms|us)$")
_SHORT_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_DURATION = re.compile(r"^(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?$")


class RichReporter:
    """Draws one progress bar per stage on the error stream, so that output can be piped."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Task | None = None

    def stage(self, label: str, total: int | None) -> Advance:
        """Begin a stage; the one before is finished, unless it goes on later."""
        self.finish()
        number = self._progress.add_task(label, total=total, detail="")
        task = next(task for task in self._progress.tasks if task.id == number)
        self._task = task

        def advance(done: int, text: str) -> None:
            if self._task is not task:
                self.finish()
                task.total, task.stop_time, self._task = total, None, task
            self._progress.update(number, completed=done, detail=text)

        return advance

    def note(self, text: str) -> None:
        """Print a sentence above the bars."""
        self._progress.console.print(f"note: {text}", markup=False)

    def finish(self) -> None:
        """Fill the bar of the stage that just ended, whose length may have been unknown."""
        if self._task is not None:
            done = max(self._task.completed, 1)
            self._progress.update(self._task.id, total=done, completed=done)
            self._progress.stop_task(self._task.id)


class LineReporter:
    """Prints one line per stage and one a minute: for logs, where a bar cannot be redrawn."""

    def __init__(self) -> None:
        self._finish: Callable[[], None] = lambda: None

    def stage(self, label: str, total: int | None) -> Advance:
        """Begin a stage; the one before is finished."""
        self.finish()
        started = shown = time.monotonic()
        latest = (0, "")

        def line() -> None:
            done, text = latest
            count = f"{done}/{total} " if total else f"{done} " if done else ""
            seconds = time.monotonic() - started
            left = seconds * (total - done) / done if total and done else 0
            rest = f", {left:.0f} s left" if left >= 1 else ""
            words = [f"{label}: {count}in {seconds:.0f} s{rest}", text]
            errors.print("  ".join(filter(None, words)), markup=False, highlight=False)

        def advance(done: int, text: str) -> None:
            nonlocal latest, shown
            latest = (done, text)
            if time.monotonic() - shown >= _SECONDS_BETWEEN_LINES:
                shown = time.monotonic()
                line()

        self._finish = line
        return advance

    def note(self, text: str) -> None:
        """Print a sentence."""
        errors.print(f"note: {text}", markup=False, highlight=False)

    def finish(self) -> None:
        """Say how the stage that just ended went."""
        self._finish()
        self._finish = lambda: None


@contextmanager
def reporting(*, quiet: bool = False) -> Iterator[Reporter]:
    """A reporter for one command; silent for machines."""
    if quiet:
        yield Silent()
        return
    if not errors.is_terminal:
        lines = LineReporter()
        yield lines
        lines.finish()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=errors) as progress:
        reporter = RichReporter(progress)
        yield reporter
        reporter.finish()


def print_json(data: Mapping[str, Any] | list[Any]) -> None:
    """Print data for machines."""
    console.print_json(json.dumps(data, allow_nan=False))


def parse_duration(text: str) -> float:
    """Seconds of ``90``, ``90s``, ``5m`` or ``1h30m``.

    Raises:
        ValueError: Not a duration, or zero.
    """
    match = _DURATION.match(text.strip())
    hours, minutes, seconds = match.groups() if match else (None, None, None)
    total = 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds or 0)
    if match is None or total <= 0:
        raise ValueError(f"{text!r} is not a duration: write 90, 90s, 5m or 1h30m")
    return total


def parse_latency(text: str) -> float:
    """Seconds of ``12ms``, ``850us`` or ``0.02s``.

    Raises:
        ValueError: Not so written, or zero.
    """
    match = _SHORT.match(text.strip())
    seconds = float(match[1]) * _SHORT_UNITS[match[2]] if match else 0.0
    if seconds <= 0:
        raise ValueError(f"{text!r} is not a latency: write 12ms, 850us or 0.02s")
    return seconds


def format_bytes(size: int) -> str:
    """Bytes with a readable unit, exact below a kilobyte."""
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= step:
            return f"{size / step:.2f} {unit}"
    return f"{size} B"
