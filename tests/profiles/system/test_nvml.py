"""NVML through a fake `pynvml`: absent parts, renamed calls, and which GPU is meant."""

from __future__ import annotations

import os
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from profiles.machine import GpuReading
from profiles.system.nvml import DeviceSettings, LinkState, open_device, why_no_device

UUIDS = ("GPU-aaaa1111-0000", "GPU-bbbb2222-0000")


class FakeError(Exception):
    """Stands for every NVMLError."""


class FakeNvml(ModuleType):
    """Two GPUs; a handle is an index. Calls in `broken` raise as an unsupported one does."""

    NVMLError = FakeError
    NVML_CLOCK_SM = 1

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.broken: set[str] = set()
        answers: dict[str, Any] = {
            "nvmlInit": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: b"570.86.15",
            "nvmlDeviceGetCount": lambda: len(UUIDS),
            "nvmlDeviceGetHandleByIndex": self.by_index,
            "nvmlDeviceGetHandleByUUID": self.by_uuid,
            "nvmlDeviceGetName": lambda handle: f"Fake {handle}",
            "nvmlDeviceGetUUID": lambda handle: UUIDS[handle],
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=100, used=30, free=70),
            "nvmlDeviceGetCudaComputeCapability": lambda handle: [7, 5],
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 12_500,
            "nvmlDeviceGetCurrPcieLinkGeneration": lambda handle: 1,
            "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 8,
            "nvmlDeviceGetMaxPcieLinkGeneration": lambda handle: 5,
            "nvmlDeviceGetMaxPcieLinkWidth": lambda handle: 16,
            "nvmlDeviceGetGpuMaxPcieLinkGeneration": lambda handle: 6,
            "nvmlDeviceGetPcieReplayCounter": lambda handle: 3,
            "nvmlDeviceGetPciInfo_v3": lambda handle: SimpleNamespace(busId=b"00000000:17:00.0"),
            "nvmlDeviceGetClockInfo": lambda handle, domain: {1: 1980}[domain],
            "nvmlDeviceGetMaxClockInfo": lambda handle, domain: {1: 1980}[domain],
            "nvmlDeviceGetEccMode": lambda handle: [1, 0],
            "nvmlDeviceGetMigMode": lambda handle: [0, 1],
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x1 | 0x2 | 0x4 | 0x40,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x10,
            "nvmlDeviceGetComputeRunningProcesses_v3": self.processes,
            "nvmlDeviceGetComputeRunningProcesses_v2": self.processes,
        }
        for name, answer in answers.items():
            setattr(self, name, self.guarded(name, answer))

    def guarded(self, name: str, answer: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if name in self.broken:
                raise FakeError("Not Supported")
            return answer(*arguments)

        return call

    def by_index(self, index: int) -> int:
        if index >= len(UUIDS):
            raise FakeError("Invalid Argument")
        return index

    def by_uuid(self, uuid: str) -> int:
        if uuid not in UUIDS:
            raise FakeError("Not Found")
        return UUIDS.index(uuid)

    def processes(self, handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid) for pid in (os.getpid(), 7, 9, 7)]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_every_answer(library: FakeNvml) -> None:
    device = open_device()
    assert device is not None
    assert why_no_device() == ""
    assert (device.name, device.uuid, device.driver) == ("Fake 0", UUIDS[0], "570.86.15")
    assert (device.total_bytes, device.used_bytes()) == (100, 30)
    assert device.energy_j() == 12.5
    assert device.compute_capability == (7, 5)
    assert device.link() == LinkState(
        generation_now=1, width_now=8, generation_max=5, width_max=16, generation_gpu_max=6
    )


def test_conditions_and_settings(library: FakeNvml) -> None:
    device = open_device()
    assert device is not None
    assert device.reading("a copy") == GpuReading(
        what="a copy",
        sm_clock_hz=1.98e9,
        throttled=("sw_power_cap", "hw_thermal_slowdown"),
        other_processes=2,
    )
    assert device.replays() == 3
    assert device.settings() == DeviceSettings(
        bus_id="00000000:17:00.0",
        sm_clock_max_hz=1.98e9,
        ecc_enabled=True,
        mig_enabled=False,
    )


def test_older_names_of_conditions(library: FakeNvml) -> None:
    device = open_device()
    assert device is not None
    library.broken = {"nvmlDeviceGetCurrentClocksEventReasons"}
    assert device.reading("").throttled == ("sync_boost",)


def test_idle_and_user_set_clocks_are_no_throttling(library: FakeNvml) -> None:
    device = open_device()
    assert device is not None
    library.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 0x1 | 0x2  # type: ignore[attr-defined]
    assert device.reading("").throttled == ()


def test_unsupported_calls_are_not_known(library: FakeNvml) -> None:
    device = open_device()
    assert device is not None
    library.broken = {name for name in vars(library) if name.startswith("nvml")}
    assert device.name is None
    assert device.uuid is None
    assert device.driver is None
    assert device.total_bytes is None
    assert device.used_bytes() is None
    assert device.energy_j() is None
    assert device.compute_capability is None
    assert device.link() == LinkState(
        generation_now=None, width_now=None, generation_max=None, width_max=None
    )
    assert device.replays() is None
    assert device.settings() == DeviceSettings(
        bus_id=None, sm_clock_max_hz=None, ecc_enabled=None, mig_enabled=None
    )
    assert device.reading("x") == GpuReading(what="x", sm_clock_hz=None, throttled=(), other_processes=None)


def test_one_unsupported_call_leaves_the_rest(library: FakeNvml) -> None:
    library.broken = {"nvmlDeviceGetCurrPcieLinkWidth"}
    device = open_device()
    assert device is not None
    link = device.link()
    assert (link.generation_now, link.width_now, link.width_max) == (1, None, 16)


def test_an_older_name_is_used_where_the_newer_fails_or_is_missing(library: FakeNvml) -> None:
    device = open_device()
    assert device is not None
    library.broken = {"nvmlDeviceGetComputeRunningProcesses_v3"}
    assert device.reading("").other_processes == 2
    del library.nvmlDeviceGetComputeRunningProcesses_v3
    assert device.reading("").other_processes == 2


@pytest.mark.parametrize(
    ("visible", "index", "name"),
    [
        (None, 1, "Fake 1"),
        ("1", 0, "Fake 1"),
        ("1,0", 1, "Fake 0"),
        (" 1 , 0", 0, "Fake 1"),
        ("GPU-bbbb2222-0000", 0, "Fake 1"),
        ("GPU-bbbb", 0, "Fake 1"),
    ],
)
def test_visible_devices_decide(
    library: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, name: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    device = open_device(index)
    assert device is not None
    assert device.name == name


@pytest.mark.parametrize(("visible", "index"), [("", 0), ("-1", 0), ("0", 1), ("-1,0", 1), ("none", 0)])
def test_hidden_devices(library: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str, index: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert open_device(index) is None
    assert why_no_device(index) == f"CUDA_VISIBLE_DEVICES='{visible}' shows no GPU {index}"


@pytest.mark.parametrize("uuid", ["bbbb2222-0000", "GPU-bbbb2222-0000"])
def test_a_uuid_wins_over_visible_devices(
    library: FakeNvml, monkeypatch: pytest.MonkeyPatch, uuid: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    device = open_device(0, uuid)
    assert device is not None
    assert device.uuid == UUIDS[1]


def test_unknown_devices_have_a_reason(library: FakeNvml) -> None:
    assert open_device(5) is None
    assert why_no_device(5) == "NVML does not give GPU 5 (Invalid Argument)"
    assert open_device(0, "cccc") is None
    assert why_no_device(0, "cccc") == "NVML knows no GPU cccc"


def test_without_a_driver(library: FakeNvml) -> None:
    library.broken = {"nvmlInit"}
    assert open_device() is None
    assert why_no_device() == "NVML does not start (Not Supported)"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_device() is None
    assert why_no_device() == "the package nvidia-ml-py is not installed"


@pytest.mark.gpu
def test_a_real_gpu() -> None:
    import torch

    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    device = open_device(0, None if uuid is None else str(uuid))
    assert device is not None, why_no_device()
    # What earlier tests freed, torch's allocator still holds, and a new block might come out of that.
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = device.used_bytes()
    block = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    assert before is not None
    # NVML's figure follows an allocation after a while.
    deadline_s = time.monotonic() + 10
    while (after := device.used_bytes()) is not None and after - before < block.numel():
        assert time.monotonic() < deadline_s, f"{before} bytes before, {after} after {block.numel()} more"
        time.sleep(0.05)
    assert after is not None
