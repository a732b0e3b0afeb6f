"""bf16 matrices without losing a bit: the tiles, and passes over them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zeroth_order_runs import a_visit

from engines.costs.quantized import lossless_bytes
from engines.lossless import lossless_codec, lossless_pass
from engines.noise import weight_pass
from engines.noise.tiles import Segment, one
from engines.noise.visits import Outputs
from engines.settings.checks import Rounding
from engines.settings.zeroth_order import Noise

CPU = torch.device("cpu")
SIZES = [1, 3, 511, 2047, 2048, 2049, 5000]
KINDS: list[Noise] = ["gaussian", "binomial", "rademacher"]


def kernel_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else CPU


def of_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int16).view(torch.bfloat16)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """NaN is what it is."""
    return torch.equal(left.view(torch.int16), right.view(torch.int16))


def some_weights(count: int, seed: int = 0) -> Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


def awkward(kind: str, count: int, seed: int = 0) -> Tensor:
    """Weights that are unlike those of a trained matrix in one way or another."""
    made = torch.Generator().manual_seed(seed)
    weights = some_weights(count, seed)
    where = torch.rand(count, generator=made)
    if kind == "zeros":
        weights.zero_()
    elif kind == "pruned":
        weights[where < 0.7] = 0.0
        weights[::2] *= -1.0  # zeros of both signs
    elif kind == "special":
        values = [
            0x7F80,
            0xFF80,
            0x7FC0,
            0xFFC1,
            0x7F81,
            0x0001,
            0x8001,
            0x007F,
            0x8000,
            0x0000,
            0x7F7F,
            0x0080,
        ]
        special = of_bits(torch.tensor(values, dtype=torch.int32))
        weights[where < 0.001] = special[
            torch.randint(len(special), (int((where < 0.001).sum()),), generator=made)
        ]
    elif kind == "outliers":
        weights[where < 0.001] *= 2.0**9
    elif kind == "large":
        weights = (weights.float() * 2.0**18).bfloat16()
    elif kind == "small":
        weights = of_bits(torch.randint(0x80, 0x800, (count,), generator=made))  # the least normal numbers
    else:
        assert kind == "usual"
    return weights


AWKWARD = ["usual", "zeros", "pruned", "special", "outliers", "large", "small"]


def encoded(weights: Tensor) -> tuple[Tensor, bool]:
    kept = torch.full((lossless_bytes(weights.numel()),), 255, dtype=torch.uint8, device=weights.device)
    return kept, bool(lossless_codec.write_tiles(weights, kept))


def decoded(kept: Tensor, count: int) -> Tensor:
    out = torch.empty(count, dtype=torch.bfloat16, device=kept.device)
    assert lossless_codec.read_tiles(kept, count, out)
    return out


@pytest.mark.parametrize("kind", AWKWARD)
@pytest.mark.parametrize("count", SIZES)
def test_every_bit_comes_back(kind: str, count: int) -> None:
    weights = awkward(kind, count)
    kept, has_room = encoded(weights)
    assert has_room
    assert same_bits(decoded(kept, count), weights)
    assert kept.numel() == -(-count // 2048) * 3104


@settings(max_examples=60, deadline=None)
@given(
    spread=st.integers(1, 60),
    center=st.integers(0, 160),
    wild=st.floats(0, 0.003),
    count=st.sampled_from(SIZES),
    seed=st.integers(0, 1000),
)
def test_what_has_room_comes_back(spread: int, center: int, wild: float, count: int, seed: int) -> None:
    """Of exponents around any number, more or less alike, with some that are anything."""
    made = torch.Generator().manual_seed(seed)
    exponent = (center - torch.rand(count, generator=made).pow(3) * spread).clamp(0, 255).to(torch.int32)
    bits = torch.randint(0, 1 << 16, (count,), generator=made, dtype=torch.int32)
    bits = torch.where(torch.rand(count, generator=made) < wild, bits, (bits & 0x807F) | (exponent << 7))
    weights = of_bits(bits)
    kept, has_room = encoded(weights)
    if has_room:
        assert same_bits(decoded(kept, count), weights)
    fits = spread <= 15 and wild == 0 and 15 < center <= 142
    assert has_room or not fits


@settings(max_examples=30, deadline=None)
@given(num_tops=st.integers(1, 40), lowest=st.integers(1, 160), seed=st.integers(0, 1000))
def test_a_tile_has_the_window_with_the_fewest_escapes(num_tops: int, lowest: int, seed: int) -> None:
    """Counted window by window; or the first of 5 or fewer from above."""
    made = torch.Generator().manual_seed(seed)
    exponents = torch.randint(lowest, min(lowest + num_tops, 256), (2048,), generator=made, dtype=torch.int32)
    exponents[: 1 + seed % 9] = min(lowest + num_tops + seed % 20, 255)
    kept, has_room = encoded(of_bits(exponents << 7))
    if not has_room:
        return
    header = int(kept.view(-1, 3104)[0, 3072:].view(torch.int32)[0])
    base, escapes = header & 0xFF, (header >> 8) & 0xFFF
    counted = [int(((exponents <= b) | (exponents > b + 15)).sum()) for b in range(128)]
    simple = min(max(int(exponents.max()) - 15, 0), 127)
    assert escapes == counted[base]
    assert base == simple if counted[simple] <= 5 else counted[base] == min(counted)


@pytest.mark.parametrize("highest", [0x80, 0x8000, 1 << 16])
def test_a_matrix_of_denormals_or_of_any_numbers_has_no_room(highest: int) -> None:
    bits = torch.randint(0, highest, (9000,), generator=torch.Generator().manual_seed(0))
    assert not encoded(of_bits(bits))[1]


def test_tiles_share_the_room_for_more_escapes() -> None:
    """20 tiles with 5 escapes each and 20 more in one of them fit, one more does not."""
    for more, fits in ((20, True), (21, False)):
        weights = torch.full((20, 2048), 1.0, dtype=torch.bfloat16)
        weights[:, 100:105] = 2.0**-40
        weights[7, 1000 : 1000 + more] = 2.0**-60
        kept, has_room = encoded(weights.view(-1))
        assert has_room == fits
        if fits:
            assert same_bits(decoded(kept, 20 * 2048), weights.view(-1))


# --- passes -------------------------------------------------------------------------------------------------


COUNTS, OFFSETS, NUMBERS = (300, 2048, 4100), (8, 312, 2360), (3, 9, 4)
SEGMENT = Segment(NUMBERS, OFFSETS, COUNTS, (True, True, True))


def flat_memory(kind: str = "special") -> Tensor:
    flat = torch.zeros(6464, dtype=torch.bfloat16)
    for seed, (offset, count) in enumerate(zip(OFFSETS, COUNTS, strict=True)):
        flat[offset : offset + count] = awkward(kind, count, seed)
    return flat


def kept_from(flat: Tensor) -> Tensor:
    each = [encoded(flat[offset : offset + count])[0] for offset, count in zip(OFFSETS, COUNTS, strict=True)]
    return torch.cat(each)


def outputs(wanted: str, device: torch.device = CPU) -> dict[str, Tensor]:
    return {name: torch.zeros(6464, dtype=torch.bfloat16, device=device) for name in wanted.split("+")}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # infinity - infinity
@pytest.mark.parametrize(
    ("noise", "rounding", "wanted"),
    [
        *((noise, "stochastic", "theta+plus+minus") for noise in KINDS),
        ("gaussian", "nearest", "theta"), ("gaussian", "stochastic", "plus"),
    ],
)  # fmt: skip
def test_a_pass_gives_the_bits_of_one_over_plain_weights(
    noise: Noise, rounding: Rounding, wanted: str
) -> None:
    """Torch's of torch's and the kernel's of the kernel's, for matrices that lie together."""
    pytest.importorskip("triton")
    from engines.lossless import lossless_pass_kernels
    from engines.noise import weight_pass_kernels

    flat = flat_memory()
    kept = kept_from(flat)
    for where, plain, function in (
        (CPU, weight_pass.visit, lossless_pass.visit_lossless),
        (kernel_device(), weight_pass_kernels.visit, lossless_pass_kernels.visit_lossless),
    ):
        how = a_visit((1e-3, 0.7), (1e-2, -2.0), device=where, rounding=rounding, noise=noise)
        expected, found = outputs(wanted, where), outputs(wanted, where)
        there = kept.to(where)
        plain(flat.to(where), SEGMENT, how, Outputs(**expected), 0)
        function(there, SEGMENT, how, Outputs(**found))
        for name, each in expected.items():
            numbers = ~each.isnan()
            assert torch.equal(~found[name].isnan(), numbers)
            assert same_bits(found[name][numbers], each[numbers])
        assert torch.equal(there.cpu(), kept)


@pytest.mark.parametrize("kind", AWKWARD)
def test_the_kernels_give_the_same_bits(kind: str) -> None:
    """Of tiles, and of what comes back, NaN included. Escapes elsewhere in the matrix, too."""
    pytest.importorskip("triton")
    from engines.lossless import lossless_pass_kernels

    flat = flat_memory(kind)
    where = kernel_device()
    expected = kept_from(flat)
    found = []
    for offset, count in zip(OFFSETS, COUNTS, strict=True):
        made = torch.full((lossless_bytes(count),), 255, dtype=torch.uint8, device=where)
        weights = flat[offset : offset + count].to(where)
        assert bool(lossless_pass_kernels.encode_lossless(weights, one(3, count), made))
        found.append(made)
    there = torch.cat(found)
    assert torch.equal(there.cpu(), expected)
    for function in (lossless_pass.decode_lossless, lossless_pass_kernels.decode_lossless):
        out = torch.zeros(6464, dtype=torch.bfloat16, device=where)
        damaged = torch.zeros(1, dtype=torch.int32, device=where)
        function(there, SEGMENT, out, damaged)
        assert not damaged
        assert same_bits(out.cpu(), flat)


def test_tiles_without_room_for_other_weights_stay_as_they_are() -> None:
    pytest.importorskip("triton")
    from engines.lossless import lossless_pass_kernels

    bits = torch.randint(0, 1 << 16, (5000,), generator=torch.Generator().manual_seed(0))
    before, _ = encoded(some_weights(5000))
    for where, function in (
        (CPU, lossless_pass.encode_lossless),
        (kernel_device(), lossless_pass_kernels.encode_lossless),
    ):
        kept = before.to(where, copy=True)
        assert not function(of_bits(bits).to(where), one(3, 5000), kept)
        assert torch.equal(kept.cpu(), before)


@settings(max_examples=20, deadline=None)
@given(byte=st.integers(0, 3072), bit=st.integers(0, 7), tile=st.integers(0, 2))
def test_a_bit_that_was_damaged_is_found(byte: int, bit: int, tile: int) -> None:
    """By torch and by the kernel: one of codes, rests or the base."""
    pytest.importorskip("triton")
    from engines.lossless import lossless_pass_kernels

    kept, _ = encoded(some_weights(5000))
    kept[tile * 3104 + byte] ^= 1 << bit
    out = torch.empty(5000, dtype=torch.bfloat16)
    for where, function in (
        (CPU, lossless_pass.decode_lossless),
        (kernel_device(), lossless_pass_kernels.decode_lossless),
    ):
        damaged = torch.zeros(1, dtype=torch.int32, device=where)
        function(kept.to(where), one(3, 5000), out.to(where), damaged)
        assert damaged


@pytest.mark.gpu
@pytest.mark.parametrize("kind", AWKWARD)
def test_the_compiled_kernels_give_the_same_bits_as_the_cpu(kind: str) -> None:
    """Of a larger matrix, and with tiles of many escapes in it."""
    weights = awkward(kind, 3_000_001)
    weights[10_000:10_030] = 2.0**-70
    expected, has_room = encoded(weights)
    there = torch.empty_like(expected, device="cuda")
    assert bool(lossless_pass.encode_lossless(weights.cuda(), one(3, 3_000_001), there)) == has_room
    assert torch.equal(there.cpu(), expected)
    out = torch.empty(3_000_001, dtype=torch.bfloat16, device="cuda")
    damaged = torch.zeros(1, dtype=torch.int32, device="cuda")
    lossless_pass.decode_lossless(there, one(3, 3_000_001), out, damaged)
    assert not damaged
    assert same_bits(out.cpu(), weights)
