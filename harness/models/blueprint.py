"""From a job to a model: its parts on the meta device, filled tensor by tensor, written out again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from engines.base import Batch, StoredTensor
from engines.files.checksums import SUMS, check_sums
from engines.model.blocks import first_names
from engines.model.randomness import is_random_setting
from engines.shapes import ModelShape
from harness.models.candidates import candidates_of, let_classify
from harness.models.configs import load_config, local_folder
from harness.models.export import write_model
from harness.models.meta import (
    CONFIGURATION_FAILURES,
    build_on_meta,
    configuration,
    malformed,
)
from harness.models.safetensors_files import names_without_place, read_weights, stored_tensors
from harness.models.tokenizers import TOKENIZER_FILES, load_tokenizer, tokenizer_files
from harness.models.weights import checkpoint_weights, random_weights, refuse_without_place
from harness.records.job import Job, ModelSource


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
        sample: Batch | None = None,
    ) -> None:
        self.shape = shape
        self.sample = sample
        self.model: Any = model
        self.source = source
        self.config: PretrainedConfig = self.model.config
        self.architecture = type(model).__name__
        # Taken now: an engine may take the model apart, and the export needs them whole.
        self.parameter_shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.persistent_buffers = _persistent_buffers_of(model)
        self._first_names = first_names(model)
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
        """Where in its file the tensor of that name is stored as it is; `None` where it is in no file."""
        return self._stored.get(self._first_names[name])

    def release(self) -> None:
        """Let go of the weights that `fill` reads from: a checkpoint is in host memory until then."""
        self._weights = _released


def _released(name: str, out: Tensor) -> None:
    raise RuntimeError(f"the weights of {name} were released")


def make_blueprint(job: Job, shape: ModelShape, sample: Batch | None = None) -> ModelBlueprint:
    """The job's model without its weights.

    Dropout is off, whatever the configuration says: zeroth-order methods compare two passes through one
    function, and methods are compared on the same function. The export has the original values again.
    Raises `UserError` if the configuration or the checkpoint cannot be used.
    """
    source = job.model
    values = load_config(source)
    _check_sums(source)
    config = configuration(values, source, shape.head, shape.num_labels, source.untied)
    if shape.label_names:
        config.id2label = dict(enumerate(shape.label_names))
        config.label2id = {name: index for index, name in enumerate(shape.label_names)}
    try:
        model = build_on_meta(config, shape.head)
    except CONFIGURATION_FAILURES as error:
        raise malformed(source.name, error) from None
    if shape.head == "classification" and model.config.pad_token_id is None:
        # A classifying decoder finds the last token of a sequence by the padding after it. Set after
        # the model was built, so that the embedding does not take it for a row without gradient.
        model.config.pad_token_id = load_tokenizer(source, shape.vocabulary).pad_id
    if job.data.template and shape.predicts_tokens:
        tokenizer = load_tokenizer(source, shape.vocabulary)
        words = candidates_of(job.data.template, job.data.labels, tokenizer, shape.head)
        let_classify(model, words, shape.head)
    random, body = random_weights(model, job.seed), model.base_model_prefix
    stored = None if source.random_weights else stored_tensors(source, model, body)
    if source.random_weights:
        weights = random
    elif stored is not None:
        refuse_without_place(source, model, names_without_place(source, model, body))
        weights = read_weights(stored)
    else:
        weights = checkpoint_weights(source, config, shape, values, random, model)
    return ModelBlueprint(
        shape=shape, model=model, source=source, weights=weights, stored=stored, sample=sample
    )


def _check_sums(source: ModelSource) -> None:
    """Raises `UserError` if weights, configuration or tokenizer are not what the folder's checksums say.

    Our exports have some; other folders need not."""
    folder = None if source.random_weights else local_folder(source)
    if folder is not None:
        wanted = {*TOKENIZER_FILES, "config.json"}
        check_sums(
            folder,
            f"copy the model again, or delete {SUMS} there if it was changed on purpose",
            lambda name: name.endswith((".safetensors", ".safetensors.index.json")) or name in wanted,
        )


def export_model(
    blueprint: ModelBlueprint, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype, folder: Path
) -> None:
    """Write a folder that transformers' `from_pretrained` loads: safetensors, configuration, tokenizer.

    `weights` yields each parameter once by its first name. `folder` appears whole or not at all; it may
    exist if it is empty. Raises `UserError` if it is in use or cannot be written.
    """
    config = copy.deepcopy(blueprint.config)
    original = load_config(blueprint.source)
    _restore_randomness(config, original)
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


def _restore_randomness(config: PretrainedConfig, original: Mapping[str, Any]) -> None:
    """Dropout and its like as the configuration `original` has them, in the ones inside it too."""
    for name, value in original.items():
        inner = getattr(config, name, None)
        if isinstance(value, Mapping) and isinstance(inner, PretrainedConfig):
            _restore_randomness(inner, value)
        elif is_random_setting(name, value) and inner is not None:
            setattr(config, name, value)


def _persistent_buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that a checkpoint has, by name."""
    saved = set(model.state_dict())
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name in saved}
