"""Every reader of a file from elsewhere: what it makes of anything is a value or a `UserError`.

Each hypothesis example is a seed of `CASES` files. `LSPZO_FUZZ=N` multiplies their number; the ordinary run
makes about twenty thousand. To see one again: the seed and the bytes are in the failure.
"""

from __future__ import annotations

import json
import os
import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import as_json, as_toml, change_bytes, change_value

from engines.base import Update
from engines.errors import UserError
from engines.files.checksums import check_sums
from harness.cli.options import JobFlags
from harness.data.examples import read_examples
from harness.models.closed_forms import CLOSED_FORMS
from harness.models.configs import NAMED_SHAPES, load_config
from harness.records.job import DataSource, load_job
from harness.records.manifest import check_manifest
from harness.records.run import encode_run, load_run, save_run
from harness.resolve import resolve_shape
from harness.runs.launch import read_result
from harness.training.update_log import LogOrigin, encode_header, encode_record, read_update_log
from profiles.catalog import find_profile
from profiles.display.tables import machine_table
from profiles.machine import load_machine
from profiles.planning.plan import load_plans
from reports.criteria import init_text, load_criteria
from reports.load import load_folder
from reports.render import render_html, render_markdown, written
from run_records import make_machine, make_sweep

FUZZ = int(os.environ.get("LSPZO_FUZZ", "1"))
CASES = 25
"""Files of a seed."""


@dataclass(frozen=True)
class Reader:
    file: str
    read: Callable[[Path], Any]
    sound: tuple[bytes, ...]
    form: str = "json"
    """`json`, `toml` or `bytes`."""
    seeds: int = 50


def _flags(path: Path) -> Any:
    job = JobFlags({"job_file": path}).job(["zo2", "lsp"])
    return resolve_shape(job) if job.model.name in NAMED_SHAPES and job.data.train == "random" else job


def _config(path: Path) -> Any:
    job = JobFlags({"model": str(path.parent), "random_weights": True, "data": "random"}).job([])
    if load_config(job.model)["model_type"] not in CLOSED_FORMS:
        return None  # built by transformers: tests/harness/models
    return resolve_shape(job)


def _profile(path: Path) -> Any:
    machine = find_profile(path)
    return machine, machine_table(machine)


def _data(path: Path) -> Any:
    return read_examples(DataSource(train=str(path)))


def _log() -> bytes:
    header = encode_header(LogOrigin(seed=1, start_step=0, run_sha256=b"r" * 32, weights_sha256=b"w" * 32))
    crc = int.from_bytes(header[-4:], "little")
    updates = (Update(step=i, learning_rate=1e-6, projected_gradient=0.5, weight_decay=0.0) for i in range(6))
    return header + b"".join(encode_record(update, crc) for update in updates)


JOB = b"""
batch_size = 2
seq_len = 16
dtype = "fp32"
steps = 3
[model]
name = "tiny-opt"
random_weights = true
[data]
train = "random"
[limits]
timeout_s = 5.0
[settings.zo2]
eps = 0.01
"""
ROWS = b'{"text": "one", "label": 1}\n{"text": "two", "label": 0}\n'
RECORDS = b'[{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "output": "d"}]'
QUESTIONS = json.dumps(
    [{"question": "who?", "context": "he was", "answers": {"text": ["he"], "answer_start": [0]}}] * 2
).encode()


@cache
def readers() -> dict[str, Reader]:
    from profiles.documents import to_json

    runs = tuple(encode_run(run) for run in make_sweep()[:3])
    plans = json.dumps(
        {"plans": [json.loads(content)["plan"] for content in runs], "schema_version": 1}
    ).encode()
    configs = tuple(as_json(shape.config) for name, shape in NAMED_SHAPES.items() if name.startswith("tiny"))
    result = as_json({"end_state": "ok", "end_reason": None, "samples": [], "summary": {}})
    manifest = as_json(
        {"planned": ["a"], "documents": {"job.toml": "0" * 64}, "records": {"runs/a.json": "1" * 64},
         "program": "1", "commit": None, "dirty": None, "criteria_sha256": None, "schema_version": 1}
    )  # fmt: skip
    sums = ("0" * 64 + "  a\n" + "1" * 64 + "  b\n").encode()
    return {
        "record": Reader("run.json", load_run, runs, seeds=100),
        "plans": Reader("plans.json", load_plans, (plans,)),
        "machine": Reader("machine.json", load_machine, (to_json(make_machine()).encode(),)),
        "profile": Reader("machine.json", _profile, (to_json(make_machine()).encode(),)),
        "manifest": Reader("manifest.json", lambda path: check_manifest(path.parent), (manifest,)),
        "result": Reader("result.json", read_result, (result,)),
        "job": Reader("job.toml", load_job, (JOB,), "toml", seeds=100),
        "flags": Reader("job.toml", _flags, (JOB,), "toml"),
        "criteria": Reader("criteria.toml", load_criteria, (init_text().encode(),), "toml"),
        "configuration": Reader("config.json", _config, configs),
        "update log": Reader("updates.log", read_update_log, (_log(),), "bytes"),
        "checksums": Reader("SHA256SUMS", lambda path: check_sums(path.parent, "no"), (sums,), "bytes"),
        "rows": Reader("data.jsonl", _data, (ROWS,), "bytes"),
        "records": Reader("data.json", _data, (RECORDS, QUESTIONS), "json"),
        "table": Reader("data.tsv", _data, (b"text\tlabel\na\t1\nb\t0\n",), "bytes"),
        "text": Reader("data.txt", _data, (b"some text\n" * 20,), "bytes", seeds=10),
    }


def cases(reader: Reader, seed: int) -> list[bytes]:
    draw = random.Random(seed)
    made = []
    for _ in range(CASES):
        content = draw.choice(reader.sound)
        if reader.form != "bytes" and draw.random() < 0.7:
            loads = json.loads if reader.form == "json" else lambda each: tomllib.loads(each.decode())
            value = change_value(loads(content), draw)
            content = as_json(value) if reader.form == "json" else as_toml(value)
        if reader.form == "bytes" or draw.random() < 0.5:
            content = change_bytes(content, draw)
        made.append(content)
    return made


NAMES = ("record", "plans", "machine", "profile", "manifest", "result", "job", "flags", "criteria",
         "configuration", "update log", "checksums", "rows", "records", "table", "text")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_a_value_or_one_line(name: str) -> None:
    reader = readers()[name]
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        _fuzz(reader, Path(folder) / reader.file)


def _fuzz(reader: Reader, path: Path) -> None:
    @settings(
        max_examples=reader.seeds * FUZZ, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, 2**63))
    def check(seed: int) -> None:
        for content in cases(reader, seed):
            path.write_bytes(content)
            try:
                reader.read(path)
            except UserError as error:
                line = str(error)
                assert line.isprintable(), line
            except Exception as error:
                error.add_note(f"seed {seed}, content {content[:2000]!r}")
                raise

    check()


def test_the_names_are_those_of_all_readers() -> None:
    assert set(NAMES) == set(readers())
    assert sum(reader.seeds for reader in readers().values()) * CASES >= 20_000


@settings(
    max_examples=25 * FUZZ, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(seed=st.integers(0, 2**63))
def test_a_report_with_a_record_that_was_tampered_with(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whole reports: what the readers let through has to be told, too."""
    folder = tmp_path_factory.getbasetemp() / "fuzzed-report"
    runs = make_sweep()
    for run in runs:
        save_run(run, folder / "runs" / f"{run.id}.json")
    bad = folder / "runs" / f"{runs[-1].id}.json"
    draw = random.Random(seed)
    for _ in range(5):
        bad.write_bytes(as_json(change_value(json.loads(encode_run(runs[-1])), draw)))
        content = bad.read_bytes()
        try:
            loaded = load_folder(folder)
            told = written(loaded, None)
            render_markdown(told)
            render_html(told)
        except UserError as error:
            if "unlike" not in str(error):  # of another machine or job: refused, by rule
                raise
        except Exception as error:
            error.add_note(f"seed {seed}, content {content[:2000]!r}")
            raise
