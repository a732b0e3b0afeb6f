"""Sparse projectors against dense formulas, in float64 where that tells."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from identity_projector import identity_projector
from torch import Tensor

from engines.subspace.projector import (
    BlockProjector,
    Projector,
    SparseProjector,
    block_rows,
    compress,
    decompress,
    one_hot_projector,
    random_block_projector,
    random_projector,
    transport_moments,
)
from engines.subspace.projector_search import bias, block_pair, learn, learning_gradient, relative_bias

Maker = Callable[[int, int, int, int], Projector]
"""rows, d, r, seed."""

MAKERS: dict[str, Maker] = {
    "block": random_block_projector,
    "one_hot": lambda rows, d, r, seed: one_hot_projector(rows, d, seed),
    "paper": random_projector,
}


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decaying(m: int, n: int) -> Tensor:
    """Singular values 1/i: what a projector can catch."""
    rank = min(m, n)
    u, v = torch.linalg.qr(matrix(m, rank, seed=1))[0], torch.linalg.qr(matrix(n, rank, seed=2))[0]
    return u / torch.arange(1, rank + 1) @ v.T


def dense64(projector: Projector) -> Tensor:
    """The matrix written entry by entry, from the definition of its kind."""
    out = torch.zeros(projector.rows, projector.d, dtype=torch.float64)
    tensors = projector.tensors()
    for row in range(projector.rows):
        for number, value in enumerate(tensors["values"][row].tolist()):
            if "indices" in tensors:
                place = int(tensors["indices"][row, number])
            else:
                blocks = projector.d // projector.r
                block = max(k for k in range(blocks) if math.ceil(k * projector.rows / blocks) <= row)
                place = block * projector.r + number
            out[row, place] += value
    return out


def assert_orthonormal(projector: Projector) -> None:
    dense = dense64(projector)
    torch.testing.assert_close(
        dense.T @ dense, torch.eye(projector.d, dtype=torch.float64), rtol=0.0, atol=2e-6
    )


@st.composite
def sides(draw: st.DrawFn, kind: str) -> Projector:
    """A projector of any size; where d / r does not divide the rows, blocks are uneven."""
    r = draw(st.integers(1, 4))
    d = r * draw(st.integers(1, 5))
    rows = draw(st.integers(d, 40))
    return MAKERS[kind](rows, d, r, draw(st.integers(0, 10_000)))


@st.composite
def problems(draw: st.DrawFn, kind: str) -> tuple[Tensor, Projector, Projector]:
    r = draw(st.integers(1, 4))
    d = r * draw(st.integers(1, 4))
    m, n = draw(st.integers(d, 33)), draw(st.integers(d, 33))
    seed = draw(st.integers(0, 10_000))
    return matrix(m, n, seed=seed), MAKERS[kind](m, d, r, seed + 1), MAKERS[kind](n, d, r, seed + 2)


@pytest.mark.parametrize("kind", MAKERS)
class TestEveryKind:
    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def test_project_and_lift_are_products_with_the_matrix(self, kind: str, data: st.DataObject) -> None:
        projector = data.draw(sides(kind))
        t = data.draw(st.integers(1, 6))
        dense = dense64(projector)
        down, up = matrix(t, projector.rows), matrix(t, projector.d, seed=1)
        torch.testing.assert_close(projector.dense(torch.float64), dense, rtol=0.0, atol=0.0)
        # A transposed view as well: that is what `compress` hands over.
        for x in (down, down.T.contiguous().T):
            found = projector.project(x)
            assert found.shape == (t, projector.d)
            torch.testing.assert_close(found.double(), x.double() @ dense, rtol=1e-5, atol=1e-5)
        for x in (up, up.T.contiguous().T):
            found = projector.lift(x)
            assert found.shape == (t, projector.rows)
            torch.testing.assert_close(found.double(), x.double() @ dense.T, rtol=1e-5, atol=1e-5)

    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def test_compress_decompress_and_bias_equal_the_dense_formulas(
        self, kind: str, data: st.DataObject
    ) -> None:
        gradient, left, right = data.draw(problems(kind))
        p, q, g = dense64(left), dense64(right), gradient.double()
        core = compress(gradient, left, right)
        torch.testing.assert_close(core.double(), p.T @ g @ q, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            decompress(core, left, right).double(), p @ core.double() @ q.T, rtol=1e-5, atol=1e-3
        )
        expected = p @ p.T @ g @ q @ q.T - g
        torch.testing.assert_close(bias(gradient, left, right).double(), expected, rtol=1e-4, atol=1e-3)
        ratio = float(expected.norm() / g.norm())
        assert relative_bias(gradient, left, right) == pytest.approx(ratio, rel=1e-4, abs=1e-5)

    def test_the_same_seed_gives_the_same_projector(self, kind: str) -> None:
        first, second, other = (MAKERS[kind](30, 8, 4, seed) for seed in (5, 5, 6))
        assert torch.equal(first.dense(), second.dense())
        assert not torch.equal(first.dense(), other.dense())

    def test_assign_makes_the_other_projector_at_the_same_place(self, kind: str) -> None:
        projector, other = MAKERS[kind](23, 8, 4, 1), MAKERS[kind](23, 8, 4, 2)
        # All tensors, also those that only speed up the products: a captured graph reads these too.
        held = [value for value in vars(projector).values() if isinstance(value, Tensor)]
        places = [each.data_ptr() for each in held]
        projector.assign(other.tensors())
        now = [value for value in vars(projector).values() if isinstance(value, Tensor)]
        assert [each.data_ptr() for each in now] == places
        assert all(map(torch.equal, now, (v for v in vars(other).values() if isinstance(v, Tensor))))
        x, y = matrix(3, 23), matrix(3, 8)
        assert torch.equal(projector.project(x), other.project(x))
        assert torch.equal(projector.lift(y), other.lift(y))

    def test_assign_rounds_to_the_dtype_held(self, kind: str) -> None:
        projector = MAKERS[kind](23, 8, 4, 1).cast(torch.bfloat16)
        other = MAKERS[kind](23, 8, 4, 2)
        projector.assign(other.tensors())
        assert projector.tensors()["values"].dtype == torch.bfloat16
        assert torch.equal(projector.dense(), other.cast(torch.bfloat16).dense())

    def test_cast_rounds_values_and_leaves_the_rest(self, kind: str) -> None:
        projector = MAKERS[kind](23, 8, 4, 1)
        half = projector.cast(torch.bfloat16)
        assert half.tensors()["values"].dtype == torch.bfloat16
        assert torch.equal(half.dense(), projector.dense().bfloat16().float())
        assert (half.rows, half.d, half.r) == (projector.rows, projector.d, projector.r)
        assert torch.equal(half.cast(torch.float32).dense(), half.dense())

    def test_sums_of_bf16_are_in_fp32(self, kind: str) -> None:
        """A column of P with 512 nonzeros: bf16 sums would stop growing at 256 equal terms."""
        projector = MAKERS[kind](2048, 4, 1, 1).cast(torch.bfloat16)
        sign = projector.dense().sum(1).sign()
        x = sign.repeat(3, 1).bfloat16()
        found = projector.project(x)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), x.double() @ dense64(projector), rtol=2**-8, atol=1e-6)
        back = projector.lift(found)
        assert back.dtype == torch.bfloat16
        torch.testing.assert_close(
            back.double(), found.double() @ dense64(projector).T, rtol=2**-8, atol=1e-6
        )

    @pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
    def test_bf16_gradients_lose_no_more_than_their_rounding(self, kind: str, shape: tuple[int, int]) -> None:
        gradient = matrix(*shape).bfloat16()
        left, right = (MAKERS[kind](rows, 6, 2, seed).cast(torch.bfloat16) for seed, rows in enumerate(shape))
        core = compress(gradient, left, right)
        assert core.dtype == torch.bfloat16
        exact = dense64(left).T @ gradient.double() @ dense64(right)
        assert float((core.double() - exact).norm() / exact.norm()) < 0.01
        back = decompress(core.contiguous(), left, right)
        assert back.dtype == torch.bfloat16
        exact = dense64(left) @ core.double() @ dense64(right).T
        assert float((back.double() - exact).norm() / exact.norm()) < 0.01


class TestPaper:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 40), st.integers(1, 20), st.data())
    def test_every_row_has_exactly_r_distinct_places(self, rows: int, d: int, data: st.DataObject) -> None:
        r = data.draw(st.integers(1, d))
        projector = random_projector(rows, d, r, seed=data.draw(st.integers(0, 2**63 - 1)))
        assert projector.indices.shape == projector.values.shape == (rows, r)
        for row in projector.indices.tolist():
            assert sorted(set(row)) == row
            assert min(row) >= 0
            assert max(row) < d
        assert int((projector.dense() != 0).sum()) == int((projector.values != 0).sum())

    def test_places_are_uniform_and_values_have_the_papers_spread(self) -> None:
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
    def test_the_bias_of_an_unlearned_pair_is_the_one_stated(self, d: int, r: int) -> None:
        m, n = 128, 192
        found = relative_bias(matrix(m, n), random_projector(m, d, r, 1), random_projector(n, d, r, 2))
        expected = math.sqrt((1 + 2 / r + m / d) * (1 + 2 / r + n / d) - 1)
        assert found == pytest.approx(expected, rel=0.1)

    def test_columns_without_a_nonzero_are_zero(self) -> None:
        projector = random_projector(2, 16, 1, seed=0)
        found = projector.project(matrix(3, 2))
        assert int((found != 0).any(0).sum()) == int((projector.dense() != 0).any(0).sum()) <= 2

    def test_more_nonzeros_than_places_are_refused(self) -> None:
        with pytest.raises(ValueError, match="cannot have 5 nonzeros"):
            random_projector(3, 4, 5, seed=0)


class TestOneHot:
    @settings(max_examples=50, deadline=None)
    @given(sides("one_hot"))
    def test_columns_are_orthonormal_and_places_shared_out_evenly(self, projector: SparseProjector) -> None:
        assert_orthonormal(projector)
        counts = torch.bincount(projector.indices.flatten().long(), minlength=projector.d)
        assert int(counts.max() - counts.min()) <= 1

    @pytest.mark.parametrize("d", [32, 64, 96])
    def test_the_bias_is_the_one_stated(self, d: int) -> None:
        m, n = 128, 192
        found = relative_bias(matrix(m, n), one_hot_projector(m, d, 1), one_hot_projector(n, d, 2))
        assert found == pytest.approx(math.sqrt(1 - d * d / (m * n)), abs=0.02)

    def test_both_signs_are_equally_likely(self) -> None:
        signs = one_hot_projector(10_000, 100, seed=4).values.sign()
        assert abs(float(signs.mean())) < 5 / math.sqrt(10_000)


class TestBlock:
    @settings(max_examples=50, deadline=None)
    @given(sides("block"))
    def test_random_columns_are_orthonormal(self, projector: BlockProjector) -> None:
        assert_orthonormal(projector)

    @settings(max_examples=50, deadline=None)
    @given(problems("block"))
    def test_closed_form_columns_are_orthonormal(self, problem: tuple[Tensor, Projector, Projector]) -> None:
        gradient, left, _ = problem
        for side in block_pair(gradient, left.d, left.r):
            assert_orthonormal(side)

    @pytest.mark.parametrize("size", [0.0, 1e-30, 1e-5, 1e12])
    def test_padding_never_leaks_whatever_the_gradients_size(self, size: float) -> None:
        """Blocks of 5 and 4 rows, 4 columns each: the shorter ones would take a fifth, empty row."""
        flat = size * torch.outer(matrix(31), matrix(19, seed=1))
        for gradient in (flat, size * matrix(31, 19)):
            for side in block_pair(gradient, d=16, r=4):
                assert_orthonormal(side)

    @pytest.mark.parametrize("size", [1e-30, 1e-5, 1.0, 1e12])
    def test_the_subspace_does_not_depend_on_the_gradients_size(self, size: float) -> None:
        gradient = decaying(31, 23)
        expected = relative_bias(gradient, *block_pair(gradient, 8, 4))
        pair = block_pair(size * gradient, 8, 4)
        assert relative_bias(gradient, *pair) == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("r", [1, 2, 4])
    def test_random_blocks_keep_less_on_one_side(self, r: int) -> None:
        """Of noise, where the least is to be gained. Over 16 blocks: a single one may converge badly."""
        gradient, identity = matrix(160, 80), identity_projector(80)
        closed, _ = block_pair(gradient, 16 * r, r)
        best = relative_bias(gradient, closed, identity)
        for seed in range(50):
            other = random_block_projector(160, 16 * r, r, seed)
            assert best < relative_bias(gradient, other, identity)

    @pytest.mark.parametrize(("m", "n", "d"), [(24, 16, 8), (16, 24, 16), (17, 31, 5)])
    def test_one_block_is_the_truncated_svd(self, m: int, n: int, d: int) -> None:
        gradient = decaying(m, n)
        singular = torch.linalg.svdvals(gradient.double())
        optimum = float(singular[:d].square().sum() / singular.square().sum())
        kept = 1 - relative_bias(gradient, *block_pair(gradient, d, d)) ** 2
        assert 0.998 * optimum <= kept <= optimum + 1e-5

    def test_a_gradient_of_that_form_is_kept_whole(self) -> None:
        left, right = random_block_projector(29, 6, 3, 1), random_block_projector(22, 6, 3, 2)
        gradient = decompress(matrix(6, 6), left, right)
        assert relative_bias(gradient, *block_pair(gradient, 6, 3)) < 1e-5

    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 60), st.data())
    def test_blocks_share_the_rows_out_evenly_and_in_order(self, rows: int, data: st.DataObject) -> None:
        blocks = data.draw(st.integers(1, rows))
        places = block_rows(rows, blocks)
        assert places[places >= 0].tolist() == list(range(rows))
        sizes = (places >= 0).sum(1)
        assert int(sizes.max() - sizes.min()) <= 1
        assert places.shape == (blocks, int(sizes.max()))

    @pytest.mark.parametrize(("rows", "d", "r"), [(9, 5, 2), (4, 8, 4), (9, 3, 5), (9, 4, 0)])
    def test_impossible_sizes_are_refused(self, rows: int, d: int, r: int) -> None:
        for make in (
            lambda: random_block_projector(rows, d, r, seed=0),
            lambda: block_pair(matrix(rows, rows), d, r),
            lambda: BlockProjector(torch.zeros(rows, r), d),
        ):
            with pytest.raises(ValueError, match=f"no {rows} x {d} projector of blocks {r} columns wide"):
                make()


def test_identity_changes_nothing() -> None:
    gradient, one = matrix(7, 7), identity_projector(7)
    assert torch.equal(compress(gradient, one, one), gradient)
    assert torch.equal(decompress(gradient, one, one), gradient)
    assert relative_bias(gradient, one, one) == 0.0


def test_bias_of_a_zero_gradient_is_zero_and_of_nan_is_nan() -> None:
    left, right = random_projector(6, 3, 1, 1), random_projector(5, 3, 1, 2)
    assert relative_bias(torch.zeros(6, 5), left, right) == 0.0
    assert math.isnan(relative_bias(torch.full((6, 5), math.nan), left, right))


@pytest.mark.parametrize(("m", "n", "d", "r"), [(9, 5, 4, 2), (5, 9, 3, 1), (6, 6, 6, 6)])
def test_learning_gradient_equals_autograd(m: int, n: int, d: int, r: int) -> None:
    beta = 0.05
    gradient = matrix(m, n).double()
    left, right = random_projector(m, d, r, 1), random_projector(n, d, r, 2)
    left, right = (side.cast(torch.float64) for side in (left, right))
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
    def problem(self) -> tuple[Tensor, SparseProjector, SparseProjector]:
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
    @pytest.mark.parametrize("kind", ["block", "one_hot"])
    def test_the_same_orthonormal_subspace_leaves_the_moments_unchanged(self, kind: str) -> None:
        left, right = MAKERS[kind](14, 6, 3, 1), MAKERS[kind](9, 6, 3, 2)
        moment, variance = matrix(6, 6), matrix(6, 6, seed=5).square()
        found = transport_moments(moment, variance, left, left, right, right)
        torch.testing.assert_close(found[0], moment, rtol=0.0, atol=1e-5)
        torch.testing.assert_close(found[1], variance, rtol=0.0, atol=1e-5)

    @pytest.mark.parametrize("kind", MAKERS)
    def test_every_kind_equals_the_formula(self, kind: str) -> None:
        lefts = [MAKERS[kind](14, 6, 3, seed) for seed in (1, 2)]
        rights = [MAKERS[kind](9, 6, 3, seed) for seed in (3, 4)]
        moment, variance = matrix(6, 6), matrix(6, 6, seed=5).square()
        found = transport_moments(moment, variance, *lefts, *rights)
        a = dense64(lefts[1]).T @ dense64(lefts[0])
        b = dense64(rights[0]).T @ dense64(rights[1])
        torch.testing.assert_close(found[0].double(), a @ moment.double() @ b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            found[1].double(), (a * a) @ variance.double() @ (b * b), rtol=1e-4, atol=1e-4
        )
        assert bool((found[1] >= 0).all())
