"""What `recommend` and `doctor` say in Japanese: no sentence of theirs is left in English."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.cli.app import app
from profiles.language import speaking, translated

ROOT = Path(__file__).parents[3]
ENGLISH = re.compile(r"\b(?:the|and|of|is|are|was|not|that|with|for|no|to|a|in)\b [a-z]+")
JAPANESE = re.compile("[ぁ-んァ-ン一-龥]")
AS_TYPED = re.compile(r"lspzo-bench [^。、]*|--[a-z][^。、\uff08\uff09]*|'[^']*'|「[^」]*」")
"""Commands, flags and names stay as they are."""


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments, "--lang", "ja"], env={"COLUMNS": "1000"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "opt-1.3b", "--profile", "rtx-3090", "--examples", "9", "--what-if", "--engines", "zo2"],
        ["--model", "opt-13b", "--profile", "rtx-3060-12gb", "--explain", "--engines", "lsp,exact-offload"],
        ["--model", "opt-30b", "--profile", "rtx-a1000-laptop", "--dtype", "fp16"],
        ["--model", "llama-3.1-8b", "--profile", "t4", "--vram", "90GB"],
        ["--model", "opt-6.7b", "--profile", "l4", "--seq-len", "2048", "--batch-size", "8",
         "--target", "hours=8", "--steps", "50", "--engines", "mezo", "--power", "400W",
         "--price", "30JPY/kWh@2026-11-01"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_recommend_says_all_of_it(arguments: list[str]) -> None:
    for line in printed("recommend", *arguments).splitlines():
        left = ENGLISH.findall(AS_TYPED.sub("", line))
        assert left == [], line


@pytest.mark.parametrize("machine", ["rtx-a1000-laptop", "rtx-3090", "h200", "rtx-4090"])
def test_doctor_says_all_of_it(machine: str) -> None:
    for line in printed("doctor", "--profile", machine).splitlines()[2:]:
        assert ENGLISH.findall(AS_TYPED.sub("", line)) == [], line


def sentences_of_checks() -> list[str]:
    """What checks say without filling anything in: titles, causes, remedies, and why they do not judge."""
    found = []
    for path in sorted((ROOT / "profiles" / "doctor").glob("checks_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            values = [node.value] if isinstance(node, ast.keyword | ast.Return) else []
            values += [node.body, node.orelse] if isinstance(node, ast.IfExp) else []
            found += [
                one.value for one in values if isinstance(one, ast.Constant) and isinstance(one.value, str)
            ]
    return [one for one in found if " " in one]


def test_every_sentence_of_the_checks_is_translated() -> None:
    found = sentences_of_checks()
    assert len(found) > 60
    with speaking("ja"):
        assert [one for one in found if not JAPANESE.search(translated(one))] == []


def test_json_stays_english() -> None:
    told = printed("recommend", "--model", "opt-1.3b", "--profile", "rtx-3090", "--json")
    assert not JAPANESE.search(told)
    assert not JAPANESE.search(printed("doctor", "--profile", "rtx-3090", "--json"))
