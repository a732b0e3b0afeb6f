"""`generate`: continue prompts, or measure how fast that goes.

Nothing here measures or lays out a table. What does not need torch does not import it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from engines import generating_engines
from engines.decoding import Sampling
from engines.errors import UserError
from engines.files.reading import read_text
from engines.settings.parse import defaults
from harness.cli.job_flags import JobFlags, tells_defaults
from harness.cli.new_folder import results_folder
from harness.cli.options import (
    BatchSize,
    DtypeFlag,
    HostMemoryFlag,
    Json,
    Model,
    Out,
    Quiet,
    RandomWeights,
    SeqLen,
    Set,
    Timeout,
    Vram,
    WarmupSteps,
    engine_names,
)
from harness.cli.sweep_progress import GenerationProgress
from harness.cli.tables import generations_table
from harness.pipeline import find_machine
from harness.progress import Progress, console
from harness.records.job import Job, Limits
from harness.records.seeds import MOST_SEED
from harness.records.settings import parse_assignments
from harness.records.shared import shared_machine
from harness.resolve import resolve_shape
from harness.runs.decoding_runs import DecodingJob, measure_decoding_runs
from profiles.documents import to_json
from profiles.machine import MACHINE_FILE, save_machine
from profiles.units import parse_bytes

MEASURED_PROMPT = 128
"""Tokens of each prompt of a measured generation, unless --seq-len says otherwise."""

MEASURED_WARMUP = 3
"""Decoding steps after the prefill that are not counted, unless --warmup-steps says otherwise."""


Prompts = Annotated[
    list[str] | None, typer.Argument(help="Texts to continue, together. [default: those of --prompts]")
]
OfRun = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="A folder that `run` wrote, in place of --model: its newest weights (mezo, zo2: after the "
        "last step in its log), also of a run that was killed or is going on. [default: none]",
    ),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", help="A text file with a prompt in each line; - for stdin. [default: none]"),
]
Generator = Annotated[
    str | None,
    typer.Option("--engine", help="zo2, or mezo with everything on the GPU. [default: zo2, or the run's]"),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Tokens after each prompt, at most.")
]
Temperature = Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")]
TopK = Annotated[int, typer.Option("--top-k", help="Draw among so many tokens; 0: among all.")]
TopP = Annotated[
    float,
    typer.Option("--top-p", help="Draw among the fewest tokens that have this probability together."),
]
DrawSeed = Annotated[int, typer.Option("--seed", help="Of the draws, and of random weights.")]
Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Time the generation of random prompts in a process of its own, and keep a record in "
        "--out/generations. The flags below are for this.",
    ),
]
RoundsOfGeneration = Annotated[
    int | None, typer.Option("--rounds", min=1, help="Processes, one after the other. [default: 1]")
]
PredictedFor = Annotated[
    Path | None,
    typer.Option("--profile", help="The machine to predict for. [default: the one in --out, or probe now]"),
]


@tells_defaults(
    {
        "model": "that of --run",
        "random_weights": "--pretrained",
        "dtype": "bf16, or the run's",
        "vram": "all that is free",
        "host_memory": "all that is free",
        "set_": "as planned",
        "batch_size": "1",
        "seq_len": str(MEASURED_PROMPT),
        "warmup_steps": str(MEASURED_WARMUP),
        "timeout": f"{Limits().timeout_s:g}",
    }
)
def generate(
    prompts: Prompts = None,
    model: Model = None,
    random_weights: RandomWeights = None,
    run: OfRun = None,
    prompts_file: PromptsFile = None,
    engine: Generator = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: DrawSeed = 0,
    dtype: DtypeFlag = None,
    vram: Vram = None,
    host_memory: HostMemoryFlag = None,
    set_: Set = None,
    measure: Measure = False,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    warmup_steps: WarmupSteps = None,
    rounds: RoundsOfGeneration = None,
    profile: PredictedFor = None,
    timeout: Timeout = None,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue prompts with weights that stream from host memory, once per new token for all prompts.

    Each text on stdout is a prompt and what comes after it, with an empty line between two. `zo2` keeps as
    many blocks on the GPU as fit into --vram, or into what is free; `--set resident_blocks=0` streams all.

    With --measure: --batch-size prompts (1) of --seq-len random tokens (128), --max-new-tokens each, the
    first --warmup-steps (3) of them not counted. The prefill is timed when it comes the second time.
    """
    sampling = _sampling(temperature, top_k, top_p, seed)
    if (model is None) == (run is None):
        raise UserError("generate", "it takes one model", "give either --model or --run")
    flags = {
        "model": model, "random_weights": random_weights, "dtype": dtype, "seed": seed, "vram": vram,
        "host_memory": host_memory, "timeout": timeout, "set_": set_,
    }  # fmt: skip
    only_measured = {
        "batch-size": batch_size, "seq-len": seq_len, "warmup-steps": warmup_steps, "rounds": rounds,
        "profile": profile, "timeout": timeout, "out": out,
    }  # fmt: skip
    if measure:
        if run is not None or prompts or prompts_file is not None:
            raise UserError(
                "--measure", "continues random prompts of --model", "leave out --run, --prompts and prompts"
            )
        name = engine or generating_engines()[0]
        job = _measured_job(flags, name, max_new_tokens, batch_size, seq_len, warmup_steps)
        _measure(job, name, sampling, rounds or 1, profile, out, as_json, quiet)
        return
    _refuse(only_measured, "is for --measure", "add --measure, or leave it out")
    texts = read_prompts(prompts or [], prompts_file)

    from harness.training.generate import Wanted, generate_from_model, generate_from_run
    from harness.training.run_folder import read_run

    wanted = Wanted(prompts=texts, max_new_tokens=max_new_tokens, sampling=sampling)
    with Progress(quiet) as progress:
        if run is None:
            name = engine or generating_engines()[0]
            job = _job(flags, name, seq_len=1)
            made = generate_from_model(job, name, wanted, progress)
        else:
            settled = {"random-weights": random_weights, "dtype": dtype}
            _refuse(settled, "is settled by the run", "leave it out")
            found = read_run(run)
            if engine is not None:
                _check_generates(engine)
            own = found.method.engine
            name = engine or (own if own in generating_engines() else generating_engines()[0])
            given = parse_assignments(set_ or [], [name]).get(name, defaults(name))
            made = generate_from_run(found, name, given, _limits(vram, host_memory), wanted, progress)
    if as_json:
        typer.echo(to_json(made), nl=False)
    else:
        typer.echo("\n\n".join(each.prompt + each.text for each in made.continuations))


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line, or the lines of `file` that hold something; `-` is stdin.

    Raises `UserError` if there is none, or if both are there.
    """
    if file is None:
        if not given:
            raise UserError("generate", "there is no prompt", "give one, or a file with --prompts")
        return list(given)
    if given:
        raise UserError("--prompts", "there are prompts as arguments too", "give one or the other")
    try:
        text = sys.stdin.read() if str(file) == "-" else read_text(file, "file of prompts")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError("stdin", f"cannot be read ({reason})", "give text in UTF-8") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(str(file), "holds no prompt", "write one in each line")
    return lines


def _refuse(flags: Mapping[str, object], why: str, remedy: str) -> None:
    """Raises `UserError` for the first of `flags` that was given."""
    for name, value in flags.items():
        if value is not None:
            raise UserError(f"--{name}", why, remedy)


def _sampling(temperature: float, top_k: int, top_p: float, seed: int) -> Sampling:
    if not 0 <= seed <= MOST_SEED:
        raise UserError("--seed", "must be between 0 and 2^63 - 1", "see 'lspzo-bench generate --help'")
    try:
        return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    except ValueError as error:
        name, _, why = str(error).partition(" ")
        raise UserError(f"--{name.replace('_', '-')}", why, "see 'lspzo-bench generate --help'") from None


def _limits(vram: str | None, host_memory: str | None) -> Limits:
    return Limits(
        vram_bytes=None if vram is None else parse_bytes(vram, "--vram"),
        host_bytes=None if host_memory is None else parse_bytes(host_memory, "--host-memory"),
    )


def _check_generates(engine: str) -> None:
    if engine_names(engine) != [engine] or engine not in generating_engines():
        raise UserError(f"--engine {engine}", "does not generate", f"use {' or '.join(generating_engines())}")


def _job(flags: Mapping[str, Any], engine: str, **fields: int) -> Job:
    _check_generates(engine)
    return JobFlags(flags).job([engine], {"data": {"train": "random"}, **fields})


def _measured_job(
    flags: Mapping[str, Any],
    engine: str,
    max_new_tokens: int,
    batch_size: int | None,
    seq_len: int | None,
    warmup_steps: int | None,
) -> Job:
    """Its first step of warm-up is the prefill."""
    warmup = 1 + (MEASURED_WARMUP if warmup_steps is None else warmup_steps)
    if max_new_tokens <= warmup:
        raise UserError(
            f"--max-new-tokens {max_new_tokens}",
            f"none is left to count after the prefill and {warmup - 1} steps of warm-up",
            f"give {warmup + 1} or more",
        )
    return _job(
        flags, engine, batch_size=1 if batch_size is None else batch_size,
        seq_len=MEASURED_PROMPT if seq_len is None else seq_len, warmup_steps=warmup,
        steps=max_new_tokens - warmup,
    )  # fmt: skip


def _measure(
    job: Job,
    engine: str,
    sampling: Sampling,
    rounds: int,
    profile: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print the records as a table and the folder, or as JSON; exit 8 if a run failed."""

    wanted = DecodingJob(job=job, shape=resolve_shape(job), engine=engine, sampling=sampling, rounds=rounds)
    folder = results_folder(out, "generate", job.model.name, resume=False)
    machine = find_machine(profile, quiet=quiet, known=folder / MACHINE_FILE)
    save_machine(shared_machine(machine), folder / MACHINE_FILE)
    with GenerationProgress(quiet) as progress:
        runs = measure_decoding_runs(
            wanted, machine, folder, on_event=progress.launched, on_end=progress.ended
        )
    if as_json:
        typer.echo(to_json(tuple(runs)), nl=False)
    else:
        console().print(generations_table(runs))
        typer.echo(str(folder))
    if any(one.end_state not in ("ok", "skipped_infeasible") for one in runs):
        raise typer.Exit(8)
