"""The tables of tests/studies/smollm2/README.md out of the published records, and what they say of methods.

    python tests/studies/smollm2_tables.py            prints the tables
    python tests/studies/smollm2_tables.py pictures   writes the curves beside the page

Steps to a value are those of the first evaluation that meets it and whose next one does too. Nine tenths of
native's gain: from the value before training to the median, over native's seeds, of the best on development
data. Beside native: `harness.quality.judge.over_seeds` of the values on test data. Seconds to a value: steps
from the study, in which processes shared a GPU, and the time of a step from runs of the same job alone.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from harness.quality.documents import QualityTarget, TrialRecord  # noqa: E402
from harness.quality.judge import over_seeds  # noqa: E402
from harness.records.learning import Evaluated  # noqa: E402
from harness.records.run import Run, load_run  # noqa: E402
from harness.records.stats import counted_step_s  # noqa: E402
from reports.charts.axes import Axis  # noqa: E402
from reports.charts.lines import LevelLine, Line, lines  # noqa: E402
from reports.charts.marks import standalone  # noqa: E402
from reports.studies.curves import middle_curve  # noqa: E402
from reports.studies.read import LoadedStudy, load_study  # noqa: E402

RESULTS = ROOT / "reports" / "results"
TASKS = {
    "SST-2, bf16": (
        ("native", "smollm2-135m-sst2_h200_20261129"),
        ("lora", "smollm2-135m-sst2_h200_20261129"),
        ("exact-offload", "smollm2-135m-sst2-exact-offload_h200_20261129"),
        ("lsp, d = n/2", "smollm2-135m-sst2-lsp_h200_20261129"),
        ("lsp, d = 3n/4", "smollm2-135m-sst2-lsp-three-quarters_h200_20261129"),
        ("lsp, d = n/4", "smollm2-135m-sst2-lsp-quarter_h200_20261129"),
        ("lsp, d = n/4, residual=1", "smollm2-135m-sst2-lsp-quarter-residual_h200_20261129"),
        ("galore", "smollm2-135m-sst2-galore_h200_20261130"),
        ("mezo", "smollm2-135m-sst2_h200_20261129"),
        ("zo2", "smollm2-135m-sst2_h200_20261129"),
    ),
    "SST-2, fp32": (
        ("native", "smollm2-135m-sst2-fp32_h200_20261129"),
        ("lsp, d = n/2", "smollm2-135m-sst2-fp32-lsp_h200_20261129"),
    ),
    "SST-2, fp32, chosen by the loss": (
        ("native", "smollm2-135m-sst2-fp32-loss_h200_20261130"),
        ("lsp, d = n/2", "smollm2-135m-sst2-fp32-loss-lsp_h200_20261130"),
    ),
    "WikiText-2, bf16": (
        ("native", "smollm2-135m-wikitext2_h200_20261129"),
        ("lora", "smollm2-135m-wikitext2-lora_h200_20261129"),
        ("lsp, d = n/2", "smollm2-135m-wikitext2-lsp_h200_20261129"),
    ),
    "Instruction records, bf16": (
        ("native", "smollm2-135m-alpaca_h200_20261130"),
        ("lora", "smollm2-135m-alpaca_h200_20261130"),
        ("exact-offload", "smollm2-135m-alpaca-exact-offload_h200_20261130"),
        ("lsp, d = n/2", "smollm2-135m-alpaca-lsp_h200_20261130"),
    ),
    "CoLA, bf16": (
        ("native", "smollm2-135m-cola_h200_20261130"),
        ("lora", "smollm2-135m-cola_h200_20261130"),
        ("exact-offload", "smollm2-135m-cola-exact-offload_h200_20261130"),
        ("lsp, d = n/2", "smollm2-135m-cola-lsp_h200_20261130"),
        ("mezo", "smollm2-135m-cola_h200_20261130"),
    ),
    "MRPC, bf16": (
        ("native", "smollm2-135m-mrpc_h200_20261130"),
        ("lora", "smollm2-135m-mrpc_h200_20261130"),
        ("exact-offload", "smollm2-135m-mrpc-exact-offload_h200_20261130"),
        ("lsp, d = n/2", "smollm2-135m-mrpc-lsp_h200_20261130"),
        ("mezo", "smollm2-135m-mrpc_h200_20261130"),
    ),
    "SST-2, by uploads": (
        ("mezo", "smollm2-135m-sst2-uploads-mezo_h200_20261129"),
        ("mezo:queries", "smollm2-135m-sst2-uploads_h200_20261129"),
        ("mezo:curvature", "smollm2-135m-sst2-uploads_h200_20261129"),
        ("mezo:fzoo", "smollm2-135m-sst2-uploads_h200_20261129"),
        ("mezo:examples", "smollm2-135m-sst2-uploads_h200_20261129"),
    ),
}
"""Methods of one task in the table's order, and the folder of each. The others stand beside the first."""

METRICS = {"matthews": "Matthews correlation"}
"""What they are called, where it is not their name."""

SECONDS = {
    "H200": ("smollm2-135m-sst2-seconds_h200_20261129", "smollm2-135m-sst2-seconds_h200_20261130"),
    "24 GB, emulated": ("smollm2-135m-sst2-seconds-24gb_h200_20261130",),
    "4 GB, emulated": (
        "smollm2-135m-sst2-seconds-4gb_h200_20261129",
        "smollm2-135m-sst2-seconds-4gb_h200_20261130",
    ),
}
"""Folders with runs of SST-2's job on a GPU of their own, by machine."""
TIMED = ("native", "lora", "exact-offload", "lsp, d = n/2")


@dataclass(frozen=True, kw_only=True)
class MethodSeeds:
    """The final trials of one method."""

    label: str
    study: LoadedStudy
    finals: tuple[TrialRecord, ...]

    @property
    def metric(self) -> str:
        return self.study.plan.target.metric

    @property
    def tests(self) -> tuple[float, ...]:
        ok = [each for each in self.finals if each.end_state == "ok" and each.learned.test is not None]
        return tuple((each.learned.test or {})[self.metric] for each in ok)

    @property
    def gain(self) -> float:
        """On test data, the median over seeds less the value before training."""
        return statistics.median(self.tests) - (self.finals[0].learned.test_before or {})[self.metric]

    @property
    def best(self) -> float:
        """On development data, the median over seeds."""
        found = [each.learned.best(self.metric) for each in self.finals if each.end_state == "ok"]
        return statistics.median(each.metrics[self.metric] for each in found if each is not None)

    @property
    def before(self) -> float:
        return self.finals[0].learned.evaluations[0].metrics[self.metric]

    @property
    def rates(self) -> tuple[float, ...]:
        (method,) = [each for each in self.study.plan.methods if each.name == self.finals[0].method]
        return method.rates

    def steps_to(self, value: float) -> tuple[int | None, ...]:
        """For each seed; `None`: not reached."""
        target = QualityTarget(metric=self.metric, value=value)
        return tuple(_steps_to(target, each) for each in self.finals if each.end_state == "ok")


def _steps_to(target: QualityTarget, record: TrialRecord) -> int | None:
    evaluations = record.learned.evaluations
    met = [target.is_met(each.metrics[target.metric]) for each in evaluations]
    for number, each in enumerate(evaluations[:-1]):
        if met[number] and met[number + 1]:
            return each.step
    return None


def methods_of(task: str) -> list[MethodSeeds]:
    found = []
    for label, folder in TASKS[task]:
        study = load_study(RESULTS / folder)
        engine = label.partition(",")[0]
        (method,) = [each.name for each in study.plan.methods if engine in (each.name, each.engine)]
        found.append(MethodSeeds(label=label, study=study, finals=study.finals(method)))
    return found


def nine_tenths(first: MethodSeeds) -> float:
    """Of the gain of the first method, on development data."""
    return first.before + 0.9 * (first.best - first.before)


def beside(one: MethodSeeds, other: MethodSeeds) -> str:
    return over_seeds(one.tests, other.tests, one.metric)


def table(task: str) -> Iterator[str]:
    """Lines of Markdown."""
    methods = methods_of(task)
    first = methods[0]
    target, name = first.study.plan.target, first.label
    metric = METRICS.get(target.metric, target.metric.replace("_", " "))
    yield (
        f"| method | rate (tried) | test {metric}, median (range) | seeds | of {name}'s gain | "
        f"beside {name} | steps to {target.value:g} | steps to 90 % of {name}'s gain |"
    )
    yield "| --- | --- | --- | ---: | ---: | --- | --- | --- |"
    for each, (_, folder) in zip(methods, TASKS[task], strict=True):
        rate, tests = each.finals[0].learning_rate, each.tests
        least, most = min(each.rates), max(each.rates)
        edge = ": the edge" if rate in (least, most) else ""
        middle, low, high = (_value(value) for value in (statistics.median(tests), min(tests), max(tests)))
        cells = (
            f"[{each.label}](../../../reports/results/{folder}/report.md)",
            f"{_rate(rate)} ({_rate(least)} to {_rate(most)}{edge})",
            f"{middle} ({low} to {high})",
            str(len(tests)),
            f"{100 * each.gain / first.gain:.1f} %",
            "" if each is first else beside(each, first),
            _steps(each.steps_to(target.value)),
            _steps(each.steps_to(nine_tenths(first))),
        )
        yield f"| {' | '.join(cells)} |"


def first_rung(task: str) -> Iterator[str]:
    """The best on development data of each rate of the search's first trials, all of one seed."""
    for each in methods_of(task):
        mine = [one for one in each.study.trials if one.method == each.finals[0].method and one.rung == 0]
        best = {one.learning_rate: one.learned.best(each.metric) for one in mine}
        cells = [f"{_rate(rate)}: {_value(it.metrics[each.metric])}" for rate, it in best.items() if it]
        yield f"| {each.label} | " + " | ".join(cells) + " |"


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """To nine tenths of native's gain: of each seed's steps, by each process's time of a step."""

    steps: tuple[int, ...]
    train_s: tuple[float, ...]
    setup_s: float
    step_s: float
    predicted_s: float | None
    """Of a step; `None` on an emulated machine, whose own GPU is predicted for."""
    processes: int


def seconds_to(steps: int, run: Run) -> float:
    """Of the steps alone: those that were taken as they were, later ones by the median."""
    first = sorted((sample for sample in run.samples), key=lambda sample: sample.step)[:steps]
    usual_s = statistics.median(counted_step_s(run.samples))
    return sum(sample.step_s for sample in first) + max(0, steps - len(first)) * usual_s


def seconds(method: MethodSeeds, value: float, folders: Sequence[Path]) -> Seconds | str:
    """In words: why the folders have none, as no run ended well or some seed did not reach the value."""
    steps = method.steps_to(value)
    reached = tuple(each for each in steps if each is not None)
    engine = method.label.partition(",")[0]
    runs = [load_run(path) for each in folders for path in sorted(each.glob(f"runs/{engine}-*.json"))]
    ends = [(run.end_state, len(run.samples)) for run in runs if run.end_state != "ok"]
    runs = [run for run in runs if run.end_state == "ok"]
    if len(reached) < len(steps):
        return "not reached"
    if not runs:
        return f"{ends[0][0]} after {ends[0][1]} steps" if ends else "not measured"
    setups = [run.summary.setup_s for run in runs if run.summary.setup_s is not None]
    predicted = None if runs[0].emulation is not None else runs[0].predicted
    return Seconds(
        steps=reached,
        train_s=tuple(seconds_to(each, run) for each in reached for run in runs),
        setup_s=statistics.median(setups),
        step_s=statistics.median(statistics.median(counted_step_s(run.samples)) for run in runs),
        predicted_s=None if predicted is None else predicted.step_s,
        processes=len(runs),
    )


def seconds_table() -> Iterator[str]:
    """Lines of Markdown."""
    by_label = {each.label: each for each in methods_of("SST-2, bf16")}
    value = nine_tenths(by_label["native"])
    machines = {machine: [RESULTS / name for name in names] for machine, names in SECONDS.items()}
    heads = []
    for machine, paths in machines.items():
        links = [f"[{path.name[-2:]} Nov](../../../reports/results/{path.name}/report.md)" for path in paths]
        heads.append(f"{machine} ({', '.join(links)})")
    yield f"| method | steps | {' | '.join(heads)} |"
    yield "| --- | --- |" + " --- |" * len(heads)
    for label in TIMED:
        method = by_label[label]
        cells = [label, _steps(method.steps_to(value))]
        cells += [_seconds(seconds(method, value, paths)) for paths in machines.values()]
        yield f"| {' | '.join(cells)} |"


CHOICES = ("the best accuracy", "the best mean of it and the one before", "the smallest loss")
"""What may choose among the evaluations of a final trial; studies do so by the first."""


def choices_table() -> Iterator[str]:
    """Lines of Markdown: the step that each of `CHOICES` takes, in SST-2's final trials of methods with
    gradients, and the loss on development data there."""
    trials = [
        trial
        for task in ("SST-2, bf16", "SST-2, fp32")
        for method in methods_of(task)
        if method.label not in ("mezo", "zo2")
        for trial in method.finals
    ]
    yield f"| chosen by | before step 120, of {len(trials)} trials | loss on development data there, mean |"
    yield "| --- | ---: | ---: |"
    for number, name in enumerate(CHOICES):
        chosen = [_chosen(trial)[number] for trial in trials]
        early = sum(each.step < 120 for each in chosen)
        loss = statistics.fmean(each.metrics["loss"] for each in chosen)
        yield f"| {name} | {early} | {loss:.4f} |"
    yield ""
    tested = [_chosen(trial)[0].metrics for trial in trials]
    values = [(trial.learned.test or {})["accuracy"] for trial in trials]
    by_accuracy, by_loss = (
        statistics.correlation(values, [each[metric] for each in tested]) for metric in ("accuracy", "loss")
    )
    yield f"Correlation with test accuracy: {by_accuracy:.2f} of accuracy, {by_loss:.2f} of loss."


def _chosen(trial: TrialRecord) -> tuple[Evaluated, Evaluated, Evaluated]:
    """Of its evaluations after a step, by each of `CHOICES`."""
    found = [each for each in trial.learned.evaluations if each.step]
    pairs = pairwise(found)
    return (
        max(found, key=lambda each: each.metrics["accuracy"]),
        max(pairs, key=lambda pair: sum(each.metrics["accuracy"] for each in pair))[1],
        min(found, key=lambda each: each.metrics["loss"]),
    )


PICTURES = {
    "SST-2, bf16": "sst2.svg",
    "SST-2, fp32": "sst2-fp32.svg",
    "SST-2, fp32, chosen by the loss": "sst2-fp32-loss.svg",
    "WikiText-2, bf16": "wikitext2.svg",
    "Instruction records, bf16": "instruct.svg",
    "CoLA, bf16": "cola.svg",
    "MRPC, bf16": "mrpc.svg",
}
"""Curves of these tasks' methods."""
DRAWN = ("native", "lora", "exact-offload", "lsp, d = n/2", "lsp, d = n/4", "mezo")
"""`zo2`'s curves are those of `mezo`, and the rest of `lsp`'s lie among the others'."""


def picture(task: str) -> str:
    """Development data over steps: each seed thin, the median over seeds bold."""
    methods = [each for each in methods_of(task) if each.label in DRAWN]
    metric, value = methods[0].metric, nine_tenths(methods[0])
    series: list[Line] = []
    engines: list[str] = []
    for each in methods:
        engine = each.finals[0].engine
        nth = engines.count(engine)
        engines.append(engine)
        found = [_curve(one, metric) for one in each.finals if one.end_state == "ok"]
        series += [Line(label=each.label, engine=engine, nth=nth, points=one, is_faint=True) for one in found]
        series.append(Line(label=each.label, engine=engine, nth=nth, points=middle_curve(found)))
    is_share = metric == "accuracy"
    drawn = lines(
        f"SmolLM2-135M, {task}",
        "; ".join(f"{each.label}: {_value(each.best)} at its best" for each in methods),
        series,
        lambda _: Axis(name="steps"),
        Axis(
            name=f"{METRICS.get(metric, metric.replace('_', ' '))} on development data",
            unit="%" if is_share else "", size=0.01 if is_share else 1.0,
        ),
        [LevelLine(value=value, name="90 % of gain")],
    )  # fmt: skip
    return standalone(drawn)


def _curve(record: TrialRecord, metric: str) -> tuple[tuple[float, float], ...]:
    return tuple((float(each.step), each.metrics[metric]) for each in record.learned.evaluations)


def _seconds(found: Seconds | str) -> str:
    if isinstance(found, str):
        return found
    middle, low, high = (
        f"{each:.1f}" if each < 10 else f"{each:.0f}"
        for each in (statistics.median(found.train_s), min(found.train_s), max(found.train_s))
    )
    predicted = "" if found.predicted_s is None else f", {1000 * found.predicted_s:.0f} predicted"
    processes = "one process" if found.processes == 1 else f"{found.processes} processes"
    return (
        f"{middle} s ({low} to {high}), set-up {found.setup_s:.1f} s; "
        f"{1000 * found.step_s:.0f} ms a step{predicted} ({processes})"
    )


def _rate(value: float) -> str:
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _value(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def _steps(steps: Sequence[int | None]) -> str:
    if all(each is None for each in steps):
        return "not reached"
    return ", ".join("not" if each is None else str(each) for each in steps)


def main() -> None:
    if sys.argv[1:] == ["pictures"]:
        for task, name in PICTURES.items():
            (Path(__file__).parent / "smollm2" / name).write_text(picture(task), encoding="utf-8")
        return
    for task in TASKS:
        print(f"## {task}\n", *table(task), "", *first_rung(task), "", sep="\n")
    print("## What chooses the weights\n", *choices_table(), "", sep="\n")
    print("## Seconds\n", *seconds_table(), sep="\n")


if __name__ == "__main__":
    main()
