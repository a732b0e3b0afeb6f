"""Settings of exact AdamW on the CPU: how moments are kept, from how many tokens the CPU hides. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, Self

from engines.costs.exact_offload import few_gradient_blocks, gradient_places, state_bytes
from engines.settings.exact_offload import ExactOffloadSettings, Moments, Weights
from engines.settings.given import GivenSettings, Value
from engines.shapes import BYTES_PER_ELEMENT
from profiles.planning.budget import gpu_bytes_needed
from profiles.planning.context import AS_FAST, Choice, PlanningContext, SettingChange
from profiles.planning.crossover import clip_by, crossover_reason
from profiles.planning.gpu_room import (
    NEAR_FASTEST,
    counts_to_try,
    finished,
    may_leave_blocks_to_gpu,
    most_gpu_blocks,
    recomputed_for_room,
    weight_slots_for_room,
    with_gpu_blocks,
)
from profiles.planning.not_chosen import faster_moments, with_price_of_streaming
from profiles.units import format_bytes, format_seconds

_Place = Literal["gpu", "host"]

MOMENTS: tuple[Moments, ...] = ("fp32", "bf16", "int8")
WEIGHTS: tuple[Weights, ...] = ("resident", "streamed")
OUTER: tuple[_Place, ...] = ("gpu", "host")
HIDDEN_STATES: tuple[_Place, ...] = ("gpu", "host")
"""In the order in which they are tried."""

FEWEST_GRADIENT_BLOCKS = 2

ENDURED_BYTES = 600e12
"""What makers of drives of 1 TB for workstations commonly warrant to be written, over the drive's life."""

FAST_DISK_BYTES_PER_S = 7e9
"""About the most that one such drive reads, on four lanes of PCIe 4; none writes faster."""

TRIED = ("moments", "weights", "outer", "hidden_states", "gradient_blocks")

WAYS_OUT = (
    SettingChange(
        values={"gradient_blocks": FEWEST_GRADIENT_BLOCKS},
        quality="none: the backward pass waits for the CPU instead",
    ),
)


def choose(context: PlanningContext, given: GivenSettings) -> Choice:
    """Exact moments where they fit, and CUDA graphs; of streamed weights, what that costs."""
    return with_price_of_streaming(context, given, _captured_or_not(context, given), _resident, ())


def _resident(context: PlanningContext, given: GivenSettings) -> ExactOffloadSettings:
    """As chosen for weights that stay on the GPU, whether they fit there or not."""
    typed: ExactOffloadSettings = _captured_or_not(
        context, given.completed(weights="resident")
    ).settings.typed
    return typed


def _captured_or_not(context: PlanningContext, given: GivenSettings) -> Choice:
    """CUDA graphs, unless their pool leaves too little room."""
    if context.machine.gpu is None:
        chosen = {name: False for name in ("compile", "graphs") if name not in given}
        return _choose(context, given.completed(**chosen))
    found = _choose(context, given)
    settings: ExactOffloadSettings = found.settings.typed
    if "graphs" in given or not settings.offload or _has_room(context, settings):
        return found
    plain = _choose(context, given.completed(graphs=False))
    its: ExactOffloadSettings = plain.settings.typed
    lacking, its_lacking = (context.missing_bytes(each.typed) for each in (found.settings, plain.settings))
    if any(lacking):  # where neither fits, the smaller shortage is told
        why = f"graphs=false: with CUDA graphs and their pool it {context.why_missing(settings)}"
        reasons = plain.reasons if any(its_lacking) else (why, *plain.reasons)
        return Choice(plain.settings, reasons) if its_lacking < lacking else found
    before, after = (context.step_s(each) for each in (settings, its))
    is_more_exact = MOMENTS.index(its.moments) < MOMENTS.index(settings.moments)
    if any(its_lacking) or before is None or after is None or not (is_more_exact or AS_FAST * after < before):
        return found
    why = (
        f"graphs=false: without CUDA graphs there is more room for activations, {format_seconds(after)} a "
        f"step, else {format_seconds(before)}"
    )
    return Choice(plain.settings, (why, *plain.reasons))


def _has_room(context: PlanningContext, settings: ExactOffloadSettings) -> bool:
    """Whether nothing was chosen for want of the memory that graphs have for themselves."""
    workload, blocks = context.workload, context.shape.num_blocks
    again = settings.recomputed(blocks, checkpointing=workload.checkpointing)
    keeps_all = not again and not settings.keeps_products(checkpointing=workload.checkpointing)
    return settings.captures and keeps_all and context.why_missing(settings) is None


def _choose(context: PlanningContext, given: GivenSettings) -> Choice:
    """Exact moments where they fit, else the least approximate that do; how gradients are clipped, where they
    are, by whether waiting for their norm hides."""
    chosen: dict[str, Value] = {}
    reasons: list[str] = []
    settings: ExactOffloadSettings = given.completed(**chosen).typed
    found = _fitting(context, given, settings)
    for key in (*TRIED, "disk_blocks", "disk_weights"):
        if key not in given and getattr(found, key) != getattr(settings, key):
            chosen[key] = getattr(found, key)
            why = _why(context, given, found, key, getattr(settings, key))
            reasons.append(f"{key}={str(chosen[key]).lower()}: {why}")
    settings = found
    reasons += _of_disk(context, settings)
    if settings.moments != "fp32":
        reasons.append(f"approximate: Adam's moments in {settings.moments}; fp32 master weights are exact")
    if "gpu_blocks" not in given:
        least = settings.gpu_blocks
        settings, its_reasons = with_gpu_blocks(context, given, settings)
        if settings.gpu_blocks:
            chosen["gpu_blocks"] = settings.gpu_blocks
        if least and not its_reasons:
            its_reasons = [f"gpu_blocks={least}: {_why(context, given, settings, 'gpu_blocks', 0)}"]
        reasons += its_reasons
    if context.workload.checkpointing and "checkpointed_blocks" not in given:
        settings, its_reasons = recomputed_for_room(context, given, settings)
        if settings.checkpointed_blocks != "all":
            chosen["checkpointed_blocks"] = settings.checkpointed_blocks
        if "kept_activations" not in given and settings.kept_activations != "all":
            chosen["kept_activations"] = settings.kept_activations
        reasons += its_reasons
    if settings.streams and "weight_slots" not in given:
        more = weight_slots_for_room(context, settings)
        if more > settings.weight_slots:
            chosen["weight_slots"] = more
            settings = replace(settings, weight_slots=more)
            reasons.append(
                f"weight_slots={more}: the last {more} blocks come up once in a step, not twice; there is "
                "room"
            )
    if settings.max_grad_norm > 0 and "clip_by" not in given:
        chosen["clip_by"], reason = clip_by(context, settings)
        settings = given.completed(**chosen).typed
        reasons.append(reason)
    reasons.append(_per_parameter(context, settings))
    if (crossover := crossover_reason(context, settings)) is not None:
        reasons.append(crossover)
    faster = None if "moments" in given else faster_moments(context, settings, MOMENTS[1:])
    if faster is not None:
        reasons.append(faster)
    return Choice(given.completed(**chosen), tuple(reasons))


def _why(
    context: PlanningContext,
    given: GivenSettings,
    found: ExactOffloadSettings,
    key: str,
    otherwise: object,
) -> str:
    """Why one of the settings of `found` is not `otherwise`: the job would not fit, or would be slower."""
    changes: dict[str, Any] = {key: otherwise}
    if key in ("weights", "disk_blocks"):
        changes["disk_weights"] = False  # which asks for both
    without = replace(found, **changes)
    if key in ("weights", "outer") and context.why_missing(without) is not None:  # the other may make room
        changes |= {"moments": found.moments, "disk_blocks": found.disk_blocks, "disk_weights": False}
        its = given.completed(**changes)
        others = (without, _fitting(context, its, its.typed))
        without = min(others, key=context.missing_bytes)
    missing = context.why_missing(without)
    if missing is not None and "graphs" not in given:  # which give way
        without = replace(without, graphs=False)
        missing = context.why_missing(without)
    if missing is not None:
        return f"without it the job {missing}"
    times = (context.step_s(finished(context, given, each)) for each in (found, without))
    with_it, without_it = map(format_seconds, times)
    return f"with the room that it leaves a step takes {with_it}, without it {without_it}"


def _of_disk(context: PlanningContext, settings: ExactOffloadSettings) -> list[str]:
    """What a step reads and writes there, if anything, how long a drive stands that, and what it takes at the
    least where the machine's was not measured."""
    cost = context.cost(settings)
    if not cost.disk_bytes:
        return []
    read = format_bytes(cost.disk_bytes)
    if settings.disk_weights:
        told = [
            f"disk: {read} are read and {format_bytes(cost.disk_write_bytes)} written in each step, where "
            "disk_folder says; weights come from there, too"
        ]
    else:
        told = [
            f"disk: {read} are read and written in each step, where disk_folder says"
            + _less_of_disk(settings)
        ]
    steps = ENDURED_BYTES / cost.disk_write_bytes
    told.append(f"disk: {steps:,.0f} such steps write 600 TB, for which a drive of 1 TB is commonly made")
    if context.machine.disk is None:
        least_s = (cost.disk_bytes + cost.disk_write_bytes) / FAST_DISK_BYTES_PER_S
        told.append(
            "disk: no rate of this machine's is known; at 7 GB/s that alone takes "
            f"{format_seconds(least_s)} a step"
        )
    return told


def _less_of_disk(settings: ExactOffloadSettings) -> str:
    """What moments that are more approximate take of it."""
    return {
        "fp32": "; moments=bf16 or int8, which are approximate, take 0.6 or 0.4 of it",
        "bf16": "; moments=int8, which are more approximate, take 0.7 of it",
        "int8": "",
    }[settings.moments]


def _per_parameter(context: PlanningContext, settings: ExactOffloadSettings) -> str:
    """What a parameter of the blocks takes of each memory."""
    element, blocks = BYTES_PER_ELEMENT[context.workload.dtype], context.shape.num_blocks
    on_gpu = f"{element} bytes on the GPU"
    if settings.streams:
        on_gpu += f" for {settings.weight_slots} blocks at a time"
    on_host = f"{element + state_bytes(element, settings.moments):.3g} bytes on the host"
    if settings.disk_blocks:
        on_host += f" ({element} of them where the rest is on disk)"
    whose, there = "the blocks", blocks - settings.updated_by_gpu(blocks)
    if there < blocks:
        whose = f"the {there} blocks that the CPU updates"
    return (
        f"per parameter of {whose}: {on_gpu}, {on_host}, and room for "
        f"the gradients of {gradient_places(blocks, settings)} of {there} blocks"
    )


def _fitting(
    context: PlanningContext, given: GivenSettings, settings: ExactOffloadSettings
) -> ExactOffloadSettings:
    """What fits: in memory, else partly on disk, else with room for the fewest gradients. Where nothing does,
    what takes the least of the memory that is too small."""
    search = _Search.of(context, given, settings)
    return (
        search.in_memory() or search.partly_on_disk() or search.with_fewest_gradients() or search.smallest()
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Search:
    """What may be tried for a job, each setting in the order in which it is."""

    context: PlanningContext
    given: GivenSettings
    settings: ExactOffloadSettings
    """Of those that are not tried."""
    moments: tuple[Moments, ...]
    weights: tuple[Weights, ...]
    outer: tuple[_Place, ...]
    hidden_states: tuple[_Place, ...]
    rooms: tuple[int | Literal["auto"], ...]
    """For gradients: `gradient_blocks`."""

    @classmethod
    def of(cls, context: PlanningContext, given: GivenSettings, settings: ExactOffloadSettings) -> Self:
        """What is not `given`."""
        few = few_gradient_blocks(context.shape.num_blocks)
        rooms: tuple[int | Literal["auto"], ...] = (settings.gradient_blocks,)
        if _chooses_room(given, settings) and few < context.shape.num_blocks:
            rooms = ("auto", few)
        return cls(
            context=context,
            given=given,
            settings=settings,
            moments=(settings.moments,) if "moments" in given else MOMENTS,
            weights=(settings.weights,) if "weights" in given or settings.gpu_blocks else WEIGHTS,
            outer=(settings.outer,) if "outer" in given else OUTER,
            hidden_states=(settings.hidden_states,) if "hidden_states" in given else HIDDEN_STATES,
            rooms=rooms,
        )

    def in_memory(self) -> ExactOffloadSettings | None:
        """The least approximate moments that fit; then the fastest of room for all blocks' gradients or a
        third's, of where weights and hidden states are and of who updates what is outside the blocks, the GPU
        where it is as fast; with blocks left to the GPU, if need be."""
        for moments in self.moments:
            tried = [
                replace(each, gradient_blocks=room) for room in self.rooms for each in self._places(moments)
            ]
            fitting = [each for each in tried if self._fits(each)] or self._left_to_gpu(tried)
            if fitting:
                return _fastest(self.context, self.given, fitting)
        return None

    def partly_on_disk(self) -> ExactOffloadSettings | None:
        """Exact moments with the states of some blocks on disk, and where that is not enough with their
        weights there, too."""
        if "disk_blocks" in self.given or not self.settings.offload:
            return None
        exact = [replace(each, gradient_blocks=self.rooms[-1]) for each in self._places(self.moments[0])]
        moves_weights = "disk_weights" not in self.given and self.context.ranks == 1
        for disk_weights in (False, True) if moves_weights else (False,):
            tried = [each for each in exact if each.weights == "streamed" or not disk_weights]
            found = [_partly_on_disk(self.context, each, disk_weights=disk_weights) for each in tried]
            if fitting := [each for each in found if each is not None]:
                return _fastest(self.context, self.given, fitting)
        return None

    def with_fewest_gradients(self) -> ExactOffloadSettings | None:
        if not _chooses_room(self.given, self.settings):
            return None
        fewest = replace(self.settings, gradient_blocks=FEWEST_GRADIENT_BLOCKS)
        found = _fitting(self.context, self.given, fewest)
        return found if self._fits(found) else None

    def smallest(self) -> ExactOffloadSettings:
        """Of exact moments where the GPU is too small even so, else of the most approximate."""
        gpu_bytes = self.context.budget.gpu_bytes
        smallest = replace(
            self.settings, moments=self.moments[-1], weights=self.weights[-1], outer=self.outer[0]
        )
        exact = replace(
            smallest, moments=self.moments[0], outer=self.outer[-1], hidden_states=self.hidden_states[-1]
        )
        if gpu_bytes is None:
            return smallest
        needed_bytes = gpu_bytes_needed(self.context.cost(exact), self.context.budget)
        return exact if needed_bytes > gpu_bytes else smallest

    def _places(self, moments: Moments) -> list[ExactOffloadSettings]:
        """Every choice of where weights, hidden states and what is outside the blocks are."""
        return [
            replace(self.settings, moments=moments, weights=weights, outer=outer, hidden_states=hidden_states)
            for hidden_states in self.hidden_states
            for weights in self.weights
            for outer in self.outer
        ]

    def _left_to_gpu(self, tried: Sequence[ExactOffloadSettings]) -> list[ExactOffloadSettings]:
        """The first that fits with the fewest blocks left to the GPU, if any does."""
        if not may_leave_blocks_to_gpu(self.context, self.given, self.settings):
            return []
        counts = counts_to_try(most_gpu_blocks(self.context, self.settings))
        some = (replace(each, gpu_blocks=n) for n in counts for each in tried if not each.streams)
        return list(islice((each for each in some if self._fits(each)), 1))

    def _fits(self, settings: ExactOffloadSettings) -> bool:
        return self.context.why_missing(settings) is None


def _chooses_room(given: GivenSettings, settings: ExactOffloadSettings) -> bool:
    return "gradient_blocks" not in given and settings.gradient_blocks == "auto"


def _fastest(
    context: PlanningContext, given: GivenSettings, fitting: Sequence[ExactOffloadSettings]
) -> ExactOffloadSettings:
    """The first that is nearly as fast as any, by prediction, each with what else is chosen for it."""
    times = [context.step_s(finished(context, given, each)) or 0.0 for each in fitting]
    enough_s = NEAR_FASTEST * min(times)
    return next(each for each, time_s in zip(fitting, times, strict=True) if time_s <= enough_s)


def _partly_on_disk(
    context: PlanningContext, settings: ExactOffloadSettings, *, disk_weights: bool
) -> ExactOffloadSettings | None:
    """`settings` with the states of as few blocks on disk as must be; `None`: they do not fit even so."""

    def with_blocks(count: int) -> ExactOffloadSettings:
        return replace(settings, disk_blocks=count, disk_weights=settings.disk_weights or disk_weights)

    def fits(count: int) -> bool:
        return context.why_missing(with_blocks(count)) is None

    blocks = context.shape.num_blocks
    if not fits(blocks):
        return None
    fewest = bisect_left(range(1, blocks), True, key=fits) + 1
    return with_blocks(fewest)
