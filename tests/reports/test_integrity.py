"""A folder of results that is not as it was written: said on page one, whatever was done to it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.errors import UserError
from harness.records.manifest import (
    MANIFEST,
    ManifestFinding,
    begin_manifest,
    check_manifest,
    load_manifest,
    record_noted,
)
from harness.records.run import encode_run, load_run
from harness.records.stats import differing_field
from reports.load import load_folder
from reports.render import render_html, render_markdown, write_report, written
from run_records import make_environment, make_machine, make_sweep, save_run, write_folder

RUNS = {f"runs/{run.id}.json": run for run in make_sweep()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As a sweep leaves it."""
    write_folder(tmp_path, list(RUNS.values()), machine=make_machine())
    begin_manifest(tmp_path, [run.id for run in RUNS.values()], make_environment(), None)
    for name, run in RUNS.items():
        with record_noted(tmp_path, tmp_path / name) as note:
            note(encode_run(run))
    return tmp_path


def findings(folder: Path) -> list[tuple[str, str]]:
    return [(one.kind, one.file) for one in check_manifest(folder)]


def page_one(folder: Path) -> str:
    loaded = load_folder(folder)
    return render_markdown(written(loaded, loaded.criteria)).split("\n## Methods")[0]


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=1))


def test_a_folder_as_it_was_written_is_sound(folder: Path) -> None:
    assert findings(folder) == []
    text = page_one(folder)
    assert "manifest" not in text.lower()
    loaded = load_folder(folder)
    whole = render_markdown(written(loaded, None))
    assert "every planned run has its record" in whole
    assert "does not guard against forgery" in whole


def test_one_number_that_was_edited_is_named(folder: Path) -> None:
    name = "runs/zo2-r1.json"
    edit(folder / name, lambda run: run["summary"].update(peak_host_bytes=10**9))
    assert findings(folder) == [("changed", name)]
    assert f"Changed since it was written, by the SHA-256 in the manifest: {name}." in page_one(folder)


def test_a_record_that_was_taken_away_and_one_that_was_added_are_named(folder: Path) -> None:
    run = load_run(folder / "runs/zo2-r1.json")
    (folder / "runs/zo2-r1.json").unlink()
    save_run(replace(run, id="zo2-r9", round=9), folder / "runs/zo2-r9.json")
    assert findings(folder) == [("missing", "runs/zo2-r1.json"), ("added", "runs/zo2-r9.json")]
    text = page_one(folder)
    assert "Records are missing that the manifest lists: runs/zo2-r1.json." in text
    assert "Not listed in the manifest, so not written by the sweep: runs/zo2-r9.json." in text


@pytest.mark.parametrize("name", ["job.toml", "machine.json"])
def test_what_says_what_was_compared_is_guarded_too(folder: Path, name: str) -> None:
    if not (folder / name).exists():
        pytest.skip("this folder has none")
    with (folder / name).open("a") as file:
        file.write("\n")
    assert findings(folder) == [("changed", name)]


def test_a_sweep_that_is_not_complete_says_so(folder: Path) -> None:
    begin_manifest(folder, ["native-r7", "native-r8"], make_environment(), None)
    assert findings(folder) == [("not_run", "runs/native-r7.json"), ("not_run", "runs/native-r8.json")]
    assert "Planned and without a record: runs/native-r7.json, runs/native-r8.json." in page_one(folder)


def test_what_a_later_sweep_finds_changed_stays_changed(folder: Path) -> None:
    edit(folder / "runs/zo2-r1.json", lambda run: run.update(round=2))
    begin_manifest(folder, [], make_environment(), None)
    assert findings(folder) == [("changed", "runs/zo2-r1.json")]


def test_without_a_manifest_the_report_says_what_cannot_be_told(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert "There is no manifest" in page_one(folder)
    assert load_manifest(folder) is None


@pytest.mark.parametrize("content", [b"", b"[" * 10**5, b'{"schema_version": 1}', b"\xff"])
def test_a_manifest_that_cannot_be_read_is_no_manifest(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(UserError):
        check_manifest(folder)
    text = page_one(folder)
    assert "There is no manifest" in text
    assert "could not be read" in text


def test_a_manifest_does_not_have_other_files_read(folder: Path) -> None:
    edit(folder / MANIFEST, lambda it: it["records"].update({"../../etc/passwd": "0", "/etc/passwd": "0"}))
    assert [one.kind for one in check_manifest(folder)] == ["missing", "missing"]


@pytest.mark.parametrize("field", ["step_s_median", "step_s_low", "step_s_p90", "tokens_per_s", "loss_last"])
def test_a_summary_that_does_not_follow_from_its_samples_is_named(folder: Path, field: str) -> None:
    run = RUNS["runs/zo2-r1.json"]
    assert differing_field(run.summary, run.samples, run.tokens_per_step) is None
    edit(folder / "runs/zo2-r1.json", lambda values: values["summary"].update({field: 0.001}))
    assert f"Figures that do not follow from their samples: zo2-r1 ({field})." in page_one(folder)


BAD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "huge": lambda run: run["summary"].update(peak_host_bytes=10**400),
    "large": lambda run: run["summary"].update(peak_host_bytes=10**37),
    "surrogate": lambda run: run.update(end_reason="half \ud800"),
    "slow": lambda run: run["samples"][0].update(step_s=1e308),
    "lost": lambda run: run["samples"][-1].update(loss=1.7e308),
    "escape": lambda run: run.update(end_state="crash", end_reason="\x1b[31mred"),
    "deep": lambda run: run["job"].update(data=json.loads("[" * 200 + "]" * 200)),
    "name": lambda run: run["model"].update(name="\u202eevil\x07" * 50),
    "parameters": lambda run: run["model"].update(parameters=10**38),
    "planned": lambda run: (
        run["predicted"].update(step_s=1e38, step_s_high=3e38) if run["predicted"] else None
    ),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_one_bad_record_does_not_take_the_report_down(folder: Path, kind: str) -> None:
    path = folder / "runs/zo2-r2.json"
    edit(path, BAD[kind])
    write_report(folder)
    for name in ("report.md", "report.html", "verdict.json"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "\x1b" not in text
        assert "runs/zo2-r2.json" in text


def test_a_pipe_among_the_records_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "runs/pipe.json")
    (folder / "runs/folder.json").mkdir()
    (folder / "runs/zero.json").symlink_to("/dev/zero")
    write_report(folder)
    reasons = {one.file: one.reason for one in load_folder(folder).broken}
    assert "is a pipe" in reasons["runs/pipe.json"]
    assert "is a device" in reasons["runs/zero.json"]
    assert "is a folder" in reasons["runs/folder.json"]


def test_the_page_lets_nothing_in(folder: Path) -> None:
    loaded = load_folder(folder)
    page = render_html(written(loaded, None))
    assert "default-src 'none'" in page
    assert ManifestFinding(kind="added", file="x").kind == "added"
