"""What an engine or a command refuses or ends with. Imports nothing of this project."""

from __future__ import annotations

import re


def printable(text: str) -> str:
    """`text` in one line that does nothing to a terminal: names come from files and folders, and may hold
    escape sequences, line breaks, marks that turn the direction of writing, or bytes that are no text."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode("ascii")
        for each in text
    )


_PLAIN = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"^Value error, ", ""),
        (r"Input should be a valid integer.*", "must be a whole number"),
        (r"Input should be a valid number.*", "must be a number"),
        (r"Input should be a valid boolean.*", "must be true or false"),
        (r"Input should be a valid string.*", "must be text"),
        (r"Input should be a valid (dictionary|mapping).*", "must be a table"),
        (r"Input should be a valid (list|tuple).*", "must be a list"),
        (r"Input should be greater than or equal to (.+)", r"must be at least \1"),
        (r"Input should be greater than (.+)", r"must be more than \1"),
        (r"Input should be less than or equal to (.+)", r"must be at most \1"),
        (r"Input should be less than (.+)", r"must be less than \1"),
        (r"Input should be (.+)", r"must be \1"),
        (r"Field required", "is missing"),
        (r"Extra inputs are not permitted|Unexpected keyword argument", "there is no such field"),
    )
)


def plainly(message: str) -> str:
    """What a library that reads values says of one (pydantic, in English), in this program's words."""
    for pattern, plain in _PLAIN:
        message = pattern.sub(plain, message)
    return message


def first_line(error: BaseException) -> str:
    """What is said of an error of a library, whose text may go on for pages; of one without words its
    name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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

    def __init__(self, message: str, *, losses: tuple[float, float] | None = None) -> None:
        super().__init__(message)
        self.losses = losses
        """Zeroth-order methods: losses of two passes of the step, one that is not finite among them."""


PEER_LOST = "another rank ended, or did not answer"


class PeerLost(Exception):
    """Another process of the same run is gone, or did not answer in time. What ended it is its own story."""

    def __init__(self) -> None:
        super().__init__(PEER_LOST)


class InfeasiblePlan(Exception):
    """The plan cannot fit the limits it was given; found before anything was allocated."""
