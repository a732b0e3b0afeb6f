"""The engine's two losses are those of two plain forward passes, for models of many families."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
)

from engines.base import Batch, Context
from engines.errors import UserError
from engines.methods.mezo import Mezo
from engines.methods.zo2 import Zo2
from engines.noise.philox import NoiseKey, normal
from engines.settings.zeroth_order import MezoSettings, Zo2Settings
from engines.shapes import Workload
from tiny_families import ENCODERS, FAMILIES, blueprint_of
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

EPS = 1e-2


def plain_losses(model: nn.Module, batch: Batch, seed: int) -> list[float]:
    """By the model's own forward, with weights moved by hand."""
    theta = {name: parameter.detach() for name, parameter in model.named_parameters()}
    z = {
        name: normal(NoiseKey(seed=seed, step=0, tensor=number), weight.numel()).view(weight.shape)
        for number, (name, weight) in enumerate(theta.items())
    }
    with torch.no_grad():
        return [
            functional_call(
                model, {name: theta[name] + sign * EPS * z[name] for name in theta}, kwargs=dict(batch.inputs)
            ).loss.item()
            for sign in (1, -1)
        ]


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_losses_are_those_of_plain_forward_passes(family: str, batch_size: int, padded: bool) -> None:
    blueprint = blueprint_of(family)
    (batch,) = tiny_batches(1, "bert" if family in ENCODERS else "opt", batch_size=batch_size)
    if padded:
        batch.inputs["attention_mask"][0, -5:] = 0
    plus, minus = plain_losses(blueprint.reference, batch, seed=7)
    workload = Workload(batch_size=batch_size, seq_len=16, dtype="fp32")
    made = Mezo(
        MezoSettings(learning_rate=0.0, eps=EPS),
        Context(device="cpu", workload=workload, seed=7, total_steps=10),
    )
    made.setup(blueprint)
    stats = made.step([batch])
    assert stats.loss == pytest.approx((plus + minus) / 2, rel=1e-5)
    assert stats.projected_gradient is not None
    assert 2 * EPS * stats.projected_gradient == pytest.approx(plus - minus, abs=1e-5 * plus)


def test_a_layer_called_twice_in_a_block_works_in_memory_and_is_refused_where_blocks_stream() -> None:
    def blueprint() -> TinyBlueprint:
        made = tiny_blueprint("opt")
        for model in (made.model, made.reference):
            for layer in model.model.decoder.layers:
                layer.activation_fn = nn.Sequential(nn.ReLU(), layer.fc2, layer.fc1)
        return made

    (batch,) = tiny_batches(1, "opt")
    where = Context(
        device="cpu", workload=Workload(batch_size=2, seq_len=16, dtype="fp32"), seed=7, total_steps=10
    )
    in_memory = Mezo(MezoSettings(learning_rate=1e-3, eps=EPS), where)
    reference = blueprint().reference
    in_memory.setup(blueprint())
    plus, minus = plain_losses(reference, batch, seed=7)
    assert in_memory.step([batch]).loss == pytest.approx((plus + minus) / 2, rel=1e-5)
    in_memory.step([batch])
    streamed = Zo2(Zo2Settings(eps=EPS), where)
    streamed.setup(blueprint())
    with pytest.raises(UserError, match=r"weights of block 0 twice in one pass; use engine mezo"):
        streamed.step([batch])


def test_two_layers_of_a_block_may_share_a_matrix() -> None:
    def blueprint() -> TinyBlueprint:
        made = tiny_blueprint("opt")
        for model in (made.model, made.reference):
            for layer in model.model.decoder.layers:
                layer.self_attn.q_proj.weight = layer.self_attn.k_proj.weight
        return made

    batches = tiny_batches(4, "opt")
    where = Context(
        device="cpu", workload=Workload(batch_size=2, seq_len=16, dtype="fp32"), seed=7, total_steps=10
    )
    in_memory = Mezo(MezoSettings(learning_rate=1e-3, eps=EPS), where)
    in_memory.setup(blueprint())
    streamed = Zo2(Zo2Settings(learning_rate=1e-3, eps=EPS, fold_every=2), where)
    streamed.setup(blueprint())
    plus, minus = plain_losses(blueprint().reference, batches[0], seed=7)
    for step, batch in enumerate(batches):
        loss = in_memory.step([batch]).loss
        assert streamed.step([batch]).loss == loss
        if step == 0:
            assert loss == pytest.approx((plus + minus) / 2, rel=1e-5)


def test_an_encoder_decoder_is_refused_in_one_line() -> None:
    config = AutoConfig.for_model("t5", d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=64)
    model = AutoModelForSeq2SeqLM.from_config(config).to("meta")
    made = Mezo(
        MezoSettings(),
        Context(device="cpu", workload=Workload(batch_size=1, seq_len=8), seed=0, total_steps=1),
    )
    with pytest.raises(UserError, match="is an encoder-decoder"):
        made.setup(TinyBlueprint(tiny_blueprint("opt").shape, model, model))
