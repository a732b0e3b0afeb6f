from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_machine import figure, make_machine

from harness.cli import app
from profiles.catalog import machine_names
from profiles.display.compare import compare_machines
from profiles.machine import save_machine


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["lspzo-bench", "profiles", *arguments])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code
    return capsys.readouterr().out


def test_ratios_are_second_over_first_and_only_where_both_are_known() -> None:
    first = make_machine()
    second = replace(first, memory=replace(first.memory, copy_bytes_per_s=figure(60e9)))
    rows = {row.field: row for row in compare_machines(first, second)}
    assert rows["memory.copy_bytes_per_s"].ratio == 1.5
    assert rows["cpu.cores_usable"].ratio == 1.0
    assert rows["gpu.matmul_fp32_flops"].ratio is None  # absent
    without = {row.field: row for row in compare_machines(first, make_machine(gpu=False))}
    assert (without["gpu.total_bytes"].second.value, without["gpu.total_bytes"].ratio) == (None, None)


def test_the_list_names_every_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(monkeypatch, capsys)
    assert all(name in text for name in machine_names())
    listed = json.loads(shown(monkeypatch, capsys, "--json"))
    assert [one["name"] for one in listed] == list(machine_names())
    t4 = next(one for one in listed if one["name"] == "t4")
    assert (t4["origin"], t4["matmul_bf16_flops"], t4["link"]) == ("datasheet", None, "PCIe 3 x16")


def test_one_machine_is_shown_with_its_sources(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(shown(monkeypatch, capsys, "show", "rtx-4090").split())
    assert "1008 GB/s" in text
    assert "whitepaper" in text
    assert "from datasheets" in text
    assert "probed" not in text
    assert json.loads(shown(monkeypatch, capsys, "show", "rtx-4090", "--json"))["schema_version"] == 2


def test_two_machines_stand_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_machine(make_machine(), tmp_path / "mine.json")
    text = shown(monkeypatch, capsys, "compare", str(tmp_path / "mine.json"), "t4")
    line = next(line for line in text.splitlines() if "host to GPU, pinned" in line)
    assert "13.0 GB/s m" in line
    assert "13.4 GB/s d" in line
    assert "1.03x" in line
    rows = json.loads(shown(monkeypatch, capsys, "compare", str(tmp_path / "mine.json"), "t4", "--json"))
    assert rows[0]["field"] == "gpu.total_bytes"
