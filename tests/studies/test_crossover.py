"""T* from seconds by tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from crossover import crossover


def test_where_two_lines_cross() -> None:
    """The CPU takes 0.32 s, the GPU 20 us for each token and 10 ms more."""
    seconds = {tokens: max(0.32, 0.01 + 20e-6 * tokens) for tokens in (1_000, 4_000, 16_000, 32_000)}
    assert crossover(seconds, 0.3) == pytest.approx(16_000)
    assert crossover(seconds, 0.01) is None, "what does not grow is not the CPU's"
    assert crossover(seconds, None) is None


@pytest.mark.parametrize(
    "seconds", [{1_000: 0.3, 4_000: 0.3, 8_000: 0.3}, {1_000: 0.02, 4_000: 0.08, 8_000: 0.16}]
)
def test_it_is_not_found_on_one_side_alone(seconds: dict[int, float]) -> None:
    assert crossover(seconds, max(seconds.values())) is None
