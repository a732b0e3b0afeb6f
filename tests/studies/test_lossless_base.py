"""The study of visits over lossless tiles runs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from lossless_base import study


def test_each_pass_over_records_has_the_bits_of_one_over_weights() -> None:
    rows = study((2048 * 3, 5000), torch.device("cpu"), lambda work: 1.0)
    assert len(rows) == 6
    assert all(row.equal for row in rows)
