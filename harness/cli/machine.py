"""Commands about machines: `profiles`, `doctor`. Nothing here measures or lays out a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness import __version__
from harness.cli.options import Json, Quiet

profiles_app = typer.Typer(help="List, show and compare machines.", invoke_without_command=True)

MachineName = Annotated[Path, typer.Argument(help="A name from `lspzo-bench profiles`, or a file.")]


@profiles_app.callback()
def profiles_list(context: typer.Context, as_json: Json = False) -> None:
    """List the machines that come with the program: names for --profile and --emulate.

    `show` and `compare` also take files from `probe`.
    """
    if context.invoked_subcommand is not None:
        return
    from harness.progress import console
    from profiles.catalog import find_profile, machine_names
    from profiles.display.compare import list_machine, list_table
    from profiles.documents import to_json

    machines = tuple(list_machine(name, find_profile(Path(name))) for name in machine_names())
    if as_json:
        typer.echo(to_json(machines), nl=False)
    else:
        console().print(list_table(machines))


@profiles_app.command("show")
def profiles_show(name: MachineName, as_json: Json = False) -> None:
    """Show one machine, each figure with its origin."""
    from harness.progress import console
    from profiles.catalog import find_profile
    from profiles.display.tables import machine_table
    from profiles.documents import to_json

    machine = find_profile(name)
    if as_json:
        typer.echo(to_json(machine), nl=False)
    else:
        console().print(machine_table(machine))


@profiles_app.command("compare")
def profiles_compare(first: MachineName, second: MachineName, as_json: Json = False) -> None:
    """Show two machines side by side."""
    from harness.progress import console
    from profiles.catalog import find_profile
    from profiles.display.compare import compare_machines, comparison_table
    from profiles.documents import to_json

    machines = find_profile(first), find_profile(second)
    if as_json:
        typer.echo(to_json(tuple(compare_machines(*machines))), nl=False)
    else:
        console().print(comparison_table(*machines))


def doctor(
    profile: Annotated[
        Path | None,
        typer.Option("--profile", help="Judge a saved machine, by name or file. [default: this one, now]"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what is not as it should be on this machine, with evidence, likely cause and remedy.

    Probes briefly, unless a saved machine is named; what a brief probe cannot tell is listed as not judged.
    One plain text, without host names, to paste into a question.
    """
    from harness.runs.launch import launch_probe
    from profiles.catalog import find_profile
    from profiles.doctor.diagnose import diagnose, diagnosis_text
    from profiles.documents import to_json
    from profiles.system.unprobed import read_system

    if profile is not None:
        machine, system = find_profile(profile), None
    else:
        machine, system = launch_probe(quiet=quiet), read_system(Path())
    diagnosis = diagnose(machine, system)
    text = to_json(diagnosis) if as_json else diagnosis_text(diagnosis, machine, __version__)
    typer.echo(text, nl=False)
