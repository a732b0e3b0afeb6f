"""Low-rank noise beside the linear layers of the blocks, whose weights are only read until a window ends.

What the estimators have in common that draw such noise (`engines.zeroth_order.low_rank.lozo`, one direction a
matrix; `engines.zeroth_order.low_rank.example_noise`, one an example), in the notation of the first: forwards
of layers, windows, what is added to weights when one ends, and checkpoints.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from engines.base import Update
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
from engines.zeroth_order.low_rank.linear_matrices import LinearMatrix, linear_matrices
from engines.zeroth_order.low_rank.matrix_rows import BlockRows, MatrixRows
from engines.zeroth_order.low_rank.sides import TwoSided

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
    number: int
    """The tensors' parts of their noise keys; `number` is the matrix's own, for rounding."""
    drawn_v: tuple[int, int, int]
    """Number and elements of the noise that V is part of, and where V begins there; rows lie as in `v`."""
    accumulator: Tensor
    """A^T, (rank, outputs) fp32."""
    v: Tensor
    """(rank, inputs)."""
    sides: tuple[Tensor, ...]
    """(2 rank, outputs) each: A^T times the scale over eps U^T, and over - eps U^T."""
    folded: tuple[Tensor, Tensor]
    """A^T times the scale and V^T of the window that is being folded, (rank, outputs) and (rank, inputs)
    fp32."""


@dataclass(frozen=True, slots=True)
class _Block:
    """The matrices with low-rank noise of a block; none where it has no such."""

    matrices: Sequence[_Matrix]
    places: BlockRows
    v_noise: Segment
    """All of the V memory as noise."""
    u_noise: Segment
    """The rows of U beside products as noise."""
    start: int
    """Of its accumulators in those of all blocks."""


class LowRank(TwoSided):
    """Low-rank noise of a model, in the place of `engines.zeroth_order.low_rank.lora.Adapters`.

    `model` is read and not changed, and its weights need not be there. Raises `UserError` if nothing in its
    trained blocks can have such noise.
    """

    form = None
    suffix: ClassVar[str]
    """Of the names of accumulators in a checkpoint."""
    noise_together: ClassVar[bool]
    """The matrices of a block have a draw in common, each its part of every row."""
    num_sides: ClassVar[int]
    """Of the memory that what stands beside a product is put together in."""

    def __init__(
        self,
        model: nn.Module,
        layout: ModelLayout,
        settings: MezoSettings,
        dtype: torch.dtype,
        device: torch.device,
        rank: int,
        scale: float,
    ) -> None:
        """`scale`: of A V^T where it is added to a weight."""
        window = settings.noise_window
        assert window is not None
        self._rank, self._window, self._scale = rank, window, scale
        self._queries = settings.queries
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
        places = [
            BlockRows.of(list(block.values()), rank, ALIGNMENT_BYTES // dtype.itemsize, self.noise_together)
            for block in shapes
        ]

        def room(of: Iterable[MatrixRows], kind: torch.dtype) -> Tensor:
            return torch.zeros(max(each.size for each in of), dtype=kind, device=device)

        elements = sum(each.u.size for each in places)
        self._flat = torch.zeros(elements, dtype=torch.float32, device=device)
        """Accumulators of all blocks."""
        self._v = room((each.v for each in places), dtype)
        # HAZARD: graphs of the blocks know these by address, so they are filled and never replaced.
        self._sides = [room((each.both for each in places), dtype) for _ in range(self.num_sides)]
        folded = (
            room((each.u_alone for each in places), torch.float32),
            room((each.v_alone for each in places), torch.float32),
        )
        self._blocks: list[_Block] = []
        number, start = len(layout.shapes), 0
        for block, place in zip(shapes, places, strict=True):
            draws = bool(block) if self.noise_together else len(block)
            numbers = [number + 2 * i for i in range(draws)]
            self._blocks.append(
                _Block(
                    matrices=self._matrices(block, place, numbers, start, folded, layout),
                    places=place,
                    v_noise=place.v.segment([each + 1 for each in numbers], rank),
                    u_noise=place.both.segment(numbers, rank),
                    start=start,
                )
            )
            number, start = number + 2 * draws, start + place.u.size
        everything = [matrix for block in self._blocks for matrix in block.matrices]
        self.tensors = {f"{matrix.name}.{self.suffix}": matrix.accumulator for matrix in everything}
        """A^T of every matrix, (rank, outputs) fp32: part of a checkpoint."""
        self.numbers: dict[str, int] = {}
        """Of the tensors whose updates are noise times one number."""
        self.blocks = tuple(index for index, here in enumerate(self._blocks) if here.matrices)
        """Those with such matrices."""
        self._by_name = {matrix.name: matrix for matrix in everything}
        self._by_module: dict[nn.Module, _Matrix] = {}

    def _matrices(
        self,
        block: Mapping[str, LinearMatrix],
        place: BlockRows,
        numbers: Sequence[int],
        start: int,
        folded: tuple[Tensor, Tensor],
        layout: ModelLayout,
    ) -> list[_Matrix]:
        """Those of a block, whose accumulators begin at `start`; `numbers` are those of their U, or of what
        they draw in common."""
        of_each = list(numbers) * len(block) if self.noise_together else numbers
        return [
            _Matrix(
                name=name,
                paths=found.paths,
                turned=found.turned,
                u_number=number,
                number=layout.numbers[name],
                drawn_v=place.drawn_v(k, number + 1),
                accumulator=place.u.view(self._flat, k, start),
                v=place.v.view(self._v, k),
                sides=tuple(place.both.view(memory, k) for memory in self._sides),
                folded=(place.u_alone.view(folded[0], k), place.v_alone.view(folded[1], k)),
            )
            for k, ((name, found), number) in enumerate(zip(block.items(), of_each, strict=True))
        ]

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

    @abstractmethod
    def add(self, module: nn.Module, x: Tensor, out: Tensor) -> None:
        """What the module's product of `x` (rows, inputs) lacks, to `out` (rows, outputs)."""

    @abstractmethod
    def begin(self, block: int, task: Task) -> None:
        """The visit of a block begins. Outside of a block's graph, which reads what is written here."""

    @abstractmethod
    def update(self, how: Visit, of_examples: Sequence[Update] = ()) -> None:
        """Apply to all accumulators the deferred updates of `how`, or those of a step's examples."""

    def _window_of(self, task: Task) -> int:
        """A perturbed pass is that of the window that goes on, one with theta itself may be at its end."""
        step = task.how.step // self._queries if task.perturb else task.how.step - 1
        return step // self._window

    def _make_v(self, block: int, window: int, how: Visit) -> None:
        of = replace(how, step=max(0, window), eps=1.0)
        weight_pass.visit(self._v, self._blocks[block].v_noise, of, Outputs(plus=self._v))

    def start_fold(self, block: int, window: int, how: Visit) -> None:
        """What the block gathered in `window` is put aside, and its accumulators begin anew."""
        self._v.zero_()
        self._make_v(block, window, without_updates(how))
        for matrix in self._blocks[block].matrices:
            torch.mul(matrix.accumulator, self._scale, out=matrix.folded[0])
            matrix.folded[1].copy_(matrix.v)
            matrix.accumulator.zero_()

    def fold(self, name: str, weight: Tensor, window: int, seed: int) -> None:
        """W += A V^T, scaled, in place, for the flat memory of a matrix, or its tiles; nothing for another
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
        number, count, start = matrix.drawn_v
        key = NoiseKey(seed=how.seed, step=(how.step - 1) // self._window, tensor=number)
        draw = philox.signs if how.noise == "rademacher" else philox.normal
        v = draw(key, count).as_strided(matrix.v.shape, matrix.v.stride(), start).to(weight.dtype).float()
        change = (matrix.accumulator.cpu() * self._scale).t() @ v
        if matrix.turned:
            change = change.t()
        return torch.where(change == 0, weight, (weight.float() + change).to(weight.dtype))


def window_due(settings: MezoSettings, step: int) -> int | None:
    """Window that is to be folded before `step` perturbs anything; `None`: none is."""
    window = settings.noise_window
    if window is None or step == 0 or step % window:
        return None
    return step // window - 1


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
