"""The program's own hot paths, timed by pytest-benchmark: `make benchmark`.

In an ordinary test run each is called once and only its result is checked. Engines are not timed here: the
harness measures them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engines.noise import tiles, visits, weight_pass
from harness.records.job import make_job
from harness.records.run import load_run
from harness.resolve import resolve_shape
from profiles.planning.recommend import recommend
from reports.load import load_folder
from reports.render import render_html, written
from run_records import make_machine, make_run, make_sweep, write_folder

ENGINES = ("native", "torchao-offload", "lsp", "mezo", "zo2")
NUM_RECORDS = 100


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    runs = [make_run("zo2", round=number) for number in range(1, NUM_RECORDS + 1)]
    return write_folder(folder, runs, machine=make_machine())


def test_rendering_a_report(benchmark: Any, tmp_path: Path) -> None:
    loaded = load_folder(write_folder(tmp_path / "sweep", make_sweep(), machine=make_machine()))
    html = benchmark(lambda: render_html(written(loaded, None)))
    assert "GO" in html


def test_loading_a_hundred_records(benchmark: Any, records: Path) -> None:
    paths = sorted((records / "runs").glob("*.json"))
    runs = benchmark(lambda: [load_run(path) for path in paths])
    assert len({run.id for run in runs}) == NUM_RECORDS


def test_reading_a_folder_of_a_hundred_records(benchmark: Any, records: Path) -> None:
    loaded = benchmark(load_folder, records)
    assert len(loaded.runs) == NUM_RECORDS
    assert not loaded.broken


def test_recommending_for_a_large_model(benchmark: Any) -> None:
    model = {"name": "opt-175b", "random_weights": True}
    job = make_job({"model": model, "batch_size": 1, "seq_len": 1024}, "benchmark")
    shape = resolve_shape(job)
    plans = benchmark(recommend, make_machine(), shape, job.workload, ENGINES, {})
    assert {plan.engine for plan in plans} == set(ENGINES)


def test_perturbing_on_the_cpu(benchmark: Any) -> None:
    weight = torch.zeros(1 << 18)
    out = torch.empty_like(weight)
    how = visits.Visit(seed=1, log=visits.DeviceUpdateLog(weight.device), first=0, last=0, step=2, eps=1.0)
    benchmark(weight_pass.visit, weight, tiles.one(3, weight.numel()), how, visits.Outputs(plus=out))
    assert abs(float(out.mean())) < 0.02
    assert abs(float(out.std()) - 1) < 0.02
