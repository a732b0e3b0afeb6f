"""The sizes of the model that a sweep is on, in `model.json`: what predictions need of it. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from engines.errors import UserError
from engines.shapes import ModelShape
from harness.records.shared import shared_name
from profiles.documents import read_document, to_json, write_whole

MODEL = "model.json"
SCHEMA_VERSION = 1

MOST_BLOCKS = 10_000
MOST_ELEMENTS = 10**14
"""Of any one size: far beyond every model, and little enough to count with."""


def _by_todays_names(shape: Any) -> Any:
    """Files until 29 November 2026 say `outer_parameters`."""
    if isinstance(shape, dict) and "outer_parameters" in shape:
        return {"non_block_parameters" if key == "outer_parameters" else key: shape[key] for key in shape}
    return shape


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedShape:
    shape: Annotated[ModelShape, BeforeValidator(_by_todays_names)]
    schema_version: int = SCHEMA_VERSION


def save_shape(shape: ModelShape, path: Path) -> None:
    """Without the path of the model and without the names of the data's classes."""
    shared = replace(shape, name=shared_name(shape.name), label_names=())
    write_whole(path, to_json(SavedShape(shape=shared)))


def load_shape(path: Path) -> ModelShape:
    """Raises `UserError` if `path` holds no sizes of a model, or some that no model has."""
    shape = read_document(path, SavedShape, SCHEMA_VERSION, "model's sizes").shape
    for name, number in _numbers(asdict(shape)):
        if not 0 <= number <= MOST_ELEMENTS:
            raise _impossible(path, name, number)
    for name in ("num_blocks", "hidden", "num_heads", "num_kv_heads", "vocabulary", "block_parameters"):
        if getattr(shape, name) < 1:
            raise _impossible(path, name, getattr(shape, name))
    if shape.num_blocks > MOST_BLOCKS or len(shape.block_sizes) not in (0, shape.num_blocks):
        raise _impossible(path, "num_blocks", shape.num_blocks)
    if not shape.matrices or any(min(one.rows, one.columns) < 1 for one in shape.matrices):
        raise _impossible(path, "matrices", 0)
    return shape


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        yield name, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _numbers(each, key)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _numbers(each, name)


def _impossible(path: Path, name: str, number: int) -> UserError:
    return UserError(
        str(path), f"field '{name}' is {number}, which no model has", "restore or delete this file"
    )
