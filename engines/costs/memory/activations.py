"""GPU memory of a transformer's activations, and of the moments of a step that hold it. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from engines.costs import transformer
from engines.shapes import BYTES_PER_ELEMENT, ModelShape, Workload

SMALL_BYTES = 1 << 20
"""The largest tensor in the range of small ones (`c10/cuda/CUDACachingAllocator`)."""

ATTENTION_PLACES = 5
"""Tensors of the size of a hidden state that attention has at once."""


def block_activation_bytes(shape: ModelShape, workload: Workload, *, compiled: bool = False) -> int:
    """What one block keeps for its backward pass, one micro-batch, attention without its score matrix.

    At 2 bytes a value: 34 h per token for a plain block (2205.05198 without the 5 a s term); for a gated one
    12 h + 4 h_kv + 8 f and another 8 h of fp32 copies in RMSNorm. Both with the log-sum-exp of attention, 4
    bytes per head and token. Of a plain block 26 h where its activation keeps its result alone, as OPT's
    ReLU does and GELU does not. GPT-2's activation is eight operations, of which eager PyTorch keeps three
    results more, 24 h.

    Compiled regions keep what products and attention need and compute most of the rest again: of a plain
    block 32 h, with ReLU 24 h; of a gated one 12 h + 4 h_kv + 6 f, as the compiler divides it, and no less
    than 16 h + 4 h_kv + 5 f, which 24 blocks of deepseek-coder 1.3B had on an H200, where f is 2.7 h; those
    of Qwen2.5 1.5B, where it is 5.8 h, had the first (`tests/studies/prediction_grid_h200_third_evening`).
    """
    tokens = workload.batch_size * workload.seq_len
    if shape.gated_mlp:
        kv = shape.hidden * shape.num_kv_heads / max(1, shape.num_heads)
        per_token = 20 * shape.hidden + 4 * kv + 8 * shape.intermediate
        if compiled:
            more = max(4 * shape.hidden, shape.intermediate)
            per_token = 12 * shape.hidden + 4 * kv + 5 * shape.intermediate + more
    else:
        of_activation = 8 * (shape.family != "opt")
        if not compiled:
            of_activation += 2 + 24 * transformer.has_long_activation(shape)
        per_token = (24 + of_activation) * shape.hidden
    # Of a mixture: a token's states as they go to each of its experts and as they come from it.
    per_token += 4 * shape.experts_per_token * shape.hidden
    scale = BYTES_PER_ELEMENT[workload.dtype] / 2
    return int(tokens * (per_token * scale + 4 * shape.num_heads))


def small_share(shape: ModelShape, workload: Workload) -> float:
    """Of what a block keeps, what lies in tensors of no more than 1 MiB, which torch's allocator has in a
    range of their own: all, or those of a hidden state's size, or none. Of OPT-1.3B with 2 x 128 tokens,
    whose hidden states are 1 MiB, 0.21 GB were free in it at the peak of a captured step on an H200, counted
    as 0.15."""
    if workload.hidden_bytes(shape) > SMALL_BYTES:
        return 0.0
    wide = workload.batch_size * workload.seq_len * shape.intermediate * BYTES_PER_ELEMENT[workload.dtype]
    if wide <= SMALL_BYTES:
        return 1.0
    if not shape.gated_mlp:
        return 0.5
    kv = shape.hidden * shape.num_kv_heads / max(1, shape.num_heads)
    return (12 * shape.hidden + 4 * kv) / (12 * shape.hidden + 4 * kv + 6 * shape.intermediate)


def product_activation_bytes(shape: ModelShape, workload: Workload) -> int:
    """What one block keeps where it keeps its input and what its products and attention give, one
    micro-batch: at 2 bytes a value 8 h + 4 h_kv + 4 f of a gated block, 12 h + 2 f of a plain one, and the
    log-sum-exp of attention. The last product's is needed by nobody. Without a compiler it is kept as well,
    2 h more, which is not counted: it leaves the block as the next one's input."""
    kv = shape.hidden
    if shape.gated_mlp:
        kv = shape.hidden * shape.num_kv_heads // max(1, shape.num_heads)
    wide = 4 if shape.gated_mlp else 2
    per_token = (
        (8 * shape.hidden + 4 * kv + wide * shape.intermediate) * BYTES_PER_ELEMENT[workload.dtype] // 2
    )
    return workload.batch_size * workload.seq_len * (per_token + 4 * shape.num_heads)


def saved_activation_bytes(
    shape: ModelShape, workload: Workload, passes: transformer.BlockPasses | None = None
) -> int:
    """What all blocks keep until the backward pass of one micro-batch. `passes`: eager ones unless given."""
    how = passes or transformer.BlockPasses.eager(shape, workload)
    recomputed = min(how.recomputed, shape.num_blocks)
    of_kept = block_activation_bytes(shape, workload, compiled=how.compiled)
    if how.keeps_products:
        of_kept = min(of_kept, product_activation_bytes(shape, workload))
    kept = recomputed * workload.hidden_bytes(shape) + (shape.num_blocks - recomputed) * of_kept
    return shape.calls_of_a_block * kept


def backward_activation_bytes(shape: ModelShape, workload: Workload, *, compiled: bool = False) -> int:
    """Activations while the last gradients are made: those of one block, recomputed or kept."""
    return workload.hidden_bytes(shape) + block_activation_bytes(shape, workload, compiled=compiled)


def wide_gradient_bytes(shape: ModelShape, workload: Workload) -> int:
    """Gradients of the wide states of a block's feed-forward part that are there beside all that it keeps: of
    the last product's input, in a gated block of both its factors."""
    wide = 2 if shape.gated_mlp else 1
    width = wide * shape.intermediate
    return workload.batch_size * workload.seq_len * width * BYTES_PER_ELEMENT[workload.dtype]


def forward_activation_bytes(shape: ModelShape, workload: Workload) -> int:
    """Transient activations of one forward pass without a backward pass, beside the block's input: inside the
    feed-forward part, where the residual and the norm's result are there with the widened states, before and
    after the activation and, in a gated block, the gate's partner."""
    wide = 3 if shape.gated_mlp else 2 + 3 * transformer.has_long_activation(shape)
    width = 2 * shape.hidden + wide * shape.intermediate
    return workload.batch_size * workload.seq_len * width * BYTES_PER_ELEMENT[workload.dtype]


def forward_pool_bytes(shape: ModelShape, workload: Workload) -> int:
    """Places of all tensors that one forward pass of a block makes, where none is joined to another: five of
    attention's (the norm's result, queries, keys, values, and what they come to; residuals take one of them
    later) and the wide ones of the feed-forward part. Sixteen jobs of mezo and zo2 on H200s
    (`tests/studies/prediction_grid_h200`) had room for it twice, and no more."""
    wide = 3 if shape.gated_mlp else 2 + 2 * transformer.has_long_activation(shape)
    width = ATTENTION_PLACES * shape.hidden + wide * shape.intermediate
    return workload.batch_size * workload.seq_len * width * BYTES_PER_ELEMENT[workload.dtype]


def peak_moment(moments: Sequence[dict[str, int]]) -> dict[str, int]:
    """The moment of a step that holds most memory; its kinds add up to the peak."""
    return max(moments, key=lambda kinds: sum(kinds.values()))


def apart_bytes(moments: Sequence[dict[str, int]]) -> int:
    """What the peaks of all kinds come to beside the peak of all: the allocator's need where kinds that are
    there at different moments have no place in common. Eager steps come close to it: gradients leave many
    small places, and logits need few large ones."""
    kinds = {kind for moment in moments for kind in moment}
    return sum(max(moment.get(kind, 0) for moment in moments) for kind in kinds) - sum(
        peak_moment(moments).values()
    )
