"""What a file given with --external says of another trainer. Imports no torch.

A plan and a record hold it as settings do: plain values. A list or a table is text in JSON.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

from engines.settings.checks import require

StepClock = Literal["arrival", "told"]


@dataclass(frozen=True, kw_only=True)
class ExternalSettings:
    """Another trainer's command, and how its steps are read from its output."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    command: str = "[]"
    """The program and its arguments, a JSON list of text."""
    folder: str = ""
    """Where it is started; empty: where this program was."""
    env: str = "{}"
    """Variables set for it beside those of the shell, a JSON table of text. They are recorded."""
    regex: str = ""
    """What a line that shows a step matches, with groups named `loss` and, where they are told, `step` and
    `step_s`; empty: lines are read as JSON."""
    loss: str = "loss"
    step: str = ""
    step_s: str = ""
    """Without `regex`: the keys of a JSON line, a dot between those of inner tables; empty: not told."""
    clock: StepClock = "arrival"
    """`arrival`: a step lasts from one line to the next, as they arrive. `told`: what the line says, in
    seconds."""
    tokens_per_step: int = 0
    """Tokens that one step computes on; 0: as many as the job's."""
    method: str = ""
    """What it does, in a sentence, for tables and reports."""

    def __post_init__(self) -> None:
        command, env = _parsed(self.command), _parsed(self.env)
        is_words = isinstance(command, list) and all(isinstance(word, str) for word in command)
        require(is_words, "command", "must be a list of words, the program first")
        is_table = isinstance(env, dict) and all(isinstance(value, str) for value in env.values())
        require(is_table, "env", "must be a table of text")
        require(self.tokens_per_step >= 0, "tokens_per_step", "must not be negative")
        if not self.regex:
            require(bool(self.loss), "loss", "names no key of a JSON line")
            require(self.clock == "arrival" or bool(self.step_s), "step_s", 'is what clock = "told" reads')
            return
        try:
            groups = re.compile(self.regex).groupindex
        except re.error as error:
            require(False, "regex", f"is no regular expression ({error})")
            return
        require("loss" in groups, "regex", "has no group (?P<loss>...)")
        told = self.clock == "arrival" or "step_s" in groups
        require(told, "regex", 'has no group (?P<step_s>...), which clock = "told" reads')

    @property
    def words(self) -> list[str]:
        """The command as it is started."""
        found: list[str] = json.loads(self.command)
        return found

    @property
    def variables(self) -> dict[str, str]:
        """`env`, by name."""
        found: dict[str, str] = json.loads(self.env)
        return found


def _parsed(text: str) -> object:
    try:
        found: object = json.loads(text)
    except ValueError:
        return None
    return found
