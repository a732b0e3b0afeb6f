"""The processes of a run: a worker for each rank, each in a session of its own, and what ends them.

Nothing is left behind, however a run ends. The workers' process groups and every descendant seen are
killed after it; a guard process does the same if this process is killed itself. The guard is a shell
that waits for the end of a pipe that only this process holds open.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import psutil

from engines.errors import UserError
from harness import PROJECT
from harness.runs.ranks import RankPlace
from profiles.system.cgroup import usable_cores
from profiles.system.gpu_allocator import allocator_environment
from profiles.system.nvml import open_device

ENDING_INTERVAL_S = 0.01
"""Between two looks at a worker that has closed its pipe and is about to end."""

FROM_STDIN = "-"
"""In place of a worker's folder: it runs one after the other what is in the folders that it reads there."""

IDLE = '{"idle": true}'
"""The line by which such a worker says that it is done with a folder."""

COMPILE_WORKERS = 8
"""Processes of torch's compiler beside a run, at most: a kind of block has some twenty kernels, and each
process takes some 25 MB of its own. torch would start one for each core, up to 32."""

WAITS_OF_THREADS = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"}
"""By these a user says how threads of OpenMP wait for each other."""

SHORT_SPINS = {"GOMP_SPINCOUNT": "1000"}
"""For runs on a CPU alone: a waiting thread turns so often before it sleeps. GNU's 300,000 turns are
milliseconds in which others want the core, the thread that is waited for too. In a trial, of which no record
is kept, steps of a tiny model took 1 s in place of 30 ms beside seven other processes on two cores; with
nothing beside they were within a tenth of each other."""

GUARD = 'read -r groups && { read -r rest; for group in $groups; do kill -s KILL -- "-$group"; done; }'
"""Reads the process groups, then nothing until the pipe ends; then kills the groups."""


def of_rank(name: str, rank: int) -> str:
    """The name of a file of a rank in the run's folder; rank 0's has no number."""
    stem, dot, end = name.partition(".")
    return f"{stem}-{rank}{dot}{end}" if rank else name


class Worker:
    """One worker process and the pipe that it tells on."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], *, reads: bool = False
    ) -> None:
        """Start it: `command`, with the pipe's descriptor and this process's id behind. With `reads` it is
        told more on its stdin. Raises `OSError`."""
        self._rest = b""
        self._open = True
        read_end, write_end = os.pipe()
        self._pipe = read_end
        try:
            with log.open("wb") as output:
                self.process = subprocess.Popen(
                    [*command, str(write_end), str(os.getpid())],
                    stdin=subprocess.PIPE if reads else subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(write_end,),
                    env=environment,
                    start_new_session=True,
                )
        except OSError:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        os.set_blocking(read_end, False)

    @property
    def pipe(self) -> int | None:
        """To wait for; `None`: the worker has closed it."""
        return self._pipe if self._open else None

    def exit_status(self) -> int | None:
        """How it ended: 0, or something else; `None`: it has not. Does not reap: until `finish` the dead
        worker keeps its number, so that killing its group cannot hit a stranger."""
        ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return None if ended is None else ended.si_status

    def end(self) -> int | None:
        """Its exit code, or minus the signal that killed it; `None`: it goes on. Reaps it."""
        return self.process.poll()

    def read(self) -> list[str]:
        """Whole lines that are in the pipe now."""
        while self._open:
            try:
                chunk = os.read(self._pipe, 65536)
            except BlockingIOError:
                break
            if not chunk:
                os.close(self._pipe)
                self._open = False
            self._rest += chunk
        *lines, self._rest = self._rest.split(b"\n")
        return [line.decode("utf-8") for line in lines]

    def kill(self) -> None:
        """With its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Group:
    """The workers of one run, in the order of their ranks, and their guard."""

    def __init__(
        self,
        work: Path,
        places: Sequence[RankPlace],
        threads: int | None,
        module: str = "harness.runs.worker",
        *,
        reads: bool = False,
    ) -> None:
        """Start `module` for each, with at most `threads` threads together; without `places`, once and alone.

        With `reads` the workers are told their folders on stdin, in place of `work`. Raises `UserError` where
        the system refuses.
        """
        self.workers: list[Worker] = []
        self._guard: subprocess.Popen[bytes] | None = None
        # -P: a folder `harness` where the user stands must not shadow ours.
        command = [sys.executable, "-P", "-m", module, FROM_STDIN if reads else str(work.resolve())]
        alone: list[RankPlace | None] = [None]
        try:
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", GUARD],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            for number, place in enumerate([*places] or alone):
                environment = child_environment(threads, place)
                self.workers.append(Worker(command, work / of_rank("log", number), environment, reads=reads))
            assert self._guard.stdin is not None
            groups = " ".join(str(worker.process.pid) for worker in self.workers)
            self._guard.stdin.write(f"{groups}\n".encode())
            self._guard.stdin.flush()
        except OSError as error:
            self.finish({})
            raise UserError(
                "the run's process",
                f"cannot be started ({error.strerror or error})",
                "free memory or disk space, or raise the limit on processes (ulimit -u)",
            ) from None

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self.workers]

    def has_ended(self) -> bool:
        return all(worker.exit_status() is not None for worker in self.workers)

    def read_lines(self, timeout_s: float) -> list[list[str]]:
        """Of each worker the whole lines that came within `timeout_s`; waits no longer than until the first
        bytes."""
        pipes = [worker.pipe for worker in self.workers if worker.pipe is not None]
        if not pipes:  # all are on their way out
            time.sleep(min(timeout_s, ENDING_INTERVAL_S))
            return [[] for _ in self.workers]
        wait(pipes, timeout_s)
        return self.read_rest()

    def read_rest(self) -> list[list[str]]:
        """Of each worker the whole lines that are in its pipe now."""
        return [worker.read() for worker in self.workers]

    def finish(self, family: Mapping[int, psutil.Process]) -> list[int]:
        """Kill what is left of the workers, their groups and `family`; their exit codes, or minus their
        signals."""
        for worker in self.workers:
            worker.kill()
        for relative in family.values():  # those that left a group; psutil knows a reused number
            with contextlib.suppress(psutil.Error):
                relative.kill()
        codes = [worker.process.wait() for worker in self.workers]
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
        return codes


class KeptGroup(Group):
    """One worker that stays for several runs, one after the other, with its imports and its GPU context.

    Between `begin` and the worker's word that it is done it is a group as any other; `finish` then lets it
    live.
    """

    def __init__(self, work: Path, threads: int | None) -> None:
        super().__init__(work, (), threads, reads=True)
        self.threads = threads
        self._is_idle = True
        self._family: dict[int, psutil.Process] = {}
        self._codes: list[int] | None = None
        """`None`: it was not ended yet."""

    @property
    def is_usable(self) -> bool:
        """It lives and has nothing to do."""
        return self._codes is None and self._is_idle and self.workers[0].exit_status() is None

    def begin(self, work: Path) -> None:
        """Let it run what is in `work`."""
        self._is_idle = False
        pipe = self.workers[0].process.stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, as the look at its end will show
            pipe.write(f"{work.resolve()}\n".encode())
            pipe.flush()

    def has_ended(self) -> bool:
        return self._is_idle or super().has_ended()

    def read_rest(self) -> list[list[str]]:
        (lines,) = super().read_rest()
        self._is_idle = self._is_idle or IDLE in lines
        return [[line for line in lines if line != IDLE]]

    def finish(self, family: Mapping[int, psutil.Process]) -> list[int]:
        self._family.update(family)
        return [0] if self.is_usable else self.close()

    def close(self) -> list[int]:
        """End it, whatever it does; its exit code."""
        if self._codes is None:
            self._codes = super().finish(self._family)
            pipe = self.workers[0].process.stdin
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        return self._codes


class KeptChild:
    """A child that stays for several runs, so that imports, the GPU's context and kernels are paid for once.

    For runs of one engine that are not timed from their process's start: each begins with a new engine. After
    a run that did not end well the next has a new process. `close` ends it.
    """

    def __init__(self) -> None:
        self._group: KeptGroup | None = None

    def begin(self, work: Path, threads: int | None) -> KeptGroup:
        """The process that runs what is in `work`."""
        if self._group is not None and not (self._group.is_usable and self._group.threads == threads):
            self.close()
        if self._group is None:
            self._group = KeptGroup(work, threads)
        self._group.begin(work)
        return self._group

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


def child_environment(at_most: int | None = None, place: RankPlace | None = None) -> dict[str, str]:
    """Of a process of ours: at most so many threads, which the ranks of a machine share."""
    usable = usable_cores().count
    if place is not None:
        usable = max(1, usable // place.local_size)
    threads = str(usable if at_most is None else min(usable, at_most))
    is_told = not WAITS_OF_THREADS.isdisjoint(os.environ)
    waits = {} if is_told or open_device() is not None else SHORT_SPINS
    environment = {
        **os.environ,
        # CUDA and NVML then count GPUs alike.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # Read when the libraries are loaded, before torch can be told.
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TORCHINDUCTOR_COMPILE_THREADS": os.environ.get(
            "TORCHINDUCTOR_COMPILE_THREADS", str(min(int(threads), COMPILE_WORKERS))
        ),
        "PYTHONFAULTHANDLER": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **allocator_environment(),
        **waits,
        **({} if place is None else place.environment),
    }
    if (PROJECT / "pyproject.toml").exists():  # a checkout need not be installed
        before = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = str(PROJECT) if not before else f"{PROJECT}{os.pathsep}{before}"
    return environment
