"""Parts of the probes that need no GPU: fits, disks, other programs, repetition, containers."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from cgroup_trees import version_2
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.machine import CopyPoint, Figure, GpuReading, absent, load_machine, save_machine
from profiles.probe import adam, disk, run, subprocesses
from profiles.probe.copy_sweep import SIZES, fit, fit_line
from profiles.probe.numa import near
from profiles.probe.run import probe_machine
from profiles.probe.subprocesses import nvbandwidth, throw_away
from profiles.probe.timing import Meter, busy_samples, fair_turns, figure
from profiles.system import cgroup
from profiles.system.cgroup import throttled_periods

MIB = 2**20


def make_meter(seconds: float = 0.0, limit_s: float = float("inf")) -> Meter:
    return Meter(seconds_each=seconds, total=9, progress=lambda *message: None, limit_s=limit_s)


# --- copies of all sizes


@given(
    latency_s=st.floats(1e-7, 1e-3),
    bytes_per_s=st.floats(1e8, 1e12),
    sizes=st.sets(st.sampled_from(SIZES), min_size=2),
)
@settings(max_examples=200, deadline=None)
def test_a_line_is_found_again(latency_s: float, bytes_per_s: float, sizes: set[int]) -> None:
    ordered = sorted(sizes)
    times_s = [latency_s + size / bytes_per_s for size in ordered]
    found_latency_s, found_rate = fit_line(ordered, times_s)
    # What a line tells of: neither end may be so small that it drowns in the other's rounding.
    for size, time_s in zip(ordered, times_s, strict=True):
        assert found_latency_s + size / found_rate == pytest.approx(time_s, rel=1e-6)


def test_small_copies_weigh_as_much_as_large_ones() -> None:
    """Least squares of absolute errors would let a percent of the largest copy drown the latency."""
    times_s = [1e-5 + size / 50e9 for size in SIZES]
    times_s[-1] *= 1.01
    latency_s, rate = fit_line(SIZES, times_s)
    assert latency_s == pytest.approx(1e-5, rel=0.02)
    assert rate == pytest.approx(50e9, rel=0.02)


def test_a_latency_is_never_negative() -> None:
    latency_s, rate = fit_line([10, 1000], [1.0, 200.0])
    assert latency_s == 0.0
    assert 5 < rate < 10


def test_a_line_needs_larger_copies_to_take_longer() -> None:
    with pytest.raises(ValueError, match="took no longer"):
        fit_line([4096, 2**20], [2.0, 1.0])


def test_a_fit_spans_its_samples() -> None:
    points = [
        CopyPoint(num_bytes=size, time_s=time_s, low_s=0.9 * time_s, high_s=1.2 * time_s, count=7)
        for size, time_s in ((size, 1e-5 + size / 20e9) for size in SIZES)
    ]
    latency, rate = fit(points)
    assert latency.value == pytest.approx(1e-5)
    assert (latency.low, latency.high) == (pytest.approx(0.9e-5), pytest.approx(1.2e-5))
    assert rate.value == pytest.approx(20e9)
    assert (rate.low, rate.high) == (pytest.approx(20e9 / 1.2), pytest.approx(20e9 / 0.9))
    assert rate.count == 7 * len(SIZES)
    assert "4096 to 1073741824 bytes, data verified" in rate.method
    with pytest.raises(ValueError, match="two sizes"):
        fit(points[:1])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_turns_are_fair(rounds: Sequence[int]) -> None:
    turns = fair_turns(rounds)
    assert sorted(turns) == sorted(
        (which, turn) for which, n in enumerate(rounds) for turn in range(1, n + 1)
    )
    done = [0] * len(rounds)
    for which, turn in turns:
        assert turn == done[which] + 1
        done[which] = turn
        shares = [count / total for count, total in zip(done, rounds, strict=True)]
        assert max(shares) - min(shares) <= 1 / min(rounds) + 1e-9


# --- repetition and time


def reading(*throttled: str, others: int | None = 0) -> GpuReading:
    return GpuReading(
        what="", sm_clock_hz=1e9, memory_clock_hz=None, temperature_c=60.0, power_w=None,
        throttled=throttled, other_processes=others,
    )  # fmt: skip


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


def test_only_calls_that_end_under_load_count() -> None:
    answers = iter([True, True, False, True])
    assert len(busy_samples(lambda: None, lambda: next(answers), 60.0)) == 2


def test_the_share_of_bandwidth() -> None:
    share = adam.bandwidth_share(figure([3e9], ""), figure([84e9], ""))
    assert share.value == pytest.approx(0.75), "28 bytes an element of 4/3 of 84 GB/s"
    assert adam.bandwidth_share(absent("no memory"), figure([1.0], "")).method.endswith("no memory")
    assert adam.thread_counts(16, 8) == (1, 8, 16)
    assert adam.thread_counts(1, None) == (1,)


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


# --- other programs


def program(folder: Path, text: str) -> None:
    path = folder / "nvbandwidth"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_nvbandwidth_is_read(path: Path) -> None:
    program(
        path,
        'echo "memcpy CE CPU(row) -> GPU(column) bandwidth (GB/s)"\necho " 0  55.63"\n'
        'echo "SUM host_to_device_memcpy_ce 55.63"\necho "$@" "$CUDA_VISIBLE_DEVICES" > "$0.called"\n'
        'echo "SUM device_to_host_memcpy_ce 55.2"',
    )
    h2d, d2h = nvbandwidth(20.0, "GPU-1")
    assert (h2d.value, d2h.value) == (55.63e9, 55.2e9)
    assert (h2d.origin, h2d.count) == ("measured", 1)
    called = (path / "nvbandwidth.called").read_text().split()
    assert called == ["-t", "host_to_device_memcpy_ce", "device_to_host_memcpy_ce", "GPU-1"]


def test_nvbandwidth_that_fails(path: Path) -> None:
    program(path, 'echo "CUDA error: no device" >&2; exit 1')
    h2d, d2h = nvbandwidth(20.0, None)
    assert h2d == d2h == absent("nvbandwidth ended with code 1 (CUDA error: no device)")


def test_nvbandwidth_that_hangs_leaves_what_it_told(path: Path) -> None:
    program(path, 'echo "SUM host_to_device_memcpy_ce 20.0"; exec sleep 60')
    h2d, d2h = nvbandwidth(1.0, None)
    assert h2d.value == 20e9
    assert d2h.method == "nvbandwidth took more than 1 s"


def test_without_nvbandwidth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvbandwidth(1.0, None)[0] == absent("nvbandwidth is not on the PATH")


@pytest.mark.parametrize("vram", [True, False])
def test_a_child_without_a_gpu_says_why(vram: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real child; GPUs are hidden from it, so that it fails on every machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    answer, end = throw_away(120.0, vram=vram, most_bytes=2.0**20, seconds=0.1)
    assert answer == {}
    assert end.startswith("ended with code 1 (")
    assert "CUDA" in end or "NVIDIA" in end


def test_a_killed_child_leaves_its_last_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\necho "{\\"pinned_bytes\\": 1}"\necho "{\\"pinned_bytes\\": 2}"\nkill -9 $$\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(subprocesses.sys, "executable", str(script))
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
    assert [point.threads for point in machine.cpu.adam_points] == [2] * len(machine.cpu.adam_points)
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


def test_a_home_that_cannot_be_written_is_not_needed() -> None:
    """The command for real."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HOME": "/proc/none", "OMP_NUM_THREADS": "1"}
    flags = ["--brief", "--json", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "harness", "probe", *flags],
        cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["gpu"] is None


def test_the_probe_reads_the_root_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    container(tmp_path)
    monkeypatch.setattr(run, "why_no_gpu", lambda: "none")
    assert probe_machine(seconds=0.0, depth="brief", root=tmp_path).cpu.name == "Small CPU"
    assert cgroup.cpu_name() != "Small CPU"
