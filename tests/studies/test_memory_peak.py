"""The peak of a trace as torch records it, and what there is to read before a GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.studies.memory_peak import ROOT, Event, lines_of, peak_of, place_of

SCRIPT = Path(__file__).parent / "memory_peak.py"
GRID = Path(__file__).parent / "prediction_grid_h200"


def event(action: str, size: int, address: int = 0, *frames: str) -> Event:
    """With frames `file:line:name`, the innermost first."""
    told: list[dict[str, Any]] = [
        {"filename": file, "line": int(line), "name": name}
        for file, line, name in (frame.split(":") for frame in frames)
    ]
    return {"action": action, "size": size, "addr": address, "frames": told}


TRACE = [
    event("free_completed", 50, 7),  # of before the trace
    event("segment_alloc", 2000),
    event("alloc", 600, 1, f"{ROOT}/engines/base.py:3:setup"),
    event("alloc", 900, 2),
    event("free_requested", 900, 2),
    event("free_completed", 900, 2),
    event("segment_map", 1000),
    event("alloc", 700, 2, "/x/site-packages/torch/nn/linear.py:5:forward"),
    event("alloc", 400, 3, f"{ROOT}/engines/base.py:3:setup"),  # the peak
    event("free_completed", 600, 1),
    event("alloc", 500, 1),
    event("segment_unmap", 1000),
]


def test_the_peak_is_what_was_there_when_most_was() -> None:
    """An address that is freed and allocated again counts with its size of the time."""
    peak = peak_of(TRACE)
    assert peak.event == 8
    assert peak.allocated_bytes == 600 + 700 + 400
    assert peak.reserved_bytes == 2000 + 1000
    assert [each["size"] for each in peak.live] == [600, 700, 400]


def test_a_trace_without_allocations_has_a_peak_of_nothing() -> None:
    peak = peak_of([event("free_completed", 50, 7), event("segment_alloc", 2000)])
    assert (peak.event, peak.allocated_bytes, peak.live) == (-1, 0, ())
    assert any("nowhere" in line for line in lines_of(peak, []))


def test_sizes_and_places_are_told_by_what_they_have_together() -> None:
    twice = [event("alloc", 3_000_000, number, f"{ROOT}/engines/base.py:3:setup") for number in (1, 2)]
    trace = [*twice, event("alloc", 5_000_000, 3, "/x/site-packages/torch/nn/linear.py:5:forward")]
    lines = list(lines_of(peak_of(trace), trace))
    assert lines[2] == "made by event 2 of 3: torch/nn/linear.py:5:forward"
    assert [line.split() for line in lines if " = " in line and line[0] == " "] == [
        ["3.000", "x", "2", "=", "6.00"],
        ["5.000", "x", "1", "=", "5.00"],
    ]
    assert lines[-2].strip() == "6.00, 2 of 3.000: engines/base.py:3:setup"


def test_a_place_deep_in_a_library_names_our_own_caller() -> None:
    device = "/x/site-packages/torch/utils/_device.py:1:f"
    deep = [f"/x/site-packages/torch/f{depth}.py:1:f" for depth in range(4)]
    made = event("alloc", 1, 1, device, *deep, f"{ROOT}/harness/a.py:9:g")
    expected = "torch/f0.py:1:f < torch/f1.py:1:f < torch/f2.py:1:f || harness/a.py:9:g"
    assert place_of(made) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.json"], "missing.json"),
        (["job.toml"], "add --engine and --machine"),
        (["job.toml", "--engine", "adam", "--machine", str(GRID / "machine.json")], "adam"),
        ([str(sorted((GRID / "runs").glob("native*.json"))[0])], "finds no CUDA device"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "job.toml").write_text('[model]\nname = "opt-125m"\nrandom_weights = true\n')
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
