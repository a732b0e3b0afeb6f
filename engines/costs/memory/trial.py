"""GPU memory of the trial that comes before a model is filled where an engine runs its passes block by block
(`engines.model.model_check`): its own passes and the engine's on stand-in weights, in fp32. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from engines.costs import transformer
from engines.shapes import BYTES_PER_ELEMENT, ModelShape, Workload

SEQUENCES, MOST_TOKENS = 2, 32
"""That are tried, and of each of them."""

LOSS_BYTES = 12
"""Of a logit at the peak of the loss' backward pass: its log-softmax and two gradients."""


def trial_moment(shape: ModelShape, workload: Workload) -> dict[str, int]:
    """Bytes by kind at its worst moment, the loss: one stretch of memory for all weights, and what blocks
    keep where vectors alone have gradients. All of it is given back before the model is filled.

    A plain block keeps 10 h values a token: both norms' inputs, attention's four tensors and the activation's
    4 h; GPT-2's activation 12 h more; a gated one 6 h, both sides of attention's keys and values and 3 f. By
    torch's record of allocations on a CPU: 40 h, 88 h and 90 h bytes of OPT, GPT-2 and Qwen2.5 0.5B. `lsp` of
    GPT-2 large had 1.53 GB then on an H200, by which its peak and ten runs that ended in the trial are told.
    """
    tokens = min(workload.batch_size, SEQUENCES) * min(workload.seq_len, MOST_TOKENS)
    if shape.gated_mlp:
        kv = shape.hidden * shape.num_kv_heads // max(1, shape.num_heads)
        kept = 6 * shape.hidden + 2 * kv + 3 * shape.intermediate
    else:
        kept = (10 + 12 * transformer.has_long_activation(shape)) * shape.hidden
    outputs = shape.vocabulary if shape.predicts_tokens else 0
    return {
        "weights": BYTES_PER_ELEMENT["fp32"] * shape.largest_tensor,
        "activations": BYTES_PER_ELEMENT["fp32"] * tokens * kept * shape.num_blocks,
        "logits": LOSS_BYTES * tokens * outputs,
    }


class PeakWithTrial(TypedDict):
    """Of `engines.costs.resources.traffic.GpuMemory`."""

    gpu_memory_bytes: Mapping[str, int]
    gpu_apart_bytes: int
    gpu_pool_bytes: int
    gpu_returned_bytes: int


def with_trial(
    shape: ModelShape, workload: Workload, most: dict[str, int], *, pool: int, stays: int, returned: int
) -> PeakWithTrial:
    """The worse of steps and trial. Of steps: `most` by kind, and apart a graph's `pool`, what `stays` beside
    it, and what is `returned` to the driver before memory runs out."""
    trial = trial_moment(shape, workload)
    more = sum(trial.values()) - sum(most.values())
    stays += pool
    if more <= stays:
        return PeakWithTrial(
            gpu_memory_bytes=most,
            gpu_apart_bytes=stays + returned,
            gpu_pool_bytes=max(pool, more),
            gpu_returned_bytes=returned,
        )
    returned = max(0, returned - (more - stays))
    return PeakWithTrial(
        gpu_memory_bytes=trial, gpu_apart_bytes=returned, gpu_pool_bytes=0, gpu_returned_bytes=returned
    )
