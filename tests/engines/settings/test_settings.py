"""Settings: text becomes typed values, and what makes no sense is refused with the key's name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engines import ENGINES
from engines.errors import UserError
from engines.settings.parse import parse_settings


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
    with pytest.raises(UserError, match=rf"{key}.*settings of {engine} are: .*{key}"):
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
    with pytest.raises(UserError, match=f"{key} must be a finite number; settings of {engine} are"):
        parse_settings(engine, {key: value})
    assert math.isnan(parse_settings("scripted", {"loss": "nan"}).loss[0])  # a script may hold any


@pytest.mark.parametrize("engine", ENGINES)
def test_an_unknown_key_is_the_users_error(engine: str) -> None:
    with pytest.raises(UserError, match=f"--set blocks=1.*settings of {engine} are: "):
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
