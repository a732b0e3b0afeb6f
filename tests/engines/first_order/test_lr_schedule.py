from __future__ import annotations

import pytest

from engines.first_order.lr_schedule import learning_rate_at
from engines.settings.zeroth_order import MezoSettings


def rates(steps: int, total_steps: int, **settings: object) -> list[float]:
    made = MezoSettings(learning_rate=8.0, **settings)  # type: ignore[arg-type]
    return [learning_rate_at(step, made, total_steps) for step in range(steps)]


def test_constant() -> None:
    assert rates(3, 3) == [8.0, 8.0, 8.0]


def test_warmup_rises_to_the_peak_and_never_starts_at_zero() -> None:
    assert rates(6, 6, warmup_steps=4) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


def test_linear_falls_to_zero_and_stays_there() -> None:
    assert rates(6, 4, schedule="linear") == [8.0, 6.0, 4.0, 2.0, 0.0, 0.0]


def test_linear_after_warmup() -> None:
    assert rates(6, 6, schedule="linear", warmup_steps=2) == [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]


def test_cosine_is_half_way_in_the_middle_and_ends_at_zero() -> None:
    values = rates(6, 4, schedule="cosine")
    assert values[0] == 8.0
    assert values[2] == pytest.approx(4.0)
    assert values[4] == pytest.approx(0.0)
    assert values[5] == pytest.approx(0.0)
    assert values == sorted(values, reverse=True)


def test_a_warmup_as_long_as_the_run() -> None:
    assert rates(2, 2, schedule="linear", warmup_steps=2) == [4.0, 8.0]
