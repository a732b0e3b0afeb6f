from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.errors import UserError
from harness.records.upgrades import load_upgrades, save_upgrades
from profiles.advice.what_if import StepsOn
from profiles.language import speaking
from reports.criteria import init_text
from reports.format import Table
from reports.load import load_folder
from reports.measured.measurements import group
from reports.pages.upgrades import what_upgrades_bring
from run_records import make_machine, make_sweep, write_folder

NOW = StepsOn(name="", step_s={"zo2": 2.0, "mezo": None})
LARGER = StepsOn(name="GPU memory 24.0 GiB to 32.0 GiB", step_s={"zo2": 2.0, "mezo": None, "native": 0.5})
FASTER = StepsOn(name="CPU cores, twice as many", step_s={"zo2": 1.0, "mezo": 1.0})
SAME = StepsOn(name="memory channels, twice as many", step_s={"zo2": 2.01, "mezo": None})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    where = write_folder(
        tmp_path / "sweep", make_sweep(), machine=make_machine(), criteria=init_text("deadline")
    )
    save_upgrades((NOW, LARGER, FASTER, SAME), where / "upgrades.json")
    return where


def test_upgrades_that_change_something_are_rows_and_the_others_are_named(folder: Path) -> None:
    loaded = load_folder(folder)
    told = what_upgrades_bring(loaded, "zo2", group(loaded.runs, loaded.machine))
    assert isinstance(told, Table)
    assert told.rows == (
        ("the machine as it is", "2.00 s", "1.00x", "-"),
        ("GPU memory 24.0 GiB to 32.0 GiB", "2.00 s", "1.00x", "native"),
        ("CPU cores, twice as many", "1.00 s", "0.50x", "-"),
    )
    assert "No difference: memory channels, twice as many." in told.note
    whole = what_upgrades_bring(loaded, "zo2", group(loaded.runs, loaded.machine, loaded.criteria))
    assert isinstance(whole, Table)
    assert whole.values[0][1] == pytest.approx(2.0 * 15000)
    with speaking("ja"):
        japanese = what_upgrades_bring(loaded, "mezo", group(loaded.runs, loaded.machine))
    assert isinstance(japanese, Table)
    assert [row[0] for row in japanese.rows] == [
        "現在のマシン",
        "GPUメモリ 24.0 GiB → 32.0 GiB",
        "CPUコア数を2倍",
    ]


def test_where_nothing_helps_a_sentence_says_so_and_without_the_file_nothing_does(folder: Path) -> None:
    save_upgrades((NOW, SAME), folder / "upgrades.json")
    loaded = load_folder(folder)
    told = what_upgrades_bring(loaded, "zo2", group(loaded.runs, loaded.machine))
    assert isinstance(told, str)
    assert "No single upgrade that was tried would make zo2 faster" in told
    (folder / "upgrades.json").unlink()
    assert what_upgrades_bring(load_folder(folder), "zo2", group(loaded.runs, None)) is None


@pytest.mark.parametrize("step_s", [0.0, -1.0, 1e999])
def test_a_time_that_nothing_takes_is_refused(step_s: float, folder: Path) -> None:
    path = folder / "upgrades.json"
    document = json.loads(path.read_text())
    document["machines"][0]["step_s"]["zo2"] = step_s
    path.write_text(json.dumps(document))
    with pytest.raises(UserError):
        load_upgrades(path)
    assert [one.file for one in load_folder(folder).broken] == ["upgrades.json"]
