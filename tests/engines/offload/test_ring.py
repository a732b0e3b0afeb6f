"""Blocks through the ring: what is computed with is what was stored, and no copy overtakes another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines.errors import UserError
from engines.model.flat_layout import BlockLayout, Part
from engines.noise.tiles import one
from engines.offload import ring
from engines.offload.ring import BlockStream
from engines.quantized.block_form import BlockForm, block_forms
from engines.transfer.compute_clock import ComputeClock
from engines.transfer.link import After, Event, Link

CPU = torch.device("cpu")


@dataclass
class Copy:
    source: Tensor
    out: Tensor
    after: list[Event]


class LazyLink(Link):
    """A link that is as late as it may be: a copy is made when somebody waits for it, and not before.

    Each direction keeps its order, as a stream does. An upload that waits neither for the last reader of its
    room nor for the download of what it reads copies at the wrong time, and weights are wrong.
    """

    def __init__(self) -> None:
        super().__init__(CPU)
        self.crossed: Counter[str] = Counter()
        self._queues: dict[str, list[Event]] = {"up": [], "down": []}
        self._copies: dict[Event, Copy] = {}

    def upload(self, host: Tensor, out: Tensor, after: After = None, name: str = "copy") -> Event:
        return self._later("up", host, out, after)

    def download(self, gpu: Tensor, out: Tensor, after: After = None, name: str = "copy") -> Event:
        return self._later("down", gpu, out, after)

    def _later(self, direction: str, source: Tensor, out: Tensor, after: After) -> Event:
        self.crossed[direction] += source.nbytes
        event = Event()
        self._copies[event] = Copy(source, out, [after] if isinstance(after, Event) else list(after or ()))
        self._queues[direction].append(event)
        return event

    def wait(self, event: Event) -> None:
        for queue in self._queues.values():
            if event in queue:
                while event in queue:
                    copy = self._copies.pop(queue.pop(0))
                    for each in copy.after:
                        self.wait(each)
                    copy.out.copy_(copy.source)

    def has_happened(self, event: Event) -> bool:
        return not any(event in queue for queue in self._queues.values())

    def synchronize(self) -> None:
        for queue in self._queues.values():
            while queue:
                self.wait(queue[-1])


def layout_of(sizes: list[int]) -> BlockLayout:
    """A block of matrices of these sizes, a multiple of 4 each."""
    parts, start = [], 0
    for number, size in enumerate(sizes):
        segment = one(number, size, decays=True)
        shape = (torch.Size([size, 1]),)
        parts.append(Part((f"w{number}",), shape, start, size, segment, trained=True, shared=False))
        start += size
    return BlockLayout(parts=tuple(parts), size=start)


def forms_of(layouts: list[BlockLayout]) -> list[BlockForm]:
    return block_forms(layouts, "full", torch.float32)


blocks_of_parts = st.lists(
    st.lists(st.integers(1, 6).map(lambda n: 4 * n), min_size=1, max_size=4), min_size=1, max_size=5
)


@settings(max_examples=150, deadline=None)
@given(
    blocks=blocks_of_parts,
    resident=st.sets(st.integers(0, 4), max_size=2),
    chunk_elements=st.integers(1, 40),
    ring_share=st.floats(1.2, 4.0),
    folds=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=5),
)
def test_every_visit_finds_what_the_last_one_stored(
    blocks: list[list[int]],
    resident: set[int],
    chunk_elements: int,
    ring_share: float,
    folds: list[list[bool]],
) -> None:
    layouts = [layout_of(sizes) for sizes in blocks]
    resident = {index for index in resident if index < len(blocks)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "UPLOAD_BYTES", 4 * chunk_elements)
        patch.setattr(ring, "ring_bytes", lambda sizes: 4 * int(ring_share * max(sizes, default=0) / 4))
        link = LazyLink()
        stream = BlockStream(forms_of(layouts), frozenset(resident), link, ComputeClock(CPU), lambda *_: None)
        expected = [torch.rand(layout.size) for layout in layouts]
        for index, values in enumerate(expected):
            with stream.filling(index) as memory:
                memory.view(torch.float32).copy_(values)
        stream.rewind()
        stream.prefetch()
        streamed = [i for i in range(len(layouts)) if i not in resident]
        for turn in folds:
            link.crossed.clear()
            for index, layout in enumerate(layouts):
                stores = turn[index]
                stream.begin(write_back=stores and index not in resident)
                for part, own in enumerate(layout.parts):
                    weight = stream.take(index, part, part + 1)
                    assert torch.equal(weight, expected[index][own.start : own.start + own.size])
                    if stores or index in resident:
                        weight.add_(1.0)
                    stream.done(index, part, part + 1)
                if stores or index in resident:
                    expected[index] += 1.0
            stream.end_pass()
            down = sum(4 * layouts[i].size for i in streamed if turn[i])
            assert link.crossed["down"] == down
        link.synchronize()
        for index, values in enumerate(expected):
            assert torch.equal(stream.at_rest(index).view(torch.float32), values)


def test_every_byte_comes_up_once_in_a_pass() -> None:
    layouts = [layout_of([8, 16, 12]) for _ in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "UPLOAD_BYTES", 64)
        patch.setattr(ring, "ring_bytes", lambda sizes: max(sizes) * 5 // 4 // 4 * 4)
        link = LazyLink()
        stream = BlockStream(forms_of(layouts), frozenset(), link, ComputeClock(CPU), lambda *_: None)
        for _ in range(6):
            before = link.crossed["up"]
            stream.prefetch()
            for index in range(4):
                stream.begin(write_back=False)
                for first, last in stream.spans(index):
                    stream.take(index, first, last)
                    stream.done(index, first, last)
            stream.end_pass()
        assert link.crossed["up"] - before == 4 * 4 * 36


def test_weights_that_are_gone_are_refused_in_one_line() -> None:
    layouts = [layout_of([64]), layout_of([64])]
    stream = BlockStream(forms_of(layouts), frozenset(), Link(CPU), ComputeClock(CPU), lambda *_: None)
    stream.prefetch()
    stream.begin(write_back=False)
    stream.take(0, 0, 1)
    stream.done(0, 0, 1)
    with pytest.raises(UserError, match="weights of block 0 twice"):
        stream.take(0, 0, 1)
