"""What `recommend` answers: plans, the whole job's time, ways out, and the verdict. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines.errors import UserError
from engines.files.reading import expanded, is_folder
from engines.shapes import ModelShape
from harness.job_arguments import job_arguments
from harness.models.configs import ENCODERS, NAMED_SHAPES, local_folder, named_shape
from harness.models.weight_files import first_broken
from harness.pipeline import ROUNDS
from harness.records.job import Job, ModelSource
from harness.resolve import resolve_shape
from harness.sharing.like_machines import LikeMachines, beside_catalogue, beside_like_machines
from harness.sharing.shared_result import Submission
from profiles.advice.amount import Amount
from profiles.advice.calibration import Calibration, calibrated
from profiles.advice.explain import explained
from profiles.advice.job_time import JobForecast, Rates, job_forecast
from profiles.advice.outlook import JobToPlan, outlook
from profiles.advice.target import Largest, Target, TargetAnswer, answers, largest_models
from profiles.advice.verdict import PlanVerdict, verdict_of
from profiles.advice.ways_out import Blocked, WayOut, way_out
from profiles.advice.what_if import WhatIf, what_if
from profiles.catalog import FOLDER, machine_names
from profiles.documents import adapter
from profiles.machine import Machine, load_machine
from profiles.planning.plan import Plan
from profiles.planning.recommend import plan_engine, rank, with_scaling
from profiles.units import format_bytes

RECOMMENDATION_VERSION = 1
"""Schema version of `recommend --json`, which `recommend --schema` describes."""


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Of the model that was planned for."""

    name: str
    family: str
    head: str
    parameters: int
    num_blocks: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The formulas of a plan that fits, with its numbers filled in."""

    engine: str
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The document of `recommend --json`. Plans are in order of rank: those that fit first, with gradients
    before without, by time."""

    machine: Machine
    job: Job
    model: ModelSizes
    amount: Amount | None
    """All that the job trains; `None`: neither flags nor data say."""
    plans: tuple[Plan, ...]
    forecasts: tuple[JobForecast, ...]
    """Of the whole job for each plan that fits, or of one step where `amount` is not known."""
    ways_out: tuple[WayOut, ...]
    """For methods that do not fit, and can."""
    blocked: tuple[Blocked, ...]
    """Methods that no change of the job lets fit."""
    verdict: PlanVerdict
    calibration: Calibration | None = None
    what_if: tuple[WhatIf, ...] = ()
    largest: tuple[Largest, ...] = ()
    explanations: tuple[Explanation, ...] = ()
    answers: tuple[TargetAnswer, ...] = ()
    """Machines of the catalogue against `target`."""
    target: Target | None = None
    like_machines: tuple[LikeMachines, ...] = ()
    """What others measured of this job on machines with the same card, by method; then, with `what_if` or
    `target`, for machines of the catalogue."""
    schema_version: int = RECOMMENDATION_VERSION


def schema() -> dict[str, Any]:
    """JSON Schema of `Recommendation`."""
    found: dict[str, Any] = adapter(Recommendation).json_schema(mode="serialization")
    return found


def without_weights(source: ModelSource) -> ModelSource:
    """What a plan needs of a model: its configuration. A config.json may be named itself, and where there are
    no weights random ones are taken."""
    name = source.name
    if name in NAMED_SHAPES:
        return replace(source, random_weights=True)
    path = expanded(name)
    if path.name == "config.json" and path.is_file():
        path = path.parent
        source = replace(source, name=str(path))
    if is_folder(path) and not any(Path(path).glob("*.safetensors")):
        return replace(source, random_weights=True)
    return source


def broken_weights(source: ModelSource) -> str | None:
    """What a run of a checkpoint in a folder would be refused for, though its plan needs no weights; `None`:
    nothing, or there are none."""
    folder = None if source.random_weights else local_folder(source)
    broken = None if folder is None else first_broken(folder)
    if broken is None:
        return None
    return (
        f"plans are made of config.json alone, but no run can load the weights: {broken}; download them again"
    )


def catalogue() -> dict[str, Machine]:
    """Machines that come with the program, by name."""
    return {name: load_machine(FOLDER / f"{name}.json") for name in machine_names()}


def limits_beyond(job: Job, machine: Machine) -> list[str]:
    """What was asked for and the machine does not have: limits that limit nothing, GPUs that are assumed. And
    a limit in GB (1e9 bytes), which is less than what a card of so many GB holds."""
    found = []
    gpu, limits = machine.gpu, job.limits
    if gpu is None and limits.vram_bytes is not None:
        found.append(
            f"--vram {format_bytes(limits.vram_bytes)} limits nothing: no GPU is found here, so plans are "
            "for the processor; --profile for a machine with a GPU, such as --profile rtx-4090"
        )
    if gpu is not None and limits.vram_bytes is not None and limits.vram_bytes > gpu.total_bytes:
        found.append(
            f"--vram {format_bytes(limits.vram_bytes)} is more than the {format_bytes(gpu.total_bytes)} of "
            f"{gpu.name}, so plans use what it has; --what-if or --profile for a larger card"
        )
    limit, decimal = limits.vram_bytes, 10**9
    if gpu is not None and limit is not None and limit % decimal == 0 and limit < gpu.total_bytes:
        size = limit // decimal
        found.append(
            f"--vram {size}GB is {format_bytes(limit)}; a card sold as {size} GB holds {size} GiB "
            f"(--vram {size}GiB), less what its driver and a desktop take"
        )
    if gpu is not None and limits.gpus > gpu.num_gpus:
        found.append(
            f"--gpus {limits.gpus} is more than this machine has: the others are taken to be like "
            f"{gpu.name}, with links of their own to one host memory"
        )
    if job.accumulation < limits.ranks:
        found.append(
            f"{limits.ranks} processes share out the micro-batches of a step, which has {job.accumulation}: "
            f"--accumulation {limits.ranks} gives each one"
        )
    if limits.host_bytes is not None and limits.host_bytes > machine.memory.total_bytes:
        found.append(
            f"--host-memory {format_bytes(limits.host_bytes)} is more than the "
            f"{format_bytes(machine.memory.total_bytes)} of this machine, so plans use what it has"
        )
    return found


def unmeasured_limit(answer: Recommendation) -> str | None:
    """That plans pin what nothing says can be pinned, where drivers are known to allow little."""
    memory = answer.machine.memory
    most = max((plan.prediction.pinned_bytes for plan in answer.plans if plan.fits), default=0)
    if "WSL" not in answer.machine.platform or memory.pinned_bytes.value is not None or most < PINNED_ON_WSL:
        return None
    return (
        f"plans pin up to {format_bytes(most)}, and WSL2 allows a few GB: 'lspzo-bench probe --out m.json' "
        "measures how much, then --profile m.json plans within it"
    )


PINNED_ON_WSL = 500 * 10**6
"""What a process on WSL2 has been refused more than (microsoft/WSL#14078)."""


def recommended(
    job: Job,
    planned: JobToPlan,
    machine: Machine,
    *,
    rates: Rates,
    calibration: Calibration | None = None,
) -> Recommendation:
    """Everything but `what_if`, `largest` and `answers`. Raises `UserError` for settings that make no
    sense."""
    contexts = {engine: planned.context(engine, machine) for engine in planned.engines}
    on_one = replace(planned, gpus=1, nodes=1)
    plans = []
    for engine, context in contexts.items():
        own = replace(job, settings={name: each for name, each in job.settings.items() if name == engine})
        given = planned.settings_of(engine)
        plan = plan_engine(context, given, job_arguments(own, has_gpu=machine.gpu is not None))
        plan = with_scaling(plan, context, on_one.context(engine, machine), given)
        plans.append(replace(plan, prediction=calibrated(plan.prediction, engine, calibration)))
    forecasts = {
        plan.engine: job_forecast(plan, contexts[plan.engine], planned.amount_or_step, rates, calibration)
        for plan in plans
        if plan.fits
    }
    plans.sort(key=lambda plan: _by_end(plan, forecasts.get(plan.engine)))
    found = [way_out(plan, contexts[plan.engine], planned.settings_of(plan.engine)) for plan in plans]
    ways = {each.engine: each for each in found if isinstance(each, WayOut)}
    shape = planned.shape
    return Recommendation(
        machine=machine,
        job=job,
        model=ModelSizes(
            name=shape.name, family=shape.family, head=shape.head, parameters=shape.parameters,
            num_blocks=shape.num_blocks, hidden=shape.hidden, vocabulary=shape.vocabulary,
        ),
        amount=planned.amount,
        plans=tuple(plans),
        forecasts=tuple(forecasts[plan.engine] for plan in plans if plan.fits),
        ways_out=tuple(ways.values()),
        blocked=tuple(each for each in found if isinstance(each, Blocked)),
        verdict=verdict_of(
            plans, forecasts, ways, shape, of_job=planned.amount is not None,
            compare=f"lspzo-bench compare {job_arguments(job, has_gpu=machine.gpu is not None)}",
            compare_steps=ROUNDS * (job.steps + job.warmup_steps),
        ),
        calibration=calibration,
    )  # fmt: skip


def _by_end(plan: Plan, forecast: JobForecast | None) -> tuple[bool, bool, bool, float]:
    """By the job's end: shorter sequences are not as much faster with every method."""
    fits, kind, is_timeless, step_s = rank(plan)
    seconds = None if forecast is None else forecast.seconds
    return fits, kind, is_timeless, step_s if seconds is None else seconds


def with_like_machines(answer: Recommendation, shared: Sequence[Submission]) -> Recommendation:
    found = beside_like_machines(answer.job, answer.machine, answer.plans, shared)
    return replace(answer, like_machines=found)


def with_like_catalogue(
    answer: Recommendation, planned: JobToPlan, shared: Sequence[Submission]
) -> Recommendation:
    """What others measured of this job with the cards of the catalogue's machines, beside what is planned
    there; the user's own limits do not hold there."""
    free = replace(planned, vram_bytes=None, host_bytes=None)

    def plans_on(machine: Machine) -> list[Plan]:
        return [
            plan_engine(free.context(engine, machine), free.settings_of(engine)) for engine in free.engines
        ]

    found = beside_catalogue(answer.job, catalogue(), plans_on, shared)
    return replace(answer, like_machines=(*answer.like_machines, *found))


def with_explanations(answer: Recommendation, planned: JobToPlan) -> Recommendation:
    forecasts = {each.engine: each for each in answer.forecasts}
    found = []
    for plan in answer.plans:
        if plan.fits:
            context = planned.context(plan.engine, answer.machine)
            lines = explained(plan, context, forecasts.get(plan.engine))
            found.append(Explanation(engine=plan.engine, lines=lines))
    return replace(answer, explanations=tuple(found))


def with_what_if(answer: Recommendation, planned: JobToPlan) -> Recommendation:
    """The table of single upgrades and of the catalogue's machines, and the largest model of each method."""
    now = outlook("now", answer.machine, planned)
    return replace(
        answer,
        what_if=what_if(now, answer.machine, planned, catalogue()),
        largest=largest_models(answer.machine, planned, _decoders()),
    )


def with_target(answer: Recommendation, planned: JobToPlan, target: Target) -> Recommendation:
    if target.model is not None:
        planned = replace(planned, shape=shape_of_target(target.model), amount=None)
    return replace(answer, target=target, answers=answers(catalogue(), planned, target, answer.machine))


NEAR_SIZE = 0.25
"""A size such as 70b means the nearest named shape, which may be so much larger or smaller."""


def shape_of_target(name: str) -> ModelShape:
    """Of a named shape, of a folder with a config.json, or of a size such as `70b`: the nearest named shape.

    Raises `UserError` for anything else.
    """
    model = ModelSource(name=model_of_target(name))
    return resolve_shape(Job(model=without_weights(model), seq_len=1))


def model_of_target(name: str) -> str:
    """The model's name: a shape or folder as it is, for a size such as `70b` the nearest named shape.

    Raises `UserError` if there is none of about that size.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?)[bB]", name)
    if size is None:
        return name
    wanted = float(size[1]) * 1e9
    nearest = min(_decoders(), key=lambda shape: abs(shape.parameters - wanted))
    if abs(nearest.parameters - wanted) > NEAR_SIZE * wanted:
        raise UserError(
            f"--target model={name}",
            f"no named shape is of about that size (the nearest is {nearest.name})",
            "name a folder with a config.json, or a shape that 'lspzo-bench models' lists",
        )
    return nearest.name


def _decoders() -> list[ModelShape]:
    return [
        named_shape(name)
        for name, each in NAMED_SHAPES.items()
        if (each.config["model_type"] not in ENCODERS and each.hub_id is not None) or name == "opt-175b"
    ]
