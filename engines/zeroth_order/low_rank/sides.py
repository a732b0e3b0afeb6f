"""Which side of a step a pass computes with, of matrices that have values for theta and for both sides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engines.zeroth_order.block_visit import Task

PLAIN, PLUS, MINUS = 0, 1, 2
"""Which values: theta's own, or those of a side."""


class TwoSided:
    """Which values a pass computes with, of matrices that have them for theta and for both sides."""

    _now: int | None = PLAIN
    """`None`: plus for the first half of a batch, minus for the rest."""

    def take_side(self, task: Task) -> None:
        self._now = PLAIN if not task.perturb else PLUS if task.plus_only else None

    def hold(self, examples: range, sequences: int) -> None:
        """What blocks run next are so many sequences, both sides together, of those examples of the step."""

    def spans(self, rows: int) -> list[tuple[int, slice]]:
        """The sides of a batch of so many rows, and the rows of each."""
        if self._now is not None:
            return [(self._now, slice(None))]
        return [(PLUS, slice(None, rows // 2)), (MINUS, slice(rows // 2, None))]

    @contextmanager
    def on_side(self, side: int) -> Iterator[None]:
        """Within it a perturbed pass is that of side 0 (plus) or 1 (minus) alone, not both stacked."""
        before, self._now = self._now, (PLUS, MINUS)[side]
        try:
            yield
        finally:
            self._now = before
