"""The closing sentences: which method, how sure, and what to do where none fits. Pure; no torch.

Methods with gradients are ranked by time to the job's end; methods without stand apart, since a step of one
kind is not worth one of the other. Overlapping ranges are a tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines import entry
from engines.shapes import ModelShape
from profiles.advice import words
from profiles.advice.job_time import JobForecast, are_tied
from profiles.advice.quality import known_of_zeroth_order
from profiles.advice.ways_out import WayOut
from profiles.planning.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanVerdict:
    first_order: tuple[str, ...]
    """Methods with gradients that fit, by time to the job's end."""
    zeroth_order: tuple[str, ...]
    ties: tuple[str, ...]
    """Of `first_order`, those whose range overlaps that of the first."""
    zeroth_ties: tuple[str, ...]
    best: str | None
    """The method to take: the first with gradients, or where none fits, the first without."""
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def verdict_of(
    plans: Sequence[Plan],
    forecasts: Mapping[str, JobForecast],
    ways_out: Mapping[str, WayOut],
    shape: ModelShape,
    *,
    of_job: bool,
) -> PlanVerdict:
    """`plans` are ranked as `profiles.planning.recommend` does. `forecasts` are of the job, or of one step
    where the job's size is not known (`of_job` is false)."""
    fitting = [plan for plan in plans if plan.fits]
    first = [plan.engine for plan in fitting if entry(plan.engine).order == "first"]
    zeroth = [plan.engine for plan in fitting if entry(plan.engine).order == "zeroth"]
    ties, zeroth_ties = _ties(first, forecasts), _ties(zeroth, forecasts)
    sentences: list[str] = []
    if not plans:
        sentences.append(words.NO_PLAN)
    elif not fitting:
        sentences += _nothing(plans, ways_out)
    else:
        if first:
            sentences += _of_kind(words.WITH_GRADIENTS, first, ties, forecasts, of_job=of_job)
        elif any(entry(plan.engine).order == "first" for plan in plans):
            sentences.append(_no_first_order(plans, ways_out))
        if zeroth:
            sentences += _of_kind(words.WITHOUT_GRADIENTS, zeroth, zeroth_ties, forecasts, of_job=of_job)
            sentences.append(known_of_zeroth_order(shape.parameters))
    return PlanVerdict(
        first_order=tuple(first),
        zeroth_order=tuple(zeroth),
        ties=ties,
        zeroth_ties=zeroth_ties,
        best=next(iter([*first, *zeroth]), None),
        sentences=tuple(sentences),
    )


def _ties(engines: Sequence[str], forecasts: Mapping[str, JobForecast]) -> tuple[str, ...]:
    """Those that may as well be the first."""
    if not engines or engines[0] not in forecasts:
        return ()
    best = forecasts[engines[0]]
    return tuple(each for each in engines[1:] if each in forecasts and are_tied(best, forecasts[each]))


def _of_kind(
    kind: str,
    engines: Sequence[str],
    ties: Sequence[str],
    forecasts: Mapping[str, JobForecast],
    *,
    of_job: bool,
) -> list[str]:
    unit = "for the job" if of_job else "a step"
    best = forecasts.get(engines[0])
    if best is None or best.seconds is None:
        return [
            f"{kind} {words.names(engines)} fit{'s' if len(engines) == 1 else ''}, without a predicted time."
        ]
    told = f"{words.duration(best.seconds)} {unit} ({words.band(best.seconds_low, best.seconds_high)})"
    if len(engines) == 1:
        return [f"{kind} {engines[0]} is the only one that fits: {told}."]
    said = [f"{kind} {engines[0]} comes first with {told}."]
    if ties:
        others = words.names([f"{each} ({words.duration(forecasts[each].seconds)})" for each in ties])
        said.append(f"{others} {'is' if len(ties) == 1 else 'are'} a tie with it: {words.MEASURE}.")
    return said


def _nothing(plans: Sequence[Plan], ways_out: Mapping[str, WayOut]) -> list[str]:
    said = [words.NOTHING_FITS]
    by_reason: dict[str, list[str]] = {}
    for plan in plans:
        if not plan.available and plan.why_not is not None:
            by_reason.setdefault(plan.why_not, []).append(plan.engine)
    said += [f"{words.names(engines)}: {why}." for why, engines in by_reason.items()]
    return [*said, *_advice(plans, ways_out)]


def _no_first_order(plans: Sequence[Plan], ways_out: Mapping[str, WayOut]) -> str:
    told = "No method with gradients fits."
    ways = _advice([plan for plan in plans if entry(plan.engine).order == "first"], ways_out)
    return " ".join([told, *ways])


def _advice(plans: Sequence[Plan], ways_out: Mapping[str, WayOut]) -> list[str]:
    """The quickest way out, those that cost no quality first."""
    found = [ways_out[plan.engine] for plan in plans if plan.engine in ways_out]
    if not found:
        return ["No change that was tried lets one fit: see --what-if for other machines."]
    best = min(found, key=lambda each: (each.quality != words.NO_PRICE, each.plan.prediction.step_s or 1e18))
    return [f"Nearest: {best.engine} with {best.flags} (price: {best.quality})."]
