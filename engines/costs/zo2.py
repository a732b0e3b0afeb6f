"""What ZO2 costs: MeZO whose blocks come up once per step and go down once per `fold_every` steps.

A block that is not resident crosses the link as it is kept (`engines.costs.quantized`) and exactly; blocks
take turns in going down, so every step downloads the same share. One that is on disk is read in every step
and never goes down. (What a full log or the end of a window of LOZO writes anew on disk, once in 50 steps or
so, is not counted.)

On the GPU: what lies outside the blocks, the resident blocks, a ring through which the streamed ones pass in
chunks, and the scratch of `engines.costs.mezo`. On the host: the other blocks, and a ring for those on disk.
Ranks of one machine have that ring once, and read a block on disk once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from engines.costs import transformer
from engines.costs.mezo import (
    STORED_IN_TILES,
    ParameterWork,
    fused_visit,
    gpu_memory,
    hidden_state_bytes,
    num_probes,
    perturb,
    perturbed_layers,
    trains_block,
)
from engines.costs.quantized import block_bytes
from engines.costs.resources import disk
from engines.costs.resources.traffic import LayerTraffic, Traffic
from engines.errors import InfeasiblePlan
from engines.settings.zeroth_order import MezoSettings, Zo2Settings
from engines.shapes import BYTES_PER_ELEMENT, ModelShape, Workload

RING_BYTES = 950_000_000
"""Uploads this far ahead go on over what holds up the blocks: the head, and the losses that are read."""

RING_MOST_BLOCKS = 5
"""Small blocks are not worth more."""

RING_ALIGNMENT_BYTES = 512

RING_LAUNCHES = 11
"""What copies and events of a streamed block take that runs as a CUDA graph, in launches: 30 are started for
it by time on an H200's host, where `mezo` takes 19 (`tests/studies/launch_counts_h200_20261130.json`). Those
of others are in what `transformer.STACKED_PLAIN_LAUNCHES` says, and one that stays takes none."""

STAYING_BYTES = 256_000_000
"""Hidden states that stay on the GPU with `hidden_states=host`: computing with them at 13B takes as long as
the next block's upload, behind which those that come up wait."""

ARRIVING_STATES = 3
LEAVING_STATES = 2
"""States on their way, at most: what is computed with and what comes next; and what goes down."""


def resident_indices(num_blocks: int, resident_blocks: int) -> frozenset[int]:
    """Which blocks stay on the GPU: as evenly spread among all as can be."""
    kept = min(resident_blocks, num_blocks)
    return frozenset((2 * i + 1) * num_blocks // (2 * kept) for i in range(kept))


def disk_indices(num_blocks: int, resident: frozenset[int], disk_blocks: int) -> frozenset[int]:
    """Which of the streamed blocks are on disk: as evenly spread among them as can be."""
    return disk.evenly_spread([i for i in range(num_blocks) if i not in resident], disk_blocks)


def choose_on_disk(
    sizes_bytes: Sequence[int],
    resident: frozenset[int],
    wanted: int | Literal["auto"],
    host_bytes: int | None,
) -> frozenset[int]:
    """Which blocks, of `sizes_bytes` each, are on disk: as many as `wanted`, or as few as let the other
    streamed ones fit into the `host_bytes` that the process may use.

    Raises `InfeasiblePlan` if host memory is too small for those that are not.
    """
    streamed_bytes = [size for i, size in enumerate(sizes_bytes) if i not in resident]
    if wanted == "auto":
        usable = sum(streamed_bytes) if host_bytes is None else host_bytes - transformer.PROCESS_HOST_BYTES
        wanted = disk.fewest_on_disk(streamed_bytes, usable)
    needed_bytes = disk.host_needed_bytes(streamed_bytes, wanted)
    if host_bytes is not None and needed_bytes > host_bytes:
        on_host = len(streamed_bytes) - min(wanted, len(streamed_bytes))
        ring = " and the ring of those on disk" if wanted and streamed_bytes else ""
        raise InfeasiblePlan(
            f"{(needed_bytes - host_bytes) / 1e9:.3g} GB of host memory are missing: "
            f"{on_host} streamed blocks{ring} take {needed_bytes / 1e9:.3g} GB, and the run may use "
            f"{host_bytes / 1e9:.3g} GB; free host memory, or keep more blocks on the GPU with "
            "--set zo2.resident_blocks=N or on disk with --set zo2.disk_blocks=N"
        )
    return frozenset(i for i in disk_indices(len(sizes_bytes), resident, wanted) if sizes_bytes[i])


def ring_bytes(streamed_block_bytes: Sequence[int]) -> int:
    """GPU memory through which the streamed blocks pass: `RING_BYTES`, but no more than 5 times the largest
    and no less than 1.2 times: while one block computes, the next one comes up into the room it has left.
    """
    largest = max(streamed_block_bytes, default=0)
    wanted = max(-(-6 * largest // 5), min(RING_MOST_BLOCKS * largest, RING_BYTES))
    return -(-wanted // RING_ALIGNMENT_BYTES) * RING_ALIGNMENT_BYTES


def num_staying(states: Sequence[int]) -> int:
    """How many of a step's hidden states, of so many bytes each, stay on the GPU with hidden_states=host."""
    return min(len(states), STAYING_BYTES // max(states, default=1))


def folds(index: int, step: int, fold_every: int) -> bool:
    """Whether block `index` goes down in `step`: blocks take turns."""
    return (step + index) % fold_every == 0


def most_going_down(blocks: Collection[int], fold_every: int) -> int:
    """How many of `blocks`, which all take turns, go down in the same step at most."""
    return max(sum(folds(index, step, fold_every) for index in blocks) for step in range(fold_every))


def folds_disk(settings: MezoSettings, total_steps: int) -> bool:
    """Whether so long a run writes blocks on disk anew, if it trains them."""
    if settings.noise_window is not None:
        return total_steps > settings.noise_window
    return total_steps * settings.queries > disk.REPLAYED_UPDATES


def replayed_visit(settings: MezoSettings, kept: float = 1.0) -> ParameterWork:
    """Of a block on disk in a long run: from 1 update to as many as the log holds are replayed.

    On a low-bit base rounding by rounding, each a pass over theta as it is `kept` (its size over that of a
    copy); what no rounding has taken is replayed by every probe.
    """
    moved, replayed = perturb(settings), (disk.REPLAYED_UPDATES + 1) / 2
    if not settings.is_quantized:
        written = 0 if settings.forward_passes == 2 else 1
        stored = kept + STORED_IN_TILES if settings.base == "lossless" else 1
        moves = moved.moves - (1 - kept) * num_probes(settings) + stored * written
        return ParameterWork(gaussians=replayed + moved.gaussians, moves=moves)
    probes, queries = num_probes(settings), settings.queries
    again = (probes - 1) * queries * (settings.fold_every - 1) / 2
    roundings = replayed / (queries * settings.fold_every)
    moves = moved.moves - (1 - kept) * probes + 2 * kept * roundings
    return ParameterWork(gaussians=replayed + again + moved.gaussians, moves=moves)


def _with_moved_states(layers: Sequence[LayerTraffic], moved_bytes: int) -> list[LayerTraffic]:
    """What hidden states of so many bytes move: down where they are made, up where they are computed with."""
    up = [0, *([moved_bytes] * (len(layers) - 1))]
    return [
        layer._replace(
            h2d_bytes=layer.h2d_bytes + came,
            d2h_bytes=layer.d2h_bytes + went,
            host_bytes=layer.host_bytes + came + went,
        )
        for layer, came, went in zip(layers, up, reversed(up), strict=True)
    ]


def traffic(shape: ModelShape, workload: Workload, settings: Zo2Settings) -> Traffic:
    """`disk_blocks=auto` counts as none: how much room the host has is known to
    `profiles.planning.recommend`."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    resident = resident_indices(shape.num_blocks, settings.resident_blocks)
    on_disk = disk_indices(shape.num_blocks, resident, settings.named_disk_blocks)
    streamed = shape.num_blocks - len(resident)
    block = block_bytes(shape, workload.dtype, settings.base)
    non_block = element * shape.non_block_parameters
    disk_bytes = len(on_disk) * block
    host_bytes = (streamed - len(on_disk)) * block
    turn = settings.noise_window or settings.fold_every
    kept = block / (element * shape.block_parameters)
    # Where resident blocks are low-bit, they keep the schedule of the others.
    keeps_turns = settings.is_quantized
    each_step, in_turn = (fused_visit(settings, every, kept) for every in (1, turn))
    visits = [each_step if i in resident and not keeps_turns else in_turn for i in range(shape.num_blocks)]
    if settings.noise_window is None:  # else windows end the log of all blocks alike
        replayed = replayed_visit(settings, kept)
        visits = [replayed if i in on_disk else visit for i, visit in enumerate(visits)]
    layers = perturbed_layers(shape, workload, settings, visits)
    of_ring = RING_LAUNCHES if transformer.runs_as_graphs(shape, workload) else 0
    for index in range(shape.num_blocks):
        if index not in resident:
            trained = trains_block(settings, index, shape.num_blocks)
            read = block if index in on_disk else 0
            down = int(block * (1 / turn)) if trained and not read else 0
            layers[1 + index] = layers[1 + index]._replace(
                launches=layers[1 + index].launches + of_ring,
                h2d_bytes=block,
                d2h_bytes=down,
                host_bytes=float(block + down + read),
                disk_bytes=read,
            )
    shared: dict[str, int] = {}
    if settings.shares_blocks and streamed > len(on_disk):
        written = [
            index
            for index in range(shape.num_blocks)
            if index not in resident | on_disk and trains_block(settings, index, shape.num_blocks)
        ]
        spare = most_going_down(written, settings.fold_every)
        shared["blocks, pinned"] = host_bytes + spare * block
    if on_disk:
        shared["disk ring, pinned"] = disk.host_ring_bytes(disk_bytes)
    held = {"weights": non_block + len(resident) * block, "buffers": ring_bytes([block] * streamed)}
    states = hidden_state_bytes(shape, workload, settings)
    away = states[num_staying(states) :] if settings.hidden_states == "host" else []
    if away:
        layers = _with_moved_states(layers, sum(away))
    on_gpu = sum(states) - sum(away) + (ARRIVING_STATES + LEAVING_STATES) * max(away, default=0)
    return Traffic(
        layers=tuple(layers),
        **gpu_memory(shape, workload, settings, held, min(on_gpu, sum(states))),
        host_memory_bytes={
            "process": transformer.PROCESS_HOST_BYTES,
            "blocks, pinned": host_bytes,
            **({"disk ring, pinned": disk.host_ring_bytes(disk_bytes)} if on_disk else {}),
            **({"hidden states, pinned": len(away) * max(away)} if away else {}),
        },
        shared_host_bytes=shared,
        divided="write-back" if settings.shares_blocks else "reads",
        shards_uploads=settings.sharded_upload,
        pinned_bytes=host_bytes + disk.host_ring_bytes(disk_bytes) + len(away) * max(away, default=0),
        overlap="streamed",
        forwards=float(settings.forward_passes),
    )
