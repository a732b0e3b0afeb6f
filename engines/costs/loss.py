"""GPU memory of a loss: the logits, what cross-entropy and its backward pass make of them, and the chunks of
the output head in which they are computed where all at once are too many. Imports no torch.
"""

from __future__ import annotations

from engines.shapes import BYTES_PER_ELEMENT, ModelShape, Workload

LOSS_BYTES_TRAINING = {"fp32": 16, "bf16": 14, "fp16": 14}
"""GPU bytes per logit at the peak of cross-entropy's backward pass: the logits, their log-softmax in fp32,
its gradient and the gradient of its input. Fits the torch peaks of torchao with offloaded gradients on an
H200, 4.9 and 16.3 GB at 1.3B and 6.7B."""

LOSS_BYTES_COMPILED = {"fp32": 8, "bf16": 4, "fp16": 4}
"""The same where a compiler fuses the loss: the logits and their gradient. `exact-offload`'s tensors at 1.3B
took 5.66 GB on an H200 (reports/results, 29 November), of which 5.27 are counted without logits."""

LOSS_BYTES_FORWARD = {"fp32": 8, "bf16": 10, "fp16": 10}
"""The same without a backward pass: the logits, their fp32 copy and the exponentials. With Triton a language
model's head needs the logits themselves only."""

LOGIT_MOVES = 6
"""Reads and writes of a logit where a compiler fuses the loss: its product writes it, the loss reads it, the
backward pass reads it and writes its gradient, and two products read that. Counted."""

LOGIT_BYTES_EAGER = {"fp32": 36, "bf16": 42, "fp16": 42}
"""What operations one by one read and write of a logit, products' shares too: the product writes it, and with
a copy in fp32 of 16 bits (6) and its gradient's cast back (6), the log-softmax 8, the gradient of what was
picked 4, that of the log-softmax 12, and two products read it. Counted, as torch's operations lie."""

SOFTMAX_AGAIN_BYTES, SOFTMAX_ROW = 12, 12_000
"""What torch's log-softmax reads again, in fp32, of a row of so many outputs or more, for which a block of
the GPU has no shared memory: twice in the forward pass, for the maximum and the sum, and once in the backward
pass. Counted in its kernels (`cunn_SoftMaxForward`, `cunn_SoftMaxBackward`), which took 13.1 and 13.8 ms of
2.5 billion logits on an H200."""

CHUNK_LOGIT_BYTES_EAGER = {"fp32": 82, "bf16": 88, "fp16": 88}
"""The same of a chunk's loss (`engines.first_order.head_loss.loss_and_slope`), which is written for a
compiler: the log-sum-exp 24, the softmax 16, the label compared and taken off 22, the share 8. Counted
likewise."""

TUNING_BYTES = 63_000_000
"""GPU memory with which torch's compiler clears the second-level cache while it times kernels that it has
just made: as large as that, 60 MiB on an H200. It is there in the first step, where a region first runs."""

TUNED_AT_A_LOSS = 0.5
"""Of that, what counts where the loss of all positions is compiled and engines keep no optimizer on the GPU:
of six jobs of `exact-offload` four had the whole loss without it and one with it
(`tests/studies/prediction_grid_h200`, `_expandable`). Which kernels are timed is the compiler's choice."""

PADDED_TO = 8
"""Elements of 16 bits to which torch's compiler may pad the sides of a product. It times both ways where a
side is off that grid."""

HEAD_CHUNK_BYTES = 32_000_000
"""Weights of the output head that `engines.zeroth_order.chunked_loss` perturbs at a time, on each side."""

HEAD_TOKENS = 4096
"""Tokens whose logits it computes at a time."""


def num_logits(shape: ModelShape, workload: Workload) -> int:
    """Logits of one pass of one micro-batch, were every position labelled."""
    if shape.head == "classification":
        return workload.batch_size * shape.num_labels
    outputs = shape.vocabulary if shape.predicts_tokens else shape.num_labels
    return workload.batch_size * workload.seq_len * outputs


def is_off_grid(shape: ModelShape, workload: Workload) -> bool:
    """Whether rows of logits begin where a 16-bit product cannot read 16 bytes at once: GPT-2's 50257 are
    odd. Forward-only methods take the vocabulary in chunks that lie on the grid."""
    return shape.predicts_tokens and BYTES_PER_ELEMENT[workload.dtype] == 2 and shape.vocabulary % 8 != 0


CHUNK_BYTES_EAGER = 21
"""Of a logit in a chunk's loss that is not compiled, where its gradient is chosen: logits and the gradient of
the chunk before (8 in fp32, and in 16 bits 2 each with 4 of their fp32 copy), three fp32 tensors and a byte.
Counted in `engines.first_order.head_loss`; two jobs of Qwen2.5 that ran out of memory on an H200 asked there
for what makes it up to within 1 % (`tests/studies/prediction_grid_h200_second_afternoon`)."""


def logits_bytes(
    shape: ModelShape, workload: Workload, loss_tokens: int | None = None, *, compiled: bool = False
) -> int:
    """Logits and what the loss and its backward pass make of them, one micro-batch; with `loss_tokens` those
    of so many positions, and what all positions' hidden states get as gradient."""
    tokens = workload.batch_size * workload.seq_len
    count = num_logits(shape, workload)
    if loss_tokens is None or loss_tokens >= tokens or shape.head != "causal_lm":
        return count * (LOSS_BYTES_COMPILED if compiled else LOSS_BYTES_TRAINING)[workload.dtype]
    of_chunk = count * loss_tokens // tokens
    if not compiled:
        return of_chunk * CHUNK_BYTES_EAGER + workload.hidden_bytes(shape)
    there = of_chunk * LOSS_BYTES_COMPILED[workload.dtype]
    before = of_chunk * BYTES_PER_ELEMENT[workload.dtype]  # the gradient of the chunk before
    most = max(there + before, there + TUNING_BYTES)
    if is_off_grid(shape, workload):
        most = max(most, padding_bytes(shape, workload, loss_tokens) + TUNING_BYTES)
    return most + workload.hidden_bytes(shape)


def forgotten_bytes(shape: ModelShape, workload: Workload, loss_tokens: int | None) -> int:
    """Logits of 16 bits, which nothing needs once they have a copy in fp32: of `LOSS_BYTES_TRAINING` what is
    free by the peak where the whole loss is not compiled, of engines that are known to do so. Three tensors
    of fp32 lay at that of `fsdp2-offload` of OPT-125M on an H200, and `native` of Qwen2.5 0.5B with 2.5
    billion logits allocates within 0.3 % of what is counted so. Jobs of `lora` and torchao-offload had 0.2 to
    2.3 bytes a logit more; why is not known."""
    tokens = workload.batch_size * workload.seq_len
    in_chunks = loss_tokens is not None and loss_tokens < tokens and shape.head == "causal_lm"
    if BYTES_PER_ELEMENT[workload.dtype] != 2 or in_chunks:
        return 0
    return 2 * num_logits(shape, workload)


def padding_bytes(shape: ModelShape, workload: Workload, tokens: int) -> int:
    """What torch's compiler has of the output head while it times its product with `tokens` positions padded
    and as it is: the matrix once more, padded, both positions' states, and padded logits."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    logits = tokens * -(-shape.vocabulary // PADDED_TO) * PADDED_TO
    return element * (2 * shape.head_parameters + tokens * shape.hidden + logits)


def moved_bytes(
    shape: ModelShape, workload: Workload, loss_tokens: int | None = None, *, compiled: bool
) -> float:
    """GPU memory traffic of the loss and its backward pass, one micro-batch, `loss_tokens` at a time."""
    if compiled:
        return LOGIT_MOVES * BYTES_PER_ELEMENT[workload.dtype] * float(num_logits(shape, workload))
    if loss_tokens is not None and shape.head == "causal_lm":
        return CHUNK_LOGIT_BYTES_EAGER[workload.dtype] * float(num_logits(shape, workload))
    each = LOGIT_BYTES_EAGER[workload.dtype]
    if shape.predicts_tokens and shape.vocabulary >= SOFTMAX_ROW:
        each += SOFTMAX_AGAIN_BYTES
    return each * float(num_logits(shape, workload))


def head_chunks(shape: ModelShape, workload: Workload) -> tuple[int, int]:
    """Chunks of the vocabulary and of the tokens in which forward-only methods compute the logits."""
    if shape.head != "causal_lm":
        return 1, 1
    rows, tokens = _logits_at_once(shape, workload)
    return -(-shape.vocabulary // rows), -(-workload.batch_size * workload.seq_len // tokens)


def chunked_logits_bytes(shape: ModelShape, workload: Workload, *, has_triton: bool) -> int:
    """Logits that are there at once in a forward-only method, one side's, and what the loss makes of them."""
    per_logit = LOSS_BYTES_FORWARD[workload.dtype]
    if shape.head != "causal_lm":
        return num_logits(shape, workload) * per_logit
    if has_triton:
        per_logit = BYTES_PER_ELEMENT[workload.dtype]
    rows, tokens = _logits_at_once(shape, workload)
    return rows * tokens * per_logit


def head_scratch_bytes(shape: ModelShape, workload: Workload) -> int:
    """Both perturbed copies of what is perturbed of the head at a time."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    if shape.head != "causal_lm":
        return 2 * element * shape.head_parameters
    rows, _ = _logits_at_once(shape, workload)
    return 2 * element * rows * (shape.head_parameters // shape.vocabulary)


def _logits_at_once(shape: ModelShape, workload: Workload) -> tuple[int, int]:
    """Rows of the vocabulary, and tokens. The engine takes the rows down to whole tiles of noise."""
    row_bytes = BYTES_PER_ELEMENT[workload.dtype] * (shape.head_parameters // shape.vocabulary)
    rows = min(shape.vocabulary, max(1, HEAD_CHUNK_BYTES // row_bytes))
    return rows, min(HEAD_TOKENS, workload.batch_size * workload.seq_len)
