"""Suites: several studies in one file that anyone can read and copy. Imports no torch.

A suite is a TOML file: what it is (`about`), `engines`, `budget`, perhaps `emulate`; the fields of a job that
all tasks share (`[job]`, as `--job` has them), most examples of each part (`[sizes]`); and `[[tasks]]`, one
for each study, with a `name`, a `target`, the files `data`, `eval_data` and `test_data` of the folder that
`--data-dir` names, and fields of its job (`[tasks.job]`). A task that cannot be studied yet says why in
`missing`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError

from engines.errors import UserError, plainly
from engines.files.reading import exists, parse_toml, read_text
from harness.quality.documents import StudySizes, parse_budget, parse_quality_target
from profiles.documents import adapter, merged

MOST_SUITE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """One study of a suite."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    target: str = ""
    data: str = ""
    """`builtin`, or a file in the folder of the data."""
    eval_data: str | None = None
    test_data: str | None = None
    job: dict[str, Any] = field(default_factory=dict)
    """Fields of its job, over those of the suite."""
    missing: str = ""
    """Why it cannot be studied yet; empty: it can."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Studies that belong together."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    about: str
    tasks: tuple[SuiteTask, ...]
    engines: tuple[str, ...] = ()
    """Empty: the default ones."""
    budget: str = "2h"
    emulate: str | None = None
    job: dict[str, Any] = field(default_factory=dict)
    sizes: StudySizes = field(default_factory=StudySizes)


def suite_names() -> tuple[str, ...]:
    """Of the suites that come along."""
    folder = files("harness.quality") / "suite_files"
    return tuple(
        sorted(each.name.removesuffix(".toml") for each in folder.iterdir() if each.name.endswith(".toml"))
    )


def load_suite(name: str) -> Suite:
    """One that comes along, by its name, or a file. Raises `UserError`."""
    if name in suite_names():
        text = (files("harness.quality") / "suite_files" / f"{name}.toml").read_text(encoding="utf-8")
    elif exists(Path(name)):
        text = read_text(Path(name), "suite", MOST_SUITE_BYTES)
    else:
        raise UserError(
            f"--suite {name}",
            "is no file and no suite",
            f"choose from: {', '.join(suite_names())}, or write one",
        )
    values = parse_toml(text, f"suite {name}")
    try:
        suite: Suite = adapter(Suite).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"suite {name}, {where}", plainly(first["msg"]), "see harness/quality/suite_files"
        ) from None
    names = [task.name for task in suite.tasks]
    twice = next((each for each in names if names.count(each) > 1), None)
    if twice is not None or not names:
        what = "names no task" if twice is None else f"names task '{twice}' twice"
        raise UserError(f"suite {name}", what, "give each study a name of its own")
    parse_budget(suite.budget)
    for task in suite.tasks:
        if not task.missing:
            parse_quality_target(task.target)
    return suite


def beside_suite(name: str) -> Path | None:
    """The folder of a suite that is the user's own file, in which its data are looked for; else `None`."""
    return None if name in suite_names() else Path(name).parent


def job_of_task(suite: Suite, task: SuiteTask, folder: Path | None) -> dict[str, Any]:
    """Fields of the task's job. Raises `UserError` for files that are not there."""
    given: dict[str, Any] = merged(suite.job, task.job)
    data = dict(given.get("data", {}))
    data["train"] = file_of(task, task.data, folder)
    if task.eval_data is not None:
        data["evaluate"] = file_of(task, task.eval_data, folder)
    return {**given, "data": data}


def file_of(task: SuiteTask, name: str, folder: Path | None) -> str:
    """Raises `UserError` if it is not there."""
    if name in ("builtin", "random"):
        return name
    if folder is None:
        raise UserError("--data-dir", f"is missing, and task {task.name} needs {name}", "name the folder")
    if not exists(folder / name):
        raise UserError(
            f"task {task.name}", f"needs {name}, which is not in {folder}", "put it there, as it is published"
        )
    return str(folder / name)
