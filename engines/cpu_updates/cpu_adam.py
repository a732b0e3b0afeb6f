"""Adam of a compressed gradient, on the CPU, and what all of Adam on the CPU is compiled from.

Memory decides its speed: two moments in fp32 and the core are read and written, 20 bytes for each element of
a bf16 core; with moments in bf16, which is approximate (`engines.cpu_updates.adamw`), 12. One pass over them
does that, and no operation of torch is one pass: its fused AdamW wants everything in one dtype, so that a
bf16 core is widened before and narrowed after. `cpu_adam.c` is that pass, compiled for this machine when it
is first used, which takes some tenths of a second.

    on an H200's host, 14 of 16 threads, alone: 3.8 G elements/s by torch's fused AdamW on parts that are
    widened in cache, 5.8 by this; at 20 bytes 116 GB/s, where reading and writing in place reaches 107.

Without a C compiler the same operations are done one by one in torch and numpy, several times slower, with
the same bits: each is rounded once, on every CPU and with any number of threads.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.cpu_updates.rounding import keep_by_chance, noise
from engines.files.locks import own_folder

SOURCE = Path(__file__).with_suffix(".c")

COMPILERS = ("cc", "gcc", "clang")

FLAGS = (
    "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fopenmp", "-shared", "-fPIC",
    # Compilers take half of the widest vectors by default: 16 cores of an Xeon did 6.6 G elements/s with bf16
    # moments, and 7.4 with whole ones.
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)  # fmt: skip
"""Those that are not about speed change no bits."""

COMPILE_LIMIT_S = 60.0

CHUNK = 1 << 16
"""Elements that torch's operations take at a time, so that what is between them stays in cache."""


class SlowAdamWarning(UserWarning):
    """There is no C compiler; steps that Adam decides take longer."""


class Factors(ctypes.Structure):
    """What the elements are multiplied by, in fp32; as in `cpu_adam.c`."""

    _fields_ = tuple(
        (name, ctypes.c_float)
        for name in (
            "scale",
            "keep_moment",
            "take_moment",
            "keep_variance",
            "take_variance",
            "unbias_moment",
            "unbias_root",
            "eps",
        )
    )


class Step(ctypes.Structure):
    """What AdamW multiplies weights by, and the key of its noise; as in `cpu_adam.c`."""

    _fields_ = (
        ("adam", Factors),
        ("keep_weight", ctypes.c_float),
        ("rate", ctypes.c_float),
        ("key", ctypes.c_uint32),
    )


class Memory(ctypes.Structure):
    """Addresses of what AdamW reads and writes; as in `cpu_adam.c`."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            "weight",
            "rest",
            "moment",
            "variance",
            "moment_scales",
            "variance_scales",
            "gradient",
        )
    )


def factors_of(updates: int, beta1: float, beta2: float, eps: float, scale: float) -> Factors:
    """Of the update of that number, counted from 1. The gradient is multiplied by `scale` first."""
    return Factors(
        scale=scale,
        keep_moment=beta1,
        take_moment=1.0 - beta1,
        keep_variance=beta2,
        take_variance=1.0 - beta2,
        unbias_moment=1.0 / (1.0 - beta1**updates),
        unbias_root=(1.0 - beta2**updates) ** -0.5,
        eps=eps,
    )


def core_adam(
    core: Tensor,
    moment: Tensor,
    variance: Tensor,
    updates: int,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    scale: float = 1.0,
    gradients: Sequence[Tensor] = (),
    key: int = 0,
) -> None:
    """Write Adam's direction m_hat / (sqrt(v_hat) + eps) over the gradient in `core`; moments in place.
    `gradients`, if there are any, are those of several processes, each like `core` and none of them it: it
    gets their sum first, in their order, each addition rounded to their dtype.

    Kingma & Ba (1412.6980), Algorithm 1, with eps outside the square root as in torch. All tensors are flat,
    contiguous, of one size and on the CPU, fp32 or bf16, both moments alike; a bf16 direction is rounded
    once, at its end, and made before moments are rounded. Of bf16 moments the first is rounded to nearest,
    the second up or down by noise of `key`, 32 bits, which is another for each update. `updates` counts the
    core's updates from 1, this one included. The gradient is multiplied by `scale` first. The learning rate
    and the decay are the caller's.

    Runs on as many threads as the calling thread has from torch. Without the interpreter's lock, but for a
    few microseconds.
    """
    factors, key = factors_of(updates, beta1, beta2, eps, scale), key & 0xFFFFFFFF
    library = compiled()
    if library is None:
        if gradients:
            add_up(core, gradients)
        core_adam_without_compiler(core, moment, variance, factors, key)
        return
    library.core_adam(
        core.data_ptr(),
        core.dtype == torch.bfloat16,
        moment.data_ptr(),
        variance.data_ptr(),
        moment.dtype == torch.bfloat16,
        core.numel(),
        factors,
        key,
        torch.get_num_threads(),
        *addresses(gradients),
    )


def addresses(gradients: Sequence[Tensor]) -> tuple[Any, int]:
    """Of the memory of each, as C takes them, and how many there are."""
    found = (ctypes.c_void_p * len(gradients))(*(each.data_ptr() for each in gradients))
    return found, len(gradients)


def add_up(out: Tensor, gradients: Sequence[Tensor]) -> None:
    """Write the sum of one or more `gradients` to `out`, in their order, each addition rounded to their
    dtype."""
    out.copy_(gradients[0])
    for each in gradients[1:]:
        out.add_(each)


def squared_norm_of_sum(gradients: Sequence[Tensor]) -> float:
    """Of what `add_up` makes of them, in fp64. None of them is written to."""
    total = 0.0
    for begin in range(0, gradients[0].numel(), CHUNK):
        parts = [each[begin : begin + CHUNK] for each in gradients]
        summed = parts[0].clone()
        add_up(summed, parts)
        total += float(summed.double().square_().sum())
    return total


@cache
def compiled() -> Any | None:
    """`cpu_adam.c` as a library, by the compiler that `CC` names or the first that can make it; `None` where
    none can, and a warning says why."""
    found = [shlex.split(os.environ.get("CC", "")), *([name] for name in COMPILERS if shutil.which(name))]
    why = "no compiler was found"
    for compiler in filter(None, found):
        try:
            return _compiled_by(compiler)
        except subprocess.CalledProcessError as error:
            why = f"{shlex.join(compiler)}: {error.stderr.decode(errors='replace').strip()[-300:]}"
        except (OSError, subprocess.SubprocessError) as error:
            why = f"{shlex.join(compiler)}: {error}"
    warnings.warn(
        f"Adam on the CPU could not be compiled ({why}): it runs in torch, with the same bits and "
        "several times slower; install gcc, or name a C compiler with OpenMP in CC",
        SlowAdamWarning,
        stacklevel=3,
    )
    return None


def _compiled_by(compiler: list[str]) -> Any:
    # In a folder of its own and gone when it is loaded: nothing to be stale, or another machine's.
    with own_folder() as folder:
        made = folder / "cpu_adam.so"
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_LIMIT_S)
        library = ctypes.CDLL(str(made))
    pointer = ctypes.c_void_p
    library.core_adam.argtypes = (
        pointer, ctypes.c_int, pointer, pointer, ctypes.c_int, ctypes.c_int64, Factors, ctypes.c_uint32,
        ctypes.c_int, pointer, ctypes.c_int,
    )  # fmt: skip
    library.core_adam.restype = None
    library.adamw.argtypes = (
        Memory, ctypes.c_int, ctypes.c_int, ctypes.c_int64, Step, ctypes.c_int, pointer, ctypes.c_int
    )  # fmt: skip
    library.adamw.restype = None
    library.store_release.argtypes = (pointer, ctypes.c_int64)
    library.store_release.restype = None
    library.load_acquire.argtypes = (pointer,)
    library.load_acquire.restype = ctypes.c_int64
    return library


def core_adam_without_compiler(
    core: Tensor, moment: Tensor, variance: Tensor, factors: Factors, key: int
) -> None:
    """What `cpu_adam.c` does to a core, by torch's operations: all of (elements,), fp32 or bf16."""
    for begin in range(0, core.numel(), CHUNK):
        part, kept_m, kept_v = (tensor[begin : begin + CHUNK] for tensor in (core, moment, variance))
        m, v, _, direction = adam_without_compiler(part.float(), kept_m.float(), kept_v.float(), factors)
        part.copy_(direction)
        kept_m.copy_(m)
        if kept_v.dtype == torch.bfloat16:
            keep_by_chance(kept_v, v, noise(key, begin, part.numel()))
        else:
            kept_v.copy_(v)


def adam_without_compiler(
    gradient: Tensor, moment: Tensor, variance: Tensor, factors: Factors
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adam of `cpu_adam.c` in its order of operations: both new moments, the root of the second, and the
    direction m_hat / (sqrt(v_hat) + eps). All of (elements,) in fp32; what is given is only read."""
    f: Any = factors  # ctypes adds the attributes
    gradient = gradient * f.scale
    m = (moment * f.keep_moment).add_(gradient * f.take_moment)
    v = (variance * f.keep_variance).add_((gradient * gradient).mul_(f.take_variance))
    # HAZARD: torch's own square root is not always the nearest number; numpy's is.
    root = torch.from_numpy(np.sqrt(v.numpy()))
    return m, v, root, (m * f.unbias_moment).div_((root * f.unbias_root).add_(f.eps))
