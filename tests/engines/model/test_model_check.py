"""What is tried before a weight is read: models that are not what they seem are refused, none is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from family_models import context, family_model

from engines.base import Batch, Blueprint, Context
from engines.costs.memory.trial import MOST_TOKENS
from engines.errors import UserError
from engines.model.model_check import check_block_major, check_driven, check_repeats, check_watched
from engines.model.stand_ins import tried_batch
from engines.shapes import Dtype
from engines.zeroth_order.stacking import blocks_apart
from harness.models.blueprint import ModelBlueprint

CHECKS = [check_driven, check_watched, check_block_major]
Check = Callable[[Blueprint, Context], None]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("family", ["llama", "bert", "mixtral", "nemotron_h", "deberta-v2"])
def test_a_model_is_as_it_was_before(family: str, check: Check) -> None:
    blueprint = family_model(family).blueprint()
    before = dict(blueprint.model.named_parameters(remove_duplicate=False))
    state = torch.get_rng_state()
    check(blueprint, context())
    after = dict(blueprint.model.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(parameter.is_meta and parameter.grad is None for parameter in after.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("forward" in vars(module) for module in blueprint.model.modules())


@pytest.mark.parametrize("check", CHECKS)
def test_layers_that_share_weights_are_refused(check: Check) -> None:
    with pytest.raises(UserError, match=r"its layers share weights: 2 calls of 1; use native") as caught:
        check(family_model("albert").blueprint(), context())
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("check", CHECKS)
def test_an_auxiliary_loss_of_experts_is_refused_with_what_turns_it_off(check: Check) -> None:
    blueprint = family_model("mixtral", output_router_logits=True).blueprint()
    with pytest.raises(
        UserError, match=r"auxiliary loss.*; use native, or set output_router_logits"
    ) as caught:
        check(blueprint, context())
    assert len(str(caught.value)) < 200
    check_repeats(blueprint, context())


def test_a_model_that_knows_no_bf16_is_refused() -> None:
    where = replace(context(), workload=replace(context().workload, dtype="bf16"))
    with pytest.raises(UserError, match="cannot be run in the precision that is asked for; use --dtype fp32"):
        check_driven(family_model("fnet").blueprint(), where)


def with_a_secret(blueprint: ModelBlueprint) -> ModelBlueprint:
    """What the first block saw reaches the second one past the hidden state."""
    first, second = blueprint.model.model.layers
    seen: list[Any] = []
    of_first, of_second = first.forward, second.forward

    def keep(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(of_first(hidden, *args, **kwargs))
        return seen[-1]

    def use(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return of_second(hidden, *args, **kwargs) + seen[-1].square() * 10

    first.forward, second.forward = keep, use
    return blueprint


@pytest.mark.parametrize("check", [check_watched, check_block_major])
def test_what_travels_past_the_hidden_state_shows_in_the_gradients(check: Check) -> None:
    with pytest.raises(UserError, match=r"one by one|cannot be watched"):
        check(with_a_secret(family_model("llama").blueprint()), context())


NOISE = torch.Generator().manual_seed(0)
"""Its own: what recomputes gives torch's back its state."""


class Rounds(torch.autograd.Function):
    """Passes on what it gets; a vector beside it gets a gradient of this size, which is another each time."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, vector: torch.Tensor, size: float) -> torch.Tensor:
        ctx.shape, ctx.size = vector.shape, size
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return gradients[0], ctx.size * torch.randn(ctx.shape, generator=NOISE), None


@pytest.mark.parametrize("check", [check_watched, check_block_major])
@pytest.mark.parametrize("size", [1e-9, 1e3])
def test_a_gradient_that_is_rounding_alone_is_no_reason_to_refuse(size: float, check: Check) -> None:
    """Of a key's bias, say, with kernels that add up in any order."""
    blueprint = family_model("llama").blueprint()
    within = blueprint.model.model.layers[0].mlp
    within.rounded = torch.nn.Parameter(torch.empty(16, device="meta"))
    usual = within.forward
    within.forward = lambda hidden: Rounds.apply(usual(hidden), within.rounded, size)
    if size < 1:
        check(blueprint, context())
    else:
        with pytest.raises(UserError, match="gives other gradients"):
            check(blueprint, context())


def test_a_block_that_is_left_out_is_refused() -> None:
    blueprint = family_model("llama").blueprint()
    blueprint.model.config.num_hidden_layers = 1  # the model's own forward then stops after one
    with pytest.raises(UserError, match="does not call its blocks one after the other"):
        check_driven(blueprint, context())


def test_it_takes_the_memory_of_the_largest_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    usual = torch.Tensor.repeat
    monkeypatch.setattr(
        torch.Tensor, "repeat", lambda self, *sizes: made.append((out := usual(self, *sizes)).numel()) or out
    )
    blueprint = family_model("llama", num_hidden_layers=30).blueprint()
    check_driven(blueprint, context())
    largest = max(parameter.numel() for parameter in blueprint.model.parameters())
    assert sum(made) < 4 * largest
    assert sum(made) < sum(parameter.numel() for parameter in blueprint.model.parameters()) / 5


def long_batch(texts: Sequence[int], *, left: bool = False, length: int = 100) -> Batch:
    """Sequences of `length` tokens, whose texts have so many of them and whose padding is on one side."""
    ids = 3 + torch.arange(len(texts) * length).view(len(texts), length) % 200
    places = torch.arange(length).expand(len(texts), -1)
    counts = torch.tensor(texts)[:, None]
    mask = (places >= length - counts if left else places < counts).long()
    return Batch(inputs={"input_ids": ids * mask, "attention_mask": mask, "labels": ids})


def tried(batch: Batch) -> dict[str, torch.Tensor]:
    blueprint = family_model("llama").blueprint()
    blueprint.sample = batch
    return dict(tried_batch(blueprint).inputs)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("texts", "begin", "count"), [
    ((100, 100, 60, 80), 44, 16), ((100, 90, 5), 0, 5), ((100, 97), 68, 29), ((70, 60), 44, 16),
    ((50,), 34, 16),
])  # fmt: skip
def test_the_tokens_that_are_tried_have_the_padding_of_the_job(
    texts: tuple[int, ...], begin: int, count: int, left: bool
) -> None:
    """With both sides of it in the most padded sequence, and none of which padding is all."""
    batch, most_padded = long_batch(texts, left=left), texts.index(min(texts))
    inputs = tried(batch)
    assert all(each.shape == (min(2, len(texts)), MOST_TOKENS) for each in inputs.values())
    assert all(each.is_contiguous() for each in inputs.values())
    assert int(inputs["attention_mask"][-1].sum()) == count
    assert bool(inputs["attention_mask"].any(1).all())
    begin = 100 - MOST_TOKENS - begin if left else begin
    taken = batch.inputs["input_ids"][most_padded, begin : begin + MOST_TOKENS]
    assert torch.equal(inputs["input_ids"][-1], taken)


def test_without_padding_the_first_tokens_are_tried() -> None:
    batch = long_batch((100, 100))
    assert torch.equal(tried(batch)["input_ids"], batch.inputs["input_ids"][:, :MOST_TOKENS])
    bare = Batch(inputs={name: batch.inputs[name] for name in ("input_ids", "labels")})
    assert torch.equal(tried(bare)["input_ids"], batch.inputs["input_ids"][:, :MOST_TOKENS])


def test_an_answer_is_where_it_was_among_the_tokens_that_are_tried() -> None:
    inputs = dict(long_batch((100, 60)).inputs)
    del inputs["labels"]
    ends = {"start_positions": torch.tensor([50, 10]), "end_positions": torch.tensor([99, 55])}
    found = tried(Batch(inputs={**inputs, **ends}))
    assert found["start_positions"].tolist() == [50 - 44, 0]
    assert found["end_positions"].tolist() == [MOST_TOKENS - 1, 55 - 44]


@pytest.mark.parametrize("check", [*CHECKS, check_repeats])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    "family", ["opt", "llama", "gpt2", "bert", "mixtral", "xlnet", "gpt_neo", "llama4_text"]
)
def test_models_are_tried_with_fewer_tokens_than_the_job_has(family: str, left: bool, check: Check) -> None:
    blueprint = family_model(family).blueprint()
    batch = long_batch((48, 40), left=left, length=48)
    if blueprint.shape.head == "classification":
        batch = Batch(inputs={**batch.inputs, "labels": torch.tensor([0, 1])})
    blueprint.sample = batch
    check(blueprint, context())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "bert", "mixtral", "deepseek_v3"])
def test_kernels_that_differ_by_shape_are_no_reason_to_refuse_on_the_gpu(family: str, dtype: Dtype) -> None:
    where = replace(context(), device="cuda:0", workload=replace(context().workload, dtype=dtype))
    made = family_model(family)
    check_driven(made.blueprint(), where)
    if family in ("opt", "llama", "gpt2", "bert"):
        assert blocks_apart(made.blueprint(), where) == frozenset()
    if dtype != "fp16":
        for check in (check_watched, check_block_major):
            check(made.blueprint(), where)
