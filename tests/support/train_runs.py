"""Runs of `lspzo-bench run` for tests: tiny, in this process or in one of its own that can be killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from settings_given import given_settings
from torch import Tensor

from engines import load_engine
from harness.progress import Progress
from harness.records.job import Job, make_job
from harness.training.train import train

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, dict[str, Any]] = {
    "native": {"learning_rate": 3e-3},
    "lsp": {"learning_rate": 3e-3, "d": 16, "learn_steps": 5},
    "exact-offload": {"learning_rate": 3e-3},
    "mezo": {"learning_rate": 1e-5},
    "zo2": {"learning_rate": 1e-5},
}


def tiny_job(name: str = "tiny-llama", **fields: Any) -> Job:
    values: dict[str, Any] = {
        "model": {"name": name, "random_weights": True},
        "batch_size": 4,
        "seq_len": 32,
        "dtype": "fp32",
        "steps": 6,
        "warmup_steps": 0,
    }
    return make_job(values | fields, "test job")


def run(
    out: Path,
    engine: str = "native",
    job: Job | None = None,
    save_every: int = 0,
    resume: bool = False,
    **more: Any,
) -> Path:
    settings = given_settings(engine, SETTINGS.get(engine, {}) | more)
    progress = Progress(quiet=True)
    return train(
        job or tiny_job(), engine, settings, out, save_every=save_every, resume=resume, progress=progress
    )


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


class Killed(BaseException):
    """Ends training as abruptly as an exception can."""


def die_at(monkeypatch: pytest.MonkeyPatch, engine: str, step: int) -> None:
    """The engine's step number `step`, counted from 0 in this process, does not come back."""
    cls = load_engine(engine)
    original, calls = cls.step, [0]

    def dying(self: Any, batches: Any) -> Any:
        if calls[0] == step:
            raise Killed
        calls[0] += 1
        return original(self, batches)

    monkeypatch.setattr(cls, "step", dying)


LONG = (
    "run", "--engine", "lsp", "--model", "tiny-llama", "--random-weights", "--dtype", "fp32",
    "--batch-size", "4", "--seq-len", "32", "--steps", "24", "--save-every", "4", "--set", "lsp.d=16",
    "--set", "learning_rate=1e-3", "--set", "learn_steps=5", "--eval-batches", "1",
)  # fmt: skip


def start_program(*arguments: str) -> subprocess.Popen[str]:
    """`lspzo-bench` with these arguments, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "harness", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    return start_program(*LONG, "--out", str(out), *more)


def stop_after(process: subprocess.Popen[str], out: Path, lines: int, number: int) -> None:
    """Send the signal once the log has that many lines."""
    log = out / "log.jsonl"
    deadline = time.monotonic() + 150
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count("\n") >= lines:
            process.send_signal(number)
            return
        time.sleep(0.005)
    raise AssertionError(process.communicate())


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err
