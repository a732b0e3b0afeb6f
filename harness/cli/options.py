"""The flags that several commands share, those that describe a job among them. Imports no torch."""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from engines import default_engines, engine_of, public_engines
from engines.errors import UserError
from harness.records.job import HeadChoice, Padding
from profiles.language import Language, speaking

Model = Annotated[
    str | None,
    typer.Option("--model", help="A hub id, a local folder, or a named shape (see `lspzo-bench models`)."),
]
RandomWeights = Annotated[
    bool | None,
    typer.Option(
        "--random-weights/--pretrained",
        help="Seeded random weights instead of a checkpoint. Named shapes need it.",
        show_default=False,
    ),
]
Untied = Annotated[
    bool | None,
    typer.Option("--untied/--as-published", help="Give the output head its own tensor.", show_default=False),
]
Layers = Annotated[
    int | None,
    typer.Option(
        "--layers", min=1, help="Only the model's first so many blocks, of random weights. [default: all]"
    ),
]
HeadFlag = Annotated[
    HeadChoice | None,
    typer.Option(
        "--head",
        help="What the model is trained for; auto: question_answering if the data has answers in a text, "
        "else causal_lm for decoders, for encoders classification, with --template masked_lm. "
        "[default: auto]",
    ),
]
DataFlag = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="random, builtin, a file (.txt, .csv, .tsv, .json, .jsonl, .parquet), or a data set of the hub "
        "(`ORGANISATION/NAME`). `lspzo-bench data` shows how it is read.",
    ),
]
EvalData = Annotated[
    str | None, typer.Option("--eval-data", help="Held-out file or data set of the same kind.")
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        help="Which column is what, where their names do not tell: `text=review,label=stars`, by number in a "
        "table without a header; `text2` is the second text of a pair, `target` a number to be predicted.",
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        help="The prompt of a labelled row: `{text} It was` for a decoder, `{text} It was {mask}.` for an "
        "encoder, with `{text2}` for the second of a pair and `{word}` for another column, here `word`; the "
        "loss is over the words of --labels alone.",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        help="With --template: the word for each class, in their order: `terrible,great`; "
        "`{choice1},{choice2}` takes each row's own, out of these columns.",
    ),
]
Strict = Annotated[
    bool | None,
    typer.Option(
        "--strict/--lenient",
        help="Refuse a file that has a record that cannot be used; else it is left out, and counted.",
        show_default=False,
    ),
]
SkipBad = Annotated[
    bool | None,
    typer.Option(
        "--skip-bad/--mostly-good",
        help="Go on also where more than a tenth of the records cannot be used.",
        show_default=False,
    ),
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Sequences per micro-batch.")]
PaddingFlag = Annotated[
    Padding | None,
    typer.Option(
        "--padding",
        help="Of batches from a file: all to --seq-len, or sequences of like length together, to the longest "
        "of them. [default: longest in run, else seq_len, as predictions have it]",
    ),
]
SeqLen = Annotated[int | None, typer.Option("--seq-len", help="Tokens per sequence.")]
Accumulation = Annotated[int | None, typer.Option("--accumulation", help="Micro-batches per step.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimizer steps, warm-up not counted.")]
WarmupSteps = Annotated[
    int | None, typer.Option("--warmup-steps", help="First steps, kept and flagged but not counted.")
]
EvalBatches = Annotated[
    int | None,
    typer.Option(
        "--eval-batches",
        help="Held-out batches evaluated before and after, drawn by --seed where there are more; 0 for none.",
    ),
]
EvalEvery = Annotated[
    int | None,
    typer.Option(
        "--eval-every",
        min=0,
        help="Steps between evaluations on held-out data while training; the best model stays in OUT/best.",
    ),
]
BestBy = Annotated[
    str | None,
    typer.Option(
        "--best-by",
        help="Metric that says which model is the best, such as loss, accuracy, f1 or matthews. "
        "[default: the task's own]",
    ),
]
Patience = Annotated[
    int | None,
    typer.Option("--patience", min=0, help="End after so many evaluations that were no better; 0: never."),
]
DtypeFlag = Annotated[
    Literal["fp32", "bf16", "fp16"] | None,
    typer.Option("--dtype", help="Weights and forward pass."),
]
Checkpointing = Annotated[
    bool | None,
    typer.Option(
        "--checkpointing/--no-checkpointing", help="Recompute activations in backward.", show_default=False
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Of weights, data order and perturbations.")]
Vram = Annotated[
    str | None,
    typer.Option(
        "--vram",
        help="Cap on GPU memory. 24GB is 24e9 bytes; a card sold as 24 GB has 24GiB and gives about 23.5GiB.",
    ),
]
HostMemoryFlag = Annotated[str | None, typer.Option("--host-memory", help="Cap on a run's host memory.")]
Timeout = Annotated[
    float | None, typer.Option("--timeout", help="Seconds one run may take, set-up included.")
]
Gpus = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        min=1,
        help="GPUs of this machine: so many processes share out the micro-batches of each step, of which "
        "--accumulation counts all, or the queries of one, with the results of one process.",
    ),
]
Nodes = Annotated[
    int | None,
    typer.Option(
        "--nodes",
        min=1,
        help="Machines: start the same command on each, with MASTER_ADDR and MASTER_PORT of the first and "
        "NODE_RANK 0, 1, ... set.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A setting of an engine: `lsp.d=1024`, or `learning_rate=1e-5` for every engine that has it. "
        "`engines` lists them; which go together stands in README.md.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder for results. [default: a new one below out/]")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Engines = Annotated[
    str | None,
    typer.Option(
        "--engines",
        "--engine",
        help=f"Comma-separated, or all; see `lspzo-bench engines`. [default: {','.join(default_engines())}]",
    ),
]
Profile = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        help="A machine: a name from `lspzo-bench profiles`, or a file from `probe`. [default: probe now]",
    ),
]
KeptProfile = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        help="A machine: a name from `lspzo-bench profiles`, or a file from `probe`. "
        "[default: this one, as `probe` last measured it, or measured now]",
    ),
]
Emulate = Annotated[
    Path | None,
    typer.Option(
        "--emulate",
        help="Hold the runs to the GPU memory, link and CPU threads of a machine that is smaller than this "
        "one, and predict for it: a name from `lspzo-bench profiles`, or a file from `probe`. "
        "[default: this machine as it is]",
    ),
]
External = Annotated[
    list[Path] | None,
    typer.Option(
        "--external",
        help="A file (TOML) that describes another trainer: its command, and how its steps are read from its "
        "output. It becomes a method of the comparison. May be repeated; see harness/README.md. "
        "[default: none]",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Do only what is missing in --out.")]
RoundsFlag = Annotated[
    int, typer.Option("--rounds", min=1, help="Processes per engine, interleaved A B B A.")
]
QualityTargetFlag = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="With --budget: what is to be reached on development data, such as `accuracy>=0.9`. "
        "[default: none, runs are of --steps]",
    ),
]
BudgetFlag = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="With --target, which needs it: steps of each method, all its trials together: `2h`, `30min`, "
        "`5Mtokens`. [default: none, or the suite's]",
    ),
]
TestData = Annotated[
    str | None,
    typer.Option(
        "--test-data", help="With --target: what nothing is chosen by. [default: half of what is held out]"
    ),
]
SuiteFlag = Annotated[
    str | None,
    typer.Option(
        "--suite",
        help="Studies with targets: a file, or one that comes along: mezo-tasks, glue, instruct, lm, quick, "
        "laptop-4gb, consumer-24gb. [default: none]",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="With --suite: the folder that has its tasks' files. "
        "[default: the suite's own, where it is a file; built-in data need none]",
    ),
]
SeedsFlag = Annotated[int, typer.Option("--seeds", min=1, help="With --target: seeds of the last trials.")]
CriteriaFlag = Annotated[
    Path | None,
    typer.Option(
        "--criteria",
        help="Criteria in TOML; their hash is stamped into every run. "
        "[default: criteria.toml in the folder of results, else built-in ones]",
    ),
]
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
        help="Exit 3, 4 or 5 on these verdicts: no-go, conditional, inconclusive (comma-separated). "
        "[default: exit 0 on each]",
    ),
]


Lang = Annotated[
    Language,
    typer.Option(
        "--lang", envvar="LSPZO_BENCH_LANG", show_envvar=False, help="Language of what is read: en or ja."
    ),
]
JobFile = Annotated[Path | None, typer.Option("--job", help="A job in TOML; flags override its fields.")]


def engine_names(engines: str | None) -> list[str]:
    """Those that `--engines` names, each once; without it those that take part by default. Raises `UserError`
    for a name that there is not, and for several settings of one engine."""
    public = public_engines()
    if engines is None:
        return list(default_engines())
    if engines.strip() == "all":
        return list(public)
    names = list(dict.fromkeys(name.strip() for name in engines.split(",") if name.strip()))
    for name in names:
        if ":" in name and engine_of(name) in public:
            raise UserError(
                f"method '{name}'",
                "several settings of one engine are for --target and --budget, or --suite",
                "give both, or name the engine alone",
            )
        if name not in public:
            raise UserError(f"engine '{name}'", "there is no such engine", _meant(name, public))
    if not names:
        raise UserError("--engines", "names no engine", "see 'lspzo-bench engines'")
    return names


def _meant(name: str, public: Sequence[str]) -> str:
    """What to do about an engine's name that is none: the nearest ones, or all."""
    near = [each for each in public if each.startswith(f"{name}-")]
    near += [each for each in difflib.get_close_matches(name.lower(), public) if each not in near]
    if near:
        return f"did you mean {' or '.join(near)}? see 'lspzo-bench engines'"
    return f"choose from: {', '.join(public)}"


def method_names(engines: str | None) -> list[str]:
    """Names from a list with commas, of engines or such as `lsp:half`: an engine with its own settings beside
    others of it. `None`: the default engines. Raises `UserError` for an unknown engine."""
    names = list(dict.fromkeys(each.strip() for each in (engines or "").split(",") if each.strip()))
    own = [name for name in names if ":" in name]
    engine_names(",".join(dict.fromkeys(map(engine_of, names))) if own else engines)
    for name in own:
        if re.fullmatch(r"[A-Za-z0-9][-\w.]*", name.partition(":")[2], re.ASCII) is None:
            raise UserError(
                f"method '{name}'", "what follows the colon is no name", "use letters, digits, - and _"
            )
    return names if own else engine_names(engines)


def exit_without_gpu(reason: str | None) -> NoReturn:
    """One line on stderr, exit code 7."""
    error = UserError(
        "no GPU", reason or "the profile has none", "see 'nvidia-smi', or leave out --require-gpu"
    )
    sys.stderr.write(f"error: {error}\n")
    raise typer.Exit(7)


def exit_for(end_states: Iterable[str]) -> None:
    """Exits 8 if a run failed; what cannot run here was not a failure."""
    if any(state not in ("ok", "not_available", "skipped_infeasible") for state in end_states):
        raise typer.Exit(8)


def speaks(command: Callable[..., None]) -> Callable[..., None]:
    """All that a command with --lang prints is in that language."""

    @functools.wraps(command)
    def called(**values: Any) -> None:
        with speaking(values["lang"]):
            command(**values)

    return called
