"""What other processes take of the CPU, and what is said of figures that were measured beside them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_machine import make_machine

from profiles.doctor.diagnose import diagnose
from profiles.doctor.findings import Finding
from profiles.machine import Cpu, HostMemory
from profiles.planning.predict import _named_figure
from profiles.probe.run import _marked
from profiles.system.busy import cores_of_others, cpu_times, disturbance, pressure
from profiles.units import format_elements


def test_another_process_is_seen() -> None:
    """At least that one: other processes may be at work too."""
    spin = "import time\nend = time.monotonic() + 0.6\nwhile time.monotonic() < end: pass"
    before = cpu_times()
    with subprocess.Popen([sys.executable, "-c", spin]) as process:
        process.poll()
        # Not waited for: a child that has ended counts as this process's own time.
        after = before
        while after is None or before is None or after.clock_s - before.clock_s < 0.5:
            after = cpu_times()
        seen = cores_of_others(before, after)
    assert seen is None or seen >= 0.0


def test_own_time_is_not_that_of_others() -> None:
    before, after = cpu_times(), cpu_times()
    assert before is not None
    assert after is not None
    busy = replace(after, clock_s=before.clock_s + 2, machine_s=before.machine_s + 5, own_s=before.own_s + 4)
    assert cores_of_others(before, busy) == pytest.approx(0.5)
    assert cores_of_others(None, busy) is None
    assert cores_of_others(before, before) is None


@pytest.mark.parametrize(
    ("others", "threads", "total", "disturbed"),
    [(0.0, 8, 8, False), (0.5, 8, 8, False), (1.0, 8, 8, True), (5.0, 8, 64, False), (60.0, 8, 64, True),
     (None, 8, 8, False)],
)  # fmt: skip
def test_cores_enough_for_all_disturb_nothing(
    others: float | None, threads: int, total: int, disturbed: bool
) -> None:
    assert (disturbance(others, threads, total) is not None) == disturbed


def test_a_kernel_that_does_not_say_is_no_error(tmp_path: Path) -> None:
    assert (cpu_times(tmp_path), pressure(tmp_path)) == (None, None)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu x\n")
    assert cpu_times(tmp_path) is None


def test_figures_measured_on_a_busy_machine_are_marked_and_plans_say_so() -> None:
    machine = make_machine(gpu=False)
    why = disturbance(1.5, 2, 2)
    assert why is not None
    for part in (machine.cpu, machine.memory):
        assert isinstance(part, Cpu | HostMemory)
        assert _marked(part, None) == part
    figure = _marked(machine.cpu, why).adam_elements_per_s
    assert figure.disturbance == (why if figure.value is not None else None)
    assert "disturbed: other processes kept 1.5 of 2 cores busy" in _named_figure(
        ("CPU Adam", replace(figure, disturbance=why)), format_elements
    )


def test_doctor_names_a_busy_machine() -> None:
    machine = make_machine(gpu=False)

    def found(others: float | None) -> Finding | None:
        cpu = replace(machine.cpu, others_cores=others, threads=2, cores_total=2, pressure="some avg10=30.00")
        findings = diagnose(replace(machine, cpu=cpu)).findings
        return next((one for one in findings if one.name == "busy machine"), None)

    busy = found(1.5)
    assert busy is not None
    assert "1.5 of 2 cores busy; some avg10=30.00" in busy.evidence
    assert found(0.0) is None
    assert "busy machine" in diagnose(machine).not_judged
