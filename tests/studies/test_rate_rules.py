"""The study of rules for rates: its rules are what it says, its table is that of its runs, and it runs."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from rate_rules import BEST_RATE, DOG_START, EPS, FACTORS, RULES, Rule, best_factor, load_trials, table, trial
from test_estimator_study import tiny_source

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "studies" / "estimators" / "rate_rules.json"


def test_the_table_in_the_log_is_that_of_the_stored_trials() -> None:
    log = (ROOT / "engines" / "EXPERIMENTS.md").read_text(encoding="utf-8")
    assert table(load_trials(STORED)) in log


def test_every_rule_was_studied_from_the_same_start_with_the_same_passes() -> None:
    trials = load_trials(STORED)
    assert {each.rule for each in trials} == set(RULES)
    assert len({each.start_loss for each in trials}) == 1
    for each in trials:
        if each.loss is not None and each.rule not in ("curvature", "signal"):
            assert 600 - 9 < each.forward_passes <= 600
    for name in RULES:
        mine = [each for each in trials if each.rule == name]
        assert {each.factor for each in mine} == set(FACTORS)
        for factor in (1.0, best_factor(mine)):
            assert {each.seed for each in mine if each.factor == factor} == {0, 1, 2}


def test_a_normalised_step_is_as_long_as_the_probe_while_slopes_stay() -> None:
    rule = Rule("normalised", 1.0, 100, 3.0)
    assert [rule.rate(slope) * abs(slope) for slope in (-2.0, 2.0)] == pytest.approx([EPS, EPS])


def test_dog_hardly_leaves_its_first_rate_where_directions_are_orthogonal() -> None:
    rule = Rule("dog", 1.0, 100, 3.0)
    rates = [rule.rate(2.0) for _ in range(400)]
    assert rates[0] == pytest.approx(4 * DOG_START / (2.0 * 10))
    # r grows as the root of t from the second step on, and so does what it is divided by.
    assert rates[-1] == pytest.approx(rates[1], rel=0.5)
    assert rule.distance == pytest.approx(math.sqrt(sum((rate * 20) ** 2 for rate in rates)))


def test_dog_from_the_probe_begins_as_a_normalised_step() -> None:
    assert Rule("dog, probe", 3.0, 100, 3.0).rate(2.0) == Rule("normalised", 3.0, 100, 3.0).rate(2.0)


def test_the_rate_by_curvature_is_one_over_its_mean_and_zero_until_it_is_known() -> None:
    rule = Rule("curvature", 2.0, 100, 3.0)
    assert rule.rate(1.0) == 0.0
    rule.curvatures += [3.0, 5.0]
    assert rule.rate(1.0) == 0.5


def test_the_rate_by_signal_is_that_by_curvature_times_what_batches_share() -> None:
    rule = Rule("signal", 1.0, 100, 3.0)
    assert rule.rate(1.0) == 0.0
    rule.curvatures.append(4.0)
    rule.pairs += [(2.0, 1.0), (1.0, -1.0)]
    assert rule.rate(1.0) == pytest.approx((2 - 1) / (2.5 + 1) / 4)
    rule.pairs.append((3.0, -3.0))
    assert rule.rate(1.0) == 0.0


def test_a_constant_rate_is_in_units_of_the_best() -> None:
    assert Rule("constant", 3.0, 100, 3.0).rate(5.0) == 3 * BEST_RATE


@pytest.mark.parametrize("name", RULES)
def test_a_trial_moves_the_weights_by_the_rates_of_its_rule(name: str) -> None:
    found = trial(tiny_source(), name, 1.0, 0, 9)
    assert found.forward_passes == 18 + {"curvature": 1, "signal": 9 * 3}.get(name, 0)
    assert found.loss is not None
    assert found.distance is not None
    if name in ("curvature", "signal"):  # of a model of random weights, which may be negative
        assert (found.loss != found.start_loss) == (found.distance > 0)
    else:
        assert found.loss != found.start_loss
    if found.distance_by_slopes is not None:
        assert found.distance == pytest.approx(found.distance_by_slopes, rel=0.1)
