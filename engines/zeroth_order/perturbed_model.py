"""A model at theta + eps z and theta - eps z at once, without a second copy of its weights.

Inside the blocks both forward passes run stacked: the first half of the batch belongs to theta + eps z, the
second to theta - eps z. What has no weights (attention, residuals, activations) is computed once for both;
a module with weights (a *unit*) computes its first half with one set and its second half with the other
(`engines.zeroth_order.unit_forward`). Its perturbed weights are made in a scratch memory when it is called,
from theta, by one pass over it (`engines.noise.weight_pass.visit`), and the next unit's take their place. So
the GPU holds, beside theta, the perturbed weights of the largest unit; and theta itself is needed only for
that pass, from wherever it is kept (`Source`).

Outside the blocks (embeddings, final norm, head) a model does anything: there each pass runs by itself, by
the model's own forward, between the same modules. Embeddings perturb the rows that are looked up and no
others.

No model code is copied: a unit is the model's own module, whose forward is replaced on the instance.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Batch, Update
from engines.costs.transformer import GRAPH_SCRATCH_BYTES
from engines.model.attention_masks import has_padding, known_padding, with_mask
from engines.model.blocks import (
    BlockCall,
    BlockDriver,
    bind,
    find_blocks,
    first_names,
    move_buffers,
    to_device,
)
from engines.model.cuda_graphs import BlockGraphs
from engines.model.evaluation import EvaluationSum
from engines.model.flat_layout import ModelLayout
from engines.noise import weight_pass
from engines.noise.realized_updates import realized_fraction
from engines.noise.visits import Outputs, Visit
from engines.quantized.block_form import BlockForm
from engines.transfer.compute_clock import ComputeClock
from engines.zeroth_order.block_visit import Source, Task
from engines.zeroth_order.chunked_loss import Targets, plain_head, targets_of
from engines.zeroth_order.estimators import Side
from engines.zeroth_order.low_rank.example_noise import ExampleLosses, ExampleNoise
from engines.zeroth_order.low_rank.lora import Adapters
from engines.zeroth_order.low_rank.low_rank_noise import LowRank
from engines.zeroth_order.paired_batch import join_calls
from engines.zeroth_order.perturbed_weights import BlockScratch
from engines.zeroth_order.unit_forward import StackedBatch, UnitForward
from engines.zeroth_order.units import block_units, has_no_bias, places_in, swapped, without_bias


@dataclass(frozen=True, slots=True)
class Prepared:
    """A micro-batch on the device."""

    inputs: Mapping[str, Tensor]
    targets: Targets | None
    """`None` where the model's own forward computes the loss."""
    padded: bool
    """Some position is left out by the attention mask."""
    examples: range
    """Of the step."""
    class_tokens: Tensor | None = None
    """As `Batch` has them."""


class PerturbedModel:
    """The model that mezo and zo2 compute with; weights outside the blocks included.

    Raises `UserError` for a model without a row of blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        layout: ModelLayout,
        adapters: Adapters | LowRank,
        clock: ComputeClock,
        forms: Sequence[BlockForm],
        apart: Collection[int] = (),
    ) -> None:
        """`apart`: blocks that cannot be run for both sides at once (`engines.zeroth_order.stacking`)."""
        self.layout = layout
        self.adapters = adapters
        self.non_block = {
            name: torch.empty(layout.shapes[name], dtype=dtype, device=device) for name in layout.non_block
        }
        self.num_blocks = len(layout.blocks)
        self.device = device
        self._clock = clock
        self._side = Side.PLAIN
        self._how: Visit | None = None
        self._in_tail = False
        places = first_names(model)
        # Whatever reads a weight past its unit reads NaN. One element each: they take no memory.
        bind(model, places, {name: _nothing(shape, dtype, device) for name, shape in layout.shapes.items()})
        move_buffers(model, device)
        model.eval()
        self.transformer = model
        self._driver = BlockDriver(model)
        self._batch = StackedBatch()
        block_path, _ = find_blocks(model)
        names = {place.rpartition(".")[::2]: name for place, name in places.items()}
        owners = {path: module for path, module in model.named_modules() if module._parameters}
        units = block_units(self._driver.blocks, block_path, owners, names, apart)
        self._apart = frozenset(
            unit.block for unit in units if unit.module is self._driver.blocks[unit.block]
        )
        self.scratch = BlockScratch(layout, units, dtype, device, self.non_block, clock, forms)
        if isinstance(adapters, LowRank):
            self.scratch.fold = adapters.fold
        self._graphs: BlockGraphs | None = None
        largest_bytes = dtype.itemsize * max(block.size for block in layout.blocks)
        # Experts pick their tokens by looking at them, which a graph cannot.
        has_experts = any(unit.mixed or unit.module in self._driver.blocks for unit in units)
        if device.type == "cuda" and 2 * largest_bytes <= GRAPH_SCRATCH_BYTES and not has_experts:
            self._graphs = BlockGraphs(self._run_eagerly)
            self.scratch.reserve(by_block=True, sides=2)
        for unit in units:
            if unit.frozen and has_no_bias(unit.module):
                unit.module.forward = without_bias(unit.module)
        adapted = adapters.install(model)
        for unit in units:
            unit.adapted = not adapted.isdisjoint(unit.module.modules())
            unit.module.forward = UnitForward(
                unit, self.scratch, adapters, self._batch, device, is_block=unit.block in self._apart
            )
        for path, module in owners.items():
            if not path.startswith(f"{block_path}."):
                module.forward = self._non_block_forward(path, module, names)
        self._example_losses = ExampleLosses(type(model).__name__)
        # After the units are in place: models with experts look at how their weights lie, NaN or not.
        self._head = plain_head(model, self._driver, places, layout.numbers)

    def prepare(self, batch: Batch, examples_before: int = 0) -> Prepared:
        """A micro-batch on the device, and where its labels are. `examples_before` it: in the step."""
        targets = None if self._head is None else targets_of(batch, self.device)
        inputs = with_mask(to_device(batch, self.device))
        each = batch.inputs.get("labels", next(iter(batch.inputs.values())))
        examples = range(examples_before, examples_before + len(each))
        return Prepared(inputs, targets, has_padding(batch.inputs), examples, batch.class_tokens)

    def begin_step(self, num_batches: int, most_sides: int) -> None:
        """So many micro-batches are to be perturbed, so many sides of each in one batch at most."""
        if self._graphs is None:
            self.scratch.reserve(by_block=num_batches > 1, sides=most_sides)
        else:  # HAZARD: its graphs know the scratch by address, so it never changes its form
            self._graphs.begin()

    def enter(self, batch: Prepared, how: Visit, sides: Sequence[Side]) -> tuple[Tensor, Sequence[BlockCall]]:
        """All of `sides`, one or both, up to the first block: the hidden state (sides x batch, seq, hidden),
        and what each block is called with beside it."""
        self._how = how
        if len(sides) == 1:
            return self._record(batch, sides[0])
        plus, minus = (self._record(batch, side) for side in sides)
        rows = plus[0].shape[0]
        return torch.cat((plus[0], minus[0])), join_calls(plus[1], minus[1], rows, self._apart)

    def enter_all(
        self, batches: Sequence[Prepared], how: Visit, sides: Sequence[Side]
    ) -> tuple[list[Tensor], list[Sequence[BlockCall]]]:
        """`enter` of every micro-batch. Apart, so that a hidden state goes once a block has made the next."""
        entered = [self.enter(batch, how, sides) for batch in batches]
        return [hidden for hidden, _ in entered], [calls for _, calls in entered]

    def end_window(self, index: int, task: Task) -> None:
        """What the block gathered in a window that the `task` ends is put aside for it, or for the rank that
        has it. Part of `visiting`."""
        if task.ends_window is not None and isinstance(self.adapters, LowRank):
            self.adapters.start_fold(index, task.ends_window, task.how)

    @contextmanager
    def visiting(self, index: int, task: Task, source: Source) -> Iterator[None]:
        """Block `index` may be run within."""
        self.end_window(index, task)
        self.scratch.begin(index, task, source)
        self._clock.start()
        self.adapters.begin(index, task)
        self._clock.stop()
        yield
        self.scratch.end()

    def enter_all_plain(self, batches: Sequence[Prepared]) -> tuple[list[Tensor], list[Sequence[BlockCall]]]:
        """Every micro-batch's hidden state before the first block and its blocks' calls, at theta."""
        if self._graphs is None:
            self.scratch.reserve(by_block=len(batches) > 1, sides=1)
        entered = [self._record(batch, Side.PLAIN) for batch in batches]
        return [hidden for hidden, _ in entered], [calls for _, calls in entered]

    def enter_cached(
        self, inputs: Mapping[str, Tensor], cache: Any, *, padded: bool
    ) -> tuple[Tensor, Sequence[BlockCall]]:
        """Likewise of a batch that goes on from the key-value `cache`, to which its blocks add; without one
        they begin anew."""
        if self._graphs is None:
            self.scratch.reserve(by_block=False, sides=1)
        self._side = Side.PLAIN
        with known_padding(padded):
            recording = self._driver.record(inputs, cache)
        return recording.hidden, recording.calls

    def try_cached(self, inputs: Mapping[str, Tensor], cache: Any) -> None:
        """Every block once with whatever weights are there, for what that leaves in `cache`."""
        hidden, calls = self.enter_cached(inputs, cache, padded=False)
        for index, call in enumerate(calls):
            hidden = self._run_eagerly(index, call, hidden)

    def takes(self, name: str) -> bool:
        """Whether the model's own forward has an argument of that name."""
        return name in self._driver.takes

    def next_logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits (batch, vocabulary) after the last block's `hidden` (batch, 1, hidden) of `ids` (batch, 1).

        The model's own, with caps and scales."""
        ones = torch.ones_like(ids)
        inputs = {"input_ids": ids, "attention_mask": ones}
        batch = Prepared(inputs, targets=None, padded=False, examples=range(len(ids)))
        logits: Tensor = self._finish(batch, hidden, Side.PLAIN).logits
        return logits[:, -1]

    def _record(self, batch: Prepared, side: Side) -> tuple[Tensor, Sequence[BlockCall]]:
        self._side = side
        with known_padding(batch.padded):
            recording = self._driver.record(batch.inputs)
        return recording.hidden, recording.calls

    def run(
        self, index: int, calls: Sequence[BlockCall], hidden: Tensor, examples: range | None = None
    ) -> Tensor:
        """The hidden state after block `index`, whose visit has begun; `calls` are those of all blocks. Both
        sides of `examples` of the step, where they are perturbed.

        The one before may be overwritten.
        """
        if examples is not None:
            self.adapters.hold(examples, hidden.shape[0])
        if self._graphs is not None and self.scratch.perturbs:
            return self._graphs.run(index, calls, hidden, stacked=self.scratch.stacks)
        return self._run_eagerly(index, calls[index], hidden)

    def _run_eagerly(self, index: int, call: BlockCall, hidden: Tensor) -> Tensor:
        self._batch.rows = hidden.shape[0]
        return self._driver.run(index, call, hidden)

    def losses(self, batch: Prepared, hidden: Tensor, how: Visit, sides: Sequence[Side]) -> Sequence[Tensor]:
        """Loss of a micro-batch on each of `sides`, () fp64 or fp32, from the hidden state of all of them.
        Where examples have directions of their own: of the first on each of `sides`, then of the next."""
        self._how = how
        states = dict(zip(sides, hidden.chunk(len(sides)), strict=True))
        of_each = isinstance(self.adapters, ExampleNoise)
        found: Sequence[Tensor]
        if self._head is None:
            outputs = (self._finish(batch, state, side) for side, state in states.items())
            if not of_each:
                return [output.loss for output in outputs]
            found = [self._example_losses.of(output, batch.inputs) for output in outputs]
        else:
            assert batch.targets is not None
            reached = {side: self._reach_head(batch, state, side) for side, state in states.items()}
            non_block, trained = self.non_block, self.layout.trained
            found = self._head.losses(reached, batch.targets, non_block, trained, how, of_each=of_each)
        return torch.stack(tuple(found), 1).flatten().unbind() if of_each else found

    def evaluate(self, batch: Prepared, hidden: Tensor, total: EvaluationSum) -> None:
        """Add to `total` what a hidden state gives that theta itself has made."""
        if self._head is not None:
            assert batch.targets is not None
            reached = self._reach_head(batch, hidden, Side.PLAIN)
            tokens, labels = batch.class_tokens, batch.inputs["labels"]
            scores = self._head.evaluate(reached, batch.targets, self.non_block, tokens)
            total.add_tokens(float(scores.loss_sum), scores.losses, labels, scores.predicted, tokens)
        else:
            total.add(self._finish(batch, hidden, Side.PLAIN), batch.inputs, batch.class_tokens)

    def _finish(self, batch: Prepared, hidden: Tensor, side: Side) -> Any:
        with self._tail(side), known_padding(batch.padded):
            return self._driver.finish(batch.inputs, hidden)

    def _reach_head(self, batch: Prepared, hidden: Tensor, side: Side) -> Tensor:
        assert self._head is not None
        with self._tail(side), known_padding(batch.padded), self._head.reached() as reached:
            self._driver.finish(batch.inputs, hidden)
        return reached.hidden

    def update_non_block(self, how: Visit, of_examples: Sequence[Update] = ()) -> None:
        """Apply deferred updates to what is outside the blocks, and to what stands beside them; there those
        of a step's examples, if these have their own."""
        for name, weight in self.non_block.items():
            if name in self.layout.trained:
                flat = weight.view(-1)
                weight_pass.visit(flat, self.layout.segment(name), how, Outputs(theta=flat))
        self.adapters.update(how, of_examples)

    def realized_update_fraction(self, how: Visit) -> float | None:
        """Of the updates of `how` to the largest trained tensor outside the blocks, or of an adapter:
        `engines.noise.realized_updates.realized_fraction`. `None` without any."""
        trained = [
            (self.non_block[name], self.layout.numbers[name])
            for name in self.non_block
            if name in self.layout.trained
        ]
        trained += [(self.adapters.tensors[name], number) for name, number in self.adapters.numbers.items()]
        if not trained:
            return None
        weight, number = max(trained, key=lambda each: each[0].numel())
        return realized_fraction(weight, number, how)

    @contextmanager
    def _tail(self, side: Side) -> Iterator[None]:
        self._side, self._in_tail = side, True
        try:
            yield
        finally:
            self._in_tail = False

    def _non_block_forward(
        self, path: str, module: nn.Module, names: Mapping[tuple[str, str], str]
    ) -> Callable[..., Any]:
        original = module.forward
        # Where the blocks are inside it, only what it has itself.
        places = [
            place
            for place in places_in(path, module, names)
            if place[0] is module or place[2] in self.non_block
        ]
        looks_up = type(module).forward is nn.Embedding.forward and getattr(module, "max_norm", None) is None
        shape: torch.Size | None = None

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal shape
            if self._in_tail and shape is not None and isinstance(module, nn.Embedding):
                # The model's forward begins anew to get to its end; what enters the blocks is not used.
                anything, ids = next(iter(self.non_block.values())), args[0] if args else None
                return anything.new_zeros((*ids.shape, shape[-1]) if isinstance(ids, Tensor) else shape)
            (_, _, name), ids = places[0], args[0] if args else None
            if looks_up and ids is not None and self._side is not Side.PLAIN and name in self.layout.trained:
                result: Any = weight_pass.rows(
                    self.non_block[name], self.layout.numbers[name], ids, self._signed()
                )
            else:
                weights = [self._non_block_weight(name) for _, _, name in places]
                with swapped(places, weights):
                    result = original(*args, **kwargs)
            shape = result.shape if isinstance(result, Tensor) else None
            return result

        return forward

    def _signed(self) -> Visit:
        assert self._how is not None
        return replace(self._how, eps=self._side.value * self._how.eps)

    def _non_block_weight(self, name: str) -> nn.Parameter:
        """A tensor outside the blocks as the present side has it."""
        weight = self.non_block[name]
        if self._side is not Side.PLAIN and name in self.layout.trained:
            assert self._how is not None
            moved = torch.empty_like(weight)
            out = Outputs(plus=moved) if self._side is Side.PLUS else Outputs(minus=moved)
            weight_pass.visit(weight.view(-1), self.layout.segment(name), self._how, out)
            weight = moved
        return nn.Parameter(weight, requires_grad=False)


def _nothing(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)
