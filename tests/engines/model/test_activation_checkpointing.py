"""Blocks in training, watched: recomputation changes no gradient, and what is told comes in order.

On the CPU and without graphs; `tests/engines/methods/test_lsp.py` holds those, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engines.model.activation_checkpointing import TrainedBlocks
from engines.model.blocks import find_blocks, without_cache
from engines.model.randomness import draws_random_numbers
from tiny_models import tiny_batches, tiny_blueprint

FAMILIES = ["opt", "llama", "qwen2", "gpt2", "roberta", "bert"]


class Diary:
    """What a watcher was told."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int]] = []

    def before_forward(self, index: int) -> None:
        self.lines.append(("forward", index))

    def before_backward(self, index: int) -> None:
        self.lines.append(("backward", index))

    def finish(self, index: int) -> None:
        self.lines.append(("finish", index))

    def after_backward(self, index: int) -> None:
        self.lines.append(("after", index))


@contextmanager
def watched(model: nn.Module, *, recomputed: int = 3) -> Iterator[Diary]:
    diary = Diary()
    blocks = TrainedBlocks(model, diary, recomputed=recomputed, graphs=True)
    blocks.begin()
    yield diary
    blocks.close()


def gradients_of(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step and the gradient of each parameter that has one."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def tiny(family: str) -> tuple[Any, dict[str, Any]]:
    (batch,) = tiny_batches(1, family)
    model = tiny_blueprint(family).reference.train()
    return model, {**batch.inputs, **without_cache(model)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("recomputed", [0, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_all_gradients_are_those_of_the_plain_model(family: str, recomputed: int) -> None:
    model, inputs = tiny(family)
    loss, plain = gradients_of(model, inputs)
    with watched(model, recomputed=recomputed):
        seen, found = gradients_of(model, inputs)
    assert torch.equal(seen, loss)
    assert same(found, plain)


@pytest.mark.parametrize("recomputed", [0, 2, 3])
def test_a_block_is_told_of_before_and_after_each_of_its_passes(recomputed: int) -> None:
    model, inputs = tiny("llama")
    with watched(model, recomputed=recomputed) as diary:
        gradients_of(model, inputs)
    forward = [("forward", index) for index in (0, 1, 2)]
    backward = [(what, index) for index in (2, 1, 0) for what in ("backward", "finish", "after")]
    assert diary.lines == forward + backward


def test_evaluation_is_told_of_but_keeps_nothing() -> None:
    model, inputs = tiny("opt")
    with watched(model) as diary, torch.no_grad():
        model(**inputs)
    assert diary.lines == [("forward", index) for index in (0, 1, 2)]


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_dropout_falls_the_same_in_the_second_forward_pass(family: str) -> None:
    model, inputs = tiny(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.5
    model.config.dropout = 0.5
    assert draws_random_numbers(model)
    torch.manual_seed(5)
    loss, plain = gradients_of(model, inputs)
    after = torch.get_rng_state()
    with watched(model):
        torch.manual_seed(5)
        seen, found = gradients_of(model, inputs)
    assert torch.equal(seen, loss)
    assert same(found, plain)
    assert torch.equal(torch.get_rng_state(), after), "what is drawn next is what would have been"


def test_gradients_add_up_over_micro_batches() -> None:
    model, inputs = tiny("llama")
    _, once = gradients_of(model, inputs)
    with watched(model):
        gradients_of(model, inputs)
        model(**inputs).loss.backward()
        twice = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert same(twice, {name: 2 * gradient for name, gradient in once.items()})


def test_frozen_weights_get_no_gradient_and_pass_one_on() -> None:
    model, inputs = tiny("llama")
    _, blocks = find_blocks(model)
    for parameter in blocks[1].parameters():
        parameter.requires_grad_(False)
    _, plain = gradients_of(model, inputs)
    with watched(model):
        _, found = gradients_of(model, inputs)
    assert same(found, plain)
    assert all(parameter.grad is None for parameter in blocks[1].parameters())


def test_a_block_has_its_own_forward_back_at_the_end() -> None:
    model, _ = tiny("llama")
    _, blocks = find_blocks(model)
    with watched(model):
        assert all("forward" in vars(block) for block in blocks)
    assert not any("forward" in vars(block) for block in blocks)


class Doubling(nn.Module):
    """A block that returns a hidden state, a second tensor and a thing that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: Tensor, bias: Tensor) -> tuple[Any, ...]:
        moved = self.linear(hidden) + bias
        return moved, "cache", 2 * moved


class Doubled(nn.Module):
    """Blocks that share a tensor with a gradient of its own, and whose second results count as well."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((4,), 0.5))
        self.layers = nn.ModuleList(Doubling() for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        total = torch.zeros(())
        for block in self.layers:
            hidden, kind, second = block(hidden, self.bias)
            assert kind == "cache"
            total = total + second.square().sum()
        return total


def test_all_that_a_block_takes_and_returns_has_its_gradient() -> None:
    torch.manual_seed(0)
    model, hidden = Doubled(), torch.randn(2, 4)
    model(hidden).backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with watched(model):
        model(hidden).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], msg=name)


def test_between_the_passes_a_block_keeps_its_input_alone() -> None:
    model, hidden = Doubled(), torch.randn(2, 4)
    kept: dict[int, int] = {}
    for recomputed in (0, 3):
        saved: list[Tensor] = []

        def save(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with (
            watched(model, recomputed=recomputed),
            torch.autograd.graph.saved_tensors_hooks(save, lambda t: t),
        ):
            blocks_out = model.layers[0](hidden, model.bias)
        kept[recomputed] = len(saved)
        assert blocks_out[1] == "cache"
    assert kept[3] == 1 < kept[0]


@pytest.mark.parametrize(("p", "found"), [(0.0, False), (0.1, True)])
def test_dropout_is_found_in_modules(p: float, found: bool) -> None:
    assert draws_random_numbers(nn.Sequential(nn.Linear(2, 2), nn.Dropout(p))) is found
