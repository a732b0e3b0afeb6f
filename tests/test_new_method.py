"""A new method is its four parts and a row in the table of engines: every command then knows it.

The method is `toy_method`. Runs are processes of their own, which know it by a `sitecustomize` in place of
an edit of the table.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toy_method
from python_path import python_path
from tiny_machine import make_machine
from typer.testing import CliRunner

from engines import ENGINES
from harness.cli.app import app
from harness.records.run import load_run
from profiles.machine import save_machine
from reports.criteria import init_text

SUPPORT = Path(toy_method.__file__).parent
JOB = (
    "--model", "tiny-llama", "--random-weights", "--data", "random", "--seq-len", "32", "--dtype", "fp32",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(ENGINES, toy_method.NAME, toy_method.ROW)
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text("import toy_method\ntoy_method.register()\n")
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path / "path", SUPPORT, Path(__file__).parent.parent))


@pytest.fixture
def machine(tmp_path: Path) -> str:
    path = tmp_path / "machine.json"
    save_machine(make_machine(gpu=False), path)
    return str(path)


def program(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_it_is_listed_with_its_settings() -> None:
    (row,) = [row for row in json.loads(program("engines", "--json")) if row["name"] == "toy"]
    assert row["settings"] == {"half_life": 1}
    assert '"toy"' in init_text()


def test_it_is_planned_by_its_own_planner_and_costs(machine: str) -> None:
    def plan(*more: str) -> dict[str, object]:
        arguments = ("recommend", *JOB, "--engines", "native,toy", "--profile", machine, "--json", *more)
        (found,) = [plan for plan in json.loads(program(*arguments))["plans"] if plan["engine"] == "toy"]
        assert isinstance(found, dict)
        return found

    chosen = plan()
    assert (chosen["fits"], chosen["settings"]) == (True, {"half_life": 3})
    assert chosen["reasons"] == ["half_life=3: one step for each block"]
    assert plan("--set", "toy.half_life=5")["settings"] == {"half_life": 5}
    assert plan("--dtype", "fp16")["why_not"] == "cannot train in fp16, being a toy; use --dtype bf16 or fp32"


def test_it_is_compared_in_a_process_of_its_own_and_reported(machine: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program(
        "compare", *JOB, "--steps", "3", "--warmup-steps", "1", "--engines", "toy",
        "--profile", machine, "--set", "half_life=1", "--rounds", "1",
        "--out", str(out), "--quiet",
    )  # fmt: skip
    (path,) = (out / "runs").glob("*.json")
    run = load_run(path)
    assert (run.engine, run.end_state) == ("toy", "ok")
    assert [sample.loss for sample in run.samples] == [1.0, 0.5, 0.25, 0.125]
    program("report", str(out))
    report = (out / "report.md").read_text(encoding="utf-8")
    assert any(line.startswith("| toy |") for line in report.splitlines()), report
