"""Chunks: what is read from a file in one go and goes up in one copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from engines.costs.resources import disk as costs
from engines.offload.direct_io import ALIGNMENT_BYTES, FileSpan, RawFile


@dataclass(frozen=True, slots=True)
class DiskChunk:
    """Bytes that are read in one go and go up in one copy."""

    block: int
    file: RawFile
    offset_bytes: int
    """Where reading begins, aligned."""
    skip: int
    """Bytes at the front that are somebody else's."""
    num_bytes: int
    place: int
    """In what `send` fills."""
    last: bool
    """Of what `send` fills."""

    @property
    def read_bytes(self) -> int:
        return -(-(self.skip + self.num_bytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


ByteRange = tuple[int, int, int]
"""Block, first byte in it, and the byte after the last."""


def cut(spans: Iterable[FileSpan], wanted: ByteRange) -> list[DiskChunk]:
    """The chunks of a range whose block lies in `spans`: none crosses a multiple of `CHUNK_BYTES` in its
    file, so each fits a slot, and all but the ends are aligned."""
    block, start, stop = wanted
    chunks: list[DiskChunk] = []
    for span in spans:
        at, end = max(start, span.start), min(stop, span.start + span.num_bytes)
        while at < end:
            offset = span.offset_bytes + at - span.start
            most = costs.CHUNK_BYTES - offset % costs.CHUNK_BYTES
            skip = offset % ALIGNMENT_BYTES
            size = min(most, end - at)
            chunks.append(DiskChunk(block, span.file, offset - skip, skip, size, at - start, last=False))
            at += size
    chunks[-1] = replace(chunks[-1], last=True)
    return chunks
