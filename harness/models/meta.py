"""From a job to a model: built on the meta device, filled tensor by tensor, written out again.

Nothing here allocates a model's weights at once, except for a checkpoint whose tensors are not the model's
one by one (`harness.models.safetensors_files`): transformers reads it into host memory in the precision it is
stored in.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES

from engines.errors import UserError
from engines.model.blocks import find_blocks
from engines.shapes import Head, MatrixShape, ModelShape
from harness.models.auto_classes import auto_class
from harness.records.job import ModelSource

DROPOUTS = (
    "activation_dropout", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop",
    "classifier_dropout", "dropout", "embd_pdrop", "hidden_dropout", "hidden_dropout_prob", "layerdrop",
    "resid_pdrop", "summary_first_dropout",
)  # fmt: skip


def build_on_meta(config: PretrainedConfig, head: Head) -> Any:
    """A model whose parameters are on the meta device, in fp32, and whose buffers are real, on the CPU.

    Raises what transformers raises for a configuration that makes no model, and `RuntimeError` for a
    model that does not say what its buffers hold.
    """
    with torch.device("meta"):
        model = auto_class(head).from_config(config, dtype=torch.float32, trust_remote_code=False)
    _materialize_buffers(model)
    if head == "causal_lm" and model.loss_type is None:
        # Class names such as GPT2LMHeadModel do not tell transformers the loss: it warns, then takes this.
        model.loss_type = "ForCausalLM"
    return model


def _materialize_buffers(model: Any) -> None:
    """Give every buffer its values: transformers' own initialisation of one module writes its buffers.

    Each by the innermost model that it belongs to, as transformers does it. The module's parameters are
    initialised too, which costs nothing while they are on the meta device.
    """
    innermost: dict[str, Any] = {}
    for path, module in model.named_modules():
        is_model = isinstance(module, PreTrainedModel)
        innermost[path] = module if is_model else innermost[path.rpartition(".")[0]]
        names = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not names:
            continue
        for name in names:
            module._buffers[name] = _marked(module.get_buffer(name))
        innermost[path]._init_weights(module)
        for name in names:
            if _is_marked(module.get_buffer(name)):
                raise RuntimeError(f"the contents of buffer {path}.{name} are not known")


def _marked(like: Tensor) -> Tensor:
    """A tensor on the CPU whose contents no initialisation would leave: NaN, or the smallest integer."""
    if like.dtype == torch.bool:
        raise RuntimeError("a boolean buffer cannot be told from an unset one")
    mark = float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).min
    return torch.full(like.shape, mark, dtype=like.dtype, device="cpu")


def _is_marked(buffer: Tensor) -> bool:
    if buffer.is_floating_point():
        return bool(buffer.isnan().any())
    return bool((buffer == torch.iinfo(buffer.dtype).min).any())


def shape_from_meta(
    values: Mapping[str, Any], *, name: str, head: Head, num_labels: int, untied: bool = False
) -> ModelShape:
    """The shape of any decoder or encoder that transformers knows, counted on a model without weights.

    It takes seconds, torch and transformers; families in `harness.models.closed_forms` do without it, and
    tests compare the two. Raises `UserError` for a configuration that makes no such model.
    """
    source = ModelSource(name=name, random_weights=True, untied=untied)
    config = configuration(values, source, head, num_labels, untied)
    if not hasattr(config, "hidden_size"):
        raise UserError(
            f"model '{name}'",
            f"its type '{values['model_type']}' is of several models, such as one of text and one of images",
            "use a model of text alone",
        )
    try:
        model = build_on_meta(config, head)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise malformed(name, error) from None
    _, blocks = find_blocks(model)
    counts = {sum(p.numel() for p in block.parameters()) for block in blocks}
    if len(counts) > 1:
        raise UserError(f"model '{name}'", "its blocks differ in size", "use a model with like blocks")
    block_parameters = counts.pop()
    sizes = [parameter.numel() for parameter in model.parameters()]
    transposed = {
        path for path, module in blocks[0].named_modules() if type(module).__name__ == "Conv1D"
    }  # GPT-2's linear layer, stored as inputs x outputs
    matrices = tuple(
        MatrixShape(
            name=path,
            rows=parameter.shape[1 if path.rpartition(".")[0] in transposed else 0],
            columns=parameter.shape[0 if path.rpartition(".")[0] in transposed else 1],
        )
        for path, parameter in blocks[0].named_parameters()
        if parameter.dim() == 2
    )
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    vocabulary = int(config.vocab_size)
    outputs = vocabulary if head == "causal_lm" else num_labels
    output = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == outputs
    ]
    first_names = first_names_of(model)
    gated = any("gate" in matrix.name for matrix in matrices)
    # The inputs of the projection back down from the feed-forward layer.
    widest = max(matrix.columns for matrix in matrices)
    return ModelShape(
        name=name,
        family=str(values["model_type"]),
        head=head,
        num_blocks=len(blocks),
        hidden=hidden,
        intermediate=_intermediate(config) or widest,
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        vocabulary=vocabulary,
        max_seq_len=_longest(config, str(values["model_type"])),
        gated_mlp=gated,
        tied=head == "causal_lm" and len(set(first_names.values())) < len(first_names),
        num_labels=0 if head == "causal_lm" else num_labels,
        block_parameters=block_parameters,
        outer_parameters=sum(sizes) - len(blocks) * block_parameters,
        head_parameters=output[-1].weight.numel() if output else 0,
        matrices=matrices,
        largest_tensor=max(sizes),
    )


def _intermediate(config: Any) -> int | None:
    """Of the widest block, where the configuration has one for each."""
    width = getattr(config, "intermediate_size", None)
    return max(width) if isinstance(width, list | tuple) else width


def _longest(config: Any, family: str) -> int:
    longest = int(config.max_position_embeddings)
    # RoBERTa and its kin count positions from their padding token on.
    offset = int(config.pad_token_id or 0) + 1 if "roberta" in family or family == "camembert" else 0
    return longest - offset


def configuration(
    values: Mapping[str, Any], source: ModelSource, head: Head, num_labels: int, untied: bool
) -> PretrainedConfig:
    """The typed configuration as this project trains it: no dropout, no cache, our head."""
    family = str(values["model_type"])
    if family not in CONFIG_MAPPING:
        raise UserError(
            f"model '{source.name}'",
            f"its type '{family}' is not one that transformers knows, and code from outside is not run",
            "use a model of a known type",
        )
    if head == "question_answering" and family not in MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES:
        raise UserError(
            f"model '{source.name}'",
            f"transformers has no question-answering head for its type '{family}'",
            "use another model, or --head causal_lm with instruction records",
        )
    try:
        config: PretrainedConfig = CONFIG_MAPPING[family].from_dict(copy.deepcopy(dict(values)))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise malformed(source.name, error) from None
    for name in DROPOUTS:
        if isinstance(getattr(config, name, None), int | float):
            setattr(config, name, 0.0)
    config.use_cache = False
    if untied:
        config.tie_word_embeddings = False
    if head != "causal_lm" and config.num_labels != num_labels:
        config.num_labels = num_labels
    if head == "classification":
        config.problem_type = "regression" if num_labels == 1 else "single_label_classification"
    return config


def malformed(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"model '{name}'", f"its configuration makes no model ({reason})", "correct config.json")


def first_names_of(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> the first name of the tensor behind it."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def persistent_buffers_of(model: nn.Module) -> dict[str, Tensor]:
    saved = set(model.state_dict())
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name in saved}
