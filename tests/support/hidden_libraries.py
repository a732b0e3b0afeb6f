"""What a process that is to be forked must not have imported."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

START_CUDA = ("torchao",)
"""Libraries that make a CUDA context as they are imported. A fork of a process that has one can have none."""


@contextlib.contextmanager
def hidden(libraries: Sequence[str]) -> Iterator[None]:
    """Within it they cannot be imported, as if they were not installed; forks may, later."""
    for name in libraries:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in libraries:
            del sys.modules[name]
