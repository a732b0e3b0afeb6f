"""Low-bit matrices: the grid, its stochastic rounding, and mezo and zo2 on them."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zeroth_order_runs import (
    KNOBS,
    a_visit,
    assert_same_steps,
    assert_same_weights,
    context,
    make_mezo,
    make_zo2,
    save,
)

from engines.costs import quantized
from engines.costs.quantized import GROUP_ELEMENTS, TILE_ELEMENTS, matrix_bytes
from engines.errors import InfeasiblePlan, UserError
from engines.methods.zo2 import Zo2
from engines.noise import weight_pass
from engines.noise.philox import NoiseKey, binomials, normal, signs
from engines.noise.tiles import Segment, one
from engines.quantized import codec
from engines.quantized.codec import pack, unpack
from engines.quantized.quantized_pass import add_low_rank_to_tiles, visit_tiles
from engines.settings.checks import Rounding
from engines.settings.parse import parse_settings
from engines.settings.zeroth_order import Base, MezoSettings, Noise, Zo2Settings
from engines.shapes import Dtype
from tiny_models import tiny_batches, tiny_blueprint

BASES: list[Base] = ["int8", "fp8", "int4"]
KINDS: list[Noise] = ["gaussian", "binomial", "rademacher"]
CPU = torch.device("cpu")


def packed(values: Tensor, base: Base) -> Tensor:
    tiles = torch.full((matrix_bytes(values.numel(), base),), 255, dtype=torch.uint8, device=values.device)
    pack(values, base, tiles)
    return tiles


def some_weights(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02


def by_group(values: Tensor) -> Tensor:
    """(groups, 128), with zeros at the end."""
    groups = torch.zeros(-(-values.numel() // GROUP_ELEMENTS) * GROUP_ELEMENTS, dtype=torch.float64)
    groups[: values.numel()] = values
    return groups.view(-1, GROUP_ELEMENTS)


def steps_of(values: Tensor, packed_from: Tensor, base: Base) -> Tensor:
    """The distance of the grid's neighbours around each of `values`, from the format's definition; scales are
    those of `packed_from`."""
    largest = by_group(packed_from).abs().amax(1, keepdim=True)
    if base == "fp8":
        scale = torch.exp2(torch.ceil(torch.log2(largest / 256)))
        exponent = torch.floor(torch.log2((by_group(values) / scale).abs())).clamp(min=-6)
        step = torch.exp2(exponent - 3) * scale
    else:
        # A scale is rounded up to 8 bits.
        step = (largest / {"int8": 124, "int4": 7}[base] * (1 + 2**-7)).expand(-1, GROUP_ELEMENTS)
    return step.reshape(-1)[: values.numel()]


def is_inside(values: Tensor, base: Base) -> Tensor:
    """Which are safely within their groups' grids."""
    groups = by_group(values).abs()
    return (groups < 0.8 * groups.amax(1, keepdim=True)).reshape(-1)[: values.numel()]


@settings(max_examples=60, deadline=None)
@given(
    base=st.sampled_from(BASES),
    count=st.sampled_from([1, 3, 127, 128, 129, 2047, 2048, 2049, 5000]),
    exponent=st.integers(-20, 12),
    seed=st.integers(0, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_packed_values_are_at_most_half_a_step_away(
    base: Base, count: int, exponent: int, seed: int, dtype: torch.dtype
) -> None:
    values = (some_weights(count, seed) * 2.0**exponent).to(dtype)
    got = unpack(packed(values, base), base, count).double()
    assert ((got - values.double()).abs() <= steps_of(values, values, base) / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("base", BASES)
def test_what_is_on_the_grid_stays_there(base: Base) -> None:
    """Packed again it has the same values; and updates that change nothing move nothing."""
    once = packed(some_weights(5000), base)
    values = unpack(once, base, 5000)
    visited = once.clone()
    visit_tiles(visited, one(3, 5000, decays=True), a_visit((0.0, 1.0)), base, store=True)
    assert torch.equal(visited, once)
    if base == "fp8":  # elsewhere the largest, rounded, may get another scale
        assert torch.equal(unpack(packed(values, base), base, 5000), values)


@pytest.mark.parametrize("base", BASES)
def test_zeros_stay_zeros_and_are_finite(base: Base) -> None:
    tiles = packed(torch.zeros(300), base)
    visit_tiles(tiles, one(3, 300, decays=True), a_visit((1e-3, 1.0)), base, store=True)
    assert unpack(tiles, base, 300).abs().max() < 1e-20


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2048, 70_001])
def test_pieces_make_up_the_whole(
    monkeypatch: pytest.MonkeyPatch, base: Base, kind: Noise, count: int
) -> None:
    results = []
    for tiles in (1, 7, 1000):
        monkeypatch.setitem(codec._CHUNK_TILES, "cpu", tiles)
        tiles = packed(some_weights(count), base)
        sides = [torch.zeros(count, dtype=torch.float16) for _ in range(2)]
        how = a_visit((1e-3, 0.5), (1e-4, -3.0), noise=kind)
        visit_tiles(tiles, one(3, count), how, base, store=True, sides=sides, perturb=True)
        results.append([tiles, *sides])
    assert all(
        torch.equal(each, whole)
        for piece in results[:2]
        for each, whole in zip(piece, results[2], strict=True)
    )


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", [False, True])
def test_formulas_in_fp32_between_the_grid_and_one_rounding(base: Base, kind: Noise, store: bool) -> None:
    draws = {"gaussian": normal, "binomial": binomials, "rademacher": signs}
    count, draw = 3000, draws[kind]
    tiles = packed(some_weights(count), base)
    value = unpack(tiles, base, count).double()
    updates = [(1e-3, 0.7), (2e-3, -0.4)]
    for step, (lr, g) in enumerate(updates):
        z = draw(NoiseKey(seed=-5, step=step, tensor=3), count).double()
        value -= lr * (g * z + 0.1 * value)
    how = a_visit(*updates, noise=kind)
    plain, plus, minus, one_side = (torch.empty(count) for _ in range(4))
    of = one(3, count, decays=True)
    visit_tiles(tiles.clone(), of, how, base, store=store, sides=(plain,))
    visit_tiles(tiles.clone(), of, how, base, store=store, sides=(one_side,), perturb=True)
    visit_tiles(tiles, of, how, base, store=store, sides=(plus, minus), perturb=True)
    assert torch.equal(one_side, plus)
    if store:
        rounded = unpack(tiles, base, count).double()
        assert torch.equal(plain.double(), rounded)
        step = steps_of(torch.maximum(value.abs(), rounded.abs()), some_weights(count), base)
        assert ((rounded - value).abs() < step)[is_inside(some_weights(count), base)].all()
        value = rounded
    assert torch.allclose(plain.double(), value, rtol=0, atol=1e-8)
    z = draw(NoiseKey(seed=-5, step=2, tensor=3), count).double()
    assert torch.allclose(plus.double(), value + 1e-3 * z, rtol=0, atol=1e-8)
    assert torch.allclose(minus.double(), value - 1e-3 * z, rtol=0, atol=1e-8)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-4])
def test_a_store_is_unbiased(base: Base, kind: Noise, size: float) -> None:
    """The mean of what rounding adds is zero, over all elements and in the direction of the update, within
    5 standard errors; elements near the end of their grid are left out, where updates are cut off."""
    count = 1 << 20
    tiles = packed(some_weights(count), base)
    before = unpack(tiles, base, count)
    inside = is_inside(before, base)
    how = a_visit((size, 1.0), (size, 1.0), noise=kind)
    wanted = torch.empty(count)
    visit_tiles(tiles.clone(), one(3, count), how, base, store=False, sides=(wanted,))
    visit_tiles(tiles, one(3, count), how, base, store=True)
    added = (unpack(tiles, base, count) - wanted).double()[inside]
    assert added.abs().max() > 0
    assert added.mean().abs() < 5 * added.std() / math.sqrt(len(added))
    direction = (wanted - before).double()[inside]
    along = added * direction
    assert along.mean().abs() < 5 * along.std() / math.sqrt(len(added))


def test_rounding_to_nearest_loses_small_updates() -> None:
    tiles = packed(some_weights(5000), "int8")
    before = tiles.clone()
    how = a_visit((1e-6, 1.0), rounding="nearest")
    visit_tiles(tiles, one(3, 5000), how, "int8", store=True)
    assert torch.equal(tiles, before)


def test_the_cost_models_tiles_are_those_of_the_noise() -> None:
    assert TILE_ELEMENTS == weight_pass.TILE
    assert [quantized.tile_bytes(base) for base in BASES] == [2080, 2080, 1056]


def kernel_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else CPU


def check_kernel(
    base: Base,
    count: int,
    dtype: torch.dtype,
    *,
    store: bool,
    sides: int,
    perturb: bool,
    rounding: Rounding,
    kind: Noise,
) -> None:
    from engines.quantized import quantized_pass_kernels

    results = []
    for where, function in ((CPU, visit_tiles), (kernel_device(), quantized_pass_kernels.visit_tiles)):
        how = a_visit((1e-3, 0.7), (1e-5, -2.0), device=where, rounding=rounding, noise=kind)
        tiles = packed(some_weights(count), base).to(where)
        outs = [torch.zeros(count, dtype=dtype, device=where) for _ in range(sides)]
        of = one(3, count, decays=True)
        function(tiles, of, how, base, store=store, sides=outs, perturb=perturb)
        results.append([each.cpu() for each in (tiles, *outs)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("kind", "store", "sides", "perturb", "rounding", "count"),
    [
        *((kind, True, 2, True, "stochastic", 2100) for kind in KINDS),
        ("gaussian", False, 2, True, "stochastic", 4100),
        ("gaussian", False, 1, False, "stochastic", 300),
        ("gaussian", True, 1, True, "nearest", 2100),
        ("gaussian", True, 0, False, "nearest", 2048),
    ],
)
def test_the_kernel_gives_the_same_bits(
    base: Base,
    kind: Noise,
    store: bool,
    sides: int,
    perturb: bool,
    rounding: Rounding,
    count: int,
) -> None:
    pytest.importorskip("triton")
    check_kernel(
        base, count, torch.float16, store=store, sides=sides, perturb=perturb, rounding=rounding, kind=kind
    )


@pytest.mark.gpu
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_the_compiled_kernel_gives_the_same_bits_as_the_cpu(
    base: Base, kind: Noise, dtype: torch.dtype, rounding: Rounding
) -> None:
    pytest.importorskip("triton")
    how: dict[str, Any] = {"rounding": rounding, "kind": kind}
    for store in (True, False):
        for sides, perturb in ((2, True), (1, True), (1, False), (0, False)):
            check_kernel(base, 1_000_001, dtype, store=store, sides=sides, perturb=perturb, **how)


@pytest.mark.parametrize(
    ("base", "kind", "sides", "store"),
    [
        *(("int8", kind, 2, True) for kind in KINDS), *((base, "gaussian", 2, True) for base in BASES[1:]),
        ("int4", "gaussian", 0, True), ("int4", "gaussian", 1, False), ("int4", "gaussian", 2, False),
    ],
)  # fmt: skip
def test_matrices_that_lie_together_are_visited_as_one_by_one(
    base: Base, kind: Noise, sides: int, store: bool
) -> None:
    """By torch's operations; and together by the kernel, which visits single ones elsewhere."""
    pytest.importorskip("triton")
    from engines.quantized import quantized_pass_kernels

    counts, offsets, numbers = (300, 2048, 2100), (8, 312, 2360), (3, 9, 4)
    segment = Segment(numbers, offsets, counts, (True, True, True))
    each = [packed(some_weights(count, seed), base) for seed, count in enumerate(counts)]
    results = []
    ways = (
        (CPU, visit_tiles, (True, False)), (kernel_device(), quantized_pass_kernels.visit_tiles, (True,)),
    )  # fmt: skip
    for where, function, ways_of_matrices in ways:
        how = a_visit((1e-3, 0.7), (1e-5, -2.0), device=where, noise=kind)
        perturb = sides == 2
        for together in ways_of_matrices:
            tiles = torch.cat(each).to(where)
            outs = [torch.zeros(4464, dtype=torch.float16, device=where) for _ in range(sides)]
            if together:
                function(tiles, segment, how, base, store=store, sides=outs, perturb=perturb)
            else:
                chunks = tiles.split([len(mine) for mine in each])
                for mine, number, at, count in zip(chunks, numbers, offsets, counts, strict=True):
                    buffers = [out[at : at + count] for out in outs]
                    of = one(number, count, decays=True)
                    function(mine, of, how, base, store=store, sides=buffers, perturb=perturb)
            results.append([kept.cpu() for kept in (tiles, *outs)])
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize(("height", "width", "rank"), [(1, 1, 1), (70, 90, 3), (33, 64, 4), (2, 2048, 2)])
def test_the_kernel_of_a_low_rank_sum_gives_the_same_bits(
    base: Base, stochastic: bool, height: int, width: int, rank: int
) -> None:
    pytest.importorskip("triton")
    from engines.quantized import quantized_pass_kernels

    made = torch.Generator().manual_seed(0)
    rows, columns = torch.randn(rank, height, generator=made) * 1e-2, torch.randn(rank, width, generator=made)
    before = packed(some_weights(height * width), base)
    results = []
    for where, function in (
        (CPU, add_low_rank_to_tiles),
        (kernel_device(), quantized_pass_kernels.add_low_rank_to_tiles),
    ):
        tiles = before.clone().to(where)
        key = NoiseKey(seed=-5, step=3, tensor=2)
        function(tiles, base, rows.to(where), columns.to(where), key, stochastic=stochastic)
        results.append(tiles.cpu())
    assert torch.equal(*results)
    assert not torch.equal(results[0], before)


@pytest.mark.gpu
@pytest.mark.parametrize("base", BASES)
def test_packing_on_the_gpu_gives_the_same_bits(base: Base) -> None:
    values = some_weights(5_000_001).to(torch.float16)
    assert torch.equal(packed(values.cuda(), base).cpu(), packed(values, base))


# --- mezo and zo2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "fold_every", "resident"),
    [("int8", 1, 0), ("int8", 1, 1), ("int8", 4, 0), ("int8", 4, 1), ("fp8", 4, 1), ("int4", 4, 1)],
)
def test_zo2_equals_mezo(base: Base, fold_every: int, resident: int) -> None:
    """Also when it is evaluated in between, which must not round anything."""
    where, knobs = context(dtype="bf16"), {"base": base, "fold_every": fold_every}
    mezo = make_mezo(tiny_blueprint("opt"), where, **knobs)
    streamed = make_zo2(tiny_blueprint("opt"), where, resident_blocks=resident, **knobs)
    undisturbed = make_zo2(tiny_blueprint("opt"), where, resident_blocks=resident, **knobs)
    batches = tiny_batches(6, "opt")
    assert_same_steps(mezo, streamed, batches[:5])
    assert streamed.evaluate(batches[:2]) == mezo.evaluate(batches[:2])
    assert_same_weights(mezo, streamed)
    assert_same_steps(mezo, streamed, batches[5:])
    for batch in batches:
        undisturbed.step([batch])
    assert_same_weights(streamed, undisturbed)
    assert streamed.realized_update_fraction() == mezo.realized_update_fraction() is not None


@pytest.mark.parametrize(("family", "dtype"), [("llama", "fp32"), ("gpt2", "fp16"), ("bert", "fp16")])
def test_zo2_equals_mezo_for_any_family_and_with_micro_batches(family: str, dtype: Dtype) -> None:
    where, knobs = context(dtype=dtype), {"base": "int8", "fold_every": 2}
    mezo, streamed = (make(tiny_blueprint(family), where, **knobs) for make in (make_mezo, make_zo2))
    batches = tiny_batches(6, family)
    for first in (0, 2, 4):
        expected, stats = mezo.step(batches[first : first + 2]), streamed.step(batches[first : first + 2])
        assert (stats.loss, stats.projected_gradient) == (expected.loss, expected.projected_gradient)
    assert_same_weights(mezo, streamed)


@pytest.mark.parametrize(("fold_every", "train"), [(1, "all"), (3, "all"), (1, "last:1")])
def test_a_log_is_replayed_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, fold_every: int, train: str
) -> None:
    """More updates than are deferred at once: a replay rounds at several steps in one visit."""
    monkeypatch.setattr("engines.zeroth_order.deferred_updates.LOG_CAPACITY", 5)
    where, knobs = context(), {"base": "int8", "fold_every": fold_every, "train": train}
    live = make_zo2(tiny_blueprint("opt", num_blocks=2), where, **knobs)
    batches = tiny_batches(3, "opt")
    updates = [update for step in range(8) for update in live.step([batches[step % 3]]).updates]
    replayed = [make(tiny_blueprint("opt", num_blocks=2), where, **knobs) for make in (make_mezo, make_zo2)]
    for each in replayed:
        each.replay(update for update in updates if update is not None)
        assert_same_weights(live, each)
    expected = [live.step([batch]).loss for batch in batches[:2]]
    for each in replayed:
        assert [each.step([batch]).loss for batch in batches[:2]] == expected
        assert_same_weights(live, each)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("resume", [make_mezo, make_zo2])
def test_a_checkpoint_holds_the_low_bit_form_and_what_is_deferred(
    base: Base, resume: Any, tmp_path: Path
) -> None:
    where, knobs = context(dtype="fp16"), {"base": base, "fold_every": 4}
    streamed = make_zo2(tiny_blueprint("llama"), where, **knobs)
    batches = tiny_batches(9, "llama")
    for batch in batches[:6]:
        streamed.step([batch])
    folder = save(streamed, tmp_path / "at-6")
    resumed = resume(tiny_blueprint("llama", seed=5), context(dtype="fp16", seed=1), **knobs)
    resumed.load(folder)
    assert_same_weights(streamed, resumed)
    assert_same_steps(resumed, streamed, batches[6:])
    assert_same_weights(streamed, resumed)
    shards = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    full = make_zo2(tiny_blueprint("llama"), where)
    with pytest.raises(UserError, match=f"its base is {base}.*--set base={base}"):
        full.load(folder)
    kept = sum(
        each.numel() * each.itemsize for each in streamed.blocks.tensors(streamed._updates.step - 1).values()
    )
    assert kept <= shards < kept + 8000  # and the names


def test_an_old_checkpoint_without_a_base_is_of_a_full_one(tmp_path: Path) -> None:
    mezo = make_mezo(tiny_blueprint("opt"))
    folder = save(mezo, tmp_path / "saved")
    state = (folder / "state.json").read_text()
    for key in ("base", "pending", "behind"):
        assert f'"{key}"' in state
    old = {key: value for key, value in json.loads(state).items() if key not in ("base", "pending", "behind")}
    (folder / "state.json").write_text(json.dumps(old))
    make_zo2(tiny_blueprint("opt")).load(folder)


def test_adapters_leave_the_base_untouched() -> None:
    """`train=lora` on a low-bit base: it is read-only, and nothing goes down."""
    where, knobs = context(dtype="bf16"), {"base": "int4", "train": "lora", "lora_rank": 2}
    mezo, streamed = (make(tiny_blueprint("opt"), where, **knobs) for make in (make_mezo, make_zo2))
    before = [streamed.blocks.stream.at_rest(index).clone() for index in range(3)]  # type: ignore[union-attr]
    stats = assert_same_steps(mezo, streamed, tiny_batches(4, "opt"))  # type: ignore[arg-type]
    assert all(each.d2h_bytes == 0 for each in stats)
    streamed.synchronize()
    after = [streamed.blocks.stream.at_rest(index) for index in range(3)]  # type: ignore[union-attr]
    assert all(map(torch.equal, before, after))
    assert_same_weights(mezo, streamed)


def test_weights_are_those_of_the_model_quantised() -> None:
    """Matrices to the grid, and vectors, embeddings and head as they are."""
    blueprint = tiny_blueprint("opt", tied=True)
    made = make_zo2(blueprint, base="int8")
    for name, weight in made.weights():
        original = blueprint.reference.get_parameter(name).detach()
        if ".layers." in name and weight.dim() == 2:
            expected = unpack(packed(original.reshape(-1), "int8"), "int8", original.numel())
            assert torch.equal(weight, expected.view(original.shape))
            assert not torch.equal(weight, original)
        else:
            assert torch.equal(weight, original)


def test_fewer_bytes_are_asked_of_the_host() -> None:
    """A plan that a full base cannot have fits with a low-bit one."""
    blueprint = tiny_blueprint("opt")
    limited = context(dtype="fp32")
    host_bytes = 2 * 3 * blueprint.shape.block_parameters
    limited = replace(limited, host_bytes=host_bytes + 3 * 4 * 6 * 2048)
    with pytest.raises(InfeasiblePlan, match="host memory"):
        make_zo2(tiny_blueprint("opt"), replace(limited, host_bytes=host_bytes))
    make_zo2(tiny_blueprint("opt"), limited, base="int4")


def test_folding_is_no_knob_of_mezo_with_a_full_base() -> None:
    with pytest.raises(UserError, match="fold_every is of use to mezo with a low-bit base"):
        parse_settings("mezo", {"fold_every": "2"})
    assert isinstance(parse_settings("mezo", {"fold_every": "2", "base": "fp8"}), MezoSettings)
    with pytest.raises(UserError, match="base"):
        parse_settings("zo2", {"base": "int2"})


@pytest.mark.gpu
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("fold_every", [1, 3])
@pytest.mark.parametrize("graphs", [False, True])
def test_equals_mezo_on_the_gpu(
    base: Base, fold_every: int, graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a full base: small chunks, a small ring, and a link that is held up at random."""
    if not graphs:
        monkeypatch.setattr("engines.zeroth_order.perturbed_model.GRAPH_SCRATCH_BYTES", 0)
        monkeypatch.setattr("engines.offload.ring.UPLOAD_BYTES", 3000)
        monkeypatch.setattr(
            "engines.offload.ring.ring_bytes", lambda sizes: -(-max(sizes) * 5 // 4 // 512) * 512
        )
    where = context("cuda:0", "fp16")
    delays = random.Random(0)
    knobs = {"base": base, "fold_every": fold_every}
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=7), where, **knobs)

    def delayed(seed: int) -> Zo2:
        made = Zo2(Zo2Settings(**KNOBS, resident_blocks=1, **knobs), where)  # type: ignore[arg-type]
        made.link_delay = lambda: delays.randrange(400_000)
        made.setup(tiny_blueprint("opt", num_blocks=7, seed=seed))
        return made

    streamed = delayed(seed=0)
    batches = tiny_batches(20, "opt")
    updates = [update for each in assert_same_steps(mezo, streamed, batches[:10]) for update in each.updates]
    assert streamed.evaluate(batches[:3]) == mezo.evaluate(batches[:3])
    resumed = delayed(seed=99)
    resumed.load(save(streamed, tmp_path / "at-10"))
    replayed = delayed(seed=0)
    replayed.replay(updates)
    assert_same_weights(streamed, replayed)
    assert streamed.realized_update_fraction() == mezo.realized_update_fraction() is not None
    streamed.close()
    assert_same_steps(mezo, resumed, batches[10:])
    assert_same_weights(mezo, resumed)
    resumed.close()
    replayed.close()
