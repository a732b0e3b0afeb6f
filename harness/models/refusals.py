"""What a configuration or a folder holds that cannot be fine-tuned here, said in one line each.

Imports neither torch nor transformers: the same line comes from every command, from where the configuration
is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.errors import UserError
from engines.files.reading import read_json

_BITS = ("bits", "w_bit", "num_bits", "wbits", "weight_bits", "nbits")
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Beside config.json, where older tools have written how they quantised."""
_LENGTH = 40
"""Characters of a name out of a file that a line has room for."""


def refuse_what_is_not_trained(config: Mapping[str, Any], name: str, folder: Path | None) -> None:
    """Raises `UserError` for quantised weights, an encoder-decoder, and models of more than text."""
    how = _quantised(config, folder)
    if how is not None:
        raise UserError(
            f"model '{name}'", f"its weights are quantised ({how})", "take the model that it was made from"
        )
    family = str(config.get("model_type"))
    if config.get("is_encoder_decoder") is True:
        raise UserError(f"model '{name}'", f"{family} is an encoder-decoder", "use a decoder or an encoder")
    senses = [sense for sense in ("vision", "audio") if isinstance(config.get(f"{sense}_config"), Mapping)]
    if senses:
        what = {"vision": "images", "audio": "sound"}[senses[0]]
        raise UserError(f"model '{name}'", f"{family} is of text and {what}", "use a model of text alone")
    if "vocab_size" not in config and {"patch_size", "num_channels"} & config.keys():
        raise UserError(f"model '{name}'", f"{family} is a model of images", "use a model of text")


def _quantised(config: Mapping[str, Any], folder: Path | None) -> str | None:
    """Such as `gptq, 4 bits`; `None` for weights as they were trained."""
    for key in ("quantization_config", "quantization", "compression_config"):
        entry = config.get(key)
        if isinstance(entry, Mapping) and entry:
            return _described(entry, str(entry.get("quant_method") or entry.get("quant_type") or "low-bit"))
    for file, method in _OWN_FILES.items():
        if folder is not None and (folder / file).is_file():
            entry = _read(folder / file)
            return _described(entry, str(entry.get("quant_method") or method))
    return None


def _described(entry: Mapping[str, Any], method: str) -> str:
    bits = next((entry[key] for key in _BITS if isinstance(entry.get(key), int)), None)
    if bits is None:
        bits = 4 if entry.get("load_in_4bit") else 8 if entry.get("load_in_8bit") or method == "fp8" else None
    groups = entry.get("config_groups")
    for group in groups.values() if bits is None and isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
    return method[:_LENGTH] if bits is None else f"{method[:_LENGTH]}, {bits} bits"


def no_config(name: str, folder: Path) -> UserError:
    """For a folder without config.json: what it is instead."""
    if (folder / "adapter_config.json").is_file():
        entry = _read(folder / "adapter_config.json")
        base = str(entry.get("base_model_name_or_path") or "another model")[-_LENGTH:]
        return UserError(
            f"model '{name}'",
            f"holds an adapter alone ({str(entry.get('peft_type', 'LoRA'))[:_LENGTH]} for {base})",
            "merge it into that model first, or take that model",
        )
    if (folder / "model_index.json").is_file():
        return UserError(f"model '{name}'", "is a pipeline that makes images", "use a model of text")
    if any(folder.glob("*.gguf")):
        return UserError(
            f"model '{name}'",
            "holds GGUF files, which are for inference",
            "take the model they were made from",
        )
    return UserError(
        f"model '{name}'", "the folder is not a model: it holds no config.json", "check the path"
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON file that another tool wrote; empty if it cannot be read."""
    try:
        found = read_json(path, "configuration")
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}
