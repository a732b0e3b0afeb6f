"""Threads and fresh memory near the GPU, where the machine has more than one NUMA node."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from profiles.system.cgroup import ROOT
from profiles.system.topology import cpus_of_node, numa_node_of, numa_nodes


@contextmanager
def near_device(bus_id: str | None, root: Path = ROOT) -> Iterator[str]:
    """`near` the node of the PCI device `bus_id`; `None`: where that is, is not known."""
    with near(None if bus_id is None else numa_node_of(bus_id, root), root) as placement:
        yield placement


@contextmanager
def near(node: int | None, root: Path = ROOT) -> Iterator[str]:
    """This thread runs on processors of `node` inside; yields a sentence on where it runs.

    Memory lies where the thread that first touches it runs, so torch gets one thread too: those it already
    has stay where they are. HAZARD: nothing inside may depend on torch's CPU threads.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield "not known"
        return
    before = os.sched_getaffinity(0)
    wanted = frozenset() if node is None else cpus_of_node(node, root) & before
    if len(numa_nodes(root)) < 2:
        yield "one NUMA node"
    elif node is None:
        yield "several NUMA nodes, and the kernel does not tell the GPU's"
    elif not wanted:
        yield f"this process may not use the processors of NUMA node {node}, the GPU's"
    else:
        try:
            os.sched_setaffinity(0, wanted)
            with torch_threads(1):
                yield f"NUMA node {node}, the GPU's"
        finally:
            os.sched_setaffinity(0, before)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes with `count` threads inside, with as many as before after it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
