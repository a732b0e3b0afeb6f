"""Plain values to the typed settings of a method. Imports no torch.

`--set key=value` gives them, `lspzo-bench engines` lists them, a `Plan` holds those that it chose. They are
parsed where they come in, from the command line, a job file or a record, and are typed from there on.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from engines import entry, load_target
from engines.errors import UserError, plainly
from engines.settings.checks import Refused
from engines.settings.given import GivenSettings, Value


def settings_class(engine: str) -> type[Any]:
    """The settings dataclass of `engine`. Raises `UserError` for an unknown engine."""
    found: type[Any] = load_target(entry(engine).settings)
    return found


def setting_names(engine: str) -> tuple[str, ...]:
    """Raises `UserError` for an unknown engine."""
    return tuple(field.name for field in fields(settings_class(engine)))


def defaults(engine: str) -> GivenSettings:
    """Nothing set. Raises `UserError` for an unknown engine."""
    return GivenSettings({}, settings_class(engine)())


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Made once for each engine, since making one takes milliseconds."""
    return TypeAdapter(kind)


_RETIRED = {"layer_share": ("1", "1.0")}
"""Settings that earlier versions had, and the values, as text, with which they did what this one does."""


def without_retired(values: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Settings that a record holds, without those that are gone since; and of the gone ones those that made
    the method another than the one of today."""
    kept = {key: value for key, value in values.items() if key not in _RETIRED}
    other = {
        key: value for key, value in values.items() if key in _RETIRED and str(value) not in _RETIRED[key]
    }
    return kept, other


def parse_recorded(engine: str, values: Mapping[str, object]) -> Any:
    """Settings from what an earlier version may have written, checked and typed.

    Raises `UserError` also for a run that a setting made what this version cannot repeat.
    """
    kept, other = without_retired(values)
    if other:
        named = " and ".join(f"{key}={value}" for key, value in other.items())
        raise UserError(
            f"engine {engine}",
            f"has no {named}: this version dropped it",
            "use the version that began the run, or start anew with another --out",
        )
    return parse_settings(engine, kept)


def parse_settings(engine: str, values: Mapping[str, object]) -> Any:
    """Typed settings of `engine` from plain values (strings are converted).

    Raises `UserError` that names the key, and for one that there is not those like it; and for an unknown
    engine.
    """
    kind: Any = settings_class(engine)
    try:
        return _adapter(kind).validate_python(dict(values))
    except ValidationError as error:
        found = error.errors()
        first = found[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        # One for each kind of value that it may have.
        whys = dict.fromkeys(plainly(each["msg"]) for each in found if each["loc"][:1] == first["loc"][:1])
        why = " or ".join([next(iter(whys)), *(each.removeprefix("must be ") for each in list(whys)[1:])])
        refused = first.get("ctx", {}).get("error")
        known = f"'lspzo-bench engines' lists the settings of {engine}"
        near = difflib.get_close_matches(key, setting_names(engine))
        if near and key not in near:
            known = f"did you mean {' or '.join(near)}? {known}"
        raise UserError(
            f"--set {key}={values.get(key, '')}" if key else f"engine {engine}",
            why,
            (refused.remedy if isinstance(refused, Refused) else "") or known,
        ) from None


def settings_of_document(engine: str, values: Mapping[str, Value]) -> GivenSettings:
    """Settings that a document holds. What is wrong with them is raised where they are asked for: a record of
    another version still loads."""
    try:
        return GivenSettings(values, parse_recorded(engine, values))
    except UserError as error:
        return GivenSettings(values, error)
