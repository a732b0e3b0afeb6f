"""Runs with blocks on disk, in real processes that are killed for real: nothing is left there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from python_path import python_path
from scripted_runs import scripted_plan
from settings_given import given_settings

from harness.records.job import DataSource, Job, ModelSource
from harness.resolve import resolve_shape
from harness.runs.events import Stepped
from harness.runs.launch import Outcome, launch_child
from harness.runs.worker import Request
from profiles.documents import to_json

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("forked_programs")


def request(folder: Path, steps: int = 4) -> Request:
    job = Job(
        model=ModelSource(name="tiny-opt", random_weights=True),
        data=DataSource(train="random"),
        batch_size=1,
        seq_len=16,
        dtype="fp32",
        steps=steps,
        warmup_steps=1,
    )
    settings = given_settings("zo2", disk_blocks=2, disk_folder=str(folder))
    plan = replace(scripted_plan(), engine="zo2", settings=settings)
    return Request(id="zo2-r1", job=job, shape=resolve_shape(job), plan=plan)


def start(folder: Path, out: Path, steps: int = 4, on_event: Any = lambda event: None) -> Outcome:
    return launch_child(request(folder, steps), out, device=None, on_event=on_event)


def holders(folder: Path) -> set[int]:
    """Processes that have a file in `folder` open, with a name or without."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link).startswith(f"{folder}/"):
                found.add(int(link.parts[2]))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    spill = tmp_path / "spill"
    yield spill
    assert list(spill.iterdir()) == []
    assert holders(spill) == set()


def test_a_run_says_what_it_read_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    outcome = start(folder, tmp_path / "out")
    assert (outcome.end_state, outcome.end_reason) == ("ok", None)
    summary = outcome.summary
    block_bytes = 4 * request(folder).shape.block_parameters
    assert summary.disk_read_bytes == 2 * block_bytes
    assert summary.disk_s is not None
    assert summary.disk_s > 0
    assert summary.disk_direct is not None
    assert summary.disk_floor_s is None  # too little to measure a rate on
    assert summary.disk_floor_share is None


def test_a_worker_that_is_killed_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    held: list[set[int]] = []

    def kill(event: object) -> None:
        if isinstance(event, Stepped) and event.sample.step == 2:
            held.append(holders(folder))
            for pid in held[0]:
                os.kill(pid, signal.SIGKILL)

    outcome = start(folder, tmp_path / "out", steps=100_000, on_event=kill)
    assert (outcome.end_state, outcome.end_reason) == ("crash", "killed by signal 9")
    assert len(held) == 1
    assert len(held[0]) == 1


PARENT = """
import sys
from pathlib import Path
from pydantic import TypeAdapter
from harness.runs.events import Stepped
from harness.runs.launch import launch_child
from harness.runs.worker import Request

def told(event):
    if isinstance(event, Stepped):
        print(event.sample.step, flush=True)

request = TypeAdapter(Request).validate_json(Path(sys.argv[1]).read_bytes())
launch_child(request, Path(sys.argv[2]), device=None, on_event=told)
"""


def test_when_both_are_killed_nothing_is_left_to_be_found(folder: Path, tmp_path: Path) -> None:
    told = tmp_path / "request.json"
    told.write_text(to_json(request(folder, steps=100_000)))
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", PARENT, str(told), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": python_path(ROOT)},
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "0\n"
    workers = holders(folder)
    assert len(workers) == 1
    assert parent.pid not in workers
    parent.kill()
    parent.communicate()
    psutil.wait_procs([psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)], timeout=20)
    deadline_s = time.monotonic() + 20
    while holders(folder) and time.monotonic() < deadline_s:
        time.sleep(0.05)


def test_a_disk_that_is_too_small_is_an_end_state(tmp_path: Path) -> None:
    """Before anything is filled: a folder that cannot be used at all, and one in the way."""
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    outcome = start(in_the_way, tmp_path / "out")
    assert outcome.end_state == "not_available"
    assert "cannot be used" in str(outcome.end_reason)
    assert "--set zo2.disk_folder=FOLDER" in str(outcome.end_reason)
    assert outcome.samples == ()
