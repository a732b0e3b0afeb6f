"""Reports in Japanese: every sentence has one, with the same names to fill in, and numbers are the same."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any, get_args

import pytest

from engines import ENGINES
from harness.records.run import load_run
from profiles.documents import adapter
from profiles.language import Language, filled, quantity, sentences, speaking, translated
from profiles.planning.plan import Plan
from reports.load import load_folder
from reports.messages import several_items
from reports.render import render_html, render_markdown, write_report, written
from run_records import cpu_runs, make_failures, make_machine, make_plan, make_sweep, write_folder

ROOT = Path(__file__).parents[2]
ENGLISH = re.compile(r"\b(the|and|of|is|are|was|were|not|that|with)\b [a-z]+ [a-z]+")
"""Three words of a sentence in a row."""


OF_TEST_RECORDS = (
    "closed form on the rates of the machine profile", "the machine's memory", "physical cores",
    "12.5 GB of GPU memory are missing", "the loss of step 6 is not finite", "the child ended with code 1",
    "not done within 1800 s",
)  # fmt: skip
"""Which this program never writes."""


def names(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("language", get_args(Language))
def test_every_sentence_is_there_in_every_language(language: str) -> None:
    english, other = sentences("reports", "en"), sentences("reports", language)  # type: ignore[arg-type]
    assert list(english) == sorted(english, key=list(english).index)
    assert set(other) == set(english)
    assert {key: names(text) for key, text in other.items()} == {
        key: names(text) for key, text in english.items()
    }


@pytest.fixture(params=["sweep", "failures", "cpu"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    runs = {"sweep": make_sweep, "failures": make_failures, "cpu": cpu_runs}[request.param]()
    plans = [make_plan("native"), make_plan("zo2"), make_plan("torchao-offload", fits=False)]
    return write_folder(tmp_path / request.param, runs, machine=make_machine(), plans=plans)


def test_the_same_numbers_in_both(folder: Path) -> None:
    loaded = load_folder(folder)
    english = written(loaded, None)
    with speaking("ja"):
        japanese = written(loaded, None)
        markdown, html = render_markdown(japanese), render_html(japanese)
    assert japanese.verdict.state == english.verdict.state
    assert japanese.verdict.method == english.verdict.method
    assert [sheet.table.keys for sheet in japanese.document.sheets] == [
        sheet.table.keys for sheet in english.document.sheets
    ]
    for mine, other in zip(japanese.document.sheets, english.document.sheets, strict=True):
        for row, beside in zip(mine.table.values, other.table.values, strict=True):
            pairs = zip(row, beside, strict=True)
            assert [a for a, b in pairs if isinstance(a, float) and a != b] == [], mine.key
    assert '<html lang="ja">' in html
    assert "## 結論" in markdown
    # No sentence is left in English: three words of it in a row stand only in names, commands and code.
    told = re.sub(r"```.*?```|`[^`]*`|--[^、。|]*|lspzo-bench [^。|]*", "", markdown, flags=re.DOTALL)
    for sentence in OF_TEST_RECORDS:
        told = told.replace(sentence, "")
    assert ENGLISH.search(told) is None, told
    # Lists have the commas of the language, names its colon, and brackets around its words are its own.
    latin = re.compile(r"[ぁ-んァ-ン一-龥\uff09][,;:] |\([^)]*[ぁ-んァ-ン一-龥][^)]*\)")
    assert [line for line in told.splitlines() if latin.search(line)] == []
    assert not re.search(r"lspzo-bench [\d.]+, torch", markdown)


def kept_sentences() -> set[str]:
    """What this program wrote into plans, records and machines: of the golden plans, and as published."""
    found: set[str | None] = set()
    for case in json.loads((ROOT / "tests" / "golden" / "plans.json").read_text())["cases"].values():
        plans = [load_plan(values) for values in (case if isinstance(case, list) else case["plans"])]
        found |= {sentence for plan in plans for sentence in told_by(plan)}
    for path in sorted((ROOT / "reports" / "results").glob("*/runs/*.json")):
        found |= set(told_by(load_run(path).plan))
    for row in ENGINES.values():
        found |= {row.summary, row.trains}
    return {sentence for sentence in found if sentence}


def load_plan(values: Any) -> Plan:
    plan: Plan = adapter(Plan).validate_python(values)
    return plan


def told_by(plan: Plan) -> list[str | None]:
    told = plan.prediction
    return [*plan.reasons, plan.why_not, told.bottleneck, told.basis.rstrip(".")]


def test_sentences_of_plans_and_records_are_translated() -> None:
    with speaking("ja"):
        left = [one for one in kept_sentences() if not re.search("[ぁ-んァ-ン一-龥]", translated(one))]
        assert left == []
        mixed = [shown for one in kept_sentences() if ENGLISH.search(shown := translated(one))]
        assert mixed == []
    assert translated("all weights") == "all weights"


def test_both_are_written_side_by_side_and_json_stays_english(folder: Path) -> None:
    write_report(folder, language="ja")
    in_english = (folder / "report.md").read_text(encoding="utf-8")
    write_report(folder)
    assert (folder / "report.md").read_text(encoding="utf-8") == in_english
    before = (folder / "verdict.json").read_bytes()
    verdict = write_report(folder, language="ja")
    assert (folder / "verdict.json").read_bytes() == before
    assert re.search("[ぁ-ん]", verdict.sentence)
    japanese = (folder / "report.ja.md").read_text(encoding="utf-8")
    assert re.findall("^(?:- |#).*[ぁ-んァ-ヴー一-龥]: .*", japanese, re.MULTILINE) == []
    names_there = {path.name for path in folder.glob("report*")}
    assert names_there == {"report.md", "report.html", "report.json", "report.ja.md", "report.ja.html"}


def test_items_with_commas_of_their_own_are_told_apart() -> None:
    with speaking("ja"):
        assert several_items(["一", "二"]) == "一、二"
        assert several_items(["一、二", "三"]) == "一、二\uff1b三"
    assert several_items(["one, and two", "three"]) == "one, and two; three"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("3.10 s", "3.10 秒"),
        ("4.2 h", "4.2 時間"),
        ("12.5 ms", "12.5 ms"),
        ("22.4 GiB", "22.4 GiB"),
        ("1.80x", "1.80 倍"),
        ("not measured", "未測定"),
        ("2026-11-21", "2026年11月21日"),
        ("2026-11-21 10:11 UTC", "2026年11月21日 10:11 UTC"),
        ("3 s and more", "3 s and more"),
    ],
)
def test_quantities_are_written_as_is_the_custom(text: str, shown: str) -> None:
    assert quantity(text) == text
    with speaking("ja"):
        assert quantity(text) == shown


@pytest.mark.parametrize(
    ("value", "japanese"),
    [("1.2 倍", "損失が1.2 倍以下"), ("1.2", "損失が1.2 以下"), ("元の値", "損失が元の値以下")],
)
def test_no_blank_between_two_japanese_words(value: str, japanese: str) -> None:
    with speaking("ja"):
        assert filled("損失が{value} 以下", {"value": value}) == japanese
        assert filled("{value} の {count}", {"value": "全", "count": 3}) == "全の 3"
    assert filled("{value} or less", {"value": value}) == f"{value} or less"
