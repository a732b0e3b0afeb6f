"""Methods that were not run: whether they would fit, and the command that tells what is missing. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engines import ENGINES, YARDSTICK, entry
from engines.errors import UserError
from engines.shapes import Dtype, ModelShape
from harness.models.configs import NAMED_SHAPES
from harness.pipeline import plan_job
from harness.records.job import DataSource
from harness.records.manifest import CRITERIA_FILE
from harness.records.run import Run
from harness.resolve import resolve_shape
from profiles.planning.plan import Plan
from reports.criteria import Metric
from reports.format import method_flags
from reports.load import Loaded
from reports.measured.measurements import Measurements
from reports.measured.padding import padded_to

OTHER_DTYPE: Dtype = "bf16"
"""That a method is planned in where it refuses the job's."""

FOLDER = "."
"""Where the commands of a report are typed: beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Untried:
    """What is predicted today of methods that no run is of, on the machine of the runs."""

    yardstick_is_out: str | None = None
    """Why the yardstick is predicted not to fit, where it was not run."""
    first: tuple[str, ...] = ()
    """Methods that most people would use, were not run, and are not predicted not to fit."""
    refusing: tuple[str, ...] = ()
    """Those of `first` that refuse the job's precision, and were planned in `OTHER_DTYPE`."""


def untried_of(loaded: Loaded) -> Untried:
    """By the profile of the machine and the sizes of the model beside the runs; where these were not kept,
    for named shapes, and of others nothing is predicted."""
    ran = {run.engine for run in loaded.runs}
    first = [name for name, row in ENGINES.items() if row.asked_first and name not in ran]
    plans = {name: _plan(name, loaded) for name in first}
    yardstick = plans.get(YARDSTICK)
    out = yardstick is not None and yardstick.available and not yardstick.fits
    refusing = tuple(name for name in first if loaded.job.dtype in entry(name).refuses)
    return Untried(
        yardstick_is_out=yardstick.why_not if yardstick is not None and out else None,
        first=tuple(name for name in first if (plan := plans[name]) is None or plan.fits),
        refusing=refusing,
    )


def shape_of(loaded: Loaded) -> ModelShape | None:
    """Sizes of the model that was run; `None` where that would need what is not in the folder."""
    if loaded.shape is not None:
        return loaded.shape
    job = loaded.job
    if job.model.name not in NAMED_SHAPES or not job.model.random_weights:
        return None
    try:
        return resolve_shape(replace(job, data=DataSource(train="random"), settings={}))
    except UserError:
        return None


def _plan(engine: str, loaded: Loaded) -> Plan | None:
    """`None` where nothing can be predicted."""
    shape, job = shape_of(loaded), loaded.job
    if loaded.machine is None or shape is None:
        return None
    dtype = OTHER_DTYPE if job.dtype in entry(engine).refuses else job.dtype
    alone = replace(job, data=DataSource(train="random"), settings={}, dtype=dtype)
    try:
        (plan,) = plan_job(alone, shape, loaded.machine, [engine])
    except UserError:
        return None
    return plan


_OF_JOB: tuple[Metric, ...] = ("job_hours", "job_cost")
_OF_TIME: tuple[Metric, ...] = ("step_s", "tokens_per_s", *_OF_JOB)


def to_try(engine: str, untried: Untried) -> str:
    """The command that runs `engine` beside what was run, typed in the folder of the report; by itself where
    it refuses the precision of that, with which it cannot be compared."""
    if engine in untried.refusing:
        return _again(engine, f"--dtype {OTHER_DTYPE} {method_flags([engine])}")
    return _more([engine], rounds=3)


_NEED_YARDSTICK: tuple[Metric, ...] = ("step_time_ratio", "heldout_ratio")
_NEED_EVALUATION: tuple[Metric, ...] = ("accuracy", "heldout_change", "heldout_ratio")
ENOUGH_ROUNDS = 5
MUCH_LONGER = 10
"""Times as long as a limit that a run reached: how much more it would have taken is not known."""
EVAL_BATCHES = 16
MORE_EXAMPLES = 4
"""Times as many as were evaluated, which makes an interval over them half as wide."""


def what_to_run(unknown: Sequence[tuple[Metric, str]], all_: Measurements, untried: Untried) -> str:
    """The command, typed in the folder of the report, that would tell the first of the metrics that are
    `unknown` of a method; empty where nothing is unknown, or no command tells it."""
    for metric, engine in unknown:
        rounds = all_.of(engine)
        missing = entry(engine).library if engine in ENGINES else None
        if rounds.runs and all(run.end_state == "not_available" for run in rounds.runs):
            if missing is None:
                continue
            return f"{missing.install} && {_more([engine], rounds=3)}"
        limits = [
            *_timeouts(rounds.runs),
            *(_timeouts(all_.of(YARDSTICK).runs) if metric in _NEED_YARDSTICK else ()),
        ]
        if limits:
            flags = f"--timeout {MUCH_LONGER * max(limits):g} {method_flags(all_.engines)}"
            return _again("longer", flags)  # the same folder keeps the same limit
        if metric in _OF_TIME and any(run.emulation is not None for run in rounds.ok):
            return _again("measured")
        if metric in _OF_JOB and padded_to(rounds) is not None:
            flags = f"--padding longest {method_flags(all_.engines)} --criteria {CRITERIA_FILE}"
            return _again("longest", flags)  # they say how much is trained
        if metric in _NEED_YARDSTICK and not all_.of(YARDSTICK).ok:
            if YARDSTICK in untried.refusing:  # side by side in one that both take
                both = method_flags([YARDSTICK, *all_.engines])
                return _again(OTHER_DTYPE, f"--dtype {OTHER_DTYPE} {both}")
            return _more([YARDSTICK], rounds=max(3, len(rounds.runs)))
        if metric in _NEED_EVALUATION and any(run.model.random_weights for run in rounds.ok):
            continue  # it takes the real weights, and where those are nobody here knows
        if metric in _NEED_EVALUATION and rounds.ok:
            batches = max(EVAL_BATCHES, MORE_EXAMPLES * int(rounds.ok[0].job.get("eval_batches", 0)))
            return _again("evaluated", f"--eval-batches {batches} {method_flags(all_.engines)}")
        if rounds.ok:
            return _more(list(all_.engines), rounds=max(ENOUGH_ROUNDS, len(rounds.runs) + 2))
    return ""


def _timeouts(runs: Sequence[Run]) -> list[float]:
    """The limits in seconds that all of these `runs` reached; none where one did not."""
    if any(run.end_state != "timeout" for run in runs):
        return []
    limits = [run.job.get("limits", {}).get("timeout_s") for run in runs]
    return [float(each) for each in limits if each is not None]


def _more(engines: Sequence[str], *, rounds: int) -> str:
    """Runs of `engines` beside those that are there."""
    named = f"--job job.toml {method_flags(engines)} --rounds {rounds} --out {FOLDER} --resume"
    return f"lspzo-bench compare {named} && lspzo-bench report {FOLDER}"


def _again(out: str, changes: str = "") -> str:
    """The job anew with `changes`, in a folder `out`."""
    sweep = " ".join(f"--job job.toml {changes} --out {shlex.quote(out)}".split())
    return f"lspzo-bench compare {sweep} && lspzo-bench report {shlex.quote(out)}"
