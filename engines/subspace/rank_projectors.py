"""Projectors of several ranks: those that the first of them has found."""

from __future__ import annotations

from safetensors.torch import load, save

from engines.subspace.core_matrix import CoreMatrix
from engines.subspace.cores import CoreState
from engines.world import World


def follow_projectors(world: World, matrix: CoreMatrix, *, is_new: bool) -> bool:
    """Let every rank have the projectors of rank 0 for a matrix, where they are new there: whether they are.
    All ranks call it for the same matrix."""
    subspace, content = matrix.subspace, b""
    if is_new:
        content = save({name: tensor.cpu().contiguous() for name, tensor in subspace.tensors().items()})
    content = world.broadcast(content)
    if content and world.rank > 0:
        subspace.load(load(content))
        subspace.generation += 1
    return bool(content)


def follow_moments(world: World, matrix: CoreMatrix, state: CoreState) -> None:
    """Let every rank have the moments of rank 0 for a matrix, as twins do. All ranks call it."""
    own = {"moment": matrix.of(state.moment), "variance": matrix.of(state.variance)}
    content = save({name: tensor.contiguous() for name, tensor in own.items()} if world.rank == 0 else {})
    tensors = load(world.broadcast(content))
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
