"""What adapters cost: no gradients of the weights, little to update, and more to start."""

from __future__ import annotations

from collections.abc import Sequence

from engines.costs import transformer
from engines.costs.native import ADAM_PASSES, GRAPH_BYTES, block_passes, training_memory
from engines.costs.resources.traffic import Traffic
from engines.costs.transformer import BlockPasses
from engines.settings.libraries import LoraSettings, QloraSettings
from engines.shapes import BYTES_PER_ELEMENT, MatrixShape, ModelShape, Workload

ADAPTER_LAUNCHES = 12
"""Operations of one adapted layer in a forward pass beyond its own product: casts, two products, a factor,
a sum, and PEFT's Python. Estimated: an H200 took 0.285 s for the 1.3B LLaMA shape with adapters on 168
layers, and 0.178 s without."""

ADAPTER_BYTES_PER_VALUE = 20
"""GPU memory traffic of an adapted layer for each value that enters or leaves it, forward: the input cast up
and down, the sum cast."""

KEPT_BY_ADAPTERS_COMPILED = 2
"""What adapters in compiled blocks keep for the backward pass, bytes for each token and hidden element beside
what comes out of their first products: one more tensor in 16 bits. OPT's activation keeps where it was
positive as well, a byte for each wide element, and blocks whose last operation is a norm have what enters
both in fp32 (`KEPT_IN_FP32`), which autocast runs so on a GPU. As the compiler divides them
(`tests/engines/costs/test_adapter_costs.py`). Beside matrices of four bits that tensor is not there: three
jobs on H200s had 1.3 to 3.3 bytes less (`tests/studies/prediction_grid_h200_expandable`, `_fourth_evening`).
"""

KEPT_BY_ADAPTERS, KEPT_BY_ADAPTERS_OF_OPT = 4, 12
"""The same in blocks that are not compiled, bytes for each token and hidden element: every adapter keeps its
own copy of what enters its layer, in 16 bits; what frozen weights would need is not kept. OPT's activation
keeps its result as well, and of its 26 a plain block keeps 24. Counted in what autograd saves of small models
(`tests/engines/costs/test_adapter_costs.py`)."""

KEPT_IN_FP32, KEPT_IN_FP32_OF_GPT2 = 4, 12
"""What comes to these in a plain block on a GPU, where autocast runs both LayerNorms in fp32, which keep what
enters them so, and GPT-2's power, from which on its activation is fp32. Of OPT-125M 5.5 or more were missing
and of GPT-2 13.5 without them (`tests/studies/prediction_grid_h200_third_evening`, `_second_evening`)."""

ADAPTER_BYTES_COMPILED = 6.5
"""The same in compiled blocks, which fuse the casts of activations: with the backward pass 9.5 bytes for each
value that enters and 10 for each that leaves. Counted in the compiler's code for a block of Qwen2.5."""

ADAPTER_CASTS = 2
"""Kernels of an adapted layer in a compiled block that cast both fp32 adapters to 16 bits in a forward pass,
and as many that cast their gradients back: the compiler makes one for each. Counted there too."""

WIDE_OF_ADAPTERS = 3
"""Of the widest states at which an adapted layer ends or begins, those that adapters add in a compiled block
whose backward pass runs: their own part of the sum, the gradient that goes back through them, and a copy in
which the compiler times the kernel that adds it up. Counted in torch's allocator in three jobs on an H200."""

WIDE_OF_ADAPTERS_AGAIN = 3
"""Of the widest states those that a gated block has beside them where a compiler runs it again: both factors
and what they come to are not kept as sums, so both parts of each are there when the gate's gradient is made,
eleven wide states in all. Counted in the compiler's code for Qwen2.5; jobs of Qwen2.5 0.5B that ran out of
memory on H200s (`tests/studies/prediction_grid_h200_third_morning`) need as much."""

NF4_BYTES = 0.516
"""Of a weight, scales of eight bits included."""

NF4_PLAIN_BYTES = 0.5625
"""The same with scales of fp32."""

DEQUANTIZE_BYTES = 2 + 0.5
"""Memory traffic of making one weight wide, beside reading it in the product."""


DEQUANTIZE_KERNELS, DEQUANTIZE_KERNELS_PLAIN = 3, 1
"""What makes a matrix wide: its scales, their offset, and its weights; with scales of fp32 these alone.
Counted in `bitsandbytes.functional.dequantize_4bit`."""


def _ends_in_fp32(shape: ModelShape, *, quantized: bool) -> bool:
    """Whether hidden states between blocks are in fp32 where adapters run in 16 bits (autocast). LayerNorm
    gives fp32 then, and a matrix of four bits what it gives in the precision of what entered it, so that in a
    plain block the last one's is added in fp32: twelve such states lay at the peak of OPT-125M on an H200."""
    return transformer.normalizes_last(shape) or (quantized and not shape.gated_mlp)


def _trained_of_block(shape: ModelShape, settings: LoraSettings) -> int:
    """Of one block."""
    adapted = (m for m in shape.matrices if settings.adapts(m.name.removesuffix(".weight")))
    return sum(settings.r * (m.rows + m.columns) for m in adapted)


def _in_block_bytes(adapted: Sequence[MatrixShape], workload: Workload, how: BlockPasses) -> int:
    """GPU memory that adapters take in a block whose backward pass runs, one micro-batch. Without a compiler
    each keeps its input, cast to 16 bits for it, and the last one has it in fp32, what comes out, and the
    sum."""
    tokens, element = workload.batch_size * workload.seq_len, BYTES_PER_ELEMENT[workload.dtype]
    if not adapted:
        return 0
    if how.compiled:
        return WIDE_OF_ADAPTERS * element * tokens * max(max(m.rows, m.columns) for m in adapted)
    kept = element * sum(m.columns for m in adapted) if element < 4 else 0
    return tokens * (kept + max(4 * m.columns + 2 * element * m.rows for m in adapted))


def _kept_by_adapters(
    shape: ModelShape,
    workload: Workload,
    adapted: Sequence[MatrixShape],
    how: BlockPasses,
    *,
    rank: int,
    quantized: bool,
) -> int:
    """GPU memory of what adapters of that rank keep in blocks that do not run again, all blocks of one
    micro-batch."""
    recomputed = min(how.recomputed, shape.num_blocks)
    tokens = workload.batch_size * workload.seq_len
    if how.compiled:
        element = BYTES_PER_ELEMENT[workload.dtype]
        of_token = element * rank * len(adapted) + KEPT_BY_ADAPTERS_COMPILED * shape.hidden * (not quantized)
        of_token += shape.intermediate * (shape.family == "opt")
        of_token += KEPT_IN_FP32 * shape.hidden * (element < 4 and transformer.normalizes_last(shape))
        return (shape.num_blocks - recomputed) * tokens * of_token * bool(adapted)
    if BYTES_PER_ELEMENT[workload.dtype] == 4:
        return 0
    per_element = KEPT_BY_ADAPTERS_OF_OPT if shape.family == "opt" else KEPT_BY_ADAPTERS
    if not shape.gated_mlp:
        per_element += KEPT_IN_FP32_OF_GPT2 if transformer.has_long_activation(shape) else KEPT_IN_FP32
    share = sum(m.columns for m in adapted) / max(1, sum(m.columns for m in shape.matrices))
    return int((shape.num_blocks - recomputed) * tokens * shape.hidden * per_element * share)


def _more_again_bytes(
    shape: ModelShape, adapted: Sequence[MatrixShape], workload: Workload, how: BlockPasses
) -> int:
    """What they take beside that in a gated block which the compiler runs again, one micro-batch."""
    if not adapted or not how.compiled or not shape.gated_mlp:
        return 0
    wide = workload.batch_size * workload.seq_len * shape.intermediate
    return WIDE_OF_ADAPTERS_AGAIN * BYTES_PER_ELEMENT[workload.dtype] * wide


def lora(shape: ModelShape, workload: Workload, settings: LoraSettings) -> Traffic:
    """2 bytes per parameter in bf16, 16 per parameter of the adapters, and activations."""
    return _traffic(shape, workload, settings, BYTES_PER_ELEMENT[workload.dtype], wide=0, widening_kernels=0)


def qlora(shape: ModelShape, workload: Workload, settings: QloraSettings) -> Traffic:
    """Matrices of four bits, one wide at a time; 16 bytes per parameter of adapters; activations."""
    per_weight = NF4_BYTES if settings.double_quant else NF4_PLAIN_BYTES
    widest = max((each.parameters for each in shape.matrices), default=0)
    return _traffic(
        shape,
        workload,
        settings,
        per_weight,
        wide=2 * BYTES_PER_ELEMENT[workload.dtype] * widest,
        widening_kernels=DEQUANTIZE_KERNELS if settings.double_quant else DEQUANTIZE_KERNELS_PLAIN,
    )


def _traffic(
    shape: ModelShape,
    workload: Workload,
    settings: LoraSettings,
    matrix_bytes: float,
    wide: int,
    widening_kernels: int,
) -> Traffic:
    """`wide`: bytes of matrices that are made wide, one after the other, by so many kernels each."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    adapters = _trained_of_block(shape, settings)
    adapted = [m for m in shape.matrices if settings.adapts(m.name.removesuffix(".weight"))]
    how = block_passes(shape, workload, settings)
    passes = 3 + how.recomputed / shape.num_blocks  # forward, two of the backward pass, and again
    own = transformer.block_forward_flops(shape, workload)
    values = sum(m.rows + m.columns for m in adapted) * workload.tokens_per_step
    matrices = sum(m.parameters for m in shape.matrices)
    in_graphs = how.captured or how.compiled
    casts = ADAPTER_CASTS * (passes - 1) if element < 4 and how.compiled else 0.0
    widened = 0.0 if wide == 0 else DEQUANTIZE_BYTES * (passes - 1) * workload.accumulation * matrices
    widening = widening_kernels * (passes - 1) * len(shape.matrices)
    layers = []
    for layer in transformer.training_layers(shape, workload, how):
        if layer.name.startswith("block."):
            flops = 2.0 * adapters * workload.tokens_per_step
            layer = layer._replace(
                gpu_forward_flops=layer.gpu_forward_flops + flops,
                # A frozen matrix has no gradient of its own: one product of the backward pass less.
                gpu_backward_flops=layer.gpu_backward_flops - own + (passes - 1) * flops,
                gpu_bytes=layer.gpu_bytes
                + (ADAPTER_BYTES_COMPILED if how.compiled else ADAPTER_BYTES_PER_VALUE) * passes / 2 * values
                + ADAM_PASSES * 4 * adapters
                + widened,
                products=layer.products - len(shape.matrices) * workload.accumulation,
                # Products of an adapter are narrow, and take what they move.
                kernels=layer.kernels
                + int(int(2 * passes + casts) * len(adapted) + widening) * workload.accumulation * in_graphs,
                launches=layer.launches
                + (0 if how.captured else int((passes - 1) * ADAPTER_LAUNCHES) * len(adapted))
                * workload.accumulation,
            )
        elif layer.name == "head" and shape.predicts_tokens:
            layer = layer._replace(gpu_backward_flops=layer.gpu_backward_flops / 2)
        layers.append(layer)
    total = shape.num_blocks * adapters
    rest = shape.parameters - shape.matrix_parameters
    return Traffic(
        layers=tuple(layers),
        **training_memory(
            shape,
            workload,
            held={
                "weights": int(matrix_bytes * shape.matrix_parameters) + element * rest,
                "adapters": 4 * total,
                "optimizer": 8 * total,
                "buffers": wide,
                "kept by adapters": _kept_by_adapters(
                    shape, workload, adapted, how, rank=settings.r, quantized=wide > 0
                ),
            },
            gradients=4 * total,
            passes=how,
            tensors_of_a_matrix=1 if wide == 0 else 0,
            more_between=workload.hidden_bytes(shape)
            if element < 4 and _ends_in_fp32(shape, quantized=wide > 0)
            else 0,
            more_in_block=_in_block_bytes(adapted, workload, how),
            more_again=_more_again_bytes(shape, adapted, workload, how) if wide == 0 else 0,
        ),
        gpu_held_bytes=shape.num_blocks * GRAPH_BYTES if how.captured else 0,
        host_memory_bytes={"process": transformer.PROCESS_HOST_BYTES},
    )
