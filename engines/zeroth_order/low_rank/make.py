"""What stands beside the linear layers of the blocks: LoRA's adapters, low-rank noise, or nothing."""

from __future__ import annotations

import torch
from torch import nn

from engines.base import Context
from engines.errors import UserError
from engines.model.flat_layout import ModelLayout
from engines.settings.zeroth_order import MezoSettings
from engines.zeroth_order.low_rank.example_noise import ExampleNoise
from engines.zeroth_order.low_rank.lora import Adapters
from engines.zeroth_order.low_rank.low_rank_noise import LowRank
from engines.zeroth_order.low_rank.lozo import Lozo


def make_adapters(
    model: nn.Module,
    layout: ModelLayout,
    settings: MezoSettings,
    dtype: torch.dtype,
    device: torch.device,
    context: Context,
) -> tuple[Adapters | LowRank, ModelLayout]:
    """What stands beside the layers of the blocks, and the layout of the weights that it leaves to train.

    Raises `UserError` where nothing can stand there, and where low-bit matrices are left to train beside
    low-rank noise.
    """
    if settings.noise_window is None:
        return Adapters(model, layout, settings, dtype, device, context.seed), layout
    low_rank: LowRank
    if settings.estimator == "lozo":
        low_rank = Lozo(model, layout, settings, dtype, device)
    else:
        examples = context.workload.examples_per_step
        low_rank = ExampleNoise(model, layout, settings, dtype, device, examples)
    left = low_rank.layout(layout)
    others = [
        part.names[0]
        for block in left.blocks
        for part in block.own_parts
        if part.trained and part.segment.decays[0]
    ]
    if settings.is_quantized and others:
        raise UserError(
            type(model).__name__,
            f"has trained matrices that are not of linear layers ('{others[0]}')",
            f"use base=full with estimator={settings.estimator}, or estimator=spsa",
        )
    return low_rank, left
