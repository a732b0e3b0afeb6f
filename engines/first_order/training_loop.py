"""The step of every method that is a torch model with an optimizer over it: passes, update, loss, checkpoint.

A method's file makes the two and says what is special about them; what it has no word for is done here.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from engines.base import Batch, Context, Evaluation, StepStats
from engines.errors import NonFiniteLoss, UserError, first_line
from engines.first_order.adamw import prepare_training, run_passes, set_learning_rate
from engines.first_order.captured_passes import CapturedPasses
from engines.first_order.checkpoint import (
    HoldsState,
    load_checkpoint,
    load_optimizer_state,
    load_rng_state,
    model_weights,
    optimizer_state,
    parameter_names,
    rng_state,
    save_checkpoint,
)
from engines.first_order.head_loss import HeadLoss
from engines.first_order.lr_schedule import constant_from, learning_rate_at
from engines.first_order.sharded_model import put_down
from engines.model.attention_masks import has_padding
from engines.model.blocks import find_blocks, to_device
from engines.model.cuda_graphs import MOST_FORMS
from engines.model.evaluation import evaluate_on_device
from engines.model.randomness import draws_random_numbers
from engines.model.training_regions import TrainingRegions, compiles
from engines.settings.first_order import (
    AdamWSettings,
    BlockPassSettings,
    ChunkedLossSettings,
    CompiledBlockSettings,
)
from engines.transfer.process_group import library_peers
from engines.transfer.rank_sums import sum_gradients, sum_of_losses
from engines.world import divide

_Result = TypeVar("_Result")


class Optimizer(HoldsState, Protocol):
    """What the loop asks of an optimizer; any of torch's form has it."""

    def step(self) -> Any:
        """Update the parameters by their gradients."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let go of the gradients."""


@runtime_checkable
class OptimizerInBackward(Optimizer, Protocol):
    """One whose updates are a part of the backward pass, which cannot be run a second time then."""

    has_updated: bool
    """Some parameter, in a step that is not over."""


class TrainingLoop:
    """Trains one model with one optimizer, one wait for the device a step.

    Several ranks of a machine each have the model, take their micro-batches and add up the gradients of what
    is trained, as DistributedDataParallel does, in the order of ranks. Or they have parts of it
    (`engines.first_order.sharded_model`), whose gradients FSDP2 averages.
    """

    def __init__(self, engine: str, settings: AdamWSettings, context: Context) -> None:
        self.engine = engine
        self.settings = settings
        self.context = context
        self.device = torch.device(context.device)
        self.steps_done = 0
        self.notes: list[str] = []
        """What of the settings could not be had, and why."""
        self._regions: TrainingRegions | None = None
        self._head_loss: HeadLoss | None = None
        self.captured: CapturedPasses | None = None
        """Graphs of whole passes; `None`: there are none."""
        self._captures_from = 0
        """The step, counted from 0."""
        self._is_compiled = False
        self._within = True
        self._share = 1.0
        self._has_replayed = False
        self._has_released = False
        """Graphs have been let go once, for lack of memory."""
        self.is_sharded = False
        """Several ranks have parts of the weights, and act together."""

    def begin(
        self, model: nn.Module, optimizer: Optimizer, *, only_trained: bool = False, within: bool = True
    ) -> None:
        """Train `model` from now on, whose weights are filled, as the workload says; settings that say how
        blocks run are followed as far as can be.

        With `only_trained` a checkpoint holds the trained parameters alone: the others are the same in every
        run of the job. `within`: what is recomputed is so within a compiled block
        (`engines.model.training_regions.compiled_block`).
        """
        self.model = model
        self._within = within
        self.optimizer = optimizer
        self._only_trained = only_trained
        self.is_sharded = self.context.world.size > 1 and any(map(_has_parts, model.parameters()))
        settings = self.settings
        if not isinstance(settings, CompiledBlockSettings):
            prepare_training(model, self.context, settings)
            return
        prepare_training(model, self.context, settings, recompute=False)
        compiled = compiles(settings.compile, self.device, self.notes)
        self._chunk_loss(compiled=compiled)
        self._install(settings, compiled=compiled)
        graphs = isinstance(settings, BlockPassSettings) and settings.graphs
        if graphs and self.is_sharded and self.device.type == "cuda":
            self.notes.append("no CUDA graph: several GPUs bring a block's weights together while it waits")
        elif self.device.type == "cuda" and graphs and not draws_random_numbers(model):
            self.capture()

    def capture(self) -> None:
        """Passes become graphs from now on. An optimizer in the backward pass is in them, with its rate."""
        left = list(self.model.parameters())
        if isinstance(self.optimizer, OptimizerInBackward):
            steady = constant_from(self.settings)
            if steady is None:
                self.notes.append(
                    "no CUDA graph: the learning rate, which it would hold, changes with each step"
                )
                return
            self._captures_from, left = steady, []
        self.captured = CapturedPasses(left, self._passes, self.device)

    def _chunk_loss(self, *, compiled: bool) -> None:
        """As the settings say. Raises `UserError` where the model's loss is of another form."""
        settings, workload = self.settings, self.context.workload
        if not isinstance(settings, ChunkedLossSettings) or settings.loss_tokens == "all":
            return
        if workload.batch_size * workload.seq_len > settings.loss_tokens:
            self._head_loss = HeadLoss(self.model, settings.loss_tokens, compiled=compiled)

    def _install(self, settings: CompiledBlockSettings, *, compiled: bool) -> None:
        self._is_compiled = False
        try:
            _, blocks = find_blocks(self.model)
        except UserError as error:
            self.notes.append(f"neither compiled nor recomputed: {error.what} {error.why}")
            return
        recomputed = settings.recomputed(len(blocks), checkpointing=self.context.workload.checkpointing)
        self._regions = TrainingRegions(
            self.model,
            compiled=compiled,
            recomputed=recomputed,
            compiles_loss=self._head_loss is None,
            within=self._within,
        )
        self._is_compiled = compiled

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One update on the mean loss of `batches`. Raises `NonFiniteLoss`, the update made."""
        with library_peers() if self.is_sharded else nullcontext():
            return self._step(batches)

    def _step(self, batches: Sequence[Batch]) -> StepStats:
        rate = learning_rate_at(self.steps_done, self.settings, self.context.total_steps)
        set_learning_rate(self.optimizer.param_groups, rate)
        world = self.context.world
        count = len(batches)
        # A mean over the ranks of what each has of the sum is taken of gradients that are in parts.
        self._share = count / world.size if self.is_sharded else count
        batches = divide(world.size, count)[world.rank].of_batches(batches)
        total = torch.zeros((), device=self.device)
        for loss in self._losses(batches):
            total += loss
        if self.is_sharded:
            total /= world.size
        else:
            sum_gradients(world, [each for each in self.model.parameters() if each.requires_grad])
        if self.settings.max_grad_norm > 0:
            # On the device and in place: the norm is not waited for, and graphs find their gradients again.
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        if not self._has_replayed:  # graphs write gradients anew, where they lie
            self.optimizer.zero_grad(set_to_none=True)
        value = sum_of_losses(world, float(total)) if world.size > 1 else float(total)
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the loss of step {self.steps_done} is {value}")
        self.steps_done += 1
        return StepStats(loss=value)

    def _losses(self, batches: Sequence[Batch]) -> Sequence[Tensor]:
        """Losses of this rank's micro-batches, as shares of the mean of all; gradients are where the
        optimizer looks."""
        found = self._replayed(batches)
        self._has_replayed = found is not None
        if found is not None:
            return found
        self.optimizer.zero_grad(set_to_none=True)
        try:
            return self._with_room(lambda: [self._pass(batch) for batch in batches])
        except torch._dynamo.exc.TorchDynamoException as error:
            if not self._is_compiled or self.steps_done > 0 or self._has_updated():
                raise
            self.notes.append(f"not compiled: {first_line(error)}")
        assert self._regions is not None
        assert isinstance(self.settings, CompiledBlockSettings)
        self._regions.remove()
        if self._head_loss is not None:
            self._head_loss.remove()
            self._chunk_loss(compiled=False)
        self._install(self.settings, compiled=False)
        self.optimizer.zero_grad(set_to_none=True)
        return [self._pass(batch) for batch in batches]

    def _replayed(self, batches: Sequence[Batch]) -> Sequence[Tensor] | None:
        """`_losses` by graphs; `None`: it has to be done without."""
        if self.captured is None or self.steps_done < self._captures_from:
            return None
        found = None
        try:
            found = self.captured.step(batches)
        except RuntimeError as error:
            self.captured = None
            self.notes.append(f"no CUDA graph: {first_line(error)}")
        if self.captured is None:
            self._give_back()
        elif found is None and isinstance(self.optimizer, OptimizerInBackward):
            self._make_room()
        return found

    def _make_room(self) -> None:
        """For passes that could not be run once more without graphs, had they no room beside them."""
        assert self.captured is not None
        if self.captured.has_too_many_forms:
            self.captured = None
            self.notes.append(f"no CUDA graph: batches come in more than {MOST_FORMS} forms")
        elif self.captured.holds_memory:
            self.captured.forget()
        else:
            return
        self._give_back()

    def _has_updated(self) -> bool:
        return isinstance(self.optimizer, OptimizerInBackward) and self.optimizer.has_updated

    def _with_room(self, run: Callable[[], _Result]) -> _Result:
        """What `run` gives, which runs without graphs. Where memory ends in it and graphs hold some, which
        nothing else may use, once more without them: a batch of a new form needs its own beside theirs."""
        try:
            return run()
        except torch.OutOfMemoryError:
            if self.captured is None or self._has_updated():
                raise
        # HAZARD: not while the error is handled, whose frames hold what the passes had.
        self._release_graphs()
        return run()

    def _release_graphs(self) -> None:
        """Let them go; from the second time on for good, as batches of too many forms come."""
        assert self.captured is not None
        if self._has_released:
            self.captured = None
            self.notes.append("no CUDA graph: batches of other lengths find no room beside it")
        else:
            self.captured.forget()
        self._has_released = True
        self._give_back()

    def _give_back(self) -> None:
        """What graphs had: compiled passes lie in circles of references, which only the collector ends, and
        their memory in a pool that nothing else may use."""
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()

    def _pass(self, batch: Batch) -> Tensor:
        return self._passes(to_device(batch, self.device), has_padding(batch.inputs))

    def _passes(self, inputs: Mapping[str, Tensor], padded: bool) -> Tensor:
        return run_passes(self.model, inputs, padded, self._share)

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Loss and accuracy in evaluation mode."""
        if self._head_loss is not None:
            batches = (part for batch in batches for part in batch.in_parts(self._head_loss.tokens))
        given = list(batches)
        found = self._with_room(lambda: evaluate_on_device(self.model, given, self.device))
        if self.is_sharded:
            put_down(self.model)
        return found

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter once, on the host."""
        return model_weights(self.model)

    def save(self, folder: Path) -> None:
        """Weights, the optimizer's state, step and random state."""
        state = optimizer_state(self.optimizer, parameter_names(self.model)) | rng_state(self.device)
        about = {"engine": self.engine, "steps_done": self.steps_done}
        writes = not self.is_sharded or self.context.world.rank == 0
        save_checkpoint(folder, self.model, state, about, only_trained=self._only_trained, writes=writes)

    def load(self, folder: Path) -> None:
        """Continue from `save`. Raises `UserError` if `folder` is not a checkpoint of this model."""
        state, about = load_checkpoint(folder, self.model, self.engine, only_trained=self._only_trained)
        load_optimizer_state(self.optimizer, parameter_names(self.model), state)
        load_rng_state(self.device, state)
        self.steps_done = int(about["steps_done"])
        if self.captured is not None:  # states lie at other places now
            self.capture()
            self._give_back()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Let go of the graphs, and give the blocks their own forward back."""
        self.captured = None
        if self._regions is not None:
            self._regions.remove()
        if self._head_loss is not None:
            self._head_loss.remove()


def _has_parts(parameter: Tensor) -> bool:
    return hasattr(parameter, "to_local")
