"""Every reader of a file from elsewhere, with sound files of its kind and what a seed makes of them.

`python tests/support/fuzzed_readers.py MINUTES [READER...]` tries seed after seed of each in turn, outside
the suite, and goes on after what a reader should not raise. It prints a line of JSON for each reader: how
many files there were, and the first seed of each kind of failure. It ends with 1 if there was one.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import secrets
import signal
import sys
import time
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mutations import as_json, as_toml, change_bytes, change_value
from safetensors.torch import save_file
from tiny_tokenizer import write_tokenizer

from engines.base import Update
from engines.errors import UserError
from engines.files.checksums import check_sums
from harness.cli.job_flags import JobFlags
from harness.data.examples import read_examples
from harness.models.blueprint import make_blueprint
from harness.models.closed_forms import CLOSED_FORMS
from harness.models.configs import NAMED_SHAPES, load_config
from harness.models.tokenizers import load_tokenizer
from harness.records.job import DataSource, Job, ModelSource, load_job
from harness.records.manifest import check_manifest
from harness.records.run import encode_run, load_run
from harness.resolve import resolve_shape
from harness.runs.launch import read_result
from harness.training.update_log import LogOrigin, encode_header, encode_record, read_update_log
from profiles.catalog import find_profile
from profiles.display.tables import machine_table
from profiles.documents import to_json
from profiles.machine import load_machine
from profiles.planning.plan import load_plans
from reports.criteria import init_text, load_criteria
from run_records import make_machine, make_sweep
from tiny_families import FAMILIES

ROOT = Path(__file__).parents[2]
CASES = 25
"""Files of a seed."""
MOST_SECONDS = 20
"""Of the processor for one file: what takes longer hangs, and what waits for ten times as long."""
MOST_MEMORY_BYTES = 16 * 2**30


@dataclass(frozen=True)
class Reader:
    file: str
    read: Callable[[Path], Any]
    sound: tuple[bytes, ...]
    form: str = "json"
    """`json`, `toml`, `bytes` or `safetensors`."""
    seeds: int = 50
    """Of the ordinary run."""
    beside: tuple[tuple[str, bytes], ...] = ()
    """Other files of its folder, which stay sound."""


def _flags(path: Path) -> Any:
    job = JobFlags({"job_file": path}).job(["zo2", "lsp"])
    return resolve_shape(job) if job.model.name in NAMED_SHAPES and job.data.train == "random" else job


def _config(path: Path) -> Any:
    job = JobFlags({"model": str(path.parent), "random_weights": True, "data": "random"}).job([])
    if load_config(job.model)["model_type"] not in CLOSED_FORMS:
        return None  # built by transformers: tests/harness/models
    return resolve_shape(job)


def _job(folder: Path, **model: Any) -> Job:
    return Job(model=ModelSource(name=str(folder), **model), data=DataSource(train="builtin"), seq_len=16)


def _family(path: Path) -> Any:
    """A configuration that transformers builds."""
    job = _job(path.parent, random_weights=True)
    return make_blueprint(job, resolve_shape(job))


def _tokenizer(path: Path) -> Any:
    found = load_tokenizer(ModelSource(name=str(path.parent), random_weights=True), 300)
    ids = found.encode(["a film", "", "b"])
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with suppress(ValueError):  # the template refuses them, by rule
        found.render_chat(chat, opens_answer=False)
    return found.decode(ids[0]), found.show(ids[0]), found.encode_places(["a b"])


def _weights(path: Path) -> Any:
    """All of a model folder, with its weights read."""
    job = _job(path.parent)
    blueprint = make_blueprint(job, resolve_shape(job))
    for name, shape in blueprint.parameter_shapes.items():
        blueprint.fill(name, torch.empty(shape))


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


TINY = {
    **NAMED_SHAPES["tiny-llama"].config, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300,
}  # fmt: skip


@cache
def model_files() -> dict[str, bytes]:
    """A model folder that is sound: one file of weights, the same in two with their index, a tokenizer."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_bytes(as_json(TINY))
        job = _job(folder, random_weights=True)
        blueprint = make_blueprint(job, resolve_shape(job))
        weights = {each: torch.empty(shape) for each, shape in blueprint.parameter_shapes.items()}
        for each, tensor in weights.items():
            blueprint.fill(each, tensor)
        half = len(weights) // 2
        shards = {"1.safetensors": list(weights)[:half], "2.safetensors": list(weights)[half:]}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for shard, names in shards.items():
            save_file({each: weights[each] for each in names}, folder / shard, metadata={"format": "pt"})
        places = {each: shard for shard, names in shards.items() for each in names}
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_bytes(as_json(index))
        write_tokenizer(folder)
        about = json.loads((folder / "tokenizer_config.json").read_bytes())
        template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        (folder / "tokenizer_config.json").write_bytes(as_json({**about, "chat_template": template}))
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def _model_readers() -> dict[str, Reader]:
    files = model_files()
    families = tuple(
        as_json({"model_type": family, **config})
        for family, config in FAMILIES.items()
        if family not in CLOSED_FORMS
    )

    def of(
        file: str, read: Callable[[Path], Any], *beside: str, form: str = "json", seeds: int = 2
    ) -> Reader:
        return Reader(file, read, (files[file],), form, seeds, tuple((each, files[each]) for each in beside))

    index, tokenizer, about = "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"
    return {
        "family": Reader("config.json", _family, families, seeds=2),
        "model": of("config.json", _weights, "model.safetensors"),
        "weights": of("model.safetensors", _weights, "config.json", form="safetensors", seeds=4),
        "index": of(index, _weights, "config.json", "1.safetensors", "2.safetensors", seeds=4),
        "tokenizer": of(tokenizer, _tokenizer, "config.json", about, seeds=4),
        "about the tokenizer": of(about, _tokenizer, "config.json", tokenizer, seeds=4),
    }


@cache
def readers() -> dict[str, Reader]:
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
        **_model_readers(),
    }


def cases(reader: Reader, seed: int) -> list[bytes]:
    """The files that a seed makes."""
    draw = random.Random(seed)
    made = []
    for _ in range(CASES):
        content = draw.choice(reader.sound)
        if reader.form != "bytes" and draw.random() < 0.7:
            content = _changed(content, reader.form, draw)
        if reader.form == "bytes" or draw.random() < 0.5:
            content = change_bytes(content, draw)
        made.append(content)
    return made


def _changed(content: bytes, form: str, draw: random.Random) -> bytes:
    """The document in it made unsound, and said in its form."""
    if form == "toml":
        return as_toml(change_value(tomllib.loads(content.decode()), draw))
    if form == "json":
        return as_json(change_value(json.loads(content), draw))
    size = int.from_bytes(content[:8], "little")
    header = as_json(change_value(json.loads(content[8 : 8 + size]), draw))
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


class Hangs(BaseException):
    """Raised in what takes too long."""


def try_seed(reader: Reader, seed: int, folder: Path) -> Iterator[tuple[bytes, BaseException]]:
    """What a seed's files make a reader raise that is not one line of a `UserError`."""
    for name, content in reader.beside:
        (folder / name).write_bytes(content)
    for content in cases(reader, seed):
        (folder / reader.file).write_bytes(content)
        try:
            with _no_longer_than(MOST_SECONDS), warnings.catch_warnings(action="ignore"):
                reader.read(folder / reader.file)
        except UserError as error:
            if not str(error).isprintable():
                yield content, error
        except (Exception, Hangs) as error:
            yield content, error


@contextmanager
def _no_longer_than(seconds: int) -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise Hangs

    timers = {signal.ITIMER_PROF: seconds, signal.ITIMER_REAL: 10 * seconds}
    before = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    for timer, limit_s in timers.items():
        signal.setitimer(timer, limit_s)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_ours(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(str(ROOT)) and "site-packages" not in frame.filename


def own_folder() -> TemporaryDirectory[str]:
    memory = Path("/dev/shm")
    return TemporaryDirectory(dir=memory if memory.is_dir() else None)


def main(minutes: float, names: list[str]) -> int:
    """Each reader gets the same time."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
    torch.set_num_threads(1)
    logging.disable()
    num_failures = 0
    for name in names:
        reader, end = readers()[name], time.monotonic() + minutes * 60 / len(names)
        found: dict[str, int] = {}
        seeds = 0
        with own_folder() as folder:
            while time.monotonic() < end:
                seeds, seed = seeds + 1, secrets.randbits(63)
                for content, error in try_seed(reader, seed, Path(folder)):
                    ours = [each for each in traceback.extract_tb(error.__traceback__) if _is_ours(each)]
                    kind = f"{type(error).__name__} {Path(ours[-1].filename).name}:{ours[-1].lineno}"
                    if kind not in found:
                        found[kind] = seed
                        sys.stderr.write(f"{name} {seed}: {content[:1500]!r}\n")
                        traceback.print_exception(error, limit=-12)
        told = {"reader": name, "files": seeds * CASES, "failures": found}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        num_failures += len(found)
    return int(num_failures > 0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main(float(sys.argv[1]), sys.argv[2:] or list(readers())))
