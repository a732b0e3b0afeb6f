"""Blocks that all micro-batches pass together, as CUDA graphs: on a CPU with graphs that are played.

What streams and shared memory may do to them `tests/engines/methods/test_exact_offload.py` holds on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fake_graphs import FakeCuda, played
from torch import Tensor, nn

from engines.base import Batch
from engines.model.block_major import BlockMajor
from engines.model.block_major_graphs import BlockMajorGraphs, Passing, _form_of, _Place
from engines.model.blocks import BlockCall, find_blocks
from engines.model.cuda_graphs import MOST_FORMS
from tiny_models import tiny_batches, tiny_blueprint

CPU = torch.device("cpu")
BLOCKS = 3


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return played(monkeypatch)


class Slots:
    """Adds up gradients of each block where they lay in the step before, as an engine does, and is called."""

    def __init__(self, own: Sequence[Sequence[nn.Parameter]]) -> None:
        self.sums = [[torch.zeros_like(each) for each in its] for its in own]
        self.act: Callable[[str, int], None] = lambda name, index: None

    def before_forward(self, index: int) -> None:
        self.act("before_forward", index)

    def after_forward(self, index: int) -> None: ...

    def before_backward(self, index: int) -> None:
        self.act("before_backward", index)

    def gradients(self, index: int, found: Sequence[Tensor | None], *, first: bool) -> None:
        for place, its in zip(self.sums[index], found, strict=True):
            if first:
                place.zero_()
            if its is not None:
                place.add_(its)

    def after_backward(self, index: int) -> None: ...


class Passes:
    """A tiny model's passes, with graphs or without."""

    def __init__(self, *, graphs: bool, family: str = "llama") -> None:
        self.model: Any = tiny_blueprint(family, num_blocks=BLOCKS).reference.train()
        _, blocks = find_blocks(self.model)
        own = [list(block.parameters()) for block in blocks]
        self.slots, self.notes = Slots(own), list[str]()
        made = BlockMajorGraphs(CPU, self.notes.append) if graphs else None
        self.passes = BlockMajor(self.model, own, self.slots, draws=False, graphs=made)

    def step(self, batches: Sequence[Batch]) -> tuple[float, list[Tensor]]:
        """The loss and all gradients."""
        self.model.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        self.passes.run(batches, CPU, losses.append)
        outside = [each.grad.clone() for each in self.model.parameters() if each.grad is not None]
        return float(losses[0]), [*outside, *(each.clone() for its in self.slots.sums for each in its)]


def of_lengths(*lengths: int, seed: int = 0, padded: bool = False) -> list[Batch]:
    """A micro-batch of each length."""
    found = []
    for number, length in enumerate(lengths):
        (batch,) = tiny_batches(1, "llama", seed=100 * seed + number, seq_len=length)
        if padded:
            mask = torch.ones_like(batch.inputs["input_ids"])
            mask[0, -2:] = 0
            batch = Batch(inputs={**batch.inputs, "attention_mask": mask})
        found.append(batch)
    return found


def assert_same_steps(steps: Sequence[Sequence[Batch]], captured: Passes, plain: Passes) -> None:
    for batches in steps:
        loss, gradients = captured.step(batches)
        expected, its = plain.step(batches)
        assert loss == expected
        assert all(torch.equal(one, other) for one, other in zip(gradients, its, strict=True))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen2", "roberta", "bert"])
@pytest.mark.parametrize("count", [1, 3])
def test_steps_are_those_without_graphs_from_the_second_on(
    family: str, count: int, fake_cuda: FakeCuda
) -> None:
    captured = Passes(graphs=True, family=family)
    batches = tiny_batches(4 * count, family)
    steps = [batches[at : at + count] for at in range(0, 4 * count, count)]
    assert_same_steps(steps, captured, Passes(graphs=False, family=family))
    assert captured.notes == []
    assert [each.replays for each in fake_cuda.graphs] == [3] * (2 * BLOCKS)


def test_each_form_of_a_step_has_graphs_of_its_own(fake_cuda: FakeCuda) -> None:
    """A new one runs without, in the memory that the others give back to it."""
    short, mixed, padded = of_lengths(8, 8), of_lengths(8, 16), of_lengths(8, 8, padded=True)
    captured = Passes(graphs=True)
    steps = [short, short, short, mixed, padded, mixed, short, padded, mixed, short]
    assert_same_steps(steps, captured, Passes(graphs=False))
    # Those of the first were let go of, and captured again.
    assert len(fake_cuda.graphs) == 4 * 2 * BLOCKS
    assert [each.replays for each in fake_cuda.graphs[:: 2 * BLOCKS]] == [2, 2, 2, 1]
    assert captured.notes == []


def test_a_form_too_many_ends_graphs_for_good(fake_cuda: FakeCuda) -> None:
    captured = Passes(graphs=True)
    steps = [of_lengths(4 + number) for number in range(MOST_FORMS + 1) for _ in range(2)]
    assert_same_steps([*steps, *steps[:2]], captured, Passes(graphs=False))
    assert captured.notes == [f"no CUDA graph: batches come in more than {MOST_FORMS} forms"]
    assert len(fake_cuda.graphs) == MOST_FORMS * 2 * BLOCKS


@pytest.mark.parametrize("number", [0, 2, 3, 4, 5])
def test_what_cannot_be_captured_runs_without(number: int, fake_cuda: FakeCuda) -> None:
    """In the forward pass, and in the backward pass, when gradients of other blocks are on their way."""
    captured = Passes(graphs=True)
    fake_cuda.fails_at = number
    assert_same_steps([of_lengths(8, 8, seed=seed) for seed in range(3)], captured, Passes(graphs=False))
    assert captured.notes == ["no CUDA graph: no room for a graph"]
    assert len(fake_cuda.graphs) == number


@pytest.mark.parametrize("where", ["before_forward", "before_backward"])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_after_a_step_that_was_broken_off_graphs_are_those_of_a_whole_one(
    where: str, step: int, fake_cuda: FakeCuda
) -> None:
    class Stopped(Exception):
        pass

    def stop(name: str, index: int) -> None:
        if (name, index) == (where, 1):
            raise Stopped

    captured, batches = Passes(graphs=True), of_lengths(8, 8)
    for _ in range(step):
        captured.step(batches)
    captured.slots.act = stop
    with pytest.raises(Stopped):
        captured.step(batches)
    captured.slots.act = lambda name, index: None
    assert_same_steps([of_lengths(8, 8, seed=seed) for seed in range(3)], captured, Passes(graphs=False))


def test_parameters_that_are_not_the_blocks_own_are_left_to_autograd(fake_cuda: FakeCuda) -> None:
    passes = Passes(graphs=False)
    _, blocks = find_blocks(passes.model)
    own = [list(block.parameters())[1:] for block in blocks]
    graphs = BlockMajorGraphs(CPU, passes.notes.append)
    passes.passes = BlockMajor(passes.model, own, Slots(own), draws=False, graphs=graphs)
    for _ in range(3):
        passes.step(of_lengths(8))
    assert not fake_cuda.graphs


@pytest.mark.parametrize(
    ("argument", "why_not"),
    [
        (object(), "blocks are called with objects of another kind than tensors and numbers"),
        (torch.zeros(2, device="meta"), "blocks are called with a tensor on the host"),
    ],
)
def test_what_has_no_fixed_place_is_told(argument: Any, why_not: str, fake_cuda: FakeCuda) -> None:
    notes: list[str] = []
    graphs = BlockMajorGraphs(CPU, notes.append)
    assert graphs.step_of([passing(BlockCall((argument,), {}))]) is None
    assert graphs.step_of([passing(BlockCall((argument,), {}))]) is None
    assert notes == [f"no CUDA graph: {why_not}"]


def passing(*calls: BlockCall) -> Passing:
    return Passing(calls=calls, shared=[], padded=False, last=torch.zeros(2, 4, 8), of_shared=[])


def test_forms_differ_in_strides_and_in_which_blocks_share_a_tensor() -> None:
    one, other = torch.zeros(4, 4), torch.zeros(4, 4)
    shared = passing(BlockCall((one,), {}), BlockCall((one,), {}))
    apart = passing(BlockCall((one,), {}), BlockCall((other,), {}))
    turned = passing(BlockCall((one.T,), {}), BlockCall((one,), {}))
    expanded = passing(BlockCall((one[:1].expand(4, 4),), {}), BlockCall((one,), {}))
    keys = [_form_of(each)[0] for each in (shared, apart, turned, expanded)]
    assert len(set(keys)) == 4
    assert keys[0] == _form_of(passing(BlockCall((other,), {}), BlockCall((other,), {})))[0]


@pytest.mark.parametrize(
    "source", [torch.arange(12.0).view(3, 4).T, torch.arange(4.0).expand(3, 4), torch.arange(12.0)[1::3]]
)
def test_a_place_has_the_sizes_strides_and_values_of_its_source(source: Tensor) -> None:
    place = _Place(source)
    place.load(source)
    assert torch.equal(place.tensor, source)
    assert place.tensor.stride() == source.stride()
