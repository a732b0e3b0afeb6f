"""A study as a document: page one, then curves, trials and what made them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import tomli_w

from engines import entry
from harness.records.columns import Column
from harness.records.job import Job
from harness.records.run import Environment
from profiles.documents import adapter
from profiles.language import enumerated, quantity, translated
from profiles.units import NOT_MEASURED, format_bytes, format_seconds
from reports.decide import Judgement, Verdict, state_text, state_word
from reports.format import Table, model_title
from reports.judging.ranking import State
from reports.messages import say, several_items
from reports.pages.document import (
    AskedRow,
    Block,
    Bullets,
    Document,
    Facts,
    FrontPage,
    Lines,
    NamedText,
    Paragraph,
    Section,
    Sheet,
    Tile,
)
from reports.provenance import data_name, period
from reports.studies.answer import (
    answer_first,
    budget_text,
    command,
    metric_text,
    reached_text,
    spread_text,
    state_of_method,
    target_text,
)
from reports.studies.curves import quality_chart, target_chart
from reports.studies.read import LoadedStudy
from reports.studies.tables import (
    WITHOUT,
    StudiedMethod,
    median_of,
    method_columns,
    trial_columns,
    without_result,
)
from reports.tables.machine import machine_facts

T = TypeVar("T")


def study_document(study: LoadedStudy, verdict: Verdict) -> Document:
    """In the language spoken."""
    methods = answer_first(study)
    metric = study.result.metric
    rows = [StudiedMethod(result=each, study=study) for each in methods]
    searched = [each for each in study.trials if each.rung < study.last_rung]
    finals = [each for each in study.trials if each.rung == study.last_rung]
    blocks: dict[str, list[Block]] = {
        "methods": [
            Sheet(
                key="study_methods",
                title=say("sheet.study_methods"),
                table=Table.of(method_columns(study), rows, say("tablenote.study_methods")),
            ),
            *_there(target_chart(methods)),
        ],
        "quality": _there(quality_chart(study, methods)),
        "seeds": _sheet("study_seeds", trial_columns(metric), finals),
        "search": _sheet("study_search", trial_columns(metric), searched),
        "risks": [Bullets(items=verdict.warnings)] if verdict.warnings else [],
        "failures": _sheet("failures", WITHOUT, without_result(study))
        or [Paragraph(text=say("section.no_failures"))],
        "machine": [
            Sheet(
                key="machine",
                title=say("sheet.machine"),
                table=machine_facts(study.machine, _environment(study)),
            )
        ],
        "reproduce": _reproduce(study),
        "reading": [Bullets(items=tuple(say(f"study.reading_{key}") for key in READING))],
    }
    return Document(
        title=say("study.title", model=model_title(study.plan.job.model), data=_data(study)),
        made_by=say("study.made_by", name=study.name),
        front=_front(study, verdict, rows),
        sections=tuple(
            Section(key=key, title=say(_TITLES.get(key, f"section.{key}")), blocks=tuple(found))
            for key, found in blocks.items()
            if found
        ),
    )


READING = ("verdict", "target", "same", "time", "search", "seeds")
_TITLES = {"seeds": "study.section_seeds", "search": "study.section_search"}


def _there(*found: Block | None) -> list[Block]:
    return [one for one in found if one is not None]


def _sheet(key: str, columns: Sequence[Column[T]], rows: Sequence[T]) -> list[Block]:
    return [Sheet(key=key, title=say(f"sheet.{key}"), table=Table.of(columns, rows))] if rows else []


def _environment(study: LoadedStudy) -> Environment:
    return next((each for each in study.trials if each.end_state == "ok"), study.trials[0]).environment


def _data(study: LoadedStudy) -> str:
    return data_name(study.plan.job.data.train)


def _front(study: LoadedStudy, verdict: Verdict, rows: Sequence[StudiedMethod]) -> FrontPage:
    chosen = next((one for one in rows if one.result.name == verdict.method), None)
    told = chosen or next((one for one in rows if one.result.test is not None), None)
    others = [say("verdict.state", engine=one.engine, state=state_word(one.state)) for one in verdict.methods]
    asides = []
    if chosen is not None:
        asides.append(say("verdict.method", summary=translated(entry(chosen.result.engine).summary)))
    if verdict.settings:
        asides.append(say("verdict.settings", settings=verdict.settings))
    if len(others) > 1:
        asides.append(say("show.sentences").join([say("verdict.other_methods"), several_items(others)]))
    parts = [(say("front.purpose"), _purpose(study)), (say("front.conditions"), _conditions(study))]
    if told is not None:
        parts.append((say("front.effect"), _effect(told)))
    return FrontPage(
        state=verdict.state,
        state_text=state_text(verdict.state),
        sentence=verdict.sentence,
        asides=tuple(asides),
        command=verdict.next_command,
        tiles=() if told is None else _tiles(told),
        tiles_title="" if told is None else say("section.key_figures", method=told.result.name),
        parts=tuple(parts),
        risks=verdict.warnings,
        criteria=tuple(_asked(study, one) for one in rows),
        decision=tuple((say(f"section.{key}"), "") for key in ("decision", "owner", "date", "next_gate")),
    )


def _purpose(study: LoadedStudy) -> tuple[NamedText, ...]:
    model = model_title(study.plan.job.model)
    return ((say("setting.question_label"), say("study.question", model=model, data=_data(study))),)


def _conditions(study: LoadedStudy) -> tuple[NamedText, ...]:
    plan, environment = study.plan, _environment(study)
    job = plan.job
    weights = "random_weights" if job.model.random_weights else "checkpoint"
    sizes = enumerated(
        say(f"study.{name}_rows", count=f"{count:,}")
        for name, count in (
            ("train", plan.sizes.train), ("development", plan.sizes.development), ("test", plan.sizes.test)
        )
        if count is not None
    )  # fmt: skip
    gpu = environment.gpu_name or say("setting.no_gpu")
    return (
        (
            say("setting.model_label"),
            say("study.model", model=model_title(job.model), weights=say(f"setting.{weights}")),
        ),
        (
            say("study.data_label"),
            say("study.data", data=_data(study), sizes=say("study.at_most", sizes=sizes) if sizes else ""),
        ),
        (say("study.target_label"), target_text(study)),
        (
            say("study.budget_label"),
            say("study.budget", budget=budget_text(study), seeds=len(plan.seeds), rates=plan.rungs[0].rates),
        ),
        (
            say("setting.workload_label"),
            say("study.workload", batch_size=job.batch_size, seq_len=job.seq_len, dtype=job.dtype),
        ),
        (
            say("setting.machine_label"),
            say(
                "setting.machine", gpu=gpu, cpu=environment.cpu, cores=environment.cores_usable,
                memory=format_bytes(environment.host_memory_bytes), held="",
            ),
        ),
        (say("setting.date_label"), period([each.time for each in study.trials])),
        *([(say("study.about_label"), study.about)] if study.about else []),
    )  # fmt: skip


def _effect(one: StudiedMethod) -> tuple[NamedText, ...]:
    metric, result = one.study.result.metric, one.result
    majority = one.study.result.majority_class
    name = say(f"study_metric.{metric}")
    quality = say(
        "study.quality_told", metric=name, test=spread_text(metric, result.test),
        before=metric_text(metric, one.study.result.zero_shot),
        majority=""
        if majority is None or metric != "accuracy"
        else say("study.majority", value=metric_text(metric, majority)),
    )  # fmt: skip
    memory = [
        say(key, memory=format_bytes(int(value)))
        for key, value in (
            ("verdict.gpu_memory", one.largest("peak_gpu_reserved_bytes")),
            ("verdict.host_memory", one.largest("peak_host_bytes")),
        )
        if value is not None
    ]
    return (
        (say("study.target_time"), reached_text(result)),
        (say("front.quality"), quality),
        (say("front.memory"), enumerated(memory) or NOT_MEASURED),
        (
            say("study.search_label"),
            say(
                "study.search_told",
                search=format_seconds(result.search_s),
                train=format_seconds(result.train_s),
            ),
        ),
    )


def _tiles(one: StudiedMethod) -> tuple[Tile, ...]:
    metric, result = one.study.result.metric, one.result
    reached = result.reached
    gpu = one.largest("peak_gpu_reserved_bytes")
    host = one.largest("peak_host_bytes")
    taken = host if gpu is None else gpu
    return (
        Tile(
            label=say("study.target_time"),
            value=quantity(format_seconds(reached.median)) if reached else reached_text(result),
            detail=_seeds(quantity(format_seconds(s)) for s in result.time_to_target_s if s is not None),
            known=reached is not None,
        ),
        Tile(
            label=say("study.test_label", metric=say(f"study_metric.{metric}")),
            value=quantity(metric_text(metric, median_of(result.test))),
            detail=say(
                "tile.quality_before", value=metric_text(metric, one.study.result.zero_shot), native=""
            ),
            known=result.test is not None,
        ),
        Tile(
            label=say("tile.host" if gpu is None else "tile.gpu"),
            value=quantity(format_bytes(None if taken is None else int(taken))),
            detail="",
            known=taken is not None,
        ),
        Tile(
            label=say("study.search_label"),
            value=quantity(format_seconds(result.search_s)),
            detail=say("study.search_detail"),
        ),
    )


def _seeds(times: Iterable[str]) -> str:
    return say("study.each_seed", times=several_items(times) or say("study.not_reached"))


_OUTCOMES: Mapping[State, Judgement] = {
    "GO": "pass", "CONDITIONAL GO": "pass", "NO-GO": "fail", "INCONCLUSIVE": "unknown",
}  # fmt: skip


def _asked(study: LoadedStudy, one: StudiedMethod) -> AskedRow:
    """The target, asked of each method."""
    result = one.result
    state = state_of_method(study, result)
    outcome = _OUTCOMES[state]
    best = say("study.best", value=spread_text(study.result.metric, result.development))
    measured = reached_text(result) if result.test is not None else say("study.no_result")
    return AskedRow(
        level=None,
        id=result.name,
        outcome=outcome,
        note=translated(result.why_not or "") or best,
        cells=(
            say("study.reaches"), target_text(study), measured, say("table.not_predicted"),
            say(f"outcome.{outcome}"),
        ),
    )  # fmt: skip


def _reproduce(study: LoadedStudy) -> list[Block]:
    environment = _environment(study)
    missing = say("reproduce.not_known")
    versions = {
        "python": environment.python, "torch": environment.torch, "transformers": environment.transformers,
    }  # fmt: skip
    state = {True: "dirty", False: "clean", None: "unknown"}[environment.dirty]
    job = adapter(Job).dump_python(study.plan.job, mode="json", exclude_none=True)
    return [
        Lines(text=f"{command(study, 'again')}\nlspzo-bench report again"),
        Facts(
            items=(
                (say("reproduce.program"), f"lspzo-bench {environment.program}"),
                (
                    say("reproduce.commit"),
                    say(
                        "reproduce.commit_state",
                        commit=environment.commit or missing,
                        state=say(f"reproduce.{state}"),
                    ),
                ),
                (
                    say("reproduce.versions"),
                    enumerated(f"{name} {version or missing}" for name, version in versions.items()),
                ),
                (say("reproduce.driver"), environment.gpu_driver or missing),
                (say("reproduce.platform"), environment.platform),
                (say("reproduce.seeds"), enumerated(map(str, study.plan.seeds))),
                (say("reproduce.runs"), period([each.time for each in study.trials])),
            )
        ),
        Paragraph(text=say("section.job")),
        Lines(text=tomli_w.dumps(job), kind="toml"),
    ]
