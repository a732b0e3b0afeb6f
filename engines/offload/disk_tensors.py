"""Blocks on disk as tensors by name: where a model's own files have them, and a whole block on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from engines.base import Blueprint, LocatesWeights
from engines.errors import UserError
from engines.model.flat_layout import BlockLayout
from engines.offload.direct_io import FileSpan, RawFile, open_existing
from engines.quantized.block_form import BlockForm
from engines.shapes import Dtype


def in_place(
    blocks: Mapping[int, BlockLayout], blueprint: Blueprint, dtype: Dtype, element_bytes: int
) -> dict[int, list[FileSpan]]:
    """Where those of `blocks` lie whose tensors are all in files, in the precision that is computed with.

    Raises `UserError` for a file that cannot be opened.
    """
    if not isinstance(blueprint, LocatesWeights):
        return {}
    files: dict[Path, RawFile] = {}
    found: dict[int, list[FileSpan]] = {}
    for index, block in blocks.items():
        spans = []
        for part in block.own_parts:
            for name, offset in zip(part.names, part.segment.offsets, strict=True):
                stored = blueprint.locate(name)
                if stored is None or stored.dtype != dtype:
                    break
                if stored.path not in files:
                    files[stored.path] = _opened(stored.path)
                start = element_bytes * (part.start + offset)
                spans.append(FileSpan(files[stored.path], stored.offset_bytes, start, stored.num_bytes))
        if len(spans) == sum(len(part.names) for part in block.own_parts):
            found[index] = spans
    return found


def _opened(path: Path) -> RawFile:
    try:
        return open_existing(path)
    except OSError as error:
        why = f"cannot be read ({error.strerror or error})"
        raise UserError(str(path), why, "check its permissions, or download the model again") from None


class FetchedTensors(Mapping[str, Tensor]):
    """Tensors by name: those of `kept`, and those of `blocks`, which `fetch` brings to host memory whole. One
    block is there at a time, so go through them in their order."""

    def __init__(
        self,
        kept: Mapping[str, Tensor],
        blocks: Mapping[int, BlockForm],
        fetch: Callable[[int], Tensor],
    ) -> None:
        """`fetch` gives a block's bytes."""
        self._kept = kept
        self._blocks = blocks
        self._fetch = fetch
        self._homes = {
            name: i for i in sorted(blocks) for part in blocks[i].layout.own_parts for name in part.names
        }
        self._there: tuple[int, dict[str, Tensor]] = (-1, {})

    def __getitem__(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        index = self._homes[name]
        if self._there[0] != index:
            self._there = (-1, {})  # before the next one is there too
            self._there = (index, self._blocks[index].views(self._fetch(index)))
        return self._there[1][name]

    def __iter__(self) -> Iterator[str]:
        yield from self._kept
        yield from self._homes

    def __len__(self) -> int:
        return len(self._kept) + len(self._homes)
