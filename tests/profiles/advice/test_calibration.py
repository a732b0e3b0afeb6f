"""Records of this machine correct predictions for it; those of others never do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from known_shapes import DEEPSEEK_1B, H200

from engines.costs.table import traffic
from engines.settings.parse import parse_settings
from engines.shapes import Workload
from profiles.advice.calibration import Seen, calibrated, calibration_of, hardware, why_other_hardware
from profiles.planning.plan import Prediction
from profiles.planning.predict import predict

WORKLOAD = Workload(batch_size=4, seq_len=1024)


@pytest.fixture
def told() -> Prediction:
    cost = traffic("native", DEEPSEEK_1B, WORKLOAD, parse_settings("native", {}))
    return predict(cost, H200, WORKLOAD)


def test_the_median_moves_the_prediction_and_the_spread_makes_its_range(told: Prediction) -> None:
    calibration = calibration_of([Seen(engine="native", ratio=ratio) for ratio in (1.2, 1.5, 1.3)], {})
    found = calibrated(told, "native", calibration)
    assert told.step_s is not None
    assert found.step_s == pytest.approx(1.3 * told.step_s)
    assert found.step_s_low == pytest.approx(1.2 / 1.05 * told.step_s)
    assert found.step_s_high == pytest.approx(1.5 * 1.05 * told.step_s)
    assert "as 3 records of this machine" in found.basis
    assert calibrated(told, "lsp", calibration) == told
    assert calibrated(told, "native", None) == told


def test_few_records_keep_the_width_of_the_range(told: Prediction) -> None:
    found = calibrated(told, "native", calibration_of([Seen(engine="native", ratio=0.5)], {}))
    assert told.step_s_low is not None
    assert found.step_s_low == pytest.approx(0.5 * told.step_s_low)


def test_other_hardware_is_named() -> None:
    ours = hardware(H200)
    assert why_other_hardware(ours, ours) is None
    assert H200.gpu is not None
    other = replace(H200, gpu=replace(H200.gpu, name="NVIDIA A100"))
    assert why_other_hardware(hardware(other), ours) == "NVIDIA A100"
    assert why_other_hardware(hardware(replace(H200, gpu=None)), ours) == "no GPU"
    fewer = replace(H200, cpu=replace(H200.cpu, cores_usable=8))
    assert why_other_hardware(hardware(fewer), ours) == "8 cores"
