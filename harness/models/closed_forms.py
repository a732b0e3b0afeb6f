"""Parameter counts of the known families in closed form. Imports neither torch nor transformers.

They keep `recommend` and `models` off torch for these families, whether the configuration is a named
shape's, a local folder's or the hub's: a plan takes 1.1 s and 47 MB with them. All other families are counted
on a model on the meta device (`harness.models.counted_shape.shape_from_meta`): 7.4 s and 440 MB. A table of
named shapes would not do, since head, labels, tied weights and the number of blocks are the job's. Tests
compare the closed forms with the models that transformers builds, and with `shape_from_meta`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from engines.shapes import Head, MatrixShape, ModelShape


def shape_of_config(
    config: Mapping[str, Any], *, name: str, head: Head, num_labels: int, untied: bool = False
) -> ModelShape:
    """The shape of a model of a family in `CLOSED_FORMS`, counted without building it.

    Keys that a configuration leaves out have the defaults of its transformers class. `untied` counts
    the output matrix on its own. Raises `KeyError` for another family.
    """
    return CLOSED_FORMS[config["model_type"]](
        {key: value for key, value in config.items() if value is not None}, name, head, num_labels, untied
    )


def _assemble(
    name: str,
    family: str,
    head: Head,
    num_labels: int,
    *,
    num_blocks: int,
    hidden: int,
    intermediate: int,
    num_heads: int,
    num_kv_heads: int,
    vocabulary: int,
    max_seq_len: int,
    gated_mlp: bool,
    tied: bool,
    matrices: list[tuple[str, int, int]],
    block_vectors: int,
    embeddings: list[int],
    non_block_matrices: list[int],
    non_block_vectors: int,
    head_inputs: int,
) -> ModelShape:
    """Counts from matrices (name, outputs, inputs), tables (elements each) and sums of vectors."""
    shapes = tuple(MatrixShape(name=path, rows=rows, columns=columns) for path, rows, columns in matrices)
    predicts_tokens = head in ("causal_lm", "masked_lm")
    head_parameters = (vocabulary if predicts_tokens else num_labels) * head_inputs
    tied = tied and predicts_tokens
    tables = embeddings + non_block_matrices
    # transformers gives a question-answering head of any family a bias, a decoder's other heads none.
    non_block_vectors += num_labels if head == "question_answering" else 0
    return ModelShape(
        name=name,
        family=family,
        head=head,
        num_blocks=num_blocks,
        hidden=hidden,
        intermediate=intermediate,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        vocabulary=vocabulary,
        max_seq_len=max_seq_len,
        gated_mlp=gated_mlp,
        tied=tied,
        num_labels=0 if predicts_tokens else num_labels,
        block_parameters=sum(matrix.parameters for matrix in shapes) + block_vectors,
        non_block_parameters=sum(tables) + non_block_vectors + (0 if tied else head_parameters),
        head_parameters=head_parameters,
        matrices=shapes,
        largest_tensor=max(*tables, head_parameters, *(matrix.parameters for matrix in shapes)),
    )


def _opt_shape(c: Mapping[str, Any], name: str, head: Head, num_labels: int, untied: bool) -> ModelShape:
    h, ffn = int(c.get("hidden_size", 768)), int(c.get("ffn_dim", 3072))
    vocabulary, projected = int(c.get("vocab_size", 50272)), int(c.get("word_embed_proj_dim", h))
    positions = int(c.get("max_position_embeddings", 2048))
    biases, norms = int(c.get("enable_bias", True)), int(c.get("layer_norm_elementwise_affine", True))
    final_norm = c.get("do_layer_norm_before", True) and not c.get("_remove_final_layer_norm", False)
    heads = int(c.get("num_attention_heads", 12))
    return _assemble(
        name, "opt", head, num_labels,
        num_blocks=int(c.get("num_hidden_layers", 12)), hidden=h, intermediate=ffn, num_heads=heads,
        num_kv_heads=heads, vocabulary=vocabulary, max_seq_len=positions, gated_mlp=False,
        tied=c.get("tie_word_embeddings", True) and not untied,
        matrices=[(f"self_attn.{part}_proj.weight", h, h) for part in ("k", "v", "q", "out")]
        + [("fc1.weight", ffn, h), ("fc2.weight", h, ffn)],
        block_vectors=biases * (5 * h + ffn) + norms * 4 * h,
        # OPT's learned positions begin at index 2.
        embeddings=[vocabulary * projected, (positions + 2) * h],
        non_block_matrices=[h * projected] * 2 if projected != h else [],
        non_block_vectors=norms * 2 * h if final_norm else 0,
        head_inputs=projected,
    )  # fmt: skip


# Defaults where a saved configuration leaves a key out, and which of the projections have biases.
_GATED_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {"vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072,
                "num_key_value_heads": 8},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768,
              "num_key_value_heads": 32},
}  # fmt: skip


def _gated_shape(c: Mapping[str, Any], name: str, head: Head, num_labels: int, untied: bool) -> ModelShape:
    family = str(c["model_type"])
    c = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        **_GATED_DEFAULTS[family],
        **c,
    }
    h, intermediate, vocabulary = int(c["hidden_size"]), int(c["intermediate_size"]), int(c["vocab_size"])
    heads = int(c["num_attention_heads"])
    kv_heads = int(c.get("num_key_value_heads", heads))
    width = int(c.get("head_dim", h // heads))
    q, kv = heads * width, kv_heads * width
    biases = 0
    if family == "qwen2":
        biases = q + 2 * kv
    elif family == "llama":
        biases = (q + 2 * kv + h) * bool(c.get("attention_bias", False))
        biases += (2 * intermediate + h) * bool(c.get("mlp_bias", False))
    return _assemble(
        name, family, head, num_labels,
        num_blocks=int(c["num_hidden_layers"]), hidden=h, intermediate=intermediate, num_heads=heads,
        num_kv_heads=kv_heads, vocabulary=vocabulary, max_seq_len=int(c["max_position_embeddings"]),
        gated_mlp=True, tied=c.get("tie_word_embeddings", False) and not untied,
        matrices=[
            ("self_attn.q_proj.weight", q, h), ("self_attn.k_proj.weight", kv, h),
            ("self_attn.v_proj.weight", kv, h), ("self_attn.o_proj.weight", h, q),
            ("mlp.gate_proj.weight", intermediate, h), ("mlp.up_proj.weight", intermediate, h),
            ("mlp.down_proj.weight", h, intermediate),
        ],
        block_vectors=2 * h + biases, embeddings=[vocabulary * h], non_block_matrices=[], non_block_vectors=h,
        head_inputs=h,
    )  # fmt: skip


def _gpt2_shape(c: Mapping[str, Any], name: str, head: Head, num_labels: int, untied: bool) -> ModelShape:
    h, vocabulary, positions = (
        int(c.get("n_embd", 768)),
        int(c.get("vocab_size", 50257)),
        int(c.get("n_positions", 1024)),
    )
    inner, heads = int(c.get("n_inner", 4 * h)), int(c.get("n_head", 12))
    return _assemble(
        name, "gpt2", head, num_labels,
        num_blocks=int(c.get("n_layer", 12)), hidden=h, intermediate=inner, num_heads=heads,
        num_kv_heads=heads, vocabulary=vocabulary, max_seq_len=positions, gated_mlp=False,
        tied=c.get("tie_word_embeddings", True) and not untied,
        # Stored transposed (inputs x outputs), given here as y = x W^T like all others.
        matrices=[
            ("attn.c_attn.weight", 3 * h, h), ("attn.c_proj.weight", h, h),
            ("mlp.c_fc.weight", inner, h), ("mlp.c_proj.weight", h, inner),
        ],
        block_vectors=9 * h + inner, embeddings=[vocabulary * h, positions * h], non_block_matrices=[],
        non_block_vectors=2 * h, head_inputs=h,
    )  # fmt: skip


def _encoder_shape(c: Mapping[str, Any], name: str, head: Head, num_labels: int, untied: bool) -> ModelShape:
    family = str(c["model_type"])
    roberta = family == "roberta"
    h, inner = int(c.get("hidden_size", 768)), int(c.get("intermediate_size", 3072))
    vocabulary = int(c.get("vocab_size", 50265 if roberta else 30522))
    positions, types = int(c.get("max_position_embeddings", 512)), int(c.get("type_vocab_size", 2))
    heads = int(c.get("num_attention_heads", 12))
    # RoBERTa counts positions from its padding token on.
    offset = int(c.get("pad_token_id", 1)) + 1 if roberta else 0
    classifies, fills_in = head == "classification", head == "masked_lm"
    return _assemble(
        name, family, head, num_labels,
        num_blocks=int(c.get("num_hidden_layers", 12)), hidden=h, intermediate=inner, num_heads=heads,
        num_kv_heads=heads, vocabulary=vocabulary, max_seq_len=positions - offset, gated_mlp=False,
        tied=c.get("tie_word_embeddings", True) and not untied,
        matrices=[(f"attention.self.{part}.weight", h, h) for part in ("query", "key", "value")]
        + [("attention.output.dense.weight", h, h), ("intermediate.dense.weight", inner, h),
           ("output.dense.weight", h, inner)],
        block_vectors=9 * h + inner,
        embeddings=[vocabulary * h, positions * h, types * h],
        # One dense layer before the classes (BERT's pooler, RoBERTa's classification head), and before the
        # words, there with a norm.
        non_block_matrices=[h * h] if classifies or fills_in else [],
        non_block_vectors=2 * h + (h + num_labels if classifies else 3 * h + vocabulary if fills_in else 0),
        head_inputs=h,
    )  # fmt: skip


CLOSED_FORMS: dict[str, Callable[[Mapping[str, Any], str, Head, int, bool], ModelShape]] = {
    "opt": _opt_shape,
    "llama": _gated_shape,
    "mistral": _gated_shape,
    "qwen2": _gated_shape,
    "gpt2": _gpt2_shape,
    "bert": _encoder_shape,
    "roberta": _encoder_shape,
}

_ACTIVATIONS = frozenset({"gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"})
_DTYPES = (None, "float32", "float16", "bfloat16")
_ROPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""By type, the numbers that it takes."""

_WHOLE_NUMBERS = (
    "vocab_size", "hidden_size", "intermediate_size", "ffn_dim", "word_embed_proj_dim", "n_embd", "n_inner",
    "n_positions", "max_position_embeddings", "type_vocab_size", "head_dim",
)  # fmt: skip
_TRUTHS = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "enable_bias", "do_layer_norm_before", "use_cache",
    "layer_norm_elementwise_affine", "_remove_final_layer_norm", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn",
)  # fmt: skip
_NUMBERS = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "initializer_range", "rope_theta", "dropout",
    "attention_dropout", "activation_dropout", "layerdrop", "hidden_dropout_prob", "resid_pdrop",
    "embd_pdrop", "attention_probs_dropout_prob", "attn_pdrop",
)  # fmt: skip
_OTHER_NAMES = {
    "gpt2": ("hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
}
"""That transformers takes for a family's own keys."""

_MAKE_OTHER_MODELS = ("is_encoder_decoder", "add_cross_attention")


def is_counted_in_closed_form(config: Mapping[str, Any]) -> bool:
    """Whether `shape_of_config` counts a configuration as transformers builds it: of a family in
    `CLOSED_FORMS`, with nothing in it that transformers may refuse or build otherwise. Of all else a model on
    the meta device shows it."""
    family = config["model_type"]
    if family not in CLOSED_FORMS or any(key in config for key in _OTHER_NAMES.get(family, ())):
        return False
    c = {key: value for key, value in config.items() if value is not None}
    heads = c.get("num_attention_heads", c.get("n_head", 1))
    width = c.get("hidden_size", c.get("n_embd", heads))
    vocabulary = c.get("vocab_size", math.inf)
    layers = c.get("num_hidden_layers")
    return (
        all(type(c[key]) is int and c[key] > 0 for key in _WHOLE_NUMBERS if key in c)
        and all(isinstance(c[key], bool) for key in _TRUTHS if key in c)
        and all(type(c[key]) in (int, float) and c[key] >= 0 for key in _NUMBERS if key in c)
        and not any(c.get(key) for key in _MAKE_OTHER_MODELS)
        and width % heads == 0
        and c.get("head_dim", 2) % 2 == 0
        and all(c[key] in _ACTIVATIONS for key in ("hidden_act", "activation_function") if key in c)
        and all(c.get(key) in _DTYPES for key in ("dtype", "torch_dtype"))
        and all(_is_rope(c[key]) for key in ("rope_scaling", "rope_parameters") if key in c)
        and ("layer_types" not in c or _names_each(c["layer_types"], layers))
        and all(_is_token(c[key], vocabulary) for key in ("pad_token_id", "bos_token_id") if key in c)
        and _is_token_or_several(c.get("eos_token_id", 0), vocabulary)
        and type(c.get("num_labels", 2)) is int
    )


def _is_rope(told: object) -> bool:
    if not isinstance(told, Mapping):
        return False
    needed = _ROPES.get(str(told.get("rope_type", told.get("type", "default"))))
    numbers = [*(needed or ()), *(key for key in ("rope_theta",) if key in told)]
    return needed is not None and all(type(told.get(key)) in (int, float) for key in numbers)


def _names_each(kinds: object, layers: object) -> bool:
    return (
        isinstance(kinds, list)
        and len(kinds) == layers
        and set(kinds) <= {"full_attention", "sliding_attention"}
    )


def _is_token(told: object, vocabulary: float) -> bool:
    return type(told) is int and -1 <= told < vocabulary


def _is_token_or_several(told: object, vocabulary: float) -> bool:
    return all(_is_token(each, vocabulary) for each in (told if isinstance(told, list) else [told]))
