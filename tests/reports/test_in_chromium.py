"""Pages as a browser shows them: nothing is cut, nothing is asked for, the keyboard reaches what scrolls, and
page one prints on one sheet. Skipped where there is no Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest

from profiles.language import Language
from reports.criteria import init_text
from reports.load import load_folder
from reports.render import page, write_report
from reports.sharing.public_page import public_page, rows_of
from reports.sharing.submission import submission_of
from run_records import make_machine, make_sweep, write_folder

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="there is no Chromium here")

CUT = """[...document.querySelectorAll('body *')].filter(one => {
  if (one.closest('.scroll') || one.closest('svg')) return false;
  return one.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
}).map(one => one.tagName + ' ' + one.className)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Browser]:
    with chromium.browser() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("pages") / "sweep"
    write_folder(where, make_sweep(), machine=make_machine(), criteria=init_text("cost"))
    write_report(where)
    write_report(where, language="ja")
    return where


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("width", [360, 820, 1440])
def test_nothing_is_cut_and_nothing_is_asked_for(
    language: Language, width: int, browser: chromium.Browser, folder: Path
) -> None:
    papers = set()
    for dark in (False, True):
        browser.open(page(folder, language), width=width, dark=dark)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(CUT) == []
        papers.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2
    assert browser.requested == []


def test_the_keyboard_reaches_whatever_scrolls(browser: chromium.Browser, folder: Path) -> None:
    browser.open(page(folder, "en"), width=360)
    unreachable = """[...document.querySelectorAll('.scroll')].filter(
      one => one.scrollWidth > one.clientWidth
      && (one.tabIndex < 0 || !one.getAttribute('aria-label'))).length"""
    assert browser.evaluate(unreachable) == 0
    assert browser.evaluate("[...document.querySelectorAll('.hint')].some(one => one.offsetHeight > 0)")
    found = "document.activeElement.classList.contains('scroll')"
    for _ in range(40):
        browser.press("Tab", 9)
        if browser.evaluate(
            f"{found} && document.activeElement.scrollWidth > document.activeElement.clientWidth"
        ):
            break
    assert browser.evaluate(found)
    browser.press("ArrowRight", 39)
    moved = "new Promise(done => setTimeout(() => done(document.activeElement.scrollLeft), 400))"
    assert browser.evaluate(moved) > 0


@pytest.mark.parametrize("language", ["en", "ja"])
def test_page_one_prints_on_one_sheet(language: Language, browser: chromium.Browser, folder: Path) -> None:
    """At the width of A4 less its margins, with what print hides hidden."""
    browser.open(page(folder, language), width=688)
    browser.call("Emulation.setEmulatedMedia", media="print")
    height = browser.evaluate("document.querySelector('section.page').getBoundingClientRect().height")
    assert height <= (297 - 24) / 25.4 * 96
    browser.call("Emulation.setEmulatedMedia", media="")
    assert browser.pdf().startswith(b"%PDF")


def test_the_public_page_filters(browser: chromium.Browser, folder: Path, tmp_path: Path) -> None:
    rows = rows_of(submission_of(load_folder(folder)), "x/report.html", "report")
    there = tmp_path / "index.html"
    there.write_text(public_page(rows), encoding="utf-8")
    browser.open(there, width=820)
    shown = "[...document.querySelectorAll('tbody tr')].filter(one => !one.hidden).length"
    assert browser.evaluate(shown) == len(rows) == 3
    browser.evaluate(
        "(() => { const one = document.querySelector('[data-key=method]'); one.value = 'lsp';"
        " one.dispatchEvent(new Event('input')); })()"
    )
    assert browser.evaluate(shown) == 1
    assert browser.evaluate("document.querySelector('#count').textContent") == "1"
    assert browser.requested == []
