"""What native fine-tuning costs: everything on the GPU, AdamW with states in the weights' precision."""

from __future__ import annotations

from engines.costs import loss, transformer
from engines.costs.memory import activations
from engines.costs.memory.segments import (
    gradients_among_activations,
    lost_between_hidden_states,
    lost_between_matrices,
    lost_in_logits,
)
from engines.costs.resources.traffic import DividedWeights, Traffic, TrainingMemory
from engines.costs.transformer import BlockPasses
from engines.settings.first_order import (
    BlockPassSettings,
    ChunkedLossSettings,
    CompiledBlockSettings,
    NativeSettings,
)
from engines.shapes import BYTES_PER_ELEMENT, ModelShape, Workload

ADAM_PASSES = 7
"""Fused AdamW reads weight, gradient and two moments and writes all but the gradient."""

ADAM_SLOWDOWN = 1.5
"""Time of torch's fused AdamW on a GPU over that of a copy of as many bytes: 2.7 TB/s where copies reach 4.1,
at 1.3B in bf16 on an H200."""


BLOCK_GATHERED, NON_BLOCK_GATHERED = 3, 2
"""How often several GPUs exchange parts in a micro-batch: of a block's weights in the forward and in the
backward pass, of its gradients, and of what is outside once each."""

GATHER_S = 4.2e-3
"""What the CPU does for FSDP2 around a block in a micro-batch, seconds on an H200's host: two H200s took
0.128 s for 4 x 1024 tokens each of the 1.3B LLaMA shape, compiled, where the GPU's work is 0.065 (one run,
engines/EXPERIMENTS.md)."""

GRAPH_BYTES = 4_000_000
"""GPU memory of one block's two passes as CUDA graphs outside torch's allocator: on an H200 `lsp` with 32
blocks took 0.2 GB more than `native` did without, in use by NVML less what torch reserved; a part may be the
graphs'. Records: reports/results/deepseek-coder-*_20261124."""

POOL_SHARE = 0.14
"""What the pool of a captured step's passes takes beside what is in it at the loss, as a share of that: 0.05
of native and 0.13 of LoRA in the records of deepseek-coder-1.3b of 29 November (reports/results), 0.08 to 0.3
in ten other runs (`tests/studies/prediction_grid`), all of one H200."""

LEFT_BY_FIRST_STEPS = 0.11
"""What is not left to the pool by the steps before the capture, as a share of the optimizer's states and of
gradients: they lie among freed activations, whose places the pool cannot have. Four jobs under a cap on an
H200 had 0.08 to 0.13 in such places when they ran out of memory."""

PIECES_BYTES = 80_000_000
"""Places that are cut in pieces in the pool of a captured step, whatever the model's size: as many as torch
leaves in its ordinary pool (`profiles.planning.budget.ALLOCATOR_BYTES`), since the two share none."""

MARGIN, MARGIN_CAPTURED, MARGIN_COUNTED, MARGIN_EAGER = 0.07, 0.06, 0.03, 0.04
"""What memory that is needed may exceed what is counted by, beside `profiles.planning.budget.PIECES_BYTES`:
of methods of which nothing more is known, of captured steps, and of those that are not captured, whose
segments are counted, compiled and not. Of the edges on H200s (`tests/studies/prediction_grid_h200`) captured
ones needed up to 3.9 % more than is counted, compiled ones between 4.7 % less and 2.4 % more (3.9 % one that
made its moments in its first step, as engines do no more), and those without a compiler up to 2.9 % more at
least, which was asked for when memory ended."""

SPARE = 0.03
"""What plans leave of the GPU beside that. Of 22 runs of `native` that were called fitting at limits which
nobody had looked at none ran out of memory (`tests/studies/prediction_grid_h200_morning`, the two mornings
beside it, noon and the second afternoon); of twelve the night before three did, which needed up to 6 % more,
most of it in `MARGIN` now.
Other methods missed by more there (`lora` by up to 21 %) or have no such runs, and leave a tenth."""

BETWEEN_GRADIENTS = 0.15
"""Of gradients of all weights, what lies free between them at the most, with expandable segments. They are
made where a block's activations were, beside tensors that come and go; what is left between two is often less
than a page of 20 MiB, which torch gives back only as a whole, or lies in a graph's pool, of which it gives
nothing back. 0.15 of OPT-1.3B in steps of 1,024 tokens, captured or not, and of Qwen2.5 1.5B with
`adamw-8bit`, whose second step asks for 467 MB in one piece while 0.48 GB lie so in 52 places (replays of
their allocations); 0.01 to 0.1 in nine others (`tests/studies/prediction_grid_h200_fifth_evening`,
`_last_evening`, `_expandable`)."""

UNSHARED = 0.5
"""Of what is there at different moments and might share places, how much does not, where passes are not
captured and an engine has tensors of other sizes than the weights': 0.3 to 0.8 in eleven jobs on H200s. torch
gives it back before memory runs out: the edges of `exact-offload` ran without
(`tests/studies/prediction_grid_h200`)."""


def block_passes(shape: ModelShape, workload: Workload, settings: CompiledBlockSettings) -> BlockPasses:
    """How a model's blocks run with these settings. `compile=auto` counts as compiled: planners say `false`
    where nothing is compiled for."""
    return BlockPasses(
        recomputed=settings.recomputed(shape.num_blocks, checkpointing=workload.checkpointing),
        compiled=settings.compile is not False,
        captured=isinstance(settings, BlockPassSettings) and settings.graphs,
        loss_compiled=settings.compile is not False,
        loss_tokens=_loss_tokens(settings),
    )


def _loss_tokens(settings: CompiledBlockSettings) -> int | None:
    if not isinstance(settings, ChunkedLossSettings) or settings.loss_tokens == "all":
        return None
    return settings.loss_tokens


def traffic(shape: ModelShape, workload: Workload, settings: NativeSettings) -> Traffic:
    """8 bytes per parameter in bf16, 16 in fp32, and activations. Several GPUs have a part each of the first:
    two blocks and a gradient are whole at a time, and what is outside of them."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    passes = block_passes(shape, workload, settings)
    layers = transformer.training_layers(shape, workload, passes)
    non_block = ADAM_SLOWDOWN * ADAM_PASSES * element * shape.non_block_parameters
    block = ADAM_SLOWDOWN * ADAM_PASSES * element * shape.block_parameters
    together = workload.accumulation * element
    updated = [
        layer._replace(
            gpu_bytes=layer.gpu_bytes + block,
            update_gpu_bytes=block,
            gathered_bytes=BLOCK_GATHERED * together * shape.block_parameters,
        )
        if layer.name.startswith("block.")
        else layer
        for layer in layers
    ]
    updated[-1] = updated[-1]._replace(
        launches=updated[-1].launches + transformer.UPDATE_LAUNCHES * (not passes.captured),
        gpu_bytes=updated[-1].gpu_bytes + non_block,
        update_gpu_bytes=non_block,
        gathered_bytes=NON_BLOCK_GATHERED * together * shape.non_block_parameters,
    )
    whole = element * (2 * shape.non_block_parameters + 3 * shape.block_parameters)
    return Traffic(
        layers=tuple(updated),
        **training_memory(
            shape,
            workload,
            held={"weights": element * shape.parameters, "optimizer": 2 * element * shape.parameters},
            gradients=element * shape.parameters,
            passes=passes,
            tensors_of_a_matrix=4,
            forgets_logits=True,
        ),
        gpu_held_bytes=shape.num_blocks * GRAPH_BYTES if passes.captured else 0,
        gpu_spare=SPARE,
        host_memory_bytes={"process": transformer.PROCESS_HOST_BYTES},
        divided_weights=DividedWeights(
            kinds=("weights", "gradients", "optimizer"),
            whole_bytes=whole,
            cpu_s=GATHER_S * workload.accumulation,
        ),
    )


def training_memory(
    shape: ModelShape,
    workload: Workload,
    held: dict[str, int],
    gradients: int,
    passes: BlockPasses | None = None,
    tensors_of_a_matrix: int | None = None,
    more_between: int = 0,
    more_in_block: int = 0,
    more_again: int = 0,
    forgets_logits: bool = False,
) -> TrainingMemory:
    """GPU memory of a step, and what torch's allocator takes beside.

    `held` is there throughout; `gradients` are freed between steps, but not between micro-batches: a CUDA
    graph writes them anew in each step, where activations lay before. `passes`: eager ones unless given.
    `tensors_of_a_matrix`: how many of its size and precision there are, itself among them; 0: its form fills
    segments; `None`: not known. `more_between`: what a hidden state between two blocks has beside its size in
    the workload's precision, `more_in_block` what a method has in a block whose backward pass runs, and
    `more_again` beside that in one that runs again. `forgets_logits`: those of 16 bits
    (`engines.costs.loss.forgotten_bytes`).
    """
    how = passes or BlockPasses.eager(shape, workload)
    moments = _moments(shape, workload, held, gradients, how)
    if how.compiled and not how.captured:  # a capture comes after the steps in which kernels are made
        whole = how.loss_compiled and how.loss_tokens is None and shape.head == "causal_lm"
        tuning = max(0, loss.TUNING_BYTES - held.get("buffers", 0))  # which are free while kernels are timed
        moments[0]["scratch"] = tuning if whole else 0
        for moment in moments[1:3]:
            moment["scratch"] = tuning
    recomputed = min(how.recomputed, shape.num_blocks)
    again = more_in_block + (more_again if recomputed else 0)
    for moment, more in zip(moments, (0, more_in_block, again, again), strict=False):
        moment["activations"] += more
    for moment in moments[:3]:
        moment["activations"] += recomputed * more_between
    between = lost_between_hidden_states(shape, workload, moments[0]["activations"])
    forgotten = 0
    if forgets_logits and not how.compiled:
        forgotten = loss.forgotten_bytes(shape, workload, how.loss_tokens)
        moments[0]["logits"] -= forgotten
        # Their own segment serves no larger tensor.
        least = sum(activations.peak_moment(moments).values()) - sum(moments[0].values())
        forgotten = max(0, forgotten - least)
    if how.captured:
        pool = int(POOL_SHARE * (moments[0]["activations"] + moments[0]["logits"]))
        # What the first step's update makes lies among freed activations, whose places the pool cannot have.
        left = [int(LEFT_BY_FIRST_STEPS * (each.get("optimizer", 0) + each["gradients"])) for each in moments]
        left[0] = max(pool, left[0]) + between
        with_left = [sum(each.values()) + more for each, more in zip(moments, left, strict=True)]
        apart = max(with_left) - sum(activations.peak_moment(moments).values()) + PIECES_BYTES
        returned, margin = 0, MARGIN_CAPTURED
    elif tensors_of_a_matrix is not None:
        copies: float = tensors_of_a_matrix
        if gradients >= BYTES_PER_ELEMENT[workload.dtype] * shape.matrix_parameters:
            copies -= gradients_among_activations(shape, workload, how)
        apart = between + int(copies * lost_between_matrices(shape, workload.dtype))
        if how.loss_compiled:
            apart += lost_in_logits(shape, workload, how.loss_tokens)
        returned = 0 if tensors_of_a_matrix else between
        margin = MARGIN_COUNTED if how.compiled else MARGIN_EAGER
    else:
        apart = returned = int(UNSHARED * activations.apart_bytes(moments))
        margin = MARGIN
    peak = activations.peak_moment(moments)
    small = max(0, moments[0]["activations"] - peak["activations"])
    small = int(activations.small_share(shape, workload) * small)
    return TrainingMemory(
        gpu_memory_bytes=peak,
        gpu_apart_bytes=apart + forgotten,
        # A graph's pool keeps what it has.
        gpu_pool_bytes=small if how.captured else 0,
        gpu_small_bytes=0 if how.captured else small,
        gpu_returned_bytes=returned + forgotten,
        gpu_between_gradients_bytes=int(BETWEEN_GRADIENTS * gradients),
        gpu_margin=margin,
        gpu_without_triton_bytes=0,
        workspaces=workspaces(passes),
    )


def _moments(
    shape: ModelShape, workload: Workload, held: dict[str, int], gradients: int, how: BlockPasses
) -> list[dict[str, int]]:
    """Bytes by kind at the loss; in the last block, while what all blocks keep is there; in the first block
    that runs again in the backward pass, while the inputs of all of them are; in the first block of the
    model, when all others have their gradients; and where a tied embedding's gradient is made."""
    of_head = BYTES_PER_ELEMENT[workload.dtype] * shape.head_parameters
    of_head = of_head if gradients >= of_head else 0
    # Of a tied head and embedding each makes its own, and their sum is a third; an optimizer in the backward
    # pass has two of them among those that are in flight.
    tied = 2 * of_head
    if gradients < BYTES_PER_ELEMENT[workload.dtype] * shape.parameters:
        tied = max(0, 3 * of_head - gradients)
    early = gradients if workload.accumulation > 1 else 0
    if how.loss_tokens is not None and shape.head == "causal_lm":
        early = max(early, of_head)  # which a loss in chunks makes with the logits
    saved = activations.saved_activation_bytes(shape, workload, how)
    hidden = workload.hidden_bytes(shape)
    of_block = activations.backward_activation_bytes(shape, workload, compiled=how.compiled)
    # Of an eager block more is counted as kept than is there at once.
    wide = activations.wide_gradient_bytes(shape, workload) if how.compiled else 0
    recomputed = min(how.recomputed, shape.num_blocks)
    done, again = 0, saved + hidden
    if recomputed:
        done = gradients * (shape.num_blocks - recomputed) // shape.num_blocks
        again = recomputed * hidden + of_block
    own = gradients * shape.block_parameters // max(1, shape.parameters)
    at_loss = {
        **held,
        "gradients": early,
        "activations": saved,
        "logits": loss.logits_bytes(shape, workload, how.loss_tokens, compiled=how.compiled),
    }
    in_last = {
        **held,
        "gradients": max(early, min(gradients, of_head)),
        "activations": saved + hidden + wide,
        "logits": 0,
    }
    in_again = {
        **held,
        "gradients": max(early, min(gradients, done + of_head)),
        "activations": again + wide,
        "logits": 0,
    }
    in_first = {
        **held,
        "gradients": gradients,
        "activations": of_block + max(0, wide - own),
        "logits": 0,
    }
    at_embedding = {
        **held,
        "gradients": gradients,
        "activations": hidden,
        "logits": 0,
        "scratch": tied if shape.tied else 0,
    }
    return [at_loss, in_last, in_again, in_first, at_embedding]


def workspaces(passes: BlockPasses | None) -> int:
    """Of products: of the thread that runs forward passes and of the one of backward passes, and the same
    again on the stream on which they are captured."""
    return 4 if passes is not None and passes.captured else 2
