"""Tiny models of families beyond the named shapes, for tests of what engines take for granted of a model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tiny_models import TinyBlueprint, tiny_blueprint

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
ENCODER = {
    **SIZES,
    "intermediate_size": 32,
    "max_position_embeddings": 66,
    "pad_token_id": 1,
    "num_labels": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False,
            "max_position_embeddings": 64},
    "gpt_neox": {**SIZES, "intermediate_size": 32, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {**GATED, "sliding_window": 4},
    "gemma": GATED,
    "gemma2": {**GATED, "sliding_window": 4, "final_logit_softcapping": 1.0},
    "qwen3": GATED,
    "phi": {**SIZES, "intermediate_size": 32, "bos_token_id": 1, "eos_token_id": 2},
    "falcon": {**SIZES, "bos_token_id": 1, "eos_token_id": 2},
    "bloom": {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "mixtral": {**GATED, "num_local_experts": 4},
    "cohere": {**GATED, "logit_scale": 0.25},
    "granite": {**GATED, "logits_scaling": 3.0},
    "bert": ENCODER,
    "roberta": ENCODER,
    "distilbert": {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32,
                   "pad_token_id": 1},
    "mpnet": ENCODER,
    "electra": {**ENCODER, "embedding_size": 8},
}  # fmt: skip
ENCODERS = {"bert", "roberta", "distilbert", "mpnet", "electra"}


def blueprint_of(family: str) -> TinyBlueprint:
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if family in ENCODERS else AutoModelForCausalLM
    reference = auto.from_config(AutoConfig.for_model(family, **FAMILIES[family])).float().eval()
    model = copy.deepcopy(reference).to("meta")
    if getattr(model.config, "tie_word_embeddings", False):
        model.tie_weights()
    for name, buffer in reference.named_buffers():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer.clone()
    encodes = family in ENCODERS
    shape = replace(
        tiny_blueprint("opt").shape,
        head="classification" if encodes else "causal_lm",
        num_labels=2 if encodes else 0,
    )
    return TinyBlueprint(shape, model, reference)
