"""Two machines: network namespaces with a link of 1 Gbit/s between them, where a test may make them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from settings_given import given_settings
from train_runs import assert_same_weights, log_of

from engines.costs.resources.network import sent_bytes
from engines.costs.table import traffic
from engines.shapes import Workload
from harness.models.configs import named_shape

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


def on_two_machines(*arguments: str) -> Any:
    """What the script prints."""
    # Before what else runs here, where that is allowed: machines of their own would have processors too.
    command = ["nice", "-n", "-10", "unshare", "-rn", sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


LSP = {"learning_rate": 1e-3, "d": 16, "check_every": 100}
JOB_OF_LSP = [*JOB[:4], "lsp", *JOB[5:-2], *(f"--set={key}={value}" for key, value in LSP.items())]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("machines")


@pytest.fixture(scope="module")
def told(out: Path) -> Any:
    """What the script prints of zo2 in a few steps and in more, and of lsp."""
    jobs = [(str(out / "zo2"), (10, 40), JOB), (str(out / "lsp"), (4, 12), JOB_OF_LSP)]
    return on_two_machines(json.dumps(jobs))


def by_one(out: Path, *arguments: str) -> None:
    command = [sys.executable, "-P", "-m", "harness", "run", *arguments, "--quiet", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def predicted_bytes(engine: str, **asked: Any) -> float:
    """That plans say a step sends."""
    shape, settings = named_shape("tiny-llama"), given_settings(engine, **asked).typed
    workload = Workload(batch_size=1, seq_len=32, dtype="fp32", accumulation=1)
    return sent_bytes(traffic(engine, shape, workload, settings), workload, ranks=2, nodes=2)


@pytest.mark.slow
@pytest.mark.skipif(not may_make_networks(), reason="network namespaces, or tc, are not allowed here")
@pytest.mark.together
@pytest.mark.usefixtures("forked_programs")
def test_two_machines_take_the_steps_of_one_and_send_a_few_bytes(told: Any, out: Path) -> None:
    """What the link carries is the same in every step and does not know the model: losses and orders, as many
    bytes as plans say."""
    few, run = told[0]
    assert run["told"][1] == "40 steps taken with the machine of NODE_RANK 0, which has the model"
    assert (run["link_bytes"] - few["link_bytes"]) / 30 == pytest.approx(predicted_bytes("zo2"), rel=0.15)
    by_one(out / "zo2" / "one", *JOB, "--steps", "40")
    assert log_of(out / "zo2" / "one") == log_of(out / "zo2" / "40-0")
    assert_same_weights(out / "zo2" / "one" / "model", out / "zo2" / "40-0" / "model")


@pytest.mark.slow
@pytest.mark.skipif(not may_make_networks(), reason="network namespaces, or tc, are not allowed here")
@pytest.mark.together
@pytest.mark.usefixtures("forked_programs")
def test_two_machines_send_each_other_the_cores_of_lsp(told: Any, out: Path) -> None:
    """And take the steps of one process that accumulates; the link carries what plans say."""
    few, run = told[1]
    sent = (run["link_bytes"] - few["link_bytes"]) / 8
    assert sent == pytest.approx(predicted_bytes("lsp", **LSP), rel=0.15)
    by_one(out / "lsp" / "one", *JOB_OF_LSP, "--steps", "12")
    assert_same_weights(out / "lsp" / "one" / "model", out / "lsp" / "12-0" / "model")


@pytest.mark.quiet
@pytest.mark.skipif(not may_make_networks(), reason="network namespaces, or tc, are not allowed here")
def test_two_machines_are_nearly_twice_as_fast_as_one() -> None:
    """At least 95 % of what both do by themselves at the same time, on a link of 1 Gbit/s. Steps last as long
    as those of a streamed model, since a link to the host that is held up decides; so they last as long
    however busy the processor is, and what the two wait for each other is what differs."""
    found = on_two_machines("pace", "8", "2")

    def rate(name: str) -> float:
        """Steps of both machines in a second."""
        medians = [
            median(seconds for each in found[name] for seconds in each[rank]["times_s"]) for rank in range(2)
        ]
        return sum(1 / seconds for seconds in medians)

    assert rate("together") >= 0.95 * rate("alone")
    both, (first, second) = found["together"][0], found["alone"][0]
    assert both[0]["losses"] == both[1]["losses"]
    assert both[0]["losses"][0] == pytest.approx((first["losses"][0] + second["losses"][0]) / 2, rel=1e-6)
