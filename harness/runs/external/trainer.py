"""A trainer that is not ours, run as a method: its command, and the steps that its output shows.

It runs inside the run's own process group, below `harness.runs.worker`: the same launcher, clock, time limit
and end states as any method. Its output and errors come through one pipe; what is read from it is copied to
the run's log. Nothing of it is trusted beyond that: its data are its own, GPU memory is seen from outside
alone, and no limit on it can be held. Imports no torch.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import psutil

from engines.base import Batch, Blueprint, Context, Evaluation, StepStats
from engines.errors import NotAvailable, UserError
from engines.settings.external import ExternalSettings

TAIL_LINES = 20
"""Of the output, kept for the reason of a failure."""

TOGETHER = 4
"""Steps that may be shown at once, by a trainer whose steps are short beside what else the machine does."""

_LINE_ENDS = re.compile(rb"[\r\n]+")
"""Progress bars go back to the start of their line."""


class ExternalTrainer:
    """A command whose output shows steps. Implements what of `engines.base.Engine` a sweep asks for."""

    name = "external"
    pinned_bytes = 0

    def __init__(self, settings: ExternalSettings, context: Context) -> None:
        self._settings = settings
        self._context = context
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: Iterator[tuple[list[str], float]] = iter(())
        self._arrived: collections.deque[tuple[StepStats, float]] = collections.deque()
        """Steps that were shown and not asked for yet, each with the time of its end."""
        self._tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self._steps_done = 0
        self._last_step: int | None = None
        self._now_s = self._last_s = time.perf_counter()
        self.notes = ["external: times and losses are as its output tells them"]
        if context.vram_bytes is not None:
            self.notes.append("external: GPU memory was not held to the limit")

    @staticmethod
    def why_not_available() -> str | None:
        """`None`: what it needs is looked for when it is planned."""
        return None

    def now(self) -> float:
        """When the last step that was asked for ended: as its line came, or by what steps told. In
        seconds."""
        return self._now_s

    def setup(self, blueprint: Blueprint | None) -> None:
        """Start the command; `blueprint` is not read. Raises `NotAvailable` where it cannot be started."""
        settings = self._settings
        try:
            self._process = subprocess.Popen(
                settings.words, cwd=settings.folder or None, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, bufsize=0,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **settings.variables},
            )  # fmt: skip
        except OSError as error:
            why = f"'{settings.words[0]}' cannot be started ({error.strerror or error})"
            raise NotAvailable(why) from None
        assert self._process.stdout is not None
        self._lines = _lines_of(self._process.stdout.fileno())

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """Wait for the line that shows the next step. `batches` are not read.

        Raises `RuntimeError` for an output that ends before, and `UserError` for one that leaves steps out or
        comes in bursts, without times to read.
        """
        while not self._arrived:
            self._take(*self._next_lines())
        self._steps_done += 1
        stats, self._now_s = self._arrived.popleft()
        return stats

    def _next_lines(self) -> tuple[list[str], float]:
        found = next(self._lines, None)
        if found is None:
            raise self._ended()
        return found

    def _take(self, lines: Sequence[str], arrived_s: float) -> None:
        """Keep the steps that `lines`, which came together, show."""
        shown = []
        for line in lines:
            print(line, flush=True)  # into the run's log
            self._tail.append(line)
            found = _shown(self._settings, line)
            if found is not None and self._is_next(found.get("step")):
                shown.append(found)
        before_s = self._last_s
        if self._settings.clock == "arrival":
            if len(shown) > TOGETHER:
                raise UserError(
                    "the external trainer", f"showed {len(shown)} steps at once: its output is buffered",
                    'have it flush each line, or read the times it tells (clock = "told")',
                )  # fmt: skip
            # A busy machine may hold up this process for longer than a short step: each has its share.
            times = [before_s + (arrived_s - before_s) * (i + 1) / len(shown) for i in range(len(shown))]
        else:
            times = list(itertools.accumulate((each["step_s"] for each in shown), initial=before_s))[1:]
        for each, at_s in zip(shown, times, strict=True):
            self._arrived.append((StepStats(loss=each["loss"]), at_s))
        if times:
            self._last_s = times[-1]

    def _is_next(self, step: float | None) -> bool:
        """Whether a shown step is a new one. Raises `UserError` where others were left out before it."""
        if step is None:
            return True
        if self._last_step is not None and step > self._last_step + 1:
            raise UserError(
                "the external trainer", f"showed step {step:g} after {self._last_step}",
                "have it log every step (such as logging_steps: 1)",
            )  # fmt: skip
        is_new = self._last_step is None or step > self._last_step
        self._last_step = int(step) if is_new else self._last_step
        return is_new

    def _ended(self) -> Exception:
        """What an output that ended too early comes to; further lines of the message are its last ones."""
        assert self._process is not None
        code = self._process.wait()
        last = next((line for line in reversed(self._tail) if line.strip()), "nothing")[:160]
        wanted = self._context.total_steps
        if code != 0:
            what = (
                f"the command ended with exit code {code}" if code > 0 else f"it was killed by signal {-code}"
            )
        elif self._steps_done == 0:
            what = "no line of its output showed a step as 'read' says"
        else:
            what = f"it ended after {self._steps_done} of {wanted} steps"
        return RuntimeError("\n".join([f"{what}; its last line: {last}", *self._tail]))

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Raises `UserError`: comparisons leave it out, and a study of quality cannot have such a trainer."""
        raise UserError(
            "a study with an external trainer",
            "its model is out of reach, so nothing held out can be evaluated",
            "compare it without --target",
        )

    def synchronize(self) -> None:
        """Nothing of it is in flight that this process knows of."""

    def close(self) -> None:
        """End the command and all that it started. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        family: list[Any] = []
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(process.pid)
            family = [*parent.children(recursive=True), parent]
        for each in family:
            with contextlib.suppress(psutil.Error):
                each.kill()
        if process.stdout is not None:
            process.stdout.close()
        process.wait()


def _lines_of(descriptor: int) -> Iterator[tuple[list[str], float]]:
    """Lines of the output that came together, and when, in seconds of `time.perf_counter`."""
    rest = b""
    while chunk := os.read(descriptor, 65536):
        *lines, rest = _LINE_ENDS.split(rest + chunk)
        yield [line.decode("utf-8", errors="replace") for line in lines], time.perf_counter()
    if rest:
        yield [rest.decode("utf-8", errors="replace")], time.perf_counter()


def _shown(settings: ExternalSettings, line: str) -> dict[str, float] | None:
    """What a line shows of a step: `loss`, and `step` and `step_s` where they are told; `None`: no step."""
    found: Mapping[str, Any]
    if settings.regex:
        match = re.search(settings.regex, line)
        if match is None:
            return None
        found = match.groupdict()
    else:
        try:
            document = json.loads(line)
        except ValueError:
            return None
        keys = {"loss": settings.loss, "step": settings.step, "step_s": settings.step_s}
        found = {name: _at(document, key) for name, key in keys.items() if key}
    wanted = ["loss", *(["step_s"] if settings.clock == "told" else [])]
    shown: dict[str, float] = {}
    for name in ("loss", "step", "step_s"):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            shown[name] = float(found[name])
    return shown if all(name in shown for name in wanted) else None


def _at(document: Any, key: str) -> Any:
    """The value at `key`, dots between the keys of inner tables; `None`: there is none."""
    for part in key.split("."):
        if not isinstance(document, dict):
            return None
        document = document.get(part)
    return document
