from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from scripted_runs import SHAPE, scripted_job, scripted_plan

import harness.runs.attempt
from engines.errors import UserError
from engines.files.writing import is_leftover
from harness.records.environment import read_environment
from harness.records.job import Job, Limits, load_job, save_job
from harness.records.manifest import MANIFEST, check_manifest
from harness.records.run import EndState, Run, Summary, load_run
from harness.runs.events import Stepped
from harness.runs.launch import Outcome
from harness.runs.sweep import (
    Ended,
    Planned,
    Started,
    SweepEvent,
    SweepOptions,
    grid,
    late_runs,
    missing,
    run_sweep,
)
from harness.runs.worker import Request
from profiles.language import speaking, translated
from profiles.planning.plan import Plan, load_plans
from profiles.system.gpu_allocator import EXPANDABLE
from run_records import save_run

JOB = scripted_job()
A, B = scripted_plan(step_s=0.25), scripted_plan(step_s=0.5)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the runs that would have been launched; nothing is started, every run ends ok."""
    ids: list[str] = []

    def pretend(request: Request, out: Path, **_: Any) -> Outcome:
        ids.append(request.id)
        return Outcome(end_state="ok", end_reason=None, samples=(), summary=Summary(), by_user=False)

    monkeypatch.setattr(harness.runs.attempt, "launch_child", pretend)
    return ids


def run_ids(job: Job, plans: list[Plan], rounds: int) -> list[str]:
    return [cell.id for cell in grid(job, plans, rounds)]


def test_rounds_are_interleaved() -> None:
    cells = grid(JOB, [A, B], 3)
    assert [(cell.plan, cell.round) for cell in cells] == [(A, 1), (B, 1), (B, 2), (A, 2), (A, 3), (B, 3)]
    assert cells[0].id == cells[3].id.replace("-r2", "-r1")
    assert len({cell.id for cell in cells}) == 6
    assert all(cell.id.startswith("scripted-") and len(cell.id.split("-")[1]) == 8 for cell in cells)


def test_ids_follow_what_is_run_and_not_what_is_predicted() -> None:
    guess = replace(A, prediction=replace(A.prediction, step_s=9.0), reasons=())
    assert run_ids(JOB, [guess], 1) == run_ids(JOB, [A], 1)
    assert run_ids(scripted_job(seed=1), [A], 1) != run_ids(JOB, [A], 1)


def test_steps_that_may_take_longer_than_a_run_is_given_are_told() -> None:
    """Six steps of up to 1.5 s."""
    slow = replace(A, prediction=replace(A.prediction, step_s_high=1.5))
    late = list(late_runs(replace(JOB, limits=Limits(timeout_s=8.0)), [slow]))
    assert late == ["scripted: 6 steps may take 9.00 s, and --timeout 8 stops a run after so many seconds"]
    with speaking("ja"):
        assert "6 ステップに最大 9.00 秒" in translated(late[0])
    assert not list(late_runs(replace(JOB, limits=Limits(timeout_s=10.0)), [slow]))
    skipped = replace(slow, fits=False, why_not="2 GiB of GPU memory are missing")
    assert not list(late_runs(replace(JOB, limits=Limits(timeout_s=8.0)), [skipped]))


def test_the_same_plan_twice_is_refused() -> None:
    with pytest.raises(UserError, match="planned twice"):
        grid(JOB, [A, A], 1)


def test_a_sweep_goes_on_after_failures_and_its_records_load_back(tmp_path: Path) -> None:
    criteria = tmp_path / "mine.toml"
    criteria.write_text("[must]\nspeed = 1\n")
    killed = scripted_plan(fail_at_step=4, failure="kill")
    infeasible = scripted_plan(fits=False, why_not="2 GiB of GPU memory are missing", loss=3)
    nan = scripted_plan(loss="2,1,nan")
    events: list[SweepEvent] = []
    runs = run_sweep(
        JOB,
        SHAPE,
        [killed, infeasible, nan, A],
        tmp_path / "out",
        SweepOptions(criteria=criteria),
        on_event=events.append,
    )
    assert [(run.end_state, len(run.samples)) for run in runs] == [
        ("crash", 4),
        ("skipped_infeasible", 0),
        ("nan_loss", 3),
        ("ok", 6),
    ]
    assert runs[1].end_reason == "2 GiB of GPU memory are missing"
    assert runs[3].summary.step_s_median == 0.25
    assert runs[3].summary.tokens_per_s == 32.0
    stored = {path.stem: load_run(path) for path in (tmp_path / "out" / "runs").iterdir()}
    assert stored == {run.id: run for run in runs}
    for run in runs:
        assert run.criteria is not None
        assert run.criteria.sha256 == hashlib.sha256(criteria.read_bytes()).hexdigest()
        assert run.criteria.time == run.time
        assert run.predicted is not None
        assert run.predicted.step_s == 1.0
        assert (run.model.parameters, run.engine) == (264, "scripted")
        assert run.job["warmup_steps"] == 2
    assert load_job(tmp_path / "out" / "job.toml") == JOB
    assert (tmp_path / "out" / "criteria.toml").read_bytes() == criteria.read_bytes()
    order = [type(event) for event in events if not isinstance(event, Stepped)]
    assert order[0] is Planned
    assert order.count(Started) == order.count(Ended) == 4
    assert sum(isinstance(event, Stepped) for event in events) == 4 + 3 + 6


def test_the_folder_is_set_up_before_the_first_run(tmp_path: Path, launched: list[str]) -> None:
    seen: list[list[str]] = []
    run_sweep(
        JOB, SHAPE, [A], tmp_path / "out",
        before_first=lambda: seen.append([*launched, *sorted(p.name for p in (tmp_path / "out").iterdir())]),
    )  # fmt: skip
    assert seen == [["job.toml", "plans.json"]]


def test_a_folder_in_use_is_refused_with_the_remedy(tmp_path: Path, launched: list[str]) -> None:
    run_sweep(JOB, SHAPE, [A], tmp_path)
    before = files(tmp_path)
    with pytest.raises(UserError, match="is not empty; add --resume"):
        run_sweep(JOB, SHAPE, [A], tmp_path)
    assert files(tmp_path) == before
    assert len(launched) == 1


def test_what_callers_put_there_first_does_not_make_a_folder_used(
    tmp_path: Path, launched: list[str]
) -> None:
    (tmp_path / "machine.json").write_text("{}")
    (tmp_path / "criteria.toml").write_text("speed = 1")
    (run,) = run_sweep(JOB, SHAPE, [A], tmp_path)
    assert run.criteria is not None


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="job.toml" if resume else "--resume"):
        run_sweep(JOB, SHAPE, [A], tmp_path, SweepOptions(resume=resume))
    assert set(files(tmp_path)) == {"thesis.tex"}


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run_sweep(JOB, SHAPE, [A], tmp_path / "out")


def test_resume_runs_only_what_is_missing(tmp_path: Path, launched: list[str]) -> None:
    run_sweep(JOB, SHAPE, [A, B], tmp_path, SweepOptions(rounds=2))
    ids = list(launched)
    missing, broken, interrupted = ids[1], ids[2], ids[3]
    (tmp_path / "runs" / f"{missing}.json").unlink()
    (tmp_path / "runs" / f"{broken}.json").write_text('{"schema_version": 1, "id"')
    stopped = replace(load_run(tmp_path / "runs" / f"{interrupted}.json"), end_state="interrupted")
    save_run(stopped, tmp_path / "runs" / f"{interrupted}.json")
    launched.clear()
    events: list[SweepEvent] = []
    runs = run_sweep(
        JOB, SHAPE, [A, B], tmp_path, SweepOptions(rounds=2, resume=True), on_event=events.append
    )
    assert launched == [missing, broken, interrupted]
    assert [run.id for run in runs] == ids
    planned = events[0]
    assert isinstance(planned, Planned)
    assert planned.kept == (ids[0],)
    assert planned.to_run == (missing, broken, interrupted)
    assert set(planned.again) == {broken, interrupted}
    assert "JSON" in planned.again[broken]
    launched.clear()
    run_sweep(JOB, SHAPE, [A, B], tmp_path, SweepOptions(rounds=2, resume=True))
    assert launched == []


@pytest.mark.parametrize("state", ["crash", "timeout", "skipped_infeasible", "not_available", "oom_gpu"])
def test_a_failed_run_is_a_result_and_not_repeated(
    tmp_path: Path, launched: list[str], state: EndState
) -> None:
    (run,) = run_sweep(JOB, SHAPE, [A], tmp_path)
    save_run(replace(run, end_state=state, end_reason="x"), tmp_path / "runs" / f"{run.id}.json")
    (again,) = run_sweep(JOB, SHAPE, [A], tmp_path, SweepOptions(resume=True))
    assert (again.end_state, len(launched)) == (state, 1)


def test_a_record_of_a_newer_version_is_not_written_over(tmp_path: Path, launched: list[str]) -> None:
    (run,) = run_sweep(JOB, SHAPE, [A], tmp_path)
    path = tmp_path / "runs" / f"{run.id}.json"
    path.write_text('{"schema_version": 999, "measured": "for hours"}')
    with pytest.raises(UserError, match=r"schema version 999.*update"):
        run_sweep(JOB, SHAPE, [A], tmp_path, SweepOptions(resume=True))
    assert "for hours" in path.read_text()
    assert len(launched) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("torch", "1.0"),
        ("gpu_name", "NVIDIA A100"),
        ("cpu", "another"),
        ("cores_usable", 999),
        ("gpu_allocator", "backend:cudaMallocAsync"),
    ],
)
def test_resume_elsewhere_is_refused_before_its_time_is_spent(
    tmp_path: Path, launched: list[str], field: str, value: Any
) -> None:
    """The report would refuse to put such runs side by side."""
    (run,) = run_sweep(JOB, SHAPE, [A], tmp_path)
    before = replace(run.environment, **{field: value})
    save_run(replace(run, environment=before), tmp_path / "runs" / f"{run.id}.json")
    with pytest.raises(UserError, match=f"'{field}' \\(was {value}"):
        run_sweep(JOB, SHAPE, [A], tmp_path, SweepOptions(resume=True, rounds=2))
    assert len(launched) == 1
    assert [kept.id for kept in run_sweep(JOB, SHAPE, [A], tmp_path, SweepOptions(resume=True))] == [run.id]


def test_resume_of_runs_before_expandable_segments_is_refused(
    tmp_path: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell(setting: str | None) -> None:
        here = replace(read_environment(), gpu_allocator=setting)
        monkeypatch.setattr("harness.runs.sweep.read_environment", lambda: here)

    tell(None)
    run_sweep(JOB, SHAPE, [A], tmp_path)
    tell(EXPANDABLE)
    told = re.escape(f"'gpu_allocator' (was none, is now {EXPANDABLE})")
    with pytest.raises(UserError, match=told):
        run_sweep(JOB, SHAPE, [A], tmp_path, SweepOptions(resume=True, rounds=2))
    assert len(launched) == 1


def test_resume_of_nothing_starts(tmp_path: Path, launched: list[str]) -> None:
    run_sweep(JOB, SHAPE, [A], tmp_path / "new", SweepOptions(resume=True))
    assert len(launched) == 1


def test_resume_keeps_the_plan_an_engine_had(tmp_path: Path, launched: list[str]) -> None:
    """A machine with less free memory today may be given other plans; runs of one engine stay alike."""
    run_sweep(JOB, SHAPE, [A], tmp_path)
    other = replace(B, engine="native")
    runs = run_sweep(JOB, SHAPE, [B, other], tmp_path, SweepOptions(resume=True, rounds=2))
    assert [run.plan for run in runs] == [A, other, other, A]
    assert launched == run_ids(JOB, [A, other], 2)


def test_a_job_file_that_was_edited_is_held_against_the_runs(tmp_path: Path, launched: list[str]) -> None:
    run_sweep(JOB, SHAPE, [A], tmp_path, SweepOptions())
    launched.clear()
    other = scripted_job(batch_size=2)
    save_job(other, tmp_path / "job.toml")
    with pytest.raises(UserError, match=r"not the job of its runs: 'batch_size' was \d+, is now 2; put"):
        run_sweep(other, SHAPE, [A], tmp_path, SweepOptions(resume=True, rounds=2))
    assert launched == []
    save_job(JOB, tmp_path / "job.toml")
    assert len(run_sweep(JOB, SHAPE, [A], tmp_path, SweepOptions(resume=True, rounds=2))) == 2


def test_resume_refuses_another_job_and_names_the_field(tmp_path: Path, launched: list[str]) -> None:
    run_sweep(JOB, SHAPE, [A], tmp_path)
    with pytest.raises(UserError, match=r"differs in 'batch_size' \(was 1, is now 2\)"):
        run_sweep(scripted_job(batch_size=2), SHAPE, [A], tmp_path, SweepOptions(resume=True))
    with pytest.raises(UserError, match=r"'limits.timeout_s'"):
        run_sweep(scripted_job(timeout_s=5.0), SHAPE, [A], tmp_path, SweepOptions(resume=True))
    with pytest.raises(UserError, match=r"'settings.scripted' \(was None"):
        run_sweep(
            scripted_job(settings={"scripted": {"loss": 2}}), SHAPE, [A], tmp_path, SweepOptions(resume=True)
        )
    assert len(launched) == 1


def test_a_folder_with_settings_as_text_is_resumed(tmp_path: Path) -> None:
    """As earlier versions wrote those of `--set`."""
    as_text = scripted_job(settings={"scripted": {"num_children": "0", "step_s": "2"}})
    typed = scripted_job(settings={"scripted": {"num_children": 0, "step_s": "2"}})
    (run,) = run_sweep(as_text, SHAPE, [scripted_plan(num_children="0", step_s="2")], tmp_path)
    plans = [scripted_plan(num_children=0, step_s="2")]
    assert missing(typed, plans, tmp_path, SweepOptions(rounds=1, resume=True)) == []
    assert run_sweep(typed, SHAPE, plans, tmp_path, SweepOptions(resume=True)) == [run]


def test_resume_refuses_other_criteria_and_names_the_field(tmp_path: Path, launched: list[str]) -> None:
    criteria, out = tmp_path / "criteria.toml", tmp_path / "out"
    criteria.write_text("[must]\nspeed = 1\n")
    run_sweep(JOB, SHAPE, [A], out, SweepOptions(criteria=criteria))
    criteria.write_text("# a comment changes nothing\n[must]\nspeed = 1\n")
    (run,) = run_sweep(JOB, SHAPE, [A], out, SweepOptions(criteria=criteria, resume=True))
    assert run.criteria is not None
    criteria.write_text("[must]\nspeed = 2\n")
    with pytest.raises(UserError, match=r"'must.speed' \(was 1, is now 2\)"):
        run_sweep(JOB, SHAPE, [A], out, SweepOptions(criteria=criteria, resume=True))


def test_criteria_do_not_come_after_the_runs(tmp_path: Path, launched: list[str]) -> None:
    run_sweep(JOB, SHAPE, [A], tmp_path / "out")
    criteria = tmp_path / "criteria.toml"
    criteria.write_text("speed = 1")
    with pytest.raises(UserError, match="without criteria"):
        run_sweep(JOB, SHAPE, [A], tmp_path / "out", SweepOptions(criteria=criteria, resume=True))


@pytest.mark.parametrize(("text", "why"), [(None, "there is no such"), ("speed = ", "is not valid TOML")])
def test_criteria_that_are_none(tmp_path: Path, text: str | None, why: str) -> None:
    criteria = tmp_path / "criteria.toml"
    if text is not None:
        criteria.write_text(text)
    with pytest.raises(UserError, match=why):
        run_sweep(JOB, SHAPE, [A], tmp_path / "out", SweepOptions(criteria=criteria))
    assert not (tmp_path / "out").exists()


def test_the_floor_is_set_beside_the_measured_step(tmp_path: Path) -> None:
    known = replace(A, prediction=replace(A.prediction, floor_s=0.1))
    killed = scripted_plan(fail_at_step=0, failure="kill")
    killed = replace(killed, prediction=replace(killed.prediction, floor_s=0.1))
    runs = run_sweep(JOB, SHAPE, [known, B, killed], tmp_path)
    assert [run.predicted and run.predicted.floor_s for run in runs] == [0.1, None, 0.1]
    assert [run.summary.floor_share for run in runs] == [0.1 / 0.25, None, None]
    assert load_run(tmp_path / "runs" / f"{runs[0].id}.json") == runs[0]
    assert load_plans(tmp_path / "plans.json")[0] == known


def test_a_trace_changes_no_id_and_is_named_by_the_record(tmp_path: Path) -> None:
    (traced,) = run_sweep(JOB, SHAPE, [A], tmp_path / "traced", SweepOptions(trace=True))
    (plain,) = run_sweep(JOB, SHAPE, [A], tmp_path / "plain")
    assert traced.id == plain.id
    assert (traced.traced, traced.trace_file) == (True, f"traces/{traced.id}.json")
    assert (plain.traced, plain.trace_file) == (False, None)
    assert json.loads((tmp_path / "traced" / f"traces/{traced.id}.json").read_text())["traceEvents"]
    assert not (tmp_path / "plain" / "traces").exists()
    (again,) = run_sweep(JOB, SHAPE, [A], tmp_path / "plain", SweepOptions(resume=True, trace=True))
    assert again == plain


def test_records_from_before_the_breakdown_still_load(tmp_path: Path, launched: list[str]) -> None:
    (run,) = run_sweep(JOB, SHAPE, [A], tmp_path)
    path = tmp_path / "runs" / f"{run.id}.json"
    document = json.loads(path.read_text())
    assert document["schema_version"] == 1
    for field in ("perturb_s", "landed_share", "floor_share"):
        del document["summary"][field]
    del document["predicted"]["floor_s"], document["plan"]["prediction"]["floor_s"]
    del document["traced"], document["trace_file"]
    path.write_text(json.dumps(document))
    assert load_run(path) == run


@pytest.fixture
def file_size_limit() -> Iterator[Any]:
    """Writing beyond so many bytes fails, as on a full disk, for this process and what it starts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_costs_no_earlier_record(tmp_path: Path, file_size_limit: Any) -> None:
    before: dict[str, bytes] = {}

    def fill(event: SweepEvent) -> None:
        if isinstance(event, Ended) and event.index == 0:
            before.update(files(tmp_path))
        if isinstance(event, Stepped) and before:
            file_size_limit(1000)

    with pytest.raises(UserError, match=r"runs/scripted-.*-r1.json: cannot be written \(File too large\)"):
        run_sweep(JOB, SHAPE, [A, B], tmp_path, on_event=fill)
    file_size_limit(resource.RLIM_INFINITY)
    after = {name: content for name, content in files(tmp_path).items() if not name.startswith(".work")}
    assert after | {MANIFEST: b""} == before | {MANIFEST: b""}
    told: list[SweepEvent] = []
    runs = run_sweep(JOB, SHAPE, [A, B], tmp_path, SweepOptions(resume=True), on_event=told.append)
    assert [run.end_state for run in runs] == ["ok", "ok"]
    # The run had ended well: its result was taken up, and nothing ran again.
    assert [type(event) for event in told] == [Planned]
    assert told[0].taken_up == (runs[1].id,)  # type: ignore[union-attr]
    assert check_manifest(tmp_path) == ()
    assert not (tmp_path / ".work").exists()


PARENT = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from pydantic import TypeAdapter
from engines.shapes import ModelShape
from harness.runs.sweep import run_sweep
from harness.records.job import load_job
from harness.runs.events import Stepped
from profiles.planning.plan import Plan

folder = Path(sys.argv[1])
shape = TypeAdapter(ModelShape).validate_json((folder / "shape.json").read_bytes())
plans = TypeAdapter(list[Plan]).validate_json((folder / "plans.json").read_bytes())

def tell(event):
    if isinstance(event, Stepped):
        print(event.run_id, event.sample.step, flush=True)

try:
    run_sweep(load_job(folder / "job.toml"), shape, plans, folder / "out", on_event=tell)
except KeyboardInterrupt:
    sys.exit(130)
"""


def start_parent(folder: Path, job: Job, plans: list[Plan]) -> subprocess.Popen[str]:
    """A sweep in a process of its own, that tells of each step."""
    from pydantic import TypeAdapter

    save_job(job, folder / "job.toml")
    (folder / "shape.json").write_bytes(TypeAdapter(type(SHAPE)).dump_json(SHAPE))
    (folder / "plans.json").write_bytes(TypeAdapter(list[Plan]).dump_json(plans))
    (folder / "parent.py").write_text(PARENT)
    return subprocess.Popen(
        [sys.executable, "-P", str(folder / "parent.py"), str(folder)], stdout=subprocess.PIPE, text=True
    )


def wait_for_step(parent: subprocess.Popen[str], run_id: str) -> None:
    assert parent.stdout is not None
    for line in parent.stdout:
        if line.startswith(run_id):
            return
    raise AssertionError(f"{run_id} never made a step")


SLOW = scripted_plan(step_s=0.08, sleep=True, num_children=2)


def test_a_killed_sweep_takes_its_processes_along_and_is_resumed(tmp_path: Path) -> None:
    first, second = run_ids(JOB, [A, SLOW], 1)
    parent = start_parent(tmp_path, JOB, [A, SLOW])
    wait_for_step(parent, second)
    family = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.communicate()
    assert len(family) == 4  # guard, worker, and the worker's two
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    out = tmp_path / "out"
    before = files(out / "runs")
    assert {name for name in before if not is_leftover(name)} == {f"{first}.json"}

    events: list[SweepEvent] = []
    runs = run_sweep(JOB, SHAPE, [A, SLOW], out, SweepOptions(resume=True), on_event=events.append)
    assert [(run.id, run.end_state) for run in runs] == [(first, "ok"), (second, "ok")]
    assert events[0] == Planned(kept=(first,), to_run=(second,), again={})
    assert files(out / "runs")[f"{first}.json"] == before[f"{first}.json"]
    assert not (out / ".work").exists()


def test_ctrl_c_keeps_what_there_is_and_exits_130(tmp_path: Path) -> None:
    hanging = scripted_plan(fail_at_step=3, failure="hang", num_children=1)
    last = scripted_plan(loss=9)
    first, second, _ = run_ids(JOB, [A, hanging, last], 1)
    parent = start_parent(tmp_path, JOB, [A, hanging, last])
    wait_for_step(parent, f"{second} 2")
    family = psutil.Process(parent.pid).children(recursive=True)
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=20)
    assert parent.returncode == 130
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    runs: dict[str, Run] = {}
    for path in (tmp_path / "out" / "runs").iterdir():
        runs[path.stem] = load_run(path)
    assert {name: (run.end_state, len(run.samples)) for name, run in runs.items()} == {
        first: ("ok", 6),
        second: ("interrupted", 3),
    }
    assert not (tmp_path / "out" / ".work").exists()


def test_needs_no_torch() -> None:
    code = "import sys, harness.runs.sweep; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        run_sweep(JOB, SHAPE, [A], tmp_path / "out")


def test_plans_are_kept_as_json(tmp_path: Path, launched: list[str]) -> None:
    run_sweep(JOB, SHAPE, [A, B], tmp_path)
    document = json.loads((tmp_path / "plans.json").read_text())
    assert [plan["settings"] for plan in document["plans"]] == [{"step_s": 0.25}, {"step_s": 0.5}]


def test_what_cannot_run_here_is_not_available_rather_than_too_big(tmp_path: Path) -> None:
    plan = replace(scripted_plan(fits=False, why_not="needs a GPU"), available=False)
    (run,) = run_sweep(JOB, SHAPE, [plan], tmp_path / "out")
    assert (run.end_state, run.end_reason) == ("not_available", "needs a GPU")
