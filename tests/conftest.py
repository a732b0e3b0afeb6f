"""Shared by all tests: the `gpu` marker, and one thread per torch operation on small machines."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib.util
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from engines.files.locks import own_folder
from profiles.system.gpu_allocator import allocator_environment

# Kernels written in Triton run under its CPU interpreter where there is no GPU; read at triton's import.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    os.environ.update(allocator_environment())  # memory is that of runs here, too; read as torch starts there
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Processes side by side share the cores: threads of OpenMP, which spin while they wait, would take them from
# each other, and tensors here are too small for several. Read at torch's import, here and in the runs that
# tests start.
if "PYTEST_XDIST_WORKER" in os.environ or not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)  # of pytest-xdist, which would make tables narrow
# Nothing that is kept for the next run is read from this user's cache, or left there.
_cache = contextlib.ExitStack()
os.environ["XDG_CACHE_HOME"] = str(_cache.enter_context(own_folder()))
atexit.register(_cache.close)
# Tests beside are no news to the runs that tests start, here and in forks.
os.getloadavg = lambda: (0.0, 0.0, 0.0)
sys.path.insert(0, str(Path(__file__).parent / "support"))


def _has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def pytest_configure(config: pytest.Config) -> None:
    """A process that runs tests has a core of its own. What it trains, here and in processes that it starts,
    then takes one thread: two wait for each other at every operation while the other core is busy, and take
    up to ten times as long. On a machine with a GPU nothing is changed: there the CPU's work counts."""
    starts_others = not hasattr(config, "workerinput") and config.getoption("numprocesses", None)
    if starts_others or not hasattr(os, "sched_setaffinity") or Path("/dev/nvidiactl").exists():
        return
    usable = sorted(os.sched_getaffinity(0))
    number = int(os.environ.get("PYTEST_XDIST_WORKER", f"gw{os.getpid()}").removeprefix("gw"))
    os.sched_setaffinity(0, {usable[number % len(usable)]})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and config.pluginmanager.hasplugin("xdist"):
            # In one process, one after the other: they measure the GPU's memory.
            item.add_marker(pytest.mark.xdist_group("gpu"))
        elif item.get_closest_marker("together") and config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    for marker in ("families", "kills", "quiet"):
        if marker not in config.option.markexpr:
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
    if any(item.get_closest_marker("gpu") for item in items) and not _has_cuda():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What the modules of all tests import is there to stay: looking for garbage among its million objects
    again and again took a quarter of the time in which tests are found."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Collections of garbage, of which some are asked for in what is tested, need not go through these
    objects either. Those that nobody asks for come with 20,000 objects more, and not with 700: they took a
    twentieth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture
def forked_programs() -> Iterator[None]:
    """Programs of ours that a test starts are forks of one that has loaded torch (`support/forked.py`): for
    tests of what they do."""
    from forked import forked

    with forked():
        yield


@pytest.fixture
def noise_drawn_once() -> Iterator[None]:
    """Engines that a test compares draw the noise of small tensors once (`support/drawn_once.py`)."""
    from drawn_once import drawn_once

    with drawn_once():
        yield


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    """What a test, or a fixture of its module, does to torch's threads ends with it: several would spin
    beside the other process, and make small operations ten times as slow."""
    _threads_as_at_the_start()
    yield
    _threads_as_at_the_start()


def _threads_as_at_the_start() -> None:
    if (torch := sys.modules.get("torch")) is not None:
        _START.setdefault("threads", int(os.environ.get("OMP_NUM_THREADS", 0)) or torch.get_num_threads())
        torch.set_num_threads(_START["threads"])


_START: dict[str, int] = {}
