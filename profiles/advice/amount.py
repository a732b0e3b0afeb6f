"""How much a job trains: steps and tokens, from what the user says or from the lengths of the data. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from engines.errors import UserError
from engines.shapes import Workload

ONE_STEP = "one step"
"""Basis of an amount that nobody said."""

MOST = 1e18
"""Sequences of a job, beyond which a number was typed wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the user says of the amount; `None`: nothing."""

    examples: int | None = None
    """In one epoch."""
    epochs: float | None = None
    tokens: int | None = None
    """In one epoch, padding not counted."""
    steps: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"--{field.name} {value:g}", "must be positive", "say how many")
        given = [f"--{name}" for name in ("steps", "examples", "tokens") if getattr(self, name) is not None]
        if self.steps is not None and self.epochs is not None:
            given.append("--epochs")
        if len(given) > 1:
            raise UserError(
                " and ".join(given),
                "each says how much is trained",
                "keep one of them",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataLengths:
    """Training sequences of a file as a run would see them."""

    sequences: int
    tokens: int
    """Of all sequences, cut to the sequence length, padding not counted."""
    shares: tuple[tuple[int, float], ...]
    """Length that a batch is padded to -> share of the batches."""
    description: str
    """One line: what was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Amount:
    """All that a job trains."""

    steps: int
    sequences: int
    tokens: int
    """Padding not counted."""
    shares: tuple[tuple[int, float], ...]
    """Length of a sequence, padding included -> share of the steps with such sequences."""
    basis: str
    """What the amount follows from."""

    @property
    def is_whole_job(self) -> bool:
        """False: it is one step of a job that has nobody knows how many."""
        return self.basis != ONE_STEP

    @property
    def padded_tokens_each(self) -> float:
        """Of a sequence in the mean over the steps, padding included."""
        return sum(share * length for length, share in self.shares) / sum(share for _, share in self.shares)


def amount_of(workload: Workload, asked: Asked, data: DataLengths | None) -> Amount | None:
    """`None` where neither the user nor the data says how much. Raises `UserError` for epochs of nothing."""
    per_step = workload.batch_size * workload.accumulation
    tokens_each = float(workload.seq_len) if data is None else data.tokens / data.sequences
    shares = ((workload.seq_len, 1.0),) if data is None else data.shares
    epochs = 1.0 if asked.epochs is None else asked.epochs
    if asked.steps is not None:
        sequences: float = asked.steps * per_step
        said = f"--steps {asked.steps:,}"
    elif asked.tokens is not None:
        sequences = asked.tokens * epochs / tokens_each
        said = f"--tokens {asked.tokens:,}"
    elif asked.examples is not None:
        sequences = asked.examples * epochs
        said = f"--examples {asked.examples:,}"
    elif data is not None:
        sequences = data.sequences * epochs
        said = f"{data.sequences:,} training sequence{'' if data.sequences == 1 else 's'}"
    elif asked.epochs is not None:
        raise UserError(
            f"--epochs {asked.epochs:g}",
            "does not say of how much",
            "add --examples, --tokens or a --data file",
        )
    else:
        return None
    if sequences > MOST:
        raise UserError(f"{said}{_epochs(asked.epochs)}", "is more than anybody trains", "say how many")
    whole = math.ceil(sequences - 1e-9)
    lengths = f"sequences of {workload.seq_len} tokens" if data is None else data.description
    return Amount(
        steps=max(1, math.ceil(whole / per_step)),
        sequences=whole,
        tokens=round(whole * tokens_each),
        shares=shares,
        basis=f"{said}{_epochs(asked.epochs)}; {lengths}",
    )


def _epochs(asked: float | None) -> str:
    if asked is None:
        return ""
    return ", 1 epoch" if asked == 1 else f", {asked:g} epochs"
