"""Shared results, read back and checked: what one says can be held against what hardware can do."""

from __future__ import annotations

from pathlib import Path

from engines import public_engines
from engines.errors import UserError
from harness.sharing.bounds import impossible
from harness.sharing.shared_result import DAY, SUBMISSION_VERSION, TEXT, Submission
from profiles.documents import read_document


def load_submission(path: Path) -> Submission:
    """Raises `UserError` if `path` is not what `submit` writes, or says what no hardware can do."""
    found = read_document(path, Submission, SUBMISSION_VERSION, "shared result")
    check(found, str(path))
    return found


def check(found: Submission, origin: str) -> None:
    """Raises `UserError` naming the first thing that cannot be."""
    machine = found.machine
    texts = [machine.gpu, machine.link, machine.cpu, found.model, found.program, found.torch, found.dtype]
    texts += [found.commit, found.data, *(method.engine for method in found.methods)]
    texts += [
        value for method in found.methods for value in method.settings.values() if isinstance(value, str)
    ]
    texts += [key for method in found.methods for key in method.settings]
    for text in texts:
        if text is not None and TEXT.fullmatch(text) is None:
            raise UserError(origin, "holds a text that is no name of a machine or setting", "write it anew")
    if not DAY.fullmatch(found.day):
        raise UserError(origin, "its day is none", "write it anew with 'lspzo-bench submit'")
    for method in found.methods:
        if method.engine not in public_engines():
            raise UserError(origin, "names a method that this version does not know", "update lspzo-bench")
        if (why := impossible(found, method)) is not None:
            raise UserError(
                f"{origin}: {method.engine}", why, "measure again; this is not what hardware does"
            )


def shared_results(folder: Path) -> tuple[tuple[Path, Submission], ...]:
    """Every shared result below `folder`, by machine. Raises `UserError` for the first that is none."""
    return tuple((path, load_submission(path)) for path in sorted(folder.glob("*/*.json")))
