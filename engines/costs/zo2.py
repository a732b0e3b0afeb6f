"""What ZO2 costs: MeZO whose blocks come up and go down once per step.

A block that is not resident crosses the link once each way, its parameters exactly. On the GPU: the outer
parameters and their perturbed copy, the resident blocks, a ring of three blocks on their way (one coming,
one computing, one going) and the perturbed copy of one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engines.base import BYTES_PER_ELEMENT, ModelShape, Traffic, Workload
from engines.costs import forward
from engines.costs.mezo import perturbed_layers
from engines.settings import Zo2Settings

RING_BLOCKS = 3

OUTER_PASSES = 4
"""Update, plus before the embedding, minus before it and for the head, plus again for the head."""


def resident_indices(num_blocks: int, resident_blocks: int) -> frozenset[int]:
    """Which blocks stay on the GPU: as evenly spread among all as can be."""
    kept = min(resident_blocks, num_blocks)
    return frozenset((2 * i + 1) * num_blocks // (2 * kept) for i in range(kept))


def ring_bytes(streamed_block_bytes: Sequence[int]) -> int:
    """GPU memory through which the streamed blocks pass."""
    largest = max(streamed_block_bytes, default=0)
    wanted = max(-(-5 * largest // 4), min(4 * largest, 1_000_000_000))
    return -(-wanted // 512) * 512


def folds(index: int, step: int, fold_every: int) -> bool:
    """Whether block `index` goes down in `step`: blocks take turns."""
    return (step + index) % fold_every == 0


def traffic(shape: ModelShape, workload: Workload, settings: Zo2Settings) -> Traffic:
    element = BYTES_PER_ELEMENT[workload.dtype]
    resident = resident_indices(shape.num_blocks, settings.resident_blocks)
    streamed = shape.num_blocks - len(resident)
    block = element * shape.block_parameters
    outer = element * shape.outer_parameters
    layers = perturbed_layers(shape, workload, OUTER_PASSES)
    for index in range(shape.num_blocks):
        if index not in resident:
            layers[1 + index] = replace(
                layers[1 + index], h2d_bytes=block, d2h_bytes=block, host_bytes=2.0 * block
            )
    streams = 2 * workload.accumulation
    return Traffic(
        layers=tuple(layers),
        gpu_memory_bytes={
            "weights": outer + len(resident) * block,
            "scratch": outer + block,
            "buffers": min(RING_BLOCKS, streamed) * block,
            "activations": streams * forward.hidden_bytes(shape, workload)
            + forward.forward_activation_bytes(shape, workload),
            "logits": forward.logits_bytes(shape, workload, training=False),
        },
        host_memory_bytes={"process": forward.PROCESS_HOST_BYTES, "blocks, pinned": streamed * block},
        pinned_bytes=streamed * block,
        overlap="streamed",
    )
