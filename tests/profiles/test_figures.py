"""The table of a machine's numbers agrees with the machine, and with those who read it."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from profiles.figures import EACH_GPU, FIGURES, Reader, figures_of, reported
from profiles.machine import Cpu, Disk, Gpu, GpuLink, HostMemory, LinkFigures

PARTS = {"gpu": Gpu, "link": LinkFigures, "cpu": Cpu, "memory": HostMemory, "disk": Disk, "each_gpu": GpuLink}
ROOT = Path(__file__).parents[2]


def test_every_figure_has_one_row() -> None:
    rows = [row.path for row in (*FIGURES, *EACH_GPU)]
    assert len(set(rows)) == len(rows)
    held = {f"{part}.{field.name}": field.type for part, kind in PARTS.items() for field in fields(kind)}
    assert set(rows) <= set(held)
    assert {path for path, kind in held.items() if kind == "Figure"} <= set(rows)
    assert {held[path] for path in rows} <= {"Figure", "int", "int | None"}


def test_labels_tell_figures_apart() -> None:
    labels = [row.label for row in FIGURES]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("reader", "places"),
    [("predict", ("planning/**/*.py", "rates.py")), ("doctor", ("doctor/*.py",))],
    ids=["predict", "doctor"],
)
def test_who_reads_a_figure_is_told_as_it_is(reader: Reader, places: tuple[str, ...]) -> None:
    files = [path for place in places for path in (ROOT / "profiles").glob(place)]
    # Which divides every figure among processes and predicts nothing.
    source = "".join(path.read_text(encoding="utf-8") for path in files if path.name != "ranks.py")
    read = {row.path for row in FIGURES if re.search(rf'\b{row.path}\b|"{row.field}"', source)}
    assert {row.path for row in FIGURES if reader in row.used_by} == read


def test_every_figure_is_read() -> None:
    assert [row.path for row in (*FIGURES, *EACH_GPU) if not row.used_by] == []


def test_rows_are_found_by_part_and_by_reader() -> None:
    assert [row.path for row in figures_of("disk")] == ["disk.write_bytes_per_s", "disk.read_bytes_per_s"]
    assert all("report" in row.used_by for row in reported())
    assert len(reported()) == 17
