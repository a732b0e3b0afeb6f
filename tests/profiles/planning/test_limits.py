"""Limits that a profile or a user names reach every plan, and no choice contradicts the forecast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_shapes import OPT_13B, measured
from settings_given import given_for_each

from engines import default_engines
from engines.costs.resources.traffic import FREE_SHARE
from engines.settings.parse import defaults
from engines.shapes import Workload
from harness.models.configs import named_shape
from profiles.catalog import find_profile
from profiles.machine import Disk, Machine
from profiles.planning.budget import budget_of, gpu_bytes_needed
from profiles.planning.context import AS_FAST, PlanningContext
from profiles.planning.plan import Plan
from profiles.planning.precisions import dtypes_for
from profiles.planning.predict import predict
from profiles.planning.recommend import recommend

RTX_3090 = find_profile(Path("rtx-3090"))
GB = 10**9


def pins_at_most(machine: Machine, limit_bytes: int, *, refused: bool = True) -> Machine:
    memory = replace(machine.memory, pinned_bytes=measured(float(limit_bytes)), pinned_refused=refused)
    return replace(machine, memory=memory)


def plans(machine: Machine, model: str, workload: Workload, *engines: str) -> list[Plan]:
    return recommend(machine, named_shape(model), workload, engines or default_engines(), {})


def test_what_the_driver_refused_to_pin_is_not_planned() -> None:
    workload = Workload(batch_size=1, seq_len=512, dtype="fp16")
    free, held = (
        plans(machine, "opt-13b", workload, "zo2")[0]
        for machine in (RTX_3090, pins_at_most(RTX_3090, 8 * GB))
    )
    assert free.prediction.pinned_bytes > 8 * GB
    assert held.fits
    assert held.prediction.pinned_bytes <= 8 * GB
    assert int(held.settings["resident_blocks"]) > int(free.settings["resident_blocks"])


def test_where_the_probe_stopped_by_itself_there_is_no_limit() -> None:
    workload = Workload(batch_size=1, seq_len=512, dtype="fp16")
    stopped = pins_at_most(RTX_3090, 8 * GB, refused=False)
    assert plans(stopped, "opt-13b", workload, "zo2") == plans(RTX_3090, "opt-13b", workload, "zo2")


@given(
    limit=st.integers(0, 40),
    model=st.sampled_from(("opt-1.3b", "qwen2.5-1.5b", "llama-3.1-8b")),
    seq_len=st.sampled_from((128, 1024)),
)
@settings(max_examples=8, deadline=None)
def test_no_plan_that_fits_pins_more_than_the_limit(limit: int, model: str, seq_len: int) -> None:
    machine = pins_at_most(RTX_3090, limit * GB)
    for plan in plans(machine, model, Workload(batch_size=1, seq_len=seq_len)):
        assert not plan.fits or plan.prediction.pinned_bytes <= limit * GB


@given(
    profile=st.sampled_from(("rtx-3090", "rtx-4090", "rtx-a1000-laptop", "h200")),
    seq_len=st.sampled_from((128, 512, 1024)),
    model=st.sampled_from(("opt-1.3b", "opt-13b", "qwen2.5-1.5b")),
)
@settings(max_examples=8, deadline=None)
def test_no_number_of_resident_blocks_is_forecast_faster_than_the_chosen(
    profile: str, seq_len: int, model: str
) -> None:
    machine, workload = find_profile(Path(profile)), Workload(batch_size=1, seq_len=seq_len, dtype="fp16")
    shape = named_shape(model)
    context = PlanningContext(
        engine="zo2", machine=machine, shape=shape, workload=workload,
        budget=budget_of(machine, None, None, None),
    )  # fmt: skip
    (chosen,) = recommend(machine, shape, workload, ["zo2"], {})
    if not chosen.fits or chosen.prediction.step_s is None:
        return
    assert machine.gpu is not None
    for resident in range(0, shape.num_blocks + 1, 3):
        typed = replace(chosen.settings.typed, resident_blocks=resident, disk_blocks=0)
        cost = context.cost(typed)
        usable = (1 - FREE_SHARE) * machine.gpu.free_bytes
        if gpu_bytes_needed(cost, context.budget) <= usable and context.why_missing(typed) is None:
            other_s = predict(cost, machine, workload).step_s
            assert other_s is not None
            assert chosen.prediction.step_s <= 1.001 * AS_FAST * other_s


def test_a_reason_never_calls_slower_what_is_forecast_faster() -> None:
    (chosen,) = plans(RTX_3090, "opt-13b", Workload(batch_size=1, seq_len=512, dtype="fp16"), "zo2")
    (thirty,) = recommend(
        RTX_3090, named_shape("opt-13b"), Workload(batch_size=1, seq_len=512, dtype="fp16"), ["zo2"],
        {"zo2": defaults("zo2").replaced(resident_blocks=30)},
    )  # fmt: skip
    assert thirty.prediction.step_s is not None
    assert chosen.prediction.step_s is not None
    assert chosen.prediction.step_s <= AS_FAST * thirty.prediction.step_s
    assert "no faster" not in " ".join(chosen.reasons)


def test_a_gpu_without_bf16_is_answered_with_what_to_type() -> None:
    t4 = find_profile(Path("t4"))
    found = {plan.engine: plan for plan in plans(t4, "qwen2.5-0.5b", Workload(batch_size=1, seq_len=512))}
    assert not any(plan.fits or plan.available for plan in found.values())
    assert "use --dtype fp32" in str(found["native"].why_not)
    assert "use --dtype fp16 or fp32" in str(found["zo2"].why_not)
    assert dtypes_for("native", t4) == ("fp32",)
    # A driver that emulates the products gives them a rate, and then they can be planned.
    assert t4.gpu is not None
    emulated = replace(t4, gpu=replace(t4.gpu, matmul_bf16_flops=measured(2e12)))
    assert any(plan.fits for plan in plans(emulated, "qwen2.5-0.5b", Workload(batch_size=1, seq_len=512)))
    # Nothing says that a GPU of unknown kind cannot.
    unknown = replace(t4, gpu=replace(t4.gpu, compute_capability=None))
    assert all(plan.available for plan in plans(unknown, "qwen2.5-0.5b", Workload(batch_size=1, seq_len=512)))


def test_a_shortage_is_that_of_the_nearest_setting() -> None:
    workload = Workload(batch_size=2, seq_len=2048)
    (plan,) = plans(find_profile(Path("rtx-4090")), "llama-3.1-8b", workload, "torchao-offload")
    assert plan.settings["offload_gradients"] is True
    assert "917 MiB missing" in str(plan.why_not)


def test_every_kind_of_memory_that_is_missing_is_named() -> None:
    machine = pins_at_most(RTX_3090, GB)
    (plan,) = recommend(
        machine, named_shape("opt-30b"), Workload(batch_size=1, seq_len=512), ["torchao-offload"], {}
    )
    told = str(plan.why_not)
    assert "of GPU memory" in told
    assert "of pinned memory" in told
    assert "of host memory" in told


@pytest.mark.parametrize("free_gb", [1, 1000])
def test_blocks_on_disk_need_room_there(free_gb: int) -> None:
    disk = Disk(
        folder="/spill", file_system="ext4", total_bytes=2000 * GB, free_bytes=free_gb * GB,
        read_bytes_per_s=measured(3e9),
    )  # fmt: skip
    (plan,) = recommend(
        replace(RTX_3090, disk=disk), OPT_13B, Workload(batch_size=1, seq_len=512, dtype="fp16"), ["zo2"], {},
        host_bytes=8 * GB, vram_bytes=8 * GB,
    )  # fmt: skip
    assert plan.fits == (free_gb == 1000)
    if not plan.fits:
        assert "of disk" in str(plan.why_not)


def test_a_model_without_matrices_in_its_blocks_has_no_plan_by_lsp_alone() -> None:
    """SqueezeBERT's are convolutions."""
    base = named_shape("roberta-base")
    shape = replace(base, matrices=())
    found = recommend(RTX_3090, shape, Workload(batch_size=1, seq_len=128), default_engines(), {})
    refused = {plan.engine: plan.why_not for plan in found if not plan.available}
    assert refused == {"lsp": "compresses matrices, and the blocks of this model have none"}


def test_four_bits_are_not_planned_for_layers_that_the_library_has_no_form_of() -> None:
    """GPT-2's matrices are transformers' `Conv1D`: runs of `qlora` refuse it."""
    workload = Workload(batch_size=1, seq_len=128)
    (plan,) = recommend(RTX_3090, named_shape("gpt2"), workload, ["qlora"], {})
    assert not plan.available
    assert "linear layers" in str(plan.why_not)
    (plan,) = recommend(RTX_3090, named_shape("opt-125m"), workload, ["qlora"], {})
    assert plan.available


@pytest.mark.parametrize("engine", ["native", "lora", "lsp", "exact-offload"])
def test_the_shortage_is_that_of_the_nearest_setting(engine: str) -> None:
    """CUDA graphs' pool is no part of what a job cannot do without."""
    shape, workload = named_shape("llama-3.1-8b"), Workload(batch_size=1, seq_len=512)
    streams = engine in ("lsp", "exact-offload")
    chosen: dict[str, str | bool] = {"weights": "resident"} if streams else {}

    def missing(settings: dict[str, dict[str, str | bool]]) -> str | None:
        given = given_for_each(settings)
        (plan,) = recommend(RTX_3090, shape, workload, [engine], given, vram_bytes=16 * GB)
        assert not plan.fits
        return plan.why_not

    assert missing({engine: chosen}) == missing({engine: {**chosen, "graphs": False}})
