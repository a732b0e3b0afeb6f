"""A folder and its verdict as a document: the first page and all sections after it. Pure."""

from __future__ import annotations

import tomli_w

from harness.records.job import Job
from harness.records.stats import DISTURBED_FACTOR
from profiles.documents import adapter
from reports import provenance
from reports.criteria import Criteria
from reports.decide import Verdict
from reports.findings import exactness
from reports.findings.breakdown import busy_table, overlap_table
from reports.format import Table, model_title
from reports.judging.untried import Untried
from reports.load import Loaded
from reports.measured.measurements import Measurements
from reports.messages import say
from reports.pages.alternatives import alternatives_table, break_even_table
from reports.pages.document import (
    Block,
    Bullets,
    Document,
    Drawing,
    Facts,
    Lines,
    Paragraph,
    Section,
    Sheet,
    Ticks,
)
from reports.pages.drawn import figures
from reports.pages.front import front_page
from reports.pages.methods import best_first, methods_table
from reports.pages.phrases import disclosures, phrases
from reports.pages.risks import gates_table, risks_table
from reports.pages.upgrades import what_upgrades_bring
from reports.tables.criteria import why_table
from reports.tables.machine import machine_facts
from reports.tables.methods import memory_table, speed_table
from reports.tables.predictions import plan_notes, prediction_table


def document(
    loaded: Loaded, verdict: Verdict, criteria: Criteria, all_: Measurements, untried: Untried
) -> Document:
    """In the language spoken."""
    charts = figures(best_first(verdict, all_), all_)
    blocks: dict[str, list[Block]] = {
        "methods": _methods(verdict, all_, charts),
        "quality": _of(charts, "quality", "loss"),
        "prediction": _prediction(loaded, all_),
        "time": [
            *_sheets(busy=busy_table(all_), overlap=overlap_table(all_)),
            *_of(charts, "busy"),
        ],
        "alternatives": _alternatives(loaded, verdict, criteria, all_, untried),
        "risks": _risks(verdict, all_),
        "gates": [
            *_sheets(gates=gates_table(verdict, all_)),
            Paragraph(text=say("gate.note"), small=True),
        ],
        "governance": _governance(verdict),
        "phrases": _phrases(loaded, verdict, all_),
        "why": _sheets(criteria=why_table(verdict)),
        "machine": _sheets(
            machine=machine_facts(loaded.machine, provenance.best_known(loaded.runs).environment)
        ),
        "failures": _failures(loaded),
        "reproduce": _reproduce(loaded, verdict),
        "disclosure": _bullets(disclosures(loaded, all_)),
        "open": _bullets(provenance.not_measured(all_)),
        "reading": _bullets(tuple(say(f"reading.{key}", factor=DISTURBED_FACTOR) for key in READING)),
    }
    return Document(
        title=say("section.title", model=model_title(loaded.job.model)),
        made_by=say("section.made_by", name=loaded.name),
        front=front_page(loaded, verdict, criteria, all_),
        sections=tuple(
            Section(key=key, title=say(f"section.{key}"), blocks=tuple(found))
            for key, found in blocks.items()
            if found
        ),
    )


READING = ("verdict", "method", "range", "same", "steps", "predicted", "gpu")
"""Keys of what a reader should know, in order."""


def _sheets(**found: Table | None) -> list[Block]:
    """Those that are there, by their keys."""
    return [
        Sheet(key=key, title=say(f"sheet.{key}"), table=table)
        for key, table in found.items()
        if table is not None and table.rows
    ]


def _bullets(items: tuple[str, ...]) -> list[Block]:
    return [Bullets(items=items)] if items else []


def _of(charts: dict[str, Drawing], *names: str) -> list[Block]:
    return [charts[name] for name in names if name in charts]


def _methods(verdict: Verdict, all_: Measurements, charts: dict[str, Drawing]) -> list[Block]:
    blocks = _sheets(methods=methods_table(verdict, all_))
    blocks += _of(charts, "job", "step", "gpu", "host")
    blocks += _sheets(speed=speed_table(all_), memory=memory_table(all_))
    if same := exactness.exact(all_):
        blocks.append(Paragraph(text=same, small=True))
    return blocks


def _prediction(loaded: Loaded, all_: Measurements) -> list[Block]:
    notes = plan_notes(loaded)
    blocks = _sheets(prediction=prediction_table(loaded, all_))
    return [*blocks, *([Bullets(items=notes, small=True)] if notes else [])]


def _alternatives(
    loaded: Loaded, verdict: Verdict, criteria: Criteria, all_: Measurements, untried: Untried
) -> list[Block]:
    blocks = _sheets(
        alternatives=alternatives_table(verdict, all_, untried),
        break_even=break_even_table(criteria.prices),
    )
    found = what_upgrades_bring(loaded, verdict.about, all_)
    return [*blocks, *([Paragraph(text=found)] if isinstance(found, str) else _sheets(upgrades=found))]


def _risks(verdict: Verdict, all_: Measurements) -> list[Block]:
    return [*_bullets(verdict.warnings), *_sheets(risks=risks_table(verdict, all_))]


def _governance(verdict: Verdict) -> list[Block]:
    items = tuple((one.seen, one.about, one.text) for one in verdict.governance)
    return [Ticks(items=items)] if items else []


def _phrases(loaded: Loaded, verdict: Verdict, all_: Measurements) -> list[Block]:
    said = phrases(loaded, verdict, all_)
    return [Paragraph(text=say("phrase.note"), small=True), Bullets(items=said)] if said else []


def _failures(loaded: Loaded) -> list[Block]:
    found = provenance.failures_table(loaded)
    return _sheets(failures=found) if found else [Paragraph(text=say("section.no_failures"))]


def _reproduce(loaded: Loaded, verdict: Verdict) -> list[Block]:
    job = adapter(Job).dump_python(loaded.job, mode="json", exclude_none=True)
    verify = [plan.verify_command for plan in loaded.plans if plan.verify_command]
    blocks: list[Block] = [
        Lines(text="\n".join(provenance.commands(loaded))),
        Facts(items=provenance.provenance(loaded, verdict)),
    ]
    if verify:
        blocks += [Paragraph(text=say("section.verify")), Lines(text="\n".join(verify))]
    return [*blocks, Paragraph(text=say("section.job")), Lines(text=tomli_w.dumps(job), kind="toml")]
