"""The one place that makes records, and what decoding runs are refused for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_runs import SHAPE, scripted_job, scripted_plan
from settings_given import given_settings

import harness.runs.attempt
from engines.base import LinkRates
from engines.decoding import Sampling
from engines.errors import UserError
from harness.records.run import Emulation, Run, Sample, Summary, load_run
from harness.runs.attempt import MatrixRate, attempt, record_path
from harness.runs.decoding_runs import DecodingJob
from harness.runs.emulate import AppliedLimits, Emulated
from harness.runs.launch import Outcome
from harness.runs.worker import Request
from run_records import make_environment

SAMPLES = (
    Sample(step=0, warmup=True, step_s=0.5, loss=None),
    Sample(step=1, warmup=False, step_s=0.25, loss=None),
    Sample(step=2, warmup=False, step_s=0.25, loss=None),
)
OUTCOME = Outcome(
    end_state="ok", end_reason=None, samples=SAMPLES, summary=Summary(step_s_median=0.25), by_user=False
)


def request(**changes: Any) -> Request:
    plan = scripted_plan()
    plan = replace(plan, prediction=replace(plan.prediction, floor_s=0.125))
    return Request(
        **({"id": "a-r1", "job": scripted_job(batch_size=3), "shape": SHAPE, "plan": plan} | changes)
    )


def recorded(
    asked: Request, outcome: Outcome, out: Path, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> tuple[Run, bool]:
    def pretend(*_: Any, **__: Any) -> Outcome:
        return outcome

    monkeypatch.setattr(harness.runs.attempt, "launch_child", pretend)
    environment = make_environment()
    return attempt(asked, 2, out, environment=environment, device=None, on_event=lambda event: None, **more)


def test_a_record_says_what_was_planned_and_what_came_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, by_user = recorded(request(), OUTCOME, tmp_path, monkeypatch, criteria_sha256="c" * 64)
    assert not by_user
    assert load_run(record_path(tmp_path, "a-r1")) == run
    assert (run.round, run.engine, run.scenario, run.samples) == (2, "scripted", "train", SAMPLES)
    assert run.predicted is not None
    assert run.predicted.floor_s == 0.125
    assert run.summary.floor_share == 0.5
    assert run.criteria is not None
    assert (run.criteria.sha256, run.criteria.time) == ("c" * 64, run.time)
    assert (run.emulation, run.sampling, run.first_token_s, run.tokens) == (None, None, None, None)


@pytest.mark.parametrize(("engine", "passes"), [("native", 3), ("mezo", 2)])
def test_a_record_tells_the_share_of_the_machines_matrix_rate_over_real_tokens(
    engine: str, passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(scripted_plan(), engine=engine, settings=given_settings(engine, {}))
    asked = request(plan=plan)
    summary = Summary(step_s_median=0.25, padded_share=0.5, forwards=2.0 if engine == "mezo" else None)
    outcome = replace(OUTCOME, summary=summary, notes=("not compiled: no",))
    rate = MatrixRate(flops_per_s=1e6, device="NVIDIA RTX 4090")
    run, _ = recorded(asked, outcome, tmp_path, monkeypatch, matrix_rate=rate)
    # 24 tokens, of which half are padding: two blocks without matrices, the head of 64 weights.
    forward = 24 * (2 * 4 * 8 * 4 + 2 * 64)
    assert run.summary.model_flops == passes * forward / 2
    assert run.summary.mfu == pytest.approx(passes * forward / 2 / 0.25 / 1e6)
    assert run.notes == ("not compiled: no",)
    two = replace(asked, job=replace(asked.job, limits=replace(asked.job.limits, gpus=2)))
    run, _ = recorded(two, outcome, tmp_path, monkeypatch, matrix_rate=rate)  # of both cards together
    assert run.summary.mfu == pytest.approx(passes * forward / 2 / 0.25 / 2e6)
    other = replace(rate, device="NVIDIA H200")  # a profile of elsewhere says nothing of this card
    run, _ = recorded(asked, outcome, tmp_path, monkeypatch, matrix_rate=other)
    assert (run.summary.mfu, run.summary.model_flops) == (None, passes * forward / 2)


def test_a_decoding_run_lies_apart_and_says_how_it_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = recorded(request(generation=Sampling(top_k=5)), OUTCOME, tmp_path, monkeypatch)
    assert load_run(tmp_path / "generations" / "a-r1.json", "decode") == run
    assert not (tmp_path / "runs").exists()
    assert (run.sampling, run.first_token_s, run.tokens) == (Sampling(top_k=5), 0.5, 6)
    nothing = replace(OUTCOME, end_state="crash", end_reason="lost", samples=(), summary=Summary())
    failed, _ = recorded(request(id="b", generation=Sampling()), nothing, tmp_path, monkeypatch)
    assert (failed.first_token_s, failed.tokens, failed.summary.floor_share) == (None, 0, None)


@pytest.mark.parametrize(
    ("plan", "end"),
    [
        (scripted_plan(fits=False, why_not="1 GB is missing"), ("skipped_infeasible", "1 GB is missing")),
        (replace(scripted_plan(fits=False), available=False), ("not_available", "the plan does not fit")),
    ],
)
def test_a_plan_that_cannot_run_is_a_record_without_a_run(
    plan: Any, end: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, by_user = recorded(request(plan=plan), OUTCOME, tmp_path, monkeypatch)
    assert ((run.end_state, run.end_reason), run.samples, by_user) == (end, (), False)


def test_no_process_is_started_for_a_library_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = "peft is not installed (pip install 'lspzo-bench[lora]')"
    monkeypatch.setattr(harness.runs.attempt, "why_not_installed", lambda name: why)
    run, by_user = recorded(request(), OUTCOME, tmp_path, monkeypatch)
    assert ((run.end_state, run.end_reason), run.samples, by_user) == (("not_available", why), (), False)
    assert run.summary == Summary()
    # Of what does not fit either, memory is the reason.
    unfit = request(id="b", plan=scripted_plan(fits=False, why_not="1 GB is missing"))
    run, _ = recorded(unfit, OUTCOME, tmp_path, monkeypatch)
    assert (run.end_state, run.end_reason) == ("skipped_infeasible", "1 GB is missing")


def test_a_run_that_was_stopped_from_the_keyboard_is_recorded_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = replace(OUTCOME, end_state="interrupted", end_reason="stopped", by_user=True)
    run, by_user = recorded(request(), stopped, tmp_path, monkeypatch)
    assert by_user
    assert load_run(record_path(tmp_path, run.id)).end_state == "interrupted"


def test_what_was_asked_of_an_emulation_is_kept_where_the_child_did_not_say_what_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = LinkRates(h2d_bytes_per_s=2e9, d2h_bytes_per_s=1e9)
    like = Emulated(machine="a laptop", vram_bytes=2**30, threads=4, rates=rates)
    wanted = Emulation(vram_bytes=2**30, threads=4, rates=rates, link="unused")
    run, _ = recorded(request(emulated=like), OUTCOME, tmp_path, monkeypatch)
    assert run.emulation == wanted
    limits = AppliedLimits(threads=2, vram_bytes=None, rates=None)
    run, _ = recorded(request(emulated=like), replace(OUTCOME, limits=limits), tmp_path, monkeypatch)
    assert run.emulation == replace(wanted, threads_held=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": "native"}, "--engine native: does not generate"),
        ({"shape": replace(SHAPE, head="classification")}, "model 'scripted': generates no text"),
        ({"job": scripted_job(seq_len=58)}, "--seq-len 58: leaves no room for 7 more of the 64 tokens"),
    ],
)
def test_decoding_that_cannot_be_is_refused_before_it_is_planned(changes: dict[str, Any], said: str) -> None:
    fine: dict[str, Any] = {"job": scripted_job(), "shape": SHAPE, "engine": "zo2", "sampling": Sampling()}
    DecodingJob(**fine)
    with pytest.raises(UserError, match=said):
        DecodingJob(**(fine | changes))
