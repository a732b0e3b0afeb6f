"""Bricks of the first-order engines: parameter groups, AdamW, the training pass, checkpoints.

Checkpoints are safetensors and JSON, no pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engines.base import Batch, Context, UserError
from engines.blocks import TORCH_DTYPE, to_device, without_cache
from engines.masks import has_padding, known_padding, with_mask
from engines.settings import AdamWSettings

_MOMENTS = ("exp_avg", "exp_avg_sq")


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


def set_learning_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    for group in groups:
        group["lr"] = learning_rate


def check_checkpointing(model: nn.Module, context: Context) -> None:
    """Raises `UserError` if the workload asks for checkpointing and transformers has none for `model`."""
    if context.workload.checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"--checkpointing with {type(model).__name__}",
            "transformers cannot recompute activations in this model",
            "use --no-checkpointing",
        )


def prepare_training(model: nn.Module, context: Context, *, recompute: bool = True) -> None:
    """Training mode, checkpointing as the workload says, and the seed that dropout draws from.

    Without `recompute` the checkpointing is the caller's; with it, `check_checkpointing` has passed.
    """
    if context.workload.checkpointing and recompute:
        # transformers 5.23 renamed it and warns about the old name. The reentrant form would lose the
        # gradients of the weights where a block's input needs none.
        enable: Any = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    model.train()
    torch.manual_seed(context.seed)


def accumulate_gradients(
    model: nn.Module, batches: Sequence[Batch], device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Forward and backward of each micro-batch; yields its index and share of the loss before its backward.

    The loss is the mean of the micro-batches' losses, so each counts alike, whatever labels it has.
    Shares are fp32 on the device: nothing here waits for the GPU.
    """
    arguments = without_cache(model)
    for index, batch in enumerate(batches):
        with known_padding(has_padding(batch.inputs)):
            loss = model(**with_mask(to_device(batch, device)), **arguments).loss / len(batches)
        yield index, loss.detach().float()
        loss.backward()


def adamw_state(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors: `<moment>.<parameter>` and `step.<parameter>`."""
    return {
        f"{key}.{names[parameter]}": value.detach()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if key in (*_MOMENTS, "step")
    }


def load_adamw_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `adamw_state` took; parameters without an entry start fresh.

    `tensors` may hold more than this optimizer's state.
    """
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in members:
        name = names[parameter]
        if f"step.{name}" not in tensors:
            optimizer.state.pop(parameter, None)
            continue
        state = {"step": tensors[f"step.{name}"].to(parameter.device, copy=True)}
        for key in _MOMENTS:
            state[key] = torch.empty_like(parameter).copy_(tensors[f"{key}.{name}"])
        optimizer.state[parameter] = state


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """What dropout draws from: torch's generators of the CPU and of the device."""
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    return states


def load_rng_state(device: torch.device, tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Each parameter once, under its first name."""
    return {parameter: name for name, parameter in model.named_parameters()}


def model_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter once, on the host. The caller has waited for its updates."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach().cpu()


def save_checkpoint(
    folder: Path, model: nn.Module, state: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Write `weights.safetensors`, `state.safetensors` and `engine.json`."""
    weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(weights, folder / "weights.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "state.safetensors")
    (folder / "engine.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def load_checkpoint(folder: Path, model: nn.Module, engine: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Put the weights back; return the state's tensors (on the CPU) and the JSON document.

    Raises `UserError` if the folder is not a checkpoint of this engine and model.
    """
    try:
        about = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "weights.safetensors")
        state = load_file(folder / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(str(folder), f"is not a checkpoint ({error})", "check the path") from None
    if about.get("engine") != engine:
        raise UserError(
            str(folder), f"was written by engine '{about.get('engine')}'", f"resume with that, not {engine}"
        )
    for name, parameter in model.named_parameters():
        found = weights.get(name)
        if found is None or found.shape != parameter.shape or found.dtype != parameter.dtype:
            raise UserError(
                str(folder),
                f"does not hold '{name}' as this model has it",
                "resume with the same model and dtype",
            )
        with torch.no_grad():
            parameter.copy_(found)
    return state, about
