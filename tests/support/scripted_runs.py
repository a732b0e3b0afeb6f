"""Jobs and plans for the scripted engine, shared by tests of the harness."""

from __future__ import annotations

from typing import Any

from settings_given import given_for_each, given_settings

from engines.shapes import ModelShape
from harness.records.job import Job, Limits, ModelSource
from profiles.planning.plan import Plan, Prediction

SHAPE = ModelShape(
    name="scripted", family="opt", head="causal_lm", num_blocks=2, hidden=4, intermediate=8, num_heads=1,
    num_kv_heads=1, vocabulary=16, max_seq_len=64, gated_mlp=False, tied=True, num_labels=0,
    block_parameters=100, non_block_parameters=64, head_parameters=64, matrices=(), largest_tensor=64,
)  # fmt: skip


def scripted_job(timeout_s: float = 60.0, host_bytes: int | None = None, **fields: Any) -> Job:
    """Two warm-up steps and four measured ones of 1 x 8 tokens."""
    values: dict[str, Any] = {"batch_size": 1, "seq_len": 8, "steps": 4, "warmup_steps": 2, **fields}
    values["settings"] = given_for_each(values.get("settings", {}))
    return Job(
        model=ModelSource(name="scripted", random_weights=True),
        limits=Limits(timeout_s=timeout_s, host_bytes=host_bytes),
        **values,
    )


def scripted_plan(fits: bool = True, why_not: str | None = None, **settings: Any) -> Plan:
    return Plan(
        engine="scripted",
        settings=given_settings("scripted", settings),
        fits=fits,
        why_not=why_not,
        prediction=Prediction(
            step_s_low=0.5, step_s=1.0, step_s_high=2.0, peak_gpu_bytes=10, peak_host_bytes=20,
            pinned_bytes=5, h2d_bytes=3, d2h_bytes=4, bottleneck="h2d", basis="made up",
        ),
        reasons=("a test",),
        verify_command="lspzo-bench compare",
    )  # fmt: skip
