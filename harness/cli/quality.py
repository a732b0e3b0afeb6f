"""`compare --target --budget`: a study of what methods learn, as a person sees it. Imports no torch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.table import Table

from harness.cli.sweep_progress import TrialProgress
from harness.progress import console
from harness.quality.documents import StudyPlan
from harness.quality.judge import MethodResult, SeedSpread, StudyResult
from harness.quality.study import planned_trials, predicted_s, run_study
from harness.quality.trials import PreparedStudy
from harness.records.environment import read_environment
from profiles.advice.words import duration
from profiles.documents import to_json
from profiles.language import translated, word
from profiles.units import NOT_MEASURED, format_seconds

ACCURACY_WITHOUT_WORDS = (
    "without --template and --labels a class is told by its name in the data, by 'bad' or 'good', or by its "
    "number: words that fit the task may give a higher accuracy"
)


def study_seen(
    ready: PreparedStudy, *, dry_run: bool, as_json: bool, quiet: bool, out: Path | None = None
) -> StudyResult | None:
    """Run the study with its progress on stderr and print what it came to; with `dry_run` only what would be
    run. `out`: what `--out` is to be where it goes on, if not the study's own folder."""
    plan = ready.plan
    if plan.target.metric == "accuracy" and ready.shape.head == "causal_lm" and not plan.job.data.template:
        typer.echo(f"{word('note')}: {translated(ACCURACY_WITHOUT_WORDS)}", err=True)
    if dry_run:
        if as_json:
            typer.echo(to_json(plan), nl=False)
        else:
            console().print(trials_table(plan))
            console().print(cost_line(plan), markup=False, soft_wrap=True)
        return None
    try:
        with TrialProgress(quiet) as progress:
            for note in read_environment().notes:
                progress.print(f"{word('note')}: {translated(note)}")
            result = run_study(ready, report=progress.print, on_event=progress.launched)
    except KeyboardInterrupt:
        named = shlex.quote(str(out or ready.out))
        sys.stderr.write(
            f"stopped: finished trials are kept; go on with the same flags, --resume and --out {named}\n"
        )
        raise
    if as_json:
        typer.echo(to_json(result), nl=False)
    else:
        console().print(results_table(result, ready))
        for line in answer_lines(result):
            console().print(line, markup=False, soft_wrap=True)
        typer.echo(str(ready.out))
    return result


def trials_table(plan: StudyPlan) -> Table:
    table = Table(title=f"to {plan.target}, {plan.budget} for each method", title_justify="left")
    for heading in ("method", "rung", "trials", "each", "evaluations", "learning rates", "fits"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "method")
    for method, number, trials in planned_trials(plan):
        rung = plan.rungs[number]
        length = rung.length
        each = f"{length.steps:,} steps" if length.seconds is None else format_seconds(length.seconds)
        if number == 0:
            rates = ", ".join(f"{rate:g}" for rate in method.rates)
        else:
            rates = "the best" if rung.rates == 1 else f"the {rung.rates} best"
        fits = "yes" if method.fits else f"no: {method.why_not}"
        table.add_row(method.name, str(number), str(trials), each, str(length.evaluations), rates, fits)
    return table


def cost_line(plan: StudyPlan) -> str:
    total, running = predicted_s(plan), sum(method.fits for method in plan.methods)
    return (
        f"{running} of {len(plan.methods)} methods run; steps of all trials: {duration(total)}, "
        "set-ups and evaluations apart"
    )


def results_table(result: StudyResult, ready: PreparedStudy) -> Table:
    seeds = len(ready.plan.seeds)
    table = Table(title=f"{result.target}, {seeds} seeds", title_justify="left")
    for heading in (
        "method", "learning rate", f"test {result.metric}", "time to target", "steps", "evaluations",
        "search", "beside the best",
    ):  # fmt: skip
        table.add_column(heading, overflow="fold", no_wrap=heading == "method")
    for each in result.methods:
        if each.why_not is not None:
            table.add_row(each.name, "", each.why_not)
            continue
        rate = "" if each.learning_rate is None else f"{each.learning_rate:g}"
        table.add_row(
            each.name, rate, _spread(each.test), _reached(each), format_seconds(each.train_s),
            format_seconds(each.eval_s), format_seconds(each.search_s), each.beside_best or "best",
        )  # fmt: skip
    for name, value in (("zero-shot", result.zero_shot), ("majority class", result.majority_class)):
        if value is not None and (name == "zero-shot" or result.metric == "accuracy"):
            table.add_row(name, "", f"{value:.4g}")
    return table


def _spread(spread: SeedSpread | None) -> str:
    if spread is None:
        return NOT_MEASURED
    return f"{spread.median:.4g} ({spread.low:.4g} to {spread.high:.4g})"


def _reached(result: MethodResult) -> str:
    found = [each for each in result.time_to_target_s if each is not None]
    if not found:
        return "not reached"
    spread = result.reached
    if spread is None:
        return f"reached by {len(found)} of {len(result.time_to_target_s)} seeds"
    low, high = format_seconds(spread.low), format_seconds(spread.high)
    return f"{format_seconds(spread.median)} ({low} to {high})"


def answer_lines(result: StudyResult) -> Sequence[str]:
    """The answer in sentences."""
    best = next((each for each in result.methods if each.test is not None and each.beside_best is None), None)
    if best is None:
        return ["no method came to a result"]
    lines = [f"best on test data: {best.name}, {_spread(best.test)}"]
    for answer in ("same", "worse", "undecided"):
        names = [each.name for each in result.methods if each.beside_best == answer]
        if names:
            meaning = {"same": "the same within a point", "worse": "worse with every seed",
                       "undecided": "undecided: seeds differ too much, or are too few"}[answer]  # fmt: skip
            lines.append(f"{', '.join(names)}: {meaning}")
    first = next((each for each in result.methods if each.reached is not None), None)
    if first is not None:
        lines.append(f"first at {result.target}: {first.name}, after {_reached(first)} of steps")
    else:
        lines.append(f"no method reached {result.target} with every seed")
    edges = [f"{each.name} ({each.learning_rate:g})" for each in result.methods if each.rate_at_edge]
    if edges:
        lines.append(
            f"at the edge of the learning rates tried, so a better one may lie beyond: {', '.join(edges)}"
        )
    if result.shared_process:
        lines.append("all trials of a method were in one process, one after the other, as they are short")
    return lines
