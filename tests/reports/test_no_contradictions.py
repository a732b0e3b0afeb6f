"""Headline, tiles, tables, criteria and charts say the same of the same thing, whatever was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import entry
from harness.records.job import Job
from harness.records.run import Run
from profiles.language import Language, quantity, speaking
from profiles.units import format_bytes
from reports.criteria import init_text, parse_criteria
from reports.criteria_templates import Purpose
from reports.format import Table
from reports.judging import stated
from reports.load import Loaded
from reports.measured.measurements import group
from reports.measured.metrics import find
from reports.pages.document import Document, Drawing
from reports.pages.front import time_of
from reports.render import WrittenReport, written
from run_records import emulated_run, make_machine, make_run, make_test_job

ENGINES = ("native", "lora", "lsp", "zo2", "exact-offload")
JOB: Job = make_test_job()


@dataclass(frozen=True)
class Measured:
    """Of one method."""

    medians: tuple[float, ...]
    gpu_bytes: int
    host_bytes: int
    accuracy: float | None
    failed: bool
    rare: bool
    """One step in 100 has more to do, the first among them."""


MEASURED = st.builds(
    Measured,
    medians=st.lists(st.floats(2e-3, 4000.0), min_size=1, max_size=3).map(tuple),
    gpu_bytes=st.integers(10**8, 24 * 10**9),
    host_bytes=st.integers(10**9, 10**11),
    accuracy=st.none() | st.floats(0.0, 1.0),
    failed=st.booleans(),
    rare=st.booleans(),
)


def runs_of(found: dict[str, Measured], *, emulated: bool) -> list[Run]:
    runs = []
    for engine, each in found.items():
        for number, median in enumerate(each.medians):
            if each.failed and number == 0:
                runs.append(make_run(engine, round=9, end_state="crash"))
            made = emulated_run if emulated else make_run
            run = (
                made(
                    engine, round=number + 1, step_s=(median, median * 1.01, median),
                    peak_gpu_reserved_bytes=each.gpu_bytes, peak_gpu_allocated_bytes=each.gpu_bytes * 9 // 10,
                    peak_host_bytes=each.host_bytes,
                    eval_accuracy_first=None if each.accuracy is None else 0.5,
                    eval_accuracy_last=each.accuracy,
                )
            )  # fmt: skip
            if each.rare and run.predicted is not None:
                run = replace(run, predicted=replace(run.predicted, rare_s=median, rare_every=100))
            runs.append(run)
    return runs


def report_on(runs: list[Run], purpose: Purpose) -> tuple[WrittenReport, Loaded]:
    criteria = parse_criteria(init_text(purpose).encode(), "test")
    loaded = Loaded(
        name="sweep", machine=make_machine(), job=JOB, plans=tuple({r.engine: r.plan for r in runs}.values()),
        runs=tuple(runs), broken=(), criteria=criteria,
    )  # fmt: skip
    return written(loaded, criteria), loaded


def cell(table: Table, row: str, key: str) -> str | None:
    place = next((place for place, name in enumerate(table.keys) if name.startswith(key)), None)
    found = next((each for each in table.rows if each[0] == row), None)
    return None if place is None or found is None else found[place]


def drawn(document: Document) -> str:
    return "".join(
        block.svg for one in document.sections for block in one.blocks if isinstance(block, Drawing)
    )


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(ENGINES), MEASURED, min_size=1, max_size=4),
    st.sampled_from(get_args(Purpose)),
    st.booleans(),
    st.sampled_from(["en", "ja"]),
)
def test_the_same_thing_has_the_same_number_everywhere(
    found: dict[str, Measured], purpose: Purpose, emulated: bool, language: Language
) -> None:
    runs = runs_of(found, emulated=emulated)
    with speaking(language):
        report, loaded = report_on(runs, purpose)
        verdict, document = report.verdict, report.document
        front, engine = document.front, report.verdict.about
        all_ = group(runs, loaded.machine, loaded.criteria)
        assert front.state == verdict.state
        assert front.sentence == verdict.sentence
        outcomes = {(row.level, row.outcome) for row in front.criteria}
        if verdict.state == "GO":
            assert not {("must", "fail"), ("must", "unknown"), ("want", "fail")} & outcomes
        if verdict.state == "NO-GO":
            assert ("must", "fail") in outcomes
        if not all_.of(engine).ok:
            assert front.tiles == ()
            return
        tables = {sheet.key: sheet.table for sheet in document.sheets}
        time = time_of(engine, all_)
        shown = stated.plain_time(time)
        gpu = quantity(format_bytes(found[engine].gpu_bytes))
        hours = find("job_hours", engine, all_).value
        if hours is not None and time.value is not None:
            assert hours * 3600 == pytest.approx(time.value)
        assert front.tiles[0].value == shown
        assert front.tiles[1].value == gpu
        told = " ".join(text for _, facts in front.parts for _, text in facts)
        ratio = find("step_time_ratio", engine, all_)
        if ratio.value is not None and ratio.applies and ratio.value != 1:
            assert stated.ratio_text(ratio) in told
            if verdict.state in ("GO", "CONDITIONAL GO") and engine != "native":
                assert stated.ratio_text(ratio) in verdict.sentence
        assert shown in told
        assert gpu in told
        if verdict.state in ("GO", "CONDITIONAL GO"):
            assert shown in verdict.sentence
            assert gpu in verdict.sentence
        methods = tables["methods"]
        key = "step_stated" if all_.steps is None else "job_time"
        assert cell(methods, engine, key) == shown
        assert cell(methods, engine, "gpu_peak") == gpu
        # Every method has one time and one memory: in its table, among the alternatives, in the charts.
        for other in all_.rounds:
            if not all_.of(other).ok:
                continue
            mine = stated.plain_time(time_of(other, all_))
            assert cell(methods, other, key) == mine
            assert mine in drawn(document)
            if all_.steps is not None and (others := tables.get("alternatives")) is not None:
                named = [row for row in others.rows if row[0].endswith(other)]
                assert named == [] or mine in named[0]
            if not emulated:
                speed = cell(tables["speed"], other, "tokens")
                assert speed is None or cell(methods, other, "tokens") == speed
                energy = cell(tables["speed"], other, "energy")
                assert energy is None or cell(methods, other, "energy") == energy
        states = {one.engine: one for one in verdict.methods}
        if verdict.method is not None:
            assert states[verdict.method].state == verdict.state
            assert states[verdict.method].beaten_by is None
            assert entry(verdict.method).role != "test_double"


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.sampled_from(ENGINES), MEASURED, min_size=2, max_size=4),
    st.sampled_from(get_args(Purpose)),
)
def test_a_method_that_another_beats_in_everything_is_no_answer(
    found: dict[str, Measured], purpose: Purpose
) -> None:
    """Faster, smaller, better by a margin that no spread hides, and native."""
    base = replace(next(iter(found.values())), medians=(1.0, 1.0, 1.0), accuracy=0.6, failed=False)
    worse = {engine: base for engine in found if engine != "native"}
    best = replace(base, medians=(0.5, 0.5, 0.5), gpu_bytes=base.gpu_bytes // 2, accuracy=0.9)
    report, _ = report_on(runs_of({"native": best, **worse}, emulated=False), purpose)
    assert report.verdict.method == "native"


def test_what_fewer_weights_would_take_is_beside_native_as_in_the_tables() -> None:
    """With its rare steps on page one too."""
    job = replace(JOB, data=replace(JOB.data, train="random"))
    runs = [make_run("native", job=job, round=each, step_s=(1.0,) * 8) for each in (1, 2, 3)]
    for each in (1, 2, 3):
        run = make_run("lsp", job=job, round=each, step_s=(0.5,) * 8)
        assert run.predicted is not None
        runs.append(replace(run, predicted=replace(run.predicted, rare_s=1.0, rare_every=8)))
    report, loaded = report_on(runs, "any")
    ratio = find("step_time_ratio", "lsp", group(runs, loaded.machine, loaded.criteria))
    assert ratio.value == pytest.approx(0.5 + 2.0 / 8)  # its first step took 2 s more
    (aside,) = [each for each in report.document.front.asides if "the time and" in each]
    assert "takes 0.75x the time" in aside
