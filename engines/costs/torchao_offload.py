"""What torchao's CPUOffloadOptimizer costs: gradients down, AdamW on the CPU, weights up, every step."""

from __future__ import annotations

from engines.costs import transformer
from engines.costs.native import training_memory
from engines.costs.resources.traffic import Traffic
from engines.settings.first_order import TorchaoOffloadSettings
from engines.shapes import BYTES_PER_ELEMENT, ModelShape, Workload


def traffic(shape: ModelShape, workload: Workload, settings: TorchaoOffloadSettings) -> Traffic:
    """Weights go up once, the sum of the gradients goes down after every micro-batch, as wide as the weights.

    Counted over all parameters; torchao leaves tensors below 4096 elements (norms, biases) on the GPU.

    Adam's states have the weights' precision too, so in bf16 an element moves half the bytes of fp32
    and the update, bound by memory, takes half the time.
    """
    element = BYTES_PER_ELEMENT[workload.dtype]
    block, non_block = shape.block_parameters, shape.non_block_parameters
    layers = []
    for layer in transformer.training_layers(shape, workload):
        parameters = block if layer.name.startswith("block.") else non_block if layer.name == "head" else 0
        layers.append(
            layer._replace(
                h2d_bytes=element * parameters,
                d2h_bytes=workload.accumulation * element * parameters,
                cpu_adam_elements=parameters,
                host_bytes=float((1 + workload.accumulation + 7) * element * parameters),
            )
        )
    weights = element * shape.parameters
    # Gradients that are offloaded are freed one by one; a few of the largest are in flight.
    gradients = 2 * element * shape.largest_tensor if settings.offload_gradients else weights
    pinned = 2 * pinned_copy_bytes(shape, element)
    return Traffic(
        layers=tuple(layers),
        **training_memory(
            shape,
            workload,
            held={"weights": weights},
            gradients=gradients,
            tensors_of_a_matrix=1 if settings.offload_gradients else 2,
        ),
        host_memory_bytes={
            "process": transformer.PROCESS_HOST_BYTES,
            "weights and gradients, pinned": pinned,
            "optimizer": 2 * weights,
        },
        pinned_bytes=pinned,
        overlap="optimizer_after_backward",
        cpu_adam_factor=element / 4,
    )


def pinned_copy_bytes(shape: ModelShape, element: int) -> int:
    """A pinned copy of every parameter, each rounded up to a power of two as torch's allocator does.

    The parameters outside the blocks count as embedding and head of one size; norms and biases are not
    rounded.
    """
    matrices = sum(power_of_two(element * matrix.parameters) for matrix in shape.matrices)
    rest = element * (shape.block_parameters - sum(matrix.parameters for matrix in shape.matrices))
    non_block = element * shape.non_block_parameters
    largest = min(element * shape.largest_tensor, non_block)
    whole, remainder = divmod(non_block, largest) if largest else (0, 0)
    return shape.num_blocks * (matrices + rest) + whole * power_of_two(largest) + remainder


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()
