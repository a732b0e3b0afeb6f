from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import noise
from engines.noise import NoiseKey, normal, perturb, perturb_all, update, update_all

KEY = NoiseKey(seed=11, step=3, tensor=2)
CPU = torch.device("cpu")


def some_weights(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """Random123's kat_vectors, philox4x32 with 10 rounds."""
    even, odd = noise.philox(
        torch.tensor([[counter[0]], [counter[2]]]), torch.tensor([[counter[1]], [counter[3]]]), key
    )
    assert (even[0].item(), odd[0].item(), even[1].item(), odd[1].item()) == expected


def test_key_and_counter_go_where_the_docstring_says() -> None:
    key = NoiseKey(seed=0x299F31D0_A4093822, step=0x13198A2E, tensor=0x85A308D3)
    words = noise.philox_words(key, (0x03707344 << 32) | 0x243F6A88, 1, CPU)
    assert words.flatten().tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_moments_are_those_of_a_standard_normal() -> None:
    count = 2_000_000
    z = normal(KEY, count).double()
    sigma = 1 / math.sqrt(count)
    assert abs(z.mean()) < 4 * sigma
    assert abs(z.var() - 1) < 4 * math.sqrt(2) * sigma
    assert abs((z**3).mean()) < 4 * math.sqrt(15) * sigma
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96) * sigma
    for bound in (0.5, 1.0, 2.0, 3.0):
        share = math.erf(bound / math.sqrt(2))
        assert abs((z.abs() < bound).double().mean() - share) < 4 * math.sqrt(share * (1 - share)) * sigma
    lanes = z.view(-1, 4)
    assert (torch.corrcoef(lanes.T) - torch.eye(4, dtype=torch.float64)).abs().max() < 5 * 2 * sigma
    assert z.isfinite().all()


@pytest.mark.parametrize(
    "other",
    [
        NoiseKey(seed=12, step=3, tensor=2),
        NoiseKey(seed=11 | 1 << 40, step=3, tensor=2),
        NoiseKey(seed=11, step=4, tensor=2),
        NoiseKey(seed=11, step=3, tensor=3),
        NoiseKey(seed=11, step=2, tensor=3),
    ],
    ids=["seed", "seed-high", "step", "tensor", "step-and-tensor-swapped"],
)
def test_noise_of_another_key_is_independent(other: NoiseKey) -> None:
    count = 100_000
    ours, theirs = normal(KEY, count), normal(other, count)
    assert abs((ours * theirs).mean()) < 5 / math.sqrt(count)
    assert abs((ours[1:] * theirs[:-1]).mean()) < 5 / math.sqrt(count)


def test_noise_does_not_depend_on_what_was_drawn_before() -> None:
    first = normal(KEY, 1000)
    normal(NoiseKey(seed=1, step=1, tensor=1), 77)
    torch.manual_seed(5)
    assert torch.equal(normal(KEY, 1000), first)


def test_a_seed_of_zero_is_as_good_as_any() -> None:
    zero = normal(NoiseKey(seed=0, step=0, tensor=0), 100_000)
    assert abs(zero.mean()) < 5 / math.sqrt(100_000)
    assert abs(zero.var() - 1) < 0.03
    assert torch.equal(zero, normal(NoiseKey(seed=0, step=0, tensor=0), 100_000))


@pytest.mark.parametrize("field", [{"step": -1}, {"tensor": 2**32}])
def test_keys_out_of_range_are_refused(field: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="32-bit"):
        NoiseKey(**{"seed": 0, "step": 0, "tensor": 0, **field})


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 500), max_size=4), chunk=st.sampled_from([100, 1 << 18]))
def test_pieces_make_up_the_whole(cuts: list[int], chunk: int) -> None:
    weight = some_weights(500)
    whole = torch.empty_like(weight)
    perturb(weight, whole, KEY, 0.25)
    whole_updated = weight.clone()
    update(whole_updated, KEY, 0.5, -0.75, 0.125)

    pieces, pieces_updated = torch.empty_like(weight), weight.clone()
    edges = [0, *sorted(cuts), 500]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "_CPU_CHUNK", chunk)
        for begin, end in pairwise(edges):
            perturb(weight[begin:end], pieces[begin:end], KEY, 0.25, start=begin)
            update(pieces_updated[begin:end], KEY, 0.5, -0.75, 0.125, start=begin)
    assert torch.equal(pieces, whole)
    assert torch.equal(pieces_updated, whole_updated)


@pytest.mark.parametrize("chunk", [16, 1 << 18])
def test_several_tensors_at_once_are_as_one_by_one(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(noise, "_CPU_CHUNK", chunk)
    weights = [some_weights(count, seed=count) for count in (7, 64, 1, 33)]
    keys = [NoiseKey(seed=1, step=2, tensor=number) for number in (5, 0, 9, 2)]
    decays = [0.1, 0.0, 0.1, 0.0]
    together, apart = [torch.empty_like(w) for w in weights], [torch.empty_like(w) for w in weights]
    perturb_all(weights, together, keys, 0.5)
    for weight, out, key in zip(weights, apart, keys, strict=True):
        perturb(weight, out, key, 0.5)
    assert all(map(torch.equal, together, apart))

    for original, other in zip(weights, apart, strict=True):
        other.copy_(original)
    update_all(weights, keys, 0.5, 2.0, decays)
    for weight, key, decay in zip(apart, keys, decays, strict=True):
        update(weight, key, 0.5, 2.0, decay)
    assert all(map(torch.equal, weights, apart))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_formulas_in_fp32_with_one_rounding(dtype: torch.dtype) -> None:
    weight = some_weights(999, dtype)
    before = weight.clone()
    z = normal(KEY, 999)
    out = torch.empty_like(weight)
    perturb(weight, out, KEY, -1e-3)
    assert torch.equal(weight, before)
    assert torch.equal(out, (weight.float() + -1e-3 * z).to(dtype))
    update(weight, KEY, 0.01, 0.4, 0.1)
    assert torch.equal(weight, (before.float() - 0.01 * (0.4 * z + 0.1 * before.float())).to(dtype))


def test_no_scale_and_no_rate_change_no_bit() -> None:
    weight = some_weights(100, torch.float16)
    out = torch.empty_like(weight)
    perturb(weight, out, KEY, 0.0)
    assert torch.equal(out, weight)
    before = weight.clone()
    update(weight, KEY, 0.0, 3.0, 0.1)
    assert torch.equal(weight, before)


def test_a_projected_gradient_of_zero_still_decays() -> None:
    weight = torch.full((8,), 2.0)
    update(weight, KEY, 0.5, 0.0, 0.25)
    assert torch.equal(weight, torch.full((8,), 2.0 - 0.5 * 0.25 * 2.0))


def kernel_device() -> torch.device:
    """The kernels run on the GPU where there is one, else under Triton's interpreter."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else CPU


@pytest.mark.parametrize("seed", [0, 1, -3, 2**40 + 17, 2**63 + 5])
def test_the_kernel_has_the_same_integer_stream(seed: int) -> None:
    kernels = pytest.importorskip("engines.noise_kernels")
    key = NoiseKey(seed=seed, step=7, tensor=3)
    for first_quad in (0, 5, 2**32 - 64):
        ours = noise.philox_words(key, first_quad, 128, CPU)
        assert torch.equal(kernels.philox_words(key, first_quad, 128, kernel_device()).cpu(), ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("start", "count"), [(0, 5000), (3, 2047), (4, 1), (2048, 2048)])
def test_the_kernel_gives_the_same_bits(dtype: torch.dtype, start: int, count: int) -> None:
    """bfloat16 is checked on a GPU only: the interpreter truncates where the hardware rounds."""
    pytest.importorskip("triton")
    check_kernel(dtype, start, count)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_compiled_kernel_gives_the_same_bits_as_the_cpu(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    check_kernel(dtype, 0, 3_000_001)
    check_kernel(dtype, 2**33 + 1, 4099)


def check_kernel(dtype: torch.dtype, start: int, count: int) -> None:
    from engines import noise_kernels

    device = kernel_device()
    weight = some_weights(count, dtype)
    expected, out = torch.empty_like(weight), torch.empty_like(weight, device=device)
    perturb(weight, expected, KEY, 1e-3, start)
    noise_kernels.perturb(weight.to(device), out, KEY, 1e-3, start)
    assert torch.equal(out.cpu(), expected)

    updated = weight.to(device)
    updated = updated.clone() if device == CPU else updated
    update(weight, KEY, 1e-3, 0.37, 0.1, start)
    noise_kernels.update(updated, KEY, 1e-3, 0.37, 0.1, start)
    assert torch.equal(updated.cpu(), weight)


@pytest.mark.gpu
def test_torch_operations_on_the_gpu_give_the_same_bits() -> None:
    device = torch.device("cuda", 0)
    assert torch.equal(normal(KEY, 1_000_003, device).cpu(), normal(KEY, 1_000_003))
