"""`--set` assignments as engine settings. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from engines.base import UserError
from engines.settings import SETTINGS, parse_settings


def parse_assignments(assignments: Sequence[str], engines: Sequence[str]) -> dict[str, dict[str, str]]:
    """Engine -> {key: value} from `key=value` and `engine.key=value`.

    A key without an engine goes to each of `engines` that has it. Raises `UserError` for an unknown
    engine or key, and for a value that the engine does not take.
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
        takers = [engine] if engine else [e for e in engines if key in {f.name for f in fields(SETTINGS[e])}]
        if not takers:
            raise UserError(
                f"--set {assignment}",
                f"none of {', '.join(engines)} has '{key}'",
                "see 'lspzo-bench engines'",
            )
        for taker in takers:
            chosen.setdefault(taker, {})[key] = value
    for engine, values in chosen.items():
        parse_settings(engine, values)
    return chosen
