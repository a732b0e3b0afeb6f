"""The study of projectors: its measures against what is known, its tables against its rows."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from projector_quality import (
    Adam,
    AdamComparison,
    Choice,
    Stage,
    alternated_pair,
    cosine,
    kept,
    make,
    measure,
    optimum,
    order,
    ordered_pair,
    rotated,
    stacked_pair,
)
from projector_tables import tables

from engines.subspace.projector import compress, decompress, random_projector
from engines.subspace.projector_search import bias

FOLDER = Path(__file__).parent / "projectors"


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choice(kind: str, r: int | None, d_share: float = 0.5) -> Choice:
    return Choice(kind=kind, calibration="1", d_share=d_share, r=r)


def test_bias_and_cosine_equal_those_of_the_expanded_gradient() -> None:
    gradient = matrix(24, 16)
    left, right = random_projector(24, 8, 2, 1), random_projector(16, 8, 2, 2)
    found = decompress(compress(gradient, left, right), left, right)
    expected = float(bias(gradient, left, right).norm() / gradient.norm()), cosine(found, gradient)
    assert kept(gradient, (left.dense(), right.dense())) == pytest.approx(expected, rel=1e-4)


def test_one_block_reaches_the_optimum_and_no_kind_beats_it() -> None:
    gradient = matrix(32, 16) @ torch.diag(1.0 / torch.arange(1, 17)) @ matrix(16, 16, seed=1)
    least, most = optimum(gradient, 8)
    assert least == pytest.approx(math.sqrt(1 - most**2), abs=1e-6)
    for kind, r in (
        ("svd", None), ("block", 4), ("block, random", 4), ("one_hot", 1), ("paper, unlearned", 4),
        ("paper, learned", 4),
    ):  # fmt: skip
        left, right = make(choice(kind, r), gradient, seed=0)
        assert left.d == right.d == 8
        found = kept(gradient, (left.dense(), right.dense()))
        if kind == "svd":
            assert found == pytest.approx((least, most), abs=1e-3)
        assert found[0] >= least - 1e-4
        assert found[1] <= most + 1e-4


@pytest.mark.parametrize("name", ["random", "strided", "by norm", "by norm, dealt out", "neighbours"])
def test_an_order_is_a_permutation_and_the_pair_stays_orthonormal(name: str) -> None:
    gradient = matrix(24, 16)
    assert sorted(order(name, gradient, 4).tolist()) == list(range(24))
    for side in ordered_pair(name, gradient, 8, 2):
        torch.testing.assert_close(side.T @ side, torch.eye(8), rtol=0.0, atol=1e-5)


def test_ordering_finds_blocks_that_a_permutation_hides() -> None:
    """Rows of four groups, each of rank one, dealt out in turn: strided blocks are the groups."""
    gradient = torch.cat([matrix(6, 1, seed=k) @ matrix(1, 16, seed=9 + k) for k in range(4)])
    hidden = gradient[torch.arange(24).view(4, 6).T.flatten()]
    assert torch.equal(order("strided", hidden, 4), torch.arange(24).view(6, 4).T.flatten())
    p, _ = ordered_pair("strided", hidden, 4, 1)
    assert float((p @ p.T @ hidden - hidden).norm() / hidden.norm()) < 1e-5


def test_turning_the_basis_leaves_the_subspace() -> None:
    gradient = matrix(24, 16)
    plain = tuple(side.dense() for side in make(choice("block", 4), gradient, seed=0))
    turned = rotated(choice("block", 4), gradient)
    for before, after in zip(plain, turned, strict=True):
        assert not torch.allclose(before, after, atol=0.1)
        torch.testing.assert_close(after @ after.T, before @ before.T, rtol=0.0, atol=1e-5)


def test_several_gradients_stacked_are_one_if_they_are_equal() -> None:
    gradient = matrix(24, 16)
    plain = kept(gradient, tuple(side.dense() for side in make(choice("block", 2), gradient, seed=0)))
    assert kept(gradient, stacked_pair([gradient, gradient], 8, 2)) == pytest.approx(plain, rel=1e-4)
    # One pass after the other can only gain.
    assert kept(gradient, alternated_pair(gradient, 8, 2))[0] <= plain[0] + 1e-5


def test_adam_is_torchs_and_its_core_with_the_identity_is_the_same() -> None:
    weight = torch.zeros(5, 3, requires_grad=True)
    torch_adam, ours = torch.optim.Adam([weight], lr=1.0, eps=1e-12), Adam()
    compared = AdamComparison({"whole": {"w": (torch.eye(5), torch.eye(3))}})
    for step in range(4):
        before = weight.detach().clone()
        weight.grad = matrix(5, 3, seed=step)
        torch_adam.step()
        torch.testing.assert_close(before - weight.detach(), ours.direction(matrix(5, 3, seed=step)))
        compared.feed({"w": matrix(5, 3, seed=step)})
    assert [found[0] for found in compared.found["whole"]] == pytest.approx([1.0] * 4)


def test_a_row_says_what_was_measured_on_which_gradients() -> None:
    given = {"w": matrix(24, 16)}
    stage = Stage(
        source="made up", step=3, loss=1.0, calibration=[given], recent=[],
        judged={"calibration": [given], "other": [{"w": matrix(24, 16, seed=1)}] * 2},
    )  # fmt: skip
    row = measure(stage, choice("block", 4))
    pair = tuple(side.dense() for side in make(choice("block", 4), given["w"], seed=0))
    assert (row["bias_calibration"], row["cosine_calibration"]) == pytest.approx(kept(given["w"], pair))
    assert row["bias_other"] == pytest.approx(kept(matrix(24, 16, seed=1), pair)[0])
    assert row["storage_bytes"] == 2 * 4 * (24 + 16)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_in_the_log_are_those_of_the_numbers(path: Path) -> None:
    log = (Path(__file__).parents[2] / "engines" / "EXPERIMENTS.md").read_text()
    printed = tables(json.loads(path.read_text()))
    for part in printed.split("\n\n"):
        if part.startswith("|"):
            assert part.strip() in log
