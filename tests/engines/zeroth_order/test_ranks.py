"""Several ranks take the steps of one process, bit for bit, in whatever order they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ThreadWorld, in_ranks
from zeroth_order_runs import context, in_groups, make_mezo, make_zo2, save

from engines.base import Batch, StepStats
from engines.errors import NonFiniteLoss, PeerLost, UserError
from engines.shapes import Dtype
from engines.world import ALONE, World, divide, part
from tiny_models import tiny_batches, tiny_blueprint

ESTIMATORS: dict[str, dict[str, Any]] = {
    "spsa": {},
    "queries": {"queries": 4, "noise": "rademacher"},
    "fzoo": {"estimator": "fzoo", "queries": 4, "noise": "rademacher"},
    "1.5-spsa": {"estimator": "1.5-spsa", "queries": 4},
    "lozo": {"estimator": "lozo", "lozo_window": 3, "weight_decay": 0.0},
    "grzo": {"estimator": "grzo", "noise": "rademacher", "grzo_window": 2, "weight_decay": 0.0},
    "lora": {"train": "lora"},
    "int8": {"base": "int8", "fold_every": 2},
    "lossless": {"base": "lossless"},
}
STEPS, ACCUMULATION = 3, 4

Run = tuple[list[StepStats], dict[str, torch.Tensor]]


def batches_of(count: int = STEPS * ACCUMULATION) -> list[Batch]:
    return tiny_batches(count, "opt")


def run_on(
    world: World,
    make: Callable[..., Any],
    knobs: Mapping[str, Any],
    dtype: Dtype = "fp32",
    accumulation: int = ACCUMULATION,
) -> Run:
    """Losses and updates of some steps, the weights after them, and an evaluation on the way."""
    where = replace(context(dtype=dtype, accumulation=accumulation), world=world)
    made = make(tiny_blueprint("opt", tied=True), where, **knobs)
    try:
        stats: list[StepStats] = []
        for number, group in enumerate(in_groups(batches_of(STEPS * accumulation), accumulation)):
            stats.append(made.step(group))
            if number == 1:
                made.evaluate(batches_of(3))
        return stats, {name: weight.clone() for name, weight in made.weights()}
    finally:
        made.close()


def assert_same_runs(one: Run, other: Run) -> None:
    assert [(each.loss, each.updates) for each in one[0]] == [(each.loss, each.updates) for each in other[0]]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(weight, other[1][name]) for name, weight in one[1].items())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_is_two_is_four_ranks(estimator: str) -> None:
    """Two of mezo and four of zo2, and mezo in one process."""
    knobs = ESTIMATORS[estimator]
    alone = run_on(ALONE, make_mezo, knobs, dtype="bf16")
    ranks: tuple[tuple[int, Callable[..., Any]], ...] = ((2, make_mezo), (4, make_zo2))
    for size, make in ranks:
        for each in in_ranks(size, partial(run_on, make=make, knobs=knobs, dtype="bf16"), seed=size):
            assert_same_runs(alone, each)


@pytest.mark.parametrize(("size", "accumulation"), [(3, 4), (3, 1), (4, 2), (2, 1)])
def test_shares_that_are_unequal_or_queries_alone(size: int, accumulation: int) -> None:
    """Three ranks of four micro-batches; ranks that have a query or two of one micro-batch."""
    knobs = ESTIMATORS["fzoo"]
    alone = run_on(ALONE, make_zo2, knobs, accumulation=accumulation)
    found = in_ranks(size, lambda world: run_on(world, make_zo2, knobs, accumulation=accumulation))
    for each in found:
        assert_same_runs(alone, each)


@pytest.mark.parametrize(
    "knobs",
    [
        {"fold_every": 3},
        {"fold_every": 2, "resident_blocks": 2, "queries": 2},
        {"fold_every": 4, "train": "last:2"},
        {"train": "lora", "base": "int8"},
        {"fold_every": 2, "base": "lossless"},
        {"fold_every": 2, "sharded_upload": True},
        {"fold_every": 3, "queries": 2, "resident_blocks": 1, "sharded_upload": True},
        {"train": "lora", "base": "lossless", "sharded_upload": True},
    ],
)
def test_blocks_that_ranks_share_are_there_once_and_written_by_one(
    knobs: dict[str, Any], tmp_path: Path
) -> None:
    """With looks at the weights, evaluations and checkpoints by one rank alone, whenever; then all replay
    what was done, and one loads the checkpoint for all, as resuming does."""
    family, count = "opt", 5
    batches = tiny_batches(6 * 4, family)

    def make(world: World) -> Any:
        where = replace(context(accumulation=4, dtype="bf16"), world=world)
        return make_zo2(tiny_blueprint(family, num_blocks=count), where, **knobs)

    def weights_of(made: Any) -> dict[str, torch.Tensor]:
        return {name: weight.clone() for name, weight in made.weights()}

    alone = make(ALONE)
    stats = [alone.step(group) for group in in_groups(batches, 4)]
    expected, updates = weights_of(alone), [update for each in stats for update in each.updates]
    after = alone.step(batches[:4])

    def act(world: ThreadWorld) -> list[bool]:
        made, found = make(world), []
        for number, group in enumerate(in_groups(batches, 4)):
            told = made.step(group)
            found.append((told.loss, told.updates) == (stats[number].loss, stats[number].updates))
            if number % 3 == world.rank:
                made.evaluate(batches[:1])
                weights_of(made)
            if number == 3 and world.rank == 0:
                save(made, tmp_path / "at-4")
        left = weights_of(made)
        found.append(all(torch.equal(left[name], weight) for name, weight in expected.items()))
        world.barrier()
        again, loaded = make(world), make(world)
        for each, log in ((again, updates), (loaded, updates[4 * len(stats[0].updates) :])):
            if world.rank == 0:  # which leads: the others come after it
                each.load(tmp_path / "at-4") if each is loaded else None
                each.replay(log)
            world.barrier()
            if world.rank > 0:
                each.load(tmp_path / "at-4") if each is loaded else None
                each.replay(log)
            world.barrier()
            if world.rank == 1:
                left = weights_of(each)
                found.append(all(torch.equal(left[name], weight) for name, weight in expected.items()))
            told = each.step(batches[:4])
            found.append((told.loss, told.updates) == (after.loss, after.updates))
        assert made.blocks.stream.shared is not None
        return found

    assert all(all(found) for found in in_ranks(3, act, seed=len(knobs)))


def test_what_goes_round_in_a_step_is_a_loss_for_each_pass() -> None:
    """16 bytes for each query of each micro-batch of a rank."""
    gathered: list[int] = []

    def act(world: ThreadWorld) -> None:
        run_on(world, make_mezo, {"queries": 2})
        gathered.append(world.meeting.gathered)

    in_ranks(2, act)
    assert 8 * max(gathered) == 2 * STEPS * 16 * 2 * (ACCUMULATION // 2)


def test_shares_that_ranks_exchange_are_each_brought_up_once() -> None:
    """Together the ranks bring up every block once a step, whatever one of them does in between."""
    knobs = {"fold_every": 2, "resident_blocks": 1, "sharded_upload": True}
    where = context(accumulation=4, dtype="bf16")
    alone = make_zo2(tiny_blueprint("opt", num_blocks=4), where, fold_every=2, resident_blocks=1)
    groups = in_groups(batches_of(16), 4)
    expected = [alone.step(group) for group in groups]

    def act(world: ThreadWorld) -> list[int]:
        made = make_zo2(tiny_blueprint("opt", num_blocks=4), replace(where, world=world), **knobs)
        found: list[int] = []
        for number, group in enumerate(groups):
            stats = made.step(group)
            assert stats.loss == expected[number].loss
            found.append(stats.h2d_bytes)
            if number == 1 and world.rank == 0:
                made.evaluate(batches_of(2))
        made.close()
        return found

    first, second = in_ranks(2, act)
    whole = expected[0].h2d_bytes
    for step in (0, 1, 3):
        assert whole <= first[step] + second[step] <= 1.1 * whole
    # What the other had exchanged by then came up whole, after the evaluation.
    assert whole / 2 < first[2] <= whole
    assert second[2] == second[1]


def test_a_loss_that_is_not_finite_on_one_rank_ends_all() -> None:
    def act(world: ThreadWorld) -> str:
        blueprint = tiny_blueprint("opt")
        if world.rank == 1:
            blueprint.reference.get_parameter("model.decoder.final_layer_norm.bias").data.fill_(float("nan"))
        made = make_mezo(blueprint, replace(context(accumulation=2), world=world))
        with pytest.raises(NonFiniteLoss) as error:
            made.step(batches_of(2))
        return str(error.value)

    first, second = in_ranks(2, act)
    assert first == second
    assert "nan" in first


def test_the_others_hear_that_a_rank_is_gone() -> None:
    ends: list[str] = []

    def act(world: ThreadWorld) -> None:
        made = make_mezo(tiny_blueprint("opt"), replace(context(accumulation=3), world=world))
        made.step(batches_of(3))
        if world.rank == 2:
            raise RuntimeError("killed")
        try:
            made.step(batches_of(3))
        except PeerLost:
            ends.append("lost")
            raise

    with pytest.raises(RuntimeError, match="killed"):
        in_ranks(3, act)
    assert ends == ["lost", "lost"]


def test_too_few_micro_batches_are_refused() -> None:
    with pytest.raises(UserError, match="a step has only 1 micro-batches to divide"):
        divide(2, 1)
    with pytest.raises(UserError, match="2 micro-batches x 2 queries"):
        divide(5, 2, 2)


def test_shares_are_the_whole_once() -> None:
    for size in range(1, 9):
        for num_batches in range(1, 6):
            for num_probes in range(1, 6):
                if size > num_batches * num_probes or -(-size // min(size, num_batches)) > num_probes:
                    continue
                cells = [
                    (batch, probe)
                    for each in divide(size, num_batches, num_probes)
                    for batch in each.batches
                    for probe in each.probes
                ]
                assert len(cells) == len(set(cells)) == num_batches * num_probes
    assert [part(5, 3, which) for which in range(3)] == [range(2), range(2, 4), range(4, 5)]


def test_one_process_asks_no_other_for_anything_in_a_step() -> None:
    """So that it costs it nothing that there could be others."""

    class Nobody:
        rank = local_rank = 0
        size = local_size = 1

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was called")

    for make, knobs in ((make_mezo, {}), (make_zo2, {"fold_every": 2, "queries": 2})):
        alone = run_on(ALONE, make, knobs)
        assert_same_runs(run_on(Nobody(), make, knobs), alone)  # type: ignore[arg-type]
