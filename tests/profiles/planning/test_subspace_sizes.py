"""`lsp.d=auto`: one d for each shape of weights, the largest that hides; graphs give way to memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from known_shapes import DEEPSEEK_1B, DEEPSEEK_7B, H200, LAPTOP_CPU, OPT_13B, TINY
from settings_given import given_for_each

from engines.costs.resources.traffic import SWITCH_INTERVAL_S, LayerTraffic, Traffic
from engines.costs.table import traffic
from engines.errors import UserError
from engines.settings.lsp import LspSettings, sizes_by_shape
from engines.settings.lsp_layout import core_size
from engines.settings.parse import parse_settings
from engines.shapes import ModelShape, Workload
from harness.models.configs import named_shape
from profiles.catalog import find_profile
from profiles.planning.budget import budget_of, gpu_bytes_needed
from profiles.planning.layer_times import resource_s
from profiles.planning.plan import Plan
from profiles.planning.recommend import recommend
from profiles.planning.subspace_sizes import HIDING_SHARE, SHARES, Sides, size_of
from profiles.units import format_seconds

TRAINING = Workload(batch_size=4, seq_len=1024, dtype="bf16")
AUTO = {"d": "auto"}
GB = 10**9
BUDGET = budget_of(H200, None, None, None)


def plan(shape: ModelShape = DEEPSEEK_1B, **changes: object) -> Plan:
    arguments = {"machine": H200, "workload": TRAINING, "values": AUTO, **changes}
    machine, workload, values = (arguments.pop(name) for name in ("machine", "workload", "values"))
    (only,) = recommend(machine, shape, workload, ["lsp"], given_for_each({"lsp": values}), **arguments)  # type: ignore[arg-type]
    return only


def sizes(of: Plan) -> dict[Sides, int]:
    return sizes_by_shape(str(of.settings["d_by_shape"]))


def block_of(cost: Traffic) -> LayerTraffic:
    return next(layer for layer in cost.layers if layer.name.startswith("block."))


def cost_of(of: Plan, shape: ModelShape, **values: object) -> Traffic:
    return traffic("lsp", shape, TRAINING, parse_settings("lsp", {**of.settings, **values}))


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, SHARES))
def test_a_size_is_a_share_of_the_weight_and_grows_with_it(one: int, other: int, k: int) -> None:
    sides = max(one, other), min(one, other)
    d = size_of(sides, k)
    assert 1 <= d <= sides[1]
    assert d == 1 or d * d <= k * sides[0] * sides[1] / SHARES
    assert d < 64 or d == sides[1] or d % 64 == 0
    assert k == SHARES or size_of(sides, k + 1) >= d


def test_each_shape_has_its_own_d_and_the_plan_says_so() -> None:
    chosen = plan()
    assert chosen.fits
    assert set(sizes(chosen)) == {(2048, 2048), (5504, 2048)}
    assert sizes(chosen)[5504, 2048] > sizes(chosen)[2048, 2048]
    assert str(chosen.settings["d_by_shape"]) in chosen.reasons[0]
    settings = parse_settings("lsp", chosen.settings)
    # The down projection is the same shape the other way round.
    assert core_size(2048, 5504, settings) == core_size(5504, 2048, settings) == sizes(chosen)[5504, 2048]


@pytest.mark.parametrize("shape", [DEEPSEEK_1B, DEEPSEEK_7B])
def test_the_chosen_sizes_hide_and_the_next_larger_do_not(shape: ModelShape) -> None:
    chosen = plan(shape)
    settings = chosen.settings

    def hides(text: str) -> bool:
        cost = cost_of(chosen, shape, d_by_shape=text)
        times = resource_s(replace(cost, layers=(block_of(cost),)), H200, TRAINING)
        assert times is not None
        updates_s = max(times["cpu"], times["host memory"]) + SWITCH_INTERVAL_S * block_of(cost).cpu_chunks
        return max(times["h2d"], times["d2h"], updates_s) <= HIDING_SHARE * times["gpu"]

    def text_of(k: int) -> str:
        return ",".join(f"{a}x{b}:{size_of((a, b), k)}" for a, b in sizes(chosen))

    assert hides(str(settings["d_by_shape"]))
    k = max(k for k in range(1, SHARES + 1) if text_of(k) == settings["d_by_shape"])
    assert k < SHARES
    assert not hides(text_of(k + 1))


def test_a_slow_link_or_cpu_or_many_micro_batches_make_them_smaller() -> None:
    fast = sizes(plan())
    assert H200.link is not None
    slow_rate = replace(H200.link.h2d_duplex_bytes_per_s, value=5e9, low=None, high=None)
    slow_link = replace(H200, link=replace(H200.link, h2d_duplex_bytes_per_s=slow_rate))
    slow_adam = replace(H200.cpu.adam_elements_per_s, value=2e8, low=None, high=None)
    slow_cpu = replace(H200, cpu=replace(H200.cpu, adam_elements_per_s=slow_adam))
    for other in (
        plan(machine=slow_link),
        plan(machine=slow_cpu),
        plan(workload=replace(TRAINING, batch_size=1)),
    ):
        assert all(d < fast[sides] for sides, d in sizes(other).items())


def test_host_memory_limits_them() -> None:
    tight = plan(DEEPSEEK_7B, host_bytes=6 * GB)
    assert tight.fits
    assert sum(sizes(tight).values()) < sum(sizes(plan(DEEPSEEK_7B)).values())


def test_without_a_gpu_memory_alone_decides() -> None:
    chosen = plan(TINY, machine=LAPTOP_CPU)
    assert sizes(chosen)[64, 64] == 48
    assert "without a GPU" in chosen.reasons[0]


def test_given_sizes_are_kept() -> None:
    values = {"d": "auto", "d_by_shape": "2048x2048:128,5504x2048:192"}
    assert sizes(plan(values=values)) == {(2048, 2048): 128, (5504, 2048): 192}


def test_auto_without_sizes_names_the_way_out() -> None:
    with pytest.raises(UserError, match=r"lsp\.d=auto: nothing says which d suits .* 64 x 32 .*--profile"):
        core_size(32, 64, LspSettings(d="auto", d_by_shape="64x64:8"))


@pytest.mark.parametrize("text", ["64x64", "64x64:0", "64:8", "64x64:8,", "a", ",64x64:8"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="d_by_shape"):
        parse_settings("lsp", {"d": "auto", "d_by_shape": text})


def test_graphs_go_off_by_themselves_where_they_do_not_fit() -> None:
    values = {"d": "1280", "r": "4"}
    roomy = plan(values=values)
    assert "graphs" not in roomy.settings
    with_graphs = gpu_bytes_needed(cost_of(roomy, DEEPSEEK_1B), BUDGET)
    without = gpu_bytes_needed(cost_of(roomy, DEEPSEEK_1B, graphs=False), BUDGET)
    assert with_graphs > without
    assert "graphs" not in plan(values=values, vram_bytes=with_graphs).settings
    values = {**values, "checkpointed_blocks": "all"}
    without = gpu_bytes_needed(cost_of(plan(values=values), DEEPSEEK_1B, graphs=False), BUDGET)
    tight = plan(values=values, vram_bytes=without)
    assert tight.fits
    assert tight.settings["graphs"] is False
    assert any(reason.startswith("graphs=false: with CUDA graphs") for reason in tight.reasons)
    # What the user asked for is kept, and then it does not fit.
    asked = plan(values={**values, "graphs": "true"}, vram_bytes=without)
    assert not asked.fits
    # Where it does not fit either way, nothing is changed.
    assert "graphs" not in plan(values=values, vram_bytes=without - 1).settings


def test_a_d_that_fits_without_graphs_is_not_called_too_large() -> None:
    """Their pool, 0.9 GiB here, made the planner say that d=512 did not fit, of a plan that did."""
    found = plan(
        named_shape("opt-6.7b"),
        machine=find_profile(Path("l4")),
        workload=Workload(batch_size=16, seq_len=512),
        values={"weights": "resident"},
    )
    assert (found.fits, found.settings["graphs"]) == (True, False)
    assert int(found.settings["d"]) > 2048
    assert not any("does not fit" in each for each in found.reasons)


def test_the_price_of_streaming_and_the_nearest_way_out_of_it_are_told() -> None:
    machine, shape = find_profile(Path("rtx-4090")), named_shape("llama-3.1-8b")
    work = Workload(batch_size=1, seq_len=512)

    def of(**values: object) -> Plan:
        return plan(shape, machine=machine, workload=work, values=values, vram_bytes=24_900_000_000)

    streamed, resident, frozen = of(), of(weights="resident"), of(train_outer=False)
    assert (streamed.settings["weights"], resident.fits, frozen.fits) == ("streamed", False, True)
    assert "weights" not in frozen.settings
    step_s, least_s, other_s = (each.prediction.step_s for each in (streamed, resident, frozen))
    assert step_s is not None
    assert least_s is not None
    assert other_s is not None
    assert step_s > 3 * other_s
    price = f"makes a step {format_seconds(step_s)} in place of {format_seconds(least_s)}"
    assert streamed.reasons[0].endswith(f"MiB missing; streaming {price}")
    (told,) = [each for each in streamed.reasons if each.startswith("not chosen unless set: with")]
    assert (
        f"with train_outer=false the weights stay on the GPU, and a step takes {format_seconds(other_s)};"
        in told
    )
    # What the user has set is not proposed otherwise.
    assert not any("the weights stay" in each for each in of(train_outer=True).reasons)


def test_micro_batches_that_leave_room_for_the_weights_are_told_before_what_costs_quality() -> None:
    shape, work = named_shape("opt-6.7b"), Workload(batch_size=4, seq_len=512)
    of = partial(plan, shape, machine=find_profile(Path("rtx-4090")), values={"checkpointed_blocks": "all"})
    for vram_bytes in range(14 * GB, 18 * GB, GB // 8):
        found = of(workload=work, vram_bytes=vram_bytes)
        told = [each for each in found.reasons if "--batch-size" in each]
        if told:
            break
    assert found.settings["weights"] == "streamed"
    (size, count) = (
        int(told[0].split()[told[0].split().index(flag) + 1]) for flag in ("--batch-size", "--accumulation")
    )
    assert size * count == 4
    assert told[0].endswith("price: none: a step is on the same sequences")
    smaller = of(workload=replace(work, batch_size=size, accumulation=count), vram_bytes=vram_bytes)
    assert smaller.fits
    assert "weights" not in smaller.settings
    assert smaller.prediction.step_s is not None
    assert found.prediction.step_s is not None
    assert f"a step takes {format_seconds(smaller.prediction.step_s)};" in told[0]
    assert smaller.prediction.step_s < found.prediction.step_s


def test_graphs_are_counted_only_where_there_are_any() -> None:
    def held(**values: object) -> int:
        return cost_of(plan(), DEEPSEEK_1B, **values).gpu_held_bytes

    assert held() > 24 * 10**6
    assert held(graphs=False) == held(offload=False) == 0


def test_weights_are_streamed_only_where_the_gpu_cannot_hold_them() -> None:
    values = {"checkpointed_blocks": "all"}
    resident = plan(OPT_13B, values=values, vram_bytes=40 * GB)
    assert resident.fits
    assert "weights" not in resident.settings
    found = plan(OPT_13B, values=values, vram_bytes=24 * GB, host_bytes=64 * GB)
    assert (found.fits, found.settings["weights"]) == (True, "streamed")
    assert found.reasons[0].startswith("weights=streamed: without it the job needs")
    assert found.prediction.peak_gpu_bytes < 20 * GB
    # The weights up twice and down once, and the cores.
    moved = 2 * OPT_13B.matrix_parameters
    assert 1.8 * moved < found.prediction.h2d_bytes < 2.5 * moved
    given: dict[str, object] = {**values, "weights": "resident"}
    assert not plan(OPT_13B, values=given, vram_bytes=24 * GB).fits


def test_a_residual_costs_work_and_a_block_of_gradients_and_streams_nothing() -> None:
    values: dict[str, object] = {"d": 512, "r": 4}
    without, found = plan(values=values), plan(values={**values, "residual": 1.0})
    assert found.fits
    assert found.prediction.h2d_bytes == without.prediction.h2d_bytes
    a_block = 2 * DEEPSEEK_1B.matrix_parameters // DEEPSEEK_1B.num_blocks
    more, less = (cost_of(each, DEEPSEEK_1B).gpu_memory_bytes for each in (found, without))
    assert more["gradients"] - less["gradients"] == a_block
    assert found.prediction.step_s is not None
    assert without.prediction.step_s is not None
    assert 1.0 < found.prediction.step_s / without.prediction.step_s < 2.0
    small = plan(OPT_13B, values={**values, "residual": 1.0}, vram_bytes=24 * GB)
    assert not small.fits
    assert "weights" not in small.settings


@pytest.mark.parametrize("values", [{}, AUTO])
@pytest.mark.parametrize("tokens", [4096, 65536])
def test_streamed_cores_hide_behind_the_weights_or_the_gpu(values: dict[str, object], tokens: int) -> None:
    """And behind all micro-batches together: a step is little longer than the GPU and the weights take."""
    workload = replace(TRAINING, accumulation=tokens // 4096)
    given = {**values, "weights": "streamed"}
    chosen = plan(DEEPSEEK_7B, values=given, workload=workload)
    smallest = plan(DEEPSEEK_7B, values={"weights": "streamed", "d": 512}, workload=workload)
    costs = (traffic("lsp", DEEPSEEK_7B, workload, each.settings.typed) for each in (chosen, smallest))
    times, least = (resource_s(each, H200, workload) for each in costs)
    assert times is not None
    assert least is not None
    assert chosen.prediction.step_s is not None
    assert chosen.prediction.step_s <= 1.2 * max(times["gpu"], least["h2d"])
    d = chosen.settings["d"] if not values else min(sizes(chosen).values())
    assert isinstance(d, int)
    assert d > 512
