"""The settings of one engine for one job on one machine, and the reason for each. Pure; no torch.

Closed forms throughout: `profiles.planning.predict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from engines.costs.disk import fewest_on_disk
from engines.costs.lsp import core_elements, core_size
from engines.costs.table import traffic as cost_of
from engines.costs.traffic import Traffic
from engines.costs.zo2 import resident_indices
from engines.settings.lsp import LSP_PRESETS, LspSettings, sizes_by_shape
from engines.settings.parse import parse_settings
from engines.settings.zeroth_order import MOST_PENDING, Zo2Settings
from engines.shapes import ModelShape, Workload
from profiles.machine import Machine
from profiles.planning.budget import FREE_SHARE, Budget, gpu_bytes_needed, host_bytes_needed, why_missing
from profiles.planning.fold_every import fold_for_loss, told_of_given
from profiles.planning.plan import Value
from profiles.planning.predict import predict, resource_s
from profiles.planning.subspace_sizes import HIDING_SHARE, largest_hidden, lsp_ladder, told_of_quality
from profiles.units import format_bytes, format_seconds

AS_FAST = 1.10
"""A step within this factor of the fastest counts as equally fast."""

FOLDS = (1, 2, 4, 8, 16)
"""What zo2's `fold_every` is chosen from."""

FOLD_AS_FAST = 1.01
"""A step within this factor of the fastest `fold_every` counts as equally fast."""

FOLD_GPU_SHARE = 0.85
"""GPU time over link time up to which updates are replayed instead of downloaded: both are predicted, and
downloads that hide behind the GPU cost nothing, while replaying that does not hide costs its whole time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Times:
    """Predicted seconds of a step, and of the resources that zo2's downloads are weighed by."""

    step_s: float
    gpu_s: float
    h2d_s: float
    link_s: float
    """Of the slowest thing that copies need."""

    @staticmethod
    def of(cost: Traffic, machine: Machine, workload: Workload) -> _Times | None:
        """`None` if the profile lacks a figure."""
        step_s, busy = predict(cost, machine, workload).step_s, resource_s(cost, machine, workload)
        if step_s is None or busy is None:
            return None
        link_s = max(busy["h2d"], busy["d2h"], busy["host memory"])
        return _Times(step_s=step_s, gpu_s=busy["gpu"], h2d_s=busy["h2d"], link_s=link_s)


class Choice:
    """The settings of one engine for one job on one machine."""

    def __init__(
        self,
        engine: str,
        machine: Machine,
        shape: ModelShape,
        workload: Workload,
        override: Mapping[str, object],
        budget: Budget,
    ) -> None:
        self._engine = engine
        self._machine = machine
        self._shape = shape
        self._workload = workload
        self._override = cast(Mapping[str, Value], override)
        self._budget = budget

    def settings(self) -> tuple[dict[str, Value], tuple[str, ...]]:
        """Chosen and overridden settings, and one reason per choice."""
        match self._engine:
            case "lsp":
                return self._lsp()
            case "zo2":
                return self._zo2()
            case "mezo":
                return self._mezo()
            case "torchao-offload":
                return self._torchao()
            case _:
                return dict(self._override), ()

    def cost(self, settings: Mapping[str, Value]) -> Traffic:
        """Raises `UserError` for an unknown engine or a setting that it does not have."""
        return cost_of(self._engine, self._shape, self._workload, parse_settings(self._engine, {**settings}))

    def _with(self, **chosen: Value) -> dict[str, Value]:
        merged = {**chosen, **self._override}
        if self._engine == "zo2" and merged.get("disk_blocks", "auto") == "auto":
            merged["disk_blocks"] = 0
            on_disk = self._fewest_on_disk(merged)
            if on_disk or "disk_blocks" in self._override:
                merged["disk_blocks"] = on_disk
            else:
                del merged["disk_blocks"]
        return merged

    def _most_resident(self) -> int:
        """All blocks but those that are to be on disk."""
        given: Zo2Settings = parse_settings("zo2", self._override)
        return self._shape.num_blocks - given.named_disk_blocks

    def _fewest_on_disk(self, without: Mapping[str, Value]) -> int:
        """Blocks that host memory has no room for; `without` are the settings with none on disk."""
        cost = self.cost(without)
        if not cost.pinned_bytes:
            return 0
        block_bytes = max(layer.h2d_bytes for layer in cost.layers)
        streamed = cost.pinned_bytes // block_bytes
        others_bytes = host_bytes_needed(cost, self._budget) - cost.pinned_bytes
        return fewest_on_disk([block_bytes] * streamed, self._budget.host_bytes - others_bytes)

    def _torchao(self) -> tuple[dict[str, Value], tuple[str, ...]]:
        kept = self._with(offload_gradients=False)
        freed = self._with(offload_gradients=True)
        if "offload_gradients" in self._override or why_missing(self.cost(kept), self._budget) is None:
            return dict(self._override), ()
        if self._workload.accumulation == 1 and why_missing(self.cost(freed), self._budget) is None:
            saved = self.cost(kept).peak_gpu_bytes - self.cost(freed).peak_gpu_bytes
            return freed, (
                f"offload_gradients=true: frees {format_bytes(saved)} of gradients, which do not fit",
            )
        return dict(self._override), ()

    def _mezo(self) -> tuple[dict[str, Value], tuple[str, ...]]:
        given = parse_settings("mezo", self._override)
        if "fold_every" in self._override:
            warning = told_of_given(given)
            return dict(self._override), () if warning is None else (warning,)
        best = fold_for_loss(given)
        return (dict(self._override), ()) if best is None else (self._with(fold_every=best[0]), (best[1],))

    def _zo2(self) -> tuple[dict[str, Value], tuple[str, ...]]:
        """Resident blocks, which take their copies off the link, then how often the others go down."""
        chosen: dict[str, Value] = {}
        reasons: list[str] = []
        if "resident_blocks" not in self._override:
            chosen["resident_blocks"], reason = self._resident_blocks()
            reasons.append(reason)
        elif self._machine.gpu is not None:
            where = self._where(parse_settings("zo2", self._override).resident_blocks)
            reasons += [f"{where} on the GPU"] if where else []
        if "fold_every" not in self._override:
            chosen["fold_every"], reason = self._fold_every(chosen)
            reasons.append(reason)
        elif (warning := told_of_given(parse_settings("zo2", self._override))) is not None:
            reasons.append(warning)
        settings = self._with(**chosen)
        if settings.get("disk_blocks") and self._override.get("disk_blocks", "auto") == "auto":
            cost = self.cost(settings)
            reasons.append(
                f"disk_blocks={settings['disk_blocks']}: host memory has no room for them; "
                f"{format_bytes(cost.disk_bytes)} are read per step from where disk_folder says"
            )
        return settings, tuple(reasons)

    def _resident_blocks(self) -> tuple[int, str]:
        """Of a limit that the user named, all is used. Otherwise a tenth of the GPU stays free, since what is
        free now may be taken later, and of the rest no more is used than makes the step faster: streaming
        that hides behind compute costs nothing, and little memory is what the method is for.
        """
        blocks = self._shape.num_blocks
        if self._budget.gpu_bytes is None:
            return 0, "resident_blocks=0: there is no GPU to keep them on; all go the way they would to one"
        named = self._budget.gpu_named
        usable = int(self._budget.gpu_bytes * (1 if named else 1 - FREE_SHARE))
        # How often blocks go down does not change memory.
        costs = {
            count: self.cost(self._with(resident_blocks=count)) for count in range(self._most_resident() + 1)
        }
        fitting = [count for count in costs if why_missing(costs[count], self._budget) is None]
        if not fitting:
            return 0, "resident_blocks=0: the least memory; it does not fit"
        fitting = [count for count in fitting if gpu_bytes_needed(costs[count]) <= usable] or fitting[:1]
        most = fitting[-1]
        resident = most if named else self._fewest_as_fast(fitting)
        why = f"as many as {format_bytes(usable)} of GPU memory hold"
        if resident < most:
            why = f"{most} would fit, but are no faster: the copies hide behind the GPU's work"
        moved = f"the other {blocks - resident} take {format_bytes(costs[resident].h2d_bytes)} up per step"
        if resident == blocks:
            moved = "nothing moves"
        where = f" ({self._where(resident)})" if resident else ""
        return resident, f"resident_blocks={resident}{where}: {why}; {moved}"

    def _where(self, resident: int) -> str:
        """Which blocks stay on the GPU, counted from 0; empty for none."""
        indices = sorted(resident_indices(self._shape.num_blocks, resident))
        if len(indices) == self._shape.num_blocks:
            return "all blocks stay"
        named = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in _ranges(indices))
        return f"block {named} stays" if len(indices) == 1 else f"blocks {named} stay" if indices else ""

    def _fewest_as_fast(self, fitting: Sequence[int]) -> int:
        """The fewest resident blocks whose predicted step is as fast as that of the most that fit."""
        best = self._step_s(fitting[-1])
        if best is None:
            return fitting[-1]
        return next(
            k for k in fitting if (time_s := self._step_s(k)) is not None and time_s <= AS_FAST * best
        )

    def _step_s(self, resident: int) -> float | None:
        """Predicted with so many resident blocks and the `fold_every` that suits them."""
        chosen: dict[str, Value] = {"resident_blocks": resident}
        if "fold_every" not in self._override:
            chosen["fold_every"], _ = self._fold_every(chosen)
        return predict(self.cost(self._with(**chosen)), self._machine, self._workload).step_s

    def _fold_every(self, chosen: Mapping[str, Value]) -> tuple[int, str]:
        """The fewest steps between downloads of a block that are as fast as any, the GPU having time to
        replay what the host does not have. `chosen` are the other settings. With a low-bit base the loss
        decides.
        """
        given = parse_settings("zo2", self._override)
        if (best := fold_for_loss(given)) is not None:
            return best
        if given.estimator == "lozo":
            return 1, f"fold_every=1: every {given.lozo_window} steps, when the noise's window ends"
        costs = {
            k: self.cost(self._with(**chosen, fold_every=k))
            for k in FOLDS
            if k * given.queries <= MOST_PENDING
        }
        every = costs[1]
        if self._machine.gpu is None:
            return 1, "fold_every=1: there is no link to relieve"
        if not every.d2h_bytes:
            return 1, "fold_every=1: nothing goes down"
        times = {k: _Times.of(cost, self._machine, self._workload) for k, cost in costs.items()}
        first = times[1]
        if first is None:
            return 1, "fold_every=1: the machine profile lacks figures, so the published schedule is kept"
        fitting = {
            k: time
            for k, time in times.items()
            if time and (k == 1 or time.gpu_s <= FOLD_GPU_SHARE * time.link_s)
        }
        best_s = min(time.step_s for time in fitting.values())
        k = next(k for k, time in fitting.items() if time.step_s <= FOLD_AS_FAST * best_s)
        told = f"up {format_seconds(fitting[k].h2d_s)}, GPU {format_seconds(fitting[k].gpu_s)}"
        down = format_bytes(costs[k].d2h_bytes)
        if k > 1:
            return k, (
                f"fold_every={k}: a download every {k}{'nd' if k == 2 else 'th'} step: {told}, "
                f"{down} down per step instead of {format_bytes(every.d2h_bytes)}"
            )
        why = "fewer downloads are no faster"
        if first.gpu_s >= first.link_s:
            why = "downloads hide behind the GPU's work"
        elif len(fitting) == 1:
            why = "the GPU has no time to replay updates instead"
        return 1, f"fold_every=1: {why} ({told}, {down} down per step)"

    def _lsp(self) -> tuple[dict[str, Value], tuple[str, ...]]:
        """The largest d that fits in memory and whose copies and CPU update hide behind the GPU; then r."""
        reasons: list[str] = []
        chosen: dict[str, Value] = {}
        given = parse_settings(self._engine, {**self._override}) if "d" in self._override else None
        if given is None:
            d, reason = self._lsp_d()
            chosen["d"] = d
            reasons.append(reason)
        elif given.d == "auto" and not given.d_by_shape:
            sizes = largest_hidden(
                self._shape, self._machine, self._workload, self._lsp_cost_by_shape, self._fits_without_graphs
            )
            chosen["d_by_shape"] = sizes.text
            d = min(sizes.d.values())
            reasons.append(f"d_by_shape={sizes.text}: {sizes.reason}")
        else:
            d = min(core_size(each.rows, each.columns, given) for each in self._shape.matrices)
        if "r" not in self._override:
            smallest = min(d, *(min(each.rows, each.columns) for each in self._shape.matrices))
            wanted = 4 if self._shape.hidden >= 1024 else 8
            chosen["r"] = min(wanted, smallest)
            reasons.append(
                f"r={chosen['r']}: nonzeros per projector row, as published for this size "
                f"({self._shape.hidden} hidden)"
            )
        reasons.append(told_of_quality(self._smallest_share(chosen)))
        if "schedule_order" not in self._override:
            chosen["schedule_order"] = "layerwise"
            blocks = self._shape.num_blocks
            reasons.append(
                f"schedule_order=layerwise: of {blocks} blocks' updates only the last one's tail shows"
            )
        if "graphs" not in self._override:
            without = {**chosen, "graphs": False}
            missing = why_missing(self.cost(self._with(**chosen)), self._budget)
            if missing is not None and why_missing(self.cost(self._with(**without)), self._budget) is None:
                chosen["graphs"] = False
                reasons.append(f"graphs=false: with CUDA graphs and their pool it {missing}")
        published = LSP_PRESETS.get(self._shape.name)
        if published is not None:
            reasons.append(
                f"not used here unless set: what is published for this model, d={published['d']}, "
                f"r={published['r']} and learned projectors (--set lsp.preset={self._shape.name})"
            )
        return self._with(**chosen), tuple(reasons)

    def _smallest_share(self, chosen: Mapping[str, Value]) -> float:
        settings: LspSettings = parse_settings(self._engine, self._with(**chosen))
        sides = [(each.rows, each.columns) for each in self._shape.matrices]
        return min(core_size(*each, settings) / min(each) for each in sides)

    def _fits_without_graphs(self, cost: Traffic) -> bool:
        """CUDA graphs, which only save launches, give way to a larger d."""
        held = cost.gpu_held_bytes if "graphs" not in self._override else 0
        return why_missing(replace(cost, gpu_held_bytes=cost.gpu_held_bytes - held), self._budget) is None

    def _lsp_cost_by_shape(self, d_by_shape: str) -> Traffic:
        smallest = min(sizes_by_shape(d_by_shape).values())
        values = {**self._override, "d": "auto", "d_by_shape": d_by_shape}
        return self.cost({**values, "r": self._override.get("r", min(4, smallest))})

    def _lsp_d(self) -> tuple[int, str]:
        ladder = lsp_ladder(self._shape.hidden)
        fitting = [d for d in ladder if self._fits_without_graphs(self._lsp_cost(d))]
        smallest, largest = ladder[0], (fitting or ladder[:1])[-1]
        if not fitting:
            return smallest, f"d={smallest}: the smallest considered, and it does not fit"
        if self._machine.gpu is None:
            return (
                largest,
                f"d={largest}: the largest considered that fits; without a GPU copies have nowhere to hide",
            )
        for d in reversed(fitting):
            times = resource_s(self._lsp_cost(d), self._machine, self._workload)
            if times is None:
                return smallest, f"d={smallest}: the machine profile lacks figures, so the smallest is safe"
            slowest = max(("h2d", "d2h", "cpu", "host memory"), key=times.__getitem__)
            # Only the last micro-batch has anything to update, so only its compute can hide that.
            micro_batches = self._workload.accumulation
            gpu_s = times["gpu"] / micro_batches
            told = f"{slowest} {format_seconds(times[slowest])} against {format_seconds(gpu_s)} of GPU time"
            if micro_batches > 1:
                told += " in one micro-batch"
            elements = self._shape.num_blocks * core_elements(self._shape, self._lsp_settings(d))
            if times[slowest] <= HIDING_SHARE * gpu_s:
                return d, f"d={d}: the largest that hides and fits ({elements / 1e6:.0f} M elements, {told})"
        return d, f"d={d}: the smallest considered; even so the copies or the CPU do not hide ({told})"

    def _lsp_cost(self, d: int) -> Traffic:
        return self.cost(self._lsp_values(d))

    def _lsp_settings(self, d: int) -> LspSettings:
        settings: LspSettings = parse_settings(self._engine, self._lsp_values(d))
        return settings

    def _lsp_values(self, d: int) -> dict[str, Value]:
        smallest = min(d, *(min(each.rows, each.columns) for each in self._shape.matrices))
        return {**self._override, "d": d, "r": self._override.get("r", min(4, smallest))}


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of successive numbers; `numbers` ascend."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
