"""The language that a person reads, and catalogues of sentences. Records and JSON are English always."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

Language = Literal["en", "ja"]

_spoken: ContextVar[Language] = ContextVar("language", default="en")


def spoken() -> Language:
    """The language that sentences are made in here; English unless `speaking` says otherwise."""
    return _spoken.get()


@contextmanager
def speaking(language: Language) -> Iterator[None]:
    """Sentences are made in `language` inside."""
    token = _spoken.set(language)
    try:
        yield
    finally:
        _spoken.reset(token)


@cache
def sentences(package: str, language: Language) -> dict[str, str]:
    """Key -> text of `package`'s `text/<language>.toml`, with `{names}` to fill in. Keys are dotted:
    `verdict.go`."""
    content = files(package).joinpath("text", f"{language}.toml").read_text(encoding="utf-8")
    return {
        f"{section}.{key}": text
        for section, entries in tomllib.loads(content).items()
        for key, text in entries.items()
    }


_JAPANESE = "[\u3001-\u303f\u3040-\u30ff\u4e00-\u9fff\uff08\uff09\uff1a]"


def filled(text: str, values: Mapping[str, object]) -> str:
    """`text` with its `{names}` filled in. Sentences in Japanese have a blank beside a name, as beside a
    number or a word in Latin letters; it goes where both of its sides are Japanese."""
    for name, value in values.items():
        if isinstance(value, str) and value and spoken() == "ja":
            place = re.escape(f"{{{name}}}")
            if re.match(_JAPANESE, value[-1]):
                text = re.sub(f"({place}) (?={_JAPANESE})", r"\1", text)
            if re.match(_JAPANESE, value[0]):
                text = re.sub(f"(?<={_JAPANESE}) ({place})", r"\1", text)
    return text.format(**values)


_NUMBER = r"[+-]?[\d.,]+(?:e[+-]?\d+)?"
_QUANTITY = re.compile(rf"({_NUMBER}) (s|min|h|us|ns|days|years|JPY)", re.ASCII)
_UNITS = {
    "s": "秒",
    "min": "分",
    "h": "時間",
    "us": "マイクロ秒",
    "ns": "ナノ秒",
    "days": "日",
    "years": "年",
    "JPY": "円",
}
_SHAPES = {"band": "{}\uff5e{}", "bracket": "{}\uff08{}\uff09"}
_BAND = re.compile(rf"({_NUMBER}(?: [A-Za-z]+)?) to ({_NUMBER}(?: [A-Za-z/]+)?)", re.ASCII)
_WITH_BAND = re.compile(rf"({_NUMBER}(?: [A-Za-z]+)?) \(({_NUMBER} to {_NUMBER})\)", re.ASCII)
_RATIO = re.compile(r"([\d.,]+)x", re.ASCII)
_DAY = re.compile(r"(\d{4})-(\d\d)-(\d\d)((?: \d\d:\d\d UTC)?)", re.ASCII)
_WORDS = {"not measured": "未測定"}


@dataclass(frozen=True, slots=True)
class _Phrase:
    """A sentence of this program, as a pattern, and its translation."""

    pattern: re.Pattern[str]
    translation: str


@cache
def _phrases(language: Language) -> tuple[_Phrase, ...]:
    """The most particular first: with the most letters of their own."""
    content = files("profiles").joinpath("text", f"{language}.toml").read_text(encoding="utf-8")
    pairs: dict[str, str] = tomllib.loads(content)["phrase"]
    own = {english: re.sub(r"\{\w+\}", "", english) for english in pairs}
    order = sorted(pairs, key=lambda english: -len(own[english]))
    return tuple(_Phrase(re.compile(_pattern(english), re.DOTALL), pairs[english]) for english in order)


def _pattern(english: str) -> str:
    """Of a sentence with `{names}`: each stands for some text, or for a number if it begins with `num_`, or
    is `parameters`."""
    parts = re.split(r"\{(\w+)\}", english)
    return "".join(
        f"(?P<{part}>{_place(part)})" if place % 2 else re.escape(part) for place, part in enumerate(parts)
    )


def _place(name: str) -> str:
    if name == "parameters":
        return f"{_NUMBER}(?: [BMK])?"
    return _NUMBER if name.startswith("num_") else ".+?"


def _translated_value(name: str, value: str) -> str:
    """What stands for a name: `items` are several, `methods` are names, each perhaps with a quantity, `parts`
    are the terms of a sum, `parameters` a number of them, and what begins with `raw_` stays as it is."""
    if name.startswith("raw_"):
        return value
    if name == "parameters":
        return _parameters(value)
    if name == "methods":
        return "、".join(_method(one) for one in re.split(r", | and ", value))
    if name == "parts":
        return " + ".join(_part(one) for one in value.split(" + "))
    if name == "items":
        return "、".join(translated(item) for item in value.split("; "))
    return translated(value)


def _method(told: str) -> str:
    """`lsp` or `lsp (27.7 min)`."""
    name, bracket, rest = told.partition(" (")
    return _SHAPES["bracket"].format(name, quantity(rest.removesuffix(")"))) if bracket else name


def _parameters(told: str) -> str:
    """`1.35 B` or `125.2 M`, in the language's own units."""
    found = re.fullmatch(r"([\d.,]+) ([BM])", told)
    if found is None:
        return told
    count = float(found[1].replace(",", "")) * (1e9 if found[2] == "B" else 1e6)
    return large_count(count, lambda number: f"{number:,.4g}")


def _part(told: str) -> str:
    """`weights, pinned 2.26 GiB`."""
    found = re.fullmatch(r"(.+?) ([\d.,]+ \w+)", told)
    return told if found is None else f"{word(found[1])} {found[2]}"


@cache
def _word_list(language: Language) -> dict[str, str]:
    content = files("profiles").joinpath("text", f"{language}.toml").read_text(encoding="utf-8")
    found: dict[str, str] = tomllib.loads(content)["word"]
    return found


def word(text: str) -> str:
    """A heading or a cell of a table, in the language spoken: of the list of words, else as a sentence, else
    as it is."""
    if spoken() == "en":
        return text
    words = _word_list(spoken())
    key = text.strip()
    if key in words:
        return words[key] + text[len(text.rstrip()) :]
    return translated(text)


def translated(text: str) -> str:
    """`text`, a sentence that this program made and that was kept in a record, say, in the language spoken;
    as it is where it is not known. What it holds of numbers and other sentences is translated too."""
    if spoken() == "en" or not text:
        return text
    for phrase in _phrases(spoken()):
        if found := phrase.pattern.fullmatch(text):
            values = {name: _translated_value(name, value) for name, value in found.groupdict().items()}
            return filled(phrase.translation, values)
    return quantity(text)


_LARGE: dict[Language, tuple[tuple[float, str], ...]] = {
    "en": ((1e9, " B"), (1e6, " M"), (1e3, " K")),
    "ja": ((1e8, "億"), (1e4, "万")),
}


def large_count(count: float, show: Callable[[float], str]) -> str:
    """A number of parameters, such as `1.35 B`, in the language's own units; `show` writes the number."""
    for size, unit in _LARGE[spoken()]:
        if count >= size:
            return f"{show(count / size)}{unit}"
    return f"{count:g}"


def enumerated(parts: Iterable[str]) -> str:
    """`a, b` as the language spoken writes it."""
    return (", " if spoken() == "en" else "、").join(parts)


def unit_word(name: str) -> str:
    """The unit `name` as the language spoken writes it: `分` for `min`."""
    return name if spoken() == "en" else _UNITS.get(name, name)


def quantity(text: str) -> str:
    """`text`, if it is a number with its unit, a date or 'not measured', as the language writes it."""
    if spoken() == "en":
        return text
    if text in _WORDS:
        return _WORDS[text]
    if found := _QUANTITY.fullmatch(text):
        return f"{found[1]} {_UNITS[found[2]]}"
    if found := _BAND.fullmatch(text):
        return _SHAPES["band"].format(quantity(found[1]), quantity(found[2]))
    if found := _WITH_BAND.fullmatch(text):
        return _SHAPES["bracket"].format(quantity(found[1]), quantity(found[2]))
    if found := _RATIO.fullmatch(text):
        return f"{found[1]} 倍"
    if found := _DAY.fullmatch(text):
        return f"{found[1]}年{int(found[2])}月{int(found[3])}日{found[4]}"
    return text
