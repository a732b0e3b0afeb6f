"""Where processes that tests start find modules."""

from __future__ import annotations

import os
from pathlib import Path


def python_path(*places: Path) -> str:
    """PYTHONPATH with `places` before what it has: packages may lie in a folder of their own."""
    return os.pathsep.join([*map(str, places), *filter(None, [os.environ.get("PYTHONPATH")])])
