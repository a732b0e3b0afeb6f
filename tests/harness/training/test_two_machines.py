"""Two machines: network namespaces with a link of 1 Gbit/s between them, where a test may make them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from train_runs import assert_same_weights, log_of

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tests" / "support" / "two_machines.py"
JOB = [
    "--model", "tiny-llama", "--random-weights", "--engine", "zo2", "--batch-size", "1", "--seq-len", "32",
    "--dtype", "fp32", "--accumulation", "2", "--set", "learning_rate=1e-5",
]  # fmt: skip


def may_make_networks() -> bool:
    if not all(map(shutil.which, ("unshare", "nsenter", "ip", "tc"))):
        return False
    shaped = "root tbf rate 1gbit burst 256kb latency 50ms"
    make = f"ip link add v0 type veth peer name v1 && tc qdisc add dev v0 {shaped}"
    return subprocess.run(["unshare", "-rn", "sh", "-c", make], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not may_make_networks(), reason="network namespaces, or tc, are not allowed here")
def test_two_machines_take_the_steps_of_one_and_send_a_few_bytes(tmp_path: Path) -> None:
    """What the link carries is the same in every step and does not know the model: losses and orders."""
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, str(SCRIPT), str(tmp_path), "40", "--", *JOB],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(done.stdout)
    assert run["told"][1] == "40 steps taken with the machine of NODE_RANK 0, which has the model"
    a_step = run["link_bytes"] / 40
    # Three rounds (the order's length, the order, the losses), of which each is 8 to 16 bytes of payload and
    # 1.4 kB with the headers of gloo and TCP, both ways: 40 microseconds at 1 Gbit/s; and the start's 24 kB.
    assert a_step < 6000
    command = [sys.executable, "-P", "-m", "harness", "run", *JOB, "--steps", "40", "--quiet"]
    out = ["--out", str(tmp_path / "one")]
    one = subprocess.run([*command, *out], cwd=ROOT, capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    assert log_of(tmp_path / "one") == log_of(tmp_path / "40-0")
    assert_same_weights(tmp_path / "one" / "model", tmp_path / "40-0" / "model")
