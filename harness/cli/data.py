"""The command `data`: a file as a model will see it, before anything is trained on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from engines.errors import UserError
from harness.cli.job_flags import JobFlags, takes_job
from harness.cli.options import Json, Lang, Quiet, speaks
from harness.progress import console, told
from harness.recommendation import without_weights
from harness.resolve import resolve_shape
from profiles.documents import to_json
from profiles.language import enumerated, translated, word

if TYPE_CHECKING:
    from harness.data.preview import Preview, ShownExample


@speaks
@takes_job(
    without=(
        "data", "untied", "layers", "accumulation", "steps", "warmup_steps", "dtype", "checkpointing", "vram",
        "host_memory", "timeout", "gpus", "nodes", "set_", "job_file",
    )
)  # fmt: skip
def data(
    flags: JobFlags,
    file: Annotated[str, typer.Argument(help="What `run` would take as --data.")],
    examples: Annotated[int, typer.Option("--examples", min=0, help="How many to show.")] = 3,
    lang: Lang = "en",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a file as a model will see it: examples in tokens, what the loss counts, labels, lengths.

    Layouts: text and label (or two texts), instruction and output, prompt and completion, messages,
    question with context and answers, or text alone; in CSV, TSV, JSON, JSON lines, Parquet, or at the hub.
    """
    job = flags.job([], {"data": {"train": file}, "padding": "longest"})
    job = replace(job, model=without_weights(job.model))
    if file == "random":
        raise UserError(
            "random", "has nothing to show: its tokens are drawn at random", "name a file, or builtin"
        )
    shape = resolve_shape(job)

    with told(f"reading {Path(file).name}", quiet=quiet):
        from harness.data.preview import preview

        found = preview(job, shape, examples)
    if as_json:
        typer.echo(to_json(found), nl=False)
    else:
        _print(found)


def _print(found: Preview) -> None:
    out = console()
    for line in (*found.readings, found.description):
        out.print(_in_parts(line), markup=False, soft_wrap=True)
    for number, example in enumerate(found.examples, start=1):
        out.print(f"\n{word('example')} {number}: {_about(example)}", markup=False, soft_wrap=True)
        out.print(_tokens(example), soft_wrap=True)
    out.print()
    rows = {
        "labels": ", ".join(f"{name} {count:,}" for name, count in found.label_counts.items()),
        "tokens of an example": ", ".join(f"{at} {each:,}" for at, each in found.length_percentiles.items()),
        "cut": f"{found.cut:,} of {found.training + found.held_out:,} examples",
        "padding": f"{found.padded_share:.1%} of what is computed on",
        "training examples that are there before": f"{found.duplicates:,}",
        "held-out examples that are in training too": f"{found.held_out_in_training:,}",
    }
    for name, value in rows.items():
        if value:
            out.print(f"{word(name)}: {translated(value)}", markup=False, soft_wrap=True)


def _in_parts(line: str) -> str:
    """What is told of a file, behind its name, in the language spoken."""
    name, colon, rest = line.partition(": ")
    return name + colon + "; ".join(translated(part) for part in rest.split("; "))


def _about(example: ShownExample) -> str:
    parts = [f"{len(example.tokens):,} tokens"]
    if example.label is None:
        parts.append(f"{sum(example.learnt)} of them learnt (underlined, between >> and <<)")
    else:
        parts.append(f"label {example.label}")
    parts += ["fills --seq-len: maybe cut"] * example.is_cut
    parts += [f"{example.padding} of padding"] * bool(example.padding)
    return enumerated(map(translated, parts))


def _tokens(example: ShownExample) -> Text:
    """Tokens apart from one another by a dot, what is learnt underlined and, for a plain terminal, framed."""
    text = Text()
    inside = False
    for token, learnt in zip(example.tokens, example.learnt, strict=True):
        if learnt != inside:
            text.append(">>" if learnt else "<<", style="dim")
        elif len(text):
            text.append("\u00b7", style="dim")
        text.append(token, style="underline" if learnt else "")
        inside = learnt
    return text.append("<<", style="dim") if inside else text
