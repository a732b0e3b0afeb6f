"""Which launches share a binary. That binaries compute what kernels do, the GPU tests of each kernel show."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from engines.kernels import triton_launch


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says otherwise."""

    is_cuda = True


def tensor(count: int = 64, *, shift: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    memory = torch.zeros(count + 64, dtype=dtype)
    first = -memory.data_ptr() // memory.element_size() % (16 // memory.element_size()) + shift
    return memory[first : first + count].as_subclass(OnGpu)


class Kernel:
    """As far as a launch knows one: keeps what it was compiled for and launched with."""

    arg_names = ("x", "count", "rate", "SIZE")

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **flags: Any) -> dict[Any, Any]:
        self.compiled.append((*arguments, flags))
        return Binary(self, len(self.compiled) - 1)


class Binary(dict[Any, Any]):
    def __init__(self, kernel: Kernel, number: int) -> None:
        self.kernel, self.number = kernel, number

    def __missing__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.kernel.launched.append((self.number, grid, arguments))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(triton_launch, "_binaries", {})
    monkeypatch.setattr(triton_launch, "_on", lambda index: nullcontext())
    return Kernel()


def test_equal_forms_share_a_binary_which_gets_all_arguments(kernel: Kernel) -> None:
    x, y = tensor(), tensor(128)
    triton_launch.launch(kernel, (7,), x, 48, 0.5, SIZE=8, num_warps=4)
    triton_launch.launch(kernel, (3, 2), y, 32, 1.5, SIZE=8, num_warps=4)
    assert len(kernel.compiled) == 1
    assert kernel.compiled[0][-1] == {"SIZE": 8, "num_warps": 4}
    (first, grid, arguments), (second, other_grid, others) = kernel.launched
    assert first == second == 0
    assert (grid, other_grid) == ((7, 1, 1), (3, 2, 1))
    assert arguments[0] is x
    assert others[0] is y
    assert (arguments[1:], others[1:]) == ((48, 0.5, 8), (32, 1.5, 8))


OTHERS: tuple[tuple[str, tuple[Any, ...], dict[str, int]], ...] = (
    ("dtype", (tensor(dtype=torch.float16), 48, 0.5), {"SIZE": 8}),
    ("alignment", (tensor(shift=1), 48, 0.5), {"SIZE": 8}),
    ("one", (tensor(), 1, 0.5), {"SIZE": 8}),
    ("no multiple of 16", (tensor(), 47, 0.5), {"SIZE": 8}),
    ("64 bits", (tensor(), 1 << 31, 0.5), {"SIZE": 8}),
    ("64 bits, negative", (tensor(), -(1 << 31) - 16, 0.5), {"SIZE": 8}),
    ("no sign", (tensor(), 1 << 63, 0.5), {"SIZE": 8}),
    ("an integer", (tensor(), 48, 2), {"SIZE": 8}),
    ("constant", (tensor(), 48, 0.5), {"SIZE": 16}),
    ("option", (tensor(), 48, 0.5), {"SIZE": 8, "num_warps": 8}),
)


@pytest.mark.parametrize(("arguments", "flags"), [each[1:] for each in OTHERS], ids=[o[0] for o in OTHERS])
def test_what_may_be_compiled_in_makes_a_binary_of_its_own(
    kernel: Kernel, arguments: tuple[Any, ...], flags: dict[str, int]
) -> None:
    triton_launch.launch(kernel, (1,), tensor(), 48, 0.5, SIZE=8)
    triton_launch.launch(kernel, (1,), *arguments, **flags)
    triton_launch.launch(kernel, (1,), tensor(), 48, 0.5, SIZE=8)
    assert len(kernel.compiled) == 2
    assert [number for number, *_ in kernel.launched] == [0, 1, 0]


def test_without_a_gpu_a_kernel_is_launched_as_it_is() -> None:
    launched: list[Any] = []

    class Plain(dict[Any, Any]):
        def __missing__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **flags: launched.append((grid, arguments, flags))

    x = torch.zeros(3)
    triton_launch.launch(Plain(), (5,), x, 48, SIZE=8)
    assert launched == [((5,), (x, 48), {"SIZE": 8})]
