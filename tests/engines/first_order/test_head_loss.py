"""The loss in chunks against the model's own: loss, gradients, whole runs, and models it is not for."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from family_models import DECODERS, family_model
from torch import Tensor, nn

import tiny_models
from engines import load_engine
from engines.base import Batch, Context
from engines.errors import UserError
from engines.first_order.head_loss import HeadLoss
from engines.settings.parse import parse_settings
from engines.shapes import OWN_LOGITS_FAMILIES, Dtype, Workload
from tiny_models import tiny_batches, tiny_blueprint

TOKENS = 2 * 16
"""Of a batch."""


def passed(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and gradients by name."""
    model.zero_grad()
    loss: Tensor = model(**batch.inputs).loss
    (loss / 2).backward()  # type: ignore[no-untyped-call]
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return loss.detach(), found


@pytest.mark.parametrize("tokens", [1, 5, TOKENS - 1, TOKENS])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("opt", True), ("gpt2", True)])
def test_equals_the_models_own(family: str, tied: bool, tokens: int) -> None:
    """Some positions without a label. fp32: to the rounding of sums in another order."""
    model = tiny_blueprint(family, tied).reference.train()
    (batch,) = tiny_batches(1, family)
    batch.inputs["labels"][0, :7] = -100
    loss, gradients = passed(model, batch)
    chunked = HeadLoss(model, tokens, compiled=False)
    found, its = passed(model, batch)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0.0)
    assert its.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(its[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    chunked.remove()
    again, _ = passed(model, batch)
    assert torch.equal(again, loss)
    assert not any("forward" in vars(each) for each in model.modules())


def test_in_bf16_the_gradient_of_the_head_is_rounded_for_each_chunk() -> None:
    model = tiny_blueprint("llama").reference.train().bfloat16()
    (batch,) = tiny_batches(1, "llama")
    loss, gradients = passed(model, batch)
    HeadLoss(model, 4, compiled=False)
    found, its = passed(model, batch)
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=0.0)
    for name, gradient in gradients.items():
        off = float((its[name].float() - gradient.float()).norm() / gradient.float().norm())
        assert off < 2.0**-7, name


def test_a_frozen_head_has_no_gradient_and_a_bias_has() -> None:
    model: Any = tiny_blueprint("llama").reference.train()
    size, width = model.lm_head.weight.shape
    model.lm_head = nn.Linear(width, size)
    (batch,) = tiny_batches(1, "llama")
    for trained in (True, False):
        model.lm_head.weight.requires_grad_(trained)
        mine = copy.deepcopy(model)
        _, gradients = passed(model, batch)
        HeadLoss(mine, 8, compiled=False)
        _, its = passed(mine, batch)
        assert its.keys() == gradients.keys()
        assert ("lm_head.weight" in its, "lm_head.bias" in its) == (trained, True)
        torch.testing.assert_close(its["lm_head.bias"], gradients["lm_head.bias"], rtol=1e-4, atol=1e-7)


def test_without_gradients_the_model_is_its_own() -> None:
    model: Any = tiny_blueprint("llama").reference.train()
    (batch,) = tiny_batches(1, "llama")
    with torch.no_grad():
        expected = model(**batch.inputs)
        HeadLoss(model, 8, compiled=False)
        found = model(**batch.inputs)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


class _Scaled(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 0.5 * super().forward(hidden)


def test_other_heads_and_losses_are_refused() -> None:
    model: Any = tiny_blueprint("llama").reference
    with torch.no_grad():
        head = model.lm_head
        model.lm_head = _Scaled(head.in_features, head.out_features, bias=False)
    with pytest.raises(UserError, match="does not end in one linear layer"):
        HeadLoss(model, 8, compiled=False)
    model.lm_head = head
    own, run = model.loss_function, model.forward

    def capped(**kwargs: Any) -> Any:
        model.loss_function, before = (
            (lambda logits, *rest, **more: before(logits.tanh(), *rest, **more)),
            (model.loss_function),
        )
        try:
            return run(**kwargs)
        finally:
            model.loss_function = before

    model.forward = capped
    with pytest.raises(UserError, match="makes something else of its logits"):
        HeadLoss(model, 8, compiled=False)
    assert model.loss_function is own
    with pytest.raises(UserError, match="does not end in one linear layer"):
        HeadLoss(tiny_blueprint("roberta").reference, 8, compiled=False)


@pytest.mark.families
@pytest.mark.parametrize("family", DECODERS)
def test_a_family_whose_loss_has_no_chunks_is_on_the_planners_list(family: str) -> None:
    model = family_model(family).reference().train()
    try:
        HeadLoss(model, 8, compiled=False)
    except UserError:
        assert family in OWN_LOGITS_FAMILIES


def trained(name: str, dtype: Dtype, **settings: Any) -> tuple[list[float], Any, dict[str, Tensor]]:
    workload = Workload(batch_size=2, seq_len=16, dtype=dtype, checkpointing=True)
    small = {"lora": {"r": 4}, "qlora": {"r": 4}, "galore": {"rank": 4}}
    given = {"learning_rate": 1e-2, **small.get(name, {}), **settings}
    engine = load_engine(name)(
        parse_settings(name, given), Context(device="cpu", workload=workload, seed=7, total_steps=6)
    )
    if (why := engine.why_not_available()) is not None:
        pytest.skip(why)
    engine.setup(tiny_blueprint("llama"))
    batches = tiny_batches(4, "llama")
    losses = [engine.step([batch]).loss for batch in batches]
    evaluation = engine.evaluate(batches)
    weights = {key: each.clone() for key, each in engine.weights()}
    engine.close()
    return losses, evaluation, weights


@pytest.mark.parametrize(
    ("name", "dtype", "rel"),
    [
        *((name, "fp32", 2e-4) for name in ("native", "lora", "qlora", "adamw-8bit", "galore")),
        ("backward-optimizer", "fp32", 2e-4),
        ("native", "bf16", 5e-3),
        ("lora", "bf16", 5e-3),
    ],
)
def test_a_run_in_chunks_is_the_run_without(name: str, dtype: Dtype, rel: float) -> None:
    losses, evaluation, weights = trained(name, dtype)
    its_losses, its_evaluation, its_weights = trained(name, dtype, loss_tokens=8)
    assert its_losses == pytest.approx(losses, rel=rel)
    assert its_evaluation.loss == pytest.approx(evaluation.loss, rel=rel)
    assert (its_evaluation.num_labels, its_weights.keys()) == (evaluation.num_labels, weights.keys())


@pytest.mark.slow
# Both from within torch's compiler.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_as_not() -> None:
    model = tiny_blueprint("llama").reference.train()
    (batch,) = tiny_batches(1, "llama")
    loss, gradients = passed(model, batch)
    HeadLoss(model, 12, compiled=True)
    found, its = passed(model, batch)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0.0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(its[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.gpu
# Both from within torch's compiler.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["native", "lora", "backward-optimizer"])
def test_on_a_gpu_it_takes_less_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled and captured where the method is; so many words that logits are most of the memory."""
    monkeypatch.setattr(tiny_models, "VOCABULARY", 60_000)
    ids = torch.randint(0, 60_000, (64, 64), generator=torch.Generator().manual_seed(0))
    found = []
    for tokens in ("all", 512):
        settings = parse_settings(name, {"learning_rate": 1e-3, "loss_tokens": tokens})
        workload = Workload(batch_size=64, seq_len=64, dtype="bf16")
        context = Context(device="cuda:0", workload=workload, seed=7, total_steps=6)
        engine = load_engine(name)(settings, context)
        before = torch.cuda.memory_allocated()  # what a test that failed in this process has left
        engine.setup(tiny_blueprint("llama"))
        torch.cuda.reset_peak_memory_stats()
        losses = [engine.step([Batch(inputs={"input_ids": ids, "labels": ids})]).loss for _ in range(5)]
        found.append((losses, torch.cuda.max_memory_allocated() - before))
        assert engine.notes == []
        engine.close()
        del engine
        gc.collect()
    (losses, peak), (its_losses, its_peak) = found
    assert its_losses == pytest.approx(losses, rel=2e-3)
    assert its_peak < peak / 2
