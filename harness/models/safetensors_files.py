"""A checkpoint's tensors where they lie in its safetensors files, read one at a time.

transformers reads a whole checkpoint into host memory first. Where every parameter has a tensor of its own
name and shape in the files, that is not needed: host memory holds one tensor, and blocks on disk are read
where they are (`engines.offload.disk`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from engines.base import StoredTensor
from engines.errors import UserError
from engines.model.blocks import TORCH_DTYPE
from engines.shapes import Dtype
from harness.models.configs import local_folder
from harness.models.weight_files import first_broken, header_of, weight_files
from harness.records.job import ModelSource

_DTYPES: dict[str, Dtype] = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def stored_tensors(source: ModelSource, model: nn.Module, body: str) -> dict[str, StoredTensor] | None:
    """Where each parameter of `model` lies, by name; `None` unless all do, whole and of one precision.

    `body` is the name of the model's part without its head, which a checkpoint may have left out or added.
    """
    folder = local_folder(source)
    if folder is None:
        return None
    try:
        stored = {key: tensor for path in weight_files(folder) for key, tensor in _tensors(path)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None  # transformers will say what is wrong with it
    found: dict[str, StoredTensor] = {}
    for name, parameter in model.named_parameters():
        keys = (name, f"{body}.{name}", name.removeprefix(f"{body}."))
        key = next((key for key in keys if key in stored), None)
        if key is None or stored[key].shape != tuple(parameter.shape):
            return None
        found[name] = stored[key]
    return found if len({tensor.dtype for tensor in found.values()}) == 1 else None


def stored_shapes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in the files of a local folder, by its name there; empty where their headers
    cannot be read."""
    folder = local_folder(source)
    if folder is None:
        return {}
    try:
        return {
            key: tuple(entry["shape"])
            for path in weight_files(folder)
            for key, entry in header_of(path)[1].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return {}


def names_without_place(source: ModelSource, model: nn.Module, body: str) -> list[str]:
    """Tensors in the files of a local folder that are of no parameter and no buffer of `model`, in the files'
    order. `body` as in `stored_tensors`."""
    known: set[str] = set()
    for each in (model.named_parameters, model.named_buffers):
        for name, _ in each(remove_duplicate=False):
            known |= {name, f"{body}.{name}", name.removeprefix(f"{body}.")}
    return [name for name in stored_shapes(source) if name not in known]


def what_is_wrong(source: ModelSource) -> str:
    """Of weights that transformers could not load: the first file that is missing or broken."""
    folder = local_folder(source)
    if folder is None:
        return "its files in the hub cache are not whole, or not safetensors"
    return first_broken(folder) or "they are not those of config.json"


def _tensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Raises as `header_of` does, and `KeyError` for another precision."""
    begin, entries = header_of(path)
    for key, entry in entries.items():
        first, last = entry["data_offsets"]
        yield (
            key,
            StoredTensor(
                path=path,
                offset_bytes=begin + first,
                num_bytes=last - first,
                shape=tuple(entry["shape"]),
                dtype=_DTYPES[entry["dtype"]],
            ),
        )


def read_weights(stored: Mapping[str, StoredTensor]) -> Callable[[str, Tensor], None]:
    """Weights by parameter name, each read when it is asked for, past any mapping: what is mapped counts as
    memory of the process. A tied parameter has its first name only. Reading raises `UserError` for a file
    that cannot be read."""

    def fill(name: str, out: Tensor) -> None:
        tensor = stored[name]
        memory = torch.empty(tensor.num_bytes, dtype=torch.uint8)
        try:
            with tensor.path.open("rb", buffering=0) as file:
                file.seek(tensor.offset_bytes)
                _read_all(file, memory.numpy().data)
        except OSError as error:
            raise UserError(
                str(tensor.path), f"cannot be read ({error.strerror or error})", "download the model again"
            ) from None
        out.copy_(memory.view(TORCH_DTYPE[tensor.dtype]).view(tensor.shape))

    return fill


def _read_all(file: Any, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done:])
        if not count:
            raise OSError("the file has become shorter")
        done += count
