"""What a person sees: tables that fit a terminal, plain lines without one."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from harness import progress
from harness.cli import tables
from harness.cli.sweep_progress import CompareProgress
from harness.progress import ProbeProgress, Progress
from harness.records.comparison import OtherHost
from harness.records.run import Sample
from harness.runs.events import SettingUp, Stepped
from harness.runs.sweep import Cell, Ended, Planned, Started
from profiles.language import speaking, translated
from run_records import make_plan, make_run, make_sweep


def drawn(table: RenderableType, width: int = 100) -> str:
    text = io.StringIO()
    Console(file=text, width=width, highlight=False).print(table)
    return text.getvalue()


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


def test_runs_whose_clock_was_held_are_marked() -> None:
    held = replace(make_run("zo2"), disturbance="the GPU's clock was held low")
    said = drawn(tables.runs_table([held, make_run("native")]), 160)
    assert said.count("disturbed: the GPU's clock was held low") == 1


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


def test_a_step_outside_the_range_that_was_predicted_is_told() -> None:
    run = make_run("zo2")
    assert run.predicted is not None
    within = replace(run, predicted=replace(run.predicted, step_s_low=1e-9, step_s_high=1e9))
    assert list(tables.bands_missed([within])) == []
    slower = replace(run, predicted=replace(run.predicted, step_s_low=1e-9, step_s_high=2e-9))
    elsewhere = replace(slower, environment=replace(run.environment, emulated="a card"))
    assert list(tables.bands_missed([elsewhere])) == []
    assert "slower than the range predicted" in " ".join(drawn(tables.runs_table([slower]), 200).split())
    faster = [
        make_run("zo2", round=each, step_s=(seconds,) * 8) for each, seconds in ((1, 1.0), (2, 3.0), (3, 2.0))
    ]
    band = replace(run.predicted, step_s_low=10.0, step_s_high=20.0)
    (line,) = tables.bands_missed([replace(each, predicted=band) for each in faster])
    assert line.startswith("faster than the range predicted: 1.00 s to 3.00 s, not 10.0 s to 20.0 s;")


def test_a_range_that_the_processor_made_a_step_miss_says_so() -> None:
    run = make_run("zo2", forward_launch_s=23.1e-6)
    assert run.predicted is not None
    run = replace(run, predicted=replace(run.predicted, step_s_low=0.1, step_s_high=0.2))
    (line,) = tables.bands_missed([run], {run.id})
    assert line == (
        "slower than the range predicted: 1.00 s, not 100 ms to 200 ms; "
        "the processor explains it, which took 23.1 us to start an operation"
    )
    with speaking("ja"):
        assert translated(line) != line
        assert "23.1 us" in translated(line) or "23.1 マイクロ秒" in translated(line)


def test_a_processor_that_the_profile_does_not_describe_is_told() -> None:
    line = tables.host_line(OtherHost(taken_s=31e-6, profile_s=14e-6))
    assert line.startswith("starting an operation took this processor 31.0 us, not 14.0 us as")
    assert "take longer than predicted" in line
    assert "take less than predicted" in tables.host_line(OtherHost(taken_s=7e-6, profile_s=14e-6))


def test_what_one_step_in_many_does_is_told_beside_the_ratio_of_medians() -> None:
    rows = [make_run("native", round=each) for each in (1, 2, 3)]
    for each in (1, 2, 3):
        row = make_run("galore", round=each, step_s=(1.0,) * 8)  # its first step took 5 s
        assert row.predicted is not None
        rows.append(replace(row, predicted=replace(row.predicted, rare_s=40.0, rare_every=4)))
    said = " ".join(drawn(tables.runs_table(rows), 200).split())
    assert "one step in 4 takes 4.00 s more, which the median does not show" in said
    assert "slower: 2.00x" in said
    assert "with what one step in 4 does beside; of medians alone: 1.00x" in said
    few = [replace(row, predicted=row.predicted and replace(row.predicted, rare_every=400)) for row in rows]
    assert "does beside:" not in " ".join(drawn(tables.runs_table(few), 200).split())
