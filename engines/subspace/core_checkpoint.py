"""Moments and projectors of compressed gradients in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from engines.errors import UserError
from engines.subspace.bias_check import Check
from engines.subspace.core_matrix import CoreMatrix
from engines.subspace.cores import CoreChunk, Cores


def save_cores(cores: Cores, state: dict[str, Tensor]) -> dict[str, Any]:
    """Add all matrices' moments (d, d) and projectors to `state`; returns their counts and checks."""
    about = {}
    for chunk, matrix in cores.placed():
        for key, tensor in checkpoint_tensors(chunk, matrix).items():
            state[f"{key}.{matrix.subspace.name}"] = tensor
        about[matrix.subspace.name] = {
            "updates": chunk.state.updates,
            "generation": matrix.subspace.generation,
            "checks": [asdict(check) for check in matrix.subspace.checks],
        }
    return about


def load_cores(cores: Cores, tensors: Mapping[str, Tensor], about: Mapping[str, Any], folder: Path) -> None:
    """Take back what `save_cores` gave. Raises `UserError`, naming `folder`, for other shapes or dtypes."""
    for chunk, matrix in cores.placed():
        name = matrix.subspace.name
        for key, tensor in checkpoint_tensors(chunk, matrix).items():
            found = tensors.get(f"{key}.{name}")
            if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise UserError(
                    str(folder),
                    f"has no {key} of shape {tuple(tensor.shape)} for '{name}'",
                    "resume with the same d, r, projector and moments",
                )
            tensor.copy_(found)
        matrix.subspace.assign(matrix.subspace.left, matrix.subspace.right)
        entry = about[name]
        chunk.state.updates = int(entry["updates"])
        matrix.subspace.generation = int(entry["generation"])
        matrix.subspace.checks = [Check(**check) for check in entry["checks"]]


def checkpoint_tensors(chunk: CoreChunk, matrix: CoreMatrix) -> dict[str, Tensor]:
    """What a checkpoint holds of a matrix: moments (d, d), what makes its projectors, and the length of its
    residual's next step."""
    moments = {"moment": matrix.of(chunk.state.moment), "variance": matrix.of(chunk.state.variance)}
    ratio = {} if matrix.residual is None else {"residual_ratio": matrix.residual.ratio}
    return moments | ratio | matrix.subspace.tensors()
