"""The files by which the folder of a training run is known. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from engines.errors import UserError
from engines.files.reading import exists
from harness.records.job import JOB_FILE

ENGINE_FILE = "engine.json"


def check_holds_run(out: Path) -> None:
    """Raises `UserError` if no run was started in `out`."""
    if not exists(out / JOB_FILE) or not exists(out / ENGINE_FILE):
        raise UserError(str(out), "holds no run", "name a folder that 'lspzo-bench run' wrote with --out")
