"""What a person sees: tables that fit a terminal, plain lines without one."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from known_shapes import OPT_1B
from rich.console import Console, RenderableType
from settings_given import given_for_each
from tiny_machine import make_machine

from engines.shapes import Workload
from harness import progress
from harness.cli import tables
from harness.cli.sweep_progress import CompareProgress
from harness.progress import ProbeProgress, Progress
from harness.records.run import Sample
from harness.runs.launch import SettingUp, Stepped
from harness.runs.sweep import Cell, Ended, Planned, Started
from profiles.planning.recommend import recommend
from run_records import make_machine as make_gpu_machine
from run_records import make_plan, make_run, make_sweep, make_test_job

ENGINES = ("native", "torchao-offload", "lsp", "mezo", "zo2")
WORKLOAD = Workload(batch_size=2, seq_len=512)


def drawn(table: RenderableType, width: int = 100) -> str:
    text = io.StringIO()
    Console(file=text, width=width, highlight=False).print(table)
    return text.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("gpu", [False, True])
def test_method_names_are_whole_and_lines_fit(width: int, gpu: bool) -> None:
    machine = make_machine(gpu=gpu)
    plans = recommend(machine, OPT_1B, WORKLOAD, ENGINES, {})
    said = drawn(tables.plans_table(OPT_1B, make_test_job(), machine, plans), width)
    assert max(map(len, said.splitlines())) <= width
    rows = {line.split()[0] for line in said.splitlines() if line.strip()}
    assert set(ENGINES) <= rows


def test_plans_say_why_not_and_give_each_setting_once() -> None:
    machine = make_machine(gpu=False)
    plans = recommend(machine, OPT_1B, WORKLOAD, ENGINES, given_for_each({"native": {"learning_rate": 1e-5}}))
    said = " ".join(drawn(tables.plans_table(OPT_1B, make_test_job(), machine, plans), 200).split())
    assert "torchao-offload cannot run here: needs a CUDA GPU" in said
    assert said.count("resident_blocks=0") == 1
    assert said.count("learning_rate=1e-05") == 1
    plan = make_plan("zo2", fits=False)
    one = " ".join(
        drawn(tables.plans_table(OPT_1B, make_test_job(), make_gpu_machine(), [plan]), 200).split()
    )
    assert "does not fit: 12.5 GB of GPU memory are missing" in one
    assert "resident_blocks=0" in one  # without a reason it is told by itself


def test_a_plan_without_a_step_time_says_why() -> None:
    plan = make_plan("zo2")
    unmeasured = replace(
        plan,
        prediction=replace(plan.prediction, step_s=None, basis="No step time: the disk was not measured."),
    )
    for each, times in ((unmeasured, 1), (plan, 0), (replace(unmeasured, available=False), 0)):
        said = " ".join(
            drawn(tables.plans_table(OPT_1B, make_test_job(), make_gpu_machine(), [each]), 200).split()
        )
        assert said.count("No step time: the disk was not measured") == times


def test_micro_batches_are_told_where_there_are_several() -> None:
    machine = make_machine()
    job = make_test_job(accumulation=4)
    plans = recommend(machine, OPT_1B, job.workload, ["native"], {})
    assert "batch 2 x 512 tokens, 4 micro-batches a step" in drawn(
        tables.plans_table(OPT_1B, job, machine, plans), 200
    )


def test_runs_say_what_ended_them_once_per_reason() -> None:
    said = drawn(tables.runs_table(make_sweep()), 160)
    assert said.count("torchao is not installed") == 1
    assert "skipped_infeasible: 12.5 GB of GPU memory are missing" in said
    assert "GPU memory" in said
    on_cpu = [make_run("native", peak_gpu_allocated_bytes=None)]
    assert "GPU memory" not in drawn(tables.runs_table(on_cpu), 160)


def test_traced_runs_are_marked_and_their_traces_named() -> None:
    kept = replace(make_run("zo2"), traced=True, trace_file="traces/zo2-r1.json")
    lost = replace(make_run("lsp", end_state="crash"), traced=True)
    said = drawn(tables.runs_table([kept, lost, make_run("native")]), 160)
    assert "traced, which costs time: traces/zo2-r1.json" in said
    assert "traced, which costs time: the trace could not be kept" in said
    assert said.count("traced") == 2


def test_a_console_without_a_terminal_is_wide_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert progress.console().width == progress.PLAIN_WIDTH
    monkeypatch.setenv("COLUMNS", "72")
    assert progress.console().width == 72


def test_plain_progress_is_a_line_per_kind_and_a_tenth_of_what_has_a_note(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress(quiet=False, silent=("hidden",)) as progress:
        for done in range(101):
            progress.update("pinning host memory (bytes)", done * 2**30, 100 * 2**30)
            progress.update("training", done, 100, note=f"loss {done}")
            progress.update("hidden", done, 100)
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert [line for line in lines if "pinning" in line] == ["pinning host memory ..."]
    assert len([line for line in lines if line.startswith("training")]) == 11
    assert not [line for line in lines if "hidden" in line]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=True) as progress:
        progress.update("training", 1, 2, note="loss 1")
        progress.print("a line")
    with CompareProgress(quiet=True) as sweep:
        sweep.update(Planned(kept=("a",), to_run=("b",), again={}))
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_a_probe_names_what_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    with ProbeProgress(quiet=False) as progress:
        progress.measurement("CPU fused AdamW", 1, 2)
        progress.measurement("done", 2, 2)
    assert capsys.readouterr().err == "measuring CPU fused AdamW (2 of 2) ...\n"


def test_a_sweep_tells_what_it_keeps_repeats_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("zo2")
    cell = Cell(id=run.id, engine="zo2", plan=make_plan("zo2"), round=1)
    hopeless = replace(cell, id="no", plan=make_plan("zo2", fits=False))
    with CompareProgress(quiet=False) as progress:
        progress.update(
            Planned(kept=("a",), to_run=("b", run.id), again={"b": "was interrupted"}, notes=("old card",))
        )
        progress.update(Started(cell=hopeless, index=0, total=2))
        progress.update(Started(cell=cell, index=1, total=2))
        progress.update(SettingUp(run_id=run.id, what="importing", done=0, total=1))
        sample = Sample(step=0, warmup=True, step_s=1.0, loss=None)
        progress.update(Stepped(run_id=run.id, sample=sample, total=10))
        progress.update(Ended(run=run, index=1, total=2))
    assert capsys.readouterr().err.splitlines() == [
        "note: old card",
        "kept     a",
        "again    b: was interrupted",
        f"missing  {run.id}",
        f"{run.id}: started, run 2 of 2",
        f"{run.id}: ok, 1.00 s a step",
    ]
