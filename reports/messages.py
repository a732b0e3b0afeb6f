"""Every sentence of a report, by key, from `text/<language>.toml`."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files


@cache
def messages(language: str = "en") -> dict[str, str]:
    """Key -> text with `{names}` to fill in. Keys are dotted: `verdict.go`."""
    content = files("reports").joinpath("text", f"{language}.toml").read_text(encoding="utf-8")
    flat: dict[str, str] = {}
    for section, entries in tomllib.loads(content).items():
        for key, text in entries.items():
            flat[f"{section}.{key}"] = text
    return flat


def say(key: str, /, **values: object) -> str:
    """The text of `key` with its names filled in. The values come out as they are: escape when rendering."""
    return messages()[key].format(**values)
