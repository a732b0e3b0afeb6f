"""LSP-Offload against its in-memory twin, AdamW, and the formulas of the paper."""

from __future__ import annotations

import copy
import gc
import importlib
import math
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from identity_projector import identity_projector
from torch import Tensor
from trained_engines import assert_same, late_by_chance, train, weights
from transformers import AutoModelForCausalLM

from engines.base import Batch, Context
from engines.cpu_updates import pipeline
from engines.cpu_updates.cpu_adam import core_adam
from engines.cpu_updates.cpu_threads import AdamThreads
from engines.errors import NonFiniteLoss, UserError
from engines.methods.lsp import Lsp
from engines.methods.native import Native
from engines.model.activation_checkpointing import TrainedBlocks
from engines.settings.checks import Refused
from engines.settings.first_order import NativeSettings
from engines.settings.lsp import LspSettings
from engines.settings.lsp_layout import CORE_SLOTS, streamed_uploads
from engines.shapes import Dtype, Workload
from engines.subspace import core_matrix, cores
from engines.subspace.core_matrix import IdleMatrixWarning
from engines.subspace.cores import CoreState
from engines.subspace.projector import Projector, SparseProjector, compress, decompress, transport_moments
from engines.subspace.residual import make_residual
from engines.subspace.subspaces import Subspace, block_matrices, subspace_seed
from engines.transfer.engine_clocks import Clocks
from engines.transfer.link import Event, Link
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint, tiny_config

SETTINGS = LspSettings(
    learning_rate=3e-3, weight_decay=0.1, schedule="cosine", warmup_steps=2,
    d=6, r=2, check_every=8, learn_steps=3, learn_timeout_s=1e9,
)  # fmt: skip
STEPS = 20
MODELS = [("opt", True), ("opt", False), ("llama", False), ("gpt2", True), ("roberta", False)]
FAMILIES = ["opt", "llama", "gpt2", "qwen2", "roberta"]


def context(
    dtype: Dtype = "fp32", accumulation: int = 1, checkpointing: bool = True, device: str = "cpu"
) -> Context:
    workload = Workload(
        batch_size=2, seq_len=16, dtype=dtype, checkpointing=checkpointing, accumulation=accumulation
    )
    return Context(device=device, workload=workload, seed=7, total_steps=STEPS)


@contextmanager
def running(
    family: str | TinyBlueprint, tied: bool = False, ctx: Context | None = None, **changes: Any
) -> Iterator[Lsp]:
    engine = Lsp(replace(SETTINGS, **changes), ctx or context())
    try:
        engine.setup(tiny_blueprint(family, tied, num_blocks=2) if isinstance(family, str) else family)
        yield engine
    finally:
        engine.close()


def kept_by_block(engine: Lsp, trained: TrainedBlocks) -> set[tuple[int, ...]]:
    """Shapes of what the first block's compiled forward keeps for its backward pass."""
    assert trained._compiled is not None
    kept: set[tuple[int, ...]] = set()
    hidden = torch.randn(3, 16, engine.model.config.hidden_size, requires_grad=True)
    positions = engine.model.model.rotary_emb(hidden, torch.arange(16)[None])

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trained._compiled[0](hidden, position_embeddings=positions)
    return kept


def subspaces(engine: Lsp) -> list[Subspace]:
    return [matrix.subspace for matrix in engine._matrices()]


def states(engine: Lsp) -> list[CoreState]:
    return [chunk.state for block in engine._blocks for chunk in block.chunks]


def core_threads() -> list[str]:
    """The engine's own that run."""
    return [each.name for each in threading.enumerate() if each.name.startswith("lsp-core")]


def copied(projector: Projector) -> Projector:
    return copy.deepcopy(projector)


@pytest.fixture(params=[True, False], ids=["gradient formed", "factors projected"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Tiny matrices cost less with their gradient formed; large ones the other way."""
    formed: bool = request.param
    monkeypatch.setattr(core_matrix, "forms_gradient", lambda *_: formed)
    return formed


class Unwatched:
    """A `Watcher` that does nothing."""

    def before_forward(self, index: int) -> None: ...

    def before_backward(self, index: int) -> None: ...

    def finish(self, index: int) -> None: ...

    def after_backward(self, index: int) -> None: ...


class Happening:
    """What the engine asks of a CUDA event, on the CPU."""

    def __init__(self) -> None:
        self._is_over = threading.Event()

    def query(self) -> bool:
        return self._is_over.is_set()

    def synchronize(self) -> None:
        assert self._is_over.wait(60)

    def end(self) -> None:
        self._is_over.set()


class LateDownloads(Link):
    """A link whose download stream lags behind: a thread that copies one thing after the other, each after
    `lag_s`. The thread that calls is the compute stream."""

    def __init__(self, lag_s: float) -> None:
        super().__init__(torch.device("cpu"))
        self._lag_s = lag_s
        self._waiting: queue.SimpleQueue[tuple[Tensor, Tensor, Happening] | None] = queue.SimpleQueue()
        self._stream = threading.Thread(target=self._copy_all, daemon=True)
        self._stream.start()

    def _copy_all(self) -> None:
        while (entry := self._waiting.get()) is not None:
            source, out, happening = entry
            time.sleep(self._lag_s)
            out.copy_(source)
            happening.end()

    def upload(self, host: Tensor, out: Tensor, after: Any = None, name: str = "copy") -> Event:
        for event in (after,) if isinstance(after, Event) else after or ():
            self.host_wait(event)
        return super().upload(host, out, after, name)

    def download_each(
        self, pairs: Sequence[tuple[Tensor, Tensor]], after: Any = None, name: str = "copy"
    ) -> list[Event]:
        happenings: list[Any] = [Happening() for _ in pairs]
        for (gpu, out), happening in zip(pairs, happenings, strict=True):
            self._waiting.put((gpu, out, happening))
        return [Event(happening) for happening in happenings]

    def wait(self, event: Event) -> None:
        self.host_wait(event)

    def synchronize(self) -> None:
        self.host_wait(self.download(torch.zeros(1), torch.zeros(1)))

    def stop(self) -> None:
        self._waiting.put(None)
        self._stream.join(60)


@contextmanager
def lagging(family: str, num_blocks: int, lag_s: float, **changes: Any) -> Iterator[Lsp]:
    engine = Lsp(replace(SETTINGS, **changes), context())
    engine.link = link = LateDownloads(lag_s)
    try:
        engine.setup(tiny_blueprint(family, num_blocks=num_blocks))
        yield engine
    finally:
        engine.close()
        link.stop()


def square_blueprint() -> TinyBlueprint:
    """A Llama whose block matrices are all 16 x 16."""
    config = tiny_config("llama", tied=False, num_blocks=2)
    config.intermediate_size, config.num_key_value_heads = 16, 2
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config).float()
    buffers = dict(reference.named_buffers())
    model = copy.deepcopy(reference).to("meta")
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer
    return TinyBlueprint(shape=tiny_blueprint("llama").shape, model=model, reference=reference)


class TestTwin:
    """The offloaded run against `offload=False`, bit for bit over 20 steps with three bias checks."""

    @pytest.mark.parametrize(("family", "tied"), MODELS)
    def test_offloaded_equals_in_memory(self, family: str, tied: bool, both_ways: bool) -> None:
        batches = tiny_batches(STEPS, family)
        with running(family, tied, offload=False) as twin:
            expected = train(twin, batches)
            assert {check.step for checks in twin.checks().values() for check in checks} == {0, 8, 16}
        with running(family, tied) as engine:
            assert_same(train(engine, batches), expected)

    @pytest.mark.parametrize("order", ["layerwise", "sequential"])
    @pytest.mark.parametrize(("clip", "moments"), [(0.0, "fp32"), (0.5, "fp32"), (0.5, "bf16")])
    def test_equal_in_bf16_with_accumulation(
        self, order: str, clip: float, moments: str, both_ways: bool
    ) -> None:
        batches, ctx = tiny_batches(20, "qwen2"), context("bf16", accumulation=2)
        changes = {"max_grad_norm": clip, "moments": moments}
        with running("qwen2", ctx=ctx, offload=False, **changes) as twin:
            expected = train(twin, batches, per_step=2)
        with running("qwen2", ctx=ctx, schedule_order=order, **changes) as engine:
            assert_same(train(engine, batches, per_step=2), expected)

    @pytest.mark.parametrize(
        ("family", "formed", "changes"),
        [
            ("opt", True, {"moments": "bf16"}),
            ("llama", False, {"max_grad_norm": 0.5}),
            ("gpt2", False, {"checkpointed_blocks": 1}),
            ("roberta", True, {"train_outer": False, "checkpointed_blocks": 2}),
        ],
    )
    def test_streamed_equals_in_memory(
        self, family: str, formed: bool, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two checks, two micro-batches, more blocks than have room on the GPU."""
        monkeypatch.setattr(core_matrix, "forms_gradient", lambda *_: formed)
        batches, ctx = tiny_batches(20, family), context("bf16", accumulation=2)
        streamed = {"weights": "streamed", **changes}
        blueprint = lambda: tiny_blueprint(family, family == "opt", num_blocks=5)  # noqa: E731
        with running(blueprint(), ctx=ctx, offload=False, **streamed) as twin:
            expected = train(twin, batches, per_step=2)
            evaluated = twin.evaluate(batches[:4])
        with running(blueprint(), ctx=ctx, **streamed) as engine:
            found = train(engine, batches, per_step=2)
            assert_same(found, expected)
            assert engine.evaluate(batches[:4]) == evaluated
            assert engine.realized_update_fraction() is not None
            assert engine.streamed is not None
            slots = engine.streamed.weights.slots
            block, wire = slots.memory(0).nbytes, engine._blocks[0].core.nbytes
            assert slots.gpu_bytes == 3 * block
        uploads = sum(streamed_uploads(5))
        assert uploads == 4
        usual = found.stats[9]  # moves no moments
        assert usual.h2d_bytes == uploads * block + 5 * wire
        assert usual.d2h_bytes == 5 * block + 5 * (wire + 4) + 4 * ("max_grad_norm" in changes)

    def test_streamed_computes_what_resident_does(self) -> None:
        """Micro-batches in another order; the same in each block, and outside where nothing is tied."""
        batches, ctx = tiny_batches(12, "llama"), context(accumulation=2)
        outcomes = []
        for where in ("resident", "streamed"):
            with running("llama", ctx=ctx, weights=where) as engine:
                outcomes.append(train(engine, batches, per_step=2))
        assert outcomes[1].losses == pytest.approx(outcomes[0].losses, rel=1e-5)

    @pytest.mark.slow
    # Both from within torch's compiler.
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    def test_streamed_equals_its_twin_compiled(self) -> None:
        batches, outcomes = tiny_batches(10, "llama"), []
        for offload in (False, True):
            with running("llama", compile=True, weights="streamed", offload=offload) as engine:
                outcomes.append(train(engine, batches))
        assert_same(*outcomes)

    @pytest.mark.parametrize("projector", ["paper", "one_hot"])
    def test_equal_with_other_projectors(self, projector: str, both_ways: bool) -> None:
        batches = tiny_batches(STEPS, "gpt2")
        with running("gpt2", offload=False, projector=projector) as twin:
            expected = train(twin, batches)
        with running("gpt2", projector=projector) as engine:
            assert_same(train(engine, batches), expected)

    def test_equal_with_compiled_blocks(self) -> None:
        """Of which the recomputed ones, through the compiler too, keep their input and no product."""
        batches = tiny_batches(6, "llama")
        for blocks in ("all", 1):
            with running("llama", offload=False, compile=True, checkpointed_blocks=blocks) as twin:
                expected = train(twin, batches)
            with running("llama", compile=True, checkpointed_blocks=blocks) as engine:
                trained = engine._trained
                assert trained is not None
                assert_same(train(engine, batches), expected)
                if blocks == "all":
                    kept = kept_by_block(engine, trained)
                    hidden = engine.model.config.hidden_size
                    assert {each for each in kept if each[:1] in ((3,), (48,))} == {(3, 16, hidden)}
                with running("llama", checkpointed_blocks=blocks) as eager:
                    assert train(eager, batches).losses == pytest.approx(expected.losses, rel=1e-5)

    def test_what_cannot_be_compiled_runs_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the first step that compiles, the second: the first one tests projectors. Losses are those of
        an engine that was never to compile."""

        def refuse(run: Any, **_: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                raise unsupported("not this block\nand more")

            return call

        unsupported = importlib.import_module("torch._dynamo.exc").Unsupported
        batches = tiny_batches(4, "llama")
        forms: list[dict[str, Any]] = [{}, {"checkpointed_blocks": 1}, {"weights": "streamed"}]
        for form in forms:
            with running("llama", **form) as engine:
                expected = train(engine, batches)
                assert engine.notes == []
            with monkeypatch.context() as patched:
                patched.setattr(torch, "compile", refuse)
                with running("llama", compile=True, **form) as engine:
                    found = train(engine, batches)
            assert engine.notes == ["not compiled: not this block"]  # told after its end too
            assert_same(found, expected)

    def test_no_graph_of_autograd_outlives_its_step(self) -> None:
        """A CUDA graph could not be captured beside it."""
        with running("llama", compile=True) as engine:
            trained = engine._trained
            assert trained is not None
            places = [each for each in trained.blocks[0].parameters() if each.requires_grad]
            gc.disable()
            try:
                for index in range(3):
                    engine.step(tiny_batches(1, "llama"))
                    # Autograd makes a new node for a parameter once all graphs with the old one are gone.
                    nodes = [each.view_as(each).grad_fn.next_functions[0][0] for each in places]
                    assert all("step" not in node.metadata for node in nodes)
                    for node in nodes:
                        node.metadata["step"] = index
                    del nodes, node
            finally:
                gc.enable()

    @pytest.mark.parametrize("used", [True, False])
    def test_all_that_a_block_returns_has_its_gradient(self, used: bool) -> None:
        """As without recomputation: of a tensor beside the hidden state too, whether it is used or not."""
        model = tiny_blueprint("opt").reference
        hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
        found = []
        for recompute in (False, True):
            trained = TrainedBlocks(model, Unwatched(), recomputed=99 if recompute else 0, graphs=False)
            block, own = trained.blocks[0], trained._forwards[0]

            def pair(state: Tensor, own: Any = own, **call: Any) -> tuple[Tensor, None, Tensor]:
                return own(state, **call), None, state.square().mean() * own(state, **call)[0, 0, 0]

            trained._forwards[0] = pair
            entering = hidden.clone().requires_grad_()
            out, nothing, beside = block(entering, attention_mask=None)
            assert nothing is None
            model.zero_grad()
            (out.sum() + 3.0 * beside if used else out.sum()).backward()
            found.append([entering.grad, *(parameter.grad for parameter in block.parameters())])
            trained.close()
        for mine, its in zip(*found, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("family", ["llama", "roberta", "deberta-v2"])
    def test_recomputation_changes_no_bit(self, family: str, both_ways: bool) -> None:
        """Dropout included, whose random state is put back, and what reaches blocks beside the hidden state:
        deberta's embeddings of positions."""
        batches = tiny_batches(6, family)
        with running(family, ctx=context(checkpointing=False)) as engine:
            expected = train(engine, batches)
        with running(family, ctx=context(checkpointing=True)) as engine:
            assert_same(train(engine, batches), expected)

    def test_factors_projected_equal_the_gradient_compressed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        outcomes = []
        for formed in (True, False):
            monkeypatch.setattr(core_matrix, "forms_gradient", lambda *_, formed=formed: formed)
            # eps: where a gradient is rounding error, Adam makes it a sign.
            with running("gpt2", adam_eps=1e-3) as engine:
                outcomes.append(train(engine, tiny_batches(5, "gpt2")))
        assert outcomes[0].losses == pytest.approx(outcomes[1].losses, rel=1e-5)
        for name, tensor in outcomes[0].weights.items():
            torch.testing.assert_close(outcomes[1].weights[name], tensor, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("order", ["layerwise", "sequential"])
    def test_equal_when_worker_and_link_are_late(self, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
        batches = tiny_batches(STEPS, "opt")
        with running("opt", offload=False) as twin:
            expected = train(twin, batches)
        delayed = late_by_chance(random.Random(0))
        monkeypatch.setattr(cores, "core_adam", delayed(core_adam))
        monkeypatch.setattr(Link, "upload", delayed(Link.upload))
        monkeypatch.setattr(Link, "download_each", delayed(Link.download_each))
        with running("opt", schedule_order=order) as engine:
            assert_same(train(engine, batches), expected)

    def test_evaluation_in_the_middle_changes_nothing(self) -> None:
        batches = tiny_batches(6, "opt")
        with running("opt") as straight, running("opt") as checked:
            losses = [straight.step([batch]).loss for batch in batches]
            found = [checked.step([batch]).loss for batch in batches[:3]]
            assert checked.evaluate(batches).loss > 0
            assert found + [checked.step([batch]).loss for batch in batches[3:]] == losses

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
    def test_is_adam_in_plain_operations_of_the_device(
        self, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The twin, whose cores go through the CPU's fused kernel, against the formula on the device itself.

        Losses within 1e-5 of each other and weights within 1e-5 over 5 steps: rounding only.
        """

        def plain_adam(
            core: Tensor, moment: Tensor, variance: Tensor, updates: int,
            *, beta1: float, beta2: float, eps: float, scale: float, gradients: tuple[Tensor, ...], key: int,
        ) -> None:  # fmt: skip
            assert scale == 1.0
            assert not gradients
            g, m, v = (tensor.to(device) for tensor in (core, moment, variance))
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g.square()
            moment.copy_(m)
            variance.copy_(v)
            core.copy_((m / (1 - beta1**updates)) / ((v / (1 - beta2**updates)).sqrt() + eps))

        # A larger eps: where both moments are rounding error of a gradient of zero, Adam makes it a sign.
        batches, ctx, changes = tiny_batches(5, "llama"), context(device=device), {"adam_eps": 1e-5}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            with running("llama", ctx=ctx, offload=False, **changes) as twin:
                expected = train(twin, batches)
            monkeypatch.setattr(cores, "core_adam", plain_adam)
            with running("llama", ctx=ctx, offload=False, **changes) as twin:
                found = train(twin, batches)
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        for name, tensor in expected.weights.items():
            torch.testing.assert_close(found.weights[name], tensor, rtol=0.0, atol=1e-5)

    @pytest.mark.parametrize(
        "changes",
        [{}, {"schedule_order": "sequential"}, {"max_grad_norm": 0.5}, {"weights": "streamed"}],
        ids=["layerwise", "sequential", "clipped", "streamed"],
    )
    def test_equal_when_downloads_lag_and_blocks_share_slots(self, changes: dict[str, Any]) -> None:
        num_blocks = 2 * CORE_SLOTS + 1
        batches = tiny_batches(5, "opt")
        with running(tiny_blueprint("opt", num_blocks=num_blocks), offload=False, **changes) as twin:
            expected = train(twin, batches)
        with lagging("opt", num_blocks, lag_s=0.002, **changes) as engine:
            assert_same(train(engine, batches), expected)

    @pytest.mark.gpu
    @pytest.mark.parametrize(
        "changes",
        [
            {"schedule_order": "layerwise"},
            {"moments": "bf16"},
            {"schedule_order": "sequential"},
            {"weights": "streamed"},
            {"weights": "streamed", "compile": False, "max_grad_norm": 0.5},
        ],
    )
    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize(("family", "tied"), MODELS)
    def test_equal_on_a_gpu_also_with_late_copies(
        self, family: str, tied: bool, dtype: Dtype, changes: dict[str, Any]
    ) -> None:
        batches, ctx = tiny_batches(STEPS, family), context(dtype, device="cuda:0")
        late = random.Random(0)
        # The fused attention kernels may sum in any order in backward.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            # More blocks than slots, so that blocks wait for each other's.
            twin_model = tiny_blueprint(family, tied, num_blocks=CORE_SLOTS + 2)
            with running(twin_model, ctx=ctx, offload=False, **changes) as twin:
                expected = train(twin, batches)
            engine = Lsp(replace(SETTINGS, **changes), ctx)
            engine.link = Link(engine.device, delay=lambda: late.choice((0, 0, 1_000_000)))
            try:
                engine.setup(tiny_blueprint(family, tied, num_blocks=CORE_SLOTS + 2))
                wires = sum(state.outgoing.nbytes for state in states(engine))
                held = 0 if engine.streamed is None else engine.streamed.pinned_bytes
                assert engine.pinned_bytes == held + 64 + wires  # the blocks' norms come first
                assert_same(train(engine, batches), expected)
            finally:
                engine.close()


class TestAgainstAdamW:
    def test_identity_projectors_are_adamw(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """d = m = n and P = Q = I: weight decay, schedule, bias correction and accumulation included."""

        def identities(*_: Any, **__: Any) -> tuple[SparseProjector, SparseProjector]:
            return identity_projector(16), identity_projector(16)

        monkeypatch.setattr("engines.subspace.subspaces.draw_pair", identities)
        batches, ctx = tiny_batches(20, "llama"), context(accumulation=2)
        native = Native(
            NativeSettings(learning_rate=3e-3, weight_decay=0.1, schedule="cosine", warmup_steps=2), ctx
        )
        native.setup(square_blueprint())
        losses = [native.step(batches[i : i + 2]).loss for i in range(0, 20, 2)]
        with running(square_blueprint(), ctx=ctx, d=512, projector="one_hot") as engine:
            found = train(engine, batches, per_step=2)
            assert all(check.bias == 0.0 for checks in engine.checks().values() for check in checks)
        assert found.losses == pytest.approx(losses, rel=1e-5)
        for name, tensor in native.weights():
            torch.testing.assert_close(found.weights[name], tensor, rtol=1e-4, atol=1e-5)

    def test_accumulation_equals_the_union(self) -> None:
        batches = tiny_batches(2, "opt")
        union = Batch(inputs={key: torch.cat([b.inputs[key] for b in batches]) for key in batches[0].inputs})
        # No new pairs: they would be found on different calibration gradients. eps above rounding errors.
        changes = {"alpha": 1e9, "adam_eps": 1e-3}
        with (
            running("opt", ctx=context(accumulation=2), **changes) as split,
            running("opt", **changes) as whole,
        ):
            for _ in range(3):
                assert split.step(batches).loss == pytest.approx(whole.step([union]).loss, rel=1e-5)
            expected = weights(whole)
            for name, tensor in weights(split).items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


class TestOneStep:
    def test_is_algorithm_1(self) -> None:
        """Compress, Adam, decompress, decay: written out for every matrix from the plain gradient."""
        batch = tiny_batches(1, "gpt2")[0]
        reference = tiny_blueprint("gpt2", num_blocks=2).reference.train()
        reference(**batch.inputs).loss.backward()
        settings = {"schedule": "constant", "warmup_steps": 0}
        with running("gpt2", **settings) as engine:
            engine.step([batch])
            found = weights(engine)
            pairs = {each.name: (each.left, each.right) for each in subspaces(engine)}
        assert len(pairs) == 2 * 4
        for name, (left, right) in pairs.items():
            old = reference.get_parameter(name)
            assert old.grad is not None
            core = compress(old.grad, left, right)
            delta = decompress(core / (core.abs() + 1e-8), left, right)
            expected = old.detach() * (1 - 3e-3 * 0.1) - 3e-3 * delta
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("accumulation", [1, 2])
    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("order", ["layerwise", "sequential"])
    def test_wire_bytes_are_the_cores(self, order: str, dtype: Dtype, accumulation: int) -> None:
        batches = tiny_batches(3 * accumulation, "llama")
        ctx = context(dtype, accumulation=accumulation)
        with running("llama", ctx=ctx, schedule_order=order, d=12) as engine:
            sizes = [each.d for each in subspaces(engine)]
            assert set(sizes) == {8, 12}  # key and value projections are 8 x 16
            found = train(engine, batches, per_step=accumulation)
        cores = {"fp32": 4, "bf16": 2}[dtype] * sum(d * d for d in sizes)
        norms = 2 * 4
        assert [(entry.h2d_bytes, entry.d2h_bytes) for entry in found.stats] == [(cores, cores + norms)] * 3
        assert (found.link.h2d_bytes, found.link.d2h_bytes) == (3 * cores, 3 * (cores + norms))

    def test_moments_that_move_are_counted(self) -> None:
        with running("llama", check_every=2) as engine:
            found = train(engine, tiny_batches(3, "llama"))
            cores = sum(4 * each.d**2 for each in subspaces(engine))
        # Step 2 finds every pair above alpha: both moments go up and come back.
        assert [entry.h2d_bytes for entry in found.stats] == [cores, cores, 3 * cores]
        assert [entry.d2h_bytes for entry in found.stats] == [cores + 8, cores + 8, 3 * cores + 8]

    def test_gradients_of_matrices_are_never_stored(self, both_ways: bool) -> None:
        with running("opt") as engine:
            for batch in tiny_batches(2, "opt"):
                engine.step([batch])
                assert all(each.weight.grad is None for each in subspaces(engine))

    def test_what_is_kept_for_backward_is_projected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(core_matrix, "forms_gradient", lambda *_: False)
        kept: list[tuple[int, ...]] = []

        def note(tensor: Tensor) -> Tensor:
            kept.append(tuple(tensor.shape))
            return tensor

        with running("opt", ctx=context(checkpointing=False)) as engine:
            batches = tiny_batches(2, "opt")
            engine.step(batches[:1])  # tests the projectors, for which it keeps everything
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                engine.step(batches[1:])
        assert kept.count((32, 6)) == 2 * 6  # (tokens, d) for each of the six matrices of both blocks

    def test_the_twin_counts_the_same_bytes_and_has_neither_thread_nor_pinned_memory(self) -> None:
        batches = tiny_batches(3, "llama")
        with running("llama", check_every=2) as engine:
            expected = train(engine, batches)
        with running("llama", check_every=2, offload=False) as engine:
            found = train(engine, batches)
            assert not core_threads()
            assert (engine.pinned_bytes, engine.link.h2d_bytes, engine.link.d2h_bytes) == (0, 0, 0)
        for mine, its in zip(found.stats, expected.stats, strict=True):
            assert (mine.h2d_bytes, mine.d2h_bytes, mine.cpu_s) == (its.h2d_bytes, its.d2h_bytes, None)

    def test_adam_runs_off_the_main_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        threads: set[str] = set()

        def spy(*args: Any, **kwargs: Any) -> None:
            threads.add(threading.current_thread().name)
            core_adam(*args, **kwargs)

        monkeypatch.setattr(cores, "core_adam", spy)
        with running("opt") as engine:
            stats = engine.step(tiny_batches(1, "opt"))
            engine.synchronize()
            assert engine._pipeline is not None
            assert engine._pipeline.step_ended(None)["cpu_s"] >= 0.0
            assert stats.cpu_threads == engine._pipeline.adam_threads.count
        assert threads == {"lsp-core-adam"}

    @pytest.mark.parametrize(
        ("weights", "accumulation", "hiding_s"),
        [("resident", 1, 0.8), ("resident", 4, 0.2), ("streamed", 4, 0.8)],
    )
    def test_updates_hide_behind_one_micro_batch_or_behind_all_that_pass_a_block_together(
        self, weights: str, accumulation: int, hiding_s: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By that the number of Adam's threads is chosen."""
        told: list[float | None] = []
        monkeypatch.setattr(AdamThreads, "step_ended", lambda self, cpu_s, hiding_s: told.append(hiding_s))
        ctx = context("bf16", accumulation=accumulation)
        monkeypatch.setattr(Clocks, "take_s", lambda self, link: {"gpu_s": 0.8})
        with running("llama", ctx=ctx, weights=weights) as engine:
            assert engine.step(tiny_batches(accumulation, "llama")).gpu_s == 0.8
        assert told == [hiding_s]


class TestResidual:
    """What projectors leave out takes a step too."""

    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_is_its_formula(self, family: str) -> None:
        """Written out over three steps from plain gradients; the ratio is the last step's."""
        batches = tiny_batches(3, family)
        given = {
            "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "train_outer": False,
            "check_every": 1000, "residual": 0.5,
        }  # fmt: skip
        with running(family, **given) as engine:
            for batch in batches:
                engine.step([batch])
            found = weights(engine)
            pairs = {each.name: (copied(each.left), copied(each.right)) for each in subspaces(engine)}
        model = tiny_blueprint(family, num_blocks=2).reference.train()
        state = {name: [0.0, 0.0, 0.0] for name in pairs}
        for step, batch in enumerate(batches, 1):
            model.zero_grad()
            model(**batch.inputs).loss.backward()
            for name, (left, right) in pairs.items():
                weight = model.get_parameter(name)
                gradient = weight.grad
                assert gradient is not None
                moment, variance, ratio = state[name]
                core = compress(gradient, left, right)
                moment, variance = 0.9 * moment + 0.1 * core, 0.999 * variance + 0.001 * core.square()
                direction = moment / (1 - 0.9**step) / ((variance / (1 - 0.999**step)).sqrt() + 1e-8)
                left_out = gradient - decompress(core.contiguous(), left, right)
                delta = decompress(direction.contiguous(), left, right) + 0.5 * ratio * left_out
                state[name] = [moment, variance, float(direction.norm() / core.norm())]
                weight.data.sub_(3e-3 * delta)
        for name in pairs:
            torch.testing.assert_close(found[name], model.get_parameter(name).detach(), rtol=1e-4, atol=2e-4)

    @pytest.mark.parametrize(
        ("family", "dtype", "changes"),
        [
            ("opt", "fp32", {}),
            ("gpt2", "bf16", {"schedule_order": "sequential"}),
            ("roberta", "fp32", {"projector": "paper", "checkpointed_blocks": 1}),
        ],
    )
    def test_offloaded_equals_in_memory(self, family: str, dtype: Dtype, changes: dict[str, Any]) -> None:
        batches, ctx = tiny_batches(STEPS, family), context(dtype)
        with running(family, ctx=ctx, offload=False, residual=1.0, **changes) as twin:
            expected = train(twin, batches)
        with running(family, ctx=ctx, residual=1.0, **changes) as engine:
            found = train(engine, batches)
        assert_same(found, expected)
        with running(family, ctx=ctx, **changes) as engine:
            plain = train(engine, batches)
        assert [each.d2h_bytes for each in plain.stats] == [each.d2h_bytes for each in found.stats]
        assert plain.losses != found.losses

    def test_equal_with_late_downloads(self) -> None:
        batches = tiny_batches(6, "llama")
        with running(tiny_blueprint("llama", num_blocks=6), offload=False, residual=1.0) as twin:
            expected = train(twin, batches)
        with lagging("llama", 6, 0.005, residual=1.0) as engine:
            assert_same(train(engine, batches), expected)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
    def test_equal_with_compiled_blocks(self) -> None:
        batches, outcomes = tiny_batches(6, "llama"), []
        for offload in (False, True):
            with running("llama", compile=True, offload=offload, residual=1.0) as engine:
                outcomes.append(train(engine, batches))
        assert_same(*outcomes)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_equal_as_graphs_on_a_gpu(self, dtype: Dtype) -> None:
        batches, ctx = tiny_batches(STEPS, "llama"), context(dtype, device="cuda:0")
        with running("llama", ctx=ctx, offload=False, residual=1.0) as twin:
            expected = train(twin, batches)
        with running("llama", ctx=ctx, residual=1.0) as engine:
            assert_same(train(engine, batches), expected)

    def test_what_is_not_finite_changes_no_weight(self) -> None:
        residual = make_residual(1.0, torch.Size((3, 2)), torch.ones(6))
        residual.ratio.fill_(2.0)
        residual.finish(torch.ones(1, 1))
        assert torch.equal(residual.left_out, torch.full((3, 2), 2.0))
        residual.finish(torch.full((1, 1), math.inf))
        assert torch.equal(residual.left_out, torch.zeros(3, 2))
        residual.core_norm.zero_()
        residual.follow(torch.ones(1, 1))
        assert float(residual.ratio) == 0.0

    def test_is_refused_where_it_cannot_be(self) -> None:
        for changes in ({"weights": "streamed"}, {"max_grad_norm": 1.0}, {"residual": -1.0}):
            with pytest.raises(Refused, match="residual"):
                replace(SETTINGS, **{"residual": 1.0, **changes})  # type: ignore[arg-type]
        with (
            pytest.raises(UserError, match="is for one micro-batch a step"),
            running("llama", ctx=context(accumulation=2), residual=1.0),
        ):
            pass


class TestSubspaces:
    def test_first_check_is_before_the_first_update_and_learning_lowers_the_bias(self) -> None:
        with running("opt", projector="paper", learn_steps=60, alpha=1e-3) as engine:
            engine.step(tiny_batches(1, "opt"))
            checks = engine.checks()
            assert len(checks) == 2 * 6
        for entries in checks.values():
            (check,) = entries
            assert check.step == 0
            assert check.learned_bias is not None
            assert check.learned_bias < 0.6 * check.bias
            assert (check.learn_steps, check.stop) == (60, "steps")

    def test_alpha_is_a_threshold_for_each_matrix(self) -> None:
        """A pair at or below alpha stays, one above goes, whatever the mean is."""
        with running("opt", offload=False) as engine:
            engine.step(tiny_batches(1, "opt"))
            biases = sorted(entries[0].bias for entries in engine.checks().values())
        alpha = biases[len(biases) // 2]
        with running("opt", alpha=alpha, offload=False) as engine:
            engine.step(tiny_batches(1, "opt"))
            kept = [entries[0] for entries in engine.checks().values() if entries[0].learned_bias is None]
            assert len(kept) == len(biases) // 2 + 1
            assert all(check.bias <= alpha and check.stop is None for check in kept)
            replaced = [each.name for each in subspaces(engine) if each.generation == 1]
            assert len(replaced) == len(biases) - len(kept)

    def test_check_every_counts_steps(self) -> None:
        with running("opt", check_every=3, offload=False) as engine:
            for batch in tiny_batches(7, "opt"):
                engine.step([batch])
            for entries in engine.checks().values():
                assert [check.step for check in entries] == [0, 3, 6]

    @pytest.mark.parametrize("projector", ["block", "paper", "one_hot"])
    def test_moments_are_transported_with_the_formula(self, projector: str) -> None:
        batches = tiny_batches(2, "opt")
        with running("opt", check_every=1, projector=projector) as engine:
            engine.step(batches[:1])
            engine.synchronize()
            each, state = subspaces(engine)[0], states(engine)[0]
            left, right = copied(each.left), copied(each.right)
            here = slice(0, each.d**2)
            moment, variance = (t[here].view(each.d, each.d).clone() for t in (state.moment, state.variance))
            engine.step(batches[1:])
            engine.synchronize()
            expected = transport_moments(moment, variance, left, each.left, right, each.right)
            assert not torch.equal(left.dense(), each.left.dense())
            found = [t[here].view(each.d, each.d) for t in (state.moment, state.variance)]
            # What step 1 then made of them, undone: moment = 0.9 * expected + 0.1 * core.
            core = (found[0] - 0.9 * expected[0]) / 0.1
            torch.testing.assert_close(
                found[1], 0.999 * expected[1] + 0.001 * core.square(), rtol=1e-3, atol=1e-12
            )

    def test_bf16_moments_move_as_fp32_ones_do(self) -> None:
        """A new pair after one step: what they then are is that of fp32 moments, rounded."""
        found = []
        for moments in ("fp32", "bf16"):
            with running("opt", check_every=1, moments=moments) as engine:
                for batch in tiny_batches(2, "opt"):
                    engine.step([batch])
                engine.synchronize()
                found.append([(each.moment.float(), each.variance.float()) for each in states(engine)])
        for mine, its in zip(*found, strict=True):
            for one, other in zip(mine, its, strict=True):
                torch.testing.assert_close(one, other, rtol=0.05, atol=0.02 * float(one.abs().max()))

    def test_a_closed_form_beats_its_first_draw_and_stays_where_it_is(self) -> None:
        with running("opt", alpha=1e-3) as engine:
            places = [tensor.data_ptr() for each in subspaces(engine) for tensor in each.tensors().values()]
            engine.step(tiny_batches(1, "opt"))
            assert places == [
                tensor.data_ptr() for each in subspaces(engine) for tensor in each.tensors().values()
            ]
            checks = [entries[0] for entries in engine.checks().values()]
        assert {check.stop for check in checks} == {"closed_form"}
        assert all(check.learned_bias is not None and check.learned_bias < check.bias for check in checks)

    def test_no_time_to_learn_keeps_the_pair(self) -> None:
        with running("opt", learn_timeout_s=0.0) as engine:
            before = [copied(each.left).dense() for each in subspaces(engine)]
            engine.step(tiny_batches(1, "opt"))
            after = [each.left.dense() for each in subspaces(engine)]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            checks = [entries[0] for entries in engine.checks().values()]
        assert {(check.stop, check.learned_bias, check.learn_steps) for check in checks} == {
            ("timeout", None, 0)
        }

    def test_the_time_limit_is_for_all_matrices_together(self) -> None:
        changes: dict[str, Any] = {"learn_timeout_s": 20.0, "learn_steps": 1000, "alpha": 1e-6}
        with running("opt", projector="paper", **changes) as engine:
            ticks = iter(range(100_000))
            engine._clock = lambda: float(next(ticks))
            engine.step(tiny_batches(1, "opt"))
            checks = [entries[0] for entries in engine.checks().values()]
        assert {check.stop for check in checks} == {"timeout"}
        assert 0 < sum(check.learn_steps for check in checks) < 20

    def test_only_learning_counts_against_its_time_limit(self) -> None:
        """However long forward and backward take, or a slow machine would never learn."""
        now_s = [0.0]
        with running("opt", projector="paper", learn_timeout_s=1.0) as engine:
            engine._clock = lambda: now_s[0]
            engine.model.register_forward_hook(lambda *_: now_s.append(now_s.pop() + 100.0))
            engine.step(tiny_batches(1, "opt"))
            checks = [entries[0] for entries in engine.checks().values()]
        assert now_s == [100.0]
        assert {(check.stop, check.learn_steps) for check in checks} == {("steps", 3)}

    def test_learning_that_is_cut_short_does_not_replace_a_better_pair(self) -> None:
        changes: dict[str, Any] = {"learn_timeout_s": 2.5, "learn_steps": 60, "alpha": 1e-3, "check_every": 1}
        with running("opt", projector="paper", **changes) as engine:
            batches = tiny_batches(1, "opt") * 2
            engine._clock = lambda: 0.0  # all the time that learning wants
            engine.step(batches[:1])
            learned = [copied(each.left).dense() for each in subspaces(engine)]
            updates = [state.updates for state in states(engine)]
            engine.synchronize()
            ticks = iter(range(100_000))
            engine._clock = lambda: float(next(ticks))
            engine.step(batches[1:])
            engine.synchronize()
            checks = [entries[1] for entries in engine.checks().values()]
            after = [each.left.dense() for each in subspaces(engine)]
            assert all(torch.equal(a, b) for a, b in zip(learned, after, strict=True))
            assert [state.updates for state in states(engine)] == [2] * len(updates)
        assert {(check.stop, check.learned_bias) for check in checks} == {("timeout", None)}
        assert sum(check.learn_steps for check in checks) > 0


class TestWhatIsTrained:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_matrix_of_the_blocks_has_a_subspace_and_nothing_else(self, family: str) -> None:
        with running(family, tied=family in ("opt", "gpt2"), d=12) as engine:
            found = {each.name: (each.d, each.left.r) for each in subspaces(engine)}
            shapes = {name: tuple(p.shape) for name, p in engine.model.named_parameters()}
        path = {"opt": "model.decoder.layers", "gpt2": "transformer.h", "roberta": "roberta.encoder.layer"}
        inside = path.get(family, "model.layers") + "."
        # In these families the matrices of the blocks are their only parameters of two dimensions.
        assert set(found) == {
            name for name, shape in shapes.items() if name.startswith(inside) and len(shape) == 2
        }
        for name, sizes in found.items():
            assert sizes == (min(12, *shapes[name]), 2)

    def test_every_trained_parameter_moves_and_frozen_ones_do_not(self) -> None:
        for train_outer in (True, False):
            blueprint = tiny_blueprint("opt", tied=True, num_blocks=2)
            with running(blueprint, train_outer=train_outer) as engine:
                engine.step(tiny_batches(1, "opt"))
                found = weights(engine)
                own = {each.name for each in subspaces(engine)}
            assert own < set(found)
            for name, tensor in found.items():
                moved = not torch.equal(tensor, blueprint.reference.get_parameter(name))
                assert moved is (train_outer or name in own), name

    def test_a_weight_that_is_used_without_its_layer_is_told(self) -> None:
        with running("opt", train_outer=False) as engine:
            matrix = subspaces(engine)[0]
            own = matrix.module
            vars(own)["forward"] = lambda x: torch.nn.functional.linear(x, own.weight, own.bias)
            with pytest.warns(IdleMatrixWarning, match=f"no gradient was collected of {matrix.name}: "):
                engine.step(tiny_batches(1, "opt"))

    def test_r_is_at_most_d(self) -> None:
        with running("opt", d=2, r=4) as engine:
            assert {(each.d, each.left.r) for each in subspaces(engine)} == {(2, 2)}


class TestFaults:
    def test_an_exception_in_the_worker_ends_the_step_with_its_cause(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise ArithmeticError("spoilt")

        monkeypatch.setattr(cores, "core_adam", fail)
        batches = tiny_batches(2, "opt")
        ways: list[dict[str, Any]] = [{}, {"schedule_order": "sequential"}, {"weights": "streamed"}]
        for changes in ways:
            with running("opt", **changes) as engine:
                engine.step(batches[:1])
                with pytest.raises(RuntimeError, match="the CPU update failed") as caught:
                    engine.step(batches[1:])
                assert isinstance(caught.value.__cause__, ArithmeticError)
                with pytest.raises(RuntimeError, match="the CPU update failed"):
                    engine.synchronize()

    @pytest.mark.parametrize("weights", ["resident", "streamed"])
    @pytest.mark.parametrize("what", ["moments", "cores"])
    def test_memory_that_ends_in_setup_leaves_nothing_behind(
        self, what: str, weights: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Moments come first, then what is pinned for cores; streamed weights lie there already."""
        made, whole = 0, cores.machine_slabs

        def some(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            if made == ("moments", "cores").index(what) + 1:
                raise OSError(12, "Cannot allocate memory")
            return whole(*args, **kwargs)

        monkeypatch.setattr(cores, "machine_slabs", some)
        engine = Lsp(replace(SETTINGS, weights=weights), context())
        with pytest.raises(OSError, match="Cannot allocate memory"):
            engine.setup(tiny_blueprint("opt", num_blocks=2))
        engine.close()
        assert not core_threads()
        assert engine.pinned_bytes == 0
        monkeypatch.undo()
        with running("opt", weights=weights) as engine:
            assert math.isfinite(engine.step(tiny_batches(1, "opt")).loss)

    def test_a_hang_becomes_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        go_on = threading.Event()
        monkeypatch.setattr(cores, "core_adam", lambda *_, **__: go_on.wait(60))
        monkeypatch.setattr(pipeline, "WAIT_LIMIT_S", 0.05)
        engine = Lsp(SETTINGS, context())
        try:
            engine.setup(tiny_blueprint("opt"))
            engine.step(tiny_batches(1, "opt"))
            with pytest.raises(RuntimeError, match="did not come within"):
                engine.synchronize()
        finally:
            go_on.set()
            monkeypatch.setattr(pipeline, "WAIT_LIMIT_S", 60.0)
            engine.close()

    @pytest.mark.parametrize("order", ["layerwise", "sequential"])
    def test_a_core_that_is_not_finite_is_told_a_step_late_and_changes_nothing(self, order: str) -> None:
        """Its own block, block 0, is the last in backward. Block 1 may have been updated by then, whole."""
        with running("opt", schedule_order=order) as engine:
            batches = tiny_batches(3, "opt")
            engine.step(batches[:1])
            before = weights(engine)
            moments = [(state.moment.clone(), state.updates) for state in states(engine)]
            module = subspaces(engine)[3].module
            assert subspaces(engine)[3].block == 0
            module.register_full_backward_pre_hook(lambda _, grads: (grads[0] * math.inf,))
            assert math.isfinite(engine.step(batches[1:2]).loss)
            with pytest.raises(NonFiniteLoss, match="gradient of step 1"):
                engine.step(batches[2:])
            after = {name: tensor.detach() for name, tensor in engine.model.named_parameters()}
            own = {each.name: each.block for each in subspaces(engine)}
            first, second = states(engine)
            assert (first.deadline, second.deadline) == (0, 1)
            went_on = second.updates == moments[1][1] + 1
            assert went_on or second.updates == moments[1][1]
            for name, tensor in before.items():
                assert torch.equal(after[name], tensor) is not (went_on and own.get(name) == 1), name
            assert (first.updates, torch.equal(first.moment, moments[0][0])) == (moments[0][1], True)
            assert torch.equal(second.moment, moments[1][0]) is not went_on

    @pytest.mark.parametrize(
        "changes", [{}, {"schedule_order": "sequential"}, {"weights": "streamed"}], ids=str
    )
    def test_a_core_that_is_not_finite_is_told_when_downloads_lag(self, changes: dict[str, Any]) -> None:
        """Its norm may still be on its way when the next step begins."""
        with lagging("opt", 2, lag_s=0.01, **changes) as engine:
            batches = tiny_batches(3, "opt")
            engine.step(batches[:1])
            subspaces(engine)[3].module.register_full_backward_pre_hook(
                lambda _, grads: (grads[0] * math.inf,)
            )
            engine.step(batches[1:2])
            with pytest.raises(NonFiniteLoss, match="gradient of step 1"):
                engine.step(batches[2:])
            assert all(torch.isfinite(tensor).all() for tensor in weights(engine).values())
            assert all(torch.isfinite(state.moment).all() for state in states(engine))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_gradient_outside_the_cores_that_is_not_finite_is_told_when_it_is_clipped(
        self, value: float
    ) -> None:
        with running("opt", max_grad_norm=1e-3) as engine:
            batches = tiny_batches(3, "opt")
            engine.step(batches[:1])
            before = weights(engine)
            embedding = engine.model.get_input_embeddings().weight
            hook = embedding.register_hook(lambda gradient: gradient * value)
            engine.step(batches[1:2])
            hook.remove()
            with pytest.raises(NonFiniteLoss, match="gradient of step 1"):
                engine.step(batches[2:])
            after = {name: tensor.detach() for name, tensor in engine.model.named_parameters()}
        assert all(torch.equal(after[name], before[name]) for name in before)

    @pytest.mark.parametrize(
        "changes",
        [{}, {"offload": False}, {"max_grad_norm": 1.0}, {"schedule_order": "sequential"}],
        ids=["layerwise", "twin", "clipped", "sequential"],
    )
    def test_a_block_that_is_passed_over_is_not_updated_again(self, changes: dict[str, Any]) -> None:
        batches = tiny_batches(2, "opt")
        with running("opt", **changes) as engine:
            engine.step(batches[:1])
            assert engine._trained is not None
            block = engine._trained.blocks[0]
            own = vars(block)["forward"]
            vars(block)["forward"] = lambda hidden, *_, **__: hidden
            engine.step(batches[1:])
            vars(block)["forward"] = own
            engine.synchronize()
            assert [state.updates for state in states(engine)] == [1, 2]
            assert float(engine._laid_out.squared_norms[0]) == 0.0

    def test_looking_at_weights_between_steps_is_no_compute(self) -> None:
        with running("opt") as engine:
            engine.step(tiny_batches(1, "opt"))
            weights(engine)
            assert not engine._compute.is_running

    def test_a_loss_that_is_not_finite_is_told_at_once_and_changes_nothing(self) -> None:
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

    def test_fp16_is_refused(self) -> None:
        with pytest.raises(UserError, match="use bf16 or fp32"), running("opt", ctx=context("fp16")):
            pass

    def test_close_may_be_called_twice_and_stops_the_thread(self) -> None:
        engine = Lsp(SETTINGS, context())
        engine.setup(tiny_blueprint("opt"))
        engine.step(tiny_batches(1, "opt"))
        engine.close()
        engine.close()
        assert not core_threads()


class TestResume:
    @pytest.mark.parametrize(
        ("family", "dtype", "weights", "moments", "residual"),
        [
            ("opt", "fp32", "resident", "fp32", 0.0),
            ("llama", "bf16", "resident", "bf16", 1.0),
            ("llama", "bf16", "streamed", "fp32", 0.0),
        ],
    )
    def test_at_step_10_equals_the_uninterrupted_run(
        self, tmp_path: Path, family: str, dtype: Dtype, weights: str, moments: str, residual: float
    ) -> None:
        batches, ctx = tiny_batches(STEPS, family), context(dtype)
        blocks = 5 if weights == "streamed" else 2
        running_one = partial(running, ctx=ctx, weights=weights, moments=moments, residual=residual)
        with running_one(tiny_blueprint(family, num_blocks=blocks)) as straight:
            expected = train(straight, batches)
            checks = straight.checks()
        with running_one(tiny_blueprint(family, num_blocks=blocks)) as first:
            for batch in batches[:10]:
                first.step([batch])
            first.save(tmp_path)
        with running_one(tiny_blueprint(family, num_blocks=blocks)) as second:
            second.load(tmp_path)
            found = train(second, batches[10:])
            assert second.checks() == checks
        assert_same(found, replace(expected, losses=expected.losses[10:]))

    def test_what_landed_of_an_update_of_an_earlier_run_is_not_known(self, tmp_path: Path) -> None:
        with running("opt") as engine:
            engine.step(tiny_batches(1, "opt"))
            engine.save(tmp_path)
        with running("opt") as engine:
            engine.load(tmp_path)
            assert engine.realized_update_fraction() is None

    def test_another_subspace_is_refused(self, tmp_path: Path) -> None:
        with running("opt") as engine:
            engine.save(tmp_path)
        for other in ({"d": 5}, {"moments": "bf16"}):
            refused = pytest.raises(UserError, match="same d, r, projector and moments")
            with running("opt", **other) as engine, refused:
                engine.load(tmp_path)


def test_learns_a_fixed_batch() -> None:
    batches = tiny_batches(1, "roberta")
    with running("roberta", schedule="constant", learning_rate=2e-2) as engine:
        losses = [engine.step(batches).loss for _ in range(STEPS)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_matrices_alone_learn_nearly_as_much_as_with_adamw(family: str) -> None:
    """Everything else frozen: embedding and head are random, so neither gets far."""
    batch = tiny_batches(1, family)[0]
    model = tiny_blueprint(family, num_blocks=2).reference.train()
    optimizer = torch.optim.AdamW(
        [module.weight for _, _, module in block_matrices(model)], lr=2e-2, weight_decay=0.0
    )
    plain = []
    for _ in range(2 * STEPS):
        optimizer.zero_grad()
        loss = model(**batch.inputs).loss
        loss.backward()
        optimizer.step()
        plain.append(float(loss.detach()))
    changes: dict[str, Any] = {"schedule": "constant", "learning_rate": 2e-2, "weight_decay": 0.0}
    with running(family, train_outer=False, d=12, learn_steps=30, check_every=1000, **changes) as engine:
        losses = [engine.step([batch]).loss for _ in range(2 * STEPS)]
    assert losses[0] == pytest.approx(plain[0], rel=1e-5)
    assert losses[0] - losses[-1] > 0.8 * (plain[0] - plain[-1])


def test_seeds_differ_by_every_argument() -> None:
    seeds = [
        subspace_seed(seed, name, side, generation)
        for seed in (0, 1)
        for name in ("a", "b")
        for side in ("left", "right")
        for generation in (0, 1)
    ]
    assert len(set(seeds)) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
