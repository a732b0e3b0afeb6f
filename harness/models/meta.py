"""From a job to a model: built on the meta device, filled tensor by tensor, written out again.

Nothing here allocates a model's weights at once, except for a checkpoint whose tensors are not the model's
one by one (`harness.models.safetensors_files`): transformers reads it into host memory in the precision it is
stored in.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from engines.errors import UserError
from engines.model.blocks import find_blocks
from engines.model.randomness import turn_off_randomness
from engines.shapes import Head, MatrixShape, ModelShape
from harness.models.auto_classes import auto_class
from harness.records.job import ModelSource

CONFIGURATION_FAILURES = (
    TypeError, ValueError, LookupError, RuntimeError, AttributeError, ImportError, AssertionError,
    ZeroDivisionError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises for a configuration that makes no model."""


def build_on_meta(config: PretrainedConfig, head: Head) -> Any:
    """A model whose parameters are on the meta device, in fp32, and whose buffers are real, on the CPU.

    Raises what transformers raises for a configuration that makes no model.
    """

    def build() -> Any:
        return auto_class(head).from_config(config, dtype=torch.float32, trust_remote_code=False)

    with torch.device("meta"):
        model = build()
    turn_off_randomness(model)
    _materialize_buffers(model, build)
    if head == "causal_lm" and model.loss_type is None:
        # Class names such as GPT2LMHeadModel do not tell transformers the loss: it warns, then takes this.
        model.loss_type = "ForCausalLM"
    return model


def _materialize_buffers(model: Any, rebuild: Callable[[], Any]) -> None:
    """Give every buffer its values: transformers' own initialisation of one module writes its buffers.

    Each by the innermost model that it belongs to, as transformers does it. The module's parameters are
    initialised too, which costs nothing while they are on the meta device. What that leaves unknown comes
    from the model built a second time, by `rebuild`, with its buffers in memory.
    """
    innermost: dict[str, Any] = {}
    unknown: list[tuple[nn.Module, str, str]] = []
    for path, module in model.named_modules():
        is_model = isinstance(module, PreTrainedModel)
        innermost[path] = module if is_model else innermost[path.rpartition(".")[0]]
        names = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not names:
            continue
        marked = [name for name in names if module.get_buffer(name).dtype != torch.bool]
        for name in marked:
            module._buffers[name] = _marked(module.get_buffer(name))
        innermost[path]._init_weights(module)
        unknown += [
            (module, path, name)
            for name in names
            if name not in marked or _is_marked(module.get_buffer(name))
        ]
    if not unknown:
        return
    with _parameters_on_meta():
        other = rebuild()
    for module, path, name in unknown:
        module._buffers[name] = other.get_submodule(path).get_buffer(name)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within it every parameter goes to the meta device as soon as a module has it; one is in memory at a
    time, and none is initialised there. Buffers stay."""
    usual = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            meta = parameter.data.to("meta")
            parameter = nn.Parameter(meta, requires_grad=parameter.requires_grad)
        usual(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = usual  # type: ignore[method-assign]


def _marked(like: Tensor) -> Tensor:
    """A tensor on the CPU whose contents no initialisation would leave: NaN, or the smallest integer."""
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
    sizes = [parameter.numel() for parameter in model.parameters()]
    transposed = {
        path for path, module in largest.named_modules() if type(module).__name__ == "Conv1D"
    }  # GPT-2's linear layer, stored as inputs x outputs
    matrices = tuple(
        MatrixShape(
            name=path,
            rows=parameter.shape[1 if path.rpartition(".")[0] in transposed else 0],
            columns=parameter.shape[0 if path.rpartition(".")[0] in transposed else 1],
        )
        for path, parameter in largest.named_parameters()
        if parameter.dim() == 2 and not path.endswith("bias")  # of a mixture: one for each expert
    )
    config = model.config.get_text_config()
    embedding = _embedding_of(model)
    predicts_tokens = head in ("causal_lm", "masked_lm")
    hidden = _number(config, "hidden_size") or _inputs_of_most(matrices) or embedding[1]
    heads = _number(config, "num_attention_heads") or 1
    outputs = embedding[0] if predicts_tokens else num_labels
    output = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == outputs
    ]
    first_names = first_names_of(model)
    experts = _experts_of(largest, config)
    in_experts = sum(each.numel() for each in experts.values())
    num_experts = max((len(each) for each in experts.values()), default=0)
    chosen = min(_first_number(config, _EXPERTS_PER_TOKEN) or num_experts, num_experts)
    layers = _number(config, "num_hidden_layers") or len(blocks)
    gated = any("gate" in name for name in (*(matrix.name for matrix in matrices), *experts))
    # The widths of a token's experts together: of each one matrix, or two where it is gated, and one back.
    expert_widths = chosen * in_experts // max(1, num_experts) // ((3 if gated else 2) * hidden)
    # The inputs of the projection back down from the feed-forward layer.
    widest = max((matrix.columns for matrix in matrices), default=hidden)
    like = len(set(sizes_of_blocks)) == 1
    in_blocks = {id(parameter): parameter.numel() for block in blocks for parameter in block.parameters()}
    return ModelShape(
        name=name,
        family=family,
        head=head,
        num_blocks=len(blocks),
        hidden=hidden,
        intermediate=max(_intermediate(config) or widest, expert_widths),
        num_heads=heads,
        num_kv_heads=_number(config, "num_key_value_heads") or heads,
        vocabulary=embedding[0],
        max_seq_len=_longest(model, config, family),
        gated_mlp=gated,
        tied=predicts_tokens and len(set(first_names.values())) < len(first_names),
        num_labels=0 if predicts_tokens else num_labels,
        block_parameters=max(sizes_of_blocks),
        block_sizes=() if like else sizes_of_blocks,
        non_block_parameters=sum(sizes) - (sum(sizes_of_blocks) if like else sum(in_blocks.values())),
        head_parameters=output[-1].weight.numel() if output else 0,
        matrices=matrices,
        largest_tensor=max(sizes),
        expert_parameters=in_experts,
        num_experts=num_experts,
        experts_per_token=chosen,
        calls_of_a_block=max(1, layers // len(blocks)) if _number(config, "num_hidden_groups") else 1,
        is_recurrent=any(_STATES.search(name) for block in blocks for name, _ in block.named_parameters()),
    )


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


def _intermediate(config: Any) -> int | None:
    return _number(config, "intermediate_size")


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
    try:
        config: PretrainedConfig = CONFIG_MAPPING[family].from_dict(copy.deepcopy(dict(values)))
    except CONFIGURATION_FAILURES as error:
        raise malformed(source.name, error) from None
    config.use_cache = False
    if config.is_encoder_decoder:
        raise UserError(
            f"model '{source.name}'", f"{family} is an encoder-decoder", "use a decoder or an encoder"
        )
    if family not in _TYPES_WITH[head]:
        raise _no_head(source.name, family, head)
    if untied:
        config.tie_word_embeddings = False
    if head not in ("causal_lm", "masked_lm") and config.num_labels != num_labels:
        config.num_labels = num_labels
    if head == "classification":
        config.problem_type = "regression" if num_labels == 1 else "single_label_classification"
    return config


_TYPES_WITH: Mapping[Head, Mapping[str, Any]] = {
    "causal_lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked_lm": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "question_answering": MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


def _no_head(name: str, family: str, head: Head) -> UserError:
    if not any(family in types for types in _TYPES_WITH.values()):
        return UserError(
            f"model '{name}'",
            f"'{family}' is no language model to train",
            "use a decoder or an encoder",
        )
    if head == "question_answering":
        return UserError(
            f"model '{name}'",
            f"transformers has no question-answering head for its type '{family}'",
            "use another model, or --head causal_lm with instruction records",
        )
    return UserError(
        f"model '{name}'",
        f"transformers has no head for {head.replace('_', ' ')} for its type '{family}'",
        "use another --head, or another model",
    )


_SENSES = re.compile(r"vision|image|audio|speech|video|visual|qformer|codec")


def refuse_more_than_text(config: PretrainedConfig, name: str) -> None:
    """Raises `UserError` for a model of images or sound beside text, by the configurations inside its own."""
    if any(_SENSES.search(part) for part in config.sub_configs):
        raise UserError(
            f"model '{name}'",
            f"its type '{config.model_type}' is of several models, such as one of text and one of images",
            "use a model of text alone",
        )


def malformed(name: str, error: Exception) -> UserError:
    """Of what transformers raises, the names of fields and packages are told, not its text."""
    text = str(error)
    if isinstance(error, ImportError):
        package = re.search(r"pip install ([\w.-]+)", text)
        needed = f" {package[1]}," if package else " a package"
        return UserError(
            f"model '{name}'",
            f"transformers needs{needed} which is not installed",
            "install it",
        )
    fields = re.findall(r"field [\"'`](\w+)[\"'`]|[`'](\w+)[`']", text)
    named = next((each for pair in fields for each in pair if each), None)
    about = f" ('{named}' is wrong or does not suit the rest)" if named else ""
    return UserError(f"model '{name}'", f"its configuration makes no model{about}", "correct config.json")


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
