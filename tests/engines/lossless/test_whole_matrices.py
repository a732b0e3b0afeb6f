"""Matrices that an update leaves no room for in lossless tiles, in the middle of a run: the bits of a full
base all the same."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import in_ranks
from zeroth_order_runs import (
    KNOBS,
    Engine,
    assert_same_steps,
    assert_same_weights,
    context,
    make_mezo,
    make_zo2,
    save,
)

from engines.base import StepStats, Update
from engines.decoding import GenerationRequest
from engines.methods.zo2 import Zo2
from engines.settings.zeroth_order import Zo2Settings
from engines.world import ALONE, World
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

BF16 = context(dtype="bf16")
CROWDED = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.gate_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.2.self_attn.o_proj.weight",
]
"""In the middle of a run of matrices that lie together, and at its ends."""
COMBINATIONS: list[dict[str, Any]] = [
    {"fold_every": 3},
    {"train": "last:1", "fold_every": 2},
    {"noise": "rademacher", "queries": 2, "fold_every": 2},
    {"estimator": "fzoo", "noise": "rademacher", "queries": 2, "learning_rate": 1e-5},
    {"estimator": "lozo", "lozo_window": 2, "weight_decay": 0.0},
    {"estimator": "grzo", "noise": "rademacher", "grzo_window": 2, "weight_decay": 0.0},
]


def crowding(num_blocks: int = 3, seed: int = 0) -> TinyBlueprint:
    """With matrices that have room while half of their weights are zero: an update makes those tiny beside
    the others."""
    blueprint = tiny_blueprint("llama", num_blocks=num_blocks, seed=seed)
    names = dict(blueprint.reference.named_parameters()).keys()
    for name in CROWDED:
        assert name in names
        weight = blueprint.reference.get_parameter(name)
        with torch.no_grad():
            weight[:, ::2] = 0.0
            weight[:, 1::2] = weight[:, 1::2].sign() * 32.0
    return blueprint


@pytest.mark.parametrize("knobs", COMBINATIONS, ids=str)
def test_bits_are_those_of_a_full_base(knobs: dict[str, Any], tmp_path: Path) -> None:
    """In memory, streamed, with resident blocks and with some on disk; evaluated on the way."""
    in_memory = {key: value for key, value in knobs.items() if key != "fold_every"}
    full = make_mezo(crowding(), BF16, **in_memory)
    on_disk = {"disk_blocks": 1, "disk_folder": str(tmp_path)}
    others: list[Engine] = [
        make_mezo(crowding(), BF16, base="lossless", **in_memory),
        make_zo2(crowding(), BF16, base="lossless", **knobs),
        make_zo2(crowding(), BF16, base="lossless", resident_blocks=1, **on_disk, **knobs),
    ]
    assert not any(each.whole_matrices or each.notes for each in others)
    batches = tiny_batches(5, "llama")
    for number, batch in enumerate(batches):
        expected = full.step([batch])
        for each in others:
            stats = each.step([batch])
            assert (stats.loss, stats.updates) == (expected.loss, expected.updates)
        if number == 2:
            found = full.evaluate(batches[:2])
            assert all(each.evaluate(batches[:2]) == found for each in others)
    # What is on disk is not stored yet, and some estimators make updates that find room.
    in_trained = {name for name in CROWDED if knobs.get("train") != "last:1" or ".2." in name}
    for each in others:
        assert_same_weights(full, each)
        assert each.notes
        assert in_trained.issuperset(each.whole_matrices)
        each.close()


def test_several_micro_batches() -> None:
    full = make_mezo(crowding(), BF16)
    lossless = make_zo2(crowding(), BF16, base="lossless", fold_every=2)
    batches = tiny_batches(10, "llama")
    for start in range(0, 10, 2):
        group = batches[start : start + 2]
        assert full.step(group).updates == lossless.step(group).updates
    assert set(lossless.whole_matrices) == set(CROWDED)
    assert_same_weights(full, lossless)


@pytest.mark.gpu
def test_copies_that_are_late_change_nothing() -> None:
    """Whole matrices come and go between those of the ring, which are held up at random."""
    where = context("cuda", "bf16")
    late = Zo2(Zo2Settings(**KNOBS, base="lossless", fold_every=2), where)
    chosen = random.Random(0)
    late.link_delay = lambda: chosen.randrange(2_000_000)
    late.setup(crowding())
    batches = tiny_batches(4, "llama")
    assert_same_steps(full := make_mezo(crowding(), where), late, [batches[i % 4] for i in range(60)])
    assert set(late.whole_matrices) == set(CROWDED)
    assert_same_weights(full, late)
    late.close()


def test_saved_resumed_replayed_and_exported(tmp_path: Path) -> None:
    """A checkpoint of weights without room is read by either base, a log makes the same weights."""
    batches = tiny_batches(8, "llama")
    full = make_zo2(crowding(), BF16, fold_every=2)
    lossless = make_zo2(crowding(), BF16, base="lossless", fold_every=3)
    updates = []
    for batch in batches[:5]:
        updates += full.step([batch]).updates
        lossless.step([batch])
    folders = [save(each, tmp_path / str(number)) for number, each in enumerate((full, lossless))]
    resumed: list[Engine] = [
        make_zo2(crowding(seed=1), BF16, base=base, fold_every=2) for base in ("full", "lossless", "lossless")
    ]
    resumed.append(make_mezo(crowding(seed=1), BF16, base="lossless"))
    for each, folder in zip(resumed, folders[::-1] + folders, strict=True):
        each.load(folder)
    replayed: list[Engine] = [
        make_zo2(crowding(), BF16, base="lossless", disk_blocks=1, disk_folder=str(tmp_path)),
        make_mezo(crowding(), BF16, base="lossless"),
    ]
    for each in replayed:
        each.replay(updates)
    everyone = [lossless, *resumed, *replayed]
    for batch in batches[5:]:
        expected = full.step([batch]).updates
        assert all(each.step([batch]).updates == expected for each in everyone)
    for each in everyone:
        assert_same_weights(full, each)
        assert set(each.whole_matrices) == (set() if each is resumed[0] else set(CROWDED))
        each.close()


def test_a_log_that_is_longer_than_what_is_deferred() -> None:
    """Replayed in parts that fill the log."""
    updates = [
        Update(step=step, learning_rate=1e-3, projected_gradient=0.3 - step % 3, weight_decay=0.1)
        for step in range(70)
    ]
    full = make_mezo(crowding(), BF16)
    full.replay(updates)
    for each in (make_zo2(crowding(), BF16, base="lossless"), make_mezo(crowding(), BF16, base="lossless")):
        each.replay(updates)
        assert set(each.whole_matrices) == set(CROWDED)
        assert_same_weights(full, each)


def test_text_is_that_of_a_full_base() -> None:
    request, batches = (
        GenerationRequest(prompts=((1, 2, 3), (4, 5)), max_new_tokens=4),
        tiny_batches(2, "llama"),
    )
    said = []
    for base in ("full", "lossless"):
        made = make_zo2(crowding(), BF16, base=base, resident_blocks=1, fold_every=2)
        for batch in batches:
            made.step([batch])
        said.append([each.tokens for each in made.generate(request)])
    assert said[0] == said[1]


def steps_of(world: World, knobs: dict[str, Any], folder: Path) -> tuple[list[StepStats], dict[str, Any]]:
    """Some steps, then as a resumed run does, rank 0 before the others: a checkpoint and what came after
    it."""
    where = replace(context(dtype="bf16", accumulation=2), world=world)
    batches = tiny_batches(6, "llama")
    groups = [batches[i : i + 2] for i in range(0, 6, 2)]
    made = make_zo2(crowding(5), where, base="lossless", **knobs)
    stats = [made.step(groups[0])]
    if world.rank == 0:
        save(made, folder / f"of-{world.size}")
    stats += [made.step(group) for group in groups[1:]]
    assert set(made.whole_matrices)
    weights = dict(made.weights())
    again = make_zo2(crowding(5), where, base="lossless", **knobs)
    world.barrier()
    for rank in range(world.size):
        if rank == world.rank:
            again.load(folder / f"of-{world.size}")
            again.replay([update for each in stats[1:] for update in each.updates])
        world.barrier()
    for name, weight in again.weights() if world.rank == 0 else ():
        assert torch.equal(weight, weights[name]), name
    stats += [again.step(groups[0])]
    assert made.step(groups[0]).updates == stats[-1].updates
    return stats, dict(again.weights())


@pytest.mark.parametrize(
    "knobs",
    [{"fold_every": 2}, {"resident_blocks": 1, "queries": 2, "sharded_upload": True}],
    ids=str,
)
def test_ranks_find_the_same(knobs: dict[str, Any], tmp_path: Path) -> None:
    alone_stats, alone = steps_of(ALONE, {**knobs, "sharded_upload": False}, tmp_path)
    for stats, weights in in_ranks(2, partial(steps_of, knobs=knobs, folder=tmp_path)):
        assert [each.updates for each in stats] == [each.updates for each in alone_stats]
        assert all(torch.equal(weight, weights[name]) for name, weight in alone.items())
