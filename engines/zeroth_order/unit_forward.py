"""How the module of a unit computes in the visit of its block: on one side, or on both, stacked in one batch.

Linear layers and layer norms take both sides in one go; anything else runs once for each side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engines.kernels import triton_launch
from engines.model.blocks import hidden_state_of
from engines.zeroth_order.chunked_loss import multiply
from engines.zeroth_order.low_rank.linear_matrices import columns_first, is_linear
from engines.zeroth_order.low_rank.lora import Adapters
from engines.zeroth_order.low_rank.low_rank_noise import LowRank
from engines.zeroth_order.paired_batch import Apart, halved, stack
from engines.zeroth_order.perturbed_weights import BlockScratch
from engines.zeroth_order.units import ModuleUnit


@dataclass(slots=True)
class StackedBatch:
    """The batch that a block is run with now."""

    rows: int = 0
    """Both sides together."""


class UnitForward:
    """In the place of a module's forward: makes the weights that the unit lacks, and computes with them."""

    def __init__(
        self,
        unit: ModuleUnit,
        scratch: BlockScratch,
        adapters: Adapters | LowRank,
        batch: StackedBatch,
        device: torch.device,
        *,
        is_block: bool,
    ) -> None:
        """`unit.module.forward` as it is now is what runs on one side. `is_block`: the unit is a whole block,
        whose sides come with calls of their own."""
        module = unit.module
        self._unit, self._scratch, self._adapters, self._batch = unit, scratch, adapters, batch
        self._own = module.forward
        self._is_block = is_block
        self._turned = columns_first(module)
        self._is_product = is_linear(module) and unit.has_weight_and_bias_only
        self._is_norm = unit.is_layer_norm and device.type == "cuda" and triton_launch.has_triton()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        unit, scratch = self._unit, self._scratch
        scratch.open(unit)
        if self._is_block and any(isinstance(each, Apart) for each in (*args, *kwargs.values())):
            return self._on_each_side(*args, **kwargs)
        if not scratch.stacks or (unit.frozen and not unit.adapted):
            return self._on_one_side(*args, **kwargs)
        if self._is_norm and args and self._is_stacked(args[0]):
            return self._norm(args[0])
        if self._is_product and self._is_stacked(args[0]) and args[0].dim() > 1:
            return self._on_one_side(args[0]) if unit.frozen else self._product(args[0])
        return self._on_each_side(*args, **kwargs)

    def _is_stacked(self, x: Tensor) -> bool:
        return x.shape[0] % self._batch.rows == 0

    def _on_one_side(self, *args: Any, **kwargs: Any) -> Any:
        """With the plus side's weights, which are theta's where nothing is perturbed."""
        with self._unit.with_side(0):
            return self._own(*args, **kwargs)

    def _on_each_side(self, *args: Any, **kwargs: Any) -> Any:
        """Each half of the batch with its side's weights, and the results stacked."""
        unit, results = self._unit, []
        for side in (0, 1):
            # Frozen weights are in the scratch of the plus side only.
            alike = unit.frozen or not self._scratch.stacks
            with unit.with_side(0 if alike else side), self._adapters.on_side(side):
                mine = halved((args, kwargs), self._batch.rows, side)
                result = self._own(*mine[0], **mine[1])
                results.append(hidden_state_of(result) if self._is_block else result)
        return stack(results, self._batch.rows)

    def _product(self, x: Tensor) -> Tensor:
        """(..., outputs) of `x` (..., inputs), the first half of its rows with the plus side's weights."""
        flat = x.reshape(-1, x.shape[-1])
        half = flat.shape[0] // 2
        first = self._unit.weights[0][0]
        width = first.shape[1] if self._turned else first.shape[0]
        out = torch.empty((flat.shape[0], width), dtype=first.dtype, device=flat.device)
        halves = ((0, slice(None, half)), (1, slice(half, None)))
        (self._multiply_together if self._unit.adapted else self._multiply_each)(flat, out, halves)
        return out.view(*x.shape[:-1], width)

    def _multiply_together(self, flat: Tensor, out: Tensor, halves: Sequence[tuple[int, slice]]) -> None:
        """One product for both sides, which differ in the bias and in what stands beside."""
        assert isinstance(self._adapters, LowRank)
        first = self._unit.weights[0][0]
        multiply(flat, first if self._turned else first.t(), None, out)
        for side, rows in halves:
            out[rows] += self._unit.weights[side][1]
        self._adapters.add(self._unit.module, flat, out)

    def _multiply_each(self, flat: Tensor, out: Tensor, halves: Sequence[tuple[int, slice]]) -> None:
        for side, rows in halves:
            weights = self._unit.weights[side]
            weight = weights[0] if self._turned else weights[0].t()
            bias = weights[1] if len(weights) > 1 else None
            multiply(flat[rows], weight, bias, out[rows])

    def _norm(self, x: Tensor) -> Tensor:
        from engines.kernels import paired_layer_norm

        (weight, bias), (other_weight, other_bias) = self._unit.weights
        module = self._unit.module
        assert isinstance(module, nn.LayerNorm)
        return paired_layer_norm.layer_norm(x, (weight, bias), (other_weight, other_bias), module.eps)
