"""Where a model's weights come from: a seed, or a checkpoint in safetensors."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from engines.errors import UserError
from engines.shapes import Head, ModelShape
from harness.models.auto_classes import auto_class
from harness.models.configs import local_folder
from harness.models.meta import CONFIGURATION_FAILURES
from harness.models.safetensors_files import stored_shapes, what_is_wrong
from harness.records.job import ModelSource
from harness.records.seeds import derive_seed

STORED_ONCE = ("inv_freq", "masked_bias", "position_ids", "relative_position_index")
"""Last parts of names of what blocks compute themselves today, and older files have."""

CHUNK_ELEMENTS = 1 << 22
"""Random weights on the CPU come in chunks of this size, each with its own generator, on all threads."""


def random_weights(model: nn.Module, seed: int) -> Callable[[str, Tensor], None]:
    """Seeded weights by parameter name: norms 1, biases 0, all else normal as configured.

    A parameter's values depend on the seed, its name, and the device and dtype they are made on; on the
    CPU neither on the number of threads. Beside `out` itself next to no memory is used.
    """
    std = _deviation(model.config)
    dims = {name: parameter.dim() for name, parameter in model.named_parameters()}

    def fill(name: str, out: Tensor) -> None:
        leaf = name.rpartition(".")[2]
        if "bias" in leaf:
            out.zero_()
        elif dims[name] == 1 and leaf == "weight":
            out.fill_(1.0)
        else:
            fill_normal(out, std, derive_seed(seed, name))

    return fill


def _deviation(config: Any) -> float:
    for name in ("initializer_range", "init_std"):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value > 0:
            return float(value)
    return 0.02


def fill_normal(out: Tensor, std: float, seed: int) -> None:
    """Normal values of mean 0, made on `out`'s own device and in its dtype."""
    if not out.is_contiguous():
        whole = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        fill_normal(whole, std, seed)
        out.copy_(whole)
        return
    flat = out.detach().view(-1)
    if out.device.type != "cpu":
        flat.normal_(0.0, std, generator=torch.Generator(device=out.device).manual_seed(seed))
        return
    chunks = torch.split(flat, CHUNK_ELEMENTS)

    def fill(index: int) -> None:
        generator = torch.Generator().manual_seed(derive_seed(seed, index))
        chunks[index].normal_(0.0, std, generator=generator)

    threads = min(len(chunks), torch.get_num_threads())
    if threads <= 1:
        for index in range(len(chunks)):
            fill(index)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, range(len(chunks))))


def checkpoint_weights(
    source: ModelSource,
    config: PretrainedConfig,
    shape: ModelShape,
    values: Mapping[str, Any],
    random: Callable[[str, Tensor], None],
    model: PreTrainedModel,
) -> Callable[[str, Tensor], None]:
    """Published weights by name of a parameter of `model`; a new head for classes or answers is random.

    The checkpoint stays in host memory, in its stored precision, as long as the blueprint lives. Raises
    `UserError` for one that is not of this model.
    """
    _refuse_other_files(source, shape.head, model)
    loaded_model, info = _loaded(source, config, shape.head, values, model.base_model_prefix)
    new = _new_names(source, shape, model, info)
    loaded = {
        name: parameter.detach()
        for name, parameter in loaded_model.named_parameters(remove_duplicate=False)
        if name not in new
    }

    def fill(name: str, out: Tensor) -> None:
        if name in loaded:
            out.copy_(loaded[name])
        else:
            random(name, out)

    return fill


def _loaded(
    source: ModelSource, config: PretrainedConfig, head: Head, values: Mapping[str, Any], body: str
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The checkpoint as transformers loads it, and what that tells of names. Raises `UserError`."""
    config = copy.deepcopy(config)
    # A head that is to be untied begins as a copy of the embedding: load it tied.
    config.tie_word_embeddings = values.get("tie_word_embeddings", type(config)().tie_word_embeddings)
    try:
        with _quiet_transformers():
            found: tuple[PreTrainedModel, Mapping[str, Any]] = auto_class(head).from_pretrained(
                str(local_folder(source) or source.name),
                config=config,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # `_new_names` looks at them
                key_mapping=_renamed(head, body),
                output_loading_info=True,
            )
    except (*CONFIGURATION_FAILURES, OSError, SafetensorError):
        raise UserError(
            f"model '{source.name}'",
            f"its weights cannot be loaded ({what_is_wrong(source)})",
            "download it again, or convert it to safetensors",
        ) from None
    return found


def _new_names(
    source: ModelSource, shape: ModelShape, model: PreTrainedModel, info: Mapping[str, Any]
) -> set[str]:
    """Of `model`'s parameters those that the checkpoint does not have. Raises `UserError` where these are
    more than a head for classes or answers, or where the checkpoint has what the model has no place for."""
    body = model.base_model_prefix
    _refuse_other_shapes(source, shape.head, body, info["mismatched_keys"])
    refuse_without_place(source, model, sorted(info["unexpected_keys"]))
    new = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
    lost = sorted(
        name
        for name in new
        if shape.predicts_tokens or (name.startswith(f"{body}.") and ".pooler." not in name)
    )
    if lost:
        raise UserError(
            f"model '{source.name}'",
            f"its checkpoint lacks {len(lost)} weights, {lost[0]} first",
            "use a checkpoint of this architecture, or add --random-weights",
        )
    return new


def refuse_without_place(source: ModelSource, model: PreTrainedModel, names: Iterable[str]) -> None:
    """Raises `UserError` if one of `names`, tensors of the checkpoint that `model` has no place for, is of
    its blocks: what config.json leaves out of a model is not what its author trained.

    Others may have no place: heads of other tasks, and what old versions of transformers stored beside.
    """
    body = model.base_model_prefix
    inside = {name for name, _ in getattr(model, body, model).named_children()}
    dropped = model._keys_to_ignore_on_load_unexpected or ()

    def is_of_blocks(name: str) -> bool:
        first, *rest = name.removeprefix(f"{body}.").split(".")
        if first not in inside or not any(part.isdigit() for part in rest):
            return False
        return rest[-1] not in STORED_ONCE and not any(re.search(each, name) for each in dropped)

    lost = [name for name in names if is_of_blocks(name)]
    if lost:
        raise UserError(
            f"model '{source.name}'",
            f"its files hold tensors of blocks that config.json does not make ({len(lost)}, {lost[0]} first)",
            "make config.json tell the blocks of the files",
        )


def _refuse_other_files(source: ModelSource, head: Head, model: PreTrainedModel) -> None:
    """Before transformers makes and initialises all that the files do not fill: with a configuration that
    lost a size that would be the family's default, for minutes and in tens of gigabytes."""
    stored, body = stored_shapes(source), model.base_model_prefix
    if not stored:
        return
    parameters = dict(model.named_parameters())
    others = [
        (name, stored[name], parameter.shape)
        for name, parameter in parameters.items()
        if name in stored and stored[name] != parameter.shape
    ]
    _refuse_other_shapes(source, head, body, others)
    wanted = sum(parameter.numel() for parameter in parameters.values())
    there = sum(math.prod(shape) for shape in stored.values())
    if wanted > 2 * there:
        raise UserError(
            f"model '{source.name}'",
            f"its files hold {there} numbers, and config.json makes a model of {wanted}",
            "make config.json tell the sizes of the file",
        )


def _refuse_other_shapes(source: ModelSource, head: Head, body: str, entries: Iterable[Any]) -> None:
    """`entries`: name, shape in the file and shape of the model. A head for other classes is made anew."""
    for name, stored, wanted in sorted(entries, key=lambda entry: str(entry[0])):
        if head in ("causal_lm", "masked_lm") or (name.startswith(f"{body}.") and ".pooler." not in name):
            raise UserError(
                f"model '{source.name}'",
                f"{name} is {_sizes(stored)} in its file and {_sizes(wanted)} by config.json",
                "make config.json tell the sizes of the file",
            )


def _sizes(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _renamed(head: Head, body: str) -> dict[str, str] | None:
    """Names in a checkpoint that transformers has otherwise: LLaMA's kin call their body `model`, but
    `transformer` where they answer questions, and it would find no weight of theirs."""
    return {r"^model\.": "transformer."} if head == "question_answering" and body == "transformer" else None


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and load reports from transformers: what matters of them is checked here."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
