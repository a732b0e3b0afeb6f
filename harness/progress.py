"""Slow work as a person sees it: bars on stderr, plain lines without a terminal. Imports no torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from profiles.language import translated, word
from profiles.units import format_bytes

A_MOMENT_S = 1.0
"""What nobody asks about."""

PLAIN_WIDTH = 160
"""Columns of a table that does not go to a terminal."""


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that is plain, and wide unless COLUMNS says otherwise, without a terminal."""
    out = Console(stderr=stderr, quiet=quiet, highlight=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = PLAIN_WIDTH
    return out


class Progress:
    """A bar per kind of work, on stderr, gone at the end; plain lines without a terminal."""

    def __init__(self, quiet: bool, silent: Collection[str] = ()) -> None:
        """`silent` kinds of work get a bar but no line."""
        self._silent = silent
        self._console = console(stderr=True, quiet=quiet)
        self._bars = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}
        self._tenths: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def print(self, line: str) -> None:
        """A line that stays, above the bars."""
        self._console.print(translated(line), markup=False, soft_wrap=True)

    def clear(self, keep: str) -> None:
        """Take all bars away but that of `keep`."""
        for what in [what for what in self._tasks if what != keep]:
            self._bars.remove_task(self._tasks.pop(what))

    def update(self, what: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units of `what` are done. `what` that ends in `(bytes)` counts bytes."""
        name = what.removesuffix(" (bytes)")
        count = f"{done}/{total}" if name == what else f"{format_bytes(done)} of {format_bytes(total)}"
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(name, total=total, count=count, note=note)
        self._bars.update(self._tasks[what], completed=done, total=total, count=count, note=note)
        if not self._console.is_terminal and what not in self._silent:
            self._print_tenth(what, name, count, note, 10 * done // max(1, total))

    def _print_tenth(self, what: str, name: str, count: str, note: str, tenth: int) -> None:
        """A line at the first call, and where there is something to say at each tenth of the work."""
        if what not in self._tenths and not note:
            self.print(f"{name} ...")
        elif note and self._tenths.get(what) != tenth:
            self.print(f"{name} {count}: {note}")
        self._tenths[what] = tenth


@contextmanager
def told(what: str, *, quiet: bool) -> Iterator[None]:
    """A bar, or without a terminal a line, for work that counts nothing and takes longer than a moment."""
    with Progress(quiet) as progress:
        tell = copy_context().run  # in the language spoken here
        late = threading.Timer(A_MOMENT_S, tell, (progress.update, what, 0, 1))
        late.start()
        try:
            yield
        finally:
            late.cancel()
            late.join()


class ProbeProgress(Progress):
    """One bar for all measurements, named by the one that is under way."""

    def measurement(self, what: str, done: int, total: int) -> None:
        """`what` is measured next, after `done` of `total`."""
        if done == total:
            return
        if self._console.is_terminal:
            self.update(word("measuring"), done, total, note=word(what))
        else:
            self.print(f"measuring {what} ({done + 1} of {total}) ...")
