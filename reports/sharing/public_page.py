"""All shared results on one page without a server: newest first, to be filtered by model, card and method."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from engines.errors import UserError
from engines.files.reading import exists
from harness.sharing.reading import shared_results
from harness.sharing.shared_result import SharedMethod, Submission
from profiles.language import Language, quantity, spoken
from profiles.units import format_bytes, format_seconds
from reports.format import digits, times
from reports.load import load_folder
from reports.messages import say
from reports.render import html_templates, page
from reports.sharing.submission import submission_of

PAGES: Mapping[Language, str] = {"en": "index.html", "ja": "index.ja.html"}

COMMUNITY = "community"
"""Beside the published folders: what others shared."""

SCRIPT = """\
const rows = [...document.querySelectorAll('tbody tr')];
const filters = [...document.querySelectorAll('[data-key]')];
function show() {
  let count = 0;
  for (const row of rows) {
    const fits = filters.every(one => {
      const asked = one.value.toLowerCase();
      if (!asked) return true;
      if (one.dataset.key === 'text') return row.textContent.toLowerCase().includes(asked);
      return row.dataset[one.dataset.key].toLowerCase() === asked;
    });
    row.hidden = !fits;
    count += fits;
  }
  document.querySelector('#count').textContent = count;
}
filters.forEach(one => one.addEventListener('input', show));
show();
"""
"""Filters rows that are there already: without scripts all of them are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedRow:
    """One method of one shared result."""

    day: str
    model: str
    job: str
    card: str
    machine: str
    method: str
    settings: str
    cells: tuple[str, ...]
    """Step, tokens per second, GPU memory, host memory, measured over predicted, runs."""
    link: str
    """To its report or file, relative to the page."""
    source: str


def rows_of(submission: Submission, link: str, source: str) -> list[SharedRow]:
    """One for each method that was measured."""
    machine = submission.machine
    return [
        SharedRow(
            day=submission.day,
            model=submission.model,
            job=_job(submission),
            card=machine.gpu or say("setting.no_gpu"),
            machine=f"{machine.cpu}, {machine.cores}, {format_bytes(machine.host_memory_bytes)}",
            method=method.engine,
            settings=" ".join(f"{key}={value}" for key, value in sorted(method.settings.items())),
            cells=_cells(method),
            link=link,
            source=source,
        )
        for method in submission.methods
        if method.step_s
    ]


def _job(submission: Submission) -> str:
    if submission.gpus == 1:
        return submission.job
    return say("index.job_on_gpus", job=submission.job, count=submission.gpus)


def _cells(method: SharedMethod) -> tuple[str, ...]:
    median = method.median_s
    nothing = say("show.nothing")
    ratio = median / method.predicted_step_s if median and method.predicted_step_s else None
    return (
        quantity(format_seconds(median)),
        nothing if method.tokens_per_s is None else digits(method.tokens_per_s),
        nothing if method.gpu_bytes is None else format_bytes(method.gpu_bytes),
        nothing if method.host_bytes is None else format_bytes(method.host_bytes),
        nothing if ratio is None else quantity(times(ratio)),
        str(len(method.step_s)),
    )


def public_rows(folder: Path, published: Sequence[Path]) -> list[SharedRow]:
    """Rows of the `published` folders in `folder` that say something of their machine, and of what others
    shared, in the folder beside. Raises `UserError` for a shared file that is none."""
    rows: list[SharedRow] = []
    own: list[Submission] = []
    for path in published:
        if any(path.glob("runs/*.json")):
            with suppress(UserError):  # emulated or traced, or nothing ended well
                own.append(found := submission_of(load_folder(path)))
                rows += rows_of(found, f"{path.name}/{_report_of(path).name}", say("public.ours"))
    for path, found in shared_results(folder.parent / COMMUNITY):
        if found in own:
            continue  # as published here, with its report
        link = f"../{COMMUNITY}/{path.parent.name}/{path.name}"
        rows += rows_of(found, link, say("public.shared"))
    return rows


def _report_of(folder: Path) -> Path:
    """The page to look at, in the language spoken if it is there; else Markdown, which is kept with runs."""
    pages = [page(folder, spoken()), page(folder, "en")]
    pages += [each.with_suffix(".md") for each in pages]
    return next((each for each in pages if exists(each)), pages[-1])


def public_page(rows: Sequence[SharedRow]) -> str:
    """HTML in the language spoken, the newest first. Nothing is loaded; its one script may be no other, by
    the page's own rule."""
    newest = sorted(rows, key=lambda row: (row.day, row.model, row.method), reverse=True)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode("utf-8")).digest()).decode("ascii")
    choices = {
        "model": sorted({row.model for row in rows}),
        "card": sorted({row.card for row in rows}),
        "method": sorted({row.method for row in rows}),
    }
    template = html_templates().get_template("results.html.j2")
    return template.render(
        rows=newest, choices=choices, script=Markup(SCRIPT), digest=digest, language=spoken(),
        other=PAGES["en" if spoken() == "ja" else "ja"],
    )  # fmt: skip
