"""Sound documents made unsound: bytes, numbers, kinds, depth."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**30, 10**400, 1e308, -1e308, 1e-320, 0.5,
    "", "x", "1", "\ud800", "\x1b[31m", "\0", "a" * 5000, "../../etc/passwd", "~nobody/x", "\u65e5\u202e",
    [], {}, [[]], {"": {}}, [None] * 40, {"a": {"b": {"c": {}}}}, "builtin", "random", "nan", "1e400", "true",
)  # fmt: skip
BYTES = (
    b"", b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"\\", b"{", b"]",
    b"[" * 3000, b",", b"=", b"[[", b"9" * 5000, b"1e999", b"NaN", b"-Infinity", b"'''", b"#", b"\x1b[2J",
)  # fmt: skip


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    """One to three of: a bit flipped, a part cut out, doubled or put elsewhere, something odd put in."""
    for _ in range(draw.randint(1, 3)):
        place, end = sorted(draw.randint(0, len(content)) for _ in range(2))
        match draw.randint(0, 5):
            case 0 if content:
                at = draw.randrange(len(content))
                content = content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
            case 1:
                content = content[:place]
            case 2:
                content = content[:place] + content[end:]
            case 3:
                content = content[:end] + content[place:]
            case 4:
                content = content[:place] + draw.choice(BYTES) + content[end:]
            case _:
                content = content[:place] + draw.choice(BYTES) + content[place:]
    return content


def change_value(value: Any, draw: random.Random) -> Any:
    """A copy of a document in which something is of another kind, missing, doubled or far too large."""
    copy = json.loads(json.dumps(value))
    for _ in range(draw.randint(1, 3)):
        holder, key = _place(copy, draw)
        if holder is None:
            return _odd(draw)
        match draw.randint(0, 4):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[draw.choice(["", "x", "schema_version", "name", "\x1b"])] = _odd(draw)
            case 2 if isinstance(holder, list):
                holder.insert(key, holder[key])
            case 3:
                for _ in range(draw.choice([1, 3, 80])):
                    holder[key] = draw.choice([[holder[key]], {"a": holder[key]}])
            case _:
                holder[key] = _odd(draw)
    return copy


def _odd(draw: random.Random) -> Any:
    """Of its own: what is put into a document may be changed there."""
    return deepcopy(draw.choice(ODD))


def _place(value: Any, draw: random.Random) -> tuple[Any, Any]:
    """A list or table somewhere in it, and one of its keys."""
    places = []
    stack = [value]
    while stack:
        each = stack.pop()
        keys = (
            list(each) if isinstance(each, dict) else list(range(len(each))) if isinstance(each, list) else []
        )
        places += [(each, key) for key in keys]
        stack += [each[key] for key in keys]
    return draw.choice(places) if places else (None, None)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def as_toml(value: Any) -> bytes:
    """As far as TOML can say it."""
    lines = []

    def said(each: Any) -> str:
        if each is None:
            return '""'
        if isinstance(each, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {said(inner)}" for key, inner in each.items()) + "}"
        if isinstance(each, list):
            return "[" + ", ".join(said(inner) for inner in each) + "]"
        return json.dumps(each)

    for key, each in value.items() if isinstance(value, dict) else ():
        lines.append(f"{json.dumps(key)} = {said(each)}")
    return "\n".join(lines).encode("utf-8", "surrogatepass")
