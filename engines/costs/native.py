"""What native fine-tuning costs: everything on the GPU, AdamW with states in the weights' precision."""

from __future__ import annotations

from dataclasses import replace

from engines.costs import transformer
from engines.costs.traffic import Traffic
from engines.settings.first_order import NativeSettings
from engines.shapes import BYTES_PER_ELEMENT, ModelShape, Workload

ADAM_PASSES = 7
"""Fused AdamW reads weight, gradient and two moments and writes all but the gradient."""


def traffic(shape: ModelShape, workload: Workload, settings: NativeSettings) -> Traffic:
    """8 bytes per parameter in bf16, 16 in fp32, and activations."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    layers = transformer.training_layers(shape, workload)
    outer = ADAM_PASSES * element * shape.outer_parameters
    block = ADAM_PASSES * element * shape.block_parameters
    updated = [
        replace(layer, gpu_bytes=layer.gpu_bytes + (block if layer.name.startswith("block.") else 0))
        for layer in layers
    ]
    updated[-1] = replace(updated[-1], gpu_bytes=updated[-1].gpu_bytes + outer)
    return Traffic(
        layers=tuple(updated),
        gpu_memory_bytes=training_memory(
            shape,
            workload,
            held={"weights": element * shape.parameters, "optimizer": 2 * element * shape.parameters},
            gradients=element * shape.parameters,
        ),
        host_memory_bytes={"process": transformer.PROCESS_HOST_BYTES},
    )


def training_memory(
    shape: ModelShape, workload: Workload, held: dict[str, int], gradients: int
) -> dict[str, int]:
    """GPU memory at the worse of two moments: the loss, when no gradient is there yet and every block's
    saved activations are, and the end of the backward pass, when it is the other way round.

    `held` is there throughout; `gradients` are freed between steps, but not between micro-batches.
    """
    at_loss = {
        **held,
        "gradients": gradients if workload.accumulation > 1 else 0,
        "activations": transformer.saved_activation_bytes(shape, workload),
        "logits": transformer.logits_bytes(shape, workload),
    }
    at_end = {
        **held,
        "gradients": gradients,
        "activations": transformer.backward_activation_bytes(shape, workload),
        "logits": 0,
    }
    return transformer.peak_moment([at_loss, at_end])
