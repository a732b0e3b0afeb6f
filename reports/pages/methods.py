"""All methods in one table: what each trains, whether it fits, how long, how much, how good. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines import entry, what_trains
from harness.records.columns import BYTES, SECONDS, CellValue, Column, Told, where_known
from harness.records.stats import Rounds, over_runs
from profiles.language import translated
from reports.decide import Verdict, state_word
from reports.format import JOULES, NUMBER, PERCENT, Table, joules, middle_cell, number
from reports.judging import stated
from reports.judging.quality import beside_native_text, learned
from reports.judging.ranking import State
from reports.measured.measurements import Measurements, is_emulated, typical
from reports.messages import say
from reports.tables.methods import fits, rare_notes


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodInShort:
    engine: str
    state: State | None
    all_: Measurements

    @property
    def rounds(self) -> Rounds:
        return self.all_.of(self.engine)


def _trains(one: MethodInShort) -> str:
    """Of its runs, which have the same settings."""
    return translated(what_trains(one.engine, one.rounds.runs[0].plan.settings if one.rounds.runs else {}))


def _time(one: MethodInShort) -> stated.Stated:
    """As stated on the first page."""
    steps = one.all_.steps
    return stated.step_s(one.engine, one.all_) if steps is None else stated.job_s(one.engine, one.all_, steps)


def _shown_time(one: MethodInShort) -> CellValue:
    """A number, or both of two runs."""
    time = _time(one)
    return Told(time.value, stated.plain_time(time)) if time.is_pair and time.value else time.value


def _is_predicted(rows: Sequence[MethodInShort]) -> bool:
    return any(_time(one).origin == "predicted" for one in rows)


def _origin(one: MethodInShort) -> CellValue:
    origin = _time(one).origin
    return None if origin == "unknown" else say(f"stated.{origin}_number")


def _sized(rows: Sequence[MethodInShort]) -> bool:
    """Somebody said how much is to be trained."""
    return any(one.all_.steps is not None for one in rows)


def _tokens_per_s(one: MethodInShort) -> CellValue:
    return None if is_emulated(one.rounds) else middle_cell(one.rounds.tokens_per_s, number)


def _energy(one: MethodInShort) -> CellValue:
    return middle_cell(over_runs(one.rounds.ok, lambda run: run.summary.energy_j), joules)


def _any_mfu(rows: Sequence[MethodInShort]) -> bool:
    return any(run.summary.mfu is not None for one in rows for run in one.rounds.ok)


def _quality(kind: str) -> Column[MethodInShort]:
    def of(one: MethodInShort) -> CellValue:
        found = learned(one.engine, one.all_, of_random_weights=True)
        if found is None or found.kind != kind:
            return None
        return say("table.first_to_last", first=found.before, last=found.told)

    return Column(kind, of, shown=where_known(of))


def _loss_beside(one: MethodInShort) -> str | None:
    """What its held-out loss is more than native's, where that was evaluated on the same sequences."""
    return beside_native_text(one.engine, one.all_) or None


def _state(one: MethodInShort) -> CellValue:
    if one.state is None:
        return None
    return state_word(one.state)


SHORT: tuple[Column[MethodInShort], ...] = (
    Column("method", lambda one: one.engine),
    Column("verdict", _state),
    Column("trains", _trains),
    Column("fits", lambda one: fits(one.rounds)),
    Column("job_time", lambda one: _shown_time(one), SECONDS, shown=lambda rows: _sized(rows)),
    Column("step_stated", lambda one: _shown_time(one), SECONDS, shown=lambda rows: not _sized(rows)),
    Column("time_origin", _origin, shown=_is_predicted),
    Column("tokens", _tokens_per_s, NUMBER),
    Column("mfu", lambda one: typical(one.rounds, lambda run: run.summary.mfu), PERCENT, shown=_any_mfu),
    Column("gpu_peak", lambda one: stated.gpu_peak(one.engine, one.all_).value, BYTES),
    Column("host", lambda one: stated.host_peak(one.engine, one.all_).value, BYTES),
    _quality("accuracy"),
    _quality("heldout_loss"),
    Column("loss_beside", lambda one: _loss_beside(one), shown=lambda rows: any(map(_loss_beside, rows))),
    Column("energy", _energy, JOULES),
    Column("source", lambda one: entry(one.engine).source),
)


def best_first(verdict: Verdict, all_: Measurements) -> list[str]:
    """Methods that were run, as the verdict ranks them; then those that it does not speak of."""
    ranked = [one.engine for one in verdict.methods]
    return [*ranked, *(engine for engine in all_.engines if engine not in ranked)]


def methods_table(verdict: Verdict, all_: Measurements) -> Table:
    """The best first, by the verdict; methods that were planned and not run are not here."""
    states = {one.engine: one.state for one in verdict.methods}
    rows = [
        MethodInShort(engine=engine, state=states.get(engine), all_=all_)
        for engine in best_first(verdict, all_)
    ]
    return Table.of(SHORT, rows, say("tablenote.methods"), *rare_notes(all_))
