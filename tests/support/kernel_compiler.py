"""Compiles the Triton kernels for a GPU that is not there, and tells what they came to.

The interpreter that other tests run kernels in checks no types of the hardware, no registers and no shared
memory. Here the kernels' own Python functions run on CPU tensors, in a process of its own, and each launch
compiles for the GPU named instead of running:

    python tests/support/kernel_compiler.py            a table, for sm_80 and sm_90
    python tests/support/kernel_compiler.py --json     one line per kernel, for the test of them

`--part 1/2` takes every second case from the second on, so that several processes can share them.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ARCHES = (80, 90)
DEVICE = "cpu"
"""Where the cases have their tensors: `sanitize_kernels` runs them on a GPU."""
LONG_COPY = "throttle hold of a long copy"
"""Only compiled: it holds a stream for 18 minutes."""
ROOT = Path(__file__).parents[2]
MODULES = tuple(
    sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "engines").rglob("*.py")
        if "import triton.language" in path.read_text(encoding="utf-8")
    )
)


@dataclass(frozen=True)
class Compiled:
    """One kernel, in one form."""

    module: str
    kernel: str
    case: str
    arch: int
    registers: int
    """Of a thread."""
    stack_bytes: int
    """Of a thread: where registers are spilled to, above all."""
    shared_bytes: int
    """Of a block of threads, dynamic ones included."""
    threads: int
    """Of a block."""
    instructions: int
    """Of the GPU's own code, loops once, with what fills up the end."""


class AbsentGpu:
    """What Triton asks of its active driver before it launches anything. The device's number is its
    architecture, since Triton keeps what it compiled by device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_cases(arches: tuple[int, ...], part: int, parts: int) -> Iterator[Compiled]:
    """Compile every kernel that the cases launch. Raises what the compiler raises, with the case named."""
    from triton.runtime import JITFunction, driver

    launched: list[tuple[Any, Any]] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        launched.append((self, kernel))
        return kernel

    JITFunction.run = compile_only  # type: ignore[method-assign]
    for name, run, once in list(cases())[part::parts]:
        for arch in arches:
            if arch != arches[-1] and not once:
                continue
            driver.set_active(AbsentGpu(arch))  # type: ignore[arg-type]
            launched.clear()
            try:
                run()
            except Exception as error:
                raise RuntimeError(f"{name} does not compile for sm_{arch}") from error
            assert launched, name
            for function, kernel in launched:
                yield Compiled(
                    module=function.fn.__module__,
                    kernel=function.fn.__name__,
                    case=name,
                    arch=arch,
                    threads=kernel.metadata.num_warps * 32,
                    **_resources(kernel),
                )


def _resources(kernel: Any) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = kernel.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return {
        "registers": found["REG"],
        "stack_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
        "instructions": _text_bytes(cubin) // INSTRUCTION_BYTES,
    }


INSTRUCTION_BYTES = 16
"""Since compute capability 7.0."""


def _text_bytes(cubin: bytes) -> int:
    """Of the sections of code in a 64-bit ELF file: those that are loaded and executable."""
    start, size, count = (struct.unpack_from(form, cubin, at)[0] for form, at in _ELF_SECTIONS)
    headers = (struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count))
    return sum(num_bytes for _, _, flags, _, _, num_bytes in headers if flags & _EXECUTABLE)


_ELF_SECTIONS = (("<Q", 0x28), ("<H", 0x3A), ("<H", 0x3C))
"""Form and place of: where section headers begin, their size, and how many there are."""
_EXECUTABLE = 4


def functions() -> dict[str, set[str]]:
    """Every function of the kernel files that Triton compiles, and those that it calls."""
    from triton.runtime import JITFunction

    found: dict[str, set[str]] = {}
    for name in MODULES:
        for function in vars(import_module(name)).values():
            if isinstance(function, JITFunction) and function.fn.__module__ == name:
                of = function.fn
                tree = ast.parse(textwrap.dedent(inspect.getsource(of)))
                used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
                called = (of.__globals__.get(each) for each in used)
                found[path_of(of)] = {path_of(each.fn) for each in called if isinstance(each, JITFunction)}
    return found


def unreached(launched: set[str], functions: Mapping[str, Iterable[str]]) -> list[str]:
    """Functions that neither were launched nor are called by one that was."""
    reached, waiting = set(launched), list(launched)
    while waiting:
        new = set(functions[waiting.pop()]) - reached
        reached |= new
        waiting += new
    return sorted(functions.keys() - reached)


def path_of(function: Any) -> str:
    return f"{function.__module__}.{function.__name__}"


Case = tuple[str, Callable[[], object], bool]
"""Its name, what to call, and whether it is compiled for the older architectures, too."""


def cases() -> Iterator[Case]:
    yield from noise_cases()
    yield from base_cases()
    yield from lossless_cases()
    yield from lozo_cases()
    yield from projector_cases()
    yield from other_cases()


def noise_cases() -> Iterator[Case]:
    import torch

    from engines.noise import weight_pass_kernels
    from engines.noise.philox import NoiseKey
    from engines.noise.tiles import LARGE, Segment, one
    from engines.noise.visits import Outputs

    def visited(dtype: str, noise: str, *, of: Segment, size: int, wanted: str, rounding: str) -> None:
        flat = flat_tensor(size, dtype)
        outs = {name: flat if name == "theta" else torch.empty_like(flat) for name in wanted.split("+")}
        weight_pass_kernels.visit(flat, of, visit_how(noise=noise, rounding=rounding), Outputs(**outs), 0)

    # Vectors and matrices of a block lie together; a larger matrix has a launch of its own: here are both.
    large = LARGE + 2048
    mixed = Segment((3, 1, 7), (0, 2504, 8192), (2500, 5008, large), (False, False, True))
    forms = {"tensors": (mixed, 8192 + large), "matrix": (one(3, 1 << 22, decays=True), 1 << 22)}
    variants = [
        (dtype, noise, form, wanted, rounding)
        for dtype in ("bfloat16", "float16", "float32")
        for noise in ("gaussian", "binomial", "rademacher")
        for form, wanted, rounding in [
            ("tensors", "theta+plus+minus", "stochastic"),
            ("matrix", "plus+minus", "nearest"),
            ("matrix", "theta", "stochastic"),
            ("matrix", "theta+plus", "stochastic"),
        ]
    ]
    for dtype, noise, form, wanted, rounding in variants:
        segment, size = forms[form]

        def run(
            dtype: str = dtype, noise: str = noise, segment: Segment = segment, size: int = size,
            wanted: str = wanted, rounding: str = rounding,
        ) -> None:  # fmt: skip
            visited(dtype, noise, of=segment, size=size, wanted=wanted, rounding=rounding)

        yield f"visit {form} {dtype} {noise} {rounding} {wanted}", run, wanted != "theta+plus"
    for noise in ("gaussian", "binomial", "rademacher"):
        indices = torch.zeros(2, 64, dtype=torch.int64, device=DEVICE)
        yield (
            f"rows bfloat16 {noise}",
            lambda noise=noise, indices=indices: weight_pass_kernels.rows(
                flat_tensor(50272 * 2048, "bfloat16").view(50272, 2048), 1, indices, visit_how(noise=noise)
            ),
            True,
        )
    # Numbers that Triton takes for another type: a count of 1 for a constant, a small seed for 32 bits.
    yield (
        "visit one element",
        lambda: weight_pass_kernels.visit(
            flat_tensor(1, "bfloat16"),
            one(3, 1),
            visit_how(seed=0, step=2**31 + 5),
            Outputs(plus=flat_tensor(1, "bfloat16")),
            0,
        ),
        False,
    )
    key = NoiseKey(seed=-1, step=2**32 - 1, tensor=5)
    yield "words", lambda: weight_pass_kernels.philox_words(key, 2**33, 128, torch.device(DEVICE)), True


def base_cases() -> Iterator[Case]:
    import torch

    from engines.costs.quantized import matrix_bytes
    from engines.noise.philox import NoiseKey
    from engines.noise.tiles import one
    from engines.quantized import quantized_pass_kernels
    from engines.settings.zeroth_order import Base

    count = 2048 * 8192

    def visited(base: Base, dtype: str, rounding: str, sides: int, *, store: bool, noise: str) -> None:
        tiles = torch.empty(matrix_bytes(count, base), dtype=torch.uint8, device=DEVICE)
        buffers = [flat_tensor(count, dtype) for _ in range(sides)]
        how = visit_how(rounding=rounding, noise=noise)
        of, perturb = one(3, count, decays=True), sides == 2 or noise == "rademacher"
        quantized_pass_kernels.visit_tiles(tiles, of, how, base, store=store, sides=buffers, perturb=perturb)

    key = NoiseKey(seed=-1, step=1, tensor=5)
    bases: tuple[Base, ...] = ("int8", "int4", "fp8")
    for base in bases:
        tiles = torch.empty(matrix_bytes(count, base), dtype=torch.uint8, device=DEVICE)
        for rank, stochastic in ((4, True), (2, False)):
            factors = flat_tensor(rank * 2048).view(rank, -1), flat_tensor(rank * 8192).view(rank, -1)
            yield (
                f"add_low_rank {base} rank {rank}{' stochastic' if stochastic else ''}",
                lambda tiles=tiles, base=base, factors=factors, stochastic=stochastic: (
                    quantized_pass_kernels.add_low_rank_to_tiles(
                        tiles, base, *factors, key, stochastic=stochastic
                    )
                ),
                stochastic,
            )
        for dtype, rounding, sides, store, noise in [
            ("bfloat16", "stochastic", 2, True, "gaussian"),
            ("float16", "nearest", 2, True, "gaussian"),
            ("float32", "stochastic", 2, False, "gaussian"),
            ("bfloat16", "stochastic", 2, False, "gaussian"),
            ("float16", "stochastic", 1, False, "gaussian"),
            ("bfloat16", "stochastic", 1, True, "gaussian"),
            ("bfloat16", "stochastic", 0, True, "gaussian"),
            ("bfloat16", "stochastic", 2, True, "binomial"),
            ("float16", "stochastic", 2, False, "binomial"),
            ("bfloat16", "stochastic", 2, True, "rademacher"),
            ("bfloat16", "stochastic", 2, False, "rademacher"),
            ("float16", "stochastic", 1, False, "rademacher"),
        ]:
            if base != "int8" and dtype == "float32":
                continue  # of which only the last store differs
            kind = {"gaussian": "", "binomial": "binomial ", "rademacher": "signs "}[noise]
            yield (
                f"visit {base} {kind}{dtype} {rounding} {sides} sides{' stored' if store else ''}",
                lambda base=base, dtype=dtype, rounding=rounding, sides=sides, store=store, noise=noise: (
                    visited(base, dtype, rounding, sides, store=store, noise=noise)
                ),
                sides == 2 and (store or noise == "rademacher"),
            )


def lossless_cases() -> Iterator[Case]:
    import torch

    from engines.costs.quantized import lossless_bytes
    from engines.lossless import lossless_pass_kernels
    from engines.noise.tiles import one
    from engines.noise.visits import Outputs

    count = 2048 * 8192
    kept = torch.zeros(lossless_bytes(count), dtype=torch.uint8, device=DEVICE)  # read on a GPU, too
    flat, of = flat_tensor(count, "bfloat16"), one(3, count, decays=True)
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for noise in ("gaussian", "binomial", "rademacher"):
        for wanted, rounding in [
            ("plus+minus", "stochastic"),
            ("plus+minus", "nearest"),
            ("theta", "stochastic"),
            ("plus", "stochastic"),
        ]:

            def visited(noise: str = noise, wanted: str = wanted, rounding: str = rounding) -> None:
                outs = {name: torch.empty_like(flat) for name in wanted.split("+")}
                lossless_pass_kernels.visit_lossless(
                    kept, of, visit_how(noise=noise, rounding=rounding), Outputs(**outs)
                )

            yield (
                f"visit lossless {noise} {rounding} {wanted}",
                visited,
                rounding == "stochastic" and wanted == "plus+minus",
            )
    yield "decode lossless", lambda: lossless_pass_kernels.decode_lossless(kept, of, flat, flag), True
    yield "encode lossless", lambda: lossless_pass_kernels.encode_lossless(flat, of, kept), True


def lozo_cases() -> Iterator[Case]:

    from engines.noise import low_rank_kernels
    from engines.noise.philox import NoiseKey

    key = NoiseKey(seed=-1, step=1, tensor=5)
    for dtype, stochastic, rank, height, width in [
        ("bfloat16", True, 4, 2048, 8192),
        ("float16", True, 2, 2048, 8192),
        ("float32", False, 8, 2048, 8192),
        ("bfloat16", False, 1, 1, 4096),
        ("bfloat16", True, 2, 4096, 1),
    ]:
        rows, columns = flat_tensor(rank * height).view(rank, -1), flat_tensor(rank * width).view(rank, -1)
        flat = flat_tensor(height * width, dtype)
        yield (
            f"add_low_rank {dtype} {height}x{width} rank {rank}{' stochastic' if stochastic else ''}",
            lambda flat=flat, stochastic=stochastic, rows=rows, columns=columns: (
                low_rank_kernels.add_low_rank(flat, rows, columns, key, stochastic=stochastic)
            ),
            rank == 4,
        )


def projector_cases() -> Iterator[Case]:
    import torch

    from engines.subspace import projector_kernels

    # (outputs, inputs, d, r): of OPT-1.3B, of Llama-like 7B models, and of sizes that divide nothing.
    shapes = [(8192, 2048, 512, 4), (4096, 11008, 2048, 4), (96, 70, 33, 3), (2048, 2048, 1024, 1)]
    for m, n, d, r in shapes:
        for dtype in ("bfloat16", "float32") if r != 4 or d != 512 else ("bfloat16", "float32", "float16"):
            of = {"dtype": getattr(torch, dtype), "device": DEVICE}
            left, right = torch.empty(m, r, **of), torch.empty(n, r, **of)

            def project(of: Any = of, m: int = m, d: int = d, left: Any = left) -> None:
                projector_kernels.block_project(torch.empty(512, m, **of), left, d)
                projector_kernels.block_project(torch.empty(m, 512, **of).T, left, d)

            def lift(of: Any = of, d: int = d, left: Any = left) -> None:
                projector_kernels.block_lift(torch.empty(512, d, **of), left, d)
                projector_kernels.block_lift(torch.empty(d, 512, **of).T, left, d)

            def update(of: Any = of, m: int = m, n: int = n, d: int = d, both: Any = (left, right)) -> None:
                weight, core = torch.empty(m, n, **of), torch.empty(d, d, **of)
                dither = of["dtype"] == torch.bfloat16
                numbers = torch.zeros(4, dtype=torch.int32, device=DEVICE)
                projector_kernels.block_update(weight, core, *both, numbers, dither=dither)

            older = r == 4 and dtype == "bfloat16"
            yield f"project {dtype} {m} d={d} r={r}", project, older
            yield f"lift {dtype} {m} d={d} r={r}", lift, older
            yield f"update {dtype} {m}x{n} d={d} r={r}", update, older
    for dtype in ("bfloat16", "float16", "float32"):
        weight, delta = flat_tensor(2048 * 2048, dtype), flat_tensor(2048 * 2048, dtype)
        yield (
            f"plain update {dtype}",
            lambda weight=weight, delta=delta: projector_kernels.plain_update(
                weight, delta, 1e-4, 0.99, 12345, dither=weight.dtype == torch.bfloat16
            ),
            dtype == "bfloat16",
        )


def other_cases() -> Iterator[Case]:
    import torch

    from engines.kernels import paired_layer_norm, token_scores_kernels
    from engines.transfer import throttle_kernels

    for dtype in ("bfloat16", "float16", "float32"):
        widths = (768, 2048, 12288) if dtype == "bfloat16" else (2048,)
        logits = flat_tensor(2048 * 8192, dtype).view(2048, 8192)
        of_tokens = [flat_tensor(2048) for _ in range(3)]
        labels, where = (torch.zeros(2048, dtype=torch.int64, device=DEVICE) for _ in range(2))
        yield (
            f"head {dtype}",
            lambda logits=logits, labels=labels, where=where, tokens=of_tokens: token_scores_kernels.gather(
                logits, labels, 8192, tokens[0], where, tokens[1], tokens[2]
            ),
            dtype == "bfloat16",
        )
        for width in widths:
            x, weights = (
                flat_tensor(64 * width, dtype).view(64, width),
                [flat_tensor(width, dtype) for _ in range(4)],
            )
            yield (
                f"layer norm {dtype} {width}",
                lambda x=x, w=weights: paired_layer_norm.layer_norm(x, (w[0], w[1]), (w[2], w[3]), 1e-5),
                dtype == "bfloat16",
            )
    up, down = (throttle_kernels.new_state(torch.device(DEVICE)) for _ in range(2))
    yield "throttle begin", lambda: throttle_kernels.begin(up, down), True
    yield "throttle hold", lambda: throttle_kernels.hold(up, down, 12345, 0.5), True
    yield LONG_COPY, lambda: throttle_kernels.hold(up, down, 2**40, 1.0), False


def flat_tensor(count: int, dtype: str = "float32") -> Any:
    import torch

    return torch.empty(count, dtype=getattr(torch, dtype), device=DEVICE)


def visit_how(**changes: Any) -> Any:
    import torch

    from engines.base import Update
    from engines.noise.visits import DeviceUpdateLog, Visit

    log = DeviceUpdateLog(torch.device(DEVICE))
    log.append(Update(step=0, learning_rate=1e-3, projected_gradient=0.5, weight_decay=0.1))
    return Visit(**{"seed": -5, "log": log, "first": 0, "last": 1, "step": 3, "eps": 1e-3, **changes})


def _table(found: list[Compiled]) -> str:
    header = f"{'kernel':24}{'case':62}{'sm':>4}{'regs':>6}{'stack':>7}{'shared':>8}{'SASS':>7}"
    lines = [
        f"{each.kernel:24}{each.case:62}{each.arch:>4}{each.registers:>6}{each.stack_bytes:>7}"
        f"{each.shared_bytes:>8}{each.instructions:>7}"
        for each in found
    ]
    return "\n".join([header, *lines])


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", default="0/1")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    found = compile_cases(ARCHES, part, parts)
    if not options.json:
        print(_table(list(found)))
        return
    print(json.dumps({name: sorted(called) for name, called in functions().items()}))
    for each in found:
        print(json.dumps(asdict(each)), flush=True)


if __name__ == "__main__":
    main()
