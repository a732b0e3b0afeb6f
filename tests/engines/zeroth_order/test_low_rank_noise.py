"""LOZO against its paper: unbiased, its steps those of a plain loop, and zo2 as mezo."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from zeroth_order_runs import (
    Engine,
    assert_all_same_steps,
    assert_replays,
    assert_same_steps,
    assert_same_weights,
    context,
    in_groups,
    make_mezo,
    make_zo2,
)

from engines.base import Batch, Update
from engines.errors import UserError
from engines.methods.mezo import Mezo
from engines.noise import tiles
from engines.noise.philox import NoiseKey, normal
from engines.settings.parse import parse_settings
from engines.settings.zeroth_order import MezoSettings
from engines.shapes import Dtype
from engines.zeroth_order.low_rank.linear_matrices import is_linear
from engines.zeroth_order.low_rank.low_rank_noise import add_low_rank
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

LOZO = MezoSettings(learning_rate=1e-3, estimator="lozo", lozo_rank=2, lozo_window=3)
CPU = torch.device("cpu")


def low_rank_names(blueprint: TinyBlueprint) -> dict[str, bool]:
    """Matrices of linear layers in the blocks, in order, and whether they are inputs x outputs."""
    return {
        f"{path}.weight": type(module) is not nn.Linear
        for path, module in blueprint.reference.named_modules()
        if is_linear(module) and any(part.isdigit() for part in path.split("."))
    }


def factor(number: int, step: int, rank: int, size: int) -> Tensor:
    return normal(NoiseKey(seed=7, step=step, tensor=number), rank * size).view(rank, size)


def plain_steps(
    given_settings: MezoSettings,
    blueprint: TinyBlueprint,
    groups: Sequence[Sequence[Batch]],
    made: Mezo,
) -> dict[str, Tensor]:
    """The paper's formulas on copies of the parameters in fp64, with whole matrices of noise."""
    model = copy.deepcopy(blueprint.reference).eval()
    theta = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    eps, q, rank = given_settings.eps, given_settings.queries, given_settings.lozo_rank
    low = low_rank_names(blueprint)

    def z_of(step: int, query: int) -> dict[str, Tensor]:
        found = {}
        for number, (name, weight) in enumerate(theta.items()):
            if name in low:
                m, n = reversed(weight.shape) if low[name] else weight.shape
                place = len(theta) + 2 * list(low).index(name)
                u = factor(place, step * q + query, rank, m).double()
                v = factor(place + 1, step // given_settings.lozo_window, rank, n).double()
                found[name] = v.T @ u if low[name] else u.T @ v
            else:
                key = NoiseKey(seed=7, step=step * q + query, tensor=number)
                found[name] = normal(key, weight.numel()).view(weight.shape).double()
        return found

    def loss(z: dict[str, Tensor], by: float, group: Sequence[Batch]) -> float:
        moved = {name: (theta[name] + by * z[name]).float() for name in theta}
        with torch.no_grad():
            each = [functional_call(model, moved, kwargs=dict(b.inputs)).loss.item() for b in group]
        return sum(each) / len(each)

    for step, group in enumerate(groups):
        noises = [z_of(step, query) for query in range(q)]
        pairs = [(loss(z, eps, group), loss(z, -eps, group)) for z in noises]
        stats = made.step(group)
        assert stats.loss == pytest.approx(sum(map(sum, pairs)) / (2 * q), rel=1e-5)
        for z, (plus, minus), update in zip(noises, pairs, stats.updates, strict=True):
            assert update.projected_gradient == pytest.approx((plus - minus) / (2 * eps), abs=3e-3)
            for name in theta:
                share = given_settings.learning_rate * update.projected_gradient / q
                theta[name] = theta[name] - share / (rank if name in low else 1) * z[name]
    return theta


CASES = {
    "one": LOZO,
    "queries": replace(LOZO, queries=2, lozo_window=2),
    "long": replace(LOZO, lozo_window=50, lozo_rank=4),
}
each_case = pytest.mark.parametrize("given_settings", CASES.values(), ids=CASES)


@each_case
@pytest.mark.parametrize(
    ("family", "accumulation"),
    [("opt", 1), ("gpt2", 1), ("llama", 1), ("roberta", 1), ("opt", 2), ("roberta", 2)],
)
def test_equals_a_plain_loop_over_the_paper(
    given_settings: MezoSettings, family: str, accumulation: int
) -> None:
    """Over two windows and a part of a third; weights to rounding, since a matrix's updates are added up
    before they are added to it."""
    blueprint = tiny_blueprint(family)
    made = make_mezo(blueprint, context(accumulation=accumulation), like=given_settings)
    groups = in_groups(tiny_batches(8 * accumulation, family), accumulation)
    start = {name: weight.clone() for name, weight in made.weights()}
    theta = plain_steps(given_settings, blueprint, groups, made)
    for name, weight in made.weights():
        assert torch.allclose(weight.double(), theta[name], atol=3e-7, rtol=1e-6), name
        assert not torch.equal(weight, start[name]), name


@pytest.mark.parametrize("rank", [1, 3])
def test_the_mean_of_the_estimates_is_the_gradient(rank: int) -> None:
    """Of f(W) = <G, W> the slope is exact. Every entry within 4.5 standard errors, over windows of two."""
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn((5, 7), generator=generator).double()
    found = []
    for step in range(4000):
        u, v = factor(3, step, rank, 5).double(), factor(4, step // 2, rank, 7).double()
        z = u.T @ v
        found.append(float((gradient * z).sum()) * z / rank)
    stacked = torch.stack(found)
    windows = stacked.view(2000, 2, 5, 7).mean(1)  # those of one window are not independent
    assert ((windows.mean(0) - gradient).abs() < 4.5 * windows.std(0) / math.sqrt(2000)).all()


@each_case
@pytest.mark.parametrize(
    ("dtype", "family", "tied", "resident_blocks"),
    [
        ("fp32", "opt", True, 1), ("bf16", "opt", True, 1), ("fp32", "gpt2", False, 0),
        ("bf16", "llama", True, 0), ("bf16", "roberta", False, 1),
    ],
)  # fmt: skip
def test_zo2_equals_mezo_and_sends_down_at_the_end_of_windows_only(
    given_settings: MezoSettings, dtype: Dtype, family: str, tied: bool, resident_blocks: int
) -> None:
    where = context(dtype=dtype)
    mezo = make_mezo(tiny_blueprint(family, tied), where, like=given_settings)
    streamed = make_zo2(
        tiny_blueprint(family, tied), where, like=given_settings, resident_blocks=resident_blocks
    )
    told = assert_same_steps(mezo, streamed, tiny_batches(7, family))
    streamed_bytes = (
        (3 - resident_blocks)
        * (4 if dtype == "fp32" else 2)
        * (tiny_blueprint(family).shape.block_parameters)
    )
    window = given_settings.lozo_window
    down = [streamed_bytes if step and step % window == 0 else 0 for step in range(7)]
    assert [each.d2h_bytes for each in told] == down
    assert {each.h2d_bytes for each in told} == {streamed_bytes}
    held_out = tiny_batches(2, family, seed=5)
    assert streamed.evaluate(held_out) == mezo.evaluate(held_out)
    assert_same_steps(mezo, streamed, tiny_batches(4, family, seed=9))
    assert_same_weights(mezo, streamed)


def test_matrices_are_only_read_within_a_window() -> None:
    mezo = make_mezo(tiny_blueprint("opt"), like=replace(LOZO, lozo_window=4))
    low = low_rank_names(tiny_blueprint("opt"))
    stored = mezo.blocks.tensors(0)
    before = {name: stored[name].clone() for name in low}
    batches = tiny_batches(5, "opt")
    for batch in batches[:4]:
        mezo.step([batch])
        assert all(torch.equal(stored[name], before[name]) for name in low)
    mezo.step([batches[4]])
    assert all(not torch.equal(stored[name], before[name]) for name in low)


@pytest.mark.parametrize("train", ["last:1", "last:2"])
def test_only_the_last_blocks(train: str) -> None:
    given_settings = replace(LOZO, train=train)
    mezo, streamed = (make(tiny_blueprint("opt"), like=given_settings) for make in (make_mezo, make_zo2))
    before = {name: weight.clone() for name, weight in mezo.weights()}
    assert_same_steps(mezo, streamed, tiny_batches(7, "opt"))
    assert_same_weights(mezo, streamed)
    first = 3 - int(train[-1])
    moved = {
        int(name.split(".")[3])
        for name, weight in mezo.weights()
        if "layers" in name and not torch.equal(weight, before[name])
    }
    assert moved == set(range(first, 3))


def test_evaluation_changes_nothing() -> None:
    plain, watched = (make_mezo(tiny_blueprint("llama"), like=LOZO) for _ in range(2))
    batches = tiny_batches(8, "llama")
    for batch in batches:
        watched.evaluate(batches[:1])
        list(watched.weights())
        assert plain.step([batch]).loss == watched.step([batch]).loss
    assert_same_weights(plain, watched)


@pytest.mark.parametrize("saved_at", [1, 3, 5, 6])
@pytest.mark.parametrize("make", [make_mezo, make_zo2])
def test_resumes_bit_for_bit_within_a_window_and_at_its_end(
    make: Callable[..., Engine], saved_at: int, tmp_path: Path
) -> None:
    where = context(dtype="bf16")
    straight, first = (make(tiny_blueprint("opt"), where, like=LOZO) for _ in range(2))
    batches = tiny_batches(9, "opt")
    assert_same_steps(straight, first, batches[:saved_at])
    first.save(tmp_path)
    second = make(tiny_blueprint("opt", seed=99), context(dtype="bf16", seed=1), like=LOZO)
    second.load(tmp_path)
    assert_same_steps(straight, second, batches[saved_at:])
    assert_same_weights(straight, second)


@pytest.mark.parametrize("count", [2, 3, 4, 11])
@pytest.mark.parametrize("queries", [1, 2])
def test_a_log_is_as_good_as_a_checkpoint(queries: int, count: int) -> None:
    given_settings, where = replace(LOZO, queries=queries), context(dtype="fp16")
    mezo = make_mezo(tiny_blueprint("gpt2", tied=True), where, like=given_settings)
    updates: list[Update] = []
    for batch in tiny_batches(count, "gpt2"):
        updates += mezo.step([batch]).updates
    others = [
        make(tiny_blueprint("gpt2", tied=True), where, like=given_settings) for make in (make_mezo, make_zo2)
    ]
    assert_replays(mezo, updates, others)
    assert_all_same_steps(mezo, others, tiny_batches(4, "gpt2", seed=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("height", "width", "rank"), [(1, 1, 1), (70, 90, 3), (64, 96, 4), (5, 2048, 2)])
def test_the_kernel_that_folds_gives_the_same_bits(
    dtype: torch.dtype, height: int, width: int, rank: int
) -> None:
    """Stochastic rounding in bf16, where the interpreter truncates what the hardware rounds to nearest."""
    pytest.importorskip("triton")
    from engines.noise import low_rank_kernels

    device = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(height * width, generator=generator) * 0.02).to(dtype)
    rows = torch.randn((rank, height), generator=generator) * 1e-4
    columns = torch.randn((rank, width), generator=generator)
    key = NoiseKey(seed=-5, step=3, tensor=2)
    ours, theirs = weight.clone(), weight.clone().to(device)
    add_low_rank(ours, rows, columns, key, stochastic=True)
    low_rank_kernels.add_low_rank(
        theirs, rows.to(device), columns.to(device), key, stochastic=dtype != torch.float32
    )
    assert torch.equal(ours, theirs.cpu())
    exact = weight.double() + (rows.double().T @ columns.double()).view(-1)
    unit = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert ((ours.double() - exact).abs() <= 2 * unit * exact.abs() + 1e-7).all()


@settings(max_examples=10, deadline=None)
@given(chunk=st.integers(1, 5))
def test_a_fold_does_not_depend_on_its_pieces(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(90 * 70, generator=generator) * 0.02).to(torch.bfloat16)
    rows, columns = (torch.randn((2, size), generator=generator) * 1e-2 for size in (90, 70))
    key = NoiseKey(seed=1, step=3, tensor=2)
    whole, pieces = weight.clone(), weight.clone()
    add_low_rank(whole, rows, columns, key, stochastic=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engines.zeroth_order.low_rank.low_rank_noise.FOLD_CHUNK", chunk * tiles.TILE)
        add_low_rank(pieces, rows, columns, key, stochastic=True)
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"noise": "rademacher"}, "noise must be gaussian"),
        ({"train": "lora"}, "train must be all or last:N"),
        ({"weight_decay": 0.1}, "weight_decay must be 0"),
        ({"lozo_rank": 0}, "lozo_rank must be between"),
        ({"lozo_window": 0}, "lozo_window must be positive"),
        ({"lozo_window": 100, "queries": 2}, "times queries must be 64 at most"),
        ({"fold_every": 2}, "fold_every must be 1"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        parse_settings("zo2", {"estimator": "lozo", **values})


@pytest.mark.gpu
@each_case
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("graphs", [True, False])
def test_zo2_equals_mezo_on_the_gpu(
    given_settings: MezoSettings, dtype: Dtype, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = context(dtype=dtype, device="cuda:0")
    if not graphs:
        monkeypatch.setattr("engines.zeroth_order.perturbed_model.GRAPH_SCRATCH_BYTES", 0)
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=5), where, like=given_settings)
    streamed = make_zo2(tiny_blueprint("opt", num_blocks=5), where, like=given_settings, resident_blocks=1)
    assert_same_steps(mezo, streamed, tiny_batches(11, "opt"))
    assert_same_weights(mezo, streamed)
    streamed.close()
