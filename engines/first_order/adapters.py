"""Adapters of PEFT inside a model: which layers get one, in which precision, and what comes of them.

The model stays a model of transformers: adapters are put into it in place of linear layers, no wrapper
around it. Adapters are fp32 whatever the weights are, as PEFT has them; in bf16 their products are bf16
(autocast).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engines.errors import UserError
from engines.model.blocks import find_blocks
from engines.settings.libraries import LoraSettings

_ADAPTER = ".lora_"
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")
"""What their classes are called: their head comes with the checkpoint."""
_BASE = ".base_layer"


def adapted_layers(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Dotted names of the linear layers of `model` that get an adapter. Raises `UserError` for a name in
    `target_modules` that no block has."""
    path, blocks = find_blocks(model)
    layers = [
        f"{path}.{name}" for name, module in blocks.named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]
    there = {name.rpartition(".")[2] for name in layers}
    missing = [] if settings.targets == ("all",) else [t for t in settings.targets if t not in there]
    if missing:
        raise UserError(
            f"--set target_modules={settings.target_modules}",
            f"no block has a linear layer '{missing[0]}'",
            f"choose from: {', '.join(sorted(there))}",
        )
    return [name for name in layers if settings.adapts(name)]


def add_adapters(model: nn.Module, settings: LoraSettings, layers: list[str], seed: int) -> None:
    """Put adapters beside `layers`; they, and the head of a model that is no language model, are all that
    is trained. That head is new, so it has to learn."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # a factor, which need not be whole
        lora_dropout=settings.lora_dropout,
        target_modules=layers,
        bias="none",
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in layers),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if _ADAPTER in name:
            parameter.data = parameter.data.float()
    body: Any = model
    if not type(model).__name__.endswith(_LANGUAGE_MODELS):
        for name, part in model.named_children():
            if name != body.base_model_prefix:
                part.requires_grad_(True)


def run_in_bf16(model: nn.Module, device: torch.device) -> None:
    """From now on the model's own forward runs under autocast, its fp32 adapters' products in bf16."""
    # Without the cache of casts: nothing outlives a pass, so a pass can be captured.
    autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    vars(model)["forward"] = autocast(model.forward)


def merged_weights(
    model: nn.Module, dtype: torch.dtype, plain: Callable[[nn.Module], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of the model that it was, once, on the host in `dtype`: W + alpha / r B A where there is
    an adapter. `plain` gives the weight of a layer as a tensor of floats."""
    for name, parameter in model.named_parameters():
        if _ADAPTER in name:
            continue
        owner, _, leaf = name.rpartition(".")
        with torch.no_grad():
            if leaf != "weight":
                weight = parameter.detach()
            elif owner.endswith(_BASE):
                layer: Any = model.get_submodule(owner.removesuffix(_BASE))
                weight = plain(layer.base_layer).float() + layer.get_delta_weight("default").float()
            else:
                weight = plain(model.get_submodule(owner))
        yield name.replace(_BASE, ""), weight.detach().to(dtype).cpu()
