"""The tables of a report: methods, memory, predictions and criteria, as plain text. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from engines import YARDSTICK, entry
from engines.errors import UserError
from engines.settings.lsp import LspSettings
from harness.records.run import Run
from harness.records.stats import Rounds, over_runs, ratio
from profiles.units import (
    NOT_MEASURED,
    format_bytes,
    format_seconds,
)
from reports.decide import Row, Verdict
from reports.format import counted, joules, loss, metric_value, number, percent, span, times
from reports.load import Loaded, engine_order
from reports.messages import say
from reports.metrics import (
    DOES_NOT_FIT,
    NOTHING_LEARNED,
    Measurements,
    ends,
    faster_or_slower,
    find,
    floor_share,
    gpu_limit_bytes,
    gpu_taken_bytes,
    held_gpu_bytes,
    held_host_bytes,
    host_limit_bytes,
    over_steps,
    predicted,
    reserves_known,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[int, ...] = ()
    """Columns that are set to the right."""
    note: str = ""


def make_table(
    columns: Sequence[str], rows: Sequence[tuple[str, ...]], numeric: Sequence[str] = (), note: str = ""
) -> Table:
    return Table(
        columns=tuple(say(f"column.{column}") for column in columns),
        rows=tuple(rows),
        numeric=tuple(index for index, column in enumerate(columns) if column in numeric),
        note=say(f"tablenote.{note}") if note else "",
    )


def engines_of(all_: Measurements) -> list[str]:
    return sorted(all_.rounds, key=engine_order)


def typical(rounds: Rounds, value: Callable[[Run], float | None]) -> float | None:
    found = over_runs(rounds.ok, value)
    return found.median if found else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One key figure."""

    label: str
    value: str
    detail: str


def tiles(verdict: Verdict, all_: Measurements) -> tuple[Tile, ...]:
    """The four figures a decision is made of, for the method that the verdict is about."""
    engine = verdict.method
    if engine is None or not all_.of(engine).ok:
        return ()
    rounds = all_.of(engine)
    expected = predicted(rounds)
    native = find("step_time_ratio", engine, all_)
    gpu_limit = gpu_limit_bytes(rounds.ok[0], all_.machine)
    predicted_s = format_seconds(expected.step_s) if expected and expected.step_s else None
    return (
        Tile(
            label=say("tile.step"),
            value=format_seconds(rounds.step_s.median if rounds.step_s else None),
            detail=say("tile.predicted", value=predicted_s) if predicted_s else say("tile.not_predicted"),
        ),
        Tile(
            label=say("tile.ratio"),
            value=times(native.value) if native.value is not None else say("tile.no_ratio"),
            detail=native.note or _beside(engine, all_),
        ),
        Tile(
            label=say("tile.gpu"),
            value=_most(rounds, gpu_taken_bytes),
            detail=_of(gpu_limit, held_gpu_bytes(rounds.ok[0])) if gpu_limit else say("note.no_gpu"),
        ),
        Tile(
            label=say("tile.host"),
            value=_most(rounds, lambda run: run.summary.peak_host_bytes),
            detail=_of(host_limit_bytes(rounds.ok[0]), held_host_bytes(rounds.ok[0])),
        ),
    )


def _of(limit_bytes: int, held_bytes: int | None) -> str:
    return say("tile.of" if held_bytes is None else "tile.held", whole=format_bytes(limit_bytes))


def criteria_cells(verdict: Verdict, all_: Measurements) -> tuple[tuple[Row, tuple[str, ...]], ...]:
    """Each criterion with its cells: name, asked, measured, predicted, outcome, runs."""
    return tuple((row, _criterion_cells(row, all_)) for row in verdict.rows)


def _criterion_cells(row: Row, all_: Measurements) -> tuple[str, ...]:
    measured = metric_value(row.metric, row.measured)
    if (
        row.measured_low is not None
        and row.measured_high is not None
        and row.measured_low < row.measured_high
    ):
        low, high = metric_value(row.metric, row.measured_low), metric_value(row.metric, row.measured_high)
        if low != high:
            measured = say("table.with_range", value=measured, range=_range(low, high, row.over_steps))
    expected = say("table.not_predicted")
    if row.predicted is not None:
        expected = metric_value(row.metric, row.predicted)
    if row.metric in ("gpu_memory_share", "gpu_memory_gib"):
        if row.measured is not None:
            taken = "reserved" if reserves_known(all_.of(row.engine)) else "tensors"
            measured = say(f"table.{taken}", value=measured)
        if row.predicted is not None:
            expected = say("table.tensors", value=expected)
    what = say(
        "table.criterion", metric=say(f"metric.{row.metric}"), engine=row.engine, id=row.id, level=row.level
    )
    return (
        what,
        f"{row.comparison} {metric_value(row.metric, row.threshold)}",
        measured,
        expected,
        say(f"outcome.{row.outcome.replace(' ', '_')}"),
        ", ".join(row.evidence) or say("tile.none"),
    )


def speed_table(all_: Measurements) -> Table:
    """Step time, tokens, how it stands beside native, loss, and accuracy where there was an evaluation. What
    lsp's first step would add to each is a note."""
    engines = engines_of(all_)
    evaluated = any(run.summary.eval_loss_last is not None for e in engines for run in all_.of(e).ok)
    columns = ["method", "ended", "step", "first_step", "tokens", "beside_native", "loss"]
    columns += ["evaluation"] if evaluated else []
    columns += ["energy"]
    rows = []
    for engine in engines:
        rounds = all_.of(engine)
        cells = [engine, ends(rounds.runs)]
        if rounds.step_s is None:
            cells += [NOT_MEASURED] * (len(columns) - 2)
        else:
            cells += [
                say(
                    "table.step", median=format_seconds(rounds.step_s.median),
                    range=span(format_seconds(rounds.step_s_low), format_seconds(rounds.step_s_high)),
                    steps=counted("step", rounds.counted_steps), runs=counted("run", rounds.step_s.count),
                ),
                format_seconds(_first_step_s(rounds)),
                number(rounds.tokens_per_s.median if rounds.tokens_per_s else None),
                _comparison(engine, all_),
                say("table.first_to_last", first=loss(rounds.loss_first), last=loss(rounds.loss_last)),
            ]  # fmt: skip
            if evaluated:
                cells.append(_evaluation(rounds))
            cells.append(joules(typical(rounds, lambda run: run.summary.energy_j)))
        rows.append(tuple(cells))
    table = make_table(columns, rows, numeric=("first_step", "tokens", "energy"), note="speed")
    searches = "".join(_search_note(all_.of(engine)) for engine in engines)
    return replace(table, note=f"{table.note}{searches}")


def _first_step_s(rounds: Rounds) -> float | None:
    return typical(rounds, lambda run: run.samples[0].step_s if run.samples else None)


def _search_note(rounds: Rounds) -> str:
    """Step time of a method that searches for projectors, with the search spread over the steps that they
    serve at least; empty where there was none, or in a step that was counted."""
    first_s = _first_step_s(rounds)
    if first_s is None or rounds.step_s is None or not rounds.ok[0].samples[0].warmup:
        return ""
    try:
        settings = rounds.ok[0].plan.settings.typed
    except UserError:
        return ""  # written by a version with other settings
    if not isinstance(settings, LspSettings):
        return ""
    spread_s = rounds.step_s.median + max(0.0, first_s - rounds.step_s.median) / settings.check_every
    return " " + say(
        "tablenote.search",
        first=format_seconds(first_s),
        steps=counted("step", settings.check_every),
        step=format_seconds(spread_s),
    )


def memory_table(all_: Measurements) -> Table:
    """Largest over the runs of each peak, and the bytes that cross the link per step."""
    columns = ["method", "fits", "allocated", "reserved", "nvml", "host", "pinned", "h2d", "d2h"]
    rows = []
    for engine in engines_of(all_):
        rounds = all_.of(engine)
        rows.append(
            (
                engine,
                _fits(rounds),
                _most(rounds, lambda run: run.summary.peak_gpu_allocated_bytes),
                _most(rounds, lambda run: run.summary.peak_gpu_reserved_bytes),
                _most(rounds, lambda run: run.summary.peak_gpu_nvml_bytes),
                _most(rounds, lambda run: run.summary.peak_host_bytes),
                _most(rounds, lambda run: run.summary.pinned_bytes),
                format_bytes(typical(rounds, lambda run: run.summary.h2d_bytes)),
                format_bytes(typical(rounds, lambda run: run.summary.d2h_bytes)),
            )
        )
    return make_table(columns, rows, numeric=columns[2:], note="memory")


def busy_table(all_: Measurements) -> Table | None:
    """How long each resource was busy per step, how near the step came to its floor, and how much of the
    update landed; `None` where none of it is known. The disk and the shares only where they have a number."""
    found = {engine: breakdown(all_.of(engine)) for engine in engines_of(all_)}
    known = {engine: one for engine, one in found.items() if one.measured}
    if not known:
        return None
    reads = any(one.disk_s is not None for one in known.values())
    columns = ["method", "h2d_time", "d2h_time", "compute", "noise", "idle", "cpu"]
    columns += ["disk_time"] if reads else []
    shares = {
        "floor": {engine: one.floor_share for engine, one in known.items()},
        "disk_floor": {engine: one.disk_floor_share for engine, one in known.items()},
        "landed": {engine: one.landed_share for engine, one in known.items()},
    }
    shares = {key: of for key, of in shares.items() if any(value is not None for value in of.values())}
    rows = [
        (
            engine,
            format_seconds(one.h2d_s),
            format_seconds(one.d2h_s),
            say("busy.with_noise", value=format_seconds(one.gpu_s))
            if one.mixed
            else format_seconds(one.compute_s),
            say("busy.no_noise") if one.noiseless else format_seconds(one.noise_s),
            format_seconds(one.idle_s),
            format_seconds(one.cpu_s),
            *([format_seconds(one.disk_s)] if reads else []),
            *(percent(of[engine]) for of in shares.values()),
        )
        for engine, one in known.items()
    ]
    columns += shares
    table = make_table(columns, rows, numeric=columns[1:], note="busy")
    return replace(table, note=" ".join((table.note, *(say(f"tablenote.{key}") for key in shares))))


def overlap_table(all_: Measurements) -> Table | None:
    """Of each resource's time per step, how much hid behind the others and how much was left exposed, which
    of the disk is not known; `None` where no method has it measured."""
    found = {engine: breakdown(all_.of(engine)) for engine in engines_of(all_)}
    rows = []
    for engine, one in found.items():
        resources = (
            ("gpu", one.gpu_s, one.gpu_exposed_s),
            ("d2h", one.d2h_s, one.d2h_exposed_s),
            ("cpu", one.cpu_s, one.cpu_exposed_s),
            ("h2d", one.h2d_s, one.h2d_exposed_s),
            *([("disk", one.disk_s, None)] if one.disk_s is not None else []),
        )
        if all(exposed_s is None for _, _, exposed_s in resources):
            continue
        for name, busy_s, exposed_s in resources:
            alone_s = hidden_s = None
            if busy_s is not None and exposed_s is not None:
                alone_s = min(exposed_s, busy_s)  # medians, and work that is not in `busy_s`, may exceed it
                hidden_s = busy_s - alone_s
            cells = (format_seconds(each) for each in (busy_s, hidden_s, alone_s))
            rows.append((engine, say(f"resource.{name}"), *cells))
    if not rows:
        return None
    columns = ["method", "resource", "busy", "overlapped", "exposed"]
    table = make_table(columns, rows, numeric=columns[2:], note="overlap")
    if all(one.disk_s is None for one in found.values()):
        return table
    return replace(table, note=f"{table.note} {say('tablenote.disk_overlap')}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown:
    """Where the time of a method's step goes: medians over runs, in seconds. `None`: not measured."""

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

    noiseless: bool = False
    """The method makes no noise: there is nothing to measure."""

    @property
    def measured(self) -> bool:
        """There is something to show."""
        return any(getattr(self, one.name) is not None for one in fields(self) if one.name != "noiseless")

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


def prediction_table(loaded: Loaded, all_: Measurements) -> Table:
    """Predicted beside measured, and their ratio: step time, GPU memory, host memory."""
    rows = []
    for engine in sorted({*all_.rounds, *(plan.engine for plan in loaded.plans)}, key=engine_order):
        rounds = all_.of(engine)
        plan = next((plan for plan in loaded.plans if plan.engine == engine), None)
        expected = predicted(rounds) or (plan.prediction if plan else None)
        if expected is None:
            continue
        range_ = span(format_seconds(expected.step_s_low), format_seconds(expected.step_s_high))
        shown = (
            say("table.with_range", value=format_seconds(expected.step_s), range=range_)
            if expected.step_s
            else say("table.not_predicted")
        )
        step_s = rounds.step_s.median if rounds.step_s else None
        rows.append(
            (engine, say("table.step_time"), shown, format_seconds(step_s), _over(step_s, expected.step_s))
        )
        for key, bytes_, value in (
            ("gpu_memory", expected.peak_gpu_bytes, lambda run: run.summary.peak_gpu_allocated_bytes),
            ("host_memory", expected.peak_host_bytes, lambda run: run.summary.peak_host_bytes),
        ):
            found = over_runs(rounds.ok, value)
            peak = found.high if found else None
            if peak is None and not bytes_:
                continue
            rows.append(
                (
                    engine,
                    say(f"table.{key}"),
                    format_bytes(bytes_) if bytes_ else say("table.not_predicted"),
                    format_bytes(peak),
                    _over(peak, bytes_),
                )
            )
    return make_table(
        ["method", "quantity", "predicted", "measured", "ratio"], rows, numeric=("ratio",), note="prediction"
    )


def plan_notes(loaded: Loaded) -> tuple[str, ...]:
    """Per method: the settings chosen, what is predicted to limit it, and on what that rests."""
    return tuple(
        say(
            "plan.note",
            engine=plan.engine,
            settings=", ".join(f"{key}={value}" for key, value in sorted(plan.settings.items()))
            or say("plan.defaults"),
            bottleneck=plan.prediction.bottleneck or say("plan.no_bottleneck"),
            basis=plan.prediction.basis.rstrip("."),
            reasons=say("plan.reasons", reasons="; ".join(plan.reasons)) if plan.reasons else "",
        )
        for plan in loaded.plans
    )


def _most(rounds: Rounds, value: Callable[[Run], int | None]) -> str:
    found = over_runs(rounds.ok, value)
    return format_bytes(found.high if found else None)


def _over(measured: float | None, expected: float | None) -> str:
    return times(measured / expected) if measured is not None and expected else NOT_MEASURED


def _comparison(engine: str, all_: Measurements) -> str:
    """`1.80x (1.78x to 1.82x, slower)`: the ratio to native and whether it is real, or why it is not told."""
    if engine == YARDSTICK:
        return say("compared.baseline")
    found = find("step_time_ratio", engine, all_)
    if found.value is None:
        return found.note or NOT_MEASURED
    return say("table.with_range", value=times(found.value), range=found.note or _beside(engine, all_))


def _beside(engine: str, all_: Measurements) -> str:
    """`1.78x to 1.82x, slower`, and whether that is over steps; empty where there is nothing to compare."""
    native, mine = all_.of(YARDSTICK).step_times, all_.of(engine).step_times
    found = ratio(mine, native)
    if found is None:
        return ""
    word = say(f"compared.{faster_or_slower(all_.of(engine), all_.of(YARDSTICK))}")
    range_ = _range(times(found.low), times(found.high), over_steps(all_.of(engine), all_.of(YARDSTICK)))
    return say("compared.range", range=range_, word=word)


def _range(low: str, high: str, of_steps: bool) -> str:
    """`1.20x to 1.90x over steps: one run`, or without what follows the numbers."""
    return say("compared.over_steps", range=span(low, high)) if of_steps else span(low, high)


def _evaluation(rounds: Rounds) -> str:
    accuracy = [typical(rounds, lambda run: run.summary.eval_accuracy_first),
                typical(rounds, lambda run: run.summary.eval_accuracy_last)]  # fmt: skip
    losses = [typical(rounds, lambda run: run.summary.eval_loss_first),
              typical(rounds, lambda run: run.summary.eval_loss_last)]  # fmt: skip
    found = say(
        "table.evaluation",
        accuracy=say(
            "table.first_to_last", first=_percent_fine(accuracy[0]), last=_percent_fine(accuracy[1])
        ),
        loss=say("table.first_to_last", first=loss(losses[0]), last=loss(losses[1])),
    )
    time_s = typical(rounds, lambda run: run.summary.eval_s)
    if time_s is None:
        return found
    return say("table.evaluation_in", evaluation=found, time=format_seconds(time_s))


def _percent_fine(value: float | None) -> str:
    return percent(value) if value is None else f"{100 * value:.1f} %"


def _fits(rounds: Rounds) -> str:
    concluded = {run.end_state for run in rounds.runs} - NOTHING_LEARNED
    if rounds.ok:
        return say("fits.yes" if not concluded & DOES_NOT_FIT else "fits.sometimes")
    if concluded == {"skipped_infeasible"}:
        return say("fits.predicted_no")
    return say("fits.no") if concluded & DOES_NOT_FIT else say("fits.unknown")
