"""Settings of the methods that come from libraries. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from engines.settings.checks import require
from engines.settings.first_order import AdamWSettings, BlockPassSettings, ChunkedLossSettings


@dataclass(frozen=True, kw_only=True)
class LoraSettings(ChunkedLossSettings, BlockPassSettings):
    """Adapters of rank r beside matrices of the blocks; the matrices themselves stay as they are."""

    r: int = 16
    """Rank: a matrix of m x n gets r (m + n) trained weights."""
    alpha: float = 32.0
    """What the adapter adds is scaled by alpha / r."""
    lora_dropout: float = 0.0
    """Of the adapters' input."""
    target_modules: str = "all"
    """Which linear layers of the blocks, by the last part of their name, separated by commas; all: every
    one."""

    def __post_init__(self) -> None:
        ChunkedLossSettings.__post_init__(self)
        require(self.r > 0, "r", "must be positive")
        require(self.alpha > 0, "alpha", "must be positive")
        require(0 <= self.lora_dropout < 1, "lora_dropout", "must be in [0, 1)")
        require(bool(self.targets), "target_modules", "names no layer", "give 'all', or names such as q_proj")

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of `target_modules`."""
        return tuple(name.strip() for name in self.target_modules.split(",") if name.strip())

    def adapts(self, layer: str) -> bool:
        """Whether a linear layer of a block, by its dotted name, gets an adapter."""
        return self.targets == ("all",) or layer.rpartition(".")[2] in self.targets


NO_LINEAR_LAYERS = ("gpt2", "openai-gpt")
"""Families whose blocks have transformers' `Conv1D` for matrices, which bitsandbytes has no form of."""


@dataclass(frozen=True, kw_only=True)
class QloraSettings(LoraSettings):
    """Adapters over matrices of four bits (NF4)."""

    double_quant: bool = True
    """The scales of 64 weights each are themselves of eight bits."""


@dataclass(frozen=True, kw_only=True)
class AdamW8bitSettings(ChunkedLossSettings, BlockPassSettings):
    """AdamW with moments of eight bits, a scale for every 256."""

    paged: bool = False
    """Moments in memory that the driver moves to the host where the GPU's is full. CUDA only."""


@dataclass(frozen=True, kw_only=True)
class BackwardOptimizerSettings(ChunkedLossSettings, BlockPassSettings):
    """AdamW of each parameter as soon as its gradient is there."""

    def __post_init__(self) -> None:
        ChunkedLossSettings.__post_init__(self)
        require(
            self.max_grad_norm == 0,
            "max_grad_norm",
            "needs all gradients at once, and each is gone when the next comes",
            "use max_grad_norm=0, or native",
        )

    @property
    def captures(self) -> bool:
        """Whether steps are CUDA graphs, which hold the learning rate."""
        return self.graphs and self.schedule == "constant" and self.dropout == 0


@dataclass(frozen=True, kw_only=True)
class GaloreSettings(ChunkedLossSettings, BlockPassSettings):
    """AdamW of the blocks' matrices on gradients projected to rank `rank`."""

    rank: int = 128
    update_proj_gap: int = 200
    """Steps between two singular value decompositions, which give the projections."""
    scale: float = 0.25
    """Of what is projected back."""

    def __post_init__(self) -> None:
        ChunkedLossSettings.__post_init__(self)
        require(self.rank > 0, "rank", "must be positive")
        require(self.update_proj_gap > 0, "update_proj_gap", "must be positive")
        require(self.scale > 0, "scale", "must be positive")


@dataclass(frozen=True, kw_only=True)
class Fsdp2OffloadSettings(AdamWSettings):
    """FSDP2 on one GPU, all its state in host memory."""


@dataclass(frozen=True, kw_only=True)
class DeepspeedSettings(AdamWSettings):
    """DeepSpeed's ZeRO with its state in host memory."""

    reduce_bucket_size: int = 50_000_000
    """Gradients that are gathered on the GPU before they go down, in elements; twice that is held."""

    def __post_init__(self) -> None:
        AdamWSettings.__post_init__(self)
        require(self.reduce_bucket_size > 0, "reduce_bucket_size", "must be positive")


@dataclass(frozen=True, kw_only=True)
class ZenflowSettings(DeepspeedSettings):
    """ZenFlow: important columns at once, the rest late."""

    topk_ratio: float = 0.1
    """Share of the columns that is updated in each step, on the GPU."""
    update_interval: int = 4
    """Steps between two updates of the rest, on the CPU."""
    overlap_step: bool = True
    """The CPU updates behind the steps that follow, in a process of its own."""

    def __post_init__(self) -> None:
        DeepspeedSettings.__post_init__(self)
        require(0 < self.topk_ratio <= 1, "topk_ratio", "must be in (0, 1]")
        require(self.update_interval > 0, "update_interval", "must be positive")
