"""A model whose weights, gradients and moments several GPUs divide: torch's FSDP2 (`fully_shard`).

Each rank has a part of every tensor. A block's parts come together before it runs, in the forward and again
in the backward pass, and are let go of after it; its gradients are summed over the ranks, each of which keeps
its part (ZeRO stage 3, 1910.02054; PyTorch FSDP, 2304.11277).
"""

from __future__ import annotations

import torch
from torch import nn

from engines.base import Blueprint
from engines.errors import UserError
from engines.model.blocks import find_blocks, first_names, move_buffers, set_parameter
from engines.transfer.process_group import mesh_of
from engines.world import World


def materialize_sharded(
    blueprint: Blueprint, device: torch.device, dtype: torch.dtype, world: World
) -> nn.Module:
    """The blueprint's model, this rank's part of every weight on `device`. One block is there whole at
    a time, and what lies outside of the blocks. All ranks make it at the same time.

    Raises `UserError` for a model whose blocks share tensors.
    """
    from torch.distributed.fsdp import fully_shard

    model = blueprint.model
    path, blocks = find_blocks(model)
    mesh = mesh_of(world, device)
    places = first_names(model)
    for index, block in enumerate(blocks):
        prefix = f"{path}.{index}."
        own = {place: name for place, name in places.items() if place.startswith(prefix)}
        others = {name for place, name in places.items() if not place.startswith(prefix)}
        if shared := sorted(others & set(own.values())):
            raise UserError(
                type(model).__name__, f"has {shared[0]} in several blocks, which GPUs cannot divide",
                "leave out --gpus",
            )  # fmt: skip
        _fill(blueprint, own, device, dtype)
        fully_shard(block, mesh=mesh)
    _fill(
        blueprint, {at: name for at, name in places.items() if not at.startswith(f"{path}.")}, device, dtype
    )
    move_buffers(model, device)
    fully_shard(model, mesh=mesh)
    return model


def _fill(blueprint: Blueprint, places: dict[str, str], device: torch.device, dtype: torch.dtype) -> None:
    """The weights at `places`, which are named by their first names: a tied tensor stays one tensor."""
    model = blueprint.model
    made: dict[str, nn.Parameter] = {}
    for place, name in places.items():
        if name not in made:
            out = torch.empty(model.get_parameter(place).shape, device=device, dtype=dtype)
            blueprint.fill(name, out)
            made[name] = nn.Parameter(out)
        set_parameter(model, place, made[name])


def put_down(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass leaves whole."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
