"""What changed between two folders of runs: verdict, criteria, and each method's time, memory and quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.records.columns import BYTES, SECONDS, CellValue, Column
from harness.records.stats import Rounds, faster_or_slower
from profiles.language import enumerated
from reports.criteria import default_criteria
from reports.decide import Verdict, state_word
from reports.format import TIMES, Table
from reports.judging import stated
from reports.judging.quality import learned
from reports.load import Loaded, engine_order, likeness, load_folder
from reports.measured.measurements import Measurements, ends, group
from reports.messages import say
from reports.render import judge


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedFolder:
    """One of the two folders."""

    loaded: Loaded
    verdict: Verdict
    all_: Measurements


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangedMethod:
    """One method before and after."""

    engine: str
    before: ComparedFolder
    after: ComparedFolder
    is_alike: bool
    """Machine and job are the same, so that times may be held against each other."""

    def rounds(self, side: ComparedFolder) -> Rounds:
        return side.all_.of(self.engine)


def _time(one: ChangedMethod, side: ComparedFolder) -> CellValue:
    time = stated.step_s(one.engine, side.all_)
    return ends(one.rounds(side).runs) or None if time.value is None else stated.time_text(time)


def _ratio(one: ChangedMethod) -> CellValue:
    before = stated.step_s(one.engine, one.before.all_).value
    after = stated.step_s(one.engine, one.after.all_).value
    return after / before if one.is_alike and before and after else None


_WORDS = {"FAST": "faster", "SLOW": "slower", "SAME": "same", "AMBIGUOUS": "overlap"}


def _word(one: ChangedMethod) -> CellValue:
    if not one.is_alike or not one.rounds(one.before).ok or not one.rounds(one.after).ok:
        return None
    return say(f"compared.{_WORDS[faster_or_slower(one.rounds(one.after), one.rounds(one.before))]}")


def _quality(one: ChangedMethod, side: ComparedFolder) -> CellValue:
    found = learned(one.engine, side.all_, of_random_weights=True)
    return None if found is None else found.told


def _memory(one: ChangedMethod, side: ComparedFolder) -> float | None:
    gpu = stated.gpu_peak(one.engine, side.all_).value
    return gpu if gpu is not None else stated.host_peak(one.engine, side.all_).value


CHANGES: tuple[Column[ChangedMethod], ...] = (
    Column("method", lambda one: one.engine),
    Column("step_before", lambda one: _time(one, one.before), SECONDS),
    Column("step_after", lambda one: _time(one, one.after), SECONDS),
    Column("after_over_before", _ratio, TIMES),
    Column("changed", _word),
    Column("memory_before", lambda one: _memory(one, one.before), BYTES),
    Column("memory_after", lambda one: _memory(one, one.after), BYTES),
    Column("quality_before", lambda one: _quality(one, one.before)),
    Column("quality_after", lambda one: _quality(one, one.after)),
)


def changes(before: Path, after: Path) -> tuple[tuple[str, ...], Table]:
    """Sentences on the verdict and on what differs in machine and job, and a table of the methods.

    Raises `UserError` where a folder cannot be read.
    """
    one, other = _side(before), _side(after)
    unlike = differing(one.loaded, other.loaded)
    engines = sorted({*one.all_.rounds, *other.all_.rounds}, key=engine_order)
    rows = [ChangedMethod(engine=engine, before=one, after=other, is_alike=not unlike) for engine in engines]
    return (*_sentences(one.verdict, other.verdict), *_unlike(unlike)), Table.of(CHANGES, rows)


def _side(folder: Path) -> ComparedFolder:
    loaded = load_folder(folder)
    criteria = loaded.criteria or default_criteria()
    return ComparedFolder(
        loaded=loaded,
        verdict=judge(loaded, criteria),
        all_=group(loaded.runs, loaded.machine, criteria),
    )


def differing(before: Loaded, after: Loaded) -> tuple[str, ...]:
    """Names of what must be the same for times to be held against each other, and is not."""
    first, second = (dict(likeness(loaded.runs[0])) for loaded in (before, after))
    return tuple(
        name
        for name in sorted({*first, *second})
        if not name.startswith("setting ") and first.get(name) != second.get(name)
    )


def _sentences(before: Verdict, after: Verdict) -> list[str]:
    sentences = [
        say(
            "diff.verdict",
            before=state_word(before.state),
            after=state_word(after.state),
            method_before=before.method or say("tile.none"),
            method_after=after.method or say("tile.none"),
        )
    ]
    outcomes = {row.id: row.outcome for row in before.rows}
    for row in after.rows:
        was = outcomes.get(row.id)
        if was is not None and was != row.outcome:
            sentences.append(
                say(
                    "diff.criterion",
                    id=row.id,
                    before=say(f"outcome.{was.replace(' ', '_')}"),
                    after=say(f"outcome.{row.outcome.replace(' ', '_')}"),
                )
            )
    return sentences


def _unlike(names: Sequence[str]) -> list[str]:
    return [say("diff.unlike", names=enumerated(names))] if names else []


def as_lines(sentences: Sequence[str], table: Table) -> str:
    """As Markdown, which reads well in a terminal and in a pull request."""
    head = f"| {' | '.join(table.columns)} |"
    marks = ["---:" if place in table.numeric else "---" for place in range(len(table.columns))]
    rule = f"| {' | '.join(marks)} |"
    rows = [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join([*sentences, "", head, rule, *rows, *(["", table.note] if table.note else [])])
