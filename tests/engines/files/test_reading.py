"""Files from elsewhere: a value or one line, whatever they are, and nothing waits."""

from __future__ import annotations

import os
import socket
import tracemalloc
from pathlib import Path

import pytest

from engines.errors import UserError, printable
from engines.files.reading import (
    MOST_DEPTH,
    exists,
    expanded,
    is_file,
    is_folder,
    parse_json,
    parse_toml,
    read_bytes,
    read_json,
    read_text,
    read_toml,
)


def refuse(path: Path, most_bytes: int = 100) -> str:
    with pytest.raises(UserError) as error:
        read_bytes(path, "note", most_bytes)
    assert "\n" not in str(error.value)
    return error.value.why


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert refuse(tmp_path / "fifo") == "is a pipe, not a note"
    assert refuse(Path("/dev/zero")) == "is a device, not a note"
    assert refuse(tmp_path) == "is a folder, not a note"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert "cannot be read" in refuse(tmp_path / "socket")


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    """Not what the largest document may have: an hour of fuzzing under a limit ran into that."""
    (tmp_path / "small").write_bytes(b"{}")
    tracemalloc.start()
    try:
        assert read_bytes(tmp_path / "small", "document") == b"{}"
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_no_more_is_read_than_a_document_may_have(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"x" * 100)
    assert read_bytes(path, "note", 100) == b"x" * 100
    path.write_bytes(b"x" * 101)
    assert refuse(path) == "has more than the 100 bytes of any note"
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room
    assert refuse(path) == "has more than the 100 bytes of any note"


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "\udcff", "\x1b[31m"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    refuse(tmp_path / name)
    if len(name) > 200 or "\0" in name:
        with pytest.raises(UserError):
            exists(tmp_path / name)
    else:
        assert not exists(tmp_path / name)


def test_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(UserError, match="cannot be looked at"):
        exists(tmp_path / "link")
    refuse(tmp_path / "link")


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    assert (is_file(tmp_path / "file"), is_folder(tmp_path / "file")) == (True, False)
    assert (is_file(tmp_path), is_folder(tmp_path)) == (False, True)
    assert (exists(tmp_path / "fifo"), is_file(tmp_path / "fifo")) == (True, False)
    assert not exists(tmp_path / "file" / "below")


def test_an_error_of_the_reader_stays_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_text(tmp_path / "file", "note")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "levels deep"),
        ("[" * 10**6, "is not valid JSON"),
        ('{"a":' * 10**5 + "1" + "}" * 10**5, "is not valid JSON"),
        ("9" * 5000, "is not valid JSON"),
        (f"[1{'0' * 400}]", "a number is above"),
        ("1.7e308", "a number is above"),
        (r'{"a": "\ud800"}', "half a character"),
        (r'{"\udfff": 1}', "half a character"),
        ("", "is not valid JSON"),
    ],
)
def test_json_that_is_refused(content: str, why: str) -> None:
    with pytest.raises(UserError, match=why) as error:
        parse_json(content, "here", "note")
    assert str(error.value).startswith("here: ")


@pytest.mark.parametrize(
    "content",
    [
        "a = " + "[" * 10**5,
        "a = " + "[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1),
        ".".join("a" * 20_000) + " = 1",
        "a = " + "9" * 5000,
        f"a = 1{'0' * 400}",
        "a = 1979-99-99",
        "a = \0",
        "\ud800",
    ],
)
def test_toml_that_is_refused(content: str) -> None:
    with pytest.raises(UserError, match="is not valid TOML"):
        parse_toml(content, "here")


def test_what_is_sound_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(r'{"a": [1, 2.5, null, true, "\ud83d\ude00"], "n": NaN}')
    assert read_json(tmp_path / "a.json", "note")["a"] == [1, 2.5, None, True, "\U0001f600"]
    (tmp_path / "a.toml").write_text("a = 1\n[b]\nc = 'd'\n")
    assert read_toml(tmp_path / "a.toml", "job") == {"a": 1, "b": {"c": "d"}}
    assert parse_json(b"[1e38]", "here", "note") == [1e38]


def test_a_home_that_there_is_not() -> None:
    with pytest.raises(UserError, match="no such user"):
        expanded("~no-such-user/file")


def test_names_do_nothing_to_a_terminal() -> None:
    error = UserError("a\x1b[31m", "b\nc\ud800", "caf\u00e9 \u202e\u65e5")
    assert str(error) == "a\\x1b[31m: b\\nc\\ud800; caf\u00e9 \\u202e\u65e5"
    assert printable("plain 1") == "plain 1"


def test_a_byte_order_mark_is_no_part_of_a_document(tmp_path: Path) -> None:
    """Windows' editors write one."""
    toml, document = tmp_path / "job.toml", tmp_path / "config.json"
    toml.write_bytes(b"\xef\xbb\xbfbatch_size = 4\r\n")
    document.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_toml(toml, "job") == {"batch_size": 4}
    assert read_json(document, "configuration") == {"a": 1}
