"""Native fine-tuning against a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_engines import weights

from engines.base import Batch, Context
from engines.errors import NonFiniteLoss, UserError
from engines.first_order import training_loop
from engines.first_order.adamw import make_adamw, with_moments
from engines.first_order.lr_schedule import learning_rate_at
from engines.methods.native import Native
from engines.model.blocks import TORCH_DTYPE, find_blocks
from engines.settings.first_order import NativeSettings
from engines.shapes import Dtype, Workload
from tiny_families import blueprint_of
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

SETTINGS = NativeSettings(learning_rate=1e-3, weight_decay=0.1, schedule="cosine", warmup_steps=2)


def context(dtype: Dtype = "fp32", checkpointing: bool = False, accumulation: int = 1) -> Context:
    workload = Workload(
        batch_size=2, seq_len=16, dtype=dtype, checkpointing=checkpointing, accumulation=accumulation
    )
    return Context(device="cpu", workload=workload, seed=7, total_steps=6)


def native(blueprint: TinyBlueprint, ctx: Context, settings: NativeSettings = SETTINGS) -> Native:
    engine = Native(settings, ctx)
    engine.setup(blueprint)
    return engine


def plain_loop(
    family: str, tied: bool, dtype: torch.dtype, steps: Sequence[Sequence[Batch]], settings: NativeSettings
) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = tiny_blueprint(family, tied).reference.train()
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay fp32
        parameter.data = parameter.data.to(dtype)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1.0, betas=(settings.beta1, settings.beta2), eps=settings.adam_eps, fused=True,
    )  # fmt: skip
    losses = []
    for index, batches in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(index, settings, 6)
        optimizer.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            loss = model(**batch.inputs).loss / len(batches)
            loss.backward()
            total += loss.detach().float()
        if settings.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        losses.append(float(total))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "tied"), [("opt", True), ("llama", False), ("gpt2", True), ("roberta", False)]
)
def test_equals_a_plain_loop_bit_for_bit(family: str, tied: bool, dtype: Dtype) -> None:
    batches = tiny_batches(12, family)
    steps = [batches[i : i + 2] for i in range(0, 12, 2)]
    engine = native(tiny_blueprint(family, tied), context(dtype, accumulation=2))
    losses = [engine.step(step).loss for step in steps]
    expected_losses, expected = plain_loop(family, tied, TORCH_DTYPE[dtype], steps, SETTINGS)
    assert losses == expected_losses
    found = weights(engine)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_moments_are_made_with_the_weights_as_the_first_step_would_make_them() -> None:
    weights = [
        torch.nn.Parameter(torch.randn(3, 4, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)
    ]
    settings = NativeSettings(weight_decay=0.1)
    before = with_moments(make_adamw(weights, settings))
    in_step = make_adamw(weights, replace(settings, learning_rate=0.0, weight_decay=0.0))
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    in_step.step()
    for weight in weights:
        made, found = before.state[weight], in_step.state[weight]
        assert made.keys() == found.keys()
        for name, value in made.items():
            assert not value.any()
            assert (value.dtype, value.device, value.shape, value.stride()) == (
                found[name].dtype, found[name].device, found[name].shape, found[name].stride(),
            )  # fmt: skip


def test_clips_the_gradient_of_all_micro_batches_together() -> None:
    """As a plain loop does, bit for bit. Adam is blind to one scale for all steps, so theirs must differ."""
    batches = tiny_batches(12, "llama")
    steps = [batches[i : i + 2] for i in range(0, 12, 2)]
    clipped = replace(SETTINGS, max_grad_norm=0.05)
    engine = native(tiny_blueprint("llama"), context(accumulation=2), clipped)
    losses = [engine.step(step).loss for step in steps]
    expected_losses, expected = plain_loop("llama", False, torch.float32, steps, clipped)
    assert losses == expected_losses
    ours = weights(engine)
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    free, _ = plain_loop("llama", False, torch.float32, steps, SETTINGS)
    assert losses != free


def test_checkpointing_changes_no_loss_and_no_weight() -> None:
    runs = []
    for checkpointing in (False, True):
        engine = native(tiny_blueprint("llama"), context(checkpointing=checkpointing))
        calls: list[int] = []
        mlp = find_blocks(engine.model)[1][0].get_submodule("mlp")
        mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        runs.append(([engine.step([batch]).loss for batch in tiny_batches(4, "llama")], weights(engine)))
        assert len(calls) == (8 if checkpointing else 4)  # once more in each backward pass
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


def test_accumulation_equals_the_union_of_its_micro_batches() -> None:
    batches = tiny_batches(2, "opt")
    union = Batch(inputs={key: torch.cat([b.inputs[key] for b in batches]) for key in batches[0].inputs})
    # Adam's eps is above the gradient's rounding error, which its division would blow up.
    settings = replace(SETTINGS, adam_eps=1e-3)
    split = native(tiny_blueprint("opt"), context(accumulation=2), settings)
    whole = native(tiny_blueprint("opt"), context(), settings)
    for _ in range(3):
        assert split.step(batches).loss == pytest.approx(whole.step([union]).loss, rel=1e-6)
    expected = weights(whole)
    for name, tensor in weights(split).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_equals_the_uninterrupted_run(tmp_path: Path, dtype: Dtype) -> None:
    def blueprint() -> TinyBlueprint:
        return tiny_blueprint("opt", tied=True)

    dropping = replace(SETTINGS, dropout=0.3)  # the random state counts only where something draws from it
    batches = tiny_batches(6, "opt")
    straight = native(blueprint(), context(dtype), dropping)
    losses = [straight.step([batch]).loss for batch in batches]

    first = native(blueprint(), context(dtype), dropping)
    for batch in batches[:3]:
        first.step([batch])
    first.save(tmp_path)
    second = native(blueprint(), context(dtype), dropping)
    second.load(tmp_path)
    assert [second.step([batch]).loss for batch in batches[3:]] == losses[3:]
    expected = weights(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(second).items())


def test_evaluation_in_the_middle_changes_nothing() -> None:
    batches = tiny_batches(4, "qwen2")
    straight, checked = (native(tiny_blueprint("qwen2"), context()) for _ in range(2))
    losses = [straight.step([batch]).loss for batch in batches]
    found = [checked.step([batch]).loss for batch in batches[:2]]
    result = checked.evaluate(batches)
    assert result.num_labels == sum(int((b.inputs["labels"][:, 1:] != -100).sum()) for b in batches)
    assert found + [checked.step([batch]).loss for batch in batches[2:]] == losses


def test_learns_a_fixed_batch() -> None:
    engine = native(tiny_blueprint("gpt2"), context(), NativeSettings(learning_rate=1e-2))
    batches = tiny_batches(1, "gpt2")
    losses = [engine.step(batches).loss for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]


def test_config_of_the_model_is_left_as_it_was() -> None:
    blueprint = tiny_blueprint("llama")
    engine = native(blueprint, context(checkpointing=True))
    before = engine.model.config.use_cache
    engine.step(tiny_batches(1, "llama"))
    assert engine.model.config.use_cache is before is True


def test_fp16_is_refused() -> None:
    with pytest.raises(UserError, match=r"loss scaling.*use bf16 or fp32"):
        native(tiny_blueprint("opt"), context("fp16"))


def test_blocks_are_recomputed_in_a_model_for_which_transformers_cannot() -> None:
    """MPNet's blocks take a tensor beside the hidden state that needs a gradient."""
    found = []
    for checkpointing in (False, True):
        engine = native(blueprint_of("mpnet"), context(checkpointing=checkpointing))
        losses = [engine.step(tiny_batches(1, "roberta")).loss for _ in range(3)]
        found.append((losses, weights(engine)))
    assert found[0][0] == found[1][0]
    for name, tensor in found[0][1].items():
        assert torch.equal(tensor, found[1][1][name]), name


@pytest.mark.parametrize("count", [0, 1, "all"])
def test_as_many_blocks_are_recomputed_as_the_setting_says(count: int | str) -> None:
    settings = replace(SETTINGS, checkpointed_blocks=count)
    engine = native(tiny_blueprint("llama"), context(checkpointing=True), settings)
    runs = [0] * len(find_blocks(engine.model)[1])
    for index, block in enumerate(find_blocks(engine.model)[1]):
        block.input_layernorm.register_forward_hook(
            lambda *_, index=index: runs.__setitem__(index, runs[index] + 1)
        )
    engine.step(tiny_batches(1, "llama"))
    recomputed = len(runs) if count == "all" else int(count)
    assert runs == [2] * recomputed + [1] * (len(runs) - recomputed)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_compiled_steps_are_those_of_the_plain_loop_within_a_few_roundings(family: str) -> None:
    batches = [tiny_batches(1, family) for _ in range(3)]
    losses, expected = plain_loop(family, True, torch.float32, batches, replace(SETTINGS, compile=True))
    for checkpointing in (False, True):
        settings = replace(SETTINGS, compile=True)
        engine = native(tiny_blueprint(family, tied=True), context(checkpointing=checkpointing), settings)
        assert [engine.step(each).loss for each in batches] == pytest.approx(losses, rel=1e-5)
        assert not engine.notes
        for name, tensor in weights(engine).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


class Graphs:
    """In the place of captured passes: holds memory that nothing else may use, and knows no batch yet."""

    def __init__(self) -> None:
        self.has_memory = True
        self.forgotten = 0

    def step(self, batches: Sequence[Batch]) -> None:
        self.has_memory = True

    def forget(self) -> None:
        self.has_memory = False
        self.forgotten += 1


def test_a_batch_of_another_form_has_the_memory_of_graphs_where_it_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where sequences are padded to the longest: each new length runs without graphs, beside theirs. The
    same losses and weights; from the second time on there are none."""
    batches = tiny_batches(4, "llama")
    expected = native(tiny_blueprint("llama", tied=False), context())
    losses = [expected.step([batch]).loss for batch in batches]
    evaluated = expected.evaluate(batches)

    engine, graphs = native(tiny_blueprint("llama", tied=False), context()), Graphs()
    loop: Any = engine.loop
    loop.captured = graphs
    run, judge = training_loop.run_passes, training_loop.evaluate_on_device

    def short_of_memory(does: Any) -> Any:
        def call(*args: Any) -> Any:
            if loop.captured is not None and graphs.has_memory:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return does(*args)

        return call

    monkeypatch.setattr(training_loop, "run_passes", short_of_memory(run))
    monkeypatch.setattr(training_loop, "evaluate_on_device", short_of_memory(judge))
    assert [engine.step([batch]).loss for batch in batches[:1]] == losses[:1]
    assert (graphs.forgotten, loop.captured, loop.notes) == (1, graphs, [])
    assert [engine.step([batch]).loss for batch in batches[1:]] == losses[1:]
    assert loop.captured is None
    assert len(loop.notes) == 1
    assert "no CUDA graph" in loop.notes[0]
    assert engine.evaluate(iter(batches)) == evaluated
    own, other = weights(engine), weights(expected)
    assert all(torch.equal(own[name], other[name]) for name in other)


def test_memory_that_ends_without_graphs_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = native(tiny_blueprint("llama", tied=False), context())
    monkeypatch.setattr(training_loop, "run_passes", fail)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step(tiny_batches(1, "llama"))


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    blueprint = tiny_blueprint("opt")
    with torch.no_grad():
        next(iter(blueprint.reference.parameters()))[:] = float("nan")
    with pytest.raises(NonFiniteLoss, match="step 0"):
        native(blueprint, context()).step(tiny_batches(1, "opt"))


def test_resume_names_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a checkpoint"):
        native(tiny_blueprint("opt"), context()).load(tmp_path)
    native(tiny_blueprint("opt"), context()).save(tmp_path)
    with pytest.raises(UserError, match="same model and dtype"):
        native(tiny_blueprint("opt"), context("bf16")).load(tmp_path)
    (tmp_path / "engine.json").write_text('{"engine": "zo2"}')
    with pytest.raises(UserError, match="written by engine 'zo2'"):
        native(tiny_blueprint("opt"), context()).load(tmp_path)
