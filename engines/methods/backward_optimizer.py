"""AdamW inside the backward pass: each parameter is updated, and its gradient freed, as soon as it is there.

What LOMO (2306.09782) does for SGD and torchtune's "optimizer in backward" for any optimizer: one torch AdamW
for each parameter, stepped by a hook that runs when its gradient has been accumulated. It is exact AdamW: the
weights are those of `native` bit for bit.

Forward pass, backward pass and all updates are one CUDA graph, as `native`'s passes are: one launch in place
of two hundred a block. The graph holds the learning rate as a number, as fused AdamW reads a tensor of it in
fp32, which is another number: there is none while the rate changes, in warm-up and by a schedule. Gradients
come from the graph's memory and go back to it within the graph.

On the GPU: weights and both moments (6 bytes per parameter in bf16, no fp32 master copy) and the gradients in
flight, two or so of the largest tensors. On the host: the batches.

Refused: several micro-batches a step, whose sum would need the gradients that are gone by then.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Blueprint
from engines.errors import UserError
from engines.first_order.adamw import make_adamw, weights_dtype, with_moments
from engines.first_order.looped_engine import LoopedEngine
from engines.model.blocks import materialize
from engines.model.model_check import check_repeats
from engines.settings.first_order import AdamWSettings
from engines.settings.libraries import BackwardOptimizerSettings


class BackwardOptimizer(LoopedEngine[BackwardOptimizerSettings]):
    """AdamW by hooks. Implements `engines.base.Engine`."""

    name = "backward-optimizer"

    def setup(self, blueprint: Blueprint) -> None:
        """Fill the model on the device. Raises `UserError` for fp16, for several micro-batches a step and
        for clipping."""
        dtype = weights_dtype(self.context, self.name)
        if self.context.workload.accumulation > 1:
            raise UserError(
                f"--accumulation {self.context.workload.accumulation} with {self.name}",
                "a gradient is gone before the next micro-batch could be added to it",
                "use a larger --batch-size with --accumulation 1, or native",
            )
        if self.settings.max_grad_norm > 0:
            raise UserError(
                f"max_grad_norm with {self.name}",
                "the norm of a whole gradient is known when its first parts are gone",
                "leave it out, or use native",
            )
        check_repeats(blueprint, self.context)
        model = materialize(blueprint, self.loop.device, dtype)
        self.loop.begin(model, AdamWInBackward(model.parameters(), self.settings))


class AdamWInBackward:
    """Of the form of an optimizer, but the backward pass has made its step already. Implements
    `engines.first_order.training_loop.OptimizerInBackward`."""

    def __init__(self, parameters: Iterable[nn.Parameter], settings: AdamWSettings) -> None:
        self._each = {each: make_adamw([each], settings) for each in parameters}
        self.has_updated = False
        self.param_groups: list[dict[str, Any]] = [
            group for optimizer in self._each.values() for group in optimizer.param_groups
        ]
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        hook = _hook_of(weakref.ref(self))
        for parameter, optimizer in self._each.items():
            optimizer.state = self.state  # one for all: each finds its own parameter in it
            with_moments(optimizer)
            hooked: Any = parameter
            hooked.register_post_accumulate_grad_hook(hook)

    def update(self, parameter: Any) -> None:
        """By its gradient, which is let go of."""
        self.has_updated = True
        optimizer = self._each[parameter]
        # torch wants to be told. Fused AdamW does the same either way: its count of steps is on the device.
        captured = parameter.is_cuda and torch.cuda.is_current_stream_capturing()
        for group in optimizer.param_groups:
            group["capturable"] = captured
        optimizer.step()
        parameter.grad = None

    def step(self) -> None:
        """Done already."""
        self.has_updated = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let go of what a backward pass that was broken off has left."""
        self.has_updated = False
        for parameter in self._each:
            parameter.grad = None


def _hook_of(optimizer: weakref.ref[AdamWInBackward]) -> Callable[[Any], None]:
    """HAZARD: a parameter holds its hooks where Python's collector cannot see them. A hook that held the
    optimizer, and so the parameter, would keep all weights for as long as the process lives."""

    def update(parameter: Any) -> None:
        whole = optimizer()
        if whole is not None:
            whole.update(parameter)

    return update
