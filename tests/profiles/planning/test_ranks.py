"""Plans of several processes: each has its part of the machine and of the step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from settings_given import given_for_each, given_settings

from engines.costs.table import traffic
from engines.shapes import Workload
from harness.models.configs import named_shape
from profiles.catalog import find_profile
from profiles.machine import Figure, GpuLink, Machine
from profiles.planning.plan import Plan
from profiles.planning.ranks import context_of_a_rank, machine_of_a_rank
from profiles.planning.recommend import recommend

H200 = find_profile(Path("h200"))
SHAPE = named_shape("opt-13b")
WORKLOAD = Workload(batch_size=1, seq_len=2048, accumulation=4, dtype="fp16")


def measured(rate: float) -> Figure:
    return Figure(value=rate, origin="measured", method="test")


def test_one_process_has_the_whole_machine() -> None:
    assert machine_of_a_rank(H200, 1) is H200
    assert WORKLOAD.of_a_rank(1) == WORKLOAD


def test_links_are_those_of_the_slowest_gpu_while_all_copy() -> None:
    assert H200.link is not None
    alone = H200.link.h2d_pinned_bytes_per_s.value
    assert alone is not None
    each = tuple(
        GpuLink(
            index=index,
            name="H200",
            h2d_bytes_per_s=measured(alone),
            d2h_bytes_per_s=measured(alone),
            h2d_together_bytes_per_s=measured(share * alone),
            d2h_together_bytes_per_s=measured(share * alone),
        )
        for index, share in enumerate((0.75, 0.5, 0.25))
    )
    machine = replace(H200, link=replace(H200.link, each_gpu=each))
    part = machine_of_a_rank(machine, 2)
    assert part.link is not None
    assert part.link.h2d_pinned_bytes_per_s.value == pytest.approx(0.5 * alone)
    assert part.link.h2d_duplex_bytes_per_s.value == pytest.approx(
        0.5 * (H200.link.h2d_duplex_bytes_per_s.value or 0.0)
    )
    assert part.cpu.cores_usable == H200.cpu.cores_usable // 2


def test_rates_of_the_host_are_shared_by_all() -> None:
    of_cores = (
        "matmul_fp32_flops",
        "matmul_bf16_flops",
        "adam_elements_per_s",
        "adamw_kernel_elements_per_s",
    )
    of_memory = ("copy_bytes_per_s", "triad_bytes_per_s")
    machine = replace(
        H200,
        cpu=replace(H200.cpu, **dict.fromkeys(of_cores, measured(8e9))),
        memory=replace(H200.memory, **dict.fromkeys(of_memory, measured(8e9))),
    )
    part = machine_of_a_rank(machine, 4)
    assert [getattr(part.cpu, name).value for name in of_cores] == [2e9] * 4
    assert [getattr(part.memory, name).value for name in of_memory] == [2e9] * 2


def test_links_together_are_no_faster_than_host_memory() -> None:
    assert H200.link is not None
    slow = replace(H200, memory=replace(H200.memory, copy_bytes_per_s=measured(1e9)))
    names = ("h2d_duplex_bytes_per_s", "d2h_duplex_bytes_per_s")
    both = sum(getattr(H200.link, name).value for name in names)
    part = machine_of_a_rank(slow, 4).link
    assert part is not None
    # One link alone shows that memory moves more than the copies say.
    assert sum(getattr(part, name).value for name in names) == pytest.approx(both / 4)
    assert part.h2d_pinned_bytes_per_s == H200.link.h2d_pinned_bytes_per_s
    fast = replace(H200, memory=replace(H200.memory, copy_bytes_per_s=measured(1e12)))
    assert machine_of_a_rank(fast, 4).link == H200.link


def test_blocks_on_the_host_count_once_and_are_written_by_one() -> None:
    settings = given_settings("zo2", fold_every=8)
    alone = traffic("zo2", SHAPE, WORKLOAD, settings.typed)
    part = context_of_a_rank("zo2", H200, SHAPE, WORKLOAD, gpus=4).cost(settings.typed)
    blocks = alone.host_memory_bytes["blocks, pinned"]
    spare = -(-SHAPE.num_blocks // 8) * blocks // SHAPE.num_blocks
    assert part.host_memory_bytes["blocks, pinned"] == pytest.approx((blocks + spare) / 4)
    assert part.pinned_bytes == pytest.approx((blocks + spare) / 4)
    assert part.d2h_bytes == pytest.approx(alone.d2h_bytes / 4, rel=1e-3)
    assert part.h2d_bytes == alone.h2d_bytes


def test_blocks_on_disk_are_read_once_for_the_machine() -> None:
    """Its bytes of them are the machine's, as its disk is; the ring and the other blocks are there once, and
    so as many blocks are on disk as for one process, but for those in whose place others are written."""
    settings = given_settings("zo2", fold_every=8, disk_blocks=20)
    alone = traffic("zo2", SHAPE, WORKLOAD, settings.typed)
    part = context_of_a_rank("zo2", H200, SHAPE, WORKLOAD, gpus=4).cost(settings.typed)
    assert part.disk_bytes == alone.disk_bytes
    assert part.host_memory_bytes["disk ring, pinned"] == alone.host_memory_bytes["disk ring, pinned"] / 4
    blocks = alone.host_memory_bytes["blocks, pinned"]
    assert blocks / 4 < part.host_memory_bytes["blocks, pinned"] < blocks / 3
    low_bit = given_settings("zo2", base="int8", disk_blocks=20)
    whole = traffic("zo2", SHAPE, WORKLOAD, low_bit.typed)
    each = context_of_a_rank("zo2", H200, SHAPE, WORKLOAD, gpus=4).cost(low_bit.typed)
    assert each.host_memory_bytes["blocks, pinned"] == whole.host_memory_bytes["blocks, pinned"]
    assert (each.disk_bytes, each.d2h_bytes) == (whole.disk_bytes, whole.d2h_bytes)
    found = {
        gpus: recommend(
            H200, SHAPE, WORKLOAD, ["zo2"], {"zo2": given_settings("zo2", resident_blocks=0, fold_every=8)},
            host_bytes=20 * 2**30, gpus=gpus,
        )[0].settings["disk_blocks"]
        for gpus in (1, 2)
    }  # fmt: skip
    assert 0 < found[1] <= found[2] <= found[1] + 12


def with_gpus_linked(rate: float, count: int = 2) -> Machine:
    """The H200s of one machine, whose links are as fast together as alone."""
    link = H200.link
    assert link is not None
    up, down = link.h2d_pinned_bytes_per_s, link.d2h_pinned_bytes_per_s
    each = tuple(
        GpuLink(
            index=index, name="H200", h2d_bytes_per_s=up, d2h_bytes_per_s=down, h2d_together_bytes_per_s=up,
            d2h_together_bytes_per_s=down, from_gpu_bytes_per_s=measured(rate),
        )
        for index in range(count)
    )  # fmt: skip
    return replace(H200, link=replace(link, each_gpu=each))


def test_shares_of_blocks_where_gpus_exchange_them_fast() -> None:
    workload = replace(WORKLOAD, accumulation=2)
    streamed = {"zo2": given_settings("zo2", resident_blocks=0)}

    def planned(machine: Machine) -> Plan:
        (plan,) = recommend(machine, SHAPE, workload, ["zo2"], streamed, gpus=2)
        return plan

    no_rate, slow, fast = planned(H200), planned(with_gpus_linked(30e9)), planned(with_gpus_linked(300e9))
    assert any("no rate between GPUs" in reason for reason in no_rate.reasons)
    assert any("no fast link" in reason for reason in slow.reasons)
    assert "sharded_upload" not in slow.settings
    assert fast.settings["sharded_upload"] is True
    assert fast.prediction.h2d_bytes == pytest.approx(slow.prediction.h2d_bytes / 2)
    assert fast.prediction.step_s is not None
    assert slow.prediction.step_s is not None
    assert fast.prediction.step_s < 0.9 * slow.prediction.step_s


def test_plans_of_several_say_how_they_scale() -> None:
    (plan,) = recommend(with_gpus_linked(300e9), SHAPE, WORKLOAD, ["zo2"], {}, gpus=2)
    assert any(reason.startswith("on 2 GPUs a step is ") for reason in plan.reasons)
    (far,) = recommend(H200, SHAPE, WORKLOAD, ["zo2"], {}, gpus=1, nodes=2)
    assert far.prediction.step_s is not None
    assert plan.prediction.step_s is not None
    plans = recommend(H200, named_shape("opt-1.3b"), WORKLOAD, ["zo2", "lora"], {}, gpus=1, nodes=2)
    assert {each.engine: each.why_not for each in plans}["lora"] == "runs on one machine"


def test_downloads_are_deferred_before_blocks_go_to_a_disk_of_unknown_speed() -> None:
    """Ranks that share blocks have those twice that go down in a step."""
    workload = Workload(batch_size=16, seq_len=64, dtype="fp16", accumulation=2)
    machine = find_profile(Path("rtx-4090"))
    plans = {}
    for gpus, given in ((1, {}), (2, {}), (2, {"fold_every": 1})):
        settings = {"zo2": given_settings("zo2", **given)}
        (plan,) = recommend(machine, named_shape("opt-66b"), workload, ["zo2"], settings, gpus=gpus)
        plans[gpus, bool(given)] = plan
    one, two, in_each = plans[1, False], plans[2, False], plans[2, True]
    assert two.settings.get("disk_blocks", 0) == 0
    assert two.settings["fold_every"] > 1
    assert any("is there twice for a step" in reason for reason in two.reasons)
    assert one.prediction.step_s is not None
    assert two.prediction.step_s is not None
    assert two.prediction.step_s < one.prediction.step_s
    assert in_each.settings["disk_blocks"] > 0
    assert in_each.prediction.step_s is None


def test_a_step_that_is_another_on_one_gpu_is_said() -> None:
    workload = Workload(batch_size=1, seq_len=1024, accumulation=8)
    machine, limit = find_profile(Path("rtx-4090")), 64 * 10**9
    said = {}
    for d in (None, 1536):
        given = {} if d is None else given_for_each({"lsp": {"d": d}})
        (found,) = recommend(machine, SHAPE, workload, ["lsp"], given, host_bytes=limit, gpus=2)
        said[d] = [each for each in found.reasons if each.startswith("on one GPU it is another step")]
    assert said[None] == ["on one GPU it is another step, with d=3840"]
    assert said[1536] == []


def test_gpus_that_bring_nothing_and_a_way_between_them_that_is_supposed_are_said() -> None:
    """A rate between GPUs that is that of the link makes dividing native's weights a loss."""
    workload = replace(WORKLOAD, dtype="bf16", accumulation=4)
    shape = named_shape("opt-13b")
    alone, slow, fast = (
        recommend(machine, shape, workload, ["native"], {}, gpus=gpus)[0]
        for machine, gpus in ((H200, 1), (H200, 2), (with_gpus_linked(300e9), 2))
    )
    assert alone.prediction.step_s is not None
    assert slow.prediction.step_s is not None
    assert slow.prediction.step_s > alone.prediction.step_s
    assert any(
        reason.startswith("2 GPUs bring nothing here: on one a step takes ") for reason in slow.reasons
    )
    assert any("as fast as the link, 55." in reason for reason in slow.reasons)
    assert not any("as fast as the link" in reason for reason in fast.reasons)
    assert not any(reason.startswith("2 GPUs bring nothing") for reason in alone.reasons)


def test_ranks_divide_the_updates_and_each_brings_down_its_gradient() -> None:
    shape, workload = named_shape("deepseek-coder-1.3b"), replace(WORKLOAD, dtype="bf16", accumulation=2)
    for engine in ("exact-offload", "lsp"):
        settings = given_settings(engine).typed
        alone = traffic(engine, shape, workload, settings)
        part = context_of_a_rank(engine, H200, shape, workload, gpus=2).cost(settings)
        assert (part.h2d_bytes, part.d2h_bytes) == (alone.h2d_bytes, alone.d2h_bytes)
        assert part.cpu_adam_elements == pytest.approx(alone.cpu_adam_elements / 2, rel=1e-6)
        assert alone.host_bytes / 2 < part.host_bytes < alone.host_bytes
        assert part.peak_host_bytes < alone.peak_host_bytes
        assert part.pinned_bytes <= alone.pinned_bytes


def test_a_plan_of_four_takes_a_quarter_of_the_micro_batches_and_others_run_on_one() -> None:
    one, four = (
        {plan.engine: plan for plan in recommend(H200, SHAPE, WORKLOAD, ["zo2", "galore"], {}, gpus=gpus)}
        for gpus in (1, 4)
    )
    assert four["galore"].why_not == "runs on one GPU"
    assert not four["galore"].available
    before, after = one["zo2"].prediction, four["zo2"].prediction
    assert before.step_s is not None
    assert after.step_s is not None
    assert after.step_s < before.step_s


def test_a_step_that_its_processes_cannot_divide_is_not_planned() -> None:
    """As a run would be refused; queries of a micro-batch can be divided, too."""
    queries = {"zo2": given_settings("zo2", queries=4)}
    why = "has 1 micro-batch a step for 4 processes; use --accumulation 4"
    for engine, overrides, expected in (("lsp", {}, why), ("zo2", {}, why), ("zo2", queries, None)):
        workload = replace(WORKLOAD, dtype="bf16", accumulation=1)
        (plan,) = recommend(H200, SHAPE, workload, [engine], overrides, gpus=4)
        assert (plan.why_not, plan.available) == (expected, expected is None)


def test_settings_of_one_process_are_not_planned_for_several() -> None:
    """As a run would be refused, and no plan chooses them, however little memory there is."""
    workload = replace(WORKLOAD, dtype="bf16", accumulation=2)
    on_disk = {"weights": "streamed", "disk_blocks": 2, "disk_weights": True}
    cases = (
        ({"gpu_blocks": 1}, "leaves blocks to the GPU in one process only; set gpu_blocks=0"),
        (on_disk, "has weights on disk in one process only; set disk_weights=false"),
    )
    for given, why in cases:
        overrides = {"exact-offload": given_settings("exact-offload", **given)}
        (plan,) = recommend(H200, SHAPE, workload, ["exact-offload"], overrides, gpus=2)
        assert (plan.fits, plan.available, plan.why_not) == (False, False, why)
    for host_bytes in (40 * 10**9, 20 * 10**9, 12 * 10**9, 6 * 10**9):
        (plan,) = recommend(H200, SHAPE, workload, ["exact-offload"], {}, gpus=2, host_bytes=host_bytes)
        assert not {"gpu_blocks", "disk_weights"} & plan.settings.keys()


def test_gpus_divide_the_weights_of_native_and_exchange_them() -> None:
    shape, workload = named_shape("deepseek-coder-6.7b"), replace(WORKLOAD, dtype="bf16", accumulation=2)
    settings = given_settings("native", graphs=False).typed
    alone = traffic("native", shape, workload.of_a_rank(2), settings)
    part = context_of_a_rank("native", H200, shape, workload, gpus=2).cost(settings)
    assert part.gpu_memory_bytes["weights"] == alone.gpu_memory_bytes["weights"] / 2
    assert part.gpu_memory_bytes["optimizer"] == alone.gpu_memory_bytes["optimizer"] / 2
    element = 2
    inside, outside = shape.num_blocks * shape.block_parameters, shape.non_block_parameters
    # Half of a block's weights twice, of its gradient once, of what is outside once each.
    assert part.from_gpu_bytes == element * (3 * inside + 2 * outside) // 2
    assert alone.from_gpu_bytes == 0
    (plan,) = recommend(H200, shape, workload, ["native"], {}, gpus=2)
    (fast,) = recommend(with_gpus_linked(300e9), shape, workload, ["native"], {}, gpus=2)
    assert plan.settings["graphs"] is False
    assert fast.prediction.step_s is not None
    assert plan.prediction.step_s is not None
    assert fast.prediction.step_s < plan.prediction.step_s


def test_machines_of_lsp_wait_for_each_others_cores() -> None:
    workload = replace(WORKLOAD, dtype="bf16", accumulation=2)
    shape = named_shape("deepseek-coder-1.3b")
    (far,) = recommend(H200, shape, workload, ["lsp"], {}, gpus=1, nodes=2)
    (near,) = recommend(H200, shape, workload, ["lsp"], {}, gpus=2)
    cost = traffic("lsp", shape, workload.of_a_rank(2), far.settings.typed)
    assert far.prediction.step_s is not None
    assert near.prediction.step_s is not None
    assert far.prediction.step_s - near.prediction.step_s > 0.9 * cost.reduced_bytes / 125e6
