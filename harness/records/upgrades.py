"""What single upgrades of its machine would bring for a sweep's job, in `upgrades.json`, as predicted when it
began: a report says then what was said there, whatever later versions predict. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from engines.errors import UserError
from profiles.advice.what_if import StepsOn
from profiles.documents import read_document, to_json, write_whole

UPGRADES = "upgrades.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedUpgrades:
    machines: tuple[StepsOn, ...]
    """The machine as it is, then with one thing changed."""
    schema_version: int = SCHEMA_VERSION


def save_upgrades(machines: tuple[StepsOn, ...], path: Path) -> None:
    write_whole(path, to_json(SavedUpgrades(machines=machines)))


def load_upgrades(path: Path) -> tuple[StepsOn, ...]:
    """Raises `UserError` if `path` holds none, or a time that nothing takes."""
    machines = read_document(path, SavedUpgrades, SCHEMA_VERSION, "table of upgrades").machines
    for machine in machines:
        for engine, step_s in machine.step_s.items():
            if step_s is not None and not (math.isfinite(step_s) and step_s > 0):
                raise UserError(
                    str(path), f"says that '{engine}' takes {step_s} s a step", "restore or delete this file"
                )
    if not machines or machines[0].name:
        raise UserError(str(path), "does not begin with the machine as it is", "restore or delete this file")
    return machines
