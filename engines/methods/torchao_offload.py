"""Baseline offloading: torchao's CPUOffloadOptimizer around AdamW.

Gradients go down as backward completes them, torch's fused AdamW runs on the CPU, one optimizer per
parameter, and the weights come up: 2 bytes per parameter each way and step in bf16, 4 in fp32. The step
ends in a wait for the uploads, so they do not overlap the next forward pass.

Numerics: weights, gradients and both moments have the workload's dtype. In bf16 that is bf16 moments
without an fp32 master, rounded to nearest: the arithmetic of our `native`, cheaper and coarser than
ZeRO-Offload's, which keeps fp32 masters. Compare the two only with that said.

On the GPU: weights, gradients (with `offload_gradients` only those in flight), and the moments of tensors
below 4096 elements, which torchao leaves there. On the host: weights and gradients (pinned, always) and
moments.

From torchao's limits: no accumulation with `offload_gradients`; learning rates are
set in the groups of the optimizers inside, since the wrapper's own list goes stale when it loads a state;
the host copy of the weights is made when the optimizer is, after they are filled. torchao has no clipping:
with `max_grad_norm` the gradients are waited for and scaled where its optimizers read them, those of large
tensors on the host, before any of it steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines import why_not_installed
from engines.base import Batch, Blueprint, Context, Evaluation, StepStats
from engines.errors import NonFiniteLoss, NotAvailable, UserError
from engines.first_order.adamw import (
    accumulate_gradients,
    check_checkpointing,
    parameter_groups,
    prepare_training,
    set_learning_rate,
    weights_dtype,
)
from engines.first_order.checkpoint import (
    load_checkpoint,
    load_rng_state,
    model_weights,
    rng_state,
    save_checkpoint,
)
from engines.first_order.lr_schedule import learning_rate_at
from engines.model.blocks import materialize
from engines.model.evaluation import evaluate_on_device
from engines.model.model_check import check_repeats
from engines.settings.first_order import TorchaoOffloadSettings, why_no_accumulation

_ON_DEVICE = "on-device"
"""torchao's name for the optimizer of the small tensors, in its state."""


def why_not_available() -> str | None:
    """Why this engine cannot run here; `None` if it can."""
    if (missing := why_not_installed(TorchaoOffload.name)) is not None:
        return missing
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        return "torchao's CPUOffloadOptimizer needs a CUDA or XPU device, and there is none"
    return None


class TorchaoOffload:
    """CPUOffloadOptimizer. Implements `engines.base.Engine`."""

    name = "torchao-offload"

    def __init__(self, settings: TorchaoOffloadSettings, context: Context) -> None:
        self.settings = settings
        self.context = context
        self.device = torch.device(context.device)
        self.steps_done = 0
        self._offloaded_bytes = 0

    @staticmethod
    def why_not_available() -> str | None:
        """Why this engine cannot run here; `None` if it can."""
        return why_not_available()

    def setup(self, blueprint: Blueprint) -> None:
        """Fill the model on the GPU, then copy it to pinned host memory.

        Raises `NotAvailable` without torchao or a GPU; `UserError` for fp16, for checkpointing that the model
        lacks, and for accumulation with offloaded gradients.
        """
        reason = why_not_available()
        if reason is None and self.device.type == "cpu":
            reason = "torchao's CPUOffloadOptimizer needs a CUDA or XPU device, and the run is on the CPU"
        if reason is not None:
            raise NotAvailable(reason)
        if (why := why_no_accumulation(self.settings, self.context.workload.accumulation)) is not None:
            raise UserError(
                "--set offload_gradients=true",
                why,
                "use one micro-batch per step, or offload_gradients=false",
            )
        self._build(blueprint)

    def _build(self, blueprint: Blueprint) -> None:
        dtype = weights_dtype(self.context, self.name)
        check_checkpointing(blueprint.model, self.context)
        check_repeats(blueprint, self.context)
        from torchao.optim import CPUOffloadOptimizer

        self.model: nn.Module = materialize(blueprint, self.device, dtype)
        self.optimizer: Any = CPUOffloadOptimizer(
            parameter_groups(self.model.parameters(), self.settings.weight_decay),
            torch.optim.AdamW,
            offload_gradients=self.settings.offload_gradients,
            lr=self.settings.learning_rate,
            betas=(self.settings.beta1, self.settings.beta2),
            eps=self.settings.adam_eps,
            fused=True,
        )
        self._offloaded_bytes = sum(parameter.nbytes for parameter in self.optimizer.param_d2h_map)
        prepare_training(self.model, self.context, self.settings)

    @property
    def pinned_bytes(self) -> int:
        """Host memory that torchao asks for pinned: a weight and a gradient of each offloaded tensor."""
        return 2 * self._offloaded_bytes

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One AdamW step on the mean loss of `batches`. Raises `NonFiniteLoss`, the update made.

        Bytes are counted from the sizes of the tensors that torchao moves, not on the link.
        """
        learning_rate = learning_rate_at(self.steps_done, self.settings, self.context.total_steps)
        set_learning_rate(inner_groups(self.optimizer), learning_rate)
        total = torch.zeros((), device=self.device)
        for _, loss in accumulate_gradients(self.model, batches, self.device):
            total += loss
        if self.settings.max_grad_norm > 0:
            self.synchronize()  # gradients are on their way down
            clip_gradients(self.optimizer, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = float(total)
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the loss of step {self.steps_done} is {value}")
        self.steps_done += 1
        return StepStats(
            loss=value,
            h2d_bytes=self._offloaded_bytes,
            d2h_bytes=self._offloaded_bytes
            * len(batches),  # torchao downloads the sum after each micro-batch
        )

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Loss and accuracy in evaluation mode."""
        return evaluate_on_device(self.model, batches, self.device)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter once, on the host."""
        return model_weights(self.model)

    def save(self, folder: Path) -> None:
        """Weights, moments, step and random state."""
        state = flat_state(self.optimizer.state_dict()) | rng_state(self.device)
        save_checkpoint(folder, self.model, state, {"engine": self.name, "steps_done": self.steps_done})

    def load(self, folder: Path) -> None:
        """Continue from `save`. Raises `UserError` if `folder` is not a checkpoint of this model."""
        tensors, about = load_checkpoint(folder, self.model, self.name)
        state = self.optimizer.state_dict()
        put_state(state, tensors)
        self.optimizer.load_state_dict(state)
        for on_device, on_host in self.optimizer.param_d2h_map.items():
            on_host.copy_(on_device.detach())  # the CPU updates this copy, not the GPU's
        load_rng_state(self.device, tensors)
        self.steps_done = int(about["steps_done"])

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.accelerator.synchronize()

    def close(self) -> None:
        """Let go of the pinned memory."""
        self.optimizer = None


@torch.no_grad()
def clip_gradients(optimizer: Any, most: float) -> None:
    """Scale the gradients that CPUOffloadOptimizer's optimizers read, so that their norm is `most` at most.

    All of them have arrived.
    """
    read = [parameter for group in inner_groups(optimizer) for parameter in group["params"]]
    nn.utils.clip_grad_norm_([each for each in read if each.grad is not None], most)


def inner_groups(optimizer: Any) -> list[dict[str, Any]]:
    """The groups that CPUOffloadOptimizer's optimizers read, those of the small tensors on the device too.

    Not its `param_groups`: for the small tensors these are the groups it was made with, which its
    `load_state_dict` replaces inside the optimizer but not there (torchao 0.18).
    """
    inside = [*optimizer.optim_dict.values()]
    if optimizer.d_opt is not None:
        inside.append(optimizer.d_opt)
    return [group for each in inside for group in each.param_groups]


def _optimizer_states(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """torchao's state as one torch optimizer state per name."""
    states = {str(index): entry for index, entry in enumerate(state["offloaded"])}
    if _ON_DEVICE in state:
        states[_ON_DEVICE] = state[_ON_DEVICE]
    return states


def flat_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of CPUOffloadOptimizer's `state_dict`: `optimizer.<which>.<parameter>.<moment>`."""
    return {
        f"optimizer.{which}.{parameter}.{key}": value
        for which, entry in _optimizer_states(state).items()
        for parameter, moments in entry["state"].items()
        for key, value in moments.items()
    }


def put_state(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put back into a fresh `state_dict` what `flat_state` took from another."""
    for which, entry in _optimizer_states(state).items():
        moments: dict[int, dict[str, Tensor]] = {}
        prefix = f"optimizer.{which}."
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                parameter, key = name.removeprefix(prefix).split(".")
                moments.setdefault(int(parameter), {})[key] = tensor
        entry["state"] = moments
