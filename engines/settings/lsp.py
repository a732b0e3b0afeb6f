"""Settings of LSP-Offload, and what its authors published. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from engines.errors import UserError
from engines.settings.checks import Rounding, require
from engines.settings.exact_offload import Weights
from engines.settings.first_order import BlockPassSettings

NO_LINEAR_LAYERS_OF_TORCH = ("ibert",)
"""Families whose blocks have matrices in layers of their own, which are taken for none."""


@dataclass(frozen=True, kw_only=True)
class LspSettings(BlockPassSettings):
    """LSP-Offload (2406.10181). Symbols d, r and alpha are the paper's."""

    d: int | Literal["auto"] = 512
    """Size of the subspace; a matrix smaller than d x d uses its own smaller dimension, to a multiple of r.
    `auto`: one for each shape of weights, as `recommend` chooses them for the machine."""
    d_by_shape: str = ""
    """For d=auto: such as `2048x2048:1024,5504x2048:1664`, the larger dimension of a weight first."""
    r: int = 4
    """Nonzeros per projector row."""
    projector: Literal["block", "one_hot", "paper"] = "block"
    """Form of the projectors (`engines.subspace.projector`): `block` is block-diagonal, orthonormal, in
    closed form; `one_hot` a random count sketch with r = 1; `paper` has random places and learned values."""
    alpha: float = 0.3
    """Relative bias above which a matrix gets a new subspace."""
    check_every: int = 1000
    """Steps between bias checks; the first is before the first update."""
    learn_steps: int = 100
    """Most Adam steps spent on learning one pair of projectors; for `paper`."""
    learn_rate: float = 0.1
    """Adam's learning rate for projector values."""
    learn_beta: float = 1e-3
    """Weight of the regulariser ||P||_F + ||Q||_F."""
    learn_timeout_s: float = 60.0
    """Most time spent on finding projectors in one round of checks, all matrices together."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Precision of Adam's moments on the host. `bf16` is approximate, and lets the CPU move 12 bytes for each
    element of a bf16 core in place of 20."""
    residual: float = 0.0
    """What the projectors leave out of a gradient takes a step too, on the GPU, without momentum: of the
    length that Adam gives to what they keep, times this (`engines.subspace.residual`); 0: none, as in the
    paper. The gradient of each matrix is then formed. With weights=resident, one micro-batch a step, and no
    clipping."""
    max_grad_norm: float = 0.0
    """Clip the gradient to this norm; 0: not at all. It is that of all compressed gradients and those outside
    the subspaces together. The CPU's updates then begin when backward has ended."""
    rounding: Rounding = "stochastic"
    """How updates reach bf16 weights; `nearest` loses those below half a unit in the last place."""
    weights: Weights = "resident"
    """Where the blocks' matrices are: on the GPU, or on the host, from where they come up for the forward and
    again for the backward pass; all micro-batches then pass a block together, and nothing is captured. The
    twin keeps them on the GPU."""
    offload: bool = True
    """False: the twin, the same updates on the CPU in the main thread, nothing overlapped."""
    train_outer: bool = True
    """Train embeddings, head, norms and biases with AdamW on the GPU, as native does."""
    schedule_order: Literal["layerwise", "sequential"] = "layerwise"
    """`sequential`: all downloads, then all CPU updates, then all uploads, as ZeRO-Offload does."""

    def __post_init__(self) -> None:
        BlockPassSettings.__post_init__(self)
        require(self.d == "auto" or self.d > 0, "d", "must be positive, or auto")
        form = r"(?:(?:[1-9]\d*x[1-9]\d*:[1-9]\d*)(?:,(?!$)|$))*"
        require(re.fullmatch(form, self.d_by_shape) is not None, "d_by_shape", "is of ROWSxCOLUMNS:D,...")
        require(self.r > 0, "r", "must be positive")
        require(self.alpha > 0, "alpha", "must be positive")
        require(self.check_every > 0, "check_every", "must be positive")
        require(self.learn_steps >= 0, "learn_steps", "must not be negative")
        require(self.learn_rate > 0, "learn_rate", "must be positive")
        require(self.learn_beta >= 0, "learn_beta", "must not be negative")
        require(self.learn_timeout_s >= 0, "learn_timeout_s", "must not be negative")
        require(self.residual >= 0, "residual", "must not be negative")
        fits = self.residual == 0 or (self.weights == "resident" and self.max_grad_norm == 0)
        require(fits, "residual", "needs weights=resident, and max_grad_norm=0")

    @property
    def block_major(self) -> bool:
        """All micro-batches pass a block together."""
        return self.weights == "streamed"

    @property
    def streams(self) -> bool:
        """Blocks' matrices come up from the host."""
        return self.offload and self.weights == "streamed"

    def size_for(self, rows: int, columns: int) -> int:
        """The d that is wanted for weights of this shape, also given the other way round.

        Raises `UserError` for `auto` without one for it.
        """
        if self.d != "auto":
            return self.d
        shape = max(rows, columns), min(rows, columns)
        found = sizes_by_shape(self.d_by_shape).get(shape)
        if found is None:
            raise UserError(
                "--set lsp.d=auto",
                f"nothing says which d suits weights of {shape[0]} x {shape[1]} on this machine",
                "add --profile, use 'compare', which plans for this machine, or give a number",
            )
        return found


@cache
def sizes_by_shape(text: str) -> dict[tuple[int, int], int]:
    """`LspSettings.d_by_shape` by the weight's dimensions, the larger first."""
    found = {}
    for part in text.split(",") if text else ():
        shape, _, d = part.partition(":")
        one, other = (int(each) for each in shape.split("x"))
        found[max(one, other), min(one, other)] = int(d)
    return found


_LONG_CHECKS: dict[str, str | int | float] = {
    "projector": "paper",
    "check_every": 1000,
    "learn_steps": 100,
    "learn_rate": 0.1,
}


_DEEPSEEK: dict[str, str | int | float] = {
    "projector": "paper",
    "alpha": 0.2,
    "check_every": 100,
    "learn_steps": 100,
    "learning_rate": 1e-4,
}


LSP_PRESETS: dict[str, dict[str, str | int | float]] = {
    "roberta-base": {**_LONG_CHECKS, "d": 512, "r": 16, "alpha": 0.3, "learning_rate": 5e-5},
    "gpt2-large": {**_LONG_CHECKS, "d": 512, "r": 16, "alpha": 0.8, "learning_rate": 1e-4},
    "open-llama-3b": {**_LONG_CHECKS, "d": 512, "r": 16, "alpha": 0.8, "learning_rate": 1e-4},
    "deepseek-coder-1.3b": {
        **_DEEPSEEK, "d": 1280, "r": 4, "learn_rate": 0.06, "schedule": "cosine", "warmup_steps": 100,
    },
    "deepseek-coder-6.7b": {**_DEEPSEEK, "d": 2048, "r": 8, "learn_rate": 0.05},
}  # fmt: skip
"""What LSP-Offload's authors ran each model with, from the scripts, README and class defaults of
gulang2019/LSP-Offload; for `--set lsp.preset=NAME`. Where several values were tried (r for GPT2-large, d for
OpenLLaMA), the middle one. Their batches: 16 x 128 (RoBERTa on GLUE), 4 x 512 and 16 x 512 (Alpaca), 128 and
64 sequences of 1024 by accumulation (DeepSeek-Coder)."""
