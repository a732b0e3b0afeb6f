"""README.md, overview.svg and the two index pages of a folder of published results: its tables as one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from markupsafe import Markup

from engines import YARDSTICK
from engines.files.reading import exists, read_text
from harness.records.columns import SECONDS, CellValue, Column, RowT, Unit, table_cells
from harness.records.memory_limits import gpu_taken_bytes
from harness.records.run import load_run
from harness.records.stats import SAME_FACTOR, ratio
from profiles.documents import write_whole
from profiles.language import speaking
from profiles.units import format_seconds
from reports.charts.axes import Axis
from reports.charts.bars import BarGroup, BarPart, BarRow, grouped_bars
from reports.charts.marks import standalone
from reports.format import (
    GIB,
    LOSS,
    NUMBER,
    PERCENT,
    TIMES,
    digits,
    middle,
    model_name,
    number,
    percent,
    span,
    times,
)
from reports.load import Broken, engine_order
from reports.measured.measurements import ends, floor_share, largest, typical
from reports.messages import say
from reports.render import markdown_text
from reports.sharing.public_page import PAGES, public_page, public_rows
from reports.sharing.published import (
    Generated,
    IndexRowT,
    Published,
    gpu_or_cpu,
    newest,
    published,
    published_folders,
    variant,
)
from reports.studies.read import ABOUT, is_study

GIBIBYTES = Unit(show=lambda bytes_: f"{bytes_ / GIB:.2f}")
"""Of a column whose heading names the unit."""


def write_index(folder: Path, on_broken: Callable[[Broken], None] = lambda broken: None) -> tuple[Path, Path]:
    """Write README.md, overview.svg, index.html and index.ja.html into `folder`. Returns where the first two
    are. The same folder gives the same bytes.

    `on_broken` is called with each file that is left out, named from `folder` on.
    Raises `UserError` if nothing is published there.
    """
    folders = published_folders(folder)
    found = [each for path in folders if any(path.glob("runs/*.json")) for each in published(path, on_broken)]
    found.sort(key=lambda each: (each.parameters, each.model, each.folder))  # engines stay in order
    generated = [
        Generated(folder=path.name, run=load_run(file, "decode"))
        for path in folders
        for file in sorted(path.glob("generations/*.json"))
    ]
    generated.sort(key=lambda each: (each.run.model.parameters, each.folder, each.sequences, each.run.id))
    page, picture = folder / "README.md", folder / "overview.svg"
    for language, name in PAGES.items():
        with speaking(language):
            write_whole(folder / name, public_page(public_rows(folder, folders)))
    write_whole(picture, overview(found))
    studies = {path.name for path in folders if is_study(path)}
    write_whole(page, index(found, generated, abouts(folder), studies))
    return page, picture


def abouts(folder: Path) -> dict[str, str]:
    """What each published folder says of itself, by its name."""
    return {
        path.name: read_text(path / ABOUT, "text on published results").strip()
        for path in published_folders(folder)
        if exists(path / ABOUT)
    }


def index(
    found: Sequence[Published],
    generated: Sequence[Generated],
    about: dict[str, str],
    studies: Collection[str] = (),
) -> str:
    """Markdown: the newest record of each job and method, trained and decoded; the others folded away."""
    lines = [
        f"# {say('index.title')}", "", say("index.intro"), "", f"![{say('index.picture')}](overview.svg)", "",
        *_newest_first(METHODS, found),
    ]  # fmt: skip
    if generated:
        lines += [f"## {say('index.generating')}", "", *_newest_first(GENERATIONS, generated)]
    reported = {each.folder for each in found} | set(studies)
    for name, text in about.items():
        where = f"{name}/report.md" if name in reported else name
        lines.append(f"- [{name}]({where}): {markdown_text(text)}")
    return "\n".join(lines).rstrip("\n") + "\n"


def overview(found: Sequence[Published]) -> str:
    """SVG: how near each step came to its floor, of the newest measurements that tell."""
    shown = [
        (each, share)
        for each in newest(found)
        if each.rounds.step_s is not None
        and not each.traced
        and (share := typical(each.rounds, floor_share)) is not None
        and share <= 1  # above, the floor was predicted wrong: no result to show
    ]
    groups = []
    for head in dict.fromkeys((each.model, each.job, each.machine, each.variant) for each, _ in shown):
        mine = [one for one in shown if (one[0].model, one[0].job, one[0].machine, one[0].variant) == head]
        mine.sort(key=lambda one: engine_order(one[0].engine))
        groups.append(
            BarGroup(
                label="",
                text=_joined(*head),
                rows=tuple(
                    BarRow(
                        label=each.engine,
                        engine=each.engine,
                        parts=(BarPart(value=100 * share),),
                        text=percent(share),
                    )
                    for each, share in mine
                ),
            )
        )
    drawn = grouped_bars(
        say("index.picture"),
        say("index.described"),
        groups,
        lambda _: Axis(name=say("index.axis"), unit="%"),
    )
    return standalone(drawn)


def _newest_first(columns: Sequence[Column[IndexRowT]], found: Sequence[IndexRowT]) -> Iterator[str]:
    """A table of the newest, then one of what they took the place of, folded away."""
    latest = newest(found)
    yield from _markdown_lines(columns, latest)
    yield ""
    if earlier := [each for each in found if not any(each is kept for kept in latest)]:
        yield from ("<details>", f"<summary>{say('index.earlier', count=len(earlier))}</summary>", "")
        yield from _markdown_lines(columns, earlier)
        yield from ("", "</details>", "")


def _markdown_lines(columns: Sequence[Column[RowT]], rows: Sequence[RowT]) -> Iterator[str]:
    """A table; nothing where it has no row."""
    if not rows:
        return
    here, cells = table_cells(columns, rows)
    yield f"| {' | '.join(say(f'index.{column.key}') for column in here)} |"
    yield f"| {' | '.join('---:' if column.unit.is_numeric else '---' for column in here)} |"
    for row in cells:
        yield f"| {' | '.join(markdown_text(cell) for cell in row)} |"


def _link(text: str, target: str) -> Markup:
    return Markup(f"[{markdown_text(text)}]({target})")


def _method(each: Published) -> str:
    method = _joined(each.engine, each.variant)
    return say("index.traced", engine=method) if each.traced else method


def _share(share: float | None) -> CellValue:
    """Above 100 % it is not a share but a floor that was predicted wrong."""
    return share if share is None or share <= 1 else say("index.floor_wrong", share=percent(share))


def _if_timed(of: Callable[[Published], CellValue]) -> Callable[[Published], CellValue]:
    """Nothing where no step of the method was timed."""
    return lambda each: None if each.rounds.step_s is None else of(each)


def _step_s(each: Published) -> CellValue:
    """Its median in seconds, both of two runs, or how the runs ended; beside it what a step of a long job
    takes on average, where that is more."""
    found, lasting_s = each.rounds.step_s, each.rounds.lasting_step_s
    if found is None:
        return ends(each.rounds.runs)
    if lasting_s is not None and lasting_s >= SAME_FACTOR * found.median:
        return say("index.lasting", step=middle(found, number), lasting=number(lasting_s))
    return middle(found, number) if found.count == 2 else found.median


def _beside_native(each: Published) -> CellValue:
    native = each.all_.of(YARDSTICK)
    found = ratio(each.rounds.lasting_step_times, native.lasting_step_times)
    if found is None:
        return None
    has_two = min(len(each.rounds.ok), len(native.ok)) == 2
    return span(times(found.low), times(found.high)) if has_two and each.engine != YARDSTICK else found.value


def _host_bytes(each: Published) -> float | None:
    return largest(each.rounds, lambda run: run.summary.peak_host_bytes)


METHODS: tuple[Column[Published], ...] = (
    Column("model", lambda each: _link(each.model, f"{each.folder}/report.md")),
    Column("job", lambda each: each.job),
    Column("machine", lambda each: each.machine),
    Column("method", _method),
    Column("step_s", _step_s, NUMBER),
    Column("ratio", _if_timed(_beside_native), TIMES),
    Column("floor", _if_timed(lambda each: _share(typical(each.rounds, floor_share))), PERCENT),
    Column("gpu", _if_timed(lambda each: largest(each.rounds, gpu_taken_bytes)), GIBIBYTES),
    Column("host", _if_timed(_host_bytes), GIBIBYTES),
    Column("loss", _if_timed(lambda each: each.rounds.loss_last), LOSS),
)


def _tokens(each: Generated) -> CellValue:
    """Its median per second, or how the run ended."""
    return each.tokens_per_s[0] if each.run.end_state == "ok" else say(f"end.{each.run.end_state}")


def _range(each: Generated) -> str | None:
    _, low, high = each.tokens_per_s
    return None if low is None or high is None else span(digits(low), digits(high))


def _first_token(each: Generated) -> CellValue:
    """Records of before `tokens` was kept timed the first prefill of a process."""
    first_s = each.run.first_token_s
    return first_s if each.run.tokens else say("index.with_start_up", value=format_seconds(first_s))


def _gpu_bytes(each: Generated) -> int | None:
    seen = each.run.summary
    return seen.peak_gpu_reserved_bytes or seen.peak_gpu_allocated_bytes


GENERATIONS: tuple[Column[Generated], ...] = (
    Column(
        "model",
        lambda each: _link(model_name(each.run.model.name), f"{each.folder}/generations/{each.run.id}.json"),
    ),
    Column("prompts", lambda each: f"{each.sequences} x {each.run.job['seq_len']}"),
    Column("machine", lambda each: gpu_or_cpu(each.run)),
    Column("method", lambda each: _joined(each.run.engine, variant(each.run))),
    Column("tokens", _tokens, NUMBER),
    Column("range", _range, NUMBER),
    Column("floor", lambda each: _share(each.run.summary.floor_share), PERCENT),
    Column("first", _first_token, SECONDS),
    Column("gpu", _gpu_bytes, GIBIBYTES),
)


def _joined(*parts: str) -> str:
    """Those that say something."""
    return ", ".join(filter(None, parts))
