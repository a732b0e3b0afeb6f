"""What MeZO costs with everything on the GPU: both forward passes stacked in one batch, and a pass over each
block's weights that makes noise twice, to update them and to perturb them; what is outside of blocks has a
pass for each. With several queries all of that is done for each, but only the first one's pass updates, by
all their entries at once (`engines.zeroth_order.estimators`).

Perturbed copies exist of one matrix at a time, or of a whole block where that is small or several
micro-batches share its visit. The head is perturbed in chunks of its vocabulary, and of the embeddings only
the rows that are looked up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines.costs import loss, transformer
from engines.costs.memory import activations
from engines.costs.quantized import block_bytes
from engines.costs.resources.traffic import GpuMemory, LayerTraffic, Traffic, by_kind
from engines.settings.zeroth_order import MezoSettings
from engines.shapes import BYTES_PER_ELEMENT, ModelShape, Workload

LORA_LAUNCHES = 4
"""Per matrix: its adapter's two products, the second of which adds, for each half of the batch."""

SIGN_COST = 0.3
"""A sign of a low-bit matrix, in normals: on an H200 the noise of a step of OPT-13B took 80 ms with signs and
136 with normals, of which 55 are not for noise; those of steps that round, which are dearer, included."""

BINOMIAL_COST = 0.45
"""A binomial draw, in normals: of 41.5 instructions for each element and update of a low-bit matrix 18.5 are
left, compiled for sm_90 (engines/EXPERIMENTS.md, 'Binomial noise'). Not measured on a GPU."""

TRIAL_BYTES = 100_000_000
"""What trying the model takes beside its stand-in for weights: 0.09 GB at Qwen2.5 3B."""

APART_SHARE = 0.6
"""What torch reserves beside a forward-only step's peak, as a share of its activations, which come in few
sizes and leave places that do not fit each other: 2.4 of 3.7 GB at 8 x 2048 tokens of OPT-13B, 0.25 to 0.4 of
0.46 at 1 x 2048 (reports/results, one H200). Where blocks do not run as graphs."""

MARGIN = 0.04
"""What memory that is needed may exceed what is counted by, beside `profiles.planning.budget.PIECES_BYTES`:
ten edges on H200s ran out with up to 27 MB more than is counted, and those whose limit was met ran with 101;
`mezo` of Qwen2.5 1.5B with 8,192 tokens ran out with 180 MB more, 3.7 %, of which no cause is known
(`tests/studies/prediction_grid_h200`, `_third_evening`)."""

LOOKUPS = 2
"""Gaussians per token and hidden element before the blocks, of each pass: two tables (tokens, positions)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterWork:
    """What a step does to each parameter of a tensor besides multiplying with it."""

    gaussians: float
    moves: float
    """Times that it is read or written."""

    def __add__(self, other: ParameterWork) -> ParameterWork:
        return ParameterWork(gaussians=self.gaussians + other.gaussians, moves=self.moves + other.moves)

    def __mul__(self, times: float) -> ParameterWork:
        return ParameterWork(gaussians=self.gaussians * times, moves=self.moves * times)


UPDATE = ParameterWork(gaussians=1, moves=2)
PERTURB = ParameterWork(gaussians=1, moves=3)
"""One draw serves both sides: theta read, both copies written."""

ONE_SIDED = ParameterWork(gaussians=1, moves=2)

FROZEN = ParameterWork(gaussians=0, moves=2)
"""Copied to scratch as it is, so that both sides compute with it and its room in a ring is free."""

STORED_IN_TILES = 10
"""What storing a parameter in lossless tiles takes beside the bytes of those, in reads or writes of it:
theta is written to scratch, encoded from there, and read once more to be perturbed. 1.6 ms for the 314.6 M
weights of a block of OPT-13B on an H200 (engines/EXPERIMENTS.md, 'A lossless base')."""


def traffic(shape: ModelShape, workload: Workload, settings: MezoSettings) -> Traffic:
    element = BYTES_PER_ELEMENT[workload.dtype]
    block = block_bytes(shape, workload.dtype, settings.base)
    turn = settings.fold_every if settings.is_quantized else 1
    visits = [fused_visit(settings, turn, block / (element * shape.block_parameters))] * shape.num_blocks
    weights = element * shape.non_block_parameters + shape.num_blocks * block
    return Traffic(
        layers=tuple(perturbed_layers(shape, workload, settings, visits)),
        **gpu_memory(shape, workload, settings, {"weights": weights}),
        host_memory_bytes={"process": transformer.PROCESS_HOST_BYTES},
        forwards=float(settings.forward_passes),
    )


def update(settings: MezoSettings) -> ParameterWork:
    """The entries of a step, in one pass."""
    return ParameterWork(gaussians=settings.queries, moves=UPDATE.moves)


def perturb(settings: MezoSettings) -> ParameterWork:
    """For all probes of a step, of which one may be a copy of theta itself."""
    moved = (ONE_SIDED if settings.is_one_sided else PERTURB) * settings.queries
    return moved + FROZEN if settings.has_clean_pass else moved


def num_probes(settings: MezoSettings) -> int:
    """Times that a step makes perturbed copies, one of theta itself included."""
    return settings.queries + settings.has_clean_pass


def fused_visit(settings: MezoSettings, fold_every: int, kept: float = 1.0) -> ParameterWork:
    """Deferred updates, storing and the perturbed copies of the first probe in one pass over theta; those of
    the others in one pass each.

    Between two turns the updates of 1 to `fold_every` steps are deferred, (fold_every + 1) / 2 on average,
    and theta is written back in the last visit only, or where there are several probes in each. A low-bit
    theta is not, so that each of them replays the updates. `kept` is the size of theta as it is kept over
    that of a copy.
    """
    moved, queries = perturb(settings), settings.queries
    written, steps = 1 / fold_every, (fold_every + 1) / 2
    if settings.is_quantized:
        steps = num_probes(settings) * (fold_every - 1) / 2 + 1
    elif settings.forward_passes > 2:
        written = 1
    stored = kept + STORED_IN_TILES if settings.base == "lossless" else kept
    moves = moved.moves - (1 - kept) * num_probes(settings) + stored * written
    return ParameterWork(gaussians=queries * steps + moved.gaussians, moves=moves)


def trains_block(settings: MezoSettings, index: int, num_blocks: int) -> bool:
    """Whether the weights of block `index` themselves are trained; not those of adapters beside them."""
    if settings.train == "lora":
        return False
    return settings.train == "all" or index >= num_blocks - int(settings.train.removeprefix("last:"))


def adapter_parameters(shape: ModelShape, settings: MezoSettings) -> int:
    """Of the adapters of one block: rank x rows and rank x columns for each matrix."""
    if settings.train != "lora":
        return 0
    return settings.lora_rank * sum(matrix.rows + matrix.columns for matrix in shape.matrices)


def trained_non_block_parameters(shape: ModelShape, settings: MezoSettings) -> tuple[int, int]:
    """Parameters outside the blocks that are updated, and those among them that the head multiplies with.

    With `last:N` embeddings are frozen, a head that is tied to them included. What remains is the head and a
    norm; a classifier's hidden layer before its classes is not known to the shape and counts as frozen.
    """
    if settings.train == "lora":
        return 0, 0
    if settings.train == "all":
        return shape.non_block_parameters, shape.head_parameters
    head = 0 if shape.tied else shape.head_parameters
    norm = shape.hidden if shape.gated_mlp else 2 * shape.hidden
    return min(head + norm, shape.non_block_parameters), head


def perturbed_layers(
    shape: ModelShape, workload: Workload, settings: MezoSettings, visits: Sequence[ParameterWork]
) -> list[LayerTraffic]:
    """Both forward passes with the noise and the update of every layer.

    `visits` is what is done to each block's weights where they are trained. What is outside the blocks is
    updated once, and perturbed for each micro-batch.
    """
    updated, head = trained_non_block_parameters(shape, settings)
    passes = settings.forward_passes
    drawn = passes - settings.has_clean_pass
    lookups = LOOKUPS * drawn * workload.tokens_per_step * shape.hidden if settings.train == "all" else 0
    chunks, _ = loss.head_chunks(shape, workload)
    stacked = transformer.stacked_layers(shape, workload)
    first, *blocks, last = by_kind(stacked, lambda layer: _passes(layer, passes))
    last = _visited(last, update(settings), updated, settings.queries, workload)
    probes = settings.queries * workload.accumulation
    perturbed = ONE_SIDED if settings.is_one_sided else PERTURB
    layers = [
        first._replace(gaussians=lookups),
        *by_kind(
            blocks,
            lambda block, visit, trained: _block(block, shape, workload, settings, visit, trained=trained),
            visits,
            [trains_block(settings, index, shape.num_blocks) for index in range(shape.num_blocks)],
        ),
        _visited(last, perturbed, probes * head, probes * chunks, workload),
    ]
    if settings.noise == "binomial":
        return by_kind(layers, lambda layer: layer._replace(gaussians=round(BINOMIAL_COST * layer.gaussians)))
    if settings.noise == "rademacher":
        # Signs cost less than the memory they are written to. A pass over low-bit matrices moves fewer bytes,
        # and makes several: there they count.
        first, *blocks, last = layers
        kept = SIGN_COST if settings.is_quantized else 0.0
        blocks = by_kind(blocks, lambda block: block._replace(gaussians=round(kept * block.gaussians)))
        return [first._replace(gaussians=0), *blocks, last._replace(gaussians=0)]
    return layers


def _passes(layer: LayerTraffic, passes: int) -> LayerTraffic:
    """So many forward passes in place of two."""
    return layer._replace(
        gpu_forward_flops=layer.gpu_forward_flops * passes / 2,
        gpu_bytes=layer.gpu_bytes * passes / 2,
        products=layer.products * passes // 2,
        kernels=layer.kernels * passes // 2,
        launches=layer.launches * passes // 2,
        waited_launches=layer.waited_launches * passes // 2,
    )


def _block(
    layer: LayerTraffic,
    shape: ModelShape,
    workload: Workload,
    settings: MezoSettings,
    visit: ParameterWork,
    *,
    trained: bool,
) -> LayerTraffic:
    # One for each matrix and one for the vectors. Where a block runs as a graph, noise is made in chunks,
    # which `forward.GRAPH_LAUNCHES` counts.
    launches = (
        0 if transformer.runs_as_graphs(shape, workload) else settings.queries * (len(shape.matrices) + 1)
    )
    if trained and settings.noise_window is not None:
        return _with_low_rank(layer, visit, shape, workload, settings)
    frozen = FROZEN
    if settings.base == "lossless":
        block = block_bytes(shape, workload.dtype, settings.base)
        kept = block / (BYTES_PER_ELEMENT[workload.dtype] * shape.block_parameters)
        frozen = ParameterWork(gaussians=0, moves=1 + kept)
    layer = _visited(layer, visit if trained else frozen, shape.block_parameters, launches, workload)
    return layer if settings.train != "lora" else _with_adapters(layer, shape, workload, settings)


def _with_low_rank(
    layer: LayerTraffic, visit: ParameterWork, shape: ModelShape, workload: Workload, settings: MezoSettings
) -> LayerTraffic:
    """LOZO, and directions of each example: matrices are copied to scratch as they are; their noise is that
    of its factors, V and each U, and its update that of U. Two products of low rank beside each matrix, the
    second twice as wide (A and U)."""
    matrices = sum(matrix.parameters for matrix in shape.matrices)
    passes, rank, q = settings.forward_passes, settings.rank(workload.examples_per_step), settings.queries
    rows, columns = (sum(getattr(each, side) for each in shape.matrices) for side in ("rows", "columns"))
    added_bytes = passes * 2 * BYTES_PER_ELEMENT[workload.dtype] * workload.tokens_per_step * rows
    layer = layer._replace(
        gpu_forward_flops=layer.gpu_forward_flops
        + passes * 2.0 * rank * (columns + 2 * rows) * workload.tokens_per_step,
        gpu_bytes=layer.gpu_bytes + added_bytes + 2 * 4 * rank * q * rows,
        gaussians=layer.gaussians + rank * q * (columns + 2 * rows),
    )
    # A query's copy, and its products: inner, side by side, and one for each side; V, A twice, and U.
    launches = q * (9 * len(shape.matrices) + 3)
    if settings.estimator == "grzo":
        # Inner, its own part, both together, and one product, in the graph where there is one; of the block
        # V, A, U, and U again for the update.
        as_graph = transformer.runs_as_graphs(shape, workload)
        launches = (1 if as_graph else 5 * workload.accumulation) * len(shape.matrices) + 9
    layer = _visited(layer, FROZEN * q, matrices, launches, workload)
    return _visited(layer, visit, shape.block_parameters - matrices, q, workload)


def accumulator_bytes(shape: ModelShape, workload: Workload, settings: MezoSettings) -> int:
    """Of low-rank noise, in fp32, of all blocks that are trained; with directions of each example also what a
    block's update is made in."""
    if settings.noise_window is None:
        return 0
    blocks = sum(trains_block(settings, index, shape.num_blocks) for index in range(shape.num_blocks))
    if settings.estimator == "grzo":
        blocks += 2
    rank = settings.rank(workload.examples_per_step)
    return 4 * rank * blocks * sum(matrix.rows for matrix in shape.matrices)


def _with_adapters(
    layer: LayerTraffic, shape: ModelShape, workload: Workload, settings: MezoSettings
) -> LayerTraffic:
    """Low-rank products beside every matrix, whose result is added to that of the matrix."""
    adapters = adapter_parameters(shape, settings)
    rows = sum(matrix.rows for matrix in shape.matrices)
    passes = settings.forward_passes
    products = LORA_LAUNCHES * len(shape.matrices) * workload.accumulation * passes // 2
    added_bytes = passes * 2 * BYTES_PER_ELEMENT[workload.dtype] * workload.tokens_per_step * rows
    layer = layer._replace(
        gpu_forward_flops=layer.gpu_forward_flops + passes * 2.0 * adapters * workload.tokens_per_step,
        gpu_bytes=layer.gpu_bytes + added_bytes,
        launches=layer.launches + products,
    )
    return _visited(layer, update(settings) + perturb(settings), adapters, 2 * settings.queries, workload)


def _visited(
    layer: LayerTraffic, visit: ParameterWork, parameters: int, launches: int, workload: Workload
) -> LayerTraffic:
    if parameters == 0:
        return layer
    element = BYTES_PER_ELEMENT[workload.dtype]
    return layer._replace(
        gpu_bytes=layer.gpu_bytes + visit.moves * element * parameters,
        gaussians=layer.gaussians + round(visit.gaussians * parameters),
        triton_launches=layer.triton_launches + launches,
    )


def hidden_state_bytes(shape: ModelShape, workload: Workload, settings: MezoSettings) -> list[int]:
    """Of each hidden state that a step has between two blocks: of every micro-batch and every probe, whose
    sides lie together."""
    one = workload.hidden_bytes(shape)
    clean = [one] * (settings.has_clean_pass * workload.accumulation)
    sides = 1 if settings.is_one_sided else 2
    return clean + [sides * one] * (settings.queries * workload.accumulation)


def graph_pool_bytes(shape: ModelShape, workload: Workload, settings: MezoSettings) -> int:
    """What the pool of blocks that run as graphs has: the places of attention's tensors and those of the
    feed-forward part's, which are larger. While a graph is captured torch neither joins places nor gives any
    back."""
    if not transformer.runs_as_graphs(shape, workload):
        return 0
    sides = 1 if settings.is_one_sided else 2
    return sides * activations.forward_pool_bytes(shape, workload)


def gpu_memory(
    shape: ModelShape,
    workload: Workload,
    settings: MezoSettings,
    held: Mapping[str, int],
    hidden_bytes: int | None = None,
) -> GpuMemory:
    """GPU memory at the worse of two moments: inside a block's feed-forward part, and at the head.

    `held` is there throughout, and so are the blocks' scratch and the hidden states of all passes of all
    micro-batches, or `hidden_bytes` of them. At the head the final norm's result and the labelled positions
    of both sides come to those.
    """
    element = BYTES_PER_ELEMENT[workload.dtype]
    as_graphs = transformer.runs_as_graphs(shape, workload)
    if as_graphs or workload.accumulation > 1:
        visited = shape.block_parameters
    else:
        visited = transformer.largest_matrix_parameters(shape) + transformer.vector_parameters(shape)
    adapters = adapter_parameters(shape, settings)
    # With adapters every block is frozen, and both sides compute with one copy.
    one_sided = settings.is_one_sided
    scratch = element * ((1 if adapters or one_sided else 2) * visited + 2 * adapters)
    _, trained_head = trained_non_block_parameters(shape, settings)
    head_scratch = loss.head_scratch_bytes(shape, workload) if trained_head else 0
    hidden = sum(hidden_state_bytes(shape, workload, settings)) if hidden_bytes is None else hidden_bytes
    # A graph has its input at a place of its own.
    hidden += 2 * as_graphs * workload.hidden_bytes(shape)
    kept = {**held}
    if adapters:
        kept["adapters"] = element * shape.num_blocks * adapters
    if accumulators := accumulator_bytes(shape, workload, settings):
        kept["optimizer"] = accumulators
    in_block = {
        **kept,
        "scratch": scratch,
        "activations": hidden + (2 - one_sided) * activations.forward_activation_bytes(shape, workload),
        "logits": 0,
    }
    at_head, without_triton = (
        {
            **kept,
            "scratch": scratch + head_scratch,
            "activations": hidden + 2 * 2 * workload.hidden_bytes(shape),
            "logits": loss.chunked_logits_bytes(shape, workload, has_triton=has_triton),
        }
        for has_triton in (True, False)
    )
    apart = APART_SHARE * max(in_block["activations"], at_head["activations"])
    if as_graphs:
        # The pool of the graphs stays, and nothing else may use it: the head has places of its own. What the
        # first step's blocks had, before there were graphs, was given back before the first capture.
        beside = sum(at_head.values()) + graph_pool_bytes(shape, workload, settings)
        apart = max(0, beside - max(sum(in_block.values()), sum(at_head.values())))
    # Before anything is filled the blocks are tried on stand-ins (`engines.model.stand_ins`), in fp32.
    trial = {"trial": 4 * shape.largest_tensor + TRIAL_BYTES}
    peak = activations.peak_moment([in_block, at_head, trial])
    more = sum(activations.peak_moment([in_block, without_triton, trial]).values()) - sum(peak.values())
    return GpuMemory(
        gpu_memory_bytes=peak,
        gpu_apart_bytes=int(apart),
        gpu_pool_bytes=int(apart) if as_graphs else 0,
        gpu_returned_bytes=0,
        gpu_margin=MARGIN,
        gpu_without_triton_bytes=more,
        workspaces=2 if as_graphs else 1,
    )
