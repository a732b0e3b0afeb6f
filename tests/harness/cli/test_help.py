"""What `--help` says of every command."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer.main

from harness.cli.app import LazyCommand, app


def test_help_says_the_default_of_every_flag() -> None:
    def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        command = command.real if isinstance(command, LazyCommand) else command
        for name, each in getattr(command, "commands", {}).items():
            yield from commands(each, f"{path} {name}")
        yield path, command

    silent = [
        f"{path} {each.opts[0]}"
        for path, command in commands(typer.main.get_command(app), "")
        for each in command.params
        if not (each.required or getattr(each, "is_flag", False) or "[default:" in (each.help or ""))
        and (each.default is None or not each.show_default)
    ]
    assert silent == []
