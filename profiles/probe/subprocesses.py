"""Other programs that a probe runs: NVIDIA's nvbandwidth, and throw-away children of this one.

The only place of the probes that starts processes. Each has a time limit and ends before the call returns.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import profiles
from profiles.machine import Figure, absent
from profiles.probe.timing import figure

NVBANDWIDTH_TESTS = ("host_to_device_memcpy_ce", "device_to_host_memcpy_ce")


def throw_away(limit_s: float, **arguments: float) -> tuple[dict[str, Any], str]:
    """The last answer of a child that runs `profiles.probe.memory_limits_child`, and how it ended: empty if
    well.

    A child tells after every step what it has, so one that is killed still leaves its last answer; without
    any, the answer is empty.
    """
    command = [sys.executable, "-P", "-m", "profiles.probe.memory_limits_child", json.dumps(arguments)]
    root = Path(profiles.__file__).parent.parent
    before = os.environ.get("PYTHONPATH")
    paths = os.pathsep.join([str(root), *([before] if before else [])])
    output, end = _run(command, limit_s, {**os.environ, "PYTHONPATH": paths})
    answers = [line for line in output.splitlines() if line.startswith("{") and line.endswith("}")]
    return (json.loads(answers[-1]) if answers else {}), end


def nvbandwidth(limit_s: float, uuid: str | None) -> tuple[Figure, Figure]:
    """H2D and D2H of the GPU `uuid` in bytes per second by NVIDIA's program, where it is on the PATH."""
    program = shutil.which("nvbandwidth")
    if program is None:
        missing = absent("nvbandwidth is not on the PATH")
        return missing, missing
    environment = dict(os.environ)
    if uuid is not None:
        environment["CUDA_VISIBLE_DEVICES"] = uuid
    output, end = _run([program, "-t", *NVBANDWIDTH_TESTS], limit_s, environment)
    h2d, d2h = (_summed(output, test, end) for test in NVBANDWIDTH_TESTS)
    return h2d, d2h


def _summed(output: str, test: str, end: str) -> Figure:
    """Each test closes with a line such as `SUM host_to_device_memcpy_ce 55.63`, in GB/s (1e9)."""
    match = re.search(rf"^SUM {test} (\d+(?:\.\d+)?)\s*$", output, re.MULTILINE)
    if match is None:
        return absent(f"nvbandwidth {end or 'gave no sum'}")
    return figure([float(match[1]) * 1e9], f"nvbandwidth {test}, its median of 3")


def _run(command: list[str], limit_s: float, environment: dict[str, str]) -> tuple[str, str]:
    """What the program wrote, and how it ended: empty if well."""
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:  # the child is dead by now
        return (error.stdout or b"").decode("utf-8", "replace"), f"took more than {limit_s:.0f} s"
    except OSError as error:
        return "", f"did not start ({error.strerror or error})"
    output = done.stdout.decode("utf-8", "replace")
    if done.returncode == 0:
        return output, ""
    if done.returncode < 0:
        return output, f"was killed by signal {-done.returncode}"
    lines = [line.strip() for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    return output, f"ended with code {done.returncode}" + (f" ({lines[-1][:200]})" if lines else "")
