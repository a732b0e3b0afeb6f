# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""NVIDIA's compute-sanitizer over every Triton kernel, in each form that `kernel_compiler` has and with sizes
that divide nothing. Needs a GPU, and takes one to two minutes on an H200.

`python tests/support/sanitize_kernels.py [TOOL...]` runs memcheck and racecheck, or the tools that are named.
It ends with 0 if nothing was found, 1 if something was, a kernel was not launched, or a tool did not see what
is wrong with a kernel that was made for it to find, and 2 where there is no compute-sanitizer or GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import kernel_compiler
import torch
import triton
import triton.language as tl
from kernel_compiler import functions, path_of, unreached
from triton.runtime import JITFunction

TOOLS = ("memcheck", "racecheck")
PARTS = 4
"""Processes of a tool, which share the cases."""
MOST_SECONDS = 150
"""For all of it; what is not done then counts as not checked."""
FOUND = 9
"""Exit status of a process in which a tool found something."""
_NONE_FOUND = re.compile(r"(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)")
_LAUNCHED = "launched "


@triton.jit
def past_the_end(out):
    """What memcheck has to find."""
    tl.store(out + (1 << 24), 1.0)


@triton.jit
def races(out):
    """What racecheck has to find: all threads of a block write one word of shared memory and read it."""
    number = tl.arange(0, 128)
    seen = tl.inline_asm_elementwise(
        "{ .shared .b32 word; st.shared.b32 [word], $1; ld.shared.b32 $0, [word]; }",
        "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.store(out + number, seen.to(tl.float32))


def wrong(tool: str) -> None:
    kernel = past_the_end if tool == "memcheck" else races
    kernel[(1,)](torch.zeros(128, device="cuda"), num_warps=4)
    torch.cuda.synchronize()


def odd_cases() -> Iterator[Callable[[], object]]:
    """Sizes that divide nothing, so that every mask has something to hold back."""
    from engines.costs.quantized import lossless_bytes, matrix_bytes
    from engines.kernels import paired_layer_norm, token_scores_kernels
    from engines.lossless import lossless_pass_kernels
    from engines.noise import low_rank_kernels, weight_pass_kernels
    from engines.noise.philox import NoiseKey
    from engines.noise.tiles import Segment, one
    from engines.noise.visits import Outputs
    from engines.quantized import quantized_pass_kernels
    from engines.subspace import projector_kernels

    flat, how, key = (
        kernel_compiler.flat_tensor,
        kernel_compiler.visit_how,
        NoiseKey(seed=3, step=1, tensor=5),
    )
    bf16 = "bfloat16"
    for noise in ("gaussian", "binomial", "rademacher"):
        for segment in (one(3, 5003, decays=True), Segment((1, 2), (0, 7), (7, 2501), (True, False))):
            weight, size = flat(5003, bf16), sum(segment.counts)
            outs = Outputs(theta=weight[:size], plus=flat(size, bf16), minus=flat(size, bf16))
            yield lambda s=segment, w=weight[:size], o=outs, n=noise: weight_pass_kernels.visit(
                w, s, how(noise=n), o, 0
            )
        table, places = (
            flat(11 * 37, bf16).view(11, 37),
            torch.tensor([[10, 0, 3]], device=kernel_compiler.DEVICE),
        )
        yield lambda t=table, p=places, n=noise: weight_pass_kernels.rows(t, 1, p, how(noise=n))
        for base in ("int8", "int4", "fp8"):
            tiles = torch.zeros(matrix_bytes(2501, base), dtype=torch.uint8, device=kernel_compiler.DEVICE)
            sides = [flat(2501, bf16) for _ in range(2)]
            for store in (False, True):
                yield lambda r=tiles, b=base, s=sides, n=noise, k=store: quantized_pass_kernels.visit_tiles(
                    r, one(3, 2501, decays=True), how(noise=n), b, store=k, sides=s, perturb=True
                )
    weights = flat(4500, bf16).fill_(1.0)
    weights[:2000:300] = 2.0**-60  # more escapes than a record has itself
    kept = torch.zeros(lossless_bytes(4500), dtype=torch.uint8, device=kernel_compiler.DEVICE)
    yield lambda: lossless_pass_kernels.encode_lossless(weights, one(3, 4500), kept)
    yield lambda: lossless_pass_kernels.decode_lossless(
        kept, one(3, 4500), flat(4500, bf16), torch.zeros(1, dtype=torch.int32, device=kernel_compiler.DEVICE)
    )
    for noise in ("gaussian", "binomial", "rademacher"):
        sides = Outputs(plus=flat(4500, bf16), minus=flat(4500, bf16))
        yield lambda n=noise, o=sides: lossless_pass_kernels.visit_lossless(
            kept, one(3, 4500, decays=True), how(noise=n), o
        )
    for base in ("int8", "int4", "fp8"):
        tiles = torch.zeros(matrix_bytes(37 * 53, base), dtype=torch.uint8, device=kernel_compiler.DEVICE)
        rows, columns = flat(3 * 37).view(3, -1), flat(3 * 53).view(3, -1)
        yield lambda r=tiles, b=base, x=rows, y=columns: quantized_pass_kernels.add_low_rank_to_tiles(
            r, b, x, y, key, stochastic=True
        )
    yield lambda: low_rank_kernels.add_low_rank(
        flat(37 * 53, bf16), flat(3 * 37).view(3, -1), flat(3 * 53).view(3, -1), key, stochastic=True
    )
    yield lambda: weight_pass_kernels.philox_words(key, 5, 64, torch.device(kernel_compiler.DEVICE))
    left, right = flat(75 * 3, bf16).view(75, 3), flat(53 * 3, bf16).view(53, 3)
    yield lambda: projector_kernels.block_project(flat(5 * 75, bf16).view(5, 75), left, 21)
    yield lambda: projector_kernels.block_lift(flat(5 * 21, bf16).view(5, 21), left, 21)
    yield lambda: projector_kernels.block_update(
        flat(75 * 53, bf16).view(75, 53),
        flat(21 * 21, bf16).view(21, 21),
        left,
        right,
        torch.zeros(4, dtype=torch.int32, device=kernel_compiler.DEVICE),
        dither=True,
    )
    yield lambda: projector_kernels.plain_update(
        flat(1001, bf16), flat(1001, bf16), 1e-4, 0.9, 5, dither=True
    )
    norms = [flat(37, bf16) for _ in range(4)]
    yield lambda: paired_layer_norm.layer_norm(
        flat(6 * 37, bf16).view(6, 37), (norms[0], norms[1]), (norms[2], norms[3]), 1e-5
    )
    whole = [torch.zeros(5, dtype=torch.int64, device=kernel_compiler.DEVICE) for _ in range(2)]
    yield lambda: token_scores_kernels.gather(
        flat(5 * 333, bf16).view(5, 333), whole[0], 333, flat(5), whole[1], flat(5), flat(5)
    )


def run_cases(part: int, parts: int) -> None:
    """Launch them, and print which kernels that were."""
    launched: set[str] = set()
    run = JITFunction.run

    def noted(self, *args, **kwargs):
        launched.add(path_of(self.fn))
        return run(self, *args, **kwargs)

    JITFunction.run = noted
    kernel_compiler.DEVICE = "cuda"
    named = [case for name, case, _ in kernel_compiler.cases() if name != kernel_compiler.LONG_COPY]
    for case in (named + list(odd_cases()))[part::parts]:
        case()
        torch.cuda.synchronize()
    sys.stdout.write("".join(f"{_LAUNCHED}{name}\n" for name in sorted(launched)))


def main(tools: tuple[str, ...]) -> int:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists() or not torch.cuda.is_available():
        sys.stdout.write("no compute-sanitizer, or no GPU\n")
        return 2
    began = time.monotonic()
    with TemporaryDirectory() as cache:
        # Each tensor has an allocation of its own, or what lies beyond its end would be another's.
        env = {
            **os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_CACHE_DIR": cache,
            "PYTHONPATH": os.pathsep.join((str(kernel_compiler.ROOT), str(Path(__file__).parent))),
        }  # fmt: skip

        def start(*arguments: str, tool: str | None = None) -> subprocess.Popen[str]:
            before = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND)] if tool else []
            return subprocess.Popen(
                [*before, sys.executable, __file__, *arguments],
                env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

        def ended(process: subprocess.Popen[str]) -> tuple[int | None, str]:
            try:
                out = process.communicate(timeout=max(1.0, MOST_SECONDS - (time.monotonic() - began)))[0]
            except subprocess.TimeoutExpired:
                process.kill()
                return None, process.communicate()[0]
            return process.returncode, out

        # Without a tool first, side by side: then all are compiled, and no tool watches the compiler.
        plain = [ended(each) for each in [start("--cases", f"{i}/{2 * PARTS}") for i in range(2 * PARTS)]]
        wrongs = {tool: start("--wrong", tool, tool=tool) for tool in tools}
        checks = {tool: [start("--cases", f"{i}/{PARTS}", tool=tool) for i in range(PARTS)] for tool in tools}
        failed = _tell("without a tool", plain, clean=None)
        for tool in tools:
            code, told = ended(wrongs[tool])
            if code != FOUND:
                failed = True
                sys.stdout.write(f"{tool} does not see a kernel that is wrong ({code}):\n{told[-2000:]}\n")
            failed |= _tell(tool, [ended(each) for each in checks[tool]], clean=_NONE_FOUND)
    sys.stdout.write(f"{'FAILED' if failed else 'passed'} in {time.monotonic() - began:.0f} s\n")
    return int(failed)


def _tell(what: str, runs: list[tuple[int | None, str]], clean: re.Pattern[str] | None) -> bool:
    """Say how it ended; whether something is wrong."""
    launched = {
        line.removeprefix(_LAUNCHED)
        for _, told in runs
        for line in told.splitlines()
        if line.startswith(_LAUNCHED)
    }
    missing = unreached(launched, functions())
    bad = [(code, told) for code, told in runs if code != 0 or (clean is not None and not clean.search(told))]
    for code, told in bad:
        ending = {None: "was not done in time", FOUND: "something was found"}.get(code, f"ended with {code}")
        sys.stdout.write(f"{what}: {ending}\n{told[:1500]}\n...\n{told[-1500:]}\n")
    if missing:
        sys.stdout.write(f"{what}: not launched: {', '.join(missing)}\n")
    if not bad and not missing:
        sys.stdout.write(f"{what}: nothing found in {len(launched)} kernels\n")
    return bool(bad or missing)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--wrong", tool]:
            wrong(tool)
        case ["--cases", share]:
            run_cases(*map(int, share.split("/")))
        case tools:
            sys.exit(main(tuple(tools) or TOOLS))
