"""What `recommend` says, for a terminal, in the language spoken. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from engines import entry
from engines.settings.given import Value
from harness.cli.tables import format_parameters, notes_grid, plain_table
from harness.recommendation import Recommendation
from profiles.advice import words
from profiles.advice.amount import Amount
from profiles.advice.job_time import JobForecast
from profiles.advice.outlook import BestMethod, Outlook
from profiles.advice.target import target_sentences
from profiles.advice.ways_out import WayOut
from profiles.advice.what_if import goes_to_twice_as_many
from profiles.language import translated, word
from profiles.planning.plan import Plan
from profiles.units import format_bytes, format_seconds

WITH_GRADIENTS = "With gradients (first order), by time to the job's end"
WITH_GRADIENTS_STEP = "With gradients (first order), by time of a step"
WITHOUT_GRADIENTS = "Without gradients (zeroth order): a step is not worth one of those above"


def recommendation_text(answer: Recommendation) -> RenderableType:
    """Both tables, notes, ways out, and the closing sentences."""
    parts: list[RenderableType] = [_said(_title(answer), bold=True)]
    if answer.amount is not None:
        parts += [_said(line) for line in _amount_lines(answer.amount, answer.job.seq_len)]
    with_gradients = WITH_GRADIENTS_STEP if answer.amount is None else WITH_GRADIENTS
    for order, heading in (("first", with_gradients), ("zeroth", WITHOUT_GRADIENTS)):
        plans = [plan for plan in answer.plans if entry(plan.engine).order == order]
        if plans:
            parts += [_said(heading), plans_of_kind(answer, plans)]
    ways = {each.engine: each for each in answer.ways_out}
    blocked = {each.engine: each.why for each in answer.blocked}
    notes = {
        plan.engine: list(_notes(plan, ways.get(plan.engine), blocked.get(plan.engine), answer.amount))
        for plan in answer.plans
    }
    for plan in answer.plans:
        notes[plan.engine] += _beside_the_steps(plan, answer.amount)
    parts.append(_notes_grid(notes))
    if answer.explanations:
        lines = {each.engine: each.lines for each in answer.explanations}
        parts += [_said("How the numbers come about", bold=True), _notes_grid(lines)]
    if answer.what_if:
        parts += [_said("What if, one change at a time", bold=True), _what_if_table(answer)]
        if answer.machine.gpu is not None and not goes_to_twice_as_many(
            answer.job.workload, answer.job.limits.ranks
        ):
            parts.append(
                _said(
                    "A second GPU or machine takes micro-batches of a step, or halves of them, and "
                    f"--batch-size {answer.job.batch_size} with --accumulation {answer.job.accumulation} "
                    "leaves none for it."
                )
            )
    if answer.largest:
        parts += [_said("The largest model that each method fits here", bold=True), _largest_table(answer)]
    if answer.answers:
        parts += [_said(_target_title(answer), bold=True), _answers_table(answer)]
        parts += [_said(sentence) for sentence in target_sentences(answer.answers, _kinds(answer))]
    if answer.calibration is not None:
        parts.append(_said(answer.calibration.summary))
    parts += [_said(each.told) for each in answer.like_machines]
    parts += [_said(sentence) for sentence in answer.verdict.sentences]
    return Group(*parts)


def _said(text: str, *, bold: bool = False) -> Text:
    return Text(translated(text), style="bold" if bold else "")


def _table(headings: Sequence[str], whole: Collection[str] = ("method",)) -> Table:
    return plain_table([word(one) for one in headings], whole=[word(one) for one in whole])


def _cells(cells: Iterable[str]) -> list[str]:
    return [word(one) for one in cells]


def _notes_grid(notes: Mapping[str, Sequence[str]]) -> Table:
    return notes_grid({engine: [translated(line) for line in lines] for engine, lines in notes.items()})


def _title(answer: Recommendation) -> str:
    job, model = answer.job, answer.model
    batches = "" if job.accumulation == 1 else f", {job.accumulation} micro-batches a step"
    gpus = job.limits.ranks
    several = "" if gpus == 1 else f"; on {gpus} GPUs"
    return (
        f"Predicted: {model.name} ({format_parameters(model.parameters)} parameters) in {job.dtype}, "
        f"batch {job.batch_size} x {job.seq_len} tokens{batches}; machine: {answer.machine.name}{several}"
    )


def _amount_lines(amount: Amount, seq_len: int) -> Iterator[str]:
    steps = "1 step" if amount.steps == 1 else f"{amount.steps:,} steps"
    yield f"The job: {steps}, {amount.tokens:,} tokens ({amount.basis})"
    mean = amount.padded_tokens_each
    if mean < (1 - MATTERS) * seq_len:
        yield (
            f"Its sequences have {mean:.0f} tokens on average, padding included, and its time is that of "
            f"such steps; a step below is one of {seq_len} tokens."
        )


def plans_of_kind(answer: Recommendation, plans: Sequence[Plan]) -> Table:
    """A row for each of `plans`; columns that are empty for all are left out."""
    forecasts = {each.engine: each for each in answer.forecasts}
    has_gpu, of_job = answer.machine.gpu is not None, answer.amount is not None
    headings = ["method", "fits", "step", "low to high"]
    headings += ["job", "low to high "] if of_job else []
    known = [each for each in forecasts.values() if of_job and each.energy_kwh is not None]
    of_gpu = any("board alone" in each.basis.get("energy_kwh", "") for each in known)
    headings += [("kWh of the GPU" if of_gpu else "kWh")] if known else []
    paid = of_job and any(each.costs for each in forecasts.values())
    headings += ["cost"] if paid else []
    headings += [*(["GPU memory"] if has_gpu else []), "host memory", "limited by"]
    table = _table(headings)
    for plan in plans:
        predicted, forecast = plan.prediction, forecasts.get(plan.engine)
        if not plan.available:
            table.add_row(*_cells([plan.engine, "no", *["-"] * (len(headings) - 2)]))
            continue
        row = [
            plan.engine,
            "yes" if plan.fits else "no",
            "not predicted" if predicted.step_s is None else format_seconds(predicted.step_s),
            words.band(predicted.step_s_low, predicted.step_s_high),
        ]
        if of_job:
            row += _job_cells(forecast)
        if known:
            row.append(_energy(forecast))
        if paid:
            row.append("-" if forecast is None else ", ".join(map(words.money, forecast.costs)) or "-")
        needed_bytes = predicted.needed_gpu_bytes
        row += [format_bytes(predicted.peak_gpu_bytes if needed_bytes is None else needed_bytes)] * has_gpu
        row.append(format_bytes(predicted.peak_host_bytes))
        table.add_row(*_cells(row), translated(predicted.bottleneck or word("not known")))
    return table


def _job_cells(forecast: JobForecast | None) -> list[str]:
    if forecast is None or forecast.seconds is None:
        return ["-", "-"]
    return [words.duration(forecast.seconds), words.band(forecast.seconds_low, forecast.seconds_high)]


def _energy(forecast: JobForecast | None) -> str:
    if forecast is None:
        return "-"
    low, expected, high = forecast.energy_kwh_low, forecast.energy_kwh, forecast.energy_kwh_high
    if low is None or expected is None or high is None:
        return "-"
    digits = words.three_digits
    return f"{digits(expected)} ({digits(low)} to {digits(high)})"


def _notes(plan: Plan, way: WayOut | None, blocked: str | None, amount: Amount | None) -> Iterator[str]:
    """Why it does not fit, what to change, and the setting that this is about; else its settings and why they
    are so."""
    reasons = " ".join(plan.reasons)
    if plan.why_not is not None:
        yield f"{'does not fit' if plan.available else 'cannot run here'}: {plan.why_not}"
        if way is not None or blocked != plan.why_not:
            yield _way_text(way, blocked, amount)
        reasons = ""
    if not plan.available:
        return
    if plan.prediction.step_s is None:
        yield plan.prediction.basis.rstrip(".")
    unexplained = [
        f"{key}={_setting_text(value)}" for key, value in plan.settings.items() if f"{key}=" not in reasons
    ]
    if unexplained:
        yield f"{'in its nearest setting, ' if plan.why_not else ''}{', '.join(unexplained)}"
    if plan.why_not is None:
        yield from plan.reasons


def _setting_text(value: Value) -> str:
    """As reasons of plans have it: `graphs=false`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _way_text(way: WayOut | None, blocked: str | None, amount: Amount | None) -> str:
    if way is None:
        return f"no way out: {blocked or 'none was tried'}"
    predicted = way.plan.prediction
    time = ""
    if predicted.step_s is not None:
        more = "" if way.times is None else f", {way.times:.2f} times that of the setting that does not fit"
        job = ""
        if amount is not None and len(amount.shares) == 1:  # else steps differ in length
            job = f", {words.duration(amount.steps * predicted.step_s)} for the job"
        time = f"; time: {format_seconds(predicted.step_s)} a step{job}{more}"
    return f"way out: {way.flags}{time}; quality: {way.quality}"


def _nothing(answer: Recommendation, there: Outlook) -> str:
    return "nothing fits" if there.has_dtype else f"no {answer.job.dtype}"


def _best_cells(best: BestMethod | None, saved_s: float | None, nothing: str) -> list[str]:
    if best is None:
        return [nothing, "-", "-"]
    time = "not predicted" if best.seconds is None else words.duration(best.seconds[1])
    return [best.engine, time, "-" if saved_s is None else _saved(saved_s)]


def _saved(seconds: float) -> str:
    if seconds == 0:
        return "none"
    return f"{'-' if seconds < 0 else ''}{words.duration(abs(seconds))}"


def _what_if_table(answer: Recommendation) -> Table:
    time = "job" if answer.amount is not None else "step"
    kinds = _kinds(answer)
    headings = ["change"]
    for heading, apart in kinds.values():
        headings += [heading, time + apart, "saved" + apart]
    table = _table([*headings, "fits then"], whole=())
    for row in answer.what_if:
        cells: list[str] = []
        for order in kinds:
            best, saved_s = getattr(row.outlook, order), getattr(row, f"{order}_saved_s")
            cells += _best_cells(best, saved_s, _nothing(answer, row.outlook))
        table.add_row(*_cells([row.outlook.name, *cells, ", ".join(row.now_fits) or "-"]))
    return table


def _kinds(answer: Recommendation) -> dict[str, tuple[str, str]]:
    """Kinds of methods that were planned: heading, and the space that tells the same headings apart."""
    planned = {entry(plan.engine).order for plan in answer.plans}
    headings = {"first": ("with gradients", ""), "zeroth": ("zeroth order", " ")}
    return {order: heading for order, heading in headings.items() if order in planned}


def _largest_table(answer: Recommendation) -> Table:
    table = _table(["method", "largest model", "step"])
    for each in answer.largest:
        name = "none" if each.model is None else f"{each.model} ({format_parameters(each.parameters)})"
        name += ", partly on disk" if each.on_disk else ""
        step = "-" if each.step_s is None else format_seconds(each.step_s)
        table.add_row(*_cells([each.engine, name, step]))
    return table


def _target_title(answer: Recommendation) -> str:
    target = answer.target
    assert target is not None
    aim = target.model
    if target.hours is not None:
        aim = "1 hour" if target.hours == 1 else f"{target.hours:g} hours"
    return f"Machines of the catalogue for {aim}, the least first"


def _answers_table(answer: Recommendation) -> Table:
    of_model = answer.target is not None and answer.target.model is not None
    time, meets = (
        ("step", "fits") if of_model else ("job" if answer.amount is not None else "step", "in time")
    )
    headings = ["machine"]
    kinds = _kinds(answer)
    for kind, apart in kinds.values():
        headings += [kind, time + apart, "low to high" + apart, meets + apart]
    table = _table(headings, whole=("machine",))
    for each in answer.answers:
        cells: list[str] = []
        for order in kinds:
            best, met = getattr(each.outlook, order), getattr(each, order)
            if best is None:
                cells += [_nothing(answer, each.outlook), "-", "-", "no"]
            elif best.seconds is None:
                cells += [best.engine, "not predicted", "-", met]
            else:
                cells += [
                    best.engine,
                    words.duration(best.seconds[1]),
                    words.band(best.seconds[0], best.seconds[2]),
                    met,
                ]
        table.add_row(*_cells([each.outlook.name, *cells]))
    return table


MATTERS = 0.01
"""Of a job's time, from where on compiling, and what is done now and then, are told."""


def _beside_the_steps(plan: Plan, amount: Amount | None) -> Iterator[str]:
    """What compiling, and what is done now and then, add to each step of a job, where that is not little."""
    predicted = plan.prediction
    if not plan.fits or amount is None or not predicted.step_s:
        return
    rare_s = predicted.rare_job_s(amount.steps)
    if rare_s >= MATTERS * predicted.step_s * amount.steps:
        yield (
            f"one step in {predicted.rare_every} takes about {format_seconds(predicted.rare_s)} more, "
            f"{format_seconds(rare_s)} over this job"
        )
    if predicted.compile_s is not None and predicted.compile_s >= MATTERS * predicted.step_s * amount.steps:
        yield (
            f"compiling takes about {format_seconds(predicted.compile_s)} once, "
            f"{format_seconds(predicted.compile_s / amount.steps)} for each step of this job"
        )
