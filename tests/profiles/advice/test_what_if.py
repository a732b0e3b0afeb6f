"""Upgrades, other machines, and answers backwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engines.errors import UserError
from engines.shapes import Workload
from harness.models.configs import named_shape
from harness.recommendation import catalogue
from profiles.advice.amount import Asked, amount_of
from profiles.advice.explain import explained
from profiles.advice.job_time import Rates, job_forecast
from profiles.advice.outlook import JobToPlan, outlook
from profiles.advice.target import Target, answers, largest_models, machine_size, parse_target
from profiles.advice.what_if import held, upgrades, what_if
from profiles.catalog import find_profile
from profiles.planning.recommend import plan_engine

WORKLOAD = Workload(batch_size=1, seq_len=512, dtype="fp16")
RTX_3090 = find_profile(Path("rtx-3090"))


def job(
    model: str = "opt-1.3b", engines: tuple[str, ...] = ("native", "zo2"), dtype: str = "bf16"
) -> JobToPlan:
    workload = Workload(batch_size=1, seq_len=512, dtype=dtype)  # type: ignore[arg-type]
    return JobToPlan(
        shape=named_shape(model),
        workload=workload,
        engines=engines,
        settings={},
        amount=amount_of(workload, Asked(examples=10_000), None),
    )


def test_each_upgrade_changes_one_thing() -> None:
    found = {each.name: each.machine for each in upgrades(RTX_3090)}
    assert len(found) == 9
    assert [name for name, machine in found.items() if machine == RTX_3090] == [
        "a second machine like it, over 1 Gbit/s",
        "a second machine like it, over 10 Gbit/s",
    ]
    for machine in (each for each in found.values() if each != RTX_3090):
        differing = [
            part
            for part in ("gpu", "link", "cpu", "memory")
            if getattr(machine, part) != getattr(RTX_3090, part)
        ]
        assert differing in (["gpu"], ["link"], ["cpu"], ["memory"], ["cpu", "memory"])
    assert any("24.0 GiB to 32.0 GiB" in name for name in found)


def test_a_second_gpu_halves_a_step_that_can_be_shared() -> None:
    workload = Workload(batch_size=2, seq_len=1024, dtype="fp16")
    amount = amount_of(workload, Asked(examples=10_000), None)
    planned = replace(job("opt-1.3b", ("native", "zo2")), workload=workload, amount=amount)
    now = outlook("now", RTX_3090, planned)
    (second,) = [row for row in what_if(now, RTX_3090, planned, {}) if "second GPU" in row.outlook.name]
    assert second.outlook.fits == ("zo2",)  # native runs on one
    assert now.zeroth is not None
    assert now.zeroth.seconds is not None
    assert second.zeroth_saved_s is not None
    assert 0.3 < second.zeroth_saved_s / now.zeroth.seconds[1] < 0.6


def test_a_second_machine_over_any_network_shares_steps_without_gradients() -> None:
    """Losses go between them: what the step waits does not depend on the network's rate."""
    workload = Workload(batch_size=2, seq_len=1024, dtype="fp16")
    amount = amount_of(workload, Asked(examples=10_000), None)
    planned = replace(job("opt-1.3b", ("native", "zo2", "lsp")), workload=workload, amount=amount)
    now = outlook("now", RTX_3090, planned)
    slow, fast = [row for row in what_if(now, RTX_3090, planned, {}) if "second machine" in row.outlook.name]
    assert slow.outlook.fits == fast.outlook.fits == ("zo2",)
    assert now.zeroth is not None
    assert now.zeroth.seconds is not None
    for row in (slow, fast):
        assert row.zeroth_saved_s is not None
        assert 0.3 < row.zeroth_saved_s / now.zeroth.seconds[1] < 0.6
    assert slow.zeroth_saved_s == pytest.approx(fast.zeroth_saved_s, rel=1e-3)


def test_cores_of_lsp_take_their_time_over_the_network() -> None:
    workload = Workload(batch_size=1, seq_len=512, dtype="bf16", accumulation=8)
    amount = amount_of(workload, Asked(steps=1000), None)
    planned = replace(job("deepseek-coder-1.3b", ("lsp",)), workload=workload, amount=amount)
    far = replace(planned, nodes=2).context("lsp", RTX_3090)
    plan = plan_engine(far, planned.settings_of("lsp"))
    assert plan.prediction.bottleneck == "network"
    assert plan.prediction.step_s is not None
    told = job_forecast(plan, far, planned.amount_or_step, Rates())
    assert told.seconds == pytest.approx(1000 * plan.prediction.step_s, rel=0.05)
    now = outlook("now", RTX_3090, planned)
    assert now.first is not None
    slow = [row for row in what_if(now, RTX_3090, planned, {}) if "over 1 Gbit/s" in row.outlook.name]
    assert slow[0].first_saved_s == 0  # it may lie idle
    lines = " ".join(explained(plan, far, told))
    assert "network = losses and gradients of 2 machines at 125 MB/s (supposed)" in lines
    assert "then the network" in lines


def test_what_an_upgrade_brings() -> None:
    planned = job("opt-13b", ("native", "zo2"), dtype="fp16")
    now = outlook("now", RTX_3090, planned)
    assert now.first is None
    assert now.zeroth is not None
    rows = {row.outlook.name: row for row in what_if(now, RTX_3090, planned, {})}
    link = next(row for name, row in rows.items() if "link" in name)
    assert link.zeroth_saved_s is not None
    assert link.zeroth_saved_s >= 0
    assert all(row.first_saved_s is None for row in rows.values())


def test_a_larger_card_lets_more_fit() -> None:
    planned = job("llama-3.1-8b", ("native",))
    now = outlook("now", RTX_3090, planned)
    h200 = what_if(now, RTX_3090, planned, {"h200": find_profile(Path("h200"))})[-1]
    assert (h200.outlook.name, h200.now_fits) == ("h200", ("native",))


def test_limits_hold_on_the_machine_planned_for_and_upgrades_begin_from_them() -> None:
    """An RTX 4090 with 64 GB of host memory is not the catalogue's with 256."""
    own = find_profile(Path("rtx-4090"))
    planned = replace(job("opt-66b", ("lsp",)), host_bytes=64 * 10**9)
    machines = {"rtx-4090": own, "another": replace(own, name="another")}
    found = {each.outlook.name: each.first for each in answers(machines, planned, Target(), own)}
    assert found == {"rtx-4090": "no", "another": "yes"}
    names = [each.name for each in upgrades(held(own, replace(planned, vram_bytes=12 * 2**30)))]
    assert "host memory 59.6 GiB to 119 GiB" in names
    assert "GPU memory 12.0 GiB to 16.0 GiB" in names


def test_a_limit_leaves_no_larger_share_of_a_larger_card_free() -> None:
    """The catalogue's RTX 3060 has 12 GiB, 11.8 of them free; so has a card of 12 GiB that is bought."""
    card = find_profile(Path("rtx-3060-12gb"))
    planned = replace(job(), vram_bytes=8 * 10**9)
    bought = {each.name: each.machine.gpu for each in upgrades(held(card, planned), card)}
    larger, own = bought["GPU memory 7.45 GiB to 12.0 GiB"], card.gpu
    assert larger is not None
    assert own is not None
    assert own.free_bytes < own.total_bytes
    assert larger.total_bytes == own.total_bytes
    assert larger.free_bytes == pytest.approx(own.free_bytes, abs=1)
    rows = what_if(outlook("now", card, planned), card, planned, {"rtx-3060-12gb": card})
    by_name = {row.outlook.name: row for row in rows}
    assert by_name["GPU memory 7.45 GiB to 12.0 GiB"].now_fits == by_name["rtx-3060-12gb"].now_fits


def test_the_least_machine_for_a_target_comes_first() -> None:
    machines = catalogue()
    found = answers(machines, job(), Target(hours=1000.0))
    sizes = [machine_size(machines[each.outlook.name]) for each in found]
    assert sizes == sorted(sizes)
    assert found[-1].first == "yes"
    assert {each.first for each in answers(machines, job(), Target(hours=1e-6))} == {"no"}


def test_the_largest_model_of_each_method() -> None:
    shapes = [named_shape(name) for name in ("opt-125m", "opt-1.3b", "opt-13b", "opt-30b")]
    found = {each.engine: each.model for each in largest_models(RTX_3090, job(), shapes)}
    assert found["native"] == "opt-1.3b"
    assert found["zo2"] in ("opt-13b", "opt-30b")


@pytest.mark.parametrize(
    "text", ["hours", "hours=", "hours=soon", "hours=-1", "hours=nan", "model=", "size=3"]
)
def test_a_target_that_says_nothing_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="--target"):
        parse_target(text)


def test_what_is_added_may_lie_idle() -> None:
    """A second machine is no worse than none, though sharing a step of one sequence takes more of it."""
    planned = job("qwen2.5-7b", ("qlora", "lsp"))
    now = outlook("now", RTX_3090, planned)
    assert now.first is not None
    assert now.first.seconds is not None
    rows = what_if(now, RTX_3090, planned, {"rtx-3060-12gb": find_profile(Path("rtx-3060-12gb"))})
    assert all(row.first_saved_s is not None and row.first_saved_s >= 0 for row in rows[:-1])
    assert rows[-1].first_saved_s is not None
    assert rows[-1].first_saved_s < 0  # a lesser card as a whole is told as it is


def test_a_card_without_the_jobs_precision_says_so() -> None:
    planned = job("opt-1.3b", ("native",))
    assert outlook("t4", find_profile(Path("t4")), planned).has_dtype is False
    assert outlook("now", RTX_3090, planned).has_dtype
