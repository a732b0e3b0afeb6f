"""Conversations: OpenAI's `messages` and ShareGPT's `conversations`, as turns of three roles. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from harness.data.reading.files import UnusableError, shortened
from harness.data.records import ChatExample, ChatRole, Turn

_ROLES: dict[str, ChatRole] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant",
}  # fmt: skip
_REASONING = ("reasoning_content", "reasoning", "thinking")
_BESIDE_TEXT = ("images", "image", "videos", "video", "audio", "audios")
_TOOLS = ("tool", "function", "observation", "function_call", "tool_call", "ipython")


def chat_example(values: Mapping[str, Any], place: str) -> ChatExample:
    """A record of turns, those of the assistant learnt unless their `weight` is 0.

    What follows the last learnt turn is left off: nothing is learnt from it. Raises `UnusableError` for a
    conversation without a turn to learn, for calls of tools, reasoning apart from the content, pictures, and
    roles that are not known.
    """
    messages = values.get("messages")
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # in a cell of a table
        try:
            messages = json.loads(messages)
        except json.JSONDecodeError:
            raise UnusableError("its messages are not valid JSON") from None
    if not isinstance(messages, list) or not messages:
        raise UnusableError("its list of messages is missing or empty")
    turns = [_turn(message) for message in messages]
    system = values.get("system")
    if isinstance(system, str) and system.strip() and turns[0].role != "system":
        turns.insert(0, Turn(role="system", content=system, is_learnt=False))
    last = max((place for place, turn in enumerate(turns) if turn.is_learnt), default=None)
    if last is None:
        raise UnusableError("no turn of the assistant is in it")
    return ChatExample(turns=tuple(turns[: last + 1]), place=place)


def _turn(message: object) -> Turn:
    if not isinstance(message, dict):
        raise UnusableError("one of its messages is not an object with a role and a content")
    if message.get("tool_calls") or message.get("function_call"):
        raise UnusableError("it holds calls of tools, which are not read")
    if (key := next((key for key in _REASONING if message.get(key)), None)) is not None:
        raise UnusableError(f'a turn has reasoning beside its content ("{key}"); write it there or remove it')
    if (key := next((key for key in _BESIDE_TEXT if message.get(key)), None)) is not None:
        raise UnusableError(f'a turn has "{key}" beside its content, and only text is read')
    name = message.get("role", message.get("from"))
    lower = str(name).casefold()
    if lower in _TOOLS:
        raise UnusableError(f"it holds calls of tools (role {shortened(lower)}), which are not read")
    role = _ROLES.get(lower)
    if role is None:
        raise UnusableError(f"its role '{shortened(str(name))}' is not one of system, user, assistant")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str) or (not content.strip() and role != "system"):
        raise UnusableError(f"the content of a turn of the {role} is missing or no text")
    learnt = message.get("weight", 1) not in (0, False) and message.get("train", True) is not False
    return Turn(role=role, content=content, is_learnt=role == "assistant" and learnt)


def _part(part: object) -> str:
    """Of a content in parts, those of text."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise UnusableError(f"it holds a part of the kind '{shortened(str(kind))}', and only text is read")
