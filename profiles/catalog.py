"""Machines by name: the profiles that come with the program, and files. No torch."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path

from engines.errors import UserError
from engines.files.reading import exists
from profiles.documents import NewerDocument
from profiles.machine import Machine, load_machine

FOLDER = Path(__file__).parent / "machines"


@cache
def machine_names() -> tuple[str, ...]:
    """Of the profiles that come with the program, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def _of_file(path: Path) -> Machine:
    """Raises `UserError`. The file is what the user named, so nothing is said of deleting it."""
    try:
        return load_machine(path)
    except NewerDocument:
        raise
    except UserError as error:
        raise UserError(
            error.what, error.why, "name a machine of 'lspzo-bench profiles', or a file of 'probe --out FILE'"
        ) from None


def find_profile(profile: Path) -> Machine:
    """The machine of that name, else of that file; a file with the name of a machine is written `./NAME`.

    Raises `UserError` if it is neither.
    """
    if str(profile) in machine_names() and profile.name == str(profile):
        return load_machine(FOLDER / f"{profile}.json")
    if profile.suffix == ".json" or len(profile.parts) > 1 or exists(profile):
        return _of_file(profile)
    near = difflib.get_close_matches(str(profile), machine_names(), n=1)
    remedy = (
        f"did you mean '{near[0]}'?"
        if near
        else "name one that 'lspzo-bench profiles' lists, or a file of 'lspzo-bench probe --out FILE' there"
    )
    raise UserError(f"profile '{profile}'", "there is no machine of that name", remedy)
