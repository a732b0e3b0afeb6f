"""What an engine or a command refuses or ends with. Imports nothing of this project."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def printable(text: str) -> str:
    """`text` in one line that does nothing to a terminal: names come from files and folders, and may hold
    escape sequences, line breaks, marks that turn the direction of writing, or bytes that are no text."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode("ascii")
        for each in text
    )


class UserError(Exception):
    """A mistake that a user can put right. Printed as one line: what, why, what to do."""

    def __init__(self, what: str, why: str, remedy: str) -> None:
        self.what = printable(what)
        self.why = printable(why)
        self.remedy = printable(remedy)
        super().__init__(f"{self.what}: {self.why}; {self.remedy}")


class NotAvailable(Exception):
    """An engine cannot run here because a library or the hardware is missing. Carries the reason."""


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite; the run ends in the state `nan_loss`."""

    def __init__(self, message: str, *, sides: tuple[float, float] | None = None) -> None:
        super().__init__(message)
        self.sides = sides
        """Zeroth-order methods: losses of two passes of the step, one that is not finite among them."""


PEER_LOST = "another rank ended, or did not answer"


class PeerLost(Exception):
    """Another process of the same run is gone, or did not answer in time. What ended it is its own story."""

    def __init__(self) -> None:
        super().__init__(PEER_LOST)


class InfeasiblePlan(Exception):
    """The plan cannot fit the limits it was given; found before anything was allocated."""
