"""The safetensors files of a checkpoint in a folder: which they are, and what their headers say. Imports no
torch, so that a plan can look at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engines.errors import UserError
from engines.files.reading import exists, open_file, read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """Raises `ValueError` for a folder without weights, and one whose list of them cannot be used."""
    if exists(folder / SINGLE):
        return [folder / SINGLE]
    if not exists(folder / INDEX):
        raise ValueError("the folder holds neither")
    index = read_json(folder / INDEX, "list of weights")
    places = index.get("weight_map") if isinstance(index, dict) else None
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or any(not isinstance(name, str) or "/" in name for name in names):
        raise ValueError("it names no files, or some elsewhere")
    return [folder / name for name in sorted(set(names))]


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """The byte at which tensors begin, and what is said of each.

    Raises `UserError` for what is no regular file, `SafetensorError` for one that the library refuses (cut
    off, or with tensors that overlap, are short or leave gaps)."""
    with open_file(path, "file of weights") as file:
        with safe_open(path, framework="np"):
            pass  # it has read the header, as nothing else would
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return 8 + size, header


def first_broken(folder: Path) -> str | None:
    """What is wrong with the first file that is missing, cut short or no safetensors; `None`: nothing that
    names and headers show."""
    try:
        files = weight_files(folder)
    except (ValueError, UserError):
        return f"{INDEX} cannot be read"
    for path in files:
        if not exists(path):
            return f"{path.name} is missing"
        try:
            header_of(path)
        except (OSError, ValueError, UserError, SafetensorError):
            return f"{path.name} is damaged or not whole"
    return None
