"""Ready-made jobs. Imports no torch."""

from __future__ import annotations

from typing import Any

from engines.errors import UserError

PRESETS = ("quick",)

LR_SEARCH_STEPS = 40
"""Most steps that `run --find-lr` takes at each learning rate."""
LR_SEARCH: dict[str, Any] = {"steps": LR_SEARCH_STEPS, "eval_batches": 8}
"""Job fields of `run --find-lr` where the user gives none."""


def preset_values(name: str, has_gpu: bool) -> dict[str, Any]:
    """The job fields of preset `name`, to be overridden by what the user gives.

    `quick` ends within five minutes on two CPU cores (a tiny model) and on a GPU (a small one).
    Raises `UserError` for an unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"preset '{name}'", "there is no such preset", f"choose from: {', '.join(PRESETS)}")
    if has_gpu:
        return {
            "model": {"name": "opt-125m", "random_weights": True},
            "batch_size": 4,
            "seq_len": 1024,
            "dtype": "bf16",
            "steps": 10,
            "warmup_steps": 3,
            "eval_batches": 4,
            "limits": {"timeout_s": 600.0},
        }
    return {
        "model": {"name": "tiny-llama", "random_weights": True},
        "batch_size": 8,
        "seq_len": 64,
        "dtype": "fp32",
        "steps": 30,
        "warmup_steps": 3,
        "eval_batches": 8,
        "limits": {"timeout_s": 600.0},
    }
