"""What today's cost model says of the grid that was measured: errors may not grow, and no cell is lost."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
from hidden_libraries import hidden
from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

from harness.records.job import make_job
from harness.records.run import Run, Summary, load_run
from harness.runs.launch import Outcome
from profiles.machine import load_machine
from profiles.planning.budget import Budget, gpu_bytes_needed
from tests.studies.prediction_grid import (
    QUANTITIES,
    Row,
    Running,
    Server,
    budget_as_run,
    compile_apart,
    cost_of,
    errors_of,
    grid_cells,
    needs_as_today,
    rows_of,
    text_of,
    untouched_bytes,
)

WHEN = (
    "",
    "_evening",
    "_night",
    "_midnight",
    "_second_night",
    "_morning",
    "_second_morning",
    "_third_morning",
    "_noon",
    "_afternoon",
    "_second_afternoon",
    "_second_evening",
    "_third_evening",
    "_fourth_evening",
    "_expandable",
    "_last_evening",
    "_fifth_evening",
    "_december_jobs",
    "_december_edges",
)
FOLDERS = tuple(Path(__file__).parent / f"prediction_grid_h200{when}" for when in WHEN)
"""Cells of 29 November to 1 December 2026 on H200 machines. Constants were changed after a look at each but
the last two, as the README of the first says."""

CELLS = 710
RAN_OUT = 194
"""Of memory."""
NOW = {
    "step": (39, 0.0227, 0.113),
    "reserved GPU memory": (196, 0.0276, 0.0711),
    "host memory": (73, 0.0207, 0.0404),
}
"""Cells, median error and within what nine in ten are, of all folders but those below; a better model makes
them smaller."""
DRAWN = {
    "_second_afternoon": {
        "step": (19, 0.0703, 0.3004),
        "step, with these launches": (19, 0.0263, 0.1462),
        "reserved GPU memory": (41, 0.0151, 0.1294),
        "host memory": (3, 0.0292, 0.0371),
    },
    "_second_evening": {
        "step": (15, 0.1233, 0.3414),
        "step, with these launches": (15, 0.0872, 0.1605),
        "reserved GPU memory": (15, 0.0183, 0.0963),
        "host memory": (3, 0.0151, 0.0372),
    },
    "_third_evening": {
        "reserved GPU memory": (19, 0.0217, 0.1478),
        "host memory": (4, 0.046, 0.0632),
    },
    "_fourth_evening": {
        "step": (18, 0.0378, 0.1357),
        "step, with these launches": (18, 0.0604, 0.1937),
        "reserved GPU memory": (18, 0.038, 0.1274),
        "host memory": (2, 0.0453, 0.0608),
    },
    "_fifth_evening": {
        "step": (23, 0.0899, 0.2951),
        "step, with these launches": (23, 0.0819, 0.3274),
        "reserved GPU memory": (23, 0.0118, 0.0331),
        "host memory": (2, 0.0264, 0.0336),
    },
    "_december_jobs": {
        "step": (23, 0.0538, 0.1635),
        "step, with these launches": (23, 0.0542, 0.2028),
        "reserved GPU memory": (23, 0.0172, 0.0771),
        "host memory": (2, 0.0202, 0.0395),
    },
    "_december_edges": {
        "reserved GPU memory": (22, 0.0219, 0.0566),
        "host memory": (5, 0.0364, 0.6843),
    },
    "_expandable": {
        "reserved GPU memory": (27, 0.014, 0.0315),
        "host memory": (4, 0.0595, 0.069),
    },
    "_last_evening": {
        "reserved GPU memory": (22, 0.0133, 0.0281),
        "host memory": (5, 0.0426, 0.1061),
    },
}
"""The same of folders whose cells were drawn by lot, and of that with expandable segments, each by itself."""
MAY_GROW = 1.05
INSIDE = 0.9
"""Share of steps that take what their range says."""
UNFIT_BUT_RAN = 3
"""Runs of 267 that would be refused today with as much memory as they had, or with a twentieth more."""


@cache
def rows_in(folder: Path) -> list[Row]:
    return rows_of(folder)


def rows() -> list[Row]:
    return [row for folder in FOLDERS for row in rows_in(folder)]


def records() -> list[tuple[Run, Budget]]:
    return [
        (record, budget_as_run(record, machine, None))
        for folder, machine in ((each, load_machine(each / "machine.json")) for each in FOLDERS)
        for path in sorted((folder / "runs").glob("*.json"))
        for record in [load_run(path)]
    ]


def limit_share(record: Run, budget: Budget) -> float:
    """What is planned for its settings today over the limit that it had."""
    cost = cost_of(record, make_job(record.job, record.id))
    needed: float = gpu_bytes_needed(cost, budget) / record.job["limits"]["vram_bytes"]
    return needed


def test_no_cell_is_lost() -> None:
    assert len(rows()) == CELLS


@pytest.mark.parametrize(
    ("when", "quantity"),
    [
        *(("all others", quantity) for quantity in NOW),
        *((when, quantity) for when, lines in DRAWN.items() for quantity in lines),
    ],
)
def test_the_errors_do_not_grow(when: str, quantity: str) -> None:
    count, median, nine_in_ten = DRAWN.get(when, NOW)[quantity]
    among = [
        row
        for its, folder in zip(WHEN, FOLDERS, strict=True)
        if (its == when if when in DRAWN else its not in DRAWN)
        for row in rows_in(folder)
    ]
    found = errors_of(among, QUANTITIES[quantity])
    assert found is not None
    assert found.count >= count, "a cell was lost"
    assert found.median <= MAY_GROW * median, text_of(among)
    assert found.nine_in_ten <= MAY_GROW * nine_in_ten, text_of(among)


def test_nine_in_ten_steps_take_what_their_range_says() -> None:
    inside = [row.inside for row in rows() if row.inside is not None]
    assert len(inside) >= 73
    assert sum(inside) >= INSIDE * len(inside), text_of(rows())


def test_what_ran_out_of_memory_is_not_called_fitting_any_more() -> None:
    """With the settings and the limit that it had."""
    ran_out = [
        (record, budget)
        for record, budget in records()
        if record.end_state == "oom_gpu" and needs_as_today(record)
    ]
    assert len(ran_out) == RAN_OUT
    still = [record.id for record, budget in ran_out if limit_share(record, budget) <= 1]
    assert not still


def test_little_that_ran_would_be_refused() -> None:
    ran = [
        (record, budget)
        for record, budget in records()
        if record.end_state == "ok" and record.job["limits"]["vram_bytes"] and needs_as_today(record)
    ]
    refused = [record.id for record, budget in ran if limit_share(record, budget) > 1 / 0.95]
    assert len(refused) <= UNFIT_BUT_RAN, refused


def test_native_called_fitting_at_new_limits_ran() -> None:
    """By which its plans leave 3 % of a GPU free and not a tenth (`engines.costs.native.SPARE`)."""
    latest = [
        folder for folder in FOLDERS if folder.name.endswith(("_morning", "_noon", "_second_afternoon"))
    ]
    ends = [
        record.end_state
        for folder in latest
        for path in sorted((folder / "runs").glob("*.json"))
        if (record := load_run(path)).engine == "native"
        and record.job["limits"]["vram_bytes"]
        and record.plan.fits
    ]
    assert len(ends) == 22
    assert set(ends) == {"ok"}


def test_a_library_that_starts_cuda_is_left_to_the_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "starts_cuda.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with hidden(["starts_cuda"]):
        assert importlib.util.find_spec("starts_cuda") is None
        with pytest.raises(ImportError):
            importlib.import_module("starts_cuda")
    assert importlib.import_module("starts_cuda") is not None


def test_only_edges_compile_apart_and_find_nothing_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two attempts at each of two cells; what torch's compiler would keep lies where it keeps it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "shared"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "shared"))
    seen: list[tuple[str, list[str]]] = []

    class Copy(Server):
        def outcome(self, folder: Path, *, alone: bool = True) -> Outcome:
            with patch.dict(os.environ):
                compile_apart(folder)
                kept = Path(triton_cache_dir(0))
                kept.mkdir(parents=True, exist_ok=True)
                seen.append((str(kept.relative_to(tmp_path)), os.listdir(kept)))
                (kept / "timed").touch()
            return Outcome(end_state="crash", end_reason=None, samples=(), summary=Summary(), by_user=False)

    machine = load_machine(FOLDERS[0] / "machine.json")
    arguments = argparse.Namespace(out=tmp_path, seconds=None)
    running = Running(arguments, machine)
    by_kind = {cell.edge: cell for cell in grid_cells() if cell.engine == "native"}
    for cell in (by_kind[1.0], by_kind[1.0], by_kind[None], by_kind[None]):
        running.measure(cell, Copy(), alone=True)
        (tmp_path / "runs" / f"{cell.name}.json").unlink()
    apart = f".work/{by_kind[1.0].name}/compiled/triton/0"
    assert seen == [(apart, []), (apart, []), ("shared", []), ("shared", ["timed"])]


def test_pages_that_a_copy_has_not_touched_are_those_of_its_server_alone() -> None:
    own = os.getpid()
    if not Path("/proc/self/smaps").exists():
        pytest.skip("the kernel says nothing of a process's pages")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert untouched_bytes(own, other.pid) > 10_000_000  # other addresses: nothing of it
        other.kill()
    assert untouched_bytes(own, own) < 10_000_000
    assert untouched_bytes(own, 2**22 + 1) == 0


def test_the_list_has_what_was_promised() -> None:
    cells = grid_cells()
    assert len(cells) >= 60
    assert len({cell.name for cell in cells}) == len(cells)
    assert len({cell.model.partition("-")[0].rstrip("0123456789.") for cell in cells}) >= 5
    assert sum(cell.edge == 1.0 for cell in cells) == sum(cell.edge == 0.95 for cell in cells) >= 20
    assert {"4GB", "8GB", "12GB", "16GB", "24GB"} <= {cell.vram for cell in cells}
    assert {None, "24GB", "12GB"} == {cell.link for cell in cells}
    assert {cell.checkpointing for cell in cells} == {True, False}
    assert {1, 2, 4, 8, 16} <= {cell.batch for cell in cells}
    assert {128, 4096} <= {cell.tokens for cell in cells}


def test_the_table_is_made_by_one_command() -> None:
    script = FOLDERS[0].parent / "prediction_grid.py"
    done = subprocess.run(
        [sys.executable, str(script), "table", *map(str, FOLDERS)], capture_output=True, text=True, check=True
    )
    assert "| reserved GPU memory | 406 |" in done.stdout
