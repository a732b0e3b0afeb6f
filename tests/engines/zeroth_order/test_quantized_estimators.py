"""Estimators on a low-bit base: zo2 as mezo, and both as the full model of the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from zeroth_order_runs import (
    Engine,
    assert_all_same_steps,
    assert_replays,
    assert_same_steps,
    assert_same_weights,
    context,
    make_mezo,
    make_zo2,
    save,
    shorten_logs,
)

from engines.costs.quantized import matrix_bytes
from engines.errors import UserError
from engines.noise.philox import NoiseKey
from engines.quantized.codec import pack, unpack
from engines.quantized.quantized_pass import add_low_rank_to_tiles
from engines.settings.parse import parse_settings
from engines.settings.zeroth_order import Base
from tiny_families import blueprint_of
from tiny_models import tiny_batches, tiny_blueprint

LOZO = {"estimator": "lozo", "lozo_rank": 2, "lozo_window": 3, "weight_decay": 0.0}
FZOO = {"estimator": "fzoo", "noise": "rademacher", "queries": 3}
CASES: dict[str, dict[str, Any]] = {
    "queries": {"base": "int8", "queries": 3, "fold_every": 2},
    "queries, on turns of every step": {"base": "fp8", "queries": 2},
    "int4, queries": {"base": "int4", "queries": 2, "fold_every": 3},
    "signs": {"base": "int8", "noise": "rademacher", "fold_every": 2},
    "signs, queries": {"base": "int4", "noise": "rademacher", "queries": 2},
    "fzoo": {"base": "int8", **FZOO, "fold_every": 3},
    "fzoo, on turns of every step": {"base": "fp8", **FZOO},
    "lozo": {"base": "int8", **LOZO},
    "lozo, of the last block": {"base": "fp8", **LOZO, "train": "last:1"},
    "lozo, queries": {"base": "int4", **LOZO, "queries": 2},
}


@pytest.mark.parametrize(
    ("case", "resident_blocks"), [(case, number % 2) for number, case in enumerate(CASES)]
)
def test_zo2_equals_mezo(case: str, resident_blocks: int) -> None:
    """Also when it is evaluated in between, which must not round anything."""
    where, knobs = context(dtype="bf16"), CASES[case]
    mezo = make_mezo(tiny_blueprint("opt"), where, **knobs)
    streamed, undisturbed = (
        make_zo2(tiny_blueprint("opt"), where, resident_blocks=resident_blocks, **knobs) for _ in range(2)
    )
    batches = tiny_batches(8, "opt")
    assert_same_steps(mezo, streamed, batches[:5])
    assert streamed.evaluate(batches[:2]) == mezo.evaluate(batches[:2])
    assert_same_weights(mezo, streamed)
    assert_same_steps(mezo, streamed, batches[5:])
    for batch in batches:
        undisturbed.step([batch])
    assert_same_weights(mezo, streamed)
    assert_same_weights(streamed, undisturbed)
    assert streamed.realized_update_fraction() == mezo.realized_update_fraction()


@pytest.mark.parametrize("case", CASES)
def test_a_log_is_replayed_to_the_same_bits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More updates than a log holds, and on from there."""
    log_holds = shorten_logs(monkeypatch)
    where, knobs = context(dtype="fp16"), {**CASES[case], "learning_rate": 1e-4}
    live = make_zo2(tiny_blueprint("opt", num_blocks=2), where, **knobs)
    batches = tiny_batches(4, "opt")
    steps = log_holds // knobs.get("queries", 1) + 3
    updates = [update for step in range(steps) for update in live.step([batches[step % 4]]).updates]
    others = [make(tiny_blueprint("opt", num_blocks=2), where, **knobs) for make in (make_mezo, make_zo2)]
    assert_replays(live, updates, others)
    assert_all_same_steps(live, others, batches)


@pytest.mark.parametrize("case", CASES)
def test_resumes_bit_for_bit(case: str, tmp_path: Path) -> None:
    """In either engine, after step 3 and after step 4 of a run that goes on."""
    where, knobs = context(dtype="bf16"), CASES[case]
    straight, saved = (make_zo2(tiny_blueprint("llama"), where, **knobs) for _ in range(2))
    batches = tiny_batches(7, "llama")
    followers: list[Engine] = [saved]
    first = 0
    for saved_at in (3, 4):
        assert_all_same_steps(straight, followers, batches[first:saved_at])
        folder = save(saved, tmp_path / str(saved_at))
        for make in (make_mezo, make_zo2):
            resumed = make(tiny_blueprint("llama", seed=5), context(dtype="bf16", seed=1), **knobs)
            resumed.load(folder)
            assert_same_weights(straight, resumed)
            followers.append(resumed)
        first = saved_at
    assert_all_same_steps(straight, followers, batches[first:])


@pytest.mark.parametrize("case", ["queries", "int4, queries", "signs", "fzoo"])
def test_each_query_sees_the_updates_that_pend(case: str, tmp_path: Path) -> None:
    """The next step is that of a full model in fp32 that has them in its weights: no block's turn is near."""
    knobs = {**CASES[case], "fold_every": 8}
    low = make_mezo(tiny_blueprint("opt"), **knobs)
    batches = tiny_batches(5, "opt")
    for batch in batches[:4]:
        low.step([batch])
    plain = tiny_blueprint("opt")
    with torch.no_grad():
        for name, weight in low.weights():
            plain.reference.get_parameter(name).copy_(weight)
    of = {key: value for key, value in knobs.items() if key not in ("base", "fold_every")}
    full = make_mezo(plain, **of)
    folder = save(full, tmp_path / "saved")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "step": 4}))
    full.load(folder)
    assert_same_steps(low, full, batches[4:])


@pytest.mark.parametrize("base", ["int8", "fp8", "int4"])
def test_a_low_rank_sum_is_rounded_to_the_grid_without_bias(base: Base) -> None:
    rank, rows, columns = 3, 40, 70
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(rows * columns, generator=made) * 0.02
    left, right = torch.randn(rank, rows, generator=made) * 2e-3, torch.randn(rank, columns, generator=made)
    tiles = torch.empty(matrix_bytes(weight.numel(), base), dtype=torch.uint8)
    pack(weight, base, tiles)
    before = unpack(tiles, base, weight.numel())
    change = (left.t() @ right).reshape(-1)
    mean = torch.zeros_like(before)
    for step in range(400):
        moved = tiles.clone()
        add_low_rank_to_tiles(
            moved, base, left, right, NoiseKey(seed=1, step=step, tensor=4), stochastic=True
        )
        mean += unpack(moved, base, weight.numel()) / 400
    inside = (before + change).abs() < before.abs().max() * 0.3
    error = (mean - before - change)[inside]
    unit = before.abs().max() / 7 if base == "int4" else before.abs().max() / 16
    assert error.abs().mean() < 0.05 * unit
    assert abs(float(error.mean())) < 1e-3 * unit
    nearest = tiles.clone()
    add_low_rank_to_tiles(nearest, base, left, right, NoiseKey(seed=1, step=0, tensor=4), stochastic=False)
    again = torch.empty_like(tiles)
    add_low_rank_to_tiles(
        again.copy_(nearest), base, 0 * left, right, NoiseKey(seed=1, step=0, tensor=4), stochastic=True
    )
    assert torch.equal(again, nearest)  # what is on the grid stays there


def test_pieces_of_a_low_rank_sum_make_up_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = torch.randn(2, 90) * 1e-2, torch.randn(2, 111)
    tiles = torch.empty(matrix_bytes(90 * 111, "int8"), dtype=torch.uint8)
    pack(torch.randn(90 * 111) * 0.02, "int8", tiles)
    whole, chunks = tiles.clone(), tiles.clone()
    key = NoiseKey(seed=3, step=2, tensor=1)
    add_low_rank_to_tiles(whole, "int8", rows, columns, key, stochastic=True)
    monkeypatch.setattr("engines.quantized.codec._CHUNK_TILES", {"cpu": 1})
    add_low_rank_to_tiles(chunks, "int8", rows, columns, key, stochastic=True)
    assert torch.equal(whole, chunks)
    assert not torch.equal(whole, tiles)


def test_within_a_window_nothing_goes_down() -> None:
    """At its end the low-bit blocks do, once."""
    made = make_zo2(tiny_blueprint("opt"), context(dtype="bf16"), base="int8", **LOZO)
    down = [made.step([batch]).d2h_bytes for batch in tiny_batches(7, "opt")]
    size = sum(form.size_bytes for form in made._forms)
    assert down == [0, 0, 0, size, 0, 0, size]


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"base": "int8", "queries": "8", "fold_every": "9"}, "fold_every times queries must be 64 at most"),
        (
            {"base": "int8", "estimator": "lozo", "fold_every": "2"},
            "fold_every must be 1 with estimator=lozo",
        ),
    ],
)
@pytest.mark.parametrize("engine", ["mezo", "zo2"])
def test_what_does_not_go_together_is_said_in_one_line(engine: str, knobs: dict[str, str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        parse_settings(engine, knobs)


def test_matrices_that_are_not_of_linear_layers_cannot_have_both() -> None:
    with pytest.raises(UserError, match="base=full with estimator=lozo"):
        make_mezo(blueprint_of("mixtral"), base="int8", **LOZO)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_mezo_on_the_gpu(case: str, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not graphs:
        monkeypatch.setattr("engines.zeroth_order.perturbed_model.GRAPH_SCRATCH_BYTES", 0)
    where, knobs = context("cuda:0", "bf16"), CASES[case]
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=5), where, **knobs)
    streamed = make_zo2(tiny_blueprint("opt", num_blocks=5), where, resident_blocks=1, **knobs)
    assert_same_steps(mezo, streamed, tiny_batches(11, "opt"))
    assert_same_weights(mezo, streamed)
    streamed.close()
    mezo.close()
