from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import harness.records.environment
from harness.records.environment import (
    busy_notes,
    capability_notes,
    describe_link,
    gpu_notes,
    read_commit,
    read_environment,
)
from profiles.language import speaking, translated
from profiles.system.nvml import NvmlDevice


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(
        ["git", *identity, "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "file").write_text("one")
    git(folder, "add", "file")
    git(folder, "commit", "-q", "-m", "one")
    return folder


def test_versions_come_from_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.records.environment, "open_device", lambda: None)
    found = read_environment()
    assert (found.python, found.torch) == (platform.python_version(), version("torch"))
    assert found.transformers == version("transformers")
    assert found.packages["numpy"] == version("numpy")
    assert found.program == harness.__version__
    assert found.cores_usable >= 1
    assert found.host_memory_bytes > 0
    assert (found.gpu_name, found.gpu_driver, found.gpu_total_bytes, found.link) == (None,) * 4


def test_missing_packages_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.records.environment, "PACKAGES", ("no-such-distribution",))
    assert read_environment().packages == {}


class Library:
    """A GPU that knows its link, or does not."""

    NVMLError = RuntimeError

    def __init__(self, generation: int | None) -> None:
        self.generation = generation

    def nvmlDeviceGetName(self, handle: object) -> str:
        return "NVIDIA Test"

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"570.1"

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> Any:
        return SimpleNamespace(total=80, used=1, free=79)

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: object) -> int:
        return 1

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: object) -> int:
        if self.generation is None:
            raise self.NVMLError("not supported")
        return self.generation

    def nvmlDeviceGetCudaComputeCapability(self, handle: object) -> list[int]:
        return [7, 5]

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: object) -> int:
        return 16


def test_gpu_and_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.records.environment, "open_device", lambda: NvmlDevice(Library(5), None))
    found = read_environment()
    assert (found.gpu_name, found.gpu_driver, found.gpu_total_bytes) == ("NVIDIA Test", "570.1", 80)
    assert found.link == "PCIe 5 x16"  # not the generation 1 of an idle GPU


def test_what_the_allocator_is_told_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr(harness.records.environment, "open_device", lambda: NvmlDevice(Library(5), None))
    assert read_environment().gpu_allocator == "expandable_segments:True"
    monkeypatch.setattr(harness.records.environment, "open_device", lambda: None)
    assert read_environment().gpu_allocator is None


def test_what_is_special_of_the_gpu_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.records.environment, "open_device", lambda: NvmlDevice(Library(5), None))
    found = read_environment()
    assert found.compute_capability == "7.5"
    assert found.notes == gpu_notes() == capability_notes((7, 5))
    monkeypatch.setattr(harness.records.environment, "open_device", lambda: None)
    found = read_environment()
    assert (found.compute_capability, found.notes, gpu_notes()) == (None, (), ())


@given(major=st.integers(1, 15), minor=st.integers(0, 9))
def test_cards_from_8_0_on_are_usual(major: int, minor: int) -> None:
    notes = capability_notes((major, minor))
    assert len(notes) == (major < 8)
    assert all(f" {major}.{minor} " in note and "\n" not in note for note in notes)


def test_bf16_is_advised_against_where_it_is_emulated() -> None:
    assert capability_notes(None) == ()
    for minor in (0, 2, 5):
        (note,) = capability_notes((7, minor))
        assert "bf16" in note
        assert "--dtype fp16 is advised for mezo and zo2" in note
    (note,) = capability_notes((6, 1))
    assert "below 7.0" in note


def test_a_link_that_is_not_told_is_none() -> None:
    assert describe_link(NvmlDevice(Library(None), None)) is None


def test_commit_and_whether_tracked_files_differ(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    (checkout / "untracked").write_text("result")
    assert read_commit(checkout) == (commit, False)
    (checkout / "file").write_text("two")
    assert read_commit(checkout) == (commit, True)


def test_a_git_hook_does_not_point_elsewhere(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", str(checkout / "nowhere"))
    assert read_commit(checkout)[1] is False


def test_a_copy_inside_another_checkout_has_no_commit(checkout: Path) -> None:
    (checkout / "site-packages").mkdir()
    assert read_commit(checkout / "site-packages") == (None, None)


def test_outside_of_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_commit(tmp_path) == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_commit(harness.records.environment.PROJECT) == (None, None)


def test_other_work_on_the_machine_is_told() -> None:
    assert busy_notes(5.9, 2) == ()
    (note,) = busy_notes(13.2, 2)
    assert "13 processes for 2 cores" in note
    with speaking("ja"):
        assert translated(note).startswith("実行開始時")
