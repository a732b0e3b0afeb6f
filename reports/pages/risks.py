"""What can go wrong, what is done against it, and three gates on the way to production. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engines import entry, trains_everything
from engines.settings.zeroth_order import approximation
from harness.records.columns import Column
from harness.records.memory_limits import gpu_limit_bytes, host_limit_bytes
from profiles.units import format_bytes, format_seconds
from reports.decide import Verdict
from reports.format import Table
from reports.judging import stated
from reports.judging.quality import learned
from reports.measured.measurements import Measurements, is_emulated
from reports.messages import say
from reports.warnings import FEW_RUNS

STOP_FACTOR = 1.5
"""Of the time stated: what takes longer is not what was decided on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Risk:
    """Key of its texts: what it is and what is done against it."""

    key: str

    def text(self, what: str) -> str:
        return say(f"risk.{self.key}_{what}")


RISKS: tuple[Column[Risk], ...] = (
    Column("risk", lambda one: one.text("what")),
    Column("mitigation", lambda one: one.text("then")),
)


def risks_table(verdict: Verdict, all_: Measurements) -> Table | None:
    """Those that apply to the method of the verdict; `None` where it is about none."""
    if verdict.method is None:
        return None
    return Table.of(RISKS, [Risk(key=key) for key in _keys(verdict.method, all_)])


def _keys(engine: str, all_: Measurements) -> Iterator[str]:
    row, rounds = entry(engine), all_.of(engine)
    if learned(engine, all_) is None:
        yield "quality"
    if row.order == "zeroth":
        yield "zeroth"
    elif row.role == "offload" and not trains_everything(engine):
        yield "subspace"
    elif not trains_everything(engine):
        yield "adapters"
    if any(approximation(run.plan.settings) is not None for run in rounds.runs):
        yield "approximate"
    if any(run.model.random_weights for run in rounds.runs):
        yield "random_weights"
    if is_emulated(rounds):
        yield "emulated"
    if 0 < len(rounds.ok) < FEW_RUNS:
        yield "few_runs"
    if _is_tight(engine, all_):
        yield "tight"
    if row.copies == "own":
        yield "research"
    yield "changes"
    yield "machine"
    yield "data"


def _is_tight(engine: str, all_: Measurements) -> bool:
    """Little of the GPU's or of the host's memory is left."""
    rounds = all_.of(engine)
    if not rounds.ok:
        return False
    gpu, limit = stated.gpu_peak(engine, all_).value, gpu_limit_bytes(rounds.ok[0], all_.machine)
    host, whole = stated.host_peak(engine, all_).value, host_limit_bytes(rounds.ok[0])
    return bool((gpu and limit and gpu > 0.9 * limit) or (host and host > 0.8 * whole))


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """A step on the way, with what leads in and out of it."""

    name: str
    enter: str
    leave: str
    stop: str
    measure: str


GATES: tuple[Column[Gate], ...] = (
    Column("gate", lambda one: one.name),
    Column("enter", lambda one: one.enter),
    Column("leave", lambda one: one.leave),
    Column("stop", lambda one: one.stop),
    Column("measure", lambda one: one.measure),
)


def gates_table(verdict: Verdict, all_: Measurements) -> Table:
    """Proof of concept, first use, production."""
    engine = verdict.method
    time = stated.step_s(engine, all_) if engine is not None else stated.Stated(value=None)
    slow = format_seconds(time.value * STOP_FACTOR) if time.value is not None else say("gate.agreed")
    peak = stated.gpu_peak(engine, all_) if engine is not None else stated.Stated(value=None)
    if engine is not None and peak.value is None:
        peak = stated.host_peak(engine, all_)
    memory = format_bytes(peak.value) if peak.value is not None else say("gate.agreed")
    values = {"engine": engine or say("gate.method"), "slow": slow, "memory": memory}
    rows = [
        Gate(
            name=say(f"gate.{key}"),
            **{part: say(f"gate.{key}_{part}", **values) for part in ("enter", "leave", "stop", "measure")},
        )
        for key in ("poc", "staged", "production")
    ]
    return Table.of(GATES, rows)
