"""DeepSpeed on one GPU: ZeRO-2 and ZeRO-3 with offload, and ZenFlow, as people run them.

ZeRO-Offload (2101.06840): gradients go down as they are made; when all are there, DeepSpeed's own AdamW
updates fp32 masters on the CPU, and weights of the job's precision come up. ZeRO-3 (2104.07857) keeps the
weights on the host too and gathers each module's before its forward and its backward pass. ZenFlow
(2505.12242) updates the `topk_ratio` most important columns on the GPU in every step and the rest on the CPU
every `update_interval` steps: updates are late, another method than AdamW.

Numerics are not those of `native`: there are fp32 masters and moments of 16 bytes a parameter, on the host.
In fp32 the weights are their own masters.

On the GPU: weights and gradients on their way down (ZeRO-2), a few modules (ZeRO-3). On the host: masters,
moments and gradients in fp32, and with ZeRO-3 the weights. DeepSpeed compiles its CPU Adam at first use, for
some minutes, which a C++ compiler and ninja have to be there for.

Deviations: `reduce_bucket_size` is 5e7 and not 5e8 elements, 0.1 GB of GPU memory and not 1; checkpoints are
not kept: DeepSpeed writes them in a form that runs code when it is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from engines import why_not_installed
from engines.base import Batch, Blueprint, Context, Evaluation, StepStats
from engines.errors import NonFiniteLoss, NotAvailable, UserError
from engines.first_order.adamw import (
    check_checkpointing,
    parameter_groups,
    prepare_training,
    set_learning_rate,
    weights_dtype,
)
from engines.first_order.lr_schedule import learning_rate_at
from engines.model.attention_masks import has_padding, known_padding, with_mask
from engines.model.blocks import materialize, no_cache, to_device, without_cache
from engines.model.evaluation import evaluate_on_device
from engines.model.model_check import check_repeats
from engines.settings.libraries import DeepspeedSettings, ZenflowSettings


class _Deepspeed:
    """A model and an optimizer that DeepSpeed drives. Implements `engines.base.Engine`."""

    name: str
    stage: ClassVar[Literal[2, 3]]

    def __init__(self, settings: DeepspeedSettings, context: Context) -> None:
        self.settings = settings
        self.context = context
        self.device = torch.device(context.device)
        self.steps_done = 0
        self.pinned_bytes = 0
        self._engine: Any = None
        self._optimizer: Any = None
        self._bytes = 0

    @staticmethod
    def why_not_available() -> str | None:
        """Why this engine cannot run here; `None` if it can."""
        return why_not_installed(Zero2Offload.name)

    def setup(self, blueprint: Blueprint) -> None:
        """Fill the model, hand it to DeepSpeed, and build its CPU Adam if that was never done here.

        Raises `NotAvailable` without DeepSpeed, or where it cannot build; `UserError` for fp16 and for
        checkpointing that the model lacks.
        """
        if (reason := self.why_not_available()) is not None:
            raise NotAvailable(reason)
        dtype = weights_dtype(self.context, self.name)
        check_checkpointing(blueprint.model, self.context)
        check_repeats(blueprint, self.context)
        if self.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        for variable, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            os.environ.setdefault(variable, value)
        import deepspeed

        if not dist.is_initialized():  # alone: nothing listens on any port
            store = dist.HashStore()  # type: ignore[attr-defined]
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        model = materialize(blueprint, self.device if self.stage == 2 else "cpu", dtype)
        parameters = sum(each.numel() for each in model.parameters())
        self._bytes = parameters * dtype.itemsize
        prepare_training(model, self.context, self.settings)
        self.context.progress("DeepSpeed, which may build its CPU Adam", 0, 1)
        try:
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model,
                model_parameters=parameter_groups(model.parameters(), self.settings.weight_decay),
                config=self._config(),
                dist_init_required=False,
            )
        except RuntimeError as error:
            if "failed to build" not in str(error):
                raise
            why = "DeepSpeed's CPU Adam cannot be built here; it needs ninja and g++ (apt install g++)"
            raise NotAvailable(why) from error
        self.context.progress("DeepSpeed, which may build its CPU Adam", 1, 1)
        if self.device.type == "cuda":
            self.pinned_bytes = parameters * (10 if self.stage == 2 else 6)

    def _config(self) -> dict[str, Any]:
        settings, workload = self.settings, self.context.workload
        pinned = self.device.type == "cuda"
        zero: dict[str, Any] = {
            "stage": self.stage,
            "offload_optimizer": {"device": "cpu", "pin_memory": pinned},
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": settings.reduce_bucket_size,
        }
        if self.stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
        if isinstance(settings, ZenflowSettings):
            zero["zenflow"] = {
                "topk_ratio": settings.topk_ratio, "select_strategy": "auto", "select_interval": "auto",
                "update_interval": settings.update_interval, "full_warm_up_rounds": 0,
                "overlap_step": settings.overlap_step,
            }  # fmt: skip
        adamw = {
            "lr": settings.learning_rate, "betas": [settings.beta1, settings.beta2],
            "eps": settings.adam_eps, "weight_decay": settings.weight_decay,
        }  # fmt: skip
        return {
            "train_micro_batch_size_per_gpu": workload.batch_size,
            "gradient_accumulation_steps": workload.accumulation,
            "bf16": {"enabled": workload.dtype == "bf16"},
            "gradient_clipping": settings.max_grad_norm,
            "zero_optimization": zero,
            "optimizer": {"type": "AdamW", "params": adamw},
            "steps_per_print": 10**9,
        }

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One step on the mean loss of `batches`. Raises `NonFiniteLoss`, the update made.

        Bytes are counted from the sizes of the tensors that DeepSpeed moves, not on the link.
        """
        rate = learning_rate_at(self.steps_done, self.settings, self.context.total_steps)
        set_learning_rate(self._optimizer.param_groups, rate)
        total = torch.zeros((), device=self.device)
        model = self._engine.module
        for batch in batches:
            with known_padding(has_padding(batch.inputs)), no_cache(model):
                inputs = with_mask(to_device(batch, self.device))
                loss = self._engine(**inputs, **without_cache(model)).loss
            total += loss.detach().float() / len(batches)
            self._engine.backward(loss)
            self._engine.step()  # which updates with the last micro-batch
        value = float(total)
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the loss of step {self.steps_done} is {value}")
        self.steps_done += 1
        up = 2 * len(batches) if self.stage == 3 else 1
        return StepStats(loss=value, h2d_bytes=up * self._bytes, d2h_bytes=len(batches) * self._bytes)

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Loss and accuracy in evaluation mode."""
        return evaluate_on_device(self._engine.module, batches, self.device)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter once, on the host."""
        import deepspeed

        for name, parameter in self._engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                found = parameter.detach().cpu().clone()
            yield name, found

    def save(self, folder: Path) -> None:
        """Raises `UserError`: what DeepSpeed saves runs code when it is read; this program neither writes
        nor reads it."""
        raise UserError(
            f"--save-every with {self.name}",
            "DeepSpeed's checkpoints run code when they are read, so none are kept",
            "leave it out, or use exact-offload",
        )  # fmt: skip

    def load(self, folder: Path) -> None:
        """Raises `UserError`, as `save` does."""
        self.save(folder)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Let go of the pinned memory. May be called twice. The process group stays for as long as the
        process lives, since DeepSpeed keeps parts of it."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = self._optimizer = None


class Zero2Offload(_Deepspeed):
    """Gradients down, AdamW on the CPU, weights up."""

    name = "zero2-offload"
    stage = 2


class Zero3Offload(_Deepspeed):
    """The same, the weights on the host as well."""

    name = "zero3-offload"
    stage = 3


class Zenflow(_Deepspeed):
    """Important columns on the GPU in every step, the rest late on the CPU."""

    name = "zenflow"
    stage = 2
