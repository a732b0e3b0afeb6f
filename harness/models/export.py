"""Writing a Hugging Face folder: whole or not at all, one shard in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from engines.errors import UserError
from engines.files.checksums import write_sums
from engines.files.reading import exists, is_folder, names_in
from engines.files.writing import ELSEWHERE, whole_folder

SHARD_BYTES = 2 * 10**9


def write_model(
    folder: Path,
    *,
    config: PretrainedConfig,
    expected: Mapping[str, tuple[int, ...]],
    weights: Iterator[tuple[str, Tensor]],
    buffers: Mapping[str, Tensor],
    dtype: torch.dtype,
    extra_files: Sequence[Path],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `weights`, cast to `dtype`, with their configuration into a new `folder`.

    `extra_files` are copied beside them. Raises `UserError` if the folder is in use or cannot be written,
    `RuntimeError` if the weights are not those `expected` (a defect of an engine).
    """
    refuse_in_use(folder, "name another place")
    try:
        with whole_folder(folder) as writing:
            config.save_pretrained(writing)
            if config.architectures and not config.architectures[0].endswith("ForSequenceClassification"):
                GenerationConfig.from_model_config(config).save_pretrained(writing)
            _write_shards(writing, _checked(weights, expected), buffers, dtype, shard_bytes)
            for path in extra_files:
                shutil.copyfile(path, writing / path.name)
            write_sums(writing)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(str(folder), f"the model cannot be written ({reason})", ELSEWHERE) from None


def holds_something(folder: Path) -> bool:
    """Whether `folder` is a file, or holds one. Raises `UserError` if that cannot be read."""
    return exists(folder) and (not is_folder(folder) or bool(names_in(folder)))


def refuse_in_use(folder: Path, remedy: str) -> None:
    """Raises `UserError` if `folder` is a file or holds something."""
    if holds_something(folder):
        raise UserError(str(folder), "exists and is not an empty folder", remedy)


def _checked(
    weights: Iterator[tuple[str, Tensor]], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    seen: set[str] = set()
    for name, tensor in weights:
        if name in seen or expected.get(name) != tuple(tensor.shape):
            raise RuntimeError(f"unexpected weight {name} of shape {tuple(tensor.shape)}")
        seen.add(name)
        yield name, tensor
    if seen != expected.keys():
        raise RuntimeError(f"weights are missing: {sorted(expected.keys() - seen)}")


def _write_shards(
    folder: Path,
    weights: Iterator[tuple[str, Tensor]],
    buffers: Mapping[str, Tensor],
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """model.safetensors, or numbered shards and their index where one would pass `shard_bytes`."""
    shards: list[list[str]] = []
    total_bytes = 0
    held: dict[str, Tensor] = dict(buffers)
    held_bytes = sum(tensor.nbytes for tensor in held.values())

    def flush() -> None:
        nonlocal held, held_bytes
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held, held_bytes = {}, 0

    for name, tensor in weights:
        size = tensor.numel() * dtype.itemsize
        if held and held_bytes + size > shard_bytes:
            flush()
        # A copy: the engine may reuse the tensor's memory for the next one.
        held[name] = tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
        held_bytes += size
        total_bytes += size
    if held:
        flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    places = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        places.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
