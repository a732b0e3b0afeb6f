"""`compare --target --budget`: what an hour of each method is worth. It prints nothing.

Plan, then trials one after the other, each in its own process, then the judgement. What is there is kept: a
study that was stopped goes on with its missing trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from engines import engine_of
from engines.errors import UserError
from engines.files.locks import locked_folder
from engines.files.reading import exists
from engines.shapes import ModelShape
from harness.data.examples import examples_of
from harness.models.configs import load_config
from harness.pipeline import find_machine, plan_job
from harness.quality.documents import (
    PLAN,
    MethodTrials,
    QualityTarget,
    StudyPlan,
    StudySizes,
    TrialBudget,
    load_plan,
    rate_grid,
    rungs_of,
    save_plan,
)
from harness.quality.judge import StudyResult, judge_study
from harness.quality.trials import Launch, PreparedStudy, StudyTrials, curves, launched, one_process
from harness.records.job import JOB_FILE, Job, save_job
from harness.records.metrics import INSTALL, OF_LIBRARIES, has_libraries, metrics_of_task
from harness.records.shared import shared_machine
from harness.resolve import resolve_shape
from harness.runs.emulate import emulated
from harness.runs.events import OnRunEvent
from harness.runs.launch import WORK
from harness.runs.sweep_folder import check_folder
from profiles.catalog import find_profile
from profiles.documents import to_json, write_whole
from profiles.machine import MACHINE_FILE, Machine, save_machine
from profiles.planning.plan import Plan

RESULT, CURVES = "quality.json", "curves.csv"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRequest:
    """What is asked for."""

    engines: Sequence[str]
    """Names of methods: of engines, and `lsp:half` for one with settings of its own."""
    out: Path
    target: QualityTarget
    budget: TrialBudget
    seeds: int = 3
    test: str | None = None
    sizes: StudySizes = field(default_factory=StudySizes)
    profile: Path | None = None
    emulate: Path | None = None
    machine: Machine | None = None
    """This one, where it was measured already and neither of the two is named."""
    resume: bool = False
    quiet: bool = False


def prepare_study(job: Job, study: StudyRequest) -> PreparedStudy:
    """The plan of a study, or the one that is in its folder. Writes nothing.

    Raises `UserError` for what is wrong with the arguments before the machine is measured (`check_study`),
    and for a folder with another study.
    """
    shape = check_study(job, study)
    rungs = rungs_of(study.budget, study.seeds, job.workload)
    like = None if study.emulate is None else emulated(find_profile(study.emulate))
    named = study.emulate or study.profile
    machine = study.machine
    if machine is None or named is not None:
        machine = find_machine(named, quiet=study.quiet, known=study.out / MACHINE_FILE)
    plans = _plans(job, shape, machine, study)
    methods = tuple(_method(name, plans[name], study) for name in study.engines)
    plan = StudyPlan(
        job=job, test=study.test, sizes=study.sizes, target=study.target, budget=study.budget,
        seeds=tuple(job.seed + number for number in range(study.seeds)), rungs=rungs, methods=methods,
        emulated=None if like is None else like.machine,
    )  # fmt: skip
    for method in methods:
        _check_long_enough(method, plan)
    if exists(study.out / PLAN):
        plan = _same_plan(load_plan(study.out), plan, study.out)
    return PreparedStudy(plan=plan, shape=shape, machine=machine, plans=plans, emulated=like, out=study.out)


def check_study(job: Job, study: StudyRequest) -> ModelShape:
    """The model's shape. Raises `UserError` for what is wrong on any machine: it needs no measurement."""
    if study.seeds < 1:
        raise UserError("--seeds", "must be positive", "give 3 or more")
    if job.limits.gpus > 1 or job.limits.nodes > 1:
        raise UserError("--gpus", "a study compares methods on one GPU", "leave it out")
    check_folder(study.out, resume=study.resume)
    if study.emulate is not None and study.profile is not None:
        raise UserError("--profile", "--emulate names the machine already", "leave out one of them")
    if study.emulate is not None:
        emulated(find_profile(study.emulate))
    shape = resolve_shape(job)
    check_metric(study.target.metric, job, shape)
    rungs_of(study.budget, study.seeds, job.workload)
    return shape


def _plans(job: Job, shape: ModelShape, machine: Machine, study: StudyRequest) -> dict[str, Plan]:
    """By name of the method; `lsp:half` is planned with its own settings."""
    engines = [name for name in study.engines if engine_of(name) == name]
    plans = {each.engine: each for each in plan_job(job, shape, machine, engines, study.emulate)}
    for name in study.engines:
        if name not in plans:
            engine = engine_of(name)
            own = replace(job, settings={engine: job.settings_of(name)})
            (plans[name],) = plan_job(own, shape, machine, [engine], study.emulate)
    return plans


def check_metric(metric: str, job: Job, shape: ModelShape) -> None:
    """Raises `UserError` for a metric that an evaluation of the task does not give."""
    if job.data.train == "random":
        raise UserError(
            "--data random", "nothing can be learnt from random tokens", "give a file, or builtin"
        )
    examples, by_words = examples_of(job, load_config(job.model)), bool(job.data.template)
    has_classes = bool(examples.labelled)
    known = metrics_of_task(
        shape.head, is_regression=examples.is_regression, has_classes=has_classes, by_words=by_words
    )
    if metric not in known:
        hint = ", or use --template" if shape.head == "causal_lm" and has_classes and not by_words else ""
        raise UserError(
            f"--target {metric}", "this task has no such metric", f"choose from: {', '.join(known)}{hint}"
        )
    if metric in OF_LIBRARIES and not has_libraries():
        raise UserError(f"--target {metric}", "needs scikit-learn and scipy", INSTALL)


def _method(name: str, plan: Plan, study: StudyRequest) -> MethodTrials:
    typed = plan.settings.typed
    if study.budget.seconds is not None and getattr(typed, "schedule", "constant") != "constant":
        raise UserError(
            f"--set {name}.schedule={typed.schedule}",
            "needs to know how many steps there are, and the budget is a time",
            "leave it out, or give the budget in tokens",
        )
    return MethodTrials(
        engine=plan.engine, variant=name.partition(":")[2], settings=plan.settings,
        fits=plan.fits, why_not=plan.why_not, step_s=plan.prediction.step_s,
        rates=rate_grid(typed.learning_rate),
    )  # fmt: skip


def _check_long_enough(method: MethodTrials, plan: StudyPlan) -> None:
    """Raises `UserError` where a step is predicted to take longer than there is between two evaluations."""
    if not method.fits or method.step_s is None:
        return
    for rung in plan.rungs:
        seconds = rung.length.seconds
        if seconds is not None and seconds / rung.length.evaluations < method.step_s:
            short = method.step_s * rung.length.evaluations / seconds
            assert plan.budget.seconds is not None
            raise UserError(
                f"--budget {plan.budget}",
                f"is too short for {method.name}: a trial has {seconds:.3g} s and "
                f"{rung.length.evaluations} evaluations, a step takes {method.step_s:.3g} s",
                f"give {_budget_text(plan.budget.seconds * short)} or more",
            )


def _budget_text(seconds: float) -> str:
    """At least so long, as `--budget` takes it."""
    return f"{math.ceil(seconds)}s" if seconds < 60 else f"{math.ceil(seconds / 60)}min"


def _same_plan(before: StudyPlan, now: StudyPlan, out: Path) -> StudyPlan:
    """The earlier plan, if it asks for the same: predictions may have changed, and its settings count.
    Raises `UserError`."""
    for name in ("job", "test", "sizes", "target", "budget", "seeds", "emulated"):
        if getattr(before, name) != getattr(now, name):
            raise UserError(
                "--resume", f"the study in {out} has another {name}", "give the same flags, or another --out"
            )
    if [each.name for each in before.methods] != [each.name for each in now.methods]:
        raise UserError("--resume", f"the study in {out} has other methods", "give the same --engines")
    return before


def predicted_s(plan: StudyPlan) -> float | None:
    """Of all trials' steps, set-ups and evaluations apart; `None`: not known."""
    total = 0.0
    for method in plan.methods:
        if not method.fits:
            continue
        for rung in plan.rungs:
            trials = rung.rates if rung.rates > 1 else len(plan.seeds)
            if rung.length.seconds is not None:
                total += trials * rung.length.seconds
            elif method.step_s is None:
                return None
            else:
                total += trials * (rung.length.steps or 0) * method.step_s
    return total


MOST_EVALUATED_TOKENS = 16384
"""In one batch of an evaluation: more are no faster on any GPU that is known here."""


def rows_together(ready: PreparedStudy) -> int:
    """Sequences in each batch of an evaluation, alike for every method: more than in training where the GPU
    has room for them beside what each method is predicted to take. A small batch leaves a GPU idle."""
    job, shape, gpu = ready.plan.job, ready.shape, ready.machine.gpu
    if gpu is None:
        return job.batch_size
    limit_bytes = min(gpu.total_bytes, job.limits.vram_bytes or gpu.total_bytes)
    peaks = [each.prediction.peak_gpu_bytes for each in ready.plans.values() if each.fits]
    used_bytes = max(peaks, default=0)
    # A forward pass alone: what a block has at once, in fp32; scores, their fp32 copy and its logarithms.
    scores = shape.vocabulary if shape.predicts_tokens else shape.num_labels
    token_bytes = 4 * (8 * shape.hidden + 3 * shape.intermediate) + 12 * scores
    room_bytes = (limit_bytes - used_bytes) // 2  # the other half for the GPU's context and gaps
    rows = min(room_bytes // (token_bytes * job.seq_len), MOST_EVALUATED_TOKENS // job.seq_len)
    return max(job.batch_size, rows)


def planned_trials(plan: StudyPlan) -> Iterator[tuple[MethodTrials, int, int]]:
    """Method, rung, and how many trials of it there are in the rung."""
    for number, rung in enumerate(plan.rungs):
        for method in plan.methods:
            yield method, number, rung.rates if rung.rates > 1 else len(plan.seeds)


def run_study(
    ready: PreparedStudy,
    *,
    report: Callable[[str], None],
    on_event: OnRunEvent = lambda event: None,
    launch: Launch | None = None,
) -> StudyResult:
    """All missing trials, then the judgement, which is kept in `quality.json` with the curves.

    Raises `UserError` for data that cannot be used and for a folder that cannot be written;
    `KeyboardInterrupt` after the record of a trial that a signal stopped.
    """
    plan, out = ready.plan, ready.out
    data_file = (out / WORK / "data.safetensors").resolve()
    with locked_folder(out):
        job, learnings = plan.job, None
        if launch is None:
            from harness.data.tokenized import save_tokenized
            from harness.quality.splits import learning_of, split

            tokenized = split(plan.job, ready.shape, plan.test, plan.sizes)
            for line in (*tokenized.readings, tokenized.description):
                report(line)
            rows = len(tokenized.held_out)
            job = replace(job, eval_batches=-(-rows // job.batch_size))
            learnings = [
                learning_of(
                    job, ready.shape, tokenized, plan.target.metric, rung.length,
                    tests=rung is plan.rungs[-1], rows_evaluated_together=rows_together(ready),
                )
                for rung in plan.rungs
            ]  # fmt: skip
            save_tokenized(tokenized, data_file)
        save_machine(shared_machine(ready.machine), out / MACHINE_FILE)
        save_plan(plan, out)
        save_job(plan.job, out / JOB_FILE)
        together = (lambda: nullcontext(launch)) if launch is not None else one_process
        trials = StudyTrials(ready, job, learnings, data_file, launch or launched, together, report, on_event)
        records = list(trials.run())
        data_file.unlink(missing_ok=True)
        result = judge_study(plan, records)
        write_whole(out / RESULT, to_json(result))
        write_whole(out / CURVES, curves(records))
        return result
