"""The closing sentences: which method, how sure, and what to do where none fits. Pure; no torch.

Methods with gradients are ranked by time to the job's end; methods without stand apart, since a step of one
kind is not worth one of the other. Overlapping ranges are a tie.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines import entry
from engines.shapes import ModelShape
from profiles.advice import words
from profiles.advice.job_time import JobForecast, are_tied
from profiles.advice.quality import known_of_zeroth_order
from profiles.advice.ways_out import WayOut
from profiles.planning.context import NO_PRICE
from profiles.planning.plan import Plan
from profiles.planning.precisions import INSTEAD

LONG_S = 1800.0
"""From where on it is said what a comparison takes."""

TO_DO = re.compile("; (use --|set )")
"""Before that with which a method can run."""


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
    compare: str = "lspzo-bench compare",
    compare_steps: int = 0,
) -> PlanVerdict:
    """`plans` are ranked as `profiles.planning.recommend` does. `forecasts` are of the job, or of one step
    where the job's size is not known (`of_job` is false). `compare` takes `compare_steps` steps with each
    method."""
    fitting = [plan for plan in plans if plan.fits]
    first = [plan.engine for plan in fitting if entry(plan.engine).order == "first"]
    zeroth = [plan.engine for plan in fitting if entry(plan.engine).order == "zeroth"]
    asked = Counter(entry(plan.engine).order for plan in plans)
    ties, zeroth_ties = _ties(first, forecasts), _ties(zeroth, forecasts)
    sentences: list[str] = []
    if not plans:
        sentences.append(words.NO_PLAN)
    elif not fitting:
        sentences += _nothing(plans, ways_out, shape)
    else:
        if first:
            sentences += _of_kind(words.WITH_GRADIENTS, first, ties, forecasts, asked["first"], of_job=of_job)
        elif asked["first"]:
            sentences.append(_no_first_order(plans, ways_out, shape))
        if zeroth:
            sentences += _of_kind(
                words.WITHOUT_GRADIENTS, zeroth, zeroth_ties, forecasts, asked["zeroth"], of_job=of_job
            )
            sentences.append(known_of_zeroth_order(shape.parameters))
    if fitting:
        sentences += _of_model(shape)
    tied = [*(first[:1] if ties else []), *ties, *(zeroth[:1] if zeroth_ties else []), *zeroth_ties]
    if tied:
        sentences += _to_measure(tied, fitting, compare, compare_steps)
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
    asked: int,
    *,
    of_job: bool,
) -> list[str]:
    """`asked`: how many methods of the kind were planned."""
    unit = "for the job" if of_job else "a step"
    best = forecasts.get(engines[0])
    if best is None or best.seconds is None:
        return [
            f"{kind} {words.names(engines)} fit{'s' if len(engines) == 1 else ''}, without a predicted time."
        ]
    time = f"{words.duration(best.seconds)} {unit} ({words.band(best.seconds_low, best.seconds_high)})"
    timeless = [each for each in engines if each not in forecasts or forecasts[each].seconds is None]
    if len(engines) == 1:
        verb = "takes" if asked == 1 else "is the only one that fits:"
        return [f"{kind} {engines[0]} {verb} {time}."]
    said = [f"{kind} {engines[0]} comes first with {time}."]
    if ties:
        others = words.names([f"{each} ({words.duration(forecasts[each].seconds)})" for each in ties])
        verb = "is" if len(ties) == 1 else "are"
        said.append(f"{others} {verb} a tie with it: {words.MEASURE}.")
    if timeless:
        verb = "fits" if len(timeless) == 1 else "fit"
        said.append(f"{words.names(timeless)} {verb} too, without a predicted time.")
    return said


def _of_model(shape: ModelShape) -> list[str]:
    """What of a model no plan counts, or nobody has measured."""
    said = []
    if shape.num_experts:
        said.append(
            f"{shape.experts_per_token} of {shape.num_experts} experts are counted for each token. "
            "No mixture of experts was measured: take these times and what fits for a guess, and compare on "
            "the machine. "
            "Adapters, 4-bit weights and subspaces are of the matrices beside the experts."
        )
    if shape.is_recurrent:
        said.append(
            "Blocks of this model carry a state from token to token, which is not counted and was not "
            "measured: transformers takes many times as long where kernels for it are not installed. "
            "Compare on the machine."
        )
    return said


def _to_measure(tied: Sequence[str], fitting: Sequence[Plan], compare: str, steps: int) -> list[str]:
    """How those that are `tied` are told apart, in so many steps each, and what that takes if it is long."""
    said = [f"To measure what is tied: {compare} --engines {','.join(tied)}"]
    steps_s = [plan.prediction.step_s or 0.0 for plan in fitting if plan.engine in tied]
    if (total_s := steps * sum(steps_s)) > LONG_S:
        said.append(
            f"By these plans that takes {words.duration(total_s)}: --rounds 1 a third of it, fewer "
            "--steps less."
        )
    return said


def _nothing(plans: Sequence[Plan], ways_out: Mapping[str, WayOut], shape: ModelShape) -> list[str]:
    able = [plan for plan in plans if plan.available]
    said = [words.NOTHING_FITS if able else words.NOTHING_RUNS]
    by_reason: dict[str, dict[str, list[str]]] = {}
    for plan in plans:
        if not plan.available and plan.why_not is not None:
            why, _, instead = plan.why_not.partition(INSTEAD)
            by_reason.setdefault(why, {}).setdefault(instead, []).append(plan.engine)
    alone = {engine for engine, way in ways_out.items() if way.flags.count("--") == 1}
    for reason, dtypes in by_reason.items():
        typed = [
            f"--dtype {dtype} for {words.names(enough)}"
            for dtype, names in dtypes.items()
            if dtype and (enough := [each for each in names if each in alone])
        ]
        everybody = words.names([each for names in dtypes.values() for each in names])
        said.append(f"{everybody}: {reason}{': type ' if typed else ''}{'; '.join(typed)}.")
    return [*said, *_advice(plans, ways_out, shape)]


def _no_first_order(plans: Sequence[Plan], ways_out: Mapping[str, WayOut], shape: ModelShape) -> str:
    outcome = "No method with gradients fits."
    ways = _advice([plan for plan in plans if entry(plan.engine).order == "first"], ways_out, shape)
    return " ".join([outcome, *ways])


def _advice(plans: Sequence[Plan], ways_out: Mapping[str, WayOut], shape: ModelShape) -> list[str]:
    """The quickest way out, those that cost no quality first."""
    found = [ways_out[plan.engine] for plan in plans if plan.engine in ways_out]
    if not found:
        if any(TO_DO.search(plan.why_not or "") for plan in plans):
            return []  # what to change of the job has been told
        if all(_refuses_model(plan, shape) for plan in plans):
            return ["No other machine would change that: name other methods with --engines."]
        return ["No change that was tried lets one fit: see --what-if for other machines."]
    best = min(
        found,
        key=lambda each: (
            entry(each.engine).order == "zeroth",
            each.quality != NO_PRICE,
            each.plan.prediction.step_s or math.inf,
        ),
    )
    return [f"Nearest: {best.engine} with {best.flags} (price: {best.quality})."]


def _refuses_model(plan: Plan, shape: ModelShape) -> bool:
    """On any machine: for how the method goes through blocks, or would with settings of its own."""
    return plan.why_not is not None and plan.why_not in {
        shape.why_not_walked(walk) for walk in (entry(plan.engine).walk, "block_major")
    }
