"""One step of MeZO over blocks that lie anywhere, and what else is done with the weights that it trains.

`ZerothOrder` is the algorithm of `engines.methods.mezo`; a `BlockStore` is where the blocks' weights are
between steps. The two methods are this one step over two stores, so they cannot differ in what they compute:
only in which visit stores which updates, and when bytes are copied.

A step makes one pass over the blocks. A *visit* of a block applies the updates that it lacks, perturbs it,
and runs all forward passes through it (`engines.zeroth_order.forward_passes`). The losses give the next
update, which is appended to the log (`engines.zeroth_order.deferred_updates`); what lies outside the blocks
takes it at once, the blocks in their next visits.

With several ranks each computes its share of the micro-batches, or of the queries, and hands its losses
round: every rank then makes the same update of them, so that weights never go from one to another.

Longer than 400 lines: all that is done with the weights between steps is here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from engines.base import Batch, Blueprint, Context, Evaluation, StepStats, Update
from engines.decoding import Decoded, GenerationRequest
from engines.lossless.whole_matrices import names_of_ranks
from engines.model.blocks import TORCH_DTYPE
from engines.model.evaluation import EvaluationSum
from engines.model.flat_layout import lay_out
from engines.model.model_check import check_driven
from engines.model.stand_ins import give_back
from engines.quantized.block_form import BlockForm, block_forms
from engines.quantized.export import plain_weights, realized_of_quantized
from engines.settings.zeroth_order import Base, MezoSettings, check_base, check_examples
from engines.world import Share, divide
from engines.zeroth_order.block_store import BlockStore, StepClocks
from engines.zeroth_order.checkpoint import open_checkpoint, save_weights
from engines.zeroth_order.deferred_updates import DeferredUpdates
from engines.zeroth_order.estimators import next_updates, of_all_examples, probes
from engines.zeroth_order.forward_passes import ForwardPasses, each_over_ranks, mean_over_ranks
from engines.zeroth_order.generation import generate_tokens
from engines.zeroth_order.low_rank.low_rank_noise import window_due
from engines.zeroth_order.low_rank.make import make_adapters
from engines.zeroth_order.perturbed_model import PerturbedModel
from engines.zeroth_order.stacking import blocks_apart, check_rows_of_sequences

EVALUATION_GROUP = 8
"""Batches that share one pass over the blocks when evaluating; their hidden states are on the GPU."""


class ZerothOrder(ABC):
    """MeZO (Malladi et al., arXiv 2305.17333, algorithm 1) over the blocks of a `BlockStore`.

    An engine gives its store in `_make_blocks`.
    """

    name: ClassVar[str]

    def __init__(self, settings: MezoSettings, context: Context, clocks: StepClocks) -> None:
        check_base(self.name, settings, context.workload.dtype)
        check_examples(self.name, settings, context.workload)
        self.settings = settings
        self.context = context
        self.device = torch.device(context.device)
        self._dtype = TORCH_DTYPE[context.workload.dtype]
        self._clocks = clocks
        self._blocks: BlockStore | None = None
        self._may_differ = False
        """Ranks have loaded or replayed since they last made a step together."""
        self._of_examples: list[Update] = []
        """Updates of the step's examples so far."""

    @abstractmethod
    def _make_blocks(self, forms: Sequence[BlockForm], updates: DeferredUpdates) -> BlockStore:
        """The store of this engine. Raises `InfeasiblePlan` if there is too little memory for blocks of these
        `forms`."""

    @staticmethod
    def why_not_available() -> str | None:
        """`None`: it runs on any device."""
        return None

    @property
    def blocks(self) -> BlockStore:
        """After `setup`."""
        assert self._blocks is not None
        return self._blocks

    @property
    def pinned_bytes(self) -> int:
        return self.blocks.pinned_bytes

    @torch.no_grad()
    def setup(self, blueprint: Blueprint) -> None:
        """Raises `InfeasiblePlan`, before anything is filled, if memory or disk is too small, and `UserError`
        for a model whose blocks cannot be driven."""
        check_driven(blueprint, self.context)
        apart = blocks_apart(blueprint, self.context)
        if self.settings.estimator == "grzo":
            check_rows_of_sequences(blueprint, self.context)
        give_back(self.device)
        adapters, self._layout = make_adapters(
            blueprint.model,
            lay_out(blueprint.model, self._dtype, self.settings.train),
            self.settings,
            self._dtype,
            self.device,
            self.context,
        )
        blocks = self._layout.blocks
        self._forms = block_forms(blocks, self.settings.base, self._dtype)
        trained = [i for i, block in enumerate(blocks) if any(part.trained for part in block.parts)]
        self._updates = DeferredUpdates(self.settings, self.context.seed, len(blocks), trained, self.device)
        made = self._make_blocks(self._forms, self._updates)
        self._model = PerturbedModel(
            blueprint.model, self._dtype, self.device, self._layout, adapters, self._clocks.noise,
            self._forms, apart,
        )  # fmt: skip
        self._blocks = made
        made.set_up(self._model, blueprint)
        for name, weight in self._model.non_block.items():
            blueprint.fill(name, weight)
        crowded = self._fill(blueprint.fill, anew=False)
        if self.settings.base == "lossless":
            crowded = names_of_ranks(crowded, self.context.world)
        if crowded:
            # Only now are sizes known: those matrices stay as they are, and all is made anew.
            made.close()
            self._blocks = None
            del made  # before the new one is taken
            self._forms = block_forms(blocks, self.settings.base, self._dtype, unlike=crowded)
            self._model.scratch.set_forms(self._forms)
            self._blocks = self._make_blocks(self._forms, self._updates)
            self._blocks.set_up(self._model, blueprint)
            self._fill(blueprint.fill, anew=False)

    def _fill(self, fill: Callable[[str, Tensor], object], *, anew: bool) -> list[str]:
        """Write the blocks' weights, each tensor by `fill`. Returns the names of matrices that lossless
        tiles have no room for."""
        crowded: list[str] = []
        self.blocks.fill(
            lambda form, memory: crowded.extend(form.fill(memory, fill, self._model.scratch.buffer)),
            anew=anew,
        )
        return crowded

    @torch.no_grad()
    def step(self, batches: Sequence[Batch]) -> StepStats:
        settings, clocks, step = self.settings, self._clocks, self._updates.step
        if self._may_differ and settings.base == "lossless":
            self._model.scratch.whole.take_from_first(
                self.context.world, self.blocks.shared, self._dtype, self._updates.num_applied
            )
        self._may_differ = False
        window = window_due(settings, step)
        earlier = self.blocks.begin_step(window)
        clocks.label("before the blocks")
        clocks.compute.start()
        asked, world = probes(settings, step), self.context.world
        division = divide(world.size, len(batches), len(asked))
        mine = division[world.rank]
        prepared = [
            self._model.prepare(batch, number * self.context.workload.batch_size)
            for number, batch in zip(mine.batches, mine.of_batches(batches), strict=True)
        ]
        passes = ForwardPasses(
            self._model, prepared, mine.of_probes(asked), self._updates.none(), self.blocks.states
        )
        for index, task in self.blocks.in_order(window):
            passes.visit(index, task, self.blocks)
        clocks.label("loss")
        alone = world.size == 1 and settings.estimator != "grzo"
        if alone:
            sums = passes.losses()
        else:
            each = passes.each_loss()
        clocks.compute.stop()
        told = earlier()  # the GPU has much to do still, so that this costs nothing
        # The one place where the host waits, for the GPU and then for the other ranks.
        if alone:
            losses = sums.read(len(prepared), step)
        else:
            self.blocks.before_ranks_meet()
            losses = self._losses_of_all(each, division, [len(probe.sides) for probe in asked], step)
        told |= self.blocks.end_step()
        self._settle()
        updates = next_updates(step, settings, self.context.total_steps, losses)
        for update in updates:
            self._append(update)
        return StepStats(
            loss=sum(losses) / len(losses), forwards=float(settings.forward_passes), updates=updates, **told
        )

    @property
    def whole_matrices(self) -> list[str]:
        """First names of the matrices that found no room in lossless tiles since the run began."""
        kept = self._model.scratch.whole.items() if self._blocks is not None else ()
        return [self._forms[block].layout.parts[part].names[0] for (block, part), _ in kept]

    @property
    def notes(self) -> list[str]:
        """Of the run so far, for its record."""
        names = self.whole_matrices
        if not names:
            return []
        return [f"base=lossless has no room for {len(names)} matrices any more, such as '{names[0]}'"]

    def _settle(self) -> None:
        """After a pass over the blocks: matrices that an update left no room for in lossless tiles are whole
        from now on. After the passes of a step those are the same on all ranks."""
        scratch = self._model.scratch
        late = scratch.without_room()
        if late:
            self.synchronize()
        for each in late:
            with self.blocks.at_rest(each.block) as memory:
                tiles = self._forms[each.block].part(memory, each.part)
                scratch.make_whole(each, tiles, self._updates.none())

    def _losses_of_all(
        self, own: Tensor, division: Sequence[Share], sides: Sequence[int], step: int
    ) -> list[float]:
        """For `next_updates`, from those of this rank's micro-batches."""
        world = self.context.world
        if self.settings.estimator != "grzo":
            return mean_over_ranks(own, world, division, sides, step)
        sides = [count * self.context.workload.batch_size for count in sides]
        return list(chain.from_iterable(each_over_ranks(own, world, division, sides, step)))

    def _append(self, update: Update) -> None:
        """What is outside the blocks takes the update at once; its time counts with the next step's. Those of
        examples do when the last of the step is there."""
        of_examples: list[Update] = []
        if self.settings.estimator == "grzo":
            of_examples = self._of_examples = [*self._of_examples[: update.query], update]
            if len(of_examples) < update.queries:
                return
            update = of_all_examples(of_examples)
        self._clocks.label("update")
        self._clocks.compute.start()
        self._clocks.noise.start()
        self._updates.append(update)
        self._model.update_non_block(self._updates.latest(), of_examples)
        self._clocks.noise.stop()
        self._clocks.compute.stop()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        total = EvaluationSum()
        remaining = iter(batches)
        while group := [self._model.prepare(batch) for batch in islice(remaining, EVALUATION_GROUP)]:
            hidden, calls = self._model.enter_all_plain(group)
            for index in self.blocks.in_order_with_theta():
                for i, each_calls in enumerate(calls):
                    hidden[i] = self._model.run(index, each_calls, hidden[i])
            for each, last in zip(group, hidden, strict=True):
                self._model.evaluate(each, last, total)
        self._settle()
        self.blocks.forget_times()
        return total.result()

    @torch.no_grad()
    def generate(self, request: GenerationRequest) -> Iterator[Decoded]:
        """Text from `request`, a token of every prompt at a time: `engines.zeroth_order.generation`."""
        self.blocks.apply_deferred(self._updates.step - 1)
        self._settle()

        def blocks() -> Iterator[int]:
            self.blocks.begin_token()
            return self.blocks.in_order_with_theta()

        compute = self._clocks.compute
        self.blocks.begin_tokens()
        for tokens in generate_tokens(self._model, request, blocks, compute, self.context.vram_bytes):
            yield Decoded(tokens=tokens, stats=StepStats(loss=math.nan, **self.blocks.end_token()))
        self.blocks.forget_times()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter by its first name, on the host, with every update and its adapter."""
        last_step, merged = self._updates.step - 1, self._model.adapters.merged
        if self.settings.base != "full":
            for name, weight in self._plain(last_step):
                yield name, merged(name, weight, self._updates.none())
            return
        self.blocks.apply_deferred(last_step)
        self.synchronize()
        where = self.blocks.tensors(last_step)
        for name in self._layout.shapes:
            yield name, merged(name, where[name].cpu(), self._updates.none())

    def _plain(self, last_step: int) -> Iterator[tuple[str, Tensor]]:
        """The model's own tensors of the full dtype, on the host, where blocks have some in tiles."""
        self.synchronize()
        self._settle()

        def stored(index: int) -> Tensor:
            memory = self.blocks.stored(index, last_step)
            if self._model.scratch.has_stored:  # a block on disk, in passing
                self._settle()
            return memory

        return plain_weights(
            self._layout,
            self._forms,
            self._model.non_block,
            stored,
            lambda index: self.blocks.lacking(index, last_step),
            self.device,
            self._model.scratch.whole,
        )

    @torch.no_grad()
    def realized_update_fraction(self) -> float | None:
        """Share of the wanted change that the last updates made to the weights as they are stored; of a
        low-bit base that is trained, of its matrices. `None`: not known."""
        share = None
        if self._updates.quantized:
            self.synchronize()
            last_step, entries = self._updates.step - 1, self.settings.fold_every * self.settings.queries
            share = realized_of_quantized(
                self._forms,
                lambda index: self.blocks.stored(index, last_step),
                lambda index: self._updates.latest(entries),
                self.device,
            )
        return self._model.realized_update_fraction(self._updates.latest()) if share is None else share

    @torch.no_grad()
    def replay(self, updates: Iterable[Update]) -> None:
        """Apply updates of an earlier run, in its order, and go on after the last."""
        in_memory = self._updates.trained - self.blocks.on_disk
        for update in updates:
            window = None
            if update.query == 0:
                window = window_due(self.settings, update.step)
                self.blocks.make_room_in_log(window)
            if self._updates.fill_the_log(in_memory) or window is not None:
                self.blocks.apply_deferred(update.step, window, by_all=True)
            if self._model.scratch.has_stored:  # before the log forgets what they took
                self._settle()
            self._append(update)
        self.blocks.apply_deferred(self._updates.step - 1, by_all=True)
        self._settle()
        self._may_differ = True

    def save(self, folder: Path) -> None:
        last_step = self._updates.step - 1
        weights: Iterable[tuple[str, Tensor]]
        if self.settings.base == "lossless":
            adapters = ((name, weight.cpu()) for name, weight in self._model.adapters.tensors.items())
            weights = chain(self._plain(last_step), adapters)
        else:
            self.blocks.apply_deferred(last_step)
            self.synchronize()
            weights = ((name, weight.cpu()) for name, weight in self.blocks.tensors(last_step).items())
        save_weights(
            folder,
            weights,
            step=self._updates.step,
            seed=self._updates.seed,
            lora=self._model.adapters.form,
            base=self._saved_base,
            deferred=self._updates.to_save(last_step),
        )

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        is_lossless, non_block = self.settings.base == "lossless", self._model.non_block
        like = self._like_plain() if is_lossless else self.blocks.like_tensors()
        checkpoint = open_checkpoint(folder, like, self._model.adapters.form, self._saved_base)

        def read(name: str, out: Tensor) -> None:
            out.copy_(checkpoint.tensor(name))

        def read_block(form: BlockForm, memory: Tensor) -> None:
            for name, out in form.views(memory).items():
                read(name, out)

        for name, weight in (non_block | self._model.adapters.tensors).items():
            read(name, weight)
        self._updates.restore(checkpoint.step, checkpoint.seed, checkpoint.deferred)
        if not is_lossless:
            self.blocks.fill(read_block, anew=True)
            return
        self._model.scratch.whole.clear()
        self._may_differ = True
        crowded = self._fill(read, anew=True)
        for block, form in enumerate(self._forms):
            for index, part in enumerate(form.layout.own_parts):
                if part.names[0] in crowded:
                    values = self._model.scratch.buffer(part.size)
                    read(part.names[0], part.views(values)[part.names[0]])
                    self._model.scratch.whole.add(block, index, values, self._updates.log.length)

    @property
    def _saved_base(self) -> Base:
        """A checkpoint has plain weights where nothing is lost."""
        return self.settings.base if self.settings.is_quantized else "full"

    def _like_plain(self) -> dict[str, Tensor]:
        """Tensors of the shapes and dtype of all that a checkpoint of plain weights has."""
        shapes = self._layout.shapes.items()
        own = {name: torch.empty(shape, dtype=self._dtype, device="meta") for name, shape in shapes}
        return own | self._model.adapters.tensors

    def trace_events(self) -> list[dict[str, Any]]:
        """Chrome trace events so far, if `Context.trace` asked for them."""
        timeline = self._clocks.timeline
        return [] if timeline is None else timeline.events()

    def synchronize(self) -> None:
        self.blocks.synchronize()

    def close(self) -> None:
        if self._blocks is not None:
            self._blocks.close()
