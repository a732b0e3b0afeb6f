"""The findings have the tables of the records, and each record is what its cell says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from methods_by_tokens import (
    RECORDS,
    ROOT,
    TOKENS,
    beside_exact,
    beside_native,
    cells_of,
    share_of_native,
    table,
)

FINDINGS = (ROOT / "reports" / "FINDINGS.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", RECORDS)
def test_the_findings_have_the_table_of_the_records(model: str) -> None:
    lines = FINDINGS.splitlines()
    told = list(table(model))
    assert len(told) == 2 + len(RECORDS[model])
    for line in told:
        assert line in lines


@pytest.mark.parametrize("model", RECORDS)
def test_a_cell_is_of_its_models_method_and_tokens(model: str) -> None:
    for label, cells in cells_of(model).items():
        for tokens, cell in cells.items():
            (run, *_) = cell.rounds.ok
            assert (run.engine, run.model.name) == (label.split(",")[0], f"deepseek-coder-{model}")
            assert cell.tokens == TOKENS[tokens], cell.folder
            assert run.environment.emulated is None
            if label.endswith("on the CPU"):
                assert not run.plan.settings.get("gpu_blocks"), cell.folder


def test_what_one_step_in_so_many_takes_more_counts() -> None:
    lsp, native = (cells_of("6.7b")[label]["384"] for label in ("lsp, n/2", "native"))
    assert lsp.rounds.step_s is not None
    assert native.rounds.step_s is not None
    assert share_of_native(lsp, native) < native.rounds.step_s.median / lsp.rounds.step_s.median


@pytest.mark.parametrize("page", [README, FINDINGS], ids=["README", "FINDINGS"])
def test_when_compression_pays_is_told_as_it_is_recorded(page: str) -> None:
    told = " ".join(page.split())
    assert beside_exact() in told
    assert beside_native() in told


def test_with_384_tokens_native_is_faster_than_lsp_and_lora_than_both() -> None:
    for model in RECORDS:
        cells = {label: each["384"] for label, each in cells_of(model).items() if "384" in each}
        times_s = {label: each.lasting_step_s for label, each in cells.items()}
        assert sorted(times_s, key=lambda label: times_s[label])[:2] == ["lora", "native"]
