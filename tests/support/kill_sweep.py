"""Kills sweeps of ten runs at random moments, and lets `--resume` do the rest.

`python kill_sweep.py FOLDER SEED MOMENTS MINUTES` ends after so many kills, or begins none after the time,
and prints one line of JSON: kills by whom and how, sweeps that were brought to their end, and what was not as
after an undisturbed sweep.

A sweep is a fork of this process, which has imported everything; its runs are processes as always. Killed are
the sweep's own process, that of the run it is at, or both at once, by SIGKILL or SIGTERM. A run whose own
process alone was killed is a failed run, which is a result; its record is deleted for it to be done again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from scripted_runs import SHAPE, scripted_job, scripted_plan

from engines.errors import UserError
from engines.files.locks import locked_folder
from engines.files.writing import is_leftover
from harness.records.run import Run, load_run
from harness.runs.sweep import Ended, SweepEvent, SweepOptions, run_sweep
from harness.signals import INTERRUPTED, interrupt, on_first_signal
from reports.load import load_folder
from reports.render import judge, render_markdown

JOB = scripted_job(steps=3, warmup_steps=1)
PLAN = scripted_plan(loss="4,3,2,1", step_s=0.03, sleep=True)
NUM_RUNS = 10
TARGETS = ("sweep", "run", "both")
MOST_SECONDS = 120
"""For a sweep that was told to end, and for one that is left alone."""


def sweep(out: Path, told: Path) -> None:
    """As `compare --resume` does it; a line in `told` for each run whose end it was told of."""

    def tell(event: SweepEvent) -> None:
        if isinstance(event, Ended):
            with told.open("a") as file:
                file.write(f"{event.run.id} {event.run.end_state}\n")

    with on_first_signal(interrupt), locked_folder(out):
        run_sweep(JOB, SHAPE, [PLAN], out, SweepOptions(rounds=NUM_RUNS, resume=True), on_event=tell)


def started(out: Path, told: Path) -> int:
    """Number of the process of a sweep."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sweep(out, told)
            code = 0
        except KeyboardInterrupt:
            code = INTERRUPTED
        except UserError as error:
            sys.stderr.write(f"{error}\n")
            code = 2
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return pid


def ended(pid: int, within_s: float) -> int | None:
    """Its exit status, or minus its signal; `None`: it goes on."""
    end = time.monotonic() + within_s
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.005)


def family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def worker_of(pid: int) -> psutil.Process | None:
    for process in family(pid):
        try:
            if "harness.runs.worker" in process.cmdline():
                return process
        except psutil.Error:
            continue
    return None


def records(out: Path) -> dict[str, tuple[Run, bytes]]:
    """Of the folder, by id; a half one would raise."""
    return {path.stem: (load_run(path), path.read_bytes()) for path in (out / "runs").glob("*.json")}


def shown(out: Path) -> str:
    """The report's tables, but for what is another in every process: time, memory, set-up."""
    loaded = load_folder(out)
    environment = replace(loaded.runs[0].environment, commit=None, dirty=None, notes=())
    runs = tuple(
        replace(
            run,
            time="",
            environment=environment,
            governance=None,
            summary=replace(run.summary, peak_host_bytes=None, setup_s=None, eval_s=None),
        )
        for run in loaded.runs
    )
    loaded = replace(loaded, runs=runs)
    return render_markdown(loaded, judge(loaded, None)).replace(str(out), "")


class Trial:
    """One sweep that is killed until it has come to its end."""

    def __init__(self, out: Path, draw: random.Random, most_wait_s: float) -> None:
        self.out, self._told, self._draw, self._most_wait_s = out, out.with_suffix(".told"), draw, most_wait_s
        self.kills: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._finished: dict[str, bytes] = {}
        """Records of runs that ended ok, as they were first seen."""

    def go_on(self, kills_left: int) -> None:
        pid = started(self.out, self._told)
        while True:
            leave = self.kills.total() >= kills_left
            code = ended(pid, MOST_SECONDS if leave else self._draw.uniform(0.0, self._most_wait_s))
            if code is None and leave:
                self.wrong.append("the sweep did not end")
                return
            if code is None:
                code = self._kill(pid)
            if code is None:  # a run was killed, and the sweep goes on
                continue
            self._check(code)
            if code == 0 and not self._repeat_killed_runs():
                return
            if self.wrong:
                return
            pid = started(self.out, self._told)

    def _kill(self, pid: int) -> int | None:
        target, number = self._draw.choice(TARGETS), self._draw.choice((signal.SIGKILL, signal.SIGTERM))
        worker, everyone = worker_of(pid), family(pid)
        hit = [each for each in ("sweep", "run") if target in (each, "both")]
        if worker is None and target != "sweep":
            hit, target = ["sweep"], "sweep"
        for each in hit:
            with suppress(ProcessLookupError):
                os.kill(pid if each == "sweep" else worker.pid, number)  # type: ignore[union-attr]
        self.kills[f"{target} {number.name}"] += 1
        if "sweep" not in hit:
            return ended(pid, 0.0)
        code = ended(pid, MOST_SECONDS)
        if code is None:
            self.wrong.append(f"goes on after {number.name}")
            os.kill(pid, signal.SIGKILL)
            return ended(pid, MOST_SECONDS)
        _, alive = psutil.wait_procs(everyone, timeout=20)
        alive = [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        if alive:
            self.wrong.append(f"{len(alive)} processes live on after {target} {number.name}")
        return code

    def _check(self, code: int) -> None:
        if code not in (0, INTERRUPTED, -signal.SIGKILL, -signal.SIGTERM):
            self.wrong.append(f"ended with {code}")
        there = records(self.out)
        told = [line.split() for line in self._told.read_text().splitlines()] if self._told.exists() else []
        for name, state in told:
            if state == "ok" and (name not in there or there[name][0].end_state != "ok"):
                self.wrong.append(f"{name} had ended and is not there")
        for name, content in self._finished.items():
            if name not in there or there[name][1] != content:
                self.wrong.append(f"{name} was changed")
        self._finished.update({name: raw for name, (run, raw) in there.items() if run.end_state == "ok"})

    def _repeat_killed_runs(self) -> bool:
        """Whether the sweep has to go on for runs whose process was killed by itself."""
        found = [name for name, (run, _) in records(self.out).items() if run.end_state != "ok"]
        for name in found:
            run = records(self.out)[name][0]
            known = (run.end_state, run.end_reason) in _OF_A_KILL
            if not known:
                self.wrong.append(f"{name}: {run.end_state}, {run.end_reason}")
            (self.out / "runs" / f"{name}.json").unlink()
        return bool(found)


_OF_A_KILL = {
    ("crash", "killed by signal 9"),
    ("crash", "killed by signal 15 (SIGTERM)"),
    ("interrupted", "stopped by a signal"),
}
"""SIGTERM ends a run that has not come to its handler yet."""


def differences(out: Path, whole: Path) -> Iterator[str]:
    names = [
        sorted(str(path.relative_to(each)) for path in each.rglob("*") if "logs" not in path.parts)
        for each in (out, whole)
    ]
    if names[0] != names[1]:
        yield f"files: {sorted(set(names[0]) ^ set(names[1]))}"
    if any(is_leftover(Path(name).name) for name in names[0]):
        yield "leftovers"
    if shown(out) != shown(whole):
        yield "tables"


def main(folder: Path, seed: int, moments: int, minutes: float) -> None:
    draw, end = random.Random(seed), time.monotonic() + minutes * 60
    began, whole = time.monotonic(), folder / "whole"
    assert ended(started(whole, folder / "whole.told"), MOST_SECONDS) == 0
    assert len(records(whole)) == NUM_RUNS
    whole_s = time.monotonic() - began
    kills: Counter[str] = Counter()
    wrong: list[Any] = []
    sweeps = 0
    while kills.total() < moments and time.monotonic() < end:
        # A third of a sweep at most between two kills: each sweep is killed some ten times on its way.
        trial = Trial(folder / f"killed-{sweeps}", draw, whole_s / 3)
        trial.go_on(min(10, moments - kills.total()))
        kills += trial.kills
        sweeps += 1
        bad = trial.wrong or list(differences(trial.out, whole))
        if bad:
            wrong.append({"sweep": sweeps, "wrong": bad})
    told = {"moments": kills.total(), "sweeps": sweeps, "kills": dict(sorted(kills.items())), "wrong": wrong}
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
