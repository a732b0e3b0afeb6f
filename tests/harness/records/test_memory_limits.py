"""How much memory a run might have taken: the smallest of what held it."""

from __future__ import annotations

import pytest

from harness.records.memory_limits import (
    EMULATED_CONTEXT_BYTES,
    gpu_limit_bytes,
    host_limit_bytes,
    imposed_card_bytes,
    imposed_gpu_bytes,
    imposed_host_bytes,
)
from run_records import emulated_run, make_run, make_test_job

GIB = 2**30


@pytest.mark.parametrize(("emulated_gib", "job_gib"), [(8, 4), (4, 8)])
def test_the_smaller_of_an_emulated_machine_and_the_job(emulated_gib: int, job_gib: int) -> None:
    run = emulated_run(job=make_test_job(limits={"vram_bytes": job_gib * GIB}), vram_bytes=emulated_gib * GIB)
    assert imposed_gpu_bytes(run) == gpu_limit_bytes(run, None) == 4 * GIB
    # CUDA's context is beside what is emulated, and inside of what the job allows.
    assert imposed_card_bytes(run) == min(emulated_gib * GIB + EMULATED_CONTEXT_BYTES, job_gib * GIB)


def test_without_limits_there_is_the_whole_machine() -> None:
    run = make_run("zo2", job=make_test_job(limits={}))
    assert imposed_gpu_bytes(run) is imposed_card_bytes(run) is imposed_host_bytes(run) is None
    assert gpu_limit_bytes(run, None) == run.environment.gpu_total_bytes
    assert host_limit_bytes(run) == run.environment.host_memory_bytes
    limited = make_run("zo2", job=make_test_job(limits={"host_bytes": 3 * GIB}))
    assert host_limit_bytes(limited) == imposed_host_bytes(limited) == 3 * GIB
