from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.errors import UserError
from harness.models.configs import named_shape
from harness.records.run import Run
from harness.records.shape import save_shape
from reports.criteria import init_text
from reports.judging.untried import untried_of
from reports.load import load_folder, refuse_unlike
from run_records import (
    make_environment,
    make_machine,
    make_plan,
    make_run,
    make_sweep,
    make_test_job,
    save_run,
    sha256_of,
    write_folder,
)


def test_a_whole_folder_comes_back(tmp_path: Path) -> None:
    runs = make_sweep()
    plans = [make_plan("zo2"), make_plan("native")]
    write_folder(
        tmp_path / "out", runs, machine=make_machine(), plans=plans, criteria=init_text(), job=make_test_job()
    )
    loaded = load_folder(tmp_path / "out")
    assert loaded.name == "out"
    assert loaded.machine == make_machine()
    assert loaded.job == make_test_job()
    assert [plan.engine for plan in loaded.plans] == ["native", "zo2"]
    assert sorted(loaded.runs, key=lambda run: run.id) == sorted(runs, key=lambda run: run.id)
    assert [run.id for run in loaded.runs][:3] == ["native-r1", "native-r2", "torchao-offload-r1"]
    assert loaded.broken == ()
    assert loaded.criteria is not None
    assert loaded.criteria.sha256 == sha256_of(init_text())


def test_runs_alone_are_enough(tmp_path: Path) -> None:
    for run in make_sweep():
        save_run(run, tmp_path / "runs" / f"{run.id}.json")
    loaded = load_folder(tmp_path)
    assert loaded.machine is None
    assert loaded.criteria is None
    assert loaded.job == make_test_job()
    assert [plan.engine for plan in loaded.plans] == ["native", "torchao-offload", "lsp", "mezo", "zo2"]


def test_broken_files_become_lines(tmp_path: Path) -> None:
    write_folder(tmp_path, make_sweep())
    runs = tmp_path / "runs"
    good = json.loads((runs / "zo2-r1.json").read_text())
    (runs / "half.json").write_text('{"schema_version": 1, "id": "ha')
    (runs / "future.json").write_text(json.dumps(good | {"schema_version": 99}))
    (runs / "copy.json").write_text(json.dumps(good))
    (runs / "job.json").write_text(json.dumps(good | {"id": "other", "job": good["job"] | {"steps": -1}}))
    (runs / "nan.json").write_text(
        json.dumps(
            good | {"id": "n", "samples": [{"step": 0, "warmup": False, "step_s": float("nan"), "loss": 1.0}]}
        )
    )
    (runs / "minus.json").write_text(
        json.dumps(good | {"id": "m", "summary": good["summary"] | {"peak_host_bytes": -5}})
    )
    (runs / "engine.json").write_text(json.dumps(good | {"id": "e", "engine": "zo9"}))
    (runs / ".zo2-r9.json.tmp.json").write_text("left by a killed writer")
    (tmp_path / "machine.json").write_text("[]")
    (tmp_path / "plans.json").write_text('{"plans": [{"engine": "zo2"}], "schema_version": 1}')
    (tmp_path / "job.toml").write_text("batch_size = 'many'")
    loaded = load_folder(tmp_path)
    # Of two files with one id the first by name is kept.
    assert len(loaded.runs) == len(make_sweep())
    reasons = {broken.file: broken.reason for broken in loaded.broken}
    assert set(reasons) == {
        "runs/half.json", "runs/future.json", "runs/zo2-r1.json", "runs/job.json", "runs/nan.json",
        "runs/minus.json", "runs/engine.json", "machine.json", "plans.json", "job.toml",
    }  # fmt: skip
    assert "not valid JSON" in reasons["runs/half.json"]
    assert "schema version 99" in reasons["runs/future.json"]
    assert "id 'zo2-r1' of another file" in reasons["runs/zo2-r1.json"]
    assert "steps must be positive" in reasons["runs/job.json"]
    assert "step_s is not a finite number" in reasons["runs/nan.json"]
    assert "peak_host_bytes is negative" in reasons["runs/minus.json"]
    assert "its engine 'zo9' is none that this version knows" in reasons["runs/engine.json"]
    assert "settings" in reasons["plans.json"]
    assert str(tmp_path) not in " ".join(reasons.values())


def test_a_job_file_that_is_of_another_job_is_left_out(tmp_path: Path) -> None:
    """As after an edit: what is told is what ran. Settings of methods, the seed and the time limit may be
    other ones."""
    changed = replace(make_test_job(), batch_size=7, seed=5)
    write_folder(tmp_path, make_sweep(), job=changed)
    loaded = load_folder(tmp_path)
    assert loaded.job == make_test_job()
    (broken,) = loaded.broken
    told = f"it is not the job of the runs: batch_size is 7 and was {make_test_job().batch_size}"
    assert (broken.file, broken.reason) == ("job.toml", told)
    again = replace(make_test_job(), seed=5)
    write_folder(tmp_path, make_sweep(), job=again)
    loaded = load_folder(tmp_path)
    assert (loaded.job, loaded.broken) == (again, ())


def test_a_landed_share_that_rounding_brought_below_zero_costs_no_run(tmp_path: Path) -> None:
    loaded = load_folder(write_folder(tmp_path, [make_run("zo2", landed_share=-1e-4)]))
    assert (len(loaded.runs), loaded.broken) == (1, ())


def test_folders_without_anything_to_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_folder(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no runs.*lspzo-bench compare"):
        load_folder(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text("{")
    with pytest.raises(
        UserError, match=r"none of its 1 run files can be read \(runs/a.json is not valid JSON"
    ):
        load_folder(tmp_path)
    write_folder(tmp_path / "good", [make_run()], criteria="schema_version = ")
    with pytest.raises(UserError, match="not valid TOML"):
        load_folder(tmp_path / "good")


def test_a_folder_of_a_suite_is_told_which_to_name(tmp_path: Path) -> None:
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews/study.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds no runs .*name one of the folders in it, such as .*/reviews"):
        load_folder(tmp_path)


def test_runs_that_may_not_be_read_are_not_told_as_none(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to("runs")  # a loop: what even root cannot list
    with pytest.raises(UserError, match=r"runs: this folder cannot be read \(.*\); make it readable"):
        load_folder(tmp_path)


def in_job(**changes: Any) -> Run:
    return make_run("lsp", job=make_test_job(**changes))


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (make_run("lsp", environment=make_environment(gpu_name="NVIDIA H200")), "GPU is"),
        (make_run("lsp", environment=make_environment(gpu_name=None)), "GPU is"),
        (make_run("lsp", environment=make_environment(gpu_driver="1")), "GPU driver"),
        (make_run("lsp", environment=make_environment(torch="2.11.0")), "torch"),
        (make_run("lsp", environment=make_environment(emulated="laptop")), "emulated machine"),
        (make_run("lsp", environment=make_environment(cpu="other")), "CPU"),
        (in_job(model={"name": "opt-125m", "random_weights": True}), "job.model.name"),
        (in_job(model={"name": "opt-1.3b"}), "job.model.random_weights"),
        (in_job(data={"train": "random"}), "job.data.train"),
        (in_job(dtype="fp32"), "job.dtype"),
        (in_job(seq_len=256), "job.seq_len"),
        (in_job(batch_size=4), "job.batch_size"),
        (in_job(accumulation=2), "job.accumulation"),
        (in_job(steps=9), "job.steps"),
        (in_job(limits={"vram_bytes": 10**9}), "job.limits.vram_bytes"),
        (
            make_run("zo2", round=2, plan=make_plan("zo2", settings={"resident_blocks": 3})),
            "zo2.resident_blocks",
        ),
    ],
)
def test_unlike_runs_are_refused_by_field(tmp_path: Path, other: Run, field: str) -> None:
    write_folder(tmp_path, [make_run(), other])
    with pytest.raises(UserError) as caught:
        load_folder(tmp_path)
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_may_differ_between_runs() -> None:
    blind = make_environment(gpu_name=None, gpu_driver=None, torch=None, transformers=None)
    refuse_unlike(
        [
            make_run(),
            make_run("mezo", end_state="not_available", environment=blind),
            in_job(seed=7, limits={"timeout_s": 60, "vram_bytes": 24 * 10**9}),
            replace(make_run("native"), environment=make_environment(commit="e" * 40)),
        ]
    )


def test_sizes_of_the_model_beside_the_runs_are_planned_with(tmp_path: Path) -> None:
    """Those of a folder of the user's own, too: by its name alone nothing could be said of it."""
    own = make_test_job(model={"name": "own-model"})
    runs = [make_run("zo2", job=own)]
    folder = write_folder(tmp_path / "sweep", runs, machine=make_machine(), job=own)
    assert untried_of(load_folder(folder)).yardstick_is_out is None
    save_shape(named_shape("opt-30b"), folder / "model.json")
    loaded = load_folder(folder)
    assert loaded.shape is not None
    assert "GPU memory" in (untried_of(loaded).yardstick_is_out or "")
    (folder / "model.json").write_text("{")
    broken = load_folder(folder)
    assert broken.shape is None
    assert [one.file for one in broken.broken] == ["model.json"]
