"""The update log: all that a zeroth-order run did to its weights, at 32 bytes a query. Imports no torch.

A step of MeZO changes every weight, but by noise that a seed makes again: step, learning rate, projected
gradient and weight decay are the whole step (Malladi et al., arXiv 2305.17333, section 2.1, store a
fine-tuned model so). With the weights it starts from, the log is therefore a checkpoint as of its last
record, and each engine that takes `engines.base.Update` reads what another wrote.

The file, little-endian: a header of 96 bytes, then records of 32: of consecutive steps, and in a step of
its queries, of which there is one unless `queries` is set. A step therefore takes 32 bytes times queries.

    header  magic, version, start step, seed, SHA-256 of the run, fingerprint of the weights,
            queries (0 for 1), CRC-32
    record  step x queries + query, learning rate, projected gradient, weight decay (numbers as fp64, bit for
            bit), CRC-32

A record's CRC begins with the header's, so a record of another log does not pass. The records of a step are
handed to the system in one write after it: killing the process loses the step in progress and nothing else,
and of a step that is not there whole nothing is read. A log with several queries is of version 2.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Self

from engines.base import Update
from engines.errors import UserError
from engines.files.reading import read_bytes
from engines.files.writing import unwritable, write_whole
from engines.settings.zeroth_order import MOST_FOLD_EVERY, MezoSettings
from harness.records.job import Job
from profiles.documents import adapter

MAGIC = b"lspzoupd"
VERSION = 2
_HEADER = struct.Struct("<8sIIQ32s32sI")
_RECORD = struct.Struct("<Iddd")
_CRC = struct.Struct("<I")
GO_ON = "free space, then go on with --resume"
MOST_LOG_BYTES = 2**34
"""Half a billion records."""
HEADER_BYTES = _HEADER.size + _CRC.size
RECORD_BYTES = _RECORD.size + _CRC.size
WITHOUT_EFFECT = frozenset(
    {"limits", "settings", "eval_batches", "checkpointing", "eval_every", "best_by", "patience"}
)
"""Fields of a job that no update depends on; the settings are told by their parsed values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogOrigin:
    """What a log belongs to: its updates mean nothing elsewhere."""

    seed: int
    """Of the perturbations, modulo 2^64."""
    start_step: int
    """Steps done before its first record."""
    run_sha256: bytes
    """Of `run_digest`."""
    weights_sha256: bytes
    """Fingerprint of the weights before its first record."""
    queries: int = 1
    """Records of a step."""

    @property
    def step_bytes(self) -> int:
        return self.queries * RECORD_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What could be read of a log."""

    origin: LogOrigin
    records: bytes
    """Whole and sound ones of whole steps, end to end."""
    torn_bytes: int
    """Behind the last sound step: a write that was cut off, or damage."""
    damaged: bool = False
    """They are no write that was cut off: there is a whole step among them, and it is not sound."""

    @property
    def end_step(self) -> int:
        """Steps done after its last record."""
        return self.origin.start_step + len(self.records) // self.origin.step_bytes

    def updates(self, first_step: int) -> Iterator[Update]:
        """Those of `first_step`, which the log reaches back to, and later."""
        first, queries = first_step - self.origin.start_step, self.origin.queries
        for offset in range(first * self.origin.step_bytes, len(self.records), RECORD_BYTES):
            draw, rate, gradient, decay = _RECORD.unpack_from(self.records, offset)
            yield Update(
                step=draw // queries, learning_rate=rate, projected_gradient=gradient, weight_decay=decay,
                query=draw % queries, queries=queries,
            )  # fmt: skip


class UpdateLog:
    """A log to append to, locked against a second writer while it is open."""

    def __init__(self, path: Path, file: FileIO, crc: int, queries: int, next_step: int) -> None:
        self.path = path
        self._file = file
        self._crc = crc
        self._queries = queries
        self._next_step = next_step

    @classmethod
    def create(cls, path: Path, origin: LogOrigin) -> Self:
        """A new log in place of whatever is at `path`; its header is on the disk when this returns.

        Raises `UserError` if it cannot be written.
        """
        header = encode_header(origin)
        write_whole(path, header, GO_ON)
        return cls(path, _open_locked(path), _crc_of(header), origin.queries, origin.start_step)

    @classmethod
    def reopen(cls, path: Path) -> tuple[Self, Contents]:
        """The log at `path` with its torn end cut off, and what it holds. Of a damaged one a copy is kept
        (`damaged_copy`).

        Raises `UserError` if it is no log, cannot be read or written, or another process appends to it.
        """
        file = _open_locked(path)
        try:
            contents = read_update_log(path)
            if contents.damaged:
                write_whole(damaged_copy(path), read_bytes(path, "update log", MOST_LOG_BYTES))
            if contents.torn_bytes:
                file.truncate(HEADER_BYTES + len(contents.records))
        except OSError as error:
            file.close()
            raise cannot_write(path, error) from None
        except UserError:
            file.close()
            raise
        origin = contents.origin
        return cls(path, file, _crc_of(encode_header(origin)), origin.queries, contents.end_step), contents

    def append(self, *updates: Update) -> None:
        """Hand the records of the next step, one for each query, to the system. Raises `UserError` if they
        cannot be written."""
        wanted = [self._next_step * self._queries + query for query in range(self._queries)]
        if [update.draw for update in updates] != wanted:
            them = ", ".join(f"step {update.step}, query {update.query}" for update in updates)
            raise ValueError(f"the updates of {them} cannot follow step {self._next_step - 1}")
        records = b"".join(encode_record(update, self._crc) for update in updates)
        try:
            if self._file.write(records) != len(records):
                raise OSError("no space left")
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self._next_step += 1

    def sync(self) -> None:
        """Onto the disk: up to here the log then survives a power cut. Raises `UserError`."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def close(self) -> None:
        """Let a next writer in. May be called twice."""
        self._file.close()


def run_digest(job: Job, settings: MezoSettings) -> bytes:
    """SHA-256 of all that decides the updates of a run, beside the weights it starts from.

    Settings that only say where things lie, such as `resident_blocks`, are not in it.
    """
    return _digest(job, settings, fold_every=1)


def _digest(job: Job, settings: MezoSettings, *, fold_every: int) -> bytes:
    """`fold_every` is that of a low-bit base for which it decides nothing.

    That it is named there at all, that a full base is not, and that a setting is named which is gone, keeps
    the bytes of earlier versions: their logs would else be those of other runs.
    """
    values = adapter(Job).dump_python(job, mode="json")
    parts = {key: value for key, value in values.items() if key not in WITHOUT_EFFECT}
    decides = {"fold_every": fold_every, **settings.decides_updates, "layer_share": 1.0}
    if not settings.is_quantized:
        del decides["base"], decides["fold_every"]
    parts["knobs"] = decides
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).digest()


def _digests(job: Job, settings: MezoSettings) -> Iterator[bytes]:
    """What logs of the run may have: earlier versions named the `fold_every` of every low-bit base."""
    yield run_digest(job, settings)
    if settings.is_quantized and not settings.trains_quantized:
        for fold_every in range(2, MOST_FOLD_EVERY + 1):
            yield _digest(job, settings, fold_every=fold_every)


def encode_header(origin: LogOrigin) -> bytes:
    packed = _HEADER.pack(
        MAGIC,
        1 if origin.queries == 1 else VERSION,
        origin.start_step,
        origin.seed % 2**64,
        origin.run_sha256,
        origin.weights_sha256,
        0 if origin.queries == 1 else origin.queries,
    )
    return packed + _CRC.pack(zlib.crc32(packed))


def encode_record(update: Update, header_crc: int) -> bytes:
    packed = _RECORD.pack(update.draw, update.learning_rate, update.projected_gradient, update.weight_decay)
    return packed + _CRC.pack(zlib.crc32(packed, header_crc))


def read_update_log(path: Path) -> Contents:
    """What the log holds now; it may be one that another process appends to.

    Raises `UserError` if it cannot be read or is no log of a version known here.
    """
    return decode(read_bytes(path, "update log", MOST_LOG_BYTES), str(path))


def decode(content: bytes, name: str) -> Contents:
    """Raises `UserError`, which calls the log `name`, unless it begins with a sound header."""
    header = content[:HEADER_BYTES]
    if not header.startswith(MAGIC):
        raise UserError(name, "is not an update log", "restore it, or start anew with another --out")
    version = int.from_bytes(header[len(MAGIC) : len(MAGIC) + 4], "little")
    if version > VERSION and len(header) == HEADER_BYTES:
        raise UserError(
            name, f"has version {version}, this program knows up to {VERSION}", "update lspzo-bench"
        )
    if len(header) < HEADER_BYTES or zlib.crc32(header[: _HEADER.size]) != _crc_of(header):
        raise UserError(name, "its header is damaged", "restore it, or start anew with another --out")
    _, _, start_step, seed, run, weights, queries = _HEADER.unpack_from(header)
    origin = LogOrigin(
        seed=seed, start_step=start_step, run_sha256=run, weights_sha256=weights, queries=max(1, queries)
    )
    end = HEADER_BYTES
    crc, draw = _crc_of(header), start_step * origin.queries
    while _is_sound(content[end : end + RECORD_BYTES], crc, draw):
        end, draw = end + RECORD_BYTES, draw + 1
    end -= (end - HEADER_BYTES) % origin.step_bytes
    rest = content[end:]
    return Contents(
        origin=origin,
        records=content[HEADER_BYTES:end],
        torn_bytes=len(rest),
        # A kill cuts off less than a step, and after a power cut there may be zeros for what was not yet on
        # the disk.
        damaged=len(rest) >= origin.step_bytes and any(rest),
    )


def refuse_damaged(contents: Contents, path: Path) -> None:
    """Raises `UserError` if steps that were done cannot be read: what is made of the others would pass for
    the run's last weights."""
    if contents.damaged:
        raise UserError(
            str(path),
            f"is damaged behind step {contents.end_step}",
            "restore it, or take those steps again with 'lspzo-bench run --resume'",
        )


def damaged_copy(path: Path) -> Path:
    """Where `UpdateLog.reopen` keeps a damaged log as it was."""
    return path.with_name(f"{path.name}.damaged")


def check_belongs(contents: Contents, job: Job, settings: MezoSettings, path: Path) -> None:
    """Raises `UserError` if the log is that of another run."""
    origin = contents.origin
    if origin.seed != job.seed % 2**64 or origin.run_sha256 not in _digests(job, settings):
        raise UserError(
            str(path),
            "belongs to another job or to other settings",
            "put the log of this run back, or start anew with another --out",
        )


def cannot_write(path: Path, error: Exception) -> UserError:
    return unwritable(path, error, GO_ON)


def _is_sound(record: bytes, header_crc: int, draw: int) -> bool:
    if len(record) < RECORD_BYTES or int.from_bytes(record[:4], "little") != draw:
        return False
    return zlib.crc32(record[: _RECORD.size], header_crc) == _crc_of(record)


def _crc_of(packed: bytes) -> int:
    """The checksum that a header or a record ends with."""
    return int.from_bytes(packed[-_CRC.size :], "little")


def _open_locked(path: Path) -> FileIO:
    try:
        file = FileIO(path, "a+")
    except OSError as error:
        raise cannot_write(path, error) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            str(path), "another process is training into this folder", "wait for it or stop it first"
        ) from None
    except OSError:
        pass  # a file system without locks: then it is up to the user
    return file
