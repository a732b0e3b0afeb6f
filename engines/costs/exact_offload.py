"""What exact AdamW on the CPU costs: native's forward and backward, and for each block its gradients down,
AdamW on the CPU, and its weights up, 2 bytes of each per bf16 parameter, while other blocks compute.

Floors of a step of T tokens with N parameters in blocks, of which each takes c bytes of host memory traffic
in AdamW (26 with fp32 moments, 18 with bf16, 14 with int8) and 4 of copies:

    GPU   (6, or 8 with recomputation) N T / F
    CPU   (c + 4) N / bandwidth of host memory
    link  2 N / bandwidth of each direction

The CPU hides behind the GPU above T* = F (c + 4) / (8 bandwidth) tokens per step. On a machine with an H200
(some 650 TFLOP/s in large products, 120 GB/s of host memory, 50 GB/s each way): a model of 1.3 or 6.7 billion
parameters takes 0.32 or 1.6 s of the CPU with fp32 moments, 0.23 or 1.2 s with bf16 and 0.19 or 1.0 s with
int8, 0.05 or 0.27 s of the link; T* is 20, 15 and 12 thousand tokens. All micro-batches of a step count: they
pass a block together (`engines.model.block_major`). A step of about T* tokens takes longer than either: the
CPU has nothing to update while the last block and the head go forward and backward, and stands still from
chunk to chunk (`engines.costs.resources.overlap.blockwise_s`).

With `weights=streamed` the weights of the blocks come up twice, but for those of the last `weight_slots`, so
the link takes 4 N / bandwidth upwards: 0.54 s for 6.7 billion parameters at 50 GB/s, 1.0 s for 13.

Blocks that the GPU updates (`gpu_blocks`) take nothing of CPU, link and host memory, and 12 bytes more per
parameter on the GPU. The first block's update hides behind nothing otherwise: some 40 ms of each step for the
200 million parameters of a block of a 6.7B model.

States on disk (`disk_blocks`) are read and written in each step: 10 bytes per parameter each way with fp32
moments, 6 and 4 with the others. With their weights there too (`disk_weights`) 2 more go each way, and 2 come
for each of both passes.

GPU memory: weights (streamed: of three blocks), gradients of a few blocks, hidden states of all micro-batches
between blocks (or what kept blocks keep), and outside the blocks weights, gradients and, unless the host has
them (`outer=host`), fp32 masters and moments. Host memory: weights, pinned; the low halves of fp32 masters;
moments; and pinned buffers for gradients that wait for the CPU. Where blocks run as CUDA graphs what they
keep lies in a pool of its own, so that logits, which are gone when it is used most, take memory beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engines.costs import loss, transformer
from engines.costs.lsp import NORM_BYTES
from engines.costs.memory import activations
from engines.costs.memory.segments import lost_in_head_gradient
from engines.costs.memory.trial import with_trial
from engines.costs.native import (
    GRAPH_BYTES,
    MARGIN_CAPTURED,
    PIECES_BYTES,
    UNSHARED,
    block_passes,
    workspaces,
)
from engines.costs.resources.disk import STATE_PLACES, WEIGHT_PLACES
from engines.costs.resources.traffic import (
    ADAMW_KERNEL_BYTES,
    FUSED_ADAM_BYTES,
    GpuMemory,
    LayerTraffic,
    Overlap,
    Traffic,
    by_kind,
)
from engines.settings.exact_offload import GRADIENT_SLOTS, MOMENT_GROUP, ExactOffloadSettings, Moments
from engines.shapes import BYTES_PER_ELEMENT, ModelShape, Workload

CHUNK_ELEMENTS = 16 << 20
"""Gradients and weights cross the link in chunks of up to this size: a copy takes 0.6 ms or more, and the
CPU's update some milliseconds."""

MARGIN = 0.025
"""What memory that is needed may exceed what is counted by, beside `profiles.planning.budget.PIECES_BYTES`:
streamed jobs on H200s ran out with up to 1.3 % more than that, and ran with 2.5 % less to 3.8 % more
(`tests/studies/prediction_grid_h200`)."""

STAYING_INPUTS = 2
"""Blocks at the end whose inputs stay on the GPU where those of others wait on the host: they are needed
before they would have gone."""

LEAST_GRADIENT_BLOCKS = 4
"""Of what `few_gradient_blocks` says."""

LAUNCHES = 95
"""Per block of five chunks that runs as no CUDA graph, in operations without autograd: Python around it, what
becomes of each gradient, events and the CPU's queue, of all threads, since the interpreter's lock lets one at
a time go on. Counted: on a CPU, where events do nothing, a block of a tiny model takes 78 of them longer than
native's (103 while each chunk went down by itself), and what it asks of the driver, 22 events and 36 waits
and questions (39 and 74 then), is some 15 more at 7 us an event (`engines.transfer.clock.compute_stream`)
and, guessed, 2 for the others."""

GPU_UPDATE_LAUNCHES = 35
"""Likewise of a block that the GPU updates, its tensors in one go. By time on a CPU a block
of a tiny Llama takes 35 to 51 more than native's (`tests/studies/launch_counts.py`, `gpu_blocks=11`, twice);
the driver's part is not in it."""

REPLAY_LAUNCHES = 32
"""Of a block that runs as two CUDA graphs and that the CPU updates, however many micro-batches there are, all
that is started for it: what becomes of its gradients is in the graphs. The GPU's update of a block is not.
By time on an H200's host, of two chunks, both threads (`tests/studies/launch_counts_h200_20261130.json`)."""

MASTER_BYTES = 12
"""fp32 master and moments of a 16-bit parameter that the GPU updates; one in fp32 has moments alone, 8."""

MASTER_TRAFFIC_BYTES = 44
"""GPU memory traffic of its update: the gradient widened, AdamW on the master, the weight rounded."""


def moment_bytes(moments: Moments) -> float:
    """Host memory of both moments of a parameter."""
    return {"fp32": 8.0, "bf16": 4.0, "int8": 2.0 + 8.0 / MOMENT_GROUP}[moments]


def state_bytes(element: int, moments: Moments) -> float:
    """Pageable host memory per parameter of a block: moments, and the low half of a 16-bit weight's
    master."""
    return moment_bytes(moments) + (4 - element)


def adam_bytes(element: int, moments: Moments) -> float:
    """Host memory traffic per parameter of an update: the gradient read, all else read and written."""
    return element + 2 * (element + state_bytes(element, moments))


def num_chunks(shape: ModelShape) -> int:
    """Of a block: its vectors, and its matrices in as many as they take."""
    vectors = transformer.vector_parameters(shape)
    return (vectors > 0) + -(-(shape.block_parameters - vectors) // CHUNK_ELEMENTS)


def gradient_places(num_blocks: int, settings: ExactOffloadSettings) -> int:
    """Blocks whose gradients have room on the host."""
    updated_there = num_blocks - settings.updated_by_gpu(num_blocks)
    if settings.waits_for_norm or not settings.offload or settings.gradient_blocks == "auto":
        return updated_there
    return min(updated_there, settings.gradient_blocks)


def few_gradient_blocks(num_blocks: int) -> int:
    """Blocks with room for whose gradients a step is as fast as with room for all where the GPU decides.

    A forward pass is a quarter to a third of a step, and the CPU needs as many blocks' gradients to have work
    meanwhile: those of the last blocks, whose weights are needed last. Where the CPU decides, backward waits
    for room, and there is nothing left to do then (`held_back_s` of `engines.costs.resources.overlap`): 291
    ms a step for 245 at deepseek-coder 1.3B, 8 of 24 blocks, on an H200.
    """
    return min(num_blocks, max(LEAST_GRADIENT_BLOCKS, -(-num_blocks // 3)))


def host_bytes(
    blocks: list[int], non_block: int, element: int, settings: ExactOffloadSettings
) -> dict[str, int]:
    """Host memory by kind, for blocks of so many parameters each, of which those that the GPU updates have
    none there, and `non_block` outside them that the host updates."""
    total = sum(blocks) + non_block
    kept = "pinned" if settings.offload else "pageable"
    places = gradient_places(len(blocks), settings)
    on_disk = [blocks[index] for index in settings.on_disk(len(blocks))]
    passing = min(STATE_PLACES, len(on_disk)) * max(on_disk, default=0)
    in_memory = total - sum(on_disk) + passing
    weights = total
    if settings.weights_on_disk(len(blocks)):
        weights += min(WEIGHT_PLACES, len(on_disk)) * max(on_disk) - sum(on_disk)
    else:
        passing = 0
    return {
        f"weights, {kept}": element * weights,
        f"gradients, {kept}": element * (places * max(blocks, default=0) + non_block),
        "optimizer": int(state_bytes(element, settings.moments) * in_memory) + element * passing,
    }


def hidden_away_bytes(shape: ModelShape, workload: Workload, settings: ExactOffloadSettings) -> int:
    """Of hidden states between blocks that wait on the host, all micro-batches."""
    if settings.hidden_states == "gpu" or not settings.offload:
        return 0
    blocks = max(0, shape.num_blocks - 1 - STAYING_INPUTS)
    return workload.accumulation * blocks * workload.hidden_bytes(shape)


def uploads_per_step(num_blocks: int, settings: ExactOffloadSettings) -> list[int]:
    """How often each block comes up: once, or for each of both passes, but for those that are still there
    when the forward pass turns."""
    stay = settings.weight_slots if settings.streams else num_blocks
    return [1 if index >= num_blocks - stay else 2 for index in range(num_blocks)]


def traffic(shape: ModelShape, workload: Workload, settings: ExactOffloadSettings) -> Traffic:
    element = BYTES_PER_ELEMENT[workload.dtype]
    updated_here = settings.updated_by_gpu(shape.num_blocks)
    updated_there = shape.num_blocks - updated_here
    blocks = [0] * updated_here + [shape.block_parameters] * updated_there
    non_block = shape.non_block_parameters if settings.outer == "host" else 0
    host = host_bytes(blocks, non_block, element, settings)
    pinned = sum(size for kind, size in host.items() if kind.endswith(", pinned"))
    passes = _passes(shape, workload, settings)
    *_, head = transformer.training_layers(shape, workload, replace(passes, captured=False))
    uploads = uploads_per_step(shape.num_blocks, settings)
    hidden = 0
    if settings.hidden_states == "host" and settings.offload:
        hidden = workload.accumulation * workload.hidden_bytes(shape)
    on_disk, weights_on_disk = settings.on_disk(shape.num_blocks), settings.weights_on_disk(shape.num_blocks)
    inner = range(1, shape.num_blocks - STAYING_INPUTS)
    places = [
        (index < updated_here, index in inner, index in on_disk, index in weights_on_disk)
        for index in range(shape.num_blocks)
    ]
    layers = by_kind(
        (*transformer.training_layers(shape, workload, passes)[:-1], head),  # no graph has that
        lambda layer, *_: _layer(layer, shape, element, settings, uploads, hidden),
        [None, *uploads, None],
        [None, *places, None],
    )
    away = hidden_away_bytes(shape, workload, settings)
    if away:
        host = {**host, "hidden states, pinned": away}
        pinned += away
    offloaded: Overlap = "blockwise_after_norm" if settings.waits_for_norm else "blockwise"
    return Traffic(
        layers=tuple(layers),
        **_gpu_memory(shape, workload, settings),
        gpu_held_bytes=shape.num_blocks * GRAPH_BYTES if settings.captures else 0,
        host_memory_bytes={"process": transformer.PROCESS_HOST_BYTES, **host},
        shared_host_bytes={kind: size for kind, size in host.items() if _is_shared(kind)},
        divided="updates",
        pinned_bytes=pinned,
        overlap=offloaded if settings.offload else "serial",
        gradient_room=gradient_places(shape.num_blocks, settings) / updated_there,
        cpu_adam_factor=adam_bytes(element, settings.moments) / FUSED_ADAM_BYTES,
        is_adamw_kernel=True,
        cpu_adamw_kernel_factor=adam_bytes(element, settings.moments) / ADAMW_KERNEL_BYTES,
    )


def _is_shared(kind: str) -> bool:
    """Ranks of one machine have it once: weights and states, not what each of them brings down."""
    return kind.startswith("weights") or kind == "optimizer"


def _layer(
    layer: LayerTraffic,
    shape: ModelShape,
    element: int,
    settings: ExactOffloadSettings,
    uploads: list[int],
    hidden: int,
) -> LayerTraffic:
    updated = 2 * element + adam_bytes(element, settings.moments)
    if layer.name == "head" and settings.outer == "host":
        non_block = shape.non_block_parameters
        return layer._replace(
            gpu_bytes=layer.gpu_bytes + 4 * element * non_block,  # cleared, added to, and read for its norm
            h2d_bytes=element * non_block,
            d2h_bytes=element * non_block,
            cpu_adam_elements=non_block,
            cpu_chunks=-(-non_block // CHUNK_ELEMENTS) * settings.offload,
            host_bytes=updated * non_block,
            update_bytes=updated * non_block,
        )
    on_gpu_bytes = MASTER_TRAFFIC_BYTES if element < 4 else FUSED_ADAM_BYTES
    if layer.name == "head":
        return layer._replace(gpu_bytes=layer.gpu_bytes + on_gpu_bytes * shape.non_block_parameters)
    if not layer.name.startswith("block."):
        return layer
    size = shape.block_parameters
    index = int(layer.name.removeprefix("block."))
    times = uploads[index]
    if not 0 < index < len(uploads) - STAYING_INPUTS:
        hidden = 0
    # Each gradient is made, added to what is there or moved there, and read for its norm.
    gpu_bytes = layer.gpu_bytes + 4 * element * size
    if index < settings.updated_by_gpu(len(uploads)):
        return layer._replace(
            python_launches=GPU_UPDATE_LAUNCHES + REPLAY_LAUNCHES * settings.captures,
            gpu_bytes=gpu_bytes + on_gpu_bytes * size,
            h2d_bytes=hidden,
            d2h_bytes=hidden,
            host_bytes=2 * hidden,
        )
    written = 0
    if index in settings.on_disk(len(uploads)):
        written = int(state_bytes(element, settings.moments) * size)
    read = written
    if index in settings.weights_on_disk(len(uploads)):
        written += element * size
        read = written + times * element * size
    return layer._replace(
        disk_bytes=read,
        disk_write_bytes=written,
        python_launches=REPLAY_LAUNCHES if settings.captures else LAUNCHES * settings.offload,
        gpu_bytes=gpu_bytes,
        h2d_bytes=times * element * size + hidden,
        d2h_bytes=element * size + NORM_BYTES + hidden,
        cpu_adam_elements=size,
        cpu_chunks=num_chunks(shape) * settings.offload,
        host_bytes=(updated + (times - 1) * element) * size + read + written + 2 * hidden,
        update_bytes=updated * size,
    )


def _passes(shape: ModelShape, workload: Workload, settings: ExactOffloadSettings) -> transformer.BlockPasses:
    """How blocks run: as native's, but that they may keep what products and attention give alone."""
    keeps = settings.keeps_products(checkpointing=workload.checkpointing)
    passes = block_passes(shape, workload, settings)
    return replace(passes, keeps_products=keeps, captured=settings.captures)


def _gpu_memory(shape: ModelShape, workload: Workload, settings: ExactOffloadSettings) -> GpuMemory:
    """GPU memory at the worst of five moments: the trial, a loss, its backward pass, that of the last block,
    and the end."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    non_block = element * shape.non_block_parameters
    on_gpu = settings.outer == "gpu"
    updated_here = settings.updated_by_gpu(shape.num_blocks) * shape.block_parameters
    updated_here += on_gpu * shape.non_block_parameters
    masters = (MASTER_BYTES if element < 4 else 8) * updated_here
    passing = 0 if on_gpu else element * shape.largest_tensor  # before they are added to those of others
    slots = min(GRADIENT_SLOTS, shape.num_blocks)
    blocks = min(settings.weight_slots, shape.num_blocks) if settings.streams else shape.num_blocks
    held = {
        "weights": non_block + element * blocks * shape.block_parameters,
        "optimizer": masters,
        "gradients": slots * element * shape.block_parameters,
    }
    passes = _passes(shape, workload, settings)
    saved = workload.accumulation * activations.saved_activation_bytes(shape, workload, passes)
    between = workload.accumulation * workload.hidden_bytes(shape)
    # One goes down, one is used, one comes up.
    recomputed = min(passes.recomputed, shape.num_blocks)
    away = min(hidden_away_bytes(shape, workload, settings), recomputed * between)
    saved -= max(0, away - between)
    made = element * shape.block_parameters  # before they are added to the slot
    in_backward = 0
    if passes.recomputed or passes.keeps_products:
        in_backward = activations.block_activation_bytes(shape, workload, compiled=passes.compiled)
    if passes.recomputed == 0 and passes.keeps_products:  # what lies between the products
        in_backward = max(0, in_backward - activations.product_activation_bytes(shape, workload))
    logits = loss.logits_bytes(shape, workload, compiled=passes.compiled)
    tuning = loss.TUNING_BYTES if passes.compiled else 0
    of_head = 0 if on_gpu else element * shape.head_parameters
    # The GPU's update forgets those outside the blocks; those of the host have places of their own.
    early = 0 if on_gpu and workload.accumulation == 1 else non_block
    moments = (
        {
            "gradients": held["gradients"] + early,
            "activations": saved + between,
            "logits": logits + int(loss.TUNED_AT_A_LOSS * tuning),
        },
        # The head's own gradient is made before it is added to what is there.
        {
            "gradients": held["gradients"] + non_block + of_head,
            "activations": saved + between,
            "logits": logits // 2 if passes.compiled else logits,
        },
        {
            "gradients": held["gradients"] + non_block + made,
            "activations": saved + between + in_backward + workload.hidden_bytes(shape),
            "logits": tuning,
        },
        {
            "gradients": held["gradients"] + non_block + passing,
            "scratch": 4 * shape.largest_tensor * (element < 4 and on_gpu),
        },
    )
    kinds = [{**held, **moment} for moment in moments]
    pool, stays, apart = 0, 0, activations.apart_bytes(kinds)
    if settings.captures:
        pool, apart = _apart_of_pool(moments, made)
        pool += 2 * between  # what enters the first block, and the gradients that enter the last
        stays = PIECES_BYTES  # as in the other pool
    if not on_gpu:
        stays += lost_in_head_gradient(shape, workload)
    most = activations.peak_moment(kinds)
    return GpuMemory(
        **with_trial(shape, workload, most, pool=pool, stays=stays, returned=int(UNSHARED * apart)),
        gpu_margin=MARGIN_CAPTURED if settings.captures else MARGIN,
        gpu_without_triton_bytes=0,
        workspaces=workspaces(passes),
    )


def _apart_of_pool(moments: Sequence[dict[str, int]], made: int) -> tuple[int, int]:
    """What a step takes beside its worst moment where graphs have a pool, and what may lie apart elsewhere.
    What blocks keep and what their backward passes make lies there, the gradients of a block (`made`) among
    it; logits and what the loss makes do not. Neither has room for the other."""
    in_pool = [{"activations": each.get("activations", 0)} for each in moments]
    in_pool[2]["gradients"] = made
    elsewhere = [
        {kind: size - its.get(kind, 0) for kind, size in each.items()}
        for each, its in zip(moments, in_pool, strict=True)
    ]
    peaks = (sum(activations.peak_moment(kinds).values()) for kinds in (in_pool, elsewhere))
    return sum(peaks) - sum(activations.peak_moment(moments).values()), activations.apart_bytes(elsewhere)
