"""LSP-Offload: gradients compressed by sparse projectors, Adam on the CPU in the subspace.

Paper: LSP-Offload, arXiv 2406.10181, Algorithm 1. One step, for every weight matrix W (m x n) inside the
model's blocks, with its pair of (d, r)-sparse projectors P and Q (`engines.subspace.projector`):

    1. GPU   S = P^T G Q = (dY P)^T (X Q), from the two factors of G, which is never formed    (line 12)
    2. link  S to the host, on its own stream                                                  (line 13)
    3. CPU   dS = Adam(S), with moments M and V, in a worker thread                            (line 14)
    4. link  dS to the GPU, on its own stream                                                  (line 15)
    5. GPU   W <- W (1 - lr wd) - lr P dS Q^T, on a stream of its own                  (lines 16 and 17)
             (`engines.subspace.chunk_application`: one CUDA graph for what travels together)

Every `check_every` steps, the first before the first update, each matrix's relative bias is tested on its
gradient of that step; above alpha the matrix gets a new pair, found on that gradient, and its moments move to
the new subspace (lines 18 to 21 and 6 to 9). Only then is G formed, one matrix at a time.

Where things live. GPU: weights, projectors, the compressed gradients of a few blocks on their way down and
up, and weights, gradients and moments of all that is not a matrix of a block. Host: each matrix's core,
pinned, of the weights' dtype (2 d^2 bytes in bf16), and both moments, fp32 (8 d^2), or with `moments=bf16`,
which is approximate (`engines.cpu_updates.adamw`), 4 d^2.

With `weights=streamed` the matrices stay on the host too and come up for the forward and again for the
backward pass, through three blocks' buffers (`engines.subspace.streamed_matrices`): 5 then waits for its
block's next forward pass, and the new weights go down. All micro-batches pass a block together
(`engines.model.block_major`), so that a step moves each weight three times however many there are. GPU memory
is that of a few blocks, hidden states, projectors and what is no matrix of a block.

Never stale: an update of step t is applied before its block's next forward pass, and `evaluate`, `weights`
and `save` apply what is left. A core that is not finite changes neither weights nor moments of its block, nor
of those that backward reaches after it; blocks before it in backward may have been updated by then. It is
found on the CPU, so nothing waits for it, and the next step raises; a loss that is not finite raises at once.

Schedules. `layerwise`: a block goes through 2 to 5 on its own while backward runs on, and of the cores that
have arrived the CPU takes those whose block is needed first (`engines.cpu_updates.pipeline`). `sequential`:
downloads during backward, then all CPU updates, then all uploads, as ZeRO-Offload does. Clipping needs the
norm of the whole gradient, so with `max_grad_norm` the CPU begins when backward has ended.

Several ranks each take their micro-batches and send their cores down their own links; on a machine one rank
adds up those of a chunk, in the order of ranks, and updates it for all (`engines.cpu_updates.rank_updates`).
Machines send each other their sums when backward has ended, and each makes all updates. Projectors are those
that rank 0 has found.

The oracle is the twin, `offload=False`: the same cores through the same CPU routine, but in the main thread,
one after the other, with copies that wait: no streams, no events, no worker, no pinned memory, no CUDA
graphs. Nothing overlaps, so a hazard in the order of streams and threads shows as a difference. Weights and
losses are bit-equal on the same device, as long as the model's own kernels are deterministic (on the CPU that
asks for the same number of threads) and no learning ends by the clock. On a GPU too the twin updates the core
on the CPU, because kernels of CPU and GPU round differently; so it is no check of Adam's arithmetic, which a
test holds against float64.

Deviations from the paper, and choices where it is silent:

- `projector=paper` is the text of the paper; the default, `block`, has another form of the same (d, r), with
  values in closed form. A matrix smaller than d x d uses its own smaller dimension, to a multiple of r.
- The calibration gradient is the current step's, of its first micro-batch, not an extra pass over a sample.
- A check whose round of learning runs out of time keeps the old pair, unless the new one is better already.
- A matrix for which forming G costs less than two projections and their product, since its d is nearly its
  size, has G formed and compressed (`engines.settings.lsp_layout.forms_gradient`).
- What is not a matrix of a block (embeddings, head, norms, biases) is trained by AdamW on the device as in
  native, or frozen with `train_outer=False`. So is a block's matrix that has a second place in the model.
- `residual`, off by default, is not the paper's: what its projectors leave out takes a step of its own.
- Micro-batches accumulate in the subspace: the core of the sum is the sum of the cores, in fp32.
- Decay, bias correction and learning-rate schedules are AdamW's. `max_grad_norm` clips by the norm of all
  compressed gradients and of the gradients outside the subspaces together.
- The update is computed in fp32 and rounded once into the weight's dtype, for bf16 stochastically by default
  (`engines.noise.stochastic_rounding`): there is no fp32 master copy. P dS is rounded to bf16 there, and so
  is dS on the wire.

Longer than 400 lines: a step and the life around it are read beside Algorithm 1 in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Batch, Blueprint, Context, Evaluation, StepStats
from engines.cpu_updates.chunks import ChunkUpdate, OfRanks, UpdateStep, update_at_once
from engines.cpu_updates.cpu_threads import leave_threads_to_adam
from engines.cpu_updates.pipeline import UpdatePipeline
from engines.cpu_updates.rank_twin import ExchangedGradients, norm_of_ranks
from engines.cpu_updates.rank_updates import RankUpdates
from engines.cpu_updates.updates_in_flight import UpdatesInFlight
from engines.errors import NonFiniteLoss, UserError
from engines.first_order.adamw import accumulate_gradients, prepare_training, weights_dtype
from engines.first_order.checkpoint import (
    load_checkpoint,
    load_rng_state,
    model_weights,
    parameter_names,
    rng_state,
    save_checkpoint,
)
from engines.first_order.lr_schedule import learning_rate_at
from engines.model.activation_checkpointing import TrainedBlocks
from engines.model.block_major import BlockMajor
from engines.model.blocks import find_blocks, materialize, no_cache
from engines.model.evaluation import evaluate_on_device
from engines.model.model_check import check_block_major, check_watched
from engines.model.randomness import draws_random_numbers
from engines.model.stand_ins import give_back
from engines.model.training_regions import TrainingRegions, compiles
from engines.settings.lsp import LspSettings
from engines.settings.lsp_layout import UPLOAD_SLOTS
from engines.subspace.apply import apply_core, realized_of_core
from engines.subspace.chunk_application import rounding_key
from engines.subspace.compressed_linear import compress_gradient, restore
from engines.subspace.core_checkpoint import load_cores, save_cores
from engines.subspace.core_matrix import CoreMatrix, warn_of_idle
from engines.subspace.cores import CoreBlock, Cores, CoreState, move_moments
from engines.subspace.dense_parameters import DenseParameters
from engines.subspace.machine_sums import MachineSums
from engines.subspace.projector import Projector
from engines.subspace.rank_projectors import follow_moments, follow_projectors
from engines.subspace.streamed_matrices import StreamedMatrices
from engines.subspace.subspaces import (
    Check,
    Round,
    draw_subspaces,
    subspace_seed,
)
from engines.transfer.clock import now_s
from engines.transfer.engine_clocks import Clocks
from engines.transfer.rank_sums import check_ranks, sum_of_losses
from engines.transfer.value_on_host import ValueOnHost
from engines.world import ALONE, World, divide


class Lsp:
    """LSP-Offload. Implements `engines.base.Engine`."""

    name = "lsp"

    def __init__(self, settings: LspSettings, context: Context) -> None:
        self.settings = settings
        self.context = context
        self.device = torch.device(context.device)
        self._clocks = Clocks(context, self.device)
        self.link = self._clocks.link()
        self.steps_done = 0
        self.calibrates = False
        """The backward pass under way tests the bias of every matrix."""
        self._clock = now_s
        self._compute = self._clocks.compute
        self._in_flight = UpdatesInFlight(self.link, self._compute)
        """Of each block that has cores, by its place among those."""
        self._cores: Cores | None = None
        self._blocks: list[CoreBlock] = []
        self._pipeline: UpdatePipeline | None = None
        self._trained: TrainedBlocks | None = None
        self._notes: list[str] = []
        self._passes: BlockMajor | None = None
        """In the place of `_trained` where micro-batches pass a block together."""
        self._regions: TrainingRegions | None = None
        self.streamed: StreamedMatrices | None = None
        self._world = context.world
        check_ranks(self.name, self._world, machines=settings.offload or self._world.local_size == 1)
        self._host_world: World = self._world if settings.offload else ALONE
        """The ranks that have what is on the host together."""
        self._ranks: RankUpdates | None = None
        """`None`: one process."""
        self._machines: MachineSums | None = None
        """`None`: one machine."""
        self._this_step = UpdateStep(number=-1, learning_rate=0.0)
        """Of the last step."""

    @staticmethod
    def why_not_available() -> str | None:
        """`None`: it runs on any device."""
        return None

    # --- set-up ---------------------------------------------------------------------------------------

    def setup(self, blueprint: Blueprint) -> None:
        """Fill the model, draw projectors, pin the cores' memory, start the CPU worker.

        Raises `UserError` for fp16, for a model without matrices in its blocks, and for a residual with
        several micro-batches.
        """
        self._dtype = weights_dtype(self.context, self.name)
        settings, context = self.settings, self.context
        if settings.residual and context.workload.accumulation > 1:
            raise UserError("--set lsp.residual", "is for one micro-batch a step", "leave out --accumulation")
        (check_block_major if settings.block_major else check_watched)(blueprint, context)
        give_back(context.device)
        if settings.streams:
            self.streamed = StreamedMatrices(
                blueprint, self._dtype, self.link, self._compute, context.progress
            )
        placed = () if self.streamed is None else self.streamed.names
        self.model: nn.Module = materialize(blueprint, self.device, self._dtype, placed=placed)
        self._names = parameter_names(self.model)
        subspaces = draw_subspaces(
            self.model, settings, context.seed, self._dtype, self.device, context.progress
        )
        self._cores = Cores(
            subspaces,
            self,
            settings,
            dtype=self._dtype,
            device=self.device,
            workload=context.workload.of_a_rank(self._world.size),
            seed=context.seed,
            progress=context.progress,
            world=self._host_world,
        )
        self._blocks = self._cores.blocks
        size = self._host_world.local_size
        if size > 1:
            owners = [number % size for number in range(len(self._cores.first))]
            self._ranks = RankUpdates(owners, self._world, context.progress)
        if self._has_machines:
            self._machines = MachineSums(self._cores, self._ranks, self._world, self.link)
        self.dense = DenseParameters(self.model, subspaces, settings, self.device)
        for matrix in self._matrices():
            compress_gradient(matrix.subspace.module, matrix, matrix.kept_width)
        self._squared_total = torch.zeros(1, device=self.device)
        self._loss = ValueOnHost(self.link)
        self._total_on_host = torch.zeros(1, pin_memory=self.device.type == "cuda")
        if self.streamed is not None:
            self.streamed.follow(self._blocks, self._is_updated)
        if settings.offload:
            largest = max(chunk.core.numel() for block in self._blocks for chunk in block.chunks)
            leave_threads_to_adam()
            self._pipeline = UpdatePipeline(
                self.link,
                self._clocks,
                slots=0 if settings.streams else UPLOAD_SLOTS,
                slot_elements=largest,
                dtype=self._dtype,
                name="lsp-core",
                ranks=self._ranks,
            )
        self._in_flight.set_up(len(self._blocks), self._pipeline)
        prepare_training(self.model, context, settings, recompute=False)
        self._install()
        self._world.barrier()

    def _install(self) -> None:
        """Let the model's blocks run as a training step runs them."""
        settings, draws = self.settings, draws_random_numbers(self.model)
        recomputed = settings.recomputed(
            len(find_blocks(self.model)[1]), checkpointing=self.context.workload.checkpointing
        )
        compiled = compiles(settings.compile, self.device, self._notes)
        if settings.block_major:
            # No parameter is the watcher's: gradients of vectors are added up where DenseParameters has them.
            nobody: list[list[nn.Parameter]] = [[] for _ in find_blocks(self.model)[1]]
            self._passes = BlockMajor(self.model, nobody, self, draws=draws)
            self._regions = TrainingRegions(
                self.model, compiled=compiled, recomputed=recomputed, falls_back=True
            )
            return
        graphs = settings.offload and settings.graphs and not draws
        self._trained = TrainedBlocks(
            self.model, self, recomputed=recomputed, graphs=graphs, compiled=compiled
        )

    @property
    def notes(self) -> list[str]:
        """What of the settings could not be had, and why."""
        runs = self._trained or self._regions
        failed = None if runs is None else runs.why_not_compiled
        return self._notes if failed is None else [*self._notes, f"not compiled: {failed}"]

    def checks(self) -> dict[str, list[Check]]:
        """Every bias check so far, by matrix."""
        return {each.subspace.name: list(each.subspace.checks) for each in self._matrices()}

    @property
    def _laid_out(self) -> Cores:
        assert self._cores is not None, "setup comes first"
        return self._cores

    def _matrices(self) -> list[CoreMatrix]:
        return [] if self._cores is None else self._cores.matrices

    @property
    def pinned_bytes(self) -> int:
        """Host memory pinned for cores and streamed matrices; 0 on a CPU device and for the twin."""
        held = 0 if self.streamed is None else self.streamed.pinned_bytes
        return held if self._cores is None or not self.settings.offload else held + self._cores.pinned_bytes

    # --- one step -------------------------------------------------------------------------------------

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One step. Updates of the matrices may still be on their way when it returns.

        Raises `NonFiniteLoss`, also for a gradient of the step before (see the module's docstring), and
        `RuntimeError` with its cause if the CPU worker failed. Bytes are those of this step's cores, both
        ways, and of moments moved to a new subspace; busy times are of what ended since the last step.
        """
        settings = self.settings
        rate = learning_rate_at(self.steps_done, settings, self.context.total_steps)
        self._this_step = UpdateStep(
            number=self.steps_done, learning_rate=rate, max_norm=settings.max_grad_norm or None
        )
        self._step_h2d_bytes = self._step_d2h_bytes = 0
        before = self._streamed_bytes()
        world, count = self._world, len(batches)
        batches = divide(world.size, count)[world.rank].of_batches(batches)
        self._begin_step()
        self._clocks.exposure.mark()
        self._compute.go_on_with("forward")
        with no_cache(self.model):
            self._run(batches, count)
        self.calibrates = False
        self._compute.go_on_with("optimizer")
        self._finish_backward()
        loss = self._loss.read()  # the step's only wait for the GPU
        self._compute.stop()
        after = self._streamed_bytes()
        self._step_h2d_bytes += after[0] - before[0]
        self._step_d2h_bytes += after[1] - before[1]
        value = sum_of_losses(world, loss)
        if not math.isfinite(value):
            self._in_flight.discard()
            raise NonFiniteLoss(f"the loss of step {self.steps_done} is {value}")
        if self.steps_done == 0:  # without graphs, so that it is known what layers have collected
            warn_of_idle(self._matrices())
        self.steps_done += 1
        busy = self._clocks.take_s(self.link)
        on_host = {}
        if self._pipeline is not None:
            on_host = self._pipeline.step_ended(self._hiding_s(busy["gpu_s"], len(batches)))
        return StepStats(
            loss=value,
            h2d_bytes=self._step_h2d_bytes,
            d2h_bytes=self._step_d2h_bytes,
            **busy,
            **on_host,
        )

    def _hiding_s(self, gpu_s: float | None, micro_batches: int) -> float | None:
        """Of the `gpu_s` of a step, what updates can hide behind. Cores are complete when the last of
        `micro_batches` has passed their block backward, and its next forward pass, the first one's, waits for
        their update: about one of them. Where all pass a block together it is the whole step."""
        if gpu_s is None or self._passes is not None:
            return gpu_s
        return gpu_s / micro_batches

    def _streamed_bytes(self) -> tuple[int, int]:
        """Of weights, up and down so far."""
        if self.streamed is None:
            return 0, 0
        return self.streamed.weights.slots.h2d_bytes, self.streamed.weights.slots.d2h_bytes

    def _run(self, batches: Sequence[Batch], count: int) -> None:
        """Forward and backward of this rank's of `count` micro-batches."""
        if self._passes is not None:
            self._micro_batch, self._is_last_micro_batch = 0, True
            compiler: Any = torch.compiler  # its methods are without annotations
            # Steps that test projectors do what compiled code does not.
            with compiler.set_stance("force_eager") if self.calibrates else nullcontext():
                self._passes.run(batches, self.device, self._loss.send, of=count)
            return
        total = torch.zeros(1, device=self.device)
        for index, loss in accumulate_gradients(self.model, batches, self.device, of=count):
            total += loss
            self._micro_batch = index
            self._is_last_micro_batch = index == len(batches) - 1
            if self._is_last_micro_batch:
                self._loss.send(total)

    def _begin_step(self) -> None:
        settings = self.settings
        self.calibrates = self.steps_done % settings.check_every == 0
        if self.calibrates:
            self._round = Round(
                step=self.steps_done,
                settings=settings,
                seed=self.context.seed,
                clock=self._clock,
                time_left_s=settings.learn_timeout_s,
            )
        if self._trained is not None:
            self._trained.is_usual = not self.calibrates
            self._trained.begin()
        self._laid_out.begin_step()
        self._capture_applications()

    def _capture_applications(self) -> None:
        """Of chunks whose kernels have been started one by one so far, where graphs are wanted."""
        if self._pipeline is None or self.streamed is not None or self.calibrates:
            return
        if not self.settings.graphs or self.device.type != "cuda":
            return
        for block in self._blocks:
            for chunk in block.chunks:
                if chunk.application.can_be_captured:
                    chunk.application.capture(self._pipeline.direction(chunk.state))

    def before_forward(self, index: int) -> None:
        """A block is about to use its weights: apply what the last step left for it."""
        if self.streamed is not None:
            self.streamed.weights.enter_forward(index)
        place = self._laid_out.place.get(index)
        if place is not None:
            self._settle(place)
        if torch.is_grad_enabled():
            self._compute.go_on_with(f"forward {index}")

    def after_forward(self, index: int) -> None:
        if self.streamed is not None:
            self.streamed.weights.leave(index)

    def before_backward(self, index: int) -> None:
        if self.streamed is not None:
            self.streamed.weights.enter_backward(index)
        self._compute.go_on_with(f"backward {index}")
        place = self._laid_out.place.get(index)
        if place is None:
            return
        # HAZARD: the block that last had this slot must have left it.
        slot_free = self._laid_out.slot_free
        self.link.wait(slot_free[place % len(slot_free)])
        if self._passes is not None:
            self._laid_out.zero_sums(place)
        for matrix in self._blocks[place].matrices:
            matrix.is_collected = False

    def gradients(self, index: int, found: Sequence[Tensor | None], *, first: bool) -> None:
        """Layers have handed them over by themselves."""

    @torch.no_grad()
    def finish(self, index: int) -> None:
        """All gradients of a block have been collected. May be part of a CUDA graph."""
        place = self._laid_out.place.get(index)
        if place is not None:
            self._blocks[place].finish()

    def after_backward(self, index: int) -> None:
        if self._passes is not None:
            self.finish(index)
        if self.streamed is not None:
            self.streamed.weights.leave(index)
        place = self._laid_out.place.get(index)
        if place is None:
            return
        block = self._blocks[place]
        block.has_gradient = True
        self._step_along_residuals(block)
        if self._is_last_micro_batch:
            self._send(place)

    def _send(self, place: int) -> None:
        """The block's cores are complete: download them and hand them to the worker."""
        block = self._blocks[place]
        block.has_gradient = False
        self._step_h2d_bytes += block.core.nbytes
        self._step_d2h_bytes += block.core.nbytes + block.squared_norm.nbytes
        updates = [
            ChunkUpdate(
                state=chunk.state,
                step=self._this_step,
                destination=None if self.streamed is not None else chunk.application,
                of_ranks=self._from_ranks(place, chunk.state),
            )
            for chunk in block.chunks
        ]
        self._in_flight.put(place, updates)
        if self._pipeline is None:
            for chunk in block.chunks:
                chunk.state.incoming.copy_(chunk.core)
            block.chunks[0].state.squared_norm.copy_(block.squared_norm)
            return
        copies = [(block.squared_norm, block.chunks[0].state.squared_norm)]
        copies += [(chunk.core, chunk.state.incoming) for chunk in block.chunks]
        arrived = self.link.download_each(copies, after=self.link.record(), name=f"block {place}")
        for update, event in zip(updates, arrived[1:], strict=True):
            update.downloaded = event
        if self._sends_at_once:
            self._pipeline.submit_each(updates)
        if not self._has_machines:
            self._submit_norms(updates)
        slot_free = self._laid_out.slot_free
        slot_free[place % len(slot_free)] = updates[-1].downloaded

    def _submit_norms(self, updates: Sequence[ChunkUpdate]) -> None:
        """Where gradients are clipped, let the worker take the norms of what several ranks or machines bring,
        before it updates by any."""
        if self._ranks is not None and self._pipeline is not None and self.settings.max_grad_norm > 0:
            for update in updates:
                self._pipeline.submit_norms([update])

    def _from_ranks(self, place: int, state: CoreState) -> Callable[[Sequence[int]], OfRanks] | None:
        """What gives the cores of all ranks, if there are several, or those of all machines."""
        if self._machines is not None:
            return self._machines.of(state.number)
        if self._ranks is not None:
            return partial(self._laid_out.of_ranks, place, state)
        if self._world.size > 1:
            return ExchangedGradients(self._world, state.incoming, state.squared_norm)
        return None

    def _step_along_residuals(self, block: CoreBlock) -> None:
        """What the block's projectors leave out. Before the cores are sent: what they come back as is applied
        behind it, and the backward pass has used the weights."""
        for matrix in block.matrices:
            if matrix.residual is not None:
                subspace, step = matrix.subspace, self._this_step
                key = subspace_seed(self.context.seed, subspace.name, step.number, "residual") & 0xFFFFFFFF
                # `data`: as in `engines.subspace.chunk_application`.
                matrix.residual.apply(subspace.weight.data, step.learning_rate, self.settings, key)

    @property
    def _sends_at_once(self) -> bool:
        waits = self.settings.max_grad_norm > 0 or self._has_machines
        return self.settings.schedule_order == "layerwise" and not waits

    @property
    def _has_machines(self) -> bool:
        return self._world.size > self._world.local_size

    def _finish_backward(self) -> None:
        """What is left of the step once backward has been enqueued."""
        for place, block in enumerate(self._blocks):
            if block.has_gradient:  # of an earlier micro-batch only
                self.before_backward(block.index)
                self.finish(block.index)
                self._send(place)
            elif not any(update.step is self._this_step for update in self._in_flight.of(place)):
                self._settle(place)  # it took no part, so that nothing has waited for its last update
                block.squared_norm.zero_()
                self._report_no_norm(block)
        self.dense.finish_backward(self._world)
        if self._machines is not None:
            self._machines.exchange(self._in_flight)
            self._submit_norms(self._in_flight.all())
        torch.sum(self._laid_out.squared_norms, 0, keepdim=True, out=self._squared_total)
        if self.settings.max_grad_norm > 0:
            self._clip(self.settings.max_grad_norm)
        updates = self._in_flight.all()
        if self._pipeline is None:
            update_at_once(updates, self.device)
        elif self.settings.schedule_order == "sequential":
            self._pipeline.submit(updates[::-1])
        elif not self._sends_at_once:
            self._pipeline.submit_each(updates)
        self.dense.step(self._this_step.learning_rate, self._squared_total)

    def _report_no_norm(self, block: CoreBlock) -> None:
        """It took no part, on any rank: they run the same model."""
        for chunk in block.chunks if self._ranks is not None else ():
            assert self._ranks is not None
            if self._ranks.owns(chunk.state.number):
                self._ranks.report_norm(chunk.state.number, self._this_step.number, 0.0)

    def _clip(self, most: float) -> None:
        """Scale the gradients outside the blocks, and let the worker know the norm of all. With several ranks
        the CPU takes that of the sum of their cores, which is waited for."""
        if self._ranks is not None and self._pipeline is not None:
            self._squared_total.fill_(self._pipeline.wait_for_norm(self._this_step.number))
        elif self._world.size > 1:
            self._squared_total.fill_(norm_of_ranks(self._in_flight.all()))
        self.dense.clip(self._squared_total, most)
        self._step_d2h_bytes += self._squared_total.nbytes
        self._this_step.total = self._total_on_host
        self._this_step.total_known = self.link.download(
            self._squared_total, self._total_on_host, after=self.link.record(), name="norm"
        )
        if self._pipeline is None:
            self.link.host_wait(self._this_step.total_known)

    def _settle(self, place: int) -> None:
        """Let the compute stream wait for a block's updates in flight, and apply those of a streamed one."""
        if self.streamed is None:
            self._in_flight.settle(place)
        elif self._in_flight.of(place):
            self.streamed.apply_update(place, self._apply_streamed)

    def _settle_all(self) -> None:
        for place in range(len(self._blocks)):
            self._settle(place)

    def _apply_streamed(self, place: int, directions: Tensor) -> None:
        """Apply a streamed block's update, whose `directions` (elements,) have come up."""
        begin = 0
        for chunk, update in zip(self._blocks[place].chunks, self._in_flight.take(place), strict=True):
            end = begin + chunk.core.numel()
            chunk.application(directions[begin:end], update.step)
            begin = end

    def _is_updated(self, place: int, wait: bool) -> bool:
        """Whether the CPU has made the block's directions; with `wait`, when it has."""
        if self._in_flight.of(place) and (wait or self._in_flight.are_made(place)):
            self._in_flight.wait(place)
            return True
        return False

    # --- subspaces ------------------------------------------------------------------------------------

    def check(self, matrix: CoreMatrix, gradient: Tensor) -> None:
        """Test the pair on this gradient (m, n); take a better one if it is wanting, and move the moments."""
        if matrix.is_collected or self._micro_batch > 0:
            return
        found = self._round.check(matrix.subspace, gradient) if self._world.rank == 0 else None
        if found is not None:
            self._take_projectors(matrix, *found)
        if self._world.size > 1:
            is_new = follow_projectors(self._world, matrix, is_new=found is not None)
            # Each twin has its own moments, and each machine, of which rank 0 alone has moved one's.
            if is_new and (self._pipeline is None or self._has_machines):
                follow_moments(self._world, matrix, self._laid_out.chunk_of(matrix).state)

    def _take_projectors(self, matrix: CoreMatrix, left: Projector, right: Projector) -> None:
        """Move the moments to the subspace of a new pair, and take it."""
        state = self._laid_out.chunk_of(matrix).state
        if state.updates > 0:
            # The moments are the worker's no more: this block's forward pass has waited for its last update.
            moved_bytes = move_moments(state, matrix, left, right)
            self._step_h2d_bytes += moved_bytes
            self._step_d2h_bytes += moved_bytes
        matrix.subspace.assign(left, right)

    @torch.no_grad()
    def realized_update_fraction(self) -> float | None:
        """Of the last update of the largest matrix: how much of it the stored weights would take,
        repeated."""
        self._settle_all()
        if self.steps_done == 0 or self._this_step.failed or self._this_step.learning_rate == 0.0:
            return None
        matrix = max(self._matrices(), key=lambda each: each.subspace.weight.numel())
        subspace = matrix.subspace
        if self.streamed is not None:
            self.streamed.weights.enter_forward(subspace.block)
        core = matrix.of(self._laid_out.chunk_of(matrix).state.outgoing).to(self.device)
        trial = subspace.weight.clone()
        key = rounding_key(self.context.seed, subspace, self._this_step)
        apply_core(subspace, trial, core, self._this_step.learning_rate, self.settings, key)
        return realized_of_core(subspace, trial, core, self._this_step.learning_rate, self.settings)

    # --- the rest of an engine's life -----------------------------------------------------------------

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Loss and accuracy in evaluation mode, every update applied."""
        self._settle_all()
        weights = None if self.streamed is None else self.streamed.weights
        with nullcontext() if weights is None else weights.coming_up(self.model):
            return evaluate_on_device(self.model, batches, self.device)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter once, on the host, every update applied."""
        self._settle_all()
        return model_weights(self._stored())

    def _stored(self) -> nn.Module:
        """The model, or what has its names and weights where those are streamed. Waits until they are
        there."""
        if self.streamed is None:
            return self.model
        self.link.synchronize()
        return self.streamed.weights.stored(self.model)

    def save(self, folder: Path) -> None:
        """Weights, both kinds of moments, projectors, checks, step and random state."""
        self._settle_all()
        self.synchronize()
        state = rng_state(self.device) | self.dense.state(self._names)
        about: dict[str, Any] = {"engine": self.name, "steps_done": self.steps_done}
        about["matrices"] = save_cores(self._laid_out, state)
        save_checkpoint(folder, self._stored(), state, about)

    def load(self, folder: Path) -> None:
        """Continue from `save`: all ranks at the same time. Raises `UserError` for another model's, or one of
        another d, r, projector or moments."""
        self._settle_all()
        self._world.barrier()
        tensors, about = load_checkpoint(folder, self._stored(), self.name)
        if self.streamed is not None:
            self.streamed.weights.slots.forget_all()
        load_cores(self._laid_out, tensors, about["matrices"], folder)
        self.dense.load(self._names, tensors)
        load_rng_state(self.device, tensors)
        self.steps_done = int(about["steps_done"])
        if self._ranks is not None:
            self._ranks.forget()  # as all of them do, and have written the same states
        self._world.barrier()

    def trace_events(self) -> list[dict[str, Any]]:
        """Chrome trace events of GPU, link and CPU, in microseconds; asked once, before `close`."""
        return self._clocks.trace_events()

    def synchronize(self) -> None:
        """Wait until no core is in flight and the device is idle."""
        self._in_flight.synchronize()
        self.link.synchronize()

    def close(self) -> None:
        """Stop the worker, give the model's modules their own forward back, unpin. May be called twice."""
        if self._trained is not None:
            self._notes = self.notes
            self._trained.close()
            self._trained = None
        if self._regions is not None:
            self._notes = self.notes
            self._regions.remove()
            self._regions = None
        for matrix in self._matrices():
            restore(matrix.subspace.module)
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
        self._in_flight.clear()
        self.link.synchronize()
        self._machines = None
        if self._cores is not None:
            self._cores.close()
            self._cores = None
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None
        if self.streamed is not None:
            self.streamed.close()
            self.streamed = None
