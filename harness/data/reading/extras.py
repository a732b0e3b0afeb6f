"""Forms that take a package beyond the core: Parquet (pyarrow) and data sets of the hub (datasets)."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from engines.errors import UserError
from harness.data.reading.files import Records, shortened
from harness.data.reading.json_files import records_of

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
    except (OSError, ValueError) as error:
        raise UserError(
            f"data '{path}'", f"is no Parquet file ({shortened(str(error), 60)})", "mend it"
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
        data = datasets.load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # of many libraries
        raise UserError(
            f"data '{source}'",
            f"the hub does not give it ({shortened(str(error), 80)})",
            "check ORGANISATION/NAME:CONFIGURATION@SPLIT, or give a file",
        ) from None
    names = {
        column: tuple(feature.names)
        for column, feature in data.features.items()
        if type(feature).__name__ == "ClassLabel"
    }
    return records_of("data set of the hub", enumerate_rows(data), class_names=names)
