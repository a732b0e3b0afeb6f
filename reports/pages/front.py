"""The first page: verdict, purpose, conditions, effect, cost, risks, decision. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from engines import entry, trains_everything
from harness.records.memory_limits import (
    gpu_limit_bytes,
    host_limit_bytes,
    imposed_gpu_bytes,
    imposed_host_bytes,
)
from harness.records.stats import Rounds, disturbed, ratio
from profiles.language import enumerated, translated
from profiles.units import format_bytes, format_seconds
from reports.criteria import Criteria
from reports.decide import Verdict, state_text, state_word
from reports.format import counted, digits, percent, span, times
from reports.judging import stated
from reports.judging.quality import learned, learned_text, majority_text, why_unknown
from reports.judging.ranking import is_faster, trains_less
from reports.load import Loaded
from reports.measured.measurements import Measurements, is_emulated
from reports.measured.metrics import find
from reports.measured.padding import padded_to
from reports.messages import say, several_items
from reports.pages.document import AskedRow, FrontPage, NamedText, Tile
from reports.provenance import setting
from reports.question import Prices
from reports.tables.criteria import criteria_cells

MOST_RISKS = 4
"""On the first page; the rest stand in their section."""


def front_page(loaded: Loaded, verdict: Verdict, criteria: Criteria, all_: Measurements) -> FrontPage:
    """Of the method that the verdict is about; where it is about none, of the one judged."""
    engine = verdict.about
    question, *conditions = setting(loaded)
    purpose = criteria.question.purpose
    parts: list[tuple[str, tuple[NamedText, ...]]] = [
        (
            say("front.purpose"),
            (*(((say("front.for"), purpose),) if purpose else ()), (question[0], question[1])),
        ),
        (say("front.conditions"), tuple(conditions)),
    ]
    rounds = all_.of(engine)
    if rounds.ok:
        parts += [
            (say("front.effect"), _effect(engine, all_)),
            (say("front.cost"), _cost(engine, all_)),
        ]
    left = len(verdict.warnings) - MOST_RISKS
    more = (say("front.more_risks", count=left),) if left > 0 else ()
    return FrontPage(
        state=verdict.state,
        state_text=state_text(verdict.state),
        sentence=verdict.sentence,
        asides=_asides(verdict, all_),
        command=verdict.next_command,
        tiles=_tiles(engine, all_) if rounds.ok else (),
        tiles_title=say("section.key_figures", method=engine),
        parts=tuple(parts),
        risks=(*verdict.warnings[:MOST_RISKS], *more),
        criteria=tuple(
            AskedRow(level=row.level, id=row.id, outcome=row.outcome, note=row.note or "", cells=cells)
            for row, cells in criteria_cells(verdict, all_)
        ),
        decision=(
            (say("section.decision"), ""),
            (say("section.owner"), criteria.question.owner),
            (say("section.date"), criteria.question.decide_by),
            (say("section.next_gate"), criteria.question.next_gate),
        ),
    )


def _asides(verdict: Verdict, all_: Measurements) -> tuple[str, ...]:
    found = []
    if verdict.method is not None:
        found.append(say("verdict.method", summary=translated(entry(verdict.method).summary)))
    if verdict.settings:
        found.append(say("verdict.settings", settings=verdict.settings))
    if len(verdict.methods) > 1:
        others = [
            say(
                "verdict.beaten" if one.beaten_by else "verdict.state",
                engine=one.engine,
                state=state_word(one.state),
                better=one.beaten_by,
            )
            for one in verdict.methods
        ]
        found.append(say("show.sentences").join([say("verdict.other_methods"), several_items(others)]))
    return (*found, *_of_less_training(verdict, all_))


def _of_less_training(verdict: Verdict, all_: Measurements) -> Iterator[str]:
    """Where quality was not measured and some methods of the same verdict train all weights and others fewer:
    what the answer's time or memory is beside that of the best of the other kind."""
    method = verdict.method
    if method is None or entry(method).order == "zeroth" or learned(method, all_) is not None:
        return
    equals = [one.engine for one in verdict.methods if one.state == verdict.state and one.engine != method]
    if trains_less(method):
        for engine in equals:
            if trains_everything(engine):
                yield say("verdict.trains_all", engine=engine, **_taken(engine, all_))
                return
    for engine in equals:
        if trains_less(engine) and is_faster(engine, method, all_):
            mine, others = (stated.step_s(one, all_).value for one in (engine, method))
            if mine and others:
                yield say(
                    "verdict.trains_less", engine=engine, trains=translated(entry(engine).trains),
                    ratio=_ratio_text(engine, method, mine / others, all_), method=method,
                    memory=_taken(engine, all_)["memory"],
                )  # fmt: skip
            return


def _ratio_text(engine: str, method: str, value: float, all_: Measurements) -> str:
    """As the tables have it, with what only some steps do; of two runs, which have no median, what they
    allow. `value` where steps were emulated."""
    both = all_.of(engine), all_.of(method)
    found = ratio(*(rounds.lasting_step_times for rounds in both))
    if found is None or any(map(is_emulated, both)):
        return times(value)
    return times(found.value) if found.is_interval else span(times(found.low), times(found.high))


def _taken(engine: str, all_: Measurements) -> dict[str, str]:
    """Time and memory, as the verdict says them."""
    gpu = stated.gpu_peak(engine, all_)
    kind = "host" if gpu.value is None else stated.gpu_kind(engine, all_)
    peak = stated.host_peak(engine, all_) if gpu.value is None else gpu
    takes = say(
        "verdict.per_step" if all_.steps is None else "verdict.whole_job",
        time=stated.time_text(time_of(engine, all_)),
    )
    return {"time": takes, "memory": say(f"verdict.{kind}_memory", memory=stated.memory_text(peak))}


def _tiles(engine: str, all_: Measurements) -> tuple[Tile, ...]:
    return (
        _time_tile(engine, all_),
        _memory_tile(engine, all_),
        _quality_tile(engine, all_),
        _cost_tile(engine, all_),
    )


def time_of(engine: str, all_: Measurements) -> stated.Stated:
    """Of the whole job where its size is known, else of a step."""
    if all_.steps is None:
        return stated.step_s(engine, all_)
    return stated.job_s(engine, all_, all_.steps)


def _time_tile(engine: str, all_: Measurements) -> Tile:
    time = time_of(engine, all_)
    range_ = stated.range_text(time) or format_seconds(time.value)
    return Tile(
        label=say("tile.step" if all_.steps is None else "tile.job"),
        value=stated.plain_time(time),
        detail=say(f"tile.{time.origin}", range=range_),
        known=time.value is not None,
    )


def _memory_tile(engine: str, all_: Measurements) -> Tile:
    run = all_.of(engine).ok[0]
    gpu = stated.gpu_peak(engine, all_)
    if gpu.value is not None:
        limit = gpu_limit_bytes(run, all_.machine)
        of = _of(limit, imposed_gpu_bytes(run)) if limit else ""
        label = say(f"tile.{stated.gpu_kind(engine, all_)}")
        return Tile(label=label, value=stated.memory_text(gpu), detail=of)
    host = stated.host_peak(engine, all_)
    return Tile(
        label=say("tile.host"),
        value=stated.memory_text(host),
        detail=_of(host_limit_bytes(run), imposed_host_bytes(run)),
        known=host.value is not None,
    )


def _of(limit_bytes: int, held_bytes: int | None) -> str:
    return say("tile.of" if held_bytes is None else "tile.held", whole=format_bytes(limit_bytes))


def _quality_tile(engine: str, all_: Measurements) -> Tile:
    found = learned(engine, all_)
    if found is None:
        return Tile(
            label=say("tile.quality"),
            value=say("show.nothing"),
            detail=why_unknown(engine, all_),
            known=False,
        )
    native = say("tile.quality_native", value=found.native) if found.native else ""
    detail = say("tile.quality_before", value=found.before, native=majority_text(found) + native)
    return Tile(
        label=say(f"tile.{found.kind}"),
        value=found.after,
        detail=say("tile.of_examples", examples=found.examples, more=detail) if found.examples else detail,
    )


def _cost_tile(engine: str, all_: Measurements) -> Tile:
    cost = find("job_cost", engine, all_)
    if cost.value is None or all_.prices is None:
        return Tile(label=say("tile.cost"), value=say("show.untyped"), detail=cost.note or "", known=False)
    return Tile(
        label=say("tile.cost"),
        value=money_text(cost.value, all_.prices),
        detail=say("tile.prices_of", date=all_.prices.as_of),
    )


def money_text(amount: float, prices: Prices) -> str:
    """`12,300 JPY`."""
    return say("show.money", amount=digits(amount), currency=prices.currency)


def _effect(engine: str, all_: Measurements) -> tuple[NamedText, ...]:
    rounds = all_.of(engine)
    time = time_of(engine, all_)
    time_text = stated.time_text(time)
    if all_.steps is not None:
        time_text = say("front.job_in", time=time_text, steps=counted("step", round(all_.steps)))
        if (padded := padded_to(rounds)) is not None:
            time_text = say("front.padded", text=time_text, tokens=padded[0])
    else:
        time_text = say("front.step_in", time=time_text)
    ratio = find("step_time_ratio", engine, all_)
    if ratio.value is not None and ratio.applies and ratio.value != 1:
        time_text = say("front.beside", text=time_text, ratio=stated.ratio_text(ratio))
    elif ratio.note:
        time_text = say("front.noted", text=time_text, note=ratio.note)
    if all_.steps is None:
        time_text = say("front.unsized", text=time_text)
    found = learned(engine, all_)
    return (
        (say("front.time"), time_text),
        (say("front.memory"), _memory_text(engine, all_)),
        (say("front.quality"), learned_text(found) if found else why_unknown(engine, all_)),
        (say("front.confidence"), _confidence(rounds)),
    )


def _memory_text(engine: str, all_: Measurements) -> str:
    run = all_.of(engine).ok[0]
    gpu, host = stated.gpu_peak(engine, all_), stated.host_peak(engine, all_)
    parts = []
    limit = gpu_limit_bytes(run, all_.machine)
    if gpu.value is not None and limit:
        key = f"front.{stated.gpu_kind(engine, all_)}_share"
        parts.append(say(key, value=stated.memory_text(gpu), share=percent(gpu.value / limit)))
    if host.value is not None:
        share = percent(host.value / host_limit_bytes(run))
        parts.append(say("front.host_share", value=stated.memory_text(host), share=share))
    return enumerated(parts)


def _confidence(rounds: Rounds) -> str:
    runs = counted("run", len(rounds.ok))
    key = "few" if len(rounds.ok) < 3 else "disturbed" if disturbed(rounds) else "some"
    if is_emulated(rounds):
        key = "emulated"
    step = rounds.step_s
    low, high = (step.interval or (step.low, step.high)) if step else (None, None)
    range_ = span(format_seconds(low), format_seconds(high))
    return say(f"confidence.{key}", runs=runs, range=range_)


def _cost(engine: str, all_: Measurements) -> tuple[NamedText, ...]:
    prices, hours = all_.prices, find("job_hours", engine, all_)
    if prices is None:
        return ((say("front.money"), say("front.no_prices")),)
    if hours.value is None:
        return ((say("front.money"), hours.note or say("show.nothing")),)
    facts: list[NamedText] = []
    own = find("job_cost", engine, all_)
    if own.value is not None:
        facts.append(
            (say("front.own"), say("front.own_cost", cost=money_text(own.value, prices), date=prices.as_of))
        )
    rent = prices.rent(hours.value)
    if rent is not None:
        name = prices.rent_name or say("front.rented")
        facts.append((name, say("front.rent_cost", cost=money_text(rent, prices), date=prices.as_of)))
    months = prices.months_to_break_even()
    if months is not None:
        facts.append((say("front.break_even"), months_text(months)))
    return tuple(facts) or ((say("front.money"), say("front.no_prices")),)


def months_text(months: float) -> str:
    """After how many months buying has cost less than renting."""
    return say("front.never") if months == float("inf") else say("front.months", months=digits(months))
