"""The words that engines, cost model and harness share. Imports no torch.

A `ModelShape` and a `Workload` say what is to be computed; an engine computes it, `engines.costs`
counts what that takes. Both speak of a model in blocks: an embedding, like blocks one after the
other, and a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from engines.shapes import Dtype, ModelShape, Workload
from engines.world import ALONE, World

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch as the model's own forward takes it.

    `inputs` holds `input_ids` (batch_size, seq_len) int64, `attention_mask` of the same shape where
    sequences are padded, `token_type_ids` where the model tells question and text apart, and `labels`:
    (batch_size, seq_len) int64 with -100 where no loss is taken for a causal language model (the model
    shifts them itself), (batch_size,) int64 for classification. For question answering `start_positions` and
    `end_positions` take the place of `labels`: (batch_size,) int64 each, the answer's first and last token.
    Tensors live on the host; an engine moves them.
    """

    inputs: Mapping[str, Tensor]
    class_tokens: Tensor | None = None
    """(classes,) int64, where a causal language model says a class by one token: those, of which each label
    is one. An evaluation takes the likeliest of them for what the model says; the loss is over all tokens."""

    @property
    def real_tokens(self) -> int:
        """Tokens in the batch without padding."""
        mask = self.inputs.get("attention_mask")
        return self.inputs["input_ids"].numel() if mask is None else int(mask.sum())

    def in_parts(self, tokens: int) -> Iterator[Batch]:
        """The same sequences in batches of up to so many tokens, or of one sequence."""
        count, length = self.inputs["input_ids"].shape
        rows = max(1, tokens // length)
        for begin in range(0, count, rows):
            part = {name: each[begin : begin + rows] for name, each in self.inputs.items()}
            yield Batch(inputs=part, class_tokens=self.class_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """One update of a zeroth-order method, or the part of one of its queries. Whole: with the settings, the
    seed and the weights before it, it gives the weights after it.

    theta <- theta - learning_rate (projected_gradient / queries z + weight_decay theta), z being the noise of
    number `draw`. The entries of a step are applied in their order.
    """

    step: int
    """From 0."""
    learning_rate: float
    projected_gradient: float
    weight_decay: float
    """Acts on tensors of two and more dimensions only."""
    query: int = 0
    """From 0, of `queries` in the step."""
    queries: int = 1

    @property
    def draw(self) -> int:
        """Number of its noise: each query of each step has its own."""
        return self.step * self.queries + self.query

    @property
    def coefficient(self) -> float:
        """Of its noise, in the mean over queries."""
        return self.projected_gradient / self.queries


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """What an engine says of one step. `None` is 'not measured'."""

    loss: float
    """Mean of the micro-batches' losses before the update, each the mean over its own labelled positions.
    ZO: mean of all forward passes."""
    forwards: float | None = None
    """Forward passes that each micro-batch took, a part of the blocks being a part of a pass; `None` where an
    engine does not tell."""
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    gpu_s: float | None = None
    h2d_s: float | None = None
    d2h_s: float | None = None
    cpu_s: float | None = None
    """Time each resource was busy in this step, as far as the engine measures it."""
    cpu_threads: int | None = None
    """Threads that this step's updates on the CPU ran on. `None`: torch's, or there are no such updates."""
    gpu_exposed_s: float | None = None
    h2d_exposed_s: float | None = None
    d2h_exposed_s: float | None = None
    cpu_exposed_s: float | None = None
    """Time that each copy direction and the CPU were busy while the GPU was not, and the GPU while nothing
    else was, of the step before the last (`engines.transfer.exposure`)."""
    perturb_s: float | None = None
    """The part of `gpu_s` that made noise: perturbing weights and replaying updates."""
    disk_read_bytes: int = 0
    """What of the disk this step computed with."""
    disk_s: float | None = None
    """Time in which something was being read from disk, for this step or ahead for the next."""
    disk_floor_s: float | None = None
    """What the step has of the disk takes at the rate that reading reached alone, before the run: with
    several ranks, `disk_read_bytes` of all."""
    disk_direct: bool | None = None
    """Whether the disk was read past the page cache; else its rates may be those of memory."""
    updates: tuple[Update, ...] = ()
    """Zeroth-order methods: the update that this step called for, an entry for each query."""

    @property
    def projected_gradient(self) -> float | None:
        """Zeroth-order methods, of the first query: (loss_plus - loss_minus) / (2 eps) with SPSA."""
        return self.updates[0].projected_gradient if self.updates else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Loss and accuracy over labelled positions of a held-out set."""

    loss: float
    accuracy: float
    """Share of labelled positions (of sequences, for classification) where the largest logit is the label, of
    those of the classes where each label is one of `Batch.class_tokens`. For question answering the share of
    sequences where both the first and the last token are right."""
    num_labels: int
    """Labelled positions, or sequences."""
    num_examples: int | None = None
    """Those that accuracy rests on, each with one class or one answer; `None` where labels are the tokens of
    a text, which are no examples apart."""
    expected: tuple[float, ...] = field(default=(), repr=False)
    predicted: tuple[float, ...] = field(default=(), repr=False)
    """The label of each sequence and what the model says in its place, where a sequence has one label: a
    class, a number, or a token. For question answering the first and the last token of each answer, one after
    the other. Empty where sequences have more labels, and where an engine does not tell."""
    sequence_losses: tuple[float, ...] = field(default=(), repr=False)
    sequence_labels: tuple[int, ...] = field(default=(), repr=False)
    """Of each sequence with a label, in the order of the batches: the sum of its labels' losses, and how many
    they are. Empty where the mean of these is not `loss`, and where an engine does not tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a file: contiguous, little-endian."""

    path: Path
    offset_bytes: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: Dtype


@runtime_checkable
class LocatesWeights(Protocol):
    """A blueprint that may know where the weights that `fill` would write lie on disk, as they are."""

    def locate(self, name: str) -> StoredTensor | None:
        """Where parameter `name` lies; `None`: in no file. Files stay as they are while the run goes on."""


class Blueprint(Protocol):
    """A model whose weights are not there yet. The engine decides where each tensor lives."""

    shape: ModelShape
    model: torch.nn.Module
    """On the meta device except for its buffers, which are real and on the CPU. The engine owns it."""
    sample: Batch | None
    """A batch of the job, to try the model on before it is filled; `None`: there is no data."""

    def fill(self, name: str, out: Tensor) -> None:
        """Write the weights of parameter `name` into `out`, of any device and float dtype.

        Does not depend on the order of calls. A tied parameter is filled under its first name in
        `model.named_parameters()`. The same device and dtype give the same bits.
        """

    def release(self) -> None:
        """Let go of the host memory behind `fill`, which may not be called afterwards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkRates:
    """What a link between host and GPU moves, in bytes per second."""

    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    """One direction while the other rests."""
    h2d_duplex_bytes_per_s: float | None = None
    d2h_duplex_bytes_per_s: float | None = None
    """One direction while the other is busy; `None`: not known, taken to be as fast as alone."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"{name} must be positive and finite")


ReportProgress = Callable[[str, int, int], None]
"""Told of slow set-up work: what, units done, units in total."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """Where and how long an engine runs."""

    device: str
    """`cuda:0` or `cpu`."""
    workload: Workload
    seed: int
    total_steps: int
    """Length of the run, for learning-rate schedules."""
    vram_bytes: int | None = None
    """GPU memory that the run may use; `None`: all that is free."""
    host_bytes: int | None = None
    """Host memory that the run may still take; `None`: not known, and not checked."""
    trace: bool = False
    """Keep what each stream did, for `trace_events` of the engines that have it."""
    link_rates: LinkRates | None = None
    """Of the link to emulate; `None`: as fast as it goes."""
    progress: ReportProgress = field(default=lambda what, done, total: None)
    world: World = ALONE
    """The processes that take each step together. Every one is handed all micro-batches of a step and
    computes its share of them; `workload.accumulation` counts all."""


class Engine(Protocol):
    """A way to fine-tune. Implementations share bricks, not a base class.

    Life: `__init__(settings, context)`, `setup`, any mixture of `step`, `evaluate`, `save`, `weights`,
    then `close`. `load` comes right after `setup`.
    """

    name: str
    pinned_bytes: int
    """Page-locked host memory that the engine holds, after `setup`."""

    @staticmethod
    def why_not_available() -> str | None:
        """Why this engine cannot run on this machine; `None` if it can."""

    def setup(self, blueprint: Blueprint) -> None:
        """Allocate and fill. Raises `InfeasiblePlan`, `NotAvailable`, `UserError`."""

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One optimizer step over `workload.accumulation` micro-batches.

        Returns when the loss is on the host. Work for the next step may still be in flight.
        Raises `NonFiniteLoss`.
        """

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Loss and accuracy with every update so far applied. Changes nothing that training sees."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter once, by its first name, on the host, with every update so far applied.

        A yielded tensor is valid until the next one is asked for.
        """

    def save(self, folder: Path) -> None:
        """Write what `load` needs to go on bit for bit. `folder` exists and is empty."""

    def load(self, folder: Path) -> None:
        """Continue from `save`."""

    def synchronize(self) -> None:
        """Wait until nothing is in flight."""

    def close(self) -> None:
        """Stop threads and free pinned memory. May be called twice."""


@runtime_checkable
class ActsTogether(Protocol):
    """An engine of which, with several ranks, no one has everything."""

    @property
    def acts_together(self) -> bool:
        """`evaluate`, `weights` and `save` are to be called on all ranks at the same time, with the same
        arguments; each finds the same, and together they write one checkpoint. `False`: any one may call them
        alone. After `setup`."""


@runtime_checkable
class SupportsRealizedUpdates(Protocol):
    """An engine that can say how much of what it wants to change arrives in the stored weights."""

    def realized_update_fraction(self) -> float | None:
        """Share of the wanted update that reaches the weights as they are stored; `None`: not known.

        1: all of it; 0: all of it was lost in rounding, which may also bring it a little beyond either. Asked
        once, after the last step and evaluation. Takes seconds at most and no more memory than a step does,
        as the peaks of the run hold it; where it is missing, the run goes on without the share.
        Raises what the work of the last step comes to, such as `NonFiniteLoss`.
        """


@runtime_checkable
class SupportsNotes(Protocol):
    """An engine that says what of its settings it could not have."""

    @property
    def notes(self) -> Sequence[str]:
        """What could not be compiled, captured or kept as asked and why, a sentence each; may grow."""


@runtime_checkable
class SupportsTrace(Protocol):
    """An engine that keeps what each stream did where `Context.trace` asks for it."""

    def trace_events(self) -> list[dict[str, Any]]:
        """Chrome trace events so far: spans with `name`, `ph`, `ts` and `dur` (microseconds), `pid` and
        `tid`, and the events that name each `tid`. `engines.transfer.trace` makes them.

        Asked once, before `close`, also after a failure; what it raises then is no other failure of the run.
        """
