"""Tiny random models of the sweep's families, by the product's own way from a configuration to a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from family_configs import DECODERS, config_of
from torch import Tensor, nn

from engines.base import Batch, Context
from engines.model.blocks import materialize
from engines.shapes import Head, ModelShape, Workload
from harness.models.blueprint import ModelBlueprint
from harness.models.counted_shape import shape_from_meta
from harness.models.meta import build_on_meta, configuration
from harness.models.weights import random_weights
from harness.records.job import ModelSource

SEQ_LEN, BATCH_SIZE = 16, 2


def head_of(family: str) -> Head:
    return "causal_lm" if family in DECODERS else "classification"


@dataclass(frozen=True)
class FamilyModel:
    """Makes blueprints of one model, again and again."""

    family: str
    shape: ModelShape
    overrides: tuple[tuple[str, Any], ...] = ()

    def blueprint(self, std: float = 0.2) -> ModelBlueprint:
        head = self.shape.head
        values = {**config_of(self.family), **dict(self.overrides)}
        source = ModelSource(name=self.family, random_weights=True)
        model = build_on_meta(configuration(values, source, head, self.shape.num_labels, False), head)
        if head == "classification" and model.config.pad_token_id is None:
            model.config.pad_token_id = 0
        normal = random_weights(model, 0)

        def fill(name: str, out: Tensor) -> None:
            normal(name, out)
            if out.dim() > 1:
                out.mul_(std / 0.02)

        sample = batches(self.shape, 1)[0]
        return ModelBlueprint(shape=self.shape, model=model, source=source, weights=fill, sample=sample)

    def reference(self) -> nn.Module:
        """The model with its weights on the CPU, in fp32, as transformers would hold it."""
        return materialize(self.blueprint(), "cpu", torch.float32)


def family_model(family: str, **overrides: Any) -> FamilyModel:
    head = head_of(family)
    labels = 0 if head == "causal_lm" else 2
    shape = shape_from_meta({**config_of(family), **overrides}, name=family, head=head, num_labels=labels)
    return FamilyModel(family, shape, tuple(overrides.items()))


def batches(shape: ModelShape, count: int, *, padded: bool = False) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(3, min(300, shape.vocabulary), (BATCH_SIZE, SEQ_LEN), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, SEQ_LEN - 4 :] = 0
            ids[1, SEQ_LEN - 4 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        if shape.head == "causal_lm":
            labels[:, :4] = -100
        else:
            labels = torch.arange(BATCH_SIZE) % 2
        made.append(Batch(inputs={"input_ids": ids, "attention_mask": mask, "labels": labels}))
    return made


def context(total_steps: int = 10, *, checkpointing: bool = True) -> Context:
    workload = Workload(batch_size=BATCH_SIZE, seq_len=SEQ_LEN, dtype="fp32", checkpointing=checkpointing)
    return Context(device="cpu", workload=workload, seed=7, total_steps=total_steps)
