"""What FSDP2 with CPU offload costs on one GPU: weights up twice, gradients down, AdamW on the CPU."""

from __future__ import annotations

from engines.costs import transformer
from engines.costs.native import training_memory
from engines.costs.resources.traffic import Traffic
from engines.costs.torchao_offload import pinned_copy_bytes
from engines.settings.libraries import Fsdp2OffloadSettings
from engines.shapes import BYTES_PER_ELEMENT, ModelShape, Workload

BLOCKS_UP = 2
"""Blocks whose weights are on the GPU at once: the one at work and the one ahead."""


def traffic(shape: ModelShape, workload: Workload, settings: Fsdp2OffloadSettings) -> Traffic:
    """Blocks go up in the forward and in the backward pass, what stands outside of them once; every
    micro-batch does it anew. States have the weights' precision."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    block, non_block = shape.block_parameters, shape.non_block_parameters
    layers = []
    for layer in transformer.training_layers(shape, workload):
        is_block = layer.name.startswith("block.")
        parameters = block if is_block else non_block if layer.name == "head" else 0
        up = workload.accumulation * element * parameters * (2 if is_block else 1)
        down = workload.accumulation * element * parameters
        layers.append(
            layer._replace(
                h2d_bytes=up,
                d2h_bytes=down,
                cpu_adam_elements=parameters,
                host_bytes=float(up + down + 7 * element * parameters),
            )
        )
    weights = element * shape.parameters
    pinned = 2 * pinned_copy_bytes(shape, element)
    up_at_once = element * (non_block + BLOCKS_UP * block)
    memory = training_memory(
        shape,
        workload,
        held={"weights": up_at_once},
        gradients=element * (non_block + block),
        forgets_logits=True,
    )
    # Parameters come up in one piece, on a stream of its own, and are copied to where they are used: what is
    # outside the blocks, and a block. torch gives memory of one stream to no other. Segments of a fixed size
    # are made for each, and expandable ones have room for both, one after the other.
    memory["gpu_apart_bytes"] += element * (non_block + block)
    memory["gpu_pool_bytes"] += element * max(non_block, block)
    return Traffic(
        layers=tuple(layers),
        **memory,
        host_memory_bytes={
            "process": transformer.PROCESS_HOST_BYTES,
            "weights and gradients, pinned": pinned,
            "optimizer": 2 * weights,
        },
        pinned_bytes=pinned,
        overlap="optimizer_after_backward",
        cpu_adam_factor=element / 4,
    )
