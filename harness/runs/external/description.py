"""Trainers that are not ours, as rows: `--external FILE.toml` says how one is started and its steps are read.

Each becomes a plan; `harness.runs.external.trainer` runs it. Nothing is predicted of it. Imports no torch.
"""

from __future__ import annotations

import json
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines import EXTERNAL_PREFIX, is_external
from engines.errors import UserError
from engines.files.reading import read_toml
from engines.settings.external import ExternalSettings
from engines.settings.given import GivenSettings, Value
from engines.settings.parse import parse_settings
from harness.records.job import Job
from profiles.planning.plan import Plan, Prediction

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_KEYS = ("name", "command", "folder", "env", "needs", "read", "clock", "tokens_per_step", "method")
_READ, _NEEDS = ("regex", "json"), ("commands", "modules", "install")


def external_plans(files: Sequence[Path], job: Job) -> list[Plan]:
    """A plan for each file: what is started, with the job's figures in the place of `${batch_size}` and the
    like. Where something that it needs is missing, or it takes other steps than the job's, the plan says so
    and is not run. Raises `UserError` for a file that is no description, and for two of one name."""
    plans = [_plan(path, job) for path in files]
    names = [plan.engine for plan in plans]
    for path, name in zip(files, names, strict=True):
        if names.count(name) > 1:
            raise UserError(str(path), f"its name, {name}, is that of another file", "give it another 'name'")
    return plans


def _plan(path: Path, job: Job) -> Plan:
    described = read_toml(path, "description of an external trainer")
    _check_keys(described, _KEYS, str(path))
    name = described.get("name", path.stem)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"{path}, name", "must be letters, digits and _.-", 'write for example name = "axolotl"'
        )
    engine = f"{EXTERNAL_PREFIX}{name}"
    values = _values(described, path, job)
    try:
        settings = GivenSettings(values, parse_settings(engine, values))
    except UserError as error:
        where = error.what.removeprefix("--set ").partition("=")[0]  # or the engine, where no key is told
        what = str(path) if where == f"engine {engine}" else f"{path}, {where}"
        raise UserError(what, error.why, "see 'External trainers' in harness/README.md") from None
    if not settings.typed.words:
        raise UserError(
            f"{path}, command", "is missing", 'write for example command = ["python", "train.py"]'
        )
    why_not = _why_not(settings.typed, _needs(described, path), job)
    return Plan(
        engine=engine,
        settings=settings,
        fits=why_not is None,
        why_not=why_not,
        available=why_not is None,
        prediction=Prediction(
            step_s_low=None, step_s=None, step_s_high=None, peak_gpu_bytes=0, peak_host_bytes=0,
            pinned_bytes=0, h2d_bytes=0, d2h_bytes=0, bottleneck=None,
            basis="Nothing is predicted of an external trainer.",
        ),
        reasons=("external: its data and its loss are its own; no limit on its memory is held",),
    )  # fmt: skip


def _check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"{where}, {key}", "there is no such key", f"keys are: {', '.join(known)}")


def _values(described: Mapping[str, Any], path: Path, job: Job) -> dict[str, Value]:
    read = _table(described, "read", path)
    _check_keys(read, _READ, f"{path}, read")
    keys = _table(read, "json", path)
    _check_keys(keys, ("loss", "step", "step_s"), f"{path}, read.json")
    if bool(read.get("regex")) == bool(keys):
        raise UserError(
            f"{path}, read", "says how a step is read, by either 'regex' or 'json'",
            r"""write for example regex = "'loss': (?P<loss>[\\d.]+)" """.strip(),
        )  # fmt: skip
    figures = {
        "model": job.model.name, "batch_size": job.batch_size, "seq_len": job.seq_len,
        "accumulation": job.accumulation, "dtype": job.dtype, "seed": job.seed,
        "steps": job.warmup_steps + job.steps,
    }  # fmt: skip
    command = described.get("command", [])
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        raise UserError(
            f"{path}, command", "must be a list of words", 'write command = ["python", "train.py"]'
        )
    values: dict[str, Value] = {
        "command": json.dumps([string.Template(word).safe_substitute(figures) for word in command]),
        "folder": str((path.parent / str(described.get("folder", "."))).resolve()),
        "env": json.dumps(_table(described, "env", path)),
    }
    values |= keys
    if "regex" in read:
        values["regex"] = read["regex"]
    return values | {
        key: described[key] for key in ("clock", "tokens_per_step", "method") if key in described
    }


def _table(described: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = described.get(key, {})
    if not isinstance(found, dict):
        raise UserError(f"{path}, {key}", "must be a table", f"write it below [{key}]")
    return found


def _needs(described: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What must be there, by key. Raises `UserError`."""
    needs = _table(described, "needs", path)
    _check_keys(needs, _NEEDS, f"{path}, needs")
    for key in ("commands", "modules"):
        names = needs.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path}, needs.{key}", "must be a list of names", f'write {key} = ["axolotl"]')
    return needs


def _why_not(settings: ExternalSettings, needs: Mapping[str, Any], job: Job) -> str | None:
    """Why it cannot be run here, or not beside the others."""
    install = f" ({needs['install']})" if needs.get("install") else ""
    program = settings.words[0]
    here = Path(settings.folder)
    for command in (program, *needs.get("commands", ())):
        if shutil.which(str(here / command) if "/" in command else command) is None:
            return f"there is no command '{command}' here{install}"
    missing = _missing_modules(program, here, [str(each) for each in needs.get("modules", ())])
    if missing:
        return f"{', '.join(missing)} cannot be imported by {program}{install}"
    tokens = job.workload.tokens_per_step
    if settings.tokens_per_step not in (0, tokens):
        return f"takes {settings.tokens_per_step:,} tokens a step, and the job's steps have {tokens:,}"
    if job.limits.ranks > 1:
        return "is one process here (--gpus 1); which GPUs it uses is its own command's to say"
    if job.warmup_steps < 1:
        return "needs a warm-up step (--warmup-steps 1 or more): its start cannot be told from its first step"
    return None


def _missing_modules(program: str, here: Path, modules: Sequence[str]) -> list[str]:
    """Those of `modules` that the trainer's Python does not find: that of the command, or ours."""
    if not modules:
        return []
    python = program if re.match(r"python[\d.]*$", Path(program).name) else sys.executable
    script = "import importlib.util as u, sys; print(*(m for m in sys.argv[1:] if u.find_spec(m) is None))"
    done = subprocess.run(
        [python, "-c", script, *modules], cwd=here, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return done.stdout.split() if done.returncode == 0 else list(modules)


def refuse_changed(before: Plan, now: Plan, out: Path) -> None:
    """Raises `UserError` where an external trainer is described otherwise than when its runs began."""
    if not is_external(now.engine) or dict(before.settings) == dict(now.settings):
        return
    keys = dict.fromkeys([*before.settings, *now.settings])
    changed = next(key for key in keys if before.settings.get(key) != now.settings.get(key))
    raise UserError(
        f"--resume {out}", f"{now.engine} differs in '{changed}' from the file its runs began with",
        "restore the file, give it another name, or name another --out",
    )  # fmt: skip
