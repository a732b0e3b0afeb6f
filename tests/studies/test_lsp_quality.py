"""The study of quality: what is run next, what a row says, and its tables against its rows."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from lsp_quality import SEEDS, Cell, Study
from lsp_quality_runs import METHODS, Budget, Method, Source, begun, decoder_on_wikitext, run
from lsp_quality_tables import Row, best_rate, final, is_as_good, quality, tables

from engines.base import Batch
from tiny_models import tiny_batches, tiny_blueprint

FOLDER = Path(__file__).parent / "quality"
TEXT, CLASSES = "Llama, WikiText-2", "MiniLM-L6, SST-2"
BUDGET = Budget(
    batch_size=2, steps=5, start_steps=2, eval_every=2, check_every=3, learning_rates=(1e-3, 1e-2)
)


def made_up(method: str, rate: float, seed: int, loss: float | None, **changes: Any) -> Row:
    last = {"step": 10, "trained_s": 2.0, "train_loss": 1.0, "loss": loss, "accuracy": 0.5}
    return {
        "source": TEXT, "method": method, "learning_rate": rate, "seed": seed, "timed": False, "end": "ok",
        "curve": [{"step": 0, "trained_s": 0.0, "train_loss": None, "loss": 3.0, "accuracy": 0.1}, last],
    } | changes  # fmt: skip


def source() -> Source:
    reference = tiny_blueprint("llama").reference

    def batch(seed: int, number: int) -> Batch:
        return tiny_batches(1, "llama", seed=100 * (seed + 1) + number)[0]

    return Source(
        name=TEXT, hidden=16, model=lambda seed: copy.deepcopy(reference), batch=batch,
        judged=tiny_batches(2, "llama", seed=7), budget=BUDGET,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_run_is_judged_on_the_way_and_at_its_end(method: Method) -> None:
    row = run(method, source(), 1e-2, 0, "cpu", math.inf)
    assert row is not None
    assert [point["step"] for point in row["curve"]] == [0, 2, 4, 5]
    times = [point["trained_s"] for point in row["curve"]]
    assert times == sorted(times)
    assert times[0] == 0.0
    assert row["end"] == "ok"
    assert final(row) == row["curve"][-1]
    first = run(METHODS[0], source(), 1e-2, 0, "cpu", math.inf)
    assert first is not None
    assert row["curve"][0]["loss"] == pytest.approx(first["curve"][0]["loss"], rel=1e-6)  # the same start
    again = run(method, source(), 1e-2, 0, "cpu", math.inf)
    assert again is not None
    assert [point["loss"] for point in again["curve"]] == [point["loss"] for point in row["curve"]]


def test_a_run_that_diverges_is_a_row_and_one_past_the_deadline_is_none() -> None:
    row = run(METHODS[0], source(), 1e30, 0, "cpu", math.inf)
    assert row is not None
    assert row["end"] == "nan_loss"
    assert final(row) is None
    assert run(METHODS[0], source(), 1e-3, 0, "cpu", time.time() - 1) is None


def test_the_decoder_begins_on_one_text_and_is_tuned_and_judged_on_another(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_bytes(b"a" * 3000)
    (tmp_path / "valid.txt").write_bytes(b"b" * 9000 + b"c" * 1000)
    made = decoder_on_wikitext(tmp_path, BUDGET)

    def seen(batch: Batch) -> set[int]:
        return set(batch.inputs["input_ids"].flatten().tolist())

    assert seen(made.batch(-1, 0)) == {ord("a")}
    assert seen(made.batch(0, 0)) == {ord("b")}
    assert set.union(*(seen(batch) for batch in made.judged)) == {ord("c")}
    weights = begun(made, "cpu")
    again = decoder_on_wikitext(tmp_path, BUDGET, weights).model(5)
    assert all(torch.equal(each, weights[name]) for name, each in again.named_parameters())
    assert not torch.equal(weights["lm_head.weight"], made.model(5).get_parameter("lm_head.weight"))


def test_the_rates_come_first_then_the_other_seeds_of_the_best_then_timed_runs(tmp_path: Path) -> None:
    budgets, names = {"decoder": BUDGET}, {"decoder": TEXT}
    study = Study(tmp_path / "quality.json", budgets, {"gpu": None})
    first = study.missing(names, budgets, timed=False)
    assert len(first) == len(METHODS) * len(BUDGET.learning_rates)
    assert {cell.seed for cell in first} == {SEEDS[0]}
    assert study.missing(names, budgets, timed=True) == []
    study.add(made_up("native", 1e-3, 0, 1.5))
    study.add(made_up("native", 1e-2, 0, 1.2))
    others = [cell for cell in study.missing(names, budgets, timed=False) if cell.method.name == "native"]
    assert [(cell.learning_rate, cell.seed) for cell in others] == [(1e-2, seed) for seed in SEEDS[1:]]
    timed = study.missing(names, budgets, timed=True)
    assert timed == [Cell(source="decoder", method=METHODS[0], learning_rate=1e-2, seed=0, timed=True)]
    # What is on disk is where the next call goes on.
    resumed = Study(tmp_path / "quality.json", budgets, {"gpu": None})
    assert resumed.missing(names, budgets, timed=False) == study.missing(names, budgets, timed=False)
    # A grid may grow, and only what is new in it is run.
    grown = {"decoder": replace(BUDGET, learning_rates=(*BUDGET.learning_rates, 1e-1))}
    more = Study(tmp_path / "quality.json", grown, {"gpu": None}).missing(names, grown, timed=False)
    native = [cell.learning_rate for cell in more if cell.method.name == "native"]
    assert native == [1e-1]
    other = {"decoder": Budget(**{**BUDGET.__dict__, "steps": 6})}
    with pytest.raises(SystemExit, match="another budget"):
        Study(tmp_path / "quality.json", other, {"gpu": None})


def test_a_method_whose_every_rate_diverges_is_left_alone(tmp_path: Path) -> None:
    budgets, names = {"decoder": BUDGET}, {"decoder": TEXT}
    study = Study(tmp_path / "quality.json", budgets, {})
    for rate in BUDGET.learning_rates:
        study.add(made_up("native", rate, 0, None, end="nan_loss"))
    assert best_rate(study.rows, TEXT, "native") is None
    assert all(cell.method.name != "native" for cell in study.missing(names, budgets, timed=False))


def test_the_best_rate_is_by_loss_for_text_and_by_accuracy_for_classes() -> None:
    rows = [made_up("lsp", 1e-3, 0, 1.5), made_up("lsp", 1e-2, 0, 1.2), made_up("lsp", 1e-1, 1, 0.1)]
    assert best_rate(rows, TEXT, "lsp") == 1e-2
    classes = [made_up("lsp", rate, 0, loss, source=CLASSES) for rate, loss in ((1e-3, 0.9), (1e-2, 0.2))]
    classes[0]["curve"][-1]["accuracy"] = 0.8
    assert best_rate(classes, CLASSES, "lsp") == 1e-3


def test_as_good_is_half_a_point_or_three_percent() -> None:
    assert is_as_good(CLASSES, 90.0, 90.5)
    assert not is_as_good(CLASSES, 89.9, 90.5)
    assert is_as_good(TEXT, 10.3, 10.0)
    assert not is_as_good(TEXT, 10.31, 10.0)
    assert quality(TEXT, [made_up("native", 1e-3, s, loss) for s, loss in ((0, 1.0), (1, 2.0))]) == (
        pytest.approx((math.e + math.e**2) / 2)
    )


def test_the_tables_say_what_the_rows_do() -> None:
    rows = [made_up("native", 1e-3, seed, 1.0 + 0.01 * seed) for seed in SEEDS]
    rows += [made_up("lsp block d=n/2", 1e-2, seed, 1.2) for seed in SEEDS]
    rows += [made_up("lsp block d=n/2", 1e-1, 0, None, end="nan_loss")]
    rows += [made_up("native", 1e-3, 0, 1.0, timed=True)]
    printed = tables({"rows": rows})
    assert "| native | 0.001 | 2.746 (2.718 to 2.773) | 1.0100 | the baseline | 3 |" in printed
    assert "| lsp block d=n/2 | 0.01 | 3.320 (3.320 to 3.320) | 1.2000 | +20.9 %, worse | 3 |" in printed
    assert "| native | 3.000 | 1.010 |" in printed
    assert "| native | 0.0 s, 3.000 | 2.0 s, 1.000 |" in printed


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_in_the_log_are_those_of_the_numbers(path: Path) -> None:
    log = (Path(__file__).parents[2] / "engines" / "EXPERIMENTS.md").read_text()
    for part in tables(json.loads(path.read_text())).split("\n\n"):
        if part.startswith("|"):
            assert part.strip() in log
