"""Every engine on a model that finds answers in a text, against what it is held to with other heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call
from trained_engines import assert_same_weights
from trained_engines import weights as weights_of

from engines.base import Batch, Context, Evaluation
from engines.methods.lsp import Lsp
from engines.methods.mezo import Mezo
from engines.methods.native import Native
from engines.methods.zo2 import Zo2
from engines.model.evaluation import evaluate_on_device
from engines.noise.philox import NoiseKey, normal
from engines.settings.first_order import NativeSettings
from engines.settings.lsp import LspSettings
from engines.settings.zeroth_order import MezoSettings, Zo2Settings
from engines.shapes import Workload
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

FAMILIES = ["opt", "llama", "gpt2", "roberta", "bert"]
ZEROTH_ORDER = {"learning_rate": 1e-3, "weight_decay": 0.1, "eps": 1e-3}
CONTEXT = Context(
    device="cpu", workload=Workload(batch_size=2, seq_len=16, dtype="fp32"), seed=7, total_steps=6
)


def blueprint_of(family: str) -> TinyBlueprint:
    return tiny_blueprint(family, num_blocks=2, head="question_answering")


def batches_of(family: str, count: int = 6, seed: int = 0) -> list[Batch]:
    return tiny_batches(count, family, seed=seed, head="question_answering")


def ready(kind: Any, settings: Any, family: str) -> Any:
    made = kind(settings, CONTEXT)
    made.setup(blueprint_of(family))
    return made


def evaluated(family: str, weights: dict[str, torch.Tensor], batches: Sequence[Batch]) -> Evaluation:
    """By the model's own forward, its weights replaced."""
    model = copy.deepcopy(blueprint_of(family).reference)
    model.load_state_dict(weights, strict=False)
    return evaluate_on_device(model, batches, "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_native_is_a_plain_loop(family: str) -> None:
    settings = NativeSettings(learning_rate=1e-3, weight_decay=0.1)
    engine = ready(Native, settings, family)
    model = copy.deepcopy(blueprint_of(family).reference).train()
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() >= 2) is decays], "weight_decay": decay}
        for decays, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    for batch in batches_of(family):
        optimizer.zero_grad()
        loss = model(**batch.inputs).loss
        loss.backward()
        optimizer.step()
        assert engine.step([batch]).loss == loss.item()
    assert_same_weights(weights_of(engine), {name: p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize("family", FAMILIES)
def test_lsp_equals_its_twin(family: str) -> None:
    settings = LspSettings(learning_rate=3e-3, d=6, r=2, check_every=3, learn_steps=3, learn_timeout_s=1e9)
    outcomes = []
    for offload in (False, True):
        engine = ready(Lsp, replace(settings, offload=offload), family)
        losses = [engine.step([batch]).loss for batch in batches_of(family)]
        outcomes.append((losses, engine.evaluate(batches_of(family, seed=1)), weights_of(engine)))
        engine.close()
    twin, offloaded = outcomes
    assert offloaded[:2] == twin[:2]
    assert_same_weights(offloaded[2], twin[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_mezo_perturbs_and_updates_as_the_paper_says(family: str) -> None:
    """Losses of the stacked passes agree with the model's own forward to rounding, weights bit for bit."""
    engine = ready(Mezo, MezoSettings(**ZEROTH_ORDER), family)
    model = copy.deepcopy(blueprint_of(family).reference).eval()
    theta = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step, batch in enumerate(batches_of(family)):
        z = {
            name: normal(NoiseKey(seed=7, step=step, tensor=number), weight.numel()).view(weight.shape)
            for number, (name, weight) in enumerate(theta.items())
        }
        losses = []
        for sign in (1, -1):
            moved = {name: weight + sign * 1e-3 * z[name] for name, weight in theta.items()}
            with torch.no_grad():
                losses.append(functional_call(model, moved, kwargs=dict(batch.inputs)).loss.item())
        stats = engine.step([batch])
        assert stats.loss == pytest.approx(sum(losses) / 2, rel=1e-6)
        g = stats.projected_gradient
        assert g == pytest.approx((losses[0] - losses[1]) / 2e-3, abs=2e-3)
        for name, weight in theta.items():
            theta[name] = weight - 1e-3 * (g * z[name] + (0.1 if weight.dim() >= 2 else 0.0) * weight)
    assert_same_weights(weights_of(engine), theta)


@pytest.mark.parametrize("knobs", [{}, {"train": "last:1"}, {"train": "lora"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_zo2_equals_mezo(family: str, knobs: dict[str, Any], tmp_path: Path) -> None:
    """Losses, evaluation and weights, bit for bit, with a resume on the way."""
    mezo = ready(Mezo, MezoSettings(**ZEROTH_ORDER, **knobs), family)
    streamed = ready(Zo2, Zo2Settings(**ZEROTH_ORDER, **knobs, fold_every=2), family)
    held_out = batches_of(family, 3, seed=1)
    batches = batches_of(family)
    for batch in batches[:3]:
        assert streamed.step([batch]).loss == mezo.step([batch]).loss
    assert streamed.evaluate(held_out) == mezo.evaluate(held_out)
    streamed.save(tmp_path)
    resumed = ready(Zo2, Zo2Settings(**ZEROTH_ORDER, **knobs), family)
    resumed.load(tmp_path)
    for batch in batches[3:]:
        expected = mezo.step([batch])
        stats = resumed.step([batch])
        assert (stats.loss, stats.projected_gradient) == (expected.loss, expected.projected_gradient)
    assert_same_weights(weights_of(resumed), weights_of(mezo))


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_evaluation_is_that_of_the_model(family: str) -> None:
    engine = ready(Zo2, Zo2Settings(**ZEROTH_ORDER), family)
    batches = batches_of(family, 4)
    engine.step(batches[:1])
    found, expected = engine.evaluate(batches), evaluated(family, weights_of(engine), batches)
    assert (found.accuracy, found.num_labels) == (expected.accuracy, 8)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
