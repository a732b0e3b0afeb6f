"""zo2 with blocks on disk gives mezo's bits, whatever the disk does, and leaves nothing there."""

from __future__ import annotations

import errno
import json
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from zeroth_order_runs import KNOBS, assert_same_steps, assert_same_weights, save, unequal_blueprint

from engines.base import Batch, Context, StoredTensor
from engines.costs.resources import disk as costs
from engines.costs.transformer import PROCESS_HOST_BYTES
from engines.costs.zo2 import disk_indices, resident_indices
from engines.errors import InfeasiblePlan, UserError
from engines.methods.mezo import Mezo
from engines.methods.zo2 import Zo2
from engines.noise.visits import LOG_CAPACITY
from engines.offload.spill_place import spill_folder
from engines.settings.parse import parse_settings
from engines.settings.zeroth_order import MezoSettings, Zo2Settings
from engines.shapes import Dtype, Workload
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

pytestmark = pytest.mark.filterwarnings(
    "ignore::engines.offload.disk_files.PageCacheWarning"
)  # wherever /tmp may be
DECODERS = ["opt", "llama", "qwen2", "gpt2"]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny block is several reads, and the ring does not hold them all."""
    monkeypatch.setattr(costs, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(costs, "SLOTS", 3)


def make(
    blueprint: TinyBlueprint,
    folder: Path,
    where: Context | None = None,
    delay_s: Callable[[], float] | None = None,
    **knobs: object,
) -> Zo2:
    knobs = {"disk_blocks": 2, "disk_folder": str(folder), **KNOBS, **knobs}
    made = Zo2(Zo2Settings(**knobs), where or context())  # type: ignore[arg-type]
    made.disk_delay_s = delay_s
    made.setup(blueprint)
    return made


def context(device: str = "cpu", dtype: Dtype = "fp32", steps: int = 60, seed: int = 7) -> Context:
    workload = Workload(batch_size=2, seq_len=16, dtype=dtype)
    return Context(device=device, workload=workload, seed=seed, total_steps=steps)


def make_mezo(blueprint: TinyBlueprint, where: Context | None = None, **knobs: object) -> Mezo:
    made = Mezo(MezoSettings(**{**KNOBS, **knobs}), where or context())  # type: ignore[arg-type]
    made.setup(blueprint)
    return made


def run(made: Zo2, batches: Sequence[Batch]) -> None:
    for batch in batches:
        made.step([batch])


def late(seed: int = 0) -> Callable[[], float]:
    """A disk that is sometimes late."""
    delays = random.Random(seed)
    return lambda: delays.choice((0.0, 0.0, 0.0, 0.003))


@pytest.mark.parametrize(
    ("fold_every", "resident_blocks", "disk_blocks", "dtype"),
    [(1, 0, 2, "fp32"), (4, 2, 2, "bf16"), (1, 1, 9, "bf16")],
)
def test_equals_mezo_with_evaluations_exports_and_a_resume(
    fold_every: int, resident_blocks: int, disk_blocks: int, dtype: Dtype, tmp_path: Path
) -> None:
    where = context(dtype=dtype)
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=6), where)
    knobs = {"fold_every": fold_every, "resident_blocks": resident_blocks, "disk_blocks": disk_blocks}
    spill = tmp_path / "spill"
    streamed = make(tiny_blueprint("opt", num_blocks=6), spill, where, late(), **knobs)
    batches, held_out = tiny_batches(24, "opt"), tiny_batches(9, "opt", seed=1)
    stats = assert_same_steps(mezo, streamed, batches[:8])
    resident = resident_indices(6, resident_blocks)
    on_disk = disk_indices(6, resident, disk_blocks)
    assert len(on_disk) == min(disk_blocks, 6 - resident_blocks)
    block_bytes = (4 if dtype == "fp32" else 2) * tiny_blueprint("opt").shape.block_parameters
    # However late the disk is, a step counts what it has computed with.
    assert {each.disk_read_bytes for each in stats} == {len(on_disk) * block_bytes}
    assert {each.h2d_bytes for each in stats} == {(6 - resident_blocks) * block_bytes}
    folded = [
        sum((i + step) % fold_every == 0 for i in range(6) if i not in resident | on_disk) * block_bytes
        for step in range(8)
    ]
    assert [each.d2h_bytes for each in stats] == [0, *folded[1:]]
    assert streamed.evaluate(held_out) == mezo.evaluate(held_out)
    assert_same_steps(mezo, streamed, batches[8:12])
    assert_same_weights(mezo, streamed)
    assert_same_steps(mezo, streamed, batches[12:15])
    other = context(seed=1, dtype=dtype)
    resumed = make(tiny_blueprint("opt", num_blocks=6, seed=99), spill, other, late(1), **knobs)
    resumed.load(save(streamed, tmp_path / "at-15"))
    assert_same_steps(mezo, streamed, batches[15:])
    assert_same_weights(mezo, streamed)
    for each, batch in zip(stats, batches[15:], strict=False):
        assert resumed.step([batch]).disk_read_bytes == each.disk_read_bytes
    streamed.close()
    resumed.close()
    assert list(spill.iterdir()) == []


@pytest.mark.parametrize("family", DECODERS)
def test_equals_mezo_for_every_family_over_ten_steps(family: str, tmp_path: Path) -> None:
    mezo = make_mezo(tiny_blueprint(family, tied=True))
    streamed = make(tiny_blueprint(family, tied=True), tmp_path, disk_blocks=2)
    assert_same_steps(mezo, streamed, tiny_batches(10, family))
    assert_same_weights(mezo, streamed)
    streamed.close()


def test_equals_mezo_when_resumed_from_a_checkpoint(tmp_path: Path) -> None:
    """Both ways: a checkpoint of either loads into the other."""
    mezo = make_mezo(tiny_blueprint("gpt2"))
    streamed = make(tiny_blueprint("gpt2"), tmp_path / "spill")
    batches = tiny_batches(9, "gpt2")
    assert_same_steps(mezo, streamed, batches[:3])
    folder = save(streamed, tmp_path / "at-3")
    for batch in batches[3:6]:
        streamed.step([batch])
    streamed.load(folder)
    assert_same_steps(mezo, streamed, batches[3:])
    assert_same_weights(mezo, streamed)
    streamed.load(save(mezo, tmp_path / "of-mezo"))
    assert_same_weights(mezo, streamed)
    streamed.close()


def test_blocks_of_unequal_shape_with_micro_batches(tmp_path: Path) -> None:
    mezo, streamed = make_mezo(unequal_blueprint()), make(unequal_blueprint(), tmp_path, disk_blocks=3)
    batches = tiny_batches(6, "opt")
    for step in range(3):
        micro = batches[2 * step : 2 * step + 2]
        expected, stats = mezo.step(micro), streamed.step(micro)
        assert (stats.loss, stats.projected_gradient) == (expected.loss, expected.projected_gradient)
    assert_same_weights(mezo, streamed)
    streamed.close()


@pytest.mark.parametrize("train", ["last:1", "last:2", "lora"])
def test_what_is_not_trained_is_read_all_the_same(train: str, tmp_path: Path) -> None:
    mezo = make_mezo(tiny_blueprint("llama"), train=train)
    streamed = make(tiny_blueprint("llama"), tmp_path, disk_blocks=3, train=train)
    batches = tiny_batches(4, "llama")
    stats = assert_same_steps(mezo, streamed, batches)
    assert {each.d2h_bytes for each in stats} == {0}
    assert_same_weights(mezo, streamed)
    streamed.close()


def base_of(made: Zo2) -> list[bytes]:
    """What the first files hold."""
    assert made.blocks.disk is not None
    found = []
    for index in sorted(made.blocks.on_disk):
        span = made.blocks.disk.files.own[index]
        with open(f"/proc/self/fd/{span.file.descriptor}", "rb") as file:
            found.append(file.read())
    return found


@pytest.fixture
def full_after(monkeypatch: pytest.MonkeyPatch) -> int:
    """Updates after which the log counts as full: fewer than it holds, to save time."""
    monkeypatch.setattr("engines.zeroth_order.deferred_updates.LOG_CAPACITY", 7)
    return 7


def test_the_base_is_never_written_and_a_full_log_goes_to_a_second_file(
    tmp_path: Path, full_after: int
) -> None:
    """Through three foldings, with an export in between."""
    steps = 3 * full_after + 5
    where = context(steps=steps, dtype="bf16")
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=4), where)
    streamed = make(tiny_blueprint("opt", num_blocks=4), tmp_path, where, fold_every=4)
    before = base_of(streamed)
    batches = tiny_batches(steps, "opt")
    assert_same_steps(mezo, streamed, batches[: full_after + 5])
    assert_same_weights(mezo, streamed)
    stats = assert_same_steps(mezo, streamed, batches[full_after + 5 :])
    block_bytes = 2 * tiny_blueprint("opt").shape.block_parameters
    assert max(each.d2h_bytes for each in stats) == block_bytes  # folding is no part of a step's traffic
    assert streamed.evaluate(batches[:2]) == mezo.evaluate(batches[:2])
    assert_same_weights(mezo, streamed)
    assert base_of(streamed) == before
    streamed.close()


def test_a_run_that_the_log_holds_takes_no_second_file(tmp_path: Path) -> None:
    short = make(tiny_blueprint("opt"), tmp_path, context(steps=LOG_CAPACITY))
    assert short.blocks.disk is not None
    assert short.blocks.disk.files.seconds == {}
    long = make(tiny_blueprint("opt"), tmp_path, context(steps=LOG_CAPACITY + 1))
    assert long.blocks.disk is not None
    assert sorted(long.blocks.disk.files.seconds) == sorted(long.blocks.on_disk)
    short.close()
    long.close()


def test_a_log_is_as_good_as_a_checkpoint(tmp_path: Path) -> None:
    """Replayed onto blocks on disk, through more updates than the log holds."""
    where = context(dtype="fp16", steps=200)
    mezo = make_mezo(tiny_blueprint("gpt2", tied=True), where)
    updates = [
        update
        for batch in tiny_batches(2 * LOG_CAPACITY + 6, "gpt2")
        for update in mezo.step([batch]).updates
    ]
    replayed = make(tiny_blueprint("gpt2", tied=True), tmp_path, where)
    replayed.replay(updates)
    assert_same_weights(mezo, replayed)
    assert_same_steps(mezo, replayed, tiny_batches(3, "gpt2", seed=5))
    assert_same_weights(mezo, replayed)
    replayed.close()


def test_as_many_blocks_as_host_memory_has_no_room_for(tmp_path: Path) -> None:
    block_bytes = 4 * tiny_blueprint("opt").shape.block_parameters
    ring_bytes = costs.host_ring_bytes(3 * block_bytes)
    host_bytes = PROCESS_HOST_BYTES + 3 * block_bytes + ring_bytes
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=6))
    streamed = make(
        tiny_blueprint("opt", num_blocks=6),
        tmp_path,
        replace(context(), host_bytes=host_bytes),
        disk_blocks="auto",
    )
    assert len(streamed.blocks.on_disk) == 3
    assert_same_steps(mezo, streamed, tiny_batches(2, "opt"))
    streamed.close()
    roomy = make(tiny_blueprint("opt"), tmp_path, disk_blocks="auto")
    assert not roomy.blocks.on_disk
    assert roomy.step(tiny_batches(1, "opt")).disk_direct is None


def test_too_little_host_memory_for_the_others_is_refused_before_anything_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_bytes = 4 * tiny_blueprint("opt").shape.block_parameters
    needed = block_bytes + costs.host_ring_bytes(2 * block_bytes)
    make(tiny_blueprint("opt"), tmp_path, replace(context(), host_bytes=needed)).close()  # just enough
    blueprint, filled = tiny_blueprint("opt"), list[str]()
    monkeypatch.setattr(blueprint, "fill", lambda name, out: filled.append(name))
    missing = "host memory are missing: 1 streamed blocks and the ring of those on disk take"
    with pytest.raises(InfeasiblePlan, match=re.escape(missing)):
        make(blueprint, tmp_path, replace(context(), host_bytes=needed - 1))
    assert filled == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blueprint, filled = tiny_blueprint("opt"), list[str]()
    monkeypatch.setattr(blueprint, "fill", lambda name, out: filled.append(name))

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InfeasiblePlan, match="the disk is too small"):
        make(blueprint, tmp_path)
    assert filled == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [0, 9])
def test_a_disk_that_fails_in_a_step_ends_it_with_the_cause(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a deadlock, and closing works."""
    streamed = make(tiny_blueprint("opt"), tmp_path)
    batches = tiny_batches(5, "opt")
    streamed.step([batches[0]])
    preadv, left = os.preadv, [after]

    def failing(descriptor: int, memory: Sequence[Any], at: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, memory, at)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error\)"):
        run(streamed, batches[1:])
    streamed.close()
    assert list(tmp_path.iterdir()) == []


def test_a_trace_shows_each_reader_and_what_it_read(tmp_path: Path) -> None:
    streamed = make(tiny_blueprint("opt"), tmp_path, replace(context(), trace=True))
    run(streamed, tiny_batches(2, "opt"))
    events = streamed.trace_events()
    streamed.close()
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    reads = [e for e in events if e["ph"] == "X" and lanes[e["tid"]].startswith("disk ")]
    assert {e["name"] for e in reads} == {f"block {i}" for i in streamed.blocks.on_disk}
    for tid in {e["tid"] for e in reads}:  # a thread reads one thing at a time
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in reads if e["tid"] == tid)
        assert all(end <= start + 1e-3 for (_, end), (start, _) in pairwise(mine))


def test_the_number_of_blocks_is_a_number_or_auto() -> None:
    assert parse_settings("zo2", {"disk_blocks": "7"}).disk_blocks == 7
    assert parse_settings("zo2", {"disk_blocks": "auto"}).disk_blocks == "auto"
    for wrong in ("-1", "some", "1.5"):
        with pytest.raises(UserError, match="disk_blocks"):
            parse_settings("zo2", {"disk_blocks": wrong})


def test_the_default_folder_is_in_the_users_cache_and_one_that_is_named_is_in_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert spill_folder("") == Path("/somewhere/lspzo-bench/spill")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert spill_folder("") == Path.home() / ".cache/lspzo-bench/spill"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert spill_folder("~/here") == tmp_path / "here"
    with pytest.raises(UserError, match=r"zo2\.disk_folder=~/no/here: there is no folder .*/no; make it, or"):
        spill_folder("~/no/here")


class StoredBlueprint(TinyBlueprint):
    """Its weights lie in a safetensors file."""

    path: Path

    def locate(self, name: str) -> StoredTensor | None:
        content = self.path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        entry = json.loads(content[8 : 8 + size])[name]
        first, last = entry["data_offsets"]
        return StoredTensor(
            path=self.path, offset_bytes=8 + size + first, num_bytes=last - first,
            shape=tuple(entry["shape"]), dtype="fp32",
        )  # fmt: skip


def stored_blueprint(path: Path, num_blocks: int = 4) -> StoredBlueprint:
    plain = tiny_blueprint("opt", num_blocks=num_blocks)
    made = StoredBlueprint(shape=plain.shape, model=plain.model, reference=plain.reference)
    made.path = path
    save_file({name: value.detach() for name, value in plain.reference.named_parameters()}, path)
    return made


def test_blocks_are_read_where_the_models_own_file_has_them(tmp_path: Path, full_after: int) -> None:
    """They take no room of their own until the log is full, and the file stays as it is."""
    steps = full_after + 9
    path, spill = tmp_path / "model.safetensors", tmp_path / "spill"
    blueprint = stored_blueprint(path)
    before, filled = path.read_bytes(), list[str]()
    fill = blueprint.fill

    def noted(name: str, out: Tensor) -> None:
        filled.append(name)
        fill(name, out)

    blueprint.fill = noted  # type: ignore[method-assign]
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=4), context(steps=steps))
    streamed = make(blueprint, spill, context(steps=full_after), late())
    assert not spill.exists()
    assert streamed.blocks.disk is not None
    assert all(streamed.blocks.disk.holds(i) for i in streamed.blocks.on_disk)
    read = {f".layers.{i}." for i in streamed.blocks.on_disk}
    assert len(read) == 2
    assert not any(where in name for name in filled for where in read)
    batches = tiny_batches(steps, "opt")
    assert_same_steps(mezo, streamed, batches[:5])
    assert streamed.evaluate(batches[:2]) == mezo.evaluate(batches[:2])
    assert_same_weights(mezo, streamed)
    folder = save(streamed, tmp_path / "at-5")
    streamed.close()
    resumed = make(stored_blueprint(path), spill, context(steps=steps))
    resumed.load(folder)
    assert_same_steps(mezo, resumed, batches[5:])
    assert_same_weights(mezo, resumed)
    resumed.close()
    assert path.read_bytes() == before


def test_a_file_in_another_precision_is_copied(tmp_path: Path) -> None:
    where = context(dtype="bf16")
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=4), where)
    streamed = make(stored_blueprint(tmp_path / "model.safetensors"), tmp_path / "spill", where)
    assert streamed.blocks.disk is not None
    assert not any(streamed.blocks.disk.holds(i) for i in streamed.blocks.on_disk)
    assert_same_steps(mezo, streamed, tiny_batches(3, "opt"))
    assert_same_weights(mezo, streamed)
    streamed.close()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("fold_every", [1, 4])
@pytest.mark.parametrize("graphs", [True, False])
def test_equals_mezo_on_the_gpu(
    dtype: Dtype, fold_every: int, graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a link and a disk that are late at random, in chunks smaller than a block."""
    if not graphs:
        monkeypatch.setattr("engines.zeroth_order.perturbed_model.GRAPH_SCRATCH_BYTES", 0)
    monkeypatch.setattr("engines.offload.ring.UPLOAD_BYTES", 500)
    monkeypatch.setattr("engines.offload.ring.ring_bytes", lambda sizes: -(-max(sizes) * 5 // 4 // 512) * 512)
    steps = LOG_CAPACITY + 26
    where = context("cuda:0", dtype, steps)
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=9), where)
    delays = random.Random(3)

    def delayed(seed: int) -> Zo2:
        knobs = {"fold_every": fold_every, "resident_blocks": 2, "disk_blocks": 4}
        knobs = {**KNOBS, **knobs, "disk_folder": str(tmp_path / "spill")}
        made = Zo2(Zo2Settings(**knobs), where)  # type: ignore[arg-type]
        made.link_delay = lambda: delays.choice((0, 0, 50_000, 300_000))
        made.disk_delay_s = late(seed)
        made.setup(tiny_blueprint("opt", num_blocks=9, seed=seed))
        return made

    streamed = delayed(0)
    batches, held_out = tiny_batches(steps, "opt"), tiny_batches(3, "opt", seed=1)
    stats = assert_same_steps(mezo, streamed, batches[:40])
    block_bytes = 2 * tiny_blueprint("opt").shape.block_parameters
    assert {each.disk_read_bytes for each in stats} == {4 * block_bytes}
    assert {each.h2d_bytes for each in stats} == {7 * block_bytes}
    assert all(each.disk_s is not None for each in stats)
    assert streamed.pinned_bytes == 3 * block_bytes + costs.host_ring_bytes(4 * block_bytes)
    assert streamed.evaluate(held_out) == mezo.evaluate(held_out)
    assert_same_weights(mezo, streamed)
    resumed = delayed(99)
    resumed.load(save(streamed, tmp_path / "at-40"))
    streamed.close()
    assert_same_steps(mezo, resumed, batches[40:])
    assert_same_weights(mezo, resumed)
    resumed.close()
    assert list((tmp_path / "spill").iterdir()) == []


@pytest.mark.gpu
def test_a_disk_that_fails_on_the_gpu_ends_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = make(tiny_blueprint("opt"), tmp_path, context("cuda:0", "bf16"))
    batches = tiny_batches(5, "opt")
    streamed.step([batches[0]])

    def failing(descriptor: int, memory: Sequence[Any], at: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(UserError, match="cannot be read"):
        run(streamed, batches[1:])
    streamed.close()
    assert torch.zeros(1, device="cuda:0").item() == 0.0


def test_several_queries_are_written_back_in_time(tmp_path: Path) -> None:
    """Five entries a step: a log of 64 holds those of 12 steps, and the 13th waits for a write-back."""
    steps = 16
    where, knobs = context(steps=steps), {"queries": 5}
    mezo = make_mezo(tiny_blueprint("opt"), where, **knobs)
    streamed = make(tiny_blueprint("opt"), tmp_path, where, **knobs, disk_blocks=2)
    assert_same_steps(mezo, streamed, tiny_batches(steps, "opt"))
    assert_same_weights(mezo, streamed)
    streamed.close()
