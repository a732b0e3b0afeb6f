"""The files in which blocks on disk lie: those of the model, where they hold a block as it is computed with,
else one of our own for each block; and a second one of each block that a run writes anew."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from engines.offload.direct_io import FileSpan, in_memory, make_file
from engines.offload.spill_place import SpillPlace


class PageCacheWarning(UserWarning):
    """Reads do not reach past the page cache: their rate may be that of memory, and they take some of it."""


class BlockFiles:
    """Where each block lies. `sizes_bytes` are the blocks' by index; `in_place` says where those are that a
    file holds already, which need no file of ours. Space is taken for a second file of each that
    `written_back` names.

    Raises `InfeasiblePlan` with what is missing where the disk is too small, and `UserError` where `folder`
    cannot be used; nothing is written then.
    """

    def __init__(
        self,
        sizes_bytes: Mapping[int, int],
        folder: Path,
        *,
        written_back: Collection[int] = (),
        in_place: Mapping[int, Sequence[FileSpan]] | None = None,
    ) -> None:
        self.sizes_bytes = dict(sizes_bytes)
        self.folder = folder
        self.spill = SpillPlace(folder=folder, setting="zo2.disk_folder")
        self.own: dict[int, FileSpan] = {}
        """Ours, which `fill` writes."""
        self.seconds: dict[int, FileSpan] = {}
        self._spans: dict[int, list[FileSpan]] = {i: list(spans) for i, spans in (in_place or {}).items()}
        self._make(sorted(written_back))
        self._spans |= {index: [span] for index, span in self.own.items()}
        self.direct = self._is_direct()

    def _make(self, written_back: Sequence[int]) -> None:
        """The files. Raises as the constructor."""
        own = [i for i in self.sizes_bytes if i not in self._spans]
        missing = [(i, self.own) for i in own] + [(i, self.seconds) for i in written_back]
        if not missing:
            return
        needed_bytes = sum(self.sizes_bytes[i] for i, _ in missing)
        twice = ", second files for folded updates included" if written_back else ""
        what = f"{len(self.sizes_bytes)} blocks take {needed_bytes / 1e9:.3g} GB{twice}"
        with self.spill.taken(needed_bytes, what, self.close):
            for index, files in missing:
                files[index] = self._make_file(index)

    def _make_file(self, block: int) -> FileSpan:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return make_file(self.folder, f"block.{block}", self.sizes_bytes[block])

    def _is_direct(self) -> bool:
        """Whether all blocks are read past the page cache; a warning says where they are not."""
        why = None
        if not all(span.file.direct for spans in self._spans.values() for span in spans):
            why = "its file system refuses direct I/O, so blocks are read through the page cache"
        elif self.own and in_memory(self.folder):
            why = "it is in host memory, which it is to spare"
        if why is not None:
            warning = f"{self.folder}: {why}, and their rate may be that of memory"
            remedy = "name a folder on a local disk with --set zo2.disk_folder=FOLDER"
            warnings.warn(f"{warning}; {remedy}", PageCacheWarning, stacklevel=4)
        return why is None

    def holds(self, block: int) -> bool:
        """A file that is not ours has its weights: it need not be filled."""
        return block not in self.own

    def spans(self, block: int) -> Sequence[FileSpan]:
        """Where it is read from."""
        return self._spans[block]

    def first(self, block: int) -> FileSpan:
        """Where it is written whole: our file, or a second one beside somebody else's."""
        return self.own[block] if block in self.own else self.second(block)

    def second(self, block: int) -> FileSpan:
        """Made, where there is none yet. Raises `UserError` where it cannot be."""
        if block not in self.seconds:
            try:
                self.seconds[block] = self._make_file(block)
            except OSError as error:
                raise self.spill.unusable("cannot hold a second file of a block", error) from error
        return self.seconds[block]

    def is_now_in(self, block: int, span: FileSpan) -> None:
        """It was written there, and is read from there from now on."""
        self._spans[block] = [span]

    def close(self) -> None:
        """Let go of them. May be called twice."""
        spans = [span for spans in self._spans.values() for span in spans]
        for span in (*spans, *self.own.values(), *self.seconds.values()):
            span.file.close()
