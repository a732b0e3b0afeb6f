"""Tables of a machine for people."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from tiny_machine import figure, make_machine

from profiles.display.anonymised import machine_page
from profiles.display.tables import figure_cells, link_text, machine_table
from profiles.language import speaking
from profiles.machine import Figure, GpuLink, GpuReading, Machine, absent
from profiles.units import format_rate


def shown(machine: Machine, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(machine_table(machine))
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def row(text: str, title: str) -> str:
    return next(line for line in text.splitlines() if title in line)


def test_a_machine_with_a_gpu() -> None:
    text = shown(make_machine(), 160)
    assert "Fake GPU [24G]" in text, "square brackets are no markup"
    assert "24.0 GiB" in row(text, "GPU memory")
    assert "22.0 GiB free" in row(text, "GPU memory")
    assert "PCIe 4 x8" in row(text, "link under load")
    assert "of PCIe 4 x16" in row(text, "link under load")
    copies = row(text, "host to GPU, pinned")
    assert "13.0 GB/s" in copies
    assert "11.7 to 14.3 GB/s" in copies
    assert "measured, 5 samples: five copies" in copies
    assert "150 TFLOP/s" in row(text, "GPU matrix product bf16")
    assert "not measured" in row(text, "GPU matrix product fp32")
    assert "OutOfMemoryError" in row(text, "GPU matrix product fp32")
    assert "cgroup quota 8.0 of 16 cores" in row(text, "usable cores")
    assert "1.00 G/s" in row(text, "CPU AdamW")
    assert "GB is 1e9 bytes" in text


def test_cores_at_two_speeds_are_told_in_words() -> None:
    machine = make_machine()
    turn = replace(figure(50e-9), low=32e-9, high=62e-9)
    cpu = replace(machine.cpu, python_turn_s=turn, forward_launch_s=figure(20e-6))
    two = replace(machine, cpu=cpu)
    sentence = "Cores ran at two speeds: a turn of a Python loop took 32.0 to 62.0 ns (median 50.0 ns)"
    assert sentence in " ".join(shown(two, 160).split())
    assert sentence in machine_page(two, ())
    with speaking("ja"):
        assert "コアの速さが2通り" in shown(two, 160)
        assert "コアの速さが2通り" in machine_page(two, ())
    one = replace(machine, cpu=replace(cpu, python_turn_s=replace(turn, low=48e-9)))
    for steady in (machine, one):
        assert "two speeds" not in shown(steady, 160) + machine_page(steady, ())


def test_a_machine_without_a_gpu() -> None:
    text = shown(make_machine(gpu=False), 160)
    assert "Driver Not Loaded" in row(text, "GPU  ")
    assert "none" in row(text, "GPU  ")
    assert "link" not in text


def test_what_a_probe_never_took_is_no_row_and_what_failed_is_one() -> None:
    plain = shown(make_machine(), 160)
    assert "sustained" not in plain
    assert "disk" not in plain
    machine = make_machine()
    assert machine.link is not None
    assert machine.gpu is not None
    second = GpuLink(
        index=1, name="Fake GPU", h2d_bytes_per_s=figure(12e9), d2h_bytes_per_s=absent("changed the data")
    )
    reading = GpuReading(what="", sm_clock_hz=1.5e9, throttled=("sw_power_cap",), other_processes=0)
    text = shown(
        replace(
            machine,
            gpu=replace(
                machine.gpu, readings=(reading,), matmul_sustained_flops=figure(9e13),
                matmul_bf16_flops=replace(figure(1e14), disturbance="throttled: sw_power_cap"),
            ),
            link=replace(machine.link, replays=2, generation_idle=1, width_idle=8, each_gpu=(second,)),
            memory=replace(machine.memory, pinned_bytes=figure(2**30), pinned_refused=True),
            disk_absent_reason="no such folder", depth="full", duration_s=200.0,
        ),
        200,
    )  # fmt: skip
    assert "90.0 TFLOP/s" in row(text, "bf16 product sustained")
    assert "12.0 GB/s" in row(text, "GPU 1, to it")
    assert "(changed the data)" in row(text, "GPU 1, from it")
    assert "all busy" not in text
    assert "disturbed: throttled: sw_power_cap" in row(text, "GPU matrix product bf16")
    assert "held down by sw_power_cap" in row(text, "GPU clock under load")
    assert "PCIe 1 x8 at rest" in row(text, "link under load")
    assert "1.00 GiB" in row(text, "pinned by one process, the driver refused more")
    assert "no such folder" in row(text, "disk")
    assert "(full, 3.33 min)" in " ".join(text.split())


@pytest.mark.parametrize("width", [40, 80, 200])
def test_fits_its_terminal(width: int) -> None:
    assert max(len(line) for line in shown(make_machine(), width).splitlines()) <= width


def test_cells_say_where_a_figure_comes_from() -> None:
    sheet = Figure(value=63e9, origin="datasheet", method="PCIe 5.0 x16")
    assert [cell.plain for cell in figure_cells(sheet, format_rate)] == [
        "63.0 GB/s", "", "datasheet: PCIe 5.0 x16",
    ]  # fmt: skip
    assert [cell.plain for cell in figure_cells(absent("no memory"), format_rate)] == [
        "not measured", "", "(no memory)",
    ]  # fmt: skip
    wide = Figure(value=1e9, origin="measured", method="copy", low=9e8, high=2e9, count=3)
    assert figure_cells(wide, format_rate)[1].plain == "900 MB/s to 2.00 GB/s"
    assert figure_cells(figure(1e10), format_rate)[1].plain == "9.00 to 11.0 GB/s"


@pytest.mark.parametrize(
    ("generation", "width", "text"),
    [(5, 16, "PCIe 5 x16"), (None, 8, "PCIe ? x8"), (3, None, "PCIe 3 x?"), (None, None, "not measured")],
)
def test_link_text(generation: int | None, width: int | None, text: str) -> None:
    assert link_text(generation, width) == text
