"""Where a run's files lie and what may leave the machine, as far as a program sees it. Imports no torch."""

from __future__ import annotations

import os
import resource
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engines.errors import UserError
from engines.files.reading import expanded
from harness.contacts import contacted
from harness.models.configs import NAMED_SHAPES
from harness.records.governance import Governance, Place, Where
from harness.records.job import Job
from harness.records.shared import shared_name
from profiles.system.cgroup import host_memory


def governance_facts(
    job: Job, settings: Any, out: Path, records: str, logs: str, by_child: Sequence[str] | None = ()
) -> Governance:
    """Of a run with the typed `settings` of its method (`None`: unknown), whose record and log go to the
    folders or files `records` and `logs` below `out`.

    `by_child`: the hosts that the run's own process contacted, if it has one; `None`: that is not known.
    """
    weights, data = _weights(job), _data(job.data.train)
    is_named = job.model.name in NAMED_SHAPES
    asks = data.where == "hub" or not (is_named or weights.where == "user" or _is_there(job.model.name))
    offline = any(_is_set(name) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    hub = "not needed" if not asks else "offline" if offline else "may be asked"
    own = contacted()
    hosts = None if own is None or by_child is None else tuple(dict.fromkeys((*own, *by_child)))
    if hosts is not None and any(_may_be_the_hub(host) for host in hosts):
        hub = "asked"
    elif hosts is not None and hub == "may be asked":
        hub = "not asked"
    return Governance(
        places=(
            weights,
            data,
            Place(what="records", where="results", name=records, mode=_mode(out)),
            Place(what="logs", where="results", name=logs, mode=_mode(out)),
            *_spill(settings),
        ),
        swap_bytes=host_memory().swap_bytes,
        core_dumps=resource.getrlimit(resource.RLIMIT_CORE)[0] != 0,
        hub=hub,  # type: ignore[arg-type]
        sent="names of files on the hub" if hub in ("asked", "may be asked") else "nothing",
        contacted=hosts,
    )


def _may_be_the_hub(host: str) -> bool:
    """Any other machine may be it, by a proxy; this one only if it is named so."""
    is_here = host in ("localhost", "::1", socket.gethostname()) or host.startswith("127.")
    return not is_here or host == urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname


def _weights(job: Job) -> Place:
    if job.model.random_weights:
        return Place(what="weights", where="seed")
    return _named("weights", job.model.name)


def _data(train: str) -> Place:
    if train in ("random", "builtin"):
        return Place(what="data", where="seed" if train == "random" else "program")
    return _named("data", train)


def _named(what: str, name: str) -> Place:
    where: Where = "user" if _is_there(name) else "hub"
    mode = _mode(expanded(name)) if where == "user" else None
    return Place(what=what, where=where, name=shared_name(name), mode=mode)  # type: ignore[arg-type]


def _spill(settings: Any) -> tuple[Place, ...]:
    """Spilled blocks have no name, and a mode of their own: only the user reads them."""
    if not getattr(settings, "disk_blocks", 0):
        return ()
    named = str(getattr(settings, "disk_folder", ""))
    where: Where = "user" if named else "cache"
    return (Place(what="spill", where=where, name=shared_name(named), mode="0600"),)


def _is_there(name: str) -> bool:
    try:
        return expanded(name).exists()
    except (UserError, OSError, ValueError):
        return False


def _mode(path: Path) -> str | None:
    try:
        return f"{stat.S_IMODE(path.stat().st_mode):04o}"
    except (OSError, ValueError):
        return None


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")
