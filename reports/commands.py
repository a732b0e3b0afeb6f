"""Commands on saved runs and on what to judge them by: `report`, `criteria init`, `submit`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import typer

from engines.errors import UserError
from engines.files.reading import exists, is_folder
from harness.cli.options import CriteriaFlag, FailOn, Json, Lang, speaks
from harness.records.manifest import CRITERIA_FILE
from harness.sharing.reading import check
from harness.sharing.shared_result import Submission
from profiles.documents import to_json, write_whole
from profiles.language import translated, word
from reports.criteria import init_text
from reports.criteria_templates import Purpose
from reports.decide import exit_code, parse_fail_on
from reports.diff import as_lines, changes
from reports.index import write_index
from reports.load import Broken, load_folder
from reports.pages.data import TableFormat, report_schema, write_tables
from reports.render import in_short, page, report_data, write_report
from reports.sharing.submission import submission_of

SHARED = Path("reports/community")

criteria_app = typer.Typer(
    help="Write down what would count as success, before measuring.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)


@criteria_app.callback()
def _criteria() -> None:
    pass


@speaks
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `compare` or `poc` wrote.")],
    criteria: CriteriaFlag = None,
    fail_on: FailOn = None,
    index: Annotated[
        bool,
        typer.Option("--index", help="Write README.md and overview.svg on all published folders in FOLDER."),
    ] = False,
    before: Annotated[
        Path | None,
        typer.Option(
            "--diff",
            help="An earlier folder: print what changed from it to FOLDER, write nothing. [default: none]",
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of report.json; FOLDER is not read.")
    ] = False,
    lang: Lang = "en",
    as_json: Json = False,
) -> None:
    """Judge saved runs and write report.md and report.html. Reads only what was saved; needs no GPU."""
    if schema:
        typer.echo(json.dumps(report_schema(), indent=1))
        return
    if before is not None:
        typer.echo(as_lines(*changes(before, folder)))
        return
    if index:
        for path in write_index(folder, note_left_out):
            typer.echo(str(path))
        return
    gates = parse_fail_on(fail_on)
    verdict = write_report(folder, criteria, note_left_out, lang)
    if as_json:
        typer.echo((folder / "verdict.json").read_text(encoding="utf-8"), nl=False)
    else:
        typer.echo(in_short(verdict, lang))
        typer.echo(str(page(folder, lang)))
    raise typer.Exit(exit_code(verdict, gates))


@criteria_app.command("init")
def criteria_init(
    path: Annotated[Path, typer.Argument(help="Where to write the file.")] = Path(CRITERIA_FILE),
    purpose: Annotated[
        Purpose,
        typer.Option("--for", help="What decides: memory, deadline, quality or cost; any: some of each."),
    ] = "any",
) -> None:
    """Write a criteria file to edit before the first measurement."""
    if exists(path):
        raise UserError(str(path), "exists already", "name another path, or delete it first")
    if not is_folder(path.parent):
        raise UserError(str(path), f"there is no folder {path.parent}", "make it, or name another path")
    write_whole(path, init_text(purpose))
    typer.echo(str(path))


def note_left_out(broken: Broken) -> None:
    """A line on stderr for a file that a report leaves out."""
    told = translated(f"{broken.file} is left out: {broken.reason}")
    typer.echo(f"{word('note')}: {told}", err=True)


def export_tables(folder: Path, kind: TableFormat, to: Path | None) -> Path:
    """Every table of the report on `folder` as a file, in `to` or FOLDER/tables. Returns where they are."""
    data = report_data(folder, note_left_out)
    there = to or folder / "tables"
    for path in write_tables(data, there, kind):
        typer.echo(str(path))
    return there


def submit(
    folder: Annotated[Path, typer.Argument(help="A folder that `compare` or `poc` wrote.")],
    to: Annotated[
        Path, typer.Option("--to", help="Folder of shared results, in a clone of the repository.")
    ] = SHARED,
    yes: Annotated[bool, typer.Option("--yes", help="Write without asking.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a record into one small file to share, without paths or names: it is shown, then written.

    Nothing is sent: commit the file and open a pull request. Models that are no named shape, and data of
    yours, are told as your own and not by name.
    """
    loaded = load_folder(folder)
    for broken in loaded.broken:
        note_left_out(broken)
    found = submission_of(loaded)
    check(found, str(folder))
    text = to_json(found)
    if as_json:
        typer.echo(text, nl=False)
        return
    path = to / found.machine.slug / submission_name(found)
    typer.echo(text, nl=False)
    if not yes and not _confirmed(f"Write this to {path}?"):
        raise UserError("submit", "nothing was written", "say yes, or add --yes")
    write_whole(path, text)
    typer.echo(str(path))


def _confirmed(question: str) -> bool:
    """Nobody there to answer is a no."""
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        return False


def submission_name(found: Submission) -> str:
    """Of its file: what was measured, when, and a digest that tells two of one day apart."""
    digest = hashlib.sha256(to_json(found).encode("utf-8")).hexdigest()[:8]
    model = found.model.replace(" ", "-")
    return (
        f"{model}_{found.batch_size}x{found.seq_len}_{found.dtype}_{found.day.replace('-', '')}_{digest}.json"
    )
