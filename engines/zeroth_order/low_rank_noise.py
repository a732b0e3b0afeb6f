"""LOZO: zeroth-order fine-tuning with low-rank noise (arXiv 2410.07698), on weights that are only read.

For each matrix W (m, n) of a linear layer in the blocks, in step t with its window w = t div nu:

    z = U_t V_w^T      U_t (m, r) ~ N(0, 1) anew in each step, V_w (n, r) ~ N(0, 1) for nu steps
    g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps)
    W <- W - lr g z / r                                    the estimate of the paper: E z z^T = r I

Within a window all updates of W have V_w in common, so their sum is A V_w^T / r with A = - sum lr g U_t, an
(m, r) accumulator in fp32. W itself stays as it was:

    y = x W^T + (x V_w) (A / r +- eps U_t)^T

one product with W for both sides, and rank-r products beside it. There is no perturbed copy of a matrix, no
noise of a matrix's size and nothing to send down. On the first visit of the next window A V_w^T / r is added
to W, rounded stochastically as all updates are, and W then goes down once.

Everything else (biases, norms, embeddings, the head, experts) takes Gaussian noise as in MeZO. In the blocks
its updates stay in the log until the window ends.

On the GPU, beside what MeZO has there: A of all blocks, and V, U and A in the weights' precision of one.

Deviations from the paper:
- The embeddings and the head have Gaussian noise of full rank, since they are on the GPU anyway.
- There is no momentum.
- A is rounded to the weights' precision where it is multiplied with (as V and eps U are), and not where it is
  added up.

A low-bit base (`engines.quantized.codec`) is written likewise when a window ends: the sum is rounded to its
grid, once in so many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from engines.errors import UserError
from engines.kernels.triton_launch import has_triton
from engines.model.flat_layout import ALIGNMENT_BYTES, ModelLayout
from engines.noise import philox, weight_pass
from engines.noise.philox import NoiseKey
from engines.noise.tiles import TILE, Segment
from engines.noise.visits import Outputs, Visit
from engines.quantized import quantized_pass
from engines.settings.zeroth_order import MezoSettings
from engines.zeroth_order.block_visit import Task, without_updates
from engines.zeroth_order.lora import MINUS, PLAIN, Adapters, TwoSided, linear_matrices

FOLD_CHUNK = 512 * TILE
"""Elements that are folded at a time by torch operations."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix with low-rank noise; views of the memory of its block's visit."""

    name: str
    paths: tuple[str, ...]
    """Of the modules that multiply with it."""
    turned: bool
    """Inputs x outputs in memory."""
    u_number: int
    v_number: int
    number: int
    """The tensors' parts of their noise keys; `number` is the matrix's own, for rounding."""
    accumulator: Tensor
    """A^T, (rank, outputs) fp32."""
    v: Tensor
    """(rank, inputs)."""
    sides: tuple[Tensor, Tensor]
    """(2 rank, outputs) each: A^T / rank over eps U^T, and over - eps U^T."""
    folded: tuple[Tensor, Tensor]
    """A^T / rank and V^T of the window that is being folded, (rank, outputs) and (rank, inputs) fp32."""


class LowRank(TwoSided):
    """The low-rank noise of a model, in the place of `engines.zeroth_order.lora.Adapters`.

    `model` is read and not changed, and its weights need not be there. Raises `UserError` if nothing in its
    trained blocks can have such noise.
    """

    form = None

    def __init__(
        self,
        model: nn.Module,
        layout: ModelLayout,
        settings: MezoSettings,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._rank, self._window, self._queries = (
            settings.lozo_rank, settings.lozo_window, settings.queries
        )  # fmt: skip
        self._rounding = settings.rounding
        self._base = settings.base
        shapes = [
            {name: places for name, places in linear_matrices(model, block).items() if name in layout.trained}
            for block in layout.blocks
        ]
        if not any(shapes):
            raise UserError(
                type(model).__name__, "has no linear layer in its trained blocks", "use estimator=spsa"
            )
        grid = ALIGNMENT_BYTES // dtype.itemsize
        names = [name for block in shapes for name in block]
        numbers = {name: len(layout.shapes) + 2 * i for i, name in enumerate(names)}
        rank = self._rank

        def extents(of_rows: int, which: int) -> list[int]:
            """Elements of the largest block, at so many rows of its matrices' outputs (0) or inputs (1)."""
            return [
                sum(_up(of_rows * places.sizes[which], grid) for places in block.values()) for block in shapes
            ]

        self._flat = torch.zeros(sum(extents(rank, 0)), dtype=torch.float32, device=device)
        """Accumulators of all blocks."""
        self._v = torch.zeros(max(extents(rank, 1)), dtype=dtype, device=device)
        # HAZARD: graphs of the blocks know these by address, so they are filled and never replaced.
        self._sides = [torch.zeros(max(extents(2 * rank, 0)), dtype=dtype, device=device) for _ in range(2)]
        folded = (
            torch.zeros(max(extents(rank, 0)), dtype=torch.float32, device=device),
            torch.zeros(max(extents(rank, 1)), dtype=torch.float32, device=device),
        )
        self._blocks: list[list[_Matrix]] = []
        self._v_segments: list[Segment] = []
        self._u_segments: list[Segment] = []
        start = 0
        offsets: list[int] = []
        for block in shapes:
            here: list[_Matrix] = []
            v_at = u_at = a_at = 0
            v_offsets, u_offsets = [], []
            for name, places in block.items():
                outputs, inputs = places.sizes
                offsets.append(start)
                v_offsets.append(v_at)
                u_offsets.append(u_at + rank * outputs)
                here.append(
                    _Matrix(
                        name=name,
                        paths=places.paths,
                        turned=places.turned,
                        u_number=numbers[name],
                        v_number=numbers[name] + 1,
                        number=layout.numbers[name],
                        accumulator=_view(self._flat, start, rank, outputs),
                        v=_view(self._v, v_at, rank, inputs),
                        sides=(
                            _view(self._sides[0], u_at, 2 * rank, outputs),
                            _view(self._sides[1], u_at, 2 * rank, outputs),
                        ),
                        folded=(
                            _view(folded[0], a_at, rank, outputs),
                            _view(folded[1], v_at, rank, inputs),
                        ),
                    )
                )
                start += _up(rank * outputs, grid)
                a_at += _up(rank * outputs, grid)
                v_at += _up(rank * inputs, grid)
                u_at += _up(2 * rank * outputs, grid)
            self._blocks.append(here)
            self._v_segments.append(_segment(here, v_offsets, lambda m: (m.v_number, m.v.numel())))
            self._u_segments.append(_segment(here, u_offsets, _u_of))
        self._segment = _segment([m for block in self._blocks for m in block], offsets, _u_of)
        everything = [matrix for block in self._blocks for matrix in block]
        self.tensors = {f"{matrix.name}.lozo": matrix.accumulator for matrix in everything}
        """A^T of every matrix, (rank, outputs) fp32: part of a checkpoint."""
        self.numbers = {f"{matrix.name}.lozo": matrix.u_number for matrix in everything}
        self.blocks = tuple(index for index, here in enumerate(self._blocks) if here)
        """Those with such matrices."""
        self._by_name = {matrix.name: matrix for matrix in everything}
        self._by_module: dict[nn.Module, _Matrix] = {}

    def layout(self, layout: ModelLayout) -> ModelLayout:
        """With the matrices as weights that are only read."""
        blocks = tuple(
            replace(
                block,
                parts=tuple(
                    replace(part, trained=part.trained and self._by_name.keys().isdisjoint(part.names))
                    for part in block.parts
                ),
            )
            for block in layout.blocks
        )
        return replace(layout, blocks=blocks, trained=layout.trained - self._by_name.keys())

    def install(self, model: nn.Module) -> set[nn.Module]:
        """Let the modules compute with their noise, too; which modules those are."""
        for matrix in self._by_name.values():
            for path in matrix.paths:
                module = model.get_submodule(path)
                if module not in self._by_module:
                    self._by_module[module] = matrix
                    module.forward = self._forward(module.forward, module)
        return set(self._by_module)

    def _forward(self, product: Callable[[Tensor], Tensor], module: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            y = product(x)  # newly made, so it may be added to
            self.add(module, x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))
            return y

        return forward

    def add(self, module: nn.Module, x: Tensor, out: Tensor) -> None:
        """What the module's product of `x` (rows, inputs) lacks, to `out` (rows, outputs)."""
        matrix = self._by_module[module]
        inner = x @ matrix.v.t()
        inner = torch.cat((inner, inner), 1)
        for side, rows in self.spans(x.shape[0]):
            out[rows].addmm_(inner[rows], matrix.sides[side == MINUS])

    def begin(self, block: int, task: Task) -> None:
        """The visit of a block begins. Outside of a block's graph, which reads what is written here."""
        self.take_side(task)
        if not self._blocks[block]:
            return
        how = without_updates(task.how)
        for memory in (self._v, *self._sides):
            memory.zero_()
        # A perturbed pass is that of the window that goes on, one with theta itself may be at its end.
        step = how.step // self._queries if task.perturb else how.step - 1
        self._make_v(block, step // self._window, how)
        for matrix in self._blocks[block]:
            for side in matrix.sides[: 1 if self._now == PLAIN else 2]:
                torch.mul(matrix.accumulator, 1 / self._rank, out=side[: self._rank])
        if task.perturb:
            plus, minus = self._sides
            weight_pass.visit(plus, self._u_segments[block], how, Outputs(plus=plus, minus=minus))

    def _make_v(self, block: int, window: int, how: Visit) -> None:
        of = replace(how, step=max(0, window), eps=1.0)
        weight_pass.visit(self._v, self._v_segments[block], of, Outputs(plus=self._v))

    def update(self, how: Visit) -> None:
        """Apply deferred updates to all accumulators."""
        weight_pass.visit(self._flat, self._segment, how, Outputs(theta=self._flat))

    def start_fold(self, block: int, window: int, how: Visit) -> None:
        """What the block gathered in `window` is put aside, and its accumulators begin anew."""
        self._v.zero_()
        self._make_v(block, window, without_updates(how))
        for matrix in self._blocks[block]:
            torch.mul(matrix.accumulator, 1 / self._rank, out=matrix.folded[0])
            matrix.folded[1].copy_(matrix.v)
            matrix.accumulator.zero_()

    def fold(self, name: str, weight: Tensor, window: int, seed: int) -> None:
        """W += A V^T / rank in place, for the flat memory of a matrix, or its tiles; nothing for another
        tensor."""
        matrix = self._by_name.get(name)
        if matrix is None:
            return
        rows, columns = reversed(matrix.folded) if matrix.turned else matrix.folded
        key = NoiseKey(seed=seed, step=window, tensor=matrix.number)
        stochastic = self._rounding == "stochastic"
        if weight.dtype == torch.uint8:
            quantized_pass.add_low_rank_to_tiles(
                weight, self._base, rows, columns, key, stochastic=stochastic
            )
        else:
            add_low_rank(weight, rows, columns, key, stochastic=stochastic)

    def merged(self, name: str, weight: Tensor, how: Visit) -> Tensor:
        """The model's own tensor of that first name, on the CPU, with what its window has gathered so far.

        In fp32, rounded once to nearest.
        """
        matrix = self._by_name.get(name)
        if matrix is None or how.step == 0:
            return weight
        key = NoiseKey(seed=how.seed, step=(how.step - 1) // self._window, tensor=matrix.v_number)
        v = philox.normal(key, matrix.v.numel()).view(matrix.v.shape).to(weight.dtype).float()
        change = (matrix.accumulator.cpu() / self._rank).t() @ v
        if matrix.turned:
            change = change.t()
        return torch.where(change == 0, weight, (weight.float() + change).to(weight.dtype))


def window_due(settings: MezoSettings, step: int) -> int | None:
    """Window that is to be folded before `step` perturbs anything; `None`: none is."""
    if settings.estimator != "lozo" or step == 0 or step % settings.lozo_window:
        return None
    return step // settings.lozo_window - 1


def beside(
    model: nn.Module,
    layout: ModelLayout,
    settings: MezoSettings,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> tuple[Adapters | LowRank, ModelLayout]:
    """What stands beside the layers of the blocks, and the layout of the weights that it leaves to train."""
    if settings.estimator != "lozo":
        return Adapters(model, layout, settings, dtype, device, seed), layout
    low_rank = LowRank(model, layout, settings, dtype, device)
    left = low_rank.layout(layout)
    others = [
        part.names[0]
        for block in left.blocks
        for part in block.own_parts
        if part.trained and part.segment.decays[0]
    ]
    if settings.is_quantized and others:
        raise UserError(
            type(model).__name__,
            f"has trained matrices that are not of linear layers ('{others[0]}')",
            "use base=full with estimator=lozo, or estimator=spsa",
        )
    return low_rank, left


def add_low_rank(weight: Tensor, rows: Tensor, columns: Tensor, key: NoiseKey, *, stochastic: bool) -> None:
    """weight[i, j] += sum over k of rows[k, i] columns[k, j], in place, computed in fp32 in that order.

    `weight` is (m n,) of any dtype, `rows` (rank, m) and `columns` (rank, n) fp32. Rounded once, with the
    bits of `key`'s rounding stream where `stochastic`.
    """
    stochastic = stochastic and weight.dtype in (torch.bfloat16, torch.float16)
    if weight.is_cuda and has_triton():
        from engines.noise import low_rank_kernels

        low_rank_kernels.add_low_rank(weight, rows, columns, key, stochastic=stochastic)
        return
    width = columns.shape[1]
    for start in range(0, weight.numel(), FOLD_CHUNK):
        chunk = weight[start : start + FOLD_CHUNK]
        element = torch.arange(start, start + chunk.numel(), device=weight.device)
        row, column = element // width, element % width
        change = rows[0, row] * columns[0, column]
        for k in range(1, rows.shape[0]):
            change = change + rows[k, row] * columns[k, column]
        moved = chunk.float() + change
        if stochastic:
            bits = philox.dither_bits(key, chunk.numel(), weight.device, start)
            moved = weight_pass.dither(moved, bits, weight.dtype)
        chunk.copy_(moved)


def _up(count: int, grid: int) -> int:
    return -(-count // grid) * grid


def _view(flat: Tensor, start: int, rows: int, columns: int) -> Tensor:
    return flat[start : start + rows * columns].view(rows, columns)


def _u_of(matrix: _Matrix) -> tuple[int, int]:
    return matrix.u_number, matrix.accumulator.numel()


def _segment(
    matrices: Sequence[_Matrix], offsets: Sequence[int], of: Callable[[_Matrix], tuple[int, int]]
) -> Segment:
    pairs = [of(matrix) for matrix in matrices]
    return Segment([n for n, _ in pairs], offsets, [c for _, c in pairs], [False] * len(pairs))
