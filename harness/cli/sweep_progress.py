"""A sweep as a person sees it while it goes on. Imports no torch."""

from __future__ import annotations

import shlex
import sys
from typing import Self

from harness.pipeline import PreparedJob, Sweep, measure_plans
from harness.progress import Progress, console
from harness.records.run import Run
from harness.runs.events import SettingUp, Stepped
from harness.runs.sweep import Ended, Planned, Started, SweepEvent
from profiles.language import translated
from profiles.units import NOT_MEASURED, format_seconds


class CompareProgress:
    """A sweep as it happens: one bar for its runs, one for the steps of the current run, a line per end."""

    def __init__(self, quiet: bool) -> None:
        self._notes = console(stderr=True, quiet=quiet)
        self._progress = Progress(quiet, silent=("runs", "steps"))

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self._progress.__exit__(*args)

    def update(self, event: SweepEvent) -> None:
        match event:
            case Planned():
                self._planned(event)
            case Started():
                self._progress.clear(keep="runs")
                self._progress.update("runs", event.index, event.total, note=event.cell.id)
                if not self._notes.is_terminal and event.cell.plan.fits:
                    self._progress.print(f"{event.cell.id}: started, run {event.index + 1} of {event.total}")
            case SettingUp():
                if self._notes.is_terminal:
                    self._progress.update(event.what, event.done, event.total)
            case Stepped():
                loss = "not finite" if event.sample.loss is None else f"{event.sample.loss:.4g}"
                note = f"{format_seconds(event.sample.step_s)} a step, loss {loss}"
                self._progress.update("steps", event.sample.step + 1, event.total, note=note)
            case Ended():
                self._progress.update("runs", event.index + 1, event.total, note=event.run.id)
                self._progress.print(ended_line(event.run))

    def _planned(self, event: Planned) -> None:
        for note in event.notes:
            self._progress.print(f"note: {translated(note)}")
        for run_id in event.kept:
            how = ", made of what its ended run had left" if run_id in event.taken_up else ""
            self._progress.print(f"kept     {run_id}{how}")
        for run_id, why in event.again.items():
            self._progress.print(f"again    {run_id}: {why}")
        if event.kept:
            for run_id in event.to_run:
                if run_id not in event.again:
                    self._progress.print(f"missing  {run_id}")


def measure_seen(ready: PreparedJob, sweep: Sweep) -> list[Run]:
    """`measure_plans` with its progress on stderr, and a line on how to go on if it is stopped."""
    try:
        with CompareProgress(sweep.quiet) as progress:
            return measure_plans(ready, sweep, progress.update)
    except KeyboardInterrupt:
        out = shlex.quote(str(sweep.out))
        how = f"stopped: finished runs are kept; go on with the same flags, --resume and --out {out}"
        sys.stderr.write(f"{translated(how)}\n")
        raise


def ended_line(run: Run) -> str:
    """How a run came out: a line that stays."""
    if run.end_reason is not None:
        return f"{run.id}: {run.end_state}: {run.end_reason}"
    seen = run.summary
    step = NOT_MEASURED if seen.step_s_median is None else f"{format_seconds(seen.step_s_median)} a step"
    return f"{run.id}: {run.end_state}, {step}"


class TrialProgress(Progress):
    """Trials of a study as they happen: a bar for the steps of the current one."""

    def launched(self, event: SettingUp | Stepped) -> None:
        if isinstance(event, SettingUp):
            if self._console.is_terminal:
                self.update(event.what, event.done, event.total)
        elif self._console.is_terminal:
            loss = "not finite" if event.sample.loss is None else f"{event.sample.loss:.4g}"
            self.update("steps", event.sample.step + 1, event.total, note=f"loss {loss}")


class GenerationProgress(Progress):
    """Measured generations as they happen: a bar for the steps of the current one, a line per end."""

    def launched(self, event: SettingUp | Stepped) -> None:
        if isinstance(event, SettingUp):
            if self._console.is_terminal:
                self.update(event.what, event.done, event.total)
        else:
            note = f"{format_seconds(event.sample.step_s)} a token"
            self.update("generating", event.sample.step + 1, event.total, note=note)

    def ended(self, run: Run) -> None:
        reason = f": {run.end_reason}" if run.end_reason is not None else ""
        self.print(f"{run.id}: {run.end_state}{reason}")
