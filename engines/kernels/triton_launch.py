"""Launches Triton kernels for 0.4 of what Triton's own `kernel[grid](...)` costs the CPU.

That looks anew at every argument, and compares every global constant of the kernel with what it was when the
kernel was compiled: 204 microseconds a launch in a profile of OPT-1.3B's steps, here 78. Small models have
little more GPU time for a launch than that. The binary is launched itself (as Triton's tutorial on softmax
does). It is kept by everything that Triton may have compiled into it: dtype and alignment of tensors, and of
numbers their type, and whether they are 1 or a multiple of 16.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Bytes, and what numbers are multiples of."""

_binaries: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""Binaries, and the constants that are arguments of theirs."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **flags: Any) -> None:
    """Start a Triton kernel on the device of the first argument, a tensor. `kernel[grid](*arguments)` would
    do the same at many times the cost for the host.

    `flags` are the kernel's constants, which are its last parameters, and options of the compiler. Without a
    GPU, for the interpreter, this is just that.
    """
    first = arguments[0]
    if not first.is_cuda:
        kernel[grid](*arguments, **flags)
        return
    with _on(first.device.index):
        key = (id(kernel), first.device.index, *flags.items(), *map(_form, arguments))
        found = _binaries.get(key)
        if found is None:
            binary = kernel.warmup(*arguments, grid=grid, **flags)
            constants = tuple(flags[name] for name in kernel.arg_names[len(arguments) :])
            found = _binaries[key] = binary, constants
        binary, constants = found
        binary[grid + (1,) * (3 - len(grid))](*arguments, *constants)


def _form(value: Any) -> Any:
    """What may be compiled into a binary of an argument."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % _ALIGNMENT == 0
    if isinstance(value, int):
        # 32 bits, else 64, and without a sign beyond.
        kind = 0 if -(1 << 31) <= value < 1 << 31 else 1 if value < 1 << 63 else 2
        return value == 1, value % _ALIGNMENT == 0, kind
    return type(value)


def _on(index: int) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index)


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def has_c_compiler() -> bool:
    """Whether there is the compiler that Triton needs to start a kernel for the first time."""
    return any(which(each) for each in (os.environ.get("CC") or "cc", "gcc", "clang"))
