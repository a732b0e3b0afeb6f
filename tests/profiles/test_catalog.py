from __future__ import annotations

from pathlib import Path

import pytest
from tiny_machine import make_machine

from engines.errors import UserError
from engines.shapes import Workload
from harness.models.configs import named_shape
from profiles.catalog import find_profile, machine_names
from profiles.machine import save_machine
from profiles.planning.recommend import recommend

ASKED_FOR = {
    "rtx-4090", "rtx-a1000-laptop", "rtx-3060-12gb", "rtx-4060-ti-16gb", "rtx-3090", "rtx-5090", "l4", "t4",
    "a100-80gb", "h100",
}  # fmt: skip


def test_the_machines_people_ask_about_are_there() -> None:
    assert set(machine_names()) >= ASKED_FOR


@pytest.mark.parametrize("name", sorted(ASKED_FOR))
def test_a_datasheet_profile_names_its_sources_and_predicts(name: str) -> None:
    machine = find_profile(Path(name))
    assert machine.gpu is not None
    assert machine.link is not None
    assert (machine.link.generation_loaded, machine.link.width_loaded) == (None, None)  # nothing ran on it
    figures = [
        machine.gpu.copy_bytes_per_s, machine.gpu.matmul_bf16_flops, machine.gpu.matmul_fp16_flops,
        machine.gpu.matmul_fp32_flops, machine.link.h2d_pinned_bytes_per_s,
        machine.link.d2h_pinned_bytes_per_s, machine.link.h2d_duplex_bytes_per_s,
        machine.cpu.adam_elements_per_s, machine.memory.copy_bytes_per_s,
    ]  # fmt: skip
    for figure in figures:
        assert figure.origin in ("datasheet", "absent")
        assert figure.origin == "absent" or figure.method.startswith("derived: ")
        assert (figure.low, figure.high, figure.count, figure.time) == (None, None, 0, None)
    dtype = "fp16" if name == "t4" else "bf16"
    workload = Workload(batch_size=1, seq_len=512, dtype=dtype)  # type: ignore[arg-type]
    plans = {plan.engine: plan for plan in recommend(machine, named_shape("opt-1.3b"), workload, ["zo2"], {})}
    assert plans["zo2"].fits
    assert plans["zo2"].prediction.step_s is not None
    assert "(datasheet)" in plans["zo2"].prediction.basis


def test_the_h200_is_measured_in_full() -> None:
    machine = find_profile(Path("h200"))
    assert machine.depth == "full"
    assert machine.gpu is not None
    assert machine.link is not None
    for figure in (
        machine.gpu.matmul_bf16_flops, machine.gpu.matmul_sustained_flops,
        machine.link.h2d_pinned_bytes_per_s, machine.link.d2h_duplex_bytes_per_s,
        machine.cpu.adam_elements_per_s, machine.memory.copy_bytes_per_s, machine.memory.pinned_bytes,
    ):  # fmt: skip
        assert figure.origin == "measured"
        assert figure.count > 0
        assert figure.low is not None
    assert machine.link.generation_loaded == machine.link.generation_max == 5
    workload = Workload(batch_size=1, seq_len=2048, dtype="fp16")
    (plan,) = recommend(machine, named_shape("opt-13b"), workload, ["zo2"], {})
    assert plan.prediction.step_s is not None
    assert "(measured)" in plan.prediction.basis


def test_links_are_85_percent_of_their_lanes() -> None:
    """PCI-SIG: 15.75, 31.5 and 63 GB/s for sixteen lanes of generation 3, 4 and 5."""
    lane = {3: 15.75e9 / 16, 4: 31.5e9 / 16, 5: 63e9 / 16}
    for name in ASKED_FOR:
        link = find_profile(Path(name)).link
        assert link is not None
        assert link.generation_max is not None
        assert link.width_max is not None
        expected = 0.85 * link.width_max * lane[link.generation_max]
        assert link.h2d_pinned_bytes_per_s.value == pytest.approx(expected)
        assert link.h2d_duplex_bytes_per_s.value == pytest.approx(0.91 * expected)


def test_a_file_and_a_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_machine(make_machine(), tmp_path / "t4")
    monkeypatch.chdir(tmp_path)
    assert find_profile(Path("t4")).name.startswith("NVIDIA T4")
    assert find_profile(tmp_path / "t4") == make_machine()


@pytest.mark.parametrize(
    ("name", "told"),
    [("rtx-4091", "did you mean 'rtx-4090'"), ("?", "lspzo-bench profiles"), ("no.json", "no such machine")],
)
def test_a_name_that_is_none_is_one_line(name: str, told: str) -> None:
    with pytest.raises(UserError, match="profile") as caught:
        find_profile(Path(name))
    assert told in str(caught.value)
