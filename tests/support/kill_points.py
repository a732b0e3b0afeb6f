"""Kills a training run or a sweep at one file-system call after the other, or takes it the room to write, and
lets it go on.

`python kill_points.py FAULT[,FAULT] FOLDER FIRST STRIDE WHAT...` prints a line of JSON for each: how many
calls there are, how many were tried, how many of the faults were told of, and what was not as after an
undisturbed run. Each trial is a fork of this process, which has imported everything: a fault and its
resumption take half a second.

A call is one that makes, opens for writing, renames, removes, cuts or syncs a file below the folder, or a
write of tensors by safetensors, where a kill also leaves half of the file. From that call on `kill`: there is
no process; `full`: the disk has no room; `inodes`: it takes no more files; `read-only`: nothing can be
written; `quota`: files may have a thousand bytes (ulimit -f). Disks need the right to mount: `unshare -rm`.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hidden_libraries import START_CUDA, hidden

with hidden(START_CUDA):
    import safetensors.torch
    import torch
    from scripted_runs import SHAPE, scripted_job, scripted_plan
    from train_runs import run, tiny_job

    import harness.runs.attempt
    from engines.errors import UserError
    from engines.files.writing import is_leftover
    from harness.records.manifest import check_manifest
    from harness.records.run import Sample, load_run
    from harness.records.stats import step_statistics
    from harness.runs import limits
    from harness.runs.launch import Outcome
    from harness.runs.sweep import SweepOptions, run_sweep
    from profiles.system.cgroup import UsableCores

EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MODEL = {"name": "tiny-gpt2", "random_weights": True}


class Disk:
    """A file system in memory that can be filled, at `place`."""

    def __init__(self, place: Path) -> None:
        self._place, self._filler = place, place / "filler"
        _mount("-t", "tmpfs", "-o", "size=64m,nr_inodes=2000", "tmpfs", str(place))

    def full(self) -> None:
        there = os.statvfs(self._place)
        with self._filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, there.f_bavail * there.f_frsize)

    def inodes(self) -> None:
        self._filler.mkdir()
        with suppress(OSError):
            for number in range(10_000):
                (self._filler / str(number)).touch()

    def read_only(self) -> None:
        """Refused by the kernel while a file is open for writing: then the next call is tried."""
        with suppress(subprocess.CalledProcessError):
            _mount("-o", "remount,ro", str(self._place))

    def mend(self) -> None:
        _mount("-o", "remount,rw", str(self._place))
        if self._filler.is_dir():
            shutil.rmtree(self._filler)
        self._filler.unlink(missing_ok=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def quota() -> None:
    """A shell sets both limits; Python takes no notice of the signal, and writing fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


class Calls:
    """Counts calls below `folder`; from number `at` on there is a fault."""

    def __init__(self, folder: Path, at: int, fault: Callable[[], None] = kill) -> None:
        self.count = 0
        self._folder, self._at, self._fault = str(folder), at, fault
        sys.addaudithook(self._on_event)
        for name in ("fsync", "ftruncate"):
            setattr(os, name, self._before(getattr(os, name)))
        self._serialize = safetensors.torch.serialize_file
        safetensors.torch.serialize_file = self._write_tensors

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        if event == "open" or event in EVENTS:
            path = arguments[0]
            if isinstance(path, str | os.PathLike) and str(path).startswith(self._folder):
                self._next()

    def _before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self._next()
            return call(*arguments)

        return counted

    def _write_tensors(self, tensors: Any, filename: Any, metadata: Any = None) -> None:
        self._next()
        self._serialize(tensors, filename, metadata=metadata)
        if self._fault is not kill:
            return
        self.count += 1
        if self.count == self._at:
            descriptor = os.open(filename, os.O_WRONLY)
            os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
            kill()

    def _next(self) -> None:
        self.count += 1
        if self.count == self._at:
            self._fault()


def train(engine: str, out: Path, resume: bool) -> None:
    run(out, engine, tiny_job(model=MODEL, batch_size=1, seq_len=8, steps=3), save_every=2, resume=resume)


def sweep(_: str, out: Path, resume: bool) -> None:
    samples = tuple(Sample(step=i, warmup=i == 0, step_s=0.25, loss=2.0 - i / 8) for i in range(4))
    outcome = Outcome(
        end_state="ok", end_reason=None, samples=samples, summary=step_statistics(samples, 8), by_user=False
    )
    harness.runs.attempt.launch_child = lambda *_, **__: outcome  # type: ignore[assignment]
    plans = [scripted_plan(loss=loss) for loss in (2, 3)]
    run_sweep(scripted_job(), SHAPE, plans, out, SweepOptions(rounds=2, resume=resume))


def told(what: str, out: Path) -> dict[str, Any]:
    """What has to be the same, however often a run or sweep was killed."""
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    # Where the update log is the checkpoint, one that a kill prevented is not made up for.
    found: dict[str, Any] = {"names": [name for name in names if not name.startswith("checkpoints")]}
    found["leftovers"] = [name for name in names if is_leftover(Path(name).name)]
    if what == "sweep":
        runs = [load_run(path) for path in sorted((out / "runs").glob("*.json"))]
        found["runs"] = [str(replace(one, time="")) for one in runs]
        found["findings"] = [str(one) for one in check_manifest(out)]
    else:
        found["weights"] = hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()
        found["log"] = (out / "log.jsonl").read_text()
    return found


def forked(work: Callable[[], None]) -> int:
    """Exit status of `work` in a process of its own: `REFUSED` for a `UserError`, 1 for another."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except UserError as error:
            code = REFUSED
            with suppress(OSError):  # a file takes no more under `quota`
                sys.stderr.write(f"{error}\n")
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def try_calls(folder: Path, what: str, first: int, stride: int, name: str) -> None:
    folder.mkdir(parents=True)
    disk = None if name in FAULTS else Disk(folder)
    fault = FAULTS[name] if disk is None else getattr(disk, name.replace("-", "_"))
    act = sweep if what == "sweep" else train
    whole, counted = folder / "whole", folder / "count"

    def undisturbed() -> None:
        calls = Calls(whole, -1, fault)
        act(what, whole, False)
        counted.write_text(json.dumps({"calls": calls.count, "modules": list(sys.modules)}))

    assert forked(undisturbed) == 0
    total, modules = json.loads(counted.read_text()).values()
    load(modules)
    expected = told(what, whole)
    wrong, tried, refused = [], 0, 0
    for at in range(1 + first % stride, total + 1, stride):
        out = folder / "disturbed"
        shutil.rmtree(out, ignore_errors=True)

        def disturbed(out: Path = out, at: int = at) -> None:
            Calls(out, at, fault)
            act(what, out, False)

        ended = forked(disturbed)
        if disk is not None:
            disk.mend()
        resumed = forked(lambda out=out: act(what, out, True))  # type: ignore[misc]
        if resumed == REFUSED:  # nothing had begun: --resume says so
            resumed = forked(lambda out=out: act(what, out, False))  # type: ignore[misc]
        tried += 1
        refused += ended == REFUSED
        found = told(what, out) if resumed == 0 else {}
        differs = [key for key, value in expected.items() if found.get(key) != value]
        endings = (-signal.SIGKILL,) if fault is kill else (0, REFUSED)
        if ended not in endings or resumed != 0 or differs:
            wrong.append({"call": at, "ended": ended, "resumed": resumed, "differs": differs})
    counts = {"fault": name, "what": what, "calls": total, "tried": tried, "refused": refused}
    sys.stdout.write(json.dumps({**counts, "wrong": wrong}) + "\n")
    sys.stdout.flush()


def load(modules: Iterable[str]) -> None:
    """So that forks find them: importing them again takes longer than a run."""
    for name in modules:
        if name not in sys.modules:
            importlib.import_module(name)
    gc.freeze()  # else each fork looks for garbage among all of it, and gets its pages for itself


FAULTS: dict[str, Callable[[], None]] = {"kill": kill, "quota": quota}
"""Those that need no disk of their own."""
REFUSED = 3

if __name__ == "__main__":
    torch.set_num_threads(1)
    limits.usable_cores = lambda: UsableCores(count=1, basis="test", total=1)
    for name in sys.argv[1].split(","):
        for each in sys.argv[5:]:
            try_calls(Path(sys.argv[2]) / name / each, each, int(sys.argv[3]), int(sys.argv[4]), name)
