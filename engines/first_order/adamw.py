"""Bricks of the first-order engines: the weights' dtype, parameter groups, AdamW, the passes of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Batch, Context
from engines.errors import UserError
from engines.model.attention_masks import has_padding, known_padding, with_mask
from engines.model.blocks import TORCH_DTYPE, no_cache, to_device, without_cache
from engines.model.randomness import set_dropout
from engines.settings.first_order import AdamWSettings
from engines.shapes import NO_RECOMPUTATION


def weights_dtype(context: Context, engine: str) -> torch.dtype:
    """The dtype of weights and gradients. Raises `UserError` for fp16, which needs loss scaling."""
    if context.workload.dtype == "fp16":
        raise UserError(
            f"--dtype fp16 with {engine}",
            "gradients underflow in fp16 without loss scaling, which this engine does not have",
            "use bf16 or fp32",
        )
    return TORCH_DTYPE[context.workload.dtype]


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices and embeddings (two dimensions and more) decay, biases and norms do not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in parameters:
        (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = ((decayed, weight_decay), (plain, 0.0))
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]


def make_adamw(parameters: Iterable[nn.Parameter], settings: AdamWSettings) -> torch.optim.AdamW:
    """torch's fused AdamW (one pass over weights, gradients and moments, on the CPU too)."""
    return torch.optim.AdamW(
        parameter_groups(parameters, settings.weight_decay),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.adam_eps,
        fused=True,
    )


def with_moments(optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    """`optimizer` with its moments made now, as its first step would make them.

    Then they lie beside the weights. Those that the first step makes lie in places that activations had, and
    keep segments of torch's allocator from what needs them whole in the next step, as logits do and a pool of
    graphs.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
    return optimizer


def set_learning_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    for group in groups:
        group["lr"] = learning_rate


def check_checkpointing(model: nn.Module, context: Context) -> None:
    """Raises `UserError` if the workload asks for checkpointing and transformers has none for `model`."""
    if context.workload.checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"--checkpointing with {type(model).__name__}",
            NO_RECOMPUTATION,
            "use --no-checkpointing",
        )


def prepare_training(
    model: nn.Module, context: Context, settings: AdamWSettings, *, recompute: bool = True
) -> None:
    """Training mode, checkpointing as the workload says, dropout as the settings do, and the seed that it
    draws from.

    Without `recompute` the checkpointing is the caller's; with it, `check_checkpointing` has passed.
    """
    if context.workload.checkpointing and recompute:
        # transformers 5.23 renamed it and warns about the old name. The reentrant form would lose the
        # gradients of the weights where a block's input needs none.
        enable: Any = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if settings.dropout > 0:
        set_dropout(model, settings.dropout)
    model.train()
    torch.manual_seed(context.seed)


def run_passes(model: nn.Module, inputs: Mapping[str, Tensor], padded: bool, share: float) -> Tensor:
    """Forward and backward of one micro-batch, whose `inputs` are on the device and whose loss is divided by
    `share`.

    Its share of the mean loss, () fp32. Gradients are added to those of the parameters. Nothing waits for the
    GPU.
    """
    with known_padding(padded), no_cache(model):
        loss: Tensor = model(**with_mask(inputs), **without_cache(model)).loss / share
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach().float()


def accumulate_gradients(
    model: nn.Module, batches: Sequence[Batch], device: torch.device, of: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Forward and backward of each micro-batch; yields its index and share of the loss before its backward.

    The loss is the mean of the losses of `of` micro-batches, by default those that are given, so each counts
    alike, whatever labels it has.
    Shares are fp32 on the device: nothing here waits for the GPU.
    """
    arguments = without_cache(model)
    for index, batch in enumerate(batches):
        with known_padding(has_padding(batch.inputs)):
            loss = model(**with_mask(to_device(batch, device)), **arguments).loss / (of or len(batches))
        yield index, loss.detach().float()
        loss.backward()
