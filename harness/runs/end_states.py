"""What the exception that ended a run says of it. Imports no torch."""

from __future__ import annotations

import re
import traceback

from engines.errors import InfeasiblePlan, NonFiniteLoss, NotAvailable, PeerLost, UserError
from harness.records.run import EndState

OUT_OF_MEMORY: dict[EndState, str] = {
    "oom_gpu": "ran out of GPU memory",
    "oom_host": "ran out of host memory",
    "pinned_limit": "could not pin host memory",
}

REASON_LENGTH = 300
"""Characters of an end reason; torch's messages go on for paragraphs."""


def classify(error: BaseException, *, is_set_up: bool = True) -> tuple[EndState, str]:
    """End state and one-line reason of the exception that ended a run.

    Before an engine `is_set_up`, a `UserError` is its refusal of this model, job or machine: nothing ran that
    could have crashed. An exception that says nothing by itself is judged by its cause: engines raise from
    their threads.
    """
    text = _first_line(error)
    match error:
        case NotAvailable():
            return "not_available", text
        case InfeasiblePlan():
            return "skipped_infeasible", text
        case NonFiniteLoss():
            return "nan_loss", text
        case UserError():
            return "crash" if is_set_up else "not_available", text
        case KeyboardInterrupt():
            return "interrupted", "stopped by a signal"
        case PeerLost():
            return "crash", text
        case MemoryError():
            return "oom_host", f"host memory could not be allocated{f' ({text})' if text else ''}"
    whole = str(error).lower()
    if _failed_to_pin(error, whole):
        return "pinned_limit", text
    if type(error).__name__ == "OutOfMemoryError" or re.search(
        r"cuda out of memory|cuda error: out of memory|cublas_status_alloc_failed", whole
    ):
        return "oom_gpu", text
    if "can't allocate memory" in whole or "cannot allocate memory" in whole:
        return "oom_host", text
    if error.__cause__ is not None:
        state, reason = classify(error.__cause__, is_set_up=is_set_up)
        if state != "crash":
            return state, reason
    return "crash", f"{type(error).__name__}: {text}" if text else type(error).__name__


def _failed_to_pin(error: BaseException, message: str) -> bool:
    """torch reports a refused pin as an ordinary CUDA error; the line that asked for it tells."""
    if re.search(r"cudahostalloc|cudahostregister|pin_memory|pinned memory|page-locked", message):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return "cuda error" in message and bool(frames) and "pin_memory" in (frames[-1].line or "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:REASON_LENGTH] if lines else ""
