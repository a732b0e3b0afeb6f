"""The table of engines, and that each of them is what `engines.base.Engine` says."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import pytest

from engines import (
    ENGINES,
    default_engines,
    engines_of_role,
    entry,
    generating_engines,
    load_engine,
    load_target,
    public_engines,
    what_trains,
    why_not_installed,
)
from engines.base import Context, Engine
from engines.errors import UserError
from engines.settings.parse import parse_settings, settings_class
from engines.shapes import Workload

CONTEXT = Context(device="cpu", workload=Workload(batch_size=1, seq_len=8), seed=0, total_steps=1)
METHODS = ("setup", "step", "evaluate", "weights", "save", "load", "synchronize", "close")


def parameter_names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", ENGINES)
def test_what_a_row_names_is_there(name: str) -> None:
    row = ENGINES[name]
    for target in (row.target, row.settings, row.costs, row.planner, row.presets):
        assert target is None or load_target(target) is not None


@pytest.mark.parametrize("name", ENGINES)
def test_a_reference_engine_is_one_with_nothing_offloaded(name: str) -> None:
    row = ENGINES[name]
    if row.reference is not None:
        assert entry(row.reference).copies == "none"
        assert entry(row.reference).order == row.order
        ours, theirs = settings_class(name), settings_class(row.reference)
        assert issubclass(ours, theirs)


def test_the_test_double_is_not_for_users() -> None:
    assert set(ENGINES) - set(public_engines()) == {"scripted"}
    assert default_engines() == (
        "native",
        "torchao-offload",
        "lsp",
        "mezo",
        "zo2",
        "exact-offload",
        "lora",
        "qlora",
    )
    assert engines_of_role("offload") == ("lsp", "zo2", "exact-offload")
    assert generating_engines() == ("zo2", "mezo")


def test_a_library_that_is_missing_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_not_installed("torchao-offload") == (
        "torchao is not installed (pip install 'lspzo-bench[torchao]')"
    )
    assert why_not_installed("native") is None


def test_an_unknown_engine_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"choose from: native, .*zo2"):
        entry("nativ")
    with pytest.raises(UserError, match="there is no such engine"):
        load_engine("nativ")


def test_the_list_of_methods_is_the_protocols() -> None:
    public = {name for name, member in vars(Engine).items() if callable(member) and not name.startswith("_")}
    assert public == {*METHODS, "why_not_available"}


@pytest.mark.parametrize("name", ENGINES)
class TestProtocol:
    def test_name_is_its_key(self, name: str) -> None:
        assert load_engine(name).name == name

    def test_methods_take_what_the_protocol_gives(self, name: str) -> None:
        kind = load_engine(name)
        for method in METHODS:
            assert parameter_names(getattr(kind, method)) == parameter_names(getattr(Engine, method)), method

    def test_says_why_it_is_not_available_without_an_instance(self, name: str) -> None:
        kind = load_engine(name)
        assert isinstance(inspect.getattr_static(kind, "why_not_available"), staticmethod | classmethod)
        reason = kind.why_not_available()
        assert reason is None or (isinstance(reason, str) and reason)

    def test_is_made_from_settings_and_context(self, name: str) -> None:
        made = load_engine(name)(parse_settings(name, {}), CONTEXT)
        made.close()
        made.close()


@pytest.mark.parametrize(
    ("engine", "settings", "learns"),
    [
        ("zo2", {}, "all weights"),
        ("zo2", {"train": "lora"}, "adapters"),
        ("mezo", {"train": "last:4"}, "train=last:4"),
        ("native", {}, "all weights"),
        ("lora", {"rank": 4}, "adapters, and a head that is new"),
    ],
)
def test_settings_say_what_learns(engine: str, settings: dict[str, object], learns: str) -> None:
    assert what_trains(engine, settings) == learns


def test_a_row_names_all_that_may_learn() -> None:
    for row in ENGINES.values():
        if row.trains_by:
            assert next(iter(row.trains_by.values())) in row.trains
            assert all(what in row.trains for what in row.trains_by.values())
