"""Settings of exact AdamW on the CPU. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engines.settings.checks import require
from engines.settings.first_order import BlockPassSettings

Moments = Literal["fp32", "bf16", "int8"]
"""How Adam's two moments are kept on the host: exact, or approximate in 2 bytes or in 1 for each of the
two."""

Weights = Literal["resident", "streamed"]

GRADIENT_SLOTS = 3
"""Blocks whose gradients are on the GPU at once: one is being made, others are on their way down."""

MOMENT_GROUP = 128
"""Neighbours that share a scale in `int8` moments. As in `cpu_adam.c`."""


@dataclass(frozen=True, kw_only=True)
class ExactOffloadSettings(BlockPassSettings):
    """AdamW with fp32 master weights on the CPU, block by block."""

    moments: Moments = "fp32"
    """Precision of Adam's moments of the blocks; `bf16` and `int8` are approximate."""
    max_grad_norm: float = 0.0
    """Clip the gradient to this norm, over all parameters; 0: not at all."""
    clip_by: Literal["exact", "previous"] = "exact"
    """Whose norm the gradient is clipped by. `exact`: its own; the CPU then begins when backward has ended.
    `previous`: that of the step before, so that nothing waits; the first step is not clipped."""
    gradient_blocks: int | Literal["auto"] = "auto"
    """Blocks whose gradients have room in pinned host memory at once; backward waits for the CPU when they
    are all taken. `auto`, and with clip_by=exact: all. Plans choose fewer where host memory is short."""
    weights: Weights = "resident"
    """Where the blocks' weights are: on the GPU, or on the host, from where they come up for the forward and
    again for the backward pass. Of no effect without `offload`."""
    weight_slots: int = 3
    """With weights=streamed: how many blocks have room on the GPU at once. The last ones are still there when
    the forward pass turns, and come up once in a step, not twice. Plans choose more where that is faster."""
    gpu_blocks: int = 0
    """With weights=resident: the model's first so many blocks, at most all but the last, have masters and
    moments on the GPU, in fp32, which updates them (12 bytes more per parameter there, none on the host).
    Their gradients come last and their weights are wanted first, so that nothing hides what the CPU would do
    for them. One process only. Plans choose as many as make a step faster, where there is room."""
    outer: Literal["gpu", "host"] = "gpu"
    """Where masters and moments are of what lies outside the blocks (embeddings, head): on the GPU, which
    updates it, or on the host with those of the blocks."""
    hidden_states: Literal["gpu", "host"] = "gpu"
    """Where the hidden states between blocks wait for the backward pass: on the GPU, or in pinned memory of
    the host, from where they come up again."""
    kept_activations: Literal["all", "products"] = "all"
    """With --checkpointing: what blocks that are not run again keep for their backward pass: all it needs, or
    what matrix products and attention give, and the rest is computed again, with the same bits. Not with
    dropout. Plans choose it where it saves running blocks again."""
    disk_blocks: int = 0
    """Blocks whose masters' low halves and moments are on disk, not in host memory: the last ones, whose
    updates have most time. Plans choose as many as host memory has no room for."""
    disk_weights: bool = False
    """With weights=streamed: the weights of those blocks are on disk, too, from where they come up for both
    passes. Plans choose it where host memory has no room for the weights alone."""
    disk_folder: str = ""
    """Where, on a local disk that stands much writing; the files have no name and are gone when the run
    ends, however it does. By default lspzo-bench/spill below $XDG_CACHE_HOME or ~/.cache."""
    offload: bool = True
    """False: the twin, the same updates on the CPU in the main thread, nothing overlapped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_grad_norm >= 0, "max_grad_norm", "must not be negative")
        require(
            self.kept_activations == "all" or self.dropout == 0,
            "kept_activations",
            "keeps what draws random numbers from being computed again",
            "set dropout=0, or kept_activations=all",
        )
        require(self.disk_blocks >= 0, "disk_blocks", "must not be negative")
        require(self.gpu_blocks >= 0, "gpu_blocks", "must not be negative")
        require(
            self.gpu_blocks == 0 or self.weights == "resident",
            "gpu_blocks",
            "is for weights that stay on the GPU",
            "set weights=resident, or gpu_blocks=0",
        )
        require(
            self.gpu_blocks <= GRADIENT_SLOTS or not self.waits_for_norm,
            "gpu_blocks",
            f"is at most {GRADIENT_SLOTS} where clipping waits for the norm: their gradients wait on the GPU",
            "set fewer, or clip_by=previous",
        )
        require(self.weight_slots >= 2, "weight_slots", "must be at least 2: one computes, the next comes up")
        require(
            not self.disk_weights or (self.weights == "streamed" and self.disk_blocks > 0),
            "disk_weights",
            "is for blocks that are streamed and have their states on disk",
            "set weights=streamed and disk_blocks=N, too",
        )
        require(
            self.gradient_blocks == "auto" or self.gradient_blocks > 0, "gradient_blocks", "must be positive"
        )

    def on_disk(self, num_blocks: int) -> range:
        """Which of a model's blocks have their states on disk."""
        count = min(self.disk_blocks, num_blocks - self.updated_by_gpu(num_blocks)) if self.offload else 0
        return range(num_blocks - count, num_blocks)

    @property
    def of_one_process(self) -> tuple[str, str] | None:
        """What of these settings several processes cannot have, and what to set in its place; `None`:
        nothing. Each process would want the gradients of all, or write the files of others."""
        if self.gpu_blocks:
            return "leaves blocks to the GPU in one process only", "gpu_blocks=0"
        if self.disk_weights:
            return "has weights on disk in one process only", "disk_weights=false"
        return None

    def updated_by_gpu(self, num_blocks: int) -> int:
        """How many of a model's first blocks the GPU updates: at least the last is left to the CPU."""
        return min(self.gpu_blocks, num_blocks - 1)

    def weights_on_disk(self, num_blocks: int) -> range:
        """Which of a model's blocks have their weights there, too."""
        return self.on_disk(num_blocks) if self.disk_weights else range(0)

    def keeps_products(self, *, checkpointing: bool) -> bool:
        """Blocks that are not run again keep what products and attention give, with or without
        --checkpointing."""
        return checkpointing and self.kept_activations == "products"

    @property
    def streams(self) -> bool:
        """Blocks come up from the host."""
        return self.offload and self.weights == "streamed"

    @property
    def captures(self) -> bool:
        """Blocks run as CUDA graphs: their weights stay where they are, and so do hidden states between them,
        and nothing draws random numbers. The twin has none, so that a hazard shows as a difference."""
        stays = self.weights == "resident" and self.hidden_states == "gpu"
        return self.graphs and self.offload and stays and self.dropout == 0

    @property
    def waits_for_norm(self) -> bool:
        """The CPU updates nothing before the step's whole gradient is known."""
        return self.max_grad_norm > 0 and self.clip_by == "exact"
