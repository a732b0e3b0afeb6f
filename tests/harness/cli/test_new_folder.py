"""Where results go that nobody named a folder for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.errors import UserError
from harness.cli.new_folder import results_folder


def test_two_commands_at_once_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both were given the first number that was free, and the second ended after its machine was measured."""
    monkeypatch.chdir(tmp_path)
    first, second = (results_folder(None, "compare", "a/b", resume=False) for _ in range(2))
    assert (first, second) == (Path("out/compare_b_001"), Path("out/compare_b_002"))
    assert results_folder(None, "compare", "a/b", resume=False, dry_run=True) == Path("out/compare_b_003")
    assert not Path("out/compare_b_003").exists()
    assert results_folder(Path("mine"), "compare", "a/b", resume=False) == Path("mine")


@pytest.mark.parametrize(("written", "stays"), [("pass", False), ("(folder / 'x').touch()", True)])
def test_a_folder_that_stays_empty_goes(written: str, stays: bool, tmp_path: Path) -> None:
    code = (
        "from harness.cli.new_folder import results_folder\n"
        f"folder = results_folder(None, 'run', 'm', resume=False)\n{written}\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "out" / "run_m_001").exists() is stays


def test_a_place_that_cannot_be_written_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").write_text("a file")
    with pytest.raises(
        UserError, match=r"out/poc_m_001: cannot be written \(Not a directory\); name another"
    ):
        results_folder(None, "poc", "m", resume=False)


def full(path: Path) -> None:
    """A file system of 64 KiB with nothing left; skips the test where none can be mounted."""
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path]).returncode:
        pytest.skip("needs to mount a file system")
    try:
        (path / "filler").write_bytes(bytes(1 << 20))
    except OSError:
        return


def read_only(path: Path) -> None:
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", path]).returncode:
        pytest.skip("needs to mount a file system")


@pytest.mark.parametrize(("made", "reason"), [(full, "No space left"), (read_only, "Read-only file system")])
@pytest.mark.parametrize("below", ["", "new", "new/a"])
def test_a_named_folder_that_cannot_be_written_is_told_at_once(
    made: Callable[[Path], None], reason: str, below: str, tmp_path: Path
) -> None:
    """It was found after the machine had been measured."""
    place = tmp_path / "place"
    made(place)
    try:
        with pytest.raises(UserError, match=rf"cannot be written \({reason}.*\); free space or name another"):
            results_folder(place / below, "compare", "m", resume=False)
        assert results_folder(place / below, "compare", "m", resume=False, dry_run=True) == place / below
    finally:
        subprocess.run(["umount", place], check=False)


@pytest.mark.parametrize("below", ["", "new"])
def test_a_file_in_place_of_a_named_folder_is_told_at_once(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: is a file, and a folder is needed; name another --out"):
        results_folder(tmp_path / "file" / below, "run", "m", resume=False)


def test_a_named_folder_is_left_as_it_was(tmp_path: Path) -> None:
    results_folder(tmp_path / "new" / "a", "run", "m", resume=False)
    results_folder(tmp_path, "run", "m", resume=True)
    assert list(tmp_path.iterdir()) == []
