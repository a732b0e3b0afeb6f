"""NVIDIA's compute-sanitizer over the tests of every Triton kernel, on their small sizes. Needs a GPU.

`python tests/support/sanitize_kernels.py [TOOL...]` runs memcheck and racecheck, or the tools that are named,
and ends with 1 if one of them found something. Not part of the suite: it takes minutes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck")
TESTS = (
    "noise/test_weight_pass.py", "quantized/test_quantized_pass.py", "subspace/test_projector.py",
    "subspace/test_projector_kernels.py", "transfer/test_throttle.py", "zeroth_order/test_chunked_loss.py",
    "zeroth_order/test_low_rank_noise.py", "zeroth_order/test_perturbed_model.py",
)  # fmt: skip
"""Below tests/engines: they start each kernel."""


def main(tools: tuple[str, ...]) -> int:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    tests = [str(ROOT / "tests" / "engines" / name) for name in TESTS]
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        "--timeout=0",
    ]
    failed = 0
    for tool in tools:
        command = [sanitizer, "--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
        code = subprocess.run([*command, *pytest, *tests], cwd=ROOT, check=False).returncode
        sys.stdout.write(f"{tool}: {'nothing found' if code == 0 else f'ended with {code}'}\n")
        failed += code != 0
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:]) or TOOLS))
