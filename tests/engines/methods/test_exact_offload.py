"""Exact AdamW on the CPU against its in-memory twin, native, and a plain loop with fp32 masters."""

from __future__ import annotations

import copy
import errno
import importlib
import math
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_graphs import FakeCuda, played
from torch import Tensor
from trained_engines import assert_same, late_by_chance, train, weights

from engines.base import Context
from engines.costs import exact_offload as costs
from engines.cpu_updates import block_state, gradient_buffers
from engines.cpu_updates.adamw import adamw, master
from engines.errors import InfeasiblePlan, NonFiniteLoss, UserError
from engines.methods.exact_offload import ExactOffload
from engines.methods.native import Native
from engines.model.block_major_graphs import BlockMajorGraphs
from engines.model.blocks import BlockDriver
from engines.offload.direct_io import RawFile
from engines.settings.exact_offload import ExactOffloadSettings
from engines.settings.first_order import NativeSettings
from engines.settings.parse import parse_settings
from engines.shapes import Dtype, Workload
from engines.transfer.link import Link
from tiny_models import tiny_batches, tiny_blueprint

SETTINGS = ExactOffloadSettings(
    learning_rate=3e-3, weight_decay=0.1, schedule="cosine", warmup_steps=2, gradient_blocks=2
)
STEPS = 12
MANY_STEPS = {False: 40, True: 1000}
"""By whether there is a GPU."""
FAMILIES = ["opt", "llama", "gpt2", "qwen2", "roberta", "deberta-v2"]
BLOCKS = 5
WEIGHTS_ON_DISK = {"weights": "streamed", "disk_weights": True}
CLIPS: list[dict[str, Any]] = [{}, {"max_grad_norm": 0.5}, {"max_grad_norm": 0.5, "clip_by": "previous"}]


def context(
    dtype: Dtype = "fp32", accumulation: int = 1, checkpointing: bool = True, device: str = "cpu", **more: Any
) -> Context:
    workload = Workload(
        batch_size=2, seq_len=16, dtype=dtype, checkpointing=checkpointing, accumulation=accumulation
    )
    return Context(device=device, workload=workload, seed=7, total_steps=STEPS, **more)


@contextmanager
def running(
    family: str, ctx: Context | None = None, delay: Any = None, **changes: Any
) -> Iterator[ExactOffload]:
    engine = ExactOffload(replace(SETTINGS, **changes), ctx or context())
    if delay is not None:
        engine.link = Link(engine.device, delay)
    try:
        engine.setup(tiny_blueprint(family, family == "opt", num_blocks=BLOCKS))
        yield engine
    finally:
        engine.close()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny block's matrices are then several chunks."""
    monkeypatch.setattr(block_state, "CHUNK_ELEMENTS", 512)


def own_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("exact-offload")]


def late_copies() -> Any:
    """For `Link`: GPU clock cycles that each copy is held up for."""
    late = random.Random(0)
    return lambda: late.choice((0, 0, 100_000, 2_000_000))


def let_calls_be_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam, and what enqueues copies."""
    delayed = late_by_chance(random.Random(0))
    monkeypatch.setattr(block_state, "adamw", delayed(adamw))
    monkeypatch.setattr(Link, "upload", delayed(Link.upload))
    monkeypatch.setattr(Link, "download_each", delayed(Link.download_each))


class TestTwin:
    """The offloaded run against `offload=False`, bit for bit."""

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize(("dtype", "accumulation"), [("fp32", 1), ("bf16", 3)])
    def test_offloaded_equals_in_memory(self, family: str, dtype: Dtype, accumulation: int) -> None:
        batches, ctx = tiny_batches(6 * accumulation, family), context(dtype, accumulation)
        with running(family, ctx, offload=False) as twin:
            expected = train(twin, batches, accumulation)
            assert not own_threads()
        with running(family, ctx) as engine:
            assert_same(train(engine, batches, accumulation), expected)

    @pytest.mark.parametrize(
        ("family", "changes"),
        [
            ("opt", {}),
            ("llama", {"max_grad_norm": 0.5}),
            ("gpt2", {"checkpointed_blocks": 1}),
            ("deberta-v2", {"checkpointed_blocks": 2}),
            ("qwen2", {"outer": "host", "moments": "int8"}),
            ("llama", {"weight_slots": 4, "checkpointed_blocks": 2}),
            ("opt", {"weight_slots": 2}),
            ("llama", {"weight_slots": 9}),
        ],
    )
    def test_streamed_equals_in_memory(self, family: str, changes: dict[str, Any]) -> None:
        batches, ctx = tiny_batches(12, family), context("bf16", 2)
        with running(family, ctx, offload=False, **changes) as twin:
            expected = train(twin, batches, 2)
            evaluated = twin.evaluate(batches)
        with running(family, ctx, weights="streamed", **changes) as engine:
            found = train(engine, batches, 2)
            assert_same(found, expected)
            assert engine.evaluate(batches) == evaluated
            block = engine.on_gpu[0].nbytes
            assert engine.streamed is not None
            slots = min(engine.settings.weight_slots, BLOCKS)
            assert engine.streamed.slots.gpu_bytes == slots * block
        uploads = costs.uploads_per_step(BLOCKS, engine.settings)
        assert uploads == [2] * (BLOCKS - slots) + [1] * slots
        non_block = 0
        if changes.get("outer") == "host":
            non_block = sum(each.nbytes for each in engine.on_gpu[BLOCKS:])
            assert non_block > 0
        assert {each.h2d_bytes for each in found.stats} == {sum(uploads) * block + non_block}

    @pytest.mark.parametrize(
        ("family", "dtype", "count", "changes"),
        [
            ("opt", "fp32", 1, {}),
            ("llama", "bf16", 2, {"outer": "host", "moments": "int8"}),
            ("gpt2", "bf16", 3, {"max_grad_norm": 0.5}),
            ("qwen2", "bf16", 4, {"max_grad_norm": 0.5, "clip_by": "previous"}),
            ("deberta-v2", "bf16", 9, {"checkpointed_blocks": 2, "disk_blocks": 3}),
            ("roberta", "bf16", 2, {"hidden_states": "host"}),
        ],
    )
    def test_equal_where_the_gpu_updates_the_first_blocks(
        self, family: str, dtype: Dtype, count: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At most all but the last; nothing of them crosses the link."""
        batches, ctx = tiny_batches(12, family), context(dtype, 2)
        with running(family, ctx, offload=False, gpu_blocks=count, **changes) as twin:
            expected = train(twin, batches, 2)
            evaluated = twin.evaluate(batches)
        let_calls_be_late(monkeypatch)
        with running(family, ctx, gpu_blocks=count, **changes) as engine:
            found = train(engine, batches, 2)
            assert_same(found, expected)
            assert engine.evaluate(batches) == evaluated
            on_host = [bool(chunks) for chunks in engine.host.chunks[:BLOCKS]]
            assert on_host == [index >= min(count, BLOCKS - 1) for index in range(BLOCKS)]
            if engine.hidden_states is None:
                went_up = sum(each.nbytes for each in engine.on_gpu[min(count, BLOCKS - 1) :])
                assert {each.h2d_bytes for each in found.stats} == {went_up}

    @pytest.mark.parametrize(
        ("family", "tied", "changes"),
        [
            ("llama", False, {}),
            ("opt", True, {"max_grad_norm": 0.5}),
            ("gpt2", False, {"max_grad_norm": 0.5, "clip_by": "previous"}),
            ("deberta-v2", False, {"moments": "bf16"}),
        ],
    )
    def test_equal_with_parameters_outside_the_blocks_on_the_host(
        self, family: str, tied: bool, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Late updates too: the head's is wanted before the losses, an embedding's before the first block."""
        batches, ctx = tiny_batches(12, family), context("bf16", 2)
        with running(family, ctx, offload=False, outer="host", **changes) as twin:
            expected = train(twin, batches, 2)
        monkeypatch.setattr(block_state, "adamw", late_by_chance(random.Random(0))(adamw))
        with running(family, ctx, outer="host", **changes) as engine:
            assert_same(train(engine, batches, 2), expected)
            names = {each: name for name, each in engine.model.named_parameters()}
            outside = engine.outside_on_host
            non_block = {names[each]: index for index, each in enumerate(outside.parameters, BLOCKS)}
            first = {name for name, index in non_block.items() if index in outside.wanted_first}
        assert any("embed" in name or "wte" in name for name in first)
        if family != "deberta-v2":  # whose blocks use what is outside them
            assert tied or any("norm" in name or "ln_f" in name for name in non_block.keys() - first)

    def test_parameters_outside_the_blocks_on_the_host_learn_what_those_on_the_gpu_do(self) -> None:
        batches, outcomes = tiny_batches(8, "llama"), []
        for outer in ("gpu", "host"):
            with running("llama", context(), outer=outer) as engine:
                outcomes.append(train(engine, batches))
        assert outcomes[1].losses == pytest.approx(outcomes[0].losses, rel=1e-6)
        for name, tensor in outcomes[0].weights.items():
            torch.testing.assert_close(outcomes[1].weights[name], tensor, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("family", "changes"),
        [
            ("opt", {"disk_blocks": 5}),
            ("llama", {"disk_blocks": 3, "max_grad_norm": 0.5, "moments": "bf16"}),
            ("gpt2", {"disk_blocks": 4, "weights": "streamed", "moments": "int8"}),
            ("qwen2", {"disk_blocks": 5, "outer": "host", "max_grad_norm": 0.5, "clip_by": "previous"}),
            ("llama", {"disk_blocks": 5, **WEIGHTS_ON_DISK}),
            ("opt", {"disk_blocks": 3, **WEIGHTS_ON_DISK, "max_grad_norm": 0.5, "moments": "int8"}),
        ],
    )
    def test_states_on_disk_equal_in_memory(
        self, family: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With reads, writes and updates that are late: more blocks than have room in memory."""
        batches, ctx = tiny_batches(16, family), context("bf16", 2)
        with running(family, ctx, offload=False, **changes) as twin:
            expected = train(twin, batches, 2)
        late = random.Random(0)
        monkeypatch.setattr(block_state, "adamw", late_by_chance(late)(adamw))
        monkeypatch.setattr(ExactOffload, "disk_delay_s", lambda self: late.choice((0.0, 0.0, 0.003)))
        folder = tmp_path / "spill"
        with running(family, ctx, disk_folder=str(folder), **changes) as engine:
            found = train(engine, batches, 2)
            on_disk = range(BLOCKS)[-changes["disk_blocks"] :]
            read = sum(engine.host.state_bytes(index) for index in on_disk)
            if engine.settings.disk_weights:
                times = costs.uploads_per_step(BLOCKS, engine.settings)
                read += sum(times[index] * 2 * engine.host.weights[index].numel() for index in on_disk)
            evaluated = engine.evaluate(batches[:3])
            assert weights(engine).keys() == expected.weights.keys()
        with running(family, ctx, offload=False, **changes) as twin:
            train(twin, batches, 2)
            assert twin.evaluate(batches[:3]) == evaluated
        assert_same(found, expected)
        assert {each.disk_read_bytes for each in found.stats} == {read}
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize(
        ("family", "changes"),
        [
            ("opt", {}),
            ("llama", {"weights": "streamed"}),
            ("gpt2", {"checkpointed_blocks": 2}),
            ("roberta", {"checkpointed_blocks": 0}),
        ],
    )
    def test_equal_with_hidden_states_on_the_host(self, family: str, changes: dict[str, Any]) -> None:
        batches, ctx = tiny_batches(12, family), context("bf16", 3)
        with running(family, ctx, offload=False, **changes) as twin:
            expected = train(twin, batches, 3)
        with running(family, ctx, **changes) as engine:
            resident = train(engine, batches, 3)
        with running(family, ctx, hidden_states="host", **changes) as engine:
            found = train(engine, batches, 3)
            assert engine.hidden_states is not None
            away = engine.hidden_states.moved_bytes // len(found.losses)
        assert_same(found, expected)
        # Inputs of two of five blocks: the first's stays, and the last two.
        assert away == 2 * 3 * 2 * 16 * 16 * 2
        for mine, its in zip(found.stats, resident.stats, strict=True):
            assert (mine.h2d_bytes - its.h2d_bytes, mine.d2h_bytes - its.d2h_bytes) == (away, away)

    @pytest.mark.parametrize("moments", ["bf16", "int8"])
    @pytest.mark.parametrize("clip", CLIPS)
    def test_equal_with_other_states_and_clipped(self, moments: str, clip: dict[str, Any]) -> None:
        batches, ctx = tiny_batches(STEPS, "llama"), context("bf16")
        with running("llama", ctx, offload=False, moments=moments, **clip) as twin:
            expected = train(twin, batches)
        with running("llama", ctx, moments=moments, **clip) as engine:
            assert_same(train(engine, batches), expected)

    @pytest.mark.parametrize("clip", [*CLIPS, {"gradient_blocks": "auto"}])
    def test_equal_when_worker_and_link_are_late(
        self, clip: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batches = tiny_batches(STEPS, "opt")
        with running("opt", offload=False, **clip) as twin:
            expected = train(twin, batches)
        let_calls_be_late(monkeypatch)
        with running("opt", **clip) as engine:
            assert_same(train(engine, batches), expected)

    @pytest.mark.parametrize("family", ["llama", "roberta", "deberta-v2"])
    def test_recomputation_changes_no_bit(self, family: str) -> None:
        batches = tiny_batches(8, family)
        outcomes = []
        for checkpointing in (False, True):
            with running(family, context(checkpointing=checkpointing, accumulation=2)) as engine:
                outcomes.append(train(engine, batches, 2))
        assert_same(outcomes[1], outcomes[0])

    @pytest.mark.parametrize("family", FAMILIES)
    def test_keeping_products_changes_no_bit(self, family: str) -> None:
        batches = tiny_batches(8, family)
        outcomes = []
        for changes in (
            {"checkpointed_blocks": 0},
            {"checkpointed_blocks": 1, "kept_activations": "products"},
            {"kept_activations": "products", "weights": "streamed", "hidden_states": "host"},
        ):
            changes = {"checkpointed_blocks": 0, **changes}
            with running(family, context("bf16", accumulation=2), **changes) as engine:
                outcomes.append(train(engine, batches, 2))
        assert_same(outcomes[1], outcomes[0])
        assert_same(outcomes[2], outcomes[0])

    def test_what_draws_random_numbers_keeps_everything(self) -> None:
        with pytest.raises(UserError, match="dropout=0"):
            parse_settings("exact-offload", {"kept_activations": "products", "dropout": 0.1})

    def test_dropout_draws_the_same_when_a_block_is_run_again(self) -> None:
        batches, outcomes = tiny_batches(4, "roberta"), []
        for dropout, checkpointing in ((0.2, False), (0.2, True), (0.0, True)):
            with running("roberta", context(checkpointing=checkpointing), dropout=dropout) as engine:
                outcomes.append(train(engine, batches))
        assert_same(outcomes[1], outcomes[0])
        assert outcomes[2].losses != outcomes[0].losses

    @pytest.mark.slow
    # Both from within torch's compiler.
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    def test_compiled_equals_its_compiled_twin(self) -> None:
        batches, ctx = tiny_batches(8, "llama"), context("bf16", 2)
        outcomes = []
        for changes in (
            {"offload": False},
            {},
            {"checkpointed_blocks": 1},
            {"checkpointed_blocks": 1, "kept_activations": "products"},
        ):
            with running("llama", ctx, compile=True, **changes) as engine:
                outcomes.append(train(engine, batches, 2))
                assert engine.notes == []
        assert_same(outcomes[1], outcomes[0])
        assert_same(outcomes[2], outcomes[0])
        assert_same(outcomes[3], outcomes[0])

    def test_what_cannot_be_compiled_runs_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(run: Any, **_: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                raise unsupported("not this block")

            return call

        unsupported = importlib.import_module("torch._dynamo.exc").Unsupported
        batches = tiny_batches(4, "llama")
        with running("llama") as engine:
            expected = train(engine, batches)
        monkeypatch.setattr(torch, "compile", refuse)
        with running("llama", compile=True) as engine:
            found = train(engine, batches)
            assert engine.notes[0].startswith("not compiled: not this block")
        assert_same(found, expected)

    def test_the_twin_counts_the_same_bytes_and_pins_nothing(self) -> None:
        batches = tiny_batches(3, "llama")
        with running("llama") as engine:
            expected = train(engine, batches)
            moved = engine.link.h2d_bytes, engine.link.d2h_bytes
        assert moved == tuple(
            sum(getattr(each, name) for each in expected.stats) for name in ("h2d_bytes", "d2h_bytes")
        )
        with running("llama", offload=False) as engine:
            found = train(engine, batches)
            assert (engine.pinned_bytes, engine.link.h2d_bytes, engine.link.d2h_bytes) == (0, 0, 0)
        for mine, its in zip(found.stats, expected.stats, strict=True):
            assert (mine.h2d_bytes, mine.d2h_bytes, mine.cpu_s) == (its.h2d_bytes, its.d2h_bytes, None)

    @pytest.mark.gpu
    @pytest.mark.parametrize(
        "clip",
        [
            *CLIPS,
            {"gradient_blocks": "auto"},
            {"weights": "streamed", "hidden_states": "host"},
            {"weights": "streamed", "outer": "host", "hidden_states": "host", **CLIPS[2]},
            *({"gpu_blocks": 2, **each} for each in CLIPS),
        ],
    )
    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_equal_on_the_gpu_with_delayed_streams(self, dtype: Dtype, clip: dict[str, Any]) -> None:
        """Each copy is held up by up to a millisecond; the rate stays, so that every update shows."""
        steps = 60
        batches = tiny_batches(2 * steps, "llama")
        ctx = context(dtype, accumulation=2, device="cuda:0")
        own: dict[str, Any] = {"compile": False, "schedule": "constant", **clip}
        with running("llama", ctx, offload=False, **own) as twin:
            expected = train(twin, batches, 2)
        with running("llama", ctx, late_copies(), **own) as engine:
            assert engine.pinned_bytes > 0
            assert_same(train(engine, batches, 2), expected)

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"moments": "bf16", "max_grad_norm": 0.5, "clip_by": "previous", "gradient_blocks": "auto"},
            {"weights": "streamed", "outer": "host", "hidden_states": "host", "moments": "int8"},
            {"gpu_blocks": 2},
        ],
        ids=["resident", "bf16", "streamed", "gpu"],
    )
    def test_equal_over_many_steps_with_late_copies(
        self, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a GPU the issue's 1,000 steps, and copies that are late there; else the calls that make them."""
        on_gpu = torch.cuda.is_available()
        steps, delay = MANY_STEPS[on_gpu], late_copies() if on_gpu else None
        batches = tiny_batches(16, "llama")
        ctx = context("bf16", device="cuda:0" if on_gpu else "cpu")
        own: dict[str, Any] = {"compile": False, "schedule": "constant", "learning_rate": 1e-3, **changes}
        taken = [batches[step % 16] for step in range(steps)]
        with running("llama", ctx, offload=False, **own) as twin:
            expected = train(twin, taken)
        if not on_gpu:
            let_calls_be_late(monkeypatch)
        with running("llama", ctx, delay, **own) as engine:
            found = train(engine, taken)
        assert_same(found, expected)
        first, last = (sum(found.losses[at : at + 16]) for at in (0, steps - 16))
        assert last < first, "nothing was learned, so that a late update would not show"

    @pytest.mark.gpu
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"weights": "streamed", "hidden_states": "host"},
            {"checkpointed_blocks": 1},
            {"checkpointed_blocks": 1, "kept_activations": "products"},
            {"weights": "streamed", "weight_slots": 4, "kept_activations": "products"},
            {"disk_blocks": 5, **WEIGHTS_ON_DISK},
            {"gpu_blocks": 3, "checkpointed_blocks": 2},
        ],
    )
    def test_equal_on_the_gpu_compiled(self, changes: dict[str, Any]) -> None:
        batches, ctx = tiny_batches(2 * STEPS, "llama"), context("bf16", 2, device="cuda:0")
        with running("llama", ctx, offload=False, **changes) as twin:
            expected = train(twin, batches, 2)
        with running("llama", ctx, **changes) as engine:
            assert_same(train(engine, batches, 2), expected)
            assert engine.notes == []


class TestGraphs:
    """Blocks as CUDA graphs, played on a CPU and real on a GPU, against the twin, which has none."""

    @pytest.fixture
    def fake_cuda(self, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
        def made(engine: ExactOffload) -> BlockMajorGraphs | None:
            return BlockMajorGraphs(engine.device, engine.notes.append) if engine.settings.captures else None

        monkeypatch.setattr(ExactOffload, "_make_graphs", made)
        return played(monkeypatch)

    @pytest.mark.parametrize(
        ("family", "changes"),
        [
            ("llama", {}),
            ("opt", {"checkpointed_blocks": 0, "max_grad_norm": 0.5}),
            ("gpt2", {"gpu_blocks": 2, "checkpointed_blocks": 2}),
            ("qwen2", {"outer": "host", "kept_activations": "products", "checkpointed_blocks": 1}),
        ],
    )
    def test_equal_to_the_twin(self, family: str, changes: dict[str, Any], fake_cuda: FakeCuda) -> None:
        batches, ctx = tiny_batches(12, family), context("bf16", 2)
        with running(family, ctx, offload=False, **changes) as twin:
            expected = train(twin, batches, 2)
            assert not fake_cuda.graphs
        with running(family, ctx, **changes) as engine:
            assert_same(train(engine, batches, 2), expected)
            assert engine.notes == []
        assert [each.replays for each in fake_cuda.graphs] == [5] * (2 * BLOCKS)

    @pytest.mark.parametrize(
        "changes", [{"weights": "streamed"}, {"hidden_states": "host"}, {"graphs": False}, {"offload": False}]
    )
    def test_none_where_something_does_not_stay_or_they_are_not_wanted(
        self, changes: dict[str, Any], fake_cuda: FakeCuda
    ) -> None:
        with running("llama", **changes) as engine:
            train(engine, tiny_batches(3, "llama"))
        assert not fake_cuda.graphs

    def test_a_run_that_goes_on_is_the_run_that_was_not_broken_off(
        self, fake_cuda: FakeCuda, tmp_path: Path
    ) -> None:
        batches = tiny_batches(6, "llama")
        with running("llama") as engine:
            expected = train(engine, batches)
        with running("llama") as engine:
            train(engine, batches[:3])
            engine.save(tmp_path)
            train(engine, batches[3:4])  # and comes back to what it was
            engine.load(tmp_path)
            assert train(engine, batches[3:]).losses == expected.losses[3:]
            for name, tensor in weights(engine).items():
                assert torch.equal(tensor, expected.weights[name]), name
        assert fake_cuda.graphs

    @pytest.mark.gpu
    @pytest.mark.parametrize(
        "changes",
        [
            {"checkpointed_blocks": 0},
            {"checkpointed_blocks": 2},
            {"checkpointed_blocks": 1, "kept_activations": "products"},
            {"gpu_blocks": 2, "checkpointed_blocks": 0, "max_grad_norm": 0.5, "clip_by": "previous"},
            {"checkpointed_blocks": 2, "compile": True},
        ],
    )
    def test_equal_on_the_gpu_in_steps_of_several_forms(
        self, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Graphs of all forms share their memory, of which each step leaves other things behind; copies are
        late, and evaluations take memory in between."""
        captures, capture = list[Any](), BlockMajorGraphs.capture

        def noted(graphs: BlockMajorGraphs, work: Any) -> Any:
            captures.append(work)
            return capture(graphs, work)

        monkeypatch.setattr(BlockMajorGraphs, "capture", noted)
        forms = [
            tiny_batches(3, "llama", seed=1, seq_len=16),
            tiny_batches(2, "llama", seed=2, seq_len=32),
            [*tiny_batches(1, "llama", seed=3, seq_len=8), *tiny_batches(2, "llama", seed=4, seq_len=16)],
        ]
        order = random.Random(1)
        steps = [0, 0, 1, 2, 0, 1, 2, *(order.randrange(3) for _ in range(40))]
        ctx = context("bf16", accumulation=3, device="cuda:0")
        own: dict[str, Any] = {"compile": False, "schedule": "constant", **changes}

        def train_in_turn(engine: ExactOffload) -> tuple[list[Any], dict[str, Tensor]]:
            told: list[Any] = []
            for number, form in enumerate(steps):
                told.append(engine.step(forms[form]).loss)
                if number % 9 == 8:
                    told.append(engine.evaluate(forms[1]))
            return told, weights(engine)

        with running("llama", ctx, offload=False, **own) as twin:
            expected, its = train_in_turn(twin)
            assert not captures
        with running("llama", ctx, late_copies(), **own) as engine:
            found, mine = train_in_turn(engine)
            assert engine.notes == []
        # The first form's were let go of when the second came, and captured again.
        assert len(captures) == 4 * 2 * BLOCKS
        assert found == expected
        for name, tensor in its.items():
            assert torch.equal(mine[name], tensor), name

    @pytest.mark.gpu
    def test_a_gpu_without_room_for_graphs_goes_on_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        batches, ctx = tiny_batches(8, "llama"), context("bf16", 2, device="cuda:0")
        with running("llama", ctx, offload=False, compile=False) as twin:
            expected = train(twin, batches, 2)
        forward = BlockDriver.run

        def without_room(driver: BlockDriver, index: int, *rest: Any) -> Tensor:
            if index == 3 and torch.cuda.is_current_stream_capturing():
                raise torch.OutOfMemoryError("no room")
            return forward(driver, index, *rest)

        monkeypatch.setattr(BlockDriver, "run", without_room)
        with running("llama", ctx, compile=False) as engine:
            assert_same(train(engine, batches, 2), expected)
            assert engine.notes == ["no CUDA graph: no room"]


class TestNative:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize(("accumulation", "gpu_blocks"), [(1, 0), (2, 0), (2, 3)])
    def test_equals_native_in_fp32(self, family: str, accumulation: int, gpu_blocks: int) -> None:
        """The same arithmetic, rounded in another order: weights within 1e-5, losses within 1e-6."""
        batches = tiny_batches(6 * accumulation, family)
        outcomes = []
        for kind in (Native, ExactOffload):
            own: Any = NativeSettings if kind is Native else ExactOffloadSettings
            # eps: where a gradient is rounding error, Adam makes it a sign.
            settings = own(learning_rate=3e-3, weight_decay=0.1, adam_eps=1e-5)
            if kind is ExactOffload:
                settings = replace(settings, gpu_blocks=gpu_blocks)
            engine: Any = kind(settings, context(accumulation=accumulation, checkpointing=False))
            engine.setup(tiny_blueprint(family, family == "opt", num_blocks=BLOCKS))
            outcomes.append(train(engine, batches, accumulation))
            engine.close()
        assert outcomes[0].losses == pytest.approx(outcomes[1].losses, rel=1e-6)
        for name, tensor in outcomes[0].weights.items():
            torch.testing.assert_close(outcomes[1].weights[name], tensor, rtol=1e-5, atol=1e-5)

    def test_in_bf16_it_is_a_plain_loop_with_fp32_masters(self) -> None:
        """torch's AdamW on fp32 copies, rounded to bf16 after each step. A rounding apart makes a gradient
        differ in its last bit, so weights agree to a few of those, and masters to less than that."""
        batches = tiny_batches(STEPS, "llama")
        model = copy.deepcopy(tiny_blueprint("llama", num_blocks=BLOCKS).reference).bfloat16().train()
        masters = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
        groups = [
            {"params": [each for each in masters if each.ndim >= 2], "weight_decay": 0.1},
            {"params": [each for each in masters if each.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        losses = []
        for batch in batches:
            loss = model(**batch.inputs, use_cache=False).loss
            loss.backward()
            losses.append(float(loss.detach()))
            with torch.no_grad():
                for each, parameter in zip(masters, model.parameters(), strict=True):
                    assert parameter.grad is not None
                    each.grad, parameter.grad = parameter.grad.float(), None
                optimizer.step()
                for each, parameter in zip(masters, model.parameters(), strict=True):
                    parameter.copy_(each)
        settings = {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0}
        with running("llama", context("bf16"), **settings) as engine:
            found = train(engine, batches)
            flat = {
                index: torch.cat([master(chunk.memory.weight, chunk.memory.rest) for chunk in chunks])
                for index, chunks in enumerate(engine.host.chunks)
            }
        assert found.losses == pytest.approx(losses, rel=2e-3)
        for (name, parameter), each in zip(model.named_parameters(), masters, strict=True):
            torch.testing.assert_close(found.weights[name], parameter.detach(), rtol=2e-2, atol=4e-3)
            if ".0." in name and each.ndim < 2:
                its = flat[0][: each.numel()] if "input" in name else None
                if its is not None:
                    torch.testing.assert_close(its, each.detach(), rtol=0, atol=2e-3)

    def test_clipped_by_its_own_norm_as_torch_clips(self) -> None:
        batches = tiny_batches(4, "gpt2")
        model = tiny_blueprint("gpt2", num_blocks=BLOCKS).reference.train()
        optimizer = torch.optim.AdamW(
            [
                {"params": [each for each in model.parameters() if each.ndim >= 2], "weight_decay": 0.1},
                {"params": [each for each in model.parameters() if each.ndim < 2], "weight_decay": 0.0},
            ],
            lr=1e-3,
            eps=1e-4,
        )
        for batch in batches:
            optimizer.zero_grad()
            model(**batch.inputs).loss.backward()
            assert float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)) > 0.05
            optimizer.step()
        settings = {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0, "adam_eps": 1e-4}
        with running("gpt2", max_grad_norm=0.05, **settings) as engine:
            found = train(engine, batches)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found.weights[name], parameter.detach(), rtol=1e-4, atol=1e-5)

    def test_previous_norm_is_that_of_the_step_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scales: list[float] = []

        def spy(*args: Any, **kwargs: Any) -> None:
            scales.append(kwargs["scale"])
            adamw(*args, **kwargs)

        monkeypatch.setattr(block_state, "adamw", spy)
        norms = []
        with running("llama", max_grad_norm=0.5, clip_by="previous") as engine:
            chunks = sum(len(each) for each in engine.host.chunks)
            for batch in tiny_batches(3, "llama"):
                engine.step([batch])
                engine.synchronize()
                norms.append(math.sqrt(engine.squared_norm()))
        by_step = [set(scales[i * chunks : (i + 1) * chunks]) for i in range(3)]
        assert by_step[0] == {1.0}
        assert min(norms) > 0.5
        for found, norm in zip(by_step[1:], norms, strict=False):
            assert len(found) == 1
            assert found.pop() == pytest.approx(0.5 / norm, rel=1e-6)


class TestLife:
    @pytest.mark.parametrize(
        ("dtype", "changes"),
        [
            ("fp32", {}),
            ("bf16", {}),
            ("bf16", {"moments": "int8"}),
            ("bf16", {"weights": "streamed", "outer": "host"}),
            ("bf16", {"disk_blocks": 4}),
            ("bf16", {"disk_blocks": 4, **WEIGHTS_ON_DISK}),
            ("bf16", {"gpu_blocks": 2}),
            ("fp32", {"gpu_blocks": 3, "max_grad_norm": 0.5}),
            ("bf16", {"moments": "bf16", "max_grad_norm": 0.5, "clip_by": "previous"}),
        ],
    )
    def test_resumed_in_the_middle_equals_the_uninterrupted_run(
        self, tmp_path: Path, dtype: Dtype, changes: dict[str, Any]
    ) -> None:
        batches, ctx = tiny_batches(STEPS, "opt"), context(dtype)
        with running("opt", ctx, **changes) as straight:
            expected = train(straight, batches)
        with running("opt", ctx, **changes) as first:
            for batch in batches[:5]:
                first.step([batch])
            first.save(tmp_path)
        with running("opt", ctx, **changes) as second:
            second.load(tmp_path)
            found = train(second, batches[5:])
        assert_same(found, replace(expected, losses=expected.losses[5:]))

    def test_states_on_disk_go_on_in_memory_and_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        batches, ctx = tiny_batches(9, "opt"), context("bf16")
        with running("opt", ctx) as straight:
            expected = train(straight, batches)
        for count, (begin, end) in zip((4, 0, 2), ((0, 3), (3, 6), (6, 9)), strict=True):
            with running("opt", ctx, disk_blocks=count) as engine:
                if begin:
                    engine.load(tmp_path / str(begin))
                found = [engine.step([batch]).loss for batch in batches[begin:end]]
                (tmp_path / str(end)).mkdir()
                engine.save(tmp_path / str(end))
                assert found == expected.losses[begin:end]
                after = weights(engine)
        assert all(torch.equal(after[name], tensor) for name, tensor in expected.weights.items())

    def test_other_moments_are_refused(self, tmp_path: Path) -> None:
        with running("opt") as engine:
            engine.save(tmp_path)
        with (
            running("opt", moments="bf16") as engine,
            pytest.raises(UserError, match="same dtype, moments and disk_weights"),
        ):
            engine.load(tmp_path)

    @pytest.mark.parametrize("counts", [(2, 1), (0, 1), (1, 0)])
    def test_states_of_other_blocks_on_the_gpu_are_refused(
        self, counts: tuple[int, int], tmp_path: Path
    ) -> None:
        before, now = counts
        with running("opt", gpu_blocks=before) as engine:
            engine.save(tmp_path)
        with (
            running("opt", gpu_blocks=now) as engine,
            pytest.raises(UserError, match=f"resume with --set exact-offload.gpu_blocks={before}"),
        ):
            engine.load(tmp_path)

    def test_evaluation_in_the_middle_changes_nothing(self) -> None:
        batches = tiny_batches(6, "opt")
        with running("opt") as straight, running("opt") as checked:
            losses = [straight.step([batch]).loss for batch in batches]
            found = [checked.step([batch]).loss for batch in batches[:3]]
            assert checked.evaluate(batches).loss > 0
            assert found + [checked.step([batch]).loss for batch in batches[3:]] == losses

    def test_adam_runs_off_the_main_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        threads: set[str] = set()

        def spy(*args: Any, **kwargs: Any) -> None:
            threads.add(threading.current_thread().name)
            adamw(*args, **kwargs)

        monkeypatch.setattr(block_state, "adamw", spy)
        with running("opt") as engine:
            engine.step(tiny_batches(1, "opt"))
            engine.synchronize()
        assert threads == {"exact-offload-adam"}
        assert not own_threads()

    def test_backward_waits_for_no_room_where_all_gradients_have_theirs(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All updates begin only when backward has ended."""
        ended = threading.Event()

        def late(*args: Any, **kwargs: Any) -> None:
            assert ended.wait(30)
            adamw(*args, **kwargs)

        monkeypatch.setattr(block_state, "adamw", late)
        with running("llama", gradient_blocks="auto") as engine:
            engine.step(tiny_batches(1, "llama"))
            ended.set()
            engine.synchronize()
            assert engine.host.updates() == [1] * BLOCKS

    def test_the_host_holds_what_the_costs_say(self) -> None:
        for dtype, moments in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"), ("bf16", "int8")):
            with running("llama", context(dtype), moments=moments) as engine:  # type: ignore[arg-type]
                sizes = [each.numel() for each in engine.on_gpu]
                told = costs.host_bytes(sizes, 0, 4 if dtype == "fp32" else 2, engine.settings)
                state = sum(engine.host.state_bytes(index) for index in range(len(sizes)))
                wire = sum(each.nbytes for each in engine.host.weights)
            assert wire == told["weights, pinned"]
            # Each of a tiny block's small tensors begins at a multiple of 64 bytes.
            assert told["optimizer"] <= state <= 1.3 * told["optimizer"]

    def test_a_trace_has_every_resource(self) -> None:
        with running("opt", context(trace=True)) as engine:
            engine.step(tiny_batches(1, "opt"))
            engine.synchronize()
            events = engine.trace_events()
        assert {"forward 0", "backward 0", "block 0"} <= {
            each["name"] for each in events if each["ph"] == "X"
        }
        named = {each["args"].get("name") for each in events if each["ph"] == "M"}
        assert {"compute", "cpu adam"} <= named

    def test_fp16_is_refused(self) -> None:
        with pytest.raises(UserError, match="use bf16 or fp32"), running("opt", context("fp16")):
            pass

    def test_close_may_be_called_twice_and_before_setup(self) -> None:
        engine = ExactOffload(SETTINGS, context())
        engine.close()
        engine.setup(tiny_blueprint("opt"))
        engine.step(tiny_batches(1, "opt"))
        engine.close()
        engine.close()
        assert not own_threads()


class TestFaults:
    def test_a_host_that_is_too_small_is_refused_before_anything_is_filled(self) -> None:
        small = context(host_bytes=1_700_000_000)
        with pytest.raises(InfeasiblePlan, match="of host memory are missing"), running("opt", small):
            pass

    def test_a_disk_that_is_too_small_is_refused_before_anything_is_filled(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with (
            pytest.raises(InfeasiblePlan, match=r"of disk are missing in .*exact-offload.disk_folder=FOLDER"),
            running("opt", disk_blocks=2, disk_folder=str(tmp_path / "spill")),
        ):
            pass
        assert list((tmp_path / "spill").iterdir()) == []

    @pytest.mark.parametrize("what", ["read", "write"])
    @pytest.mark.parametrize("changes", [{}, WEIGHTS_ON_DISK], ids=["states", "weights"])
    def test_a_disk_that_fails_ends_the_run_in_one_line(
        self, changes: dict[str, Any], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batches = tiny_batches(6, "opt")
        with running("opt", disk_blocks=5, disk_folder=str(tmp_path / "spill"), **changes) as engine:
            engine.step(batches[:1])
            engine.synchronize()

            def fail(*_: Any) -> None:
                raise OSError(errno.EIO, "Input/output error")

            monkeypatch.setattr(RawFile, what, fail)
            told = f"cannot be {what if what == 'read' else 'written'}"
            with pytest.raises(UserError, match=told):  # in which step depends on the disk's pace
                train(engine, batches[1:])

    def test_memory_that_ends_in_setup_leaves_nothing_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = 0
        whole = block_state.HostSlab

        def some(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made == 6:
                raise OSError(12, "Cannot allocate memory")
            return whole(*args, **kwargs)

        monkeypatch.setattr(block_state, "HostSlab", some)
        with pytest.raises(OSError, match="Cannot allocate memory"), running("opt"):
            pass
        assert not own_threads()

    @pytest.mark.parametrize("clip", [0.0, 0.5])
    def test_an_exception_in_the_worker_ends_the_step_with_its_cause(
        self, clip: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise ArithmeticError("spoilt")

        monkeypatch.setattr(block_state, "adamw", fail)
        batches = tiny_batches(2, "opt")
        with running("opt", max_grad_norm=clip) as engine:
            engine.step(batches[:1])
            with pytest.raises(RuntimeError, match="the CPU update failed") as caught:
                engine.step(batches[1:])
            assert isinstance(caught.value.__cause__, ArithmeticError)

    def test_a_worker_that_hangs_becomes_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        go_on = threading.Event()
        monkeypatch.setattr(block_state, "adamw", lambda *_, **__: go_on.wait(60))
        monkeypatch.setattr(gradient_buffers, "WAIT_LIMIT_S", 0.05)
        engine = ExactOffload(SETTINGS, context())
        try:
            engine.setup(tiny_blueprint("opt", num_blocks=BLOCKS))
            with pytest.raises(RuntimeError, match="freed no gradient within"):
                engine.step(tiny_batches(1, "opt"))
        finally:
            go_on.set()
            engine.close()

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("clip", CLIPS)
    def test_a_gradient_that_is_not_finite_is_told_a_step_late(
        self, value: float, clip: dict[str, Any]
    ) -> None:
        """Of block 0, the last in backward: it changes nothing in it, nor outside the blocks."""
        with running("opt", **clip) as engine:
            batches = tiny_batches(3, "opt")
            engine.step(batches[:1])
            before = weights(engine)
            moments = [chunk.memory.moment.clone() for chunk in engine.host.chunks[0]]
            embedding = engine.model.get_input_embeddings().weight
            first = engine.own[0][0]
            hook = first.register_hook(lambda gradient: gradient * value)
            assert math.isfinite(engine.step(batches[1:2]).loss)
            hook.remove()
            with pytest.raises(NonFiniteLoss, match="gradient of step 1"):
                engine.step(batches[2:])
            own = {id(parameter) for parameter in engine.own[0]} | {id(embedding)}
            for name, parameter in engine.model.named_parameters():
                if id(parameter) in own:
                    assert torch.equal(parameter.detach(), before[name]), name
            assert all(torch.isfinite(parameter).all() for parameter in engine.model.parameters())
            for chunk, moment in zip(engine.host.chunks[0], moments, strict=True):
                assert torch.equal(chunk.memory.moment, moment)

    @pytest.mark.parametrize("clip", CLIPS)
    @pytest.mark.parametrize("block", [0, 3])
    def test_a_gradient_that_is_not_finite_changes_no_block_that_the_gpu_updates(
        self, clip: dict[str, Any], block: int, tmp_path: Path
    ) -> None:
        """Of one of them, or of one that backward reached before them."""
        with running("opt", gpu_blocks=2, **clip) as engine:
            batches = tiny_batches(4, "opt")
            engine.step(batches[:1])
            engine.save(tmp_path)
            before = weights(engine)
            hook = engine.own[block][0].register_hook(lambda gradient: gradient * math.nan)
            assert math.isfinite(engine.step(batches[1:2]).loss)
            hook.remove()
            with pytest.raises(NonFiniteLoss, match="gradient of step 1"):
                engine.step(batches[2:3])
            unchanged = {id(parameter) for own in engine.own[: min(2, block + 1)] for parameter in own}
            found = [name for name, each in engine.model.named_parameters() if id(each) in unchanged]
            assert len(found) == len(unchanged)
            for name in found:
                assert torch.equal(engine.model.get_parameter(name).detach(), before[name]), name
            engine.load(tmp_path)
            assert math.isfinite(engine.step(batches[3:]).loss)

    def test_a_loss_that_is_not_finite_is_told_at_once(self) -> None:
        with running("opt") as engine:
            batches = tiny_batches(2, "opt")
            engine.step(batches[:1])
            before = weights(engine)
            head = engine.model.get_output_embeddings()
            hook = head.register_forward_hook(lambda _, __, out: out * math.nan)
            with pytest.raises(NonFiniteLoss, match="step 1"):
                engine.step(batches[1:])
            hook.remove()
            after = weights(engine)
        assert all(torch.equal(after[name], before[name]) for name in before)
