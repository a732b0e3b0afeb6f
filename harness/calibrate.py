"""What saved runs say of predictions for the machine that they are of. Imports no torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from engines.errors import UserError
from engines.files.reading import expanded
from harness.records.job import make_job
from harness.records.run import Environment, Run, load_run
from harness.resolve import resolve_shape
from profiles.advice.calibration import Calibration, Seen, calibration_of, hardware, why_other_hardware
from profiles.machine import Machine
from profiles.planning.ranks import context_of_a_rank

SAME_MODEL = 1.3
"""A record whose own prediction is further than this from today's was predicted, or run, by another version
of the program: what it missed is not what is missed today."""

NO_RUN = "not a run that ended well"
EMULATED = "of an emulated machine"
OTHER_VERSION = "predicted otherwise by another version of this program"
NOT_PREDICTED = "not predicted"
MODEL_GONE = "its model is not here any more"


def calibration_from(runs: Path, machine: Machine) -> Calibration:
    """Of the folder of a sweep, or of a folder of such folders. Raises `UserError` where there are no runs,
    or none of `machine`'s hardware."""
    folder = expanded(str(runs))
    paths = sorted({*folder.glob("runs/*.json"), *folder.glob("*/runs/*.json")})
    if not paths:
        raise UserError(f"--calibrate {runs}", "holds no runs", "name a folder that 'compare' wrote")
    seen: list[Seen] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        found = _seen(path, machine)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            seen.append(found)
    if not seen:
        why = "; ".join(f"{count} {reason}" for reason, count in left_out.most_common(2))
        raise UserError(f"--calibrate {runs}", f"no run counts here: {why}", "run 'compare' on this machine")
    return calibration_of(seen, left_out)


def _seen(path: Path, machine: Machine) -> Seen | str:
    """A record's ratio, or why it does not count."""
    try:
        run = load_run(path)
    except UserError:
        return NO_RUN
    taken_s = run.summary.step_s_median
    if run.end_state != "ok" or taken_s is None or run.scenario != "train":
        return NO_RUN
    if run.environment.emulated is not None:
        return EMULATED
    if (differing := _why_other(run.environment, machine)) is not None:
        return f"of other hardware ({differing})"
    try:
        predicted_s = _predicted_s(run, machine)
    except UserError:
        return MODEL_GONE
    recorded_s = None if run.predicted is None else run.predicted.step_s
    if not predicted_s or not recorded_s:
        return NOT_PREDICTED
    if not 1 / SAME_MODEL <= predicted_s / recorded_s <= SAME_MODEL:
        return OTHER_VERSION
    energy_j = run.summary.energy_j
    boards = max(1, len(run.ranks))
    power_w = None if energy_j is None else energy_j / taken_s / boards
    return Seen(engine=run.engine, ratio=taken_s / predicted_s, power_w=power_w)


def _why_other(environment: Environment, machine: Machine) -> str | None:
    gpu: tuple[str, ...] = ("no GPU",)
    if environment.gpu_name is not None:
        gpu = (environment.gpu_name, f"{(environment.gpu_total_bytes or 0) / 2**30:.0f} GiB")
    theirs = (*gpu, environment.cpu, f"{environment.cores_usable} cores")
    return why_other_hardware(theirs, hardware(machine))


def _predicted_s(run: Run, machine: Machine) -> float | None:
    job = make_job(run.job, "the run's job")
    gpus, nodes = job.limits.gpus, job.limits.nodes
    shape = resolve_shape(job)
    context = context_of_a_rank(run.engine, machine, shape, job.workload, gpus=gpus, nodes=nodes)
    return context.step_s(run.plan.settings.typed)
