"""Folders that belong to one process as long as it lives: real ones, some of which are killed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engines.errors import UserError
from engines.files.locks import OWN, locked_folder, own_folder

ROOT = Path(__file__).parents[3]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    ask = (
        "import sys; from pathlib import Path; from engines.files.locks import locked_folder\n"
        "with locked_folder(Path(sys.argv[1])): print('mine')"
    )
    command = [sys.executable, "-c", ask, str(tmp_path / "out")]

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    with locked_folder(tmp_path / "out"):
        assert "another process writes into this folder" in other().stderr
        with pytest.raises(UserError, match="another process"), locked_folder(tmp_path / "out"):
            pass
    assert other().stdout == "mine\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written"), locked_folder(path):
            pass


HOLD = """
import sys, time
from pathlib import Path
from engines.files.locks import own_folder
with own_folder(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("")
    print(folder.name, flush=True)
    time.sleep(600)
"""


def holder(place: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that holds a folder in `place`, and the folder's name."""
    command = [sys.executable, "-c", HOLD, str(place)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_killed_process_leaves_its_folder_to_the_next_to_take_away(tmp_path: Path) -> None:
    """And no other: not that of one that lives, a file, or what a link of such a name points to."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").write_text("")
    (tmp_path / f"{OWN}link").symlink_to(tmp_path / "mine")
    (tmp_path / f"{OWN}file").write_text("")
    others = {"mine", f"{OWN}link", f"{OWN}file"}
    killed, left = holder(tmp_path)
    living, kept = holder(tmp_path)
    with killed, living:
        try:
            killed.kill()
            assert killed.wait() == -signal.SIGKILL
            assert {path.name for path in tmp_path.iterdir()} == {*others, left, kept}
            with own_folder(tmp_path) as folder:
                assert {path.name for path in tmp_path.iterdir()} == {*others, kept, folder.name}
                assert (tmp_path / kept / "file").exists()
            assert {path.name for path in tmp_path.iterdir()} == {*others, kept}
            assert (tmp_path / "mine" / "kept").exists()
        finally:
            living.kill()


def test_own_folders_are_made_while_others_look_for_such_to_take_away(tmp_path: Path) -> None:
    found: list[bool] = []

    def make() -> None:
        for _ in range(100):
            with own_folder(tmp_path) as folder:
                (folder / "file").write_text("")
                found.append((folder / "file").exists())

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 400
    assert list(tmp_path.iterdir()) == []


def test_what_another_user_left_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / f"{OWN}left"
    left.mkdir()
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    with own_folder(tmp_path):
        assert left.exists()
    monkeypatch.undo()
    with own_folder(tmp_path):
        assert not left.exists()


def test_a_folder_that_another_took_away_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = fcntl.flock, list[Path]()

    def late(descriptor: int, operation: int) -> None:
        if not taken:
            (folder,) = tmp_path.iterdir()
            folder.rmdir()
            taken.append(folder)
        lock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", late)
    with own_folder(tmp_path) as folder:
        assert folder.exists()
        assert folder not in taken
