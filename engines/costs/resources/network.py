"""What machines that share out a method's steps send each other: losses, and compressed gradients of one that
has them. No torch."""

from __future__ import annotations

from engines.costs.resources.traffic import Traffic
from engines.shapes import Workload

LOSS_BYTES = 8

ROUND_BYTES = 1400
"""Of a round between two machines beside what it is about, both ways: headers of gloo and TCP
(`tests/harness/training/test_two_machines.py` reads the counters of a link)."""

ROUNDS = 3
"""Of a step: what is to be done, in two, and the losses."""

ROUND_S = 0.5e-3
"""Of a local network and of the processes at both ends, whatever the rate. Assumed, not measured."""

NETWORK_ERROR = 2.0
"""Factor each way of what a step waits for other machines where the rate is the network's name, as 10 Gbit/s:
rounds of local networks take 0.1 to 1 ms, and one stream of TCP has half to nearly all of a rate. Assumed,
not measured: no probe reaches another machine."""


def sent_bytes(traffic: Traffic, workload: Workload, ranks: int, nodes: int) -> float:
    """In a step, over one machine's network port, both ways. `traffic` and `workload` are a rank's."""
    if nodes == 1:
        return 0.0
    losses = LOSS_BYTES * traffic.forwards * workload.accumulation
    small = (nodes - 1) * ROUNDS * ROUND_BYTES + 2 * losses * ranks * (nodes - 1) / nodes
    return small + 2 * (nodes - 1) * traffic.reduced_bytes


def network_s(traffic: Traffic, workload: Workload, ranks: int, nodes: int, bytes_per_s: float) -> float:
    """Seconds that a step waits for the other machines, which are as fast."""
    if nodes == 1:
        return 0.0
    reduced = (nodes - 1) * traffic.reduced_bytes  # it goes as much as comes, at the same time
    return ROUNDS * ROUND_S + (sent_bytes(traffic, workload, ranks, nodes) - reduced) / bytes_per_s
