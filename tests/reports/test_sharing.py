"""`submit`: a record as one small file, without paths or names, and what no hardware can do is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engines.errors import UserError
from harness.cli.app import app
from harness.sharing.reading import check, load_submission, shared_results
from harness.sharing.shared_result import SharedMachine
from profiles.documents import to_json
from reports.load import load_folder
from reports.sharing.submission import submission_of
from run_records import (
    cpu_runs,
    emulated_run,
    make_machine,
    make_run,
    make_sweep,
    make_test_job,
    write_folder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "sweep", make_sweep(), machine=make_machine())


def test_it_is_shown_then_written_and_read_back(folder: Path, tmp_path: Path) -> None:
    arguments = ["submit", str(folder), "--to", str(tmp_path / "community")]
    refused = CliRunner().invoke(app, arguments, input="n\n")
    assert '"engine": "native"' in refused.stdout
    assert not (tmp_path / "community").exists()
    done = CliRunner().invoke(app, [*arguments, "--yes"])
    assert done.exit_code == 0, done.output
    path = Path(done.stdout.splitlines()[-1])
    assert path.parent.name == "rtx-4090-24gib_ryzen-9-7950x-16c_119gib"
    found = load_submission(path)
    assert shared_results(tmp_path / "community") == ((path, found),)
    assert [method.engine for method in found.methods][:2] == ["native", "torchao-offload"]
    assert found.methods[0].step_s == pytest.approx((0.505, 0.51))


def test_nobody_there_to_answer_is_a_no(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sweep", make_sweep(), machine=make_machine())
    done = CliRunner().invoke(app, ["submit", str(folder), "--to", str(tmp_path / "community")], input="")
    assert isinstance(done.exception, UserError)
    assert "nothing was written" in str(done.exception)
    assert not (tmp_path / "community").exists()


def test_nothing_of_the_user_is_in_it(tmp_path: Path) -> None:
    job = make_test_job(model={"name": "/home/someone/secret-model"}, data={"train": "/home/someone/a.tsv"})
    run = make_run("native", job=job)
    text = to_json(submission_of(load_folder(write_folder(tmp_path / "x", [run], job=job))))
    for word in ("someone", "secret", "/", "tsv"):
        assert word not in text
    values = json.loads(text)
    assert (values["model"], values["data"]) == ("own model", "own")


@pytest.mark.parametrize(
    ("names", "slug"),
    [
        (("NVIDIA H200", "Intel(R) Xeon(R) Platinum 8480+"), "h200-24gib_xeon-platinum-8480-8c_119gib"),
        (("NVIDIA GeForce RTX 3060", "AMD Ryzen 5 5600X 6-Core Processor"),
         "rtx-3060-24gib_ryzen-5-5600x-6-core-8c_119gib"),
        ((None, "AMD EPYC"), "no-gpu_epyc-8c_119gib"),
        ((None, "///"), "no-gpu_unnamed-8c_119gib"),
    ],
)  # fmt: skip
def test_one_spelling_for_a_machine(names: tuple[str | None, str], slug: str) -> None:
    gpu, cpu = names
    machine = SharedMachine(
        gpu=gpu, gpu_memory_bytes=24 * 2**30 if gpu else None, link=None, cpu=cpu, cores=8,
        host_memory_bytes=119 * 2**30,
    )  # fmt: skip
    assert machine.slug == slug


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"step_s": (1e-5,)}, "shorter than"),
        ({"step_s": (-1.0,)}, "0 or less"),
        ({"gpu_bytes": 10**12}, "of a GPU of"),
        ({"gpu_bytes": 10**6}, "where tensors alone take more"),
        ({"host_bytes": 10**15}, "of memory"),
        ({"tokens_per_s": 1e9}, "more tokens per second"),
        ({"runs": 1, "step_s": (0.5, 0.5)}, "more medians than runs"),
        ({"engine": "magic"}, "does not know"),
        ({"settings": {"x": "/home/someone"}}, "no name of a machine"),
    ],
)
def test_what_no_hardware_can_do_is_refused(changes: dict[str, Any], why: str, folder: Path) -> None:
    found = submission_of(load_folder(folder))
    check(found, "x")
    bad = replace(found, methods=(replace(found.methods[0], **changes),))
    with pytest.raises(UserError, match=why):
        check(bad, "x")


def test_a_hostile_file_is_one_line(folder: Path, tmp_path: Path) -> None:
    found = submission_of(load_folder(folder))
    values = json.loads(to_json(found))
    path = tmp_path / "a.json"
    for change in ({"model": "<script>"}, {"extra": 1}, {"schema_version": 9}, {"methods": 3}):
        path.write_text(json.dumps(values | change))
        with pytest.raises(UserError) as caught:
            load_submission(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "runs", [[emulated_run("native")], [replace(make_run("native"), traced=True)],
             [make_run("native", end_state="crash")]],
)  # fmt: skip
def test_what_says_nothing_of_its_machine_is_refused(runs: list[Any], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        submission_of(load_folder(write_folder(tmp_path / "x", runs)))


def test_a_machine_without_a_gpu(tmp_path: Path) -> None:
    job = make_test_job(limits={}, eval_batches=2)
    found = submission_of(load_folder(write_folder(tmp_path / "cpu", cpu_runs(), job=job)))
    check(found, "x")
    assert found.machine.slug.startswith("no-gpu_")
