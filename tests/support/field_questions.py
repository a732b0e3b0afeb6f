"""The fifteen questions that users of this field ask, each with the command that answers it and what it says:
`python tests/support/field_questions.py` prints the page profiles/questions.md.
"""

from __future__ import annotations

import os
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from typer.testing import CliRunner

from harness.cli.app import app

PAGE = Path(__file__).parents[2] / "profiles" / "questions.md"
WIDTH = "240"
"""Columns, so that no line of an answer is wrapped."""


@dataclass(frozen=True, kw_only=True)
class Question:
    asked: str
    where: str
    """Threads in which people ask."""
    command: str | None = None
    """Arguments of the program; `None`: it does not answer."""
    shown: tuple[str, ...] = ()
    """Parts of the lines of its answer that are shown."""
    told: str
    """What it comes to, or why there is no answer."""


QUESTIONS = tuple(
    Question(**{**each, "shown": tuple(each.get("shown", ()))})
    for each in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["question"]
)


def page() -> str:
    """Markdown."""
    head = [
        "# What people ask, and what the program says",
        "",
        "Made by `python tests/support/field_questions.py`, which runs the commands; `tests/test_golden.py`",
        "holds it to the code. Machines are datasheets, so that everybody gets these answers; without",
        "`--profile` plans are for the machine at hand, as it was measured last or is measured now.",
    ]
    body = [line for number, each in enumerate(QUESTIONS, 1) for line in _lines(number, each)]
    return "\n".join([*head, *body]) + "\n"


def _lines(number: int, question: Question) -> Iterator[str]:
    yield from ("", f"## {number}. {question.asked}", "", f"({question.where})", "")
    if question.command is not None:
        yield from ("```", f"lspzo-bench {question.command}")
        yield from (f"  {line}" for line in _answer(question))
        yield from ("```", "")
    yield question.told


def _answer(question: Question) -> list[str]:
    assert question.command is not None
    done = CliRunner(env={**os.environ, "COLUMNS": WIDTH}).invoke(
        app, [*shlex.split(question.command), "--quiet"]
    )
    assert done.exception is None, done.exception
    lines = [line.strip() for line in done.stdout.splitlines()]
    found = [line for line in lines if any(part.strip() in line for part in question.shown)]
    assert found, (question.asked, done.stdout)
    return found


if __name__ == "__main__":
    sys.stdout.write(page())
