"""README.md and overview.svg of a folder of published results: all of its tables as one, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engines import YARDSTICK
from engines.errors import UserError
from engines.settings.parse import defaults
from engines.settings.zeroth_order import MezoSettings
from harness.records.job import Job
from harness.records.stats import Rounds, counted_step_s, outer_deciles, ratio
from harness.runs.decoding_runs import GenerationRun, load_generation
from profiles.documents import write_whole
from profiles.planning.plan import Plan
from profiles.units import NOT_MEASURED, format_bytes, format_seconds
from reports import charts
from reports.format import GIB, digits, loss, model_name, model_title, number, percent, span, times
from reports.load import Broken, Loaded, engine_order, load_folder
from reports.messages import say
from reports.metrics import Measurements, ends, floor_share, gpu_taken_bytes, group
from reports.render import markdown_text
from reports.tables import typical

KINDS = ("runs", "generations")
VARIANTS = (
    "base", "train", "estimator", "noise", "queries", "layer_share", "disk_blocks", "projector", "offload",
    "schedule_order",
)  # fmt: skip
"""Settings that make another method of an engine."""
ABOUT = "about.txt"
"""In a published folder: a sentence on what it is for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One method of one folder."""

    folder: str
    model: str
    job: str
    machine: str
    parameters: int
    engine: str
    variant: str
    """Settings that make another method of the engine, as `--set` takes them; empty for none."""
    traced: bool
    began: str
    """Time of the first run, ISO 8601."""
    rounds: Rounds
    all_: Measurements

    @property
    def subject(self) -> tuple[str, str, str, str, str, bool]:
        """What it measures: a later one of the same takes its place in the picture."""
        return self.model, self.job, self.machine, self.variant, self.engine, self.traced


def write_index(folder: Path, on_broken: Callable[[Broken], None] = lambda broken: None) -> tuple[Path, Path]:
    """Write the two files into `folder`, and say where they are. The same folder gives the same bytes.

    `on_broken` is told of each file that is left out, named from `folder` on.
    Raises `UserError` if nothing is published there.
    """
    folders = published_folders(folder)
    found = [each for path in folders if any(path.glob("runs/*.json")) for each in published(path, on_broken)]
    found.sort(key=lambda each: (each.parameters, each.model, each.folder))  # engines stay in order
    generated = [
        (path.name, load_generation(file))
        for path in folders
        for file in sorted(path.glob("generations/*.json"))
    ]
    generated.sort(key=lambda one: (one[1].model.parameters, one[0], one[1].job["batch_size"], one[1].id))
    page, picture = folder / "README.md", folder / "overview.svg"
    write_whole(picture, overview(found))
    write_whole(page, index(found, generated, abouts(folder)))
    return page, picture


def published_folders(folder: Path) -> list[Path]:
    """The subfolders of `folder` that hold records, by name. Raises `UserError` if there is none."""
    found = [
        path for path in sorted(folder.glob("*")) if any(any(path.glob(f"{kind}/*.json")) for kind in KINDS)
    ]
    if not found:
        raise UserError(
            str(folder), "holds no published runs (*/runs/*.json)", "name a folder such as reports/results"
        )
    return found


def published(folder: Path, on_broken: Callable[[Broken], None] = lambda broken: None) -> Iterator[Published]:
    """Every method of one folder, native first. Raises `UserError` as `load_folder` does."""
    loaded = load_folder(folder)
    for broken in loaded.broken:
        on_broken(replace(broken, file=f"{folder.name}/{broken.file}"))
    all_ = group(loaded.runs, loaded.machine)
    for engine in sorted(all_.rounds, key=engine_order):
        rounds = all_.of(engine)
        yield Published(
            folder=folder.name,
            model=model_title(loaded.job.model),
            job=_job_in_short(loaded.job),
            machine=_machine(loaded, rounds),
            parameters=rounds.runs[0].model.parameters,
            engine=engine,
            variant=variant(rounds.runs[0].plan),
            traced=any(run.traced for run in rounds.runs),
            began=min(run.time for run in rounds.runs),
            rounds=rounds,
            all_=all_,
        )


def abouts(folder: Path) -> dict[str, str]:
    """What each published folder says of itself, by its name."""
    return {
        path.name: (path / ABOUT).read_text(encoding="utf-8").strip()
        for path in published_folders(folder)
        if (path / ABOUT).exists()
    }


def index(
    found: Sequence[Published], generated: Sequence[tuple[str, GenerationRun]], about: dict[str, str]
) -> str:
    """Markdown. `generated` are records with their folder."""
    columns = ("model", "job", "machine", "method", "step_s", "ratio", "floor", "gpu", "host", "loss")
    align = ["---"] * 4 + ["---:"] * 6
    head = [[say(f"index.{column}") for column in columns], align]
    rows = [*head, *(_cells(each) for each in found)] if found else []
    lines = [
        f"# {say('index.title')}", "", say("index.intro"), "", f"![{say('index.picture')}](overview.svg)", "",
        *(f"| {' | '.join(row)} |" for row in rows), "",
    ]  # fmt: skip
    if generated:
        lines += [f"## {say('index.generating')}", "", *_generation_lines(generated), ""]
    reported = {each.folder for each in found}
    for name, text in about.items():
        where = f"{name}/report.md" if name in reported else name
        lines.append(f"- [{name}]({where}): {markdown_text(text)}")
    return "\n".join(lines).rstrip("\n") + "\n"


def variant(plan: Plan) -> str:
    """Those of `VARIANTS` that a run had otherwise than by default, as `--set` takes them."""
    settings, usual = plan.settings.typed, defaults(plan.engine).typed
    names = [name for name in VARIANTS if getattr(settings, name, None) != getattr(usual, name, None)]
    if isinstance(settings, MezoSettings) and settings.base != "full" and settings.train != "lora":
        names.append("fold_every")
    return ", ".join(f"{name}={getattr(settings, name)}" for name in names)


def newest(found: Sequence[Published]) -> list[Published]:
    """Of those that measure the same, the latest. In the order of `found`."""
    latest: dict[tuple[str, str, str, str, str, bool], Published] = {}
    for each in found:
        if (before := latest.get(each.subject)) is None or before.began <= each.began:
            latest[each.subject] = each
    return [each for each in found if latest[each.subject] is each]


def overview(found: Sequence[Published]) -> str:
    """SVG: how near each step came to its floor, of the newest measurements that tell."""
    shown = [
        (each, share)
        for each in newest(found)
        if each.rounds.step_s is not None
        and not each.traced
        and (share := typical(each.rounds, floor_share)) is not None
    ]
    groups = []
    for head in dict.fromkeys((each.model, each.job, each.machine, each.variant) for each, _ in shown):
        mine = [one for one in shown if (one[0].model, one[0].job, one[0].machine, one[0].variant) == head]
        mine.sort(key=lambda one: engine_order(one[0].engine))
        groups.append(
            charts.BarGroup(
                label="",
                text=_joined(*head),
                rows=tuple(
                    charts.BarRow(
                        label=each.engine,
                        engine=each.engine,
                        parts=(charts.Part(value=100 * share),),
                        text=percent(share),
                    )
                    for each, share in mine
                ),
            )
        )
    drawn = charts.grouped_bars(
        say("index.picture"),
        say("index.described"),
        groups,
        lambda _: charts.Axis(name=say("index.axis"), unit="%"),
    )
    return charts.standalone(drawn)


def _cells(each: Published) -> list[str]:
    method = _joined(each.engine, each.variant)
    if each.traced:
        method = say("index.traced", engine=method)
    start = [
        f"[{markdown_text(each.model)}]({each.folder}/report.md)",
        *(markdown_text(text) for text in (each.job, each.machine, method)),
    ]
    rounds = each.rounds
    if rounds.step_s is None:
        return [*start, markdown_text(ends(rounds.runs)), *[NOT_MEASURED] * 5]
    beside = ratio(rounds.step_times, each.all_.of(YARDSTICK).step_times)
    gpu = [bytes_ for run in rounds.ok if (bytes_ := gpu_taken_bytes(run)) is not None]
    host = [bytes_ for run in rounds.ok if (bytes_ := run.summary.peak_host_bytes) is not None]
    return [
        *start,
        digits(rounds.step_s.median),
        times(beside.value) if beside else NOT_MEASURED,
        percent(typical(rounds, floor_share)),
        _gib(max(gpu, default=None)),
        _gib(max(host, default=None)),
        loss(rounds.loss_last),
    ]


def _generation_lines(generated: Sequence[tuple[str, GenerationRun]]) -> Iterator[str]:
    columns = ("model", "prompts", "machine", "method", "tokens", "range", "floor", "first", "gpu")
    yield f"| {' | '.join(say(f'index.{column}') for column in columns)} |"
    yield f"| {' | '.join(['---'] * 4 + ['---:'] * 5)} |"
    for folder, run in generated:
        seen, batch_size = run.summary, int(run.job["batch_size"])
        machine = run.environment.gpu_name or run.environment.cpu
        method = _joined(run.engine, variant(run.plan))
        cells = [
            f"[{markdown_text(model_name(run.model.name))}]({folder}/generations/{run.id}.json)",
            *(markdown_text(text) for text in (f"{batch_size} x {run.job['seq_len']}", machine, method)),
        ]
        fast_s, slow_s = outer_deciles(counted_step_s(run.samples))
        times_s = (seen.step_s_median, slow_s, fast_s)
        middle, low, high = (None if step_s is None else batch_size / step_s for step_s in times_s)
        first = format_seconds(run.first_token_s)
        cells += [
            number(middle) if run.end_state == "ok" else say(f"end.{run.end_state}"),
            NOT_MEASURED if low is None or high is None else span(digits(low), digits(high)),
            percent(seen.floor_share), first if run.tokens else say("index.with_start_up", value=first),
            _gib(seen.peak_gpu_reserved_bytes or seen.peak_gpu_allocated_bytes),
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _joined(*parts: str) -> str:
    """Those that say something."""
    return ", ".join(filter(None, parts))


def _gib(bytes_: int | None) -> str:
    return NOT_MEASURED if bytes_ is None else f"{bytes_ / GIB:.2f}"


def _machine(loaded: Loaded, rounds: Rounds) -> str:
    environment = rounds.runs[0].environment
    machine = environment.gpu_name or (loaded.machine.name if loaded.machine else environment.cpu)
    if environment.emulated is None:
        return machine
    return say("index.emulated", machine=machine, emulated=environment.emulated)


def _job_in_short(job: Job) -> str:
    told = say("index.job_told", batch=job.batch_size, seq_len=job.seq_len, dtype=job.dtype)
    if job.limits.vram_bytes is None:
        return told
    return say("index.job_capped", job=told, vram=format_bytes(job.limits.vram_bytes))
