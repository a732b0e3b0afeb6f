"""A kill at any file-system call of a run or a sweep, or no room to write from there on: `--resume` ends as
if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from python_path import python_path

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
KINDS = ("native", "lsp", "exact-offload", "mezo", "zo2", "sweep")
DISKS = ("full", "inodes", "read-only")
STRIDE = 37
"""Of the ordinary run: every call is tried apart, with `-m kills`."""


def disturbed(
    *faults: str, first: int, stride: int, kinds: tuple[str, ...] = KINDS, before: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        command = [sys.executable, str(SUPPORT / "kill_points.py"), ",".join(faults), folder]
        done = subprocess.run(
            [*before, *command, str(first), str(stride), *kinds],
            cwd=ROOT, capture_output=True, text=True, timeout=1800,
            env={
                **os.environ, "PYTHONPATH": python_path(ROOT, SUPPORT), "OMP_NUM_THREADS": "1",
                "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # what has begun to use CUDA cannot be forked
            },
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(one["fault"], one["what"]) for one in found] == [(f, kind) for f in faults for kind in kinds]
    assert [one["wrong"] for one in found] == [[]] * len(found), f"{found}\n{done.stderr[-3000:]}"
    return found


@cache
def mounting() -> tuple[str, ...]:
    """What a command begins with that may mount: in a name space of its own, so that nothing stays."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    with TemporaryDirectory() as folder:
        for command in (("unshare", "-m"), ("unshare", "-rm")):
            mount = [*command, "mount", "-t", "tmpfs", "tmpfs", folder]
            if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
                return command
    pytest.skip("nothing may be mounted here")


def test_a_kill_at_some_calls() -> None:
    for told in disturbed("kill", first=7, stride=STRIDE):
        assert told["tried"] >= told["calls"] // STRIDE > 0


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_a_kill_at_some_calls_of_torchao_offload() -> None:
    """Which runs on a GPU alone."""
    (told,) = disturbed("kill", first=3, stride=11, kinds=("torchao-offload",))
    assert told["tried"] >= 4


def test_no_room_from_some_calls_on() -> None:
    """A file system that is really full, out of inodes or read-only; a limit on sizes of files."""
    found = disturbed(
        *DISKS, "quota", first=23, stride=2 * STRIDE, kinds=("native", "sweep"), before=mounting()
    )
    assert sum(told["refused"] for told in found) >= 4


@pytest.mark.kills
@pytest.mark.timeout(1800)
def test_a_kill_at_every_call() -> None:
    for told in disturbed("kill", first=0, stride=1):
        assert told["tried"] == told["calls"] > 40


@pytest.mark.kills
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", [*DISKS, "quota"])
def test_no_room_from_every_call_on(fault: str) -> None:
    for told in disturbed(fault, first=0, stride=1, kinds=("native", "mezo", "sweep"), before=mounting()):
        assert told["tried"] == told["calls"]
        assert told["refused"] > 0
