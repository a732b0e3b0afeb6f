"""Answered backwards: the least machine that does a job in time, or that holds a model. Pure; no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from engines.errors import UserError
from engines.shapes import ModelShape
from profiles.advice import words
from profiles.advice.outlook import BestMethod, JobToPlan, Outlook, outlook
from profiles.machine import Machine
from profiles.planning.recommend import plan_engine

Meets = Literal["yes", "perhaps", "no"]
"""The whole range is within the target, a part of it, or nothing."""

REMEDY = "write hours=8, or model=NAME or a size such as model=70b"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    hours: float | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetAnswer:
    """Of one machine."""

    outlook: Outlook
    first: Meets
    zeroth: Meets
    """Whether the best method of each kind meets the target."""


def parse_target(text: str) -> Target:
    """The target that `hours=8` or `model=70b` names. Raises `UserError`."""
    key, _, value = text.partition("=")
    what = f"--target '{text}'"
    if key == "model" and value:
        return Target(model=value)
    if key != "hours":
        raise UserError(what, "names neither hours nor a model", REMEDY)
    try:
        hours = float(value)
    except ValueError:
        hours = 0.0
    if not 0 < hours < 1e6:
        raise UserError(what, "is no number of hours", REMEDY)
    return Target(hours=hours)


def answers(
    machines: Mapping[str, Machine], job: JobToPlan, target: Target, own: Machine | None = None
) -> tuple[TargetAnswer, ...]:
    """One for each machine, the least first. The user's limits hold on `own`, and on no other."""
    elsewhere = replace(job, vram_bytes=None, host_bytes=None)
    found = []
    for name, machine in sorted(machines.items(), key=lambda each: machine_size(each[1])):
        seen = outlook(name, machine, job if machine == own else elsewhere)
        found.append(
            TargetAnswer(outlook=seen, first=_meets(seen.first, target), zeroth=_meets(seen.zeroth, target))
        )
    return tuple(found)


def machine_size(machine: Machine) -> tuple[float, float]:
    """What machines are ordered by, since no prices are built in: memory of the GPU, then its rate."""
    gpu = machine.gpu
    if gpu is None:
        return 0.0, 0.0
    rate = gpu.matmul_bf16_flops.value or gpu.matmul_fp16_flops.value or gpu.matmul_fp32_flops.value
    return float(round(gpu.total_bytes / 2**30)), rate or 0.0


def _meets(best: BestMethod | None, target: Target) -> Meets:
    if best is None:
        return "no"
    if target.hours is None:
        return "yes"
    if best.seconds is None:
        return "no"
    low, _, high = (each / 3600 for each in best.seconds)
    return "yes" if high <= target.hours else "perhaps" if low <= target.hours else "no"


def target_sentences(found: Sequence[TargetAnswer], kinds: Collection[str]) -> tuple[str, ...]:
    """The least machine by each of the `kinds` of method (`first`, `zeroth`), and the least that may be one
    by the range's lower end."""
    said = []
    for kind, name in (("first", words.WITH_GRADIENTS), ("zeroth", words.WITHOUT_GRADIENTS)):
        if kind not in kinds:
            continue
        sure = next((each for each in found if getattr(each, kind) == "yes"), None)
        perhaps = next((each for each in found if getattr(each, kind) == "perhaps"), None)
        if sure is None and perhaps is None:
            said.append(words.no_machine(name))
            continue
        if sure is not None:
            best = getattr(sure.outlook, kind)
            said.append(
                words.least_machine(
                    name, sure.outlook.name, best.engine, disk_bytes=best.disk_bytes,
                    timed=best.seconds is not None,
                )
            )  # fmt: skip
        if perhaps is not None and (sure is None or found.index(perhaps) < found.index(sure)):
            method = getattr(perhaps.outlook, kind).engine
            said.append(words.perhaps_machine(name, perhaps.outlook.name, method))
    return tuple(said)


@dataclass(frozen=True, kw_only=True, slots=True)
class Largest:
    """The largest model that a method fits."""

    engine: str
    model: str | None
    """`None`: not even the smallest."""
    parameters: int = 0
    step_s: float | None = None
    on_disk: bool = False
    """A part of it is read from disk in every step."""


def largest_models(machine: Machine, job: JobToPlan, shapes: Sequence[ModelShape]) -> tuple[Largest, ...]:
    """For each method the largest of `shapes` that fits with the job's batches; sequences as long as a model
    takes."""
    by_size = sorted(shapes, key=lambda shape: shape.parameters, reverse=True)
    return tuple(_largest(engine, machine, job, by_size) for engine in job.engines)


def _largest(engine: str, machine: Machine, job: JobToPlan, by_size: Sequence[ModelShape]) -> Largest:
    for shape in by_size:
        tokens = min(job.workload.seq_len, shape.max_seq_len)
        workload = replace(job.workload, seq_len=tokens)
        context = replace(job, shape=shape, workload=workload).context(engine, machine)
        plan = plan_engine(context, job.settings_of(engine))
        if plan.fits:
            prediction = plan.prediction
            return Largest(
                engine=engine, model=shape.name, parameters=shape.parameters, step_s=prediction.step_s,
                on_disk=prediction.disk_read_bytes > 0,
            )  # fmt: skip
        if not plan.available:
            break
    return Largest(engine=engine, model=None)
