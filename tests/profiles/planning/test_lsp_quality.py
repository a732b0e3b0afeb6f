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
from smollm2_tables import methods_of

from profiles.language import speaking, translated
from profiles.planning.lsp_quality import PLAIN, RESIDUAL, quality_reasons

ROOT = Path(__file__).parents[3]
METHODS = {0.25: "lsp block d=n/4", 0.5: "lsp block d=n/2", 0.75: "lsp block d=3n/4", 1.0: "lsp block d=n"}


def test_the_numbers_are_those_of_the_file() -> None:
    per_byte, accuracy, *_ = PLAIN
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
    study, _ = RESIDUAL
    document = json.loads((ROOT / study.source).read_text())

    def losses(name: str) -> list[float]:
        rows = [row for row in document["rows"] if row["variant"] == name]
        rates = [row["rate"] for row in rows if row["seed"] == 1]
        return sorted(row["loss"] for row in rows if row["rate"] == rates[0])

    gain = document["start_loss"] - fmean(losses("native"))
    for share, part in ((0.25, "n/4"), (0.5, "n/2")):
        found = losses(f"block d={part}, residual")
        kept = sorted(100 * (document["start_loss"] - each) / gain for each in found)
        assert study.found[share] == pytest.approx((fmean(kept), kept[0], kept[2]), abs=0.06)


def test_the_numbers_on_real_weights_are_those_of_the_records() -> None:
    by_label = {each.label: each.tests for each in methods_of("SST-2, bf16")}
    native = fmean(by_label["native"])
    labels = {0.25: "lsp, d = n/4", 0.5: "lsp, d = n/2", 0.75: "lsp, d = 3n/4"}
    cells = [(PLAIN[2], share, label) for share, label in labels.items()]
    for study, share, label in (*cells, (RESIDUAL[1], 0.25, "lsp, d = n/4, residual=1")):
        assert (ROOT / study.source).is_file()
        points = sorted(100 * (native - each) for each in by_label[label])
        assert study.found[share] == pytest.approx((fmean(points), points[0], points[2]), abs=0.06)


def test_the_numbers_on_other_tasks_are_those_of_the_records() -> None:
    tasks = (
        "SST-2, fp32, chosen by the loss",
        "WikiText-2, bf16",
        "Instruction records, bf16",
        "MRPC, bf16",
        "CoLA, bf16",
    )
    named = {
        "accuracy": "accuracy",
        "Matthews correlation": "matthews",
        "per token": "perplexity_per_token",
    }
    for study, task in zip(PLAIN[3:], tasks, strict=True):
        assert task.split(",")[0].lower() in study.name.lower()
        by_label = {each.label: each for each in methods_of(task)}
        whole_of, half_of = (
            [(each.learned.test or {})[named[study.unit]] for each in by_label[label].finals]
            for label in (study.whose.removesuffix("'s"), "lsp, d = n/2")
        )
        whole = fmean(whole_of)
        if study.unit == "per token":
            behind = sorted(100 * (each / whole - 1) for each in half_of)
        else:
            behind = sorted(100 * (whole - each) for each in half_of)
        assert study.found == {0.5: pytest.approx((fmean(behind), behind[0], behind[2]), abs=0.06)}
    assert [each.whose for each in PLAIN[3:]] == ["native's"] * 2 + ["exact-offload's"] * 3


def test_a_size_that_a_study_lacks_is_not_told_of_it() -> None:
    told = " ".join(quality_reasons(1.0, 135 * 10**6, residual=False))
    assert "SmolLM2" not in told
    assert "not known" in told
    known = quality_reasons(0.5, 135 * 10**6, residual=False)
    assert "not known" not in " ".join(known)
    assert "0.4 points (-0.1 to 0.7) above native's accuracy" in known[-6]
    assert "0.1 points (-0.2 to 0.4) above native's accuracy" in known[-5]
    assert "0.1 % (-0.2 to 0.4) above native's perplexity per token" in known[-4]
    assert "0.1 % (-0.4 to 0.9) below exact-offload's perplexity per token" in known[-3]
    assert "2.8 points (1.7 to 3.6) below exact-offload's accuracy" in known[-2]
    assert "6.2 points (1.8 to 13.3) below exact-offload's Matthews correlation" in known[-1]
    assert "SmolLM2" in quality_reasons(0.25, 10**6, residual=True)[-1]


def test_what_was_not_studied_is_not_known() -> None:
    assert quality_reasons(0.2, 10**7, residual=False) == (
        "quality: d is 0.20 of n; below 0.25 n nothing was studied: not known",
    )
    assert "not known" not in " ".join(quality_reasons(0.5, 5 * 10**6, residual=False))
    assert quality_reasons(0.5, 7 * 10**9, residual=True)[-1] == "quality: of 7 B parameters it is not known"


def test_a_study_whose_name_has_brackets_is_told_in_japanese() -> None:
    told = "quality: on SST-2 (template, bf16) (134 M parameters) it ended 0.3 points (-0.9 to 2.2) below "
    told += "native's accuracy"
    with speaking("ja"):
        found = translated(told)
    assert "SST-2 (template, bf16)" in found
    assert "(134" not in found
