"""What methods with AdamW save, and how they go on from it bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engines.errors import UserError


class HoldsState(Protocol):
    """The part of an optimizer that checkpoints are about."""

    param_groups: list[dict[str, Any]]
    """Each with `params`."""
    state: Any
    """By parameter: tensors and whole numbers by name."""


_MOMENTS = ("exp_avg", "exp_avg_sq")


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


def optimizer_state(optimizer: HoldsState, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """What an optimizer holds for each parameter, flat: `<key>.<parameter>`; whole numbers as () int64."""
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            held = whole(value.detach()) if isinstance(value, Tensor) else torch.tensor(int(value))
            # What all parameters share (bitsandbytes on a GPU) becomes copies: safetensors has no aliases.
            found[f"{key}.{names[parameter]}"] = held.clone() if held.data_ptr() in places else held
            places.add(held.data_ptr())
    return found


def load_optimizer_state(
    optimizer: HoldsState, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_state` took; `tensors` may hold more than this optimizer's state."""
    members = {names[each]: each for group in optimizer.param_groups for each in group["params"]}
    optimizer.state.clear()
    for place, tensor in tensors.items():
        key, _, name = place.partition(".")
        if name in members:
            is_count = tensor.dtype == torch.int64 and tensor.dim() == 0
            kept = int(tensor) if is_count else _like(members[name], tensor)
            optimizer.state.setdefault(members[name], {})[key] = kept


def _like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A copy of `tensor` where the parameter lies, and in parts as that is."""
    if not hasattr(parameter, "to_local") or tensor.dim() == 0:
        return tensor.to(parameter.device, copy=True)
    made = torch.empty_like(parameter, dtype=tensor.dtype)
    _local(made).copy_(own_part(parameter, tensor))
    return made


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which ranks have parts, from all of them, who ask for it at the same time; any other as it
    is. With one process its part is the whole, wherever that lies."""
    sharded: Any = tensor
    if not hasattr(tensor, "to_local"):
        return tensor
    found: Tensor = sharded.full_tensor() if sharded.device_mesh.size() > 1 else sharded.to_local()
    return found


def _local(tensor: Tensor) -> Tensor:
    """What is here of a tensor."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def own_part(like: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part of a whole `tensor`, where it has a part of `like`; else all of it."""
    sharded: Any = like
    if not hasattr(like, "to_local") or sharded.device_mesh.size() == 1:
        return tensor
    parts = torch.chunk(tensor, sharded.device_mesh.size(), dim=0)
    rank = sharded.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else tensor[:0]


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
        yield name, whole(parameter.detach()).cpu()


def _kept(model: nn.Module, only_trained: bool) -> dict[str, nn.Parameter]:
    named = model.named_parameters()
    return {name: each for name, each in named if each.requires_grad or not only_trained}


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    state: Mapping[str, Tensor],
    about: Mapping[str, Any],
    *,
    only_trained: bool = False,
    writes: bool = True,
) -> None:
    """Write `weights.safetensors`, `state.safetensors` and `engine.json`. With `only_trained` weights without
    a gradient are left out: they are what they were when the model was filled. Where ranks have parts of the
    weights all of them come here, and one `writes`."""
    kept = _kept(model, only_trained)
    weights = {name: whole(parameter.detach()).contiguous() for name, parameter in kept.items()}
    if not writes:
        return
    save_file(weights, folder / "weights.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "state.safetensors")
    (folder / "engine.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def load_checkpoint(
    folder: Path, model: nn.Module, engine: str, *, only_trained: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
    for name, parameter in _kept(model, only_trained).items():
        found = weights.get(name)
        if found is None or found.shape != parameter.shape or found.dtype != parameter.dtype:
            raise UserError(
                str(folder),
                f"does not hold '{name}' as this model has it",
                "resume with the same model and dtype",
            )
        with torch.no_grad():
            _local(parameter).copy_(own_part(parameter, found))
    return state, about
