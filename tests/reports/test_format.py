"""How commands in a report name methods."""

from __future__ import annotations

from reports.format import method_flags


def test_another_trainer_is_named_by_its_file() -> None:
    assert method_flags(["mezo", "external:mine", "zo2"]) == "--engines mezo,zo2 --external mine.toml"
    assert method_flags(["external:a.b"]) == "--external a.b.toml"
