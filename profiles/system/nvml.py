"""What NVIDIA's management library (NVML) says of a GPU: the only place that talks to it. No torch.

The module `pynvml` comes from the distribution nvidia-ml-py; the distribution named pynvml is
deprecated. Laptops, WSL2, MIG slices and containers each lack some of the calls, so every answer may
be `None`: not known here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from profiles.machine import GpuReading


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkState:
    """PCI Express generation and lanes, as they are now and as device and slot allow."""

    generation_now: int | None
    """Falls to 1 while the GPU idles; read it while copies run."""
    width_now: int | None
    generation_max: int | None
    width_max: int | None
    generation_gpu_max: int | None = None
    """What the GPU alone could do, in a better slot."""


THROTTLES = {
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
}
"""Bits of NVML's clock event reasons that hold clocks down under load."""


IDLE = 0x1
"""The bit of a GPU that has nothing to do, whose clock is low for that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClockState:
    """A GPU's clock now."""

    sm_clock_hz: float
    is_idle: bool
    held_by: tuple[str, ...]
    """What holds it down, by the names of `THROTTLES`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSettings:
    """What does not change while a probe runs."""

    bus_id: str | None
    sm_clock_max_hz: float | None
    ecc_enabled: bool | None
    mig_enabled: bool | None


class NvmlDevice:
    """One GPU. A call that this driver or device does not support gives `None`."""

    def __init__(self, library: Any, handle: Any) -> None:
        """`library` is the initialised `pynvml`, `handle` one of its device handles."""
        self._library = library
        self._handle = handle

    def __repr__(self) -> str:
        return f"NvmlDevice({self.name}, {self.uuid})"

    @property
    def name(self) -> str | None:
        return _text(self._device("nvmlDeviceGetName"))

    @property
    def uuid(self) -> str | None:
        """Such as `GPU-01234567-...`."""
        return _text(self._device("nvmlDeviceGetUUID"))

    @property
    def driver(self) -> str | None:
        """Version of the driver, such as `570.86.15`."""
        return _text(self._call("nvmlSystemGetDriverVersion"))

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """(major, minor), such as (9, 0)."""
        found = self._device("nvmlDeviceGetCudaComputeCapability")
        return None if found is None else (int(found[0]), int(found[1]))

    @property
    def total_bytes(self) -> int | None:
        return self._memory("total")

    def used_bytes(self) -> int | None:
        """Memory in use on the whole device: every process, their contexts and the driver's share."""
        return self._memory("used")

    def energy_j(self) -> float | None:
        """Energy of the board since the driver was loaded; a difference of two readings is of use.

        The counter moves every 20 to 100 ms. GPUs older than Volta have none.
        """
        millijoules = self._device("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def link(self) -> LinkState:
        return LinkState(
            generation_now=self._device("nvmlDeviceGetCurrPcieLinkGeneration"),
            width_now=self._device("nvmlDeviceGetCurrPcieLinkWidth"),
            generation_max=self._device("nvmlDeviceGetMaxPcieLinkGeneration"),
            width_max=self._device("nvmlDeviceGetMaxPcieLinkWidth"),
            generation_gpu_max=self._device("nvmlDeviceGetGpuMaxPcieLinkGeneration"),
        )

    def replays(self) -> int | None:
        """Packets that the link had to send again, since the driver was loaded."""
        count = self._device("nvmlDeviceGetPcieReplayCounter")
        return None if count is None else int(count)

    def settings(self) -> DeviceSettings:
        pci = self._device("nvmlDeviceGetPciInfo_v3", "nvmlDeviceGetPciInfo")
        ecc, mig = (self._device(f"nvmlDeviceGet{name}Mode") for name in ("Ecc", "Mig"))
        return DeviceSettings(
            bus_id=None if pci is None else _text(pci.busId),
            sm_clock_max_hz=self.highest_clock_hz(),
            # Both answer with the present and the pending mode.
            ecc_enabled=None if ecc is None else bool(ecc[0]),
            mig_enabled=None if mig is None else bool(mig[0]),
        )

    def reading(self, what: str) -> GpuReading:
        """Clock, throttling and other processes now: read it while the GPU works.

        Other processes are counted on the assumption that this one has a CUDA context and is in the list:
        in a container no process id tells them apart.
        """
        reasons = self._reasons()
        processes = self._processes()
        return GpuReading(
            what=what,
            sm_clock_hz=self._clock_hz("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            throttled=_held_by(reasons or 0),
            other_processes=None if processes is None else max(0, len(processes) - 1),
        )

    def clock(self) -> ClockState | None:
        """Two calls, where `reading` asks for processes too; `None` where clock or reasons are not told."""
        reasons, clock_hz = self._reasons(), self._clock_hz("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM")
        if reasons is None or clock_hz is None:
            return None
        return ClockState(
            sm_clock_hz=clock_hz, is_idle=bool(int(reasons) & IDLE), held_by=_held_by(int(reasons))
        )

    def highest_clock_hz(self) -> float | None:
        """That the card may run at."""
        return self._clock_hz("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM")

    def _reasons(self) -> Any:
        return self._device(
            "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"
        )

    def _clock_hz(self, name: str, domain: str) -> float | None:
        megahertz = self._call(name, arguments=(self._handle, getattr(self._library, domain, None)))
        return None if megahertz is None else megahertz * 1e6

    def _processes(self) -> set[int] | None:
        processes = self._device(
            "nvmlDeviceGetComputeRunningProcesses_v3",
            "nvmlDeviceGetComputeRunningProcesses_v2",
            "nvmlDeviceGetComputeRunningProcesses",
        )
        return None if processes is None else {int(process.pid) for process in processes}

    def _memory(self, kind: str) -> int | None:
        memory = self._device("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(getattr(memory, kind))

    def _device(self, *names: str) -> Any:
        return self._call(*names, arguments=(self._handle,))

    def _call(self, *names: str, arguments: tuple[Any, ...] = ()) -> Any:
        """The answer of the first of `names` that library and driver have; newest name first."""
        for name in names:
            function = getattr(self._library, name, None)
            if function is None:
                continue
            try:
                return function(*arguments)
            except self._library.NVMLError:
                continue
        return None


def open_device(index: int = 0, uuid: str | None = None) -> NvmlDevice | None:
    """The GPU that CUDA calls `cuda:<index>` in this process, or `None` (see `why_no_device`).

    NVML counts GPUs by bus address and knows nothing of CUDA_VISIBLE_DEVICES; CUDA may put the fastest
    first. `uuid`, with or without its `GPU-` prefix, settles which one is meant; torch has it in
    `torch.cuda.get_device_properties(index).uuid`. Without it, CUDA_VISIBLE_DEVICES is followed.
    """
    device, _ = _find(index, uuid)
    return device


def visible_gpus() -> list[str]:
    """The GPUs that CUDA shows this process, each by a name that CUDA_VISIBLE_DEVICES takes."""
    found: list[str] = []
    while open_device(len(found)) is not None:
        index, _ = _visible(len(found))
        found.append(str(index))
    return found


def why_no_device(index: int = 0, uuid: str | None = None) -> str:
    """Why `open_device` gives `None` for the same arguments; empty where it gives a device."""
    _, reason = _find(index, uuid)
    return reason


def _find(index: int, uuid: str | None) -> tuple[NvmlDevice | None, str]:
    try:
        import pynvml
    except ImportError:
        return None, "the package nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()  # counted by NVML; it ends with the process
    except pynvml.NVMLError as error:
        return None, f"NVML does not start ({error})"
    wanted: int | str | None = uuid
    if wanted is None:
        wanted, reason = _visible(index)
        if wanted is None:
            return None, reason
    try:
        if isinstance(wanted, int):
            handle = pynvml.nvmlDeviceGetHandleByIndex(wanted)
        else:
            handle = _handle_by_uuid(pynvml, wanted)
    except pynvml.NVMLError as error:
        return None, f"NVML does not give GPU {wanted} ({error})"
    if handle is None:
        return None, f"NVML knows no GPU {wanted}"
    return NvmlDevice(pynvml, handle), ""


def _visible(index: int) -> tuple[int | str | None, str]:
    """NVML index or UUID of the CUDA device `index`, else the reason why there is none."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return index, ""
    hidden = f"CUDA_VISIBLE_DEVICES='{value}' shows no GPU {index}"
    wanted: int | str | None = None
    # CUDA ignores every entry from the first invalid one on.
    for entry in value.split(",")[: index + 1]:
        wanted = entry.strip()
        if wanted.isdecimal():
            wanted = int(wanted)
        elif not wanted.startswith(("GPU-", "MIG-")):
            return None, hidden
    if index >= len(value.split(",")):
        return None, hidden
    return wanted, ""


def _handle_by_uuid(library: Any, uuid: str) -> Any | None:
    """`uuid` may lack its prefix, as torch gives it, or its end, as CUDA_VISIBLE_DEVICES allows."""
    names = [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"GPU-{uuid}", f"MIG-{uuid}"]
    for name in names:
        try:
            return library.nvmlDeviceGetHandleByUUID(name)
        except library.NVMLError:
            continue
    for index in range(library.nvmlDeviceGetCount()):
        handle = library.nvmlDeviceGetHandleByIndex(index)
        if (_text(library.nvmlDeviceGetUUID(handle)) or "").startswith(names[0]):
            return handle
    return None


def _held_by(reasons: int) -> tuple[str, ...]:
    return tuple(name for bit, name in THROTTLES.items() if reasons & bit)


def _text(value: Any) -> str | None:
    """Old versions of pynvml answer in bytes."""
    if value is None:
        return None
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
