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

GROUP_LAUNCHES, TENSOR_LAUNCHES = 100, 7
"""FSDP2's own Python, in launches of a model's operations: in each micro-batch around what comes up and goes
down together, its hooks, events and copies; and in each step for each tensor of it, which is a DTensor to the
optimizer. By time on an H200's host a block of Llama takes 281 with its nine tensors, of which eager passes
are 122 (463 recomputed, of 304), one of OPT 291 with 16, of which they are 84
(`tests/studies/launch_counts_h200_20261201.json`). On a CPU 285 and 289, and 100 for a further micro-batch
of Llama."""
ROOT_LAUNCHES = 100
"""The same in a step outside of the blocks, where weights come up once, the optimizer's among it: 94 of Llama
and 115 of OPT."""


def traffic(shape: ModelShape, workload: Workload, settings: Fsdp2OffloadSettings) -> Traffic:
    """Blocks go up in the forward and in the backward pass, what stands outside of them once; every
    micro-batch does it anew. States have the weights' precision."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    block, non_block = shape.block_parameters, shape.non_block_parameters
    own = GROUP_LAUNCHES * workload.accumulation + TENSOR_LAUNCHES * transformer.num_tensors(shape)
    layers = []
    for layer in transformer.training_layers(shape, workload):
        is_block = layer.name.startswith("block.")
        parameters = block if is_block else non_block if layer.name == "head" else 0
        up = workload.accumulation * element * parameters * (2 if is_block else 1)
        down = workload.accumulation * element * parameters
        layers.append(
            layer._replace(
                launches=layer.launches + (own if is_block else ROOT_LAUNCHES if layer.name == "head" else 0),
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
        overlap="uploaded_when_called",
        cpu_adam_factor=element / 4,
    )
