"""Sizes of models from their configuration alone. Imports neither torch nor transformers.

A configuration comes from the table of named shapes, from a local folder, or from the hub; closed
forms turn it into a `ModelShape`, so that a 175B model can be planned for on a laptop.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engines.errors import UserError
from engines.files.reading import exists, expanded, is_folder, read_json
from engines.shapes import ModelShape
from harness.models.closed_forms import shape_of_config
from harness.models.refusals import no_config, refuse_what_is_not_trained
from harness.records.job import ModelSource
from harness.records.shape import MOST_BLOCKS

MOST_CONFIG_BYTES = 16 * 2**20

ENCODERS = ("bert", "roberta")
"""Families with a closed form that classify; the others generate."""

DEFAULT_LABELS = 2
"""Classes where the data does not say: random data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedShape:
    """A published architecture without its weights.

    Dropout is 0 in all of them (OPT, GPT-2 and RoBERTa were trained with 0.1): methods are compared on
    one function, not on random ones.
    """

    name: str
    config: Mapping[str, Any]
    """Plain Hugging Face configuration: `model_type` and the arguments of its class."""
    hub_id: str | None
    """Where the sizes are published, and the weights to be had; `None` for our own tiny ones."""


def _opt(hidden: int, layers: int, heads: int, ffn: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "opt", "vocab_size": 50272, "hidden_size": hidden, "word_embed_proj_dim": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": ffn or 4 * hidden,
        "max_position_embeddings": 2048, "dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0,
        "init_std": 0.02, "tie_word_embeddings": True, "pad_token_id": 1, "bos_token_id": 2,
        "eos_token_id": 2, **more,
    }  # fmt: skip


def _gated(
    family: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": family, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "attention_dropout": 0.0, "initializer_range": 0.02, **more,
    }  # fmt: skip


def _qwen(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    common = {
        "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": 151643, "eos_token_id": 151643,
    }  # fmt: skip
    return _gated("qwen2", hidden, intermediate, layers, heads, kv_heads, **{**common, **more})


def _deepseek(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return _gated(
        "llama", hidden, intermediate, layers, heads, heads, vocab_size=32256, max_position_embeddings=16384,
        rms_norm_eps=1e-6, tie_word_embeddings=False, bos_token_id=32013, eos_token_id=32014,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
    )  # fmt: skip


def _gpt2(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": hidden, "n_layer": layers,
        "n_head": heads, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "summary_first_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": True,
        "bos_token_id": 50256, "eos_token_id": 50256, **more,
    }  # fmt: skip


def _roberta(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "roberta", "vocab_size": 50265, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, **more,
    }  # fmt: skip


# Bytes and three special tokens fit the vocabulary; four heads of sixteen. The deviation is about that of
# LeCun's initialisation for 64 inputs: with 0.02, models this narrow take long to begin to learn.
_TINY_STD = 0.1
_TINY: dict[str, Any] = {
    "initializer_range": _TINY_STD,
    "vocab_size": 320,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TINY_ROPE: dict[str, Any] = {**_TINY, "max_position_embeddings": 256, "rms_norm_eps": 1e-6}
_LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip

_TABLE: tuple[tuple[str, str | None, dict[str, Any]], ...] = (
    ("opt-125m", "facebook/opt-125m", _opt(768, 12, 12)),
    ("opt-350m", "facebook/opt-350m",
     _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False)),
    ("opt-1.3b", "facebook/opt-1.3b", _opt(2048, 24, 32)),
    ("opt-2.7b", "facebook/opt-2.7b", _opt(2560, 32, 32)),
    ("opt-6.7b", "facebook/opt-6.7b", _opt(4096, 32, 32)),
    ("opt-13b", "facebook/opt-13b", _opt(5120, 40, 40)),
    ("opt-30b", "facebook/opt-30b", _opt(7168, 48, 56)),
    ("opt-66b", "facebook/opt-66b", _opt(9216, 64, 72)),
    ("opt-175b", None, _opt(12288, 96, 96)),
    ("llama-2-7b", "meta-llama/Llama-2-7b-hf",
     _gated("llama", 4096, 11008, 32, 32, 32, vocab_size=32000, max_position_embeddings=4096,
            rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)),
    ("llama-3.1-8b", "meta-llama/Llama-3.1-8B",
     _gated("llama", 4096, 14336, 32, 32, 8, vocab_size=128256, max_position_embeddings=131072,
            rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=128000, eos_token_id=128001,
            rope_parameters=_LLAMA_3_ROPE)),
    ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", _qwen(896, 4864, 24, 14, 2)),
    ("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", _qwen(1536, 8960, 28, 12, 2, max_position_embeddings=131072)),
    ("qwen2.5-3b", "Qwen/Qwen2.5-3B", _qwen(2048, 11008, 36, 16, 2)),
    ("qwen2.5-7b", "Qwen/Qwen2.5-7B",
     _qwen(3584, 18944, 28, 28, 4, vocab_size=152064, max_position_embeddings=131072,
           tie_word_embeddings=False)),
    ("deepseek-coder-1.3b", "deepseek-ai/deepseek-coder-1.3b-base", _deepseek(2048, 5504, 24, 16)),
    ("deepseek-coder-6.7b", "deepseek-ai/deepseek-coder-6.7b-base", _deepseek(4096, 11008, 32, 32)),
    ("gpt2", "openai-community/gpt2", _gpt2(768, 12, 12)),
    ("gpt2-large", "openai-community/gpt2-large", _gpt2(1280, 36, 20)),
    ("roberta-base", "FacebookAI/roberta-base", _roberta(768, 3072, 12, 12)),
    ("tiny-opt", None,
     _opt(64, 3, 4, vocab_size=320, max_position_embeddings=256, init_std=_TINY_STD)),
    ("tiny-llama", None,
     _gated("llama", 64, 128, 3, 4, 2, tie_word_embeddings=False, **_TINY_ROPE)),
    ("tiny-qwen2", None,
     _gated("qwen2", 64, 128, 3, 4, 2, tie_word_embeddings=True, **_TINY_ROPE)),
    ("tiny-gpt2", None, _gpt2(64, 3, 4, n_positions=256, **_TINY)),
    ("tiny-roberta", None, _roberta(64, 128, 3, 4, vocab_size=320, max_position_embeddings=258,
              initializer_range=_TINY_STD)),
)  # fmt: skip

NAMED_SHAPES: dict[str, NamedShape] = {
    name: NamedShape(name=name, config=config, hub_id=hub_id) for name, hub_id, config in _TABLE
}


def named_shape(name: str) -> ModelShape:
    """The shape of an entry of `NAMED_SHAPES` with the head its family has. `KeyError` for another name."""
    config = NAMED_SHAPES[name].config
    encoder = config["model_type"] in ENCODERS
    return shape_of_config(
        config,
        name=name,
        head="classification" if encoder else "causal_lm",
        num_labels=DEFAULT_LABELS if encoder else 0,
    )


def load_config(source: ModelSource) -> dict[str, Any]:
    """The plain configuration of a named shape, a local folder or a hub id, in that order, with as many
    blocks as `source` says.

    Raises `UserError` if there is none, if it needs code from outside, if weights are asked for where there
    are none to load, or if it has not so many blocks.
    """
    config = _whole_config(source)
    if source.layers is None:
        return config
    what = f"--layers {source.layers}"
    if not source.random_weights:
        raise UserError(what, "leaves blocks of a checkpoint out", "add --random-weights, or leave it out")
    key = next((name for name in _BLOCKS_KEYS if isinstance(config.get(name), int)), None)
    if key is None:
        raise UserError(what, f"the configuration of {source.name} does not tell its blocks", "leave it out")
    if source.layers > config[key]:
        raise UserError(
            what, f"{source.name} has {config[key]} blocks", f"use --layers {config[key]} or less"
        )
    kinds = config.get("layer_types")
    cut = {} if kinds is None else {"layer_types": kinds[: source.layers]}
    return config | {key: source.layers} | cut


_BLOCKS_KEYS = ("num_hidden_layers", "n_layer")


def _whole_config(source: ModelSource) -> dict[str, Any]:
    named = NAMED_SHAPES.get(source.name)
    if named is not None:
        if not source.random_weights:
            load = f" or give the hub id {named.hub_id}" if named.hub_id else ""
            raise UserError(
                f"model '{source.name}'", "is a shape without weights", f"add --random-weights{load}"
            )
        return dict(named.config)
    folder = local_folder(source)
    if folder is not None:
        config = read_config(folder / "config.json", source.name)
        if not source.random_weights and not any(folder.glob("*.safetensors")):
            raise UserError(
                f"model '{source.name}'",
                "the folder holds no safetensors weights (no other format is read)",
                "convert them to safetensors, or add --random-weights",
            )
        return config
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source.name) and not source.name.startswith((".", "~")):
        return read_config(_hub_config(source.name), source.name)
    raise _unknown_model(source.name)


def local_folder(source: ModelSource) -> Path | None:
    """The folder that `source` names, if it names one. A named shape goes before a folder of its name.

    Raises `UserError` if it names a file.
    """
    if source.name in NAMED_SHAPES:
        return None
    path = expanded(source.name)
    if not exists(path):
        return None
    if not is_folder(path):
        raise UserError(f"model '{source.name}'", "is a file", "name the folder that holds config.json")
    return path


def read_config(path: Path, name: str) -> dict[str, Any]:
    """A model's config.json as it is written. Raises `UserError` where there is none, or where it cannot be a
    model's: no type, sizes that are no numbers or far too large, heads that do not divide."""
    if not exists(path):
        raise no_config(name, path.parent)
    config = _plain(read_json(path, "configuration", MOST_CONFIG_BYTES))
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(
            f"model '{name}'",
            "config.json names no model_type, so it is not a transformers model",
            "check the path",
        )
    for key, value in config.items():
        is_number = isinstance(value, int) and not isinstance(value, bool)
        # A list has one for each block, null the default.
        if key in _SIZES and not isinstance(value, list | None) and not (is_number and value > 0):
            raise UserError(
                f"model '{name}'",
                f"config.json has {key} = {json.dumps(value)[:40]}, which is no whole number above 0",
                "correct config.json",
            )
        most = _MOST.get(key, MOST_BLOCKS if "layer" in key else None)
        if most is not None and is_number and value > most:
            raise UserError(
                f"model '{name}'",
                f"config.json has {key} = {value}, above {most}",
                "correct config.json",
            )
    heads, kv_heads = (config.get(key) for key in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        raise UserError(
            f"model '{name}'",
            f"config.json has num_key_value_heads = {kv_heads}, which does not divide num_attention_heads = "
            f"{heads}",
            "correct config.json",
        )
    refuse_what_is_not_trained(config, name, path.parent)
    return config


def _plain(value: Any) -> Any:
    """Infinity as transformers writes it is a number."""
    if isinstance(value, dict):
        infinite = value.keys() == {"__float__"}
        return float(value["__float__"]) if infinite else {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


_MOST = {
    "vocab_size": 10**8,
    "max_position_embeddings": 10**9, "n_positions": 10**9, "hidden_size": 10**7, "n_embd": 10**7,
    "num_experts": 10**5, "num_local_experts": 10**5, "num_labels": 10**6,
}  # fmt: skip
"""Many times what any model has. One of more parts would be built for hours, even without its weights."""

_SIZES = frozenset(
    {
        "vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads",
        "n_head", "num_key_value_heads", "head_dim",
    }
)  # fmt: skip
"""Without one of these there is no model; the closed forms would count with whatever stands there."""


def _hub_config(hub_id: str) -> Path:
    """config.json of a hub model: from the cache if it is there, else downloaded."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    unreachable = UserError(
        f"model '{hub_id}'",
        "is no folder here, not in the hub cache, and the hub cannot be reached",
        "check the name, download it where there is a network, or use a named shape"
        " with --random-weights ('lspzo-bench models')",
    )
    try:
        cached = try_to_load_from_cache(hub_id, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        if not hub_answers(hub_id):
            raise unreachable
        return Path(hf_hub_download(hub_id, "config.json"))
    except LocalEntryNotFoundError:
        raise unreachable from None
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model '{hub_id}'",
            f"the hub does not give it ({reason})",
            "check the name and your access, or use a local folder",
        ) from None


def hub_answers(hub_id: str, file: str = "config.json", kind: Literal["model", "dataset"] = "model") -> bool:
    """Asked once: a download tries for half a minute, with a line on stderr for each time."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(hub_id, file, repo_type=kind))
    except (HfHubHTTPError, OSError, ValueError):  # the download says what it is
        return True
    except Exception:  # of the HTTP library, which is another in each version of the hub's
        return False
    return True


def _unknown_model(name: str) -> UserError:
    close = difflib.get_close_matches(name.lower(), NAMED_SHAPES, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return UserError(
        f"model '{name}'",
        "is no named shape, no folder and no hub id (organisation/name)",
        f"{meant}see 'lspzo-bench models'",
    )
