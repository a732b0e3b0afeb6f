"""Forms that take a package beyond the core: Parquet (pyarrow) and data sets of the hub (datasets)."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from engines.errors import UserError
from harness.data.reading.files import Records, listed, shortened
from harness.data.reading.json_files import records_of
from harness.models.configs import hub_answers

JSON_SUFFIXES = {".json": False, ".jsonl": True, ".ndjson": True}
"""Suffix -> whether a record is a line."""
SUFFIXES = (".txt", ".tsv", ".csv", *JSON_SUFFIXES, ".parquet")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w.-]+)?")


def is_hub_id(source: str) -> bool:
    """Whether `source` is `organisation/name`, maybe with `:configuration` and `@split`, and no path here."""
    return (
        _HUB_ID.fullmatch(source) is not None
        and not source.startswith((".", "~"))
        and not Path(source).exists()
        and not Path(source).parent.is_dir()
        and Path(source).suffix.lower()
        not in (".txt", ".tsv", ".csv", ".json", ".jsonl", ".ndjson", ".parquet")
    )


def _needed(package: str, what: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise UserError(
            what,
            f"needs {package}, which is not installed",
            "install it: pip install 'lspzo-bench[datasets]'",
        ) from None


def read_parquet(path: Path) -> Records:
    """All rows of a Parquet file. Raises `UserError` if pyarrow is missing or the file is none."""
    if not path.exists():
        raise UserError(f"data '{path}'", "there is no such file", "check the path")
    parquet = _needed("pyarrow.parquet", f"data '{path}'")
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError):
        raise UserError(
            f"data '{path}'", "is no Parquet file, or a part of one", "write or download it again"
        ) from None
    return records_of("Parquet", enumerate_rows(table.to_pylist()))


def enumerate_rows(rows: Any) -> Any:
    return ((number, f"row {number}", row) for number, row in enumerate(rows, start=1))


def read_hub(source: str) -> Records:
    """A split of a data set of the hub, by default `train`. Names of its classes come along.

    Raises `UserError` if `datasets` is missing or the hub does not give it.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    datasets = _needed("datasets", f"data '{source}'")
    whole, _, split = source.partition("@")
    name, _, configuration = whole.partition(":")
    try:
        if not hub_answers(name, "README.md", "dataset"):
            _stay_offline(datasets)
        data = datasets.load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # of many libraries
        why, remedy = _why_not(error, configuration, split or "train")
        raise UserError(f"data '{source}'", why, remedy) from None
    names = {
        column: tuple(feature.names)
        for column, feature in data.features.items()
        if type(feature).__name__ == "ClassLabel"
    }
    return records_of("data set of the hub", enumerate_rows(data), class_names=names)


def _stay_offline(datasets: Any) -> None:
    """The libraries look into their cache alone from here on, as HF_HUB_OFFLINE=1 says to a process
    at its start; else each of many requests would be tried for half a minute."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _why_not(error: Exception, configuration: str, split: str) -> tuple[str, str]:
    """Why the hub does not give a data set, and what to do."""
    text, kind = str(error), type(error).__name__
    there = listed(re.findall(r"'([^']+)'", text.rpartition("[")[2]))
    if "DatasetNotFound" in kind:
        return "the hub has none of that name, or not for everybody", "check the name, or give a file"
    if isinstance(error, ConnectionError) or "Offline" in kind or "Connect" in kind:
        return "is not in the cache, and the hub cannot be reached", "connect to it, or give a file"
    if text.startswith("Unknown split"):
        return f"has no split '{shortened(split)}'", f"choose with @ from: {there}"
    if text.startswith("Config name is missing"):
        return "has several configurations", f"choose with : from: {there}"
    if text.startswith("BuilderConfig"):
        return f"has no configuration '{shortened(configuration)}'", f"choose with : from: {there}"
    if "scripts are no longer supported" in text:
        return "is made by a script, which is not run", "give a file, or a data set of files"
    return f"cannot be read as the hub has it ({kind})", "download its files and give one of them"
