"""The loss of a language model in chunks of its positions: no more logits than those of one chunk.

A causal language model ends in a linear layer and the mean cross-entropy of the next token. With N positions,
vocabulary V and width H, torch keeps N x V logits, their log-softmax in fp32 and the gradients of both: 7 GB
at 4096 positions and 128 thousand words. Here each chunk's logits become, at once, its part of the loss and
the gradients of its hidden states and of the layer, and are gone (Liger-Kernel's fused linear cross-entropy,
2410.10989, by torch's operations):

    p = softmax(h W^T),  slope = (p - one_hot(label)) / labelled positions
    gradient of h = slope W,  gradient of W = sum over chunks of slope^T h

What is rounded otherwise than in torch's own: a bf16 gradient of W is rounded once for each chunk, and the
loss is summed over chunks. Nothing else: logits are of the weights' dtype and everything behind them fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engines.errors import UserError
from engines.model.attention_masks import with_mask
from engines.model.blocks import no_cache, without_cache
from engines.model.label_words import classifies_by_words

NO_LABEL = -100

ChunkLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor]]


class HeadLoss:
    """Stands in the place of a model's head and of its loss where it trains, until `remove`."""

    def __init__(self, model: nn.Module, tokens: int, *, compiled: bool) -> None:
        """Logits of `tokens` positions are there at once. The model's weights are filled, on its device.

        Raises `UserError` for a model whose loss is not the mean cross-entropy of what one linear layer
        gives, which is found out by trying.
        """
        self._model: Any = model
        self.tokens = tokens
        self._head = _plain_head(model)
        own: Any = self._model
        self._own_loss: Callable[..., Any] = own.loss_function
        run: ChunkLoss = loss_and_slope
        self._chunk: ChunkLoss = torch.compile(run, dynamic=False) if compiled else run
        self._is_on = True
        vars(self._head)["forward"] = self._forward
        own.loss_function = self._loss

    def _trains(self) -> bool:
        return bool(self._model.training) and torch.is_grad_enabled()

    def _forward(self, hidden: Tensor) -> Tensor:
        return hidden if self._trains() else nn.Linear.forward(self._head, hidden)

    def _loss(self, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        """() fp32 of what the head gave, (batch, seq, hidden) in training."""
        if not self._trains():
            loss: Tensor = self._own_loss(logits, labels, vocab_size, **kwargs)
            return loss
        following = nn.functional.pad(labels, (0, 1), value=NO_LABEL)[..., 1:].reshape(-1)
        hidden = logits.reshape(following.numel(), -1)
        apply: Any = _ChunkedLoss.apply
        found: Tensor = apply(hidden, self._head.weight, self._head.bias, following, self.tokens, self._chunk)
        return found

    def remove(self) -> None:
        """The model's own head and loss. May be called twice."""
        if self._is_on:
            vars(self._head).pop("forward", None)
            self._model.loss_function = self._own_loss
            self._is_on = False


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        tokens: int,
        chunk: ChunkLoss,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        ctx.dtype = hidden.dtype
        # What is compiled sees plain tensors, of one dtype also where autocast would make them that.
        hidden, weight = hidden.detach().to(weight.dtype), weight.detach()
        bias = None if bias is None else bias.detach()
        share = (labels != NO_LABEL).sum().float().reciprocal()
        total = torch.zeros((), device=hidden.device)
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight) if wants_weight else None
        of_bias = torch.zeros_like(bias) if bias is not None and wants_bias else None
        for begin in range(0, hidden.shape[0], tokens):
            its = slice(begin, begin + tokens)
            loss, slope = chunk(hidden[its], weight, bias, labels[its], share)
            total += loss
            if of_hidden is not None:
                torch.mm(slope, weight, out=of_hidden[its])
            if of_weight is not None:
                of_weight.addmm_(slope.T, hidden[its])
            if of_bias is not None:
                of_bias += slope.sum(0)
        ctx.gradients = of_hidden, of_weight, of_bias
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        found = [None if each is None else each.mul_(gradient) for each in ctx.gradients]
        ctx.gradients = None
        of_hidden = None if found[0] is None else found[0].to(ctx.dtype)
        return of_hidden, found[1], found[2], None, None, None


def loss_and_slope(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """Of one chunk: `share` times the sum of its negative log-likelihoods, () fp32, and the gradient of that
    for its logits, (chunk, vocabulary) of the weights' dtype.

    `hidden` (chunk, hidden), `weight` (vocabulary, hidden), `labels` (chunk,) int64.
    """
    logits = nn.functional.linear(hidden, weight, bias)
    wide = logits.float()
    labelled = labels != NO_LABEL
    place = labels.clamp(min=0).unsqueeze(1)
    log_sum = wide.logsumexp(1, keepdim=True)
    missed = (log_sum - wide.gather(1, place)).squeeze(1)
    loss = torch.where(labelled, missed, 0.0).sum() * share
    slope = (wide - log_sum).exp()
    # Compared and not scattered: compiled, it is all one pass from the logits to their gradient.
    words = torch.arange(wide.shape[1], device=wide.device)
    slope = torch.where(words == place, slope - 1.0, slope) * (labelled * share).unsqueeze(1)
    return loss, slope.to(logits.dtype)


def _plain_head(model: nn.Module) -> nn.Linear:
    """The linear layer whose outputs, as they are, the model's loss is taken of. Raises `UserError`."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if type(head) is not nn.Linear or "forward" in vars(head) or classifies_by_words(model):
        raise _refused("this model does not end in one linear layer over its vocabulary")
    whole: Any = model
    ids = torch.arange(4, device=head.weight.device).view(1, 4)
    places = torch.arange(4 * head.out_features, device=head.weight.device)
    known = (places * 37 % 121 - 60).view(1, 4, -1).to(head.weight.dtype)
    marker = torch.full((), 0.5, device=head.weight.device)
    taken: list[Tensor] = []

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        # The sum over several steps' items, or labels that are shifted already: not what is computed here.
        if all(value is None for value in kwargs.values()) and torch.equal(labels, ids):
            taken.append(logits)
        return marker

    own, was_training = whole.loss_function, model.training
    vars(head)["forward"] = lambda hidden: known[:, -hidden.shape[1] :]
    whole.loss_function = loss
    try:
        model.eval()
        with torch.no_grad(), no_cache(model):
            inputs = with_mask({"input_ids": ids, "labels": ids})
            output = model(**inputs, **without_cache(model))
    finally:
        model.train(was_training)
        vars(head).pop("forward")
        whole.loss_function = own
    is_plain = len(taken) == 1 and taken[0].dtype == known.dtype and torch.equal(taken[0], known)
    if not is_plain or output.loss is not marker:
        raise _refused("this model makes something else of its logits before the loss")
    return head


def _refused(why: str) -> UserError:
    return UserError("--set loss_tokens", why, "leave it out, or take a smaller --batch-size")
