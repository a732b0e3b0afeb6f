"""How two texts share a sequence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from harness.data.token_tables import shares

LENGTHS = st.integers(0, 40)


@given(LENGTHS, LENGTHS, LENGTHS)
def test_what_is_too_long_is_taken_from_the_longer_text(first: int, second: int, most: int) -> None:
    kept = [first, second]
    while sum(kept) > most:
        kept[0 if kept[0] >= kept[1] else 1] -= 1
    assert shares(first, second, most) == tuple(kept)
