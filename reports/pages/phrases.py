"""Sentences to say in a meeting, of measured numbers alone, and a line of disclosure per result. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from engines import ENGINES, YARDSTICK
from harness.records.comparison import beside_native
from harness.records.memory_limits import gpu_limit_bytes
from harness.records.run import Run
from harness.records.stats import Rounds
from profiles.language import enumerated
from profiles.units import format_bytes
from reports.decide import Verdict
from reports.findings.exactness import compare_with_reference
from reports.format import counted, digits, job_in_short, model_title, percent, span, times
from reports.judging import stated
from reports.judging.quality import learned
from reports.load import Loaded
from reports.measured.measurements import DOES_NOT_FIT, Measurements, is_emulated
from reports.messages import say


def phrases(loaded: Loaded, verdict: Verdict, all_: Measurements) -> tuple[str, ...]:
    """With the runs that each rests on. Nothing predicted, and of an emulated machine no time."""
    engine = verdict.method
    if engine is None or not all_.of(engine).ok:
        return ()
    evidence = enumerated(run.id for run in all_.of(engine).ok)
    return tuple(
        say("phrase.with_evidence", text=text, runs=evidence) for text in _own_phrases(loaded, engine, all_)
    )


def _own_phrases(loaded: Loaded, engine: str, all_: Measurements) -> Iterator[str]:
    rounds, native = all_.of(engine), all_.of(YARDSTICK)
    run = rounds.ok[0]
    model = model_title(loaded.job.model)
    gpu, limit = stated.gpu_peak(engine, all_), gpu_limit_bytes(run, all_.machine)
    where = run.environment.emulated or run.environment.gpu_name or run.environment.cpu
    if gpu.value is not None and limit:
        yield say(
            "phrase.gpu_random" if run.model.random_weights else "phrase.gpu",
            model=model,
            where=where,
            method=engine,
            memory=stated.memory_text(gpu),
            limit=format_bytes(limit),
            share=percent(gpu.value / limit),
        )
    ended = {one.end_state for one in native.runs}
    if engine != YARDSTICK and ended & (DOES_NOT_FIT - {"skipped_infeasible"}):
        yield say("phrase.native_out", method=engine)
    beside = stated.gpu_peak(YARDSTICK, all_)
    if engine != YARDSTICK and gpu.value is not None and beside.value:
        yield say("phrase.gpu_share", method=engine, share=percent(gpu.value / beside.value))
    if not is_emulated(rounds) and rounds.step_s is not None:
        beside_it = beside_native(rounds, native)
        if beside_it is not None and beside_it.answer in ("faster", "slower"):
            yield say(f"phrase.{beside_it.answer}", method=engine, ratio=times(beside_it.ratio))
        rate = rounds.tokens_per_s
        if rate is not None:
            yield say(
                "phrase.rate",
                method=engine,
                model=model,
                where=where,
                step=stated.plain_time(stated.step_s(engine, all_)),
                rate=digits(rate.median),
            )
    found = learned(engine, all_)
    if found is not None:
        yield say(f"phrase.{found.kind}", method=engine, before=found.before, after=found.told)
    reference = ENGINES[engine].reference
    same = compare_with_reference(engine, reference, all_) if reference else None
    if reference and same is not None and not same.differ:
        yield say("phrase.exact", method=engine, reference=reference, steps=same.steps)


def disclosures(loaded: Loaded, all_: Measurements) -> tuple[str, ...]:
    """One line for each method that was measured: system, processors, software, result, records."""
    return tuple(_disclosure(loaded, engine, all_) for engine in all_.engines if all_.of(engine).ok)


def _disclosure(loaded: Loaded, engine: str, all_: Measurements) -> str:
    rounds = all_.of(engine)
    run = rounds.ok[0]
    environment = run.environment
    time = stated.step_s(engine, all_)
    peak = stated.gpu_peak(engine, all_)
    memory = stated.memory_text(peak if peak.value is not None else stated.host_peak(engine, all_))
    return say(
        "disclosure.line",
        method=_with_settings(run),
        model=model_title(loaded.job.model),
        job=job_in_short(loaded.job),
        result=stated.time_text(time),
        memory=memory,
        runs=counted("run", len(rounds.ok)),
        gpu=say(
            "disclosure.gpu",
            count=loaded.job.limits.gpus,
            name=environment.gpu_name,
            driver=environment.gpu_driver or "?",
        )
        if environment.gpu_name
        else say("setting.no_gpu"),
        cpu=environment.cpu,
        cores=environment.cores_usable,
        host=format_bytes(environment.host_memory_bytes),
        emulated=say("disclosure.emulated", name=environment.emulated) if environment.emulated else "",
        software=enumerated(
            (
                f"lspzo-bench {environment.program}",
                f"torch {environment.torch or '?'}",
                f"transformers {environment.transformers or '?'}",
            )
        ),
        commit=(environment.commit or "?")[:12],
        state=say(f"reproduce.{_clean(environment.dirty)}"),
        time=span(*_days(rounds)),
        records=enumerated(f"runs/{one.id}.json" for one in rounds.ok),
    )


def _days(rounds: Rounds) -> tuple[str, str]:
    """The first and the last on which its runs began, in whatever order: a clock may have been set back."""
    days = [one.time[:10] for one in rounds.ok]
    return min(days), max(days)


def _with_settings(run: Run) -> str:
    settings = " ".join(f"{key}={value}" for key, value in sorted(run.plan.settings.items()))
    return f"{run.engine} {settings}".strip()


def _clean(dirty: bool | None) -> str:
    return "unknown" if dirty is None else "dirty" if dirty else "clean"
