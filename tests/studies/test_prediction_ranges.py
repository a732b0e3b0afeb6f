"""Families left out of the factor that their steps are held against."""

from __future__ import annotations

import pytest

from harness.models.configs import named_shape
from profiles.planning.plan import Prediction
from tests.studies.prediction_ranges import Step, left_out, nine_in_ten, step_of


def of(family: str, needed: float) -> Step:
    return Step(family=family, factor=1.5, needed=needed)


def test_the_others_factor_is_held_against_a_family() -> None:
    steps = [of("opt", 1.0), of("opt", 1.1), of("opt", 1.2), of("llama", 1.3), of("llama", 1.15)]
    assert left_out(steps) == [("llama", 2, 1, 1.2)], "two of another family are too few for opt's"
    assert nine_in_ten([1.0] * 9 + [9.0]) == 1.0
    assert nine_in_ten([1.0] * 8 + [2.0, 9.0]) == 2.0


@pytest.mark.parametrize(("taken_s", "needed"), [(1.0, 1.0), (1.2, 1.0), (1.6, 1.28), (0.5, 1.6)])
def test_what_a_step_needs_beside_the_figures(taken_s: float, needed: float) -> None:
    """The figures alone say 0.8 to 1.25 s."""
    told = Prediction(
        step_s_low=0.8 / 1.5, step_s=1.0, step_s_high=1.25 * 1.5, peak_gpu_bytes=0, peak_host_bytes=0,
        pinned_bytes=0, h2d_bytes=0, d2h_bytes=0, bottleneck="gpu",
        basis="..; model error a factor of 1.5 each way.",
    )  # fmt: skip
    found = step_of(named_shape("opt-125m"), told, taken_s)
    assert found is not None
    assert found.needed == pytest.approx(needed)
    assert found.is_inside == (needed <= 1.5)
    assert step_of(named_shape("opt-125m"), told, None) is None
