"""The line itself: what is checked when, what is planned, and commands that a person can paste."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_machine import make_machine

from engines.errors import UserError
from harness.cli import app
from harness.data.tokenized import load_tokenized
from harness.job_arguments import job_arguments
from harness.pipeline import (
    Sweep,
    measure_plans,
    plan_job,
    planned_cells,
    prepare,
    training_settings,
)  # fmt: skip
from harness.records.job import DataSource, Job, make_job
from harness.records.shape import load_shape
from harness.records.upgrades import load_upgrades
from harness.resolve import resolve_shape
from profiles.machine import Machine, load_machine, save_machine

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
        {"data": {"train": "r.tsv", "columns": {"text": "the review", "label": "stars"}, "strict": True}},
        {"data": {"train": "r.tsv", "template": "{text} It\\nwas", "labels": ["very bad", "good"]}},
        {"data": {"train": "r.tsv", "skip_bad": True}, "padding": "longest"},
        {"limits": {"gpus": 2, "nodes": 3}, "accumulation": 6},
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


def sweep_of(out: Path, **fields: Any) -> Sweep:
    return Sweep(**{"engines": ["native", "mezo"], "out": out, "check_criteria": lambda path: None, **fields})


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A machine without a GPU is found wherever one is probed; an entry for each time."""
    probes: list[bool] = []

    def launch_probe(*, quiet: bool) -> Machine:
        probes.append(quiet)
        return make_machine(gpu=False)

    monkeypatch.setattr("harness.pipeline.launch_probe", launch_probe)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    return probes


SMALL = {"model": MODEL, "seq_len": 32, "batch_size": 2, "dtype": "fp32", "data": {"train": "random"}}


def test_everything_is_ready_before_anything_is_written(tmp_path: Path, probed: list[bool]) -> None:
    job, sweep = make_job(SMALL, "test job"), sweep_of(tmp_path / "out", rounds=3)
    ready = prepare(job, sweep)
    assert probed == [False]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "a GPU that torch cannot use is hidden"
    assert ready.job == job
    assert {plan.engine for plan in ready.plans} == {"native", "mezo"}
    assert (ready.emulated, ready.in_use, ready.save_data) == (None, False, None)
    cells = planned_cells(ready, sweep)
    assert sorted(cell.plan.engine for cell in cells) == ["mezo"] * 3 + ["native"] * 3
    assert not sweep.out.exists()


def test_a_machine_that_was_saved_is_not_measured_again(tmp_path: Path, probed: list[bool]) -> None:
    known = replace(make_machine(gpu=False), name="of before")
    (tmp_path / "out").mkdir()
    save_machine(known, tmp_path / "out" / "machine.json")
    ready = prepare(make_job(SMALL, "test job"), sweep_of(tmp_path / "out", resume=True))
    assert ready.machine == known
    assert probed == []


@pytest.mark.parametrize(
    ("fields", "sweep", "said"),
    [
        ({}, {"emulate": Path("t4"), "profile": Path("t4")}, "--emulate names the machine already"),
        ({}, {"profile": Path("nowhere.json")}, "nowhere.json"),
        ({"data": {"train": "nowhere.tsv"}}, {}, "nowhere.tsv"),
        ({"model": {"name": "no-such-shape", "random_weights": True}}, {}, "no-such-shape"),
    ],
)
def test_what_is_wrong_is_said_before_the_machine_is_measured(
    tmp_path: Path, probed: list[bool], fields: dict[str, Any], sweep: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        prepare(make_job({**SMALL, **fields}, "test job"), sweep_of(tmp_path / "out", **sweep))
    assert probed == []


def test_criteria_that_are_none_are_said_before_the_machine_is_measured(
    tmp_path: Path, probed: list[bool]
) -> None:
    (tmp_path / "out").mkdir()
    kept, named = tmp_path / "out" / "criteria.toml", tmp_path / "mine.toml"
    kept.touch()
    read: list[Path] = []

    def check(path: Path) -> None:
        read.append(path)
        if path == kept:
            raise UserError(str(path), "is none", "write one")

    with pytest.raises(UserError, match="is none"):
        prepare(make_job(SMALL, "test job"), sweep_of(tmp_path / "out", criteria=named, check_criteria=check))
    assert read == [named, kept]
    assert probed == []


def test_without_a_gpu_another_job_takes_its_place(tmp_path: Path, probed: list[bool]) -> None:
    wanted, small = make_job({**SMALL, "seq_len": 64}, "test job"), make_job(SMALL, "test job")
    assert prepare(wanted, sweep_of(tmp_path / "a"), without_gpu=small).job == small
    save_machine(make_machine(gpu=False), tmp_path / "named.json")
    named = sweep_of(tmp_path / "b", profile=tmp_path / "named.json")
    assert prepare(wanted, named, without_gpu=small).job == wanted, (
        "a machine that is named is taken as it is"
    )


def test_each_plan_tells_the_command_that_gives_it(tmp_path: Path) -> None:
    job = make_job({**SMALL, "settings": {"mezo": {"eps": 0.01}, "native": {"beta1": 0.8}}}, "test job")
    plans = plan_job(job, resolve_shape(job), make_machine(gpu=False), ["native", "mezo"])
    for plan in plans:
        (other,) = {"native", "mezo"} - {plan.engine}
        assert f"--set {plan.engine}." in plan.verify_command
        assert f"--set {other}." not in plan.verify_command


def test_what_was_set_is_trained_with_and_the_rest_is_planned(tmp_path: Path) -> None:
    save_machine(make_machine(gpu=True), tmp_path / "machine.json")
    job = make_job({**SMALL, "settings": {"zo2": {"eps": 0.02, "base": "int8"}}}, "test job")
    alone = training_settings(job, "zo2", None)
    assert (alone["eps"], alone["fold_every"]) == (0.02, 8), "how often is the loss's matter on every machine"
    planned = training_settings(job, "zo2", tmp_path / "machine.json")
    assert (planned["eps"], planned["base"]) == (0.02, "int8")
    assert "resident_blocks" in planned
    assert "resident_blocks" not in alone


def test_a_plan_that_does_not_fit_is_not_trained_with(tmp_path: Path) -> None:
    save_machine(make_machine(gpu=True), tmp_path / "machine.json")
    job = make_job(
        {**SMALL, "model": {"name": "opt-13b", "random_weights": True}, "dtype": "bf16"}, "test job"
    )
    with pytest.raises(UserError, match="does not fit the machine"):
        training_settings(
            replace(job, limits=replace(job.limits, vram_bytes=10**9)), "native", tmp_path / "machine.json"
        )


def test_the_sweep_is_told_to_whoever_watches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, probed: list[bool]
) -> None:
    sweep = sweep_of(tmp_path / "out", rounds=2, trace=True)
    ready = prepare(make_job(SMALL, "test job"), sweep)
    seen: list[Any] = []

    def pretend(*given: Any, on_event: Any, before_first: Any, data_file: Any) -> list[Any]:
        seen.extend(given)
        before_first()
        on_event("an event")
        assert data_file is None
        return []

    monkeypatch.setattr("harness.pipeline.run_sweep", pretend)
    measure_plans(ready, sweep, seen.append)
    job, shape, plans, out, options, event = seen
    assert (job, shape, plans, out, event) == (ready.job, ready.shape, ready.plans, sweep.out, "an event")
    assert (options.rounds, options.trace, options.resume) == (2, True, False)
    assert load_machine(out / "machine.json") == ready.machine
    assert load_shape(out / "model.json").parameters == ready.shape.parameters
    assert load_upgrades(out / "upgrades.json")[0].step_s.keys() >= {"native"}
