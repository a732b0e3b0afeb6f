"""Processors, nodes and ports on a laid-out file tree."""

from __future__ import annotations

from pathlib import Path

import pytest
from cgroup_trees import write

from profiles.system.topology import Port, cpus_of_node, numa_node_of, numa_nodes, port_above, processors


def test_nothing_is_known() -> None:
    nowhere = Path("/none")
    found = processors(nowhere)
    assert (found.cores_physical, found.sockets, found.numa_nodes, found.governor) == (None,) * 4
    assert found.instruction_sets == ()
    assert cpus_of_node(0, nowhere) == frozenset()
    assert numa_node_of("00000000:17:00.0", nowhere) is None
    assert port_above("00000000:17:00.0", nowhere) == Port(generation_max=None, width_max=None)


def test_hyper_threads_are_no_cores(tmp_path: Path) -> None:
    for cpu in range(8):
        folder = f"sys/devices/system/cpu/cpu{cpu}"
        write(
            tmp_path,
            {
                f"{folder}/topology/physical_package_id": str(cpu % 4 // 2),
                f"{folder}/topology/core_id": str(cpu % 2),
                f"{folder}/cpufreq/scaling_governor": "powersave" if cpu else "performance",
            },
        )
    write(tmp_path, {"proc/cpuinfo": "processor : 0\nflags\t\t: sse2 avx2 fma avx512_bf16 amx_tile"})
    found = processors(tmp_path)
    assert (found.cores_physical, found.sockets) == (4, 2)
    assert found.governor == "performance, powersave"
    assert found.instruction_sets == ("avx2", "fma", "avx512_bf16", "amx_tile")


def test_arm_calls_them_features(tmp_path: Path) -> None:
    write(tmp_path, {"proc/cpuinfo": "Features\t: fp asimd bf16 sve"})
    assert processors(tmp_path).instruction_sets == ("asimd", "bf16", "sve")


def test_nodes_with_memory_only_are_left_out(tmp_path: Path) -> None:
    node = "sys/devices/system/node/node"
    write(tmp_path, {f"{node}0/cpulist": "0-3,8", f"{node}1/cpulist": "4-7", f"{node}2/cpulist": ""})
    assert numa_nodes(tmp_path) == (0, 1)
    assert cpus_of_node(0, tmp_path) == {0, 1, 2, 3, 8}


@pytest.mark.parametrize(
    ("speed", "width", "port"),
    [
        ("32.0 GT/s PCIe", "16", Port(generation_max=5, width_max=16)),
        ("8 GT/s", "4", Port(generation_max=3, width_max=4)),
        ("Unknown", "255", Port(generation_max=None, width_max=None)),
    ],
)
def test_the_port_above_a_gpu(tmp_path: Path, speed: str, width: str, port: Port) -> None:
    above = "sys/devices/pci0000:16/0000:16:01.0"
    write(
        tmp_path,
        {
            f"{above}/max_link_speed": speed,
            f"{above}/max_link_width": width,
            f"{above}/0000:17:00.0/numa_node": "1",
        },
    )
    devices = tmp_path / "sys/bus/pci/devices"
    devices.mkdir(parents=True)
    (devices / "0000:17:00.0").symlink_to(tmp_path / above / "0000:17:00.0")
    assert port_above("00000000:17:00.0", tmp_path) == port
    assert numa_node_of("00000000:17:00.0", tmp_path) == 1


def test_a_firmware_that_does_not_tell(tmp_path: Path) -> None:
    write(tmp_path, {"sys/bus/pci/devices/0000:17:00.0/numa_node": "-1"})
    assert numa_node_of("00000000:17:00.0", tmp_path) is None
