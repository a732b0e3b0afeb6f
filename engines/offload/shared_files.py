"""`engines.offload.disk_files.BlockFiles` that the ranks of a machine have together.

The first rank of the machine makes them, without a name; the others open them by that process's descriptors,
as they do its memory (`engines.transfer.shared_memory`), and they are gone with the last of them. Where a
block is read from, and who has made a second file of it since, stands in numbers that all of them see.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from engines.cpu_updates.rank_numbers import RankNumbers
from engines.errors import InfeasiblePlan, NotAvailable, UserError
from engines.offload.direct_io import ALIGNMENT_BYTES, FileSpan, open_of_process
from engines.offload.disk_files import BlockFiles
from engines.world import World

ROWS = 3
"""Of the numbers: whether a block is in its second file; which rank made that, counted from 1; and that
rank's descriptor of it."""


class SharedFiles(BlockFiles):
    """All ranks make it together; in the `numbers`, from `first_row` on, each block has a column.

    Raises on every rank what the first of its machine meets, and `NotAvailable` where a rank cannot open what
    another has made.
    """

    def __init__(
        self,
        sizes_bytes: Mapping[int, int],
        folder: Path,
        world: World,
        numbers: RankNumbers,
        first_row: int,
        *,
        written_back: Collection[int],
        in_place: Mapping[int, Sequence[FileSpan]],
    ) -> None:
        self._world = world
        self._numbers = numbers
        self._is_in_second, self._made_by, self._descriptor_of = range(first_row, first_row + ROWS)
        self._column = {block: column for column, block in enumerate(sorted(sizes_bytes))}
        super().__init__(sizes_bytes, folder, written_back=written_back, in_place=in_place)

    def _make(self, written_back: Sequence[int]) -> None:
        world = self._world
        failure: InfeasiblePlan | UserError | None = None
        if world.local_rank == 0:
            try:
                super()._make(written_back)
            except (InfeasiblePlan, UserError) as error:
                failure = error
        kinds = (self.own, self.seconds)
        told = [{block: span.file.descriptor for block, span in kind.items()} for kind in kinds]
        made = json.loads(world.exchange(json.dumps(told).encode())[world.rank - world.local_rank])
        why = "" if failure is None else str(failure)
        if world.local_rank > 0:
            try:
                for kind, descriptors in zip(kinds, made, strict=True):
                    for block, descriptor in descriptors.items():
                        kind[int(block)] = self._opened(int(block), 0, descriptor)
            except OSError as error:
                why = f"a file of another rank cannot be opened ({error.strerror or error})"
        reasons = [each.decode() for each in world.exchange(why.encode())]  # and the others have opened them
        if failure is not None:
            raise failure
        for rank, reason in enumerate(reasons):
            if reason:
                self.close()
                raise NotAvailable(f"rank {rank}: {reason}")

    def _opened(self, block: int, local_rank: int, descriptor: int) -> FileSpan:
        file = open_of_process(self._numbers.pids[local_rank], descriptor)
        return FileSpan(file, ALIGNMENT_BYTES, 0, self.sizes_bytes[block])

    def second(self, block: int) -> FileSpan:
        self._open_second(block)
        known = block in self.seconds
        span = super().second(block)
        if not known:
            column = self._column[block]
            self._numbers.values[self._descriptor_of, column] = span.file.descriptor
            self._numbers.store(self._made_by, column, self._world.local_rank + 1)
        return span

    def _open_second(self, block: int) -> None:
        """If another rank has made one that this one does not know."""
        column = self._column[block]
        maker = self._numbers.load(self._made_by, column)
        if maker == 0 or block in self.seconds:
            return
        descriptor = int(self._numbers.values[self._descriptor_of, column])
        try:
            self.seconds[block] = self._opened(block, maker - 1, descriptor)
        except OSError as error:
            raise self.spill.unusable(
                "holds a file of another rank, which cannot be opened", error
            ) from error

    def is_now_in(self, block: int, span: FileSpan) -> None:
        super().is_now_in(block, span)
        self._numbers.store(self._is_in_second, self._column[block], int(span is self.seconds.get(block)))

    def look(self) -> None:
        """Read each block where whoever wrote it last has it."""
        for block, column in self._column.items():
            if self._numbers.load(self._is_in_second, column):
                self._open_second(block)
                super().is_now_in(block, self.seconds[block])
            elif block in self.own:
                super().is_now_in(block, self.own[block])
