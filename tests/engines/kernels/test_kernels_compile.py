"""Every Triton kernel compiles for the GPUs that it is for, and fits them: no GPU is needed.

What the interpreter of the other tests does not see: types that the hardware lacks, registers that run out,
shared memory that is too small.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from kernel_compiler import ARCHES, Compiled, unreached

from engines.kernels.triton_launch import has_triton

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
    pytest.mark.xdist_group("kernels"),  # so that they are compiled once
]

PROCESSES = 2
REGISTERS = 65536
"""Of a multiprocessor, which a block of threads has to share."""
STACK_BYTES = 16
"""Of a thread: the assembler may put a few registers aside to fit one more block of threads."""
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""That a block can ask for."""


@pytest.fixture(scope="module")
def compiled() -> tuple[dict[str, list[str]], list[Compiled]]:
    """The functions of the kernel files with those that they call, and all kernels in all forms."""
    script = Path(__file__).parents[2] / "support" / "kernel_compiler.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    running = [
        subprocess.Popen(
            [sys.executable, script, "--json", "--part", f"{part}/{PROCESSES}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for part in range(PROCESSES)
    ]  # fmt: skip
    found: list[Compiled] = []
    functions: dict[str, list[str]] = {}
    for process in running:
        out, told = process.communicate()
        assert process.returncode == 0, told
        first, *rest = out.splitlines()
        functions = json.loads(first)
        found += [Compiled(**json.loads(line)) for line in rest]
    return functions, found


def test_each_kernel_is_compiled_for_each_architecture(
    compiled: tuple[dict[str, list[str]], list[Compiled]],
) -> None:
    """Each function of the files is a kernel that was launched, or is called by one."""
    functions, kernels = compiled
    for arch in ARCHES:
        reached = {f"{each.module}.{each.kernel}" for each in kernels if each.arch == arch}
        assert reached <= functions.keys()
        assert unreached(reached, functions) == [], f"not compiled for sm_{arch}"


def test_no_kernel_runs_out_of_registers(compiled: tuple[dict[str, list[str]], list[Compiled]]) -> None:
    for each in compiled[1]:
        assert each.stack_bytes <= STACK_BYTES, each
        assert each.registers * each.threads <= REGISTERS, each


def test_shared_memory_is_there(compiled: tuple[dict[str, list[str]], list[Compiled]]) -> None:
    for each in compiled[1]:
        assert each.shared_bytes <= SHARED_BYTES[each.arch], each


def test_what_limits_noise_is_arithmetic_of_known_length(
    compiled: tuple[dict[str, list[str]], list[Compiled]],
) -> None:
    """Two normals and two moves of four elements are some 450 instructions, rounding to a grid some 150. What
    moves values through shared memory has many more."""
    kernels = [each for each in compiled[1] if each.kernel in ("_matrix_kernel", "_visit_kernel")]
    assert Counter(each.arch for each in kernels).keys() == set(ARCHES)
    for each in kernels:
        assert each.shared_bytes == 0, each
        assert each.instructions < 900, each
