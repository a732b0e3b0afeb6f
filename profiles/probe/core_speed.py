"""How fast a core runs, apart from any GPU: a plain Python loop, and a visit to one core after the other.

A virtual machine's core is often one half of a physical one, whose other half may be another tenant's. It
then runs at two speeds and changes within seconds: on a host of an H200 a turn of this loop took 32 to 35 ns
or 51 to 62, and so an operation of a forward pass 15 or 19 to 25 us, by core and by time.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from profiles.probe.timing import clock_s
from profiles.system.cgroup import ROOT
from profiles.system.topology import fastest_cores

TURNS = 10_000
"""Of the loop in one sample, some 0.3 to 0.6 ms: short beside the time for which a core keeps its speed."""
LOOP_S = 0.008
"""For which it is run: with a sample begun just before the end still under 10 ms."""
NEXT_CORE = 0.618
"""Share of all cores from one visited core to the next: the golden ratio spreads few visits evenly, and the
halves of one physical core do not follow each other."""


def python_turn_s(seconds: float = LOOP_S) -> float:
    """Seconds that one turn of a loop of plain Python takes now, the median over `seconds`."""
    samples: list[float] = []
    start_s = before_s = clock_s()
    while not samples or before_s - start_s < seconds:
        total = 0
        for number in range(TURNS):
            total += number
        after_s = clock_s()
        samples.append((after_s - before_s) / TURNS)
        before_s = after_s
    return statistics.median(samples)


@contextmanager
def on_core(visit: int, root: Path = ROOT) -> Iterator[None]:
    """This thread runs on one core inside, on another for each number of a `visit`. Cores that are slower by
    design than others are left out, as the kernel does not choose them either.

    Threads that are started inside stay on that core. HAZARD: autograd starts its own at the first backward
    pass.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    cores = sorted(fastest_cores(before, root))
    try:
        with contextlib.suppress(OSError):  # a core that was taken away meanwhile
            os.sched_setaffinity(0, {cores[int(NEXT_CORE * visit % 1 * len(cores))]})
        yield
    finally:
        os.sched_setaffinity(0, before)
