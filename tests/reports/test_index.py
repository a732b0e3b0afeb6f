"""The page and the picture of a folder of published results."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engines.base import LinkRates
from engines.decoding import Sampling
from engines.errors import UserError
from harness.cli.app import app
from harness.records.run import Emulation, EndState, Run
from profiles.documents import to_json
from reports.index import ABOUT, overview, write_index
from reports.sharing.published import newest, published, published_folders
from run_records import cpu_runs, make_breakdown, make_plan, make_run, make_sweep, make_test_job, write_folder

JOB = "2 x 512 bf16, 22.4 GiB of GPU memory"
START = f"| [opt-1.3b](opt_4090/report.md) | {JOB} | NVIDIA RTX 4090 |"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_folder(tmp_path / "opt_4090", make_sweep())
    write_folder(tmp_path / "b_cpu", cpu_runs(), job=make_test_job(limits={}))
    (tmp_path / "notes").mkdir()
    return tmp_path


def shown(folder: Path) -> str:
    return " ".join(ElementTree.fromstring(overview(list(published(folder)))).itertext())


def emulated(run: Run) -> Run:
    rates = LinkRates(h2d_bytes_per_s=2e9, d2h_bytes_per_s=1e9)
    held = Emulation(vram_bytes=4 * 10**9, threads=4, rates=rates, link="emulated")
    return replace(run, emulation=held, environment=replace(run.environment, emulated="a laptop"))


def generation(run: Run) -> Run:
    return replace(run, scenario="decode", sampling=Sampling(), first_token_s=0.7)


def test_every_method_of_every_folder_has_a_row(results: Path) -> None:
    (results / "opt_4090" / ABOUT).write_text("A [sweep].\n")
    page, _ = write_index(results)
    lines = page.read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 2 + 5
    assert f"{START} lsp | 0.909 and 0.918 | 1.78x to 1.82x | not measured | 8.38 | 20.49 | 1.8000 |" in table
    failed = "1 out of GPU memory, 1 not run, predicted not to fit"
    assert any(line.startswith(f"{START} mezo | {failed} | not measured |") for line in table)
    assert lines[-1] == "- [opt_4090](opt_4090/report.md): A \\[sweep\\]."


def test_the_same_folder_gives_the_same_bytes(results: Path) -> None:
    before = [path.read_bytes() for path in write_index(results)]
    assert [path.read_bytes() for path in write_index(results)] == before


def test_a_row_for_the_browser_leads_to_html_where_it_was_made(results: Path) -> None:
    """HTML is not kept with published runs; Markdown is."""
    folder = results / "opt_4090"
    for made, links in (
        ("report.md", ("report.md", "report.md")), ("report.ja.md", ("report.md", "report.ja.md")),
        ("report.html", ("report.html", "report.html")),
        ("report.ja.html", ("report.html", "report.ja.html")),
    ):  # fmt: skip
        (folder / made).write_text("")
        write_index(results)
        for name, link in zip(("index.html", "index.ja.html"), links, strict=True):
            assert f'href="opt_4090/{link}"' in (results / name).read_text(), (made, name)


def test_a_traced_run_is_told_and_not_drawn(tmp_path: Path) -> None:
    runs = [run for run in make_breakdown() if run.engine in ("mezo", "zo2")]
    runs = [replace(run, traced=run.engine == "zo2") for run in runs]
    write_folder(tmp_path / "one", runs)
    page, picture = write_index(tmp_path)
    assert "| zo2, traced |" in page.read_text()
    text = picture.read_text()
    assert "mezo" in text
    assert "zo2" not in text


def test_the_picture_shows_the_share_of_the_floor(tmp_path: Path) -> None:
    found = shown(write_folder(tmp_path / "one", make_breakdown()))
    for text in ("80 %", "75 %", f"opt-1.3b, {JOB}, NVIDIA RTX 4090"):
        assert text in found
    assert "lsp" not in found, "it has no floor"


def test_no_share_of_an_emulated_machines_floor(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "one", [emulated(run) for run in make_breakdown()])
    assert "zo2" not in shown(folder)
    page, _ = write_index(tmp_path)
    row = next(line for line in page.read_text().splitlines() if "| zo2 |" in line)
    assert "| a laptop, emulated on NVIDIA RTX 4090 | zo2 | 0.8 | 1.60x | not measured |" in row


def test_the_newest_of_the_same_is_drawn(tmp_path: Path) -> None:
    late = [replace(make_run(engine), time="2026-12-01T00:00:00+00:00") for engine in ("lsp", "zo2")]
    early = [replace(make_run(engine), time="2026-11-01T00:00:00+00:00") for engine in ("native", "zo2")]
    found = [
        *published(write_folder(tmp_path / "a", late)),
        *published(write_folder(tmp_path / "b", early)),
    ]
    assert [(each.folder, each.engine) for each in newest(found)] == [
        ("a", "lsp"), ("a", "zo2"), ("b", "native"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("end_state", "taken"), [("interrupted", "a"), ("not_available", "a"), ("oom_gpu", "b")]
)
def test_what_was_stopped_from_outside_takes_no_place(
    tmp_path: Path, end_state: EndState, taken: str
) -> None:
    """That a method does not fit any more does."""
    early = replace(make_run("lsp"), time="2026-11-01T00:00:00+00:00")
    late = replace(make_run("lsp", end_state=end_state), time="2026-12-01T00:00:00+00:00")
    found = [
        *published(write_folder(tmp_path / "a", [early])),
        *published(write_folder(tmp_path / "b", [late])),
    ]
    assert [each.folder for each in newest(found)] == [taken]
    assert [each.folder for each in newest(found[::-1])] == [taken]


@pytest.mark.parametrize(("again_s", "taken"), [(0.52, "a"), (0.48, "a"), (0.6, "b")])
def test_what_a_single_process_repeats_keeps_its_place(tmp_path: Path, again_s: float, taken: str) -> None:
    """Where they took another time, something has changed since."""
    early = [
        replace(make_run("lsp", round=each, step_s=(0.5,) * 8), time="2026-11-01T00:00:00+00:00")
        for each in (1, 2, 3)
    ]
    late = replace(make_run("lsp", step_s=(again_s,) * 8), time="2026-12-01T00:00:00+00:00")
    found = [
        *published(write_folder(tmp_path / "a", early)),
        *published(write_folder(tmp_path / "b", [late])),
    ]
    assert [each.folder for each in newest(found)] == [taken]
    assert [each.folder for each in newest(found[::-1])] == [taken]


def test_what_was_measured_again_is_folded_away(tmp_path: Path) -> None:
    late, early = "2026-12-01T00:00:00+00:00", "2026-11-01T00:00:00+00:00"
    write_folder(tmp_path / "a", [replace(make_run(engine), time=early) for engine in ("native", "zo2")])
    write_folder(tmp_path / "b", [replace(make_run("zo2"), time=late)])
    for name, time in (("a", early), ("b", late)):
        kept = tmp_path / name / "generations"
        kept.mkdir()
        (kept / "one.json").write_text(to_json(generation(replace(make_run("zo2"), time=time))))
    page, _ = write_index(tmp_path)
    tables, *folded = page.read_text().split("<details>")
    assert len(folded) == 2
    assert tables.count("(a/report.md)") == 1, "native alone"
    assert tables.count("(b/report.md)") == 1
    for part, row in zip(folded, ("(a/report.md)", "(a/generations/"), strict=True):
        assert part.startswith("\n<summary>Other records of the same jobs and methods: 1<")
        inside, after = part.split("</details>")
        assert inside.count(row) == 1
        assert row not in after.split("\n- ")[0]


def test_a_later_day_in_another_subspace_takes_no_place(tmp_path: Path) -> None:
    for name, d in (("a", "1280"), ("b", "1536")):
        job = make_test_job(settings={"lsp": {"d": d}})
        run = make_run("lsp", job=job, plan=make_plan("lsp", settings={"d": d}))
        write_folder(tmp_path / name, [run], job=job)
    found = [each for name in ("a", "b") for each in published(tmp_path / name)]
    assert [each.variant for each in newest(found)] == ["d=1280", "d=1536"]


def test_a_step_below_its_floor_is_no_bar(tmp_path: Path) -> None:
    runs = [make_run("zo2", floor_share=1.22), make_run("mezo", floor_share=0.8)]
    write_folder(tmp_path / "one", runs)
    page, picture = write_index(tmp_path)
    assert "| 122 %: floor predicted wrong |" in page.read_text()
    assert "zo2" not in picture.read_text()
    assert "mezo" in picture.read_text()


def test_generations_have_a_table_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "opt_gen" / "generations"
    folder.mkdir(parents=True)
    for batch_size, step_s in ((32, 0.5), (1, 0.4)):
        run = make_run(
            "zo2", job=make_test_job(batch_size=batch_size, seq_len=128), step_s=(step_s, step_s, 2 * step_s),
            floor_share=0.93,
        )  # fmt: skip
        (folder / f"{batch_size}.json").write_text(to_json(generation(run)))
    page, _ = write_index(tmp_path)
    lines = page.read_text().splitlines()
    rows = [line for line in lines if line.startswith("| [opt-1.3b]")]
    assert rows == [
        "| [opt-1.3b](opt_gen/generations/zo2-r1.json) | 1 x 128 | NVIDIA RTX 4090 | zo2 | 2.5 | 1.39 to 2.5 "
        "| 93 % | 700 ms, start-up included | 5.59 |",
        "| [opt-1.3b](opt_gen/generations/zo2-r1.json) | 32 x 128 | NVIDIA RTX 4090 | zo2 | 64 | 35.6 to 64 "
        "| 93 % | 700 ms, start-up included | 5.59 |",
    ]
    assert sum(line.startswith("| model |") for line in lines) == 1, "no runs, no table of them"


def test_the_command_writes_both_files(results: Path) -> None:
    told = CliRunner().invoke(app, ["report", "--index", str(results)])
    assert told.exit_code == 0
    assert told.stdout.split() == [str(results / "README.md"), str(results / "overview.svg")]


def test_a_folder_without_results_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match="no published runs"):
        published_folders(tmp_path)


def test_settings_that_make_another_method_are_told_and_drawn_apart(tmp_path: Path) -> None:
    usual = make_plan("zo2", settings={"resident_blocks": "3"})
    other = make_plan("zo2", settings={"base": "int8", "noise": "rademacher", "fold_every": 4})
    for name, plan in (("a", usual), ("b", other)):
        write_folder(tmp_path / name, [make_run("zo2", plan=plan, floor_share=0.5)])
    page, picture = write_index(tmp_path)
    text = page.read_text()
    assert "| NVIDIA RTX 4090 | zo2 | " in text
    assert "| NVIDIA RTX 4090 | zo2, base=int8, noise=rademacher, fold_every=4 | " in text
    assert "base=int8, noise=rademacher, fold_every=4" in picture.read_text()
    found = [each for name in ("a", "b") for each in published(tmp_path / name)]
    assert len(newest(found)) == 2


def test_a_setting_that_is_gone_still_makes_another_method(tmp_path: Path) -> None:
    plan = make_plan("zo2", settings={"layer_share": 0.5, "queries": 2})
    write_folder(tmp_path / "old", [make_run("zo2", plan=plan)])
    page, _ = write_index(tmp_path)
    assert "| zo2, layer_share=0.5, queries=2 | " in page.read_text()


def test_a_folder_without_a_report_is_linked_itself(tmp_path: Path) -> None:
    folder = tmp_path / "opt_gen"
    (folder / "generations").mkdir(parents=True)
    (folder / "generations" / "one.json").write_text(to_json(generation(make_run("zo2"))))
    (folder / ABOUT).write_text("Prompts.\n")
    page, _ = write_index(tmp_path)
    assert page.read_text().splitlines()[-1] == "- [opt_gen](opt_gen): Prompts."
