"""What is written is whole or not at all, and has the modes that the umask leaves."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from engines.errors import UserError
from engines.files.checksums import SUMS, check_sums, read_sums, write_sums
from engines.files.writing import (
    TEMPORARY,
    clear_leftovers,
    is_leftover,
    whole_file,
    whole_folder,
    write_whole,
)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755), (0o002, 0o664, 0o775)]
)
def test_the_umask_holds(tmp_path: Path, umask: int, file: int, folder: int) -> None:
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "new" / "a", "a")
        with whole_folder(tmp_path / "model") as writing:
            (writing / "config.json").write_text("{}")
            descriptor = os.open(writing / "weights", os.O_CREAT | os.O_WRONLY, 0o600)  # as safetensors does
            os.close(descriptor)
    finally:
        os.umask(before)
    assert mode(tmp_path / "new" / "a") == file
    assert mode(tmp_path / "new") == mode(tmp_path / "model") == folder
    assert {mode(path) for path in (tmp_path / "model").iterdir()} == {file}


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "model") as writing:
        (writing / "a").write_text(str(1 / 0))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_takes_no_place_in_use(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("")
    with pytest.raises(OSError), whole_folder(tmp_path / "model") as writing:  # noqa: PT011
        (writing / "a").write_text("a")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine"]


def test_long_names_and_odd_text(tmp_path: Path) -> None:
    write_whole(tmp_path / ("n" * 255), "a")
    with pytest.raises(UserError, match="File name too long"):
        write_whole(tmp_path / ("n" * 256), "a")
    write_whole(tmp_path / "text", "half \ud800")
    assert (tmp_path / "text").read_text() == "half \\ud800"
    assert len(list(tmp_path.iterdir())) == 2


def test_room_is_taken_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with whole_file(tmp_path / "record", reserve_bytes=10_000) as file:
        (writing,) = tmp_path.iterdir()
        assert writing.stat().st_blocks * 512 >= 10_000
        file.write(b"short")
    assert (tmp_path / "record").read_bytes() == b"short"

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left"), whole_file(tmp_path / "other", reserve_bytes=1):
        raise AssertionError("work was done")
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_leftovers_are_known_and_cleared(tmp_path: Path) -> None:
    for name in (
        f"{TEMPORARY}0123",
        ".job.toml.ab3_x9qq",
        ".updates.log.abcdefgh",
        ".hidden",
        ".job.toml.orig",
    ):
        (tmp_path / name).write_text("")
    for name in (f"{TEMPORARY}9", ".model.k3j2h1g0", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    clear_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".hidden", ".job.toml.orig", "model"}
    assert not is_leftover("model")
    clear_leftovers(tmp_path / "not there")


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(40)))
    (tmp_path / "b b").write_bytes(b"")
    write_sums(tmp_path)
    assert check_sums(tmp_path, "copy it again")
    content = (tmp_path / "a").read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (tmp_path / "a").write_bytes(flipped)
        with pytest.raises(UserError, match=r"is damaged.*copy it again"):
            check_sums(tmp_path, "copy it again")
    assert check_sums(tmp_path, "", lambda name: name == "b b")


def test_files_that_are_missing_and_lists_that_are_none(tmp_path: Path) -> None:
    assert not check_sums(tmp_path, "")
    (tmp_path / "a").write_text("a")
    write_sums(tmp_path)
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tmp_path / "a").unlink()
    with pytest.raises(UserError, match="is missing"):
        check_sums(tmp_path, "")
    for text in ("x", f"{'0' * 64}  ../a", f"{'0' * 64}  a\n{'1' * 64}  a", "\x00"):
        (tmp_path / SUMS).write_text(text)
        with pytest.raises(UserError, match="is not a list of checksums"):
            read_sums(tmp_path)
