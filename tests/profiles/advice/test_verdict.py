"""The closing sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from known_shapes import DEEPSEEK_1B, DEEPSEEK_7B, H200, OPT_13B, TINY

from engines.shapes import ModelShape, Workload
from harness.models.configs import named_shape
from profiles.advice.job_time import JobForecast, Rates, job_forecast
from profiles.advice.outlook import JobToPlan
from profiles.advice.verdict import PlanVerdict, verdict_of
from profiles.advice.ways_out import WayOut, way_out
from profiles.catalog import find_profile
from profiles.machine import Machine
from profiles.planning.recommend import plan_engine, rank

TRAINING = Workload(batch_size=4, seq_len=1024)
GB = 10**9


def verdict(
    engines: Sequence[str],
    shape: ModelShape = DEEPSEEK_7B,
    workload: Workload = TRAINING,
    machine: Machine = H200,
    vram_bytes: int | None = None,
) -> PlanVerdict:
    job = JobToPlan(shape=shape, workload=workload, engines=engines, settings={}, vram_bytes=vram_bytes)
    contexts = {engine: job.context(engine, machine) for engine in engines}
    plans = sorted((plan_engine(contexts[e], job.settings_of(e)) for e in engines), key=rank)
    forecasts: dict[str, JobForecast] = {
        p.engine: job_forecast(p, contexts[p.engine], job.amount_or_step, Rates()) for p in plans if p.fits
    }
    found = [way_out(p, contexts[p.engine], job.settings_of(p.engine)) for p in plans]
    ways = {each.engine: each for each in found if isinstance(each, WayOut)}
    return verdict_of(plans, forecasts, ways, shape, of_job=False)


def test_the_first_with_gradients_is_named_with_its_range() -> None:
    found = verdict(["native", "torchao-offload"])
    assert found.best == "native"
    assert found.first_order == ("native", "torchao-offload")
    assert found.ties == ()
    assert found.text.startswith("With gradients native comes first with 286 ms a step (")


def test_overlapping_ranges_are_called_a_tie() -> None:
    found = verdict(["native", "lsp"])
    assert len(found.ties) == 1
    assert "is a tie with it" in found.text


def test_that_no_mixture_was_measured_is_said() -> None:
    mixture = replace(DEEPSEEK_1B, expert_parameters=1 << 20, num_experts=8, experts_per_token=2)
    assert "2 of 8 experts are counted for each token. No mixture" in verdict(["native"], mixture).text
    assert "mixture" not in verdict(["native"], DEEPSEEK_1B).text


def test_that_states_from_token_to_token_are_not_counted_is_said() -> None:
    assert "carry a state" in verdict(["native"], replace(DEEPSEEK_1B, is_recurrent=True)).text
    assert "carry a state" not in verdict(["native"], DEEPSEEK_1B).text


def test_a_comparison_that_takes_long_says_so() -> None:
    job = JobToPlan(shape=DEEPSEEK_7B, workload=TRAINING, engines=(), settings={})
    plans = [plan_engine(job.context(e, H200), job.settings_of(e)) for e in ("native", "lsp")]
    forecasts = {
        p.engine: job_forecast(p, job.context(p.engine, H200), job.amount_or_step, Rates()) for p in plans
    }
    told = [
        verdict_of(plans, forecasts, {}, DEEPSEEK_7B, of_job=False, compare_steps=steps).sentences[-1]
        for steps in (39, 39_000)
    ]
    assert told[0].startswith("To measure what is tied:")
    steps_s = sum(plan.prediction.step_s or 0.0 for plan in plans)
    assert told[1].startswith(f"By these plans that takes {39_000 * steps_s / 3600:.2f} h: --rounds 1")


def test_a_zeroth_order_method_never_comes_before_one_with_gradients() -> None:
    found = verdict(["mezo", "native"], DEEPSEEK_1B)
    assert (found.best, found.first_order, found.zeroth_order) == ("native", ("native",), ("mezo",))
    assert "not known at 1.35 B" in found.text
    assert "0.3 M parameters, per byte" in found.text


def test_a_small_model_is_within_the_study() -> None:
    assert "What a step learns at this size" in verdict(["mezo"], TINY).text


def test_where_nothing_fits_the_nearest_way_out_is_told() -> None:
    found = verdict(["native", "zo2"], OPT_13B, vram_bytes=GB)
    assert found.best is None
    assert found.text.startswith("Nothing fits.")
    only = verdict(["lora", "mezo"], DEEPSEEK_7B, Workload(batch_size=8, seq_len=2048), vram_bytes=21 * GB)
    assert only.best == "mezo"
    assert "No method with gradients fits. Nearest: lora with --batch-size " in only.text
    assert "on the same sequences" in only.text


def test_what_cannot_run_is_answered_with_what_to_type() -> None:
    found = verdict(["native", "lsp"], TINY, Workload(batch_size=4, seq_len=64, dtype="fp16"))
    assert "native and lsp: cannot train in fp16" in found.text
    assert "type --dtype bf16 or fp32 for native and lsp." in found.text
    assert "with --dtype bf16" in found.text
    assert verdict([]).text == "There is no plan."


def test_where_a_flag_lets_methods_run_nothing_else_is_advised() -> None:
    workload = Workload(batch_size=4, seq_len=64, accumulation=2)
    job = JobToPlan(shape=TINY, workload=workload, engines=["native"], settings={}, gpus=3)
    plan = plan_engine(job.context("native", H200), job.settings_of("native"))
    told = verdict_of([plan], {}, {}, TINY, of_job=False).text
    assert told.endswith("native: has 2 micro-batches a step for 3 processes; use --accumulation 3.")


def test_a_precision_is_named_for_what_it_lets_run() -> None:
    """native takes more than a T4 has in fp32, and the torchao row smaller micro-batches, too."""
    t4 = find_profile(Path("t4"))
    workload = Workload(batch_size=8, seq_len=512)
    found = verdict(["native", "lora", "torchao-offload"], named_shape("qwen2.5-1.5b"), workload, machine=t4)
    assert "type --dtype fp32 for lora." in found.text
    assert "native, lora and torchao-offload: NVIDIA T4 has no bf16" in found.text


def test_another_machine_is_not_named_where_the_model_is_refused() -> None:
    """It said 'see --what-if for other machines', none of which would run it."""
    funnel = replace(DEEPSEEK_1B, family="funnel")
    text = verdict(["lsp", "zo2"], funnel).text
    assert text.endswith("No other machine would change that: name other methods with --engines.")
    assert "--what-if" not in text
    large = verdict(["native"], OPT_13B, vram_bytes=4 * GB).text
    assert "see --what-if for other machines" in large
    asks = verdict(["zo2"], replace(DEEPSEEK_1B, has_router_loss=True)).text
    assert asks.endswith("set output_router_logits to false in config.json.")
