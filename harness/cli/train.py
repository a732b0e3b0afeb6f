"""Commands that train with one engine: `run`, with its search for a learning rate, and `export`.

Nothing here measures or lays out a table. What does not need torch does not import it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from engines.errors import UserError
from harness.cli.options import JobFlags, Out, Quiet, engine_names, results_folder, takes_job
from harness.cli.tables import rates_table
from harness.pipeline import training_settings
from harness.progress import Progress, console
from harness.records.presets import LR_SEARCH
from profiles.documents import to_json


@takes_job(without=("warmup_steps", "host_memory", "timeout"))
def run(
    flags: JobFlags,
    engine: Annotated[str, typer.Option("--engine", help="The method; see `lspzo-bench engines`.")],
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            help="A machine, by name or as JSON from `probe`: use the settings of `recommend` for it. "
            "[default: the engine's own defaults]",
        ),
    ] = None,
    save_every: Annotated[
        int,
        typer.Option(
            "--save-every",
            min=0,
            help="Steps between full checkpoints; 0 for none but on Ctrl-C, with mezo and zo2 none at all.",
        ),
    ] = 0,
    out: Out = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where the run in --out was, with the same flags: from its newest full checkpoint, "
            "with mezo and zo2 also from its update log.",
        ),
    ] = False,
    find_lr: Annotated[
        bool,
        typer.Option(
            "--find-lr",
            help="Train nothing: try seven learning rates around the default, or the one that is --set, for "
            "at most 40 steps each, and print the flag to use. With --out, keep find_lr.json there.",
        ),
    ] = False,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace",
            help="Also write what each stream did in the steps of this call, where the engine keeps it, to "
            "OUT/trace.json for chrome://tracing or Perfetto. Costs time, and memory with every step.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --find-lr: print what find_lr.json holds on stdout.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune with one engine and export a Hugging Face folder. Its last line is that folder.

    `mezo` and `zo2` append each step to `updates.log` in --out, 32 bytes that make a checkpoint with the
    weights they start from; each goes on from the other's. A kill at any moment loses the step in progress.

    A job without flags or --job is 10 steps of batch 1 x 512 tokens in bf16, with checkpointing, seed 0,
    on the built-in data. What --set says goes before what --profile recommends, and that before the engine's
    defaults. The folder keeps the settings of its first start, also when it is resumed.
    """

    names = engine_names(engine)
    if len(names) > 1:
        raise UserError(f"--engine {engine}", "is not one method that trains", "see 'lspzo-bench engines'")
    if find_lr:
        if resume or save_every or trace:
            raise UserError("--find-lr", "trains nothing", "leave out --resume, --save-every and --trace")
        _find_lr(flags, names, profile, out, as_json, quiet)
        return
    if as_json:
        raise UserError("--json", "is for --find-lr", "leave it out; 'run' prints the folder that it exports")
    job = replace(flags.job(names, {"padding": "longest"}), warmup_steps=0)
    folder = results_folder(out, "run", job.model.name, resume)
    settings = training_settings(job, names[0], profile)

    from harness.training.train import train

    with Progress(quiet) as progress:
        exported = train(
            job, names[0], settings, folder, save_every=save_every, resume=resume, trace=trace,
            progress=progress,
        )  # fmt: skip
    typer.echo(str(exported))


def _find_lr(
    flags: JobFlags, names: list[str], profile: Path | None, out: Path | None, as_json: bool, quiet: bool
) -> None:
    """Print what each learning rate did and, as the last line, the flag to use; or all of it as JSON."""

    job = replace(flags.job(names, {**LR_SEARCH, "padding": "longest"}), warmup_steps=0)
    settings = training_settings(job, names[0], profile)

    from harness.training.find_lr import find_lr

    with Progress(quiet) as progress:
        finding = find_lr(job, names[0], settings, out, progress)
    if as_json:
        typer.echo(to_json(finding), nl=False)
    else:
        console().print(rates_table(finding))
    if finding.flag is None:
        raise UserError(
            "--find-lr",
            "no learning rate lowered the loss",
            "set the middle of the grid elsewhere with --set learning_rate=, or give more --eval-batches",
        )
    if finding.at_the_edge:
        note = "the best rate tried is at the end of the grid: search again with this one in the middle"
        console(stderr=True, quiet=quiet).print(f"note: {note}", soft_wrap=True)
    if not as_json:
        typer.echo(finding.flag)


def export(
    folder: Annotated[Path, typer.Argument(help="A folder that `run` wrote, whatever became of the run.")],
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Where to. [default: export-step-NNNNNNNN in FOLDER]"),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write the model of a run as a Hugging Face folder, without training. Its last line is that folder.

    The run may be finished, stopped, killed or still going on. With `mezo` and `zo2` the weights are those
    after the last step in its update log; with the others those of its newest checkpoint.
    """
    from harness.training.train import export_run

    with Progress(quiet) as progress:
        exported = export_run(folder, to, progress)
    typer.echo(str(exported))
