"""A machine as a document."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_machine import make_machine

from engines.errors import UserError
from profiles.machine import Figure, absent, load_machine, save_machine

VERSION_1 = {
    "gpu": (
        "name", "total_bytes", "free_bytes", "driver", "compute_capability", "num_gpus", "copy_bytes_per_s",
        "matmul_bf16_flops", "matmul_fp16_flops", "matmul_fp32_flops",
    ),
    "link": (
        "generation_max", "generation_loaded", "width_max", "width_loaded", "h2d_pinned_bytes_per_s",
        "d2h_pinned_bytes_per_s", "h2d_pageable_bytes_per_s", "d2h_pageable_bytes_per_s",
        "h2d_duplex_bytes_per_s", "d2h_duplex_bytes_per_s",
    ),
    "cpu": (
        "name", "cores_usable", "cores_basis", "cores_total", "threads", "matmul_fp32_flops",
        "matmul_bf16_flops", "adam_elements_per_s",
    ),
    "memory": ("total_bytes", "available_bytes", "total_basis", "swap_bytes", "copy_bytes_per_s"),
}  # fmt: skip


@pytest.mark.parametrize("gpu", [True, False])
def test_saved_and_loaded_are_equal(tmp_path: Path, gpu: bool) -> None:
    machine = make_machine(gpu=gpu)
    path = tmp_path / "machine.json"
    save_machine(machine, path)
    assert load_machine(path) == machine


PUBLISHED = sorted((Path(__file__).parents[2] / "reports" / "results").glob("*/machine.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_profiles_load(path: Path) -> None:
    data = json.loads(path.read_text())
    machine = load_machine(path)
    assert machine.schema_version == data["schema_version"]
    assert machine.cpu.adam_elements_per_s.value == data["cpu"]["adam_elements_per_s"]["value"]


def test_a_profile_of_version_1_lacks_later_figures_with_a_reason(tmp_path: Path) -> None:
    """Cut down to the fields of version 1, it loads, and says of the rest that it is not there."""
    path = tmp_path / "machine.json"
    save_machine(make_machine(), path)
    data = json.loads(path.read_text())
    data["schema_version"] = 1
    for later in ("disk", "disk_absent_reason", "depth", "duration_s"):
        del data[later]
    for part, first in VERSION_1.items():
        data[part] = {name: value for name, value in data[part].items() if name in first}
    path.write_text(json.dumps(data))
    machine = load_machine(path)
    assert machine.schema_version == 1
    assert machine.gpu is not None
    assert machine.link is not None
    assert machine.gpu.matmul_bf16_flops == make_machine().gpu.matmul_bf16_flops  # type: ignore[union-attr]
    for later_figure in (
        machine.gpu.matmul_sustained_flops, machine.memory.triad_bytes_per_s, machine.memory.pinned_bytes,
    ):  # fmt: skip
        assert (later_figure.origin, later_figure.value) == ("absent", None)
        assert later_figure.method
    assert machine.disk is None


def change(path: Path, **fields: Any) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | fields))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"schema_version": 99}, "has schema version 99"),
        ({"schema_version": None}, "has no schema_version, so it is not a machine profile"),
        ({"cpu": None}, "field 'cpu'"),
        ({"memory": {}}, "field 'memory.total_bytes'"),
        ({"versions": ["torch"]}, "field 'versions'"),
    ],
)
def test_a_bad_profile_is_one_line(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    path = tmp_path / "machine.json"
    save_machine(make_machine(), path)
    change(path, **fields)
    with pytest.raises(UserError) as error:
        load_machine(path)
    assert why in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "number", "why"),
    [
        ("gpu.total_bytes", -5, "is -5, and must be positive"),
        ("gpu.copy_bytes_per_s.value", 0.0, "is 0.0, and must be positive"),
        ("link.h2d_pinned_bytes_per_s.value", -1e9, "must be positive"),
        ("gpu.matmul_bf16_flops.value", float("inf"), "is inf, and must be a finite number"),
        ("gpu.matmul_bf16_flops.low", -1.0, "must not be negative"),
        ("cpu.threads", 0, "must be positive"),
        ("memory.available_bytes", -1, "must not be negative"),
        ("memory.available_bytes", 0, None),
        ("memory.swap_bytes", 0, None),
    ],
)
def test_a_number_that_no_machine_has_is_refused(
    tmp_path: Path, name: str, number: float, why: str | None
) -> None:
    path = tmp_path / "machine.json"
    save_machine(make_machine(), path)
    data = json.loads(path.read_text())
    *parents, last = name.split(".")
    part = data
    for parent in parents:
        part = part[parent]
    part[last] = number
    path.write_text(json.dumps(data))
    if why is None:
        load_machine(path)
        return
    with pytest.raises(UserError) as error:
        load_machine(path)
    assert f"field '{name}' is" in str(error.value)
    assert why in str(error.value)


def test_a_figure_that_contradicts_its_origin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    machine = make_machine()
    save_machine(machine, path)
    memory = json.loads(path.read_text())["memory"]
    memory["copy_bytes_per_s"]["origin"] = "absent"
    change(path, memory=memory)
    with pytest.raises(UserError, match=r"memory\.copy_bytes_per_s"):
        load_machine(path)


def test_fields_of_a_later_minor_version_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    machine = make_machine()
    save_machine(machine, path)
    change(path, colour="green")
    assert load_machine(path) == machine


NO_LONGER_MEASURED = {
    "gpu": (
        "matmul_tf32_flops", "matmul_fp8_flops", "matmul_int8_ops", "matmul_burst_flops",
        "matmul_during_copies_flops", "noise_elements_per_s", "launch_s", "usable_bytes", "context_bytes",
        "idle_power_w", "load_power_w", "load_energy_w", "power_limit_w", "persistence_enabled",
    ),
    "link": (
        "numa_node", "sweeps", "h2d_during_adam_bytes_per_s", "d2h_during_adam_bytes_per_s",
        "h2d_during_matmul_bytes_per_s", "d2h_during_matmul_bytes_per_s", "h2d_nvbandwidth_bytes_per_s",
        "d2h_nvbandwidth_bytes_per_s",
    ),
    "cpu": (
        "cache_bytes", "products", "adam_points", "adam_bandwidth_share", "adam_during_copies_elements_per_s",
    ),
    "memory": ("pin_bytes_per_s",),
}  # fmt: skip
"""What nothing read, by part, in profiles of version 2."""


def test_figures_that_are_no_longer_measured_are_passed_over(tmp_path: Path) -> None:
    """The full probe of an H200 has them all. It loads, and is saved without them."""
    published = Path(__file__).parents[2] / "profiles" / "machines" / "h200.json"
    before = json.loads(published.read_text())
    path = tmp_path / "machine.json"
    machine = load_machine(published)
    save_machine(machine, path)
    assert load_machine(path) == machine
    after = json.loads(path.read_text())
    for part, names in NO_LONGER_MEASURED.items():
        assert set(names) <= set(before[part])
        assert set(before[part]) - set(after[part]) == set(names)
        assert all(
            after[part][name] == before[part][name]
            for name in after[part]
            if name in before[part] and name != "readings"
        )
    told = ("what", "sm_clock_hz", "throttled", "other_processes")
    readings = [{name: reading[name] for name in told} for reading in before["gpu"]["readings"]]
    assert after["gpu"]["readings"] == readings
    before["gpu"]["noise_elements_per_s"] = {"value": "none of ours"}
    path.write_text(json.dumps(before))
    assert load_machine(path) == machine, "nor are they judged"


def test_a_value_and_its_origin_agree() -> None:
    with pytest.raises(ValueError, match="absent"):
        Figure(value=1.0, origin="absent", method="")
    with pytest.raises(ValueError, match="measured"):
        Figure(value=None, origin="measured", method="")
    assert absent("no GPU").value is None


def test_a_full_disk_keeps_the_profile_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "machine.json"
    machine = make_machine()
    save_machine(machine, path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_machine(replace(machine, name="other"), path)
    assert load_machine(path) == machine
    assert len(list(tmp_path.iterdir())) == 1
