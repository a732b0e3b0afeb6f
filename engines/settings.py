"""Every knob of every engine, with its unit and its default. Imports no torch.

`--set key=value` changes them, `lspzo-bench engines` lists them, a `Plan` holds the ones it chose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from engines.base import UserError

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """AdamW as in Loshchilov & Hutter (1711.05101), with decoupled weight decay."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    learning_rate: float = 1e-4
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    """Applied to matrices only; biases and norms are never decayed."""
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-8

    def __post_init__(self) -> None:
        _require(self.learning_rate >= 0, "learning_rate", "must not be negative")
        _require(self.warmup_steps >= 0, "warmup_steps", "must not be negative")
        _require(self.weight_decay >= 0, "weight_decay", "must not be negative")
        _require(0 <= self.beta1 < 1, "beta1", "must be in [0, 1)")
        _require(0 <= self.beta2 < 1, "beta2", "must be in [0, 1)")
        _require(self.adam_eps > 0, "adam_eps", "must be positive")


@dataclass(frozen=True, kw_only=True)
class NativeSettings(AdamWSettings):
    """Everything on the GPU: the line that all methods are measured against."""


@dataclass(frozen=True, kw_only=True)
class TorchaoOffloadSettings(AdamWSettings):
    """torchao's CPUOffloadOptimizer around AdamW."""

    offload_gradients: bool = False
    """Free each gradient on the GPU as soon as it is on the host."""


@dataclass(frozen=True, kw_only=True)
class LspSettings(AdamWSettings):
    """LSP-Offload (2406.10181). Symbols d, r and alpha are the paper's."""

    d: int = 512
    """Size of the subspace; a matrix smaller than d x d uses its own smaller side."""
    r: int = 4
    """Nonzeros per projector row."""
    alpha: float = 0.3
    """Relative bias above which a matrix gets a new subspace."""
    check_every: int = 1000
    """Steps between bias checks; the first is before the first update."""
    learn_steps: int = 100
    """Most Adam steps spent on learning one pair of projectors."""
    learn_rate: float = 0.1
    """Adam's learning rate for projector values."""
    learn_beta: float = 1e-3
    """Weight of the regulariser ||P||_F + ||Q||_F."""
    learn_timeout_s: float = 60.0
    """Most time spent on one round of learning, all matrices together."""
    projector: Literal["learned", "identity"] = "learned"
    """`identity` needs d = m = n and is for checks against AdamW."""
    offload: bool = True
    """False: the in-memory twin, everything on the GPU."""
    train_outer: bool = True
    """Train embeddings, head, norms and biases with AdamW on the GPU, as native does."""
    schedule_order: Literal["layerwise", "sequential"] = "layerwise"
    """`sequential`: all downloads, then all CPU updates, then all uploads, as ZeRO-Offload does."""

    def __post_init__(self) -> None:
        AdamWSettings.__post_init__(self)
        _require(self.d > 0, "d", "must be positive")
        _require(self.r > 0, "r", "must be positive")
        _require(self.alpha > 0, "alpha", "must be positive")
        _require(self.check_every > 0, "check_every", "must be positive")
        _require(self.learn_steps >= 0, "learn_steps", "must not be negative")
        _require(self.learn_timeout_s >= 0, "learn_timeout_s", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class MezoSettings:
    """MeZO (2305.17333): SGD along one random direction, two forward passes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    learning_rate: float = 1e-6
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    """Applied to matrices only; biases and norms are never decayed."""
    eps: float = 1e-3
    """Size of the perturbation."""

    def __post_init__(self) -> None:
        _require(self.learning_rate >= 0, "learning_rate", "must not be negative")
        _require(self.warmup_steps >= 0, "warmup_steps", "must not be negative")
        _require(self.weight_decay >= 0, "weight_decay", "must not be negative")
        _require(self.eps > 0, "eps", "must be positive")


@dataclass(frozen=True, kw_only=True)
class Zo2Settings(MezoSettings):
    """ZO2 (2503.12668): MeZO with the blocks in host memory."""

    resident_blocks: int = 0
    """Blocks that stay on the GPU, spread evenly among the streamed ones."""

    def __post_init__(self) -> None:
        MezoSettings.__post_init__(self)
        _require(self.resident_blocks >= 0, "resident_blocks", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class ScriptedSettings:
    """The harness's own test double: scripted losses, times and bytes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    step_s: tuple[float, ...] = (0.01,)
    """Time of each step; the last repeats. Slept only with `sleep`; otherwise the clock is told."""
    loss: tuple[float, ...] = (1.0,)
    """Loss of each step; the last repeats. NaN ends the run in `nan_loss`."""
    fail_at_step: int | None = None
    failure: Literal["oom_gpu", "oom_host", "pinned_limit", "crash", "kill", "hang", "interrupt"] = "crash"
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    host_allocation_bytes: int = 0
    """Host memory touched at set-up."""


Settings = AdamWSettings | MezoSettings | ScriptedSettings

SETTINGS: dict[str, type[Any]] = {
    "native": NativeSettings,
    "torchao-offload": TorchaoOffloadSettings,
    "lsp": LspSettings,
    "mezo": MezoSettings,
    "zo2": Zo2Settings,
    "scripted": ScriptedSettings,
}


def parse_settings(engine: str, values: Mapping[str, object]) -> Any:
    """Typed settings of `engine` from plain values (strings are converted).

    Raises `UserError` that names the key and the engine's keys.
    """
    kind = SETTINGS[engine]
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "settings"
        known = ", ".join(field.name for field in fields(kind))
        raise UserError(
            f"--set {key}={values.get(key, '')}", first["msg"], f"settings of {engine} are: {known}"
        ) from None


def _require(holds: bool, key: str, why: str) -> None:
    if not holds:
        raise ValueError(f"{key} {why}")
