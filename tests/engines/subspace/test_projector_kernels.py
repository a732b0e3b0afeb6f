"""The Triton kernels of projectors against torch's operations: on the GPU, else under Triton's
interpreter."""

from __future__ import annotations

import pytest
import torch

from engines.kernels.triton_launch import has_triton
from engines.noise.stochastic_rounding import dithered, updated
from engines.subspace.apply import kernel_numbers
from engines.subspace.projector import BlockProjector, decompress, random_block_projector

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
    from engines.subspace import projector_kernels

    weight, delta = matrix(37, 29), matrix(37, 29, seed=1)
    expected = weight * 0.99 - delta * 1e-2
    if dither:
        expected = dithered(expected, key=12345)
    projector_kernels.plain_update(weight, delta, 1e-2, 0.99, 12345, dither=dither)
    assert torch.equal(weight, expected)


@pytest.fixture(params=[2, 4])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs' sizes are those of 16 bits, then those of fp32."""
    from engines.subspace import projector_kernels

    monkeypatch.setitem(projector_kernels.SIZES, 4, projector_kernels.SIZES[request.param])


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize(("m", "n", "d", "r"), [(70, 40, 24, 4), (33, 65, 16, 2), (48, 48, 48, 3)])
def test_an_update_by_blocks_is_that_of_the_expanded_core(m: int, n: int, d: int, r: int) -> None:
    from engines.subspace import projector_kernels

    left, right = pair(m, n, d, r)
    core, weight = matrix(d, d, seed=3), matrix(m, n, seed=4)
    expected = weight.clone()
    dense = left.dense() @ core @ right.dense().T
    updated(expected, dense, 0.1, 0.9, "nearest", 0)
    numbers = torch.from_numpy(kernel_numbers([0], 0.1, 0.9)[0])
    projector_kernels.block_update(weight, core, left.values, right.values, numbers, dither=False)
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=2e-3)  # tensor cores may take tf32


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize(("rows", "d", "r"), [(70, 24, 4), (33, 16, 2), (48, 48, 3)])
def test_both_maps_are_products_with_the_matrix(rows: int, d: int, r: int) -> None:
    from engines.subspace import projector_kernels

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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "d", "r"), [(2048, 512, 128, 4), (1000, 333, 96, 3), (256, 256, 64, 1)])
def test_in_16_bits_sums_are_in_fp32(dtype: torch.dtype, m: int, n: int, d: int, r: int) -> None:
    """What is stored is a rounding or two of them away."""
    from engines.subspace import projector_kernels

    left, right = (each.cast(dtype, DEVICE) for each in pair(m, n, d, r))
    x, y, core = (matrix(*of, seed=seed).to(dtype) for seed, of in enumerate(((200, m), (200, d), (d, d))))
    dense, other = left.dense().double(), right.dense().double()
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]

    def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
        size = float(expected.abs().max())
        assert float((found.double() - expected).abs().max()) <= 4 * unit * size

    for given in (x, x.t().contiguous().t()):
        assert_close(projector_kernels.block_project(given, left.values, d), x.double() @ dense)
    for given in (y, y.t().contiguous().t()):
        assert_close(projector_kernels.block_lift(given, left.values, d), y.double() @ dense.T)
    weight = matrix(m, n, seed=4).to(dtype)
    expected = weight.double() * 0.9 - dense @ core.double() @ other.T * 0.1
    dither = dtype == torch.bfloat16
    numbers = torch.from_numpy(kernel_numbers([7], 0.1, 0.9)[0]).to(weight.device)
    projector_kernels.block_update(weight, core, left.values, right.values, numbers, dither=dither)
    assert_close(weight, expected)
