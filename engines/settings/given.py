"""Settings of a method with what of them was set. Imports no torch.

A job and a plan hold settings so: documents keep only what was set, plain and as it was written; whoever
computes takes the typed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Self

from pydantic import GetCoreSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from engines.errors import UserError

Value = str | int | float | bool
"""Of a setting, as documents and the command line hold it. A list is text, separated by commas."""


class GivenSettings(Mapping[str, Value]):
    """What was set or chosen of a method's settings, in its order; `typed` has the rest too, at the defaults.

    Never changed: `completed` and `replaced` make others.
    """

    __slots__ = ("_typed", "_values")

    def __init__(self, values: Mapping[str, Value], typed: Any) -> None:
        """`typed` is the method's settings class with `values` and defaults, or the `UserError` that says why
        there is none: a document may be of a version with other settings."""
        self._values = dict(values)
        self._typed = typed

    @property
    def typed(self) -> Any:
        """All settings, of the method's own class. Raises `UserError` for values that this version does not
        take."""
        if isinstance(self._typed, UserError):
            raise UserError(self._typed.what, self._typed.why, self._typed.remedy)
        return self._typed

    def __getitem__(self, key: str) -> Value:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"GivenSettings({self._values})"

    def completed(self, **chosen: Value) -> Self:
        """`chosen` first, then what is given, which wins."""
        new = {key: value for key, value in chosen.items() if key not in self._values}
        return type(self)({**chosen, **self._values}, replace(self.typed, **new))

    def replaced(self, **values: Value) -> Self:
        """`values` win; what was not given stands last."""
        return type(self)({**self._values, **values}, replace(self.typed, **values))

    def normalized(self) -> Self:
        """The same, each value of its own type: earlier versions kept those of the command line as text.
        Raises `UserError` as `typed` does."""
        typed = self.typed
        return type(self)(
            {key: plain(getattr(typed, key), value) for key, value in self._values.items()}, typed
        )


def plain(typed: object, given: Value) -> Value:
    """`typed` if it is a plain value, else `given` as text, such as a list."""
    return typed if isinstance(typed, bool | int | float | str) else str(given)


class Documented:
    """Tells pydantic how a field with `GivenSettings` is read and written: in a document it is `kind`, and
    `read` makes the field of that and of the fields before it."""

    def __init__(self, kind: Any, read: Callable[[Any, ValidationInfo], Any]) -> None:
        self._kind = kind
        self._read = read

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        kind = handler.generate_schema(self._kind)
        return core_schema.with_info_after_validator_function(
            self._read,
            kind,
            serialization=core_schema.plain_serializer_function_ser_schema(
                _as_documented, return_schema=kind
            ),
        )


def _as_documented(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(each) if isinstance(each, Mapping) else each for key, each in value.items()}
