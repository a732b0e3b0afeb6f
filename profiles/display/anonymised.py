"""A machine as a Markdown page that can be shown to strangers: no host name, serial number, user or path."""

from __future__ import annotations

import getpass
import platform
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from profiles.display.core_speeds import two_speeds_text
from profiles.display.tables import machine_caption, machine_sections
from profiles.language import translated
from profiles.machine import Machine

REMOVED = "[removed]"

_IDENTIFIERS = re.compile(
    r"(?:GPU|MIG)-[0-9a-fA-F]{8}(?:-[0-9a-fA-F]+)*"  # NVIDIA's UUIDs
    r"|\b[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-9]\b"  # bus addresses
    r"|(?<![\w/.])~?/(?:[\w.+@~-]+/)*[\w.+@~-]+"  # absolute paths
)


def machine_page(machine: Machine, private: Collection[str] | None = None) -> str:
    """One table per part. `private` words are taken out too; by default the names of this host and user."""
    names = own_names() if private is None else private
    lines = [f"# {_cell(machine.name, names)}", ""]
    for section in machine_sections(machine):
        lines += ["|  | value | range | origin |", "| --- | ---: | --- | --- |"]
        lines += ["| " + " | ".join(_cell(text, names) for text in row) + " |" for row in section]
        lines.append("")
    if (speeds := two_speeds_text(machine.cpu)) is not None:
        lines += [_cell(translated(speeds), names), ""]
    lines += [_cell(machine_caption(machine), names), ""]
    return "\n".join(lines)


def scrub(text: str, private: Collection[str]) -> str:
    """`text` without paths, NVIDIA's and the bus's identifiers, and the `private` words."""
    text = _IDENTIFIERS.sub(REMOVED, text)
    for name in sorted(private, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", REMOVED, text, flags=re.IGNORECASE)
    return text


def own_names() -> frozenset[str]:
    """The host's name, whole and without its domain, the user's, and that of their home."""
    host = platform.node()
    names = {host, host.partition(".")[0]}
    with suppress(OSError, KeyError, RuntimeError):  # an account without an entry, as in containers
        names |= {getpass.getuser(), Path.home().name}
    # Names that are words of the page hide nobody.
    return frozenset(name for name in names if len(name) > 2 and name not in ("root", "localhost"))


def _cell(text: str, private: Collection[str]) -> str:
    return scrub(" ".join(text.split()), private).replace("|", "\\|")
