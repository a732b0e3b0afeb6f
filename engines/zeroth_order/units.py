"""Units: the modules of a block that compute with weights of their own, and with perturbed ones in their
place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from engines.zeroth_order.chunked_loss import multiply


class ModuleUnit:
    """A module of a block that computes with its own weights, and maybe those of modules inside it."""

    def __init__(self, block: int, module: nn.Module, places: Sequence[tuple[nn.Module, str, str]]) -> None:
        self.block = block
        self.module = module
        self.places = places
        """(owner, its attribute, first name of the tensor)."""
        self.mixed = any(
            (weight := owner._parameters[leaf]) is not None and weight.dim() > 2 for owner, leaf, _ in places
        )
        """It has weights of three dimensions, as experts of a mixture do."""
        self.parts: tuple[int, ...] = ()
        self.frozen = False
        """No part of it is trained: both sides compute with the same weights."""
        self.adapted = False
        """Adapters stand beside it or beside modules inside it; it is frozen then."""
        self.weights: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        """As `places`, for the plus and the minus side: views of the scratch memory."""

    @property
    def is_layer_norm(self) -> bool:
        """A plain layer norm over the last dimension, with weight and bias."""
        return (
            type(self.module) is nn.LayerNorm
            and len(self.module.normalized_shape) == 1
            and [leaf for _, leaf, _ in self.places] == ["weight", "bias"]
        )

    @property
    def has_weight_and_bias_only(self) -> bool:
        return all(leaf in ("weight", "bias") for _, leaf, _ in self.places)

    def with_side(self, side: int) -> AbstractContextManager[None]:
        """The module computes with the scratch of side 0 (plus, and theta itself) or 1 (minus)."""
        return swapped(self.places, self.weights[side])


def block_units(
    blocks: nn.ModuleList,
    block_path: str,
    owners: Mapping[str, nn.Module],
    names: Mapping[tuple[str, str], str],
    apart: Collection[int],
) -> list[ModuleUnit]:
    """The modules of each block that have weights of their own; one that has others inside covers them.

    Where modules take turns on parts of the batch (the experts of a mixture, a list inside the block), halves
    of their inputs are no sides: there, and in blocks of `apart`, the whole block is one unit, and each side
    runs through it by itself.
    """
    units: list[ModuleUnit] = []
    for index, block in enumerate(blocks):
        root = f"{block_path}.{index}"
        inside = {path: owners[path] for path in owners if path == root or path.startswith(f"{root}.")}
        lists = [
            path
            for path, module in block.named_modules()
            if isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None
        ]
        if lists or index in apart:
            units.append(ModuleUnit(index, block, places_in(root, block, names)))
            continue
        covered: list[str] = []
        for path, module in inside.items():
            if not any(path.startswith(f"{parent}.") for parent in covered):
                covered.append(path)
                units.append(ModuleUnit(index, module, places_in(path, module, names)))
    return units


def places_in(
    path: str, module: nn.Module, names: Mapping[tuple[str, str], str]
) -> list[tuple[nn.Module, str, str]]:
    """Owner, attribute and first name of every tensor in `module` and below."""
    found = []
    for below, owner in module.named_modules():
        where = f"{path}.{below}" if below and path else below or path
        found += [
            (owner, leaf, names[where, leaf])
            for leaf, parameter in owner._parameters.items()
            if parameter is not None
        ]
    return found


def has_no_bias(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module._parameters["bias"] is None


def without_bias(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module's product by the faster kernel of `multiply`, as trained layers have it."""

    def product(x: Tensor) -> Tensor:
        weight = module._parameters["weight"]  # the one that is swapped in
        assert weight is not None
        out = torch.empty((x.numel() // x.shape[-1], weight.shape[0]), dtype=x.dtype, device=x.device)
        multiply(x.reshape(-1, x.shape[-1]), weight.t(), None, out)
        return out.view(*x.shape[:-1], weight.shape[0])

    return product


@contextmanager
def swapped(places: Sequence[tuple[nn.Module, str, str]], weights: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [owner._parameters[leaf] for owner, leaf, _ in places]
    for (owner, leaf, _), weight in zip(places, weights, strict=True):
        owner._parameters[leaf] = weight
    try:
        yield
    finally:
        for (owner, leaf, _), old in zip(places, before, strict=True):
            owner._parameters[leaf] = old
