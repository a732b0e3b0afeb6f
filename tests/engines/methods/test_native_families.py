"""The plain loop, native eager and native compiled on every family of the tests, decoders and encoders.

Eager has the plain loop's bits. Compiled regions round fewer intermediate results: losses within 1e-5,
weights within 1e-4 of themselves or 1e-5, in fp32, after three steps. A family compiles for 10 to 70 s on a
CPU, so the ordinary run has one of each kind of block compiled, and `-m families` the others.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engines.base import Batch, Context
from engines.methods.native import Native
from engines.settings.first_order import NativeSettings
from engines.shapes import Workload
from tiny_families import ENCODERS, FAMILIES, blueprint_of
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

NAMED = ("opt", "llama", "gpt2", "qwen2", "roberta")
"""Of named shapes; the others are families that engines know nothing of."""

EVERY = (*NAMED, *(name for name in FAMILIES if name not in NAMED))
COMPILED = {"opt", "llama", "gpt2", "roberta", "gemma2", "bloom", "mixtral", "mpnet"}
"""In the ordinary run: learned and rotary positions, a third kind of product, an encoder, two kinds of layers
in turn, distances in the scores, experts, a tensor beside the hidden state that is trained."""

Steps = tuple[list[float], dict[str, Tensor]]


def made(family: str) -> TinyBlueprint:
    return tiny_blueprint(family) if family in NAMED else blueprint_of(family)


def batches_of(family: str) -> list[Batch]:
    return tiny_batches(3, "roberta" if family in ENCODERS or family == "roberta" else "opt")


def plain(family: str) -> Steps:
    """As one would write it: the model's own forward pass, torch's AdamW; without dropout, as native is."""
    model: Any = made(family).reference.eval()
    decayed = [[p for p in model.parameters() if (p.dim() >= 2) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed[0], "weight_decay": 0.1}, {"params": decayed[1], "weight_decay": 0.0}],
        lr=1e-3, fused=True,
    )  # fmt: skip
    losses = []
    for batch in batches_of(family):
        optimizer.zero_grad()
        loss = model(**batch.inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def native(family: str, *, compiled: bool, checkpointing: bool) -> tuple[Steps, list[str]]:
    workload = Workload(batch_size=2, seq_len=16, dtype="fp32", checkpointing=checkpointing)
    settings = NativeSettings(learning_rate=1e-3, weight_decay=0.1, compile=compiled)
    engine = Native(settings, Context(device="cpu", workload=workload, seed=7, total_steps=3))
    engine.setup(made(family))
    try:
        losses = [engine.step([batch]).loss for batch in batches_of(family)]
        return (losses, {name: tensor.clone() for name, tensor in engine.weights()}), engine.notes
    finally:
        engine.close()


@pytest.mark.parametrize("family", EVERY)
def test_eager_has_the_bits_of_the_plain_loop(family: str) -> None:
    expected_losses, expected = plain(family)
    (losses, found), _ = native(family, compiled=False, checkpointing=True)
    assert losses == expected_losses
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in COMPILED else pytest.mark.families) for name in EVERY],
)
def test_compiled_is_the_plain_loop_within_a_few_roundings(family: str) -> None:
    expected_losses, expected = plain(family)
    (losses, found), notes = native(family, compiled=True, checkpointing=False)
    assert notes == []
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
