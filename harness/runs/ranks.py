"""The ranks of one run: which process is which, on which GPU, and that they are alike. Imports no torch.

A rank is a process with one GPU. Its environment has the variables that torchrun sets (RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE), so that libraries find what they look for. On one machine the ranks meet at a
file of the run; on several, where a person or torchrun starts the same command on each, at MASTER_ADDR and
MASTER_PORT, the machine's number being NODE_RANK, or torchrun's own name for it, GROUP_RANK.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engines import entry
from engines.errors import UserError
from engines.world import World
from harness.records.environment import read_environment
from harness.records.job import Job, Limits
from harness.records.run import Summary
from profiles.system.nvml import NvmlDevice, open_device, visible_gpus

RENDEZVOUS = "LSPZO_BENCH_RENDEZVOUS"
"""Environment variable: where the ranks meet, as a URL for torch.distributed."""
MEETING = "ranks"
"""The file in a run's folder at which the ranks of one machine meet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlace:
    """One rank of a run."""

    rank: int
    size: int
    local_rank: int
    """Among the ranks of its machine."""
    local_size: int
    where: str
    """`file:///...` or `tcp://host:port`."""

    @property
    def environment(self) -> dict[str, str]:
        """What its process is told."""
        variables = {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            RENDEZVOUS: self.where,
        }
        gpus = visible_gpus()
        if gpus:  # its own is the only one that it sees, and so its cuda:0
            variables["CUDA_VISIBLE_DEVICES"] = gpus[self.local_rank % len(gpus)]
        if self.local_size == self.size:  # a host name that leads nowhere does no harm, nor a slow network
            own = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
            variables |= {name: value for name, value in own.items() if name not in os.environ}
        return variables


def places(limits: Limits, folder: Path) -> list[RankPlace]:
    """The ranks of a run that this machine has, by what a run may use; none where it is one process.

    Those of one machine meet in `folder`, where no run has met before. Raises `UserError`.
    """
    if limits.ranks == 1:
        return []
    node, where = 0, f"file://{(folder / MEETING).resolve()}"
    if limits.nodes > 1:
        node, where = _rendezvous(limits.nodes, os.environ)
    return [
        RankPlace(
            rank=node * limits.gpus + local, size=limits.ranks, local_rank=local,
            local_size=limits.gpus, where=where,
        )
        for local in range(limits.gpus)
    ]  # fmt: skip


def _rendezvous(nodes: int, environment: Mapping[str, str]) -> tuple[int, str]:
    """This machine's number, and where the ranks meet. Raises `UserError`."""
    environment = {"NODE_RANK": environment.get("GROUP_RANK", ""), **environment}
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        if not environment.get(name, "").strip():
            raise UserError(
                f"--nodes {nodes}",
                f"{name} is not set",
                "set MASTER_ADDR and MASTER_PORT to the first machine's, and NODE_RANK to 0, 1, ...",
            )
    address, port, node = (environment[name] for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"))
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"MASTER_PORT={port}", "is no port", "set a number from 1024 to 65535, the same on all"
        )
    if not node.isdecimal() or int(node) >= nodes:
        raise UserError(
            f"NODE_RANK={node}", f"is no number of {nodes} machines", f"set one of 0 to {nodes - 1}"
        )
    return int(node), f"tcp://{address}:{port}"


def _refuse_copies(limits: Limits, environment: Mapping[str, str]) -> None:
    """Raises `UserError` where torchrun has started this command several times on this machine."""
    count = environment.get("LOCAL_WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in environment and RENDEZVOUS not in environment and count != "1":
        raise UserError(
            f"torchrun --nproc-per-node {count}",
            "starts the command more than once, which starts its own processes",
            f"set --nproc-per-node 1, and --gpus {max(int(count), limits.gpus)}",
        )


def place_of(environment: Mapping[str, str]) -> RankPlace:
    """Of a process with the `RankPlace.environment`."""
    rank, size, local_rank, local_size = (
        int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    return RankPlace(
        rank=rank, size=size, local_rank=local_rank, local_size=local_size, where=environment[RENDEZVOUS]
    )


def check_gpus(limits: Limits, engines: Sequence[str] = ()) -> None:
    """Raises `UserError` where this machine has fewer GPUs than `limits.gpus`, one of the `engines`, which
    were named, runs on one alone, or torchrun has started this command several times. Without any GPU, ranks
    share the CPU."""
    _refuse_copies(limits, os.environ)
    count = len(visible_gpus())
    if 0 < count < limits.gpus:
        raise UserError(
            f"--gpus {limits.gpus}", f"this machine shows {count}", f"use --gpus {count} or fewer"
        )
    for name in engines if limits.ranks > 1 else ():
        if not entry(name).several_gpus:
            raise UserError(
                f"--gpus {limits.gpus}", f"{name} runs on one GPU", "leave out --gpus and --nodes"
            )
        if limits.nodes > 1 and not entry(name).several_machines:
            raise UserError(
                f"--nodes {limits.nodes}",
                f"{name} runs on one machine",
                "leave out --nodes, or use lsp, mezo or zo2",
            )


def devices_of(ranks: Sequence[RankPlace], first: NvmlDevice | None) -> list[NvmlDevice]:
    """The GPUs of the ranks of this machine; `first` is that of the first, or of a run that is alone."""
    if first is None:
        return []
    count = len(visible_gpus())
    more = [open_device(index) for index in range(1, min(len(ranks), count))]
    return [first, *(device for device in more if device is not None)]


def of_group(summaries: Sequence[Summary]) -> Summary:
    """Of several ranks: times and bytes of the first, peaks of the GPU that has most in use, energy, pinned
    memory and what is read from disk of all."""
    first = summaries[0]
    if len(summaries) == 1:
        return first

    def known(name: str) -> list[int]:
        return [value for each in summaries if (value := getattr(each, name)) is not None]

    return replace(
        first,
        peak_gpu_allocated_bytes=max(known("peak_gpu_allocated_bytes"), default=None),
        peak_gpu_reserved_bytes=max(known("peak_gpu_reserved_bytes"), default=None),
        pinned_bytes=sum(known("pinned_bytes")) if known("pinned_bytes") else None,
        disk_read_bytes=sum(known("disk_read_bytes")) if known("disk_read_bytes") else None,
        energy_j=sum(known("energy_j")) if len(known("energy_j")) == len(summaries) else None,
    )


def of_one(summary: Summary) -> Summary:
    """Of one rank, as it is kept beside that of the group: every rank has the same evaluation."""
    return replace(
        summary, eval_sequence_labels=(), eval_sequence_losses_first=(), eval_sequence_losses_last=()
    )


def what_to_agree_on(job: Job, engine: str, settings: Mapping[str, object]) -> dict[str, str]:
    """What has to be the same on every rank, by name: else the ranks would not take the same steps."""
    here = read_environment()
    asked = json.dumps([str(job), engine, dict(settings)], sort_keys=True, default=str)
    return {
        "lspzo-bench": here.program,
        "commit": str(here.commit),
        "Python": here.python,
        "torch": str(here.torch),
        "transformers": str(here.transformers),
        "triton": here.packages.get("triton", "None"),
        "GPU": here.gpu_name or here.cpu,
        "driver": str(here.gpu_driver),
        "job or settings": hashlib.sha256(asked.encode("utf-8")).hexdigest()[:8],
    }


def check_alike(world: World, own: Mapping[str, str]) -> None:
    """Raises `UserError`, on every rank, where a rank tells something else than rank 0."""
    of_ranks = [json.loads(each) for each in world.exchange(json.dumps(dict(own)).encode("utf-8"))]
    for rank, each in enumerate(of_ranks):
        for name, value in each.items():
            if value != of_ranks[0].get(name):
                raise UserError(
                    f"rank {rank}",
                    f"its {name} is {value}, that of rank 0 is {of_ranks[0].get(name)}",
                    "ranks have to be alike, or they would not take the same steps",
                )
