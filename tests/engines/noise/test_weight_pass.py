from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.base import Update
from engines.noise import philox, tiles, visits
from engines.noise.philox import NoiseKey, binomials, normal, signs
from engines.noise.tiles import LANES, TILE, Segment, one
from engines.noise.visits import LOG_CAPACITY, DeviceUpdateLog, Outputs, Visit
from engines.noise.weight_pass import rows, visit
from engines.settings.checks import Rounding
from engines.settings.zeroth_order import Noise

KEY = NoiseKey(seed=11, step=3, tensor=2)
CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]
NOISES: list[Noise] = ["gaussian", "binomial", "rademacher"]
Draw = Callable[..., torch.Tensor]
DRAW: dict[Noise, Draw] = {"gaussian": normal, "binomial": binomials, "rademacher": signs}


def an_update(step: int = 3, lr: float = 0.01, g: float = 0.4, decay: float = 0.1) -> Update:
    return Update(step=step, learning_rate=lr, projected_gradient=g, weight_decay=decay)


def a_visit(
    *updates: Update,
    step: int = 3,
    eps: float = 0.0,
    rounding: Rounding = "stochastic",
    device: torch.device = CPU,
    seed: int = 11,
    noise: Noise = "gaussian",
) -> Visit:
    log = DeviceUpdateLog(device)
    for each in updates:
        log.append(each)
    return Visit(
        seed=seed, log=log, first=0, last=len(updates), rounding=rounding, step=step, eps=eps, noise=noise
    )


def updated(weight: torch.Tensor, how: Visit, number: int = 2, *, decays: bool = True) -> torch.Tensor:
    out = torch.empty_like(weight)
    visit(weight, one(number, weight.numel(), decays=decays), how, Outputs(theta=out))
    return out


def perturbed(weight: torch.Tensor, how: Visit, number: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    plus, minus = torch.empty_like(weight), torch.empty_like(weight)
    visit(weight, one(number, weight.numel()), how, Outputs(plus=plus, minus=minus))
    return plus, minus


def some_weights(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """Random123's kat_vectors, philox4x32 with 7 rounds."""
    even, odd = philox.philox(
        torch.tensor([[counter[0]], [counter[2]]]), torch.tensor([[counter[1]], [counter[3]]]), key
    )
    assert (even[0].item(), odd[0].item(), even[1].item(), odd[1].item()) == expected


def test_key_and_counter_go_where_the_docstring_says() -> None:
    key = NoiseKey(seed=0x299F31D0_A4093822, step=0x13198A2E, tensor=0x85A308D3)
    words = philox.philox_words(key, (0x03707344 << 32) | 0x243F6A88, 1, CPU)
    assert words.flatten().tolist() == [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]


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
    words = z[: count // TILE * TILE].view(-1, 4, LANES).transpose(1, 2).reshape(-1, 4)
    assert (torch.corrcoef(words.T) - torch.eye(4, dtype=torch.float64)).abs().max() < 5 * 2 * sigma
    assert z.isfinite().all()


def test_moments_are_those_of_32_fair_coins() -> None:
    """And values of a Philox call, and the bits that round beside any value, are uncorrelated."""
    count = 2_000_000
    z = binomials(KEY, count).double()
    sigma = 1 / math.sqrt(count)
    heads = (z * math.sqrt(8) + 16).round()
    assert (z * math.sqrt(8) + 16 - heads).abs().max() < 1e-5
    for number in range(33):
        share = math.comb(32, number) / 2**32
        assert abs((heads == number).double().mean() - share) < 5 * math.sqrt(share) * sigma + 1e-9
    assert abs(z.mean()) < 4 * sigma
    assert abs(z.var() - 1) < 4 * math.sqrt(2) * sigma
    assert abs((z**4).mean() - 2.9375) < 4 * math.sqrt(90) * sigma
    piece = [tiles.TileRange(2, 0, count // TILE * TILE, 0, decays=False)]
    found, bits = philox.draw_binomials(11, 3, piece, CPU, uniform=True)
    assert bits is not None
    assert torch.equal(found.double(), z[: len(found)])
    both = torch.stack((found.double(), bits.double())).view(2, -1, 4, LANES)
    words = both.permute(0, 2, 1, 3).reshape(8, -1)
    assert (torch.corrcoef(words) - torch.eye(8, dtype=torch.float64)).abs().max() < 5 * 2 * sigma
    assert abs(bits.double().mean() / 2**16 - 0.5) < 4 * sigma


def test_an_update_without_decay_is_one_with_a_decay_of_zero() -> None:
    """Kernels and loops leave the term out."""
    weight, bare = some_weights(5000), replace(an_update(), weight_decay=0.0)
    how = a_visit(bare, an_update(step=4))
    assert how.decays
    assert not a_visit(bare).decays
    assert not replace(a_visit(an_update(), bare), first=1).decays
    assert torch.equal(updated(weight, replace(how, last=1)), updated(weight, a_visit(bare)))


def test_signs_are_fair_and_independent() -> None:
    """Within 5 standard deviations: their mean, and their products with neighbours, with those of the next
    tile, lane and half, and with the rounding's bits."""
    count = 2_000_000
    z = signs(KEY, count)
    assert z.abs().eq(1.0).all()
    bound = 5 / math.sqrt(count - 16 * TILE)
    assert abs(z.mean()) < bound
    for shift in (1, 8, 64, 128, 512, TILE // 2, TILE, 2 * TILE, 8 * TILE, 16 * TILE):
        assert abs((z[shift:] * z[:-shift]).mean()) < bound
    bits = torch.stack([z[i * TILE : (i + 1) * TILE] for i in range(count // TILE)]).mean(0)
    assert bits.abs().max() < 5.5 / math.sqrt(count // TILE)  # each place of a tile by itself


@pytest.mark.parametrize("draw", [normal, binomials, signs])
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
def test_noise_of_another_key_is_independent(other: NoiseKey, draw: Draw) -> None:
    count = 100_000
    ours, theirs = draw(KEY, count), draw(other, count)
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
@given(
    cuts=st.lists(st.integers(0, 4), max_size=3),
    count=st.sampled_from([1, 500, 511, 512, 513, 2048, 5 * TILE - 3]),
    chunk=st.sampled_from([512, 1024, 1 << 16]),
    kind=st.sampled_from(NOISES),
)
def test_pieces_make_up_the_whole(cuts: list[int], count: int, chunk: int, kind: Noise) -> None:
    weight = some_weights(count, torch.float16)
    how = a_visit(an_update(1), an_update(2, g=-3.0), eps=1e-3, noise=kind)
    whole = [torch.empty_like(weight) for _ in range(3)]
    segment = one(2, count, decays=True)
    visit(weight, segment, how, Outputs(theta=whole[0], plus=whole[1], minus=whole[2]))
    pieces = [torch.empty_like(weight) for _ in range(3)]
    edges = sorted({0, count, *(cut * TILE for cut in cuts if cut * TILE < count)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiles.CHUNK_LANES, "cpu", chunk)
        for begin, end in pairwise(edges):
            part = one(2, end - begin, decays=True)
            theta, plus, minus = (each[begin:end] for each in pieces)
            visit(weight[begin:end], part, how, Outputs(theta=theta, plus=plus, minus=minus), start=begin)
        assert torch.equal(DRAW[kind](KEY, count), DRAW[kind](KEY, 5 * TILE)[:count])
    assert all(map(torch.equal, pieces, whole))


def test_a_piece_begins_with_a_tile() -> None:
    weight = some_weights(10)
    with pytest.raises(ValueError, match="multiple of 2048"):
        visit(weight, one(2, 10), a_visit(), Outputs(theta=weight), start=4)


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("chunk", [512, 1 << 16])
def test_vectors_in_one_memory_are_as_one_by_one(
    monkeypatch: pytest.MonkeyPatch, chunk: int, kind: Noise
) -> None:
    monkeypatch.setitem(tiles.CHUNK_LANES, "cpu", chunk)
    counts, numbers = (7, 640, 1, 3000), (5, 0, 9, 2)
    offsets = (0, 8, 648, 656)
    flat = some_weights(3656, torch.bfloat16)
    how = a_visit(an_update(1), an_update(2), eps=1e-3, noise=kind)
    outs = [torch.empty_like(flat) for _ in range(3)]
    visit(
        flat, Segment(numbers, offsets, counts, (False, True, False, True)), how,
        Outputs(theta=outs[0], plus=outs[1], minus=outs[2]),
    )  # fmt: skip
    for number, offset, count in zip(numbers, offsets, counts, strict=True):
        weight = flat[offset : offset + count]
        theta = updated(weight, how, number, decays=number in (0, 2))
        plus, minus = perturbed(theta, a_visit(eps=1e-3, noise=kind), number)
        for out, alone in zip(outs, (theta, plus, minus), strict=True):
            assert torch.equal(out[offset : offset + count], alone)


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_formulas_in_fp32_with_one_rounding(dtype: torch.dtype, kind: Noise) -> None:
    weight = some_weights(2999, dtype)
    before = weight.clone()
    z = DRAW[kind](KEY, 2999)
    plus, minus = perturbed(weight, a_visit(eps=1e-3, noise=kind))
    assert torch.equal(weight, before)
    assert torch.equal(plus, (weight.float() + 1e-3 * z).to(dtype))
    assert torch.equal(minus, (weight.float() - 1e-3 * z).to(dtype))
    moved = before.float() - 0.01 * (0.4 * z + 0.1 * before.float())
    assert torch.equal(updated(weight, a_visit(an_update(), rounding="nearest", noise=kind)), moved.to(dtype))
    if dtype == torch.float32:
        assert torch.equal(updated(weight, a_visit(an_update(), noise=kind)), moved)


def test_updates_in_one_visit_are_as_in_several() -> None:
    """What a log replayed at once must hold to: the rounding of each step is part of the algorithm."""
    weight = some_weights(5000, torch.bfloat16)
    several = [an_update(step, g=1.0 + step) for step in range(9)]
    together = updated(weight, a_visit(*several))
    apart = weight
    for each in several:
        apart = updated(apart, a_visit(each))
    assert torch.equal(together, apart)


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [3.0, 0.02, 3e-5, 0.0])
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(
    dtype: torch.dtype, size: float, kind: Noise
) -> None:
    """Also around zero, and below fp16's smallest normal number, 6.1e-5."""
    count = 400_000
    start = torch.full((count,), size).to(dtype)
    how = a_visit(an_update(lr=2.7e-7, g=1.0, decay=0.0), noise=kind)
    z = DRAW[kind](KEY, count)
    wanted = start.double() - 2.7e-7 * z.double()
    out = updated(start, how).double()
    nearest = wanted.float().to(dtype)
    away = torch.full_like(nearest, float("inf"))
    up, down = torch.nextafter(nearest, away).double(), torch.nextafter(nearest, -away).double()
    assert ((out == nearest.double()) | (out == up) | (out == down)).all()
    unit = (up - nearest.double()).max().item()
    error = (out - wanted).double()
    assert abs(error.mean()) < 5 * unit / math.sqrt(count)
    # With z: what would pull the weights along the noise.
    assert abs((error * z).mean()) < 5 * unit / math.sqrt(count)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("change", [1e-7, 1e-6, 1e-5, 1e-4])
def test_updates_land(dtype: torch.dtype, change: float) -> None:
    """The share of the wanted update that reaches the weights, as its projection."""
    count = 8_000_000
    weight = some_weights(count, dtype)
    z = normal(KEY, count).double()
    wanted = -change * z
    landed = updated(weight, a_visit(an_update(lr=change, g=1.0, decay=0.0))).double() - weight.double()
    share = float((landed * wanted).sum() / (wanted * wanted).sum())
    assert 0.95 < share < 1.05


def test_no_scale_and_no_rate_change_no_bit() -> None:
    weight = some_weights(1000, torch.float16)
    assert torch.equal(perturbed(weight, a_visit(eps=0.0))[0], weight)
    assert torch.equal(updated(weight, a_visit(an_update(lr=0.0, g=3.0))), weight)


def test_a_projected_gradient_of_zero_still_decays() -> None:
    weight = torch.full((8,), 2.0)
    decayed = updated(weight, a_visit(an_update(lr=0.5, g=0.0, decay=0.25)))
    assert torch.equal(decayed, torch.full((8,), 2.0 - 0.5 * 0.25 * 2.0))


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("width", [1, 64, 513, 1500])
def test_rows_are_those_of_the_whole_tensor(width: int, kind: Noise) -> None:
    weight = some_weights(40 * width, torch.float16).view(40, width)
    plus, minus = perturbed(weight, a_visit(eps=1e-3, noise=kind))
    indices = torch.tensor([[3, 39, 0], [3, 17, 5]])
    assert torch.equal(rows(weight, 2, indices, a_visit(eps=1e-3, noise=kind)), plus[indices])
    assert torch.equal(rows(weight, 2, indices, a_visit(eps=-1e-3, noise=kind)), minus[indices])


def test_the_log_forgets_what_is_too_old() -> None:
    log = DeviceUpdateLog(CPU)
    for step in range(visits.LOG_CAPACITY + 3):
        log.append(an_update(step))
    assert [each.step for each in log.between(3, 6)] == [3, 4, 5]
    for first, last in ((2, 5), (5, 4), (5, visits.LOG_CAPACITY + 4)):
        with pytest.raises(ValueError, match="not in the log"):
            log.between(first, last)


def kernel_device() -> torch.device:
    """The kernels run on the GPU where there is one, else under Triton's interpreter."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else CPU


@pytest.mark.parametrize("seed", [0, 1, -3, 2**40 + 17, 2**63 + 5])
def test_the_kernel_has_the_same_integer_stream(seed: int) -> None:
    kernels = pytest.importorskip("engines.noise.weight_pass_kernels")
    key = NoiseKey(seed=seed, step=7, tensor=3)
    for first_lane in (0, 5, 2**32 - 64):
        ours = philox.philox_words(key, first_lane, 128, CPU)
        assert torch.equal(kernels.philox_words(key, first_lane, 128, kernel_device()).cpu(), ours)


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("start", "count"), [(0, 5000), (2 * TILE, 2047), (TILE, 1), (0, TILE)])
def test_the_kernel_gives_the_same_bits(dtype: torch.dtype, start: int, count: int, kind: Noise) -> None:
    """bfloat16 with stochastic rounding and nothing else: the interpreter truncates where the hardware
    rounds."""
    pytest.importorskip("triton")
    perturbs = dtype != torch.bfloat16 or torch.cuda.is_available()
    check_kernel(dtype, start, count, kind, perturbs=perturbs)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_compiled_kernel_gives_the_same_bits_as_the_cpu(dtype: torch.dtype, kind: Noise) -> None:
    pytest.importorskip("triton")
    check_kernel(dtype, 0, 3_000_001, kind, perturbs=True)
    check_kernel(dtype, 2**33, 4099, kind, perturbs=True)


def check_kernel(dtype: torch.dtype, start: int, count: int, kind: Noise, *, perturbs: bool) -> None:
    from engines.noise import weight_pass_kernels

    device = kernel_device()
    weight = some_weights(count, dtype)
    weight[: count // 3] *= 1e-3  # below fp16's normal numbers
    segment = one(2, count, decays=True)
    results = []
    for where, function in ((CPU, visit), (device, weight_pass_kernels.visit)):
        several = an_update(1, lr=1e-5), an_update(2**31 + 5, g=-2.0)
        how = a_visit(*several, eps=1e-3, device=where, seed=-5, noise=kind)
        source = weight.to(where)
        outs = [torch.empty_like(source) for _ in range(3)]
        more = {"plus": outs[1], "minus": outs[2]} if perturbs else {}
        out = Outputs(theta=outs[0], **more)
        function(source, segment, how, out, start)
        results.append([each.cpu() for each in outs[: 3 if perturbs else 1]])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("offsets", [(0, 2504, 2512), (0, 2501, 2505), (0, 2500, 2510)])
@pytest.mark.parametrize("kind", NOISES)
def test_the_kernel_of_vectors_and_rows_gives_the_same_bits(kind: Noise, offsets: tuple[int, ...]) -> None:
    """Wherever the tensors lie: of some widths a thread loads several elements at once."""
    pytest.importorskip("triton")
    from engines.noise import weight_pass_kernels

    device = kernel_device()
    flat = some_weights(5000, torch.float16)
    indices = torch.tensor([[3, 4], [0, 3]])
    results = []
    for where, vectors, gather in (
        (CPU, visit, rows),
        (device, weight_pass_kernels.visit, weight_pass_kernels.rows),
    ):
        how = a_visit(an_update(), eps=-1e-3, device=where, noise=kind)
        source = flat.to(where)
        outs = [torch.zeros_like(source) for _ in range(3)]
        segment = Segment((4, 1, 7), offsets, (2500, 3, 2488), (True, False, True))
        vectors(source, segment, how, Outputs(theta=outs[0], plus=outs[1], minus=outs[2]), 0)
        outs.append(gather(source.view(5, 1000), 3, indices.to(where), how))
        results.append([each.cpu() for each in outs])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", NOISES)
def test_a_tensor_beyond_the_reach_of_the_table_has_a_launch_of_its_own(
    kind: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from engines.noise import weight_pass_kernels

    monkeypatch.setattr("engines.noise.tiles.MOST_IN_TABLE", 5000)
    device, flat = kernel_device(), some_weights(9000, torch.float16)
    segment = Segment((4, 1, 7), (0, 4000, 6000), (4000, 1500, 3000), (True, False, True))
    assert [segment.is_large(index) for index in range(3)] == [False, True, True]
    assert len(segment.tiles(device)) == 2
    results = []
    for where, function in ((CPU, visit), (device, weight_pass_kernels.visit)):
        source = flat.to(where)
        out = torch.zeros_like(source)
        how = a_visit(an_update(), eps=1e-3, device=where, noise=kind)
        function(source, segment, how, Outputs(plus=out), 0)
        results.append(out.cpu())
    assert torch.equal(*results)


@pytest.mark.gpu
def test_a_row_of_the_log_is_not_written_again_before_it_is_copied() -> None:
    """A replay makes updates faster than the GPU takes them."""
    device = torch.device("cuda", 0)
    log = DeviceUpdateLog(device)
    torch.cuda._sleep(500_000_000)
    seen = []
    for step in range(3 * LOG_CAPACITY):
        log.append(an_update(step))
        seen.append(log.table[step % LOG_CAPACITY, 0].clone())
    assert torch.stack(seen).tolist() == list(range(3 * LOG_CAPACITY))


@pytest.mark.gpu
def test_torch_operations_on_the_gpu_give_the_same_bits() -> None:
    device = torch.device("cuda", 0)
    assert torch.equal(normal(KEY, 1_000_003, device).cpu(), normal(KEY, 1_000_003))
