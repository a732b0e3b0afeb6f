"""`--set` assignments: who takes them, and what a preset stands for."""

from __future__ import annotations

import json

import pytest
from settings_given import given_for_each

from engines.errors import UserError
from engines.settings.given import Value
from engines.settings.lsp import LSP_PRESETS, LspSettings
from engines.settings.parse import parse_settings
from harness.cli.tables import engines_json
from harness.records.settings import check_settings, left_out, parse_assignments, typed_settings


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
    assert (chosen["d"], chosen["r"]) == (64, 16)


def test_unknown_presets_and_takers_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"lsp\.preset=gpt9: there is no such preset; choose from: roberta"):
        parse_assignments(["lsp.preset=gpt9"], ["lsp"])
    with pytest.raises(UserError, match="none of native, zo2 has 'preset'"):
        parse_assignments(["preset=gpt2-large"], ["native", "zo2"])
    with pytest.raises(UserError, match=r"--set zo2\.preset=gpt2-large"):
        parse_assignments(["zo2.preset=gpt2-large"], ["zo2"])


def test_values_get_the_types_that_the_engine_gives_them() -> None:
    given = ["lsp.d=64", "learning_rate=1e-3", "graphs=no", "projector=paper", "alpha=1"]
    assert parse_assignments(given, ["native", "lsp"]) == {
        "native": {"learning_rate": 0.001, "graphs": False},
        "lsp": {"d": 64, "learning_rate": 0.001, "graphs": False, "projector": "paper", "alpha": 1.0},
    }
    assert parse_assignments(["d=auto"], ["lsp"]) == {"lsp": {"d": "auto"}}
    as_text = given_for_each({"lsp": {"d": "64"}, "gone": {"x": "1"}})
    assert typed_settings(as_text) == {"lsp": {"d": 64}, "gone": {"x": "1"}}


@pytest.mark.parametrize(
    ("assignment", "settings", "words"),
    [
        ("foo.d=1", {"foo": {"d": 1}}, "there is no engine 'foo'; engines are: .*zo2"),
        ("scripted.loss=1", {"scripted": {"loss": 1}}, "there is no engine 'scripted'; engines are: .*zo2"),
        ("lsp.d=-3", {"lsp": {"d": -3}}, "d must be positive"),
        (
            "zo2.d=3",
            {"zo2": {"d": 3}},
            "there is no such field; 'lspzo-bench engines' lists the settings of zo2",
        ),
        ("zo2.eps=-1", {"zo2": {"eps": -1}}, "eps must be positive"),
        (
            "native.warmup_steps=true",
            {"native": {"warmup_steps": True}},
            "(whole number|must be a number, not true)",
        ),
    ],
)
def test_a_job_file_is_checked_as_flags_are(
    assignment: str, settings: dict[str, dict[str, Value]], words: str
) -> None:
    engine = assignment.partition(".")[0]
    with pytest.raises(UserError, match=f"^--set {engine}.*: .*{words}"):
        parse_assignments([assignment], ["native", "zo2"])
    with pytest.raises(UserError, match=rf"^my\.toml, settings\.{engine}.*: .*{words}"):
        check_settings(settings, ["native", "zo2"], "my.toml")


def test_what_is_for_an_engine_that_does_not_run_is_left_out() -> None:
    assert parse_assignments(["lsp.d=3", "zo2.eps=1"], ["native", "zo2"]) == {"zo2": {"eps": 1.0}}
    assert left_out(["lsp.d=3", "zo2.eps=1", "eps=2"], ["native", "zo2"]) == ["lsp.d=3"]
    assert check_settings({"lsp": {"d": 3}, "zo2": {"eps": 1}}, ["zo2"], "my.toml") == {"zo2": {"eps": 1.0}}


def test_a_job_file_may_name_a_preset() -> None:
    checked = check_settings({"lsp": {"preset": "gpt2-large", "r": 8}}, ["lsp"], "my.toml")
    assert checked == {"lsp": {**LSP_PRESETS["gpt2-large"], "r": 8}}


def test_the_list_of_engines_has_the_presets() -> None:
    (lsp,) = [row for row in json.loads(engines_json()) if row["name"] == "lsp"]
    assert lsp["presets"] == LSP_PRESETS
