"""What a run tells while it goes on: lines of JSON that `harness.runs.worker` writes, one process for each
rank, as the parent reads them. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from engines.base import StepStats
from harness.records.run import Sample
from harness.runs.emulate import AppliedLimits
from harness.runs.measure import RunRecording
from harness.runs.worker import Request, Result
from profiles.documents import adapter


@dataclass(frozen=True, kw_only=True, slots=True)
class SettingUp:
    """Slow work of a run's set-up."""

    run_id: str
    what: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped:
    """A step of a run is done."""

    run_id: str
    sample: Sample
    total: int
    """Steps of the run, warm-up included."""


OnRunEvent = Callable[[SettingUp | Stepped], None]


class RankProgress:
    """What one rank of a run has told so far."""

    def __init__(self, request: Request) -> None:
        self.recording = RunRecording(tokens_per_step=request.tokens_per_step)
        """Its steps."""
        self.traced = False
        """The engine keeps a trace, which costs time."""
        self.limits: AppliedLimits | None = None
        """What of an emulated machine it is held to."""
        self.contacted: list[str] = []
        """Hosts that it looked for or connected to."""
        self.result: Result | None = None
        """Of one that could not write it."""
        self._run_id = request.id
        self._total_steps = request.job.warmup_steps + request.job.steps

    def take(self, line: str) -> SettingUp | Stepped | None:
        """Take a line down, and give what of it is for those who watch the run."""
        match json.loads(line):
            case {"sample": values, "stats": stats}:
                sample = Sample(**values)
                self.recording.steps.append((sample, None if stats is None else StepStats(**stats)))
                return Stepped(run_id=self._run_id, sample=sample, total=self._total_steps)
            case {"traced": _}:
                self.traced = True
            case {"result": result}:
                self.result = adapter(Result).validate_python(result)
            case {"contacted": host}:
                self.contacted.append(host)
            case {"limits": limits}:
                self.limits = adapter(AppliedLimits).validate_python(limits)
            case progress:
                return SettingUp(run_id=self._run_id, **progress)
        return None
