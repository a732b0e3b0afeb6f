"""Settings of the methods with AdamW over all weights. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ConfigDict

from engines.settings.checks import Schedule, require, require_finite


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
    dropout: float = 0.0
    """Probability of every dropout of activations and attention weights that the model has; 0: none, whatever
    its configuration says. Whole layers and routers are never touched."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.learning_rate >= 0, "learning_rate", "must not be negative")
        require(self.warmup_steps >= 0, "warmup_steps", "must not be negative")
        require(self.weight_decay >= 0, "weight_decay", "must not be negative")
        require(0 <= self.beta1 < 1, "beta1", "must be in [0, 1)")
        require(0 <= self.beta2 < 1, "beta2", "must be in [0, 1)")
        require(self.adam_eps > 0, "adam_eps", "must be positive")
        require(0 <= self.dropout < 1, "dropout", "must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class NativeSettings(AdamWSettings):
    """Everything on the GPU: the line that all methods are measured against."""


@dataclass(frozen=True, kw_only=True)
class TorchaoOffloadSettings(AdamWSettings):
    """torchao's CPUOffloadOptimizer around AdamW."""

    offload_gradients: bool = False
    """Free each gradient on the GPU as soon as it is on the host."""
