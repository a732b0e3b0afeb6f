"""What is on the GPU at the peak of a run: by size, and by the place in the code that made it.

    python tests/studies/memory_peak.py RECORD.json [--out FILE]
    python tests/studies/memory_peak.py JOB.toml --engine NAME --machine MACHINE.json [--out FILE]

Runs what a record ran (of `compare`, or of `prediction_grid.py`) or what is planned of a job, in this process
and without its limit of GPU memory, while torch records each allocation. Beside what was there at the peak
stands what the cost model counts by kind, so that what it leaves out can be told by its place. Recording
makes steps slow; their times say nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from engines.costs.table import traffic  # noqa: E402
from engines.errors import UserError  # noqa: E402
from engines.settings.parse import parse_settings  # noqa: E402
from harness.pipeline import plan_job  # noqa: E402
from harness.records.job import Job, load_job, make_job  # noqa: E402
from harness.records.run import load_run  # noqa: E402
from harness.resolve import resolve_shape  # noqa: E402
from harness.runs import worker  # noqa: E402
from harness.runs.launch import read_result  # noqa: E402
from profiles.documents import to_json, write_whole  # noqa: E402
from profiles.machine import load_machine  # noqa: E402
from profiles.planning.plan import Plan  # noqa: E402

Event = Mapping[str, Any]
"""One entry of a device's trace, as `torch.cuda.memory._snapshot` has them."""

MOST_EVENTS = 3_000_000
"""That torch keeps; older ones are lost."""
SEGMENTS = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
"""Events that change what torch has reserved."""
NEAREST = 3
"""Frames that name a place, from the innermost one."""
MOST_SIZES, MOST_PLACES = 25, 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The moment at which most bytes were allocated, as they were asked for, without rounding."""

    event: int
    """Its place in the trace: the allocation that made it; -1: nothing was allocated."""
    allocated_bytes: int
    reserved_bytes: int
    live: tuple[Event, ...]
    """The allocations that were there then, in the order in which they were made."""


def peak_of(trace: Sequence[Event]) -> Peak:
    """Of what `trace` allocates itself; what was there before is left out, also where it is freed."""
    live: dict[int, Event] = {}
    allocated = most = 0
    at = -1
    for index, event in enumerate(trace):
        allocated += _followed(live, event)
        if allocated > most:
            most, at = allocated, index
    until = trace[: at + 1]
    live.clear()
    for event in until:
        _followed(live, event)
    return Peak(
        event=at,
        allocated_bytes=most,
        reserved_bytes=sum(SEGMENTS.get(event["action"], 0) * event["size"] for event in until),
        live=tuple(live.values()),
    )


def _followed(live: dict[int, Event], event: Event) -> int:
    """By how many bytes an event changes what is allocated; `live`, by address, is brought up to date."""
    if event["action"] == "alloc":
        live[event["addr"]] = event
        return int(event["size"])
    if event["action"] == "free_completed" and event["addr"] in live:
        return -int(live.pop(event["addr"])["size"])
    return 0


def place_of(event: Event) -> str:
    """The innermost frames of an allocation, and the innermost one of ours where it is none of them."""
    frames = [
        f"{_short(frame['filename'])}:{frame['line']}:{frame['name']}"
        for frame in event.get("frames", [])
        if not _short(frame["filename"]).startswith("torch/utils/_device")
    ]
    near = frames[:NEAREST]
    ours = [frame for frame in frames if frame.startswith(("engines/", "harness/"))][:1]
    return " < ".join(near) + "".join(f" || {frame}" for frame in ours if frame not in near)


def _short(file: str) -> str:
    return file.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")


def lines_of(peak: Peak, trace: Sequence[Event]) -> Iterator[str]:
    """For people: the peak, then its bytes by size and by place, the largest share first."""
    made_at = place_of(trace[peak.event]) if peak.event >= 0 else "nowhere"
    yield f"allocated at the peak {peak.allocated_bytes / 1e9:.4f} GB"
    yield f"reserved then {peak.reserved_bytes / 1e9:.4f} GB"
    yield f"made by event {peak.event} of {len(trace)}: {made_at}"
    sizes = Counter(int(event["size"]) for event in peak.live)
    yield "by size (MB x tensors = MB):"
    for size, count in _largest(sizes, MOST_SIZES, lambda size: size):
        yield f"  {size / 1e6:9.3f} x {count:4d} = {size * count / 1e6:9.2f}"
    places = Counter((place_of(event), int(event["size"])) for event in peak.live)
    yield "by place (MB, tensors of MB):"
    for (place, size), count in _largest(places, MOST_PLACES, lambda key: key[1]):
        yield f"  {size * count / 1e6:9.2f}, {count} of {size / 1e6:.3f}: {place}"


def _largest(counted: Counter[Any], most: int, size_of: Callable[[Any], int]) -> list[tuple[Any, int]]:
    """So many of what was counted, by the bytes that all of a kind have together."""
    return sorted(counted.items(), key=lambda item: -size_of(item[0]) * item[1])[:most]


def asked_for(arguments: argparse.Namespace) -> tuple[Job, Plan]:
    """What is to run, without the job's limit of GPU memory. Raises `UserError`."""
    path: Path = arguments.what
    if path.suffix != ".toml":
        record = load_run(path)
        return _unlimited(make_job(record.job, str(path))), record.plan
    if arguments.engine is None or arguments.machine is None:
        raise UserError(str(path), "is a job, of which nothing is planned yet", "add --engine and --machine")
    job = _unlimited(load_job(path))
    (plan,) = plan_job(job, resolve_shape(job), load_machine(arguments.machine), [arguments.engine])
    if not plan.available:
        raise UserError(arguments.engine, f"cannot do this job: {plan.why_not}", "name another engine")
    return job, plan


def _unlimited(job: Job) -> Job:
    return replace(job, limits=replace(job.limits, vram_bytes=None))


def counted_kinds(job: Job, plan: Plan) -> str:
    """What the cost model has at the peak, and what it lets the allocator take beside."""
    given = {name: str(value) for name, value in plan.settings.items()}
    cost = traffic(plan.engine, resolve_shape(job), job.workload, parse_settings(plan.engine, given))
    kinds = {**cost.gpu_memory_bytes, "apart": cost.gpu_apart_bytes}
    return "counted (MB): " + ", ".join(f"{kind} {size / 1e6:.0f}" for kind, size in kinds.items())


def recorded(job: Job, plan: Plan) -> tuple[str, list[Event]]:
    """How the run ended, and the trace of its allocations on the first GPU. Raises `UserError`."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("memory_peak", "finds no CUDA device", "run it where `nvidia-smi` shows one")
    torch.cuda.init()
    request = worker.Request(id="memory-peak", job=job, shape=resolve_shape(job), plan=plan)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / worker.REQUEST).write_text(to_json(request), encoding="utf-8")
        events = os.open(folder / "events", os.O_WRONLY | os.O_CREAT, 0o644)
        torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS, stacks="python", context="alloc")
        worker.main([name, str(events), str(os.getppid())])
        trace: list[Event] = torch.cuda.memory._snapshot()["device_traces"][0]
        result = read_result(folder / worker.RESULT)
    if len(trace) >= MOST_EVENTS:
        raise UserError("memory_peak", f"saw more than {MOST_EVENTS} events", "take fewer steps")
    if result is None:
        return "ended without a result", trace
    return f"ended {result.end_state}" + (f": {result.end_reason}" if result.end_reason else ""), trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", type=Path, help="a record of a run (.json), or a job (.toml)")
    parser.add_argument("--engine", help="of a job, the method that is planned")
    parser.add_argument("--machine", type=Path, help="of a job, the profile that it is planned for")
    parser.add_argument("--out", type=Path, help="write there what else is printed")
    arguments = parser.parse_args()
    try:
        job, plan = asked_for(arguments)
        ended, trace = recorded(job, plan)
        given = ", ".join(f"{name}={value}" for name, value in plan.settings.items())
        told = [f"{plan.engine} ({given or 'its defaults'}) {ended}", counted_kinds(job, plan)]
        text = "\n".join([*told, *lines_of(peak_of(trace), trace)]) + "\n"
        if arguments.out is None:
            print(text, end="")
        else:
            write_whole(arguments.out, text)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
