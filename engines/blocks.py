"""A Hugging Face model seen as an embedding, a row of like blocks, and a head.

No model code is copied: blocks are found on the model, and its own forward does the rest.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from engines.base import Batch, Blueprint, Evaluation, UserError

TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and module of the model's row of blocks: its longest `ModuleList` of one class.

    Raises `UserError` for a model without one, and for an encoder-decoder, which has two.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(
            type(model).__name__,
            "is an encoder-decoder, which has two rows of blocks",
            "use a decoder or an encoder",
        )
    best: tuple[str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if len({type(block) for block in module}) == 1 and (best is None or len(module) > len(best[1])):
            best = (path, module)
    if best is None:
        raise UserError(
            type(model).__name__, "has no row of like blocks", "use a transformer decoder or encoder"
        )
    return best


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace the parameter of that dotted name, in this place only."""
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path).register_parameter(leaf, parameter)


def materialize(blueprint: Blueprint, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """The blueprint's model with every weight on `device`; a tied tensor stays one tensor."""
    model = blueprint.model
    made: dict[int, nn.Parameter] = {}
    places = list(model.named_parameters(remove_duplicate=False))
    for name, old in places:
        if id(old) not in made:
            out = torch.empty(old.shape, device=device, dtype=dtype)
            blueprint.fill(name, out)
            made[id(old)] = nn.Parameter(out)
        set_parameter(model, name, made[id(old)])
    move_buffers(model, device)
    return model


def move_buffers(model: nn.Module, device: torch.device | str) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def to_device(batch: Batch, device: torch.device | str) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.inputs.items()}


def count_correct(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """(correct, labelled): positions where the largest logit is the label.

    `logits` (batch, seq, vocabulary) predict the next position's label; (batch, classes) their own.
    """
    if logits.dim() == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != -100
    correct = (logits.argmax(-1) == labels) & kept
    return int(correct.sum()), int(kept.sum())


class EvaluationSum:
    """Adds up batches to an `Evaluation`; each batch weighs as many labels as it has."""

    def __init__(self) -> None:
        self._loss = 0.0
        self._correct = 0
        self._labels = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        correct, labelled = count_correct(logits, labels)
        self._loss += float(loss) * labelled
        self._correct += correct
        self._labels += labelled

    def result(self) -> Evaluation:
        """Raises `UserError` if nothing was labelled."""
        if self._labels == 0:
            raise UserError("evaluation", "the data has no labelled position", "give a data set with labels")
        return Evaluation(
            loss=self._loss / self._labels, accuracy=self._correct / self._labels, num_labels=self._labels
        )


def evaluate_on_device(model: nn.Module, batches: Iterable[Batch], device: torch.device | str) -> Evaluation:
    """Evaluation of a model whose weights are all on `device`. Restores the training mode."""
    was_training = model.training
    model.eval()
    total = EvaluationSum()
    with torch.no_grad():
        for batch in batches:
            inputs = to_device(batch, device)
            output = model(**inputs)
            total.add(output.loss, output.logits, inputs["labels"])
    model.train(was_training)
    return total.result()
