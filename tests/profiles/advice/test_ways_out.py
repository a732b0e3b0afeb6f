"""A 'no' with what to type instead, and its price. The cases are from the field."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from settings_given import given_for_each

from engines.shapes import Workload
from harness.models.configs import named_shape
from profiles.advice import words
from profiles.advice.outlook import JobToPlan
from profiles.advice.ways_out import Blocked, WayOut, way_out
from profiles.catalog import find_profile
from profiles.planning.context import NO_PRICE
from profiles.planning.recommend import plan_engine


def way(engine: str, model: str, profile: str, values: dict[str, Any] | None = None, **limits: Any) -> WayOut:
    workload = Workload(**{"batch_size": 1, "seq_len": 512, **limits.pop("workload", {})})
    job = JobToPlan(
        shape=named_shape(model),
        workload=workload,
        engines=(engine,),
        settings=given_for_each({engine: values or {}}),
        **limits,
    )
    context = job.context(engine, find_profile(Path(profile)))
    plan = plan_engine(context, job.settings_of(engine))
    found = way_out(plan, context, job.settings_of(engine))
    assert not plan.fits
    assert isinstance(found, WayOut)
    assert found.plan.fits
    return found


def test_micro_batches_first_since_they_cost_no_quality() -> None:
    found = way("lora", "llama-3.1-8b", "rtx-4090", workload={"batch_size": 16, "seq_len": 2048})
    assert found.flags == "--batch-size 4 --accumulation 4"
    assert found.quality == "none: a step is on the same sequences"
    assert found.times is not None


def test_a_small_card_is_told_to_leave_embeddings_alone() -> None:
    """On the authors' laptop, which has 3.81 GiB to give, not even that is enough."""
    job = {"d": 1280, "r": 4, "projector": "paper", "weights": "resident"}
    found = way(
        "lsp", "deepseek-coder-1.3b", "rtx-3060-12gb", job, workload={"seq_len": 384}, vram_bytes=9 * 2**29
    )
    assert found.flags.startswith("--set lsp.train_outer=false")
    assert "embeddings" in found.quality


def test_a_precision_that_the_gpu_lacks() -> None:
    found = way("zo2", "qwen2.5-0.5b", "t4")
    assert found.flags == "--dtype fp16"
    assert way("native", "qwen2.5-0.5b", "t4").flags == "--dtype fp32"
    assert way("native", "qwen2.5-0.5b", "rtx-4090", workload={"dtype": "fp16"}).flags == "--dtype bf16"


def test_micro_batches_are_not_offered_where_the_engine_refuses_them() -> None:
    """torchao overwrites offloaded gradients: a step of two micro-batches would train on the second alone."""
    found = way(
        "torchao-offload", "llama-3.1-8b", "rtx-4090", {"offload_gradients": True},
        workload={"batch_size": 2, "seq_len": 2048},
    )  # fmt: skip
    assert found.flags.startswith("--seq-len ")

    job = JobToPlan(
        shape=named_shape("opt-125m"),
        workload=Workload(batch_size=1, seq_len=512, accumulation=2),
        engines=("torchao-offload",),
        settings=given_for_each({"torchao-offload": {"offload_gradients": True}}),
    )
    context = job.context("torchao-offload", find_profile(Path("rtx-4090")))
    plan = plan_engine(context, job.settings_of("torchao-offload"))
    assert not plan.available
    assert "micro-batches would not add up" in (plan.why_not or "")


def test_what_costs_nothing_is_not_said_beside_what_costs_something() -> None:
    waits, kept = "none: the backward pass waits for the CPU instead", NO_PRICE
    assert words.of_prices(()) == kept
    assert words.of_prices((waits,)) == words.of_prices((waits, kept)) == waits
    assert words.of_prices(("passes in bf16", waits, "passes in bf16")) == "passes in bf16"


def test_recomputation_before_shorter_sequences() -> None:
    found = way("lora", "llama-3.1-8b", "rtx-4090", workload={"seq_len": 3072, "checkpointing": False})
    assert "--checkpointing" in found.flags
    assert "--seq-len" not in found.flags


def test_shorter_sequences_are_as_long_as_they_can_be() -> None:
    found = way("torchao-offload", "llama-3.1-8b", "rtx-4090", workload={"batch_size": 2, "seq_len": 2048})
    tokens = int(found.flags.split("--seq-len ")[1])
    assert "cut" in found.quality
    assert tokens % 64 == 0
    assert tokens < 2048


def test_a_method_that_fits_needs_none() -> None:
    job = JobToPlan(
        shape=named_shape("opt-125m"), workload=Workload(batch_size=1, seq_len=128), engines=(), settings={}
    )
    context = job.context("native", find_profile(Path("rtx-4090")))
    given_ = job.settings_of("native")
    assert way_out(plan_engine(context, given_), context, given_) is None


def test_where_nothing_helps_the_least_that_is_needed_is_told() -> None:
    job = JobToPlan(
        shape=named_shape("opt-13b"), workload=Workload(batch_size=4, seq_len=512), engines=(), settings={}
    )
    context = job.context("native", find_profile(Path("rtx-4090")))
    given_ = job.settings_of("native")
    found = way_out(plan_engine(context, given_), context, given_)
    assert isinstance(found, Blocked)
    assert found.why.startswith("even one sequence of 64 tokens at a time needs ")


@given(
    engine=st.sampled_from(("native", "lora", "lsp", "exact-offload", "torchao-offload", "mezo", "zo2")),
    model=st.sampled_from(("opt-1.3b", "qwen2.5-1.5b", "llama-3.1-8b")),
    gib=st.integers(3, 24),
    batch_size=st.sampled_from((1, 4, 6)),
    seq_len=st.sampled_from((128, 1000, 2048)),
)
@settings(max_examples=20, deadline=None)
def test_what_is_typed_fits(engine: str, model: str, gib: int, batch_size: int, seq_len: int) -> None:
    """The flags alone, read as the command line reads them, give a plan that fits."""
    workload = Workload(batch_size=batch_size, seq_len=seq_len)
    job = JobToPlan(
        shape=named_shape(model), workload=workload, engines=(engine,), settings={}, vram_bytes=gib * 2**30
    )
    context = job.context(engine, find_profile(Path("rtx-4090")))
    plan = plan_engine(context, job.settings_of(engine))
    found = way_out(plan, context, job.settings_of(engine))
    if not isinstance(found, WayOut):
        return
    words = found.flags.split()
    changes: dict[str, Any] = {}
    own: dict[str, str] = {}
    for flag, value in pairwise(words):
        if flag in ("--batch-size", "--accumulation", "--seq-len"):
            changes[flag[2:].replace("-", "_")] = int(value)
        elif flag == "--dtype":
            changes["dtype"] = value
        elif flag == "--set":
            key, _, text = value.partition("=")
            own[key.partition(".")[2]] = text
    typed = replace(context, workload=replace(workload, **changes))
    assert plan_engine(typed, given_for_each({engine: own})[engine]).fits


def test_texts_are_not_cut_where_a_loss_in_small_chunks_is_enough() -> None:
    """A chunk of the loss costs no quality, and one sequence cannot be divided into micro-batches."""
    found = way("qlora", "llama-3.1-8b", "rtx-4060-ti-16gb", vram_bytes=7_535_000_000)
    assert found.flags == "--set qlora.r=4"
    assert found.plan.settings["loss_tokens"] == 64
