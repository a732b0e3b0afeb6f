"""Sweeps of ten runs killed at a hundred random moments: see `kill_sweep`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from python_path import python_path

ROOT = Path(__file__).parents[3]
SUPPORT = ROOT / "tests" / "support"
MOMENTS = 100
MINUTES = 15


@pytest.mark.kills
@pytest.mark.timeout(60 * (MINUTES + 5))
def test_what_had_finished_is_there_and_resuming_gives_the_tables_of_an_undisturbed_sweep() -> None:
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        command = [sys.executable, str(SUPPORT / "kill_sweep.py"), folder, "16", str(MOMENTS), str(MINUTES)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": python_path(ROOT, SUPPORT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["wrong"] == [], f"{told}\n{done.stderr[-3000:]}"
    assert told["moments"] == MOMENTS
