"""The line's own pieces: commands that a person can paste."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_machine import make_machine

from harness.cli import app
from harness.data.tokenized import load_tokenized
from harness.pipeline import Sweep, job_arguments, measure_plans, prepare
from harness.records.job import DataSource, Job, make_job
from profiles.machine import save_machine

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


def test_the_runs_of_a_sweep_read_its_data_from_one_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_machine(make_machine(gpu=False), tmp_path / "machine.json")
    seen: list[Path] = []

    def pretend(*_: Any, before_first: Any, data_file: Path, **__: Any) -> list[Any]:
        before_first()
        assert data_file.is_absolute()
        seen.append(data_file)
        assert load_tokenized(data_file).description.startswith("built-in reviews")
        return []

    monkeypatch.setattr("harness.pipeline.run_sweep", pretend)
    job = make_job({"model": MODEL, "seq_len": 32, "batch_size": 2, "dtype": "fp32"}, "test job")
    sweep = Sweep(
        engines=["native"], out=tmp_path / "out", profile=tmp_path / "machine.json",
        check_criteria=lambda path: None,
    )  # fmt: skip
    ready = prepare(job, sweep)
    assert not sweep.out.exists()
    measure_plans(ready, sweep, lambda event: None)
    assert len(seen) == 1
    assert not seen[0].parent.exists()
    drawn = prepare(replace(job, data=DataSource(train="random")), sweep)
    assert drawn.save_data is None
