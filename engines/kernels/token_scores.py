"""What the logits of each token say, gathered a chunk of the vocabulary at a time: the negative
log-likelihood of its label, and the likeliest token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engines.kernels.triton_launch import has_c_compiler, has_triton

WIDE_LOGITS = 1 << 20
"""That are in fp32 at once without Triton, or those of one token: 4 MiB, which stay in a CPU's cache (64 MiB
take 2.5 times as long in bf16)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Of one batch: the negative log-likelihoods, (n,) fp32, and the likeliest tokens, (n,) int64."""

    losses: Tensor
    predicted: Tensor

    @property
    def loss_sum(self) -> Tensor:
        """() fp64."""
        return self.losses.sum(dtype=torch.float64)


class RunningScores:
    """Of each token, (count,): the largest logit so far with its place, the sum of exponentials under it, and
    the label's logit."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.largest = torch.full((count,), -torch.inf, device=device)
        self.where = torch.zeros((count,), dtype=torch.int64, device=device)
        self.sums = torch.zeros((count,), device=device)
        self.target = torch.full((count,), -torch.inf, device=device)
        self._by_kernel = device.type == "cuda" and has_triton() and has_c_compiler()

    def add(self, tokens: slice, logits: Tensor, labels: Tensor, first: int) -> None:
        """Logits (at least as many as tokens, rows) of the vocabulary from `first` on. `labels` are of all
        tokens, (count,) int64; one below 0 is no token's, and its loss infinite."""
        found = [each[tokens] for each in (self.largest, self.where, self.sums, self.target)]
        labels = labels[tokens]
        if self._by_kernel:
            from engines.kernels import token_scores_kernels

            largest, where, sums, target = found
            token_scores_kernels.gather(logits, labels, first, largest, where, sums, target)
            return
        together = max(1, WIDE_LOGITS // logits.shape[1])
        for begin in range(0, labels.shape[0], together):
            part = slice(begin, begin + together)
            _gather(logits[part], labels[part], first, *(each[part] for each in found))

    def scores(self) -> Scores:
        return Scores(losses=self.sums.log() + self.largest - self.target, predicted=self.where)


def _gather(
    logits: Tensor, labels: Tensor, first: int, largest: Tensor, where: Tensor, sums: Tensor, target: Tensor
) -> None:
    """`token_scores_kernels.gather` by torch's operations."""
    values = logits[: largest.shape[0]].float()
    place = labels - first
    inside = (place >= 0) & (place < values.shape[1])
    found = values.gather(1, place.clamp(0, values.shape[1] - 1).unsqueeze(1)).squeeze(1)
    target.copy_(torch.where(inside, found, target))
    best, best_where = values.max(1)
    where.copy_(torch.where(best > largest, best_where + first, where))
    overall = torch.maximum(best, largest)
    sums.mul_((largest - overall).exp()).add_((values - overall.unsqueeze(1)).exp_().sum(1))
    largest.copy_(overall)
