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
`engines.zeroth_order.low_rank` ends, they are folded into a second file. A base that is only read needs
no more than that.

Ranks of one machine have the blocks on its host once, and divide the writing: a block goes down by one of
them, to another place than it came from, and all take it from there when all have ended the step
(`engines.offload.shared_blocks`). Blocks on disk are there once, too, and read once for all of them; what is
written there anew, they divide (`engines.offload.shared_disk`). With `sharded_upload` each brings up a share
of every part over its own link, and the GPUs exchange the shares (`engines.transfer.share_exchange`).

Events order the streams; the host waits once per step, to read the two losses. Uploads for the next step go
on over the loss, as far as the ring has room.

With a lossless `base` the blocks' matrices are kept and copied as in `engines.lossless.lossless_codec`, to
the bit, but for those that found no room there (`engines.lossless.whole_matrices`). With a low-bit one they
are as in `engines.quantized.codec`, approximately; their updates are deferred exactly and join them at the
times of `engines.zeroth_order.deferred_updates`, wherever they are kept.

With `hidden_states=host` those of the step's passes wait in pinned host memory, but for the first 256 MB
(`engines.model.waiting_states`): a step of tens of queries has as many of them.

On the GPU: embeddings, norms and head; the resident blocks; the ring; the perturbed weights of one layer; the
hidden states of both passes. On the host: the other blocks, in pinned memory of exactly their size, or
a ring through which those on disk come.

Deviations from the paper and its code, beside those of `engines.methods.mezo`:
- Noise is computed from counters; no generator states are kept, and tied tensors have one perturbation.
- Downloads are not needed in every step (`fold_every`); the paper's schedule is 1.
- Blocks may be on disk; the paper has all in host memory.
- The deferred updates are applied wherever weights are looked at: evaluating, exporting, saving.

Longer than 400 lines: where blocks lie and what is done with them there is one store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from engines.base import Blueprint, Context
from engines.costs.mezo import hidden_state_bytes, num_probes
from engines.costs.zo2 import folds_disk, most_going_down, num_staying, resident_indices
from engines.lossless.whole_matrices import WholeMatrices
from engines.model.waiting_states import States, StatesOnDevice, WaitingStates
from engines.noise.visits import Visit
from engines.offload.blocks_on_disk import BlocksOnDisk, put_on_disk, which_on_disk
from engines.offload.disk_tensors import FetchedTensors
from engines.offload.ring import BlockStream
from engines.offload.shared_disk import SharedDisk
from engines.quantized.block_form import BlockForm
from engines.settings.zeroth_order import Zo2Settings
from engines.shapes import ModelShape
from engines.transfer.compute_clock import ComputeClock
from engines.transfer.engine_clocks import Clocks
from engines.world import Alone, divide
from engines.zeroth_order.block_store import FillBlock, StepClocks
from engines.zeroth_order.block_visit import BlockMemory, Task
from engines.zeroth_order.deferred_updates import DeferredUpdates
from engines.zeroth_order.low_rank.low_rank_noise import LowRank
from engines.zeroth_order.perturbed_model import PerturbedModel
from engines.zeroth_order.step import ZerothOrder


class Zo2(ZerothOrder):
    """MeZO, blocks streamed from host memory: the step of `engines.zeroth_order.step` over `StreamedBlocks`.

    The times of a step, unlike its loss and bytes, are those of the step before.
    """

    name = "zo2"
    settings: Zo2Settings
    link_delay: Callable[[], int] | None = None
    """For stress tests, set before `setup`: see `engines.transfer.link.Link`."""
    disk_delay_s: Callable[[], float] | None = None
    """Likewise: see `engines.offload.disk.DiskBlocks`."""

    def __init__(self, settings: Zo2Settings, context: Context) -> None:
        device = torch.device(context.device)
        self._copies = Clocks(context, device)
        timeline = self._copies.timeline
        noise = ComputeClock(device, timeline, "perturb")
        super().__init__(settings, context, StepClocks(self._copies.compute, noise, timeline))

    def _make_blocks(self, forms: Sequence[BlockForm], updates: DeferredUpdates) -> StreamedBlocks:
        return StreamedBlocks(
            forms, updates, self.settings, self.context, self._clocks, self._copies,
            link_delay=self.link_delay, disk_delay_s=self.disk_delay_s,
        )  # fmt: skip


class StreamedBlocks:
    """The blocks of ZO2: some on the GPU for good, the others in pinned host memory or on disk.

    What each place holds differs. A block on disk has the base or, once it was written anew, what the second
    file has; the others have what visits stored in them.
    """

    def __init__(
        self,
        forms: Sequence[BlockForm],
        updates: DeferredUpdates,
        settings: Zo2Settings,
        context: Context,
        clocks: StepClocks,
        copies: Clocks,
        *,
        link_delay: Callable[[], int] | None,
        disk_delay_s: Callable[[], float] | None,
    ) -> None:
        """Raises `InfeasiblePlan` if host memory is too small."""
        self._forms = forms
        self._updates = updates
        self._settings = settings
        self._context = context
        self._clocks = clocks
        self._copies = copies
        self._delays = link_delay, disk_delay_s
        self._world = context.world if settings.shares_blocks else Alone()
        self._resident = resident_indices(len(forms), settings.resident_blocks)
        self.on_disk = which_on_disk(forms, self._resident, settings, context, self._world)
        self.disk: BlocksOnDisk | None = None
        self.stream: BlockStream | None = None
        self.states: States = StatesOnDevice()

    def set_up(self, model: PerturbedModel, blueprint: Blueprint) -> None:
        """Raises `InfeasiblePlan` if the disk is too small."""
        self._model = model
        self.link = self._copies.link(self._delays[0])
        streamed = frozenset(range(len(self._forms))) - self._resident
        model.scratch.whole = WholeMatrices(self.link.device, self.link, streamed)
        if self.on_disk:
            changed = self._changed_on_disk() if folds_disk(self._settings, self._context.total_steps) else []
            self.disk = put_on_disk(
                self._forms, self.on_disk, self._settings, blueprint, self._context, self.link,
                written_back=changed, delay_s=self._delays[1], timeline=self._clocks.timeline,
            )  # fmt: skip
        if self._settings.hidden_states == "host":
            self.states = self._make_states(blueprint.shape)
        self.stream = BlockStream(
            self._forms,
            self._resident,
            self.link,
            self._clocks.compute,
            self._context.progress,
            self.disk,
            self._world,
            most_written=most_going_down(self._taking_turns, self._settings.fold_every),
            sharded=self._settings.sharded_upload,
            timeline=self._clocks.timeline,
        )

    def _make_states(self, shape: ModelShape) -> States:
        """In host memory, but for those that stay, of this rank's part of a step."""
        workload, settings, world = self._context.workload, self._settings, self._context.world
        sizes = hidden_state_bytes(shape, workload, settings)
        mine = divide(world.size, workload.accumulation, num_probes(settings))[world.rank]
        count, staying = len(mine.batches) * len(mine.probes), num_staying(sizes)
        if count <= staying:
            return StatesOnDevice()
        return WaitingStates(
            self.link,
            num_states=count,
            num_staying=staying,
            most_bytes=max(sizes),
            progress=self._context.progress,
        )

    @property
    def _taking_turns(self) -> list[int]:
        """Blocks that training changes and that go down, each when it is its turn."""
        return sorted(self._updates.trained - self._resident - self.on_disk)

    def _changed_on_disk(self) -> list[int]:
        """Blocks on disk that training changes."""
        changed = {*self._updates.trained}
        if isinstance(self._model.adapters, LowRank):
            changed.update(self._model.adapters.blocks)
        return sorted(self.on_disk & changed)

    @property
    def shared(self) -> frozenset[int]:
        if self._ring.shared is None:
            return frozenset()
        return frozenset(range(len(self._forms))) - self._resident - self.on_disk

    @property
    def _ring(self) -> BlockStream:
        assert self.stream is not None
        return self.stream

    @property
    def pinned_bytes(self) -> int:
        waiting = self.states.pinned_bytes if isinstance(self.states, WaitingStates) else 0
        return self._ring.pinned_bytes + waiting + self._model.scratch.whole.pinned_bytes

    def fill(self, fill_block: FillBlock, *, anew: bool) -> None:
        """Write every block to where it lives, but those that a file of the model's own holds; with a GPU
        through the ring, so never twice on the host. A low-bit base is made there in its final form, one
        matrix at a time."""
        ring, world = self._ring, self._context.world
        if anew:  # what has come up already is about to be replaced
            ring.stop_reading(together=False)
            ring.rewind()
        shares = ring.shared is not None or isinstance(self.disk, SharedDisk)
        for index, form in enumerate(self._forms):
            # One rank of the machine writes it: at first they take turns, later the first one loads for all.
            writer = 0 if anew else index % world.local_size
            if self._ranks_share(index) and world.local_rank != writer:
                continue
            if anew or self.disk is None or index not in self.on_disk or not self.disk.holds(index):
                with ring.filling(index) as memory:
                    fill_block(form, memory)
            self._context.progress("filling blocks", index + 1, len(self._forms))
        ring.rewind()
        self.forget_times()
        if shares and not anew:
            world.barrier()
            self._context.progress("waiting for the other ranks", 1, 1)
        if self.disk is not None and not anew:
            self.disk.choose_depth()
        if not (shares and anew):  # else the first rank may still be at it; the next pass sends up anyway
            ring.prefetch()

    def _ranks_share(self, block: int) -> bool:
        """Where it lies, other ranks of the machine read it too."""
        if block in self.on_disk:
            return isinstance(self.disk, SharedDisk)
        return self._ring.shared is not None and block not in self._resident

    # --- what a visit asks for: `engines.zeroth_order.block_visit.Source` -------------------------

    def spans(self, block: int) -> list[tuple[int, int]]:
        return self._ring.spans(block)

    def take(self, block: int, first: int, last: int) -> Tensor:
        return self._ring.take(block, first, last)

    def done(self, block: int, first: int, last: int) -> None:
        """The parts go down if the block is written, and what comes next goes up into their place: the ring's
        `done` ends with `prefetch`."""
        self._ring.done(block, first, last)

    # --- a step -----------------------------------------------------------------------------------------

    def make_room_in_log(self, window: int | None) -> None:
        self._make_room_in_log(window, together=False)

    def _make_room_in_log(self, window: int | None, *, together: bool) -> None:
        """Ranks that share the blocks on disk divide them where all do this `together`, before a step; else
        the first of the machine writes them, when it replays."""
        due = [
            index
            for index in self._changed_on_disk()
            if window is not None or self._updates.leave_no_room_for_a_step(index)
        ]
        if not due:
            return
        self._ring.stop_reading(together=together)
        world = self._context.world
        for turn, index in enumerate(due):
            writer = turn % world.local_size if together else 0
            if self._ranks_share(index) and world.local_rank != writer:
                task = self._task_at_rest(index, self._updates.step, window)
                self._model.end_window(index, task)
            else:
                with self._ring.fetched(index, write_back=True) as memory:
                    task = self._bring_up_to_date(index, memory, self._updates.step, window)
            self._updates.mark_stored(index, task)

    def begin_step(self, window: int | None) -> Callable[[], dict[str, Any]]:
        times = self._cut_times()
        self._make_room_in_log(window, together=True)
        self._ring.begin_pass(by_all=True)
        self._moved_before = self._ring.moved()
        self._copies.exposure.mark()
        return times

    def in_order(self, window: int | None) -> Iterator[tuple[int, Task]]:
        """A block goes down when it is its turn. With low-rank noise windows have their own."""
        by_window = self._settings.noise_window is not None
        updates = self._updates
        self._ring.begin_writing(
            [i for i in self._taking_turns if updates.is_due(i) and updates.num_deferred(i)]
        )
        return self._pass(
            lambda index: not by_window and self._updates.is_due(index), perturb=True, window=window
        )

    def before_ranks_meet(self) -> None:
        self._ring.finish_writing()

    def end_step(self) -> dict[str, Any]:
        self._ring.publish()
        return self._ring.moved_since(self._moved_before)

    def _cut_times(self) -> Callable[[], dict[str, Any]]:
        """The times so far, to be asked for later: `engines.transfer.compute_clock.ComputeClock.cut`."""
        disk_s = None if self.disk is None else self.disk.take_busy_s()
        copies, perturb = self._copies.cut(self.link), self._clocks.noise.cut()
        return lambda: copies() | {"perturb_s": perturb(), "disk_s": disk_s}

    def _pass(
        self, goes_down: Callable[[int], bool], *, perturb: bool = False, window: int | None = None
    ) -> Iterator[tuple[int, Task]]:
        """Every block in order, and what its visit is to do, which the caller makes.

        One that `goes_down` names is stored with its updates, and so is every resident one unless trained
        matrices are low-bit, but none on disk is.
        """
        updates = self._updates
        again = perturb and self._settings.forward_passes > 2
        for index in range(len(self._forms)):
            deferred = updates.num_deferred(index) > 0
            resident, on_disk = index in self._resident, index in self.on_disk
            self._clocks.label(f"block {index}")
            ends_window = None if on_disk else window
            keep = deferred and ((resident and not updates.quantized) or (goes_down(index) and not on_disk))
            keep = keep or ends_window is not None
            shared = None if resident else self._ring.shared
            self._ring.begin(write_back=keep and not resident and (shared is None or shared.writes(index)))
            roundings: tuple[Visit, ...] = ()
            how = updates.lacking(index)
            if on_disk:
                roundings, how = updates.split(index, updates.step - (not perturb))
            # With several probes the ring's copy takes the updates, whether it goes down or not.
            store = keep or (deferred and again and not updates.quantized)
            yield (
                index,
                Task(how=how, store=store, perturb=perturb, roundings=roundings, ends_window=ends_window),
            )
            if keep or not deferred:
                updates.mark_applied(index)
        self._ring.end_pass()

    def _pass_with_theta(self, goes_down: Callable[[int], bool], window: int | None = None) -> Iterator[int]:
        self._ring.begin_pass(by_all=False)
        for index, task in self._pass(goes_down, window=window):
            with self._model.visiting(index, task, self):
                yield index

    # --- the weights themselves -------------------------------------------------------------------------

    def in_order_with_theta(self) -> Iterator[int]:
        return self._pass_with_theta(lambda index: False)

    def begin_tokens(self) -> None:
        self._moved_before = self._ring.moved()

    def begin_token(self) -> None:
        self._copies.exposure.mark()

    def end_token(self) -> dict[str, Any]:
        moved = self._ring.moved_since(self._moved_before)
        self._moved_before = self._ring.moved()
        return moved | self._cut_times()()

    def forget_times(self) -> None:
        self.link.take_busy_s()
        self._clocks.compute.take_s()
        self._clocks.noise.take_s()
        if self.disk is not None:
            self.disk.take_busy_s()

    def apply_deferred(self, last_step: int, window: int | None = None, *, by_all: bool = False) -> None:
        moved = False
        if self._ring.shared is not None:
            moved = self._store_on_host(last_step, by_all=by_all)
        elif self._updates.quantized:
            moved = self._apply_roundings(last_step)
        elif window is not None or self._updates.most_deferred(self._updates.trained - self.on_disk):
            for _ in self._pass_with_theta(lambda index: True, window):
                moved = True
        if moved:
            self.forget_times()

    def _store_on_host(self, last_step: int, *, by_all: bool) -> bool:
        """With blocks that ranks share: store deferred updates in what is on this GPU, and `by_all` ranks at
        the same time in the others, which the first of the machine writes. Whether anything was."""
        behind = [i for i in sorted(self._updates.trained - self.on_disk) if self._updates.num_deferred(i)]
        for index in behind if by_all else self._resident.intersection(behind):
            if index in self._resident:
                self._bring_up_to_date(index, self._ring.at_rest(index), last_step)
            elif self._world.local_rank == 0:
                with self._ring.fetched(index, write_back=True) as memory:
                    self._bring_up_to_date(index, memory, last_step)
            self._updates.mark_applied(index)
        if by_all:
            self._ring.rewind()  # HAZARD: what has come up already is not what the first rank has written
        return bool(behind)

    def _apply_roundings(self, last_step: int) -> bool:
        """With trained low-bit matrices: store what was to be rounded up to `last_step` in blocks that are
        not on disk. Whether anything was."""
        nothing = Task(how=self._updates.none(), store=False, perturb=False)
        tasks = [
            nothing if index in self.on_disk else self._updates.task_of_roundings(index, last_step)
            for index in range(len(self._forms))
        ]
        if not any(task.store for task in tasks):
            return False
        self._ring.begin_pass(by_all=False)
        for index, task in enumerate(tasks):
            self._ring.begin(write_back=task.store and index not in self._resident)
            with self._model.visiting(index, task, self):
                pass
            self._updates.mark_stored(index, task)
        self._ring.end_pass()
        return True

    def at_rest(self, block: int) -> AbstractContextManager[Tensor]:
        if block in self.on_disk:
            return self._ring.fetched(block, write_back=False)
        return nullcontext(self._ring.at_rest(block))

    def stored(self, block: int, last_step: int) -> Tensor:
        if block in self.on_disk:
            return self._up_to_date(block, last_step)
        return self._ring.at_rest(block)

    def lacking(self, block: int, last_step: int) -> Visit:
        if block not in self.on_disk:
            return self._updates.lacking(block)
        if self._updates.quantized:
            return self._updates.split(block, last_step)[1]
        return self._updates.none()

    def tensors(self, last_step: int) -> Mapping[str, Tensor]:
        """A block on disk, or one that ranks share and that is behind, comes to pageable host memory when one
        of its tensors is asked for, with its updates, and goes when one of another block is."""
        fetched = self.on_disk
        if self._ring.shared is not None:  # where others read it
            fetched |= frozenset(i for i in self._updates.trained if self._updates.num_deferred(i))
        where = self._in_memory(fetched)
        if not fetched:
            return where
        forms = {i: self._forms[i] for i in sorted(fetched)}
        return FetchedTensors(where, forms, lambda index: self._up_to_date(index, last_step))

    def like_tensors(self) -> Mapping[str, Tensor]:
        like = self._in_memory(self.on_disk)
        for index in self.on_disk:
            form = self._forms[index]
            like |= form.views(torch.empty(form.size_bytes, dtype=torch.uint8, device="meta"))
        return like

    def _in_memory(self, left_out: frozenset[int]) -> dict[str, Tensor]:
        where = dict(self._model.non_block)
        for index, form in enumerate(self._forms):
            if index not in left_out:
                where |= form.views(self._ring.at_rest(index))
        return where | self._model.adapters.tensors

    @torch.no_grad()
    def _up_to_date(self, index: int, last_step: int) -> Tensor:
        """The bytes of a block on disk, copied to the host, with the updates that it takes."""
        with self._ring.fetched(index, write_back=False) as memory:
            self._bring_up_to_date(index, memory, last_step)
            return memory.to("cpu", copy=True)

    def _bring_up_to_date(
        self, index: int, memory: Tensor, last_step: int, window: int | None = None
    ) -> Task:
        """Store in `memory`, the bytes of a block on disk, what its place on the host would have after
        `last_step`, and what the `window` of low-rank noise has gathered."""
        task = self._task_at_rest(index, last_step, window)
        self._clocks.compute.start()
        with self._model.visiting(index, task, BlockMemory(self._forms[index], memory)):
            pass
        self._clocks.compute.stop()
        return task

    def _task_at_rest(self, index: int, last_step: int, window: int | None) -> Task:
        if self._updates.quantized:
            return self._updates.task_of_roundings(index, last_step)
        return Task(how=self._updates.lacking(index), store=True, perturb=False, ends_window=window)

    def synchronize(self) -> None:
        self._ring.synchronize()

    def close(self) -> None:
        if self.stream is not None:
            self.synchronize()
            self._model.scratch.whole.clear()
            self.stream.close()
        if isinstance(self.states, WaitingStates):
            self.states.close()
        if self.disk is not None:
            self.disk.close()
