"""Low-rank adapters (Hu et al., arXiv 2106.09685) beside the linear layers of the blocks, for `train=lora`.

    y = x W^T + b + scale (x A^T) B^T,    A ~ N(0, 1 / inputs),  B = 0 at first,  scale = lora_alpha / rank

The model's own weights are frozen: both sides of a step share one product with W, over the stacked batch, and
each half then takes the products with its own A and B. The adapters of all blocks are on the GPU in both
engines. They are perturbed when the visit of their block begins, and take an update as soon as it is known,
so that none is ever deferred.

Their tensors are numbered after the model's own, in the order of their names. A matrix that is used twice in
its block has one adapter; one that is also used elsewhere has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from engines.base import Update
from engines.errors import UserError
from engines.model.flat_layout import ALIGNMENT_BYTES, BlockLayout, ModelLayout
from engines.noise import philox, weight_pass
from engines.noise.philox import NoiseKey
from engines.noise.tiles import Segment
from engines.noise.visits import Outputs, Visit
from engines.settings.zeroth_order import MezoSettings
from engines.zeroth_order.block_visit import Task, without_updates
from engines.zeroth_order.checkpoint import LoraForm
from engines.zeroth_order.low_rank.linear_matrices import linear_matrices
from engines.zeroth_order.low_rank.sides import MINUS, PLAIN, PLUS, TwoSided

START_STEP = 2**32 - 1
"""Step of the noise that A begins as: the last there is, so that no perturbation repeats it."""


class Adapters(TwoSided):
    """All adapters of a model; there are none unless `settings.train` is `lora`.

    `model` is read and not changed, and its weights need not be there. Raises `UserError` if nothing in its
    blocks can have an adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ModelLayout,
        settings: MezoSettings,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        """`<module path>.lora_A` (rank, inputs) and `<module path>.lora_B` (outputs, rank)."""
        self.numbers: dict[str, int] = {}
        """The tensors' parts of their noise keys."""
        self.form = (
            LoraForm(rank=settings.lora_rank, alpha=settings.lora_alpha) if settings.train == "lora" else None
        )
        self._scale = settings.lora_alpha / settings.lora_rank
        self._places: dict[str, tuple[str, ...]] = {}
        """Of every matrix with an adapter, by its first name: paths of the modules that multiply with it."""
        self._transposed: set[str] = set()
        """First names of those that are inputs x outputs."""
        self._values: dict[str, list[tuple[Tensor, Tensor]]] = {}
        """(A, B) by first name, and then by `PLAIN`, `PLUS` and `MINUS`."""
        self._memory: list[Tensor] = []
        """Of each block the flat memory of its adapters, laid out as `_segments` says."""
        self._segments: list[Segment] = []
        self._sides: list[Tensor] = []
        """Perturbed adapters of the block that is visited, plus and minus.

        HAZARD: graphs of the blocks know them by address, so they are filled and never replaced."""
        if settings.train == "lora":
            shapes = [self._find(model, block, settings.lora_rank) for block in layout.blocks]
            if not any(shapes):
                raise UserError(
                    type(model).__name__, "has no linear layer in its blocks", "use train=all or train=last:N"
                )
            names = sorted(name for each in shapes for name in each)
            self.numbers = {name: len(layout.shapes) + i for i, name in enumerate(names)}
            self._allocate(shapes, dtype, device)
            self._start(seed)

    def _find(self, model: nn.Module, block: BlockLayout, rank: int) -> dict[str, tuple[int, int]]:
        """Shapes of a block's adapters by name."""
        shapes: dict[str, tuple[int, int]] = {}
        for name, found in linear_matrices(model, block).items():
            self._places[name] = found.paths
            if found.turned:
                self._transposed.add(name)
            outputs, inputs = found.sizes
            path = found.paths[0]
            shapes |= {f"{path}.lora_A": (rank, inputs), f"{path}.lora_B": (outputs, rank)}
        return shapes

    def _allocate(
        self, blocks: Sequence[dict[str, tuple[int, int]]], dtype: torch.dtype, device: torch.device
    ) -> None:
        grid = ALIGNMENT_BYTES // dtype.itemsize
        sizes = []
        for shapes in blocks:
            counts = [rows * columns for rows, columns in shapes.values()]
            extents = [-(-count // grid) * grid for count in counts]
            offsets = [sum(extents[:i]) for i in range(len(counts))]
            numbers = [self.numbers[name] for name in shapes]
            self._segments.append(Segment(numbers, offsets, counts, [True] * len(counts)))
            sizes.append(sum(extents))
        self._memory = [torch.zeros(size, dtype=dtype, device=device) for size in sizes]
        self._sides = [torch.zeros(max(sizes), dtype=dtype, device=device) for _ in (PLUS, MINUS)]
        by_path = {paths[0]: name for name, paths in self._places.items()}
        for shapes, segment, flat in zip(blocks, self._segments, self._memory, strict=True):
            views = [
                {
                    name: memory[offset : offset + count].view(shape)
                    for (name, shape), offset, count in zip(
                        shapes.items(), segment.offsets, segment.counts, strict=True
                    )
                }
                for memory in (flat, *self._sides)
            ]
            self.tensors |= views[PLAIN]
            for path in {name.rpartition(".")[0] for name in shapes}:
                self._values[by_path[path]] = [(v[f"{path}.lora_A"], v[f"{path}.lora_B"]) for v in views]

    def _start(self, seed: int) -> None:
        """The same on every device: noise by counter, made by torch operations, scaled in fp32."""
        for name, tensor in self.tensors.items():
            if name.endswith(".lora_A"):
                key = NoiseKey(seed=seed, step=START_STEP, tensor=self.numbers[name])
                z = philox.normal(key, tensor.numel(), tensor.device)
                tensor.copy_(z.mul_(tensor.shape[1] ** -0.5).view(tensor.shape))

    def install(self, model: nn.Module) -> set[nn.Module]:
        """Let the modules compute with their adapters, too; which modules those are."""
        found: set[nn.Module] = set()
        for name, paths in self._places.items():
            for path in paths:
                module = model.get_submodule(path)
                if module not in found:
                    module.forward = self._forward(module.forward, self._values[name])
                    found.add(module)
        return found

    def _forward(
        self, product: Callable[[Tensor], Tensor], values: Sequence[tuple[Tensor, Tensor]]
    ) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            y = product(x)  # newly made, so it may be added to
            flat, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
            for side, rows in self.spans(flat.shape[0]):
                a, b = values[side]
                out[rows].addmm_(flat[rows] @ a.t(), b.t(), alpha=self._scale)
            return out.view(y.shape)

        return forward

    def begin(self, block: int, task: Task) -> None:
        """The visit of a block begins. Outside of a block's graph, which reads what is written here."""
        self.take_side(task)
        if task.perturb and self._memory:
            flat = self._memory[block]
            plus, minus = (memory[: flat.numel()] for memory in self._sides)
            out = Outputs(plus=plus) if task.plus_only else Outputs(plus=plus, minus=minus)
            weight_pass.visit(flat, self._segments[block], without_updates(task.how), out)

    def update(self, how: Visit, of_examples: Sequence[Update] = ()) -> None:
        """Apply deferred updates in place; those of a step's examples are others'."""
        for flat, segment in zip(self._memory, self._segments, strict=True):
            weight_pass.visit(flat, segment, how, Outputs(theta=flat))

    def merged(self, name: str, weight: Tensor, how: Visit) -> Tensor:
        """The model's own tensor of that first name, on the CPU, with its adapter added: W + scale B A.

        In fp32, rounded once. Where nothing is added the bits stay, a negative zero's as well.
        """
        if name not in self._values:
            return weight
        a, b = (tensor.cpu().float() for tensor in self._values[name][PLAIN])
        change = (b @ a).mul_(self._scale)
        if name in self._transposed:
            change = change.t()
        return torch.where(change == 0, weight, (weight.float() + change).to(weight.dtype))
