"""Commands that train with one engine: `run`, with its search for a learning rate, and `export`.

Nothing here measures or lays out a table. What does not need torch does not import it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from engines.errors import UserError
from harness.cli.by_name import by_name
from harness.cli.job_flags import JobFlags, takes_job
from harness.cli.new_folder import results_folder
from harness.cli.options import Out, Quiet, engine_names
from harness.cli.tables import rates_table
from harness.pipeline import training_settings
from harness.progress import Progress, console
from harness.records.job import Job
from harness.records.presets import LR_SEARCH
from harness.training.run_files import check_holds_run
from profiles.documents import to_json

MOST_EPOCHS = 1e9
"""Passes over the data; more were typed wrong."""


EngineFlag = Annotated[str, typer.Option("--engine", help="The method; see `lspzo-bench engines`.")]
PlannedFor = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        help="A machine, by name or as JSON from `probe`: use the settings of `recommend` for it. "
        "[default: the engine's own defaults]",
    ),
]
SaveEvery = Annotated[
    int,
    typer.Option(
        "--save-every",
        min=0,
        help="Steps between full checkpoints; 0 for none but on Ctrl-C, with mezo and zo2 none at all.",
    ),
]
GoOn = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on where the run in --out was, with the same flags: from its newest full checkpoint, "
        "with mezo and zo2 also from its update log.",
    ),
]
FindLr = Annotated[
    bool,
    typer.Option(
        "--find-lr",
        help="Train nothing: try seven learning rates around the default, or the one that is --set, for "
        "at most 40 steps each, and print the flag to use. With --out, keep find_lr.json there.",
    ),
]
EpochsToTrain = Annotated[
    float | None,
    typer.Option(
        "--epochs", help="In place of --steps: so many passes over the training data. [default: none]"
    ),
]
ExamplesToTrain = Annotated[
    int | None,
    typer.Option(
        "--examples", min=1, help="In place of --steps: so many training sequences. [default: none]"
    ),
]
Repeat = Annotated[
    int,
    typer.Option(
        "--repeat",
        min=1,
        help="Train so often, with seeds from --seed on, into OUT/seed-N each; tell median and range.",
    ),
]
Tensorboard = Annotated[
    bool,
    typer.Option(
        "--tensorboard",
        help="Also write losses and metrics for TensorBoard to OUT/tensorboard (extra `tensorboard`).",
    ),
]
TraceOfRun = Annotated[
    bool,
    typer.Option(
        "--trace",
        help="Also write what each stream did in the steps of this call, where the engine keeps it, to "
        "OUT/trace.json for chrome://tracing or Perfetto. Costs time, and memory with every step.",
    ),
]
FoundAsJson = Annotated[
    bool, typer.Option("--json", help="With --find-lr: print what find_lr.json holds on stdout.")
]


@takes_job(without=("warmup_steps", "host_memory", "timeout"))
def run(
    flags: JobFlags,
    engine: EngineFlag,
    profile: PlannedFor = None,
    save_every: SaveEvery = 0,
    out: Out = None,
    resume: GoOn = False,
    find_lr: FindLr = False,
    epochs: EpochsToTrain = None,
    examples: ExamplesToTrain = None,
    repeat: Repeat = 1,
    tensorboard: Tensorboard = False,
    trace: TraceOfRun = False,
    as_json: FoundAsJson = False,
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
    _check_length(epochs, examples, gives_steps=flags.gives("steps"))
    _check_evaluations(job)

    from harness.training.follower import follow_from_here, leads
    from harness.training.repeats import spread_over, started
    from harness.training.train import Length, train

    length = None if epochs is None and examples is None else Length(epochs=epochs, examples=examples)
    if not leads(job.limits):
        if length is not None or repeat > 1:
            why = "is not for machines that follow, which are told when to end"
            raise UserError("--epochs", why, "give --steps on every machine, and one run at a time")
        with Progress(quiet) as progress:
            steps = follow_from_here(job, names[0], settings.typed, progress)
        typer.echo(f"{steps} steps taken with the machine of NODE_RANK 0, which has the model")
        return
    seeds = range(job.seed, job.seed + repeat)
    folders = [folder / f"seed-{seed}" if repeat > 1 else folder for seed in seeds]
    with Progress(quiet) as progress:
        for seed, own in zip(seeds, folders, strict=True):
            exported = train(
                replace(job, seed=seed), names[0], settings, own, save_every=save_every,
                resume=resume and (repeat == 1 or started(own)), trace=trace, board=tensorboard,
                length=length, progress=progress,
            )  # fmt: skip
        for line in spread_over(folders) if repeat > 1 else ():
            progress.print(line)
    typer.echo(str(exported if repeat == 1 else folder))


def _check_length(epochs: float | None, examples: int | None, *, gives_steps: bool) -> None:
    """Raises `UserError` where the length is none that anybody trains, or was given twice."""
    if epochs is not None and not 0 < epochs < MOST_EPOCHS:
        why = "is more than anybody trains" if epochs > 0 else "must be positive"
        raise UserError(f"--epochs {epochs:g}", why, "give a number of passes, such as 3 or 0.5")
    if [gives_steps, epochs is not None, examples is not None].count(True) > 1:
        raise UserError("--epochs", "the length is given twice", "give one of --steps, --epochs, --examples")


def _check_evaluations(job: Job) -> None:
    """Raises `UserError` where the best model is to be kept by evaluations that are not made."""
    if (job.patience or job.best_by) and not job.eval_every:
        raise UserError("--patience", "nothing is evaluated on the way", "add --eval-every")
    if job.eval_every and not job.eval_batches:
        raise UserError("--eval-every", "there is nothing to evaluate on", "add --eval-batches")


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
    tables: Annotated[
        Literal["csv", "parquet"] | None,
        typer.Option(
            "--format",
            help="Of a folder that `compare` or `poc` wrote: every table of its report as a file in --to. "
            "[default: FOLDER/tables]",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write the model of a run as a Hugging Face folder, without training. Its last line is that folder.

    With --format: the tables of a comparison, for spreadsheets and programs. The run may be finished,
    stopped, killed or still going on. With `mezo` and `zo2` the weights are those after the last step in its
    update log; with the others those of its newest checkpoint.
    """
    if tables is not None:
        typer.echo(str(by_name("reports.commands:export_tables")(folder, tables, to)))
        return
    check_holds_run(folder)

    from harness.training.train import export_run

    with Progress(quiet) as progress:
        exported = export_run(folder, to, progress)
    typer.echo(str(exported))
