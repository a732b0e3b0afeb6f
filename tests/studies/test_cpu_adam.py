"""Ways in which an update on the CPU is scheduled otherwise, and undone."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from cpu_adam import VARIANTS, all_threads, share_of_threads

from engines.cpu_updates import pipeline


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_changes_what_there_is(name: str) -> None:
    """A name that has moved fails here, and not in the minutes of a GPU."""
    with ExitStack() as stack:
        for way in VARIANTS[name][1]:
            stack.enter_context(way())


def test_adam_has_its_share_of_the_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(32)
    try:
        for way, count in ((share_of_threads(0.5), 16), (all_threads(), 30)):
            with way:
                threads = pipeline.AdamThreads()
                for _ in range(20):
                    assert threads.count == count
                    threads.step_ended(1.0, None)
    finally:
        torch.set_num_threads(before)
