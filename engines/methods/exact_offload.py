"""Exact AdamW on the CPU, block by block behind the backward pass.

ZeRO-Offload (2101.06840) put AdamW with fp32 master weights on the CPU; it waits for it. Here it is AdamW
(1711.05101, `engines.cpu_updates.adamw`), and each block goes its own way, as in LSP-Offload (2406.10181),
SlideFormer (2603.16428) and prime-rl. One step:

    1. GPU   forward: all micro-batches pass block 0, then block 1, ...
    2. GPU   backward from the last block on: its gradient G, summed over the micro-batches
    3. link  G to the host, on its own stream, while the GPU goes on with the block before
    4. CPU   AdamW on the block's fp32 masters and moments, in a worker thread
    5. link  the block's bf16 weights to the GPU, on their own stream, straight to where the model has them;
             the next forward pass waits for them block by block

Since micro-batches pass a block together (`engines.model.block_major`), a block's gradient is complete once
in a step however many there are, and 3 to 5 have a whole step's compute to hide behind: above T* tokens per
step they do (`engines.costs.exact_offload`).

With `weights=streamed` (ZeRO-Infinity, 2104.07857, and the vertical order of GreedySnake, 2512.17570) the
blocks' weights stay on the host and come up for 1 and again for 2, through the buffers of a few blocks on the
GPU (`weight_slots`; `engines.offload.block_slots`); 5 is left out. GPU memory is then that of a few blocks,
hidden states and what is outside the blocks, whatever the model's size.

Where things live. GPU: the bf16 weights of the model, gradients of three blocks, hidden states between
blocks; of what lies outside the blocks (embeddings, final norm, head) also gradients, fp32 masters and
moments, updated there. Host, per parameter of the blocks: the bf16 weight (pinned) and the 16 bits that make
it an fp32 master, and two moments, in fp32 (12 bytes in all), or bf16 (8) or int8 (6), which are approximate.
Gradients of all blocks, or of as many as `gradient_blocks` says, have pinned buffers there.

The first block's gradient is the last to be complete, and its weights are wanted first, so that its update
shows in every step. `gpu_blocks` keeps masters and moments of the first so many on the GPU, which updates
them where their gradients lie, as SuperOffload (2509.21271) does with its last buckets and ZeRO-Offload++
with a share of all: the more there are, the less is left for the CPU to do.

With `outer=host` what lies outside the blocks has its masters and moments on the host too, each tensor for
itself: the head's gradient goes down when the losses are known and is wanted last, an embedding's is the last
to be complete and wanted first, so its update shows.

With `hidden_states=host` those between blocks wait for the backward pass in pinned memory
(`engines.model.hidden_states`), where a step of many tokens would not fit.

Where host memory ends, low halves and moments of the last blocks are on disk (`disk_blocks`,
`engines.offload.disk_states`): read when their gradient is down, updated, written. With `disk_weights` their
weights are there with them, and come up from there for both passes (`engines.offload.disk_weights`).

Never stale: an update of step t is on the GPU before its block's next forward pass, and `evaluate`, `weights`
and `save` wait for what is left. A gradient that is not finite changes neither weights nor moments of its
block, nor of those that backward reaches after it; what is outside the blocks does not change either. The CPU
finds it (of `gpu_blocks` the GPU), so nothing waits, and the next step raises; a loss that is not finite
raises at once.

Clipping by the norm of the whole gradient: `clip_by=exact` waits for it, so that the CPU begins when backward
has ended; `clip_by=previous` scales by the norm of the step before, which is a method of its own, in which
nothing waits. The first step has none before it, and is not clipped.

Blocks and loss run compiled on a GPU, as native's do, and blocks are recomputed where activation
checkpointing asks for it, whole or what lies between their products (`engines.model.training_regions`): they
keep the activations of all micro-batches, where native has one's. Where weights and hidden states stay on the
GPU, all that micro-batches do in a block, in one direction, is one CUDA graph from the second step on
(`engines.model.block_major_graphs`): to start a compiled block's kernels one by one takes the CPU about as
long as they take the GPU, while Adam wants its cores. A gradient is summed within the graph, in one of three
slots; what copies it and its weights, and waits for them, is in none.

Several ranks of one machine each take their micro-batches and send their gradients down their own links. The
host has weights and states once; one rank adds up a chunk's gradients, in the order of ranks, and updates it
for all (`engines.cpu_updates.rank_updates`). What the GPU updates outside the blocks, it updates on every
rank by the same sum. With one micro-batch a rank the bits are those of one process that accumulates them,
with any number those of as many twins, which exchange their gradients. The norm to clip by is that of the
sum, which the CPU takes chunk by chunk as it arrives. States on disk have one rank for each block.

The oracle is the twin, `offload=False`: the same passes and the same CPU routine, in the main thread, with
copies that wait, and no CUDA graphs. Weights and losses are bit-equal on the same device, as long as the
model's own kernels are deterministic. In fp32 it is `native`'s arithmetic, in another order of rounding.

Deviations, and choices: micro-batches add up in the weights' dtype, as in native. A gradient crosses the link
in the weights' dtype. Masters begin as the bf16 weights that the model was loaded with. A master is rounded
to bf16 halves away from zero, on the GPU to even. Decay, bias correction and schedules are AdamW's. A tensor
that several blocks share, or a block and what is outside, is updated on the GPU.

Longer than 400 lines: a step and the life around it are read in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Batch, Blueprint, Context, Evaluation, StepStats
from engines.costs.exact_offload import gradient_places, host_bytes
from engines.costs.transformer import PROCESS_HOST_BYTES
from engines.cpu_updates.block_state import BlockStates
from engines.cpu_updates.chunks import UpdateStep
from engines.cpu_updates.cpu_threads import leave_threads_to_adam
from engines.cpu_updates.gradient_buffers import GradientBuffers
from engines.cpu_updates.gradient_norms import GradientNorms
from engines.cpu_updates.gradient_slots import GradientSlots
from engines.cpu_updates.outside_blocks import OutsideBlocks
from engines.cpu_updates.pipeline import GradientNotFinite, UpdatePipeline
from engines.cpu_updates.rank_updates import RankUpdates
from engines.cpu_updates.update_dispatch import UpdateDispatch
from engines.cpu_updates.updates_in_flight import UpdatesInFlight
from engines.errors import InfeasiblePlan, NonFiniteLoss, UserError, first_line
from engines.first_order.adamw import prepare_training, weights_dtype
from engines.first_order.checkpoint import (
    load_checkpoint,
    load_rng_state,
    model_weights,
    parameter_names,
    rng_state,
    save_checkpoint,
)
from engines.first_order.gpu_updates import GpuUpdates
from engines.first_order.lr_schedule import learning_rate_at
from engines.first_order.master_weights import MasterWeights
from engines.model.block_major import BlockMajor
from engines.model.block_major_graphs import BlockMajorGraphs
from engines.model.blocks import first_names, move_buffers, no_cache, set_parameter
from engines.model.evaluation import evaluate_on_device
from engines.model.flat_layout import BlockLayout, ModelLayout, lay_out, lay_out_group
from engines.model.hidden_states import HiddenStates
from engines.model.model_check import check_block_major
from engines.model.randomness import draws_random_numbers
from engines.model.stand_ins import give_back
from engines.model.training_regions import TrainingRegions, compiles
from engines.offload.disk_states import DiskStates
from engines.offload.disk_weights import DiskWeights
from engines.offload.kept_states import KeptStates
from engines.offload.spill_place import spill_folder
from engines.offload.streamed_weights import StreamedWeights
from engines.settings.exact_offload import GRADIENT_SLOTS, ExactOffloadSettings
from engines.transfer.engine_clocks import Clocks
from engines.transfer.rank_sums import check_ranks, sum_of_losses
from engines.transfer.value_on_host import ValueOnHost
from engines.world import ALONE, World, divide


class ExactOffload:
    """AdamW on the CPU behind the backward pass. Implements `engines.base.Engine`."""

    name = "exact-offload"
    disk_delay_s: Callable[[], float] | None = None
    """For stress tests, set before `setup`: see `engines.offload.disk_states.DiskStates`."""

    def __init__(self, settings: ExactOffloadSettings, context: Context) -> None:
        self.settings = settings
        self.context = context
        self.device = torch.device(context.device)
        self._clocks = Clocks(context, self.device)
        self.link = self._clocks.link()
        self.steps_done = 0
        self._compute = self._clocks.compute
        self.notes: list[str] = []
        """What of the settings could not be had, and why."""
        self._world = context.world
        check_ranks(self.name, self._world, of_one_process=settings.of_one_process)
        self._host_world: World = self._world if settings.offload else ALONE
        """The ranks that have what is on the host together."""
        self._this_step = UpdateStep(number=-1, learning_rate=0.0)
        """Of the last step."""
        self._in_flight = UpdatesInFlight(self.link, self._compute)
        """Of each block, and of each tensor outside them that the host updates: the groups."""
        self.on_gpu: list[Tensor] = []
        """Of each group, (elements,): where its weights are, or are when they have come up."""
        # `None`, until `setup` has made it and where the settings leave it out: `close` asks.
        self._regions: TrainingRegions | None = None
        self._states: BlockStates | None = None
        self._kept: KeptStates | None = None
        self._buffers: GradientBuffers | None = None
        self._outside_on_host: OutsideBlocks | None = None
        self._pipeline: UpdatePipeline | None = None
        self._ranks: RankUpdates | None = None
        """`None`: one process."""
        self.streamed: StreamedWeights | None = None
        """`None`: the blocks' weights stay on the GPU."""
        self._disk_weights: DiskWeights | None = None
        """`None`: no block's weights are on disk."""
        self.hidden_states: HiddenStates | None = None
        """`None`: those between blocks stay on the GPU."""

    @staticmethod
    def why_not_available() -> str | None:
        """`None`: it runs on any device."""
        return None

    # --- set-up ---------------------------------------------------------------------------------------

    def setup(self, blueprint: Blueprint) -> None:
        """Fill the model, take memory on the host, start the CPU worker.

        Raises `UserError` for fp16 and a model whose blocks cannot be driven, `InfeasiblePlan` where the host
        lacks the memory.
        """
        self._dtype = weights_dtype(self.context, self.name)
        check_block_major(blueprint, self.context)
        give_back(self.device)
        self.model: nn.Module = blueprint.model
        layout = lay_out(self.model, self._dtype)
        outside: list[BlockLayout] = []
        """Of each tensor outside the blocks that the host updates."""
        if self.settings.outer == "host":
            outside = [lay_out_group([name], layout.shapes, self._dtype) for name in layout.non_block]
        self._layouts, self._num_blocks = layout.blocks, len(layout.blocks)
        self._updated_by_gpu = self.settings.updated_by_gpu(self._num_blocks)
        """Blocks, the model's first. The host has nothing of them."""
        self._take_host_memory(outside)
        parameters = self._place_weights(blueprint, layout, outside)
        self.own = [
            [parameters[name] for part in block.own_parts for name in part.names] for block in layout.blocks
        ]
        self._names = parameter_names(self.model)
        self._gpu_updates = GpuUpdates(self.own[: self._updated_by_gpu], self.settings, self.link)
        by_gpu = [] if outside else [parameters[name] for name in layout.non_block]
        self._outside_on_gpu = MasterWeights(by_gpu, self.settings)
        self._slots = GradientSlots(layout.blocks, GRADIENT_SLOTS, self._dtype, self.link)
        self._norms = GradientNorms(len(self.on_gpu), self.settings, self.link)
        self._loss = ValueOnHost(self.link)
        self._start_updates()
        self._outside_on_host = OutsideBlocks(
            outside,
            [parameters[name] for each in outside for name in each.parts[0].names],
            self.host,
            self._in_flight,
            self._dispatch,
            self._make_buffers,
        )
        prepare_training(self.model, self.context, self.settings, recompute=False)
        self.hidden_states = self._make_hidden_states(blueprint.shape.hidden)
        self._passes = BlockMajor(
            self.model,
            self.own,
            self,
            draws=draws_random_numbers(self.model),
            hidden_states=self.hidden_states,
            graphs=self._make_graphs(),
        )
        self._install(compiled=compiles(self.settings.compile, self.device, self.notes))
        self._world.barrier()  # HAZARD: what the host has is whole from here on

    def _take_host_memory(self, outside: Sequence[BlockLayout]) -> None:
        """For weights and states, in memory or on disk, and for gradients of the blocks."""
        of_host = [BlockLayout(parts=(), size=0)] * self._updated_by_gpu
        of_host += self._layouts[self._updated_by_gpu :]
        self._check_host([block.size for block in of_host], sum(each.size for each in outside))
        on_disk = self.settings.on_disk(self._num_blocks)
        ranks = self._host_world
        self._states = BlockStates(
            [*of_host, *outside],
            self.settings,
            dtype=self._dtype,
            device=self._host_device,
            seed=self.context.seed,
            progress=self.context.progress,
            elsewhere=on_disk,
            weights_elsewhere=self.settings.weights_on_disk(self._num_blocks),
            world=ranks,
        )
        if ranks.size > 1:
            self._ranks = RankUpdates(self._owners(on_disk), ranks, self.context.progress)
        own_on_disk = [index for index in on_disk if index % ranks.size == ranks.rank]
        self._kept = KeptStates(self._states, own_on_disk, self._make_disk)
        places = gradient_places(self._num_blocks, self.settings)
        self._buffers = self._make_buffers([max(block.size for block in self._layouts)] * places)

    def _make_buffers(self, sizes: Sequence[int]) -> GradientBuffers:
        """Places for so many elements each."""
        where = (self._dtype, self._host_device, self.context.progress, self._host_world)
        return GradientBuffers(sizes, *where)

    @property
    def _host_device(self) -> torch.device:
        """What host memory is pinned for; the twin pins none."""
        return self.device if self.settings.offload else torch.device("cpu")

    def _owners(self, on_disk: Collection[int]) -> list[int]:
        """Which rank updates each chunk: they take turns, but one has all of a block whose state is on
        disk, and its file."""
        size, found = self._host_world.size, list[int]()
        for index, chunks in enumerate(self.host.chunks):
            found += [index % size if index in on_disk else chunk.number % size for chunk in chunks]
        return found

    @property
    def acts_together(self) -> bool:
        """Ranks have states on disk, each its own: see `engines.base.ActsTogether`."""
        return self._host_world.size > 1 and self.settings.disk_blocks > 0

    def _start_updates(self) -> None:
        """The worker, and what sends gradients to it."""
        if self.settings.offload:
            leave_threads_to_adam()
            self._pipeline = UpdatePipeline(self.link, self._clocks, name="exact-offload", ranks=self._ranks)
        self._in_flight.set_up(len(self.on_gpu), self._pipeline)
        self._dispatch = UpdateDispatch(
            self.host,
            self.kept,
            self.on_gpu,
            self._norms,
            self._in_flight,
            self.link,
            num_blocks=self._num_blocks,
            waits_for_norm=self.settings.waits_for_norm,
            pipeline=self._pipeline,
            ranks=self._ranks,
            world=self._world,
        )

    def _make_graphs(self) -> BlockMajorGraphs | None:
        if not self.settings.captures or self.device.type != "cuda":
            return None
        return BlockMajorGraphs(self.device, self.notes.append, standing=self._compute.standing)

    def _make_hidden_states(self, width: int) -> HiddenStates | None:
        if self.settings.hidden_states == "gpu" or not self.settings.offload:
            return None
        workload = self.context.workload.of_a_rank(self._world.size)
        tokens = workload.batch_size * workload.seq_len
        return HiddenStates(
            self.link,
            num_blocks=self._num_blocks,
            micro_batches=workload.accumulation,
            most_bytes=tokens * width * self._dtype.itemsize,
            progress=self.context.progress,
        )

    def _make_disk(self, sizes_bytes: Mapping[int, int]) -> DiskStates:
        """Raises `InfeasiblePlan` if the disk is too small."""
        setting = f"{self.name}.disk_folder"
        folder = spill_folder(self.settings.disk_folder, setting)
        return DiskStates(
            sizes_bytes, folder, setting, delay_s=self.disk_delay_s, timeline=self._clocks.timeline
        )

    def _install(self, *, compiled: bool) -> None:
        """Let the model's blocks and loss run compiled or not, and recomputed as far as the settings say."""
        settings, checkpointing = self.settings, self.context.workload.checkpointing
        self._regions = TrainingRegions(
            self.model,
            compiled=compiled,
            recomputed=settings.recomputed(self._num_blocks, checkpointing=checkpointing),
            keeps="products" if settings.keeps_products(checkpointing=checkpointing) else "all",
        )
        self._is_compiled = compiled

    def _check_host(self, sizes: list[int], non_block: int) -> None:
        """Raises `InfeasiblePlan` if the host has too little memory for blocks of so many parameters and
        `non_block` outside them."""
        held = host_bytes(sizes, non_block, self._dtype.itemsize, self.settings)
        for kind in held:
            if not kind.startswith("gradients"):  # ranks have it together
                held[kind] //= self._host_world.local_size
        needed = PROCESS_HOST_BYTES + sum(held.values())
        usable = self.context.host_bytes
        if usable is not None and needed > usable:
            raise InfeasiblePlan(
                f"{(needed - usable) / 1e9:.3g} GB of host memory are missing: weights, moments and "
                f"gradients of the blocks take {needed / 1e9:.3g} GB with the process, and the run may use "
                f"{usable / 1e9:.3g} GB; free memory, or --set exact-offload.disk_blocks=N (states on disk) "
                "or moments=bf16 (or int8), which is approximate"
            )

    @torch.no_grad()
    def _place_weights(
        self, blueprint: Blueprint, layout: ModelLayout, outside: Sequence[BlockLayout]
    ) -> dict[str, nn.Parameter]:
        """Weights of each block, and of each tensor of `outside`, in flat memory on the GPU, and a copy on
        the host. Returns the model's parameters by first name."""
        tensors: dict[str, Tensor] = {}
        for name in () if outside else layout.non_block:
            tensors[name] = torch.empty(layout.shapes[name], dtype=self._dtype, device=self.device)
            blueprint.fill(name, tensors[name])
        if self.settings.streams:
            self._disk_weights = self.kept.weights_ahead(
                self.settings.weights_on_disk(self._num_blocks), self.link, self.context.progress
            )
            self.streamed = StreamedWeights(
                dict(enumerate(layout.blocks)),
                self.host.weights[: self._num_blocks],
                self.link,
                self._compute,
                self._is_on_host,
                self._disk_weights,
                slots=self.settings.weight_slots,
            )
        for index, group in enumerate((*layout.blocks, *outside)):
            if self.streamed is not None and index < self._num_blocks:
                with self.kept.here(index, changes=True):
                    tensors |= self.streamed.fill(index, blueprint, self.host.weights[index])
                self.on_gpu.append(self.streamed.memory(index))
                continue
            memory = torch.zeros(group.size, dtype=self._dtype, device=self.device)
            its = group.views(memory)
            for name, tensor in its.items():
                blueprint.fill(name, tensor)
            is_its = index % self._host_world.local_size == self._host_world.local_rank
            if is_its and index >= self._updated_by_gpu:
                self.host.weights[index].copy_(memory)
            self.on_gpu.append(memory)
            tensors |= its
        parameters = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
        for place, name in first_names(self.model).items():
            set_parameter(self.model, place, parameters[name])
        move_buffers(self.model, self.device)
        return parameters

    def _is_on_host(self, index: int, wait: bool) -> bool:
        """Whether the block's last update is on the host; with `wait`, when it is."""
        if wait or self._in_flight.are_made(index):
            self._in_flight.settle(index)
            return True
        return False

    @property
    def host(self) -> BlockStates:
        """What the host holds of the groups."""
        assert self._states is not None, "setup comes first"
        return self._states

    @property
    def kept(self) -> KeptStates:
        """The optimizer's states, in memory or on disk."""
        assert self._kept is not None, "setup comes first"
        return self._kept

    @property
    def outside_on_host(self) -> OutsideBlocks:
        """What the host updates outside the blocks; of nothing, where the GPU does."""
        assert self._outside_on_host is not None, "setup comes first"
        return self._outside_on_host

    @property
    def pinned_bytes(self) -> int:
        """Host memory pinned for weights and gradients; 0 on a CPU device and for the twin."""
        held = (self._states, self._buffers, self._outside_on_host, self.hidden_states, self._disk_weights)
        return sum(each.pinned_bytes for each in held if each is not None)

    # --- one step -------------------------------------------------------------------------------------

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One step. Updates of the blocks may still be on their way when it returns.

        Raises `NonFiniteLoss`, also for a gradient of the step before (see the module's docstring), and
        `RuntimeError` with its cause if the CPU worker failed. Bytes are those of this step's gradients and
        weights; busy times are of what ended since the last step.
        """
        settings = self.settings
        rate = learning_rate_at(self.steps_done, settings, self.context.total_steps)
        self._this_step = UpdateStep(
            number=self.steps_done, learning_rate=rate, max_norm=settings.max_grad_norm or None
        )
        self._norms.begin(self._this_step)
        self._dispatch.begin(self._this_step)
        before = self._moved_bytes()
        world, count = self._world, len(batches)
        batches = divide(world.size, count)[world.rank].of_batches(batches)
        self._clocks.exposure.mark()
        self._compute.go_on_with("forward")
        self.outside_on_host.begin()
        with no_cache(self.model):
            self._run(batches, count)
        self._compute.go_on_with("optimizer")
        self._finish()
        self._compute.stop()
        # Asking some hundred events takes milliseconds: before the GPU is waited for, and not after.
        busy = self._clocks.take_s(self.link)
        value = sum_of_losses(world, self._loss.read())  # the step's only wait for the GPU
        if not math.isfinite(value):
            self._in_flight.discard()
            raise NonFiniteLoss(f"the loss of step {self.steps_done} is {value}")
        self.steps_done += 1
        h2d, d2h, from_disk = (now - then for now, then in zip(self._moved_bytes(), before, strict=True))
        disk = self.kept.disk
        on_host = {} if self._pipeline is None else self._pipeline.step_ended(busy["gpu_s"])
        return StepStats(
            loss=value,
            h2d_bytes=h2d,
            d2h_bytes=d2h,
            disk_read_bytes=0 if disk is None else disk.total_bytes + from_disk,
            disk_s=None if disk is None else disk.take_busy_s(),
            disk_direct=None if disk is None else disk.direct,
            **busy,
            **on_host,
        )

    def _moved_bytes(self) -> tuple[int, int, int]:
        """So far: up, down, and of weights from disk."""
        hidden = 0 if self.hidden_states is None else self.hidden_states.moved_bytes
        up, down = self._dispatch.h2d_bytes, self._dispatch.d2h_bytes + self._norms.d2h_bytes
        if self.streamed is not None:
            up += self.streamed.slots.h2d_bytes
        from_disk = 0 if self._disk_weights is None else self._disk_weights.sent_bytes
        return up + hidden, down + hidden, from_disk

    def _run(self, batches: Sequence[Batch], count: int) -> None:
        """Forward and backward of this rank's of `count` micro-batches."""
        try:
            self._passes.run(batches, self.device, self._take_loss, of=count)
        except torch._dynamo.exc.TorchDynamoException as error:
            # Found before the first block has passed anything on.
            if not self._is_compiled or self.steps_done > 0 or self._in_flight.any():
                raise
            self.notes.append(f"not compiled: {first_line(error)}")
            assert self._regions is not None
            self._regions.remove()
            self._install(compiled=False)
            self._passes.run(batches, self.device, self._take_loss, of=count)

    def _take_loss(self, loss: Tensor) -> None:
        """The loss is known, and with it the gradients of what only its computation uses."""
        self._loss.send(loss)
        if self.outside_on_host.parameters:
            self.outside_on_host.send_others(self._passes.used_before())

    def before_forward(self, index: int) -> None:
        """A block is about to use its weights: they must have come up."""
        self._compute.stop()  # what is waited for now is no compute
        if self.streamed is None:
            if index == self._updated_by_gpu:  # by now the GPU has those before it to compute
                self._check_gpu_updates()
            self._in_flight.settle(index)
        else:
            self.streamed.enter_forward(index)
        self._compute.go_on_with(f"forward {index}")

    def after_forward(self, index: int) -> None:
        if self.streamed is not None:
            self.streamed.leave(index)
        if index == self._num_blocks - 1:
            self.outside_on_host.begin_others()

    def before_backward(self, index: int) -> None:
        """A block's gradients are about to be made: its slot must be free, and its weights must be there."""
        self._compute.stop()
        if self.streamed is not None:
            self.streamed.enter_backward(index)
        self._slots.enter(index)
        self._compute.go_on_with(f"backward {index}")

    def gradients(self, index: int, found: Sequence[Tensor | None], *, first: bool) -> None:
        """Sum a micro-batch's gradients in the block's slot."""
        self._slots.add(index, found, first=first)

    @torch.no_grad()
    def after_backward(self, index: int) -> None:
        """The block's gradient is complete: download it and hand it to the worker, or update by it here."""
        if index < self._updated_by_gpu:
            self._norms.take(index, self._slots.gradient(index))
            if not self.settings.waits_for_norm:
                self._update_on_gpu(index, self._norms.scale_by_previous(self._this_step))
            return
        if self.streamed is not None:
            self.streamed.leave(index)
            self.streamed.forget(index)
        assert self._buffers is not None
        place = self._buffers.take(self._compute.standing)
        downloaded = self._dispatch.send(
            index,
            self._slots.gradient(index),
            self._buffers,
            place,
            goes_up=self.streamed is None,
            consumed=partial(self._buffers.give, place),
        )
        self._slots.leave(index, downloaded)

    def _update_on_gpu(self, index: int, scale: Tensor | None) -> None:
        """AdamW by the block's gradient, which is in its slot, times `scale` (1,), unless that or one that
        backward reached before it is not finite."""
        total = self._norms.of_groups[index : self._num_blocks].sum(0, keepdim=True)
        rate = self._this_step.learning_rate
        self._gpu_updates.update(index, self._slots.gradients(index), rate, scale, total)
        self._slots.leave(index, self.link.record())

    @torch.no_grad()
    def _finish(self) -> None:
        """What is left of the step once backward has been enqueued."""
        self.outside_on_host.send()
        self._outside_on_gpu.sum_over_ranks(self._world)
        outside = self._outside_on_gpu.squared_norm(self.device)
        own = self._norms.of_groups.sum(0, keepdim=True) + outside
        squared = own if self._world.size == 1 else self._dispatch.squared_norm_of_ranks() + outside
        scale = self._norms.finish(self._this_step, squared, waits=self._pipeline is None)
        # HAZARD: behind `finish`, whose norm the CPU clips by.
        self._dispatch.submit()
        if self.settings.waits_for_norm:
            for index in range(self._updated_by_gpu):
                self._update_on_gpu(index, scale)
        self._gpu_updates.send_norm(self._norms.of_groups)
        # Finite where both are: another rank's gradient may be what is not.
        total = own if squared is own else own + squared
        self._outside_on_gpu.step(self._this_step.learning_rate, scale, total)

    def _check_gpu_updates(self) -> None:
        """Raises `NonFiniteLoss` if a gradient that the GPU updates blocks by was not finite in the last
        step."""
        if not self._gpu_updates.was_finite():
            self._in_flight.discard()
            raise NonFiniteLoss(str(GradientNotFinite(self.steps_done - 1)))

    def _settle_all(self) -> None:
        """Let the compute stream wait for all updates. Raises what the next step would."""
        self._check_gpu_updates()
        self._in_flight.settle_all()

    # --- the rest of an engine's life -----------------------------------------------------------------

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Loss and accuracy in evaluation mode, every update applied."""
        self._settle_all()
        with nullcontext() if self.streamed is None else self.streamed.coming_up(self.model):
            return evaluate_on_device(self.model, batches, self.device)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter once, on the host, every update applied; what is on disk a block at a time."""
        self._settle_all()
        return chain(model_weights(self._stored()), self._weights_on_disk())

    def _weights_on_disk(self) -> Iterator[tuple[str, Tensor]]:
        for index in self.settings.weights_on_disk(self._num_blocks):
            with self.kept.here(index, changes=False):
                for name, tensor in self._layouts[index].views(self.host.weights[index]).items():
                    yield name, tensor.clone()

    def _stored(self) -> nn.Module:
        """The model, or what has its names and weights where those are streamed, but for what is on disk."""
        return self.model if self.streamed is None else self.streamed.stored(self.model)

    def save(self, folder: Path) -> None:
        """Weights, low halves of masters, moments, step and random state."""
        self._settle_all()
        self.synchronize()
        state = rng_state(self.device)
        for each in (self._outside_on_gpu, self._gpu_updates):
            state |= each.state(self._names)
        about: dict[str, Any] = {"engine": self.name, "steps_done": self.steps_done}
        about["gpu_blocks"] = self._updated_by_gpu
        states, about["updates"] = self.kept.save(folder)
        state |= states
        if self.settings.max_grad_norm > 0:
            state["total"] = self._norms.last(self.steps_done, self._ranks).clone()
        if not self.acts_together or self._world.rank == 0:
            save_checkpoint(folder, self._stored(), state, about)
        if self.acts_together:
            self._world.barrier()  # its blocks on disk every rank has written by itself

    def load(self, folder: Path) -> None:
        """Continue from `save`: all ranks at the same time. Raises `UserError` for a checkpoint of another
        model, dtype, moments or gpu_blocks."""
        self._settle_all()
        self._world.barrier()
        tensors, about = load_checkpoint(folder, self._stored(), self.name)
        if (saved := about.get("gpu_blocks", 0)) != self._updated_by_gpu:
            raise UserError(
                str(folder),
                f"has masters of {saved} blocks as the GPU has them, not of {self._updated_by_gpu}",
                f"resume with --set {self.name}.gpu_blocks={saved}",
            )
        self.kept.load(folder, tensors, about["updates"])
        first = self._updated_by_gpu if self.streamed is None else self._num_blocks
        for index in range(first, len(self.on_gpu)):
            self.host.weights[index].copy_(self.on_gpu[index].detach())
        if self.streamed is not None:
            self.streamed.slots.forget_all()
        for each in (self._gpu_updates, self._outside_on_gpu):
            each.load(self._names, tensors)
        load_rng_state(self.device, tensors)
        self.steps_done = int(about["steps_done"])
        if "total" in tensors:
            self._norms.take_back(tensors["total"], self.steps_done)
        if self._ranks is not None:
            self._ranks.forget()  # as all of them do, and have written the same states
        self._world.barrier()

    def squared_norm(self) -> float:
        """Of the whole gradient of the last step, where gradients are clipped. Waits for it."""
        return float(self._norms.last(self.steps_done, self._ranks))

    def trace_events(self) -> list[dict[str, Any]]:
        """Chrome trace events of GPU, link and CPU, in microseconds; asked once, before `close`."""
        return self._clocks.trace_events()

    def synchronize(self) -> None:
        """Wait until nothing is in flight and the device is idle."""
        self._in_flight.synchronize()
        self.link.synchronize()

    def close(self) -> None:
        """Stop the worker, give the model its own forward back, unpin. May be called twice."""
        if self._regions is not None:
            self._regions.remove()
        if self._kept is not None:
            self._kept.stop()
            self._kept = None
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
        self.link.synchronize()
        self._in_flight.clear()
        pinned = (self._disk_weights, self._buffers, self._states, self._outside_on_host)
        for each in (*pinned, self.hidden_states, self._ranks):
            if each is not None:
                each.close()
        self._disk_weights = self._buffers = self._states = self._outside_on_host = None
        self.hidden_states = self._ranks = None
