"""FSDP2 (`fully_shard`) with CPU offload on one GPU: weights come up block by block, AdamW runs on the CPU.

Each block's weights are copied up before it runs, in the forward and again in the backward pass, ahead of
time by one block; embedding, norm and head stay up from one to the other. Gradients go down as they are made.
When all are there, torch's fused AdamW updates everything on the CPU.

Numerics are those of `native`: weights, gradients and moments in the workload's precision, no fp32 master
copy. Users often keep fp32 masters with FSDP2, which takes twice the host memory and twice the copies.

On the GPU: two or three blocks and what stands outside of them. On the host: weights and gradients (pinned)
and moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from engines.base import Batch, Blueprint, Context, Evaluation, StepStats
from engines.errors import NotAvailable
from engines.first_order.adamw import check_checkpointing, make_adamw, weights_dtype
from engines.first_order.looped_engine import LoopedEngine
from engines.first_order.sharded_model import put_down
from engines.model.blocks import find_blocks, materialize
from engines.model.model_check import check_repeats
from engines.settings.libraries import Fsdp2OffloadSettings


class Fsdp2Offload(LoopedEngine[Fsdp2OffloadSettings]):
    """torch's FSDP2 with one process. Implements `engines.base.Engine`."""

    name = "fsdp2-offload"

    def __init__(self, settings: Fsdp2OffloadSettings, context: Context) -> None:
        super().__init__(settings, context)
        self._owns_group = False
        self._up_bytes = self._down_bytes = 0

    @classmethod
    def why_not_available(cls) -> str | None:
        """Why this engine cannot run here; `None` if it can."""
        if not dist.is_available():
            return "this torch was built without torch.distributed"
        if torch.cuda.is_available() and not dist.is_nccl_available():
            return "this torch was built without NCCL, which FSDP2 needs on a GPU"
        return None

    def setup(self, blueprint: Blueprint) -> None:
        """Fill the model on the host and hand it to FSDP2.

        Raises `NotAvailable`; `UserError` for fp16 and for checkpointing that the model lacks."""
        if (reason := self.why_not_available()) is not None:
            raise NotAvailable(reason)
        dtype = weights_dtype(self.context, self.name)
        check_checkpointing(blueprint.model, self.context)
        check_repeats(blueprint, self.context)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        device = self.loop.device
        model = materialize(blueprint, "cpu", dtype)
        if not dist.is_initialized():  # alone: nothing listens on any port
            store = dist.HashStore()  # type: ignore[attr-defined]
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
            self._owns_group = True
        mesh = init_device_mesh(device.type, (1,))
        policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        _, blocks = find_blocks(model)
        total = sum(each.nbytes for each in model.parameters())
        inside = sum(each.nbytes for each in blocks.parameters())
        for block in blocks:
            fully_shard(block, mesh=mesh, offload_policy=policy)
        fully_shard(model, mesh=mesh, offload_policy=policy)
        self._up_bytes, self._down_bytes = total + inside, total
        self.pinned_bytes = 2 * total if device.type == "cuda" else 0
        self.loop.begin(model, make_adamw(model.parameters(), self.settings))

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One AdamW step on the mean loss of `batches`. Raises `NonFiniteLoss`, the update made.

        Bytes are counted from the sizes of the tensors that FSDP2 moves, not on the link.
        """
        count = len(batches)
        return replace(
            self.loop.step(batches), h2d_bytes=count * self._up_bytes, d2h_bytes=count * self._down_bytes
        )

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Loss and accuracy in evaluation mode."""
        found = self.loop.evaluate(batches)
        put_down(self.loop.model)
        return found

    def close(self) -> None:
        """Leave the process group."""
        self.loop.close()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
        self._owns_group = False
