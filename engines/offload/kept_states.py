"""Optimizer states of all blocks, in memory or on disk: their way to whoever updates them or brings up the
weights among them; checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.base import ReportProgress
from engines.costs.resources.disk import WEIGHT_PLACES
from engines.cpu_updates.block_state import BlockStates
from engines.cpu_updates.chunks import ChunkUpdate
from engines.cpu_updates.pipeline import UpdatePipeline
from engines.errors import UserError
from engines.offload.disk_states import DiskStates
from engines.offload.disk_weights import DiskWeights
from engines.transfer.link import Link


class KeptStates:
    """`BlockStates` whose blocks `on_disk` have their states in files."""

    def __init__(
        self, host: BlockStates, on_disk: Sequence[int], make_disk: Callable[[Mapping[int, int]], DiskStates]
    ) -> None:
        """`make_disk` is given what each block's state takes, in bytes, if any is on disk."""
        self.host = host
        self._on_disk = frozenset(on_disk)
        self.disk: DiskStates | None = None
        if self._on_disk:
            self.disk = make_disk({index: host.state_bytes(index) for index in on_disk})

    def submit(self, index: int, updates: Sequence[ChunkUpdate], pipeline: UpdatePipeline) -> None:
        """Hand a block's updates to the worker, those of one on disk when its state has come."""
        if self.disk is None or index not in self._on_disk:
            pipeline.submit_each(updates)
            return

        def ready(memory: Tensor, failure: UserError | None) -> None:
            self.host.attach(index, memory, failure)
            pipeline.submit_each(updates)

        self.disk.request(index, ready)

    def updated(self, index: int) -> None:
        """All updates of a block have been made."""
        if self.disk is not None and index in self._on_disk:
            self.host.attach(index, None)
            self.disk.release(index)

    def weights_ahead(
        self, blocks: Sequence[int], link: Link, progress: ReportProgress
    ) -> DiskWeights | None:
        """Reads the weights of those `blocks` ahead of their passes, from the beginning of their states on
        disk; `None` without any."""
        if not blocks:
            return None
        assert self.disk is not None
        disk = self.disk
        head_bytes = {index: self.host.head_bytes(index) for index in blocks}
        return DiskWeights(
            lambda index, memory: disk.read_head(index, memory[: head_bytes[index]]),
            max(head_bytes.values()),
            min(WEIGHT_PLACES, len(blocks)),
            link,
            progress,
        )

    def save(self, folder: Path) -> tuple[dict[str, Tensor], list[int]]:
        """What a checkpoint holds, and how often each block was updated. What is on disk is copied to a file
        for each block: all at once may be too much for memory."""
        state: dict[str, Tensor] = {}
        for index in range(len(self.host.chunks)):
            if index in self._on_disk:
                with self.here(index, changes=False):
                    save_file(self.host.state(index), _own_file(folder, index))
            else:
                state |= self.host.state(index)
        return state, self.host.updates()

    def load(self, folder: Path, tensors: Mapping[str, Tensor], updates: Sequence[int]) -> None:
        """Take back what `save` gave, wherever blocks were then. Raises `UserError` for other states."""
        for index, count in enumerate(updates):
            own = _own_file(folder, index)
            found = load_file(own) if own.exists() else tensors
            with self.here(index, changes=True):
                self.host.load(index, found, count, str(folder))

    @contextmanager
    def here(self, index: int, *, changes: bool) -> Iterator[None]:
        """What is on disk of a block is in memory, while nothing is updated; with `changes` it is written
        back."""
        if self.disk is None or index not in self._on_disk:
            yield
            return
        with self.disk.borrowed(index, changes=changes) as memory:
            self.host.attach(index, memory)
            try:
                yield
            finally:
                self.host.attach(index, None)

    def stop(self) -> None:
        """Read and write no more. Before the worker ends, which it hands work to."""
        if self.disk is not None:
            self.disk.close()


def _own_file(folder: Path, index: int) -> Path:
    return folder / f"state-{index}.safetensors"
