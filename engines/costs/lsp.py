"""What LSP-Offload costs: native's forward and backward, and per block matrix a d x d core that goes down,
through Adam on the CPU, and comes up.

GPU: weights, one core per matrix, projectors, gradients of what is not projected, and for a moment the
dense projectors and the fp32 update of one matrix. Host: per matrix the pinned core and two moments, fp32.
The twin (`offload=False`) moves and computes the same with nothing pinned and nothing overlapped.
"""

from __future__ import annotations

from dataclasses import replace

from engines.base import BYTES_PER_ELEMENT, LayerTraffic, MatrixShape, ModelShape, Overlap, Traffic, Workload
from engines.costs import forward
from engines.costs.native import ADAM_PASSES
from engines.settings import LspSettings

WIRE_BYTES = 4
"""Per element of a core, each way: fp32."""

PROJECTOR_BYTES = 8
"""Per nonzero: an fp32 value and an int32 column."""

CORE_ADAM_BYTES = 24
"""Host memory traffic per element: core and two moments read, all written over."""

CORE_ADAM_FACTOR = CORE_ADAM_BYTES / 28
"""Time of the core's Adam over that of fused AdamW, per element. It is the same kernel with the core as both
gradient and parameter: 24 bytes move where AdamW moves 28. Seen on one server core: 0.78 to 0.92."""

UPDATE_PASSES = 10
"""fp32 passes over a matrix to apply its update: the product written, the weight widened, decayed, the
update scaled, subtracted and rounded."""

LAUNCHES = 12
"""Per matrix, in launches of a model's own operations (`profiles.predict`): about 40 bare ones to scatter the
projectors, multiply, check and copy, each about a third as slow. Estimated."""


def core_size(matrix: MatrixShape, d: int) -> int:
    """d_eff: side of the core of `matrix`."""
    return min(d, matrix.rows, matrix.columns)


def core_elements(shape: ModelShape, d: int) -> int:
    """Elements of all cores of one block."""
    return sum(core_size(matrix, d) ** 2 for matrix in shape.matrices)


def traffic(shape: ModelShape, workload: Workload, settings: LspSettings) -> Traffic:
    element = BYTES_PER_ELEMENT[workload.dtype]
    cores = shape.num_blocks * core_elements(shape, settings.d)
    host = {"process": forward.PROCESS_HOST_BYTES, "optimizer": 2 * WIRE_BYTES * cores}
    if settings.offload:
        host["cores, pinned"] = WIRE_BYTES * cores
    layers = [_layer(layer, shape, workload, settings) for layer in forward.training_layers(shape, workload)]
    trained_on_gpu = 0
    if settings.train_outer:
        trained_on_gpu = shape.parameters - shape.matrix_parameters
    offloaded: Overlap = "layerwise" if settings.schedule_order == "layerwise" else "optimizer_after_backward"
    return Traffic(
        layers=tuple(layers),
        gpu_memory_bytes=_gpu_memory(shape, workload, settings, element * trained_on_gpu),
        host_memory_bytes=host,
        pinned_bytes=WIRE_BYTES * cores if settings.offload else 0,
        overlap=offloaded if settings.offload else "serial",
        cpu_adam_factor=CORE_ADAM_FACTOR,
    )


def _layer(layer: LayerTraffic, shape: ModelShape, workload: Workload, settings: LspSettings) -> LayerTraffic:
    """`layer` with what the method adds to it."""
    adam_bytes = ADAM_PASSES * BYTES_PER_ELEMENT[workload.dtype] if settings.train_outer else 0
    if layer.name == "head":
        return replace(layer, gpu_bytes=layer.gpu_bytes + adam_bytes * shape.outer_parameters)
    if not layer.name.startswith("block."):
        return layer
    core = core_elements(shape, settings.d)
    plain = shape.block_parameters - sum(matrix.parameters for matrix in shape.matrices)
    times = 1 + workload.accumulation  # compressed once per micro-batch, expanded once
    flops = times * sum(product_flops(matrix, settings.d) for matrix in shape.matrices)
    moved = sum(product_bytes(matrix, settings.d, workload) for matrix in shape.matrices)
    added = replace(
        layer,
        gpu_backward_flops=layer.gpu_backward_flops + flops,
        gpu_bytes=layer.gpu_bytes + moved + adam_bytes * plain,
        launches=layer.launches + LAUNCHES * len(shape.matrices),
    )
    wire = WIRE_BYTES * core
    return replace(
        added,
        h2d_bytes=wire,
        d2h_bytes=wire,
        cpu_adam_elements=core,
        host_bytes=float(2 * wire + CORE_ADAM_BYTES * core),
    )


def product_flops(matrix: MatrixShape, d: int) -> float:
    """Compressing or expanding once, with projectors scattered dense: 2 m n d + 2 min(m, n) d^2."""
    side = core_size(matrix, d)
    return 2.0 * matrix.parameters * side + 2.0 * min(matrix.rows, matrix.columns) * side**2


def product_bytes(matrix: MatrixShape, d: int, workload: Workload) -> float:
    """GPU memory traffic of a step outside the products: projectors scattered (zeroed, then read), and the
    update applied."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    dense = 2 * element * (matrix.rows + matrix.columns) * core_size(matrix, d)
    return float((1 + workload.accumulation) * dense + 4 * UPDATE_PASSES * matrix.parameters)


def _gpu_memory(
    shape: ModelShape, workload: Workload, settings: LspSettings, trained_bytes: int
) -> dict[str, int]:
    """GPU memory at the worst of three moments: the first block's update, the loss, the last gradients."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    cores = WIRE_BYTES * shape.num_blocks * core_elements(shape, settings.d)
    nonzeros = shape.num_blocks * sum(
        (matrix.rows + matrix.columns) * min(settings.r, core_size(matrix, settings.d))
        for matrix in shape.matrices
    )
    largest = max(shape.matrices, key=lambda matrix: matrix.parameters)
    d = core_size(largest, settings.d)
    dense = element * (largest.rows + largest.columns) * d
    between = (4 + element) * min(largest.rows, largest.columns) * d
    held = {
        "weights": element * shape.parameters,
        "optimizer": 2 * trained_bytes,
        "projectors": PROJECTOR_BYTES * nonzeros,
        "cores": cores,
    }
    saved = forward.saved_activation_bytes(shape, workload)
    moments = (
        {"activations": saved, "scratch": 12 * largest.parameters + dense},
        {"activations": saved, "logits": forward.logits_bytes(shape, workload)},
        {
            "activations": forward.backward_activation_bytes(shape, workload),
            "gradients": trained_bytes + element * largest.parameters,
            "scratch": dense + between,
        },
    )
    kept = {"gradients": trained_bytes} if workload.accumulation > 1 else {}
    return forward.largest([{**held, **kept, **moment} for moment in moments])
