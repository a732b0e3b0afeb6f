from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from family_models import batches, context, family_model
from torch import nn

from engines.errors import UserError
from engines.methods.native import Native
from engines.model.randomness import draws_random_numbers, is_random_setting, set_dropout, turn_off_randomness
from engines.settings.first_order import NativeSettings
from tiny_models import tiny_blueprint


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("attention_dropout", 0.1, True),
        ("embd_pdrop", 0.1, True),
        ("seq_classif_dropout", 0.2, True),
        ("layerdrop", 0.0, True),
        ("router_jitter_noise", 0.01, True),
        ("drop_tokens", True, False),
        ("classifier_dropout", None, False),
        ("hidden_size", 1, False),
    ],
)
def test_a_setting_of_randomness_is_known_by_its_name_and_number(
    name: str, value: object, found: bool
) -> None:
    assert is_random_setting(name, value) is found


class DropPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prob = 0.3


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.jitter_noise = 0.1
        self.attention_dropout = 0.2
        self.path = DropPath()
        self.inner = nn.Dropout(0.5)


def test_all_kinds_are_turned_off_and_only_dropout_of_activations_comes_back() -> None:
    model = Router()
    assert draws_random_numbers(model)
    turn_off_randomness(model)
    assert not draws_random_numbers(model)
    set_dropout(model, 0.25)
    assert (model.attention_dropout, model.inner.p) == (0.25, 0.25)
    assert (model.jitter_noise, model.path.prob) == (0.0, 0.0)


def losses(dropout: float, seed: int) -> list[float]:
    engine = Native(NativeSettings(learning_rate=1e-3, dropout=dropout), replace(context(), seed=seed))
    blueprint = tiny_blueprint("opt")
    data = batches(blueprint.shape, 3)
    engine.setup(blueprint)
    return [engine.step([batch]).loss for batch in data]


def test_dropout_is_off_unless_it_is_asked_for_and_follows_the_seed() -> None:
    assert losses(0.0, seed=1) == losses(0.0, seed=2)
    assert losses(0.3, seed=1) != losses(0.0, seed=1)
    assert losses(0.3, seed=1) == losses(0.3, seed=1)
    assert losses(0.3, seed=1) != losses(0.3, seed=2)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_probability_out_of_range(dropout: float) -> None:
    with pytest.raises(ValueError, match="dropout"):
        NativeSettings(dropout=dropout)


def test_a_model_that_draws_all_the_same_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    blueprint = family_model("llama").blueprint()
    layer = blueprint.model.model.layers[0]
    own = layer.forward

    def shaken(hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        noise = torch.rand_like(hidden) if layer.training else 0
        return own(hidden, *args, **kwargs) + noise

    monkeypatch.setattr(layer, "forward", shaken)
    engine = Native(NativeSettings(), context())
    with pytest.raises(UserError, match="draws random numbers in training") as caught:
        engine.setup(blueprint)
    assert len(str(caught.value)) < 200
