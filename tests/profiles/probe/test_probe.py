"""The probes: their arithmetic, a real small run on the CPU, and the GPU's path on a stand-in."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_machine import make_machine
from torch.overrides import TorchFunctionMode

from profiles.figures import FIGURES, FigureRow
from profiles.machine import Figure, Machine, absent, load_machine, save_machine
from profiles.probe import adam, buffers, cpu, gpu, launches, link, memory, multi_gpu, numa, pinned_limit, run
from profiles.probe.run import probe_machine
from profiles.probe.timing import (
    AT_LEAST,
    AT_MOST,
    Meter,
    host_samples,
    inside_overlap,
    largest_size,
    once,
    one_line,
    rate_figure,
)
from profiles.system import cgroup, nvml
from profiles.system.cgroup import HostMemoryLimit, UsableCores

MIB = 2**20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores and little memory, so that every buffer is small."""
    monkeypatch.setattr(
        cgroup,
        "host_memory",
        lambda root=cgroup.ROOT: HostMemoryLimit(
            total_bytes=128 * MIB, available_bytes=64 * MIB, swap_bytes=0, basis="cgroup limit"
        ),
    )
    monkeypatch.setattr(
        cgroup,
        "usable_cores",
        lambda root: UsableCores(count=2, basis="affinity 2 of 4 cores", total=4),
    )
    monkeypatch.setattr(cgroup, "last_level_cache_bytes", lambda root: MIB)


def check_measured(figure: Figure) -> None:
    assert figure.origin == "measured", figure.method
    assert figure.value is not None
    assert figure.low is not None
    assert figure.high is not None
    assert 0 < figure.low <= figure.value <= figure.high
    assert figure.count >= AT_LEAST - 2  # overlapping copies may be few
    assert figure.method
    assert figure.time is not None


# --- timing


def test_a_rate_is_the_median_of_rates() -> None:
    figure = rate_figure(10.0, [1.0, 4.0, 2.0], "copy")
    assert (figure.value, figure.low, figure.high, figure.count) == (5.0, 2.5, 10.0, 3)
    assert (figure.origin, figure.method) == ("measured", "copy")


def test_no_samples_are_no_figure() -> None:
    with pytest.raises(ValueError, match="no samples"):
        rate_figure(1.0, [], "copy")


def test_host_samples_are_bounded() -> None:
    calls: list[int] = []
    samples = host_samples(lambda: calls.append(1), 1.0)
    assert len(samples) == AT_MOST
    assert len(calls) > len(samples), "the warm-up is not a sample"
    assert len(host_samples(lambda: None, 0.0)) == AT_LEAST


def test_only_overlapping_calls_count() -> None:
    busy = [0.0, 1.0, 2.0, 3.0]
    assert inside_overlap([0.5, 1.0, 2.0, 3.0, 4.0], busy) == [1.0, 1.0]
    assert inside_overlap([0.0, 4.0, 8.0], busy) == []
    assert inside_overlap([-2.0, -1.0, 0.5, 1.5], busy) == [1.0]


def test_a_disturbed_call_does_not_count_where_a_size_is_chosen() -> None:
    naps_s = iter((0.1, 0.0, 0.1, 0.0))  # the first call and one more are slow
    assert once(lambda: time.sleep(next(naps_s))) < 0.05


def test_largest_size_stops_before_the_slow_one() -> None:
    tried: list[int] = []

    def time_s(size: int) -> float:
        tried.append(size)
        return size**3 * 1e-9

    assert largest_size(time_s, (128, 256, 512, 1024), 0.2) == 512
    assert tried == [128, 256, 512]
    assert largest_size(time_s, (128, 256), 1e-9) == 128
    assert largest_size(time_s, (128, 256), 1e9) == 256


def test_a_failing_measurement_does_not_stop_the_rest() -> None:
    told: list[tuple[str, int, int]] = []
    meter = Meter(seconds_each=0.5, total=3, progress=lambda *message: told.append(message))
    good = Figure(value=1.0, origin="measured", method="x")

    def bad(seconds: float) -> Figure:
        raise RuntimeError("\n  no such thing\ndetails")

    assert meter.measure("a", lambda seconds: good, absent) == good
    assert meter.measure("b", bad, absent) == absent("RuntimeError: no such thing")
    assert meter.measure("c", lambda seconds: good, absent) == good
    assert told == [("a", 0, 3), ("b", 1, 3), ("c", 2, 3)]


def test_an_interrupt_is_no_failed_measurement() -> None:
    meter = Meter(seconds_each=0.5, total=1, progress=lambda *message: None)

    def interrupt(seconds: float) -> Figure:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        meter.measure("a", interrupt, absent)


@pytest.mark.parametrize(("left_s", "taken_s"), [(0.0, 1.0), (2.5, 2.5), (1000.0, 60.0)])
def test_sustained_load_is_measured_however_late_it_is(
    monkeypatch: pytest.MonkeyPatch, left_s: float, taken_s: float
) -> None:
    taken = []

    def soak(seconds: float, watch: object) -> Figure:
        taken.append(seconds)
        return rate_figure(1.0, [1.0], "a load")

    monkeypatch.setattr(gpu, "_sustained_flops", soak)
    monkeypatch.setattr(gpu, "free", lambda: None)
    monkeypatch.setattr(Meter, "left_s", lambda _: left_s)
    meter = Meter(seconds_each=1.0, total=1, progress=lambda *_: None)
    assert gpu.sustained_flops(meter, 60.0).value == 1.0
    assert taken == [taken_s]


def test_reasons_are_one_line() -> None:
    assert one_line(ValueError("")) == "ValueError"
    assert one_line(ValueError("a\nb")) == "ValueError: a"
    assert one_line(type("_Private", (Exception,), {})("a")) == "a"
    assert len(one_line(ValueError("x" * 10_000))) < 250


# --- the CPU, for real


@pytest.mark.usefixtures("small")
def test_a_machine_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "why_no_gpu", lambda: "no GPU in this test")
    told: list[tuple[str, int, int]] = []
    threads = torch.get_num_threads()
    machine = probe_machine(lambda *message: told.append(message), seconds=0.2, depth="brief")
    assert torch.get_num_threads() == threads
    assert machine.gpu is None
    assert machine.link is None
    assert machine.gpu_absent_reason == "no GPU in this test"
    assert machine.name.startswith("no GPU, ")
    assert (machine.cpu.cores_usable, machine.cpu.threads, machine.cpu.cores_total) == (2, 2, 4)
    assert machine.cpu.cores_basis == "affinity 2 of 4 cores"
    assert machine.memory.total_bytes == 128 * MIB
    for figure in (
        machine.cpu.matmul_fp32_flops,
        machine.cpu.matmul_bf16_flops,
        machine.cpu.adam_elements_per_s,
        machine.cpu.adamw_kernel_elements_per_s,
        machine.memory.copy_bytes_per_s,
    ):
        check_measured(figure)
    assert machine.versions["torch"]
    assert [done for _, done, _ in told] == [0, 1, 2, 3, 4, 5]
    assert {total for _, _, total in told} == {5}
    path = tmp_path / "machine.json"
    save_machine(machine, path)
    assert load_machine(path) == machine


def test_adam_is_given_less_than_its_share() -> None:
    figure = adam.adam_elements_per_s(0.0, 8 * MIB, cache_bytes=2 * MIB)
    check_measured(figure)
    assert "1 tensors of 393216 elements (6 MiB)" in figure.method
    assert "cache" not in figure.method
    assert "partly from cache" in adam.adam_elements_per_s(0.0, 8 * MIB, cache_bytes=64 * MIB).method


def test_the_programs_own_adamw_is_probed_where_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = adam.adamw_kernel_elements_per_s(0.0, 8 * MIB, cache_bytes=2 * MIB)
    check_measured(figure)
    assert "393216 elements (5 MiB)" in figure.method
    assert "cache" not in figure.method
    monkeypatch.setattr("engines.cpu_updates.cpu_adam.compiled", lambda: None)
    figure = adam.adamw_kernel_elements_per_s(0.0, 8 * MIB, cache_bytes=2 * MIB)
    assert (figure.value, figure.origin) == (None, "absent")


def test_adam_runs_over_tensors_larger_than_caches() -> None:
    optimizer, elements = adam.make_optimizer(5 * 2**10, tensor_elements=2**10)
    assert (len(optimizer.param_groups[0]["params"]), elements) == (5, 5 * 2**10)
    assert adam.large_elements(2**40, 2**20) * adam.STATE_BYTES_PER_ELEMENT == 2**30
    assert adam.large_elements(2**40, 2**30) * adam.STATE_BYTES_PER_ELEMENT == 2**32
    assert adam.large_elements(2**30, 2**30) * adam.STATE_BYTES_PER_ELEMENT < 2**30


def test_a_matrix_product_fits_its_memory() -> None:
    assert "torch.mm 128 x 128" in cpu.matmul_flops("fp32", 1.0, MIB).method
    assert "torch.mm 128 x 128" in cpu.matmul_flops("fp32", 0.0, 2**40).method


def test_a_copy_fits_its_memory() -> None:
    assert "copy of 4 MiB" in memory.copy_bytes_per_s(0.0, 8 * MIB, None).method
    assert "partly from cache" in memory.copy_bytes_per_s(0.0, 8 * MIB, 64 * MIB).method


@pytest.mark.usefixtures("small")
def test_one_failing_probe_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **keywords: object) -> Figure:
        raise MemoryError("cannot allocate")

    monkeypatch.setattr(run, "why_no_gpu", lambda: "none")
    monkeypatch.setattr(cpu, "matmul_flops", fail)
    machine = probe_machine(seconds=0.0, depth="brief")
    assert machine.cpu.matmul_fp32_flops == absent("MemoryError: cannot allocate")
    check_measured(machine.cpu.adam_elements_per_s)
    check_measured(machine.memory.copy_bytes_per_s)


def test_threads_are_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    inside: list[int] = []

    def fail() -> None:
        with numa.torch_threads(before + 1):
            inside.append(torch.get_num_threads())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert inside == [before + 1]
    assert torch.get_num_threads() == before


def test_importing_the_probes_imports_no_torch() -> None:
    modules = "profiles.probe.run, profiles.display.tables, profiles.system.nvml"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("cuda", "nvml_reason", "reason"),
    [
        (None, "", "is built without GPU support"),
        ("13.0", "NVML does not start (Driver Not Loaded)", "NVML does not start (Driver Not Loaded)"),
        ("13.0", "", "torch sees no CUDA device, though the driver does"),
    ],
)
def test_why_no_gpu(monkeypatch: pytest.MonkeyPatch, cuda: str | None, nvml_reason: str, reason: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(nvml, "why_no_device", lambda: nvml_reason)
    found = run.why_no_gpu()
    assert found is not None
    assert reason in found


def test_why_no_gpu_tells_what_torch_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def unavailable() -> bool:
        warnings.warn("The NVIDIA driver on your\nsystem is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert run.why_no_gpu() == "The NVIDIA driver on your system is too old"


# --- the GPU's path without one


class FakeEvent:
    """An event that is over as soon as it is recorded; `running` makes queries say otherwise."""

    running = True

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: object = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: FakeEvent) -> float:
        return (end.time - self.time) * 1e3

    def query(self) -> bool:
        return not self.running


class OnTheHost(TorchFunctionMode):
    """Tensors asked for on `cuda` or in pinned memory are made in ordinary memory instead."""

    def __init__(self, pin_limit_bytes: int) -> None:
        super().__init__()
        self.pin_limit_bytes = pin_limit_bytes
        self.made: list[weakref.ref[torch.Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", "cpu")
        if kwargs.pop("pin_memory", False) and args[0] > self.pin_limit_bytes:
            raise RuntimeError("CUDA error: out of memory\nmore text")
        result = func(*args, **kwargs)
        if device == "cuda":
            self.made.append(weakref.ref(result))
        return result


class FakeStream:
    def wait_event(self, event: FakeEvent) -> None:
        assert event.time > 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch, small: None) -> Iterator[OnTheHost]:
    """A GPU of 64 MiB made of host memory. Shows that the path holds together, not that it measures."""
    # Before there seems to be a GPU: what it imports in its turn, such as torchao, would use it.
    importlib.import_module("transformers.models.llama.modeling_llama")
    replays, uses = itertools.count(), itertools.count()
    device = nvml.NvmlDevice(
        SimpleNamespace(
            NVMLError=RuntimeError,
            NVML_CLOCK_SM=1,
            nvmlSystemGetDriverVersion=lambda: "570.1",
            nvmlDeviceGetCurrPcieLinkGeneration=lambda handle: 3,
            nvmlDeviceGetCurrPcieLinkWidth=lambda handle: 8,
            nvmlDeviceGetMaxPcieLinkGeneration=lambda handle: 4,
            nvmlDeviceGetMaxPcieLinkWidth=lambda handle: 16,
            nvmlDeviceGetPcieReplayCounter=lambda handle: next(replays),
            nvmlDeviceGetCurrentClocksEventReasons=lambda handle: 0,
            nvmlDeviceGetPciInfo_v3=lambda handle: SimpleNamespace(busId="00000000:17:00.0"),
            nvmlDeviceGetEccMode=lambda handle: [1, 1],
            # A context of 8 MiB is there from the second reading on.
            nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=(3 + 8 * (next(uses) > 0)) * MIB),
        ),
        0,
    )
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "can_device_access_peer": lambda one, other: True,
        "device": lambda index: FakeStream(),
        "device_count": lambda: 1,
        "get_device_properties": lambda index: SimpleNamespace(name="Fake GPU", major=9, minor=0, uuid="u"),
        "mem_get_info": lambda index=0: (48 * MIB, 64 * MIB),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "Event": FakeEvent,
        "Stream": FakeStream,
        "stream": lambda stream: stream,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: None, raising=False)
    monkeypatch.setattr(nvml, "open_device", lambda index=0, uuid=None: device)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * MIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: MIB)
    monkeypatch.setattr(run.launches, "DEVICE", "cpu")  # a module goes to no other here
    monkeypatch.setattr(launches, "BLOCKS", 1)
    monkeypatch.setattr(gpu, "MATMUL_SIZES", (32, 64))
    monkeypatch.setattr(run, "SUSTAINED_S", dict.fromkeys(run.SUSTAINED_S, 0.0))
    with OnTheHost(pin_limit_bytes=2**40) as mode:
        yield mode


def is_figure(row: FigureRow) -> bool:
    return isinstance(row.find(make_machine()), Figure) or row.part == "disk"


def measured(machine: Machine) -> dict[str, Figure]:
    """The figures of `machine` that were taken, by path; each has a range, a method and a time."""
    found = {row.path: row.find(machine) for row in FIGURES}
    taken = {path: one for path, one in found.items() if isinstance(one, Figure) and one.value is not None}
    for figure in taken.values():
        check_measured(figure)
    return taken


GPU_FIGURES = (
    "gpu.copy_bytes_per_s", "gpu.matmul_bf16_flops", "gpu.matmul_fp16_flops", "gpu.matmul_fp32_flops",
)  # fmt: skip


ONLY_ON_CUDA = {"cpu.graph_launch_s", "cpu.triton_launch_s", "gpu.product_s"}


def test_a_machine_with_a_gpu(fake_cuda: OnTheHost, tmp_path: Path) -> None:
    told: list[int] = []
    machine = probe_machine(lambda what, done, total: told.append(done), seconds=0.0, depth="brief")
    assert machine.gpu is not None
    assert machine.gpu_absent_reason is None
    assert machine.name.startswith("Fake GPU, ")
    assert (machine.gpu.driver, machine.gpu.compute_capability) == ("570.1", "9.0")
    assert (machine.gpu.total_bytes, machine.gpu.free_bytes) == (64 * MIB, (48 + 8) * MIB), "as it was before"
    brief = {row.path for row in FIGURES if row.depth == "brief" and is_figure(row)}
    assert set(measured(machine)) == brief - ONLY_ON_CUDA
    assert machine.gpu.process_bytes.value == (8 - 2) * MIB
    assert "no such thing on" in machine.cpu.graph_launch_s.method
    assert machine.link is not None
    for figure in (machine.link.h2d_duplex_bytes_per_s, machine.link.d2h_duplex_bytes_per_s):
        assert "4 MiB, pinned" in figure.method, "an eighth of 64 MiB holds two buffers of 4 MiB"
    assert (machine.link.generation_loaded, machine.link.width_loaded) == (3, 8)
    assert (machine.link.generation_max, machine.link.width_max) == (4, 16)
    assert told == sorted(told)
    assert told[-1] == 19
    assert fake_cuda.made
    assert all(made() is None for made in fake_cuda.made), "every buffer is freed"
    path = tmp_path / "machine.json"
    save_machine(machine, path)
    assert load_machine(path) == machine


def test_an_idle_link_is_not_a_loaded_one(fake_cuda: OnTheHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEvent, "running", False)
    found = probe_machine(seconds=0.0, depth="brief").link
    assert found is not None
    assert (found.generation_loaded, found.width_loaded) == (None, None)
    assert (found.generation_max, found.width_max) == (4, 16)


def test_without_nvml_the_link_is_still_measured(
    fake_cuda: OnTheHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml, "open_device", lambda index, uuid: None)
    machine = probe_machine(seconds=0.0, depth="brief")
    assert machine.gpu is not None
    assert machine.gpu.driver is None
    assert machine.link is not None
    assert machine.link.generation_max is None
    check_measured(machine.link.h2d_pinned_bytes_per_s)


def test_pinned_buffers_shrink_to_what_is_allowed(fake_cuda: OnTheHost) -> None:
    fake_cuda.pin_limit_bytes = 2 * MIB
    found = probe_machine(seconds=0.0, depth="brief").link
    assert found is not None
    check_measured(found.h2d_pinned_bytes_per_s)
    assert found.h2d_pinned_bytes_per_s.method == "1 MiB, pinned"
    assert found.h2d_pageable_bytes_per_s.method == "4 MiB, pageable"


def test_refused_pinning_leaves_the_pageable_figures(fake_cuda: OnTheHost) -> None:
    fake_cuda.pin_limit_bytes = 0
    told: list[int] = []
    found = probe_machine(lambda what, done, total: told.append(done), seconds=0.0, depth="brief").link
    assert found is not None
    refused = absent("RuntimeError: CUDA error: out of memory")
    assert found.h2d_pinned_bytes_per_s == refused
    assert found.d2h_pinned_bytes_per_s == refused
    assert found.h2d_duplex_bytes_per_s == refused
    check_measured(found.h2d_pageable_bytes_per_s)
    check_measured(found.d2h_pageable_bytes_per_s)
    assert found.generation_loaded is None
    assert told[-1] == 19


def test_a_copy_that_changes_data_is_not_measured(
    fake_cuda: OnTheHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers.Buffers, "down", lambda self: None)
    found = probe_machine(seconds=0.0, depth="brief").link
    assert found is not None
    assert found.h2d_pinned_bytes_per_s.method.endswith("a copy (d2h, 4194304 bytes) changed the data")


@pytest.mark.parametrize("name", ["copy_bytes_per_s", "matmul_flops"])
def test_one_failing_gpu_measurement(
    fake_cuda: OnTheHost, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*arguments: object) -> Figure:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, name, fail)
    machine = probe_machine(seconds=0.0, depth="brief")
    failed = {
        row.path for row in FIGURES if row.find(machine) == absent("OutOfMemoryError: CUDA out of memory")
    }
    expected = {"copy_bytes_per_s": GPU_FIGURES[:1], "matmul_flops": GPU_FIGURES[1:]}
    assert failed == set(expected[name])


def test_a_gpu_that_refuses_to_start(fake_cuda: OnTheHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> Callable[[], None]:
        raise RuntimeError("CUDA error: device is busy")

    monkeypatch.setattr(torch.cuda, "device", refuse)
    machine = probe_machine(seconds=0.0, depth="brief")
    assert machine.gpu is None
    assert machine.link is None
    assert machine.gpu_absent_reason == "RuntimeError: CUDA error: device is busy"
    check_measured(machine.cpu.matmul_fp32_flops)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The arguments of calls of the process that pins, which needs a GPU; its answers are made up."""
    calls: list[dict[str, float]] = []
    pinned: dict[str, Any] = {
        "pinned_bytes": 30 * MIB, "step_bytes": 10 * MIB, "refused": True,
        "stopped": "RuntimeError: CUDA error",
    }  # fmt: skip

    def child(limit_s: float, **arguments: float) -> tuple[dict[str, Any], str]:
        calls.append(arguments)
        return pinned, ""

    monkeypatch.setattr(pinned_limit, "throw_away", child)
    return calls


def test_a_default_probe_takes_the_rest_too(
    fake_cuda: OnTheHost, children: list[dict[str, float]], tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    machine = probe_machine(
        lambda what, done, total: told.append((done, total)), seconds=0.0, folder=tmp_path
    )
    assert machine.depth == "default"
    assert machine.gpu is not None
    assert machine.link is not None
    assert machine.disk is not None
    assert set(measured(machine)) == {row.path for row in FIGURES if is_figure(row)} - ONLY_ON_CUDA
    assert machine.memory.pinned_refused is True
    assert machine.memory.pinned_bytes.method.endswith("steps of 10 MiB until: RuntimeError: CUDA error")
    assert children[0]["most_bytes"] == 32 * MIB, "half of what is available"
    assert machine.link.replays == 1
    assert machine.gpu.ecc_enabled is True
    assert machine.gpu.mig_enabled is None, "this NVML does not tell"
    assert told == sorted(told)
    assert [done for done, total in told if done == total] == [told[-1][1]], "the count is right"
    assert all(made() is None for made in fake_cuda.made), "every buffer is freed"
    path = tmp_path / "machine.json"
    save_machine(machine, path)
    assert load_machine(path) == machine


@pytest.mark.parametrize(
    ("disturbed", "attempts", "of"),
    [((), 1, 0), ((0,), 2, 1), ((0, 1, 2), 4, 3), ((0, 1, 2, 3), 4, 2)],
)
def test_both_directions_are_measured_again_while_their_samples_differ(
    disturbed: tuple[int, ...], attempts: int, of: int,
    fake_cuda: OnTheHost, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Attempt i, if disturbed, has every second copy slower; the third least of all."""
    calls = itertools.count(-1)  # the first is the warm-up

    def overlapping(actions: object, rounds: int) -> list[list[float]]:
        attempt = next(calls)
        slow = (1.5 if attempt != 2 else 1.4) if attempt in disturbed else 1.0
        each = [0.01, 0.01 * slow, 0.01 * slow] * 4
        return [each, [0.01] * 8]

    monkeypatch.setattr(link, "overlapping_samples", overlapping)
    monkeypatch.setattr(link, "DUPLEX_REST_S", 0.0)
    up, down = link._duplex(buffers.Buffers(MIB, pinned=False), 0.0)
    assert next(calls) == attempts
    slow = {1: 1.0, 2: 1.0, 4: 1.0 if of == 3 else 1.4}[attempts]
    assert up.value == pytest.approx(MIB / (0.01 * slow))
    assert down.value == pytest.approx(MIB / 0.01)
    assert (f"of {attempts} attempts" in up.method) == (attempts > 1)


def test_each_gpu_alone_and_together(fake_cuda: OnTheHost) -> None:
    meter = Meter(seconds_each=0.0, total=1, progress=lambda *message: None)
    found = multi_gpu.each_gpu(meter, 2, memory_bytes=16 * MIB)
    assert [gpu.index for gpu in found] == [0, 1]
    for gpu_link in found:
        check_measured(gpu_link.h2d_bytes_per_s)
        check_measured(gpu_link.d2h_together_bytes_per_s)
        assert "4 MiB, pinned, all 2 GPUs" in gpu_link.d2h_together_bytes_per_s.method


# --- a real GPU


@pytest.mark.gpu
def test_a_real_gpu(tmp_path: Path) -> None:
    before = torch.cuda.memory_reserved()
    machine = probe_machine(folder=tmp_path)
    found = machine.link
    assert found is not None
    for one_way, both_ways in (
        (found.h2d_pinned_bytes_per_s, found.h2d_duplex_bytes_per_s),
        (found.d2h_pinned_bytes_per_s, found.d2h_duplex_bytes_per_s),
    ):
        check_measured(both_ways)
        assert one_way.value is not None
        assert both_ways.value is not None
        assert both_ways.value <= 1.1 * one_way.value
    assert found.generation_loaded is None or found.generation_loaded >= 1
    assert machine.gpu is not None
    assert set(measured(machine)) == {row.path for row in FIGURES if is_figure(row)}
    assert machine.gpu.readings
    assert machine.duration_s is not None
    assert torch.cuda.memory_reserved() <= before
    path = tmp_path / "machine.json"
    save_machine(machine, path)
    assert load_machine(path) == machine
