"""What LSP-Offload costs: native's forward and backward, less the products of weight gradients, and per block
matrix two projections of what those would multiply and a d x d core that goes down, through Adam on the CPU,
and comes up.

GPU: weights, projectors, the cores of a few blocks, and gradients and moments of what is not projected. Host:
per matrix the pinned core, of the weights' dtype, and two moments, fp32 or bf16. With `weights=streamed` the
matrices are on the host too, pinned: all micro-batches pass a block together, each matrix comes up for both
passes and goes down once, when its update has been applied. The twin (`offload=False`) moves and computes the
same with nothing pinned and nothing overlapped, and keeps all cores on the GPU for a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engines.costs import loss, transformer
from engines.costs.memory import activations
from engines.costs.memory.segments import lost_in_head_gradient, stays_in_logits
from engines.costs.memory.trial import with_trial
from engines.costs.native import (
    ADAM_PASSES,
    ADAM_SLOWDOWN,
    GRAPH_BYTES,
    UNSHARED,
    block_passes,
    workspaces,
)
from engines.costs.resources.traffic import (
    ADAMW_KERNEL_BYTES,
    FUSED_ADAM_BYTES,
    GpuMemory,
    LayerTraffic,
    Overlap,
    RareWork,
    Traffic,
    by_kind,
)
from engines.costs.transformer import BlockPasses
from engines.settings.lsp import LspSettings
from engines.settings.lsp_layout import (
    CHUNK_ELEMENTS,
    CORE_SLOTS,
    UPLOAD_SLOTS,
    WEIGHT_SLOTS,
    chunk_ends,
    core_elements,
    core_size,
    forms_gradient,
    nonzeros_per_row,
    streamed_uploads,
)
from engines.shapes import BYTES_PER_ELEMENT, MatrixShape, ModelShape, Workload

INDEX_BYTES = 8
"""Per nonzero of a projector that stores its places: by row and by column, int32 each."""

MARGIN = 0.03
"""What memory that is needed may exceed what is counted by, beside `profiles.planning.budget.PIECES_BYTES`:
tensors of streamed jobs of Qwen2.5 took up to 2.9 % more on H200s (`tests/studies/prediction_grid_h200`)."""

NORM_BYTES = 4
"""A block's squared norm goes down before its cores."""

OWN_KERNELS_SLOWDOWN = 2.0
"""Time of the kernels that project and that apply an update over that of a copy of as many bytes: 24 us for
12, 47 for 26, 40 for 16 and 94 for 43 at 4096 tokens on an H200 (engines/EXPERIMENTS.md)."""

GRAPH_COPIES = 7
"""Of a block's hidden state or its gradient, in a micro-batch whose blocks run as CUDA graphs: to the graph's
place and out of it, and within it to what the backward pass needs. Counted
(`engines.model.training_graphs`)."""

NORM_KERNELS = 3
"""Of a block's cores: their norm, its square, and a copy of it. Counted."""

LAUNCHES = 2
"""Per matrix and micro-batch, in launches of a model's own operations: two projections, the product, and
Python around them. Two records of deepseek-coder at 1 x 384 tokens without graphs (reports/results, 4gb) took
0.212 and 0.216 s, of which the model's own operations are 0.15 and `BLOCK_LAUNCHES` 0.05."""

COMPILED_MATRIX_LAUNCHES = 9
"""The same in compiled code that no graph has: three operations of this program, which torch finds by name,
each with Python of its own. By CPU time each micro-batch of a streamed block of a tiny Llama takes 142
operations, of which native's compiled block has 77; without a compiler 123, of 115."""

STREAM_LAUNCHES = 18
"""The same for a matrix whose weights are streamed, however many micro-batches pass it together. Counted:
such a block starts 50 to 56 operations of torch more for each matrix, of which a model's own launches have
three to four each. By time on a CPU a tiny Llama's block takes 15 in each step."""

BLOCK_LAUNCHES = 45
"""Of a block whose weights stay, in operations without autograd and once a step: copies of cores, events, the
queue of the CPU's thread, and what applies its updates as one graph. With `REPLAY_LAUNCHES` three models'
blocks took 56, 60 and 67 on an H200 (engines/EXPERIMENTS.md, 1 December 2026)."""

APPLY_LAUNCHES = 11
"""Per matrix, where updates are applied kernel by kernel: a block of seven took 146 to 162 when all were."""

REPLAY_LAUNCHES = 15
"""The same of each micro-batch where blocks run as CUDA graphs, both passes: copies in and out of the graphs'
places, their launches. By time on a CPU: 10 to 17, with graphs that do nothing."""

BF16_MOMENTS_SLOWDOWN = 1.3
"""Time of Adam on a core with bf16 moments over that of the bytes it moves: rounding is arithmetic. 1.27 with
all threads of an H200's host and 1.41 with half (engines/EXPERIMENTS.md), 1.1 to 1.4 in nine runs of two
others."""

LOSS_BYTES = 12
"""GPU bytes per logit at the peak of a loss that is not compiled where blocks are, 16-bit weights. Less than
without them: of seven jobs on H200s four of the evening of 30 November had 11.6 to 12, those before 4 to 11
(`tests/studies/prediction_grid_h200`, `_fourth_evening`)."""

RESIDUAL_PASSES = 14
"""Over a matrix, reads and writes, for what its projectors leave out."""

CHECK_BYTES = 12
"""GPU memory of a check for each element of the gradient."""

CHECK_S = 2e-9
"""Time of a check that finds a new block-diagonal pair, for each element of the gradient: 2.3 ns at 1.3B, 1.3
at 6.7B, both on an H200 (first steps of the records of deepseek-coder, reports/results)."""


def traffic(shape: ModelShape, workload: Workload, settings: LspSettings) -> Traffic:
    element = BYTES_PER_ELEMENT[workload.dtype]
    cores = shape.num_blocks * core_elements(shape, settings)
    norms = -(-NORM_BYTES * shape.num_blocks // 64) * 64
    wire_bytes = element * cores + norms
    host = {"process": transformer.PROCESS_HOST_BYTES, "optimizer": core_moment_bytes(settings) * cores}
    host["cores, pinned" if settings.offload else "cores"] = wire_bytes
    if settings.streams:
        host["weights, pinned"] = element * shape.matrix_parameters
    passes = lsp_passes(shape, workload, settings)
    work = _BlockWork.of(shape, workload, settings)
    layers = by_kind(
        transformer.training_layers(shape, workload, passes),
        lambda layer, _: _layer(layer, shape, workload, settings, work),
        [None, *work.uploads, None],
    )
    trained_on_gpu = 0
    if settings.train_outer:
        trained_on_gpu = shape.parameters - shape.matrix_parameters
    slowdown = BF16_MOMENTS_SLOWDOWN if settings.moments == "bf16" else 1.0
    at_once = settings.schedule_order == "layerwise" and settings.max_grad_norm == 0
    offloaded: Overlap = "layerwise" if at_once else "optimizer_after_backward"
    if settings.block_major:
        offloaded = "blockwise" if at_once else "blockwise_after_norm"
    return Traffic(
        layers=tuple(layers),
        **_gpu_memory(shape, workload, settings, element * trained_on_gpu),
        gpu_held_bytes=_graph_bytes(shape, workload, settings),
        host_memory_bytes=host,
        # What goes up is there once too, beside what each of them brings down.
        shared_host_bytes={"optimizer": host["optimizer"] + wire_bytes} if settings.offload else {},
        divided="updates",
        pinned_bytes=sum(size for kind, size in host.items() if kind.endswith(", pinned")),
        overlap=offloaded if settings.offload else "serial",
        cpu_adam_factor=core_adam_bytes(element, settings) / FUSED_ADAM_BYTES * slowdown,
        cpu_adam_slowdown=slowdown,
        cpu_adamw_kernel_factor=core_adam_bytes(element, settings) / ADAMW_KERNEL_BYTES * slowdown,
        rare=_checks(shape, settings),
        reduced_bytes=element * (cores + trained_on_gpu),
    )


def _checks(shape: ModelShape, settings: LspSettings) -> RareWork | None:
    """Measuring the bias of all projectors and finding new ones: at most that much. Projectors that are
    learned take what their gradients ask for, up to `learn_timeout_s`, which nobody can tell beforehand."""
    if settings.projector != "block":
        return None
    return RareWork(every_steps=settings.check_every, gpu_s=CHECK_S * shape.matrix_parameters)


def lsp_passes(shape: ModelShape, workload: Workload, settings: LspSettings) -> BlockPasses:
    """How blocks run; the twin has no graphs, nor have blocks that all micro-batches pass together."""
    passes = block_passes(shape, workload, settings)
    captured = passes.captured and settings.offload and not settings.block_major
    return replace(passes, captured=captured, loss_compiled=False)


def _graph_bytes(shape: ModelShape, workload: Workload, settings: LspSettings) -> int:
    return shape.num_blocks * GRAPH_BYTES if lsp_passes(shape, workload, settings).captured else 0


def _pool_bytes(shape: ModelShape, workload: Workload, settings: LspSettings) -> int:
    """The one pool in which all graphs run. A block's intermediate values lie there, and nothing else may use
    it between blocks or in the steps that test projectors, which run without graphs."""
    if not lsp_passes(shape, workload, settings).captured:
        return 0
    return activations.backward_activation_bytes(shape, workload)


def core_moment_bytes(settings: LspSettings) -> int:
    """Host memory of both moments of an element."""
    return {"fp32": 8, "bf16": 4}[settings.moments]


def core_adam_bytes(element: int, settings: LspSettings) -> int:
    """Host memory traffic per element of a core's Adam: the core and two moments read and written over.
    torch's fused AdamW in fp32, by which machines are probed, moves 28."""
    return 2 * (element + core_moment_bytes(settings))


@dataclass(frozen=True, kw_only=True, slots=True)
class _BlockWork:
    """What the method does in every block alike, in a step."""

    core_elements: int
    chunks: int
    """In which cores travel."""
    saved_flops: float
    """Of the gradients' products that cores replace."""
    moved_bytes: float
    """GPU memory traffic to make cores and to apply their updates, and of copies around graphs."""
    kernels: int
    """Of copies and sums."""
    uploads: list[int]
    """How often each block's weights go up."""

    @classmethod
    def of(cls, shape: ModelShape, workload: Workload, settings: LspSettings) -> _BlockWork:
        moved = sum(projection_bytes(each, settings, workload) for each in shape.matrices)
        sizes = [core_size(each.rows, each.columns, settings) ** 2 for each in shape.matrices]
        count, kernels = workload.accumulation, NORM_KERNELS
        if count > 1:  # sums: cleared, added to, rounded to the core
            kernels += 1 + (count + 1) * len(shape.matrices)
        if lsp_passes(shape, workload, settings).captured:
            moved += 2.0 * GRAPH_COPIES * count * workload.hidden_bytes(shape)
            kernels += GRAPH_COPIES * count
        return cls(
            core_elements=sum(sizes),
            chunks=len(chunk_ends(sizes)),
            saved_flops=sum(saved_flops(matrix, settings, workload) for matrix in shape.matrices),
            moved_bytes=moved,
            kernels=kernels,
            uploads=streamed_uploads(shape.num_blocks) if settings.streams else [0] * shape.num_blocks,
        )


def _layer(
    layer: LayerTraffic, shape: ModelShape, workload: Workload, settings: LspSettings, work: _BlockWork
) -> LayerTraffic:
    """`layer` with what the method adds to it, and without what it saves."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    adam_bytes = ADAM_SLOWDOWN * ADAM_PASSES * element if settings.train_outer else 0
    if layer.name == "head":
        # No graph has it.
        launches = transformer.outside_launches(shape) * workload.accumulation
        on_gpu_bytes = layer.gpu_bytes + adam_bytes * shape.non_block_parameters
        return layer._replace(launches=launches, gpu_bytes=on_gpu_bytes)
    if not layer.name.startswith("block."):
        return layer
    core, matrices = work.core_elements, sum(matrix.parameters for matrix in shape.matrices)
    passes = lsp_passes(shape, workload, settings)
    each = (COMPILED_MATRIX_LAUNCHES if passes.compiled else LAUNCHES) * workload.accumulation
    each += STREAM_LAUNCHES * settings.streams
    launches = layer.launches + each * len(shape.matrices)
    python_launches = BLOCK_LAUNCHES
    if not (passes.captured and settings.projector == "block" and settings.residual == 0):
        python_launches += APPLY_LAUNCHES * len(shape.matrices)
    if settings.streams or not settings.offload:
        python_launches = 0
    if passes.captured:
        launches = 0
        python_launches += REPLAY_LAUNCHES * workload.accumulation
    wire, down = element * core, element * matrices if settings.streams else 0
    up = work.uploads[int(layer.name.removeprefix("block."))] * down
    updated = float(2 * wire + core_adam_bytes(element, settings) * core)
    return layer._replace(
        gpu_backward_flops=layer.gpu_backward_flops - work.saved_flops,
        gpu_bytes=layer.gpu_bytes + work.moved_bytes + adam_bytes * (shape.block_parameters - matrices),
        kernels=layer.kernels + work.kernels,
        launches=launches,
        python_launches=python_launches,
        h2d_bytes=wire + up,
        d2h_bytes=wire + NORM_BYTES + down,
        cpu_adam_elements=core,
        cpu_chunks=work.chunks * settings.offload,
        host_bytes=updated + up + down,
        update_bytes=updated,
    )


def saved_flops(matrix: MatrixShape, settings: LspSettings, workload: Workload) -> float:
    """Operations of a step less than native's: the gradient's product is a core's, 2 T d^2 for 2 T m n."""
    d = core_size(matrix.rows, matrix.columns, settings)
    if settings.residual or forms_gradient(matrix.rows, matrix.columns, d, workload):
        return 0.0
    return 2.0 * workload.tokens_per_step * (matrix.parameters - d * d)


def projection_bytes(matrix: MatrixShape, settings: LspSettings, workload: Workload) -> float:
    """GPU memory traffic of a step to make a matrix's core and to apply its update, in the time of copies."""
    element, d = BYTES_PER_ELEMENT[workload.dtype], core_size(matrix.rows, matrix.columns, settings)
    rows, columns = matrix.rows, matrix.columns
    if settings.residual or forms_gradient(rows, columns, d, workload):
        made = workload.accumulation * (3 * rows * columns + 2 * rows * d)
    else:
        made = workload.tokens_per_step * (rows + columns + 2 * d)
    # Expanded, taken off the gradient, kept, scaled, filled and applied.
    left_out = (RESIDUAL_PASSES * matrix.parameters + d * d) if settings.residual else 0
    own = OWN_KERNELS_SLOWDOWN * (made + 2 * matrix.parameters)
    moved = element * (own + 4 * d * d + left_out)
    if workload.accumulation > 1:  # fp32 sums: cleared, added to by each micro-batch, rounded to the core
        moved += (4 + 12 * workload.accumulation + 4 + element) * d * d
    return float(moved)


def _gpu_memory(
    shape: ModelShape, workload: Workload, settings: LspSettings, trained_bytes: int
) -> GpuMemory:
    """GPU memory at the worst of three moments: the trial, the loss, the last gradients of a block."""
    element = BYTES_PER_ELEMENT[workload.dtype]
    sizes = [core_size(matrix.rows, matrix.columns, settings) for matrix in shape.matrices]
    core = sum(d * d for d in sizes)
    chunk = min(core, max([CHUNK_ELEMENTS, *(d * d for d in sizes)]))
    slots = min(CORE_SLOTS, shape.num_blocks) if settings.offload else shape.num_blocks
    nonzeros = shape.num_blocks * sum(
        (matrix.rows + matrix.columns) * min(nonzeros_per_row(settings), d)
        for matrix, d in zip(shape.matrices, sizes, strict=True)
    )
    kept = sum(matrix.parameters for matrix in shape.matrices) if settings.residual else 0
    stores_places = settings.projector != "block"
    on_host = 0
    if settings.streams:
        away = max(0, shape.num_blocks - WEIGHT_SLOTS)
        on_host = element * away * sum(matrix.parameters for matrix in shape.matrices)
    held = {
        "weights": element * shape.parameters - on_host,
        "optimizer": 2 * trained_bytes,
        "gradients": trained_bytes,
        "projectors": nonzeros * ((2 * element + INDEX_BYTES) if stores_places else element),
        "cores": element * slots * core,
    }
    if settings.streams:
        held["cores"] += element * min(WEIGHT_SLOTS, shape.num_blocks) * core
    elif settings.offload:
        held["cores"] += element * UPLOAD_SLOTS * chunk
    held["gradients"] += element * kept  # what one block's projectors leave out
    if workload.accumulation > 1:
        held["cores"] += 4 * (1 if settings.block_major else shape.num_blocks) * core
    # Steps that test projectors are not compiled, and keep more.
    passes = replace(block_passes(shape, workload, settings), compiled=False)
    saved = activations.saved_activation_bytes(shape, workload, passes)
    again = 0
    if settings.block_major:
        saved = workload.accumulation * (saved + workload.hidden_bytes(shape))
        if passes.recomputed:
            again = activations.block_activation_bytes(shape, workload)
    # A check forms the gradient, and holds three of its size in fp32.
    largest = max(
        (
            workload.batch_size * workload.seq_len * d * element + matrix.parameters * (element + CHECK_BYTES)
            for matrix, d in zip(shape.matrices, sizes, strict=True)
        ),
        default=0,
    )
    moments = (
        {
            "activations": saved,
            "logits": _logits_bytes(shape, workload, settings),
        },
        {
            "activations": saved + again + workload.hidden_bytes(shape),
            "scratch": largest,
        },
    )
    kinds = [{**held, **moment} for moment in moments]
    if settings.train_outer and trained_bytes:
        # Gradients of the head and of the embedding are made before they are added to those that are there.
        of_head = {
            "activations": saved,
            "logits": _logits_bytes(shape, workload, settings) // 2,
            "scratch": element * shape.head_parameters,
        }
        kinds += [{**held, **of_head}, {**held, "scratch": element * shape.largest_tensor}]
    apart = activations.apart_bytes(kinds)
    if settings.block_major:  # a block's passes find the places that the logits have left
        apart = int(UNSHARED * apart)
    stays = 0
    if settings.train_outer and trained_bytes:
        stays += lost_in_head_gradient(shape, workload)
    if settings.streams and stays_in_logits(shape, workload):
        stays, apart = stays + apart, 0
    pool, most = _pool_bytes(shape, workload, settings), activations.peak_moment(kinds)
    return GpuMemory(
        **with_trial(shape, workload, most, pool=pool, stays=stays, returned=apart),
        gpu_margin=MARGIN,
        gpu_without_triton_bytes=0,
        workspaces=workspaces(lsp_passes(shape, workload, settings)),
    )


def _logits_bytes(shape: ModelShape, workload: Workload, settings: LspSettings) -> int:
    """With blocks that all micro-batches pass together the loss is compiled too."""
    compiled = settings.compile is not False
    if settings.block_major or not compiled or BYTES_PER_ELEMENT[workload.dtype] == 4:
        return loss.logits_bytes(shape, workload, compiled=compiled and settings.block_major)
    return LOSS_BYTES * loss.num_logits(shape, workload)
