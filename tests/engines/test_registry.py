"""The table of engines, and that each of them is what `engines.base.Engine` says."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from engines import ENGINES, entry, load_engine
from engines.base import Context, Engine
from engines.errors import UserError
from engines.settings.parse import SETTINGS, parse_settings
from engines.shapes import Workload

CONTEXT = Context(device="cpu", workload=Workload(batch_size=1, seq_len=8), seed=0, total_steps=1)
METHODS = ("setup", "step", "evaluate", "weights", "save", "load", "synchronize", "close")


def parameter_names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_every_engine_has_settings() -> None:
    assert set(SETTINGS) == set(ENGINES)


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
        assert isinstance(inspect.getattr_static(kind, "why_not_available"), staticmethod)
        reason = kind.why_not_available()
        assert reason is None or (isinstance(reason, str) and reason)

    def test_is_made_from_settings_and_context(self, name: str) -> None:
        made = load_engine(name)(parse_settings(name, {}), CONTEXT)
        made.close()
        made.close()
