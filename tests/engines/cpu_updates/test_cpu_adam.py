"""Adam of a compressed gradient: against Adam in float64, and compiled against torch's operations."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engines.cpu_updates import cpu_adam as module
from engines.cpu_updates.cpu_adam import SlowAdamWarning, compiled, core_adam
from engines.cpu_updates.rounding import NEXT_UPDATE

PART = 32768
"""As in core_adam.c."""


@pytest.fixture(params=["compiled", "torch"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test with and without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(module, "compiled", lambda: None)
        monkeypatch.setattr(module, "CHUNK", 1000)
    elif compiled() is None:
        pytest.skip("needs a C compiler with OpenMP")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, 17, 33, 70_001])
@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_adam_in_float64(scale: float, size: int, dtype: torch.dtype, how: None) -> None:
    generator = torch.Generator().manual_seed(size)
    moment, variance = torch.zeros(size), torch.zeros(size)
    exact_m, exact_v = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for step in range(1, 6):
        # One sign per element: a moment near zero would be all rounding error.
        gradient = (scale * (0.5 + torch.rand(size, generator=generator))).to(dtype)
        exact_g = gradient.double()
        exact_m = 0.9 * exact_m + 0.1 * exact_g
        exact_v = 0.999 * exact_v + 0.001 * exact_g**2
        expected = (exact_m / (1 - 0.9**step)) / ((exact_v / (1 - 0.999**step)).sqrt() + 1e-8)
        core_adam(gradient, moment, variance, step, beta1=0.9, beta2=0.999, eps=1e-8)
        # bf16: moments as exact as ever, the direction rounded once.
        rtol = 1e-5 if dtype == torch.float32 else 2.0**-8
        torch.testing.assert_close(gradient.double(), expected, rtol=rtol, atol=0.0)
    torch.testing.assert_close(moment.double(), exact_m, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(variance.double(), exact_v, rtol=1e-5, atol=0.0)


def test_signs_are_the_gradients(how: None) -> None:
    gradient = torch.tensor([-2.0, 3.0, 0.0] * 7)
    expected = gradient.sign()
    moment, variance = torch.zeros(21), torch.zeros(21)
    core_adam(gradient, moment, variance, 1, beta1=0.9, beta2=0.999, eps=1e-8)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(moment, 0.1 * torch.tensor([-2.0, 3.0, 0.0] * 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_gradient_is_the_gradient_scaled(dtype: torch.dtype, how: None) -> None:
    gradient = torch.randn(333, generator=torch.Generator().manual_seed(0)).to(dtype)
    scaled = gradient * 0.25  # exact
    found = [torch.zeros(333) for _ in range(4)]
    core_adam(gradient, *found[:2], 3, beta1=0.9, beta2=0.999, eps=1e-8, scale=0.25)
    core_adam(scaled, *found[2:], 3, beta1=0.9, beta2=0.999, eps=1e-8)
    assert torch.equal(gradient, scaled)
    assert torch.equal(found[0], found[2])


def test_bf16_moments_have_the_mean_of_fp32_ones(how: None) -> None:
    """Of 20,000 equal elements; 0.1 % of a variance is below half a unit in the last place."""
    count = 20_000
    kept = [torch.zeros(count, dtype=torch.bfloat16) for _ in range(2)]
    kept[1].fill_(1.0)
    exact = [torch.zeros(count), torch.ones(count)]
    for step in range(1, 31):
        core = torch.full((count,), 0.25, dtype=torch.bfloat16)
        direction = core.clone()
        core_adam(direction, *kept, step, beta1=0.9, beta2=0.999, eps=1e-8, key=NEXT_UPDATE * step)
        core_adam(core, *exact, step, beta1=0.9, beta2=0.999, eps=1e-8)
        torch.testing.assert_close(direction.float().mean(), core.float().mean(), rtol=0.02, atol=0.0)
    assert float(exact[1][0]) < 0.98
    torch.testing.assert_close(kept[1].float().mean(), exact[1].mean(), rtol=2e-4, atol=0.0)
    torch.testing.assert_close(kept[0].float().mean(), exact[0].mean(), rtol=0.02, atol=0.0)
    assert float(kept[1].float().std()) > 0.0


def test_a_variance_without_gradient_decays(how: None) -> None:
    """In bf16 moments rounded to nearest it would not: 0.1 % is below half a unit in the last place."""
    moment, variance = torch.zeros(64), torch.ones(64)
    core = torch.zeros(64, dtype=torch.bfloat16)
    for step in range(1, 101):
        core_adam(core.zero_(), moment, variance, step, beta1=0.9, beta2=0.999, eps=1e-8)
    torch.testing.assert_close(variance, torch.full((64,), 0.999**100))


def assert_same_both_ways(core: Tensor, moment: Tensor, variance: Tensor, updates: int, scale: float) -> None:
    """Assert that both ways leave the same bits."""
    assert compiled() is not None or shutil.which("cc") is None
    found = []
    for library in (compiled(), None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "compiled", lambda library=library: library)
            tensors = [core.clone(), moment.clone(), variance.clone()]
            core_adam(*tensors, updates, beta1=0.9, beta2=0.999, eps=1e-8, scale=scale, key=updates)
            found.append(tensors)
    for mine, its in zip(*found, strict=True):
        assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 17, PART - 1, PART, 3 * PART + 5])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_compiled_and_torch_have_the_same_bits(
    dtype: torch.dtype, size: int, num_threads: int, threads: None
) -> None:
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(size)

    def drawn() -> Tensor:
        """Of all magnitudes, zeros and denormals among them."""
        exponents = torch.randint(-150, 40, (size,), generator=generator)
        return torch.ldexp(torch.randn(size, generator=generator), exponents)

    assert_same_both_ways(drawn().to(dtype), drawn(), drawn().abs(), 7, 1.0)
    assert_same_both_ways(drawn().to(dtype), drawn(), drawn().abs(), 1, 0.3)
    compact = drawn().bfloat16(), drawn().abs().bfloat16()
    assert_same_both_ways(drawn().to(dtype), *compact, 7, 0.3)


@given(
    values=st.lists(st.tuples(*3 * [st.floats(width=32)]), min_size=1, max_size=40),
    updates=st.integers(1, 10**6),
    scale=st.floats(0.0, 1.0, width=32),
)
def test_they_agree_on_every_number(
    values: list[tuple[float, float, float]], updates: int, scale: float
) -> None:
    core, moment, variance = (torch.tensor(column) for column in zip(*values, strict=True))
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for library in (compiled(), None):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "compiled", lambda library=library: library)
                tensors = [core.to(dtype, copy=True), moment.clone(), variance.abs()]
                core_adam(*tensors, updates, beta1=0.9, beta2=0.999, eps=1e-8, scale=scale)
                found.append(tensors)
        for mine, its in zip(*found, strict=True):
            # NaN is NaN: which of its bits an operation leaves is not said anywhere.
            torch.testing.assert_close(mine, its, rtol=0.0, atol=0.0, equal_nan=True)


def test_without_a_compiler_there_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for compiler in ("/nowhere/cc", "false", None):
        if compiler is None:
            monkeypatch.delenv("CC")
        else:
            monkeypatch.setenv("CC", compiler)
        with pytest.warns(SlowAdamWarning, match=compiler or "no compiler was found"):
            assert compiled.__wrapped__() is None


def test_it_is_compiled_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    for compiler in ("gcc -g", "/nowhere/cc"):  # with arguments; and another where that one is missing
        monkeypatch.setenv("CC", compiler)
        assert compiled.__wrapped__() is not None


def test_the_bias_of_late_updates_is_gone() -> None:
    core, moment, variance = torch.ones(3), torch.full((3,), 0.5), torch.full((3,), 0.25)
    core_adam(core, moment, variance, 10**7, beta1=0.9, beta2=0.999, eps=0.0)
    expected = (0.5 * 0.9 + 0.1) / math.sqrt(0.25 * 0.999 + 0.001)
    torch.testing.assert_close(core, torch.full((3,), expected))
