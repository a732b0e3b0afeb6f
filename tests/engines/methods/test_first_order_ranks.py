"""exact-offload and lsp on several ranks of a machine, which update in the memory of its host together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SideBySideWorld, side_by_side
from torch import Tensor

from engines.base import Batch, Context
from engines.cpu_updates import block_state
from engines.errors import NonFiniteLoss, UserError
from engines.methods.exact_offload import ExactOffload
from engines.methods.lora import Lora
from engines.methods.lsp import Lsp
from engines.settings import lsp_layout
from engines.settings.exact_offload import ExactOffloadSettings
from engines.settings.libraries import LoraSettings
from engines.settings.lsp import LspSettings
from engines.shapes import Dtype, Workload
from engines.world import ALONE, World
from tiny_models import tiny_batches, tiny_blueprint

STEPS = 5
EXACT = ExactOffloadSettings(
    learning_rate=3e-3, weight_decay=0.1, schedule="cosine", warmup_steps=2, gradient_blocks=2
)


LSP = LspSettings(learning_rate=3e-3, weight_decay=0.1, d=32, r=4, check_every=2, alpha=0.2)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny block's matrices are then several chunks, of several owners."""
    monkeypatch.setattr(block_state, "CHUNK_ELEMENTS", 512)
    monkeypatch.setattr(lsp_layout, "CHUNK_ELEMENTS", 2048)


def context(world: World, accumulation: int, dtype: Dtype) -> Context:
    workload = Workload(batch_size=2, seq_len=16, dtype=dtype, checkpointing=True, accumulation=accumulation)
    return Context(device="cpu", workload=workload, seed=7, total_steps=2 * STEPS, world=world)


Run = tuple[list[float], dict[str, Tensor]]
Make = Callable[[Context], Any]


def exact(**changes: Any) -> Make:
    return lambda where: ExactOffload(replace(EXACT, **changes), where)


def model_of(family: str = "llama") -> Any:
    return tiny_blueprint(family, num_blocks=4)


def models_of(size: int) -> list[Any]:
    """To be made before the ranks are: models are drawn from torch's own generator, which threads share."""
    return [model_of() for _ in range(size)]


def lsp(**changes: Any) -> Make:
    return lambda where: Lsp(replace(LSP, **changes), where)


def take_steps(engine: Any, batches: list[Batch], per_step: int) -> Run:
    losses = [engine.step(batches[at : at + per_step]).loss for at in range(0, len(batches), per_step)]
    return losses, {name: weight.clone() for name, weight in engine.weights()}


def run_on(size: int, make: Make, per_step: int, dtype: Dtype = "fp32", machines: int = 1) -> list[Run]:
    """Of every rank, each of the machines having as many."""
    models, batches = models_of(size), tiny_batches(STEPS * per_step, "llama")

    def act(world: World) -> Run:
        engine = make(context(world, per_step, dtype))
        try:
            engine.setup(models[world.rank])
            found = take_steps(engine, batches, per_step)
            world.barrier()  # nobody goes before all have looked at what they share
            return found
        finally:
            engine.close()

    return [act(ALONE)] if size == 1 else side_by_side(size, act, machines)


def assert_same(found: Run, expected: Run) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, weight in expected[1].items():
        assert torch.equal(found[1][name], weight), name


@pytest.mark.parametrize(
    ("size", "dtype", "changes"),
    [
        (2, "fp32", {}),
        (2, "bf16", {"moments": "int8", "weights": "streamed"}),
        (3, "bf16", {"outer": "host", "hidden_states": "host"}),
    ],
)
def test_ranks_of_exact_offload_take_the_steps_of_one_process(
    size: int, dtype: Dtype, changes: dict[str, Any]
) -> None:
    """One micro-batch each; the embeddings are not tied, whose gradients would add up in another order."""
    (expected,) = run_on(1, exact(**changes), size, dtype)
    for found in run_on(size, exact(**changes), size, dtype):
        assert_same(found, expected)


@pytest.mark.parametrize(
    ("size", "changes"),
    [(2, {}), (2, {"projector": "paper", "learn_steps": 5}), (4, {"weights": "streamed"})],
)
def test_ranks_of_lsp_take_the_steps_of_the_twin_in_one_process(size: int, changes: dict[str, Any]) -> None:
    """With a micro-batch each, in fp32: of bf16 cores one process rounds the sum, and ranks each. With new
    projectors on the way."""
    (expected,) = run_on(1, lsp(offload=False, **changes), size)
    for found in run_on(size, lsp(**changes), size):
        assert_same(found, expected)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {"projector": "paper", "learn_steps": 5}),
        (2, {"max_grad_norm": 0.05}),
        (4, {"max_grad_norm": 0.05}),
    ],
)
def test_two_machines_reduce_the_cores_of_lsp(size: int, changes: dict[str, Any]) -> None:
    """With a rank each they have the bits of two ranks of one machine, and with two each those of one
    another; every update is made on both."""
    first, *others = run_on(size, lsp(**changes), size, "bf16", machines=2)
    for each in others:
        assert_same(each, first)
    (of_one, *_) = run_on(size, lsp(**changes), size, "bf16")
    if size == 2:
        assert_same(first, of_one)
    for name, weight in of_one[1].items():
        torch.testing.assert_close(first[1][name], weight, rtol=0.05, atol=5e-3)


def test_ranks_of_lora_add_up_the_gradients_of_their_adapters() -> None:
    """As one process accumulates them: one micro-batch each, in fp32."""
    pytest.importorskip("peft")
    models, batches, one_at_a_time = models_of(3), tiny_batches(STEPS * 3, "llama"), threading.Lock()

    def act(world: World) -> Run:
        engine = Lora(LoraSettings(learning_rate=1e-3, max_grad_norm=0.1), context(world, 3, "fp32"))
        with one_at_a_time:  # adapters are drawn from torch's own generator, which threads share
            engine.setup(models[world.rank])
        world.barrier()
        found = take_steps(engine, batches, 3)
        engine.close()
        return found

    found = side_by_side(3, act)
    models = models_of(1)
    for each in (*found[1:], act(ALONE)):
        assert_same(each, found[0])


def test_ranks_with_several_micro_batches_agree_among_themselves_and_nearly_with_one() -> None:
    (expected,) = run_on(1, exact(), 4)
    first, second = run_on(2, exact(), 4)
    assert_same(second, first)
    for name, weight in expected[1].items():
        torch.testing.assert_close(first[1][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [exact(moments="bf16"), lsp()])
def test_a_checkpoint_of_one_rank_is_gone_on_with_by_all_and_by_one(make: Make, tmp_path: Path) -> None:
    batches, models = tiny_batches(4 * 2, "llama"), models_of(2)

    def begin(world: World) -> Run:
        engine = make(context(world, 2, "fp32"))
        engine.setup(models[world.rank])
        take_steps(engine, batches[:4], 2)
        if world.rank == 1:
            engine.save(tmp_path)
        world.barrier()
        found = take_steps(engine, batches[4:], 2)
        world.barrier()
        engine.close()
        return found

    def go_on(world: World) -> Run:
        engine = make(context(world, 2, "fp32"))
        engine.setup(models[world.rank])
        engine.load(tmp_path)
        found = take_steps(engine, batches[4:], 2)
        world.barrier()
        engine.close()
        return found

    expected = side_by_side(2, begin)[0]
    models = models_of(2)
    found = side_by_side(2, go_on)
    models = models_of(1)
    for each in (*found, go_on(ALONE)):
        assert_same(each, expected)


def test_a_gradient_that_is_not_finite_on_one_rank_ends_all() -> None:
    batches, models = tiny_batches(4, "llama"), models_of(2)

    def act(world: SideBySideWorld) -> str:
        engine = exact()(context(world, 2, "fp32"))
        engine.setup(models[world.rank])
        if world.rank == 1:
            gradients = engine.gradients

            def broken(index: int, found: Any, *, first: bool) -> None:
                for each in found if index == 2 else ():
                    each.fill_(float("inf"))
                gradients(index, found, first=first)

            engine.gradients = broken
        engine.step(batches[:2])
        with pytest.raises(NonFiniteLoss) as raised:
            engine.step(batches[2:])
        engine.close()
        return str(raised.value)

    assert set(side_by_side(2, act)) == {"a gradient of step 0 is not finite"}


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (exact, {}),
        (exact, {"max_grad_norm": 0.05, "moments": "int8", "weights": "streamed"}),
        (exact, {"max_grad_norm": 0.05, "clip_by": "previous", "outer": "host"}),
        (lsp, {"projector": "paper", "learn_steps": 5}),
        (lsp, {"max_grad_norm": 0.05, "moments": "bf16"}),
    ],
)
def test_ranks_take_the_steps_of_their_twins(make: Callable[..., Make], changes: dict[str, Any]) -> None:
    """In bf16, with two micro-batches a rank: of the same ranks with nothing offloaded, which exchange
    gradients and make every update, each in its main thread."""
    expected = run_on(2, make(offload=False, **changes), 4, "bf16")
    assert_same(expected[1], expected[0])
    for found in run_on(2, make(**changes), 4, "bf16"):
        assert_same(found, expected[0])


@pytest.mark.parametrize(
    "make",
    [exact(max_grad_norm=0.05), exact(max_grad_norm=0.05, clip_by="previous"), lsp(max_grad_norm=0.05)],
)
def test_ranks_clip_by_the_norm_of_all_their_gradients(make: Make) -> None:
    """As one process does, but for how the norm is rounded."""
    (expected,) = run_on(1, make, 2)
    for losses, weights in run_on(2, make, 2):
        assert losses == pytest.approx(expected[0], rel=1e-5)
        for name, weight in expected[1].items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6)


def test_states_of_some_blocks_are_on_disk_and_each_rank_has_its_files(tmp_path: Path) -> None:
    """Checkpoints are written by all together, and are gone on with by two ranks and by one."""
    changes = {"disk_blocks": 3, "disk_folder": str(tmp_path / "disk"), "moments": "bf16"}
    (whole,) = run_on(1, exact(moments="bf16"), 2)
    batches, models = tiny_batches(STEPS * 2, "llama"), models_of(2)
    folder = tmp_path / "checkpoint"
    folder.mkdir()

    def begin(world: World) -> Run:
        engine = exact(**changes)(context(world, 2, "fp32"))
        engine.setup(models[world.rank])
        assert engine.acts_together
        take_steps(engine, batches[:4], 2)
        engine.save(folder)
        found = take_steps(engine, batches[4:], 2)
        world.barrier()
        engine.close()
        return found

    def go_on(world: World) -> Run:
        engine = exact(**changes)(context(world, 2, "fp32"))
        engine.setup(models[world.rank])
        engine.load(folder)
        found = take_steps(engine, batches[4:], 2)
        world.barrier()
        engine.close()
        return found

    expected = (whole[0][2:], whole[1])
    for each in side_by_side(2, begin):
        assert_same(each, expected)
    models = models_of(2)
    for each in side_by_side(2, go_on):
        assert_same(each, expected)
    models = models_of(1)
    assert_same(go_on(ALONE), expected)


def test_what_ranks_cannot_do_is_said() -> None:
    class Two:
        rank = local_rank = 0
        size = local_size = 2

    changes = {"weights": "streamed", "disk_blocks": 1, "disk_weights": True}
    with pytest.raises(UserError, match=r"weights on disk in one process only; .*disk_weights=false"):
        exact(**changes)(context(Two(), 2, "fp32"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"blocks to the GPU in one process only; .*gpu_blocks=0"):
        exact(gpu_blocks=1)(context(Two(), 2, "fp32"))  # type: ignore[arg-type]
