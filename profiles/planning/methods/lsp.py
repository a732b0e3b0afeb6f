"""Settings of LSP-Offload: where weights are, the size of subspaces, nonzeros per row, CUDA graphs. No torch.

Closed forms throughout: `profiles.planning.predict`. Sizes that are considered: `subspace_sizes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from engines.costs.resources.traffic import Traffic
from engines.settings.given import GivenSettings, Value
from engines.settings.lsp import LSP_PRESETS, LspSettings, sizes_by_shape
from engines.settings.lsp_layout import compresses, core_elements, core_size
from profiles.planning.budget import gpu_bytes_needed, shortages
from profiles.planning.context import BESIDE_GPU, Choice, PlanningContext, SettingChange
from profiles.planning.lsp_quality import quality_reasons
from profiles.planning.not_chosen import faster_moments, with_price_of_streaming
from profiles.planning.recomputation import fewest_recomputed
from profiles.planning.subspace_sizes import hides, largest_hidden, lsp_ladder
from profiles.units import format_seconds

WAYS_OUT = (
    SettingChange(
        values={"train_outer": False},
        quality="embeddings, head, norms and biases stay as they are; what that costs was not studied",
    ),
)


STREAMED_FASTER, STREAMED_AS_FAST = 0.95, 1.05
"""A step with streamed weights within the first factor of that with all of them on the GPU is worth its
copies; within the second where the room that they leave, and that is short, makes subspaces larger."""


def choose(context: PlanningContext, given: GivenSettings) -> Choice:
    """Weights on the GPU where they fit there beside the smallest subspaces, else streamed, or where the room
    that they leave, and that is short, makes a step faster or subspaces larger."""
    if not context.shape.matrices:
        return Choice(given)
    placed = _weights(context, given)
    found = _choose_for_weights(context, given, placed)
    settings: LspSettings = found.settings.typed
    if placed.reasons:
        return with_price_of_streaming(context, given, found, _resident, WAYS_OUT)
    if "weights" in given or context.machine.gpu is None or not settings.offload or settings.residual:
        return found
    again = settings.recomputed(context.shape.num_blocks, checkpointing=context.workload.checkpointing)
    has_room = not (again or (settings.graphs is False and "graphs" not in given))
    if has_room:
        # Streamed, all micro-batches would hide updates, not the last alone: slower, or no faster, where it
        # was measured, as no graph starts the blocks then (engines/EXPERIMENTS.md).
        return found
    streamed = given.completed(weights="streamed")
    other = _choose_for_weights(context, streamed, Choice(streamed))
    its: LspSettings = other.settings.typed
    elements, its_elements = (core_elements(context.shape, each) for each in (settings, its))
    before, after = (context.step_s(each) for each in (settings, its))
    if its_elements < elements or before is None or after is None or context.why_missing(its) is not None:
        return found
    if after > (STREAMED_FASTER if its_elements == elements else STREAMED_AS_FAST) * before:
        return found
    times = f"{format_seconds(after)} a step, else {format_seconds(before)}"
    why = f"weights=streamed: they leave more room to activations and subspaces, {times}"
    return Choice(other.settings, (why, *other.reasons))


def _resident(context: PlanningContext, given: GivenSettings) -> LspSettings:
    """As chosen for weights that stay on the GPU, whether they fit there or not."""
    stay = given.completed(weights="resident")
    typed: LspSettings = _choose_for_weights(context, stay, Choice(stay)).settings.typed
    return typed


def _choose_for_weights(context: PlanningContext, given: GivenSettings, placed: Choice) -> Choice:
    """As few recomputed blocks as fit; the largest d that fits then and whose copies and CPU update hide;
    then r."""
    shape = context.shape
    recomputed = _recomputed(context, placed.settings)
    given = recomputed.settings
    planner = _Planner(context=context, given=given)
    chosen, smallest, why_sizes = planner.sizes()
    reasons = [*placed.reasons, *recomputed.reasons, *why_sizes]
    if "r" not in given:
        wanted = 4 if shape.hidden >= 1024 else 8
        chosen["r"] = min(wanted, smallest, *(min(each.rows, each.columns) for each in shape.matrices))
        reasons.append(
            f"r={chosen['r']}: nonzeros per projector row, as published for this size ({shape.hidden} hidden)"
        )
    typed: LspSettings = given.completed(**chosen).typed
    reasons += quality_reasons(planner.smallest_share(typed), shape.parameters, residual=typed.residual > 0)
    if "schedule_order" not in given:
        chosen["schedule_order"] = "layerwise"
        reasons.append(
            f"schedule_order=layerwise: of {shape.num_blocks} blocks' updates only the last one's tail shows"
        )
    if "graphs" not in given:
        typed = given.completed(**chosen).typed
        missing = context.why_missing(typed)
        plain = replace(typed, graphs=False)
        if missing is not None and context.why_missing(plain) is None:
            chosen["graphs"] = False
            reasons.append(f"graphs=false: with CUDA graphs and their pool it {missing}")
        elif missing is not None and _missing_bytes(context, plain) < _missing_bytes(context, typed):
            chosen["graphs"] = False  # neither fits: the smaller shortage is told
    reasons += planner.of_moments(chosen)
    published = LSP_PRESETS.get(shape.name)
    if published is not None and any(given.get(key) != value for key, value in published.items()):
        reasons.append(
            f"not used here unless set: what is published for this model, d={published['d']}, "
            f"r={published['r']} and learned projectors (--set {context.engine}.preset={shape.name})"
        )
    return Choice(given.completed(**chosen), tuple(reasons))


def _recomputed(context: PlanningContext, given: GivenSettings) -> Choice:
    """As few recomputed blocks as fit beside the smallest subspaces, unless d says how large they are."""
    with_d = given if "d" in given else given.completed(d=lsp_ladder(context.shape.hidden)[0])
    if with_d.typed.d == "auto":
        return Choice(given)
    found = fewest_recomputed(context, with_d)
    more = {name: value for name, value in found.settings.items() if name not in with_d}
    return Choice(given.completed(**more), found.reasons)


def _missing_bytes(context: PlanningContext, settings: LspSettings) -> int:
    return sum(each.missing_bytes for each in shortages(context.cost(settings), context.budget))


def _weights(context: PlanningContext, given: GivenSettings) -> Choice:
    """`weights`, where nothing says where they are."""
    settings: LspSettings = given.completed(graphs=False).typed
    if "weights" in given or context.machine.gpu is None or settings.residual:
        return Choice(given)
    if "d" not in given or (settings.d == "auto" and not settings.d_by_shape):
        settings = replace(settings, d=lsp_ladder(context.shape.hidden)[0])
    missing = context.why_missing(settings)
    streamed = replace(settings, weights="streamed")
    gpu_bytes = context.budget.gpu_bytes
    is_gpu_small = (
        gpu_bytes is not None and gpu_bytes_needed(context.cost(settings), context.budget) > gpu_bytes
    )
    asks_for_graphs = "graphs" in given and settings.graphs
    if missing is None or not settings.offload or not is_gpu_small or asks_for_graphs:
        return Choice(given)
    kept = context.why_missing(streamed)
    # Where another memory is too small, it is with them there all the more: what lacks less is told.
    streamed_fits_gpu = gpu_bytes_needed(context.cost(streamed), context.budget) <= (gpu_bytes or 0)
    lacks_less = _missing_bytes(context, settings) <= _missing_bytes(context, streamed)
    if kept is not None and streamed_fits_gpu and lacks_less:
        return Choice(given)
    return Choice(given.completed(weights="streamed"), (f"weights=streamed: without it the job {missing}",))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Planner:
    context: PlanningContext
    given: GivenSettings

    def sizes(self) -> tuple[dict[str, Value], int, list[str]]:
        """What is chosen of d and d_by_shape, the smallest d that is used, and why."""
        shape, settings = self.context.shape, self.given.typed
        if "d" not in self.given:
            d, reason = self.size()
            return {"d": d}, d, [reason]
        if settings.d == "auto" and not settings.d_by_shape:
            found = largest_hidden(
                shape,
                self.context.machine,
                self.context.workload,
                self.cost_by_shape,
                lambda d_by_shape: self.fits_without_graphs(self._of_shapes(d_by_shape)),
                block_major=settings.block_major,
            )
            why = f"d_by_shape={found.text}: {found.reason}"
            return {"d_by_shape": found.text}, min(found.d.values()), [why]
        reasons = []
        if not compresses(shape, settings):
            largest = max(min(each.rows, each.columns) for each in shape.matrices)
            reasons.append(
                f"d={settings.d}: nothing is compressed, as no matrix has more than {largest} on its smaller "
                "dimension"
            )
        return {}, min(core_size(each.rows, each.columns, settings) for each in shape.matrices), reasons

    def size(self) -> tuple[int, str]:
        """One d for all weights, and why."""
        context, ladder = self.context, lsp_ladder(self.context.shape.hidden)
        fitting = [d for d in ladder if self.fits_without_graphs(self._of_size(d))]
        smallest, largest = ladder[0], (fitting or ladder[:1])[-1]
        if not fitting:
            return smallest, f"d={smallest}: the smallest considered, and it does not fit"
        if context.machine.gpu is None:
            return (
                largest,
                f"d={largest}: the largest considered that fits; without a GPU copies have nowhere to hide",
            )
        for d in reversed(fitting):
            settings = self._of_size(d)
            times = context.resource_s(settings)
            if times is None:
                return smallest, f"d={smallest}: the machine profile lacks figures, so the smallest is safe"
            slowest = max(BESIDE_GPU, key=times.__getitem__)
            # Only the last micro-batch has anything to update, so only its compute can hide that.
            micro_batches = 1 if settings.block_major else context.workload.accumulation
            gpu_s = times["gpu"] / micro_batches
            balance = (
                f"{slowest} {format_seconds(times[slowest])} against {format_seconds(gpu_s)} of GPU time"
            )
            if micro_batches > 1:
                balance += " in one micro-batch"
            streamed_s = self._streamed_s(smallest)
            if streamed_s > gpu_s:
                balance += f" and {format_seconds(streamed_s)} of streaming"
            elements = context.shape.num_blocks * core_elements(context.shape, settings)
            if hides(times, gpu_s, streamed_s):
                return (
                    d,
                    f"d={d}: the largest that hides and fits ({elements / 1e6:.0f} M elements, {balance})",
                )
        return d, f"d={d}: the smallest considered; even so the copies or the CPU do not hide ({balance})"

    def of_moments(self, chosen: Mapping[str, Value]) -> list[str]:
        """That moments which were set are approximate, or what such would bring beside what is `chosen`."""
        settings: LspSettings = self.given.typed
        if settings.moments != "fp32":
            return [f"approximate: Adam's moments of the subspaces in {settings.moments}"]
        if "moments" in self.given:
            return []
        typed = self.given.completed(**chosen).typed
        more = self.larger_with_bf16(chosen) or faster_moments(self.context, typed, ("bf16",))
        return [] if more is None else [more]

    def larger_with_bf16(self, chosen: Mapping[str, Value]) -> str | None:
        """What moments in bf16, which are approximate, would let hide; `None`: no larger d, or d is given."""
        if "d" not in chosen or self.context.machine.gpu is None:
            return None
        other = replace(self, given=self.given.completed(moments="bf16"))
        d, _ = other.size()
        if d <= int(chosen["d"]):
            return None
        return (
            f"not chosen unless set: moments=bf16, which is approximate, would let d={d} hide in place of "
            f"{chosen['d']}"
        )

    def _streamed_s(self, smallest: int) -> float:
        """Seconds that streaming the weights takes with the `smallest` cores; 0 where they stay."""
        context, settings = self.context, self._of_size(smallest)
        times = context.resource_s(settings)
        return max(times["h2d"], times["d2h"]) if settings.streams and times is not None else 0.0

    def _of_size(self, d: int) -> LspSettings:
        smallest = min(d, *(min(each.rows, each.columns) for each in self.context.shape.matrices))
        return replace(self._with_r(smallest), d=d)

    def _with_r(self, smallest: int) -> LspSettings:
        """Unless `r` is given, the published one or what the `smallest` side allows."""
        settings: LspSettings = self.given.completed(r=min(4, smallest)).typed
        return settings

    def _of_shapes(self, d_by_shape: str) -> LspSettings:
        settings = self._with_r(min(sizes_by_shape(d_by_shape).values()))
        return replace(settings, d="auto", d_by_shape=d_by_shape)

    def cost_by_shape(self, d_by_shape: str) -> Traffic:
        return self.context.cost(self._of_shapes(d_by_shape))

    def fits_without_graphs(self, settings: LspSettings) -> bool:
        """CUDA graphs, which only save launches, and their pool give way to a larger d."""
        if "graphs" not in self.given:
            settings = replace(settings, graphs=False)
        return self.context.why_missing(settings) is None

    def smallest_share(self, settings: LspSettings) -> float:
        """The smallest d over a weight's smaller dimension."""
        sides = [(each.rows, each.columns) for each in self.context.shape.matrices]
        return min(core_size(*each, settings) / min(each) for each in sides)
