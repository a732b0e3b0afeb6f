"""What is found by going to the limit: memory that a process can take. Run in a process of its own.

A refused allocation leaves some drivers in an error that lasts as long as the process, and what was taken
goes back whole only at its end. After every step the child prints one line of JSON with what it has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from profiles.probe.timing import clock_s, one_line
from profiles.system import cgroup, nvml

VRAM_SMALLEST_BYTES = 2 * 2**20
"""What torch asks the driver for at least."""
PIN_STEP_BYTES = 2**30
"""A power of two, to which torch's pinned allocator rounds."""


Tell = Callable[[dict[str, Any]], None]


def take_vram(tell: Tell) -> None:
    """Allocates all of `cuda:0` in pieces that halve when refused: `usable_bytes`, `context_bytes`."""
    device = nvml.open_device()
    before = device.used_bytes() if device else None
    import torch

    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    after = device.used_bytes() if device else None
    context_bytes = None if before is None or after is None else max(0, after - before)
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    taken: list[Any] = []
    sum_bytes, piece = 0, 2**30
    while piece > free_bytes // 4 and piece > VRAM_SMALLEST_BYTES:
        piece //= 2
    # HAZARD: Windows lets a process allocate past the GPU's memory, in the host's; so does WSL2.
    while piece >= VRAM_SMALLEST_BYTES and sum_bytes + piece <= total_bytes:
        try:
            taken.append(torch.empty(piece, dtype=torch.uint8, device="cuda"))
            sum_bytes += piece
        except RuntimeError:  # out of memory
            piece //= 2
    tell({"usable_bytes": sum_bytes, "context_bytes": context_bytes})
    taken.clear()
    torch.cuda.empty_cache()


def take_pinned(tell: Tell, *, most_bytes: float, seconds: float) -> None:
    """Pins memory in steps until refused, until `most_bytes`, or for `seconds`.

    HAZARD: pinned memory cannot be swapped out, so the machine would swap everything else. Before each step,
    as much again as is to be taken must be available. Tells `pinned_bytes`, `refused` and `steps_s`.
    """
    import torch

    torch.zeros(1, device="cuda")
    taken: list[Any] = []
    steps_s: list[float] = []
    start, step, stopped = clock_s(), PIN_STEP_BYTES, "the bound for this probe was reached"
    while step > most_bytes and step > 2**20:
        step //= 2
    sum_bytes, refused = 0, None
    while sum_bytes + step <= most_bytes:
        if clock_s() - start > seconds:
            stopped = "its time was used up"
            break
        if cgroup.host_memory().available_bytes < 2 * step:
            stopped = "little host memory was left"
            break
        before = clock_s()
        try:
            taken.append(torch.empty(step, dtype=torch.uint8, pin_memory=True))
        except RuntimeError as error:
            refused, stopped = True, one_line(error)
            break
        taken[-1][::4096] = 1  # the driver has touched it already, or does now
        steps_s.append(clock_s() - before)
        sum_bytes += step
        tell(_pinned(sum_bytes, step, steps_s, None, "the process ended early"))
    tell(_pinned(sum_bytes, step, steps_s, refused or False, stopped))


def _pinned(
    sum_bytes: int, step: int, steps_s: list[float], refused: bool | None, stopped: str
) -> dict[str, Any]:
    return {
        "pinned_bytes": sum_bytes, "step_bytes": step, "steps_s": steps_s, "refused": refused,
        "stopped": stopped,
    }  # fmt: skip


def main(arguments: str) -> None:
    wanted = json.loads(arguments)
    told: dict[str, Any] = {}

    def tell(answer: dict[str, Any]) -> None:
        told.update(answer)
        print(json.dumps(told), flush=True)

    if wanted["vram"]:
        take_vram(tell)
    take_pinned(tell, most_bytes=wanted["most_bytes"], seconds=wanted["seconds"])


if __name__ == "__main__":
    main(*sys.argv[1:])
