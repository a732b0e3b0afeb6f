"""Models that AdamW has trained in this process, for engines to go on with, and batches to judge them on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from projector_gradients import OTHERS_FROM, Source, Training
from rich.progress import Progress
from torch import Tensor, nn

from engines.base import Batch

HELD_OUT = 16
"""Batches that the loss is taken on."""


def sizes_of(reference: nn.Module) -> Any:
    """What the trial of a model at set-up asks of its shape."""
    config: Any = reference.config
    head = "causal_lm" if "CausalLM" in type(reference).__name__ else "classification"
    return SimpleNamespace(
        hidden=config.hidden_size,
        max_seq_len=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        head=head,
    )


@dataclass
class Trained:
    """A blueprint of a model whose weights are there. See `engines.base.Blueprint`."""

    reference: nn.Module
    model: nn.Module
    shape: Any = None
    sample: Any = None

    @staticmethod
    def of(reference: nn.Module) -> Trained:
        model = copy.deepcopy(reference).to("meta")
        model.tie_weights()  # type: ignore[operator]
        for name, buffer in reference.named_buffers():
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = buffer.clone()
        return Trained(reference, model, sizes_of(reference))

    def fill(self, name: str, out: Tensor) -> None:
        out.copy_(self.reference.get_parameter(name))

    def release(self) -> None:
        """The reference stays for the next engine."""


def train(source: Source, steps: int, progress: Progress) -> None:
    """With AdamW, in place."""
    task = progress.add_task(f"{source.name}: AdamW", total=steps)
    training = Training(source)
    source.model.train(False)
    for _ in range(steps):
        training.step()
        progress.advance(task)
    source.model.zero_grad(set_to_none=True)


def batches(source: Source, first: int, count: int) -> list[Batch]:
    """On the host, with whatever the model takes."""
    made = (source.batch(number) for number in range(first, first + count))
    return [Batch(inputs={name: each.cpu() for name, each in one.items()}) for one in made]


def held_out(source: Source) -> list[Batch]:
    return batches(source, OTHERS_FROM, HELD_OUT)
