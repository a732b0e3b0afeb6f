"""mezo and zo2 on tiny models, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from engines.base import Batch, Context, StepStats, Update
from engines.methods.mezo import Mezo
from engines.methods.zo2 import Zo2
from engines.noise.visits import DeviceUpdateLog, Visit
from engines.settings.checks import Rounding
from engines.settings.zeroth_order import MezoSettings, Noise, Zo2Settings
from engines.shapes import Dtype, Workload
from tiny_models import TinyBlueprint, tiny_blueprint

KNOBS = {"learning_rate": 1e-3, "weight_decay": 0.1, "eps": 1e-3}

Engine = Mezo | Zo2


def context(
    device: str = "cpu", dtype: Dtype = "fp32", steps: int = 100, seed: int = 7, accumulation: int = 1
) -> Context:
    workload = Workload(batch_size=2, seq_len=16, dtype=dtype, accumulation=accumulation)
    return Context(device=device, workload=workload, seed=seed, total_steps=steps)


def make_mezo(
    blueprint: TinyBlueprint,
    where: Context | None = None,
    like: MezoSettings | None = None,
    **knobs: object,
) -> Mezo:
    """With the settings `like`, or `KNOBS`, changed by `knobs`."""
    of = {**(vars(like) if like else KNOBS), **knobs}
    made = Mezo(MezoSettings(**of), where or context())  # type: ignore[arg-type]
    made.setup(blueprint)
    return made


def make_zo2(
    blueprint: TinyBlueprint,
    where: Context | None = None,
    like: MezoSettings | None = None,
    **knobs: object,
) -> Zo2:
    """As `make_mezo`."""
    of = {**(vars(like) if like else KNOBS), **knobs}
    made = Zo2(Zo2Settings(**of), where or context())  # type: ignore[arg-type]
    made.setup(blueprint)
    return made


def shorten_logs(patch: pytest.MonkeyPatch) -> int:
    """Updates that a log holds from now on: fewer than usual, to save time."""
    for module in ("noise.visits", "zeroth_order.deferred_updates"):
        patch.setattr(f"engines.{module}.LOG_CAPACITY", 12)
    return 12


def assert_same_weights(left: Engine, right: Engine) -> None:
    for (name, weight), (other_name, other) in zip(left.weights(), right.weights(), strict=True):
        assert name == other_name
        assert torch.equal(weight, other), name


def assert_same_steps(
    left: Engine, right: Engine, batches: Sequence[Batch], accumulation: int = 1
) -> list[StepStats]:
    """Losses and updates of both engines over `batches`, so many in each step, bit for bit."""
    all_stats = []
    for group in in_groups(batches, accumulation):
        expected, stats = left.step(group), right.step(group)
        assert (stats.loss, stats.updates) == (expected.loss, expected.updates)
        all_stats.append(stats)
    return all_stats


def assert_all_same_steps(first: Engine, others: Sequence[Engine], batches: Sequence[Batch]) -> None:
    """As `assert_same_steps`, of one engine and each of the others; then their weights."""
    for batch in batches:
        expected = first.step([batch])
        for each in others:
            stats = each.step([batch])
            assert (stats.loss, stats.updates) == (expected.loss, expected.updates)
    for each in others:
        assert_same_weights(first, each)


def assert_replays(first: Engine, updates: Sequence[Update], others: Sequence[Engine]) -> None:
    """`updates`, those of `first` so far, make of each of the others, at the start, what it is."""
    for each in others:
        each.replay(updates)
        assert_same_weights(first, each)


def in_groups(batches: Sequence[Batch], size: int) -> list[Sequence[Batch]]:
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def save(made: Engine, folder: Path) -> Path:
    folder.mkdir()
    made.save(folder)
    return folder


def unequal_blueprint() -> TinyBlueprint:
    """Blocks whose MLPs are 32, 5 and 48 wide: unequal in size, and off every alignment."""
    blueprint = tiny_blueprint("opt")
    torch.manual_seed(3)
    for index, width in ((1, 5), (2, 48)):
        for model, device in ((blueprint.reference, "cpu"), (blueprint.model, "meta")):
            layer = model.model.decoder.layers[index]
            layer.fc1 = nn.Linear(16, width, device=device)
            layer.fc2 = nn.Linear(width, 16, device=device)
    return blueprint


def a_visit(
    *updates: tuple[float, float],
    device: torch.device | str = "cpu",
    rounding: Rounding = "stochastic",
    noise: Noise = "gaussian",
) -> Visit:
    """Of updates by (learning rate, projected gradient), with some decay."""
    log = DeviceUpdateLog(torch.device(device))
    for step, (lr, g) in enumerate(updates):
        log.append(Update(step=step, learning_rate=lr, projected_gradient=g, weight_decay=0.1))
    steps = len(updates)
    return Visit(seed=-5, log=log, first=0, last=steps, rounding=rounding, step=steps, eps=1e-3, noise=noise)
