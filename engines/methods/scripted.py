"""The harness's test double: does nothing, takes as long as it is told and fails when it is told.

Not a method. It has no weights and imports no torch, so that launch, warm-up, statistics, failure,
resume and report can be checked exactly and in milliseconds. Its times are told to a clock of its own
(`now`), which the harness reads in place of the real one.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.base import Batch, Blueprint, Context, Evaluation, StepStats
from engines.errors import InfeasiblePlan, NotAvailable, UserError
from engines.settings.scripted import ScriptedSettings

if TYPE_CHECKING:
    from torch import Tensor

PAGE_BYTES = 4096


class OutOfMemoryError(RuntimeError):
    """Named and worded as torch's own."""


class Scripted:
    """Plays its settings back."""

    name = "scripted"

    def __init__(self, settings: ScriptedSettings, context: Context) -> None:
        self._settings = settings
        self._context = context
        self._step = 0
        self._evaluations = 0
        self._now_s = 0.0
        self._undrained_s = 0.0
        self._memory = bytearray()
        self._children: list[int] = []
        self._steps: list[tuple[float, float]] = []
        """Beginning and end of each step by the scripted clock, where a trace is kept."""
        self.pinned_bytes = 0

    @staticmethod
    def why_not_available() -> str | None:
        """`None`: it needs nothing."""
        return None

    def now(self) -> float:
        """The scripted clock, in seconds."""
        return self._now_s

    def setup(self, blueprint: Blueprint | None) -> None:
        """`blueprint` is not read."""
        settings = self._settings
        self._context.progress("scripted set-up", 0, 1)
        self._spend(settings.setup_s)
        self._memory = bytearray(settings.host_allocation_bytes)
        self._memory[::PAGE_BYTES] = b"\1" * len(self._memory[::PAGE_BYTES])
        self._children = [_fork_waiting() for _ in range(settings.num_children)]
        self.pinned_bytes = settings.pinned_bytes
        if settings.fail_at_step == -1:
            self._fail()
        self._context.progress("scripted set-up", 1, 1)

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """The next scripted step; `batches` are not read."""
        settings = self._settings
        began_s = self._now_s
        self._spend(_at(settings.step_s, self._step))
        if self._context.trace:
            self._steps.append((began_s, self._now_s))
        self._undrained_s += settings.drain_s
        if settings.fail_at_step == self._step:
            self._fail()
        stats = StepStats(
            loss=_at(settings.loss, self._step),
            h2d_bytes=settings.h2d_bytes,
            d2h_bytes=settings.d2h_bytes,
            gpu_s=None if settings.gpu_s is None else _at(settings.gpu_s, self._step),
        )
        self._step += 1
        return stats

    def trace_events(self) -> list[dict[str, Any]]:
        """A span for each step, on the one line there is."""
        line = {"name": "thread_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "script"}}
        spans = [
            {"name": f"step {step}", "ph": "X", "pid": 0, "tid": 0,
             "ts": 1e6 * began_s, "dur": 1e6 * (ended_s - began_s)}
            for step, (began_s, ended_s) in enumerate(self._steps)
        ]  # fmt: skip
        return [line, *spans]

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """The next scripted evaluation; `batches` are not read."""
        evaluation = Evaluation(
            loss=_at(self._settings.eval_loss, self._evaluations),
            accuracy=_at(self._settings.eval_accuracy, self._evaluations),
            num_labels=1,
        )
        self._spend(_at(self._settings.eval_s, self._evaluations))
        self._evaluations += 1
        return evaluation

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """There are none."""
        yield from ()

    def save(self, folder: Path) -> None:
        state = {"step": self._step, "evaluations": self._evaluations}
        (folder / "scripted.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        state = json.loads((folder / "scripted.json").read_text(encoding="utf-8"))
        self._step, self._evaluations = state["step"], state["evaluations"]

    def synchronize(self) -> None:
        """Spends what `drain_s` left in flight; steps overlap, so only one step's worth is left."""
        self._spend(min(self._undrained_s, self._settings.drain_s))
        self._undrained_s = 0.0

    def close(self) -> None:
        for child in self._children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        self._children = []
        self._memory = bytearray()

    def _spend(self, duration_s: float) -> None:
        self._now_s += duration_s
        if self._settings.sleep:
            time.sleep(duration_s)

    def _fail(self) -> None:
        if self._settings.fail_on_rank not in (-1, self._context.world.rank):
            return
        match self._settings.failure:
            case "crash":
                raise RuntimeError("scripted crash")
            case "oom_gpu":
                raise OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8.00 GiB "
                    "of which 1.00 GiB is free."
                )
            case "oom_host":
                raise MemoryError("scripted")
            case "pinned_limit":
                raise RuntimeError("cudaHostRegister failed: CUDA error: out of memory")
            case "not_available":
                raise NotAvailable("scripted: the library is not installed")
            case "infeasible":
                raise InfeasiblePlan("scripted: 1 GiB of GPU memory is missing")
            case "user_error":
                raise UserError("scripted", "a setting is wrong", "fix it")
            case "interrupt":
                os.kill(os.getpid(), signal.SIGTERM)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                _wait_for_ever()


def _at(script: tuple[float, ...], index: int) -> float:
    return script[min(index, len(script) - 1)]


def _fork_waiting() -> int:
    """The process id of a child that does nothing until it is killed."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _wait_for_ever()
    return child


def _wait_for_ever() -> None:
    while True:
        signal.pause()
