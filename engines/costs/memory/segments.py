"""GPU memory that torch's allocator takes for tensors and cannot give to others. Imports no torch."""

from __future__ import annotations

from functools import cache

from engines.costs import transformer
from engines.costs.memory import activations
from engines.shapes import BYTES_PER_ELEMENT, Dtype, ModelShape, Workload

SMALL_BYTES, LARGE_BYTES, SEGMENT_BYTES, ROUND_BYTES = 1 << 20, 10 << 20, 20 << 20, 2 << 20
"""torch's allocator (`c10/cuda/CUDACachingAllocator`): tensors up to the first share segments of their own,
below the second they are cut from segments of the third, above that they have whole ones of the fourth."""

KEPT_HIDDEN_STATES = 8
"""Tensors of the size of a hidden state that a compiled block keeps."""

PLACES_OF_LOGITS = 3
"""Of a loss in chunks that is compiled: a chunk's logits, their gradient, and that of the chunk before."""


def lost_between_matrices(shape: ModelShape, dtype: Dtype) -> int:
    """GPU memory that torch's allocator takes for the matrices of all blocks and cannot give to others:
    tensors of 1 to 10 MiB are cut from segments of 20 MiB, larger ones have segments of whole 2 MiB. Of
    OPT-1.3B in bf16 8 % (matrices of 8 MiB), of OPT-350M nothing (2 and 8 MiB)."""
    sizes = [matrix.parameters * BYTES_PER_ELEMENT[dtype] for matrix in shape.matrices]
    return _segments_of(tuple(sizes), shape.num_blocks) - shape.num_blocks * sum(sizes)


@cache
def _segments_of(sizes: tuple[int, ...], times: int) -> int:
    """Bytes of the segments that torch's allocator takes for tensors of these sizes, so many times over, each
    in the smallest place that is free and large enough."""
    taken = 0
    free: list[int] = []
    for size in times * sizes:
        if size <= SMALL_BYTES:
            taken += size
            continue
        place = min((each for each in free if each >= size), default=0)
        if place:
            free.remove(place)
        else:
            place = SEGMENT_BYTES if size < LARGE_BYTES else _whole(size)
            taken += place
        if place - size > SMALL_BYTES:
            free.append(place - size)
    return taken


def lost_between_hidden_states(shape: ModelShape, workload: Workload, kept_bytes: int) -> int:
    """The same of the hidden states among `kept_bytes` that a block keeps: of each segment what is
    left when no whole one fits any more."""
    hidden = workload.hidden_bytes(shape)
    if not SMALL_BYTES < hidden <= SEGMENT_BYTES // 2:
        return 0
    unused = 1 - SEGMENT_BYTES // hidden * hidden / SEGMENT_BYTES
    block = activations.block_activation_bytes(shape, workload, compiled=True)
    return int(unused * kept_bytes * min(1.0, KEPT_HIDDEN_STATES * hidden / block))


def gradients_among_activations(
    shape: ModelShape, workload: Workload, passes: transformer.BlockPasses
) -> float:
    """Share of the blocks whose gradients lie where activations were, so that nothing is lost between them:
    of blocks that keep more than their gradients take, in places of hidden states that have segments of their
    own. Each is given back as a whole by then, and matrices fill it.

    Of deepseek-coder 1.3B with 4,096 tokens, all blocks kept, `native` needed 15.98 GB or less on an H200,
    where 16.14 GB are tensors and what lies between four of each matrix; three leave 15.9.
    """
    if workload.hidden_bytes(shape) <= LARGE_BYTES:
        return 0.0
    kept = activations.block_activation_bytes(shape, workload, compiled=passes.compiled)
    if kept < BYTES_PER_ELEMENT[workload.dtype] * shape.block_parameters:
        return 0.0
    return 1 - min(passes.recomputed, shape.num_blocks) / shape.num_blocks


def stays_in_logits(shape: ModelShape, workload: Workload) -> bool:
    """Whether what lies apart of the logits cannot be given back for them, where hidden states wait on the
    GPU while weights come and go: hidden states have segments of their own then. torch gives the free ones
    back, all of them, before memory runs out in the first loss; the next step's blocks take places that the
    logits have left in their stead, some of them until the loss, and a part that is taken keeps the whole.

    `lsp` of OPT-350M ran out so in its second step with 16,384 tokens, hidden states of 34 MB and 1.6 GB of
    logits; smaller hidden states are cut from segments of which others keep a part, and jobs with them ran
    (`tests/studies/prediction_grid_h200_second_afternoon`).
    """
    return workload.hidden_bytes(shape) > LARGE_BYTES


def lost_in_head_gradient(shape: ModelShape, workload: Workload) -> int:
    """GPU memory in the place of the head's own gradient that is lost while it is made anew in the next step:
    the logits' gradient, which is smaller, lies there, and a part that is taken keeps the whole. It lies
    there where its own place was given back, so that room for that is enough, too.

    `exact-offload` of Qwen2.5 0.5B with 512 tokens ran out of memory on an H200 when it asked for its 272 MB,
    with at least 129 MB free in pieces: 117 lie beside the logits' 156 in the place of the step before, and
    other pieces were 18 where it ran (`tests/studies/prediction_grid_h200_second_afternoon`).
    """
    if shape.head != "causal_lm":
        return 0
    element = BYTES_PER_ELEMENT[workload.dtype]
    logits = element * workload.batch_size * workload.seq_len * shape.vocabulary
    return max(0, min(element * shape.head_parameters - logits, logits))


def lost_in_logits(shape: ModelShape, workload: Workload, loss_tokens: int | None) -> int:
    """GPU memory in the places of a chunk's logits that the backward pass cannot use, where it is not
    captured. torch's allocator cuts its widest states from them; what is left of each place holds no other,
    and is not given back, since a part of it is taken. Logits narrower than that are given back whole.

    Of Qwen2.5 0.5B with 8 x 1024 tokens and chunks of 1024 that is 3 x 70 of 298 MiB. A replay of its
    allocations by the allocator's rules, from the code that torch's compiler makes for a GPU, needs 240 MB
    more than with chunks of 256, whose logits are narrower than a wide state; a run on an H200 ended with
    187 MB or more in pieces (`tests/studies/prediction_grid_h200_noon`).
    """
    tokens = workload.batch_size * workload.seq_len
    if loss_tokens is None or loss_tokens >= tokens or shape.head != "causal_lm":
        return 0
    element = BYTES_PER_ELEMENT[workload.dtype]
    place = _whole(element * loss_tokens * shape.vocabulary)
    wide = element * tokens * shape.intermediate
    return 0 if place < wide or wide < LARGE_BYTES else PLACES_OF_LOGITS * (place % _whole(wide))


def _whole(size: int) -> int:
    """A segment of its own for so many bytes."""
    return -(-size // ROUND_BYTES) * ROUND_BYTES
