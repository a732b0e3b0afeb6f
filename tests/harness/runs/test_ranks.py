"""Runs of several processes: real ones, that meet through torch.distributed and are killed for real."""

from __future__ import annotations

import io
import json
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import children, is_rank
from left_behind import children_left
from ranks import in_ranks
from scripted_runs import SHAPE, scripted_job, scripted_plan
from settings_given import given_settings

from engines.errors import UserError
from engines.transfer.process_group import ProcessGroup, meet, mesh_of
from harness.records.job import DataSource, Job, Limits, ModelSource
from harness.resolve import resolve_shape
from harness.runs.events import Stepped
from harness.runs.launch import Outcome, launch_child
from harness.runs.ranks import RENDEZVOUS, check_alike, check_gpus, place_of, places, what_to_agree_on
from harness.runs.worker import Request, execute

pytestmark = pytest.mark.usefixtures("forked_programs")


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    assert children_left() == []


def tiny_request(gpus: int, steps: int = 4) -> Request:
    """zo2 on four micro-batches a step, on so many processes."""
    job = Job(
        model=ModelSource(name="tiny-opt", random_weights=True),
        data=DataSource(train="random"),
        batch_size=1,
        seq_len=16,
        accumulation=4,
        dtype="fp32",
        steps=steps,
        warmup_steps=1,
        limits=Limits(gpus=gpus, timeout_s=240.0),
    )
    plan = replace(scripted_plan(), engine="zo2", settings=given_settings("zo2", learning_rate=1e-4))
    return Request(id="zo2-r1", job=job, shape=resolve_shape(job), plan=plan)


def launch(request: Request, out: Path, on_event: Any = lambda event: None) -> Outcome:
    return launch_child(request, out, device=None, on_event=on_event)


def scripted(out: Path, gpus: int, limits: dict[str, Any] | None = None, **settings: Any) -> Outcome:
    job = replace(scripted_job(), limits=Limits(gpus=gpus, timeout_s=60.0, **(limits or {})))
    request = Request(id="scripted-r1", job=job, shape=SHAPE, plan=scripted_plan(**settings))
    return launch(request, out)


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """Also where one is late: it stands still for a while in a step."""

    def hold_up(event: object) -> None:
        if isinstance(event, Stepped) and event.sample.step == 1:
            for process in children(recursive=False):
                if is_rank(process, 1):
                    process.suspend()
                    threading.Timer(0.5, process.resume).start()

    one, two = execute(tiny_request(1), io.StringIO(), tmp_path), launch(tiny_request(2), tmp_path, hold_up)
    assert (one.end_state, two.end_state, two.end_reason) == ("ok", "ok", None)
    assert [sample.loss for sample in one.samples] == [sample.loss for sample in two.samples]
    assert len(two.ranks) == 2
    for summary in two.ranks:
        assert summary.step_s_median is not None
        assert summary.h2d_bytes == one.summary.h2d_bytes
        assert summary.loss_last == one.summary.loss_last


def test_a_rank_that_is_killed_ends_the_run_and_is_its_reason(tmp_path: Path) -> None:
    """Anyone of them, at any step."""
    victim, at = random.randrange(2), random.randrange(1, 6)

    def kill(event: object) -> None:
        if isinstance(event, Stepped) and event.sample.step == at:
            for process in children(recursive=False):
                if is_rank(process, victim):
                    process.send_signal(signal.SIGKILL)

    outcome = launch(tiny_request(2, steps=100_000), tmp_path, kill)
    assert (outcome.end_state, outcome.end_reason) == ("crash", f"rank {victim}: killed by signal 9")
    assert len(outcome.samples) > at
    assert len(outcome.ranks) == 2


@pytest.mark.parametrize(
    ("failure", "state", "reason"),
    [
        ("oom_gpu", "oom_gpu", "rank 1: CUDA out of memory"),
        ("kill", "crash", "rank 1: killed by signal 9"),
        ("not_available", "not_available", "rank 1: scripted: the library"),
    ],
)
def test_the_rank_that_fails_says_how_the_run_ended(
    tmp_path: Path, failure: str, state: str, reason: str
) -> None:
    outcome = scripted(tmp_path, 2, fail_at_step=2, failure=failure, fail_on_rank=1, step_s=0.5)
    assert outcome.end_state == state
    assert str(outcome.end_reason).startswith(reason)
    assert len(outcome.ranks) == 2
    if failure != "kill":
        assert "--- rank 1" in (tmp_path / "logs" / "scripted-r1.log").read_text()


def test_of_ranks_that_all_fail_the_first_says_it(tmp_path: Path) -> None:
    outcome = scripted(tmp_path, 2, fail_at_step=2, failure="oom_gpu", fail_on_rank=-1)
    assert outcome.end_state == "oom_gpu"
    assert str(outcome.end_reason).startswith("rank 0: CUDA out of memory")


def test_ranks_that_hang_when_one_has_failed_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.runs.launch.ENDING_TOGETHER_S", 0.2)
    outcome = scripted(tmp_path, 2, fail_at_step=-1, failure="kill", fail_on_rank=1, step_s=60.0, sleep=True)
    assert (outcome.end_state, outcome.end_reason) == ("crash", "rank 1: killed by signal 9")


def test_the_places_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert places(Limits(), tmp_path) == []
    ranks = places(Limits(gpus=2), tmp_path)
    assert [place_of(place.environment) for place in ranks] == ranks
    assert {place.environment["GLOO_SOCKET_IFNAME"] for place in ranks} == {"lo"}
    for name, value in (("MASTER_ADDR", "host"), ("MASTER_PORT", "29500"), ("NODE_RANK", "1")):
        monkeypatch.setenv(name, value)
    second = places(Limits(gpus=2, nodes=3), tmp_path)
    assert [(place.rank, place.size, place.local_rank, place.where) for place in second] == [
        (2, 6, 0, "tcp://host:29500"),
        (3, 6, 1, "tcp://host:29500"),
    ]


def test_torchrun_starts_one_command_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own name for a machine's number does; several commands on one are refused in one line."""
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "1"}
    for name, value in ({"MASTER_ADDR": "host", "MASTER_PORT": "29500"} | torchrun).items():
        monkeypatch.setenv(name, value)
    assert [place.rank for place in places(Limits(gpus=2, nodes=2), tmp_path)] == [2, 3]
    check_gpus(Limits())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match=r"torchrun --nproc-per-node 2: .*set --nproc-per-node 1, and --gpus 2"
    ):
        check_gpus(Limits())
    monkeypatch.setenv(RENDEZVOUS, "file:///tmp/ranks")  # as our own processes have it
    check_gpus(Limits())


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("MASTER_ADDR", "", "MASTER_ADDR is not set"),
        ("MASTER_PORT", "http", "is no port"),
        ("NODE_RANK", "2", "is no number of 2 machines"),
        ("NODE_RANK", "-1", "is no number of 2 machines"),
    ],
)
def test_a_wrong_rendezvous_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, why: str
) -> None:
    for each, good in (("MASTER_ADDR", "host"), ("MASTER_PORT", "29500"), ("NODE_RANK", "0")):
        monkeypatch.setenv(each, good)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=why) as error:
        places(Limits(nodes=2), tmp_path)
    assert len(str(error.value)) < 200


def test_a_rank_that_never_comes_is_one_line(tmp_path: Path) -> None:
    for where in (f"file://{tmp_path}/ranks", "tcp://127.0.0.1:29631", "tcp://no.such.host.invalid:29500"):
        rank = 0 if where.endswith("29631") or where.startswith("file") else 1
        with pytest.raises(UserError, match="the ranks did not meet") as error:
            meet(where, rank, 2, 0, 1, join_s=1.0)
        assert len(str(error.value)) < 300


def test_ranks_that_are_unlike_are_refused_on_all() -> None:
    def act(world: Any) -> str:
        with pytest.raises(UserError) as error:
            check_alike(world, {"torch": "2.11" if world.rank else "2.10", "GPU": "H200"})
        return str(error.value)

    first, second = in_ranks(2, act)
    assert first == second
    assert first.startswith("rank 1: its torch is 2.11, that of rank 0 is 2.10;")
    in_ranks(2, lambda world: check_alike(world, {"torch": "2.11"}))


def test_more_gpus_than_there_are_and_methods_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.runs.ranks.visible_gpus", lambda: ["0", "1"])
    check_gpus(Limits(gpus=2), ["zo2", "mezo"])
    with pytest.raises(UserError, match="this machine shows 2"):
        check_gpus(Limits(gpus=4))
    with pytest.raises(UserError, match="galore runs on one GPU"):
        check_gpus(Limits(gpus=2), ["lora", "galore"])


class TwoGpus(ProcessGroup):
    """Rank 0 of two, as it would find the other."""

    def __init__(self, other: list[object]) -> None:
        super().__init__(0, 2, 0, 2, None)  # type: ignore[arg-type]
        self._other = other

    def exchange(self, content: bytes) -> list[bytes]:
        return [content, json.dumps(self._other).encode()]


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-0"))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    return torch.device("cuda:0")


def test_a_missing_nccl_is_one_line(a_gpu: torch.device) -> None:
    with pytest.raises(UserError, match="rank 1: its torch has no NCCL") as error:
        TwoGpus(["GPU-1", False]).of_this_machine(a_gpu)
    assert len(str(error.value)) < 200


def test_gpus_that_do_not_reach_each_other_are_one_line(
    a_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("NCCL error: unhandled system error\nLast error: no route")

    monkeypatch.setattr(torch.distributed, "new_group", fail)
    with pytest.raises(UserError, match="does not reach the others \\(NCCL error") as error:
        TwoGpus(["GPU-1", True]).of_this_machine(a_gpu)
    assert len(str(error.value)) < 250


def test_ranks_that_share_a_gpu_divide_no_weights(
    a_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "new_group", lambda *arguments, **more: object())
    with pytest.raises(UserError, match="two ranks share a GPU"):
        mesh_of(TwoGpus(["GPU-0", True]), a_gpu)


def test_unlike_machines_and_drivers_are_named() -> None:
    """What every rank tells of itself at the start."""
    own = what_to_agree_on(tiny_request(1).job, "zo2", {})
    assert {"lspzo-bench", "commit", "torch", "transformers", "triton", "GPU", "driver"} < own.keys()

    def act(world: Any) -> None:
        check_alike(world, own | ({"GPU": "NVIDIA A100"} if world.rank else {}))

    with pytest.raises(UserError, match="rank 1: its GPU is NVIDIA A100, that of rank 0 is"):
        in_ranks(2, act)
