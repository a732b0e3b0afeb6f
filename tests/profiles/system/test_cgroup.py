"""Limits of cores and memory on laid-out control group trees of both versions."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from cgroup_trees import version_2, write

from profiles.system import cgroup
from profiles.system.cgroup import cpu_name, host_memory, last_level_cache_bytes, platform_name, usable_cores

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 cores, 64 GiB of which 48 are available, 8 GiB of swap."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=48 * GIB))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=8 * GIB, used=GIB))


def version_1(root: Path, own: str, mount_root: str, files: dict[str, str]) -> None:
    mounts = [
        f"{place} 24 0:{place} {mount_root} /sys/fs/cgroup/{name} rw shared:1 - cgroup cgroup rw,{name}"
        for place, name in enumerate(("cpu,cpuacct", "cpuset", "memory"))
    ]
    lines = [f"4:cpu,cpuacct:{own}", f"3:cpuset:{own}", f"2:memory:{own}", "1:name=systemd:/elsewhere"]
    write(root, {"proc/self/cgroup": "\n".join(lines), "proc/self/mountinfo": "\n".join(mounts)})
    write(root, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})


def test_no_control_groups(tmp_path: Path) -> None:
    cores = usable_cores(tmp_path)
    assert (cores.count, cores.basis, cores.total) == (16, "all 16 cores", 16)
    memory = host_memory(tmp_path)
    assert (memory.total_bytes, memory.available_bytes, memory.swap_bytes) == (64 * GIB, 48 * GIB, 8 * GIB)
    assert memory.basis == "all 64.0 GiB"


def test_control_groups_without_files(tmp_path: Path) -> None:
    version_2(tmp_path)
    assert usable_cores(tmp_path).count == 16
    assert host_memory(tmp_path).total_bytes == 64 * GIB


def test_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 7})
    cores = usable_cores(tmp_path)
    assert (cores.count, cores.basis) == (3, "affinity 3 of 16 cores")


@pytest.mark.parametrize(
    ("quota", "count", "basis"),
    [
        ("200000 100000", 2, "cgroup quota 2.0 of 16 cores"),
        ("390000 100000", 3, "cgroup quota 3.9 of 16 cores"),
        ("50000 100000", 1, "cgroup quota 0.5 of 16 cores"),
        ("3200000 100000", 16, "all 16 cores"),
        ("max 100000", 16, "all 16 cores"),
        ("nonsense", 16, "all 16 cores"),
    ],
)
def test_quota_of_version_2(tmp_path: Path, quota: str, count: int, basis: str) -> None:
    version_2(tmp_path, app__cpu_max=quota)
    cores = usable_cores(tmp_path)
    assert (cores.count, cores.basis) == (count, basis)


def test_an_outer_group_binds_the_inner_one(tmp_path: Path) -> None:
    version_2(
        tmp_path,
        own="/app/job",
        job__cpu_max="800000 100000",
        app__cpu_max="400000 100000",
        job__memory_max="max",
        app__memory_max=str(4 * GIB),
    )
    assert usable_cores(tmp_path).count == 4
    memory = host_memory(tmp_path)
    assert (memory.total_bytes, memory.basis) == (4 * GIB, "cgroup limit 4.0 of 64.0 GiB")


def test_a_sibling_does_not_bind(tmp_path: Path) -> None:
    version_2(tmp_path, own="/other", app__cpu_max="100000 100000", app__memory_max=str(GIB))
    assert usable_cores(tmp_path).count == 16
    assert host_memory(tmp_path).total_bytes == 64 * GIB


@pytest.mark.parametrize("own", ["/kubepods/pod1", "/../../outside", "/"])
def test_own_group_is_the_mount_point(tmp_path: Path, own: str) -> None:
    """In a container the mount shows the container's own group, under whatever path the host has for it."""
    version_2(
        tmp_path,
        own=own,
        mount_root="/kubepods/pod1",
        top__cpu_max="300000 100000",
        top__memory_max=str(2 * GIB),
    )
    assert usable_cores(tmp_path).count == 3
    assert host_memory(tmp_path).total_bytes == 2 * GIB


@pytest.mark.parametrize(("cpus", "count"), [("0-3", 4), ("0,2,4-5", 4), ("9", 1), ("", 16), ("0-", 16)])
def test_cpuset_of_version_2(tmp_path: Path, cpus: str, count: int) -> None:
    version_2(tmp_path)
    write(tmp_path, {"sys/fs/cgroup/app/cpuset.cpus.effective": cpus})
    cores = usable_cores(tmp_path)
    assert cores.count == count
    if count < 16:
        assert cores.basis == f"cgroup cpuset {count} of 16 cores"


def test_the_tightest_decides(tmp_path: Path) -> None:
    version_2(tmp_path, app__cpu_max="300000 100000")
    write(tmp_path, {"sys/fs/cgroup/app/cpuset.cpus.effective": "0-1"})
    assert usable_cores(tmp_path).basis == "cgroup cpuset 2 of 16 cores"


def test_memory_of_version_2(tmp_path: Path) -> None:
    version_2(
        tmp_path,
        app__memory_max=str(8 * GIB),
        app__memory_high=str(6 * GIB),
        app__memory_current=str(3 * GIB),
        app__memory_stat=f"anon {GIB}\ninactive_file {GIB}",
        app__memory_swap_max="0",
    )
    memory = host_memory(tmp_path)
    assert memory.total_bytes == 6 * GIB
    assert memory.available_bytes == 4 * GIB, "the page cache counts as available"
    assert memory.swap_bytes == 0
    assert memory.basis == "cgroup limit 6.0 of 64.0 GiB"


def test_a_group_over_its_limit_has_nothing_available(tmp_path: Path) -> None:
    version_2(tmp_path, app__memory_high=str(GIB), app__memory_current=str(2 * GIB))
    assert host_memory(tmp_path).available_bytes == 0


def test_version_1(tmp_path: Path) -> None:
    version_1(
        tmp_path,
        "/docker/abc",
        "/docker/abc",
        {
            "cpu,cpuacct/cpu.cfs_quota_us": "250000",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
            "cpuset/cpuset.cpus": "0-7",
            "memory/memory.limit_in_bytes": str(2 * GIB),
            "memory/memory.memsw.limit_in_bytes": str(3 * GIB),
            "memory/memory.usage_in_bytes": str(GIB),
            "memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB // 2}",
        },
    )
    cores = usable_cores(tmp_path)
    assert (cores.count, cores.basis) == (2, "cgroup quota 2.5 of 16 cores")
    memory = host_memory(tmp_path)
    assert memory.total_bytes == 2 * GIB
    assert memory.available_bytes == 3 * GIB // 2
    assert memory.swap_bytes == GIB


def test_version_1_nested_and_unlimited(tmp_path: Path) -> None:
    unlimited = str(2**63 - 4096)
    version_1(
        tmp_path,
        "/outer/inner",
        "/",
        {
            "cpu,cpuacct/outer/inner/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/outer/inner/cpu.cfs_period_us": "100000",
            "cpu,cpuacct/outer/cpu.cfs_quota_us": "500000",
            "cpu,cpuacct/outer/cpu.cfs_period_us": "100000",
            "memory/outer/inner/memory.limit_in_bytes": unlimited,
            "memory/outer/inner/memory.memsw.limit_in_bytes": unlimited,
            "memory/memory.limit_in_bytes": unlimited,
        },
    )
    assert usable_cores(tmp_path).count == 5
    memory = host_memory(tmp_path)
    assert (memory.total_bytes, memory.swap_bytes, memory.basis) == (64 * GIB, 8 * GIB, "all 64.0 GiB")


def test_a_mount_point_with_a_blank(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/",
            "proc/self/mountinfo": r"30 24 0:26 / /my\040groups rw - cgroup2 cgroup2 rw",
            "my groups/cpu.max": "100000 100000",
        },
    )
    assert usable_cores(tmp_path).count == 1


@pytest.mark.parametrize(
    ("release", "ending"),
    [
        ("6.8.0-45-generic", None),
        ("5.15.153.1-microsoft-standard-WSL2", " (WSL2)"),
        ("4.4.0-19041-Microsoft", " (WSL1)"),
    ],
)
def test_platform(tmp_path: Path, release: str, ending: str | None) -> None:
    write(tmp_path, {"proc/sys/kernel/osrelease": release})
    name = platform_name(tmp_path)
    assert release in name
    assert name.endswith(ending) if ending else "WSL" not in name


def test_platform_has_no_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: pytest.fail("asked for the host's name"))
    assert cgroup.platform_name()


def test_cpu_name(tmp_path: Path) -> None:
    assert cpu_name(tmp_path)
    write(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: Fast CPU 9000\nmodel name\t: Other"})
    assert cpu_name(tmp_path) == "Fast CPU 9000"


def test_last_level_caches(tmp_path: Path) -> None:
    """Four cores, two of which share each last-level cache."""
    assert last_level_cache_bytes(tmp_path) is None
    for core in range(4):
        folder = f"sys/devices/system/cpu/cpu{core}/cache"
        share = "0-1" if core < 2 else "2-3"
        for index, (level, size, shared) in enumerate([("1", "32K", str(core)), ("3", "16M", share)]):
            place = f"{folder}/index{index}"
            write(
                tmp_path,
                {f"{place}/level": level, f"{place}/size": size, f"{place}/shared_cpu_list": shared},
            )
    assert last_level_cache_bytes(tmp_path) == 32 * 2**20


def test_this_machine() -> None:
    assert usable_cores().count >= 1
    memory = host_memory()
    assert 0 <= memory.available_bytes <= memory.total_bytes
