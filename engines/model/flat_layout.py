"""Where a model's tensors lie: each block's in one flat memory, in parts that are visited as a whole.

A block is its vectors (biases and norms), packed as one part, then each of its matrices. Tensors are numbered
as the model has them; the number is a tensor's part of its noise key, so a tied tensor has one perturbation.
A tensor that several blocks share, or a block and what is outside the blocks, belongs to no block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from engines.model.blocks import find_blocks, first_names
from engines.noise.tiles import Segment, one

ALIGNMENT_BYTES = 16
"""Of each tensor in a block's flat memory: the widest load of a GPU thread."""


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of a block that lie together and are perturbed in one go."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    start: int
    """Of its first element in the block's memory."""
    size: int
    """Elements, the gaps between tensors included."""
    segment: Segment
    trained: bool
    shared: bool
    """It is also used elsewhere, so it does not lie in the block's memory."""

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors in `flat`, the part's memory."""
        spans = zip(self.names, self.shapes, self.segment.offsets, self.segment.counts, strict=True)
        return {name: flat[offset : offset + count].view(shape) for name, shape, offset, count in spans}


@dataclass(frozen=True, slots=True)
class BlockLayout:
    parts: tuple[Part, ...]
    size: int
    """Elements of the block's memory."""

    def segment(self, first: int, last: int) -> Segment:
        """Own parts `first` to `last` - 1, which lie together, as one segment."""
        parts = self.parts[first:last]
        shift = [part.start - parts[0].start for part in parts]
        return Segment(
            [number for part in parts for number in part.segment.numbers],
            [by + offset for part, by in zip(parts, shift, strict=True) for offset in part.segment.offsets],
            [count for part in parts for count in part.segment.counts],
            [decays for part in parts for decays in part.segment.decays],
        )

    def runs(self, first: int, last: int) -> list[tuple[int, int]]:
        """Own parts `first` to `last` - 1, in groups of neighbours that are all trained, or none of them."""
        edges = [i for i in range(first + 1, last) if self.parts[i].trained != self.parts[i - 1].trained]
        return [run for run in pairwise((first, *edges, last)) if run[0] < run[1]]

    @property
    def own_parts(self) -> list[Part]:
        return [part for part in self.parts if not part.shared]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The block's own tensors in `flat`, its memory."""
        found: dict[str, Tensor] = {}
        for part in self.own_parts:
            found |= part.views(flat[part.start : part.start + part.size])
        return found


@dataclass(frozen=True, slots=True)
class ModelLayout:
    shapes: Mapping[str, torch.Size]
    """Of every tensor, by first name, in the model's order."""
    numbers: Mapping[str, int]
    blocks: tuple[BlockLayout, ...]
    non_block: tuple[str, ...]
    """First names of the tensors that belong to no block."""
    trained: frozenset[str]

    def segment(self, name: str) -> Segment:
        shape = self.shapes[name]
        return one(self.numbers[name], shape.numel(), decays=len(shape) >= 2)


def lay_out(model: nn.Module, dtype: torch.dtype, train: str = "all") -> ModelLayout:
    """The layout of `model`, whose weights need not be there, in `dtype`.

    `train` is that of `engines.settings.zeroth_order.MezoSettings`: which tensors are trained.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    numbers = {name: number for number, name in enumerate(shapes)}
    path, blocks = find_blocks(model)
    homes: dict[str, set[str]] = {name: set() for name in shapes}
    used: list[list[str]] = [[] for _ in blocks]
    for place, name in first_names(model).items():
        index = place.removeprefix(f"{path}.").partition(".")[0] if place.startswith(f"{path}.") else ""
        homes[name].add(index)
        if index and name not in used[int(index)]:
            used[int(index)].append(name)
    shared = {name for name, places in homes.items() if len(places) > 1}
    grid = ALIGNMENT_BYTES // dtype.itemsize
    trained = _trained(model, train, shapes, used)
    return ModelLayout(
        shapes=shapes,
        numbers=numbers,
        blocks=tuple(_lay_out_block(names, shapes, numbers, shared, trained, grid) for names in used),
        non_block=tuple(name for name in shapes if name in shared or homes[name] == {""}),
        trained=trained,
    )


def lay_out_group(names: Sequence[str], shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> BlockLayout:
    """Tensors of these names as one block: vectors first, as one part, then the others."""
    grid = ALIGNMENT_BYTES // dtype.itemsize
    numbers = {name: number for number, name in enumerate(names)}
    return _lay_out_block(names, shapes, numbers, (), frozenset(names), grid)


def _trained(
    model: nn.Module, train: str, shapes: Iterable[str], used: Sequence[Sequence[str]]
) -> frozenset[str]:
    """`last:N` means the last N blocks and what is outside the blocks, but for embeddings; with `lora` no
    tensor of the model itself is trained (`engines.zeroth_order.low_rank.lora`)."""
    if train == "all":
        return frozenset(shapes)
    if train == "lora":
        return frozenset()
    count = int(train.removeprefix("last:"))
    in_blocks = {name for names in used for name in names}
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outside = {
        name
        for name, parameter in model.named_parameters()
        if name not in in_blocks and id(parameter) not in looked_up
    }
    return frozenset(outside.union(*used[-count:]))


def _lay_out_block(
    names: Sequence[str],
    shapes: Mapping[str, torch.Size],
    numbers: Mapping[str, int],
    shared: Iterable[str],
    trained: frozenset[str],
    grid: int,
) -> BlockLayout:
    own = [name for name in names if name not in shared]
    vectors = [name for name in own if len(shapes[name]) < 2]
    parts: list[Part] = []
    end = 0

    def add(group: Sequence[str], *, decays: bool, is_shared: bool = False) -> None:
        nonlocal end
        counts = [shapes[name].numel() for name in group]
        extents = [-(-count // grid) * grid for count in counts]
        offsets = [sum(extents[:i]) for i in range(len(group))]
        segment = Segment([numbers[name] for name in group], offsets, counts, [decays] * len(group))
        sizes = tuple(shapes[name] for name in group)
        parts.append(
            Part(tuple(group), sizes, end, sum(extents), segment, trained.issuperset(group), is_shared)
        )
        if not is_shared:
            end += sum(extents)

    if vectors:
        add(vectors, decays=False)
    for name in own:
        if len(shapes[name]) >= 2:
            add([name], decays=True)
    for name in names:
        if name in shared:
            add([name], decays=len(shapes[name]) >= 2, is_shared=True)
    return BlockLayout(parts=tuple(parts), size=end)
