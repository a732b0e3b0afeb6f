"""Checkpoints of the zeroth-order engines: weights in safetensors, adapters beside them, the step and the
seed. Both read each other's.

With a full base every update so far is in the weights, so that none is deferred. The matrices of a low-bit
base are kept as they are in memory (`engines.quantized.codec`), with the updates that they have not taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engines.base import Update
from engines.errors import UserError
from engines.settings.zeroth_order import Base

CHECKPOINT_VERSION = 1
_SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
SHARD_BYTES = 2**30
"""Weights are saved in files of about this size, so that saving takes no second copy of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraForm:
    """What adapters are, beside their values."""

    rank: int
    alpha: float

    def __str__(self) -> str:
        return f"lora_rank={self.rank} and lora_alpha={self.alpha:g}"


def save_weights(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    *,
    step: int,
    seed: int,
    lora: LoraForm | None,
    base: Base = "full",
    deferred: tuple[Sequence[Update], Sequence[int]] = ((), ()),
) -> None:
    """Weights in safetensors files, and what else determines the next step: its number, the seed, what
    adapters are scaled with, and the updates that some block lacks, with how many each block does."""
    shard: dict[str, Tensor] = {}
    count = shard_bytes = 0
    for name, weight in weights:
        shard[name] = weight.clone()
        shard_bytes += weight.nbytes
        if shard_bytes >= SHARD_BYTES:
            safetensors.torch.save_file(shard, folder / f"weights-{count:05}.safetensors")
            shard, shard_bytes, count = {}, 0, count + 1
    if shard:
        safetensors.torch.save_file(shard, folder / f"weights-{count:05}.safetensors")
    state = {
        "schema_version": CHECKPOINT_VERSION, "method": "mezo", "step": step, "seed": seed,
        "lora": None if lora is None else {"rank": lora.rank, "alpha": lora.alpha},
        "base": base, "pending": [asdict(update) for update in deferred[0]], "behind": list(deferred[1]),
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What `save_weights` wrote; tensors are read when they are asked for."""

    step: int
    seed: int
    deferred: tuple[Sequence[Update], Sequence[int]]
    """Updates that some block lacks, and how many of them each block does."""
    _shards: Mapping[str, Any]

    def tensor(self, name: str) -> Tensor:
        result: Tensor = self._shards[name].get_tensor(name)
        return result


def open_checkpoint(
    folder: Path, expected: Mapping[str, Tensor], lora: LoraForm | None, base: Base = "full"
) -> Checkpoint:
    """Raises `UserError` unless the folder holds tensors of the names, shapes and dtypes of `expected`, on
    the same `base`, and adapters, if both have some, of the form `lora`."""
    remedy = "give a folder that mezo or zo2 saved for the same model, precision and adapters"
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["schema_version"] != CHECKPOINT_VERSION:
            raise ValueError(f"schema version {state['schema_version']}, not {CHECKPOINT_VERSION}")
        step, seed = int(state["step"]), int(state["seed"])
        lora_form = state.get("lora")  # checkpoints from before it was written lack it
        saved_form = lora_form and LoraForm(rank=int(lora_form["rank"]), alpha=float(lora_form["alpha"]))
        saved_base = str(state.get("base", "full"))  # these, too
        deferred = [Update(**values) for values in state.get("pending", ())]
        behind = [int(count) for count in state["behind"]] if deferred else []
        files: list[Any] = [
            safe_open(path, framework="pt") for path in sorted(folder.glob("weights-*.safetensors"))
        ]
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(str(folder), f"is not a checkpoint of mezo or zo2 ({reason})", remedy) from None
    if saved_form and lora and saved_form != lora:
        raise UserError(
            str(folder),
            f"its adapters have {saved_form}, these {lora}",
            f"resume with --set lora_rank={saved_form.rank} --set lora_alpha={saved_form.alpha:g}",
        )
    if saved_base != base:
        raise UserError(
            str(folder),
            f"its base is {saved_base}, here it is {base}",
            f"resume with --set base={saved_base}",
        )
    shards = {name: file for file in files for name in file.keys()}  # noqa: SIM118  not a dict
    if shards.keys() != expected.keys():
        odd = min(shards.keys() ^ expected.keys())
        raise UserError(str(folder), f"differs from the model in tensor '{odd}'", remedy)
    for name, like in expected.items():
        saved = shards[name].get_slice(name)
        here = _SAFETENSORS_DTYPE[like.dtype]
        if tuple(saved.get_shape()) != tuple(like.shape) or saved.get_dtype() != here:
            raise UserError(
                str(folder),
                f"'{name}' is {saved.get_shape()} {saved.get_dtype()}, not {list(like.shape)} {here}",
                remedy,
            )
    return Checkpoint(step=step, seed=seed, deferred=(deferred, behind), _shards=shards)
