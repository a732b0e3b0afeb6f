"""What is named in a table and imported when it is asked for.

So a table can name a command of a higher room without an import that points upward.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def by_name(target: str) -> Any:
    """What `module:name` names. Imports the module."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
