"""How long a step takes when its resources overlap: closed forms over the layers' times.

One function per `Overlap` of `engines.costs.resources.traffic`. Each is monotone in every time it is given,
no smaller than the busiest resource and no larger than the sum of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engines.costs.resources.traffic import Overlap

CHUNK_SHARE = 0.25
"""Share of a block that crosses the link at a time where blocks are streamed in chunks
(`engines.offload.ring`): a matrix of the feed-forward part is a third of a plain block and a little under a
quarter of a gated one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTimes:
    """Seconds one layer keeps each resource busy in one step."""

    gpu_s: float
    backward_s: float
    """The part of `gpu_s` that is the backward pass."""
    h2d_s: float
    d2h_s: float
    cpu_s: float
    host_s: float
    """Host memory, shared by copies and CPU update; it is busy while they are, never after them."""
    update_host_s: float = 0.0
    """Of `host_s`, what the CPU's updates move and copies of what they read and write."""
    between_updates_s: float = 0.0
    """What the CPU stands still for from one chunk to the next."""
    disk_s: float = 0.0
    from_gpu_s: float = 0.0
    """Between the machine's GPUs."""


def busy_s(layers: Sequence[LayerTimes]) -> dict[str, float]:
    """Seconds each resource is busy in one step, by the name that a prediction's bottleneck has."""
    return {
        "gpu": sum(layer.gpu_s for layer in layers),
        "h2d": sum(layer.h2d_s for layer in layers),
        "d2h": sum(layer.d2h_s for layer in layers),
        "cpu": sum(layer.cpu_s for layer in layers),
        "disk": sum(layer.disk_s for layer in layers),
        "host memory": sum(layer.host_s for layer in layers),
        "gpu to gpu": sum(layer.from_gpu_s for layer in layers),
    }


def serial_s(layers: Sequence[LayerTimes], micro_batches: int = 1) -> float:
    """Nothing overlaps: compute, then downloads, then CPU, then uploads."""
    busy = busy_s(layers)
    return max(sum(busy.values()) - busy["host memory"], busy["host memory"])


def gathered_s(layers: Sequence[LayerTimes], micro_batches: int = 1) -> float:
    """A layer's weights come together while the one before it computes; the first one is waited for, and the
    last one's gradient. FSDP (2304.11277)."""
    busy = busy_s(layers)
    waited = max((layer.from_gpu_s for layer in layers), default=0.0)
    chain = max(busy["gpu"], busy["gpu to gpu"]) + waited
    return min(max(chain, *busy.values()), serial_s(layers))


def uploaded_when_called_s(layers: Sequence[LayerTimes], micro_batches: int = 1) -> float:
    """A layer's weights come up when the forward pass calls it, and in the backward pass while the one
    before it computes, behind which gradients go down; when all have, the CPU updates. FSDP2 with offload.

    t_gpu + t_h2d / 2 + max(0, t_h2d / 2 - t_backward, t_d2h - t_backward) + t_cpu + one layer's way down

    By a trace on an H200 both passes of a model of 1.3B took 164 ms, where starting them takes 121 and half
    of the uploads 48.
    """
    busy = busy_s(layers)
    backward, up = sum(layer.backward_s for layer in layers), busy["h2d"] / 2
    down = max((layer.d2h_s for layer in layers), default=0.0)
    passes = busy["gpu"] + up + max(0.0, up - backward, busy["d2h"] - backward)
    return max(*busy.values(), min(passes + busy["cpu"] + down, serial_s(layers)))


def optimizer_after_backward_s(layers: Sequence[LayerTimes], micro_batches: int = 1) -> float:
    """Gradients go down under the backward passes; then the CPU updates, then the weights come up.

    t_gpu + max(0, t_d2h - t_backward) + t_cpu + t_h2d
    """
    busy = busy_s(layers)
    backward = sum(layer.backward_s for layer in layers)
    chain = busy["gpu"] + max(0.0, busy["d2h"] - backward) + busy["cpu"] + busy["h2d"]
    return max(chain, busy["host memory"], busy["disk"])


def streamed_s(layers: Sequence[LayerTimes], micro_batches: int = 1) -> float:
    """Layers follow each other through all resources in chunks: the busiest one is never idle, but for one
    chunk's way through the others. ZO2 (2503.12668): upload, both forward passes, download; before them, for
    some, the disk.

    max over resources R of (total of R + `CHUNK_SHARE` of the largest layer's share of every other resource)
    """
    return _pipelined_s(layers, micro_batches=1, chunk_share=CHUNK_SHARE)


def layerwise_s(layers: Sequence[LayerTimes], micro_batches: int = 1) -> float:
    """LSP-Offload's layer-wise schedule (2406.10181, closed form): deep layers' updates are on their way
    while shallow layers compute, into the next forward pass.

    max(L (f + b) + c + u + h, max(L c, L u, L h) + fill), the fill being one layer's way through the others,
    what comes after the last layer with weights to update (the head), and all micro-batches but one, during
    which there is nothing to update.
    """
    return _pipelined_s(layers, micro_batches, chunk_share=1.0)


def blockwise_s(layers: Sequence[LayerTimes], micro_batches: int = 1) -> float:
    """All micro-batches pass a block together, so that its gradients have the rest of the step to go down,
    through the CPU and up again, into the next forward pass, in chunks.

    max over copies of (total + `CHUNK_SHARE` of the largest layer's share of every other resource), the CPU's
    total + the GPU's time for the last block that it updates and for what comes after it, and the GPU's total
    + max(0, what it waits for the first block that the CPU updates - its own time for the blocks before that)

    The gradients of a block are there all at once, when backward leaves it, and the next forward pass wants
    its weights whole. So the GPU waits for the CPU's whole update of the first block, and a chunk's way down
    and up; and the CPU, which has updated the last block, for all micro-batches' way through it.
    """
    first = next((at for at, layer in enumerate(layers) if _moves(layer)), len(layers))
    wait_s = 0.0
    if first < len(layers):
        wanted = layers[first]
        wait_s = _updates_s([wanted]) + CHUNK_SHARE * (wanted.d2h_s + wanted.h2d_s)
    before_s = sum(layer.gpu_s for layer in layers[:first] if layer.backward_s > 0)
    return _pipelined_s(
        layers, micro_batches=1, chunk_share=CHUNK_SHARE, gpu_waits_s=max(0.0, wait_s - before_s)
    )


def held_back_s(layers: Sequence[LayerTimes], room: float) -> float:
    """`blockwise_s` where gradients of only that share of the blocks, `room`, may wait on the host.

    max(blockwise, updates + turn + min(forward, max(0, (1 - room) updates - backward))), the turn being what
    the CPU stands still for anyway, and the forward pass what comes before that

    What has not been updated when backward ends waits there, at most `room` of it; for the rest backward
    waits. While it does, and the next gradient is on its way into what has become free, the CPU updates what
    it was to have for the next forward pass, and stands still in that for as long.
    """
    backward = sum(layer.backward_s for layer in layers)
    turn_s, turning = _turn_s(layers, 1, CHUNK_SHARE), _turning(layers)
    updates = _updates_s(layers, turn_s)
    held_s = max(0.0, (1.0 - room) * updates - backward)
    before_s = sum(layer.gpu_s - layer.backward_s for layer in layers[: len(layers) - len(turning)])
    waiting_s = updates + turn_s + min(before_s, held_s)
    return max(blockwise_s(layers), min(waiting_s, serial_s(layers)))


def blockwise_after_norm_s(layers: Sequence[LayerTimes], micro_batches: int = 1) -> float:
    """The same where the CPU begins when backward has ended: only the next forward pass hides it.

    backward + max(forward, CPU or uploads, whichever takes longer, and a chunk of the other)
    """
    busy = busy_s(layers)
    backward = sum(layer.backward_s for layer in layers)
    of_cpu, of_link = (
        CHUNK_SHARE * max(times, default=0.0)
        for times in ([layer.cpu_s for layer in layers], [layer.h2d_s for layer in layers])
    )
    after = max(busy["gpu"] - backward, busy["cpu"] + of_link, busy["h2d"] + of_cpu)
    return max(max(backward, busy["d2h"]) + after, busy["host memory"], busy["disk"])


def _moves(layer: LayerTimes) -> bool:
    """It gives link or CPU work."""
    return layer.h2d_s + layer.d2h_s + layer.cpu_s > 0


def _updates_s(layers: Sequence[LayerTimes], turn_s: float = 0.0) -> float:
    """What the CPU's updates take from the first to the last, of which there are `turn_s` before the next
    step's: its own time, or what memory takes for them beside other copies, which go on all the time.

    That is the w of w = updates + copies w / (w + turn).
    """
    own = sum(layer.update_host_s for layer in layers)
    beside = sum(layer.host_s - layer.update_host_s for layer in layers) if own else 0.0
    between = sum(layer.between_updates_s for layer in layers)
    half = (own + between + beside - turn_s) / 2
    in_memory = half + math.sqrt(half * half + (own + between) * turn_s)
    return max(sum(layer.cpu_s for layer in layers) + between, in_memory)


def _turning(layers: Sequence[LayerTimes]) -> Sequence[LayerTimes]:
    """The last layer that gives link or CPU work, and those after it."""
    last = max((at for at, layer in enumerate(layers) if _moves(layer)), default=len(layers))
    return layers[last:]


def _turn_s(layers: Sequence[LayerTimes], micro_batches: int, chunk_share: float) -> float:
    """From the last update of a step to the first of the next: what was updated goes up, its layer and those
    after it run forward and backward, and the first gradient comes down."""
    turning = _turning(layers)
    copied_s = sum(layer.h2d_s + layer.d2h_s for layer in turning[:1])
    return sum(layer.gpu_s for layer in turning) / micro_batches + chunk_share * copied_s


def _pipelined_s(
    layers: Sequence[LayerTimes], micro_batches: int, chunk_share: float, gpu_waits_s: float | None = None
) -> float:
    """Only the last of `micro_batches` gives the others work. Layers move on in shares of `chunk_share`.
    `gpu_waits_s`: what a GPU waits that decides; `None`: for a share of the largest layer's way."""
    busy = busy_s(layers)
    idle_s = busy["gpu"] * (micro_batches - 1) / micro_batches
    moving = [layer for layer in layers if _moves(layer)]
    share = {
        "gpu": chunk_share * max((layer.gpu_s / micro_batches for layer in moving), default=0.0),
        "h2d": chunk_share * max((layer.h2d_s for layer in moving), default=0.0),
        "d2h": chunk_share * max((layer.d2h_s for layer in moving), default=0.0),
        "cpu": chunk_share * max((layer.cpu_s for layer in moving), default=0.0),
        "gpu to gpu": chunk_share * max((layer.from_gpu_s for layer in moving), default=0.0),
    }
    fill = sum(share.values())
    copies = (busy[name] + fill - share[name] + idle_s for name in ("h2d", "d2h", "gpu to gpu"))
    updates = 0.0
    if busy["cpu"]:
        stands_s = _turn_s(layers, micro_batches, chunk_share) + idle_s
        updates = _updates_s(layers, stands_s) + stands_s
    # Reading goes on ahead, over the ends of layers and steps: it waits for nobody.
    waits_s = fill - share["gpu"] if gpu_waits_s is None else gpu_waits_s
    chains = (busy["gpu"] + waits_s, updates, *copies)
    return max(*busy.values(), min(max(chains), serial_s(layers)))


STEP_TIME: dict[Overlap, Callable[[Sequence[LayerTimes], int], float]] = {
    "serial": serial_s,
    "gathered": gathered_s,
    "uploaded_when_called": uploaded_when_called_s,
    "optimizer_after_backward": optimizer_after_backward_s,
    "streamed": streamed_s,
    "layerwise": layerwise_s,
    "blockwise": blockwise_s,
    "blockwise_after_norm": blockwise_after_norm_s,
}
