"""What a shell completes, and how soon lists are there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from python_path import python_path

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("words", "found"), [("re", {"recommend", "report"}), ("report --la", {"--lang"}), ("comp", {"compare"})]
)
def test_a_shell_completes_commands_and_flags(words: str, found: set[str]) -> None:
    line = f"lspzo-bench {words}"
    asked = {
        "_LSPZO_BENCH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-m", "harness"], env=os.environ | asked | {"PYTHONPATH": python_path(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert set(done.stdout.split()) == found, done.stderr


@pytest.mark.parametrize(
    ("words", "is_refused"),
    [("engines", False), ("models", False), ("--help", False), ("export nowhere", True)],
)
def test_lists_and_refusals_are_there_without_torch(words: str, is_refused: bool) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from harness.cli.app import app\n"
        f"assert bool(CliRunner().invoke(app, {words.split()!r}).exit_code) == {is_refused}\n"
        "print([name for name in ('torch', 'transformers', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
