"""What plans say of subspaces is what our own studies hold, with its range, and no more."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import fmean

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

from lsp_quality_tables import best_rate

from profiles.planning.lsp_quality import PLAIN, RESIDUAL, quality_reasons

ROOT = Path(__file__).parents[3]
METHODS = {0.25: "lsp block d=n/4", 0.5: "lsp block d=n/2", 0.75: "lsp block d=3n/4", 1.0: "lsp block d=n"}


def test_the_numbers_are_those_of_the_file() -> None:
    per_byte, accuracy = PLAIN
    rows = json.loads((ROOT / per_byte.source).read_text())["rows"]

    def spread(source: str, method: str, key: str) -> list[float]:
        rate = best_rate(rows, source, method)
        return [
            row["curve"][-1][key]
            for row in rows
            if (row["source"], row["method"], row["learning_rate"]) == (source, method, rate)
            and not row["timed"]
        ]

    native = fmean(math.exp(each) for each in spread("Llama 4 x 256, WikiText-2", "native", "loss"))
    for share, numbers in per_byte.found.items():
        losses = spread(per_byte.name, METHODS[share], "loss")
        behind = sorted(100 * (math.exp(each) / native - 1) for each in losses)
        assert numbers == pytest.approx((fmean(behind), behind[0], behind[2]), abs=0.06)
    native = fmean(spread(accuracy.name, "native", "accuracy"))
    for share, numbers in accuracy.found.items():
        points = sorted(100 * (native - each) for each in spread(accuracy.name, METHODS[share], "accuracy"))
        assert numbers == pytest.approx((fmean(points), points[0], points[2]), abs=0.06)


def test_the_numbers_of_the_residual_are_those_of_its_file() -> None:
    document = json.loads((ROOT / RESIDUAL.source).read_text())

    def losses(name: str) -> list[float]:
        rows = [row for row in document["rows"] if row["variant"] == name]
        rates = [row["rate"] for row in rows if row["seed"] == 1]
        return sorted(row["loss"] for row in rows if row["rate"] == rates[0])

    gain = document["start_loss"] - fmean(losses("native"))
    for share, part in ((0.25, "n/4"), (0.5, "n/2")):
        found = losses(f"block d={part}, residual")
        kept = sorted(100 * (document["start_loss"] - each) / gain for each in found)
        assert RESIDUAL.found[share] == pytest.approx((fmean(kept), kept[0], kept[2]), abs=0.06)


def test_what_was_not_studied_is_not_known() -> None:
    assert quality_reasons(0.2, 10**7, residual=False) == (
        "quality: d is 0.20 of n; below 0.25 n nothing was studied: not known",
    )
    assert "not known" not in " ".join(quality_reasons(0.5, 5 * 10**6, residual=False))
    assert quality_reasons(0.5, 7 * 10**9, residual=True)[-1] == "quality: of 7 B parameters it is not known"
