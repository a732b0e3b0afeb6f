"""Weights of a block that matrices of low rank can stand beside: those of linear layers alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from engines.model.blocks import first_names
from engines.model.flat_layout import BlockLayout


def columns_first(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is inputs x outputs."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or columns_first(module)


@dataclass(frozen=True, slots=True)
class LinearMatrix:
    """A weight of linear layers of one block."""

    paths: tuple[str, ...]
    """Of the modules that multiply with it."""
    turned: bool
    """Inputs x outputs in memory."""
    sizes: tuple[int, int]
    """(outputs, inputs)."""


def linear_matrices(model: nn.Module, block: BlockLayout) -> dict[str, LinearMatrix]:
    """A block's own matrices that only linear layers use, by first name."""
    own = {
        name: shape for part in block.own_parts for name, shape in zip(part.names, part.shapes, strict=True)
    }
    places: dict[str, list[str]] = {name: [] for name in own}
    for place, name in first_names(model).items():
        if name in own:
            places[name].append(place)
    found = {}
    for name, shape in own.items():
        modules = [model.get_submodule(place.rpartition(".")[0]) for place in places[name]]
        turned = {columns_first(module) for module in modules}
        if len(shape) != 2 or not all(is_linear(module) for module in modules) or len(turned) > 1:
            continue
        if any(not place.endswith(".weight") for place in places[name]):
            continue
        paths = tuple(place.removesuffix(".weight") for place in places[name])
        rows, columns = shape
        sizes = (columns, rows) if turned == {True} else (rows, columns)
        found[name] = LinearMatrix(paths, turned == {True}, sizes)
    return found
