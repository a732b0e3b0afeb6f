"""A job's data in tokens, and the file by which a sweep hands it to its runs.

The data of a sweep is read and tokenized once, before anything is measured, and kept in one file that every
run reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.errors import UserError
from harness.data.token_tables import TokenTable, rows_in


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """The data of a job in tokens."""

    train: TokenTable
    held_out: TokenTable
    held_out_in_training: tuple[int, ...]
    """Rows of `held_out` whose tokens are those of some row of `train`: they say nothing of others."""
    pad_id: int
    """Token that fills what is shorter than the sequence length."""
    description: str
    """One line: what it is, how many examples and tokens, and what had to be cut."""
    readings: tuple[str, ...] = ()
    """A line for each file: how it was read, and what of it could not be used."""
    label_names: tuple[str, ...] = ()
    """Of the classes, in their order; empty where the data numbers them from 0."""
    test: TokenTable | None = None
    """What nothing is chosen by; `None`: there is none."""

    def with_tables(self, train: TokenTable, held_out: TokenTable, test: TokenTable | None) -> Tokenized:
        """The same data with other rows in its parts."""
        seen = tuple(rows_in(held_out, train))
        return replace(self, train=train, held_out=held_out, test=test, held_out_in_training=seen)


def sequence_lengths(tokenized: Tokenized) -> list[int]:
    """Tokens of each training sequence."""
    lengths: list[int] = tokenized.train.lengths.tolist()
    return lengths


_PARTS = ("train", "held_out", "test")
_LISTS = ("readings", "label_names", "held_out_in_training")


def save_tokenized(tokenized: Tokenized, path: Path) -> None:
    """Write a safetensors file. Raises `UserError` if it cannot be written."""
    tensors: dict[str, Tensor] = {}
    metadata = {"pad_id": str(tokenized.pad_id), "description": tokenized.description}
    metadata |= {name: json.dumps(getattr(tokenized, name)) for name in _LISTS}
    for part in _PARTS:
        table: TokenTable | None = getattr(tokenized, part)
        if table is None:
            continue
        for field in fields(TokenTable):
            value = getattr(table, field.name)
            if isinstance(value, Tensor):
                tensors[f"{part}.{field.name}"] = value.contiguous()
        metadata |= {f"{part}.packed": str(int(table.packed)), f"{part}.cut": str(table.cut)}
        metadata[f"{part}.choices"] = str(table.choices)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata=metadata)
    except OSError as error:
        raise UserError(
            str(path), f"cannot be written ({error.strerror or error})", "free space or name another place"
        ) from None


def load_tokenized(path: Path) -> Tokenized:
    """What `save_tokenized` wrote."""
    with safe_open(path, framework="pt") as file:
        metadata: Mapping[str, str] = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def table(part: str) -> TokenTable:
        names = [field.name for field in fields(TokenTable)]
        own: dict[str, Any] = {name: tensors.get(f"{part}.{name}") for name in names}
        own |= {"packed": metadata[f"{part}.packed"] == "1", "cut": int(metadata[f"{part}.cut"])}
        own["choices"] = int(metadata[f"{part}.choices"])
        return TokenTable(**own)

    return Tokenized(
        train=table("train"),
        held_out=table("held_out"),
        test=table("test") if "test.starts" in tensors else None,
        pad_id=int(metadata["pad_id"]),
        description=metadata["description"],
        **{name: tuple(json.loads(metadata[name])) for name in _LISTS},
    )
