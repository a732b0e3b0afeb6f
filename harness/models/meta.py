"""A model of transformers without weights: its configuration as it is trained here, its modules on the meta
device.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
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
from engines.model.randomness import turn_off_randomness
from engines.shapes import Head
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


def configuration(
    values: Mapping[str, Any], source: ModelSource, head: Head, num_labels: int, untied: bool
) -> PretrainedConfig:
    """The typed configuration as this project trains it: no dropout, no cache, our head. Raises `UserError`
    for a type that transformers does not know or cannot read, an encoder-decoder, or one without `head`."""
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
    names = [each for pair in fields for each in pair if each and not each.startswith("validate_")]
    named = next(iter(names), None)
    about = f" ('{named}' is wrong or does not suit the rest)" if named else ""
    if re.search(r"multiple of the number of|divisible by .?num_heads", text):
        about = " (the hidden size is no multiple of the number of heads)"
    return UserError(f"model '{name}'", f"its configuration makes no model{about}", "correct config.json")
