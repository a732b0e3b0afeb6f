"""Parameter counts of the known families in closed form. Imports neither torch nor transformers.

They keep `recommend` and `models` off torch for these families, whether the configuration is a named
shape's, a local folder's or the hub's: a plan takes 1.1 s and 47 MB with them. All other families are counted
on a model on the meta device (`harness.models.counted_shape.shape_from_meta`): 7.4 s and 440 MB. A table of
named shapes would not do, since head, labels, tied weights and the number of blocks are the job's. Tests
compare the closed forms with the models that transformers builds, and with `shape_from_meta`.
"""

from __future__ import annotations

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
