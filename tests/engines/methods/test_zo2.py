from __future__ import annotations

import random
import re
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from zeroth_order_runs import (
    KNOBS,
    assert_all_same_steps,
    assert_replays,
    assert_same_steps,
    assert_same_weights,
    context,
    make_mezo,
    make_zo2,
    save,
    unequal_blueprint,
)

from engines.base import Batch
from engines.costs.zo2 import resident_indices
from engines.errors import InfeasiblePlan
from engines.methods.zo2 import Zo2
from engines.model.blocks import BlockCall, BlockDriver, Recording
from engines.noise.visits import LOG_CAPACITY
from engines.settings.zeroth_order import Zo2Settings
from engines.shapes import Dtype
from engines.zeroth_order.step import EVALUATION_GROUP
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

DECODERS = ["opt", "llama", "qwen2", "gpt2"]


@pytest.mark.parametrize(
    ("family", "tied"),
    [*((family, tied) for family in DECODERS for tied in (False, True)), ("roberta", False)],
)
def test_equals_mezo_over_twelve_steps_an_evaluation_and_a_resume(
    family: str, tied: bool, tmp_path: Path
) -> None:
    """Evaluated after step 4, saved and resumed by a fresh engine after step 8."""
    mezo, streamed = make_mezo(tiny_blueprint(family, tied)), make_zo2(tiny_blueprint(family, tied))
    batches = tiny_batches(12, family)
    held_out = tiny_batches(EVALUATION_GROUP + 1, family, seed=1)
    assert_same_steps(mezo, streamed, batches[:4])
    assert streamed.evaluate(held_out) == mezo.evaluate(held_out)
    assert_same_steps(mezo, streamed, batches[4:8])
    resumed = make_zo2(tiny_blueprint(family, tied, seed=99), context(seed=1))
    resumed.load(save(streamed, tmp_path / "at-8"))
    assert_same_steps(mezo, resumed, batches[8:])
    assert_same_weights(mezo, resumed)


@pytest.mark.parametrize("noise", ["gaussian", "binomial", "rademacher"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_equals_mezo_in_half_precision(dtype: Dtype, noise: str) -> None:
    where = context(dtype=dtype)
    mezo, streamed = (
        make_mezo(tiny_blueprint("llama", tied=True), where, noise=noise),
        make_zo2(tiny_blueprint("llama", tied=True), where, noise=noise),
    )
    assert_same_steps(mezo, streamed, tiny_batches(4, "llama"))
    assert_same_weights(mezo, streamed)


@pytest.mark.parametrize(
    ("num_blocks", "resident_blocks"), [(1, 0), (1, 1), (2, 0), (4, 1), (4, 3), (4, 4), (7, 2)]
)
def test_equals_mezo_for_any_number_of_blocks_and_residents(num_blocks: int, resident_blocks: int) -> None:
    blueprint = tiny_blueprint("opt", num_blocks=num_blocks)
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=num_blocks))
    streamed = make_zo2(blueprint, resident_blocks=resident_blocks)
    batches = tiny_batches(4, "opt")
    stats = assert_same_steps(mezo, streamed, batches)
    block_bytes = 4 * blueprint.shape.block_parameters
    assert {each.h2d_bytes for each in stats} == {(num_blocks - resident_blocks) * block_bytes}
    downloads = [each.d2h_bytes for each in stats]
    assert downloads == [0] + 3 * [
        (num_blocks - resident_blocks) * block_bytes
    ]  # at first nothing is deferred
    assert streamed.evaluate(batches) == mezo.evaluate(batches)
    assert_same_weights(mezo, streamed)


def test_blocks_of_unequal_shape() -> None:
    mezo, streamed = make_mezo(unequal_blueprint()), make_zo2(unequal_blueprint())
    assert_same_steps(mezo, streamed, tiny_batches(5, "opt"))
    assert_same_weights(mezo, streamed)


def test_each_block_crosses_the_link_once_each_way_and_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = make_zo2(unequal_blueprint(), resident_blocks=0)
    crossed: Counter[tuple[str, int, int]] = Counter()
    link = streamed.blocks.link
    upload, download = link.upload, link.download

    def counted_upload(host: torch.Tensor, out: torch.Tensor, after: object = None, name: str = "") -> object:
        crossed["up", host.data_ptr(), host.nbytes] += 1
        return upload(host, out, after)  # type: ignore[arg-type]

    def counted_download(
        gpu: torch.Tensor, out: torch.Tensor, after: object = None, name: str = ""
    ) -> object:
        crossed["down", out.data_ptr(), out.nbytes] += 1
        return download(gpu, out, after)  # type: ignore[arg-type]

    monkeypatch.setattr(link, "upload", counted_upload)
    monkeypatch.setattr(link, "download", counted_download)
    sizes = [
        4 * sum(parameter.numel() for parameter in block.parameters())
        for block in unequal_blueprint().reference.model.decoder.layers
    ]
    first, *rest = tiny_batches(4, "opt")
    streamed.step([first])
    for batch in rest:
        crossed.clear()
        streamed.step([batch])
        assert set(crossed.values()) == {1}
        for direction in ("up", "down"):
            # A gap of less than 16 bytes after an odd tensor crosses too.
            moved = sorted(n for way, _, n in crossed if way == direction)
            assert all(0 <= got - size < 16 * 16 for got, size in zip(moved, sorted(sizes), strict=True))


def test_micro_batches_of_one_step_share_the_noise_and_the_visit() -> None:
    mezo, streamed = make_mezo(tiny_blueprint("qwen2")), make_zo2(tiny_blueprint("qwen2"))
    batches = tiny_batches(6, "qwen2")
    for step in range(2):
        micro = batches[3 * step : 3 * step + 3]
        expected, stats = mezo.step(micro), streamed.step(micro)
        assert (stats.loss, stats.projected_gradient) == (expected.loss, expected.projected_gradient)
        assert stats.h2d_bytes == 3 * 4 * tiny_blueprint("qwen2").shape.block_parameters
    assert_same_weights(mezo, streamed)


@pytest.mark.parametrize("padding", [slice(-2, None), slice(0, 2)], ids=["right", "left"])
@pytest.mark.parametrize("family", [*DECODERS, "roberta", "bert"])
def test_padded_batches_of_changing_length(family: str, padding: slice) -> None:
    mezo, streamed = make_mezo(tiny_blueprint(family)), make_zo2(tiny_blueprint(family))
    batches = [tiny_batches(1, family, seed=n, seq_len=n)[0] for n in (16, 5, 9)]
    for batch in batches:
        batch.inputs["attention_mask"][0, padding] = 0
    assert_same_steps(mezo, streamed, batches)
    assert_same_weights(mezo, streamed)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rate_schedules_act_on_every_parameter(schedule: str) -> None:
    where = context(steps=4)
    knobs = {"schedule": schedule, "warmup_steps": 2}
    mezo = make_mezo(tiny_blueprint("gpt2", tied=True), where, **knobs)
    streamed = make_zo2(tiny_blueprint("gpt2", tied=True), where, **knobs)
    before = {name: weight.clone() for name, weight in streamed.weights()}
    batches = tiny_batches(7, "gpt2")
    assert_same_steps(mezo, streamed, batches[:4])
    trained = {name: weight.clone() for name, weight in streamed.weights()}
    assert not any(torch.equal(trained[name], before[name]) for name in before)
    assert_same_steps(mezo, streamed, batches[4:])  # the rate is zero from here on
    assert all(torch.equal(weight, trained[name]) for name, weight in streamed.weights())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_perturbing_never_changes_the_weights(dtype: Dtype) -> None:
    streamed = make_zo2(tiny_blueprint("opt", tied=True), context(dtype=dtype), learning_rate=0.0, eps=1e-2)
    before = {name: weight.clone() for name, weight in streamed.weights()}
    for batch in tiny_batches(3, "opt"):
        assert streamed.step([batch]).projected_gradient != 0.0
    assert all(torch.equal(weight, before[name]) for name, weight in streamed.weights())


def test_the_last_update_is_in_all_that_is_seen(tmp_path: Path) -> None:
    """An update is deferred until the block comes up again; evaluating, exporting and saving do not wait for
    it."""
    batches = tiny_batches(4, "llama")
    mezo = make_mezo(tiny_blueprint("llama"))
    evaluating, exporting, saving = (make_zo2(tiny_blueprint("llama")) for _ in range(3))
    for batch in batches[:3]:
        for each in (mezo, evaluating, exporting, saving):
            each.step([batch])
    assert evaluating.evaluate(batches) == mezo.evaluate(batches)
    assert evaluating.evaluate(batches) == mezo.evaluate(batches)
    assert_same_weights(mezo, exporting)
    other = make_mezo(tiny_blueprint("llama", seed=5))
    other.load(save(saving, tmp_path / "saved"))
    assert_same_weights(mezo, other)
    expected = mezo.step([batches[3]]).loss
    assert [each.step([batches[3]]).loss for each in (evaluating, exporting, saving, other)] == [expected] * 4


def test_a_checkpoint_replaces_what_has_been_trained(tmp_path: Path) -> None:
    """`load` drops the deferred update and the blocks that have come up already."""
    batches = tiny_batches(6, "gpt2")
    mezo, streamed = make_mezo(tiny_blueprint("gpt2")), make_zo2(tiny_blueprint("gpt2"))
    assert_same_steps(mezo, streamed, batches[:2])
    folder = save(streamed, tmp_path / "at-2")
    for batch in batches[2:4]:
        streamed.step([batch])
    streamed.load(folder)
    assert_same_steps(mezo, streamed, batches[4:])
    assert_same_weights(mezo, streamed)


def test_a_hidden_state_goes_when_the_next_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each stream the GPU holds one hidden state, not the one that entered the first block as well."""
    streamed = make_zo2(tiny_blueprint("opt"))
    record, run = BlockDriver.record, BlockDriver.run
    entering: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def noted_record(driver: BlockDriver, inputs: Mapping[str, Any]) -> Recording:
        recording = record(driver, inputs)
        entering.append(weakref.ref(recording.hidden))
        return recording

    def noted_run(driver: BlockDriver, index: int, call: BlockCall, hidden: torch.Tensor) -> torch.Tensor:
        if index == 1:
            alive.append(sum(reference() is not None for reference in entering))
        return run(driver, index, call, hidden)

    monkeypatch.setattr(BlockDriver, "record", noted_record)
    monkeypatch.setattr(BlockDriver, "run", noted_run)
    batches = tiny_batches(2, "opt")
    streamed.step(batches)
    streamed.evaluate(batches)
    assert len(entering) == 2 * 2 + 2
    assert alive == [0] * 4


def test_a_tensor_that_blocks_share_stays_on_the_gpu() -> None:
    def shared() -> TinyBlueprint:
        blueprint = tiny_blueprint("opt")
        for model in (blueprint.model, blueprint.reference):
            layers = model.model.decoder.layers
            layers[1].fc1.weight = layers[0].fc1.weight
        return blueprint

    mezo, streamed = make_mezo(shared()), make_zo2(shared())
    stats = assert_same_steps(mezo, streamed, tiny_batches(4, "opt"))
    assert_same_weights(mezo, streamed)
    size = 4 * (3 * shared().shape.block_parameters - 2 * 16 * 32)
    assert {each.h2d_bytes for each in stats} == {size}


@pytest.mark.parametrize(("fold_every", "resident_blocks"), [(2, 0), (3, 1), (5, 0), (64, 1)])
def test_fewer_downloads_give_the_same_bits(fold_every: int, resident_blocks: int, tmp_path: Path) -> None:
    """Also with evaluations, exports and a resume at any point of the turn."""
    where = context(dtype="bf16")
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=5), where)
    knobs = {"fold_every": fold_every, "resident_blocks": resident_blocks}
    streamed = make_zo2(tiny_blueprint("opt", num_blocks=5), where, **knobs)
    batches = tiny_batches(17, "opt")
    stats = assert_same_steps(mezo, streamed, batches[:7])
    block_bytes = 2 * tiny_blueprint("opt").shape.block_parameters
    downloads = [each.d2h_bytes // block_bytes for each in stats]
    streamed_blocks = [i for i in range(5) if i not in resident_indices(5, resident_blocks)]
    expected = [sum((i + step) % fold_every == 0 for i in streamed_blocks) for step in range(7)]
    assert downloads == [0, *expected[1:]]
    assert streamed.evaluate(batches[:2]) == mezo.evaluate(batches[:2])
    assert_same_steps(mezo, streamed, batches[7:9])
    assert_same_weights(mezo, streamed)
    assert_same_steps(mezo, streamed, batches[9:12])
    resumed = make_zo2(tiny_blueprint("opt", num_blocks=5, seed=99), context(seed=1, dtype="bf16"), **knobs)
    resumed.load(save(streamed, tmp_path / "at-12"))
    assert_same_steps(mezo, resumed, batches[12:])
    assert_same_weights(mezo, resumed)


def test_a_log_is_as_good_as_a_checkpoint() -> None:
    """Base weights and updates give the weights after them, through more updates than a log holds."""
    where = context(dtype="fp16", steps=200)
    mezo = make_mezo(tiny_blueprint("gpt2", tied=True), where)
    updates = [
        update
        for batch in tiny_batches(2 * LOG_CAPACITY + 6, "gpt2")
        for update in mezo.step([batch]).updates
    ]
    others = [make(tiny_blueprint("gpt2", tied=True), where) for make in (make_mezo, make_zo2)]
    assert_replays(mezo, updates, others)
    assert_all_same_steps(mezo, others, tiny_batches(3, "gpt2", seed=5))


@pytest.mark.parametrize("train", ["last:1", "last:2", "last:9"])
def test_frozen_blocks_stay_and_are_never_downloaded(train: str) -> None:
    mezo = make_mezo(tiny_blueprint("llama"), train=train)
    streamed = make_zo2(tiny_blueprint("llama"), train=train, resident_blocks=1)
    before = {name: weight.clone() for name, weight in mezo.weights()}
    stats = assert_same_steps(mezo, streamed, tiny_batches(4, "llama"))
    assert_same_weights(mezo, streamed)
    assert streamed.evaluate(tiny_batches(2, "llama")) == mezo.evaluate(tiny_batches(2, "llama"))
    count = min(3, int(train.removeprefix("last:")))
    moved = {name for name, weight in mezo.weights() if not torch.equal(weight, before[name])}
    expected = {
        name
        for name in before
        if "embed" not in name and ("layers" not in name or int(name.split(".")[2]) >= 3 - count)
    }
    assert moved == expected
    block_bytes = 4 * tiny_blueprint("llama").shape.block_parameters
    trained = [i for i in range(3 - count, 3) if i not in resident_indices(3, 1)]
    assert [each.d2h_bytes for each in stats] == [0] + 3 * [len(trained) * block_bytes]
    assert {each.h2d_bytes for each in stats} == {2 * block_bytes}


def test_residents_are_spread_and_cost_no_slab() -> None:
    assert resident_indices(8, 2) == {2, 6}
    everything = make_zo2(tiny_blueprint("opt"), resident_blocks=3)
    assert everything.pinned_bytes == 0
    (batch,) = tiny_batches(1, "opt")
    assert everything.step([batch]).h2d_bytes == 0


@pytest.mark.parametrize("resident_blocks", [0, 1])
def test_too_little_host_memory_is_refused_before_anything_is_filled(
    resident_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = (3 - resident_blocks) * 4 * tiny_blueprint("opt").shape.block_parameters
    where = replace(context(), host_bytes=needed)
    make_zo2(tiny_blueprint("opt"), where, resident_blocks=resident_blocks).close()  # just enough
    blueprint, filled = tiny_blueprint("opt"), list[str]()
    monkeypatch.setattr(blueprint, "fill", lambda name, out: filled.append(name))
    missing = f"{1000 / 1e9:.3g} GB of host memory are missing: {3 - resident_blocks} streamed blocks"
    with pytest.raises(InfeasiblePlan, match=re.escape(missing)):
        make_zo2(blueprint, replace(where, host_bytes=needed - 1000), resident_blocks=resident_blocks)
    assert filled == []


def test_more_residents_than_blocks_means_all() -> None:
    everything = make_zo2(tiny_blueprint("opt"), replace(context(), host_bytes=0), resident_blocks=99)
    mezo = make_mezo(tiny_blueprint("opt"))
    stats = assert_same_steps(mezo, everything, tiny_batches(2, "opt"))
    assert {each.h2d_bytes for each in stats} == {0}


def test_closing_twice_and_before_setup_is_allowed() -> None:
    made = Zo2(Zo2Settings(), context())
    made.close()
    made.setup(tiny_blueprint("opt"))
    made.close()
    made.close()


def test_lowers_the_loss_within_its_budget() -> None:
    (batch,) = tiny_batches(1, "opt", batch_size=4)
    batch = Batch(inputs={**batch.inputs, "labels": torch.full_like(batch.inputs["labels"], 9)})
    streamed = make_zo2(tiny_blueprint("opt"), learning_rate=1e-2, weight_decay=0.0)
    before = streamed.evaluate([batch])
    for _ in range(60):
        streamed.step([batch])
    assert streamed.evaluate([batch]).loss < before.loss - 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("fold_every", [1, 3])
def test_equals_mezo_on_the_gpu(
    family: str, tied: bool, dtype: Dtype, fold_every: int, tmp_path: Path
) -> None:
    """As on the CPU, the link held up at random so that an order that is only lucky shows."""
    where = context("cuda:0", dtype)
    delays = random.Random(0)
    mezo = make_mezo(tiny_blueprint(family, tied, num_blocks=7), where)

    def delayed(seed: int) -> Zo2:
        made = Zo2(Zo2Settings(**KNOBS, resident_blocks=1, fold_every=fold_every), where)
        made.link_delay = lambda: delays.randrange(400_000)
        made.setup(tiny_blueprint(family, tied, num_blocks=7, seed=seed))
        return made

    streamed = delayed(seed=0)
    batches = tiny_batches(20, family)
    held_out = tiny_batches(3, family, seed=1)
    assert_same_steps(mezo, streamed, batches[:5])
    assert streamed.evaluate(held_out) == mezo.evaluate(held_out)
    assert_same_steps(mezo, streamed, batches[5:10])
    resumed = delayed(seed=99)
    resumed.load(save(streamed, tmp_path / "at-10"))
    streamed.close()
    stats = assert_same_steps(mezo, resumed, batches[10:])
    assert_same_weights(mezo, resumed)
    block_bytes = 2 * tiny_blueprint(family).shape.block_parameters
    assert resumed.pinned_bytes == 6 * block_bytes
    if fold_every == 1:
        assert [each.d2h_bytes for each in stats] == [0] + 9 * [6 * block_bytes]
    for each in stats:
        assert each.h2d_bytes == 6 * block_bytes
        assert each.h2d_s is not None
        assert each.gpu_s is not None
    resumed.close()


@pytest.mark.gpu
def test_delays_on_both_streams_change_no_bit_in_200_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrices, so that layers take their own scratch and blocks are cut into chunks."""
    monkeypatch.setattr("engines.zeroth_order.perturbed_model.GRAPH_SCRATCH_BYTES", 0)
    monkeypatch.setattr("engines.offload.ring.UPLOAD_BYTES", 500)
    monkeypatch.setattr("engines.offload.ring.ring_bytes", lambda sizes: -(-max(sizes) * 5 // 4 // 512) * 512)
    where = context("cuda:0", "bf16")
    delays = random.Random(1)
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=9), where)
    streamed = Zo2(Zo2Settings(**KNOBS, resident_blocks=2, fold_every=4), where)
    streamed.link_delay = lambda: delays.choice((0, 0, 50_000, 300_000))
    streamed.setup(tiny_blueprint("opt", num_blocks=9))
    for seed in range(10):
        assert_same_steps(mezo, streamed, tiny_batches(20, "opt", seed=seed))
    assert_same_weights(mezo, streamed)
    streamed.close()


@pytest.mark.gpu
def test_graphs_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    where = context("cuda:0", "fp16")
    graphs = make_zo2(tiny_blueprint("llama"), where)
    batches = [*tiny_batches(4, "llama"), *tiny_batches(6, "llama", seq_len=9), *tiny_batches(3, "llama")]
    groups = [batches[i : i + 2] for i in range(0, len(batches), 2)]
    monkeypatch.setattr("engines.zeroth_order.perturbed_model.GRAPH_SCRATCH_BYTES", 0)
    eager = make_mezo(tiny_blueprint("llama"), where)
    for group in groups:
        expected, stats = eager.step(group), graphs.step(group)
        assert (stats.loss, stats.projected_gradient) == (expected.loss, expected.projected_gradient)
        assert graphs.evaluate(group) == eager.evaluate(group)
    assert_same_weights(eager, graphs)
    graphs.close()


@pytest.mark.gpu
@pytest.mark.parametrize("noise", ["gaussian", "binomial", "rademacher"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_equals_mezo_on_the_gpu_without_delay_and_with_unequal_blocks(dtype: Dtype, noise: str) -> None:
    where = context("cuda:0", dtype)
    mezo, streamed = (
        make_mezo(unequal_blueprint(), where, noise=noise),
        make_zo2(unequal_blueprint(), where, noise=noise),
    )
    for _ in range(5):
        assert_same_steps(mezo, streamed, tiny_batches(20, "opt"))
    assert_same_weights(mezo, streamed)
    streamed.close()
