"""Orthogonal iteration against eigh: how much energy it keeps, on spectra like those of gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engines.model.blocks import materialize
from engines.subspace.subspace_iteration import leading_vectors
from tiny_models import tiny_batches, tiny_blueprint

HEIGHTS_AND_RANKS = [(7, 4), (18, 4), (16, 8), (43, 8), (64, 16)]
"""Of blocks of the 1.3B and the 6.7B LLaMA shape, and of a wider form."""


def gradient(rows: int, columns: int, seed: int) -> Tensor:
    """One like those in `EXPERIMENTS.md`, bias 0.3 to 0.5 at d = n/2: singular values fall as 1/i, and a
    quarter of the norm is noise."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(n, rank, generator=generator)).Q for n in (rows, columns))
    flat = u / torch.arange(1, rank + 1) @ v.T
    noise = torch.randn(rows, columns, generator=generator)
    return flat + 0.25 * noise * flat.norm() / noise.norm()


def grams(parts: Tensor) -> Tensor:
    found = parts @ parts.transpose(1, 2)
    return found / found.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30)[:, None, None]


def kept(gram: Tensor, vectors: Tensor) -> Tensor:
    return (vectors.double() * (gram.double() @ vectors.double())).sum((1, 2))


def most(gram: Tensor, r: int) -> Tensor:
    return torch.linalg.eigvalsh(gram.double())[:, -r:].sum(1)


def found_for(gram: Tensor, r: int) -> Tensor:
    return leading_vectors(gram, torch.ones(gram.shape[:2], dtype=torch.bool, device=gram.device), r)


def assert_orthonormal(vectors: Tensor) -> None:
    products = vectors.double().transpose(1, 2) @ vectors.double()
    expected = torch.eye(vectors.shape[2], dtype=torch.float64, device=vectors.device)
    torch.testing.assert_close(products, expected.expand_as(products), rtol=0.0, atol=2e-6)


@pytest.mark.parametrize(("height", "r"), HEIGHTS_AND_RANKS)
def test_the_energy_is_within_a_percent_of_eighs(height: int, r: int) -> None:
    gram = grams(gradient(32 * height, 256, seed=height).view(32, height, 256))
    vectors = found_for(gram, r)
    assert_orthonormal(vectors)
    assert float(kept(gram, vectors).sum()) >= 0.99 * float(most(gram, r).sum())


@pytest.mark.parametrize(("height", "r"), [(8, 4), (16, 8)])
def test_the_energy_of_a_models_gradients_is_within_a_percent_of_eighs(height: int, r: int) -> None:
    model = materialize(tiny_blueprint("llama"), "cpu", torch.float32)
    for batch in tiny_batches(4, "llama"):
        model(**batch.inputs).loss.backward()
    checked = 0
    for name, parameter in model.named_parameters():
        if "layers." in name and parameter.ndim == 2 and parameter.shape[0] % height == 0:
            assert parameter.grad is not None
            gram = grams(parameter.grad.view(-1, height, parameter.shape[1]))
            assert float(kept(gram, found_for(gram, r)).sum()) >= 0.99 * float(most(gram, r).sum())
            checked += 1
    assert checked > 0


def test_noise_alone_is_within_a_percent_too() -> None:
    """The slowest to converge: no eigenvalue stands out."""
    gram = grams(torch.randn(64, 43, 43, generator=torch.Generator().manual_seed(0)))
    assert float(kept(gram, found_for(gram, 8)).sum()) >= 0.99 * float(most(gram, 8).sum())


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_blocks_without_energy_in_some_directions_stay_orthonormal(rank: int) -> None:
    """All of what there is is kept, also where one column is left to the last direction."""
    for height, r in ((4, 4), (5, 4), (18, 8)):
        generator = torch.Generator().manual_seed(height)
        parts = torch.randn(50, height, max(rank, 1), generator=generator) * float(rank > 0)
        gram = grams(parts @ torch.randn(max(rank, 1), 32, generator=generator))
        vectors = found_for(gram, r)
        assert_orthonormal(vectors)
        torch.testing.assert_close(kept(gram, vectors), most(gram, r).clamp_min(0.0), rtol=1e-4, atol=1e-6)


def test_eigenvalues_that_drown_in_high_powers_are_found_by_low_ones() -> None:
    values = torch.tensor([1.0, 1e-2, 3e-4, 2e-5, 1e-5, 1e-5])
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    gram = (turn * (values / values.sum())) @ turn.T
    assert float(kept(gram[None], found_for(gram[None], 3))) == pytest.approx(
        float(most(gram[None], 3)), rel=1e-5
    )


def test_rows_that_are_not_there_stay_zero() -> None:
    parts = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0))
    parts[1:, 5] = 0.0
    used = torch.ones(3, 6, dtype=torch.bool)
    used[1:, 5] = False
    vectors = leading_vectors(grams(parts), used, 5)
    assert_orthonormal(vectors)
    assert not vectors[~used].any()
    # What the padding leaves is what there would be without it, but for the start.
    assert torch.allclose(kept(grams(parts)[1:], vectors[1:]), torch.ones(2, dtype=torch.float64), atol=1e-5)


def test_the_same_matrices_give_the_same_bits() -> None:
    gram = grams(gradient(64, 48, seed=2).view(8, 8, 48))
    assert torch.equal(found_for(gram, 4), found_for(gram.clone(), 4))


@pytest.mark.gpu
@pytest.mark.parametrize(("height", "r"), HEIGHTS_AND_RANKS)
def test_on_a_gpu(height: int, r: int) -> None:
    gram = grams(gradient(32 * height, 256, seed=height).view(32, height, 256)).to("cuda:0")
    vectors = found_for(gram, r)
    assert torch.equal(vectors, found_for(gram, r))
    assert_orthonormal(vectors)
    assert float(kept(gram, vectors).sum()) >= 0.99 * float(most(gram, r).sum())
