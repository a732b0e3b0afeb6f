"""Where a model draws random numbers in training, by one rule for all families: dropout, router jitter.

A place of randomness is a number above 0 and up to 1 that a module or a configuration has under a name with
`drop` or `jitter` in it (`attention_dropout`, `embd_pdrop`, `layerdrop`, `drop_path_rate`,
`router_jitter_noise`), or that a module of a class with `Drop` in its name has as `p`, `prob` or
`rate`. So functional dropout is found as well as `nn.Dropout`. What a rule of names could miss, two forward
passes that ought to be equal show at set-up: `engines.model.model_check`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_RANDOM = re.compile(r"drop|jitter")
_OWN_NAMES = ("p", "prob", "probability", "rate")
_OF_WHOLE_LAYERS_OR_ROUTERS = re.compile(r"layer_?drop|drop_?path|path_?drop|jitter|stochastic")


def is_random_setting(name: str, value: object) -> bool:
    """Whether a configuration's value says that something is dropped or shaken at random."""
    return isinstance(value, float | int) and not isinstance(value, bool) and bool(_RANDOM.search(name))


@dataclass(frozen=True, slots=True)
class _Place:
    """A number that says how often something is dropped."""

    owner: Any
    name: str
    of_activations: bool
    """Dropout proper; else whole layers or paths, or noise on a router."""

    @property
    def value(self) -> float:
        return float(vars(self.owner)[self.name])

    def set(self, value: float) -> None:
        setattr(self.owner, self.name, value)


def _places(model: nn.Module) -> Iterator[_Place]:
    configs: dict[int, Any] = {}
    for module in model.modules():
        drops = "Drop" in type(module).__name__
        whole = drops and bool(_OF_WHOLE_LAYERS_OR_ROUTERS.search(type(module).__name__.lower()))
        for name, value in vars(module).items():
            if hasattr(value, "to_dict"):
                _collect(value, configs)
            elif (
                is_random_setting("drop" if drops and name in _OWN_NAMES else name, value) and 0 <= value <= 1
            ):
                of_layers = whole or bool(_OF_WHOLE_LAYERS_OR_ROUTERS.search(name))
                yield _Place(module, name, not of_layers)
    for config in configs.values():
        for name, value in vars(config).items():
            if is_random_setting(name, value) and 0 <= value <= 1:
                yield _Place(config, name, not _OF_WHOLE_LAYERS_OR_ROUTERS.search(name))


def _collect(config: Any, into: dict[int, Any]) -> None:
    """A configuration and those inside it."""
    if id(config) in into:
        return
    into[id(config)] = config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            _collect(value, into)


def draws_random_numbers(model: nn.Module) -> bool:
    """Whether a place of the model, in training, drops or shakes anything."""
    return any(place.value > 0 for place in _places(model))


def turn_off_randomness(model: nn.Module) -> None:
    """No dropout of any kind and no jitter, in the modules of `model` and in its configurations."""
    for place in list(_places(model)):
        if place.value > 0:
            place.set(0.0)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Every dropout of activations or attention weights that the model has drops with this `probability`,
    from 0 to below 1. Layers, paths and routers stay as they are."""
    for place in list(_places(model)):
        if place.of_activations:
            place.set(probability)
