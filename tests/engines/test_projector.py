"""Sparse projectors against dense formulas, in float64 where that tells."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines.projector import (
    Projector,
    bias,
    compress,
    decompress,
    identity_projector,
    learn,
    learning_gradient,
    random_projector,
    relative_bias,
    transport_moments,
)


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decaying(m: int, n: int) -> Tensor:
    """Singular values 1/i: what a projector can catch."""
    rank = min(m, n)
    u, v = torch.linalg.qr(matrix(m, rank, seed=1))[0], torch.linalg.qr(matrix(n, rank, seed=2))[0]
    return u / torch.arange(1, rank + 1) @ v.T


def dense64(projector: Projector) -> Tensor:
    """The matrix written entry by entry."""
    out = torch.zeros(projector.rows, projector.d, dtype=torch.float64)
    for row in range(projector.rows):
        for place, value in zip(projector.indices[row].tolist(), projector.values[row].tolist(), strict=True):
            out[row, place] += value
    return out


def orthonormal(rows: int, d: int, scale: Tensor) -> Projector:
    """One nonzero in each of the first d rows: columns of norm one."""
    values = torch.zeros(rows, 1)
    values[:d, 0] = scale
    return Projector(indices=(torch.arange(rows) % d).to(torch.int32)[:, None], values=values, d=d)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Projector, Projector]:
    m, n = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    d = draw(st.integers(1, min(m, n)))
    r = draw(st.integers(1, d))
    seed = draw(st.integers(0, 10_000))
    return matrix(m, n, seed=seed), random_projector(m, d, r, seed + 1), random_projector(n, d, r, seed + 2)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_compress_decompress_and_bias_equal_the_dense_formulas(
    problem: tuple[Tensor, Projector, Projector],
) -> None:
    gradient, left, right = problem
    p, q, g = dense64(left), dense64(right), gradient.double()
    core = compress(gradient, left, right)
    assert core.dtype == torch.float32
    torch.testing.assert_close(core.double(), p.T @ g @ q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        decompress(core, left, right).double(), p @ core.double() @ q.T, rtol=1e-5, atol=1e-4
    )
    expected = p @ p.T @ g @ q @ q.T - g
    torch.testing.assert_close(bias(gradient, left, right).double(), expected, rtol=1e-5, atol=1e-3)
    ratio = float(expected.norm() / g.norm())
    assert relative_bias(gradient, left, right) == pytest.approx(ratio, rel=1e-4, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.data())
def test_every_row_has_exactly_r_distinct_places(rows: int, d: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, d))
    projector = random_projector(rows, d, r, seed=data.draw(st.integers(0, 2**63 - 1)))
    assert projector.indices.shape == projector.values.shape == (rows, r)
    for row in projector.indices.tolist():
        assert len(set(row)) == r
        assert min(row) >= 0
        assert max(row) < d
    assert int((projector.dense() != 0).sum()) == int((projector.values != 0).sum())


def test_places_are_uniform_and_values_have_the_papers_spread() -> None:
    rows, d, r = 20_000, 8, 3
    projector = random_projector(rows, d, r, seed=3)
    counts = torch.bincount(projector.indices.flatten().long(), minlength=d)
    expected = rows * r / d
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)
    # All 56 subsets alike: positions that were only uniform one by one would not be.
    subsets = torch.bincount((2 ** projector.indices.long()).sum(1), minlength=256)
    assert int((subsets > 0).sum()) == 56
    assert (subsets[subsets > 0] - rows / 56).abs().max() < 5 * math.sqrt(rows / 56)
    assert float(projector.values.std()) == pytest.approx(1 / math.sqrt(r), rel=0.02)
    assert abs(float(projector.values.mean())) < 0.01


@pytest.mark.parametrize(("d", "r"), [(64, 4), (64, 16), (32, 2)])
def test_the_bias_of_an_unlearned_pair_is_the_one_stated(d: int, r: int) -> None:
    m, n = 128, 192
    found = relative_bias(matrix(m, n), random_projector(m, d, r, 1), random_projector(n, d, r, 2))
    expected = math.sqrt((1 + 2 / r + m / d) * (1 + 2 / r + n / d) - 1)
    assert found == pytest.approx(expected, rel=0.1)


def test_the_same_seed_gives_the_same_projector() -> None:
    first, second, other = (random_projector(30, 10, 4, seed) for seed in (5, 5, 6))
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.values, second.values)
    assert not torch.equal(first.values, other.values)


def test_more_nonzeros_than_places_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot have 5 nonzeros"):
        random_projector(3, 4, 5, seed=0)


def test_identity_changes_nothing() -> None:
    gradient, one = matrix(7, 7), identity_projector(7)
    assert torch.equal(compress(gradient, one, one), gradient)
    assert torch.equal(decompress(gradient, one, one), gradient)
    assert relative_bias(gradient, one, one) == 0.0


@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
def test_bf16_gradients_sum_in_fp32(shape: tuple[int, int]) -> None:
    gradient = matrix(*shape).bfloat16()
    left, right = random_projector(shape[0], 6, 2, 1), random_projector(shape[1], 6, 2, 2)
    core = compress(gradient, left, right)
    assert core.dtype == torch.float32
    exact = dense64(left).T @ gradient.double() @ dense64(right)
    assert float((core.double() - exact).norm() / exact.norm()) < 0.01
    back = decompress(core, left, right, torch.bfloat16)
    assert back.dtype == torch.float32
    exact = dense64(left) @ core.double() @ dense64(right).T
    assert float((back.double() - exact).norm() / exact.norm()) < 0.01


def test_bias_of_a_zero_gradient_is_zero_and_of_nan_is_nan() -> None:
    left, right = random_projector(6, 3, 1, 1), random_projector(5, 3, 1, 2)
    assert relative_bias(torch.zeros(6, 5), left, right) == 0.0
    assert math.isnan(relative_bias(torch.full((6, 5), math.nan), left, right))


def test_unlearned_projectors_have_the_bias_that_theory_gives() -> None:
    gradient, left, right = matrix(96, 64), random_projector(96, 32, 4, 1), random_projector(64, 32, 4, 2)
    expected = math.sqrt((1 + 96 / 32) * (1 + 64 / 32) - 1)
    assert relative_bias(gradient, left, right) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(("m", "n", "d", "r"), [(9, 5, 4, 2), (5, 9, 3, 1), (6, 6, 6, 6)])
def test_learning_gradient_equals_autograd(m: int, n: int, d: int, r: int) -> None:
    beta = 0.05
    gradient = matrix(m, n).double()
    left, right = random_projector(m, d, r, 1), random_projector(n, d, r, 2)
    left, right = (replace(side, values=side.values.double()) for side in (left, right))
    found = learning_gradient(gradient, left, right, beta)

    leaves = [side.values.clone().requires_grad_() for side in (left, right)]
    p, q = (
        torch.zeros(side.rows, d, dtype=torch.float64).scatter(1, side.indices.long(), leaf)
        for side, leaf in zip((left, right), leaves, strict=True)
    )
    loss = (p @ p.T @ gradient @ q @ q.T - gradient).norm() + beta * (p.norm() + q.norm())
    loss.backward()
    torch.testing.assert_close(found.loss, loss.detach())
    torch.testing.assert_close(found.left, leaves[0].grad)
    torch.testing.assert_close(found.right, leaves[1].grad)


class TestLearn:
    def problem(self) -> tuple[Tensor, Projector, Projector]:
        return 1e-4 * decaying(24, 16), random_projector(24, 8, 4, 1), random_projector(16, 8, 4, 2)

    def run(self, alpha: float, steps: int, time_limit_s: float = 1e9, tick_s: float = 0.0):  # type: ignore[no-untyped-def]
        now = iter(range(10_000))
        gradient, left, right = self.problem()
        learned = learn(
            gradient, left, right, alpha=alpha, beta=1e-3, steps=steps, rate=0.1,
            time_limit_s=time_limit_s, clock=lambda: tick_s * next(now),
        )  # fmt: skip
        return gradient, left, right, learned

    def test_lowers_the_bias_and_says_by_how_much(self) -> None:
        gradient, left, right, learned = self.run(alpha=1e-6, steps=100)
        assert learned.bias_before == pytest.approx(relative_bias(gradient, left, right), rel=1e-5)
        assert learned.bias_after == pytest.approx(
            relative_bias(gradient, learned.left, learned.right), rel=1e-4
        )
        assert learned.bias_after < 0.6 < 2.0 < learned.bias_before
        assert (learned.steps, learned.stop) == (100, "steps")
        assert torch.equal(learned.left.indices, left.indices)
        assert not learned.left.values.requires_grad

    def test_stops_at_alpha(self) -> None:
        *_, learned = self.run(alpha=0.9, steps=100)
        assert learned.stop == "alpha"
        assert learned.bias_after <= 0.9
        assert 0 < learned.steps < 100

    def test_stops_when_the_time_is_over(self) -> None:
        *_, learned = self.run(alpha=1e-6, steps=100, time_limit_s=5.0, tick_s=1.0)
        # The clock reads 0 at the start and one more before each step; the fifth reading ends it.
        assert (learned.steps, learned.stop) == (4, "timeout")

    def test_no_steps_leaves_the_pair(self) -> None:
        _, left, _, learned = self.run(alpha=1e-6, steps=0)
        assert torch.equal(learned.left.values, left.values)
        assert (learned.steps, learned.stop) == (0, "steps")

    def test_never_returns_worse_than_it_began(self) -> None:
        gradient, left, right = self.problem()
        learned = learn(
            gradient, left, right, alpha=1e-6, beta=0.0, steps=5, rate=100.0, time_limit_s=1e9,
            clock=lambda: 0.0,
        )  # fmt: skip
        assert learned.bias_after == learned.bias_before
        assert torch.equal(learned.right.values, right.values)


class TestTransport:
    def test_equals_the_formula(self) -> None:
        m, n, d = 11, 9, 5
        lefts = [random_projector(m, d, 2, seed) for seed in (1, 2)]
        rights = [random_projector(n, d, 3, seed) for seed in (3, 4)]
        moment, variance = matrix(d, d), matrix(d, d, seed=5).square()
        found = transport_moments(moment, variance, *lefts, *rights)
        a = dense64(lefts[1]).T @ dense64(lefts[0])
        b = dense64(rights[0]).T @ dense64(rights[1])
        torch.testing.assert_close(found[0].double(), a @ moment.double() @ b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            found[1].double(), (a * a) @ variance.double() @ (b * b), rtol=1e-5, atol=1e-5
        )
        assert bool((found[1] >= 0).all())

    def test_the_same_orthonormal_subspace_leaves_the_moments_unchanged(self) -> None:
        left, right = orthonormal(10, 4, torch.tensor([1.0, -1.0, 1.0, -1.0])), identity_projector(4)
        moment, variance = matrix(4, 4), matrix(4, 4, seed=5).square()
        found = transport_moments(moment, variance, left, left, right, right)
        assert torch.equal(found[0], moment)
        assert torch.equal(found[1], variance)
