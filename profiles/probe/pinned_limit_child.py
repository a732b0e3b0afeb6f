"""Pins host memory until it is refused. Run in a process of its own by `profiles.probe.pinned_limit`.

A refused allocation leaves some drivers in an error that lasts as long as the process, and what was taken
goes back whole only at its end. After every step the child prints one line of JSON with what it has.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from profiles.probe.timing import clock_s, one_line
from profiles.system import cgroup

STEP_BYTES = 2**30
"""A power of two, to which torch's pinned allocator rounds."""


def take_pinned(*, most_bytes: float, seconds: float) -> None:
    """Pins memory in steps until refused, until `most_bytes`, or for `seconds`.

    HAZARD: pinned memory cannot be swapped out, so the machine would swap everything else. Before each step,
    as much again as is to be taken must be available. Prints `pinned_bytes`, `step_bytes`, `refused` and why
    it stopped.
    """
    import torch

    torch.zeros(1, device="cuda")
    taken: list[Any] = []
    start, step, stopped = clock_s(), STEP_BYTES, "the bound for this probe was reached"
    while step > most_bytes and step > 2**20:
        step //= 2
    sum_bytes, refused = 0, False
    while sum_bytes + step <= most_bytes:
        if clock_s() - start > seconds:
            stopped = "its time was used up"
            break
        if cgroup.host_memory().available_bytes < 2 * step:
            stopped = "little host memory was left"
            break
        try:
            taken.append(torch.empty(step, dtype=torch.uint8, pin_memory=True))
        except RuntimeError as error:
            refused, stopped = True, one_line(error)
            break
        taken[-1][::4096] = 1  # the driver has touched it already, or does now
        sum_bytes += step
        _print(pinned_bytes=sum_bytes, step_bytes=step, refused=None, stopped="the process ended early")
    _print(pinned_bytes=sum_bytes, step_bytes=step, refused=refused, stopped=stopped)


def _print(**answer: object) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    take_pinned(**json.loads(sys.argv[1]))
