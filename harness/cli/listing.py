"""Commands that list what there is: `engines`, `models`."""

from __future__ import annotations

import typer

from harness.cli.options import Json
from harness.cli.tables import engines_json, engines_table, models_json, models_table
from harness.progress import console


def engines(as_json: Json = False) -> None:
    """List the engines, what each is, whether it can run here, and its settings."""
    if as_json:
        typer.echo(engines_json(), nl=False)
    else:
        console().print(engines_table())


def models(as_json: Json = False) -> None:
    """List the named shapes that `--model NAME --random-weights` takes."""
    if as_json:
        typer.echo(models_json(), nl=False)
    else:
        console().print(models_table())
