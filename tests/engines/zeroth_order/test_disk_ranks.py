"""Blocks on disk that ranks read once for all of them: the bits of one process, and its bytes."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SideBySideWorld, side_by_side
from zeroth_order_runs import KNOBS, context, in_groups, make_mezo, save

from engines.base import StepStats
from engines.costs.resources import disk as costs
from engines.costs.zo2 import traffic
from engines.errors import UserError
from engines.methods.zo2 import Zo2
from engines.offload.direct_io import RawFile
from engines.settings.zeroth_order import Zo2Settings
from engines.world import ALONE, World
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

pytestmark = pytest.mark.filterwarnings(
    "ignore::engines.offload.disk_files.PageCacheWarning"
)  # wherever /tmp may be
LOZO = {"estimator": "lozo", "lozo_rank": 2, "lozo_window": 3, "weight_decay": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "spsa": {},
    "fold_every, resident": {"fold_every": 3, "resident_blocks": 1},
    "all on disk, queries": {"disk_blocks": 9, "queries": 2},
    "fzoo": {"estimator": "fzoo", "noise": "rademacher", "queries": 3},
    "1.5-spsa": {"estimator": "1.5-spsa", "queries": 2},
    "last:2": {"train": "last:2", "fold_every": 2},
    "lora": {"train": "lora", "lora_rank": 2},
    "lossless": {"base": "lossless", "fold_every": 2},
    "int8": {"base": "int8", "fold_every": 2},
    "lozo": LOZO,
    "grzo": {"estimator": "grzo", "noise": "rademacher", "grzo_window": 2, "weight_decay": 0.0},
}
GO_ON = {"spsa", "all on disk, queries", "lossless", "int8", "lozo"}
"""Cases that are resumed, too: what is loaded and replayed differs."""
FOUR = {"spsa", "fzoo", "last:2", "lozo"}
"""Cases of four ranks; the others are of two."""
SEEDING = threading.Lock()
"""Of the process's one generator, from which a model's first weights come."""
FULL_AFTER = 4
BLOCKS, ACCUMULATION = 5, 4


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny block is several reads, the ring does not hold them all, and the log is soon full."""
    monkeypatch.setattr(costs, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(costs, "SLOTS", 5)
    monkeypatch.setattr("engines.zeroth_order.deferred_updates.LOG_CAPACITY", FULL_AFTER)


def make(world: World, folder: Path, delay_s: Callable[[], float] | None = None, **knobs: Any) -> Zo2:
    of = {"disk_blocks": 3, "disk_folder": str(folder), **KNOBS, **knobs}
    where = context(accumulation=ACCUMULATION, dtype="bf16")
    made = Zo2(Zo2Settings(**of), replace(where, world=world))
    made.disk_delay_s = delay_s
    made.setup(blueprint())
    return made


def blueprint() -> TinyBlueprint:
    with SEEDING:
        return tiny_blueprint("opt", num_blocks=BLOCKS)


def late(seed: int) -> Callable[[], float]:
    delays = random.Random(seed)
    return lambda: delays.choice((0.0, 0.0, 0.0, 0.002))


def weights_of(made: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in made.weights()}


def are_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steps_of(made: Any, batches: Any) -> list[StepStats]:
    return [made.step(group) for group in in_groups(batches, ACCUMULATION)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_take_the_steps_of_one_process(case: str, tmp_path: Path) -> None:
    """Through a log that is full, or a window that ends, every few steps, with a disk that is late at random
    and ranks that evaluate, export and save alone whenever; then two that go on from what those left. Once
    they are on two machines, each of which reads for itself."""
    knobs, steps = CASES[case], FULL_AFTER + 2
    batches = tiny_batches((steps + 2) * ACCUMULATION, "opt")
    until = steps * ACCUMULATION
    mezo = make_mezo(
        tiny_blueprint("opt", num_blocks=BLOCKS), context(accumulation=ACCUMULATION, dtype="bf16"),
        **{name: value for name, value in knobs.items() if "_blocks" not in name
           and (name != "fold_every" or case == "int8")},
    )  # fmt: skip
    expected = steps_of(mezo, batches[:until])
    updates = [update for each in expected for update in each.updates]
    left = weights_of(mezo)
    evaluated = mezo.evaluate(batches[:2])
    after = steps_of(mezo, batches[until:])

    def act(world: SideBySideWorld) -> list[bool]:
        found = []
        made = make(world, tmp_path / "spill", late(world.rank), **knobs)
        try:
            for number, group in enumerate(in_groups(batches[:until], ACCUMULATION)):
                told = made.step(group)
                found.append((told.loss, told.updates) == (expected[number].loss, expected[number].updates))
                if number % (world.size + 1) == world.rank:
                    made.evaluate(batches[:1])
                if number == 2 and world.rank == 0:
                    weights_of(made)
                    save(made, tmp_path / "saved")
            found.append(made.evaluate(batches[:2]) == evaluated)
            found.append(are_same(weights_of(made), left))
        finally:
            made.close()
        return found

    def go_on(world: SideBySideWorld) -> list[bool]:
        """From the log alone, and from what the ranks before have saved."""
        found = []
        again = make(world, tmp_path / "spill", late(world.rank), **knobs)
        loaded = make(world, tmp_path / "spill", late(world.rank), **knobs)
        try:
            for each, first in ((again, 0), (loaded, 3 * len(expected[0].updates))):
                if world.rank > 0:  # the others come after the one that leads
                    world.barrier()
                if first:
                    each.load(tmp_path / "saved")
                each.replay(updates[first:])
                if world.rank == 0:
                    world.barrier()
                world.barrier()
                found.append(are_same(weights_of(each), left))
                stats = steps_of(each, batches[until:])
                found += [
                    (a.loss, a.updates) == (b.loss, b.updates) for a, b in zip(stats, after, strict=True)
                ]
        finally:
            again.close()
            loaded.close()
        return found

    found = side_by_side(4 if case in FOUR else 2, act, machines=2 if case == "last:2" else 1)
    assert all(all(each) for each in found), found
    if case in GO_ON:
        found = side_by_side(2, go_on)
        assert all(all(each) for each in found), found
    assert list((tmp_path / "spill").iterdir()) == []


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_chunk_is_read_once_for_the_machine(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step: what the ranks read is what one process reads, and what the plan says; each reads a part."""
    reads: Counter[tuple[int, int]] = Counter()
    read = RawFile.read

    def counted(file: RawFile, memory: memoryview, offset_bytes: int, needed_bytes: int) -> None:
        reads[file.descriptor, offset_bytes] += 1
        read(file, memory, offset_bytes, needed_bytes)

    alone = make(ALONE, tmp_path)
    batches = tiny_batches(4 * ACCUMULATION, "opt")
    expected = {each.disk_read_bytes for each in steps_of(alone, batches)}
    shape = tiny_blueprint("opt", num_blocks=BLOCKS).shape
    planned = traffic(shape, alone.context.workload, alone.settings).of_a_rank(ranks)
    assert expected == {planned.disk_bytes}
    alone.close()
    monkeypatch.setattr(RawFile, "read", counted)

    def act(world: SideBySideWorld) -> tuple[list[int], int]:
        made = make(world, tmp_path)
        try:
            told = [each.disk_read_bytes or 0 for each in steps_of(made, batches)]
            world.barrier()
            return told, made.pinned_bytes
        finally:
            made.close()

    found = side_by_side(ranks, act)
    sums = {sum(each) for each in zip(*(told for told, _ in found), strict=True)}
    assert sums == expected
    assert all(0 < each < max(expected) / ranks + 4096 * 3 for told, _ in found for each in told)
    # Four passes, and what is read ahead of the next.
    passes = sum(reads.values()) / len({offset for _, offset in reads}) / 3
    assert 4 <= passes <= 5.5


def test_a_disk_that_fails_ends_all_ranks_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = tiny_batches(8 * ACCUMULATION, "opt")
    read, ends = RawFile.read, []

    def act(world: SideBySideWorld) -> None:
        made = make(world, tmp_path)
        assert made.blocks.disk is not None
        first = made.blocks.disk.files.own[min(made.blocks.on_disk)]

        def failing(file: RawFile, memory: memoryview, offset_bytes: int, needed_bytes: int) -> None:
            if file.descriptor == first.file.descriptor:
                raise OSError(5, "Input/output error")
            read(file, memory, offset_bytes, needed_bytes)

        try:
            made.step(batches[:ACCUMULATION])
            world.barrier()
            if world.rank == 1:
                monkeypatch.setattr(RawFile, "read", failing)
            with pytest.raises(UserError, match=r"cannot be read \(Input/output error\)"):
                steps_of(made, batches[ACCUMULATION:])
            ends.append(world.rank)
        finally:
            made.close()

    side_by_side(2, act)
    assert sorted(ends) == [0, 1]


def test_a_trace_shows_what_its_rank_has_read(tmp_path: Path) -> None:
    """Together they have read every block, each something else."""

    def act(world: SideBySideWorld) -> tuple[Counter[str], frozenset[int]]:
        where = context(accumulation=ACCUMULATION, dtype="bf16")
        settings = Zo2Settings(disk_blocks=2, disk_folder=str(tmp_path))
        made = Zo2(settings, replace(where, world=world, trace=True))
        made.setup(blueprint())
        try:
            made.step(tiny_batches(ACCUMULATION, "opt"))
            events = made.trace_events()
        finally:
            made.close()
        lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
        reads = [e for e in events if e["ph"] == "X" and lanes[e["tid"]].startswith("disk shared")]
        return Counter(e["name"] for e in reads), made.blocks.on_disk

    (first, on_disk), (second, _) = side_by_side(2, act)
    assert set(first + second) == {f"block {i}" for i in on_disk}
    assert first
    assert second


def test_ranks_agree_on_the_blocks_that_host_memory_has_no_room_for(tmp_path: Path) -> None:
    """By the one that has the least; what is on the host they have once."""
    block_bytes = 2 * tiny_blueprint("opt").shape.block_parameters

    def act(world: SideBySideWorld) -> tuple[frozenset[int], int]:
        host_bytes = 2**30 + (world.rank + 3) * block_bytes
        where = replace(context(dtype="bf16", accumulation=2), world=world, host_bytes=host_bytes)
        settings = Zo2Settings(disk_blocks="auto", disk_folder=str(tmp_path))
        made = Zo2(settings, where)
        made.setup(blueprint())
        try:
            made.step(tiny_batches(2, "opt"))
            return made.blocks.on_disk, len(made.blocks.on_disk)
        finally:
            made.close()

    first, second = side_by_side(2, act)
    assert first == second
