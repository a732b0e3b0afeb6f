"""Opens pages in headless Chromium at three widths, light and dark, and says what is wrong with them.

    python tests/studies/look_at_pages.py reports/results/index*.html reports/results/*/*.html --to SHOTS

`lspzo-bench report FOLDER --lang ja` and `report --index reports/results` make these pages. Each has a line:
ok, or its faults (something is cut, asked for, not reached by the keyboard, page one longer than a sheet of
A4). With `--to` a picture of each window is kept, and a PDF. Exit code 1 on a fault.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import chromium
from looked_at import A4_HEIGHT, WIDTHS, faults, height_printed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--to", type=Path)
    asked = parser.parse_args()
    if chromium.PROGRAM is None:
        print("there is no Chromium here: apt-get install chromium")
        return 1
    bad = 0
    with chromium.browser() as browser:
        for path in asked.pages:
            name = f"{path.parent.name}-{path.stem}"
            found = []
            for width in WIDTHS:
                for dark in (False, True):
                    seen = faults(browser, path, width, dark=dark)
                    found += [f"at {width}{' dark' if dark else ''}: {one}" for one in seen]
                    if asked.to is not None:
                        asked.to.mkdir(parents=True, exist_ok=True)
                        shown = asked.to / f"{name}-{width}{'d' if dark else ''}.png"
                        browser.screenshot(shown, whole=width == 1440 and not dark)
            if browser.evaluate("document.querySelector('section.page') !== null"):
                height = height_printed(browser, path)
                if height > A4_HEIGHT:
                    found.append(f"page one takes {height / A4_HEIGHT:.2f} sheets")
                if asked.to is not None:
                    (asked.to / f"{name}.pdf").write_bytes(browser.pdf())
            bad += bool(found)
            print(f"{path}: {'; '.join(dict.fromkeys(found)) or 'ok'}")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
