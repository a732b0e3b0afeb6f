"""Passes as CUDA graphs, played on a CPU, of methods whose gradients are left and of the one that uses them
up: the bits of the same method without graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_graphs import FakeCuda, played
from trained_engines import assert_same_weights, weights

from engines import load_engine
from engines.base import Batch, Context
from engines.errors import NonFiniteLoss
from engines.first_order import adamw, training_loop
from engines.model.cuda_graphs import MOST_FORMS
from engines.model.evaluation import evaluate_on_device
from engines.settings.parse import parse_settings
from engines.shapes import Dtype, Workload
from tiny_models import tiny_batches, tiny_blueprint

INSIDE = "backward-optimizer"
RATE = {"learning_rate": 1e-2, "weight_decay": 0.1}


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return played(monkeypatch)


def engine(
    name: str,
    family: str = "llama",
    dtype: Dtype = "fp32",
    *,
    captured: bool = True,
    checkpointing: bool = False,
    accumulation: int = 1,
    **settings: Any,
) -> Any:
    workload = Workload(
        batch_size=2, seq_len=16, dtype=dtype, checkpointing=checkpointing, accumulation=accumulation
    )
    context = Context(device="cpu", workload=workload, seed=7, total_steps=6)
    made: Any = load_engine(name)(parse_settings(name, {**RATE, **settings}), context)
    made.setup(tiny_blueprint(family, tied=True))
    if captured:
        made.loop.capture()  # as on a GPU
    return made


def losses(made: Any, batches: Sequence[Batch], each: int = 1) -> list[float]:
    return [made.step(batches[at : at + each]).loss for at in range(0, len(batches), each)]


def shortened(batch: Batch, tokens: int) -> Batch:
    return Batch(inputs={name: tensor[:, :tokens].contiguous() for name, tensor in batch.inputs.items()})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_a_step_with_its_updates_is_one_graph_with_the_bits_of_native(
    family: str, dtype: Dtype, checkpointing: bool, fake_cuda: FakeCuda
) -> None:
    batches = tiny_batches(6, family)
    native = engine("native", family, dtype, captured=False)
    expected = losses(native, batches)
    inside = engine(INSIDE, family, dtype, checkpointing=checkpointing)
    assert losses(inside, batches) == expected
    assert_same_weights(weights(inside), weights(native))
    assert [each.replays for each in fake_cuda.graphs] == [5]
    assert all(parameter.grad is None for parameter in inside.loop.model.parameters())
    assert inside.notes == []


def test_native_has_a_graph_of_a_steps_first_micro_batch_and_one_of_the_others(fake_cuda: FakeCuda) -> None:
    batches = tiny_batches(12, "llama")
    eager = engine("native", accumulation=3, captured=False)
    captured = engine("native", accumulation=3)
    assert losses(captured, batches, 3) == losses(eager, batches, 3)
    assert_same_weights(weights(captured), weights(eager))
    assert [each.replays for each in fake_cuda.graphs] == [3, 2 * 3]


@pytest.mark.parametrize("name", ["native", INSIDE])
def test_a_run_that_goes_on_is_the_run_that_was_not_broken_off(
    name: str, fake_cuda: FakeCuda, tmp_path: Path
) -> None:
    batches = tiny_batches(8, "llama")
    straight = engine(name, captured=False)
    expected = losses(straight, batches)
    broken = engine(name)
    losses(broken, batches[:4])
    broken.save(tmp_path)
    losses(broken, batches[4:5])  # and comes back to what it was
    broken.load(tmp_path)
    assert losses(broken, batches[4:]) == expected[4:]
    assert_same_weights(weights(broken), weights(straight))
    assert [each.replays for each in fake_cuda.graphs] == [4, 3]


def test_graphs_give_their_memory_back_before_a_batch_of_a_new_form(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ran out of memory half-way could not be run again: some weights are those of the next step."""
    plain = tiny_batches(8, "llama")
    short = shortened(plain[4], 8)
    batches = [*plain[:4], short, *plain[5:], short]
    eager, captured = engine(INSIDE, captured=False), engine(INSIDE)
    expected = losses(eager, batches)
    held: list[bool] = []
    run = adamw.run_passes

    def watched(*args: Any) -> Any:
        held.append(captured.loop.captured.holds_memory)
        return run(*args)

    monkeypatch.setattr(training_loop, "run_passes", watched)
    assert losses(captured, batches) == expected
    assert_same_weights(weights(captured), weights(eager))
    # Eager, capture, eager, capture, and beside that the second form's.
    assert held == [False, False, False, False, True]
    assert [each.replays for each in fake_cuda.graphs] == [3, 3, 1]
    assert captured.notes == []


def test_a_form_too_many_ends_graphs_for_good(fake_cuda: FakeCuda) -> None:
    first = tiny_batches(1, "llama")[0]
    batches = [shortened(first, 6 + number) for number in range(MOST_FORMS + 1)]
    batches = [each for each in batches for _ in range(2)] + batches[:2]
    eager, captured = engine(INSIDE, captured=False), engine(INSIDE)
    assert losses(captured, batches) == losses(eager, batches)
    assert_same_weights(weights(captured), weights(eager))
    assert captured.loop.captured is None
    assert captured.notes == ["no CUDA graph: batches come in more than 4 forms"]
    assert len(fake_cuda.graphs) == MOST_FORMS


def test_a_capture_that_fails_has_updated_nothing(fake_cuda: FakeCuda) -> None:
    batches = tiny_batches(4, "llama")
    eager, captured = engine(INSIDE, captured=False), engine(INSIDE)
    fake_cuda.fails_at = 0
    assert losses(captured, batches) == losses(eager, batches)
    assert_same_weights(weights(captured), weights(eager))
    assert captured.notes == ["no CUDA graph: no room for a graph"]


def test_a_rate_that_warms_up_is_captured_when_it_has(fake_cuda: FakeCuda) -> None:
    batches = tiny_batches(6, "llama")
    native, inside = engine("native", captured=False, warmup_steps=3), engine(INSIDE, warmup_steps=3)
    assert losses(inside, batches) == losses(native, batches)
    assert_same_weights(weights(inside), weights(native))
    assert [each.replays for each in fake_cuda.graphs] == [2]  # three of warm-up, one of the form


def test_a_rate_that_changes_to_the_end_is_not_captured(fake_cuda: FakeCuda) -> None:
    batches = tiny_batches(6, "llama")
    native, inside = engine("native", captured=False, schedule="cosine"), engine(INSIDE, schedule="cosine")
    assert losses(inside, batches) == losses(native, batches)
    assert_same_weights(weights(inside), weights(native))
    assert not fake_cuda.graphs
    assert inside.notes == ["no CUDA graph: the learning rate, which it would hold, changes with each step"]


def test_an_evaluation_has_the_memory_of_graphs_where_it_must(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = tiny_batches(6, "llama")
    eager, captured = engine(INSIDE, captured=False), engine(INSIDE)
    assert losses(captured, batches[:3]) == losses(eager, batches[:3])
    assert captured.evaluate(batches) == eager.evaluate(batches)
    judge: Any = evaluate_on_device

    def short_of_memory(*args: Any) -> Any:
        if captured.loop.captured.holds_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return judge(*args)

    monkeypatch.setattr(training_loop, "evaluate_on_device", short_of_memory)
    assert captured.evaluate(batches).loss == judge(eager.loop.model, batches, eager.loop.device).loss
    assert losses(captured, batches[3:]) == losses(eager, batches[3:])
    assert_same_weights(weights(captured), weights(eager))
    assert captured.notes == []


def test_a_pass_that_has_updated_weights_is_not_run_again(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = engine(INSIDE)
    run: Any = adamw.run_passes
    calls: list[torch.Tensor] = []

    def half_way(*args: Any) -> Any:
        calls.append(run(*args))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training_loop, "run_passes", half_way)
    with pytest.raises(torch.OutOfMemoryError):
        captured.step(tiny_batches(1, "llama"))
    assert len(calls) == 1


def test_a_loss_that_is_not_finite_ends_a_captured_run(fake_cuda: FakeCuda) -> None:
    batches = tiny_batches(4, "llama")
    captured = engine(INSIDE)
    losses(captured, batches[:3])
    with torch.no_grad():
        next(iter(captured.loop.model.parameters()))[:] = float("nan")
    with pytest.raises(NonFiniteLoss, match="step 3"):
        captured.step(batches[3:])
