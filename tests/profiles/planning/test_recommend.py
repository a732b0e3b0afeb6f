"""Plans: what fits, what is chosen and why."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_shapes import (
    DEEPSEEK_1B,
    DEEPSEEK_7B,
    H200,
    LAPTOP_CPU,
    OPT_13B,
    TINY,
    llama,
    measured,
    opt,
    with_vram,
)
from settings_given import given_for_each

from engines import entry
from engines.costs.resources.traffic import FUSED_ADAM_BYTES
from engines.costs.table import traffic
from engines.costs.transformer import PROCESS_HOST_BYTES, PROCESS_HOST_BYTES_WITHOUT_GPU
from engines.costs.zo2 import resident_indices
from engines.errors import UserError
from engines.settings.parse import parse_settings
from engines.shapes import ModelShape, Workload
from harness.models.configs import named_shape
from profiles.catalog import find_profile
from profiles.machine import Disk, Machine, absent
from profiles.planning.budget import CONTEXT_BYTES, budget_of, gpu_bytes_needed
from profiles.planning.context import AS_FAST
from profiles.planning.layer_times import resource_s
from profiles.planning.methods.lsp import STREAMED_FASTER
from profiles.planning.methods.zo2 import FOLD_GPU_SHARE, FOLDS
from profiles.planning.plan import Plan
from profiles.planning.predict import predict
from profiles.planning.recommend import rank, recommend
from profiles.planning.subspace_sizes import HIDING_SHARE, lsp_ladder
from profiles.rates import COPY_WRITE_ALLOCATE
from profiles.units import format_seconds

TRAINING = Workload(batch_size=4, seq_len=1024, dtype="bf16")
FORWARD_ONLY = Workload(batch_size=1, seq_len=2048, dtype="fp16")
ON_CPU = Workload(batch_size=4, seq_len=64, dtype="fp32")
ENGINES = ("native", "torchao-offload", "lsp", "mezo", "zo2")
GB = 10**9
BUDGET = budget_of(H200, None, None, None)


def plan(
    engine: str,
    machine: Machine = H200,
    shape: ModelShape = DEEPSEEK_7B,
    workload: Workload = TRAINING,
    **limits: int,
) -> Plan:
    (only,) = recommend(machine, shape, workload, [engine], {}, **limits)  # type: ignore[arg-type]
    return only


def test_plans_that_fit_come_first_and_the_fastest_of_them() -> None:
    plans = recommend(H200, DEEPSEEK_7B, TRAINING, ENGINES, {}, vram_bytes=24 * GB)
    assert {p.engine for p in plans} == set(ENGINES)
    fits = [p.fits for p in plans]
    assert fits == sorted(fits, reverse=True)
    assert {p.engine for p in plans if not p.fits} == {"native"}
    for kind in (True, False):
        orders = [entry(p.engine).order for p in plans if p.fits is kind]
        assert orders == sorted(orders)  # with gradients first: a step of the others is not worth as much
        for order in ("first", "zeroth"):
            alike = [p for p in plans if p.fits is kind and entry(p.engine).order == order]
            times = [p.prediction.step_s or 0.0 for p in alike]
            assert times == sorted(times)
    assert plans == sorted(plans, key=rank)


def test_a_plan_without_a_time_comes_after_those_with_one() -> None:
    machine = replace(H200, link=None)
    plans = recommend(machine, TINY, TRAINING, ENGINES, {})
    # zo2 keeps every block of so small a model on the GPU, so it needs no link.
    assert next(p.engine for p in plans if p.prediction.step_s is not None) == "native"
    for order in ("first", "zeroth"):
        absent_times = [p.prediction.step_s is None for p in plans if entry(p.engine).order == order]
        assert absent_times == sorted(absent_times)
    assert {p.engine for p in plans if p.prediction.step_s is not None} == {"native", "mezo", "zo2"}


def test_why_not_names_the_missing_bytes() -> None:
    native = plan("native", vram_bytes=24 * GB)
    assert not native.fits
    assert native.why_not is not None
    assert "of GPU memory" in native.why_not
    assert "22.4 GiB are usable" in native.why_not
    assert "missing" in native.why_not
    host = plan("torchao-offload", host_bytes=32 * GB)
    assert host.why_not is not None
    assert "of host memory, 29.8 GiB are usable: 29.9 GiB missing" in host.why_not
    pinned = plan("zo2", shape=OPT_13B, workload=FORWARD_ONLY, vram_bytes=8 * GB, pinned_limit_bytes=GB)
    assert pinned.why_not is not None
    assert "of pinned memory" in pinned.why_not
    assert plan("native").why_not is None


def test_the_context_and_fragmentation_count() -> None:
    cost = traffic("native", DEEPSEEK_1B, TRAINING, parse_settings("native", {}))
    needed = gpu_bytes_needed(cost, BUDGET)
    assert needed > cost.peak_gpu_bytes + CONTEXT_BYTES

    def fits(machine: Machine, vram_bytes: int) -> bool:
        asked = given_for_each({"native": {"graphs": True}})
        (found,) = recommend(machine, DEEPSEEK_1B, TRAINING, ["native"], asked, vram_bytes=vram_bytes)
        return found.fits

    assert fits(H200, needed)
    assert not fits(H200, needed - 1)
    # What others hold of the GPU is not usable, whatever the limit.
    assert not fits(with_vram(H200, needed - 1), needed)


def test_without_graphs_where_they_alone_do_not_fit() -> None:
    needed = gpu_bytes_needed(traffic("native", DEEPSEEK_1B, TRAINING, parse_settings("native", {})), BUDGET)
    assert "graphs" not in plan("native", shape=DEEPSEEK_1B, vram_bytes=needed).settings
    found = plan("native", shape=DEEPSEEK_1B, vram_bytes=needed - 1)
    assert found.fits
    assert found.settings["graphs"] is False
    assert found.reasons[0].startswith("graphs=false: with CUDA graphs and their pool it needs")


def test_unknown_engine_and_setting_are_the_users_errors() -> None:
    with pytest.raises(UserError, match="there is no such engine"):
        recommend(H200, TINY, TRAINING, ["lspp"], {})
    with pytest.raises(UserError, match="lists the settings of lsp"):
        recommend(H200, TINY, TRAINING, ["lsp"], given_for_each({"lsp": {"rank": 3}}))


def test_overrides_win_and_are_kept_as_given() -> None:
    overrides: dict[str, dict[str, object]] = {
        "lsp": {"d": "256", "learning_rate": 3e-5},
        "zo2": {"resident_blocks": 3},
        "torchao-offload": {"offload_gradients": True},
        "native": {"weight_decay": 0.1},
    }
    plans = {p.engine: p for p in recommend(H200, DEEPSEEK_1B, TRAINING, ENGINES, given_for_each(overrides))}
    for engine, values in overrides.items():
        assert {key: plans[engine].settings[key] for key in values} == values
        assert any(reason.startswith("as set: ") for reason in plans[engine].reasons)
    assert plans["lsp"].prediction.h2d_bytes == 24 * 7 * 256 * 256 * 2
    assert plans["zo2"].prediction.h2d_bytes == 21 * 2 * DEEPSEEK_1B.block_parameters
    assert plans["mezo"].settings == {}


def test_the_command_that_checks_a_plan() -> None:
    arguments = {"lsp": "--model tiny-llama --batch-size 4"}
    (only,) = recommend(H200, TINY, TRAINING, ["lsp"], {}, job_arguments=arguments)
    assert shlex.split(only.verify_command) == [
        "lspzo-bench", "compare", "--model", "tiny-llama", "--batch-size", "4", "--engine", "lsp",
    ]  # fmt: skip


# --- a loss in chunks ---------------------------------------------------------------------------------


def test_the_loss_is_in_chunks_where_nothing_fits_without() -> None:
    shape = llama("llama-8b", 4096, 14336, 32, 32, vocabulary=128256)
    many = Workload(batch_size=8, seq_len=2048, dtype="bf16")
    (chosen,) = recommend(H200, shape, many, ["lora"], {}, vram_bytes=32 * GB)
    assert chosen.fits
    assert chosen.settings["loss_tokens"] == 1024
    (told,) = (reason for reason in chosen.reasons if reason.startswith("loss_tokens"))
    assert re.match(r"loss_tokens=1024: without it the job needs .* of GPU memory", told)
    whole = given_for_each({"lora": {"loss_tokens": "all"}})
    assert not recommend(H200, shape, many, ["lora"], whole, vram_bytes=32 * GB)[0].fits
    assert "loss_tokens" not in plan("lora", shape=shape).settings
    # What no engine can compute in chunks is not planned so: the run would be refused.
    for its, asked in (
        (replace(shape, family="gemma2"), many),
        (shape, replace(many, words_alone=True)),
    ):
        (other,) = recommend(H200, its, asked, ["lora"], {}, vram_bytes=32 * GB)
        assert "loss_tokens" not in other.settings
        assert not other.fits


# --- lsp ----------------------------------------------------------------------------------------------


def test_ladder_of_d() -> None:
    assert lsp_ladder(2048) == list(range(256, 1537, 128))
    assert lsp_ladder(768) == [128, 256, 384, 512]
    assert lsp_ladder(384) == [128, 256]
    assert lsp_ladder(256) == [32, 64, 128]
    assert lsp_ladder(64) == [8, 16, 32]
    assert lsp_ladder(2) == [1]
    assert all(lsp_ladder(hidden) for hidden in range(1, 5000))


def with_host_memory(bytes_per_s: float) -> Machine:
    """Whose copies and AdamW take so much of it."""
    return replace(
        H200,
        cpu=replace(H200.cpu, adam_elements_per_s=measured(bytes_per_s / FUSED_ADAM_BYTES)),
        memory=replace(H200.memory, copy_bytes_per_s=measured(bytes_per_s / COPY_WRITE_ALLOCATE)),
    )


def test_d_is_the_largest_that_hides() -> None:
    assert plan("lsp", machine=with_host_memory(2.8e12), shape=DEEPSEEK_1B).settings["d"] == 1536
    slow = with_host_memory(28e9)
    chosen = plan("lsp", machine=slow, shape=DEEPSEEK_1B)
    d = int(chosen.settings["d"])
    assert 256 < d < 1024
    for size, hides in ((d, True), (d + 128, False)):
        values = {"d": size, "r": 4, "checkpointed_blocks": 0}
        cost = traffic("lsp", DEEPSEEK_1B, TRAINING, parse_settings("lsp", values))
        busy = resource_s(cost, slow, TRAINING)
        assert busy is not None
        slowest_s = max(time_s for name, time_s in busy.items() if name != "gpu")
        assert (slowest_s <= HIDING_SHARE * busy["gpu"]) is hides
    assert any(f"d={d}" in reason and "ms of GPU time" in reason for reason in chosen.reasons)


@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 128), (1, 384), (4, 1024)])
@pytest.mark.parametrize("accumulation", [1, 4, 16])
def test_no_lsp_of_as_many_elements_is_faster_with_its_weights_elsewhere(
    batch_size: int, seq_len: int, accumulation: int
) -> None:
    """What micro-batches start was counted too dearly of weights on the GPU, and too cheaply of streamed
    ones: 308 ms for gpt2-large in place of 155 (4 x 384 tokens)."""
    workload = Workload(batch_size=batch_size, seq_len=seq_len, accumulation=accumulation, dtype="bf16")
    for shape in (named_shape("gpt2-large"), DEEPSEEK_1B):
        chosen = plan_for(workload, shape, {})
        d = chosen.settings["d"]
        others = [plan_for(workload, shape, {"weights": where, "d": d}) for where in ("resident", "streamed")]
        times = [each.prediction.step_s for each in others if each.fits]
        step_s = chosen.prediction.step_s
        assert step_s is not None
        assert times
        assert step_s <= 1.05 * min(each for each in times if each is not None)


def plan_for(workload: Workload, shape: ModelShape, values: dict[str, object]) -> Plan:
    (found,) = recommend(H200, shape, workload, ["lsp"], given_for_each({"lsp": values}))
    return found


@pytest.mark.parametrize(
    ("model", "engine", "profile", "dtype", "is_captured"),
    [
        ("qwen2.5-0.5b", "native", "rtx-3060-12gb", "fp32", True),
        ("roberta-base", "native", "rtx-3060-12gb", "fp32", True),
        ("deepseek-coder-1.3b", "adamw-8bit", "rtx-4060-ti-16gb", "fp32", True),
        ("deepseek-coder-1.3b", "galore", "rtx-4060-ti-16gb", "fp32", False),
        ("deepseek-coder-1.3b", "native", "h200", "bf16", True),
    ],
)
def test_graphs_are_kept_unless_a_step_is_predicted_faster_without_them(
    model: str, engine: str, profile: str, dtype: str, is_captured: bool
) -> None:
    """Which is for the memory that they take, and never for what they do."""
    workload = Workload(batch_size=1, seq_len=128, accumulation=4, dtype=dtype)  # type: ignore[arg-type]
    machine, shape = find_profile(Path(profile)), named_shape(model)

    def planned(values: dict[str, object]) -> Plan:
        (found,) = recommend(machine, shape, workload, [engine], given_for_each({engine: values}))
        assert found.fits
        return found

    chosen, captured, plain = planned({}), planned({"graphs": True}), planned({"graphs": False})
    assert chosen.settings.get("graphs", True) is is_captured
    if not is_captured:
        assert any("else " in each for each in chosen.reasons if each.startswith("graphs=false: without"))
    times = [each.prediction.step_s for each in (captured, plain)]
    assert chosen.prediction.step_s is not None
    assert chosen.prediction.step_s <= AS_FAST * min(each for each in times if each is not None)


def test_a_plan_of_lsp_tells_what_the_loss_pays() -> None:
    (chosen,) = recommend(H200, DEEPSEEK_1B, TRAINING, ["lsp"], given_for_each({"lsp": {"d": 1280}}))
    told = [reason for reason in chosen.reasons if reason.startswith("quality")]
    assert told[0] == "quality: d is 0.62 of n, and d = 0.5 n was studied, over three seeds"
    assert "(3.3 M parameters) it ended 5 % (4.3 to 5.8) above native's perplexity per byte" in told[1]
    assert told[-1] == "quality: of 1.35 B parameters it is not known"


def test_a_d_that_compresses_nothing_is_said() -> None:
    said = "d={}: nothing is compressed, as no matrix has more than 2048 on its smaller dimension"
    for d, is_said in ((2047, False), (2048, True), (5000, True)):
        (chosen,) = recommend(H200, DEEPSEEK_1B, TRAINING, ["lsp"], given_for_each({"lsp": {"d": d}}))
        assert (said.format(d) in chosen.reasons) is is_said


def test_lsp_is_short_of_what_it_lacks_least_of() -> None:
    """Streamed weights lack some host memory, weights on the GPU six cards."""
    machine, shape = find_profile(Path("rtx-4090")), named_shape("opt-66b")
    workload = Workload(batch_size=1, seq_len=1024)
    (found,) = recommend(machine, shape, workload, ["lsp"], {}, host_bytes=128 * 10**9)
    assert not found.fits
    assert found.settings["weights"] == "streamed"
    assert "host memory" in (found.why_not or "")
    assert "GPU memory" not in (found.why_not or "")


def test_moments_in_bf16_are_said_and_let_a_larger_d_hide() -> None:
    slow = replace(H200, cpu=replace(H200.cpu, adam_elements_per_s=measured(1.6e9)))
    exact = plan("lsp", machine=slow, shape=DEEPSEEK_1B)
    overrides = given_for_each({"lsp": {"moments": "bf16"}})
    (compact,) = recommend(slow, DEEPSEEK_1B, TRAINING, ["lsp"], overrides)
    assert int(exact.settings["d"]) < int(compact.settings["d"])
    said = "approximate: Adam's moments of the subspaces in bf16"
    assert said in compact.reasons
    assert said not in exact.reasons
    (offered,) = [each for each in exact.reasons if each.startswith("not chosen unless set: moments")]
    assert offered.endswith(f"would let d={compact.settings['d']} hide in place of {exact.settings['d']}")
    large = {"d": 1536}
    told = {}
    for moments in (None, "fp32", "bf16"):
        values = large if moments is None else {**large, "moments": moments}
        (told[moments],) = recommend(slow, DEEPSEEK_1B, TRAINING, ["lsp"], given_for_each({"lsp": values}))
    (offered,) = [each for each in told[None].reasons if each.startswith("not chosen unless set: moments")]
    with_bf16, without = told["bf16"].prediction.step_s, told[None].prediction.step_s
    assert with_bf16 is not None
    assert without is not None
    assert offered.endswith(f"{format_seconds(with_bf16)} a step in place of {format_seconds(without)}")
    assert not any("unless set: moments" in each for key in ("fp32", "bf16") for each in told[key].reasons)


def test_d_hides_behind_the_one_micro_batch_that_updates() -> None:
    slow = replace(H200, cpu=replace(H200.cpu, adam_elements_per_s=measured(4e8)))
    once = plan("lsp", machine=slow, shape=DEEPSEEK_1B)
    eight = plan("lsp", machine=slow, shape=DEEPSEEK_1B, workload=replace(TRAINING, accumulation=8))
    assert abs(int(eight.settings["d"]) - int(once.settings["d"])) <= 128
    assert any("of GPU time in one micro-batch" in reason for reason in eight.reasons)


def test_weights_stay_where_they_fit_though_one_micro_batch_does_not_hide_updates() -> None:
    """Streamed, all four would by forecast; measured it was slower or no faster (engines/EXPERIMENTS.md)."""
    slow = replace(H200, cpu=replace(H200.cpu, adam_elements_per_s=measured(1.8e9)))
    four = replace(TRAINING, accumulation=4)

    def found(**values: object) -> Plan:
        own = given_for_each({"lsp": {"d": 2048, **values}})
        (only,) = recommend(slow, DEEPSEEK_7B, four, ["lsp"], own)
        return only

    chosen, streamed = found(), found(weights="streamed")
    assert "weights" not in chosen.settings
    assert chosen.prediction.step_s is not None
    assert streamed.prediction.step_s is not None
    assert streamed.prediction.step_s < STREAMED_FASTER * chosen.prediction.step_s


def test_d_has_a_floor() -> None:
    chosen = plan("lsp", machine=with_host_memory(28e7), shape=DEEPSEEK_1B)
    assert chosen.settings["d"] == 256
    assert "do not hide" in chosen.reasons[1]


def test_d_shrinks_until_host_memory_holds_the_cores() -> None:
    roomy = plan("lsp", shape=DEEPSEEK_7B)
    tight = plan("lsp", shape=DEEPSEEK_7B, host_bytes=6 * GB)
    assert tight.fits
    assert int(tight.settings["d"]) < int(roomy.settings["d"])


def test_r_is_four_but_for_small_models() -> None:
    assert plan("lsp", shape=DEEPSEEK_1B).settings["r"] == 4
    small = plan("lsp", machine=LAPTOP_CPU, shape=TINY, workload=ON_CPU)
    assert small.settings["r"] == 8
    (tiny_d,) = recommend(LAPTOP_CPU, TINY, ON_CPU, ["lsp"], given_for_each({"lsp": {"d": 2}}))
    assert tiny_d.settings["r"] == 2  # never more nonzeros than places


def test_published_values_that_are_not_used_are_told_as_such() -> None:
    (told,) = (each for each in plan("lsp", shape=DEEPSEEK_1B).reasons if "published for this model" in each)
    assert told.startswith("not used here unless set: what is published for this model, d=")
    assert told.endswith("(--set lsp.preset=deepseek-coder-1.3b)")


def test_absent_figures_leave_the_smallest_d() -> None:
    machine = replace(H200, cpu=replace(H200.cpu, adam_elements_per_s=absent("timed out")))
    chosen = plan("lsp", machine=machine, shape=DEEPSEEK_1B)
    assert chosen.settings["d"] == 256
    assert chosen.prediction.step_s is None


# --- zo2 and torchao ----------------------------------------------------------------------------------


def test_zo2_uses_all_of_a_limit_that_the_user_named() -> None:
    chosen = plan("zo2", shape=OPT_13B, workload=FORWARD_ONLY, vram_bytes=16 * GB)
    resident = int(chosen.settings["resident_blocks"])
    assert 0 < resident < 40
    assert chosen.fits
    more = traffic("zo2", OPT_13B, FORWARD_ONLY, parse_settings("zo2", {"resident_blocks": resident + 1}))
    assert gpu_bytes_needed(more, BUDGET) > 16 * GB


def test_zo2_leaves_a_tenth_free_of_a_gpu_without_a_named_limit() -> None:
    named = plan("zo2", shape=OPT_13B, workload=FORWARD_ONLY, vram_bytes=16 * GB)
    free = plan("zo2", machine=with_vram(H200, 16 * GB), shape=OPT_13B, workload=FORWARD_ONLY)
    assert int(free.settings["resident_blocks"]) < int(named.settings["resident_blocks"])
    assert free.prediction.peak_gpu_bytes < 0.9 * 16 * GB


@pytest.mark.parametrize("vram_bytes", [None, 23 * GB])
def test_zo2_takes_no_number_of_blocks_that_another_is_faster_than(vram_bytes: int | None) -> None:
    """Where more blocks stay, rare downloads stop being worth it, and a step takes longer again."""
    machine, shape = find_profile(Path("rtx-3090")), named_shape("llama-3.1-8b")
    workload = Workload(batch_size=2, seq_len=64, dtype="fp32")
    (chosen,) = recommend(machine, shape, workload, ["zo2"], {}, vram_bytes=vram_bytes)
    times = []
    for count in range(17):
        asked = given_for_each({"zo2": {"resident_blocks": count}})
        (other,) = recommend(machine, shape, workload, ["zo2"], asked, vram_bytes=vram_bytes)
        times.append(other.prediction.step_s or 0.0)
    assert chosen.prediction.step_s is not None
    assert chosen.prediction.step_s <= AS_FAST * min(times)
    assert "would fit, and take longer" in chosen.reasons[0]


def test_zo2_streams_what_hides_behind_compute() -> None:
    workload = replace(FORWARD_ONLY, batch_size=16)
    chosen = plan("zo2", shape=OPT_13B, workload=workload)
    assert chosen.settings["resident_blocks"] == 0
    assert "take as long" in chosen.reasons[0]
    assert "hide behind the GPU's work" in chosen.reasons[0]
    bound = plan("zo2", shape=OPT_13B, workload=replace(FORWARD_ONLY, seq_len=256))
    assert int(bound.settings["resident_blocks"]) > 0


OPT_SIZES = {
    "1.3B": opt("opt-1.3b", 2048, 24, 32, tied=False),
    "6.7B": opt("opt-6.7b", 4096, 32, 32, tied=False),
    "13B": opt("opt-13b", 5120, 40, 40, tied=False),
    "30B": opt("opt-30b", 7168, 48, 56, tied=False),
}


def zo2_plan(
    shape: ModelShape, workload: Workload = FORWARD_ONLY, machine: Machine = H200, **values: object
) -> Plan:
    (only,) = recommend(machine, shape, workload, ["zo2"], given_for_each({"zo2": values}))
    return only


def told(chosen: Plan, setting: str) -> str:
    """The reason for a setting."""
    (reason,) = (reason for reason in chosen.reasons if reason.startswith(f"{setting}="))
    return reason


@pytest.mark.parametrize("size", OPT_SIZES)
def test_zo2_replays_updates_where_the_link_is_the_limit(size: str) -> None:
    shape = OPT_SIZES[size]
    chosen = zo2_plan(shape, resident_blocks=0)
    k = int(chosen.settings["fold_every"])
    assert k > 1
    floor_s, step_s = chosen.prediction.floor_s, chosen.prediction.step_s
    assert floor_s is not None
    assert step_s is not None
    assert step_s <= 1.04 * floor_s
    # No other is faster by more than a hundredth, unless replaying leaves the GPU too little room.
    for other in FOLDS:
        cost = traffic(
            "zo2", shape, FORWARD_ONLY, parse_settings("zo2", {"resident_blocks": 0, "fold_every": other})
        )
        busy, other_s = resource_s(cost, H200, FORWARD_ONLY), predict(cost, H200, FORWARD_ONLY).step_s
        assert busy is not None
        assert other_s is not None
        has_room = busy["gpu"] <= FOLD_GPU_SHARE * max(busy["h2d"], busy["d2h"])
        assert has_room or other > k
        if has_room:
            assert step_s <= AS_FAST * other_s
        if other < k:
            assert other_s > step_s


def test_zo2_says_what_replaying_saves() -> None:
    reason = told(zo2_plan(OPT_SIZES["13B"], resident_blocks=0), "fold_every")
    assert reason == (
        "fold_every=8: a download every 8th step: up 460 ms, GPU 285 ms, "
        "2.93 GiB down per step instead of 23.4 GiB"
    )


def test_zo2_asks_as_many_queries_as_the_link_has_time_for() -> None:
    """Where the link decides, so many take as long as one, and no more would; fewer tokens leave time for
    more of them. Nothing is chosen that was set, nor with one query for MeZO, which is told of them."""
    knobs = {"resident_blocks": 0, "estimator": "1.5-spsa", "noise": "rademacher"}
    found = []
    for tokens in (2048, 1024, 384, 128):
        workload = replace(FORWARD_ONLY, seq_len=tokens)
        chosen = zo2_plan(OPT_13B, workload, **knobs)
        queries = int(chosen.settings.typed.queries)
        one, more = (zo2_plan(OPT_13B, workload, **knobs, queries=n) for n in (1, queries + 1))
        assert chosen.prediction.step_s <= 1.02 * one.prediction.step_s
        assert more.prediction.step_s > 1.02 * one.prediction.step_s
        found.append(queries)
    assert found == sorted(found)
    assert found[0] < found[-1]
    assert told(chosen, "queries").startswith(f"queries={queries}: as many as hide behind the link")
    mezo = zo2_plan(OPT_13B, workload, resident_blocks=0)
    assert mezo.settings.typed.queries == 1
    assert "would take as long" in told(mezo, "queries")
    assert zo2_plan(OPT_13B, workload, **knobs, queries=3).settings.typed.queries == 3


@pytest.mark.parametrize("train", ["lora", "all"])
def test_zo2_sends_lossless_tiles_of_bf16_where_that_is_faster(train: str) -> None:
    workload = replace(FORWARD_ONLY, dtype="bf16")
    chosen = zo2_plan(OPT_13B, workload, resident_blocks=0, train=train)
    whole = zo2_plan(OPT_13B, workload, resident_blocks=0, train=train, base="full")
    assert chosen.settings.typed.base == "lossless"
    assert chosen.prediction.step_s < 0.95 * whole.prediction.step_s
    assert "the same bits in fewer bytes" in told(chosen, "base")
    assert zo2_plan(OPT_13B, workload, train=train).settings.typed.base == "full"  # nothing comes up
    for other in (replace(workload, dtype="fp16"), workload):
        knobs = {} if other.dtype == "fp16" else {"base": "int8"}
        plan = zo2_plan(OPT_13B, other, resident_blocks=0, train=train, **knobs)
        assert not any("lossless" in reason for reason in plan.reasons)


def test_a_direction_for_each_example_takes_a_step_of_mezo_on_a_link_that_decides() -> None:
    workload = replace(FORWARD_ONLY, batch_size=16, seq_len=64)
    mezo = zo2_plan(OPT_13B, workload, resident_blocks=0)
    knobs = {"estimator": "grzo", "noise": "rademacher"}
    plan = zo2_plan(OPT_13B, workload, resident_blocks=0, **knobs)
    assert plan.prediction.step_s <= mezo.prediction.step_s
    assert told(plan, "fold_every") == "fold_every=1: every 50 steps, when the noise's window ends"


def test_zo2_tells_of_near_normals_where_a_step_waits_for_normals() -> None:
    slow = zo2_plan(OPT_13B, resident_blocks=0, base="int8")
    assert "near-normals in half the instructions" in told(slow, "noise")
    near = zo2_plan(OPT_13B, resident_blocks=0, base="int8", noise="binomial")
    assert near.prediction.step_s < 0.95 * slow.prediction.step_s
    for knobs in ({"base": "int8", "noise": "binomial"}, {"base": "full"}, {"base": "int8", "train": "lora"}):
        assert "noise=" not in " ".join(
            each for each in zo2_plan(OPT_13B, resident_blocks=0, **knobs).reasons if "as set" not in each
        )


def test_hidden_states_wait_on_the_host_where_the_gpu_has_no_room_for_them() -> None:
    workload = replace(FORWARD_ONLY, batch_size=16, seq_len=512)
    knobs = {"resident_blocks": 0, "queries": 40, "noise": "rademacher"}
    here, away = (traffic("zo2", OPT_13B, workload, parse_settings("zo2", {**knobs, "hidden_states": place}))
                  for place in ("gpu", "host"))  # fmt: skip
    states = 80 * 16 * 512 * OPT_13B.hidden * 2
    assert here.gpu_memory_bytes["activations"] - away.gpu_memory_bytes["activations"] > 0.8 * states
    small = replace(H200, gpu=replace(H200.gpu, total_bytes=9 * GB, free_bytes=9 * GB))
    chosen = zo2_plan(OPT_13B, workload, machine=small, **knobs)
    assert chosen.fits
    assert chosen.settings["hidden_states"] == "host"
    roomy = zo2_plan(OPT_13B, workload, **knobs)
    assert "hidden_states" not in roomy.settings


def test_replaying_leaves_the_gpu_a_margin() -> None:
    """The slower the GPU's memory, the longer noise takes, and the fewer updates are replayed."""
    assert H200.gpu is not None
    seen = []
    for factor in (1, 2, 4, 8, 16):
        gpu = replace(H200.gpu, copy_bytes_per_s=measured(4.1e12 / factor))
        chosen = zo2_plan(OPT_13B, machine=replace(H200, gpu=gpu), resident_blocks=0)
        seen.append(int(chosen.settings["fold_every"]))
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > seen[-1] == 1


def test_zo2_downloads_every_step_where_that_hides() -> None:
    chosen = zo2_plan(OPT_SIZES["13B"], replace(FORWARD_ONLY, batch_size=8))
    assert chosen.settings == {"resident_blocks": 0, "fold_every": 1}
    assert "downloads hide behind the GPU's work" in told(chosen, "fold_every")


def test_there_is_nothing_to_fold_where_nothing_goes_down() -> None:
    for values in ({"resident_blocks": 40}, {"resident_blocks": 0, "train": "lora"}):
        chosen = zo2_plan(OPT_13B, **values)
        assert chosen.settings["fold_every"] == 1
        assert told(chosen, "fold_every") == "fold_every=1: nothing goes down"
    unlinked = zo2_plan(OPT_13B, machine=replace(H200, link=None), resident_blocks=0)
    assert unlinked.settings["fold_every"] == 1
    assert "lacks figures" in told(unlinked, "fold_every")
    on_cpu = plan("zo2", machine=LAPTOP_CPU, shape=TINY, workload=ON_CPU)
    assert told(on_cpu, "fold_every") == "fold_every=1: there is no link to relieve"


def test_fold_every_as_set_is_kept_and_decides_with_the_residents() -> None:
    chosen = zo2_plan(OPT_13B, fold_every=3)
    assert chosen.settings["fold_every"] == 3
    resident = int(chosen.settings["resident_blocks"])
    streamed, block = 40 - resident, 2 * OPT_13B.block_parameters
    assert chosen.prediction.d2h_bytes == streamed * (block // 3)
    assert not any(reason.startswith("fold_every=") for reason in chosen.reasons)


def test_the_plan_says_which_blocks_stay() -> None:
    chosen = plan("zo2", shape=OPT_SIZES["13B"], workload=FORWARD_ONLY, vram_bytes=24 * GB)
    resident = int(chosen.settings["resident_blocks"])
    assert named_blocks(told(chosen, "resident_blocks")) == resident_indices(40, resident)
    for count in (1, 2, 20, 39):
        (reason,) = (each for each in zo2_plan(OPT_13B, resident_blocks=count).reasons if "stay" in each)
        assert named_blocks(reason) == resident_indices(40, count)
    assert "all blocks stay on the GPU" in zo2_plan(OPT_13B, resident_blocks=40).reasons
    for nowhere in (
        zo2_plan(OPT_13B, resident_blocks=0),
        zo2_plan(OPT_13B, machine=replace(H200, gpu=None, link=None), resident_blocks=3),
    ):
        assert not any("stay" in reason for reason in nowhere.reasons)


def named_blocks(reason: str) -> set[int]:
    """The blocks of `blocks 1, 4-6 stay`."""
    found = re.search(r"blocks? ([\d, -]+) stays?", reason)
    assert found is not None
    ends = [[int(end) for end in part.split("-")] for part in found[1].split(", ")]
    return {index for span in ends for index in range(span[0], span[-1] + 1)}


def test_a_24_gb_card_keeps_three_quarters_of_opt_13b() -> None:
    limit = {"vram_bytes": 24 * GB}
    chosen = plan("zo2", shape=OPT_SIZES["13B"], workload=FORWARD_ONLY, **limit)
    assert chosen.settings["resident_blocks"] == 31
    assert chosen.prediction.step_s is not None
    assert chosen.prediction.step_s <= 0.32
    # Several micro-batches share perturbed copies of a whole block, which takes room.
    several = plan("zo2", shape=OPT_SIZES["13B"], workload=replace(FORWARD_ONLY, accumulation=4), **limit)
    assert several.settings["resident_blocks"] == 30
    assert several.fits


def test_torchao_frees_gradients_only_where_they_do_not_fit() -> None:
    assert plan("torchao-offload").settings == {}
    freed = plan("torchao-offload", vram_bytes=24 * GB)
    assert freed.fits
    assert freed.settings == {"offload_gradients": True}
    assert "GiB of gradients" in freed.reasons[0]


def test_without_a_gpu() -> None:
    plans = {p.engine: p for p in recommend(LAPTOP_CPU, TINY, ON_CPU, ENGINES, {})}
    assert {name for name, p in plans.items() if not p.fits} == {"torchao-offload"}
    assert plans["torchao-offload"].why_not == "needs a CUDA GPU, and this machine has none"
    assert plans["zo2"].settings["resident_blocks"] == 0
    assert not plan("native", machine=LAPTOP_CPU, shape=DEEPSEEK_1B, workload=ON_CPU).fits


def test_without_a_gpu_a_process_takes_no_memory_for_cuda() -> None:
    """What fits is judged by the bytes that are predicted."""
    needed = plan("native", machine=LAPTOP_CPU, shape=TINY, workload=ON_CPU).prediction.peak_host_bytes
    assert PROCESS_HOST_BYTES_WITHOUT_GPU < needed < PROCESS_HOST_BYTES
    for host_bytes, fits in ((needed, True), (needed - 1, False)):
        told = plan("native", machine=LAPTOP_CPU, shape=TINY, workload=ON_CPU, host_bytes=host_bytes)
        assert told.fits == fits


def test_gradients_do_not_fit_in_fp16() -> None:
    plans = {p.engine: p for p in recommend(H200, OPT_13B, FORWARD_ONLY, ENGINES, {})}
    assert {name for name, p in plans.items() if p.fits} == {"mezo", "zo2"}
    assert "fp16" in (plans["lsp"].why_not or "")


def test_scripted_fits_everywhere() -> None:
    assert plan("scripted", machine=LAPTOP_CPU).fits


# --- properties ---------------------------------------------------------------------------------------


@given(
    engine=st.sampled_from(ENGINES),
    sizes=st.tuples(st.integers(10**8, 40 * GB), st.integers(10**8, 40 * GB)),
    host=st.integers(GB, 60 * GB),
    is_named=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_more_vram_never_makes_a_plan_stop_fitting(
    engine: str, sizes: tuple[int, int], host: int, is_named: bool
) -> None:
    shape, workload = replace(DEEPSEEK_7B, num_blocks=8), replace(TRAINING, batch_size=1)
    fits = [
        plan(engine, H200, shape, workload, vram_bytes=size, host_bytes=host).fits
        if is_named
        else plan(engine, with_vram(H200, size), shape, workload, host_bytes=host).fits
        for size in sorted(sizes)
    ]
    assert fits != [True, False]


@given(sizes=st.tuples(st.integers(10**8, 40 * GB), st.integers(10**8, 40 * GB)))
@settings(max_examples=30, deadline=None)
def test_more_named_vram_never_moves_more_bytes_with_zo2(sizes: tuple[int, int]) -> None:
    shape = replace(OPT_13B, num_blocks=8)
    less, more = (
        plan("zo2", shape=shape, workload=FORWARD_ONLY, vram_bytes=size).prediction for size in sorted(sizes)
    )
    assert more.h2d_bytes <= less.h2d_bytes


def with_disk(machine: Machine, read_bytes_per_s: float) -> Machine:
    figures = {"write_bytes_per_s": measured(1e9), "read_bytes_per_s": measured(read_bytes_per_s)}
    disk = Disk(
        folder="/tmp", file_system="ext4", total_bytes=10**13, free_bytes=10**12, direct=True, **figures
    )
    return replace(machine, disk=disk)


def test_blocks_go_to_disk_only_where_host_memory_is_too_small() -> None:
    """OPT-13B: 25.2 GB of blocks, which 16 GiB do not hold."""
    machine = with_disk(H200, 5e9)
    roomy = plan("zo2", machine, OPT_13B, FORWARD_ONLY, vram_bytes=8 * GB)
    assert "disk_blocks" not in roomy.settings
    tight = plan("zo2", machine, OPT_13B, FORWARD_ONLY, vram_bytes=8 * GB, host_bytes=16 * 2**30)
    assert tight.fits
    count = tight.settings["disk_blocks"]
    assert isinstance(count, int)
    cost = traffic("zo2", OPT_13B, FORWARD_ONLY, parse_settings("zo2", tight.settings))
    assert cost.peak_host_bytes <= 16 * 2**30
    fewer = parse_settings("zo2", {**tight.settings, "disk_blocks": count - 1})
    assert traffic("zo2", OPT_13B, FORWARD_ONLY, fewer).peak_host_bytes > 16 * 2**30
    told = tight.prediction
    assert told.disk_read_bytes == count * 2 * OPT_13B.block_parameters
    assert told.bottleneck == "disk"
    assert told.step_s == pytest.approx(told.disk_read_bytes / 5e9)
    assert told.floor_s == pytest.approx(told.disk_read_bytes / 5e9)
    assert "disk read bandwidth 5.00 GB/s" in told.basis
    assert any(reason.startswith(f"disk_blocks={count}: host memory has no room") for reason in tight.reasons)


def test_a_number_of_blocks_on_disk_that_is_given_is_kept_and_auto_is_counted() -> None:
    machine = with_disk(H200, 5e9)
    limits = {"vram_bytes": 8 * GB, "host_bytes": 16 * 2**30}
    chosen = plan("zo2", machine, OPT_13B, FORWARD_ONLY, **limits)
    for asked, expected in (("auto", chosen.settings["disk_blocks"]), ("39", "39"), (0, 0)):
        (only,) = recommend(
            machine, OPT_13B, FORWARD_ONLY, ["zo2"], given_for_each({"zo2": {"disk_blocks": asked}}), **limits
        )  # type: ignore[arg-type]
        assert only.settings["disk_blocks"] == expected
        assert only.fits == (asked != 0)
        on_disk, resident = int(only.settings["disk_blocks"]), int(only.settings["resident_blocks"])
        assert on_disk + resident <= OPT_13B.num_blocks
    (roomy,) = recommend(
        machine, OPT_13B, FORWARD_ONLY, ["zo2"], given_for_each({"zo2": {"disk_blocks": "auto"}})
    )
    assert roomy.settings["disk_blocks"] == 0


def test_a_disk_that_was_not_measured_gives_no_time() -> None:
    machine = replace(H200, disk=None, disk_absent_reason="a brief probe measures no disk")
    tight = plan("zo2", machine, OPT_13B, FORWARD_ONLY, vram_bytes=8 * GB, host_bytes=16 * 2**30)
    assert tight.fits
    assert tight.prediction.step_s is None
    assert tight.prediction.floor_s is None
    assert "disk read bandwidth is not in the machine profile: a brief probe" in tight.prediction.basis


@pytest.mark.parametrize("engine", ["mezo", "zo2"])
@pytest.mark.parametrize(
    ("values", "fold_every", "why"),
    [
        ({"base": "int8"}, 8, "each rounding to the int8 grid adds noise, so it is rare for the loss's sake"),
        ({"base": "int8", "train": "last:4"}, 8, "each rounding to the int8 grid adds noise"),
        ({"base": "fp8"}, 16, "each rounding to the fp8 grid adds noise"),
        ({"base": "int4"}, 16, "with int4 even they undo what is learned; train=lora only reads the base"),
        ({"base": "int8", "queries": 16}, 4, "more than 4 steps of 16 queries the log does not hold"),
    ],
)
def test_how_rarely_a_low_bit_base_is_rounded_is_decided_by_the_loss(
    engine: str, values: dict[str, object], fold_every: int, why: str
) -> None:
    """The same for both engines and on every machine: one is the other's twin."""
    for machine, workload in ((H200, FORWARD_ONLY), (LAPTOP_CPU, ON_CPU)):
        (only,) = recommend(machine, OPT_13B, workload, [engine], given_for_each({engine: values}))
        assert only.settings["fold_every"] == fold_every
        assert why in told(only, "fold_every")
        parse_settings(engine, only.settings)


@pytest.mark.parametrize("engine", ["mezo", "zo2"])
def test_where_nothing_is_rounded_speed_decides_as_before(engine: str) -> None:
    for values in ({"base": "int4", "train": "lora"}, {"base": "int8", "estimator": "lozo"}, {}):
        (only,) = recommend(H200, OPT_13B, FORWARD_ONLY, [engine], given_for_each({engine: values}))
        assert not any("rounding" in reason for reason in only.reasons)


@pytest.mark.parametrize("engine", ["mezo", "zo2"])
@pytest.mark.parametrize(
    ("base", "fold_every", "warns"), [("int8", 1, True), ("int8", 8, False), ("int4", 64, True)]
)
def test_a_fold_every_that_costs_loss_is_kept_and_said(
    engine: str, base: str, fold_every: int, warns: bool
) -> None:
    values: dict[str, object] = {"base": base, "fold_every": fold_every}
    (only,) = recommend(H200, OPT_13B, FORWARD_ONLY, [engine], given_for_each({engine: values}))
    assert only.settings["fold_every"] == fold_every
    assert any(each.startswith("as set, it may lose what is learned") for each in only.reasons) == warns


@pytest.mark.parametrize(("base", "read_gb"), [("int4", 29.0), ("int8", 116.0), ("full", None)])
def test_175b_is_planned_on_a_host_of_64_gib_with_every_base(base: str, read_gb: float | None) -> None:
    shape = opt("opt-175b", 12288, 96, 96)
    machine = with_disk(with_vram(H200, 24 * GB), 2e9)
    asked: dict[str, dict[str, object]] = {"zo2": {"base": base, "resident_blocks": 0}}
    (planned,) = recommend(
        machine, shape, FORWARD_ONLY, ["zo2"], given_for_each(asked), host_bytes=60 * 2**30
    )
    assert planned.fits
    assert planned.prediction.bottleneck == "disk"
    cost = traffic("zo2", shape, FORWARD_ONLY, parse_settings("zo2", planned.settings))
    assert cost.disk_bytes == planned.prediction.disk_read_bytes
    assert cost.peak_host_bytes <= 60 * 2**30
    assert read_gb is None or cost.disk_bytes == pytest.approx(read_gb * 1e9, rel=0.01)


def test_a_low_bit_base_is_an_explicit_choice_and_said() -> None:
    """175B takes 250 GB of host memory and a disk; nobody is given an approximation who has not asked."""
    shape = opt("opt-175b", 12288, 96, 96)
    memory = replace(H200.memory, total_bytes=256 * 2**30, available_bytes=250 * GB)
    machine = replace(with_vram(H200, 18 * GB), memory=memory)
    for told in recommend(machine, shape, FORWARD_ONLY, ["mezo", "zo2"], {}):
        assert "base" not in told.settings
        assert told.engine != "mezo" or not told.fits
        assert told.engine != "zo2" or told.settings["disk_blocks"] != 0
    asked: dict[str, dict[str, object]] = {"zo2": {"base": "int8"}}
    first, *_ = recommend(machine, shape, FORWARD_ONLY, ["mezo", "zo2"], given_for_each(asked))
    assert (first.engine, first.fits, first.settings["base"]) == ("zo2", True, "int8")
    assert "disk_blocks" not in first.settings
    assert "approximate: 8-bit base (int8)" in first.reasons


def test_more_memory_is_no_slower() -> None:
    """A larger card, or more that may be pinned: what was faster with less is tried with more, too. Plans
    take what is as fast within 2 %."""
    batches = Workload(batch_size=16, seq_len=1024, accumulation=4, dtype="bf16")
    cases: list[tuple[str, ModelShape, Workload, Sequence[int]]] = [
        ("lora", named_shape("qwen2.5-0.5b"), batches, (8, 12, 16, 20, 24)),
        ("qlora", named_shape("qwen2.5-0.5b"), batches, (8, 12, 16, 20, 24)),
        ("galore", named_shape("qwen2.5-0.5b"), batches, (8, 12, 16, 20, 24)),
        ("lsp", DEEPSEEK_1B, replace(TRAINING, dtype="fp32"), (12, 16, 20, 24)),
        ("exact-offload", DEEPSEEK_7B, replace(TRAINING, accumulation=4), (16, 20, 24, 32)),
        ("adamw-8bit", DEEPSEEK_1B, replace(TRAINING, batch_size=8, seq_len=512), (8, 10, 12, 16)),
    ]
    for engine, shape, workload, cards in cases:
        plans = [plan(engine, shape=shape, workload=workload, vram_bytes=each * 2**30) for each in cards]
        times = [each.prediction.step_s for each in plans if each.fits]
        assert len(times) > 1, engine
        for smaller, larger in pairwise(times):
            assert smaller is not None
            assert larger is not None
            assert larger <= 1.02 * smaller, (engine, times)


def test_more_pinned_memory_sends_no_block_to_disk() -> None:
    card = with_vram(H200, 16 * 2**30)
    workload = Workload(batch_size=8, seq_len=64, dtype="fp16")
    for pinned in (0.25, 0.9, 1.0, 1.1, 1.5, 4.0):
        found = plan(
            "zo2",
            machine=card,
            shape=named_shape("llama-2-7b"),
            workload=workload,
            pinned_limit_bytes=int(pinned * 2**30),
        )
        assert found.fits
        assert "disk_blocks" not in found.settings, pinned


def test_what_stays_free_of_an_unnamed_card_is_not_called_too_small() -> None:
    """A tenth of it does, or what `native`'s forecast may miss by; of a limit that the user named nothing."""
    workload = replace(TRAINING, batch_size=2, seq_len=1024)
    for engine, tenths_gib, share in (("native", 124, "3%"), ("galore", 85, "10%")):
        room = tenths_gib * 2**30 // 10
        card = with_vram(H200, room)
        limits: dict[str, dict[str, int]] = {"unnamed": {}, "named": {"vram_bytes": room}}
        said = {
            name: " ".join(plan(engine, machine=card, shape=DEEPSEEK_1B, workload=workload, **limit).reasons)
            for name, limit in limits.items()
        }
        assert f"fewer leave less than {share} of the GPU free" in said["unnamed"]
        assert "of the GPU free" not in said["named"]
