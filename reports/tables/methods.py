"""Methods as rows: their speed, losses and energy, and the memory that they take. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from engines import YARDSTICK
from engines.errors import UserError
from engines.settings.lsp import LspSettings
from harness.records.columns import BYTES, SECONDS, CellValue, Column
from harness.records.comparison import beside_native
from harness.records.run import Run
from harness.records.stats import SAME_FACTOR, Rounds, over_runs, rare_step_s
from profiles.units import NOT_MEASURED, format_seconds
from reports.format import (
    JOULES,
    NUMBER,
    PERCENT,
    Table,
    counted,
    joules,
    loss,
    middle,
    middle_cell,
    number,
    percent,
    range_told,
    span,
    times,
)
from reports.judging.quality import examples_text, sequences_text
from reports.judging.stated import ratio_text
from reports.measured.examples import loss_over_sequences, over_examples
from reports.measured.measurements import (
    DOES_NOT_FIT,
    NOTHING_LEARNED,
    Measurements,
    ends,
    is_emulated,
    largest,
    over_steps,
    predicted,
    typical,
)
from reports.measured.metrics import find
from reports.messages import say


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodRow:
    """One method as a row: its runs, and all others to hold it against."""

    rounds: Rounds
    all_: Measurements

    @property
    def engine(self) -> str:
        return self.rounds.engine


def _methods(all_: Measurements) -> list[MethodRow]:
    return [MethodRow(rounds=all_.of(engine), all_=all_) for engine in all_.engines]


def _if_timed(of: Callable[[MethodRow], CellValue]) -> Callable[[MethodRow], CellValue]:
    """Nothing where no step of the method was timed."""
    return lambda method: None if method.rounds.step_s is None else of(method)


def _each_run(
    value: Callable[[Run], float | None], show: Callable[[float | None], str]
) -> Callable[[MethodRow], CellValue]:
    """The median over runs of `value`; of two runs both."""

    def cell(method: MethodRow) -> CellValue:
        found = over_runs(method.rounds.ok, value)
        return middle_cell(found, show)

    return cell


def _any_has(value: Callable[[Run], float | None]) -> Callable[[Sequence[MethodRow]], bool]:
    return lambda methods: any(value(run) is not None for each in methods for run in each.rounds.ok)


def _mfu(run: Run) -> float | None:
    return run.summary.mfu


def _first_s(run: Run) -> float | None:
    return run.samples[0].step_s if run.samples else None


SPEED: tuple[Column[MethodRow], ...] = (
    Column("method", lambda one: one.engine),
    Column("ended", lambda one: ends(one.rounds.runs)),
    Column("step", lambda one: _step(one.rounds)),
    Column("first_step", _if_timed(_each_run(_first_s, format_seconds)), SECONDS),
    Column("tokens", lambda one: _tokens_per_s(one.rounds), NUMBER),
    Column("mfu", _if_timed(_each_run(_mfu, percent)), PERCENT, shown=_any_has(_mfu), note="mfu"),
    Column("beside_native", _if_timed(lambda one: _comparison(one.engine, one.all_))),
    Column("loss", _if_timed(lambda one: _first_to_last(one.rounds.loss_first, one.rounds.loss_last, loss))),
    Column(
        "evaluation",
        _if_timed(lambda one: _evaluation(one.rounds)),
        shown=_any_has(lambda run: run.summary.eval_loss_last),
    ),
    Column("energy", _if_timed(_each_run(lambda run: run.summary.energy_j, joules)), JOULES),
)


def speed_table(all_: Measurements) -> Table:
    """Step time, tokens, how it stands beside native, loss, and accuracy where there was an evaluation. What
    lsp's first step would add to each, and what one step in so many of others does, is a note."""
    searches = [note for engine in all_.rounds if (note := _search_note(all_.of(engine)))]
    return Table.of(SPEED, _methods(all_), say("tablenote.speed"), *searches, *rare_notes(all_))


def rare_notes(all_: Measurements) -> Iterator[str]:
    """Methods whose median step is not that of a long job, since one step in so many has more to do. That of
    lsp has a note of its own in `speed_table`."""
    native_s = all_.of(YARDSTICK).lasting_step_s
    for engine in all_.engines:
        rounds = all_.of(engine)
        usual_s, lasting_s, expected = rounds.step_s, rounds.lasting_step_s, predicted(rounds)
        if usual_s is None or lasting_s is None or expected is None or _search_note(rounds):
            continue
        if is_emulated(rounds) or lasting_s < SAME_FACTOR * usual_s.median:
            continue
        beside = ""
        if engine != YARDSTICK and native_s:
            beside = say("tablenote.rare_beside_native", ratio=times(lasting_s / native_s))
        yield say(
            "tablenote.rare",
            engine=engine,
            every=f"{expected.rare_every:,}",
            more=format_seconds(typical(rounds, rare_step_s)),
            step=format_seconds(lasting_s),
            beside=beside,
        )


def _step(rounds: Rounds) -> str | None:
    """`1.00 s (0.90 to 1.10 s, 8 steps, 1 run)`; from three runs on with the interval of the median."""
    if rounds.step_s is None:
        return None
    of_median = ""
    if rounds.step_s.interval is not None:
        low, high = rounds.step_s.interval
        of_median = say("table.interval", range=span(format_seconds(low), format_seconds(high)))
    return say(
        "table.step", median=middle(rounds.step_s, format_seconds), interval=of_median,
        range=span(format_seconds(rounds.step_s_low), format_seconds(rounds.step_s_high)),
        steps=counted("step", rounds.counted_steps), runs=counted("run", rounds.step_s.count),
    )  # fmt: skip


def _tokens_per_s(rounds: Rounds) -> CellValue:
    return middle_cell(rounds.tokens_per_s, number)


def _search_note(rounds: Rounds) -> str:
    """Step time of a method that searches for projectors, with the search spread over the steps that they
    serve at least; empty where there was none, or in a step that was counted."""
    first_s = typical(rounds, _first_s)
    if first_s is None or rounds.step_s is None or not rounds.ok[0].samples[0].warmup:
        return ""
    try:
        settings = rounds.ok[0].plan.settings.typed
    except UserError:
        return ""  # written by a version with other settings
    if not isinstance(settings, LspSettings):
        return ""
    spread_s = rounds.step_s.median + max(0.0, first_s - rounds.step_s.median) / settings.check_every
    return say(
        "tablenote.search",
        first=format_seconds(first_s),
        steps=counted("step", settings.check_every),
        step=format_seconds(spread_s),
    )


def _largest(value: Callable[[Run], float | None]) -> Callable[[MethodRow], CellValue]:
    return lambda method: largest(method.rounds, value)


def _typical(value: Callable[[Run], float | None]) -> Callable[[MethodRow], CellValue]:
    return lambda method: typical(method.rounds, value)


MEMORY: tuple[Column[MethodRow], ...] = (
    Column("method", lambda one: one.engine),
    Column("fits", lambda one: fits(one.rounds)),
    Column("allocated", _largest(lambda run: run.summary.peak_gpu_allocated_bytes), BYTES),
    Column("reserved", _largest(lambda run: run.summary.peak_gpu_reserved_bytes), BYTES),
    Column("nvml", _largest(lambda run: run.summary.peak_gpu_nvml_bytes), BYTES),
    Column("host", _largest(lambda run: run.summary.peak_host_bytes), BYTES),
    Column("pinned", _largest(lambda run: run.summary.pinned_bytes), BYTES),
    Column("h2d", _typical(lambda run: run.summary.h2d_bytes), BYTES),
    Column("d2h", _typical(lambda run: run.summary.d2h_bytes), BYTES),
)


def memory_table(all_: Measurements) -> Table:
    """Largest over the runs of each peak, and the bytes that cross the link per step."""
    return Table.of(MEMORY, _methods(all_), say("tablenote.memory"))


def _comparison(engine: str, all_: Measurements) -> str:
    """`1.80x (1.78x to 1.82x, slower)`: the ratio to native and whether it is real, or why it is not told."""
    if engine == YARDSTICK:
        return say("compared.baseline")
    found = find("step_time_ratio", engine, all_)
    if found.value is None:
        return found.note or NOT_MEASURED
    return say("table.with_range", value=ratio_text(found), range=found.note or _beside(engine, all_))


def _beside(engine: str, all_: Measurements) -> str:
    """`95 %: 1.78x to 1.82x; slower`, or why it is undecided; empty where there is nothing to compare."""
    found = beside_native(all_.of(engine), all_.of(YARDSTICK))
    if found is None:
        return ""
    word = say(f"compared.{found.why_undecided or found.answer}")
    low, high = times(found.low), times(found.high)
    if found.confidence is not None:
        return say("compared.interval", range=span(low, high), word=word)
    if over_steps(all_.of(engine), all_.of(YARDSTICK)):
        return say("compared.range", range=range_told(low, high, over_steps=True), word=word)
    return word


def _first_to_last(first: float | None, last: float | None, show: Callable[[float | None], str]) -> str:
    return say("table.first_to_last", first=show(first), last=show(last))


def _evaluation(rounds: Rounds) -> str:
    """Accuracy and loss before and after, and how long the last evaluation took."""
    accuracy = _first_to_last(
        typical(rounds, lambda run: run.summary.eval_accuracy_first),
        typical(rounds, lambda run: run.summary.eval_accuracy_last),
        _percent_fine,
    )
    if (examples := over_examples(rounds)) is not None:
        accuracy = say("quality.told", value=accuracy, examples=examples_text(examples))
    losses = _first_to_last(
        typical(rounds, lambda run: run.summary.eval_loss_first),
        typical(rounds, lambda run: run.summary.eval_loss_last),
        loss,
    )
    if sequences := sequences_text(loss_over_sequences(rounds)):
        losses = say("quality.told", value=losses, examples=sequences)
    found = say("table.evaluation", accuracy=accuracy, loss=losses)
    time_s = typical(rounds, lambda run: run.summary.eval_s)
    return (
        found if time_s is None else say("table.evaluation_in", evaluation=found, time=format_seconds(time_s))
    )


def _percent_fine(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{100 * value:.1f} %"


def fits(rounds: Rounds) -> str:
    concluded = {run.end_state for run in rounds.runs} - NOTHING_LEARNED
    if rounds.ok:
        return say("fits.yes" if not concluded & DOES_NOT_FIT else "fits.sometimes")
    if concluded == {"skipped_infeasible"}:
        return say("fits.predicted_no")
    return say("fits.no") if concluded & DOES_NOT_FIT else say("fits.unknown")
