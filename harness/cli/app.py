"""The command line: flags become typed objects, and the room that does the work is called.

Nothing here measures or lays out a table. What does not need torch does not import it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import typer

from engines.errors import UserError
from harness import __version__
from harness.cli.generate import generate
from harness.cli.machine import doctor, profiles_app
from harness.cli.options import JobFlags, Json, Out, Quiet, engine_names, results_folder, takes_job
from harness.cli.train import export, run

PROGRAM = "lspzo-bench"

_USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]
"""click's UsageError, which newer versions of typer bring along under another name."""

app = typer.Typer(
    name=PROGRAM,
    help=(
        "Can this machine fine-tune this model by offloading, how slow, how good, with which method? "
        "Probe the machine, predict, measure every method in its own process, and write the decision up."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
criteria_app = typer.Typer(
    help="Write down what would count as success, before measuring.", no_args_is_help=True
)
app.add_typer(criteria_app, name="criteria")

app.add_typer(profiles_app, name="profiles")
app.command()(doctor)

Engines = Annotated[
    str | None,
    typer.Option("--engines", "--engine", help="Comma-separated; see `lspzo-bench engines`. [default: all]"),
]
Profile = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        help="A machine: a name from `lspzo-bench profiles`, or a file from `probe`. [default: probe now]",
    ),
]
Emulate = Annotated[
    Path | None,
    typer.Option(
        "--emulate",
        help="Hold the runs to the GPU memory, link and CPU threads of a machine that is smaller than this "
        "one, and predict for it: a name from `lspzo-bench profiles`, or a file from `probe`.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Do only what is missing in --out.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Processes per engine, interleaved A B B A.")]
Criteria = Annotated[
    Path | None, typer.Option("--criteria", help="Criteria in TOML; their hash is stamped into every run.")
]
Preset = Annotated[str | None, typer.Option("--preset", help="A ready-made job: quick.")]
Trace = Annotated[
    bool,
    typer.Option(
        "--trace",
        help="Also write what each stream did, where the engine keeps it, to OUT/traces/ID.json for "
        "chrome://tracing or Perfetto. Costs time: records say that they were traced.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run, and stop.")]
RequireGpu = Annotated[bool, typer.Option("--require-gpu", help="Exit 7 if there is no GPU.")]
FailOn = Annotated[
    str | None,
    typer.Option(
        "--fail-on",
        help="Exit 3, 4 or 5 on these verdicts: no-go, conditional, inconclusive (comma-separated).",
    ),
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def probe(
    out: Annotated[
        Path | None, typer.Option("--out", help="Also save the profile to this JSON file.")
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
    as_json: Json = False,
    quiet: Quiet = False,
    require_gpu: RequireGpu = False,
) -> None:
    """Measure this machine: GPU, link, CPU, memory, disk. Takes up to a minute.

    Figures that other processes on the GPU disturbed are marked.
    """
    from harness.pipeline import exit_without_gpu
    from harness.progress import ProbeProgress, console
    from profiles.display.anonymised import machine_page
    from profiles.display.tables import machine_table
    from profiles.documents import check_writable, to_json
    from profiles.machine import save_machine
    from profiles.probe.disk import check_disk
    from profiles.probe.run import probe_machine, why_no_gpu

    if brief and full:
        raise UserError("--brief and --full", "exclude each other", "give one of them")
    if as_json and markdown:
        raise UserError("--json and --markdown", "both go to stdout", "give one of them")
    if brief and disk is not None:
        raise UserError("--brief and --disk", "a brief probe measures no disk", "give one of them")
    if out is not None:
        check_writable(out)
    if disk is not None:
        check_disk(disk)
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
    if out is not None:  # after what was measured has been told: the disk may be full
        save_machine(machine, out)
    if require_gpu and machine.gpu is None:
        exit_without_gpu(machine.gpu_absent_reason)  # one that torch sees may still fail


@app.command()
@takes_job(without=("steps", "warmup_steps", "eval_batches", "seed", "timeout"))
def recommend(
    flags: JobFlags,
    engines: Engines = None,
    profile: Profile = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Plan every method for a job on a machine: does it fit, how slow, what limits it, with which knobs.

    A job without flags or --job is batch 1 x 512 tokens in bf16, with checkpointing.
    """
    from harness.cli.tables import plans_table
    from harness.pipeline import find_machine, plan_job
    from harness.progress import console
    from harness.resolve import resolve_shape
    from profiles.documents import to_json
    from profiles.planning.recommend import why_first

    names = engine_names(engines)
    job = flags.job(names)
    shape = resolve_shape(job)
    machine = find_machine(profile, quiet=quiet)
    plans = plan_job(job, shape, machine, names)
    if as_json:
        typer.echo(to_json(tuple(plans)), nl=False)
    else:
        console().print(plans_table(shape, job, machine, plans))
        console().print(why_first(plans), markup=False)


@app.command()
@takes_job()
def compare(
    flags: JobFlags,
    engines: Engines = None,
    profile: Profile = None,
    emulate: Emulate = None,
    rounds: Rounds = 2,
    criteria: Criteria = None,
    out: Out = None,
    resume: Resume = False,
    trace: Trace = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run every plan, each in its own process, interleaved; one record per run, kept whatever happens.

    A job without flags or --job is batch 1 x 512 tokens in bf16, with checkpointing, 10 steps after 3 of
    warm-up, on the built-in data.
    """
    from harness.cli.tables import grid_table, runs_table
    from harness.pipeline import compare_job, planned_cells
    from harness.progress import console
    from profiles.documents import to_json

    names = engine_names(engines)
    job = flags.job(names)
    folder = results_folder(out, "compare", job.model.name, resume)
    if dry_run:
        cells = planned_cells(
            job, names, folder, profile=profile, rounds=rounds, criteria=criteria, resume=resume, quiet=quiet,
            emulate=emulate,
        )  # fmt: skip
        if as_json:
            typer.echo(to_json(tuple(cells)), nl=False)
        else:
            console().print(grid_table(cells))
        return
    runs = compare_job(
        job, names, folder, profile=profile, rounds=rounds, criteria=criteria, resume=resume, quiet=quiet,
        trace=trace, emulate=emulate,
    )  # fmt: skip
    if as_json:
        typer.echo(to_json(tuple(runs)), nl=False)
    else:
        console().print(runs_table(runs))
        typer.echo(str(folder))
    _exit_for(runs)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `compare` or `poc` wrote.")],
    criteria: Criteria = None,
    fail_on: FailOn = None,
    index: Annotated[
        bool,
        typer.Option("--index", help="Write README.md and overview.svg on all published folders in FOLDER."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Judge saved runs and write report.md and report.html. Reads only what was saved; needs no GPU."""
    from harness.pipeline import note_left_out
    from profiles.documents import to_json
    from reports.decide import exit_code, parse_fail_on
    from reports.index import write_index
    from reports.render import write_report

    if index:
        for path in write_index(folder, note_left_out):
            typer.echo(str(path))
        return
    gates = parse_fail_on(fail_on)
    verdict = write_report(folder, criteria, note_left_out)
    typer.echo(to_json(verdict) if as_json else f"{verdict.state}: {verdict.sentence}", nl=not as_json)
    if not as_json:
        typer.echo(str(folder / "report.html"))
    raise typer.Exit(exit_code(verdict, gates))


@criteria_app.command("init")
def criteria_init(
    path: Annotated[Path, typer.Argument(help="Where to write the file.")] = Path("criteria.toml"),
) -> None:
    """Write a criteria file to edit before the first measurement."""
    from profiles.documents import write_whole
    from reports.criteria import init_text

    if path.exists():
        raise UserError(str(path), "exists already", "name another path, or delete it first")
    if not path.parent.is_dir():
        raise UserError(str(path), f"there is no folder {path.parent}", "make it, or name another path")
    write_whole(path, init_text())
    typer.echo(str(path))


@app.command()
@takes_job()
def poc(
    flags: JobFlags,
    preset: Preset = "quick",
    engines: Engines = None,
    profile: Profile = None,
    emulate: Emulate = None,
    rounds: Rounds = 2,
    criteria: Criteria = None,
    fail_on: FailOn = None,
    out: Out = None,
    resume: Resume = False,
    trace: Trace = False,
    quiet: Quiet = False,
    require_gpu: RequireGpu = False,
) -> None:
    """The whole line in one go: probe, recommend, compare, report. Its last line is the report's path."""
    from harness.pipeline import proof_of_concept
    from harness.records.presets import preset_values
    from profiles.system.nvml import open_device
    from reports.decide import exit_code, parse_fail_on

    gates = parse_fail_on(fail_on)
    names = engine_names(engines)
    # The driver's word; whether torch can use the GPU shows when it is probed.
    on_gpu, on_cpu = (
        flags.job(names, preset_values(preset, has_gpu=has_gpu) if preset else {})
        for has_gpu in (True, False)
    )
    job = on_gpu if open_device() is not None else on_cpu
    folder = results_folder(out, "poc", job.model.name, resume)
    verdict, runs = proof_of_concept(
        job, names, folder, profile=profile, rounds=rounds, criteria=criteria, resume=resume, quiet=quiet,
        require_gpu=require_gpu, without_gpu=on_cpu, trace=trace, emulate=emulate,
    )  # fmt: skip
    typer.echo(f"{verdict.state}: {verdict.sentence}")
    typer.echo(str(folder / "report.html"))
    code = exit_code(verdict, gates)
    if code:
        raise typer.Exit(code)
    _exit_for(runs)


app.command()(run)
app.command()(export)
app.command()(generate)


@app.command("engines")
def engines_command(as_json: Json = False) -> None:
    """List the engines, what each is, whether it can run here, and its knobs."""
    from harness.cli.tables import engines_json, engines_table
    from harness.progress import console

    if as_json:
        typer.echo(engines_json(), nl=False)
    else:
        console().print(engines_table())


@app.command("models")
def models_command(as_json: Json = False) -> None:
    """List the named shapes that `--model NAME --random-weights` takes."""
    from harness.cli.tables import models_json, models_table
    from harness.progress import console

    if as_json:
        typer.echo(models_json(), nl=False)
    else:
        console().print(models_table())


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 2."""
    try:
        with redirect_stdout(cast(TextIO, _Stdout(sys.stdout))):
            code = app(prog_name=PROGRAM, standalone_mode=False)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        if isinstance(error, _CannotPrint):  # nor could Python, at its end, what is left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except _USAGE_ERROR as error:
        if told := _told(error):  # else there were no arguments, and the help has been printed
            sys.stderr.write(f"error: {told}\n")
        sys.exit(2)
    sys.exit(code)


def _told(error: Any) -> str:
    """A usage error as one line, or nothing where it has no message."""
    message = " ".join(error.format_message().split())
    if not message:
        return ""
    message = message.replace(": Value error, ", ": ")  # pydantic's word
    message = re.sub(r"\. Did you mean (.*)\?$", r" (did you mean \1?)", message).removesuffix(".")
    command = PROGRAM if error.ctx is None else error.ctx.command_path
    return str(UserError(command, message[0].lower() + message[1:], f"see '{command} --help'"))


class _CannotPrint(UserError):
    """Standard output cannot be written."""


class _Stdout:
    """Standard output whose failure is a `UserError`, but for a reader that has gone: typer ends the program
    then, without a word."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._failures_told():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._failures_told():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _failures_told(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _CannotPrint(
                "standard output", f"cannot be written ({error.strerror})", "free space or send it elsewhere"
            ) from None


def _exit_for(runs: Any) -> None:
    """Exit 8 if a run failed; what cannot run here was not a failure."""
    if any(run.end_state not in ("ok", "not_available", "skipped_infeasible") for run in runs):
        raise typer.Exit(8)
