"""ZO2: MeZO with the blocks in host memory (Wang et al., arXiv 2503.12668).

The algorithm is `engines.mezo`'s, and so are the bits. What differs is where the weights are. In a step
each block comes up once, and while it is there

    1. the update of the step before is applied to it (its g was not known when the block was last here),
    2. it starts on its way down again, since nothing below changes it,
    3. theta + eps z goes to the scratch block, and the plus stream's hidden state through it,
    4. theta - eps z goes to the same scratch block, and the minus stream's hidden state through it.

Blocks pass through a ring of three buffers, so that block i + 1 comes up and block i - 1 goes down while
block i computes. Events order the streams; the host waits once per step, to read the two losses.

On the GPU: embeddings, norms and head with their perturbed copy; the resident blocks; the ring; one
scratch block; the hidden states of both streams. On the host: the other blocks, in one pinned slab.

Deviations from the paper and its code:
- Perturbations go to scratch, never to the weights (see `engines.mezo`).
- Noise is computed from counters; no generator states are kept, and tied tensors have one perturbation.
- The pending update is applied wherever weights are looked at: evaluating, exporting, saving.
- Every step moves each block once each way, also the first, when nothing is pending yet: all steps are
  alike.
- The first blocks of the next step come up while this step's head computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from engines.base import Batch, Blueprint, Context, Evaluation, InfeasiblePlan, StepStats, Update, UserError
from engines.blocks import (
    TORCH_DTYPE,
    BlockCall,
    BlockDriver,
    EvaluationSum,
    bind,
    find_blocks,
    first_names,
    move_buffers,
    to_device,
)
from engines.costs.zo2 import RING_BLOCKS, resident_indices
from engines.mezo import (
    LossPair,
    TensorGroup,
    group_of,
    next_update,
    open_checkpoint,
    save_checkpoint,
)
from engines.settings import Zo2Settings
from engines.transfer import ComputeClock, Event, HostSlab, Link, Progress

EVALUATION_GROUP = 8
"""Batches that share one pass over the blocks when evaluating; their hidden states are on the GPU."""

SCRATCH_ALIGNMENT_BYTES = 512
"""As torch's allocator aligns. Matrix libraries choose kernels by alignment, and bits follow the kernel."""


class BlockStream:
    """Blocks as flat tensors, some on the GPU for good, the others passing through a ring of buffers.

    The ring never rests: a buffer that has been released at once awaits the block that is due in it, if
    need be of the next pass. A pass over the blocks (`visit`) must therefore be run to its end.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        resident: frozenset[int],
        dtype: torch.dtype,
        link: Link,
        progress: Progress,
    ) -> None:
        self._link = link
        self._sizes = sizes
        self._on_gpu = {i: torch.empty(sizes[i], dtype=dtype, device=link.device) for i in sorted(resident)}
        self._streamed = [i for i in range(len(sizes)) if i not in resident]
        self._slab: HostSlab | None = None
        self._host: dict[int, Tensor] = {}
        if self._streamed:
            item = dtype.itemsize
            self._slab = HostSlab(item * sum(sizes[i] for i in self._streamed), link.device, progress)
            offset = 0
            for i in self._streamed:
                self._host[i] = self._slab.view(offset, (sizes[i],), dtype)
                offset += item * sizes[i]
        largest = max((sizes[i] for i in self._streamed), default=0)
        self._ring = [
            torch.empty(largest, dtype=dtype, device=link.device)
            for _ in range(min(RING_BLOCKS, len(self._streamed)))
        ]
        self.rewind()

    @property
    def pinned_bytes(self) -> int:
        return self._slab.num_bytes if self._slab is not None and self._slab.pinned else 0

    def rewind(self) -> None:
        """Wait for all copies and forget what has come up: the next pass starts from host memory."""
        self._link.synchronize()
        self._next_upload = 0
        self._next_visit = 0
        self._arrivals: dict[int, Event] = {}
        self._released: list[tuple[Event, ...]] = [() for _ in self._ring]
        self._home: dict[int, Event] = {}

    @contextmanager
    def filling(self, index: int) -> Iterator[Tensor]:
        """Block `index`, to be written: on the GPU where there is one. Between `rewind` and the first pass.

        At the end a block that is streamed is sent to its place in host memory.
        """
        if index in self._on_gpu:
            yield self._on_gpu[index]
        elif self._link.device.type == "cpu":
            yield self._host[index]
        else:
            slot = index % len(self._ring)
            buffer = self._ring[slot][: self._sizes[index]]
            for event in self._released[slot]:
                self._link.wait(event)  # HAZARD: the buffer is on its way down with an earlier block
            yield buffer
            done = self._link.download(buffer, self._host[index], after=self._link.record())
            self._released[slot], self._home[index] = (done,), done

    def at_rest(self, index: int) -> Tensor:
        """Block `index` where it lives. Only after `Link.synchronize`; not to be written."""
        return self._on_gpu[index] if index in self._on_gpu else self._host[index]

    def prefetch(self) -> None:
        """Send the first blocks of the next pass on their way up."""
        while self._next_upload < self._next_visit + len(self._ring):
            self._upload_next()

    def visit(self, arrive: Callable[[int, Tensor], None], download: bool) -> Iterator[tuple[int, Tensor]]:
        """Each block in order, on the GPU, valid until the next one is asked for.

        `arrive` may change it; with `download` it is then sent down while the caller, who must not
        change it, computes with it.
        """
        self.prefetch()
        for index, size in enumerate(self._sizes):
            if index in self._on_gpu:
                arrive(index, self._on_gpu[index])
                yield index, self._on_gpu[index]
                continue
            ticket = self._next_visit
            slot = ticket % len(self._ring)
            block = self._ring[slot][:size]
            self._link.wait(self._arrivals.pop(ticket))
            arrive(index, block)
            if download:
                self._home[index] = self._link.download(block, self._host[index], after=self._link.record())
            yield index, block
            # HAZARD: the buffer is free once the compute stream has read it for the last time AND its
            # download has ended; the upload below waits for both.
            in_use = (self._home[index],) if download else ()
            self._released[slot] = (self._link.record(), *in_use)
            self._next_visit += 1
            self._upload_next()

    def _upload_next(self) -> None:
        ticket = self._next_upload
        slot = ticket % len(self._ring)
        index = self._streamed[ticket % len(self._streamed)]
        after = self._released[slot]
        if index in self._home:
            # HAZARD: its download of the pass before must have ended, or the old weights come up.
            after = (*after, self._home[index])
        buffer = self._ring[slot][: self._sizes[index]]
        self._arrivals[ticket] = self._link.upload(self._host[index], buffer, after=after)
        self._next_upload += 1

    def close(self) -> None:
        """Free the pinned memory. After `Link.synchronize`."""
        self._host.clear()
        if self._slab is not None:
            self._slab.close()


class Zo2:
    """MeZO, blocks streamed from host memory."""

    name = "zo2"
    link_delay: Callable[[], int] | None = None
    """For stress tests, set before `setup`: see `engines.transfer.Link`."""

    def __init__(self, settings: Zo2Settings, context: Context) -> None:
        self.settings = settings
        self.context = context
        self.device = torch.device(context.device)
        self._dtype = TORCH_DTYPE[context.workload.dtype]
        self._seed = context.seed
        self._step = 0
        self._pending: Update | None = None
        self._clock = ComputeClock(self.device)

    @staticmethod
    def why_not_available() -> str | None:
        """`None`: it runs on any device."""
        return None

    def setup(self, blueprint: Blueprint) -> None:
        """Raises `UserError` for a model whose blocks share tensors, and `InfeasiblePlan` before anything is
        allocated if the streamed blocks do not fit into host memory."""
        model = blueprint.model
        places = first_names(model)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        block_names = _names_by_block(model, places)
        in_blocks = {name for names in block_names for name in names}
        self._order = list(shapes)
        block_shapes = [{name: shapes[name] for name in names} for names in block_names]
        sizes = [_extent(own, 1) for own in block_shapes]
        resident = resident_indices(len(sizes), self.settings.resident_blocks)
        self._refuse_too_little_host_memory(sizes, resident)

        outer = {name: self._empty(shape) for name, shape in shapes.items() if name not in in_blocks}
        scratch = {name: torch.empty_like(weight) for name, weight in outer.items()}
        self._outer = group_of(model, outer, scratch)

        # One scratch block for all: each block's parameters are views of it, bound once and for good.
        # Only the compute stream touches it, so its uses are in order by themselves.
        grid = SCRATCH_ALIGNMENT_BYTES // self._dtype.itemsize
        one_block = self._empty((max(_extent(own, grid) for own in block_shapes),))
        self._layouts: list[TensorGroup] = []
        for own in block_shapes:
            views = _views(one_block, own, grid)
            scratch.update(views)
            self._layouts.append(group_of(model, views, views))
        bind(model, places, scratch)
        move_buffers(model, self.device)
        model.eval()
        self._driver = BlockDriver(model)

        self._link = Link(self.device, self.link_delay)
        self._stream = BlockStream(sizes, resident, self._dtype, self._link, self.context.progress)
        self._fill(blueprint.fill)

    def _refuse_too_little_host_memory(self, sizes: Sequence[int], resident: frozenset[int]) -> None:
        streamed_bytes = self._dtype.itemsize * sum(sizes[i] for i in range(len(sizes)) if i not in resident)
        host_bytes = self.context.host_bytes
        if host_bytes is not None and streamed_bytes > host_bytes:
            missing_bytes, count = streamed_bytes - host_bytes, len(sizes) - len(resident)
            raise InfeasiblePlan(
                f"{missing_bytes / 1e9:.3g} GB of host memory are missing: {count} streamed blocks take "
                f"{streamed_bytes / 1e9:.3g} GB, and the run may use {host_bytes / 1e9:.3g} GB; free host "
                "memory, or keep more blocks on the GPU with --set zo2.resident_blocks=N"
            )

    @torch.no_grad()
    def _fill(self, fill: Callable[[str, Tensor], object]) -> None:
        """Write every weight to where it lives; with a GPU through the ring, so never twice on the host."""
        for name, weight in zip(self._outer.names, self._outer.weights, strict=True):
            fill(name, weight)
        for index in range(len(self._layouts)):
            with self._stream.filling(index) as flat:
                block = self._block(index, flat)
                for name, weight in zip(block.names, block.weights, strict=True):
                    fill(name, weight)
            self.context.progress("filling blocks", index + 1, len(self._layouts))
        self.synchronize()
        self._forget_times()
        self._stream.prefetch()

    def _block(self, index: int, flat: Tensor) -> TensorGroup:
        """Block `index` whose weights are packed in `flat`."""
        layout = self._layouts[index]
        own = {name: tensor.shape for name, tensor in zip(layout.names, layout.scratch, strict=True)}
        return replace(layout, weights=list(_views(flat, own, 1).values()))

    def _empty(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self.device)

    @property
    def pinned_bytes(self) -> int:
        return self._stream.pinned_bytes

    @torch.no_grad()
    def step(self, batches: Sequence[Batch]) -> StepStats:
        h2d_bytes, d2h_bytes = self._link.h2d_bytes, self._link.d2h_bytes
        eps = self.settings.eps
        self._clock.start()
        inputs = [to_device(batch, self.device) for batch in batches]
        self._update_outer()
        hidden: dict[int, list[Tensor]] = {}
        calls: dict[int, list[Sequence[BlockCall]]] = {}
        for sign in (1, -1):
            self._outer.perturb(self._seed, self._step, sign * eps)
            hidden[sign], calls[sign] = self._enter(inputs)
        self._clock.stop()

        for index, group in self._visit(download=True):
            for sign in (1, -1):
                group.perturb(self._seed, self._step, sign * eps)
                for i, each_calls in enumerate(calls[sign]):
                    hidden[sign][i] = self._driver.run(index, each_calls[index], hidden[sign][i])

        self._clock.start()
        losses = LossPair(self.device)
        for sign in (-1, 1):
            if sign == 1:  # the outer scratch still holds the minus side from before the blocks
                self._outer.perturb(self._seed, self._step, eps)
            for each, last in zip(inputs, hidden[sign], strict=True):
                losses.add(sign, self._driver.finish(each, last).loss)
        self._clock.stop()
        plus, minus = losses.read(len(inputs), self._step)  # the one place where the host waits
        self._pending = next_update(self._step, self.settings, self.context, plus, minus)
        self._step += 1
        h2d_s, d2h_s = self._link.take_busy_s()
        return StepStats(
            loss=(plus + minus) / 2,
            h2d_bytes=self._link.h2d_bytes - h2d_bytes,
            d2h_bytes=self._link.d2h_bytes - d2h_bytes,
            gpu_s=self._clock.take_s(),
            h2d_s=h2d_s,
            d2h_s=d2h_s,
            update=self._pending,
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        total = EvaluationSum()
        remaining = iter(batches)
        while group := list(islice(remaining, EVALUATION_GROUP)):
            inputs = [to_device(batch, self.device) for batch in group]
            self._update_outer()
            self._outer.show_weights()
            hidden, calls = self._enter(inputs)
            for index, block in self._visit(download=self._pending is not None):
                block.show_weights()
                for i, each_calls in enumerate(calls):
                    hidden[i] = self._driver.run(index, each_calls[index], hidden[i])
            for each, last in zip(inputs, hidden, strict=True):
                output = self._driver.finish(each, last)
                total.add(output.loss, output.logits, each["labels"])
        self._forget_times()
        return total.result()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        self._flush()
        self.synchronize()
        where = dict(zip(self._outer.names, self._outer.weights, strict=True))
        for index in range(len(self._layouts)):
            block = self._block(index, self._stream.at_rest(index))
            where.update(zip(block.names, block.weights, strict=True))
        for name in self._order:
            yield name, where[name].cpu()

    def replay(self, updates: Iterable[Update]) -> None:
        """Apply updates of an earlier run, in its order, and go on after the last."""
        for update in updates:
            self._flush()
            self._pending = update
            self._step = update.step + 1

    def save(self, folder: Path) -> None:
        save_checkpoint(folder, self.weights(), step=self._step, seed=self._seed)

    def load(self, folder: Path) -> None:
        scratch = [self._outer, *self._layouts]
        expected = {
            name: tensor for group in scratch for name, tensor in zip(group.names, group.scratch, strict=True)
        }
        checkpoint = open_checkpoint(folder, expected)
        self._stream.rewind()  # what has come up already is about to be replaced
        self._fill(lambda name, out: out.copy_(checkpoint.tensor(name)))
        self._step, self._seed, self._pending = checkpoint.step, checkpoint.seed, None

    def synchronize(self) -> None:
        self._link.synchronize()

    def close(self) -> None:
        if hasattr(self, "_stream"):
            self.synchronize()
            self._stream.close()

    def _enter(
        self, inputs: Sequence[Mapping[str, Tensor]]
    ) -> tuple[list[Tensor], list[Sequence[BlockCall]]]:
        """Each micro-batch's hidden state before the first block, and what its blocks are called with.

        Apart, so that a hidden state goes as soon as a block has made the next of it.
        """
        entered = [self._driver.record(each) for each in inputs]
        return [each.hidden for each in entered], [each.calls for each in entered]

    def _visit(self, *, download: bool) -> Iterator[tuple[int, TensorGroup]]:
        """Each block with the pending update applied, and the compute clock running. To be run to its end.

        The caller has updated the outer tensors.
        """
        update = self._pending

        def arrive(index: int, flat: Tensor) -> None:
            self._clock.start()
            if update is not None:
                self._block(index, flat).update(self._seed, update)

        for index, flat in self._stream.visit(arrive, download):
            yield index, self._block(index, flat)
            self._clock.stop()
        self._pending = None

    def _update_outer(self) -> None:
        if self._pending is not None:
            self._outer.update(self._seed, self._pending)

    @torch.no_grad()
    def _flush(self) -> None:
        """Apply the pending update now."""
        if self._pending is None:
            return
        self._update_outer()
        for _ in self._visit(download=True):
            continue
        self._forget_times()

    def _forget_times(self) -> None:
        """Copies and kernels so far belong to no step."""
        self._link.take_busy_s()
        self._clock.take_s()


def _names_by_block(model: nn.Module, places: Mapping[str, str]) -> list[list[str]]:
    """First names of each block's tensors. Raises `UserError` if one is also somewhere else."""
    path, blocks = find_blocks(model)
    prefixes = [f"{path}.{index}." for index in range(len(blocks))]
    for place, name in places.items():
        homes = {prefix for prefix in prefixes if place.startswith(prefix) or name.startswith(prefix)}
        if homes and not any(place.startswith(p) and name.startswith(p) for p in homes):
            raise UserError(
                type(model).__name__,
                f"ties '{place}' to '{name}', which is not in the same block",
                "use engine mezo, which keeps all weights on the GPU",
            )
    return [[name for name in dict.fromkeys(places.values()) if name.startswith(p)] for p in prefixes]


def _extent(shapes: Mapping[str, torch.Size], grid: int) -> int:
    """Elements that tensors take up one after the other, each starting on a multiple of `grid`."""
    return sum(-(-shape.numel() // grid) * grid for shape in shapes.values())


def _views(flat: Tensor, shapes: Mapping[str, torch.Size], grid: int) -> dict[str, Tensor]:
    """Tensors that lie in `flat` one after the other, each starting on a multiple of `grid`."""
    views = {}
    offset = 0
    for name, shape in shapes.items():
        views[name] = flat[offset : offset + shape.numel()].view(shape)
        offset += -(-shape.numel() // grid) * grid
    return views
