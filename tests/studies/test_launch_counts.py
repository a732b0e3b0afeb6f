"""Launches of a block by time: the difference of two depths, beside what the cost model counts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import launch_counts
from launch_counts import CASES, Case, config_folder, counted_launches, found_of, job_of

from engines.costs.transformer import GATED_LAUNCHES, PLAIN_STARTS
from engines.shapes import ModelShape
from harness.resolve import resolve_shape


def test_blocks_are_what_deeper_models_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 ms outside of blocks, 100 us a block."""

    @contextmanager
    def stepping(
        case: Case, job: object, shape: ModelShape, device: str
    ) -> Iterator[Callable[[float], list[float]]]:
        yield lambda seconds: [2e-3 + 1e-4 * shape.num_blocks] * 9

    monkeypatch.setattr(launch_counts, "stepping", stepping)
    found = found_of(CASES[0], "cpu", 0.02)
    assert found.block_s == pytest.approx(1e-4)
    assert found.outside_s == pytest.approx(2e-3)
    assert found.taken == pytest.approx(1e-4 / found.launch_s)


def test_an_eager_block_counts_as_three_passes(tmp_path: Path) -> None:
    case = Case(engine="native", family="llama", settings={"compile": "false", "graphs": "false"})
    job = job_of(case, config_folder("llama", 4, tmp_path), "cpu")
    assert counted_launches(case, job, resolve_shape(job)) == 3 * GATED_LAUNCHES
    plain = replace(case, family="opt")
    job = job_of(plain, config_folder("opt", 4, tmp_path), "cpu")
    assert counted_launches(plain, job, resolve_shape(job)) == 3 * PLAIN_STARTS


def test_a_case_is_measured_or_says_why_not() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = found_of(Case(engine="native", family="llama"), "cpu", 0.05)
    finally:
        torch.set_num_threads(threads)
    assert found.taken is not None, found.why_not
    assert found.taken > 30
    refused = found_of(Case(engine="native", family="llama", settings={"rank": "3"}), "cpu", 0.05)
    assert refused.taken is None
    assert "rank" in (refused.why_not or "")
