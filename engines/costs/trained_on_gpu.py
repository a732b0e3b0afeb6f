"""What the rows cost that keep everything on the GPU and train all weights: fewer bytes than `native`, or
freed earlier."""

from __future__ import annotations

from dataclasses import replace

from engines.costs import transformer
from engines.costs.native import ADAM_PASSES, ADAM_SLOWDOWN, GRAPH_BYTES, block_passes, training_memory
from engines.costs.resources.traffic import LayerTraffic, RareWork, Traffic
from engines.costs.transformer import BlockPasses
from engines.settings.libraries import AdamW8bitSettings, BackwardOptimizerSettings, GaloreSettings
from engines.shapes import BYTES_PER_ELEMENT, ModelShape, Workload

EIGHT_BIT_MOMENTS = 2 * (1 + 4 / 256)
"""Bytes per parameter: both moments as uint8, an fp32 scale for every 256 (bitsandbytes)."""

PAGED_FACTOR = 2
"""Time of a page on the link over that of a copy."""

IN_FLIGHT = 2
"""Gradients of the size of the largest tensor that an optimizer inside the backward pass has at once."""

OPTIMIZER_IN_BACKWARD_LAUNCHES = 5
"""What the Python of one torch optimizer for one parameter takes, in operations without autograd, called by
the thread of the backward pass. By time on a CPU (`tests/studies/launch_counts.py`), without what CUDA adds:
four jobs on H200s, of 288 to 432 of them a step, took 5 to 7.8 beside what starts their blocks."""

UPDATE_KERNELS = 2
"""Of one parameter in a CUDA graph: its count of steps, and fused AdamW."""

GALORE_LAUNCHES = 6
"""The same for one parameter of galore-torch's AdamW: 83 us on an H200's host where an operation took 14.4,
the captured passes left out (`tests/studies/launch_counts_h200_20261201.json`)."""

DECOMPOSITION_S = 1.6e-11
"""A singular value decomposition of an (m, n) matrix over m n min(m, n): those of the 168 matrices of the
1.3B LLaMA shape took 40 s on an H200 (engines/EXPERIMENTS.md; two runs)."""

EIGHT_BIT_LAUNCHES = 4
EIGHT_BIT_S = 2e-11
"""The same for one parameter of bitsandbytes' AdamW8bit, which waits for the GPU after each, and what its
kernel takes for each element, which finds both moments in a table and is slower than its memory. From seven
steps of five models on H200s: 62 us beside the passes for a parameter of the smallest, 178 for one of the
largest (`tests/studies/prediction_grid_h200_morning`, reports/results/deepseek-coder-1.3b-rows_*)."""


def adamw_8bit(shape: ModelShape, workload: Workload, settings: AdamW8bitSettings) -> Traffic:
    """6 bytes per parameter in bf16 and the scales, and activations.

    Paged moments count as the host's altogether, and go up and down once a step: what a full GPU comes to.
    """
    element = BYTES_PER_ELEMENT[workload.dtype]
    moments = int(EIGHT_BIT_MOMENTS * shape.parameters)
    # Weight read and written, gradient read, both moments read and written.
    passes = block_passes(shape, workload, settings)
    on_gpu = _updated(
        shape,
        workload,
        passes,
        3 * element + 2 * EIGHT_BIT_MOMENTS,
        waited=EIGHT_BIT_LAUNCHES * transformer.num_tensors(shape),
        unrated_s=EIGHT_BIT_S,
    )
    held = {"weights": element * shape.parameters, "optimizer": 0 if settings.paged else moments}
    gradients = element * shape.parameters
    return Traffic(
        layers=tuple(_with_paging(layer, shape) for layer in on_gpu) if settings.paged else on_gpu,
        **training_memory(
            shape,
            workload,
            held=held,
            gradients=gradients,
            passes=passes,
            tensors_of_a_matrix=2,
            forgets_logits=True,
        ),
        gpu_held_bytes=graph_bytes(shape, passes),
        host_memory_bytes={
            "process": transformer.PROCESS_HOST_BYTES,
            "optimizer": moments if settings.paged else 0,
        },
    )


def _with_paging(layer: LayerTraffic, shape: ModelShape) -> LayerTraffic:
    """The driver moves pages at half of what the link does (bitsandbytes' documentation)."""
    non_block = shape.non_block_parameters if layer.name == "head" else 0
    parameters = shape.block_parameters if layer.name.startswith("block.") else non_block
    paged = int(PAGED_FACTOR * EIGHT_BIT_MOMENTS * parameters)
    return layer._replace(h2d_bytes=paged, d2h_bytes=paged)


def backward_optimizer(shape: ModelShape, workload: Workload, settings: BackwardOptimizerSettings) -> Traffic:
    """6 bytes per parameter in bf16, gradients in flight, and activations."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    passes = replace(block_passes(shape, workload, settings), captured=settings.captures)
    tensors = transformer.num_tensors(shape)
    slowdown = ADAM_SLOWDOWN if passes.captured else 1.0  # without a graph it hides behind the launches
    layers = _updated(
        shape,
        workload,
        passes,
        slowdown * ADAM_PASSES * element,
        0 if passes.captured else OPTIMIZER_IN_BACKWARD_LAUNCHES * tensors,
        kernels=UPDATE_KERNELS * tensors if passes.captured else 0,
    )
    return Traffic(
        layers=layers,
        **training_memory(
            shape,
            workload,
            held={"weights": element * shape.parameters, "optimizer": 2 * element * shape.parameters},
            gradients=IN_FLIGHT * element * shape.largest_tensor,
            passes=passes,
            tensors_of_a_matrix=3,
            forgets_logits=True,
        ),
        gpu_held_bytes=graph_bytes(shape, passes),
        host_memory_bytes={"process": transformer.PROCESS_HOST_BYTES},
    )


def galore(shape: ModelShape, workload: Workload, settings: GaloreSettings) -> Traffic:
    """4 bytes per parameter in bf16, moments and projections of low rank, and activations; the singular value
    decompositions of one step in `update_proj_gap` apart."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    low_rank = sum(
        min(settings.rank, each.rows, each.columns)
        * (2 * max(each.rows, each.columns) + min(each.rows, each.columns))
        for each in shape.matrices
    )
    plain = shape.num_blocks * transformer.vector_parameters(shape) + shape.non_block_parameters
    states = element * (shape.num_blocks * low_rank + 2 * plain)
    largest = max((each.parameters for each in shape.matrices), default=0)
    passes = block_passes(shape, workload, settings)
    projected = 4.0 * settings.rank * sum(each.parameters for each in shape.matrices)
    launches = GALORE_LAUNCHES * transformer.num_tensors(shape)
    layers = [
        layer._replace(
            gpu_backward_flops=layer.gpu_backward_flops
            + (projected if layer.name.startswith("block.") else 0.0),
        )
        for layer in _updated(shape, workload, passes, 6 * element, launches)
    ]
    return Traffic(
        layers=tuple(layers),
        **training_memory(
            shape,
            workload,
            held={
                "weights": element * shape.parameters,
                "optimizer": states,
                "buffers": 2 * element * largest,  # what is projected back, beside the weight
            },
            gradients=element * shape.parameters,
            passes=passes,
            tensors_of_a_matrix=2,
        ),
        gpu_held_bytes=graph_bytes(shape, passes),
        host_memory_bytes={"process": transformer.PROCESS_HOST_BYTES},
        rare=RareWork(
            every_steps=settings.update_proj_gap,
            gpu_s=DECOMPOSITION_S
            * shape.num_blocks
            * sum(each.parameters * min(each.rows, each.columns) for each in shape.matrices),
        ),
    )


def graph_bytes(shape: ModelShape, passes: BlockPasses) -> int:
    """GPU memory of the captured passes outside torch's allocator."""
    return shape.num_blocks * GRAPH_BYTES if passes.captured else 0


def _updated(
    shape: ModelShape,
    workload: Workload,
    passes: BlockPasses,
    bytes_per_parameter: float,
    python_launches: int = 0,
    waited: int = 0,
    unrated_s: float = 0.0,
    kernels: int = 0,
) -> tuple[LayerTraffic, ...]:
    """Forward and backward of every layer with an update of its parameters: `python_launches`,
    `waited_launches` and `kernels` of a block's, `unrated_s` of an element."""
    parameters = {"embedding": 0, "head": shape.non_block_parameters}
    return tuple(
        layer._replace(
            gpu_bytes=layer.gpu_bytes
            + bytes_per_parameter * parameters.get(layer.name, shape.block_parameters),
            python_launches=python_launches if layer.name.startswith("block.") else 0,
            waited_launches=waited if layer.name.startswith("block.") else 0,
            kernels=layer.kernels + (kernels if layer.name.startswith("block.") else 0),
            unrated_s=unrated_s * parameters.get(layer.name, shape.block_parameters),
        )
        for layer in transformer.training_layers(shape, workload, passes)
    )
