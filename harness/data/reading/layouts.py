"""From a record, its columns told apart, to an example: instructions, documents, labelled texts. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from harness.data.reading.files import UnusableError
from harness.data.records import InstructionExample

_KINDS = {dict: "an object", list: "a list", bool: "true or false", float: "a number with a fraction"}


def text_of(values: Mapping[str, Any], role: str, shown: str) -> str:
    """The text of a role; a whole number counts as one. `shown` is what its file calls it.

    Raises `UnusableError` for what is missing, empty or no text.
    """
    value = values.get(role)
    if type(value) is int:
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UnusableError(f"{shown} is missing or empty")
    if not isinstance(value, str):
        kind = next((name for kind, name in _KINDS.items() if isinstance(value, kind)), "of another kind")
        advice = ": write it as JSON in a text" if isinstance(value, dict | list) else ""
        raise UnusableError(f"{shown} is {kind}, not text{advice}")
    return value


def optional_text(values: Mapping[str, Any], role: str, shown: str) -> str:
    """The text of a role, empty where it is missing. Raises `UnusableError` for what is no text."""
    value = values.get(role)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return text_of(values, role, shown)


def instruction_example(
    values: Mapping[str, Any], column_of: Mapping[str, str], place: str
) -> InstructionExample:
    """Of Alpaca's layout and its kin: an instruction or a bare prompt, and what is to be answered.

    Raises `UnusableError`.
    """

    def text(role: str) -> str:
        return text_of(values, role, json.dumps(column_of.get(role, role)))

    def maybe(role: str) -> str:
        return optional_text(values, role, json.dumps(column_of.get(role, role)))

    system = maybe("system").strip()
    opening = f"{system}\n\n" if system else ""
    if "completion" in column_of:
        return InstructionExample(prompt=opening + text("prompt"), answer=text("completion"), place=place)
    prompt = instruction_prompt(text("instruction"), maybe("input"))
    answer = text("output").strip()
    earlier = "".join(
        f"{instruction_prompt(asked, '')}{answered.strip()}\n\n" for asked, answered in _history(values)
    )
    return InstructionExample(prompt=opening + earlier + prompt, answer=answer, place=place)


def _history(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Earlier questions with their answers, as LLaMA-Factory has them."""
    history = values.get("history") or []
    pairs = isinstance(history, list) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    )
    if not pairs:
        raise UnusableError('"history" is not a list of pairs of texts')
    return [(asked, answered) for asked, answered in history]


def instruction_prompt(instruction: str, given: str) -> str:
    """The prompt of an Alpaca-like record: what to do, the task, its input if any, the answer's heading."""
    opening = "Do the task below" + (", using the input that follows it." if given.strip() else ".")
    middle = f"\n\n### Input:\n{given.strip()}" if given.strip() else ""
    return f"{opening}\n\n### Instruction:\n{instruction.strip()}{middle}\n\n### Response:\n"
