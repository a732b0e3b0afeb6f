"""The command that plans: `recommend`. Nothing here plans or lays out a table."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from engines.errors import UserError
from harness.calibrate import calibration_from
from harness.cli.advice_tables import recommendation_text
from harness.cli.job_flags import OF_TRAINING, JobFlags, takes_job
from harness.cli.new_folder import results_folder
from harness.cli.options import (
    Engines,
    Json,
    KeptProfile,
    Lang,
    Out,
    Quiet,
    engine_names,
    speaks,
)
from harness.kept_machine import kept_machine
from harness.models.tokenizers import tokenizer_files
from harness.pipeline import data_lengths, find_machine, job_to_plan
from harness.progress import console
from harness.recipes.write import Stack, write_recipe
from harness.recommendation import (
    Recommendation,
    broken_weights,
    limits_beyond,
    model_of_target,
    recommended,
    schema,
    unmeasured_limit,
    with_explanations,
    with_like_catalogue,
    with_like_machines,
    with_target,
    with_what_if,
    without_weights,
)
from harness.resolve import resolve_shape
from harness.sharing.like_machines import SHARED
from harness.sharing.reading import shared_results
from profiles.advice.amount import Asked, amount_of
from profiles.advice.job_time import Rates
from profiles.advice.money import dated_ahead, parse_power, parse_price
from profiles.advice.outlook import JobToPlan
from profiles.advice.target import parse_target
from profiles.documents import to_json
from profiles.language import translated, word
from profiles.machine import Machine

IN_BYTES = (
    "so its data is counted in bytes: a tokenizer makes about a quarter as many tokens of English; "
    "name a folder that has one"
)

MEASURED_HERE = (
    "this machine is measured first, some 15 s, and plans are for it; --profile NAME is for one that "
    "'lspzo-bench profiles' lists, --profile FILE for one that 'lspzo-bench probe --out FILE' measured"
)
ANEW = "'lspzo-bench probe' measures it anew, --profile is for another"
NO_GPU_HERE = "torch can use no GPU here, so plans are for the CPU; --profile rtx-4090, say, is for a card"

ExamplesFlag = Annotated[
    int | None,
    typer.Option(
        "--examples",
        help="Examples in an epoch, for the whole job's hours. [default: those of --data, if it is a file]",
    ),
]
EpochsFlag = Annotated[
    float | None, typer.Option("--epochs", help="Epochs of --examples, --tokens or a file. [default: 1]")
]
TokensFlag = Annotated[
    int | None, typer.Option("--tokens", help="Tokens in an epoch, padding not counted. [default: not said]")
]
JobSteps = Annotated[
    int | None, typer.Option("--steps", help="Optimizer steps of the whole job. [default: not said]")
]
PowerFlag = Annotated[
    str | None,
    typer.Option(
        "--power", help="What a machine takes under load, such as 450W; gives kWh. [default: not said]"
    ),
]
PriceFlags = Annotated[
    list[str] | None,
    typer.Option(
        "--price",
        help="Of a machine's hour or a kWh, with its date: 2.49USD/h@2026-11-29, 31JPY/kWh@2026-11-29. "
        "[default: none is built in]",
    ),
]
WhatIfFlag = Annotated[
    bool, typer.Option("--what-if", help="Single upgrades, other machines, the largest model of each method.")
]
TargetFlag = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="Backwards, the least machine of the catalogue: `hours=8` or `model=70b`. [default: none]",
    ),
]
CalibrateFlag = Annotated[
    Path | None,
    typer.Option(
        "--calibrate",
        help="A folder that `compare` wrote on this machine: its runs correct predictions. [default: none]",
    ),
]
ExplainFlag = Annotated[
    bool, typer.Option("--explain", help="The formulas of each plan that fits, with its numbers filled in.")
]
RecipeFlag = Annotated[
    Stack | None,
    typer.Option(
        "--recipe",
        help="Write the recommended method as a configuration of that program, where it has it, and as our "
        "job.toml, into --out. [default: none]",
    ),
]
SchemaFlag = Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of --json, and stop.")]


@speaks
@takes_job(without=("steps", "warmup_steps", "eval_batches", "seed", "timeout", *OF_TRAINING))
def recommend(
    flags: JobFlags,
    examples: ExamplesFlag = None,
    epochs: EpochsFlag = None,
    tokens: TokensFlag = None,
    steps: JobSteps = None,
    power: PowerFlag = None,
    price: PriceFlags = None,
    what_if: WhatIfFlag = False,
    target: TargetFlag = None,
    calibrate: CalibrateFlag = None,
    explain: ExplainFlag = False,
    recipe: RecipeFlag = None,
    engines: Engines = None,
    profile: KeptProfile = None,
    out: Out = None,
    lang: Lang = "en",
    as_json: Json = False,
    schema_: SchemaFlag = False,
    quiet: Quiet = False,
) -> None:
    """Plan every method for a job on a machine: does it fit, how long, what limits it, what to change.

    A job without flags or --job is batch 1 x 512 tokens in bf16, with checkpointing. --examples, --epochs,
    --tokens, --steps or a file as --data make hours of it. A model needs no weights here, only a config.json.
    """
    if schema_:
        typer.echo(json.dumps(schema(), indent=1))
        return
    asked = Asked(examples=examples, epochs=epochs, tokens=tokens, steps=steps)
    rates = Rates(
        power_w=None if power is None else parse_power(power),
        prices=tuple(parse_price(each) for each in price or ()),
    )
    if (guess := dated_ahead(rates.prices, datetime.now().astimezone().date())) is not None:
        _note(guess)
    aim = None if target is None else parse_target(target)
    names = engine_names(engines)
    if aim is not None and aim.model is not None:
        flags.suppose_model(model_of_target(aim.model))
    job = flags.job(names)
    job = replace(job, model=without_weights(job.model))
    shape = resolve_shape(job)
    if (broken := broken_weights(job.model)) is not None:
        _note(broken)
    # As `run` pads.
    as_run = job if flags.gives("padding") else replace(job, padding="longest")
    lengths = data_lengths(as_run, shape, quiet=quiet)
    amount = amount_of(job.workload, asked, lengths)
    if aim is not None and aim.hours is not None and amount is None:
        raise UserError(
            f"--target '{target}'", "does not say of how much", "add --examples, --tokens or a --data file"
        )
    if lengths is not None and not tokenizer_files(job.model):
        _note(f"{job.model.name} comes without a tokenizer here, {IN_BYTES}")
    folder = None if recipe is None else results_folder(out, "recipe", job.model.name, resume=False)
    machine = _machine(profile, quiet=quiet)
    for note in limits_beyond(job, machine):
        _note(note)
    if (what_if or aim is not None) and (job.limits.vram_bytes or job.limits.host_bytes):
        _note(OTHERS_ARE_WHOLE)
    planned = job_to_plan(job, shape, names, amount)
    calibration = None if calibrate is None else calibration_from(calibrate, machine)
    answer = recommended(job, planned, machine, rates=rates, calibration=calibration)
    if (unmeasured := unmeasured_limit(answer)) is not None:
        _note(unmeasured)
    answer = _with_shared_results(
        answer, planned, with_catalogue=what_if or (aim is not None and aim.model is None)
    )
    if explain:
        answer = with_explanations(answer, planned)
    if what_if:
        answer = with_what_if(answer, planned)
    if aim is not None:
        answer = with_target(answer, planned, aim)
    if as_json:
        typer.echo(to_json(answer), nl=False)
    else:
        console().print(recommendation_text(answer))
    if recipe is not None and folder is not None:
        written = write_recipe(answer, recipe, folder)
        for line in written.lines:
            typer.echo(translated(line), err=True)
        if not as_json:
            typer.echo(str(written.folder))


def _machine(profile: Path | None, *, quiet: bool) -> Machine:
    """The one that is named, or this one: as it was measured last, or measured now. Notes say which."""
    if profile is not None:
        return find_machine(profile, quiet=quiet)
    machine = kept_machine()
    if machine is not None:
        when = f"{machine.time[:10]} {machine.time[11:16]} UTC"
        _note(f"plans are for this machine as it was measured on {when}; {ANEW}")
    else:
        _note(MEASURED_HERE)
        machine = find_machine(None, quiet=quiet)
    if machine.gpu is None:
        _note(NO_GPU_HERE)
    return machine


def _with_shared_results(
    answer: Recommendation, planned: JobToPlan, *, with_catalogue: bool
) -> Recommendation:
    """`answer` beside what others have measured: on machines like this one and, `with_catalogue`, on those of
    the catalogue."""
    try:
        shared = [each for _, each in shared_results(SHARED)]
        answer = with_like_machines(answer, shared)
        if with_catalogue:
            answer = with_like_catalogue(answer, planned, shared)
    except UserError as error:
        _note(f"shared results are left out: {error}")
    return answer


OTHERS_ARE_WHOLE = (
    "--vram and --host-memory hold for the machine that is planned for; "
    "others of the catalogue have all of theirs"
)


def _note(text: str) -> None:
    typer.echo(f"{word('note')}: {translated(text)}", err=True)
