"""Of what sizes of a model a study of quality speaks."""

from __future__ import annotations

SAME_SIZE = 3.0
"""A study speaks of models of up to so many times its own parameters, and down to as small a part."""


def speaks_of(studied: float, parameters: float) -> bool:
    """Whether a study of a model with `studied` parameters does of one with `parameters`."""
    return studied / SAME_SIZE <= parameters <= SAME_SIZE * studied
