"""The shape of a model that transformers knows and no closed form, counted on the model itself."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from engines.model.blocks import find_blocks, first_names
from engines.shapes import Head, MatrixShape, ModelShape
from harness.models.meta import (
    CONFIGURATION_FAILURES,
    build_on_meta,
    configuration,
    malformed,
    refuse_more_than_text,
)
from harness.records.job import ModelSource


def shape_from_meta(
    values: Mapping[str, Any], *, name: str, head: Head, num_labels: int, untied: bool = False
) -> ModelShape:
    """The shape of any decoder or encoder that transformers knows, counted on a model without weights.

    It takes seconds, torch and transformers; families in `harness.models.closed_forms` do without it, and
    tests compare the two. Raises `UserError` for a configuration that makes no such model.
    """
    source = ModelSource(name=name, random_weights=True, untied=untied)
    config = configuration(values, source, head, num_labels, untied)
    refuse_more_than_text(config, name)
    try:
        model = build_on_meta(config, head)
    except CONFIGURATION_FAILURES as error:
        raise malformed(name, error) from None
    return _counted(model, name, str(values["model_type"]), head, num_labels)


def _counted(model: Any, name: str, family: str, head: Head, num_labels: int) -> ModelShape:
    """What of a shape can be counted comes from the model; of its configuration, numbers of heads and the
    longest sequence where it says them."""
    _, blocks = find_blocks(model)
    sizes_of_blocks = tuple(sum(p.numel() for p in block.parameters()) for block in blocks)
    largest = blocks[sizes_of_blocks.index(max(sizes_of_blocks))]
    like = len(set(sizes_of_blocks)) == 1
    in_blocks = {id(parameter): parameter.numel() for block in blocks for parameter in block.parameters()}
    sizes = [parameter.numel() for parameter in model.parameters()]
    matrices = _matrices_of(largest)
    config = model.config.get_text_config()
    rows, width = _embedding_of(model)
    hidden = _number(config, "hidden_size") or _inputs_of_most(matrices) or width
    heads = _number(config, "num_attention_heads") or 1
    predicts_tokens = head in ("causal_lm", "masked_lm")
    names = first_names(model)
    experts = _experts_of(largest, config)
    num_experts = max((len(each) for each in experts.values()), default=0)
    chosen = min(_first_number(config, _EXPERTS_PER_TOKEN) or num_experts, num_experts)
    in_experts = sum(each.numel() for each in experts.values())
    gated = any("gate" in name for name in (*(matrix.name for matrix in matrices), *experts))
    # The widths of a token's experts together: of each one matrix, or two where it is gated, and one back.
    expert_widths = chosen * in_experts // max(1, num_experts) // ((3 if gated else 2) * hidden)
    # The inputs of the projection back down from the feed-forward layer.
    widest = max((matrix.columns for matrix in matrices), default=hidden)
    return ModelShape(
        name=name,
        family=family,
        head=head,
        num_blocks=len(blocks),
        hidden=hidden,
        intermediate=max(_number(config, "intermediate_size") or widest, expert_widths),
        num_heads=heads,
        num_kv_heads=_number(config, "num_key_value_heads") or heads,
        vocabulary=rows,
        max_seq_len=_longest(model, config, family),
        gated_mlp=gated,
        tied=predicts_tokens and len(set(names.values())) < len(names),
        num_labels=0 if predicts_tokens else num_labels,
        block_parameters=max(sizes_of_blocks),
        block_sizes=() if like else sizes_of_blocks,
        non_block_parameters=sum(sizes) - (sum(sizes_of_blocks) if like else sum(in_blocks.values())),
        head_parameters=_head_parameters(model, rows if predicts_tokens else num_labels),
        matrices=matrices,
        largest_tensor=max(sizes),
        expert_parameters=in_experts,
        num_experts=num_experts,
        experts_per_token=chosen,
        calls_of_a_block=_calls_of_a_block(config, len(blocks)),
        has_router_loss=head == "causal_lm" and _has_router_loss(model),
        is_recomputable=getattr(model, "supports_gradient_checkpointing", False),
        is_recurrent=any(_STATES.search(name) for block in blocks for name, _ in block.named_parameters()),
    )


def _matrices_of(block: nn.Module) -> tuple[MatrixShape, ...]:
    """In the order of its parameters, rows being outputs; of a mixture one for each expert's."""
    # GPT-2's linear layer is stored as inputs x outputs.
    transposed = {path for path, module in block.named_modules() if type(module).__name__ == "Conv1D"}
    matrices = []
    for path, parameter in block.named_parameters():
        if parameter.dim() == 2 and not path.endswith("bias"):
            is_transposed = path.rpartition(".")[0] in transposed
            rows, columns = reversed(parameter.shape) if is_transposed else parameter.shape
            matrices.append(MatrixShape(name=path, rows=rows, columns=columns))
    return tuple(matrices)


def _head_parameters(model: nn.Module, outputs: int) -> int:
    """Of the weight of the last layer that has so many outputs; 0: there is none."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == outputs
    ]
    return layers[-1].weight.numel() if layers else 0


def _has_router_loss(model: nn.Module) -> bool:
    """Asked for, and known to the file of the model's class: others have the key and do nothing with it."""
    asked = getattr(model.config, "output_router_logits", False)
    return bool(asked) and hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")


def _calls_of_a_block(config: Any, num_blocks: int) -> int:
    """How often each runs in a forward pass: ALBERT's groups of layers share their weights."""
    layers = _number(config, "num_hidden_layers") or num_blocks
    return max(1, layers // num_blocks) if _number(config, "num_hidden_groups") else 1


NO_LIMIT = 1 << 20
"""Longest sequence of a model that has none: positions by bias or rotation, or a state in place of them."""


def _number(config: Any, name: str) -> int | None:
    """Of the configuration; of the largest block, where it has one for each."""
    value = getattr(config, name, None)
    if isinstance(value, list | tuple):
        value = max((each for each in value if isinstance(each, int)), default=None)
    return value if isinstance(value, int) and value > 0 else None


_STATES = re.compile(r"\bA_log$|\brg_lru\b|\btime_decay$")
"""Parameters of states that go from token to token: of Mamba and gated delta nets, of Griffin, of RWKV."""

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k")


def _first_number(config: Any, names: Sequence[str]) -> int | None:
    return next((number for name in names if (number := _number(config, name)) is not None), None)


def _experts_of(block: nn.Module, config: Any) -> dict[str, nn.Parameter]:
    """A mixture's matrices, which transformers keeps in one tensor for all experts of a block."""
    count = _first_number(config, _EXPERTS)
    return {
        name: parameter
        for name, parameter in block.named_parameters()
        if count is not None and parameter.dim() == 3 and len(parameter) == count
    }


def _embedding_of(model: Any) -> tuple[int, int]:
    """Rows and columns of the table of tokens."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        table = None
    weight = getattr(table, "weight", None)
    if weight is None or weight.dim() != 2:
        tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
        if not tables:
            return int(getattr(model.config, "vocab_size", 0) or 1), int(
                getattr(model.config, "hidden_size", 1)
            )
        weight = max(tables, key=lambda each: each.shape[0])
    return int(weight.shape[0]), int(weight.shape[1])


def _inputs_of_most(matrices: Sequence[MatrixShape]) -> int | None:
    """The width that most matrices of a block take."""
    widths = Counter(matrix.columns for matrix in matrices)
    return widths.most_common(1)[0][0] if widths else None


def _longest(model: Any, config: Any, family: str) -> int:
    """By the configuration where it says, else by the model's table of positions, if it has one."""
    stated = _number(config, "max_position_embeddings")
    if stated is None:
        tables = [
            module.weight.shape[0]
            for path, module in model.named_modules()
            if isinstance(module, nn.Embedding) and re.search(r"position|wpe", path)
        ]
        return min(tables, default=NO_LIMIT)
    # RoBERTa and its kin count positions from their padding token on.
    table = next(
        (m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == stated), None
    )
    offset = _number(config, "pad_token_id") or 0
    counted = "roberta" in family or family in ("camembert", "mpnet", "xmod", "data2vec-text")
    return stated - (offset + 1 if counted and table is not None else 0)
