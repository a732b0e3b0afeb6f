"""What the child tells its engine of the machine."""

from __future__ import annotations

import pytest

from harness import worker
from profiles.limits import HostMemoryLimit


def test_host_memory_is_what_is_available_held_to_the_jobs_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemoryLimit(total_bytes=100, available_bytes=60, swap_bytes=0, basis="all")
    monkeypatch.setattr(worker, "host_memory", lambda: memory)
    assert [worker.usable_host_bytes(limit) for limit in (None, 70, 50)] == [60, 60, 50]
