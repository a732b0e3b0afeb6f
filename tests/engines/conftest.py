"""Tests of engines have the noise of small tensors drawn once; those of the noise itself do not."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _draws_once(request: pytest.FixtureRequest) -> None:
    if "noise" not in request.path.parts:
        request.getfixturevalue("noise_drawn_once")
