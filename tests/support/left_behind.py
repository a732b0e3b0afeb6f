"""What processes a test leaves behind."""

from __future__ import annotations

import psutil
from forked import children


def children_left() -> list[psutil.Process]:
    """Processes that this one started and that still run, but for torch's compilers and that which forks.

    The first compiled model of a test process starts a server of compile workers that lives as long as the
    process does, so it may belong to an earlier test.
    """
    return [child for child in children() if not _compiles(child)]


def _compiles(process: psutil.Process) -> bool:
    try:
        family = [process, *process.parents()]
        return any("torch/_inductor/compile_worker" in " ".join(each.cmdline()) for each in family)
    except psutil.NoSuchProcess:
        return True  # it has ended
