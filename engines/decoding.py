"""The words of generation, shared by engines and harness. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from engines.base import StepStats


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Raises `ValueError` for values out of range."""

    temperature: float = 0.0
    """0: greedy, the token with the largest logit; the other fields have no effect then."""
    top_k: int = 0
    """Only among this many tokens; 0: among all."""
    top_p: float = 1.0
    """Only among the fewest tokens that have this probability together."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError("temperature must not be negative")
        if self.top_k < 0:
            raise ValueError("top_k must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError("top_p must be in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What is to be continued, and how far. Raises `ValueError` without a prompt or for an empty one."""

    prompts: Sequence[Sequence[int]]
    """Token ids of each prompt."""
    max_new_tokens: int
    end_ids: Sequence[int] = ()
    """Tokens that end a sequence; without one every sequence gets all new tokens."""
    pad_id: int = 0
    """Fills up shorter prompts, and follows the end of a sequence."""
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        if not self.prompts or not all(self.prompts):
            raise ValueError("a prompt must have a token")
        if self.max_new_tokens <= 0:
            raise ValueError("max_new_tokens must be positive")

    @property
    def prompt_tokens(self) -> int:
        """Of the longest prompt, to whose length the others are padded."""
        return max(len(prompt) for prompt in self.prompts)

    @property
    def cache_tokens(self) -> int:
        """Positions of each sequence whose keys and values are kept: all but that of the last token."""
        return self.prompt_tokens + self.max_new_tokens - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """One decoding step."""

    tokens: tuple[int, ...]
    """The next token of each prompt, `pad_id` after its end."""
    stats: StepStats
    """Bytes of the work that was started since the step before, and times of what has ended since. There is
    no loss: it is NaN."""


class GeneratingEngine(Protocol):
    """An engine that continues prompts with its weights."""

    def generate(self, request: GenerationRequest) -> Iterator[Decoded]:
        """Decoding steps until every prompt has ended or has all its new tokens, with every update so far
        applied. Changes nothing that training sees; no step is taken before the last is asked for.

        The caller sees to it that the model takes sequences of that length. Raises `UserError` for a model
        that generates no text, `InfeasiblePlan` if the cache does not fit, before it is allocated.
        """
