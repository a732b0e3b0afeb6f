"""Commands about machines: `probe`, `doctor`, `profiles`. Nothing here measures or lays out a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engines.errors import UserError
from harness import __version__
from harness.cli.options import Json, Lang, Quiet, RequireGpu, exit_without_gpu, speaks
from harness.kept_machine import keep_machine
from harness.progress import ProbeProgress, console
from harness.runs.launch import launch_probe
from profiles.catalog import find_profile, machine_names
from profiles.display.anonymised import machine_page
from profiles.display.compare import compare_machines, comparison_table, list_machine, list_table
from profiles.display.tables import machine_table
from profiles.doctor.diagnose import diagnose, diagnosis_text
from profiles.documents import check_writable, to_json
from profiles.machine import save_machine
from profiles.probe.disk import require_measurable_disk
from profiles.probe.run import probe_machine, why_no_gpu
from profiles.system.unprobed import read_system

profiles_app = typer.Typer(
    help="List, show and compare machines.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

MachineName = Annotated[Path, typer.Argument(help="A name from `lspzo-bench profiles`, or a file.")]


@profiles_app.callback()
def profiles_list(context: typer.Context, as_json: Json = False) -> None:
    """List the machines that come with the program: names for --profile and --emulate.

    `show` and `compare` also take files from `probe`.
    """
    if context.invoked_subcommand is not None:
        return

    machines = tuple(list_machine(name, find_profile(Path(name))) for name in machine_names())
    if as_json:
        typer.echo(to_json(machines), nl=False)
    else:
        console().print(list_table(machines))


@profiles_app.command("show")
def profiles_show(name: MachineName, as_json: Json = False) -> None:
    """Show one machine, each figure with its origin."""
    machine = find_profile(name)
    if as_json:
        typer.echo(to_json(machine), nl=False)
    else:
        console().print(machine_table(machine))


@profiles_app.command("compare")
def profiles_compare(first: MachineName, second: MachineName, as_json: Json = False) -> None:
    """Show two machines side by side."""
    machines = find_profile(first), find_profile(second)
    if as_json:
        typer.echo(to_json(tuple(compare_machines(*machines))), nl=False)
    else:
        console().print(comparison_table(*machines))


@speaks
def doctor(
    profile: Annotated[
        Path | None,
        typer.Option("--profile", help="Judge a saved machine, by name or file. [default: this one, now]"),
    ] = None,
    lang: Lang = "en",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what is not as it should be on this machine, with evidence, likely cause and remedy.

    Probes briefly, unless a saved machine is named; what a brief probe cannot tell is listed as not judged.
    One plain text, without host names, to paste into a question.
    """
    if profile is not None:
        machine, system = find_profile(profile), None
    else:
        machine, system = launch_probe(quiet=quiet), read_system(Path())
    diagnosis = diagnose(machine, system)
    if as_json:
        typer.echo(to_json(diagnosis), nl=False)
        return
    typer.echo(diagnosis_text(diagnosis, machine, __version__), nl=False)


@speaks
def probe(
    out: Annotated[
        Path | None, typer.Option("--out", help="Also save the profile to this JSON file. [default: none]")
    ] = None,
    disk: Annotated[
        Path | None,
        typer.Option("--disk", help="Folder whose disk is measured. [default: the current folder]"),
    ] = None,
    brief: Annotated[
        bool, typer.Option("--brief", help="Only what predictions need: some 15 s, no disk.")
    ] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="Longer samples, a minute of load: up to five minutes."),
    ] = False,
    markdown: Annotated[
        bool,
        typer.Option(
            "--markdown", help="Print a page to share, without host names, serial numbers and paths."
        ),
    ] = False,
    lang: Lang = "en",
    as_json: Json = False,
    quiet: Quiet = False,
    require_gpu: RequireGpu = False,
) -> None:
    """Measure this machine: GPU, link, CPU, memory, disk. Takes up to a minute.

    Figures that other processes on the GPU disturbed are marked.
    """
    if brief and full:
        raise UserError("--brief and --full", "exclude each other", "give one of them")
    if as_json and markdown:
        raise UserError("--json and --markdown", "both go to stdout", "give one of them")
    if brief and disk is not None:
        raise UserError("--brief and --disk", "a brief probe measures no disk", "give one of them")
    if out is not None:
        check_writable(out)
    if disk is not None:
        require_measurable_disk(disk)
    if require_gpu and (reason := why_no_gpu()) is not None:
        exit_without_gpu(reason)
    with ProbeProgress(quiet) as progress:
        machine = probe_machine(
            progress.measurement, depth="brief" if brief else "full" if full else "default", folder=disk
        )
    if as_json:
        typer.echo(to_json(machine), nl=False)
    elif markdown:
        typer.echo(machine_page(machine), nl=False)
    else:
        console().print(machine_table(machine))
    keep_machine(machine)
    if out is not None:  # after what was measured has been told: the disk may be full
        save_machine(machine, out)
    if require_gpu and machine.gpu is None:
        exit_without_gpu(machine.gpu_absent_reason)  # one that torch sees may still fail
