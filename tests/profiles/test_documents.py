"""Documents: read with one clear line per mistake, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from settings_given import given_settings

from engines.errors import UserError
from profiles.documents import read_document, to_json, write_whole
from profiles.planning.plan import Plan, Prediction, load_plans, save_plans


@dataclass(frozen=True, kw_only=True)
class Note:
    text: str
    value: float | None = None
    schema_version: int = 1


def read(path: Path) -> Note:
    return read_document(path, Note, 1, "note")


def refuse(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read(path)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(str(path))
    assert error.value.remedy
    return line


def test_round_trip(tmp_path: Path) -> None:
    note = Note(text="caf\u00e9 \u65e5\u672c", value=0.1)
    path = tmp_path / "new" / "folder" / "note.json"
    write_whole(path, to_json(note))
    assert read(path) == note


def test_not_finite_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    write_whole(path, to_json(Note(text="", value=float("nan"))))
    assert read(path).value is None


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is not valid JSON"),
        (b'{"text": "cut of', "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"9" * 10_000, "is not valid JSON"),
        (b"[1, 2]", "has no schema_version"),
        (b"null", "has no schema_version"),
        (b'{"text": "a"}', "has no schema_version"),
        (b'{"text": "a", "schema_version": "1"}', "has no schema_version"),
        (b'{"text": "a", "schema_version": 2}', "has schema version 2, this program knows up to 1"),
        (b'{"schema_version": 1}', "field 'text'"),
        (b'{"text": 3, "schema_version": 1}', "field 'text'"),
        (b'{"text": "a", "value": "fast", "schema_version": 1}', "field 'value'"),
    ],
)
def test_a_bad_document_is_one_line(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(content)
    assert why in refuse(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    assert "there is no such note" in refuse(tmp_path / "missing.json")
    assert "is a folder, not a note" in refuse(tmp_path)
    assert "cannot be read (Not a directory)" in refuse(tmp_path / "file" / "note.json")
    assert "cannot be read (File name too long)" in refuse(tmp_path / ("n" * 300))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*arguments: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", deny)
    assert "this note may not be read" in refuse(tmp_path / "note.json")


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, old: str | None
) -> None:
    path = tmp_path / "note.json"
    if old is not None:
        path.write_text(old)

    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match=os.strerror(code)) as error:
        write_whole(path, "new")
    monkeypatch.undo()
    assert "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ([] if old is None else ["note.json"])
    if old is not None:
        assert path.read_text() == old


def test_an_interrupted_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note.json"
    path.write_text("old")

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_whole(tmp_path / "file" / "note.json", "new")


def test_plans_of_before_there_was_a_floor(tmp_path: Path) -> None:
    prediction = Prediction(
        step_s_low=0.5, step_s=1.0, step_s_high=2.0, peak_gpu_bytes=10, peak_host_bytes=20, pinned_bytes=5,
        h2d_bytes=3, d2h_bytes=4, bottleneck="h2d", basis="made up", floor_s=0.75,
    )  # fmt: skip
    plan = Plan(engine="zo2", settings=given_settings("zo2"), fits=True, why_not=None, prediction=prediction)
    path = tmp_path / "plans.json"
    save_plans([plan], path)
    assert load_plans(path) == (plan,)
    document = json.loads(path.read_bytes())
    del document["plans"][0]["prediction"]["floor_s"]
    path.write_text(json.dumps(document))
    assert load_plans(path)[0].prediction.floor_s is None
