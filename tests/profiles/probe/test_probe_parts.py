"""Parts of the probes that need no GPU: repetition, disks, the child that pins, containers."""

from __future__ import annotations

import errno
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cgroup_trees import version_2

from profiles.machine import Figure, GpuReading, absent, load_machine, save_machine
from profiles.probe import disk, gpu, pinned_limit, run
from profiles.probe.numa import near
from profiles.probe.pinned_limit import throw_away
from profiles.probe.run import probe_machine
from profiles.probe.timing import Meter, figure
from profiles.system import cgroup
from profiles.system.cgroup import throttled_periods
from profiles.system.nvml import NvmlDevice

MIB = 2**20


def make_meter(seconds: float = 0.0, limit_s: float = float("inf")) -> Meter:
    return Meter(seconds_each=seconds, total=9, progress=lambda *message: None, limit_s=limit_s)


# --- repetition and time


def reading(*throttled: str, others: int | None = 0) -> GpuReading:
    return GpuReading(what="", sm_clock_hz=1e9, throttled=throttled, other_processes=others)


def measured(meter: Meter, readings: list[GpuReading]) -> tuple[Figure, int]:
    """A measurement that looks at the GPU once, and how often it was made."""
    calls = 0
    meter.look = lambda what: replace(readings[min(calls, len(readings)) - 1], what=what)

    def take(seconds: float) -> Figure:
        nonlocal calls
        calls += 1
        meter.watch()
        return figure([float(calls)], "copies")

    return meter.measure("a copy", take, absent), calls


def test_a_disturbed_measurement_is_made_again() -> None:
    meter = make_meter()
    found, calls = measured(meter, [reading("sw_thermal_slowdown"), reading()])
    assert (found.value, found.disturbance, calls) == (2.0, None, 2)
    assert [one.what for one in meter.readings] == ["a copy"] * 2


def test_what_still_disturbs_is_marked_and_not_repeated_again() -> None:
    meter = make_meter()
    found, calls = measured(meter, [reading("sw_power_cap"), reading("sw_power_cap", others=1)])
    assert (found.value, calls) == (2.0, 2)
    assert found.disturbance == "another process on the GPU; throttled: sw_power_cap"
    found, calls = measured(meter, [reading("sw_power_cap")])
    assert (found.disturbance, calls) == ("throttled: sw_power_cap", 1)
    found, calls = measured(meter, [reading("hw_slowdown"), reading()])
    assert (found.disturbance, calls) == (None, 2)


@pytest.mark.parametrize("others", [0, None])
def test_an_undisturbed_measurement_is_made_once(others: int | None) -> None:
    assert measured(make_meter(), [reading(others=others)])[1] == 1


def test_every_figure_of_a_pair_is_marked() -> None:
    meter = make_meter()
    meter.look = lambda what: reading("hw_slowdown")

    def take(seconds: float) -> tuple[Figure, Figure]:
        meter.watch()
        return figure([1.0], "up"), absent("down")

    up, down = meter.measure("both", take, lambda why: (absent(why), absent(why)))
    assert up.disturbance == "throttled: hw_slowdown"
    assert down == absent("down")


def test_what_can_be_done_without_is_left_out_when_time_is_up() -> None:
    meter = make_meter(limit_s=0.0)
    assert "used up" in meter.optional("a", lambda seconds: figure([1.0], ""), absent).method
    assert meter.measure("b", lambda seconds: figure([1.0], ""), absent).value == 1.0
    assert meter.done == 2


def test_what_needs_more_time_than_is_left_is_not_begun() -> None:
    meter = make_meter(limit_s=1000.0)
    assert meter.optional("a", lambda seconds: figure([1.0], ""), absent, needs_s=900.0).value == 1.0
    assert meter.optional("b", lambda seconds: figure([1.0], ""), absent, needs_s=1001.0).value is None


# --- disk


def test_a_disk_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    found, reason = disk.probe_disk(make_meter(0.05), tmp_path)
    assert reason is None
    assert found is not None
    assert list(tmp_path.iterdir()) == []
    for rate in (found.write_bytes_per_s, found.read_bytes_per_s):
        assert rate.origin == "measured", rate.method
        assert rate.count >= 1
    assert 0 < found.free_bytes <= found.total_bytes
    assert found.direct is not None
    assert found.folder == str(tmp_path.resolve())


def test_the_file_is_nobody_elses(tmp_path: Path) -> None:
    descriptor, _ = disk.open_nameless(tmp_path)
    try:
        assert list(tmp_path.iterdir()) == []
        assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o600
        assert os.fstat(descriptor).st_nlink == 0
    finally:
        os.close(descriptor)


def test_without_direct_io_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    found, _ = disk.probe_disk(make_meter(), tmp_path)
    assert found is not None
    assert found.direct is False
    assert found.write_bytes_per_s.origin == found.read_bytes_per_s.origin == "measured"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    meter = make_meter()
    found, reason = disk.probe_disk(meter, tmp_path / "none")
    assert found is None
    assert reason is not None
    assert "No such file" in reason
    assert meter.done == disk.NUM_MEASUREMENTS


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root writes to read-only folders, so the kernel's answer is given in its place."""

    def refuse(*arguments: object, **keywords: object) -> tuple[int, str]:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(disk.tempfile, "mkstemp", refuse)
    found, _ = disk.probe_disk(make_meter(), tmp_path)
    assert found is not None
    assert found.write_bytes_per_s.method == "Read-only file system"
    assert "Read-only file system" in found.read_bytes_per_s.method
    assert found.free_bytes > 0


@pytest.mark.parametrize("chunks", [0, 2])
def test_a_disk_that_fills_up_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    write, written = os.write, 0

    def fill(descriptor: int, block: object) -> int:
        nonlocal written
        if written == chunks * disk.CHUNK_BLOCKS + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += 1
        return write(descriptor, block)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "write", fill)
    found, _ = disk.probe_disk(make_meter(60.0), tmp_path)
    assert found is not None
    assert found.write_bytes_per_s.count == found.read_bytes_per_s.count == chunks
    if chunks == 0:
        assert "No space left" in found.write_bytes_per_s.method
        assert "nothing was written" in found.read_bytes_per_s.method
    assert list(tmp_path.iterdir()) == []


def test_a_nearly_full_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: usage._replace(free=100 * MIB))
    found, _ = disk.probe_disk(make_meter(), tmp_path)
    assert found is not None
    assert found.write_bytes_per_s.method.endswith("is free")
    assert "less than" in found.write_bytes_per_s.method


def test_the_file_system_is_the_innermost_mount(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "deep"
    folder.mkdir(parents=True)
    mounts = tmp_path / "proc" / "self" / "mountinfo"
    mounts.parent.mkdir(parents=True)
    mounts.write_text(
        "1 0 0:1 / / rw - ext4 /dev/a rw\n"
        f"2 1 0:2 / {tmp_path / 'data'} rw shared:1 - xfs /dev/b rw\n"
        f"3 1 0:3 / {tmp_path / 'dat'} rw - tmpfs none rw\n"
    )
    assert disk.file_system(folder, tmp_path) == "xfs"
    assert disk.file_system(tmp_path, tmp_path) == "ext4"
    assert disk.file_system(folder, folder) is None


# --- the child that pins


def test_a_child_without_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real child; GPUs are hidden from it, so that it fails on every machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    answer, end = throw_away(120.0, most_bytes=2.0**20, seconds=0.1)
    assert answer == {}
    assert end.startswith("ended with code 1 (")
    assert "CUDA" in end or "NVIDIA" in end


def test_a_killed_child_leaves_its_last_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\necho "{\\"pinned_bytes\\": 1}"\necho "{\\"pinned_bytes\\": 2}"\nkill -9 $$\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(pinned_limit.sys, "executable", str(script))
    assert throw_away(20.0) == ({"pinned_bytes": 2}, "was killed by signal 9")


# --- a container


def container(root: Path) -> None:
    """Two and a half of many cores, 1.5 GiB; the quota has stopped the group seven times."""
    version_2(
        root,
        app__cpu_max="250000 100000",
        app__memory_max=str(1536 * MIB),
        app__memory_current=str(512 * MIB),
        app__cpu_stat="usage_usec 1\nnr_periods 9\nnr_throttled 7",
    )
    (root / "proc/cpuinfo").write_text("model name : Small CPU\nflags : fpu avx2 fma avx512f hypervisor\n")
    for cpu in range(4):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{cpu // 2}\n")
        (folder / "core_id").write_text("0\n")
    for node in range(2):
        folder = root / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{2 * node}-{2 * node + 1}\n")


def test_a_container_without_a_gpu_and_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota, a memory limit, a read-only working folder and a home that cannot be written."""
    root, place = tmp_path / "root", tmp_path / "place"
    place.mkdir()
    container(root)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setenv("HOME", "/proc/none")

    def refuse(*arguments: object, **keywords: object) -> tuple[int, str]:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(disk.tempfile, "mkstemp", refuse)
        machine = probe_machine(seconds=0.0, folder=place, root=root)
    assert machine.gpu is None
    assert machine.gpu_absent_reason == "the package nvidia-ml-py is not installed"
    assert machine.link is None
    assert (machine.cpu.cores_usable, machine.cpu.threads) == (2, 2)
    assert machine.cpu.cores_basis == "cgroup quota 2.5 of 4 cores"
    assert (machine.cpu.cores_physical, machine.cpu.sockets, machine.cpu.numa_nodes) == (2, 2, 2)
    assert machine.cpu.instruction_sets == ("avx2", "fma", "avx512f")
    assert machine.cpu.governor is None
    assert machine.cpu.throttled_periods == 0, "none of the seven was in the probe"
    assert machine.cpu.name == "Small CPU"
    assert (machine.memory.total_bytes, machine.memory.available_bytes) == (1536 * MIB, 1024 * MIB)
    assert machine.memory.total_basis.startswith("cgroup limit 1.5 of")
    assert machine.cpu.matmul_fp32_flops.origin == "measured"
    assert machine.memory.pinned_bytes.origin == "absent"
    assert machine.disk is not None
    assert "Read-only" in machine.disk.write_bytes_per_s.method
    for part in (machine.cpu, machine.memory, machine.disk):
        for name in part.__dataclass_fields__:
            found = getattr(part, name)
            assert not isinstance(found, Figure) or found.method, name
    saved = tmp_path / "machine.json"
    save_machine(machine, saved)
    assert load_machine(saved) == machine


def test_throttled_periods(tmp_path: Path) -> None:
    assert throttled_periods(tmp_path) is None
    container(tmp_path)
    assert throttled_periods(tmp_path) == 7
    (tmp_path / "sys/fs/cgroup/app/cpu.max").write_text("max 100000\n")
    assert throttled_periods(tmp_path) is None, "without a quota nothing is stopped"


def test_a_thread_near_a_node(tmp_path: Path) -> None:
    container(tmp_path)
    here = os.sched_getaffinity(0)
    folder = tmp_path / "sys/devices/system/node/node1"
    one = min(here)
    (folder / "cpulist").write_text(f"{one}\n")
    with near(1, tmp_path) as placement:
        assert os.sched_getaffinity(0) == {one}
    assert placement == "NUMA node 1, the GPU's"
    assert os.sched_getaffinity(0) == here
    (folder / "cpulist").write_text("100000\n")
    with near(1, tmp_path) as placement:
        assert "may not use" in placement
        assert os.sched_getaffinity(0) == here
    with near(None, tmp_path) as placement:
        assert "does not tell" in placement


def test_the_probe_reads_the_root_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    container(tmp_path)
    monkeypatch.setattr(run, "why_no_gpu", lambda: "none")
    assert probe_machine(seconds=0.0, depth="brief", root=tmp_path).cpu.name == "Small CPU"
    assert cgroup.cpu_name() != "Small CPU"


@pytest.mark.parametrize(("pids", "disturbance"), [((7,), None), ((7, 8), "another process on the GPU")])
def test_memory_that_others_may_have_taken_meanwhile_is_marked(
    pids: tuple[int, ...], disturbance: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 MiB more are in use than before, 2 of them torch's."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 << 20)
    monkeypatch.setattr(gpu, "free", lambda: None)
    library = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=9 << 20),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=pid) for pid in pids],
    )
    found = gpu.process_bytes(NvmlDevice(library, 0), 4 << 20)
    assert (found.value, found.disturbance) == (3 << 20, disturbance)
