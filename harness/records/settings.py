"""Settings of engines as the user gives them, by `--set` or in a job file. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from engines import ENGINES
from engines.errors import UserError
from engines.settings.lsp import LSP_PRESETS
from engines.settings.parse import SETTINGS, parse_settings
from profiles.planning.plan import Value

PRESET = "preset"

TEST_DOUBLE = "scripted"
"""The engine that is not for users."""


def public_engines() -> list[str]:
    return [name for name in ENGINES if name != TEST_DOUBLE]


def parse_assignments(assignments: Sequence[str], engines: Sequence[str]) -> dict[str, dict[str, Value]]:
    """Engine -> {key: value} from `key=value` and `engine.key=value`, checked and typed.

    A key without an engine goes to each of `engines`, those that run, that has it. `lsp.preset=NAME` stands
    for the values that the method's authors published for a model; other assignments win over it. What is for
    an engine that does not run is checked and left out: see `left_out`. Raises `UserError` for an unknown
    engine, key or preset, and for a value that the engine does not take.
    """
    chosen: dict[str, dict[str, Value]] = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator or not name:
            raise UserError(f"--set {assignment}", "is not KEY=VALUE", "write for example --set lsp.d=1024")
        engine, _, key = name.rpartition(".")
        if engine:
            _check_known(engine, engines, f"--set {assignment}")
        takers = [engine] if engine else [each for each in engines if _has(each, key)]
        if not takers:
            raise UserError(
                f"--set {assignment}",
                f"none of {', '.join(engines)} has '{key}'",
                "see 'lspzo-bench engines'",
            )
        for taker in takers:
            chosen.setdefault(taker, {})[key] = value
    typed = {engine: _typed(engine, values, f"--set {engine}.") for engine, values in chosen.items()}
    return {engine: values for engine, values in typed.items() if engine in engines}


def left_out(assignments: Sequence[str], engines: Sequence[str]) -> list[str]:
    """Those of `assignments` that are for an engine that does not run. `parse_assignments` has taken them."""
    named = {each: each.partition("=")[0].rpartition(".")[0] for each in assignments}
    return [each for each, engine in named.items() if engine and engine not in engines]


def check_settings(
    settings: Mapping[str, Mapping[str, Value]], engines: Sequence[str], origin: str
) -> dict[str, dict[str, Value]]:
    """The settings of a job file, checked and typed as those of `--set` are, for the engines that run: a file
    may be of several methods. `origin` names the file, for the error. Raises `UserError`."""
    for engine in settings:
        _check_known(engine, engines, f"{origin}, settings.{engine}")
    typed = {
        engine: _typed(engine, values, f"{origin}, settings.{engine}.") for engine, values in settings.items()
    }
    return {engine: values for engine, values in typed.items() if engine in engines}


def typed_settings(settings: Mapping[str, Mapping[str, Value]]) -> dict[str, dict[str, Value]]:
    """The same settings, each value of its own type: earlier versions kept those of `--set` as text. Those of
    an unknown engine stay as they are. Raises `UserError`."""
    return {
        engine: _typed(engine, values, f"settings.{engine}.") if engine in SETTINGS else dict(values)
        for engine, values in settings.items()
    }


def _check_known(engine: str, engines: Sequence[str], what: str) -> None:
    """Raises `UserError` if `engine` neither runs nor is one of the users'."""
    public = public_engines()
    if engine not in (*public, *engines):
        raise UserError(what, f"there is no engine '{engine}'", f"engines are: {', '.join(public)}")


def _typed(engine: str, values: Mapping[str, Value], where: str) -> dict[str, Value]:
    """`values` as the engine takes them, its preset spelt out. A list stays text.

    Raises `UserError`, in which `where` stands before the key.
    """
    given = dict(values)
    if engine == "lsp" and PRESET in given:
        name = str(given.pop(PRESET))
        given = {**_preset(name, where), **given}
    try:
        typed = parse_settings(engine, given)
    except UserError as error:
        key = error.what.removeprefix("--set ")  # else the values do not go together
        what = where + key if key != error.what else where.removesuffix(".")
        raise UserError(what, error.why, error.remedy) from None
    for key, value in given.items():
        if isinstance(value, bool) and not isinstance(getattr(typed, key), bool):
            raise UserError(
                f"{where}{key}", "must be a number, not true or false", "see 'lspzo-bench engines'"
            )
    return {key: _plain(getattr(typed, key), value) for key, value in given.items()}


def _plain(typed: object, given: Value) -> Value:
    """`typed` if it is a plain value, else `given` as text, such as a list."""
    return typed if isinstance(typed, bool | int | float | str) else str(given)


def _has(engine: str, key: str) -> bool:
    return key in {field.name for field in fields(SETTINGS[engine])} or (engine == "lsp" and key == PRESET)


def _preset(name: str, where: str) -> dict[str, Value]:
    if name not in LSP_PRESETS:
        raise UserError(
            f"{where}{PRESET}={name}",
            "there is no such preset",
            f"choose from: {', '.join(LSP_PRESETS)}",
        )
    return dict(LSP_PRESETS[name])
