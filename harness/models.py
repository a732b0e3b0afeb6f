"""From a job to a model: built on the meta device, filled tensor by tensor, written out again.

Nothing here allocates a model's weights at once, except for a checkpoint whose tensors are not the model's
one by one (`harness.stored`): transformers reads it into host memory in the precision it is stored in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES

from engines.base import StoredTensor
from engines.errors import UserError
from engines.model.blocks import find_blocks
from engines.shapes import Head, MatrixShape, ModelShape
from harness.export import write_model
from harness.heads import auto_class
from harness.job import Job, ModelSource
from harness.shapes import load_config, local_folder
from harness.stored import read_weights, stored_tensors
from harness.tokens import load_tokenizer, tokenizer_files
from harness.weights import checkpoint_weights, random_weights

_DROPOUTS = (
    "activation_dropout", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop",
    "classifier_dropout", "dropout", "embd_pdrop", "hidden_dropout", "hidden_dropout_prob", "layerdrop",
    "resid_pdrop", "summary_first_dropout",
)  # fmt: skip


class ModelBlueprint:
    """A model on the meta device, and where its weights come from. See `engines.base.Blueprint`."""

    def __init__(
        self,
        *,
        shape: ModelShape,
        model: nn.Module,
        source: ModelSource,
        weights: Callable[[str, Tensor], None],
        stored: Mapping[str, StoredTensor] | None = None,
    ) -> None:
        self.shape = shape
        self.model: Any = model
        self.source = source
        self.config: PretrainedConfig = self.model.config
        self.architecture = type(model).__name__
        # Taken now: an engine may take the model apart, and the export needs them whole.
        self.parameter_shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.persistent_buffers = _persistent_buffers(model)
        self._first_names = _first_names(model)
        self._weights = weights
        self._stored = stored or {}

    def fill(self, name: str, out: Tensor) -> None:
        """Write the weights of parameter `name` into `out`, of any device and float dtype.

        Raises `KeyError` for a name the model does not have, `ValueError` for an `out` of another shape.
        """
        first = self._first_names[name]
        if tuple(out.shape) != self.parameter_shapes[first]:
            raise ValueError(f"{name} is {self.parameter_shapes[first]}, not {tuple(out.shape)}")
        with torch.no_grad():
            self._weights(first, out)

    def locate(self, name: str) -> StoredTensor | None:
        """See `engines.base.LocatesWeights`."""
        return self._stored.get(self._first_names[name])

    def release(self) -> None:
        """Let go of the weights that `fill` reads from: a checkpoint is in host memory until then."""
        self._weights = _released


def _released(name: str, out: Tensor) -> None:
    raise RuntimeError(f"the weights of {name} were released")


def make_blueprint(job: Job, shape: ModelShape) -> ModelBlueprint:
    """The job's model without its weights.

    Dropout is off, whatever the configuration says: zeroth-order methods compare two passes through one
    function, and methods are compared on the same function. The export has the original values again.
    Raises `UserError` if the configuration or the checkpoint cannot be used.
    """
    source = job.model
    values = load_config(source)
    config = _configuration(values, source, shape.head, shape.num_labels, source.untied)
    try:
        model = build_on_meta(config, shape.head)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise _malformed(source.name, error) from None
    if shape.head == "classification" and model.config.pad_token_id is None:
        # A classifying decoder finds the last token of a sequence by the padding after it. Set after
        # the model was built, so that the embedding does not take it for a row without gradient.
        model.config.pad_token_id = load_tokenizer(source, shape.vocabulary).pad_id
    random, body = random_weights(model, job.seed), model.base_model_prefix
    stored = None if source.random_weights else stored_tensors(source, model, body)
    if source.random_weights:
        weights = random
    elif stored is not None:
        weights = read_weights(stored)
    else:
        weights = checkpoint_weights(source, config, shape, values, random, body)
    return ModelBlueprint(shape=shape, model=model, source=source, weights=weights, stored=stored)


def export_model(
    blueprint: ModelBlueprint, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype, folder: Path
) -> None:
    """Write a folder that transformers' `from_pretrained` loads: safetensors, configuration, tokenizer.

    `weights` yields each parameter once by its first name. `folder` appears whole or not at all; it may
    exist if it is empty. Raises `UserError` if it is in use or cannot be written.
    """
    config = copy.deepcopy(blueprint.config)
    original = load_config(blueprint.source)
    for name in _DROPOUTS:
        if hasattr(config, name) and name in original:
            setattr(config, name, original[name])
    config.use_cache = original.get("use_cache", True)
    config.architectures = [blueprint.architecture]
    config.dtype = dtype
    source_folder = local_folder(blueprint.source)
    generation = None if source_folder is None else source_folder / "generation_config.json"
    write_model(
        folder,
        config=config,
        expected=blueprint.parameter_shapes,
        weights=weights,
        buffers=blueprint.persistent_buffers,
        dtype=dtype,
        extra_files=[
            *tokenizer_files(blueprint.source),
            *([generation] if generation is not None and generation.is_file() else []),
        ],
    )


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

    For families without a closed form. Raises `UserError` for a configuration that makes no such model.
    """
    source = ModelSource(name=name, random_weights=True, untied=untied)
    config = _configuration(values, source, head, num_labels, untied)
    if not hasattr(config, "hidden_size"):
        raise UserError(
            f"model '{name}'",
            f"its type '{values['model_type']}' is of several models, such as one of text and one of images",
            "use a model of text alone",
        )
    try:
        model = build_on_meta(config, head)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise _malformed(name, error) from None
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
    first_names = _first_names(model)
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
    told = getattr(config, "intermediate_size", None)
    return max(told) if isinstance(told, list | tuple) else told


def _longest(config: Any, family: str) -> int:
    longest = int(config.max_position_embeddings)
    # RoBERTa and its kin count positions from their padding token on.
    offset = int(config.pad_token_id or 0) + 1 if "roberta" in family or family == "camembert" else 0
    return longest - offset


def _configuration(
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
        raise _malformed(source.name, error) from None
    for name in _DROPOUTS:
        if isinstance(getattr(config, name, None), int | float):
            setattr(config, name, 0.0)
    config.use_cache = False
    if untied:
        config.tie_word_embeddings = False
    if head != "causal_lm" and config.num_labels != num_labels:
        config.num_labels = num_labels
    if head == "classification":
        config.problem_type = "single_label_classification"
    return config


def _malformed(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"model '{name}'", f"its configuration makes no model ({reason})", "mend config.json")


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> the first name of the tensor behind it."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    saved = set(model.state_dict())
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name in saved}
