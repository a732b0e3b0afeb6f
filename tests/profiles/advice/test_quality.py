"""What is said of zeroth-order steps is what our own studies hold."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from profiles.advice.quality import ZEROTH_ORDER, known_of_zeroth_order

ROOT = Path(__file__).parents[3]


def test_every_study_is_there() -> None:
    for study in ZEROTH_ORDER:
        assert (ROOT / study.source).is_file()
        assert study.unit in ("per byte", "per token", "accuracy")


def test_the_numbers_of_the_estimators_study_are_those_of_its_file() -> None:
    (study,) = (each for each in ZEROTH_ORDER if each.source.endswith("estimators.json"))
    trials = json.loads((ROOT / study.source).read_text())["trials"]
    mine = [each for each in trials if each["estimator"] == "mezo" and each["learning_rate"] == 1e-4]
    assert {each["steps"] for each in mine} == {1000}
    assert f"{mine[0]['start_loss']:.3f}" in study.finding
    assert f"{fmean(each['losses'][-1] for each in mine):.3f}" in study.finding
    assert len({each["seed"] for each in mine}) == 3


def test_the_numbers_of_the_study_on_real_weights_are_those_of_its_file() -> None:
    (study,) = (each for each in ZEROTH_ORDER if "smollm2" in each.source)
    result = json.loads((ROOT / study.source).read_text())
    told = {each["engine"]: each["test"] for each in result["methods"]}
    shares = [told["mezo"], told["native"]]
    assert told["zo2"] == told["mezo"]
    for each in shares:
        middle, low, high = (f"{each[name] * 100:.1f}" for name in ("median", "low", "high"))
        assert f"to {middle} % ({low} to {high} %" in study.finding
    assert f"from {result['zero_shot'] * 100:.1f} %" in study.finding
    steps = {each["steps"] for each in _final_trials(study.source)}
    assert steps == {244}
    assert "244 steps" in study.finding


def _final_trials(source: str) -> list[dict[str, int]]:
    trials = (ROOT / source).parent / "trials"
    return [json.loads(path.read_text())["learned"] for path in trials.glob("*-rung2-*.json")]


def test_other_sizes_are_not_known() -> None:
    assert known_of_zeroth_order(300_000).startswith("What a step learns at this size")
    for parameters in (1_000, 10**7, 13 * 10**9):
        assert "is not known at" in known_of_zeroth_order(parameters)
    assert known_of_zeroth_order(125_000_000).startswith("What a step learns at this size: SmolLM2-135M")
