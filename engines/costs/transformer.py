"""What every method pays: floating-point operations of a transformer, and what starts them. Its activations
are in `memory.activations`, its logits in `loss`.

Counts follow Korthikanti et al. (2205.05198) and hold for any Hugging Face model of the shape. A layer
is the embedding, one block or the head; counts are per optimizer step, all micro-batches together,
unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from engines.costs import loss
from engines.costs.resources.traffic import LayerTraffic
from engines.shapes import BYTES_PER_ELEMENT, ENCODER_FAMILIES, ModelShape, Workload

PLAIN_ELEMENTWISE_BYTES = 45
"""GPU memory traffic of norms, activations and residuals in one forward pass of a plain block (LayerNorm,
GELU or ReLU), bytes per token and hidden element at 2 bytes each. Counted kernel by kernel: two LayerNorms
8, two residuals 12, the activation 16, biases and copies the rest. Fits OPT-13B's two forwards, 0.184 s on
an H200."""

LONG_ACTIVATION_BYTES = 128
"""What GPT-2's activation adds: eight operations that read 10 times and write 8, where one reads and writes,
on 4 h elements. Counted."""

GATED_ELEMENTWISE_BYTES = 200
"""The same for a gated block with RMSNorm in fp32, rotary embedding and SwiGLU, each a row of separate
kernels in eager PyTorch. Fits forward and backward of the 6.7B LLaMA shape, 0.470 s on an H200."""

COMPILED_PLAIN_ELEMENTWISE_BYTES = 30
COMPILED_GATED_ELEMENTWISE_BYTES = 45
"""The same where a compiler fuses what lies between two products. Counted for a gated block, hidden h and
feed-forward 2.7 h: two norms with their residuals 20, rotary embedding 8, SwiGLU 16. With it forward and
backward pass of the 1.3B LLaMA shape take 35 ms less, which was measured on an H200."""

BACKWARD_ELEMENTWISE = 2.6
"""Elementwise traffic of a backward pass over that of its forward pass (input, saved value and two
gradients instead of input and output)."""

PLAIN_LAUNCHES = 14
GATED_LAUNCHES = 40
"""Kernels of one forward pass of a block; a backward pass starts about twice as many. Those of a gated block
are what the probe counts an operation by (`profiles.probe.launches`)."""

PLAIN_STARTS = 28
"""What starting a plain block takes, in those: views, and the Python of its modules, are not kernels. By time
on a CPU: OPT's 24 to 31, GPT-2's 24 to 36, RoBERTa's 28 to 33, a gated one's 40."""

STACKED_PLAIN_KERNELS = 22
STACKED_GATED_KERNELS = 63
"""Kernels of both forward passes of a block in one batch, every product started once per half, without those
that make noise; norms of a gated block run once per half too, eight kernels each time, and their halves are
put together. Those of a gated block are counted as torch runs them
(tests/engines/costs/test_counted_operations.py), the others from the modules, not traced."""

STACKED_PLAIN_LAUNCHES, STACKED_GATED_LAUNCHES = 119, 182
"""What it takes to start those one by one, in launches: the engine's Python visits each matrix by itself. By
time on an H200's host, in operations that each process timed itself: steps of OPT-13B, and two of
DeepSeek-Coder 6.7B in processes of 14.6 and 22.2 us (`tests/studies/prediction_grid_h200_second_afternoon`),
less `ENTRY_LAUNCHES`.
They are 155 and 209 operations of torch, which on a CPU, without a driver to call, take as long as 103 and
115."""

COMPILED_KERNELS = 6
"""Kernels of one forward pass of a compiled block beside its products: attention, both norms with their
residuals, rotary embedding or biases, the activation. Counted."""

ATTENTION_SHARE, ATTENTION_SHARE_WIDE = 0.4, 0.5
"""Rate of attention's kernels on a Hopper GPU over that of a large product, with heads of 64 to 127 features
and with wider ones: FlashAttention-2 reaches 200 to 290 and 250 to 350 TFLOP/s there (Shah et al., 2024,
arXiv 2407.08608), products 680. A causal kernel leaves half of the scores out, which `block_forward_flops`
counts."""

WIDE_HEAD = 128

ATTENTION_BACKWARD = 2.5
"""Operations of attention's backward pass over those of its forward pass: it makes the scores anew. Counted;
for other products it is 2."""

GRAPH_SCRATCH_BYTES = 400_000_000
"""Perturbed copies of a whole block's weights up to which blocks are run as CUDA graphs
(`engines.zeroth_order.perturbed_model`). A larger block keeps the GPU busy for longer than the CPU needs to
start its kernels: 2.5 ms on an H200 machine."""

GRAPH_LAUNCHES = 22
"""What it takes to start a block then, in launches: copies in and out, the graph, noise, and the engine's
Python around them. 19 by time on an H200's host with a tiny Llama
(`tests/studies/launch_counts_h200_20261130.json`), and 22 where RoBERTa and GPT-2 large took 13.2 and 13.5 ms
(`tests/studies/prediction_grid_h200_second_evening`)."""

ENTRY_LAUNCHES = 220
"""What both sides of a micro-batch take before their first block, for which the GPU waits: embeddings and
their noise, masks, positions, and what blocks are called with, each side by the model's own forward. With
`STEP_LAUNCHES` and the head's it makes 300 outside of the blocks, by time on that host."""

STEP_LAUNCHES = 50
"""What nothing hides between two steps, in launches without autograd: the loss is read, the next batch goes
up, and the GPU waits. 0.4 to 1.4 ms of mezo and zo2 on H200s (`idle_s` in reports/results)."""

CHECKPOINT_LAUNCHES = 10
"""What `torch.utils.checkpoint` adds to a compiled block, which has it inside, beside the pass that runs
again: 6 to 12 by time on a CPU."""
SAVED_PLAIN, SAVED_GATED = 28, 38
"""Tensors that a block's operations save for the backward pass one by one. Counted."""
SAVED_LAUNCHES = 3.7
"""What `torch.utils.checkpoint` takes for each of them, in launches: its Python is called when one is saved,
when it is made again, and when it is wanted. By time on an H200's host, of Llama, over and above the pass
that runs again (`tests/studies/launch_counts_h200_20261130.json`); on a CPU 2.9 to 3.1 of Llama, Qwen2, OPT
and RoBERTa."""

COMPILED_LAUNCHES = 25
"""What starting one pass of a compiled block takes that is not captured, a backward pass being two: whatever
it was before, a compiler leaves the same few kernels, and finding the block's form, autograd's wrappers and
the Python around each kernel take longer than starting it. By time forward and backward of a block take 75
to 80 operations with autograd on a CPU, of Llama, Qwen2 and OPT alike, where they take 115, 122 and 82 eager,
and 62 of Llama and 79 of OPT on an H200's host (`tests/studies/launch_counts_h200_20261130.json`)."""
HEAD_LAUNCHES = 12
PLAIN_ENTRY_LAUNCHES, GATED_ENTRY_LAUNCHES = 10, 60
"""What a micro-batch that trains takes outside of the blocks beside its head: embeddings, masks and
positions, of gated models their rotary embedding. By time on a CPU the models without a head take 6 and 7
of OPT and GPT-2, 61 and 98 of Llama and Qwen2."""
UPDATE_LAUNCHES = 50
"""What torch's fused optimizer takes in a step, its gradients cleared and the loss added up. With this, the
head and `STEP_LAUNCHES` it is 188 of Llama and 138 of OPT outside of the blocks: 208 to 212 and 115 by time
on an H200's host (`tests/studies/launch_counts_h200_20261130.json`), 193 to 199 and 128 to 199 on a CPU."""

CHUNK_LAUNCHES = 3
"""The head for one side, chunk of the vocabulary and chunk of the tokens, in launches: the product, the
running log-sum-exp, and the Python around them. Counted in `engines.zeroth_order.chunked_loss`."""

PROCESS_HOST_BYTES = 1_700_000_000
"""Host memory of Python with torch and CUDA loaded: what native runs held on an H200 machine."""

PROCESS_HOST_BYTES_WITHOUT_GPU = 600_000_000
"""The same without CUDA: at 22 M to 125 M parameters, runs on a CPU held 0.45 GB (mezo, zo2) to 1.0 GB
(native, lsp) beside what is counted by kind."""

COMPILER_HOST_BYTES = 700_000_000
"""Host memory of torch's compiler: 0.11 GB in the process itself, and 0.53 GB of a helper with eight forks
that compile Triton kernels for an H200, each page once. Measured on a machine without a GPU (torch 2.13,
Triton 3.6); torch with CUDA has larger libraries."""


def block_forward_flops(shape: ModelShape, workload: Workload) -> float:
    """One forward pass of one block over all tokens of a step.

    Two per matrix parameter and token, of experts those that the token goes through, and 4 seq_len hidden per
    token for the scores and their product with the values, causal or not (kernels that skip the upper
    triangle are not counted on).
    """
    tokens = workload.tokens_per_step * shape.calls_of_a_block
    multiplied = sum(matrix.parameters for matrix in shape.matrices) + shape.active_expert_parameters
    matrices = 2.0 * multiplied * tokens
    return matrices + 4.0 * workload.seq_len * shape.hidden * tokens


def attention_longer_flops(shape: ModelShape, workload: Workload, forwards: float, backwards: float) -> float:
    """Of so many passes through one block, over all tokens of a step."""
    counted = 4.0 * workload.seq_len * shape.hidden * workload.tokens_per_step * shape.calls_of_a_block
    is_wide = shape.hidden >= WIDE_HEAD * shape.num_heads
    done = (0.5 if shape.is_causal else 1.0) / (ATTENTION_SHARE_WIDE if is_wide else ATTENTION_SHARE)
    return counted * (forwards * (done - 1) + backwards * (ATTENTION_BACKWARD * done - 2))


def head_forward_flops(shape: ModelShape, workload: Workload) -> float:
    """One forward pass of the head: every token, but one per sequence for classification."""
    positions = workload.tokens_per_step
    if shape.head == "classification":
        positions //= workload.seq_len
    return 2.0 * shape.head_parameters * positions


def model_flops(shape: ModelShape, workload: Workload, passes: float) -> float:
    """Of `passes` forward passes over all tokens of a step, a backward pass being two of them. The least that
    a step needs: nothing is recomputed, and padding counts as tokens."""
    forward = shape.num_blocks * block_forward_flops(shape, workload) + head_forward_flops(shape, workload)
    return passes * forward


def elementwise_bytes(shape: ModelShape, workload: Workload, *, compiled: bool = False) -> float:
    """GPU memory traffic of one forward pass of one block outside its matrix products."""
    gated = COMPILED_GATED_ELEMENTWISE_BYTES if compiled else GATED_ELEMENTWISE_BYTES
    plain = COMPILED_PLAIN_ELEMENTWISE_BYTES if compiled else PLAIN_ELEMENTWISE_BYTES
    per_element = gated if shape.gated_mlp else plain
    if has_long_activation(shape) and not compiled:
        per_element += LONG_ACTIVATION_BYTES
    scale = BYTES_PER_ELEMENT[workload.dtype] / 2
    return per_element * scale * workload.tokens_per_step * shape.hidden * shape.calls_of_a_block


def expert_read_bytes(shape: ModelShape, workload: Workload) -> float:
    """GPU memory traffic of the experts' weights in one forward pass of one block, all micro-batches.

    A product of many tokens hides the reading of its matrix; an expert has its share of a micro-batch alone.
    Counted for those that some token goes through, if each token chooses for itself.
    """
    if not shape.num_experts:
        return 0.0
    tokens = workload.batch_size * workload.seq_len
    reached = 1 - (1 - shape.experts_per_token / shape.num_experts) ** tokens
    return reached * shape.expert_parameters * BYTES_PER_ELEMENT[workload.dtype] * workload.accumulation


def has_long_activation(shape: ModelShape) -> bool:
    """Whether the activation is a row of operations in place of one: GELU by tanh, written out."""
    return shape.family == "gpt2"


def num_biases(shape: ModelShape) -> int:
    """Of the products of a block; the gradient of each is a sum over tokens. Of gated blocks those with more
    vectors than two norms have them at queries, keys and values."""
    if shape.gated_mlp:
        return 3 if vector_parameters(shape) > 2 * shape.hidden else 0
    return len(shape.matrices)


def num_tensors(shape: ModelShape) -> int:
    """Of a block: matrices, biases and two norms, which have biases too where the block is not gated."""
    return len(shape.matrices) + num_biases(shape) + (2 if shape.gated_mlp else 4)


def block_kernels(shape: ModelShape) -> int:
    return GATED_LAUNCHES if shape.gated_mlp else PLAIN_LAUNCHES


def block_launches(shape: ModelShape) -> int:
    """What starting its operations one by one takes."""
    return GATED_LAUNCHES if shape.gated_mlp else PLAIN_STARTS


def outside_launches(shape: ModelShape) -> int:
    """What both passes of a micro-batch take to start outside of the blocks, the head among it."""
    entry = GATED_ENTRY_LAUNCHES if shape.gated_mlp else PLAIN_ENTRY_LAUNCHES
    return entry + 3 * HEAD_LAUNCHES


def largest_matrix_parameters(shape: ModelShape) -> int:
    """Of the matrices of a block."""
    return max((matrix.parameters for matrix in shape.matrices), default=0)


def vector_parameters(shape: ModelShape) -> int:
    """Biases and norms of a block."""
    return shape.block_parameters - sum(matrix.parameters for matrix in shape.matrices)


def runs_as_graphs(shape: ModelShape, workload: Workload) -> bool:
    """Whether forward-only methods run a block as a CUDA graph, with room for all its perturbed copies.

    Counted without a GPU too, where there are no graphs: the blocks are small.
    """
    return 2 * BYTES_PER_ELEMENT[workload.dtype] * shape.block_parameters <= GRAPH_SCRATCH_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPasses:
    """How forward and backward pass of a model's blocks run."""

    recomputed: int
    """Blocks that run again in the backward pass, from the first on."""
    compiled: bool = False
    captured: bool = False
    """As CUDA graphs."""
    loss_compiled: bool = False
    loss_tokens: int | None = None
    """Positions whose logits are there at once; `None`: those of a micro-batch."""
    keeps_products: bool = False
    """Blocks that do not run again keep what products and attention give, and compute the rest again."""

    @classmethod
    def eager(cls, shape: ModelShape, workload: Workload) -> BlockPasses:
        """Every operation by itself, and all blocks recomputed or none."""
        return cls(recomputed=shape.num_blocks if workload.checkpointing else 0)


def training_layers(
    shape: ModelShape, workload: Workload, passes: BlockPasses | None = None
) -> list[LayerTraffic]:
    """Forward and backward of every layer; the optimizer comes on top. `passes`: eager ones unless given."""
    how = passes or BlockPasses.eager(shape, workload)
    head = head_forward_flops(shape, workload)
    last = LayerTraffic(
        name="head",
        gpu_forward_flops=head,
        gpu_backward_flops=2 * head,
        off_grid_flops=3 * head if loss.is_off_grid(shape, workload) else 0.0,
        gpu_bytes=workload.accumulation
        * loss.moved_bytes(shape, workload, how.loss_tokens, compiled=how.loss_compiled),
    )
    last = _started(last, outside_launches(shape), 3 * HEAD_LAUNCHES, 3, how, workload)
    kept, again = (_training_block(shape, workload, how, recomputed=each) for each in (False, True))
    blocks = [
        (again if index < how.recomputed else kept).named(f"block.{index}")
        for index in range(shape.num_blocks)
    ]
    return [LayerTraffic(name="embedding"), *blocks, last]


def _training_block(
    shape: ModelShape, workload: Workload, how: BlockPasses, *, recomputed: bool
) -> LayerTraffic:
    forward = block_forward_flops(shape, workload)
    again = 0.0
    if recomputed:
        # A compiler sees that nobody needs the result of the second run, and leaves out its last product.
        unneeded = 2.0 * shape.hidden * shape.intermediate * workload.tokens_per_step if how.compiled else 0.0
        again = max(0.0, forward - unneeded)
    runs, calls = 2 if recomputed else 1, shape.calls_of_a_block
    fills_in = how.keeps_products and not recomputed  # what lies between products
    of_a_pass = COMPILED_KERNELS + len(shape.matrices) if how.compiled else block_kernels(shape)
    kernels = (2 + runs) * of_a_pass + num_biases(shape)
    launches = (2 + runs) * (COMPILED_LAUNCHES if how.compiled else block_launches(shape))
    if recomputed or fills_in:
        saved = SAVED_GATED if shape.gated_mlp else SAVED_PLAIN
        launches += CHECKPOINT_LAUNCHES if how.compiled else int(SAVED_LAUNCHES * saved)
    elementwise = elementwise_bytes(shape, workload, compiled=how.compiled)
    layer = LayerTraffic(
        name="block",
        gpu_forward_flops=forward,
        gpu_backward_flops=2 * forward + again,
        attention_longer_flops=attention_longer_flops(shape, workload, runs, 1),
        gpu_bytes=(runs + fills_in + BACKWARD_ELEMENTWISE) * elementwise
        + (runs + 1) * expert_read_bytes(shape, workload),
    )
    products = (2 + runs) * len(shape.matrices)
    return _started(layer, calls * launches, calls * kernels, calls * products, how, workload)


def _started(
    layer: LayerTraffic, launches: int, kernels: int, products: int, how: BlockPasses, workload: Workload
) -> LayerTraffic:
    """`layer` with what each micro-batch starts: operations one by one or as graphs, and so many kernels,
    products among them. Those of eager blocks take no time of their own: what lies between them is in the
    bytes that they move (`BACKWARD_ELEMENTWISE`)."""
    has_own_time = how.captured or how.compiled
    return layer._replace(
        products=products * workload.accumulation,
        launches=0 if how.captured else launches * workload.accumulation,
        kernels=max(0, kernels - products) * workload.accumulation * has_own_time,
    )


def stacked_layers(shape: ModelShape, workload: Workload) -> list[LayerTraffic]:
    """Two forward passes of every layer, stacked in one batch, without a backward pass and without noise.

    A micro-batch goes through the head by itself, and so does each side of it.
    """
    launches = STACKED_GATED_LAUNCHES if shape.gated_mlp else STACKED_PLAIN_LAUNCHES
    products, kernels = 2 * len(shape.matrices), 0
    if runs_as_graphs(shape, workload):
        in_graph = STACKED_GATED_KERNELS if shape.gated_mlp else STACKED_PLAIN_KERNELS
        launches, kernels = GRAPH_LAUNCHES, max(0, in_graph - products)
    block = LayerTraffic(
        name="block",
        gpu_forward_flops=2 * block_forward_flops(shape, workload),
        attention_longer_flops=attention_longer_flops(shape, workload, 2, 0),
        gpu_bytes=2 * (elementwise_bytes(shape, workload) + expert_read_bytes(shape, workload)),
        products=products * workload.accumulation,
        kernels=kernels * workload.accumulation,
        launches=launches * workload.accumulation,
    )
    of_vocabulary, of_tokens = loss.head_chunks(shape, workload)
    # Logits are written by the product and read once by the loss.
    logit_bytes = (
        2.0 * BYTES_PER_ELEMENT[workload.dtype] * workload.accumulation * loss.num_logits(shape, workload)
    )
    last = LayerTraffic(
        name="head",
        gpu_forward_flops=2 * head_forward_flops(shape, workload),
        gpu_bytes=2 * logit_bytes,
        products=2 * of_vocabulary * of_tokens * workload.accumulation,
        launches=2 * (HEAD_LAUNCHES + CHUNK_LAUNCHES * of_vocabulary * of_tokens) * workload.accumulation,
    )
    first = LayerTraffic(name="embedding", waited_launches=ENTRY_LAUNCHES * workload.accumulation)
    return [first, *(block.named(f"block.{index}") for index in range(shape.num_blocks)), last]


def normalizes_last(shape: ModelShape) -> bool:
    """Whether a block's last operation is its norm, as in BERT's family and OPT-350M."""
    if shape.family == "opt":
        return shape.predicts_tokens and shape.head_parameters != shape.vocabulary * shape.hidden
    return shape.family in ENCODER_FAMILIES and shape.family != "modernbert"
