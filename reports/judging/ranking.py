"""Which method is the answer: the order of methods that were judged, and which of them another beats. Pure.

Methods of one verdict are told apart by quality where it was measured on held-out data, training moved it and
other data would have said the same, and else by kind: a step with gradients before one without, what most
people would use before the rest, and what trains all weights before what trains fewer, which is as good only
where that was measured. Only then by the time of a step in a long job, with its part of what one in so many
does beside; ranges that overlap are a tie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from engines import ENGINES, entry, trains_everything
from harness.records.stats import SAME_FACTOR, disturbed, over_runs, ratio
from reports.judging.stated import gpu_peak, host_peak, step_s
from reports.measured.examples import OverSequences, difference_over_sequences
from reports.measured.measurements import Measurements, heldout_loss, is_emulated, typical

State = Literal["GO", "CONDITIONAL GO", "NO-GO", "INCONCLUSIVE"]
BEST_FIRST: tuple[State, ...] = ("GO", "CONDITIONAL GO", "INCONCLUSIVE", "NO-GO")

AS_GOOD = 1.02
"""Held-out losses within this factor may be called as good as each other."""

PART_OF_GAIN = 0.1
"""Of what the best one's held-out loss fell by, which a method as good as that may stay behind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """A method as its criteria were judged."""

    engine: str
    state: State
    missed: int
    """Criteria that it failed, or that could not be judged."""


def quality(engine: str, all_: Measurements) -> float | None:
    """Held-out loss after the last step, median over the runs; smaller is better. Random weights tell nothing
    of the real model's."""
    real = [run for run in all_.of(engine).ok if not run.model.random_weights]
    found = over_runs(real, heldout_loss)
    return found.median if found else None


def loss_beside(one: str, other: str, all_: Measurements) -> OverSequences | None:
    """What the held-out loss of `one` is more than that of `other` on the same sequences, with the wider of
    the two ranges, over sequences and over runs; `None` where losses of sequences were not kept."""
    found = difference_over_sequences(all_.of(one), all_.of(other))
    mine, its = (over_runs(all_.of(each).ok, heldout_loss) for each in (one, other))
    if found is None or mine is None or its is None:
        return None
    return replace(found, low=min(found.low, mine.low - its.high), high=max(found.high, mine.high - its.low))


LEAST_DIFFERENCE = 5e-5
"""Half of the last place in which a loss is told: what is less is rounding, as of the same sums in another
order, and no difference."""


def difference_word(found: OverSequences) -> Literal["same", "undecided", "worse", "better"]:
    """What `loss_beside` found."""
    if max(abs(found.low), abs(found.high)) < LEAST_DIFFERENCE:
        return "same"
    if found.low <= 0 <= found.high:
        return "undecided"
    return "worse" if found.value > 0 else "better"


def are_told_apart(one: str, other: str, all_: Measurements) -> bool:
    """Whether other sequences, or other runs, would have had the better one of the two before the other too;
    also where that is not known."""
    found = loss_beside(one, other, all_)
    return found is None or difference_word(found) in ("worse", "better")


@dataclass(frozen=True, kw_only=True, slots=True)
class BestQuality:
    """Of several methods, held-out losses of the best before the first step and after the last."""

    engine: str
    before: float
    after: float

    @property
    def told(self) -> bool:
        """Whether losses tell methods apart: the model as it was would not be called as good as this."""
        return self.before > self.after * AS_GOOD

    @property
    def as_good(self) -> float:
        """The largest loss that is called as good."""
        return min(self.after * AS_GOOD, self.after + PART_OF_GAIN * (self.before - self.after))


def best_quality(engines: Iterable[str], all_: Measurements) -> BestQuality | None:
    """Of those of `engines` that ran; `None` where it is not known of every one of them, as then they cannot
    be told apart by it."""
    ran = [engine for engine in engines if all_.of(engine).ok]
    losses = {engine: loss for engine in ran if (loss := quality(engine, all_)) is not None}
    if not losses or len(losses) < len(ran):
        return None
    best = min(losses, key=losses.__getitem__)
    before = typical(all_.of(best), lambda run: run.summary.eval_loss_first)
    return None if before is None else BestQuality(engine=best, before=before, after=losses[best])


def trains_less(engine: str) -> bool:
    """Whether it has gradients and does not train every weight along them: adapters, or a subspace."""
    return entry(engine).order == "first" and not trains_everything(engine)


def beats(one: str, other: str, all_: Measurements) -> bool:
    """Whether `one` is better than `other` in time, memory and quality. Quality that was not measured, or
    that training did not move, counts as better only for a method that trains everything, against one that
    does not or does just the same."""
    if not is_faster(one, other, all_) or not _smaller(one, other, all_):
        return False
    best = best_quality((one, other), all_)
    if best is not None and best.told:
        return quality(one, all_) == best.after != quality(other, all_) and are_told_apart(one, other, all_)
    return trains_everything(one) or (entry(one).order == entry(other).order == "zeroth")


def is_faster(one: str, other: str, all_: Measurements) -> bool:
    """In a step of a long job, beyond what the runs of either leave open. Of a method whose runs disagree by
    far that cannot be told."""
    mine, others = all_.of(one), all_.of(other)
    if disturbed(mine) or disturbed(others):
        return False
    if not is_emulated(mine) and not is_emulated(others):
        found = ratio(mine.lasting_step_times, others.lasting_step_times)
        return found is not None and found.high < 1
    a, b = step_s(one, all_), step_s(other, all_)
    return a.high is not None and b.low is not None and a.high < b.low


def _smaller(one: str, other: str, all_: Measurements) -> bool:
    """Less GPU memory; less host memory where neither has a GPU's."""
    for peak in (gpu_peak, host_peak):
        mine, others = peak(one, all_).value, peak(other, all_).value
        if mine is not None and others is not None:
            return mine < others
    return False


def beaten_by(standings: Sequence[Standing], all_: Measurements) -> Mapping[str, str]:
    """Each method that another one beats whose verdict is no worse, and the best of those."""
    found: dict[str, str] = {}
    for loser in standings:
        winners = [
            each
            for each in standings
            if BEST_FIRST.index(each.state) <= BEST_FIRST.index(loser.state)
            and beats(each.engine, loser.engine, all_)
        ]
        if winners:
            found[loser.engine] = ordered(winners, all_)[0].engine
    return found


def _lesser_kind(engine: str) -> tuple[bool, bool, bool]:
    """Whether it has no gradients, is not what most people would use, and trains fewer weights."""
    row = entry(engine)
    return row.order == "zeroth", not row.asked_first, trains_less(engine)


def ordered(standings: Sequence[Standing], all_: Measurements) -> list[Standing]:
    """The best first; none that another beats before that one."""
    best = best_quality((each.engine for each in standings), all_)

    def by_quality(engine: str) -> tuple[float, tuple[bool, ...]]:
        loss, its = quality(engine, all_), _lesser_kind(engine)
        if loss is None or best is None or not best.told:
            return float("inf"), its
        if loss <= best.as_good:
            return 0.0, (False,) * len(its)
        if are_told_apart(engine, best.engine, all_):
            return loss, (False,) * len(its)
        # Not known to be worse, nor as good: it goes behind the best where it is of a kind that does.
        return 0.0, tuple(one > other for one, other in zip(its, _lesser_kind(best.engine), strict=True))

    kinds = {
        each.engine: (BEST_FIRST.index(each.state), each.missed, by_quality(each.engine))
        for each in standings
    }

    def kind(each: Standing) -> tuple[int, int, tuple[float, tuple[bool, ...]]]:
        """What tells before time does."""
        return kinds[each.engine]

    def by_time(each: Standing) -> tuple[float, float, int]:
        rounds = all_.of(each.engine)
        seconds = step_s(each.engine, all_).value if is_emulated(rounds) else rounds.lasting_step_s
        memory = gpu_peak(each.engine, all_).value or host_peak(each.engine, all_).value
        infinite = float("inf")
        return (
            infinite if seconds is None else seconds,
            infinite if memory is None else memory,
            _place(each.engine),
        )

    left = sorted(standings, key=lambda each: (kind(each), by_time(each)))
    found: list[Standing] = []
    while left:
        tied = [each for each in left if kind(each) == kind(left[0]) and _tied(each, left[0], all_)]
        chosen = min(tied, key=lambda each: (not entry(each.engine).asked_first, by_time(each)[1:]))
        found.append(chosen)
        left.remove(chosen)
    return _beaten_last(found, all_)


def _beaten_last(found: list[Standing], all_: Measurements) -> list[Standing]:
    """Whatever put a method first, one that beats it, with a verdict no worse, goes before it."""
    result: list[Standing] = []
    left = list(found)
    while left:
        free = next(
            one
            for one in left
            if not any(
                BEST_FIRST.index(each.state) <= BEST_FIRST.index(one.state)
                and beats(each.engine, one.engine, all_)
                for each in left
                if each is not one
            )
        )
        result.append(free)
        left.remove(free)
    return result


def _tied(one: Standing, other: Standing, all_: Measurements) -> bool:
    """The ranges of their times overlap, or lie so near that they are called the same."""
    if one is other:
        return True
    mine, others = all_.of(one.engine), all_.of(other.engine)
    if is_emulated(mine) or is_emulated(others):
        a, b = step_s(one.engine, all_), step_s(other.engine, all_)
        if a.low is None or b.low is None or a.high is None or b.high is None:
            return False
        return a.low <= b.high and b.low <= a.high
    if mine.step_s is None or others.step_s is None:
        return mine.step_s is others.step_s
    found = ratio(mine.lasting_step_times, others.lasting_step_times)
    return found is not None and found.low <= SAME_FACTOR and found.high >= 1 / SAME_FACTOR


def _place(engine: str) -> int:
    return list(ENGINES).index(engine)
