"""Moments and projectors of compressed gradients in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from engines.errors import UserError
from engines.subspace.core_matrix import CoreMatrix
from engines.subspace.cores import CoreChunk, Cores
from engines.subspace.subspaces import Check


def save_cores(cores: Cores, state: dict[str, Tensor]) -> dict[str, Any]:
    """Add all matrices' moments (d, d) and projectors to `state`; returns their counts and checks."""
    about = {}
    for chunk, matrix in cores.placed():
        subspace = matrix.subspace
        for key, tensor in (_adam_tensors(chunk, matrix) | subspace.tensors()).items():
            state[f"{key}.{subspace.name}"] = tensor
        about[subspace.name] = {
            "updates": chunk.state.updates,
            "generation": subspace.generation,
            "checks": [asdict(check) for check in subspace.checks],
        }
    return about


def load_cores(cores: Cores, tensors: Mapping[str, Tensor], about: Mapping[str, Any], folder: Path) -> None:
    """Take back what `save_cores` gave. Raises `UserError`, naming `folder`, for other shapes or dtypes."""
    for chunk, matrix in cores.placed():
        subspace, of_adam = matrix.subspace, _adam_tensors(chunk, matrix)
        found = {
            key: _stored_like(tensor, key, subspace.name, tensors, folder)
            for key, tensor in (of_adam | subspace.tensors()).items()
        }
        for key, tensor in of_adam.items():
            tensor.copy_(found[key])
        subspace.load(found)
        entry = about[subspace.name]
        chunk.state.updates = int(entry["updates"])
        subspace.generation = int(entry["generation"])
        subspace.checks = [Check(**check) for check in entry["checks"]]


def _stored_like(tensor: Tensor, key: str, name: str, tensors: Mapping[str, Tensor], folder: Path) -> Tensor:
    """What a checkpoint has in the place of `tensor`, of the matrix `name`."""
    found = tensors.get(f"{key}.{name}")
    if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
        raise UserError(
            str(folder),
            f"has no {key} of shape {tuple(tensor.shape)} for '{name}'",
            "resume with the same d, r, projector and moments",
        )
    return found


def _adam_tensors(chunk: CoreChunk, matrix: CoreMatrix) -> dict[str, Tensor]:
    """Of a matrix: moments (d, d), and (1,) the length of its residual's next step, if it has one."""
    moments = {"moment": matrix.of(chunk.state.moment), "variance": matrix.of(chunk.state.variance)}
    return moments if matrix.residual is None else moments | {"residual_ratio": matrix.residual.ratio}
