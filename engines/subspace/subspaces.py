"""Subspaces of weight matrices: drawing projectors, testing their bias, finding better ones.

LSP-Offload (2406.10181), Algorithm 1, lines 18 to 21 and 1 to 9. `engines.methods.lsp` says when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engines.base import ReportProgress
from engines.errors import UserError
from engines.model.blocks import find_blocks
from engines.settings.lsp import LspSettings
from engines.settings.lsp_layout import core_size
from engines.subspace.projector import (
    Projector,
    SparseProjector,
    one_hot_projector,
    random_block_projector,
    random_projector,
)
from engines.subspace.projector_search import StopReason, block_pair, learn, relative_bias


@dataclass(frozen=True, kw_only=True)
class Check:
    """One bias check of one matrix."""

    step: int
    bias: float
    """Relative bias of the pair in use, on this step's gradient."""
    learned_bias: float | None = None
    """That of the new pair; `None` if the pair was kept."""
    learn_steps: int = 0
    stop: StopReason | None = None
    """Why learning ended; `None` if the pair passed. `timeout` without a learned bias: too little time."""


@dataclass(kw_only=True, eq=False)
class Subspace:
    """A weight matrix and its pair. Rows and columns are the stored ones (Conv1D stores W^T)."""

    name: str
    block: int
    module: nn.Linear | Conv1D
    weight: nn.Parameter
    left: Projector
    right: Projector
    generation: int = 0
    """How many pairs have been drawn since its first; seeds the next."""
    checks: list[Check] = field(default_factory=list)

    @property
    def d(self) -> int:
        return self.left.d

    @property
    def inputs_are_rows(self) -> bool:
        return isinstance(self.module, Conv1D)

    def tensors(self) -> dict[str, Tensor]:
        """What makes both projectors, as `left.values` (m, r) and `right.values` (n, r); indices likewise."""
        return {
            f"{name}.{key}": tensor
            for name, projector in (("left", self.left), ("right", self.right))
            for key, tensor in projector.tensors().items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave: of the same names and shapes, on any device."""
        for name, projector in (("left", self.left), ("right", self.right)):
            projector.assign({key: tensors[f"{name}.{key}"] for key in projector.tensors()})

    def assign(self, left: Projector, right: Projector) -> None:
        """Take the values of another pair, in place."""
        self.left.assign(left.tensors())
        self.right.assign(right.tensors())


@torch.no_grad()
def _is_product(module: nn.Linear | Conv1D) -> bool:
    """Whether a layer is its product and no more; a class of its own, as routers have, is tried on two."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight: Any = module.weight
    if weight.is_meta:
        return False
    turned = isinstance(module, Conv1D)
    width = weight.shape[0] if turned else weight.shape[1]
    x = torch.linspace(-1, 1, 2 * width, device=weight.device).view(2, width).to(weight.dtype)
    expected = nn.functional.linear(x, weight.T if turned else weight, module.bias)
    found: Any = module(x)
    return (
        isinstance(found, Tensor)
        and found.shape == expected.shape
        and torch.allclose(
            found.float(), expected.float(), rtol=2e-2, atol=2e-2 * float(expected.float().abs().max())
        )
    )


def block_matrices(model: nn.Module) -> list[tuple[int, str, nn.Linear | Conv1D]]:
    """(block, name of the weight, module) of every `nn.Linear` and GPT-2 `Conv1D` inside the model's blocks.

    A weight with a second place in the model is left out: its gradient is not its block's alone.
    """
    path, blocks = find_blocks(model)
    places: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)] = places.get(id(parameter), 0) + 1
    return [
        (index, f"{path}.{index}.{name}.weight", module)
        for index, block in enumerate(blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and places[id(module.weight)] == 1 and _is_product(module)
    ]


def subspace_seed(seed: int, *parts: object) -> int:
    """A seed of 63 bits that depends on all of its arguments. Projectors and rounding have the bits of these:
    another separator would be another training."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def draw_pair(
    name: str, shape: torch.Size, d: int, settings: LspSettings, seed: int, generation: int
) -> tuple[Projector, Projector]:
    """A fresh pair for a matrix of `shape` (m, n), fp32 on the CPU, the same for the same arguments."""
    rows, columns = shape
    kind = settings.projector
    r = min(settings.r, d)
    seeds = [subspace_seed(seed, name, place, generation) for place in ("left", "right")]
    if kind == "one_hot":
        return one_hot_projector(rows, d, seeds[0]), one_hot_projector(columns, d, seeds[1])
    make = random_block_projector if kind == "block" else random_projector
    return make(rows, d, r, seeds[0]), make(columns, d, r, seeds[1])


def draw_subspaces(
    model: nn.Module,
    settings: LspSettings,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: ReportProgress,
) -> list[list[Subspace]]:
    """The subspaces of each block that has any, their first pairs drawn.

    Raises `UserError` for a model that has none.
    """
    chosen = block_matrices(model)
    if not chosen:
        raise UserError(type(model).__name__, "has no matrices in its blocks", "use another model")
    by_block: dict[int, list[Subspace]] = {}
    for done, (index, name, module) in enumerate(chosen):
        weight: Any = module.weight  # Conv1D is without annotations
        d = core_size(weight.shape[0], weight.shape[1], settings)
        pair = draw_pair(name, weight.shape, d, settings, seed, generation=0)
        left, right = (projector.cast(dtype, device) for projector in pair)
        by_block.setdefault(index, []).append(
            Subspace(name=name, block=index, module=module, weight=weight, left=left, right=right)
        )
        progress("drawing projectors", done + 1, len(chosen))
    return list(by_block.values())


@dataclass(kw_only=True)
class Round:
    """One round of checks: those of one step, all matrices together."""

    step: int
    settings: LspSettings
    seed: int
    clock: Callable[[], float]
    """Seconds."""
    time_left_s: float
    """For learning."""

    def check(self, subspace: Subspace, gradient: Tensor) -> tuple[Projector, Projector] | None:
        """Test the relative bias on this gradient (m, n); above alpha, a new pair, fp32 on its device.

        Takes down what was found in `subspace.checks`. Waits for the GPU.
        """
        found = relative_bias(gradient, subspace.left, subspace.right)
        if not found > self.settings.alpha:  # also where the gradient is not finite; the step will say so
            subspace.checks.append(Check(step=self.step, bias=found))
            return None
        if self.time_left_s <= 0:
            subspace.checks.append(Check(step=self.step, bias=found, stop="timeout"))
            return None
        subspace.generation += 1
        begin_s = self.clock()
        left, right, steps, stop = self._find(subspace, gradient)
        self.time_left_s -= self.clock() - begin_s
        dtype = subspace.weight.dtype
        learned = relative_bias(gradient, *(projector.cast(dtype) for projector in (left, right)))
        # A round that ran out of time, or a form that is fitted in one go, may have nothing better to offer.
        if stop in ("timeout", "closed_form") and learned >= found:
            subspace.checks.append(Check(step=self.step, bias=found, learn_steps=steps, stop=stop))
            return None
        subspace.checks.append(
            Check(step=self.step, bias=found, learned_bias=learned, learn_steps=steps, stop=stop)
        )
        return left, right

    def _find(self, subspace: Subspace, gradient: Tensor) -> tuple[Projector, Projector, int, StopReason]:
        """A new pair, the Adam steps it took, and why that was the end."""
        settings, d = self.settings, subspace.d
        if settings.projector == "block":
            return *block_pair(gradient, d, subspace.left.r), 0, "closed_form"
        pair = draw_pair(subspace.name, subspace.weight.shape, d, settings, self.seed, subspace.generation)
        left, right = (projector.cast(torch.float32, gradient.device) for projector in pair)
        if not (settings.projector == "paper" and isinstance(left, SparseProjector)):
            return left, right, 0, "redrawn"
        assert isinstance(right, SparseProjector)
        learned = learn(
            gradient,
            left,
            right,
            alpha=settings.alpha,
            beta=settings.learn_beta,
            steps=settings.learn_steps,
            rate=settings.learn_rate,
            time_limit_s=self.time_left_s,
            clock=self.clock,
        )
        return learned.left, learned.right, learned.steps, learned.stop
