"""AdamW on the CPU: against AdamW in float64, compiled against torch's, compact states against exact."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engines.cpu_updates import adamw as module
from engines.cpu_updates import block_state
from engines.cpu_updates.adamw import AdamWMemory, adamw, master, state_tensors
from engines.cpu_updates.block_state import BlockChunk
from engines.cpu_updates.chunks import UpdateStep
from engines.cpu_updates.cpu_adam import compiled
from engines.cpu_updates.rounding import noise_key
from engines.settings.exact_offload import ExactOffloadSettings, Moments
from engines.settings.lsp import LspSettings
from engines.subspace import cores
from engines.subspace.cores import CoreState

KINDS: tuple[Moments, ...] = ("fp32", "bf16", "int8")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["compiled", "torch"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test with and without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(module, "compiled", lambda: None)
    elif compiled() is None:
        pytest.skip("needs a C compiler with OpenMP")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def fresh(weight: Tensor, kind: Moments) -> AdamWMemory:
    wanted = state_tensors(weight.numel(), weight.dtype, kind)
    state = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in wanted.items()}
    return AdamWMemory(
        weight=weight.clone(),
        rest=state.get("rest"),
        kind=kind,
        moment=state["moment"],
        variance=state["variance"],
        moment_scales=state.get("moment_scales"),
        variance_scales=state.get("variance_scales"),
    )


def step(memory: AdamWMemory, gradient: Tensor, updates: int, **changes: float) -> None:
    usual = {
        "learning_rate": 1e-2, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "scale": 1.0,
    }  # fmt: skip
    adamw(gradient, memory, updates, key=17 * updates, **{**usual, **changes})


def drawn(size: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Of many magnitudes, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-30, 3, (size,), generator=generator)
    values = torch.ldexp(torch.randn(size, generator=generator), exponents)
    return torch.where(torch.rand(size, generator=generator) < 0.1, 0.0, values).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_adamw_in_float64(dtype: torch.dtype, how: None) -> None:
    """The fp32 master, also of bf16 weights, to the rounding of some operations."""
    weight = torch.randn(5_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    memory = fresh(weight, "fp32")
    exact = weight.double()
    m = v = torch.zeros_like(exact)
    for updates in range(1, 21):
        gradient = torch.randn(5_000, generator=torch.Generator().manual_seed(updates)).to(dtype)
        g = 0.5 * gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        way = (m / (1 - 0.9**updates)) / ((v / (1 - 0.999**updates)).sqrt() + 1e-8)
        exact = exact * (1 - 1e-2 * 0.1) - 1e-2 * way
        step(memory, gradient, updates, scale=0.5)
    found = master(memory.weight, memory.rest)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_split_masters_are_fp32_masters(how: None) -> None:
    """Same bits of master and moments as with fp32 weights, from the same gradients."""
    start = torch.randn(3_001, generator=torch.Generator().manual_seed(0)).bfloat16()
    split, whole = fresh(start, "fp32"), fresh(start.float(), "fp32")
    for updates in range(1, 11):
        gradient = drawn(3_001, updates, torch.bfloat16)
        step(split, gradient, updates)
        step(whole, gradient.float(), updates)
        assert torch.equal(master(split.weight, split.rest), whole.weight)
        # Rounded to nearest: as a cast, but for halves.
        bits = whole.weight.view(torch.int32)
        is_half = (bits & 0xFFFF) == 0x8000
        assert torch.equal(split.weight[~is_half], whole.weight.bfloat16()[~is_half])
    assert torch.equal(split.moment, whole.moment)
    assert torch.equal(split.variance, whole.variance)


def test_what_no_bf16_weight_shows_adds_up_in_the_master(how: None) -> None:
    """90 updates of 2e-5 on a weight of 1, where bf16 has steps of 0.004 below and 0.008 above."""
    memory = fresh(torch.ones(8, dtype=torch.bfloat16), "fp32")
    for updates in range(1, 91):
        step(memory, torch.ones(8, dtype=torch.bfloat16), updates, learning_rate=2e-5, weight_decay=0.0)
    assert torch.equal(memory.weight, torch.ones(8, dtype=torch.bfloat16))
    torch.testing.assert_close(master(memory.weight, memory.rest), torch.full((8,), 1 - 1.8e-3))


def both_ways(memory: AdamWMemory, gradient: Tensor, updates: int) -> list[AdamWMemory]:
    found = []
    for library in (compiled(), None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "compiled", lambda library=library: library)
            mine = copy.deepcopy(memory)
            step(mine, gradient, updates, scale=0.3)
            found.append(mine)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 127, 128, 1025, 70_001])
def test_compiled_and_torch_have_the_same_bits(
    dtype: torch.dtype, size: int, kind: Moments, threads: None
) -> None:
    torch.set_num_threads(1 + size % 3)
    memory = fresh(drawn(size, 0, dtype), kind)
    for updates in range(1, 8):
        memory, its = both_ways(memory, drawn(size, updates, dtype), updates)
        assert torch.equal(memory.weight, its.weight)
        for name, tensor in memory.state().items():
            assert torch.equal(tensor, its.state()[name]), (name, updates)


@given(
    values=st.lists(st.tuples(*2 * [st.floats(-(2.0**50), 2.0**50, width=32)]), min_size=1, max_size=40),
    updates=st.integers(1, 10**6),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
)
def test_they_agree_on_every_number(
    values: list[tuple[float, float]], updates: int, kind: Moments, dtype: torch.dtype
) -> None:
    weight, gradient = (torch.tensor(column).to(dtype) for column in zip(*values, strict=True))
    mine, its = both_ways(fresh(weight, kind), gradient, updates)
    assert torch.equal(mine.weight, its.weight)
    for name, tensor in mine.state().items():
        assert torch.equal(tensor, its.state()[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_variance_without_gradient_decays(kind: Moments, how: None) -> None:
    """A step takes 0.1 %, less than half a step of bf16 or of the 8-bit code: rounding by chance keeps up."""
    memory = fresh(torch.ones(4096), kind)
    for updates in range(1, 201):
        gradient = torch.zeros(4096) if updates > 1 else torch.linspace(0.5, 1.0, 4096)
        step(memory, gradient, updates, learning_rate=0.0)
    _, variance = module.opened_moments(memory)
    expected = 0.001 * torch.linspace(0.5, 1.0, 4096).square() * 0.999**199
    tolerance = {"fp32": 1e-5, "bf16": 5e-3, "int8": 2e-2}[kind]
    torch.testing.assert_close(variance.sum(), expected.sum(), rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_compact_moments_lead_near_where_exact_ones_do(kind: Moments, how: None) -> None:
    """A noisy quadratic in 4,096 dimensions whose curvatures span four orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    curvature = torch.logspace(-2, 2, 4096)[torch.randperm(4096, generator=generator)]
    start = torch.randn(4096, generator=generator)
    losses = {}
    for each in ("fp32", kind):
        memory = fresh(start, each)  # type: ignore[arg-type]
        noise = torch.Generator().manual_seed(1)
        for updates in range(1, 301):
            gradient = curvature * (memory.weight + 0.1 * torch.randn(4096, generator=noise))
            step(memory, gradient, updates, weight_decay=0.0)
        losses[each] = float((curvature * memory.weight.square()).sum())
    assert losses[kind] == pytest.approx(losses["fp32"], rel=0.05)


def test_a_part_is_the_same_memory() -> None:
    memory = fresh(torch.ones(300), "int8")
    part = memory.part(128, 300)
    part.weight.zero_()
    part.moment_scales.fill_(2.0)  # type: ignore[union-attr]
    assert memory.weight.tolist() == [1.0] * 128 + [0.0] * 172
    assert memory.moment_scales is not None
    assert memory.moment_scales.tolist() == [0.0, 2.0, 2.0]


def test_states_take_what_is_said() -> None:
    bytes_of = {
        kind: sum(
            dtype.itemsize * math.prod(shape)
            for dtype, shape in state_tensors(1280, torch.bfloat16, kind).values()
        )
        for kind in KINDS
    }
    assert bytes_of == {"fp32": 10 * 1280, "bf16": 6 * 1280, "int8": 4 * 1280 + 80}


@pytest.mark.parametrize("of", ["block", "core"])
def test_every_update_of_every_chunk_draws_noise_of_its_own(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same one in each, an element's moment would be rounded up in all of them, or in none."""
    drawn: list[int] = []
    where, name = (block_state, "adamw") if of == "block" else (cores, "core_adam")
    monkeypatch.setattr(where, name, lambda *_, key, **__: drawn.append(key & 0xFFFFFFFF))
    chunk: BlockChunk | CoreState
    for number in range(4):
        n, key, common = 128, noise_key(0, number // 2, number % 2), {"deadline": 0, "number": number}
        if of == "block":
            chunk = BlockChunk(
                **common, squared_norm=torch.zeros(1), begin=0, end=n, weight=torch.zeros(n),
                memory=fresh(torch.zeros(n), "bf16"), weight_decay=0.0, settings=ExactOffloadSettings(),
                key=key, gradient=torch.zeros(n),
            )  # fmt: skip
        else:
            flat = torch.zeros(n)
            chunk = CoreState(
                **common, incoming=flat, outgoing=flat, moment=flat, variance=flat,
                squared_norm=torch.zeros(1), settings=LspSettings(), key=key,
            )  # fmt: skip
        for step in range(50):
            chunk.update(UpdateStep(number=step, learning_rate=1.0))
    assert len(set(drawn)) == len(drawn) == 200
