"""Every GPU's link, alone and while all of them copy, and from one GPU to the next."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from profiles.machine import Figure, GpuLink, absent
from profiles.probe.buffers import Buffers, free, largest_buffers
from profiles.probe.timing import Action, Meter, cuda_samples, rate_figure

BUFFER_BYTES = 128 * 2**20
ROUNDS = 40
NUM_MEASUREMENTS = 1


def each_gpu(meter: Meter, count: int, *, memory_bytes: int) -> tuple[GpuLink, ...]:
    """Empty if it fails. A CUDA context stays behind on each GPU until the process ends."""
    found = meter.optional(
        f"links of {count} GPUs", lambda seconds: _each(count, seconds, memory_bytes), lambda why: ()
    )
    free()
    return found


def _each(count: int, seconds: float, memory_bytes: int) -> tuple[GpuLink, ...]:
    import torch

    cuda: Any = torch.cuda
    buffers, alone = [], []
    for index in range(count):
        with cuda.device(index):
            own = largest_buffers(BUFFER_BYTES, memory_bytes // count, pinned=True)
            buffers.append(own)
            method = f"{own.num_bytes / 2**20:.0f} MiB, pinned"
            each_s = seconds / (2 * count)
            alone.append(
                tuple(
                    rate_figure(own.num_bytes, cuda_samples(copy, each_s), method)
                    for copy in (own.up, own.down)
                )
            )
    h2d_together = _together(buffers, [own.up for own in buffers])
    d2h_together = _together(buffers, [own.down for own in buffers])
    from_gpus = _from_next(buffers)
    return tuple(
        GpuLink(
            index=index,
            name=cuda.get_device_properties(index).name,
            h2d_bytes_per_s=alone[index][0],
            d2h_bytes_per_s=alone[index][1],
            h2d_together_bytes_per_s=h2d_together[index],
            d2h_together_bytes_per_s=d2h_together[index],
            from_gpu_bytes_per_s=from_gpus[index],
        )
        for index in range(count)
    )


def _from_next(buffers: Sequence[Buffers]) -> list[Figure]:
    """Absent where one of the GPUs cannot read another's memory: copies would go through the host then."""
    import torch

    count = len(buffers)
    pairs = [(index, (index + 1) % count) for index in range(count)]
    if not all(torch.cuda.can_device_access_peer(*pair) for pair in pairs):
        return [absent("a GPU cannot read the next one's memory")] * count
    least = min(own.num_bytes for own in buffers)

    def copy(index: int, other: int) -> Action:
        to, source = buffers[index].device_up[:least], buffers[other].device_down[:least]
        return lambda: to.copy_(source, non_blocking=True)

    return _together(
        buffers, [copy(*pair) for pair in pairs], f"{least / 2**20:.0f} MiB from the next GPU", least
    )


def _together(
    buffers: Sequence[Buffers],
    copies: Sequence[Action],
    what: str | None = None,
    num_bytes: int | None = None,
) -> list[Figure]:
    """All GPUs copy at once, each its own. Only copies count that ended before the first GPU was done.

    Events of different GPUs cannot be compared, so each GPU's times count from its own first copy, which was
    queued within microseconds of the others'.
    """
    import torch

    cuda: Any = torch.cuda
    marks = []
    for index in range(len(buffers)):
        with cuda.device(index):
            marks.append([cuda.Event(enable_timing=True) for _ in range(ROUNDS + 1)])
            cuda.synchronize()
            marks[index][0].record()
    for turn in range(1, ROUNDS + 1):
        for index, copy in enumerate(copies):
            with cuda.device(index):
                copy()
                marks[index][turn].record()
    for index in range(len(buffers)):
        with cuda.device(index):
            cuda.synchronize()
    times = [[row[0].elapsed_time(event) / 1e3 for event in row] for row in marks]
    shortest = min(row[-1] for row in times)
    found = []
    for own, row in zip(buffers, times, strict=True):
        samples = [end - start for start, end in itertools.pairwise(row[1:]) if end <= shortest]
        amount = num_bytes or own.num_bytes
        method = f"{what or f'{amount / 2**20:.0f} MiB, pinned'}, all {len(buffers)} GPUs at once"
        found.append(
            rate_figure(amount, samples, method) if samples else absent("the copies did not overlap")
        )
    return found
