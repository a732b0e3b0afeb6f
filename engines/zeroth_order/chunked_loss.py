"""The end of a causal language model in chunks: logits only where labels are, and never all of them at once.

Most models end in one linear layer, whose outputs are the logits, and in the mean cross-entropy of the next
token. For those (`plain_head` finds out) the loss is computed over chunks of the vocabulary with a running
log-sum-exp, so that neither a perturbed copy of the head nor the logits of a long batch take memory. The sum
over tokens is in fp64: a projected gradient is a small difference of two losses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from math import gcd, lcm
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Batch
from engines.costs.loss import HEAD_CHUNK_BYTES, HEAD_TOKENS
from engines.kernels.token_scores import RunningScores, Scores
from engines.model.blocks import BlockDriver, sent
from engines.model.evaluation import IGNORED
from engines.model.label_words import classifies_by_words
from engines.noise import weight_pass
from engines.noise.tiles import TILE, one
from engines.noise.visits import Outputs, Visit
from engines.zeroth_order.estimators import Side

TOKEN_GRID = 64
ROW_GRID = 256


@dataclass(frozen=True, slots=True)
class Targets:
    """The labelled positions of a batch, on the device."""

    positions: Tensor
    """(n,) int64 into the flattened (batch, seq) positions whose next token is labelled."""
    labels: Tensor
    """(n,) int64."""


def targets_of(batch: Batch, device: torch.device) -> Targets:
    """Found on the host, where the labels are: the GPU is not waited for."""
    labels = batch.inputs["labels"]
    following = torch.full_like(labels, IGNORED)
    following[:, :-1] = labels[:, 1:]
    positions = (following.view(-1) != IGNORED).nonzero().view(-1)
    chosen = following.view(-1)[positions]
    return Targets(sent(positions, device), sent(chosen, device))


class _Reached(Exception):
    """Ends a forward pass at the head."""


@dataclass(slots=True)
class Arrival:
    """What a forward pass brought to the head."""

    hidden: Tensor


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module's forward is another one, on this instance, and then what it was."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


class LossHead:
    """A linear output layer with weight `weight` (vocabulary, hidden), both names first names."""

    def __init__(self, module: nn.Linear, weight: str, bias: str | None, numbers: Mapping[str, int]) -> None:
        self._module = module
        self._weight = weight
        self._bias = bias
        self._numbers = numbers

    @contextmanager
    def reached(self) -> Iterator[Arrival]:
        """Within it a forward pass of the model ends at the head, quietly, and what came there is kept."""
        arrival = Arrival(torch.empty(0))

        def stop(hidden: Tensor) -> Tensor:
            arrival.hidden = hidden
            raise _Reached

        with suppress(_Reached), _replaced(self._module, stop):
            yield arrival

    def losses(
        self,
        hidden: Mapping[Side, Tensor],
        targets: Targets,
        non_block: Mapping[str, Tensor],
        trained: Collection[str],
        how: Visit,
        *,
        of_each: bool = False,
    ) -> list[Tensor]:
        """Mean losses, () fp64, of the hidden states (batch, seq, hidden) of each side; or, `of_each`
        sequence, (batch,) fp64, what it adds to the mean, times the number of sequences.

        What is not in `trained` is not perturbed.
        """
        weight = non_block[self._weight]
        vocabulary, width = weight.shape
        rows = chunk_rows(vocabulary, width, weight.element_size())
        moved = [side for side in hidden if side is not Side.PLAIN]
        trains = self._weight in trained and bool(moved)
        scratch = [
            torch.empty((rows, width), dtype=weight.dtype, device=weight.device)
            for _ in range(trains * len(moved))
        ]
        biases = self._biases(non_block, how, trained, moved) if moved else [self._bias_of(non_block)]

        def chunk(first: int, last: int) -> list[Tensor]:
            if not trains:
                return [weight[first:last]] * len(hidden)
            theta = weight[first:last].view(-1)
            buffers = [memory[: last - first] for memory in scratch]
            segment = one(self._numbers[self._weight], theta.numel(), decays=True)
            out = _outputs(moved, [buffer.view(-1) for buffer in buffers])
            weight_pass.visit(theta, segment, how, out, start=first * width)
            return buffers

        scores = _scores(list(hidden.values()), targets, vocabulary, rows, chunk, biases)
        if of_each:
            batch, length, _ = next(iter(hidden.values())).shape
            return [of_sequences(each.losses, targets, batch, length) for each in scores]
        return [each.loss_sum / targets.labels.numel() for each in scores]

    def evaluate(
        self,
        hidden: Tensor,
        targets: Targets,
        non_block: Mapping[str, Tensor],
        class_tokens: Tensor | None = None,
    ) -> Scores:
        """With the weights as they are. `class_tokens`: what is predicted is the likeliest of these."""
        weight = non_block[self._weight]
        vocabulary, width = weight.shape
        rows = chunk_rows(vocabulary, width, weight.element_size())
        bias = self._bias_of(non_block)
        (scores,) = _scores([hidden], targets, vocabulary, rows, lambda a, b: [weight[a:b]], [bias])
        if class_tokens is None:
            return scores
        tokens = class_tokens.to(weight.device)
        state = hidden.reshape(-1, width)[targets.positions]
        logits = nn.functional.linear(state, weight[tokens], None if bias is None else bias[tokens])
        return replace(scores, predicted=tokens[logits.argmax(-1)])

    def _bias_of(self, non_block: Mapping[str, Tensor]) -> Tensor | None:
        return None if self._bias is None else non_block[self._bias]

    def _biases(
        self, non_block: Mapping[str, Tensor], how: Visit, trained: Collection[str], sides: Sequence[Side]
    ) -> Sequence[Tensor | None]:
        bias = self._bias_of(non_block)
        if bias is None or self._bias is None or self._bias not in trained:
            return [bias] * len(sides)
        moved = [torch.empty_like(bias) for _ in sides]
        segment = one(self._numbers[self._bias], bias.numel())
        weight_pass.visit(bias, segment, how, _outputs(sides, moved))
        return moved


def of_sequences(losses: Tensor, targets: Targets, batch: int, length: int) -> Tensor:
    """(batch,) fp64 whose mean is that of the `losses` (n,) at the positions of `targets`: of each sequence
    the sum of its own. Added up in the same order in every step: not by atomics."""
    placed = torch.zeros(batch * length, dtype=torch.float64, device=losses.device)
    placed[targets.positions] = losses.double()
    return placed.view(batch, length).sum(1) * (batch / targets.labels.numel())


def _outputs(sides: Sequence[Side], memory: Sequence[Tensor]) -> Outputs:
    """The perturbed weights of each of `sides`."""
    of = dict(zip(sides, memory, strict=True))
    return Outputs(plus=of.get(Side.PLUS), minus=of.get(Side.MINUS))


def chunk_rows(vocabulary: int, width: int, element_bytes: int) -> int:
    """Vocabulary rows at a time: about `HEAD_CHUNK_BYTES` of weights, and whole tiles of noise.

    Also a multiple of `ROW_GRID`: the logits of other counts lie off the grid of the fastest matrix kernels.
    """
    grid = lcm(TILE // gcd(width, TILE), ROW_GRID)
    wanted = HEAD_CHUNK_BYTES // (width * element_bytes)
    return min(vocabulary, max(1, wanted // grid) * grid)


def _scores(
    hidden: Sequence[Tensor],
    targets: Targets,
    vocabulary: int,
    rows: int,
    chunk: Callable[[int, int], Sequence[Tensor]],
    biases: Sequence[Tensor | None],
) -> list[Scores]:
    """One `Scores` per side; `chunk(first, last)` gives each side's rows of the head.

    ln sum exp over the vocabulary is gathered chunk by chunk, in fp32 as transformers' loss has it.
    """
    count = targets.labels.numel()
    states = [_padded(side.reshape(-1, side.shape[-1])[targets.positions]) for side in hidden]
    sides = [RunningScores(count, state.device) for state in states]
    for first in range(0, vocabulary, rows):
        last = min(first + rows, vocabulary)
        weights = chunk(first, last)
        for state, weight, bias, running in zip(states, weights, biases, sides, strict=True):
            chunk_bias = None if bias is None else bias[first:last]
            for begin in range(0, count, HEAD_TOKENS):
                tokens = state[begin : begin + HEAD_TOKENS]
                logits = torch.empty(
                    (tokens.shape[0], last - first), dtype=weight.dtype, device=weight.device
                )
                multiply(tokens, weight.t(), chunk_bias, logits)
                running.add(slice(begin, min(begin + HEAD_TOKENS, count)), logits, targets.labels, first)
                del logits  # or the next ones are made beside them
    return [running.scores() for running in sides]


@cache
def _zeros(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(width, dtype=dtype, device=device)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x weight + bias, for (rows, inputs), (inputs, width) and (width,).

    On a GPU a bias of zeros stands for none: torch takes products with a bias to cuBLASLt, whose choice of
    kernel is much the faster (OPT-1.3B's head in chunks on an H200: 0.26 ms for 1.18, on half the rows).
    """
    if bias is None and x.is_cuda:
        bias = _zeros(weight.shape[1], weight.dtype, weight.device)
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def _padded(state: Tensor) -> Tensor:
    """Rows of zeros at the end: matrix products of an odd number of rows take up to three times as long."""
    missing = -state.shape[0] % TOKEN_GRID
    return nn.functional.pad(state, (0, 0, 0, missing)) if missing else state


def plain_head(
    model: nn.Module, driver: BlockDriver, places: Mapping[str, str], numbers: Mapping[str, int]
) -> LossHead | None:
    """The model's head if it is one linear layer and a mean cross-entropy; else `None`.

    Found out by trying: the layer is replaced by one that answers with known logits, which the model must
    hand out as they are (no cap, no scale), with the loss that belongs to them. Weights may be anything.
    """
    getter = getattr(model, "get_output_embeddings", None)
    module = getter() if getter is not None else None
    if type(module) is not nn.Linear or classifies_by_words(model):
        return None
    path = next(name for name, each in model.named_modules() if each is module)
    weight, bias = places.get(f"{path}.weight"), places.get(f"{path}.bias")
    if weight is None:
        return None
    device = module.weight.device
    ids = torch.arange(4, device=device).view(1, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    known = (torch.arange(4 * module.out_features, device=device) * 37 % 121 - 60).view(1, 4, -1)
    logits = known.to(module.weight.dtype)
    with _replaced(module, lambda hidden: logits[:, -hidden.shape[1] :]):
        output = driver.finish(inputs, driver.record(inputs).hidden)
    expected = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    same = torch.equal(output.logits.float(), logits.float()) and torch.allclose(
        output.loss.float(), expected, rtol=1e-4
    )
    return LossHead(module, weight, bias, numbers) if same else None
