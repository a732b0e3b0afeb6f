"""Tests of engines have the noise of small tensors drawn once; those of the noise itself do not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _drawn_once(request: pytest.FixtureRequest) -> Iterator[None]:
    if "noise" in request.path.parts:
        yield
        return
    from drawn_once import drawn_once

    with drawn_once():
        yield
