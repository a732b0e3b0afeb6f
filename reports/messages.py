"""Every sentence of a report, by key, from `text/<language>.toml`."""

from __future__ import annotations

from collections.abc import Iterable

from profiles.language import Language, filled, quantity, sentences, spoken

_COMMA = "、"
"""Japanese has one sign between items and between the parts of one."""


def messages(language: Language = "en") -> dict[str, str]:
    """Key -> text with `{names}` to fill in. Keys are dotted: `verdict.go`."""
    return sentences("reports", language)


def say(key: str, /, **values: object) -> str:
    """The text of `key`, in the language spoken, with its names filled in. The values come out as they are:
    escape when rendering."""
    texts = {name: quantity(value) if isinstance(value, str) else value for name, value in values.items()}
    return filled(messages(spoken())[key], texts)


def several_items(items: Iterable[str]) -> str:
    """Items that may have commas of their own, one after the other as the language spoken writes them."""
    told = list(items)
    return say("show.list_of_long" if any(_COMMA in each for each in told) else "show.list").join(told)
