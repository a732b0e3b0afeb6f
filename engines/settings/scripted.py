"""Settings of the harness's own test double. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict

from engines.settings.checks import require, require_finite


def _as_sequence(value: object) -> object:
    """`0.1,0.2` and `0.1` as they come from the command line and from a plan."""
    if isinstance(value, str):
        return value.split(",")
    return (value,) if isinstance(value, int | float) else value


Script = Annotated[tuple[float, ...], BeforeValidator(_as_sequence)]
"""One value per call, in order; the last repeats. As text: separated by commas."""


@dataclass(frozen=True, kw_only=True)
class ScriptedSettings:
    """The harness's own test double: scripted losses, times and bytes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    setup_s: float = 0.0
    """Time of the set-up."""
    step_s: Script = (0.01,)
    """Time of each step, told to the engine's own clock; spent only with `sleep`."""
    drain_s: float = 0.0
    """Time for which the work of a step goes on after its loss is known, until `synchronize`."""
    loss: Script = (1.0,)
    """Loss of each step; NaN ends the run in `nan_loss`."""
    eval_loss: Script = (1.0,)
    """Loss of each evaluation."""
    eval_accuracy: Script = (0.5,)
    """Accuracy of each evaluation."""
    eval_s: Script = (0.0,)
    """Time of each evaluation."""
    gpu_s: Script | None = None
    """Time that the GPU is busy in each step."""
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    pinned_bytes: int = 0
    host_allocation_bytes: int = 0
    """Host memory touched at set-up."""
    num_children: int = 0
    """Processes forked at set-up, as data loaders are; they wait, and end with the engine."""
    sleep: bool = False
    """Spend the scripted times for real."""
    fail_at_step: int | None = None
    """Step, from 0, in which `failure` happens; -1: in the set-up."""
    failure: Literal[
        "crash",
        "oom_gpu",
        "oom_host",
        "pinned_limit",
        "not_available",
        "infeasible",
        "user_error",
        "interrupt",
        "kill",
        "hang",
    ] = "crash"
    fail_on_rank: int = 0
    """The one that fails, where there are several; -1: all of them."""

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("step_s", "loss", "eval_loss", "eval_accuracy", "eval_s", "gpu_s"):
            require(getattr(self, name) != (), name, "must not be empty")
        for name in ("setup_s", "drain_s", "h2d_bytes", "host_allocation_bytes", "num_children"):
            require(getattr(self, name) >= 0, name, "must not be negative")
