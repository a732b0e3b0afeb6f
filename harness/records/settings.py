"""Settings of engines as the user gives them, by `--set` or in a job file. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engines import ENGINES, engine_of, entry, load_target, public_engines
from engines.errors import UserError
from engines.settings.given import GivenSettings, Value, plain
from engines.settings.parse import parse_settings, setting_names

PRESET = "preset"


def published_presets(engine: str) -> Mapping[str, Mapping[str, Value]]:
    """Settings that the method's authors published, by model; of most methods there are none."""
    where = entry(engine).presets
    found: Mapping[str, Mapping[str, Value]] = {} if where is None else load_target(where)
    return found


def parse_assignments(assignments: Sequence[str], engines: Sequence[str]) -> dict[str, GivenSettings]:
    """Settings by engine from `key=value` and `engine.key=value`, checked and typed.

    A key without an engine goes to each of `engines`, those that run, that has it. `lsp:half.d=288` is for
    `lsp:half` alone where that runs, `lsp.d=288` for all of `lsp`. `lsp.preset=NAME` stands for the values
    that the method's authors published for a model; other assignments win over it. What is for an engine that
    does not run is checked and left out: see `left_out`. Raises `UserError` for an unknown engine, key or
    preset, and for a value that the engine does not take.
    """
    running = {*engines, *map(engine_of, engines)}
    chosen: dict[str, dict[str, Value]] = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator or not name:
            raise UserError(f"--set {assignment}", "is not KEY=VALUE", "write for example --set lsp.d=1024")
        engine, _, key = name.rpartition(".")
        if engine:
            _check_known(engine, engines, f"--set {assignment}")
            if engine != engine_of(engine) and engine not in engines:
                raise UserError(
                    f"--set {assignment}", f"'{engine}' does not run", f"methods are: {', '.join(engines)}"
                )
        takers = (
            [engine]
            if engine
            else [each for each in dict.fromkeys(map(engine_of, engines)) if _has(each, key)]
        )
        if not takers:
            raise UserError(
                f"--set {assignment}",
                f"none of {', '.join(engines)} has '{key}'",
                "see 'lspzo-bench engines'",
            )
        for taker in takers:
            chosen.setdefault(taker, {})[key] = value
    typed = {engine: _typed(engine, values, f"--set {engine}.") for engine, values in chosen.items()}
    return {engine: values for engine, values in typed.items() if engine in running}


def left_out(assignments: Sequence[str], engines: Sequence[str]) -> list[str]:
    """Those of `assignments` that are for an engine that does not run. `parse_assignments` has taken them."""
    running = {"", *engines, *map(engine_of, engines)}
    return [each for each in assignments if each.partition("=")[0].rpartition(".")[0] not in running]


def check_settings(
    settings: Mapping[str, Mapping[str, Value]], engines: Sequence[str], origin: str
) -> dict[str, GivenSettings]:
    """The settings of a job file, checked and typed as those of `--set` are, for the engines that run: a file
    may be of several methods. `origin` names the file, for the error. Raises `UserError`."""
    for engine in settings:
        _check_known(engine, engines, f"{origin}, settings.{engine}")
    typed = {
        engine: _typed(engine, values, f"{origin}, settings.{engine}.") for engine, values in settings.items()
    }
    running = {*engines, *map(engine_of, engines)}
    return {engine: values for engine, values in typed.items() if engine in running}


def typed_settings(settings: Mapping[str, GivenSettings]) -> dict[str, GivenSettings]:
    """The same settings, each value of its own type: earlier versions kept those of `--set` as text. Those of
    an unknown engine stay as they are. Raises `UserError`."""
    return {
        engine: given.normalized() if engine_of(engine) in ENGINES else given
        for engine, given in settings.items()
    }


def _check_known(engine: str, engines: Sequence[str], what: str) -> None:
    """Raises `UserError` if `engine` neither runs nor is one of the users'."""
    public = public_engines()
    if engine not in (*public, *engines) and engine_of(engine) not in map(engine_of, engines):
        raise UserError(what, f"there is no engine '{engine}'", f"engines are: {', '.join(public)}")


def _typed(engine: str, values: Mapping[str, Value], where: str) -> GivenSettings:
    """`values` as the engine takes them, its preset spelt out. A list stays text.

    Raises `UserError`, in which `where` stands before the key.
    """
    given, engine = dict(values), engine_of(engine)
    if PRESET in given and (presets := published_presets(engine)):
        name = str(given.pop(PRESET))
        given = {**_preset(presets, name, where), **given}
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
    return GivenSettings({key: plain(getattr(typed, key), value) for key, value in given.items()}, typed)


def _has(engine: str, key: str) -> bool:
    return key in setting_names(engine) or (key == PRESET and entry(engine).presets is not None)


def _preset(presets: Mapping[str, Mapping[str, Value]], name: str, where: str) -> dict[str, Value]:
    if name not in presets:
        raise UserError(
            f"{where}{PRESET}={name}",
            "there is no such preset",
            f"choose from: {', '.join(presets)}",
        )
    return dict(presets[name])
