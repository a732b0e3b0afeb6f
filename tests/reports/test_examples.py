"""The interval of accuracy over examples."""

from __future__ import annotations

import pytest
import scipy.stats

from reports.examples import share_interval


@pytest.mark.parametrize(("hits", "count"), [(22, 32), (0, 10), (10, 10), (1, 1), (793, 872)])
def test_the_interval_of_a_share_is_wilsons(hits: int, count: int) -> None:
    found = scipy.stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert share_interval(hits / count, count) == pytest.approx((found.low, found.high), abs=1e-12)
