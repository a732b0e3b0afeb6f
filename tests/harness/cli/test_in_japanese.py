"""What commands with --lang print in Japanese: no sentence of theirs is left in English."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
from known_shapes import LAPTOP_CPU
from rich.console import Console
from typer.testing import CliRunner

from engines import public_engines
from engines.shapes import Workload
from harness.cli.app import app
from harness.cli.sweep_progress import ended_line
from harness.cli.tables import runs_table
from harness.models.configs import named_shape
from harness.records.job import DataKind
from harness.records.run import Run
from profiles.catalog import find_profile, machine_names
from profiles.display.tables import machine_table
from profiles.language import speaking, translated
from profiles.planning.recommend import recommend
from run_records import cpu_runs, emulated_run, make_failures, make_sweep, write_folder

OF_TEST_RECORDS = (
    "closed form on the rates of the machine profile", "12.5 GB of GPU memory are missing",
    "the loss of step 6 is not finite", "the child ended with code 1",
    "not done within 1800 s", "CUDA out of memory: tried to allocate 2.5 GB",
)  # fmt: skip
"""Which this program never writes, and a library's own."""

ROOT = Path(__file__).parents[3]
ENGLISH = re.compile(r"\b(?:the|and|of|is|are|was|not|that|with|for|no|to|a|in)\b [a-z]+")
JAPANESE = re.compile("[ぁ-んァ-ン一-龥]")
AS_TYPED = re.compile(r"lspzo-bench [^。、]*|--[a-z][^。、\uff08\uff09]*|'[^']*'|「[^」]*」")
"""Commands, flags and names stay as they are."""


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments, "--lang", "ja"], env={"COLUMNS": "1000"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "opt-1.3b", "--profile", "rtx-3090", "--examples", "9", "--what-if", "--engines", "zo2"],
        ["--model", "opt-13b", "--profile", "rtx-3060-12gb", "--explain", "--engines", "lsp,exact-offload"],
        ["--model", "opt-30b", "--profile", "rtx-a1000-laptop", "--dtype", "fp16"],
        ["--model", "llama-3.1-8b", "--profile", "t4", "--vram", "90GB"],
        ["--model", "opt-6.7b", "--profile", "l4", "--seq-len", "2048", "--batch-size", "8",
         "--target", "hours=8", "--steps", "50", "--engines", "mezo", "--power", "400W",
         "--price", "30JPY/kWh@2026-11-01"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_recommend_says_all_of_it(arguments: list[str]) -> None:
    for line in printed("recommend", *arguments).splitlines():
        left = ENGLISH.findall(AS_TYPED.sub("", line))
        assert left == [], line


def test_recommend_tells_of_a_file_in_japanese(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\nhello there,1\nbad,0\nfine day,1\n")
    flags = ("--profile", "rtx-3090", "--engines", "native", "--data", str(path))
    told = printed("recommend", "--model", "opt-125m", *flags)
    line = next(each for each in told.splitlines() if path.name in each and "\uff08" in each)
    assert ENGLISH.findall(AS_TYPED.sub("", line)) == []
    assert not {"labelled", "training", "held-out"} & set(re.findall("[a-z-]+", line))


def test_every_kind_of_data_is_in_japanese() -> None:
    with speaking("ja"):
        for kind in get_args(DataKind):
            if kind not in ("random", "builtin"):
                amounts = "6 training and 2 held-out examples, 33 training tokens (bytes)"
                told = translated(f"{kind} rows.txt: {amounts}")
                assert kind not in told
                assert "rows.txt\uff1a学習 6" in told


def test_data_says_all_of_it_but_tokens(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\nhello there,1\nbad,0\nfine day,1\n")
    flags = ("--model", "tiny-opt", "--seq-len", "20", "--examples", "1")
    lines = printed("data", str(path), *flags).splitlines()
    said = [line for line in lines if line and "\u00b7" not in line]
    assert len(said) >= 8
    for line in said:
        assert ENGLISH.findall(AS_TYPED.sub("", line)) == [], line
        assert JAPANESE.search(line) or line.startswith("ラベル"), line


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (
            "moments=int8: without it the job needs 79.5 GiB of host memory, 53.6 GiB are usable: "
            "25.9 GiB missing",
            ("主記憶が 79.5 GiB 必要",),
        ),
        (
            "needs 27.5 GiB of GPU memory, CUDA and fragmentation included, 24.0 GiB are usable: "
            "3.48 GiB missing and needs 61.0 GiB of pinned memory, 7.45 GiB are usable: 53.6 GiB missing "
            "and needs 111 GiB of host memory, 53.6 GiB are usable: 56.9 GiB missing",
            ("ピン留めメモリが 61.0 GiB 必要", "主記憶が 111 GiB 必要", "56.9 GiB 不足"),
        ),
        (
            "d=1152: the largest that hides and fits (200 M elements, host memory 1.01 s against 405 ms "
            "of GPU time and 923 ms of streaming)",
            ("主記憶の帯域 1.01 秒",),
        ),
    ],
)
def test_host_memory_is_an_amount_or_a_rate(told: str, words: tuple[str, ...]) -> None:
    with speaking("ja"):
        said = translated(told)
    assert all(each in said for each in words)
    assert ENGLISH.findall(said) == []
    assert "memory" not in said


@pytest.mark.parametrize("machine", ["rtx-a1000-laptop", "rtx-3090", "h200", "rtx-4090"])
def test_doctor_says_all_of_it(machine: str) -> None:
    for line in printed("doctor", "--profile", machine).splitlines()[2:]:
        assert ENGLISH.findall(AS_TYPED.sub("", line)) == [], line


def sentences_of_checks() -> list[str]:
    """What checks say without filling anything in: titles, causes, remedies, and why they do not judge."""
    found = []
    for path in sorted((ROOT / "profiles" / "doctor").glob("checks_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            values = [node.value] if isinstance(node, ast.keyword | ast.Return) else []
            values += [node.body, node.orelse] if isinstance(node, ast.IfExp) else []
            found += [
                one.value for one in values if isinstance(one, ast.Constant) and isinstance(one.value, str)
            ]
    return [one for one in found if " " in one]


def test_every_sentence_of_the_checks_is_translated() -> None:
    found = sentences_of_checks()
    assert len(found) > 60
    with speaking("ja"):
        assert [one for one in found if not JAPANESE.search(translated(one))] == []


NAMES = re.compile(
    r"[A-Z][\w.-]+(?: (?:[A-Z0-9][\w.,-]*|and|of))+|specifications|datasheet|whitepaper|appendix A[^\uff09]*"
)
"""Of datasheets and hardware, which stay as they are."""


@pytest.mark.parametrize("name", machine_names())
def test_the_table_of_a_probe_says_all_of_it(name: str) -> None:
    out = Console(file=io.StringIO(), width=1000)
    with speaking("ja"):
        out.print(machine_table(find_profile(Path(name))))
    assert isinstance(out.file, io.StringIO)
    for line in out.file.getvalue().splitlines()[1:]:
        cells = re.sub(r"\uff08[^\uff08]*\uff09", "", line)  # what a number is from: titles of datasheets
        assert ENGLISH.findall(cells) == [], line


def make_emulated() -> list[Run]:
    return [emulated_run("native"), emulated_run("zo2")]


@pytest.mark.parametrize("runs", [make_sweep, make_failures, cpu_runs, make_emulated])
def test_the_table_of_runs_and_its_notes_say_all_of_it(runs: Callable[[], list[Run]]) -> None:
    out = Console(file=io.StringIO(), width=1000)
    with speaking("ja"):
        out.print(runs_table(runs()))
        assert isinstance(out.file, io.StringIO)
        told = out.file.getvalue()
        for run in runs():
            told += translated(ended_line(run)) + "\n"
    for sentence in OF_TEST_RECORDS:
        told = told.replace(sentence, "")
    for line in told.splitlines():
        assert ENGLISH.findall(AS_TYPED.sub("", line)) == [], line


def test_notes_on_flags_and_files_are_in_japanese(tmp_path: Path) -> None:
    told = printed(
        "recommend", "--model", "opt-1.3b", "--profile", "rtx-3090", "--engines", "zo2", "--set", "lsp.d=64"
    )
    assert "その手法は実行しないため、何も変わりません" in told
    folder = write_folder(tmp_path / "sweep", make_sweep())
    (folder / "runs" / "broken.json").write_text("{")
    assert "注意: runs/broken.json は除外しました" in printed("report", str(folder))


def test_json_stays_english() -> None:
    told = printed("recommend", "--model", "opt-1.3b", "--profile", "rtx-3090", "--json")
    assert not JAPANESE.search(told)
    assert not JAPANESE.search(printed("doctor", "--profile", "rtx-3090", "--json"))


def test_plans_without_a_gpu_are_in_japanese() -> None:
    """What `zo2` plans there, and what disturbs figures of a busy CPU."""
    with speaking("ja"):
        for sentence in (
            "resident_blocks=0: there is no GPU to keep them on; all go the way they would to one",
            "fold_every=1: there is no link to relieve",
            "other processes kept 0.6 of 2 cores busy",
            "disturbed: other processes kept 0.6 of 2 cores busy",
            "no GPU, AMD EPYC",
            "this program's AdamW, bf16 weights, fp32 moments, 67108864 elements (896 MiB), 1 threads",
        ):
            shown = translated(sentence)
            assert JAPANESE.search(shown), shown
            assert not ENGLISH.search(shown), shown


@pytest.mark.parametrize("machine", ["rtx-3060-12gb", "t4", "h200", "none"])
def test_every_reason_of_plans_is_in_japanese(machine: str) -> None:
    """Of jobs that fit, of those that do not, on several GPUs and with little host memory."""
    where = LAPTOP_CPU if machine == "none" else find_profile(Path(machine))
    works = (
        Workload(batch_size=4, seq_len=512),
        Workload(batch_size=1, seq_len=512, accumulation=4, dtype="fp16"),
    )
    limits = ((1, None), (1, 16 * 10**9), (2, None))[: 1 if machine == "none" else 3]
    told = set()
    for model, work, (gpus, host_bytes) in product(("llama-3.1-8b", "opt-66b", "gpt2"), works, limits):
        if model == "opt-66b" and gpus == 1 and machine != "h200":
            continue  # a third of the time, and told in no other words than the rest
        shape = named_shape(model)
        for plan in recommend(where, shape, work, public_engines(), {}, gpus=gpus, host_bytes=host_bytes):
            told |= {*plan.reasons, plan.why_not or "", plan.prediction.basis}
    with speaking("ja"):
        said = {each: translated(each) for each in told}
    left = {each: text for each, text in said.items() if ENGLISH.search(AS_TYPED.sub("", text))}
    assert not left
