"""Settings of the methods with AdamW over all weights. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict

from engines.settings.checks import Schedule, require, require_finite
from engines.shapes import NO_RECOMPUTATION, ModelShape


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """AdamW as in Loshchilov & Hutter (1711.05101), with decoupled weight decay.

    Methods with nothing but these settings and their own leave --checkpointing to transformers."""

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
    max_grad_norm: float = 0.0
    """Clip the gradient of each step to this norm, of all parameters together; 0: not at all."""

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.learning_rate >= 0, "learning_rate", "must not be negative")
        require(self.warmup_steps >= 0, "warmup_steps", "must not be negative")
        require(self.weight_decay >= 0, "weight_decay", "must not be negative")
        require(0 <= self.beta1 < 1, "beta1", "must be in [0, 1)")
        require(0 <= self.beta2 < 1, "beta2", "must be in [0, 1)")
        require(self.adam_eps > 0, "adam_eps", "must be positive")
        require(0 <= self.dropout < 1, "dropout", "must be in [0, 1)")
        require(self.max_grad_norm >= 0, "max_grad_norm", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class CompiledBlockSettings(AdamWSettings):
    """How the blocks of a model that is trained run: through code of ours, which recomputes those of any
    model."""

    compile: bool | Literal["auto"] = "auto"
    """Blocks through torch's compiler (lsp: without the loss); `auto`: on a GPU, where it can be. The first
    steps take some seconds longer, up to a minute."""
    checkpointed_blocks: int | Literal["all"] = "all"
    """With --checkpointing: how many blocks are run again in the backward pass, from the first on. Plans
    choose as few as fit."""

    def __post_init__(self) -> None:
        AdamWSettings.__post_init__(self)
        count = self.checkpointed_blocks
        require(count == "all" or count >= 0, "checkpointed_blocks", "must not be negative")

    def recomputed(self, num_blocks: int, *, checkpointing: bool) -> int:
        """How many of a model's blocks are run again, with or without --checkpointing."""
        if not checkpointing:
            return 0
        count = self.checkpointed_blocks
        return num_blocks if count == "all" else min(count, num_blocks)


@dataclass(frozen=True, kw_only=True)
class BlockPassSettings(CompiledBlockSettings):
    """The same, and captured."""

    graphs: bool = True
    """Forward and backward pass as CUDA graphs, where they can be captured: without dropout, with
    exact-offload where weights and hidden states stay on the GPU, and with backward-optimizer, whose updates
    they hold, where the learning rate is constant."""


@dataclass(frozen=True, kw_only=True)
class ChunkedLossSettings(CompiledBlockSettings):
    """How the loss over a vocabulary is computed."""

    loss_tokens: int | Literal["all"] = "all"
    """Positions whose logits are there at once in training; `all`: those of a micro-batch. Plans choose
    chunks where the logits do not fit. A bf16 gradient of the head is then rounded once for each chunk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loss_tokens == "all" or self.loss_tokens > 0, "loss_tokens", "must be positive, or all")


@dataclass(frozen=True, kw_only=True)
class NativeSettings(ChunkedLossSettings, BlockPassSettings):
    """Everything on the GPU: the line that all methods are measured against."""


@dataclass(frozen=True, kw_only=True)
class TorchaoOffloadSettings(AdamWSettings):
    """torchao's CPUOffloadOptimizer around AdamW."""

    offload_gradients: bool = False
    """Free each gradient on the GPU as soon as it is on the host."""


def why_no_checkpointing(settings: Any, shape: ModelShape) -> str | None:
    """Why a method with these typed settings cannot run `shape` with --checkpointing; `None`: it can."""
    by_transformers = isinstance(settings, AdamWSettings) and not isinstance(settings, CompiledBlockSettings)
    return NO_RECOMPUTATION if by_transformers and not shape.is_recomputable else None


def why_no_accumulation(settings: Any, accumulation: int) -> str | None:
    """Why a step of `accumulation` micro-batches cannot have these typed settings; `None`: it can."""
    if isinstance(settings, TorchaoOffloadSettings) and settings.offload_gradients and accumulation > 1:
        return "torchao overwrites offloaded gradients, so micro-batches would not add up"
    return None
