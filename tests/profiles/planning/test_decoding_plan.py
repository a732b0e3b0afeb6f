from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from known_shapes import OPT_13B
from settings_given import given_settings
from tiny_machine import make_machine

from engines.costs.decoding import Decoding, least_gpu_bytes, traffic
from engines.errors import UserError
from engines.settings.zeroth_order import Zo2Settings
from engines.shapes import ModelShape
from profiles.machine import absent
from profiles.planning.budget import Budget, budget_of, gpu_bytes_needed
from profiles.planning.decoding import fitting, plan_generation

ONE = Decoding(batch_size=1, prompt_tokens=128, new_tokens=128, dtype="fp16")
BUDGET = Budget(gpu_bytes=22 * 10**9, host_bytes=100 * 10**9, pinned_bytes=None, gpu_named=True)


def test_as_many_blocks_stay_as_fit() -> None:
    settings, why_not = fitting("zo2", OPT_13B, ONE, given_settings("zo2"), BUDGET)
    assert why_not is None
    kept = settings["resident_blocks"]
    assert isinstance(kept, int)
    assert 0 < kept < 40
    needed = [
        gpu_bytes_needed(traffic(OPT_13B, ONE, Zo2Settings(resident_blocks=count)), BUDGET)
        for count in (kept, kept + 1)
    ]
    assert needed[0] <= 22 * 10**9 < needed[1]


def test_a_share_stays_free_where_no_limit_is_named_and_a_larger_cache_leaves_less_room() -> None:
    def kept(decoding: Decoding, *, named: bool) -> int:
        settings, _ = fitting(
            "zo2", OPT_13B, decoding, given_settings("zo2"), replace(BUDGET, gpu_named=named)
        )
        return int(settings["resident_blocks"])

    assert kept(ONE, named=False) < kept(ONE, named=True)
    assert kept(replace(ONE, batch_size=32), named=True) < kept(ONE, named=True)


def test_what_is_set_is_kept_and_without_a_gpu_nothing_is_chosen() -> None:
    assert fitting("zo2", OPT_13B, ONE, given_settings("zo2", {"resident_blocks": 3}), BUDGET) == (
        {"resident_blocks": 3},
        None,
    )
    assert fitting("zo2", OPT_13B, ONE, given_settings("zo2"), replace(BUDGET, gpu_bytes=None)) == (
        {},
        None,
    )


def test_blocks_that_are_to_be_on_disk_do_not_stay_on_the_gpu() -> None:
    settings, _ = fitting("zo2", OPT_13B, ONE, given_settings("zo2", {"disk_blocks": 38}), BUDGET)
    assert settings == {"disk_blocks": 38, "resident_blocks": 2}
    with pytest.raises(UserError, match=r"zo2\.disk_blocks=41: .* has 40 blocks"):
        fitting("zo2", OPT_13B, ONE, given_settings("zo2", {"disk_blocks": 41}), BUDGET)


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    _, why_not = fitting("zo2", OPT_13B, replace(ONE, batch_size=256), given_settings("zo2"), BUDGET)
    assert why_not is not None
    assert "GPU memory, CUDA and fragmentation included" in why_not
    set_ = {"resident_blocks": 0, "disk_blocks": 0}
    _, why_not = fitting(
        "zo2", OPT_13B, ONE, given_settings("zo2", set_), replace(BUDGET, host_bytes=20 * 10**9)
    )
    assert why_not is not None
    assert "host memory" in why_not
    _, why_not = fitting("mezo", OPT_13B, ONE, given_settings("mezo"), BUDGET)
    assert why_not is not None


def test_what_host_memory_has_no_room_for_is_on_disk() -> None:
    little = replace(BUDGET, host_bytes=20 * 10**9)
    settings, why_not = fitting("zo2", OPT_13B, ONE, given_settings("zo2", {"resident_blocks": 0}), little)
    assert why_not is None
    count = settings["disk_blocks"]
    assert isinstance(count, int)
    costs = [
        traffic(OPT_13B, ONE, Zo2Settings(disk_blocks=on_disk)).peak_host_bytes
        for on_disk in (count, count - 1)
    ]
    assert costs[0] <= 20 * 10**9 < costs[1]


def test_a_setting_that_is_none_is_the_users_error() -> None:
    with pytest.raises(UserError, match="residents"):
        fitting("zo2", OPT_13B, ONE, given_settings("zo2", {"residents": 3}), BUDGET)


@pytest.mark.parametrize("resident_blocks", [0, 20])
def test_the_floor_is_the_upload_as_long_as_it_is_the_largest(resident_blocks: int) -> None:
    machine = make_machine()
    budget = budget_of(machine, None, None, None)
    plan = plan_generation(
        "zo2", machine, OPT_13B, ONE, given_settings("zo2", {"resident_blocks": resident_blocks}), budget
    )
    up = 2 * OPT_13B.block_parameters * (40 - resident_blocks)
    assert plan.prediction.h2d_bytes == up
    assert plan.prediction.floor_s == pytest.approx(up / 13e9)
    assert plan.prediction.step_s is not None
    assert plan.prediction.step_s >= up / 13e9
    assert plan.prediction.bottleneck == "h2d"


def test_with_everything_on_the_gpu_the_floor_is_one_read_of_weights_and_cache() -> None:
    machine = make_machine()
    plan = plan_generation(
        "mezo", machine, OPT_13B, ONE, given_settings("mezo"), budget_of(machine, None, None, None)
    )
    assert not plan.fits
    assert plan.prediction.floor_s == pytest.approx(least_gpu_bytes(OPT_13B, ONE) / 900e9)


@pytest.mark.parametrize("prompts", [1, 32])
def test_a_lossless_base_gains_a_quarter_where_the_link_decides(prompts: int) -> None:
    machine, decoding = make_machine(), replace(ONE, dtype="bf16", batch_size=prompts)
    full_s, lossless_s = (
        plan_generation(
            "zo2", machine, OPT_13B, decoding,
            given_settings("zo2", {"resident_blocks": 0, "base": base}), budget_of(machine, None, None, None),
        ).prediction.step_s
        for base in ("full", "lossless")
    )  # fmt: skip
    assert full_s is not None
    assert lossless_s is not None
    assert lossless_s / full_s == pytest.approx(0.76, abs=0.01)


def test_blocks_that_come_up_in_bf16_are_lossless_unless_it_is_said() -> None:
    machine = make_machine()
    budget, in_bf16 = budget_of(machine, None, None, None), replace(ONE, dtype="bf16")

    def base(shape: ModelShape, decoding: Decoding, values: dict[str, Any]) -> str:
        plan = plan_generation("zo2", machine, shape, decoding, given_settings("zo2", values), budget)
        return str(plan.settings.typed.base)

    assert base(OPT_13B, in_bf16, {"resident_blocks": 0}) == "lossless"
    assert base(OPT_13B, in_bf16, {"resident_blocks": 0, "base": "full"}) == "full"
    assert base(OPT_13B, ONE, {"resident_blocks": 0}) == "full"
    assert base(replace(OPT_13B, num_blocks=1), in_bf16, {}) == "full"


def test_without_a_figure_there_is_no_floor() -> None:
    machine = make_machine()
    assert machine.link is not None
    link = replace(machine.link, h2d_pinned_bytes_per_s=absent("not probed"))
    machine = replace(machine, link=link)
    plan = plan_generation(
        "zo2", machine, OPT_13B, ONE, given_settings("zo2"), budget_of(machine, None, None, None)
    )
    assert plan.prediction.floor_s is None
