"""What records and reports show of a user's paths: names, never places. Imports no torch.

Records, reports and the machine's profile beside them are made to be given away. A path that begins at the
root or at a home becomes its last part; one that is relative stays, as it says nothing of the machine.
`job.toml` and the settings in `plans.json` keep paths as they were given: `--resume` needs them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.settings.given import GivenSettings
from harness import PROJECT
from harness.records.job import Job, make_job
from profiles.documents import adapter
from profiles.machine import Machine
from profiles.planning.plan import Plan

_TEXTS = frozenset({"template", "labels", "columns"})
"""Fields of a job's data that hold text of the user's and no path."""

_PATH = re.compile(r"(?<![\w./:~<-])~?(?:/[^\s/'\"`:,;()<>|]+){2,}/?")
"""A path of two parts or more that begins at the root or at a home, inside of a text."""


def shared_name(name: str) -> str:
    """The last part of a path that begins at the root or at a home; anything else as it is."""
    return name.rstrip("/").rpartition("/")[2] or "/" if name.startswith(("/", "~")) else name


def shared_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a job, as records keep it, or the settings of a method, with names for paths."""
    return {key: value if key in _TEXTS else _shared(value) for key, value in values.items()}


def _shared(value: Any) -> Any:
    if isinstance(value, Mapping):
        return shared_values(value)
    if isinstance(value, str) and value.startswith(('["', '{"')):  # a command, or variables
        with suppress(ValueError):
            return json.dumps(_shared_words(json.loads(value)))
    return shared_name(value) if isinstance(value, str) else value


def _shared_words(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _shared_words(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_shared_words(each) for each in value]
    return without_paths(shared_name(value)) if isinstance(value, str) else value


def shared_job(job: Job) -> Job:
    """`job` with names for paths. Raises `UserError` if its settings are none that this version takes."""
    dumped = adapter(Job).dump_python(job, mode="json")
    shared = shared_values(dumped)
    return job if shared == dumped else make_job(shared, "the job")


def shared_settings(settings: GivenSettings) -> GivenSettings:
    """`settings` with names for paths. Raises `UserError` for values that this version does not take."""
    shared = shared_values(settings)
    changed = {key: value for key, value in shared.items() if value != settings[key]}
    return settings.replaced(**changed) if changed else settings


def shared_command(command: str) -> str:
    """A command with names for paths, to be typed where these are."""
    try:
        words = shlex.split(command)
    except ValueError:
        return without_paths(command)
    shared = [f"{key}{mark}{shared_name(value)}" if mark else shared_name(word) for word in words
              for key, mark, value in (word.partition("="),)]  # fmt: skip
    return command if shared == words else shlex.join(shared)


def shared_plan(plan: Plan, *, keep_settings: bool = False) -> Plan:
    """`plan` with names for paths; `keep_settings`: but for its settings. Raises `UserError` as
    `shared_settings` does."""
    named = [value for value in plan.settings.values() if isinstance(value, str)]
    return replace(
        plan,
        settings=plan.settings if keep_settings else shared_settings(plan.settings),
        verify_command=shared_command(plan.verify_command),
        why_not=None if plan.why_not is None else without_paths(plan.why_not, *named),
        reasons=tuple(without_paths(reason, *named) for reason in plan.reasons),
    )


def shared_machine(machine: Machine) -> Machine:
    """`machine` with a name for the folder whose disk was measured."""
    reason = machine.disk_absent_reason
    return replace(
        machine,
        disk=None if machine.disk is None else replace(machine.disk, folder=shared_name(machine.disk.folder)),
        disk_absent_reason=None if reason is None else without_paths(reason),
    )


def without_paths(text: str, *named: str) -> str:
    """`text` with names for its paths: those `named`, which may hold blanks, and whatever looks like one.

    Files of this program and of installed packages are told from their root, so that a traceback stays one.
    """
    places = {name: shared_name(name) for name in named if name.startswith("/") and name.rstrip("/")}
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    for root in (PROJECT, Path(os.getcwd())):
        if root != root.parent:
            text = text.replace(f"{root}/", "")
    return _PATH.sub(_name_of, text)


def _name_of(found: re.Match[str]) -> str:
    _, packages, below = found[0].partition("/site-packages/")
    return packages.lstrip("/") + below if packages else shared_name(found[0])


def paths_of(job: Job) -> tuple[str, ...]:
    """What of `job` may be a path."""
    named = [job.model.name, job.data.train, job.data.evaluate or ""]
    named += [value for each in job.settings.values() for value in each.values() if isinstance(value, str)]
    return tuple(each for each in named if each)
