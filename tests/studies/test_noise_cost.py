"""The study of what noise costs runs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import noise_cost


def test_rows_of_every_noise_with_the_bits_of_the_cpu() -> None:
    calls: list[int] = []

    def clock(work: object) -> float:
        assert callable(work)
        work()
        calls.append(1)
        return float(len(calls))

    rows = noise_cost.study((noise_cost.COMPARED, 2048), torch.device("cpu"), clock)
    assert len(rows) == 12
    assert len({(row.base, row.noise, row.decays) for row in rows}) == 12
    assert all(row.equal and row.draw_ms == 0.25 for row in rows)
