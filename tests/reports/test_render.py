"""Whole reports. Set UPDATE_GOLDEN=1 to rewrite tests/reports/golden/ after a change that is meant."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import string
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup

from engines.errors import UserError
from harness.records.comparison import comparisons
from harness.records.run import Run
from profiles.figures import reported
from profiles.machine import Figure
from reports.criteria import default_criteria, init_text
from reports.format import model_name
from reports.load import Loaded, load_folder
from reports.messages import messages
from reports.provenance import told_of
from reports.render import (
    judge,
    markdown_text,
    render_html,
    render_markdown,
    write_report,
    written,
)
from run_records import (
    cpu_runs,
    emulated_run,
    make_breakdown,
    make_environment,
    make_failures,
    make_machine,
    make_plan,
    make_run,
    make_sweep,
    make_test_job,
    save_run,
    scaled,
    sha256_of,
    write_folder,
)

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = '</td><script>alert("x")</script> | `code` [a](b) *b* & http://evil.example'


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    text = init_text()
    plans = [make_plan(engine) for engine in ("native", "lsp", "zo2", "mezo")]
    return write_folder(
        tmp_path / "sweep", make_sweep(sha256_of(text)), machine=make_machine(), criteria=text,
        plans=[*plans, make_plan("torchao-offload", fits=False)],
    )  # fmt: skip


@pytest.fixture
def failures(tmp_path: Path) -> Path:
    folder = write_folder(
        tmp_path / "failures",
        make_failures(),
        plans=[make_plan("zo2"), make_plan("torchao-offload", fits=False)],
    )
    (folder / "runs" / "half.json").write_text("{")
    return folder


@pytest.fixture
def breakdown(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "breakdown", make_breakdown())


@pytest.fixture
def cpu(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "cpu", cpu_runs(), job=make_test_job(limits={}, eval_batches=2))


def rendered(folder: Path) -> tuple[Loaded, str, str]:
    loaded = load_folder(folder)
    told = written(loaded, loaded.criteria)
    return loaded, render_markdown(told), render_html(told)


@pytest.mark.parametrize("name", ["sweep", "failures", "cpu", "breakdown"])
def test_golden_markdown(name: str, request: pytest.FixtureRequest) -> None:
    _, markdown, _ = rendered(request.getfixturevalue(name))
    golden = GOLDEN / f"{name}.md"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(markdown, encoding="utf-8")
    assert markdown == golden.read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Checks nesting and collects what could load something."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", ["sweep", "failures", "cpu", "breakdown"])
def test_html_is_one_whole_file_that_loads_nothing(name: str, request: pytest.FixtureRequest) -> None:
    _, _, html = rendered(request.getfixturevalue(name))
    assert len(html.encode("utf-8")) < 1_000_000
    outline = Outline()
    outline.feed(html)
    assert outline.open == []
    assert not outline.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert set(re.findall(r'href="(.)', html)) == {"#"}
    assert not outline.attributes & {"src", "srcset", "action", "data", "xlink:href", "style"}
    assert not any(attribute.startswith("on") for attribute in outline.attributes)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|javascript:|data:image", html, re.IGNORECASE)
    assert html.lstrip().startswith("<!DOCTYPE html>")
    assert "@page { size: A4" in html


def test_the_verdict_stands_before_everything_else(sweep: Path) -> None:
    _, markdown, html = rendered(sweep)
    assert markdown.splitlines()[2] == "## Verdict: GO"
    body = html[html.index("<body>") :]
    order = [
        'class="state">GO',
        ">Purpose<",
        ">Conditions<",
        ">Effect<",
        ">Cost<",
        "Risks: know before you trust this",
        "Criteria",
        ">Decision<",
        "Methods",
        "Failures",
        "How to reproduce",
    ]
    places = [body.index(text) for text in order]
    assert places == sorted(places)


def test_the_same_folder_gives_the_same_bytes_elsewhere_and_in_any_order(sweep: Path, tmp_path: Path) -> None:
    write_report(sweep)
    first = {name: (sweep / name).read_bytes() for name in ("report.md", "report.html", "verdict.json")}
    again = tmp_path / "other place" / "sweep"
    again.parent.mkdir()
    runs = make_sweep(sha256_of(init_text()))
    random.Random(3).shuffle(runs)
    plans = [make_plan(engine) for engine in ("mezo", "zo2", "lsp", "native")]
    write_folder(
        again,
        runs,
        machine=make_machine(),
        criteria=init_text(),
        plans=[make_plan("torchao-offload", fits=False), *plans],
    )
    write_report(again)
    assert {name: (again / name).read_bytes() for name in first} == first
    write_report(sweep)
    assert {name: (sweep / name).read_bytes() for name in first} == first
    assert str(tmp_path).encode() not in b"".join(first.values())


def test_the_report_of_a_report_folder_does_not_read_itself(sweep: Path) -> None:
    verdict = write_report(sweep)
    saved = json.loads((sweep / "verdict.json").read_text())
    assert saved["state"] == verdict.state == "GO"
    assert saved["schema_version"] == 1
    assert [row["outcome"] for row in saved["rows"]] == ["pass"] * 5
    assert write_report(sweep) == verdict


def test_a_verdict_says_of_which_model_machine_and_day_it_is(sweep: Path) -> None:
    """It is repeated in meetings, without its page."""
    verdict = write_report(sweep)
    runs = load_folder(sweep).runs
    model, gpu = runs[0].model.name, runs[0].environment.gpu_name
    told = {(run.model.name, run.environment.gpu_name, run.time[:10]) for run in runs}
    assert told == {(model, gpu, runs[0].time[:10])}
    assert verdict.sentence.endswith(
        f"Model: {model}; machine: {gpu} held to 22.4 GiB of GPU memory; run on {runs[0].time[:10]}."
    )
    assert gpu in write_report(sweep, language="ja").sentence


def test_a_verdict_on_an_emulated_machine_names_both(tmp_path: Path) -> None:
    run = make_sweep()[0]
    here = replace(run.environment, gpu_name="NVIDIA H200", emulated="rtx-3090")
    times = ["2026-11-30T23:59:00+00:00", "2026-12-01T00:01:00+00:00"]
    job = make_test_job(limits={})
    runs = [make_run(job=job, environment=here, time=time, round=n) for n, time in enumerate(times, 1)]
    told = told_of(load_folder(write_folder(tmp_path / "runs", runs, job=job)))
    assert "machine: rtx-3090, emulated on NVIDIA H200; run on 2026-11-30 to 2026-12-01" in told


@pytest.mark.parametrize(
    ("limits", "machine"),
    [
        ({}, "NVIDIA H200"),
        ({"vram_bytes": 8 * 2**30}, "NVIDIA H200 held to 8.00 GiB of GPU memory"),
        ({"gpus": 2}, "2 GPUs, each NVIDIA H200"),
    ],
)
def test_a_verdict_says_how_many_gpus_and_how_little_of_them(
    limits: dict[str, int], machine: str, tmp_path: Path
) -> None:
    """What fits where a run was held to 8 GiB is no news of a card of 140."""
    job = make_test_job(limits=limits)
    here = make_environment(gpu_name="NVIDIA H200", gpu_total_bytes=140 * 2**30)
    folder = write_folder(tmp_path / "runs", [make_run(job=job, environment=here)], job=job)
    assert f"; machine: {machine}; run on" in write_report(folder).sentence


def test_criteria_given_by_path_take_the_place_of_the_folders_own(sweep: Path, tmp_path: Path) -> None:
    stricter = tmp_path / "stricter.toml"
    stricter.write_text(init_text().replace("threshold = 5.0", "threshold = 0.5"))
    verdict = write_report(sweep, stricter)
    assert verdict.state == "CONDITIONAL GO"
    assert "1.00x" in verdict.sentence
    assert "at most 0.50x" in verdict.sentence
    assert any("set after measurement" in warning for warning in verdict.warnings)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    environment = make_environment(cpu=HOSTILE, packages={HOSTILE: HOSTILE}, emulated=HOSTILE)
    plan = make_plan(
        "lsp", reasons=(HOSTILE,), settings={HOSTILE: HOSTILE}, verify_command=f"{HOSTILE}```\n# x"
    )
    job = make_test_job(model={"name": HOSTILE})
    runs = [
        make_run("lsp", end_state="crash", end_reason=HOSTILE, job=job, environment=environment, plan=plan),
        replace(make_run("zo2", job=job, environment=environment), id=HOSTILE),
    ]
    criteria = (
        init_text().replace('id = "runs"', f"id = '''{HOSTILE}'''").replace("What is to be", "<b>Fitting</b>")
    )
    folder = write_folder(tmp_path / "x", [], job=job, criteria=criteria)
    for i, run in enumerate(runs):
        save_run(run, folder / "runs" / f"{i}.json")
    _, markdown, html = rendered(folder)
    outline = Outline()
    outline.feed(html)
    assert "script" not in outline.tags
    assert "<b>Fitting" not in html
    assert "&lt;script&gt;" in html
    outside = re.sub(r"```.*?\n```", "", markdown, flags=re.DOTALL)
    assert "<script" not in outside
    assert "```" not in outside
    for above, line in itertools.pairwise(outside.splitlines()):
        if above.startswith("|") and line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", above)) == len(re.findall(r"(?<!\\)\|", line)), line


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("opt-1.3b", "opt-1.3b"),
        ("facebook/opt-1.3b", "facebook/opt-1.3b"),
        ("out/models/minilm", "minilm"),
        ("/data/minilm/", "minilm"),
        ("../minilm", "minilm"),
    ],
)
def test_a_model_in_a_folder_is_called_by_its_own_name(name: str, shown: str) -> None:
    assert model_name(name) == shown


def test_markdown_text() -> None:
    assert markdown_text("a|b\n<i>`*") == "a\\|b &lt;i&gt;\\`\\*"
    assert markdown_text(Markup("a|b")) == "a|b"
    assert markdown_text("x && y; AT&T &amp; &#39;") == "x && y; AT&T &amp;amp; &amp;#39;"


def test_what_was_not_measured_is_said_and_never_zero(failures: Path) -> None:
    _, markdown, html = rendered(failures)
    assert "Energy: not measured for zo2." in markdown
    assert "Speed and memory of native, lsp, mezo: no run ended ok." in markdown
    assert "| native | NO-GO | all weights | no | - |" in markdown
    assert "runs/half.json" in markdown
    assert "1 file(s) could not be read" in html
    for state in ("oom_gpu", "crash", "timeout", "nan_loss"):
        assert f"| {state} |" in markdown
    assert "planned, not run" in markdown
    assert "None" not in re.sub(r"<[^>]*>", "", html)
    assert "nan" not in re.sub(r"nan_loss|finance", "", markdown)


def test_charts_without_a_measurement_are_left_out(tmp_path: Path) -> None:
    _, _, html = rendered(write_folder(tmp_path, [make_run("lsp", end_state="crash")]))
    assert "<svg" not in html
    assert "Charts" not in html


def test_evaluation_and_busy_times_show_where_there_are_any(cpu: Path, sweep: Path) -> None:
    _, markdown, _ = rendered(cpu)
    assert "50.0 % to 81.2 %; loss 0.7000 to 0.4000" in markdown
    assert "How long each resource was busy" in markdown
    assert "Measured without a GPU" in markdown
    _, markdown, _ = rendered(sweep)
    assert "Held-out accuracy" not in markdown
    assert "How long each resource was busy" not in markdown


def test_the_breakdown_tells_what_was_measured_and_what_was_not(breakdown: Path) -> None:
    _, markdown, html = rendered(breakdown)
    table = markdown[markdown.index("How long each resource was busy") : markdown.index("\n## Risks\n")]
    rows = {line.split(" | ")[0].lstrip("| "): line for line in table.splitlines() if line.startswith("| ")}
    nothing = "-"
    assert rows["zo2"] == "| zo2 | 600 ms | 500 ms | 375 ms | 125 ms | 300 ms | - | 75 % | 93 % |"
    assert rows["native"].split(" | ")[3:5] == ["450 ms", "none made"]
    assert rows["mezo"].split(" | ")[3:5] == ["380 ms (noise included)", nothing]
    assert rows["mezo"].endswith("| 75 % | 0.4 % |")
    assert rows["lsp"].split(" | ")[3:5] == [nothing, "none made"]
    assert "torchao-offload" not in rows
    assert "do not add up to the step" in table

    start = html.index("<h3>Where the time of a step goes")
    figure = html[start : html.index("</figure>", start)]
    assert "step 800 ms; predicted floor 600 ms, 75 % of it; 93 % of the update landed" in figure
    assert "compute + noise" in figure
    assert "torchao-offload" not in figure
    assert "do not add up to its step" in figure


def test_how_near_a_step_came_to_reading_its_blocks_alone(tmp_path: Path) -> None:
    """A column of its own, where some method has blocks on disk."""
    runs = [make_run("zo2", gpu_s=0.5, disk_floor_share=0.9), make_run("mezo", gpu_s=0.4)]
    _, markdown, _ = rendered(write_folder(tmp_path, runs))
    table = markdown[markdown.index("How long each resource was busy") :]
    assert "| Disk floor / step |" in table
    assert "| 90 % |" in next(line for line in table.splitlines() if line.startswith("| zo2"))
    assert "100 % is the disk's limit" in table


def test_what_may_be_recomputed_and_what_was_are_both_told(tmp_path: Path) -> None:
    def workload(name: str, runs: list[Run]) -> str:
        markdown = rendered(write_folder(tmp_path / name, runs))[1]
        return next(line for line in markdown.splitlines() if line.startswith("- Workload"))

    runs = [
        make_run("native", plan=make_plan("native", settings={"checkpointed_blocks": 0})),
        make_run("lsp", plan=make_plan("lsp", settings={"checkpointed_blocks": 3})),
        make_run("exact-offload"),
        make_run("mezo"),  # it has no backward pass
    ]
    told = "activations may be recomputed (blocks recomputed: native none; lsp 3; exact-offload all); "
    assert told in workload("may", runs)
    job = make_test_job(checkpointing=False)
    assert "no activations recomputed; " in workload("off", [make_run("native", job=job)])


def test_gpu_memory_says_what_of_it_is_told(tmp_path: Path) -> None:
    """What torch reserved, or of a trainer that does not tell it what its tensors took."""
    _, markdown, html = rendered(write_folder(tmp_path / "reserved", [make_run("native")]))
    assert "5.59 GiB of GPU memory reserved. Model: opt-1.3b;" in markdown
    assert "- Memory: 5.59 GiB of GPU memory reserved by torch (" in markdown
    assert "Peak GPU memory, reserved by torch" in html
    tensors = [make_run("native", peak_gpu_reserved_bytes=None)]
    _, markdown, html = rendered(write_folder(tmp_path / "tensors", tensors))
    assert "- Memory: 5.12 GiB of GPU memory in tensors (" in markdown
    assert "Peak GPU memory, tensors" in html


def test_what_the_runs_were_held_to_is_told_where_the_machine_is(tmp_path: Path) -> None:
    """In the question, beside the machine and beside the peaks."""
    job = make_test_job(limits={"vram_bytes": 8 * 2**30, "host_bytes": 32 * 2**30})
    _, markdown, html = rendered(write_folder(tmp_path / "job", [make_run(job=job)], job=job))
    caps = "held to 8.00 GiB of GPU memory, 32.0 GiB of host memory"
    assert f"on this machine, {caps}, with which method" in markdown
    assert f"119 GiB host memory; {caps}\n" in markdown
    assert "of the 8.00 GiB it was held to" in html

    free = make_test_job(limits={})
    emulated = emulated_run(job=free, vram_bytes=4 * 2**30, vram_bytes_held=3 * 2**30)
    _, markdown, html = rendered(write_folder(tmp_path / "emulated", [emulated], job=free))
    caps = "held to 3.00 GiB of GPU memory, the link and 8 CPU threads of 'rtx-4090'"
    assert f"119 GiB host memory; {caps}\n" in markdown
    assert "of the 3.00 GiB it was held to" in html

    _, markdown, html = rendered(write_folder(tmp_path / "whole", [make_run(job=free)], job=free))
    assert "held to" not in markdown
    assert "it was held to" not in html


def test_the_disk_has_a_row_a_bar_and_a_line(tmp_path: Path) -> None:
    seen = {
        "gpu_s": 0.25, "h2d_s": 0.4, "d2h_s": 0.1, "idle_s": 0.7, "disk_s": 0.875, "disk_floor_s": 0.75,
        "disk_floor_share": 0.75, "gpu_exposed_s": 0.3, "h2d_exposed_s": 0.05, "d2h_exposed_s": 0.0,
    }  # fmt: skip
    runs = [make_run("zo2", **seen), make_run("mezo", gpu_s=0.4)]
    _, markdown, html = rendered(write_folder(tmp_path, runs))
    table = markdown[markdown.index("What hides behind what") :].split("\n## ")[0]
    assert "| zo2 | disk reads | 875 ms | - | - |" in table
    assert "how much of it was exposed is not measured" in table
    # Updates beside the model's work are in what is exposed and not in what is busy.
    assert "| zo2 | GPU | 250 ms | 0.00 s | 250 ms |" in table
    busy = markdown[markdown.index("How long each resource was busy") :].split("\n### ")[0]
    cells = {line.split(" | ")[0]: line.split(" | ") for line in busy.splitlines() if line[:2] == "| "}
    assert [cells[key][5] for key in ("| Method", "| zo2", "| mezo")] == [
        "Disk reads",
        "875 ms",
        "-",
    ]
    figure = html[html.index("<h3>Where the time of a step goes") :].split("</figure>")[0]
    assert "disk reads 875 ms" in figure
    assert "disk alone 750 ms, 75 % of it" in figure
    assert figure.count('stroke-dasharray="1.5 2.5"') == 1


def test_a_range_over_the_steps_of_one_run_says_so(tmp_path: Path) -> None:
    """Beside the ratio and where it is judged, if only one of the two methods has a single run."""
    native = [make_run("native", round=i, step_s=scaled(0.5)) for i in (1, 2)]
    asked = init_text().replace(
        '"any method"\ncomparison = "at most"\nthreshold = 5.0',
        '"zo2"\ncomparison = "at most"\nthreshold = 5.0',
    )
    runs = [*native, make_run("zo2")]
    _, markdown, _ = rendered(write_folder(tmp_path / "one", runs, criteria=asked))
    assert "| 2.00x (1.80x to 2.20x over steps: one run, undecided: fewer than three runs) |" in markdown
    assert "| at most 5.00x | 2.00x (1.80x to 2.20x over steps: one run) |" in markdown
    two = [make_run("zo2", round=i, step_s=scaled(0.9 + 0.1 * i)) for i in (1, 2)]
    _, markdown, _ = rendered(write_folder(tmp_path / "two", [*native, *two], criteria=asked))
    assert "| 2.00x to 2.20x (undecided: fewer than three runs) |" in markdown
    assert "| at most 5.00x | 2.00x to 2.20x |" in markdown
    three = [make_run("zo2", round=i, step_s=scaled(0.9 + 0.1 * i)) for i in (1, 2, 3)]
    native = [make_run("native", round=i, step_s=scaled(0.5)) for i in (1, 2, 3)]
    _, markdown, _ = rendered(write_folder(tmp_path / "three", [*native, *three], criteria=asked))
    assert "| 2.20x (95 %: 2.00x to 2.40x; slower) |" in markdown
    assert "| at most 5.00x | 2.20x (2.00x to 2.40x) |" in markdown
    assert "1.10 s (95 %: 1.00 to 1.20 s; steps: 900 ms to 1.32 s; 24 steps, 3 runs)" in markdown


def test_gpu_memory_that_is_judged_says_what_it_is(tmp_path: Path) -> None:
    """What torch reserved is measured, what tensors take is predicted."""
    _, markdown, _ = rendered(
        write_folder(tmp_path / "reserved", [make_run(peak_gpu_reserved_bytes=9 * 10**9)])
    )
    assert "| at most 100 % | 38 % reserved by torch | 25 % in tensors | pass |" in markdown
    unknown = make_run(peak_gpu_reserved_bytes=None, peak_gpu_allocated_bytes=3 * 10**9)
    _, markdown, _ = rendered(write_folder(tmp_path / "tensors", [unknown]))
    assert "| at most 100 % | 12 % in tensors | 25 % in tensors | pass |" in markdown


def test_the_first_step_is_shown_and_the_search_for_projectors_spread(tmp_path: Path) -> None:
    """Where it was a warm-up step, and the method has projectors to find."""
    plan = make_plan("lsp", settings={"d": 512, "check_every": 40})
    runs = [make_run("native", step_s=scaled(0.5)), make_run("lsp", plan=plan)]
    _, markdown, _ = rendered(write_folder(tmp_path / "lsp", runs))
    speed = markdown[markdown.index("### Speed and learning") :].split("\n### ")[0]
    cells = {line.split(" | ")[0]: line.split(" | ") for line in speed.splitlines() if line[:2] == "| "}
    assert [cells[key][3] for key in ("| Method", "| native", "| lsp")] == ["First step", "2.50 s", "5.00 s"]
    assert "lsp's first step, 5.00 s, finds its projectors. They are checked every 40 steps:" in speed
    assert "a step of a long run is 1.10 s on average, which is an upper bound" in speed

    names = itertools.count()

    def note(run: Run) -> bool:
        _, text, _ = rendered(write_folder(tmp_path / str(next(names)), [run]))
        return "finds its projectors" in text

    assert not note(make_run("zo2"))
    assert not note(make_run("lsp", end_state="crash"))
    assert not note(make_run("lsp", plan=make_plan("lsp", settings={"of another version": 1})))
    counted = make_run("lsp")
    counted = replace(counted, samples=tuple(replace(sample, warmup=False) for sample in counted.samples))
    assert not note(counted)


def test_a_few_slow_steps_do_not_make_the_bars_short(tmp_path: Path) -> None:
    steps = [1.0] * 19 + [10.0]
    _, markdown, html = rendered(write_folder(tmp_path, [make_run(step_s=steps)]))
    figure = html[html.index("<h3>Step time</h3>") :].split("</figure>")[0]
    assert "10 % to 90 % quantile of the counted steps" in figure
    assert ">2</text>" not in figure  # the axis ends where the bar and the prediction do
    assert "1.00 s (1.00 to 10.0 s; 20 steps, 1 run)" in markdown


def test_losses_are_drawn_of_every_run_from_the_end_of_its_warm_up(tmp_path: Path) -> None:
    """A long first step does not shift a method's line."""
    runs = [make_run(round=i, step_s=scaled(float(i))) for i in (1, 2)]
    _, _, html = rendered(write_folder(tmp_path, runs))
    figure = html[html.index("<h3>Training loss against wall-clock time after the warm-up</h3>") :]
    figure = figure.split("</figure>")[0]
    assert "zo2: 2.4000 after 8.00 s; zo2: 2.4000 after 16.0 s" in figure
    drawn = re.findall(r'<polyline points="([^"]*)"', figure)
    assert [len(points.split()) for points in drawn] == [8, 8]
    assert "Time since the end of the warm-up (s)" in figure


def test_disturbed_runs_do_not_tell_which_is_faster(tmp_path: Path) -> None:
    native = [make_run("native", round=i, step_s=scaled(0.2)) for i in (1, 2, 3)]
    steady = [make_run("zo2", round=i, step_s=scaled(1.0)) for i in (1, 2, 3)]
    _, markdown, _ = rendered(write_folder(tmp_path / "steady", [*native, *steady]))
    assert "5.00x (95 %: 5.00x; slower)" in markdown
    disturbed = [*steady[:2], make_run("zo2", round=3, step_s=scaled(1.6))]
    _, markdown, _ = rendered(write_folder(tmp_path / "disturbed", [*native, *disturbed]))
    assert "5.00x (95 %: 5.00x to 8.00x; undecided: the runs were disturbed)" in markdown


def test_of_two_runs_both_are_shown_and_nothing_is_claimed(tmp_path: Path) -> None:
    native = [make_run("native", round=i, step_s=scaled(0.2)) for i in (1, 2)]
    two = [make_run("zo2", round=i, step_s=scaled(0.9 + i / 10)) for i in (1, 2)]
    loaded, markdown, html = rendered(write_folder(tmp_path, [*native, *two]))
    assert "1.00 and 1.10 s (" in markdown
    assert "5.00x to 5.50x (undecided: fewer than three runs)" in markdown
    assert "1.05 s" not in markdown
    assert "1.05 s" not in html
    (found,) = comparisons(loaded.runs)
    assert (found.answer, found.why_undecided, found.confidence) == ("undecided", "few_runs", None)
    assert judge(loaded, loaded.criteria).comparisons == (found,)


def test_nothing_is_faster_than_a_native_that_was_not_at_its_best(tmp_path: Path) -> None:
    slow = make_test_job(settings={"native": {"compile": False}})
    zo2 = [make_run("zo2", round=i, step_s=scaled(0.5), job=slow) for i in (1, 2, 3)]
    native = [make_run("native", round=i, job=slow) for i in (1, 2, 3)]
    _, markdown, _ = rendered(write_folder(tmp_path / "by hand", [*native, *zo2], job=slow))
    assert "0.50x (95 %: 0.50x; undecided: native was not at its best)" in markdown
    assert "Native could have been faster (set by hand: compile=False)" in markdown
    before = [replace(make_run("native", round=i), notes=None) for i in (1, 2, 3)]
    zo2 = [make_run("zo2", round=i, step_s=scaled(0.5)) for i in (1, 2, 3)]
    (found,) = comparisons([*before, *zo2])
    assert found.native_not_at_best == "its record does not say whether it was compiled"
    assert found.answer == "undecided"


def test_a_ratio_of_an_emulated_machine_comes_with_a_note(tmp_path: Path) -> None:
    runs = [emulated_run("native"), emulated_run("zo2", step_s=scaled(2.0))]
    _, markdown, html = rendered(write_folder(tmp_path, runs))
    note = "the GPU's speed is not that of the emulated machine"
    assert f"| 2.00x ({note}) |" in markdown
    assert "2.00x" not in html[: html.index('class="contents"')]
    assert "slower" not in markdown[: markdown.index("How to read")]


def test_what_was_overlapped_and_what_was_exposed_has_a_table(tmp_path: Path) -> None:
    seen = {
        "gpu_s": 0.4, "d2h_s": 0.1, "h2d_s": 0.2, "cpu_s": None,
        "gpu_exposed_s": 0.15, "d2h_exposed_s": 0.0, "h2d_exposed_s": 0.05, "cpu_exposed_s": None,
    }  # fmt: skip
    _, markdown, html = rendered(
        write_folder(tmp_path, [make_run("lsp", **seen), make_run("native", gpu_s=0.4)])
    )
    table = markdown[markdown.index("What hides behind what") :].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| lsp")]
    assert rows == [
        "| lsp | GPU | 400 ms | 250 ms | 150 ms |",
        "| lsp | copies to host | 100 ms | 100 ms | 0.00 s |",
        "| lsp | CPU update | - | - | - |",
        "| lsp | copies to GPU | 200 ms | 150 ms | 50.0 ms |",
    ]
    assert "| native" not in table
    assert "isk" not in table
    assert "What hides behind what" in html


def test_every_message_is_used_and_every_name_in_it_is_plain() -> None:
    root = Path(__file__).parents[2]
    files = [
        root / "harness" / "records" / "stats.py",
        root / "harness" / "records" / "metrics.py",
        root / "harness" / "records" / "governance.py",
        root / "harness" / "records" / "run.py",
        root / "profiles" / "machine.py",
        root / "profiles" / "figures.py",
    ]
    files += [path for path in (root / "reports").rglob("*") if path.suffix in (".py", ".j2")]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    for key, text in messages().items():
        # Some keys are put together: a known beginning or end, and a word of a closed list.
        word = key.partition(".")[2]
        part = re.sub(
            r"^(key|checkpointing|in|tick|hub|poc|staged|production|below|beside|reading|target)_|"
            r"_(axis|measured|unknown|of_all|what|then|number|rows|memory|share)$",
            "",
            word,
        )
        words = {word, part, part.replace("_", " "), part.replace("_", " ").upper()}
        assert any(re.search(rf"(?<![a-z]){re.escape(one)}(?![a-z])", source) for one in words), key
        fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
        assert all(re.fullmatch(r"[a-z_]+", name) for name in fields), key
        assert text.isascii(), key


def test_every_figure_of_a_report_has_a_label() -> None:
    figures = {row.path for row in reported() if isinstance(row.find(make_machine()), Figure)}
    parts = tuple(f"machine.{part}." for part in ("gpu", "link", "cpu", "memory", "disk"))
    assert {f"machine.{path}" for path in figures} == {key for key in messages() if key.startswith(parts)}


def test_a_folder_that_may_not_be_written_is_one_line(sweep: Path) -> None:
    (sweep / "report.md").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(sweep)


def test_defaults_judge_where_there_are_no_criteria(cpu: Path) -> None:
    loaded = load_folder(cpu)
    verdict = judge(loaded, None)
    assert verdict.criteria_sha256 == default_criteria().sha256
    assert any("built-in defaults" in warning for warning in verdict.warnings)
    assert verdict.state == "GO"  # GPU memory counts neither way where there is no GPU


def test_reports_start_without_torch() -> None:
    code = (
        "import sys; import reports.render, reports.charts, harness.records.stats;"
        "print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "[]"


def test_a_clock_that_was_set_back_between_runs_is_told_in_order(tmp_path: Path) -> None:
    times = ["2026-11-22T00:01:00+00:00", "2026-11-21T23:59:00+00:00", "2026-11-21T23:58:00+00:00"]
    runs = [make_run(round=number, time=time) for number, time in enumerate(times, 1)]
    folder = write_folder(tmp_path / "sweep", runs)
    write_report(folder)
    told = (folder / "report.md").read_text()
    assert "2026-11-21 to 2026-11-22; runs/" in told
    assert "2026-11-21 23:58 UTC to 2026-11-22 00:01 UTC" in told
