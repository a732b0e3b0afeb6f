"""mezo and zo2 on tiny models, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from engines.base import Batch, Context, Dtype, StepStats, Workload
from engines.mezo import Mezo
from engines.settings import MezoSettings, Zo2Settings
from engines.zo2 import Zo2
from tiny_models import TinyBlueprint

KNOBS = {"learning_rate": 1e-3, "weight_decay": 0.1, "eps": 1e-3}


def context(device: str = "cpu", dtype: Dtype = "fp32", steps: int = 100, seed: int = 7) -> Context:
    workload = Workload(batch_size=2, seq_len=16, dtype=dtype)
    return Context(device=device, workload=workload, seed=seed, total_steps=steps)


def make_mezo(blueprint: TinyBlueprint, where: Context | None = None, **knobs: object) -> Mezo:
    made = Mezo(MezoSettings(**{**KNOBS, **knobs}), where or context())  # type: ignore[arg-type]
    made.setup(blueprint)
    return made


def make_zo2(blueprint: TinyBlueprint, where: Context | None = None, **knobs: object) -> Zo2:
    made = Zo2(Zo2Settings(**{**KNOBS, **knobs}), where or context())  # type: ignore[arg-type]
    made.setup(blueprint)
    return made


def assert_same_weights(left: Mezo | Zo2, right: Mezo | Zo2) -> None:
    for (name, weight), (other_name, other) in zip(left.weights(), right.weights(), strict=True):
        assert name == other_name
        assert torch.equal(weight, other), name


def assert_same_steps(mezo: Mezo, zo2: Zo2, batches: Sequence[Batch]) -> list[StepStats]:
    """Losses and projected gradients of both engines over `batches`, bit for bit."""
    all_stats = []
    for batch in batches:
        expected, stats = mezo.step([batch]), zo2.step([batch])
        assert stats.loss == expected.loss
        assert stats.projected_gradient == expected.projected_gradient
        all_stats.append(stats)
    return all_stats


def save(made: Mezo | Zo2, folder: Path) -> Path:
    folder.mkdir()
    made.save(folder)
    return folder
