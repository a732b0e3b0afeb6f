"""What is said of zeroth-order steps is what our own studies hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean, median

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

from smollm2_tables import methods_of

from profiles.advice.quality import ZEROTH_ORDER, known_of_zeroth_order

ROOT = Path(__file__).parents[3]


def test_every_study_is_there() -> None:
    for study in ZEROTH_ORDER:
        assert (ROOT / study.source).is_file()
        assert study.unit in ("per byte", "per token", "accuracy", "Matthews correlation")


def test_the_numbers_of_the_estimators_study_are_those_of_its_file() -> None:
    (study,) = (each for each in ZEROTH_ORDER if each.source.endswith("estimators.json"))
    trials = json.loads((ROOT / study.source).read_text())["trials"]
    mine = [each for each in trials if each["estimator"] == "mezo" and each["learning_rate"] == 1e-4]
    assert {each["steps"] for each in mine} == {1000}
    assert f"{mine[0]['start_loss']:.3f}" in study.finding
    assert f"{fmean(each['losses'][-1] for each in mine):.3f}" in study.finding
    assert len({each["seed"] for each in mine}) == 3


def test_the_numbers_of_the_study_on_real_weights_are_those_of_its_records() -> None:
    (study,) = (each for each in ZEROTH_ORDER if "SST-2" in each.name)
    methods = {each.label: each for each in (*methods_of("SST-2, bf16"), *methods_of("SST-2, by uploads"))}
    native, mezo, queries = (methods[label] for label in ("native", "mezo", "mezo:queries"))
    for each, words in ((mezo, "from 51.9 % to "), (queries, "eight queries to "), (native, "in 244 to ")):
        middle, low, high = (
            f"{value * 100:.1f}" for value in (median(each.tests), min(each.tests), max(each.tests))
        )
        assert f"{words}{middle} % ({low} to {high} %" in study.finding
    before = mezo.finals[0].learned.test_before
    assert before is not None
    assert f"{before['accuracy'] * 100:.1f}" == "51.9"
    steps = [{trial.learned.steps for trial in each.finals} for each in (mezo, queries, native)]
    assert steps == [{244}, {81}, {244}]


def test_the_numbers_on_mrpc_and_cola_are_those_of_their_records() -> None:
    for name, form, share in (("MRPC", ".1f", 100), ("CoLA", ".2f", 1)):
        (study,) = (each for each in ZEROTH_ORDER if name in each.name)
        methods = {each.label: each for each in methods_of(f"{name}, bf16")}
        percent = " %" if share == 100 else ""
        for label in ("mezo", "native"):
            tests = methods[label].tests
            middle, low, high = (
                f"{value * share:{form}}" for value in (median(tests), min(tests), max(tests))
            )
            assert f" {middle}{percent} ({low} to {high}{percent}" in study.finding
        (steps,) = {trial.learned.steps for each in methods.values() for trial in each.finals}
        assert f"{steps} steps of 16 rows" in study.finding
        assert f"AdamW in {steps} " in study.finding
    test = methods_of("MRPC, bf16")[0].finals[0].learned.test
    assert test is not None
    assert f"majority class ({test['majority_class'] * 100:.1f} %)" == "majority class (66.5 %)"


def test_other_sizes_are_not_known() -> None:
    assert known_of_zeroth_order(300_000).startswith("What a step learns at this size")
    for parameters in (1_000, 10**7, 13 * 10**9):
        assert "is not known at" in known_of_zeroth_order(parameters)
    assert known_of_zeroth_order(125_000_000).startswith("What a step learns at this size: SmolLM2-135M")
