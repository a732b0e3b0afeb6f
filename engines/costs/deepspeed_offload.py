"""What DeepSpeed's offload costs on one GPU: fp32 masters, moments and gradients on the host. Not measured
yet.

Bytes per parameter follow DeepSpeed's own accounts (runtime/zero/stage_1_and_2.py, stage3.py): on the host 4
of masters, 4 of gradients, 8 of moments and 2 of a staging copy.
"""

from __future__ import annotations

from dataclasses import replace

from engines.costs import transformer
from engines.costs.fsdp2_offload import BLOCKS_UP
from engines.costs.native import training_memory
from engines.costs.resources.traffic import Traffic
from engines.settings.libraries import DeepspeedSettings, ZenflowSettings
from engines.shapes import BYTES_PER_ELEMENT, ModelShape, Workload

MASTER, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes per parameter on the host, in fp32."""


def zero2(shape: ModelShape, workload: Workload, settings: DeepspeedSettings) -> Traffic:
    """Weights on the GPU; every micro-batch sends its gradients down."""
    return _offloaded(shape, workload, settings, uploads=1.0, late=1.0)


def zenflow(shape: ModelShape, workload: Workload, settings: ZenflowSettings) -> Traffic:
    """ZeRO-2 with the most important share of the columns updated on the GPU, and all others every
    `update_interval` steps, behind the steps that follow."""
    late = (1 - settings.topk_ratio) / settings.update_interval
    found = _offloaded(shape, workload, settings, uploads=late, late=late)
    chosen = int(3 * 4 * settings.topk_ratio * shape.parameters)
    return replace(
        found,
        gpu_memory_bytes={**found.gpu_memory_bytes, "selected columns": chosen},
        overlap="blockwise" if settings.overlap_step else found.overlap,
    )


def zero3(shape: ModelShape, workload: Workload, settings: DeepspeedSettings) -> Traffic:
    """Weights on the host too: each block's go up in the forward and in the backward pass of a
    micro-batch."""
    return _offloaded(shape, workload, settings, uploads=2.0 * workload.accumulation, late=1.0, streams=True)


def _offloaded(
    shape: ModelShape,
    workload: Workload,
    settings: DeepspeedSettings,
    *,
    uploads: float,
    late: float,
    streams: bool = False,
) -> Traffic:
    """`uploads`: how often the weights go up in a step. `late`: share of the parameters that the CPU updates
    in a step, on average. `streams`: only a few blocks' weights are on the GPU."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    layers = []
    for layer in transformer.training_layers(shape, workload):
        is_block = layer.name.startswith("block.")
        parameters = (
            shape.block_parameters if is_block else shape.non_block_parameters if layer.name == "head" else 0
        )
        up = int(uploads * element * parameters)
        down = workload.accumulation * element * parameters
        updated = int(late * parameters)
        layers.append(
            layer._replace(
                h2d_bytes=up, d2h_bytes=down, cpu_adam_elements=updated,
                host_bytes=float(up + down + 7 * 4 * updated),
            )
        )  # fmt: skip
    weights = element * shape.parameters
    bucket = 2 * element * settings.reduce_bucket_size
    blocks_up = element * (shape.non_block_parameters + BLOCKS_UP * shape.block_parameters)
    staging = element * shape.parameters
    pinned = (MASTER + GRADIENT) * shape.parameters + staging
    if streams:
        pinned = GRADIENT * shape.parameters + staging
    return Traffic(
        layers=tuple(layers),
        **training_memory(
            shape,
            workload,
            held={"weights": blocks_up if streams else weights, "buckets": bucket},
            gradients=2 * element * shape.largest_tensor,
        ),
        host_memory_bytes={
            "process": transformer.PROCESS_HOST_BYTES,
            "masters, gradients and a copy of the weights": (MASTER + GRADIENT) * shape.parameters + staging,
            "optimizer": MOMENTS * shape.parameters,
        },
        pinned_bytes=pinned,
        overlap="optimizer_after_backward",
    )
