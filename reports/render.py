"""report.md, report.html, report.json and verdict.json from an output folder. The same folder gives the same
bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from engines.errors import UserError
from profiles.documents import to_json, write_whole
from profiles.language import Language, enumerated, speaking, spoken
from reports.criteria import Criteria, default_criteria, load_criteria
from reports.decide import Verdict, decide, state_text
from reports.findings.governance import governance_lines
from reports.findings.host_speed import about_speeds
from reports.judging.untried import Untried, shape_of, untried_of
from reports.load import Broken, Loaded, load_folder
from reports.measured.measurements import group
from reports.messages import say
from reports.pages.build import document
from reports.pages.data import DataTable, ReportData, data_of, table_of_runs
from reports.pages.document import Document
from reports.provenance import machine_in_short, named, told_of
from reports.studies.answer import study_verdict
from reports.studies.pages import study_document
from reports.studies.read import LoadedStudy, is_study, load_study
from reports.studies.tables import evaluations_table
from reports.warnings import about_integrity


def write_report(
    folder: Path,
    criteria_path: Path | None = None,
    on_broken: Callable[[Broken], None] = lambda broken: None,
    language: Language = "en",
) -> Verdict:
    """Judge what lies in `folder` and write report.md, report.html, report.json and verdict.json there; in
    another language than English also report.ja.md and report.ja.html, which say the same.

    `criteria_path` takes the place of the folder's own criteria.toml. Without either the built-in
    defaults judge, and the report says so. `on_broken` is called with each file that is left out. The verdict
    comes in `language`; what is for programs is in English always. Raises `UserError`.
    """
    source = _source(folder, criteria_path)
    for broken in source.broken:
        on_broken(broken)
    with speaking("en"):
        english = source.told()
        write_whole(folder / "verdict.json", to_json(english.verdict))
        write_whole(folder / "report.json", to_json(source.data(english)))
        _write_pages(english, folder, "en")
    if language == "en":
        return english.verdict
    with speaking(language):
        shown = source.told()
        _write_pages(shown, folder, language)
    return shown.verdict


def _write_pages(document: WrittenReport, folder: Path, language: Language) -> None:
    name = page(folder, language).with_suffix("")
    write_whole(name.with_name(f"{name.name}.md"), render_markdown(document))
    write_whole(name.with_name(f"{name.name}.html"), render_html(document))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """What a report is made of: a folder that was read."""

    broken: tuple[Broken, ...]
    told: Callable[[], WrittenReport]
    """Judged and told in the language spoken."""
    more: tuple[DataTable, ...]
    """Tables for programs alone."""

    def data(self, english: WrittenReport) -> ReportData:
        return data_of(english.verdict, english.document, self.more)


def _source(folder: Path, criteria_path: Path | None) -> _Source:
    """Raises `UserError`."""
    if is_study(folder):
        if criteria_path is not None:
            raise UserError("--criteria", "a study is judged by its own target", "leave it out")
        study = load_study(folder)
        return _Source(broken=study.broken, told=lambda: _study_told(study), more=(evaluations_table(study),))
    loaded = load_folder(folder)
    criteria = load_criteria(criteria_path) if criteria_path is not None else loaded.criteria
    return _Source(
        broken=loaded.broken, told=lambda: written(loaded, criteria), more=(table_of_runs(loaded.runs),)
    )


def _study_told(study: LoadedStudy) -> WrittenReport:
    machines = dict.fromkeys(machine_in_short(each.environment) for each in study.trials)
    told = named(study.plan.job.model, enumerated(machines), [each.time for each in study.trials])
    verdict = _naming(study_verdict(study), told)
    return WrittenReport(verdict=verdict, document=study_document(study, verdict))


def report_data(folder: Path, on_broken: Callable[[Broken], None] = lambda broken: None) -> ReportData:
    """The verdict and tables of `folder` for programs, in English; writes nothing. Raises `UserError`."""
    source = _source(folder, None)
    for broken in source.broken:
        on_broken(broken)
    return source.data(source.told())


def page(folder: Path, language: Language) -> Path:
    """Where `write_report` puts the page to look at."""
    return folder / ("report.html" if language == "en" else f"report.{language}.html")


def in_short(verdict: Verdict, language: Language) -> str:
    """The verdict as one line, and below it the command that would settle what is open."""
    with speaking(language):
        lines = [say("verdict.line", state=state_text(verdict.state), sentence=verdict.sentence)]
        if verdict.next_command:
            lines.append(say("verdict.line_next", command=verdict.next_command))
    return "\n".join(lines)


def what_to_do(folder: Path, language: Language = "en") -> str:
    """The verdict on `folder` as `in_short` tells it; writes nothing. Raises `UserError`."""
    with speaking(language):
        loaded = load_folder(folder)
        return in_short(judge(loaded, loaded.criteria), language)


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenReport:
    """A folder judged and told, in one language."""

    verdict: Verdict
    document: Document


def written(loaded: Loaded, criteria: Criteria | None) -> WrittenReport:
    """In the language spoken. `criteria` of `None`: the built-in defaults judge."""
    asked = criteria or default_criteria()
    untried = untried_of(loaded)
    verdict = judge(loaded, asked, untried)
    all_ = group(loaded.runs, loaded.machine, asked, untried.yardstick_is_out)
    return WrittenReport(verdict=verdict, document=document(loaded, verdict, asked, all_, untried))


def judge(loaded: Loaded, criteria: Criteria | None, untried: Untried | None = None) -> Verdict:
    """The verdict on a folder, with warnings where its files cannot be read or do not hold together."""
    verdict = decide(
        loaded.runs, criteria or default_criteria(), loaded.machine, untried or untried_of(loaded)
    )
    unreadable = (say("warning.unreadable", count=len(loaded.broken)),) if loaded.broken else ()
    unsound = about_integrity(loaded.findings, loaded.runs)
    unlike = about_speeds(loaded.runs, loaded.machine, shape_of(loaded))
    return replace(
        _naming(verdict, told_of(loaded)),
        warnings=(*unsound, *unreadable, *unlike, *verdict.warnings),
        governance=governance_lines(loaded.runs),
    )


def _naming(verdict: Verdict, told: str) -> Verdict:
    """With what it is of in its sentence, which is repeated where the page is not at hand."""
    return replace(verdict, sentence=say("show.sentences").join((verdict.sentence, told)))


def render_markdown(report: WrittenReport) -> str:
    """For pull requests and wikis. Text from the data is escaped; charts are left to the HTML."""
    return _markdown().get_template("report.md.j2").render(document=report.document)


def render_html(report: WrittenReport) -> str:
    """One file without scripts or anything from outside; its first page prints on one sheet of A4."""
    tone = report.document.front.state.lower().removesuffix(" go")
    return (
        html_templates()
        .get_template("report.html.j2")
        .render(document=report.document, tone=tone, language=spoken(), markup=Markup)
    )


@cache
def html_templates() -> Environment:
    """Of pages: values are escaped, and a name that is not there is an error."""
    environment = Environment(
        loader=PackageLoader("reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.globals["say"] = say
    return environment


@cache
def _markdown() -> Environment:
    environment = Environment(
        loader=PackageLoader("reports"), autoescape=False, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, finalize=markdown_text,
    )  # fmt: skip
    environment.globals["say"] = say
    environment.filters["code"] = _code
    return environment


def markdown_text(value: Any) -> Any:
    """`value` on one line that Markdown shows as it is, in a table too. `Markup` passes unchanged."""
    if isinstance(value, Markup):
        return value
    # An ampersand that begins no entity stays, for commands that are pasted from the raw text.
    text = re.sub(r"&(?=#?\w+;)", "&amp;", " ".join(str(value).split()))
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    for character in "\\`*[]|":
        text = text.replace(character, "\\" + character)
    return text


def _code(text: str) -> Markup:
    """`text` inside a fenced block, which it cannot end."""
    return Markup(text.replace("```", "'''").rstrip("\n"))
