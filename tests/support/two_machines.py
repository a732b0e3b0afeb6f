"""Two machines on one: network namespaces with a link of 1 Gbit/s between them, and the same command on both.

    unshare -rn python tests/support/two_machines.py '[[OUT, [STEPS, ...], [ARGUMENT OF run, ...]], ...]'

Runs `run ARGUMENTS --steps N --nodes 2 --out OUT/N-RANK` for each N of STEPS and prints JSON, a list for each
job: of each N what the machines told, the bytes that went over the link, both ways, and the wall time.

    unshare -rn python tests/support/two_machines.py pace STEPS ROUNDS

Takes so many paced steps (`paced_steps.py`) on both machines, each by itself and then together, several times
in turn, and prints JSON: `alone` and `together`, a list of what the machines told for each time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from forked import forked

ROOT = Path(__file__).parents[2]
FIRST, SECOND = "10.9.0.1", "10.9.0.2"


def sh(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def connect() -> tuple[subprocess.Popen[bytes], list[str]]:
    """The process that holds the second machine's network, and what a command there begins with."""
    holder = subprocess.Popen(["unshare", "-n", "sleep", "600"])
    inside = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
    mine = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{holder.pid}/ns/net") == mine:
        time.sleep(0.05)
    sh("ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
    sh("ip", "link", "set", "v1", "netns", str(holder.pid))
    for begin, device, address in (([], "v0", FIRST), (inside, "v1", SECOND)):
        sh(*begin, "ip", "link", "set", "lo", "up")
        sh(*begin, "ip", "addr", "add", f"{address}/24", "dev", device)
        sh(*begin, "ip", "link", "set", device, "up")
        shaped = ("root", "tbf", "rate", "1gbit", "burst", "256kb", "latency", "50ms")
        sh(*begin, "tc", "qdisc", "add", "dev", device, *shaped)
    return holder, inside


def link_bytes() -> int:
    (link,) = json.loads(sh("ip", "-s", "-j", "link", "show", "v0"))
    return int(link["stats64"]["rx"]["bytes"] + link["stats64"]["tx"]["bytes"])


def train(inside: list[str], out: Path, steps: int, arguments: list[str]) -> dict[str, object]:
    before, began_s = link_bytes(), time.monotonic()
    command = [sys.executable, "-P", "-m", "harness", "run", *arguments, "--nodes", "2", "--quiet"]
    command += ["--steps", str(steps)]
    environment = os.environ | {
        "MASTER_ADDR": FIRST, "MASTER_PORT": "29511", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with forked():
        ranks = [
            subprocess.Popen(
                [*begin, *command, "--out", str(out / f"{steps}-{rank}")],
                env=environment | {"NODE_RANK": str(rank), "GLOO_SOCKET_IFNAME": f"v{rank}"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, begin in enumerate(([], inside))
        ]
    told = [each.communicate(timeout=300)[0].strip() for each in ranks]
    codes = [each.returncode for each in ranks]
    assert codes == [0, 0], (codes, told)
    wall_s = time.monotonic() - began_s
    return {"steps": steps, "told": told, "link_bytes": link_bytes() - before, "wall_s": wall_s}


def pace(inside: list[str], steps: int, size: int) -> list[dict[str, object]]:
    """What both machines tell, which take steps at the same time: by themselves, or as `size` 2 together."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "support" / "paced_steps.py")]
    machines = [
        subprocess.Popen(
            [*begin, *command, str(rank), str(size), f"tcp://{FIRST}:29512", str(steps)],
            env=environment | {"GLOO_SOCKET_IFNAME": f"v{rank}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, begin in enumerate(([], inside))
    ]
    return [json.loads(each.communicate(timeout=300)[0]) for each in machines]


def main() -> None:
    holder, inside = connect()
    try:
        if sys.argv[1] == "pace":
            steps, rounds = int(sys.argv[2]), int(sys.argv[3])
            found: dict[str, list[object]] = {"alone": [], "together": []}
            for _ in range(rounds):
                for size, name in enumerate(found, start=1):
                    found[name].append(pace(inside, steps, size))
            print(json.dumps(found))
            return
        told = [
            [train(inside, Path(out), steps, arguments) for steps in counts]
            for out, counts, arguments in json.loads(sys.argv[1])
        ]
        print(json.dumps(told))
    finally:
        holder.kill()
        holder.wait()


if __name__ == "__main__":
    main()
