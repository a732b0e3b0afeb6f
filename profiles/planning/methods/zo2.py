"""Settings of ZO2: which blocks stay on the GPU, which lie on disk, how often the others go down. No torch.

Closed forms throughout: `profiles.planning.predict`. What is chosen depends on what else is, and all of it is
one forecast.

Longer than 400 lines: blocks that stay, that lie on disk and that go down rarely are chosen together, each by
what the others leave of the same memory and time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engines.costs.resources.traffic import Traffic
from engines.costs.zo2 import resident_indices
from engines.settings.given import GivenSettings, Value
from engines.settings.zeroth_order import MOST_DEFERRED, MOST_QUERIES, Zo2Settings
from profiles.machine import Machine
from profiles.planning.budget import gpu_bytes_needed, num_on_disk, why_missing
from profiles.planning.context import AS_FAST, Choice, PlanningContext
from profiles.planning.fold_every import fold_for_loss, warning_on_given
from profiles.units import format_bytes, format_seconds

SHARDED_FASTER = 0.95
"""A step within this factor of that with whole blocks on every link is worth an exchange between GPUs."""

OWN_LINK_TIMES = 1.5
"""GPUs that copy from each other so many times as fast as from the host do not use its link for it."""

FOLDS = (1, 2, 4, 8, 16)
"""What `fold_every` is chosen from."""

QUERIED = ("spsa", "1.5-spsa")
"""Estimators whose every query is a direction of its own, as good as any other."""

NOISE_FASTER = 0.95
"""Of a step with normals, below which another kind of noise is worth a line."""

QUERIES_AS_FAST = 1.02
"""A step with more queries within this factor of one with a single query takes as long."""

LOSSLESS_FASTER = 0.95
"""Lossless tiles are worth their extra passes where a step is within this factor of that with whole bytes."""

FOLD_GPU_SHARE = 0.85
"""GPU time over link time up to which updates are replayed instead of downloaded: both are predicted, and
downloads that hide behind the GPU cost nothing, while replaying that does not hide costs its whole time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Times:
    """Predicted seconds of a step, and of the resources that downloads are weighed by."""

    step_s: float
    gpu_s: float
    h2d_s: float
    link_s: float
    """Of the slowest thing that copies need."""

    @staticmethod
    def of(context: PlanningContext, settings: Zo2Settings) -> _Times | None:
        """`None` if the profile lacks a figure."""
        step_s, busy = context.step_s(settings), context.resource_s(settings)
        if step_s is None or busy is None:
            return None
        link_s = max(busy["h2d"], busy["d2h"], busy["host memory"], busy["gpu to gpu"])
        return _Times(step_s=step_s, gpu_s=busy["gpu"], h2d_s=busy["h2d"], link_s=link_s)


def choose(context: PlanningContext, given: GivenSettings) -> Choice:
    """Resident blocks, which take their copies off the link, then how often the others go down, and how many
    queries the link has time for. On several GPUs also whether they bring up shares of each block and
    exchange them. Matrices of bf16 come up as lossless tiles where a step is then faster."""
    plain = _choose_for_base(context, given)
    if "base" in given or context.machine.gpu is None or context.workload.dtype != "bf16":
        return plain
    fewer = _choose_for_base(context, given.completed(base="lossless"))
    before, after = (context.step_s(each.settings.typed) for each in (plain, fewer))
    if before is None or after is None or after > LOSSLESS_FASTER * before:
        return plain
    if context.why_missing(fewer.settings.typed) is not None:
        return plain
    times = f"{format_seconds(after)} a step, else {format_seconds(before)}"
    why = f"base=lossless: the same bits in fewer bytes, {times}"
    return Choice(fewer.settings, (why, *fewer.reasons))


def _choose_for_base(context: PlanningContext, given: GivenSettings) -> Choice:
    """All but the base; and what more queries, or another kind of noise, would bring."""
    placed = _with_other_noise(context, given, _choose_upload(context, given))
    if "queries" in given or given.typed.estimator not in QUERIED or context.machine.gpu is None:
        return placed
    most, one_s, most_s = most_queries(context, given, placed.settings.typed)
    if most == 1:
        return placed
    if given.typed.estimator == "spsa":  # one query is MeZO, and so many another method
        why = (
            f"queries={most} would take as long: {format_seconds(most_s)} a step, with one "
            f"{format_seconds(one_s)}, as the link decides"
        )
        return Choice(placed.settings, (*placed.reasons, why))
    more = _choose_upload(context, given.completed(queries=most))
    why = (
        f"queries={most}: as many as hide behind the link, {format_seconds(most_s)} a step; with one "
        f"{format_seconds(one_s)}"
    )
    return Choice(more.settings, (why, *more.reasons))


def _with_other_noise(context: PlanningContext, given: GivenSettings, placed: Choice) -> Choice:
    """What near-normals would gain where a low-bit base makes normals what a step waits for: they are told of
    and not chosen, as they make other steps."""
    settings = placed.settings.typed
    if "noise" in given or settings.noise != "gaussian" or settings.estimator not in QUERIED:
        return placed
    if not settings.trains_quantized:
        return placed
    normals_s, near_s = (context.step_s(each) for each in (settings, replace(settings, noise="binomial")))
    if normals_s is None or near_s is None or near_s > NOISE_FASTER * normals_s:
        return placed
    why = (
        f"noise=binomial would take {format_seconds(near_s)} a step, with normals "
        f"{format_seconds(normals_s)}: near-normals in half the instructions, as good by one study"
    )
    return Choice(placed.settings, (*placed.reasons, why))


def most_queries(
    context: PlanningContext, given: GivenSettings, settings: Zo2Settings
) -> tuple[int, float, float]:
    """The most queries with which a step takes as long as with one, and the predicted seconds of both.

    A visit hides behind the upload of a block while it computes for less time, so they are about
    S* / 2 = b F / (4 BW T), b being bytes a parameter, F the GPU's rate of products, BW the link's of uploads
    and T the tokens of a step; noise and replayed updates count, too. 1 where the profile lacks figures.
    """

    def step_s(queries: int) -> float | None:
        if settings.fold_every * queries > MOST_DEFERRED and "fold_every" in given:
            return None
        changed = replace(settings, queries=queries, fold_every=1)
        if "hidden_states" not in given and _helps_on_host(context, changed):
            changed = replace(changed, hidden_states="host")
        if context.why_missing(changed) is not None:
            return None
        planner = _Planner(context=context, given=given)
        fold_every = settings.fold_every if "fold_every" in given else planner.fold_every(changed)[0]
        return context.step_s(replace(changed, fold_every=fold_every))

    one_s = most_s = step_s(1)
    most = 1
    for queries in range(2, MOST_QUERIES + 1):
        found_s = step_s(queries)
        if one_s is None or found_s is None or found_s > QUERIES_AS_FAST * one_s:
            break
        most, most_s = queries, found_s
    return most, one_s or 0.0, most_s or 0.0


def _choose_upload(context: PlanningContext, given: GivenSettings) -> Choice:
    """Whether each GPU brings up whole blocks or shares, and what suits that; all but base, noise and
    queries."""
    whole = _choose_blocks(context, given)
    if context.local_ranks == 1 or context.machine.gpu is None or "sharded_upload" in given:
        return whole
    if not (whole.settings.typed.may_shard_upload and context.cost(whole.settings.typed).h2d_bytes):
        return whole
    sharded = _choose_blocks(context, given.completed(sharded_upload=True))
    before_s, after_s = (context.step_s(each.settings.typed) for each in (whole, sharded))
    if context.why_missing(sharded.settings.typed) is not None or before_s is None:
        return whole
    if after_s is None:
        why = "sharded_upload=false: the machine profile has no rate between GPUs"
        return Choice(whole.settings, (*whole.reasons, why))
    if not _gpus_have_own_links(context.machine):
        why = "sharded_upload=false: the GPUs have no fast link of their own between them, such as NVLink"
        return Choice(whole.settings, (*whole.reasons, why))
    told = f"(a step {format_seconds(after_s)}, with whole blocks {format_seconds(before_s)})"
    if after_s >= SHARDED_FASTER * before_s:
        why = f"sharded_upload=false: shares that GPUs exchange are no faster {told}"
        return Choice(whole.settings, (*whole.reasons, why))
    why = f"sharded_upload=true: each GPU brings up its share of a block, then they exchange them {told}"
    return Choice(sharded.settings, (*sharded.reasons, why))


def _gpus_have_own_links(machine: Machine) -> bool:
    """Else what they exchange goes over the links to the host, which shares are to relieve."""
    link = machine.link
    if link is None:
        return False
    least = OWN_LINK_TIMES * (link.h2d_pinned_bytes_per_s.value or 0.0)
    return all((gpu.from_gpu_bytes_per_s.value or 0.0) >= least for gpu in link.each_gpu)


def _choose_blocks(context: PlanningContext, given: GivenSettings) -> Choice:
    """Where blocks and hidden states are, and how often blocks go down."""
    chosen: dict[str, Value] = {}
    reasons: list[str] = []
    if "hidden_states" not in given and _helps_on_host(context, given.typed):
        given = given.completed(hidden_states="host")
        reasons.append("hidden_states=host: those of all passes take more than the GPU has left")
    planner = _Planner(context=context, given=given)
    if "resident_blocks" not in given:
        chosen["resident_blocks"], reason = planner.resident_blocks()
        reasons.append(reason)
    elif context.machine.gpu is not None:
        where = planner.where(given.typed.resident_blocks)
        reasons += [f"{where} on the GPU"] if where else []
    if "fold_every" not in given:
        chosen["fold_every"], reason = planner.fold_every(given.completed(**chosen).typed)
        reasons.append(reason)
    elif (warning := warning_on_given(given.typed)) is not None:
        reasons.append(warning)
    settings = given.completed(**chosen)
    if planner.disk_is_open:
        on_disk = planner.placed(settings.typed).named_disk_blocks
        if on_disk or "disk_blocks" in given:
            settings = settings.replaced(disk_blocks=on_disk)
        if on_disk:
            read_bytes = context.cost(settings.typed).disk_bytes
            reasons.append(
                f"disk_blocks={on_disk}: host memory has no room for them; "
                f"{format_bytes(read_bytes)} are read per step from where disk_folder says"
            )
            if context.local_ranks > 1:
                reasons.append(f"what is read from disk is read once for all {context.local_ranks} GPUs")
    return Choice(settings, tuple(reasons))


def _helps_on_host(context: PlanningContext, settings: Zo2Settings) -> bool:
    """Whether a step fits with hidden states on the host, and does not without, by the GPU's memory: with no
    block there, and as many on disk as need be."""
    usable = context.budget.gpu_bytes
    if usable is None:
        return False
    here, away = (
        gpu_bytes_needed(context.cost(replace(settings, hidden_states=place)), context.budget)
        for place in ("gpu", "host")
    )
    return here > usable >= away


@dataclass(frozen=True, kw_only=True, slots=True)
class _Planner:
    context: PlanningContext
    given: GivenSettings

    @property
    def disk_is_open(self) -> bool:
        """The user did not say how many blocks lie on disk."""
        if self.given.typed.sharded_upload:
            return False
        return "disk_blocks" not in self.given or self.given.typed.disk_blocks == "auto"

    def placed(self, settings: Zo2Settings) -> Zo2Settings:
        """`settings` with the blocks on disk that host memory has no room for, if that is open."""
        if not self.disk_is_open:
            return settings
        context = self.context
        cost = context.cost_of_one_process(replace(settings, disk_blocks=0))
        return replace(settings, disk_blocks=num_on_disk(cost, context.budget, context.local_ranks))

    def cost(self, settings: Zo2Settings) -> Traffic:
        return self.context.cost(self.placed(settings))

    def resident_blocks(self) -> tuple[int, str]:
        """Of a limit that the user named, all is used that makes no step slower. Otherwise a tenth of the GPU
        stays free, since what is free now may be taken later, and of the rest no more is used than makes the
        step faster: streaming that hides behind compute costs nothing, and little memory is what the method
        is for.
        """
        budget, settings = self.context.budget, self.given.typed
        blocks = self.context.shape.num_blocks
        usable = budget.fillable_gpu_bytes
        if usable is None:
            return 0, "resident_blocks=0: there is no GPU to keep them on; all go the way they would to one"
        # How often blocks go down does not change memory, but for ranks that share them: most often, least.
        if self.context.local_ranks > 1 and "fold_every" not in self.given and settings.noise_window is None:
            settings = replace(settings, fold_every=max(FOLDS))
        costs = {
            count: self.cost(replace(settings, resident_blocks=count))
            for count in range(blocks - settings.named_disk_blocks + 1)
        }
        fitting = [count for count in costs if why_missing(costs[count], budget) is None]
        if not fitting:
            return 0, "resident_blocks=0: the least memory; it does not fit"
        # No block goes to disk that has room on the GPU.
        away = {count: costs[count].disk_bytes for count in fitting}
        fitting = [count for count in fitting if away[count] == min(away.values())]
        needed = {count: gpu_bytes_needed(costs[count], budget) for count in fitting}
        fitting = [count for count in fitting if needed[count] <= usable] or [
            min(fitting, key=needed.__getitem__)
        ]
        most = fitting[-1]
        as_fast = self._as_fast_as_any(fitting)
        resident = as_fast[-1 if budget.gpu_named else 0]
        why = f"as many as {format_bytes(usable)} of GPU memory hold"
        if resident < most:
            why = self._why_no_more(resident, most)
        if resident and (limited := why_missing(costs[0], budget)) is not None:
            why += f"; with none a step {limited}"
        moved = f"the other {blocks - resident} take {format_bytes(costs[resident].h2d_bytes)} up per step"
        if resident == blocks:
            moved = "nothing moves"
        where = f" ({self.where(resident)})" if resident else ""
        return resident, f"resident_blocks={resident}{where}: {why}; {moved}"

    def where(self, resident: int) -> str:
        """Which blocks stay on the GPU, counted from 0; empty for none."""
        blocks = self.context.shape.num_blocks
        indices = sorted(resident_indices(blocks, resident))
        if len(indices) == blocks:
            return "all blocks stay"
        named = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in _ranges(indices))
        return f"block {named} stays" if len(indices) == 1 else f"blocks {named} stay" if indices else ""

    def _as_fast_as_any(self, fitting: Sequence[int]) -> Sequence[int]:
        """The numbers of resident blocks whose predicted step is as fast as that of any that fits."""
        fewest, most = fitting[0], fitting[-1]
        best_s = self._step_s(most)
        if best_s is None:
            return (most,)
        if self._downloads_every(fewest) == self._downloads_every(most):
            # More blocks that stay never take longer, as long as the others go down equally often.
            return fitting[bisect_left(fitting, True, key=lambda k: self._is_as_fast(k, AS_FAST * best_s)) :]
        times = {k: time_s for k in fitting if (time_s := self._step_s(k)) is not None}
        fastest_s = min(times.values())
        return [k for k, time_s in times.items() if time_s <= AS_FAST * fastest_s]

    def _downloads_every(self, resident: int) -> int:
        settings: Zo2Settings = replace(self.given.typed, resident_blocks=resident)
        return settings.fold_every if "fold_every" in self.given else self.fold_every(settings)[0]

    def _is_as_fast(self, resident: int, wanted_s: float) -> bool:
        time_s = self._step_s(resident)
        return time_s is not None and time_s <= wanted_s

    def _why_no_more(self, resident: int, most: int) -> str:
        mine, best = self._step_s(resident), self._step_s(most)
        if mine is None or best is None:
            return f"{most} would fit"
        times = f"({format_seconds(best)} against {format_seconds(mine)})"
        if best > AS_FAST * mine:  # downloads that are as rare are not worth it there
            return f"{most} would fit, and take longer {times}"
        text = f"{most} would fit, and take as long {times}"
        settings = replace(self.given.typed, resident_blocks=resident)
        prediction = self.context.predict(self.placed(settings))
        return f"{text}: the copies hide behind the GPU's work" if prediction.bottleneck == "gpu" else text

    def _step_s(self, resident: int) -> float | None:
        """Predicted with so many resident blocks and the `fold_every` that suits them."""
        settings: Zo2Settings = replace(
            self.given.typed, resident_blocks=resident, fold_every=self._downloads_every(resident)
        )
        return self.context.step_s(self.placed(settings))

    def fold_every(self, settings: Zo2Settings) -> tuple[int, str]:
        """The fewest steps between downloads of a block that are as fast as any, the GPU having time to
        replay what the host does not have. `settings` are the others. With a low-bit base the loss decides.
        """
        machine = self.context.machine
        if (best := fold_for_loss(settings)) is not None:
            return best
        if (window := settings.noise_window) is not None:
            return 1, f"fold_every=1: every {window} steps, when the noise's window ends"
        placed = {
            k: self.placed(replace(settings, fold_every=k))
            for k in FOLDS
            if k * settings.queries <= MOST_DEFERRED
        }
        every = self.context.cost(placed[1])
        if machine.gpu is None:
            return 1, "fold_every=1: there is no link to relieve"
        if not every.d2h_bytes:
            return 1, "fold_every=1: nothing goes down"
        times = {k: _Times.of(self.context, each) for k, each in placed.items()}
        first = times[1]
        if first is None:
            return self._fold_off_the_disk(placed, times) or (
                1,
                "fold_every=1: the machine profile lacks figures, so the published schedule is kept",
            )
        # Links that are fed in shares are slowed down by what goes down on all of them, more than predicted:
        # replaying may take what it takes away from them.
        fitting = {
            k: time
            for k, time in times.items()
            if time
            and (k == 1 or time.gpu_s <= FOLD_GPU_SHARE * (first if settings.sharded_upload else time).link_s)
        }
        best_s = min(time.step_s for time in fitting.values())
        k = next(k for k, time in fitting.items() if time.step_s <= AS_FAST * best_s)
        balance = f"up {format_seconds(fitting[k].h2d_s)}, GPU {format_seconds(fitting[k].gpu_s)}"
        down = format_bytes(self.context.cost(placed[k]).d2h_bytes)
        if k > 1:
            return k, (
                f"fold_every={k}: a download every {k}{'nd' if k == 2 else 'th'} step: {balance}, "
                f"{down} down per step instead of {format_bytes(every.d2h_bytes)}"
            )
        why = "fewer downloads are no faster"
        if first.gpu_s >= first.link_s:
            why = "downloads hide behind the GPU's work"
        elif len(fitting) == 1:
            why = "the GPU has no time to replay updates instead"
        return 1, f"fold_every=1: {why} ({balance}, {down} down per step)"

    def _fold_off_the_disk(
        self, placed: Mapping[int, Zo2Settings], times: Mapping[int, _Times | None]
    ) -> tuple[int, str] | None:
        """Where a step is not predicted as blocks are on disk, and fewer downloads leave them room in host
        memory: ranks that share blocks have each one twice that goes down in a step."""
        known = {k: time.step_s for k, time in times.items() if time and not placed[k].named_disk_blocks}
        on_disk = placed[1].named_disk_blocks
        if not known or not on_disk:
            return None
        k = next(k for k, step_s in known.items() if step_s <= AS_FAST * min(known.values()))
        return k, (
            f"fold_every={k}: a block that goes down is there twice for a step, and with a download in each "
            f"one {on_disk} of them would be on disk"
        )


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of successive numbers; `numbers` ascend."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
