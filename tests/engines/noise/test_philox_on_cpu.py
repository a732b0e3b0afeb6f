"""NumPy's operations give the bits of torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engines.noise import philox
from engines.noise.philox import NoiseKey, normal, normals_at, signs
from engines.noise.philox_on_cpu import MOST_LANES

WORDS = st.integers(0, 0xFFFFFFFF)


def by_torch(function: object, *arguments: object) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(philox, "MOST_LANES", 0)
        found = function(*arguments)  # type: ignore[operator]
    assert isinstance(found, Tensor)
    return found


def words(even: list[list[int]], odd: list[list[int]], key: tuple[int, int]) -> Tensor:
    return torch.cat(philox.philox(torch.tensor(even), torch.tensor(odd), key))


@given(st.lists(st.tuples(WORDS, WORDS, WORDS, WORDS), min_size=1, max_size=9), st.tuples(WORDS, WORDS))
def test_words_of_any_counters(counters: list[tuple[int, ...]], key: tuple[int, int]) -> None:
    columns = [list(column) for column in zip(*counters, strict=True)]
    even, odd = columns[:2], columns[2:]
    assert torch.equal(words(even, odd, key), by_torch(words, even, odd, key))


@given(
    st.lists(st.integers(0, 2**50), min_size=1, max_size=9), WORDS, WORDS, st.integers(-(2**63), 2**63 - 1)
)
def test_normals_of_any_elements(elements: list[int], tensor: int, step: int, seed: int) -> None:
    at = torch.tensor(elements)
    assert torch.equal(normals_at(at, tensor, step, seed), by_torch(normals_at, at, tensor, step, seed))


@pytest.mark.parametrize("draw", [normal, signs])
@pytest.mark.parametrize("count", [1, 2049, 4 * MOST_LANES, 4 * MOST_LANES + 1])
def test_tensors_around_the_largest_that_numpy_draws(draw: object, count: int) -> None:
    key = NoiseKey(seed=-3, step=2**32 - 1, tensor=7)
    assert torch.equal(draw(key, count), by_torch(draw, key, count))  # type: ignore[operator]


def test_bits_are_counted_as_on_a_device_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.tensor([[0, 1, 0xFFFFFFFF, 0x80000000, 0x55555555, 0x12345678]] * 2)
    found = philox.binomials_of(words, words.flip(1))

    class Elsewhere:
        type = "cuda"

    monkeypatch.setattr(torch.Tensor, "device", Elsewhere())
    assert torch.equal(philox.binomials_of(words, words.flip(1)), found)
