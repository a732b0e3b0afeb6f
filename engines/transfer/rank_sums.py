"""Sums over the ranks of a machine, in their order: every rank has the same bits of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engines.errors import UserError
from engines.world import World

BUCKET_BYTES = 128_000_000
"""Gradients are exchanged together up to about this size, which is there once for each rank meanwhile."""


@torch.no_grad()
def sum_over_ranks(world: World, tensors: Sequence[Tensor]) -> None:
    """In place, each addition rounded to the tensors' dtype, which is one; of a machine first, then over the
    machines. All ranks call it with tensors of
    the same shapes; on a GPU in the order of the current stream.
    """
    for bucket in _buckets(tensors):
        sizes = [each.numel() for each in bucket]
        memory = bucket[0].new_empty((world.local_size, sum(sizes)))
        own = memory[world.local_rank]
        torch.cat([each.reshape(-1) for each in bucket], out=own)
        world.all_gather(memory.view(-1))
        total = memory[0]
        for rank in range(1, world.local_size):
            total += memory[rank]
        if world.size > world.local_size:
            of_machines = world.between_machines(total.cpu())
            total.copy_(of_machines[0])
            for each in of_machines[1:]:
                total += each.to(total.device)
        for each, part in zip(bucket, torch.split(total, sizes), strict=True):
            each.copy_(part.view(each.shape))


def gathered(world: World, tensor: Tensor) -> list[Tensor]:
    """What each rank of this machine has of a flat tensor of one size, copies, in their order."""
    memory = tensor.new_empty((world.local_size, tensor.numel()))
    memory[world.local_rank] = tensor
    world.all_gather(memory.view(-1))
    return list(memory)


def sum_gradients(world: World, parameters: Sequence[Tensor]) -> None:
    """Let each parameter's gradient be the sum over the ranks: of those that have one anywhere."""
    if world.size == 1 or not parameters:
        return
    of_ranks = world.gather([float(each.grad is not None) for each in parameters])
    found: list[Tensor] = []
    for number, parameter in enumerate(parameters):
        if any(has[number] for has in of_ranks):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
    sum_over_ranks(world, found)


def sum_of_losses(world: World, share: float) -> float:
    """Of what each rank's micro-batches add to the mean loss, in fp32, as one process has it."""
    if world.size == 1:
        return share
    shares = [own for (own,) in world.gather([share])]
    total = torch.tensor(shares[0])
    for own in shares[1:]:
        total += torch.tensor(own)
    return float(total)


def check_ranks(
    engine: str, world: World, *, machines: bool = False, of_one_process: tuple[str, str] | None = None
) -> None:
    """Raises `UserError` for what CPU updates cannot do on several ranks; with `machines` these may be on
    several machines. `of_one_process`: what of the settings they cannot have, and what to set instead."""
    if world.size == 1:
        return
    where = f"{engine} on {world.size} ranks"
    if world.local_size < world.size and not machines:
        raise UserError(where, "updates in the memory of one machine", "use one machine, or lsp, mezo or zo2")
    if of_one_process is not None:
        why, instead = of_one_process
        raise UserError(where, why, f"use --set {engine}.{instead}")


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []
    for each in tensors:
        if found and sum(other.nbytes for other in found) + each.nbytes > BUCKET_BYTES:
            yield found
            found = []
        found.append(each)
    if found:
        yield found
