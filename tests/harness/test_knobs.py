"""`--set` assignments: who takes them, and what a preset stands for."""

from __future__ import annotations

import json

import pytest

from engines.base import UserError
from engines.settings import LSP_PRESETS, LspSettings, parse_settings
from harness.knobs import parse_assignments
from harness.show import engines_json


@pytest.mark.parametrize("name", LSP_PRESETS)
def test_a_preset_gives_settings_that_the_engine_takes(name: str) -> None:
    chosen = parse_assignments([f"lsp.preset={name}"], ["native", "lsp"])
    assert chosen.keys() == {"lsp"}
    typed = parse_settings("lsp", chosen["lsp"])
    for key, value in LSP_PRESETS[name].items():
        assert getattr(typed, key) == value
    assert typed.projector == "paper"


def test_the_published_values_are_those_of_the_papers_runs() -> None:
    typed: LspSettings = parse_settings("lsp", LSP_PRESETS["deepseek-coder-1.3b"])
    assert (typed.d, typed.r, typed.alpha, typed.check_every) == (1280, 4, 0.2, 100)
    typed = parse_settings("lsp", LSP_PRESETS["deepseek-coder-6.7b"])
    assert (typed.d, typed.r, typed.alpha, typed.check_every) == (2048, 8, 0.2, 100)
    typed = parse_settings("lsp", LSP_PRESETS["roberta-base"])
    assert (typed.d, typed.r, typed.alpha, typed.check_every) == (512, 16, 0.3, 1000)


@pytest.mark.parametrize("order", [["lsp.d=64", "preset=gpt2-large"], ["preset=gpt2-large", "lsp.d=64"]])
def test_other_assignments_win_whatever_the_order(order: list[str]) -> None:
    chosen = parse_assignments(order, ["lsp", "native"])["lsp"]
    assert chosen["d"] == "64"
    assert chosen["r"] == "16"


def test_unknown_presets_and_takers_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"lsp\.preset=gpt9: there is no such preset; choose from: roberta"):
        parse_assignments(["lsp.preset=gpt9"], ["lsp"])
    with pytest.raises(UserError, match="none of native, zo2 has 'preset'"):
        parse_assignments(["preset=gpt2-large"], ["native", "zo2"])
    with pytest.raises(UserError, match=r"zo2\.preset|preset=gpt2-large"):
        parse_assignments(["zo2.preset=gpt2-large"], ["zo2"])


def test_the_list_of_engines_has_the_presets() -> None:
    (lsp,) = [row for row in json.loads(engines_json()) if row["name"] == "lsp"]
    assert lsp["presets"] == LSP_PRESETS
