"""What a sweep was to run and the SHA-256 of what it wrote, in `manifest.json`, kept as it goes. No torch.

It shows what is missing, was added or was changed since: against accidents and casual edits. It is no proof
against forgery: whoever changes a record on purpose can write a manifest to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from engines.files.checksums import sha256_of
from engines.files.reading import exists, is_file, names_in
from engines.files.writing import whole_file
from harness.records.job import JOB_FILE
from harness.records.run import Environment
from harness.records.shape import MODEL
from profiles.documents import read_document, to_json, write_whole
from profiles.machine import MACHINE_FILE

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
PLANS_FILE, CRITERIA_FILE = "plans.json", "criteria.toml"
DOCUMENTS = (JOB_FILE, PLANS_FILE, MACHINE_FILE, MODEL, CRITERIA_FILE)
RECORDS = "runs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    planned: tuple[str, ...]
    """Ids of the runs of all sweeps in the folder, in their order."""
    documents: dict[str, str]
    """SHA-256 by name of the files that say what is compared, as the newest sweep began."""
    records: dict[str, str] = field(default_factory=dict)
    """SHA-256 by path relative to the folder; set before the record takes its place."""
    program: str
    """Version of lspzo-bench."""
    commit: str | None
    dirty: bool | None
    criteria_sha256: str | None
    schema_version: int = SCHEMA_VERSION


FindingKind = Literal["no_manifest", "missing", "not_run", "added", "changed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestFinding:
    """Something in a folder of results that is not as its manifest says."""

    kind: FindingKind
    file: str
    """Relative to the folder; of a run that left no record, where it would be."""


def load_manifest(out: Path) -> Manifest | None:
    """`None` where there is none. Raises `UserError` if it cannot be read."""
    path = out / MANIFEST
    return read_document(path, Manifest, SCHEMA_VERSION, "manifest") if exists(path) else None


def begin_manifest(
    out: Path, planned: Iterable[str], environment: Environment, criteria_sha256: str | None
) -> None:
    """Say in `out` what a sweep is about to run. What an earlier one noted there stays as it was noted.

    Raises `UserError` if it cannot be read or written.
    """
    earlier = load_manifest(out)
    known = () if earlier is None else earlier.planned
    manifest = Manifest(
        planned=tuple(dict.fromkeys([*known, *planned])),
        documents={name: sha256_of(out / name) for name in DOCUMENTS if is_file(out / name)},
        records={} if earlier is None else earlier.records,
        program=environment.program,
        commit=environment.commit,
        dirty=environment.dirty,
        criteria_sha256=criteria_sha256,
    )
    write_whole(out / MANIFEST, to_json(manifest))


@contextmanager
def record_noted(out: Path, path: Path) -> Iterator[Callable[[bytes], object]]:
    """What is to be called with the content that `path` below `out` is about to hold; at the end it stands in
    the manifest, for which room is taken at once. Nothing where `out` has no manifest.

    Raises `UserError` if that cannot be read or written."""
    manifest = load_manifest(out)
    if manifest is None:
        yield lambda content: None
        return
    name = path.relative_to(out).as_posix()

    def with_digest(digest: str) -> bytes:
        return to_json(replace(manifest, records=manifest.records | {name: digest})).encode("utf-8")

    with whole_file(out / MANIFEST, reserve_bytes=len(with_digest("0" * 64))) as file:
        yield lambda content: file.write(with_digest(hashlib.sha256(content).hexdigest()))


def check_manifest(out: Path) -> tuple[ManifestFinding, ...]:
    """What in `out` is not as its manifest says. Raises `UserError` if that cannot be read."""
    manifest = load_manifest(out)
    if manifest is None:
        return (ManifestFinding(kind="no_manifest", file=MANIFEST),)
    noted: Mapping[str, str] = manifest.documents | manifest.records
    found = [
        ManifestFinding(kind="changed" if there else "missing", file=name)
        for name, digest in noted.items()
        for there in (_is_below(name) and is_file(out / name),)
        if not there or sha256_of(out / name) != digest
    ]
    expected = [f"{RECORDS}/{run_id}.json" for run_id in manifest.planned]
    found += [ManifestFinding(kind="not_run", file=name) for name in expected if name not in manifest.records]
    names = names_in(out / RECORDS) if exists(out / RECORDS) else set()
    listed = {name for name in names if name.endswith(".json") and not name.startswith(".")}
    added = sorted(f"{RECORDS}/{name}" for name in listed)
    found += [ManifestFinding(kind="added", file=name) for name in added if name not in manifest.records]
    return tuple(found)


def _is_below(name: str) -> bool:
    """A manifest from elsewhere must not have files of the reader's read."""
    return not name.startswith("/") and ".." not in name.split("/")
