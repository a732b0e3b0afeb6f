"""SIGINT, SIGTERM and SIGHUP alike: the first asks a command to come to an end, a second one ends it at once.

Ctrl-C, `kill`, a batch system's notice, a container that is stopped and a connection that is lost all mean
the same. What a crash leaves behind is settled here too. Imports nothing of this project.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130
"""Exit code of a command that was stopped."""


@contextmanager
def on_first_signal(act: Callable[[], None]) -> Iterator[None]:
    """`act` is called at the first of `ENDING`; at a second the process ends at once, with `INTERRUPTED`.

    A signal that is ignored stays so (as `nohup` has it). Signals come to the main thread only, so in another
    one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = [False]

    def on_signal(number: int, frame: object) -> None:
        if asked[0]:
            os._exit(INTERRUPTED)
        asked[0] = True
        act()

    before: dict[signal.Signals, Any] = {}
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt() -> None:
    """Raises `KeyboardInterrupt`."""
    raise KeyboardInterrupt


def no_core_dumps() -> None:
    """From here on, in this process and its children: a dump would hold weights and data, wherever the system
    puts it."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # The limit does not hold a system that pipes dumps to a program; then they hold no memory.
    with contextlib.suppress(OSError), open("/proc/self/coredump_filter", "w", encoding="ascii") as chosen:
        chosen.write("0")


def named_signal(number: int) -> str:
    """`signal 7 (SIGBUS)`; most real-time signals have no name: `signal 40`."""
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
