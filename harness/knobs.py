"""`--set` assignments as engine settings. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from engines.base import UserError
from engines.settings import LSP_PRESETS, SETTINGS, parse_settings

PRESET = "preset"


def parse_assignments(assignments: Sequence[str], engines: Sequence[str]) -> dict[str, dict[str, str]]:
    """Engine -> {key: value} from `key=value` and `engine.key=value`.

    A key without an engine goes to each of `engines` that has it. `lsp.preset=NAME` stands for the values
    that the method's authors published for a model; other assignments win over it. Raises `UserError` for an
    unknown engine, key or preset, and for a value that the engine does not take.
    """
    chosen: dict[str, dict[str, str]] = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator or not name:
            raise UserError(f"--set {assignment}", "is not KEY=VALUE", "write for example --set lsp.d=1024")
        engine, _, key = name.rpartition(".")
        if engine and engine not in SETTINGS:
            raise UserError(
                f"--set {assignment}", f"there is no engine '{engine}'", f"engines are: {', '.join(SETTINGS)}"
            )
        takers = [engine] if engine else [each for each in engines if _has(each, key)]
        if not takers:
            raise UserError(
                f"--set {assignment}",
                f"none of {', '.join(engines)} has '{key}'",
                "see 'lspzo-bench engines'",
            )
        for taker in takers:
            chosen.setdefault(taker, {})[key] = value
    for engine, values in chosen.items():
        if engine == "lsp" and PRESET in values:
            chosen[engine] = values = {**_preset(values[PRESET]), **values}
            del values[PRESET]
        parse_settings(engine, values)
    return chosen


def _has(engine: str, key: str) -> bool:
    return key in {field.name for field in fields(SETTINGS[engine])} or (engine == "lsp" and key == PRESET)


def _preset(name: str) -> dict[str, str]:
    if name not in LSP_PRESETS:
        raise UserError(
            f"--set lsp.{PRESET}={name}",
            "there is no such preset",
            f"choose from: {', '.join(LSP_PRESETS)}",
        )
    return {key: str(value) for key, value in LSP_PRESETS[name].items()}
