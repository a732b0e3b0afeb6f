"""How much host memory one process can pin: found by pinning until refused, in a process of its own.

The only place of the probes that starts a process. It has a time limit and ends before the call returns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import profiles
from profiles.machine import Figure, absent
from profiles.probe.timing import Meter, figure
from profiles.system import cgroup

PIN_S = (3.0, 40.0)
"""For how long memory is pinned in the default and in the full probe."""
PIN_SHARE = 2
"""At most this share of the available host memory is pinned."""
START_S = 20.0
"""A child's start, torch and CUDA: the most that is waited for."""
CHILD_S = 12.0
"""What must be left of the probe's time for it."""
NUM_MEASUREMENTS = 1


def pinned_limit(meter: Meter, *, full: bool, root: Path = cgroup.ROOT) -> tuple[Figure, bool | None]:
    """Bytes that one process could pin, and whether the driver refused more.

    Measured before this process has a CUDA context. Where the child ends early, its last answer counts.
    """
    seconds = PIN_S[full]

    def take(_: float) -> tuple[Figure, bool | None]:
        most_bytes = cgroup.host_memory(root).available_bytes // PIN_SHARE
        answer, end = throw_away(START_S + 2 * seconds, most_bytes=most_bytes, seconds=seconds)
        if "pinned_bytes" not in answer:
            raise RuntimeError(f"the child that pins {end or 'gave no answer'}")
        stopped = f"the process {end}" if end else answer["stopped"]
        method = f"pinned in steps of {answer['step_bytes'] / 2**20:.0f} MiB until: {stopped}"
        return figure([float(answer["pinned_bytes"])], method), answer.get("refused")

    return meter.optional(
        "pinned memory to the limit",
        take,
        lambda why: (absent(why), None),
        needs_s=CHILD_S + seconds,
        repeats=False,
    )


def throw_away(limit_s: float, **arguments: float) -> tuple[dict[str, Any], str]:
    """The last answer of `profiles.probe.pinned_limit_child`, and how that process ended: empty if well.

    The child prints after every step what it has, so one that is killed still leaves its last answer; without
    any, the answer is empty.
    """
    command = [sys.executable, "-P", "-m", "profiles.probe.pinned_limit_child", json.dumps(arguments)]
    root = Path(profiles.__file__).parent.parent
    before = os.environ.get("PYTHONPATH")
    paths = os.pathsep.join([str(root), *([before] if before else [])])
    output, end = _run(command, limit_s, {**os.environ, "PYTHONPATH": paths})
    answers = [line for line in output.splitlines() if line.startswith("{") and line.endswith("}")]
    return (json.loads(answers[-1]) if answers else {}), end


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
