"""Blocks on disk together with a low-bit base and with low-rank noise: mezo's bits."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from zeroth_order_runs import (
    KNOBS,
    assert_same_steps,
    assert_same_weights,
    context,
    make_mezo,
    save,
    shorten_logs,
)

from engines.base import Context, LocatesWeights
from engines.costs.resources import disk as costs
from engines.costs.transformer import PROCESS_HOST_BYTES
from engines.methods.zo2 import Zo2
from engines.noise.visits import LOG_CAPACITY
from engines.settings.zeroth_order import Zo2Settings
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

pytestmark = pytest.mark.filterwarnings(
    "ignore::engines.offload.disk_files.PageCacheWarning"
)  # wherever /tmp may be
GRZO = {"estimator": "grzo", "noise": "rademacher", "grzo_window": 3, "weight_decay": 0.0}
LOZO = {"estimator": "lozo", "lozo_rank": 2, "lozo_window": 3, "weight_decay": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "int8": {"base": "int8"},
    "int8, rounded rarely": {"base": "int8", "fold_every": 4},
    "int4, queries": {"base": "int4", "fold_every": 3, "queries": 2},
    "fp8": {"base": "fp8", "fold_every": 3},
    "int8, signs": {"base": "int8", "fold_every": 4, "noise": "rademacher"},
    "int4, fzoo": {"base": "int4", "estimator": "fzoo", "noise": "rademacher", "queries": 2, "fold_every": 3},
    "int8, last:1": {"base": "int8", "fold_every": 2, "train": "last:1"},
    "int4, lora": {"base": "int4", "train": "lora", "lora_rank": 2},
    "lozo": LOZO,
    "lozo, int8": {**LOZO, "base": "int8"},
    "grzo": GRZO,
    "lozo, int4, queries, last:2": {**LOZO, "base": "int4", "queries": 2, "train": "last:2"},
}
READ_ONLY = {"base": "int4", "train": "lora", "lora_rank": 2}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `test_zo2_disk`."""
    monkeypatch.setattr(costs, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(costs, "SLOTS", 3)


def make(blueprint: TinyBlueprint, folder: Path, where: Context, **knobs: Any) -> Zo2:
    of = {"disk_blocks": 2, "disk_folder": str(folder), **KNOBS, **knobs}
    made = Zo2(Zo2Settings(**of), where)
    made.setup(blueprint)
    return made


@pytest.mark.parametrize("case", CASES)
def test_equals_mezo_with_evaluations_exports_and_a_resume(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a log that is full every few steps."""
    monkeypatch.setattr("engines.zeroth_order.deferred_updates.LOG_CAPACITY", 5)
    where, knobs = context(dtype="bf16"), CASES[case]
    mezo = make_mezo(tiny_blueprint("opt"), where, **knobs)
    streamed = make(tiny_blueprint("opt"), tmp_path, where, **knobs)
    batches = tiny_batches(10, "opt")
    stats = assert_same_steps(mezo, streamed, batches[:4])
    sizes = {i: form.size_bytes for i, form in enumerate(streamed._forms)}
    assert {each.h2d_bytes for each in stats} == {sum(sizes.values())}
    assert {each.disk_read_bytes for each in stats} == {sum(sizes[i] for i in streamed.blocks.on_disk)}
    assert streamed.evaluate(batches[:2]) == mezo.evaluate(batches[:2])
    assert_same_weights(mezo, streamed)
    assert streamed.realized_update_fraction() == mezo.realized_update_fraction()
    assert_same_steps(mezo, streamed, batches[4:7])
    resumed = make(tiny_blueprint("opt", seed=5), tmp_path, context(dtype="bf16", seed=1), **knobs)
    resumed.load(save(streamed, tmp_path / "of-zo2"))
    in_memory = make_mezo(tiny_blueprint("opt", seed=6), context(dtype="bf16", seed=2), **knobs)
    in_memory.load(tmp_path / "of-zo2")
    assert_same_weights(mezo, resumed)
    assert_same_steps(mezo, streamed, batches[7:])
    assert_same_steps(in_memory, resumed, batches[7:])
    for each in (streamed, resumed):
        assert_same_weights(mezo, each)
        each.close()


@pytest.mark.parametrize("case", ["int8, rounded rarely", "int4, fzoo", "lozo"])
def test_evaluations_and_exports_leave_no_trace(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.zeroth_order.deferred_updates.LOG_CAPACITY", 5)
    where, knobs, batches = context(dtype="bf16"), CASES[case], tiny_batches(10, "opt")
    looked_at, undisturbed = (make(tiny_blueprint("opt"), tmp_path, where, **knobs) for _ in range(2))
    for number, batch in enumerate(batches):
        assert looked_at.step([batch]).loss == undisturbed.step([batch]).loss
        if number in (3, 6):
            looked_at.evaluate(batches[:2])
            save(looked_at, tmp_path / f"kept-{number}")
            assert list(looked_at.weights())
    assert_same_weights(looked_at, undisturbed)
    for each in (looked_at, undisturbed):
        each.close()


@pytest.mark.parametrize("case", CASES)
def test_a_log_is_replayed_to_the_same_bits(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More updates than a log holds, and on from there."""
    log_holds = shorten_logs(monkeypatch)
    where = context(dtype="fp16", steps=90)
    knobs = {**CASES[case], "learning_rate": 1e-4}
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=2), where, **knobs)
    batches = tiny_batches(4, "opt")
    steps = log_holds // knobs.get("queries", 1) + 3
    updates = [update for step in range(steps) for update in mezo.step([batches[step % 4]]).updates]
    replayed = make(tiny_blueprint("opt", num_blocks=2), tmp_path, where, **knobs, disk_blocks=1)
    replayed.replay(updates)
    assert_same_weights(mezo, replayed)
    assert_same_steps(mezo, replayed, batches)
    assert_same_weights(mezo, replayed)
    replayed.close()


def test_a_low_bit_base_on_disk_is_never_written(tmp_path: Path) -> None:
    """Until the log is full it is as it was filled; where it is only read there is no second file at all."""
    for knobs, second in ((CASES["int8"], True), (READ_ONLY, False)):
        made = make(tiny_blueprint("opt"), tmp_path, context(steps=LOG_CAPACITY + 1), **knobs)
        assert made.blocks.disk is not None
        assert set(made.blocks.disk.files.seconds) == (set(made.blocks.on_disk) if second else set())
        files = [made.blocks.disk.files.own[index].file for index in sorted(made.blocks.on_disk)]

        def contents(of: list[Any] = files) -> list[bytes]:
            return [Path(f"/proc/self/fd/{file.descriptor}").read_bytes() for file in of]

        before = contents()
        for batch in tiny_batches(5, "opt"):
            made.step([batch])
        for _ in made.weights():
            continue
        assert contents() == before
        made.close()


def test_a_models_file_is_asked_for_no_low_bit_block(tmp_path: Path) -> None:
    """The tiles are made from its weights, once, in files of our own."""
    blueprint = tiny_blueprint("opt")
    blueprint.locate = lambda name: pytest.fail(name)  # type: ignore[attr-defined]
    assert isinstance(blueprint, LocatesWeights)
    made = make(blueprint, tmp_path, context(), base="int8")
    assert made.blocks.disk is not None
    assert set(made.blocks.disk.files.own) == set(made.blocks.on_disk)
    made.close()


def test_several_queries_fill_the_log_sooner_and_room_is_taken_beforehand(tmp_path: Path) -> None:
    for queries, second in ((1, False), (2, True)):
        made = make(tiny_blueprint("opt"), tmp_path, context(steps=LOG_CAPACITY), queries=queries)
        assert made.blocks.disk is not None
        assert bool(made.blocks.disk.files.seconds) == second
        made.close()


def test_as_many_low_bit_blocks_as_host_memory_has_no_room_for(tmp_path: Path) -> None:
    roomy = make(tiny_blueprint("opt", num_blocks=5), tmp_path, context(), base="int4", disk_blocks=0)
    block_bytes = roomy._forms[0].size_bytes
    host_bytes = PROCESS_HOST_BYTES + 3 * block_bytes + costs.host_ring_bytes(2 * block_bytes)
    where = replace(context(), host_bytes=host_bytes)
    tight = make(tiny_blueprint("opt", num_blocks=5), tmp_path, where, base="int4", disk_blocks="auto")
    assert len(tight.blocks.on_disk) == 2
    tight.close()


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_equals_mezo_on_the_gpu(
    case: str, graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a link and a disk that are late at random, and a log that is full every few steps."""
    if not graphs:
        monkeypatch.setattr("engines.zeroth_order.perturbed_model.GRAPH_SCRATCH_BYTES", 0)
    monkeypatch.setattr("engines.zeroth_order.deferred_updates.LOG_CAPACITY", 9)
    monkeypatch.setattr("engines.offload.ring.UPLOAD_BYTES", 3000)
    monkeypatch.setattr("engines.offload.ring.ring_bytes", lambda sizes: -(-max(sizes) * 5 // 4 // 512) * 512)
    where, knobs = context("cuda:0", "bf16"), CASES[case]
    delays = random.Random(3)
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=7), where, **knobs)

    def delayed(seed: int) -> Zo2:
        of = {
            "resident_blocks": 1,
            "disk_blocks": 3,
            "disk_folder": str(tmp_path / "spill"),
            **KNOBS,
            **knobs,
        }
        made = Zo2(Zo2Settings(**of), where)
        made.link_delay = lambda: delays.choice((0, 0, 50_000, 300_000))
        made.disk_delay_s = lambda: delays.choice((0.0, 0.0, 0.003))
        made.setup(tiny_blueprint("opt", num_blocks=7, seed=seed))
        return made

    streamed = delayed(0)
    batches = tiny_batches(24, "opt")
    stats = assert_same_steps(mezo, streamed, batches[:14])
    assert all(each.disk_s is not None for each in stats)
    assert streamed.evaluate(batches[:3]) == mezo.evaluate(batches[:3])
    assert_same_weights(mezo, streamed)
    assert streamed.realized_update_fraction() == mezo.realized_update_fraction()
    resumed = delayed(99)
    resumed.load(save(streamed, tmp_path / "at-14"))
    streamed.close()
    assert_same_steps(mezo, resumed, batches[14:])
    assert_same_weights(mezo, resumed)
    resumed.close()
    assert torch.zeros(1, device="cuda:0").item() == 0.0
