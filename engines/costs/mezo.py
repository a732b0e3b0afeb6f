"""What MeZO costs with everything on the GPU: two forward passes and three passes over the weights."""

from __future__ import annotations

from dataclasses import replace

from engines.base import BYTES_PER_ELEMENT, LayerTraffic, ModelShape, Traffic, Workload
from engines.costs import forward
from engines.settings import MezoSettings

PASSES = 3
"""Update, perturb to one side, perturb to the other: each reads the weights, draws z and writes, one
kernel per tensor."""


def traffic(shape: ModelShape, workload: Workload, settings: MezoSettings) -> Traffic:
    """Weights and one scratch copy that holds the perturbed ones, so that the weights stay as they are."""
    weights = BYTES_PER_ELEMENT[workload.dtype] * shape.parameters
    return Traffic(
        layers=tuple(perturbed_layers(shape, workload, outer_passes=PASSES)),
        gpu_memory_bytes={
            "weights": weights,
            "scratch": weights,
            "activations": forward.forward_activation_bytes(shape, workload),
            "logits": forward.logits_bytes(shape, workload, training=False),
        },
        host_memory_bytes={"process": forward.PROCESS_HOST_BYTES},
    )


def perturbed_layers(shape: ModelShape, workload: Workload, outer_passes: int) -> list[LayerTraffic]:
    """Both forward passes with the perturbations and the update of every layer.

    `outer_passes` is the number of passes over the parameters outside the blocks.
    """
    layers = []
    for layer in forward.forward_layers(shape, workload, passes=2):
        if layer.name.startswith("block."):
            layer = _with_passes(layer, workload, PASSES, shape.block_parameters)
            layer = replace(layer, launches=layer.launches + PASSES * forward.block_tensors(shape))
        elif layer.name == "head":
            layer = _with_passes(layer, workload, outer_passes, shape.outer_parameters)
        layers.append(layer)
    return layers


def _with_passes(layer: LayerTraffic, workload: Workload, passes: int, parameters: int) -> LayerTraffic:
    element = BYTES_PER_ELEMENT[workload.dtype]
    return replace(
        layer,
        gpu_bytes=layer.gpu_bytes + passes * 2 * element * parameters,
        gaussians=passes * parameters,
    )
