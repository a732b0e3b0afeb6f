"""What is to be computed: the sizes of a model in blocks, and of the work on it. Imports no torch.

A model is an embedding, like blocks one after the other, and a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from engines.registry_row import Walk

Dtype = Literal["fp32", "bf16", "fp16"]
"""Precision of the weights and of the forward pass."""


BYTES_PER_ELEMENT: dict[Dtype, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


Direction = Literal["h2d", "d2h"]
"""Over the link: from host to device, or back."""


Head = Literal["causal_lm", "masked_lm", "classification", "question_answering"]
"""`masked_lm` fills in a word that stands for a class; `question_answering` is extractive: the first and the
last token of the answer in a given text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixShape:
    """One weight matrix of a block, as y = x W^T."""

    name: str
    """Its parameter name inside the block, such as `self_attn.q_proj.weight`."""
    rows: int
    """Output features m."""
    columns: int
    """Input features n."""

    @property
    def parameters(self) -> int:
        return self.rows * self.columns


ENCODER_FAMILIES = ("albert", "bert", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta")
"""Values of `model_type` whose tokens see those after them; what is not listed counts as a decoder."""

OWN_LOGITS_FAMILIES = (
    "cohere", "cohere2", "cpmant", "gemma2", "gemma3n_text", "granite", "granitemoe", "granitemoehybrid",
    "granitemoeshared", "nanochat", "recurrent_gemma", "vaultgemma", "xglm", "xlnet",
)  # fmt: skip
"""Those that scale or cap what their output matrix gives, or take a loss of their own of it: it cannot be
computed in chunks (`engines.first_order.head_loss`)."""


NOT_IN_ORDER = "does not call its blocks one after the other"
NOT_ONE_BY_ONE = "its blocks cannot be run one by one"
NOT_WATCHED = "its blocks cannot be watched"
OTHER_GRADIENTS = "running its blocks one by one gives other gradients than the model's"
SEVERAL_STATES = "its blocks pass on more than one hidden state of each token, which this method cannot stack"
OWN_CHANGES = "changes its own weights in a forward pass"
ROUTER_LOSS = "its experts' auxiliary loss is of more than its blocks pass on"
NO_RECOMPUTATION = "transformers cannot recompute activations in this model"


def shared_layers(calls: int, blocks: int) -> str:
    """Of a model that calls its `blocks` so often in a pass."""
    return f"its layers share weights: {calls} calls of {blocks}"


_ONE_BY_ONE = {
    "flaubert": NOT_ONE_BY_ONE, "funnel": NOT_IN_ORDER, "gemma3n_text": SEVERAL_STATES,
    "reformer": NOT_ONE_BY_ONE, "squeezebert": NOT_IN_ORDER, "xlm": NOT_ONE_BY_ONE,
}  # fmt: skip

REFUSED_FAMILIES: Mapping[Walk, Mapping[str, str]] = {
    "own": {},
    "watched": {
        "funnel": NOT_IN_ORDER, "gemma3n_text": OTHER_GRADIENTS, "openai-gpt": NOT_WATCHED,
        "squeezebert": NOT_IN_ORDER,
    },
    "block_major": _ONE_BY_ONE,
    "driven": {**_ONE_BY_ONE, "rwkv": OWN_CHANGES},
}  # fmt: skip
"""Values of `model_type` that a method refuses as it starts, by how it goes through blocks, and why: as the
sweep over families found them (`engines/README.md`), so that plans say so before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes of a model that costs follow from. Counts are of elements, not bytes."""

    name: str
    family: str
    """`model_type` of its Hugging Face configuration, such as `opt` or `llama`."""
    head: Head
    num_blocks: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    vocabulary: int
    max_seq_len: int
    gated_mlp: bool
    tied: bool
    """Embedding and output head are one tensor."""
    num_labels: int
    """Outputs of a classification head, or 2 (first, last) of a question-answering head for each token; 0 for
    a language model."""
    block_parameters: int
    """All parameters of one block, matrices, norms and biases; of the largest where they differ in size."""
    non_block_parameters: int
    """All parameters outside the blocks (embeddings, final norm, head), a tied tensor counted once."""
    head_parameters: int
    """Those outside the blocks that multiply every token on the way out (the output matrix, tied or not)."""
    matrices: tuple[MatrixShape, ...]
    """The weight matrices of one block."""
    largest_tensor: int
    """Elements of the largest single parameter of the model."""
    block_sizes: tuple[int, ...] = ()
    """Parameters of each block where they differ in size; empty where all have `block_parameters`. Costs take
    every block for the largest."""
    expert_parameters: int = 0
    """Of a mixture: the matrices of all experts of one block. They are in `block_parameters`, and not in
    `matrices`, since no method treats them as products of its own."""
    num_experts: int = 0
    """Of each block; 0 where it has none."""
    experts_per_token: int = 0
    calls_of_a_block: int = 1
    """In one pass; more where layers share their weights, as ALBERT's do."""
    is_recurrent: bool = False
    """Some blocks carry a state from token to token, of which costs count the products around it alone."""
    has_router_loss: bool = False
    """Of a mixture whose loss has a part of its own for how tokens are spread over the experts, as
    `output_router_logits` in its configuration asks."""
    is_recomputable: bool = True
    """transformers' own checkpointing can compute its blocks' activations again."""
    label_names: tuple[str, ...] = ()
    """Of a classification head's outputs, as the data names them; empty where it numbers them from 0."""

    @property
    def predicts_tokens(self) -> bool:
        """The head's outputs are the vocabulary; it comes with the checkpoint."""
        return self.head in ("causal_lm", "masked_lm")

    @property
    def is_causal(self) -> bool:
        """Each token sees those before it, as in every decoder; in encoders it sees all."""
        return self.head != "masked_lm" and self.family not in ENCODER_FAMILIES

    def why_not_walked(self, walk: Walk) -> str | None:
        """Why no method that goes so through a model's blocks trains this one; `None`: nothing is known."""
        if walk != "own" and self.calls_of_a_block > 1:
            return shared_layers(self.calls_of_a_block * self.num_blocks, self.num_blocks)
        if walk != "own" and self.has_router_loss:
            return ROUTER_LOSS
        return REFUSED_FAMILIES[walk].get(self.family)

    @property
    def parameters(self) -> int:
        in_blocks = sum(self.block_sizes) or self.num_blocks * self.block_parameters
        return in_blocks + self.non_block_parameters

    @property
    def active_expert_parameters(self) -> float:
        """Of one block's experts, those that a token goes through."""
        return self.expert_parameters * self.experts_per_token / max(1, self.num_experts)

    @property
    def matrix_parameters(self) -> int:
        """Parameters in the weight matrices of all blocks."""
        return self.num_blocks * sum(matrix.parameters for matrix in self.matrices)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The part of a job that costs follow from; the other part says where weights and data come from."""

    batch_size: int
    """Sequences per micro-batch."""
    seq_len: int
    """Tokens per sequence."""
    accumulation: int = 1
    """Micro-batches per step."""
    dtype: Dtype = "bf16"
    checkpointing: bool = True
    """Recompute each block's activations in the backward pass. Without effect on forward-only methods."""
    words_alone: bool = False
    """The loss is over the words that stand for classes, and not the whole vocabulary: no loss in chunks."""

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len * self.accumulation

    @property
    def examples_per_step(self) -> int:
        return self.batch_size * self.accumulation

    def hidden_bytes(self, shape: ModelShape) -> int:
        """Hidden states of one micro-batch between two blocks."""
        return self.batch_size * self.seq_len * shape.hidden * BYTES_PER_ELEMENT[self.dtype]

    def of_a_rank(self, ranks: int) -> Workload:
        """What the one of so many processes with the most to do computes of a step: a micro-batch at least,
        as ranks that divide the queries of one have it."""
        return replace(self, accumulation=max(1, -(-self.accumulation // ranks)))
