"""Each estimator against its paper: unbiased, its steps those of a plain loop, and zo2 as mezo."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from plain_loop import PlainLoop
from torch import Tensor
from zeroth_order_runs import (
    assert_all_same_steps,
    assert_replays,
    assert_same_steps,
    assert_same_weights,
    context,
    in_groups,
    make_mezo,
    make_zo2,
)

from engines.base import Update
from engines.errors import UserError
from engines.noise.philox import NoiseKey, signs
from engines.noise.tiles import one
from engines.noise.visits import DeviceUpdateLog, Outputs, Visit
from engines.noise.weight_pass import visit
from engines.settings.parse import parse_settings
from engines.settings.zeroth_order import MezoSettings
from engines.zeroth_order.estimators import Side, next_updates, probes
from tiny_models import tiny_batches, tiny_blueprint

BASE = MezoSettings(learning_rate=1e-3, weight_decay=0.1, eps=1e-3)
THREE = replace(BASE, queries=3)
FZOO = replace(BASE, estimator="fzoo", queries=4, noise="rademacher", learning_rate=1e-6)
LOZO = replace(BASE, estimator="lozo", queries=2, lozo_window=3, weight_decay=0.0)
CURVED = replace(THREE, estimator="1.5-spsa", noise="rademacher", eps=0.03)
CASES = {
    "1.5-spsa": CURVED,
    "n-spsa": THREE,
    "n-spsa, signs": replace(THREE, noise="rademacher"),
    "fzoo": FZOO,
    "fzoo, decay": replace(FZOO, weight_decay=100.0, queries=2),
}
each_case = pytest.mark.parametrize("settings", CASES.values(), ids=CASES)


# --- the estimate ---------------------------------------------------------------------------------------


class Bowl:
    """A quadratic of 24 weights whose gradient is known: f(w) = 1/2 w^T A w + b^T w."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        root = torch.randn((24, 24), generator=generator, dtype=torch.float64)
        self.a, self._b = root @ root.T / 24, torch.randn(24, generator=generator, dtype=torch.float64)
        self.start = torch.randn(24, generator=generator)

    def __call__(self, w: Tensor) -> float:
        w = w.double()
        return float(w @ self.a @ w / 2 + self._b @ w)

    @property
    def gradient(self) -> Tensor:
        return self.a @ self.start.double() + self._b


def directions(settings: MezoSettings, bowl: Bowl, count: int) -> Iterator[tuple[Tensor, list[float]]]:
    """What steps 0 to `count` - 1 would do to the start, over -lr, as the engines make it; and losses."""
    weight, segment, log = bowl.start, one(5, 24), DeviceUpdateLog(torch.device("cpu"))
    for step in range(count):
        losses = []
        how = Visit(seed=11, log=log, first=log.length, last=log.length, eps=settings.eps,
                    noise=settings.noise)  # fmt: skip
        for probe in probes(settings, step):
            plus, minus = torch.empty_like(weight), torch.empty_like(weight)
            visit(weight, segment, replace(how, step=probe.draw), Outputs(plus=plus, minus=minus))
            of = {Side.PLUS: plus, Side.MINUS: minus, Side.PLAIN: weight}
            losses += [bowl(of[side]) for side in probe.sides]
        first = log.length
        for update in next_updates(step, settings, 10, losses):
            log.append(update)
        out = torch.empty_like(weight)
        visit(weight, segment, replace(how, first=first, last=log.length), Outputs(theta=out))
        yield (weight - out).double() / settings.learning_rate, losses


UNBIASED = {
    "mezo": MezoSettings(learning_rate=1.0),
    "spsa": MezoSettings(learning_rate=1.0, noise="rademacher"),
    "n-spsa": MezoSettings(learning_rate=1.0, queries=3),
}


@cache
def estimates(name: str) -> Tensor:
    """(1500, 24): what so many steps would do from one start."""
    return torch.stack([direction for direction, _ in directions(UNBIASED[name], Bowl(), 1500)])


@pytest.mark.parametrize("name", UNBIASED)
def test_the_mean_of_the_estimates_is_the_gradient(name: str) -> None:
    """Of a quadratic the two-sided slope is exact, so nothing but chance is between them: every coordinate
    lies within 4.5 standard errors (all 24 together fail by chance once in 6000)."""
    bowl, found = Bowl(), estimates(name)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - bowl.gradient).abs() < 4.5 * error + 2e-3).all()


def test_three_queries_have_a_third_of_the_variance() -> None:
    spread = [estimates(name).var(0).sum() for name in ("mezo", "n-spsa")]
    assert float(spread[0] / spread[1]) == pytest.approx(3.0, rel=0.2)


def test_a_slope_is_divided_by_the_power_of_its_curvature() -> None:
    """Of a quadratic the curvature along z is z^T A z, whatever eps; no power of it divides by less than the
    floor; with an alpha of 0 nothing is divided."""
    bowl = Bowl()
    settings = replace(CURVED, learning_rate=1.0, weight_decay=0.0, eps=1e-2, curvature_alpha=0.5)
    (_, losses), *_ = directions(settings, bowl, 1)
    slopes = [update.projected_gradient for update in next_updates(0, THREE, 10, losses[1:])]
    slopes = [slope * THREE.eps / settings.eps for slope in slopes]
    bent = [update.projected_gradient for update in next_updates(0, settings, 10, losses)]
    for query, (slope, found) in enumerate(zip(slopes, bent, strict=True)):
        z = signs(NoiseKey(seed=11, step=query, tensor=5), 24).double()
        assert slope / found == pytest.approx(float(z @ bowl.a @ z) ** 0.5, rel=1e-3)
    for changes, by in (({"curvature_floor": 100.0}, 100.0), ({"curvature_alpha": 0.0}, 1.0)):
        updates = next_updates(0, replace(settings, **changes), 10, losses)
        assert [update.projected_gradient * by for update in updates] == pytest.approx(slopes)


def test_fzoo_before_its_normalisation_is_unbiased_and_its_step_has_one_length() -> None:
    """Times sigma the step is the one-sided estimate, whose bias is of the order of eps. The step itself
    does not grow with the loss: that of 1000 f is that of f."""
    bowl, settings = Bowl(), replace(FZOO, learning_rate=1.0, weight_decay=0.0, eps=1e-4)
    found, losses = zip(*directions(settings, bowl, 1500), strict=True)
    raw = torch.stack([step * statistics.stdev(each[1:]) for step, each in zip(found, losses, strict=True)])
    error = raw.std(0) / math.sqrt(len(raw))
    assert ((raw.mean(0) - bowl.gradient).abs() < 4.5 * error + 5e-3).all()
    for each in losses[:20]:
        ours = next_updates(0, settings, 10, each)
        scaled = next_updates(0, settings, 10, [1000 * loss for loss in each])
        for one_entry, other in zip(ours, scaled, strict=True):
            assert other.projected_gradient == pytest.approx(one_entry.projected_gradient, rel=1e-6)


def test_fzoo_does_not_move_where_all_losses_are_one_number() -> None:
    updates = next_updates(3, FZOO, 10, [2.0, 1.5, 1.5, 1.5, 1.5])
    assert [update.projected_gradient for update in updates] == [0.0] * 4
    assert [update.weight_decay for update in updates] == [0.1, 0.0, 0.0, 0.0]
    assert [update.draw for update in updates] == [12, 13, 14, 15]


@pytest.mark.parametrize(("settings", "passes"), [(BASE, 2), (THREE, 6), (CURVED, 7), (LOZO, 4), (FZOO, 5)])
def test_the_forward_passes_of_the_costs_are_those_that_are_asked_for(
    settings: MezoSettings, passes: int
) -> None:
    asked = probes(settings, 3)
    assert settings.forward_passes == sum(len(probe.sides) for probe in asked) == passes


@pytest.mark.parametrize(("settings", "passes"), [(BASE, 2), (CURVED, 7), (FZOO, 5)])
def test_forward_passes_are_told(settings: MezoSettings, passes: int) -> None:
    made = make_mezo(tiny_blueprint("opt"), like=settings)
    assert made.step(tiny_batches(1, "opt")).forwards == passes


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"queries": 0}, "queries must be between"),
        ({"queries": 65}, "queries must be between"),
        ({"estimator": "fzoo", "noise": "rademacher"}, "queries must be 2 or more"),
        ({"estimator": "fzoo", "queries": 2}, "noise must be rademacher"),
        ({"curvature_floor": 0}, "curvature_floor must be positive"),
        ({"curvature_alpha": 2}, "curvature_alpha must be between"),
        ({"layer_share": 0.5}, "layer_share"),
        ({"fold_every": 9, "queries": 8}, "times queries must be 64 at most"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        parse_settings("zo2", values)


# --- steps ----------------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize(
    ("family", "tied", "knobs"),
    [
        ("opt", True, {"fold_every": 3, "resident_blocks": 1}),
        ("gpt2", False, {}),
        ("roberta", False, {"fold_every": 3, "resident_blocks": 1}),
    ],
    ids=str,
)
def test_zo2_equals_mezo(settings: MezoSettings, family: str, tied: bool, knobs: dict[str, int]) -> None:
    where = context(dtype="bf16")
    mezo = make_mezo(tiny_blueprint(family, tied), where, like=settings)
    streamed = make_zo2(tiny_blueprint(family, tied), where, like=settings, **knobs)
    told = assert_same_steps(mezo, streamed, tiny_batches(5, family))
    held_out = tiny_batches(2, family, seed=5)
    assert streamed.evaluate(held_out) == mezo.evaluate(held_out)
    assert_same_steps(mezo, streamed, tiny_batches(2, family, seed=9))
    assert_same_weights(mezo, streamed)
    streamed_blocks = 3 - knobs.get("resident_blocks", 0)
    block_bytes = 2 * tiny_blueprint(family).shape.block_parameters
    assert {each.h2d_bytes for each in told} == {streamed_blocks * block_bytes}  # once, however many queries
    assert {each.forwards for each in told} == {settings.forward_passes}


@each_case
def test_micro_batches_share_the_noise(settings: MezoSettings) -> None:
    """One step of three micro-batches, the same in both engines; their losses are those of the whole."""
    where = context(accumulation=3)
    mezo, streamed = (make(tiny_blueprint("qwen2"), where, like=settings) for make in (make_mezo, make_zo2))
    groups = in_groups(tiny_batches(9, "qwen2"), 3)
    loop = PlainLoop(settings, tiny_blueprint("qwen2"))
    loop.steps_beside(mezo, groups)
    for group in groups:
        streamed.step(group)
    assert_same_weights(mezo, streamed)
    loop.assert_same_weights(mezo)


@each_case
def test_a_log_is_as_good_as_a_checkpoint(settings: MezoSettings) -> None:
    where = context(dtype="fp16")
    mezo = make_mezo(tiny_blueprint("gpt2", tied=True), where, like=settings)
    updates: list[Update] = []
    for batch in tiny_batches(14, "gpt2"):
        updates += mezo.step([batch]).updates
    replayed, streamed = (
        make(tiny_blueprint("gpt2", tied=True), where, like=settings) for make in (make_mezo, make_zo2)
    )
    assert_replays(mezo, updates, (replayed, streamed))
    assert_all_same_steps(mezo, (replayed, streamed), tiny_batches(3, "gpt2", seed=5))


@pytest.mark.parametrize("settings", [replace(THREE, train="lora"), replace(FZOO, train="lora")], ids=str)
def test_adapters_take_several_queries(settings: MezoSettings) -> None:
    mezo = make_mezo(tiny_blueprint("llama"), like=settings)
    streamed = make_zo2(tiny_blueprint("llama"), like=settings)
    before = {name: tensor.clone() for name, tensor in mezo._model.adapters.tensors.items()}
    assert_same_steps(mezo, streamed, tiny_batches(3, "llama"))
    assert_same_weights(mezo, streamed)
    assert all(not torch.equal(mezo._model.adapters.tensors[name], before[name]) for name in before)


@pytest.mark.gpu
@each_case
@pytest.mark.parametrize("graphs", [True, False])
def test_zo2_equals_mezo_on_the_gpu(
    settings: MezoSettings, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With graphs in one engine and without them in the other, or without them in both."""
    where = context(dtype="bf16", device="cuda:0")
    streamed = (
        make_zo2(tiny_blueprint("opt", num_blocks=5), where, like=settings, fold_every=2) if graphs else None
    )
    monkeypatch.setattr("engines.zeroth_order.perturbed_model.GRAPH_SCRATCH_BYTES", 0)
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=5), where, like=settings)
    streamed = streamed or make_zo2(
        tiny_blueprint("opt", num_blocks=5), where, like=settings, resident_blocks=1
    )
    assert_same_steps(mezo, streamed, tiny_batches(12, "opt"))
    assert_same_weights(mezo, streamed)
    streamed.close()
