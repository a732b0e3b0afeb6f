"""Settings: text becomes typed values, and what makes no sense is refused with the key's name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engines import ENGINES
from engines.errors import UserError
from engines.settings.parse import parse_recorded, parse_settings, without_retired


@pytest.mark.parametrize(
    ("engine", "key", "value"),
    [
        ("native", "learning_rate", "-1"),
        ("native", "learning_rate", "nan"),
        ("native", "beta1", "1"),
        ("native", "beta2", "-0.1"),
        ("native", "adam_eps", "0"),
        ("native", "warmup_steps", "-1"),
        ("native", "schedule", "quadratic"),
        ("torchao-offload", "weight_decay", "-0.1"),
        ("lsp", "d", "0"),
        ("lsp", "r", "0"),
        ("lsp", "alpha", "0"),
        ("lsp", "check_every", "0"),
        ("lsp", "learn_steps", "-1"),
        ("lsp", "learn_rate", "0"),
        ("lsp", "learn_beta", "-1"),
        ("lsp", "learn_timeout_s", "-1"),
        ("lsp", "learning_rate", "-1"),
        ("mezo", "eps", "0"),
        ("zo2", "eps", "-1"),
        ("zo2", "resident_blocks", "-1"),
        ("zo2", "resident_blocks", "half"),
        ("scripted", "step_s", ""),
    ],
)
def test_a_senseless_value_is_the_users_error(engine: str, key: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{key}.*settings of {engine}"):
        parse_settings(engine, {key: value})


@pytest.mark.parametrize(
    ("engine", "key"),
    [
        ("native", "learning_rate"),
        ("lsp", "alpha"),
        ("mezo", "lora_alpha"),
        ("zo2", "eps"),
        ("scripted", "drain_s"),
    ],
)
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_number_is_finite(engine: str, key: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{key} must be a finite number; .* lists the settings of {engine}"):
        parse_settings(engine, {key: value})
    assert math.isnan(parse_settings("scripted", {"loss": "nan"}).loss[0])  # a script may hold any


@pytest.mark.parametrize("engine", ENGINES)
def test_an_unknown_key_is_the_users_error(engine: str) -> None:
    with pytest.raises(UserError, match=f"--set blocks=1: there is no such field; .*settings of {engine}"):
        parse_settings(engine, {"blocks": 1})


@pytest.mark.parametrize(
    ("engine", "text", "typed"),
    [
        ("lsp", {"d": "256", "offload": "false"}, {"d": 256, "offload": False}),
        ("zo2", {"resident_blocks": "3", "eps": "1e-2"}, {"resident_blocks": 3, "eps": 0.01}),
        ("scripted", {"step_s": "0.1,0.2"}, {"step_s": (0.1, 0.2)}),
    ],
)
def test_text_becomes_typed_values(engine: str, text: dict[str, str], typed: dict[str, Any]) -> None:
    settings = parse_settings(engine, text)
    assert {key: getattr(settings, key) for key in typed} == typed


@pytest.mark.parametrize("given", [1, 1.0, "1", "1.0"])
def test_a_record_of_an_earlier_version_may_name_a_setting_that_is_gone(given: object) -> None:
    assert parse_recorded("zo2", {"layer_share": given, "eps": 2e-3}) == parse_settings("zo2", {"eps": 2e-3})
    assert without_retired({"layer_share": given, "eps": 2e-3}) == ({"eps": 2e-3}, {})


def test_what_such_a_setting_made_of_a_run_is_told_and_not_repeated() -> None:
    assert without_retired({"layer_share": 0.5, "eps": 2e-3}) == ({"eps": 2e-3}, {"layer_share": 0.5})
    with pytest.raises(UserError, match=r"has no layer_share=0\.5: this version dropped it"):
        parse_recorded("mezo", {"layer_share": 0.5})


def test_a_setting_that_is_gone_is_no_setting() -> None:
    with pytest.raises(UserError, match=r"--set layer_share=1: .*lists the settings of zo2"):
        parse_settings("zo2", {"layer_share": "1"})


@pytest.mark.parametrize(
    ("values", "quantized"),
    [
        ({}, False),
        ({"base": "int8"}, True),
        ({"base": "int8", "train": "last:1"}, True),
        ({"base": "int8", "train": "lora"}, False),
        ({"base": "int8", "estimator": "lozo"}, False),
    ],
)
def test_fold_every_decides_the_bits_where_trained_matrices_are_low_bit(
    values: dict[str, Any], quantized: bool
) -> None:
    settings = parse_settings("zo2", {**values, "resident_blocks": 1})
    assert settings.trains_quantized == quantized
    assert ("fold_every" in settings.decides_updates) == quantized
    assert "resident_blocks" not in settings.decides_updates
    assert settings.decides_updates["eps"] == settings.eps
