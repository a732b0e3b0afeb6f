"""Runs a fine-tuning job on an engine and keeps what happened."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

__version__ = "0.1.0"

PROJECT = Path(__file__).resolve().parent.parent
"""The folder that the four rooms lie in: a checkout's, or where they are installed."""


def _import_the_other_rooms() -> None:
    """The folders beside this one, whatever lies earlier on the path.

    Users have folders named `profiles` and `reports` too, where they stand or on PYTHONPATH.
    """
    for name in ("engines", "profiles", "reports"):
        folder = PROJECT / name
        spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        if name not in sys.modules and spec is not None and spec.loader is not None:
            module = sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(module)


_import_the_other_rooms()
