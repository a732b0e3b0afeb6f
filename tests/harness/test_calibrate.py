"""Records of the same machine correct its predictions; others are left out, counted, and said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engines.errors import UserError
from harness.calibrate import calibration_from
from harness.records.run import load_run
from profiles.catalog import find_profile
from profiles.machine import load_machine
from run_records import save_run

RESULTS = Path(__file__).parents[2] / "reports" / "results"
FOLDER = RESULTS / "opt-13b_h200_20261124"


def test_records_of_this_machine_count() -> None:
    found = calibration_from(FOLDER, load_machine(FOLDER / "machine.json"))
    assert {"mezo", "zo2"} <= set(found.factors)
    assert 0.8 < found.factors["zo2"].expected < 1.25
    assert "records of this machine" in found.summary


def test_records_of_another_machine_never_count(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other hardware") as raised:
        calibration_from(FOLDER, find_profile(Path("rtx-4090")))
    assert len(str(raised.value)) < 200
    machine = load_machine(FOLDER / "machine.json")
    run = load_run(next(FOLDER.glob("runs/zo2*.json")))
    other = replace(run, id="other", environment=replace(run.environment, gpu_name="NVIDIA A100"))
    failed = replace(run, id="failed", end_state="crash", end_reason="a test")
    for each in (run, other, failed):
        save_run(each, tmp_path / "sweep" / "runs" / f"{each.id}.json")
    (tmp_path / "sweep" / "runs" / "broken.json").write_text("{")
    found = calibration_from(tmp_path, machine)
    assert found.factors["zo2"].count == 1
    assert sum(found.left_out.values()) == 3


def test_a_record_of_an_earlier_engine_does_not_count(tmp_path: Path) -> None:
    run = load_run(next(FOLDER.glob("runs/zo2*.json")))
    assert run.predicted is not None
    assert run.predicted.step_s is not None
    told = replace(run.predicted, step_s=3 * run.predicted.step_s)
    save_run(replace(run, predicted=told), tmp_path / "runs" / "zo2.json")
    with pytest.raises(UserError, match="another version"):
        calibration_from(tmp_path, load_machine(FOLDER / "machine.json"))


def test_power_of_a_record_of_two_gpus_is_that_of_one_board() -> None:
    two = RESULTS / "opt-13b-streamed-2gpus_h200_20261129"
    found = calibration_from(two, load_machine(two / "machine.json"))
    assert found.factors["zo2"].expected == pytest.approx(1.0, abs=0.1)
    assert 400 < found.power_w["zo2"] < 700  # 992 W of both


def test_a_folder_without_runs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no runs"):
        calibration_from(tmp_path, find_profile(Path("rtx-4090")))
