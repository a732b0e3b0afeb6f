"""ZO2: MeZO with the blocks in host memory (Wang et al., arXiv 2503.12668).

The algorithm is `engines.methods.mezo`'s, and so are the bits. What differs is where the weights are. In a
step each block comes up once, part by part (`engines.offload.ring`), and while it is there, for each of its
layers

    1. theta takes the updates that were not known when it was last written,
    2. theta + eps z and theta - eps z go to scratch memory, in the same pass over theta
    (`engines.noise.weight_pass`),
    3. both forward passes go through the layer, stacked (`engines.zeroth_order.perturbed_model`).

Nothing below changes theta, so its room on the GPU is free for the next part after 2. Every `fold_every`-th
step the updated theta is written in 1 and sent down; blocks take turns, so all steps are alike. In between
the host keeps an older theta, and its updates are replayed at each visit from the log of (step, g, lr): a
Gaussian per parameter instead of two bytes over the link. A replayed update is rounded as it was when it was
new, so the bits do not depend on `fold_every`.

Blocks that host memory has no room for are on disk (`engines.offload.disk`), and are never written there
while they train: their updates stay in the log and are replayed from the base at every visit, on a low-bit
one rounding by rounding. When the log is full, after `LOG_CAPACITY` updates, or a window of
`engines.zeroth_order.low_rank_noise` ends, they are folded into a second file. A base that is only read needs
no more than that.

Events order the streams; the host waits once per step, to read the two losses. Uploads for the next step go
on over the loss, as far as the ring has room.

With a low-bit `base` the blocks' matrices are kept and copied as in `engines.quantized.codec`, approximately;
their updates pend exactly and join them at the times of `engines.zeroth_order.deferred_updates`, wherever
they are kept.

On the GPU: embeddings, norms and head; the resident blocks; the ring; the perturbed weights of one layer; the
hidden states of both streams. On the host: the other blocks, in pinned memory of exactly their size, or
a ring through which those on disk come.

Deviations from the paper and its code, beside those of `engines.methods.mezo`:
- Noise is computed from counters; no generator states are kept, and tied tensors have one perturbation.
- Downloads are not needed in every step (`fold_every`); the paper's schedule is 1.
- Blocks may be on disk; the paper has all in host memory.
- The pending updates are applied wherever weights are looked at: evaluating, exporting, saving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.base import Batch, Blueprint, Context, Evaluation, StepStats, Update
from engines.costs.zo2 import choose_on_disk, folds_disk, resident_indices
from engines.decoding import Decoded, GenerationRequest
from engines.methods.mezo import EVALUATION_GROUP
from engines.model.blocks import TORCH_DTYPE
from engines.model.evaluation import EvaluationSum
from engines.model.flat_layout import BlockLayout, lay_out
from engines.noise.visits import LOG_CAPACITY, Visit
from engines.offload.disk import DiskBlocks, spill_folder
from engines.offload.disk_tensors import in_place
from engines.offload.ring import BlockStream
from engines.quantized.block_form import BlockForm, block_forms
from engines.quantized.export import landed_on_grid, plain_weights
from engines.settings.zeroth_order import Zo2Settings
from engines.transfer.compute_clock import ComputeClock
from engines.transfer.engine_clocks import Clocks
from engines.zeroth_order.checkpoint import open_checkpoint, save_checkpoint
from engines.zeroth_order.deferred_updates import PendingUpdates
from engines.zeroth_order.estimators import drawn_blocks, forwards, next_updates, probes
from engines.zeroth_order.forward_passes import Streams
from engines.zeroth_order.generation import generate
from engines.zeroth_order.low_rank_noise import LowRank, beside, window_due
from engines.zeroth_order.perturbed_model import PerturbedModel
from engines.zeroth_order.perturbed_weights import Task
from engines.zeroth_order.stored_blocks import KeptBlocks


class Zo2:
    """MeZO, blocks streamed from host memory."""

    name = "zo2"
    link_delay: Callable[[], int] | None = None
    """For stress tests, set before `setup`: see `engines.transfer.link.Link`."""
    disk_delay_s: Callable[[], float] | None = None
    """Likewise: see `engines.offload.disk.DiskBlocks`."""

    def __init__(self, settings: Zo2Settings, context: Context) -> None:
        self.settings = settings
        self.context = context
        self.device = torch.device(context.device)
        self._dtype = TORCH_DTYPE[context.workload.dtype]
        self._seed = context.seed
        self._step = 0
        self._clocks = Clocks(context, self.device)
        self._clock = self._clocks.compute
        self._noise_clock = ComputeClock(self.device, self._clocks.timeline, "perturb")
        self._disk: DiskBlocks | None = None

    @staticmethod
    def why_not_available() -> str | None:
        """`None`: it runs on any device."""
        return None

    @torch.no_grad()
    def setup(self, blueprint: Blueprint) -> None:
        """Raises `InfeasiblePlan` before anything is filled if host memory or the disk is too small for its
        blocks."""
        adapters, self._layout = beside(
            blueprint.model,
            lay_out(blueprint.model, self._dtype, self.settings.train),
            self.settings,
            self._dtype,
            self.device,
            self._seed,
        )
        blocks, base = self._layout.blocks, self.settings.base
        self._forms = block_forms(blocks, base, self._dtype)
        resident = resident_indices(len(blocks), self.settings.resident_blocks)
        self._on_disk = choose_on_disk(
            [form.size_bytes for form in self._forms],
            resident,
            self.settings.disk_blocks,
            self.context.host_bytes,
        )
        self._pending = PendingUpdates(
            self._forms,
            self.device,
            apart=self.settings.layer_share < 1,
            every=self.settings.fold_every,
            apart_from_flushes=self._on_disk,
        )
        self._model = PerturbedModel(
            blueprint.model, self._dtype, self.device, self._layout, adapters, self._noise_clock, base
        )
        self._link = self._clocks.link(self.link_delay)
        self._disk = self._make_disk(blocks, blueprint)
        self._stream = BlockStream(
            self._forms, resident, self._link, self._clock, self.context.progress, self._disk
        )
        self._kept = KeptBlocks(
            self._model, self._stream, self._forms, self._on_disk, self._pending, self._visit, self._clock
        )
        held = frozenset(i for i in self._on_disk if self._disk is not None and self._disk.holds(i))
        self._fill(
            blueprint.fill,
            lambda form, memory: form.fill(memory, blueprint.fill, self._model.scratch.room),
            held,
        )
        if self._disk is not None:
            self._disk.choose_depth()
        self._stream.prefetch()

    def _make_disk(self, blocks: Sequence[BlockLayout], blueprint: Blueprint) -> DiskBlocks | None:
        if not self._on_disk:
            return None
        size, dtype = self._dtype.itemsize, self.context.workload.dtype
        as_stored = {i: blocks[i] for i in self._on_disk} if self.settings.base == "full" else {}
        return DiskBlocks(
            {i: self._forms[i].size_bytes for i in sorted(self._on_disk)},
            spill_folder(self.settings.disk_folder),
            self._link,
            self.context.progress,
            folds=self._folded_on_disk() if folds_disk(self.settings, self.context.total_steps) else (),
            in_place=in_place(as_stored, blueprint, dtype, size),
            delay_s=self.disk_delay_s,
            timeline=self._clocks.timeline,
        )

    def _folded_on_disk(self) -> list[int]:
        """Blocks on disk that training changes."""
        trained = {*self._pending.trained}
        if isinstance(self._model.adapters, LowRank):
            trained.update(self._model.adapters.blocks)
        return sorted(self._on_disk & trained)

    def _fill(
        self,
        fill: Callable[[str, Tensor], object],
        fill_block: Callable[[BlockForm, Tensor], object],
        held: frozenset[int] = frozenset(),
    ) -> None:
        """Write every weight to where it lives, but those of blocks that are `held` there; with a GPU through
        the ring, so never twice on the host. A low-bit base is made there in its final form, one matrix at a
        time.
        """
        for name, weight in self._model.outer.items():
            fill(name, weight)
        for index, form in enumerate(self._forms):
            if index not in held:
                with self._stream.filling(index) as memory:
                    fill_block(form, memory)
            self.context.progress("filling blocks", index + 1, len(self._forms))
        self._stream.rewind()
        self._forget_times()

    @property
    def pinned_bytes(self) -> int:
        return self._stream.pinned_bytes

    @torch.no_grad()
    def step(self, batches: Sequence[Batch]) -> StepStats:
        """Its times, unlike its loss and bytes, are those of the step before."""
        times = self._cut_times()
        window = window_due(self.settings, self._step)
        self._fold_on_disk(window)
        before = self._stream.moved()
        self._label("before the blocks")
        self._clocks.exposure.mark()
        self._clock.start()
        prepared = [self._model.prepare(batch) for batch in batches]
        streams = Streams(self._model, prepared, probes(self.settings, self._step), self._visit())
        for index, task in self._pass(self._goes_down, perturbed=self._drawn(self._step), folds=window):
            streams.visit(index, task, self._stream)
        self._label("loss")
        sums = streams.losses()
        self._clock.stop()
        told = times()  # the GPU has much to do still, so that this costs nothing
        losses = sums.read(len(prepared), self._step)  # the one place where the host waits
        updates = next_updates(self._step, self.settings, self.context.total_steps, losses)
        for update in updates:
            self._append(update)
        return StepStats(
            loss=sum(losses) / len(losses),
            forwards=float(forwards(self.settings)),
            updates=updates,
            **self._stream.moved_since(before),
            **told,
        )

    def _goes_down(self, block: int) -> bool:
        """Whether it is the block's turn to keep its updates in this step. LOZO's windows have their own."""
        return self.settings.estimator != "lozo" and self._pending.is_due(block, self._step)

    def _cut_times(self) -> Callable[[], dict[str, Any]]:
        """See `engines.transfer.compute_clock.ComputeClock.cut`."""
        disk_s = None if self._disk is None else self._disk.take_busy_s()
        clocks, perturb = self._clocks.cut(self._link), self._noise_clock.cut()
        return lambda: clocks() | {"perturb_s": perturb(), "disk_s": disk_s}

    def _pass(
        self,
        stores: Callable[[int], bool],
        *,
        perturbed: Collection[int] | None = None,
        folds: int | None = None,
    ) -> Iterator[tuple[int, Task]]:
        """Every block in order, and what its visit is to do, which the caller makes. One that `stores` names
        keeps its updates, and so does every resident one unless they are rounded to a grid, but none on disk
        does. `perturbed`: the blocks that are, in a step."""
        on_grid = self._pending.on_grid
        again = perturbed is not None and len(probes(self.settings, self._step)) > 1
        for index in range(len(self._layout.blocks)):
            pending = self._pending.pends(index)
            resident = self._stream.is_resident(index)
            self._label(f"block {index}")
            kept = resident and not on_grid
            keep = pending and (kept or (stores(index) and index not in self._on_disk))
            folded = None if index in self._on_disk else folds
            keep = keep or folded is not None
            self._stream.begin(keep=keep and not resident)
            overdue: tuple[Visit, ...] = ()
            how = self._visit(index)
            if index in self._on_disk:
                overdue, how = self._pending.split(index, how, self._step - (perturbed is None))
            # With several probes the ring's copy takes the updates, whether it goes down or not.
            store = keep or (pending and again and not on_grid)
            perturb = perturbed is not None and index in perturbed
            yield index, Task(how=how, store=store, perturb=perturb, overdue=overdue, folds=folded)
            if keep or not pending:
                self._pending.stored(index)
        self._stream.end_pass()

    def _pass_without_noise(self, stores: Callable[[int], bool], folds: int | None = None) -> Iterator[int]:
        """As `_pass`; each block may be run while its index is held."""
        for index, task in self._pass(stores, folds=folds):
            with self._model.visiting(index, task, self._stream):
                yield index

    def _drawn(self, step: int) -> frozenset[int]:
        return drawn_blocks(self.settings, self._seed, step, self._pending.drawable)

    def _visit(self, block: int | None = None, *, latest: int | None = None) -> Visit:
        """With the updates that `block` has not taken, or none without a block; or with so many of the latest
        ones, of the block or of all."""
        log = self._pending.everything if block is None else self._pending.logs[block]
        first = log.length if block is None else self._pending.first(block)
        return Visit(
            seed=self._seed, log=log, first=first if latest is None else max(0, log.length - latest),
            last=log.length, rounding=self.settings.rounding, step=self._step, eps=self.settings.eps,
            noise=self.settings.noise,
        )  # fmt: skip

    def _append(self, update: Update) -> None:
        """The outer weights take it at once; its time counts with the next step's."""
        self._label("update")
        self._clock.start()
        self._noise_clock.start()
        self._pending.append(update, self._drawn(update.step))
        self._model.update_outer(self._visit(latest=1))
        self._noise_clock.stop()
        self._clock.stop()
        self._step = update.step + 1

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        total = EvaluationSum()
        remaining = iter(batches)
        while group := [self._model.prepare(batch) for batch in islice(remaining, EVALUATION_GROUP)]:
            hidden, calls = self._model.enter_all_plain(group)
            for index in self._pass_without_noise(lambda i: False):
                for i, each_calls in enumerate(calls):
                    hidden[i] = self._model.run(index, each_calls, hidden[i])
            for each, last in zip(group, hidden, strict=True):
                self._model.evaluate(each, last, total)
        self._forget_times()
        return total.result()

    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> Iterator[Decoded]:
        """See `engines.decoding.GeneratingEngine`."""
        self._flush(self._step - 1)

        def blocks() -> Iterator[int]:
            self._clocks.exposure.mark()
            return self._pass_without_noise(lambda i: False)

        before = self._stream.moved()
        for tokens in generate(self._model, request, blocks, self._clock, self.context.vram_bytes):
            moved = self._stream.moved_since(before)
            before = self._stream.moved()
            yield Decoded(tokens=tokens, stats=StepStats(loss=math.nan, **moved, **self._cut_times()()))
        self._forget_times()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.settings.base != "full":
            self.synchronize()
            plain = plain_weights(
                self._layout,
                self._forms,
                self._model.outer,
                lambda index: self._kept.block(index, self._step - 1),
                lambda index: self._kept.lacking(index, self._step - 1),
                self.device,
            )
            for name, weight in plain:
                yield name, self._model.adapters.merged(name, weight, self._visit())
            return
        self._flush(self._step - 1)
        self.synchronize()
        where = self._kept.tensors(self._step - 1)
        for name in self._layout.shapes:
            yield name, self._model.adapters.merged(name, where[name].cpu(), self._visit())

    def _fold_on_disk(self, window: int | None) -> None:
        """Blocks on disk whose updates fill the log, or whose `window` ends, are written to their second
        files."""
        for index in self._folded_on_disk():
            if window is not None or self._pending.behind(index) + self.settings.queries > LOG_CAPACITY:
                self._kept.fold(index, self._step, window)

    def trace_events(self) -> list[dict[str, Any]]:
        """See `engines.base.TellsTrace`."""
        return self._clocks.trace_events()

    def _label(self, name: str) -> None:
        self._clock.label = self._noise_clock.label = name

    @torch.no_grad()
    def landed_share(self) -> float | None:
        """See `engines.zeroth_order.perturbed_model.PerturbedModel.landed_share`; with a low-bit base, of its
        matrices."""
        share = None
        if self._pending.on_grid:
            self.synchronize()
            entries = self.settings.fold_every * self.settings.queries
            share = landed_on_grid(
                self._forms,
                lambda index: self._kept.block(index, self._step - 1),
                lambda index: self._visit(index, latest=entries),
                self.device,
            )
        return self._model.landed_share(self._visit(latest=1)) if share is None else share

    @torch.no_grad()
    def replay(self, updates: Iterable[Update]) -> None:
        """Apply updates of an earlier run, in its order, and go on after the last."""
        for update in updates:
            window = window_due(self.settings, update.step) if update.query == 0 else None
            if update.query == 0:
                self._fold_on_disk(window)
            if self._pending.most == LOG_CAPACITY or window is not None:
                self._flush(update.step, window)
            self._append(update)
        self._flush(self._step - 1)

    def save(self, folder: Path) -> None:
        self._flush(self._step - 1)
        self.synchronize()
        weights = ((name, weight.cpu()) for name, weight in self._kept.tensors(self._step - 1).items())
        save_checkpoint(
            folder, weights, step=self._step, seed=self._seed, lora=self._model.adapters.form,
            base=self.settings.base, pending=self._pending.pending(self._step - 1),
        )  # fmt: skip

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        form = self._model.adapters.form
        expected = self._kept.in_memory()
        for index in self._on_disk:
            block = self._forms[index]
            expected |= block.views(torch.empty(block.size_bytes, dtype=torch.uint8, device="meta"))
        checkpoint = open_checkpoint(folder, expected, form, self.settings.base)
        self._stream.rewind()  # what has come up already is about to be replaced

        def read(name: str, out: Tensor) -> None:
            out.copy_(checkpoint.tensor(name))

        def read_block(form: BlockForm, memory: Tensor) -> None:
            for name, out in form.views(memory).items():
                read(name, out)

        self._fill(read, read_block)
        self._step, self._seed = checkpoint.step, checkpoint.seed
        self._pending.restore(*checkpoint.pending, self._drawn)
        for name, tensor in self._model.adapters.tensors.items():
            tensor.copy_(checkpoint.tensor(name))
        self._stream.prefetch()

    def synchronize(self) -> None:
        self._link.synchronize()

    def close(self) -> None:
        if hasattr(self, "_stream"):
            self.synchronize()
            self._stream.close()
        if self._disk is not None:
            self._disk.close()

    @torch.no_grad()
    def _flush(self, last_step: int, folds: int | None = None) -> None:
        """Apply the pending updates now, but those of blocks on disk, which stay in the log, and what the
        window `folds` has gathered; to trained matrices of a low-bit base, those updates that steps up to
        `last_step` have rounded to the grid."""
        moved = False
        if self._pending.on_grid:
            moved = self._kept.catch_up(last_step)
        elif self._pending.most or folds is not None:
            for _ in self._pass_without_noise(lambda i: True, folds):
                moved = True
        if moved:
            self._forget_times()

    def _forget_times(self) -> None:
        """Copies and kernels so far belong to no step."""
        self._link.take_busy_s()
        self._clock.take_s()
        self._noise_clock.take_s()
        if self._disk is not None:
            self._disk.take_busy_s()
