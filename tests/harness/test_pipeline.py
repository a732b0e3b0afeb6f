"""The line's own pieces: commands that a person can paste."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import pytest

from harness.cli import app
from harness.pipeline import job_arguments
from harness.records.job import Job, make_job

MODEL = {"name": "tiny-llama", "random_weights": True}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model": {"name": "my models/llama 1", "untied": True, "head": "classification"}},
        {"model": {**MODEL, "layers": 2}},
        {"data": {"train": "my reviews.tsv", "evaluate": "held out.tsv"}, "eval_batches": 3},
        {"batch_size": 3, "seq_len": 48, "accumulation": 2, "dtype": "fp32", "checkpointing": False},
        {"steps": 7, "warmup_steps": 0, "seed": 5},
        {"limits": {"vram_bytes": 24 * 10**9 + 1, "host_bytes": 2**33, "timeout_s": 12.5}},
        {"settings": {"lsp": {"d": 16, "projector": "paper"}, "zo2": {"eps": 0.01}}},
    ],
)
def test_the_flags_of_a_job_give_that_job(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    seen: list[Job] = []
    monkeypatch.setattr("harness.cli.compare.prepare", lambda job, *_, **__: seen.append(job))
    monkeypatch.setattr("harness.cli.compare.planned_cells", lambda *_: [])
    job = make_job({"model": MODEL, **fields}, "test job")
    arguments = shlex.split(job_arguments(job))
    monkeypatch.setattr(sys, "argv", ["lspzo-bench", "compare", *arguments, "--dry-run", "--out", "unused"])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code
    assert seen == [job]
