"""The Triton kernels of projectors against torch's operations: on the GPU, else under Triton's
interpreter."""

from __future__ import annotations

import pytest
import torch

from engines.noise import has_triton
from engines.projector import BlockProjector, decompress, random_block_projector
from engines.rounding import dithered, updated

pytestmark = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def pair(m: int, n: int, d: int, r: int) -> tuple[BlockProjector, BlockProjector]:
    return tuple(  # type: ignore[return-value]
        random_block_projector(rows, d, r, seed).cast(torch.float32, DEVICE)
        for seed, rows in enumerate((m, n))
    )


@pytest.mark.parametrize("dither", [False, True])
def test_an_update_is_rounded_as_by_torch(dither: bool) -> None:
    from engines import projector_kernels

    weight, delta = matrix(37, 29), matrix(37, 29, seed=1)
    expected = weight * 0.99 - delta * 1e-2
    if dither:
        expected = dithered(expected, key=12345)
    projector_kernels.plain_update(weight, delta, 1e-2, 0.99, dither, 12345)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize(("m", "n", "d", "r"), [(70, 40, 24, 4), (33, 65, 16, 2), (48, 48, 48, 3)])
def test_an_update_by_blocks_is_that_of_the_expanded_core(m: int, n: int, d: int, r: int) -> None:
    from engines import projector_kernels

    left, right = pair(m, n, d, r)
    core, weight = matrix(d, d, seed=3), matrix(m, n, seed=4)
    expected = weight.clone()
    dense = left.dense() @ core @ right.dense().T
    updated(expected, dense, 0.1, 0.9, "nearest", 0)
    projector_kernels.block_update(weight, core, left.values, right.values, 0.1, 0.9, False, 0)
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=2e-3)  # tensor cores may take tf32


@pytest.mark.parametrize(("rows", "d", "r"), [(70, 24, 4), (33, 16, 2), (48, 48, 3)])
def test_both_maps_are_products_with_the_matrix(rows: int, d: int, r: int) -> None:
    from engines import projector_kernels

    projector, _ = pair(rows, rows, d, r)
    dense, x, y = projector.dense(), matrix(5, rows, seed=1), matrix(5, d, seed=2)
    found = projector_kernels.block_project(x, projector.values, d)
    torch.testing.assert_close(found, x @ dense, rtol=1e-3, atol=2e-3)
    found = projector_kernels.block_lift(y, projector.values, d)
    torch.testing.assert_close(found, y @ dense.T, rtol=1e-3, atol=2e-3)
    core = matrix(d, d, seed=5)
    torch.testing.assert_close(
        decompress(core, projector, projector), dense @ core @ dense.T, rtol=1e-3, atol=2e-3
    )
