"""What a run's program saw of security and data governance, as records keep it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kept = Literal["weights", "data", "records", "logs", "spill"]
Where = Literal["seed", "program", "user", "hub", "results", "cache"]
"""`seed`: drawn, so in no file. `program`: comes with this program. `user`: a file or folder that was named.
`hub`: the cache of the hub's library. `results`: the folder of results. `cache`: this program's own, below
the user's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where something of a run lies, without a path of the user's."""

    what: Kept
    where: Where
    name: str = ""
    """Relative to the folder of results, or a name alone; empty: none tells more."""
    mode: str | None = None
    """Permissions in octal, such as `0700`; `None`: not known, or there is no file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Governance:
    places: tuple[Place, ...]
    swap_bytes: int
    """Of this machine, or as its control group allows: what is in memory may come to be on that disk."""
    core_dumps: bool
    """Whether a crash may leave a copy of memory."""
    hub: Literal["not needed", "offline", "may be asked", "not asked", "asked"]
    """`offline`: by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE. `may be asked`: for files by name, which nobody
    watched. `asked` and `not asked` are observed."""
    sent: Literal["nothing", "names of files on the hub"]
    """What this program has leave the machine: never weights, data or results."""
    contacted: tuple[str, ...] | None = None
    """Hosts that the run and the program that started it looked for or connected to (`harness.contacts`);
    `None`: not watched."""
