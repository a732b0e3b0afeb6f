"""Programs of ours in forks of a process that has loaded torch: a start takes 0.1 seconds then, and not four.

    with forked():  # what starts `python -P -m harness...`, or `python -c ...`, is served

The process that forks has one thread and does nothing else. What it forks becomes a child of the caller, as
one that `subprocess` started: it can be waited for and killed, in a session of its own. `nsenter --net=...`
before the command is understood. For tests of what programs do; those of how they start, and of what they
take of the machine, do without. On a machine with a GPU nothing is served.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
MAINS = {
    "harness": "harness.cli.app", "harness.runs.worker": "harness.runs.worker",
    "harness.training.follower": "harness.training.follower",
    "torch.distributed.run": "torch.distributed.run",
}  # fmt: skip
"""By what `python -m` is given: the module whose `main` it calls."""
WORKERS = ("harness.runs.worker", "harness.training.follower")
LOADED = (
    "harness.cli.train", "harness.cli.generate", "harness.cli.compare", "harness.training.train",
    "harness.training.generate", "harness.data.preview", "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt", "reports.poc", "reports.render",
)  # fmt: skip
BINDS_POPEN = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
"""What torchrun starts its processes by, with a `Popen` of its own import."""
SAME = ("TRITON_INTERPRET", "HF_HUB_OFFLINE", "PYTHONWARNINGS")
"""Variables that are read when libraries are loaded."""
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36
CLONE_NEWNET = 0x40000000
UNUSED = 500
"""From here on nobody has descriptors."""
_LIBC = ctypes.CDLL(None)
_START_ANEW: Any = vars(subprocess.Popen)["_execute_child"]


class Server:
    """The process that forks, from the caller's side."""

    def __init__(self, ours: socket.socket, pid: int) -> None:
        self.pid = pid
        self._socket = ours
        self._environment = dict(os.environ)

    def may_start(self, words: Any, environment: dict[str, str]) -> bool:
        """Whether a fork is what `words` would be, started anew."""
        if not isinstance(words, list | tuple) or not _is_ours(_behind_network(words)):
            return False
        paths, known = (
            set(each.get("PYTHONPATH", "").split(":")) for each in (environment, self._environment)
        )
        threads = {environment.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        same = all(environment.get(name) == self._environment.get(name) for name in SAME)
        return same and threads == {"1"} and paths <= known | {str(ROOT)}

    def close(self, process: subprocess.Popen[bytes]) -> None:
        self._socket.close()
        process.wait()

    def fork(self, request: dict[str, Any], descriptors: list[int]) -> int:
        """The process id of what was forked, a child of this process."""
        _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # whose parent ends, is adopted here
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            return int(self._socket.recv(64))
        finally:
            _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _behind_network(words: Sequence[str]) -> Sequence[str]:
    return words[2:] if words[0] == "nsenter" else words


def _is_ours(words: Sequence[str]) -> bool:
    match _without_options(words):
        case ["-c", *_]:
            return words[0] == sys.executable
        case ["-m", what, *_]:
            return words[0] == sys.executable and what in MAINS
    return False


def _without_options(words: Sequence[str]) -> list[str]:
    """What Python is to run, `-m` or `-c` first, as a fork does without these of its options."""
    return list(itertools.dropwhile(lambda word: word in ("-P", "-u"), words[1:]))


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen`, which lets `server` start what it can."""

    server: Server

    def _execute_child(
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, pass_fds: Any, cwd: Any, env: Any,
        *more: Any,
    ) -> None:  # fmt: skip
        environment = dict(os.environ if env is None else env)
        if not self.server.may_start(args, environment):
            _START_ANEW(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more)
            return
        pipes = more[3:9]  # of stdin, stdout and stderr, each the end to read from before that to write to
        ends = (pipes[0], pipes[3], pipes[5])
        standard = [number if end == -1 else end for number, end in enumerate(ends)]
        request = {
            "words": _without_options(_behind_network(args)),
            "network": args[1].removeprefix("--net=") if args[0] == "nsenter" else None,
            "environment": environment, "parent": os.getpid(),
            "folder": os.fspath(cwd or Path.cwd()), "passed": list(pass_fds),
        }  # fmt: skip
        self.pid = self.server.fork(request, [*standard, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


@contextlib.contextmanager
def forked() -> Iterator[None]:
    """`subprocess` starts programs of ours as forks, here and in these programs themselves."""
    if Path("/dev/nvidiactl").exists():
        yield
        return
    if os.getpid() not in _SERVERS:
        _SERVERS[os.getpid()] = _new_server()
    with _served_by(_SERVERS[os.getpid()]):
        yield


def children(*, recursive: bool = True) -> list[psutil.Process]:
    """Of this process, but for the one that forks."""
    forking = {server.pid for server in _SERVERS.values()}
    return [each for each in psutil.Process().children(recursive=recursive) if each.pid not in forking]


def is_rank(process: psutil.Process, rank: int) -> bool:
    """Of a run, started anew or forked."""
    return process.name() == f"rank {rank}" or process.environ().get("RANK") == str(rank)


_SERVERS: dict[int, Server] = {}


def _new_server() -> Server:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        # A child that stays: what is forked below it is adopted by its nearest living ancestor that asks to.
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__)), str(theirs.fileno())],
            pass_fds=(theirs.fileno(),), env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        )  # fmt: skip
    server = Server(ours, process.pid)
    atexit.register(server.close, process)
    return server


@contextlib.contextmanager
def _served_by(server: Server) -> Iterator[None]:
    original, Popen.server = subprocess.Popen, server
    subprocess.Popen = Popen  # type: ignore[misc]
    try:
        yield
    finally:
        subprocess.Popen = original  # type: ignore[misc]


# --- the process that forks ---------------------------------------------------------------------------


def serve(theirs: socket.socket) -> dict[str, Any]:
    """Fork what is asked for, until nobody can ask; returns in each fork, with what it is to do."""
    while True:
        content, received, *_ = socket.recv_fds(theirs, 1 << 20, 64)
        if not content:
            os._exit(0)
        read_end, write_end = os.pipe()
        middle = os.fork()
        if middle == 0:
            if os.fork():
                os._exit(0)
            theirs.close()
            os.close(read_end)
            os.setsid()
            os.write(write_end, str(os.getpid()).encode())
            os.close(write_end)
            return become(json.loads(content), received)
        for descriptor in (write_end, *received):
            os.close(descriptor)
        told = os.read(read_end, 64)
        os.close(read_end)
        os.waitpid(middle, 0)
        theirs.send(told)


def become(request: dict[str, Any], received: list[int]) -> dict[str, Any]:
    """This process, with the descriptors, the environment and the folder of a request; what it is to do."""
    while os.getppid() != request["parent"]:  # it is being adopted
        time.sleep(0.001)
    if request["network"] is not None:
        with open(request["network"]) as network:
            assert _LIBC.setns(network.fileno(), CLONE_NEWNET) == 0, "a network that cannot be entered"
    if not set(request["words"]).intersection(
        WORKERS
    ):  # which may start workers, of a server of its own: still one thread
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            ours.close()
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2, *received):
                os.dup2(nothing, descriptor)
            return serve(theirs)
        theirs.close()
        os.environ.clear()
        os.environ.update(request["environment"])
        Popen.server = Server(ours, pid)
        subprocess.Popen = Popen  # type: ignore[misc]
        vars(sys.modules[BINDS_POPEN])["Popen"] = Popen
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, UNUSED) for descriptor in received]
    for descriptor in received:
        os.close(descriptor)
    for source, descriptor in zip(moved, (0, 1, 2, *request["passed"]), strict=True):
        os.dup2(source, descriptor)
        os.close(source)
    for name, mode, number in (("stdin", "r", 0), ("stdout", "w", 1), ("stderr", "w", 2)):
        setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    sys.stderr.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    random.seed()
    if rank := os.environ.get("RANK"):
        _LIBC.prctl(PR_SET_NAME, f"rank {rank}".encode(), 0, 0, 0)
    return request


if __name__ == "__main__":
    for name in (*MAINS.values(), *LOADED):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    kind, what, *sys.argv[1:] = serve(socket.socket(fileno=int(sys.argv[1])))["words"]
    if kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        sys.exit()
    main = importlib.import_module(MAINS[what]).main
    sys.exit(main(sys.argv[1:]) if what in WORKERS else main())
