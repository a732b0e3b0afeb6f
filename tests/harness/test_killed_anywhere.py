"""A kill at any file-system call of a run or a sweep: `--resume` ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
KINDS = ("native", "lsp", "mezo", "zo2", "sweep")
STRIDE = 37
"""Of the ordinary run: every call is tried apart, with `-m slow`."""


def killed(first: int, stride: int) -> list[dict[str, Any]]:
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        done = subprocess.run(
            [sys.executable, str(SUPPORT / "kill_points.py"), folder, str(first), str(stride), *KINDS],
            cwd=ROOT, capture_output=True, text=True, timeout=1800,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [one["what"] for one in found] == list(KINDS)
    assert [one["wrong"] for one in found] == [[]] * len(KINDS), f"{found}\n{done.stderr[-3000:]}"
    return found


def test_a_kill_at_some_calls() -> None:
    for told in killed(first=7, stride=STRIDE):
        assert told["tried"] >= told["calls"] // STRIDE > 0


@pytest.mark.kills
@pytest.mark.timeout(1800)
def test_a_kill_at_every_call() -> None:
    for told in killed(first=0, stride=1):
        assert told["tried"] == told["calls"] > 40
