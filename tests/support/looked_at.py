"""What must hold of a page in a browser: nothing is cut, nothing is asked for, the keyboard reaches whatever
scrolls, page one prints on one sheet of A4."""

from __future__ import annotations

from pathlib import Path

import chromium

WIDTHS = (360, 820, 1440)

CUT = """[...document.querySelectorAll('body *')].filter(one => {
  if (one.closest('.scroll') || one.closest('svg') || one.tagName === 'OPTION') return false;
  const box = one.getBoundingClientRect();
  return box.width > 0 && (box.right > document.documentElement.clientWidth + 1 || box.left < -1);
}).map(one => one.tagName + ' ' + one.className)"""
"""Elements that reach beyond the page."""

DRAWN_OVER = """[...document.querySelectorAll('svg')].flatMap(one => {
  const box = one.viewBox.baseVal;
  return [...one.querySelectorAll('text')].filter(text => {
    const found = text.getBBox();
    return found.x < -1 || found.x + found.width > box.width + 1 || found.y + found.height > box.height + 1;
  }).map(text => text.textContent);
})"""
"""Texts of charts that reach beyond their chart."""

UNREACHED = """[...document.querySelectorAll('body *')].filter(one => {
  const style = getComputedStyle(one);
  const scrolls = ['auto', 'scroll'].includes(style.overflowX) && one.scrollWidth > one.clientWidth + 1;
  return scrolls && (one.tabIndex < 0 || !one.getAttribute('aria-label'));
}).map(one => one.tagName + ' ' + one.className)"""
"""What scrolls sideways and the keyboard does not stop at, or has no name for a screen reader."""

A4_WIDTH, A4_HEIGHT = 688, (297 - 24) / 25.4 * 96
"""Less the margins."""


def faults(browser: chromium.Browser, path: Path, width: int, *, dark: bool) -> list[str]:
    """Of the page at `path` in a window of that width; the browser shows it afterwards."""
    browser.requested.clear()
    browser.open(path, width=width, dark=dark)
    found = []
    if (wide := browser.evaluate("document.documentElement.scrollWidth")) > width:
        found.append(f"is {wide} wide")
    found += [f"cut: {one}" for one in browser.evaluate(CUT)]
    found += [f"drawn over: {one}" for one in browser.evaluate(DRAWN_OVER)]
    found += [f"not reached by the keyboard: {one}" for one in browser.evaluate(UNREACHED)]
    found += [f"asked for: {one}" for one in browser.requested]
    return found


def height_printed(browser: chromium.Browser, path: Path) -> float:
    """Of page one at the width of A4, in units of which a sheet has `A4_HEIGHT`."""
    browser.open(path, width=A4_WIDTH)
    browser.call("Emulation.setEmulatedMedia", media="print")
    height: float = browser.evaluate("document.querySelector('section.page').getBoundingClientRect().height")
    browser.call("Emulation.setEmulatedMedia", media="")
    return height
