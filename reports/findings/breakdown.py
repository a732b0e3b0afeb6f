"""Where the time of a method's step goes, and the tables that show it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields

from engines import entry
from harness.records.columns import SECONDS, CellValue, Column, optional
from harness.records.run import Run
from harness.records.stats import Rounds
from profiles.units import format_seconds
from reports.format import PERCENT, Table
from reports.measured.measurements import Measurements, floor_share, typical
from reports.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown:
    """Medians over the runs of a method that ended ok, in seconds per step. `None`: not measured."""

    engine: str
    h2d_s: float | None = None
    d2h_s: float | None = None
    gpu_s: float | None = None
    """Compute and noise."""
    compute_s: float | None = None
    """Without noise; `None` also where noise was made and not timed."""
    noise_s: float | None = None
    idle_s: float | None = None
    """Of the GPU."""
    cpu_s: float | None = None
    gpu_exposed_s: float | None = None
    h2d_exposed_s: float | None = None
    d2h_exposed_s: float | None = None
    cpu_exposed_s: float | None = None
    """Of a resource's time, what hid behind no other: see `harness.records.run.Summary`."""
    floor_share: float | None = None
    """Predicted floor over measured step."""
    disk_s: float | None = None
    """Something was being read."""
    disk_floor_s: float | None = None
    """What a step reads, at the rate of reading alone, measured."""
    disk_floor_share: float | None = None
    """That over the measured step."""
    landed_share: float | None = None
    """Realized update fraction: what of the wanted update survived rounding."""
    noiseless: bool = False
    """The method makes no noise: there is nothing to measure."""

    @property
    def is_measured(self) -> bool:
        """There is something to show."""
        return any(
            getattr(self, one.name) is not None for one in fields(self) if one.name.endswith(("_s", "_share"))
        )

    @property
    def mixed(self) -> bool:
        """The GPU's time is known, but not how much of it made noise."""
        return self.gpu_s is not None and self.compute_s is None


def breakdown(rounds: Rounds) -> Breakdown:
    """Of the runs that ended ok."""
    noise_s = typical(rounds, lambda run: run.summary.perturb_s)
    noiseless = entry(rounds.engine).order == "first" and noise_s is None

    def compute_s(run: Run) -> float | None:
        seen = run.summary
        if seen.gpu_s is None or (seen.perturb_s is None and not noiseless):
            return None
        return max(0.0, seen.gpu_s - (seen.perturb_s or 0.0))

    return Breakdown(
        engine=rounds.engine,
        h2d_s=typical(rounds, lambda run: run.summary.h2d_s),
        d2h_s=typical(rounds, lambda run: run.summary.d2h_s),
        gpu_s=typical(rounds, lambda run: run.summary.gpu_s),
        compute_s=typical(rounds, compute_s),
        noise_s=noise_s,
        noiseless=noiseless,
        idle_s=typical(rounds, lambda run: run.summary.idle_s),
        cpu_s=typical(rounds, lambda run: run.summary.cpu_s),
        gpu_exposed_s=typical(rounds, lambda run: run.summary.gpu_exposed_s),
        h2d_exposed_s=typical(rounds, lambda run: run.summary.h2d_exposed_s),
        d2h_exposed_s=typical(rounds, lambda run: run.summary.d2h_exposed_s),
        cpu_exposed_s=typical(rounds, lambda run: run.summary.cpu_exposed_s),
        floor_share=typical(rounds, floor_share),
        disk_s=typical(rounds, lambda run: run.summary.disk_s),
        disk_floor_s=typical(rounds, lambda run: run.summary.disk_floor_s),
        disk_floor_share=typical(rounds, lambda run: run.summary.disk_floor_share),
        landed_share=typical(rounds, lambda run: run.summary.landed_share),
    )


def _compute(one: Breakdown) -> CellValue:
    return say("busy.with_noise", value=format_seconds(one.gpu_s)) if one.mixed else one.compute_s


BUSY: tuple[Column[Breakdown], ...] = (
    Column("method", lambda one: one.engine),
    Column("h2d_time", lambda one: one.h2d_s, SECONDS),
    Column("d2h_time", lambda one: one.d2h_s, SECONDS),
    Column("compute", _compute, SECONDS),
    Column("noise", lambda one: say("busy.no_noise") if one.noiseless else one.noise_s, SECONDS),
    Column("idle", lambda one: one.idle_s, SECONDS),
    Column("cpu", lambda one: one.cpu_s, SECONDS),
    optional("disk_time", lambda one: one.disk_s, SECONDS),
    optional("floor", lambda one: one.floor_share, PERCENT, note="floor"),
    optional("disk_floor", lambda one: one.disk_floor_share, PERCENT, note="disk_floor"),
    optional("landed", lambda one: one.landed_share, PERCENT, note="landed"),
)


def busy_table(all_: Measurements) -> Table | None:
    """How long each resource was busy per step, how near the step came to its floor, and what of the update
    was realized; `None` where none of it is known."""
    rows = [one for engine in all_.engines if (one := breakdown(all_.of(engine))).is_measured]
    return Table.of(BUSY, rows, say("tablenote.busy")) if rows else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourceOverlap:
    """One resource of one method: how long it was busy in a step, and how much of that hid behind others."""

    engine: str
    resource: str
    busy_s: float | None
    exposed_s: float | None

    @property
    def alone_s(self) -> float | None:
        """Medians, and work that is not in `busy_s`, may exceed it."""
        if self.busy_s is None or self.exposed_s is None:
            return None
        return min(self.exposed_s, self.busy_s)

    @property
    def hidden_s(self) -> float | None:
        return None if self.busy_s is None or self.alone_s is None else self.busy_s - self.alone_s


OVERLAP: tuple[Column[ResourceOverlap], ...] = (
    Column("method", lambda one: one.engine),
    Column("resource", lambda one: say(f"resource.{one.resource}")),
    Column("busy", lambda one: one.busy_s, SECONDS),
    Column("overlapped", lambda one: one.hidden_s, SECONDS),
    Column("exposed", lambda one: one.alone_s, SECONDS),
)


def overlap_table(all_: Measurements) -> Table | None:
    """Of each resource's time per step, how much hid behind the others and how much was left exposed, which
    of the disk is not known; `None` where no method has it measured."""
    found = [breakdown(all_.of(engine)) for engine in all_.engines]
    rows = [row for one in found for row in _overlaps(one)]
    if not rows:
        return None
    reads = any(one.disk_s is not None for one in found)
    return Table.of(
        OVERLAP, rows, *(say(f"tablenote.{key}") for key in ("overlap", *["disk_overlap"] * reads))
    )


def _overlaps(one: Breakdown) -> list[ResourceOverlap]:
    """The resources of a method, or none of them where nothing exposed was measured."""
    times_s = {
        "gpu": (one.gpu_s, one.gpu_exposed_s),
        "d2h": (one.d2h_s, one.d2h_exposed_s),
        "cpu": (one.cpu_s, one.cpu_exposed_s),
        "h2d": (one.h2d_s, one.h2d_exposed_s),
    }
    if all(exposed_s is None for _, exposed_s in times_s.values()):
        return []
    if one.disk_s is not None:
        times_s["disk"] = (one.disk_s, None)
    return [
        ResourceOverlap(engine=one.engine, resource=name, busy_s=busy_s, exposed_s=exposed_s)
        for name, (busy_s, exposed_s) in times_s.items()
    ]
