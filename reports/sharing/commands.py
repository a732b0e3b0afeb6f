"""`submit`: a folder of runs as one small file to share, shown before it is written. Nothing is sent."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from engines.errors import UserError
from harness.cli.options import Json
from profiles.documents import to_json, write_whole
from reports.commands import note_left_out
from reports.load import load_folder
from reports.sharing.shared_result import Submission
from reports.sharing.submission import check, submission_of

COMMUNITY = Path("reports/community")


def submit(
    folder: Annotated[Path, typer.Argument(help="A folder that `compare` or `poc` wrote.")],
    to: Annotated[
        Path, typer.Option("--to", help="Folder of shared results, in a clone of the repository.")
    ] = COMMUNITY,
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
    path = to / found.machine.slug / name_of(found)
    typer.echo(text, nl=False)
    if not yes and not typer.confirm(f"Write this to {path}?", err=True):
        raise UserError("submit", "nothing was written", "say yes, or add --yes")
    write_whole(path, text)
    typer.echo(str(path))


def name_of(found: Submission) -> str:
    """Of its file: what was measured, when, and a digest that tells two of one day apart."""
    digest = hashlib.sha256(to_json(found).encode("utf-8")).hexdigest()[:8]
    model = found.model.replace(" ", "-")
    return (
        f"{model}_{found.batch_size}x{found.seq_len}_{found.dtype}_{found.day.replace('-', '')}_{digest}.json"
    )
