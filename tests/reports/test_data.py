"""A report for programs: JSON with a schema, tables as files, what changed between two folders; and that
every number has one source."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from pydantic import TypeAdapter
from typer.testing import CliRunner

from harness.cli.app import app
from harness.records.run import Run
from reports.criteria import init_text
from reports.load import load_folder
from reports.pages.data import ReportData
from reports.render import write_report, written
from run_records import emulated_run, make_machine, make_run, make_sweep, make_test_job, scaled, write_folder

SIZED = init_text().replace("schema_version = 1\n", "schema_version = 1\n\n[job]\nsteps = 1000\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "sweep", make_sweep(), machine=make_machine(), criteria=init_text("cost"))


def run_program(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_the_report_for_programs_follows_its_schema(folder: Path) -> None:
    write_report(folder)
    values = json.loads((folder / "report.json").read_text())
    TypeAdapter(ReportData).validate_python(values)
    schema = json.loads(run_program("report", str(folder), "--schema"))
    assert set(schema["properties"]) == set(values) == {"verdict", "tables", "schema_version"}
    tables = {table["key"]: table for table in values["tables"]}
    methods = tables["methods"]
    assert all(len(row) == len(methods["columns"]) for row in methods["rows"])
    native = dict(zip(methods["columns"], methods["rows"][0], strict=True))
    assert native["method"] == "native"
    assert native["job_time_s"] == pytest.approx(7612.5)  # of two runs what lies between them
    assert native["gpu_peak_bytes"] == 21_500_000_000
    assert len(tables["runs"]["rows"]) == len(make_sweep())


def test_every_table_is_a_file(folder: Path) -> None:
    told = run_program("export", str(folder), "--format", "csv").splitlines()
    assert told[-1] == str(folder / "tables")
    methods = pd.read_csv(folder / "tables" / "methods.csv")
    assert list(methods["method"])[:3] == ["native", "lsp", "zo2"]
    assert methods["host_bytes"].iloc[0] == 5_000_000_000
    runs = pd.read_csv(folder / "tables" / "runs.csv")
    assert len(runs) == len(make_sweep())
    assert {Path(line).name for line in told[:-1]} == {path.name for path in (folder / "tables").iterdir()}


def test_a_spreadsheet_takes_no_text_for_a_formula(tmp_path: Path) -> None:
    job = make_test_job()
    bad = make_run("lsp", end_state="crash", end_reason="=HYPERLINK(1)", job=job)
    folder = write_folder(tmp_path / "x", [bad, make_run("zo2")], job=job)
    run_program("export", str(folder), "--format", "csv", "--to", str(tmp_path / "out"))
    assert "'=HYPERLINK(1)" in (tmp_path / "out" / "failures.csv").read_text()


def test_parquet_says_what_it_needs(folder: Path) -> None:
    pytest.importorskip("pyarrow")
    run_program("export", str(folder), "--format", "parquet")
    assert len(pd.read_parquet(folder / "tables" / "runs.parquet")) == len(make_sweep())


def test_what_changed_between_two_folders(folder: Path, tmp_path: Path) -> None:
    faster = [
        make_run("native", round=i, step_s=scaled(0.4), peak_gpu_reserved_bytes=20 * 2**30) for i in (1, 2)
    ]
    after = write_folder(tmp_path / "after", faster, machine=make_machine(), criteria=init_text("cost"))
    told = run_program("report", str(after), "--diff", str(folder))
    assert "Verdict: GO (native), now GO (native)." in told
    row = next(line for line in told.splitlines() if line.startswith("| native"))
    assert "| 505 and 510 ms | 400 ms | 0.79x | undecided" in row
    other = make_test_job(batch_size=4)
    unlike = write_folder(tmp_path / "unlike", [make_run("native", job=other)], job=other)
    told = run_program("report", str(unlike), "--diff", str(folder))
    assert "Times are not held against each other, as these differ: job.batch_size" in told
    assert "faster" not in told
    assert not (unlike / "report.html").exists()


def test_runs_that_were_disturbed_are_no_fair_ground(tmp_path: Path) -> None:
    for name, last_s, told in (("calm", 0.42, "fair: 3 runs"), ("busy", 2.2, "low: 3 runs")):
        runs = [make_run("native", round=i, step_s=scaled(s)) for i, s in ((1, 0.4), (2, 0.41), (3, last_s))]
        folder = write_folder(tmp_path / name, runs)
        run_program("report", str(folder))
        (line,) = [each for each in (folder / "report.md").read_text().splitlines() if "Confidence:" in each]
        assert told in line
        assert ("something else took their time" in line) == (name == "busy")


@pytest.mark.parametrize(
    "runs",
    [
        [make_run("native", step_s=scaled(0.4)), make_run("zo2", step_s=scaled(0.9))],
        [emulated_run("native"), emulated_run("zo2", step_s=scaled(7.0))],
    ],
    ids=["measured", "emulated"],
)
@pytest.mark.parametrize("criteria", [None, SIZED], ids=["unsized", "sized"])
def test_headline_tile_and_table_hold_one_number(
    runs: list[Run], criteria: str | None, tmp_path: Path
) -> None:
    """And it is that of the machine that the page is about: on an emulated one the predicted."""
    told = written(load_folder(write_folder(tmp_path, runs, criteria=criteria)), None)
    if criteria is not None:
        loaded = load_folder(tmp_path)
        told = written(loaded, loaded.criteria)
    method, front = told.verdict.method, told.document.front
    time = front.tiles[0].value
    assert time in front.sentence
    table = next(sheet.table for sheet in told.document.sheets if sheet.key == "methods")
    row = next(row for row in table.rows if row[0] == method)
    assert time in row
    is_emulated = runs[0].emulation is not None
    assert ("predicted" in front.tiles[0].detail) is is_emulated
    assert ("(predicted)" in front.sentence) is is_emulated
    assert ("predicted" in row) is is_emulated
    if is_emulated:
        assert not re.search(r"7\.00 s", front.sentence + " ".join(tile.value for tile in front.tiles))
