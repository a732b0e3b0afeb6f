"""One direction per example: GRZO's losses and update (arXiv 2606.02857), with directions of rank one.

In step t with its window w = t div nu, of B examples with losses l_1 to l_B, whose mean is the step's loss,
and for each matrix W (m, n) of a linear layer in the blocks:

    z_i = r_i s_i^T           r_i (m,) signs, anew in each step; s_i (n,) signs, for nu steps
    delta_i = (l_i(theta + eps z_i) - l_i(theta - eps z_i)) / 2
    a_i = delta_i / std_j(delta_j)                                      with B - 1
    W <- W - lr / (2 eps B) sum_i a_i z_i

The paper has z_i = U * (r_i s_i^T), element by element, with one Gaussian U (m, n) for all examples (formulae
of its README and `estimation_side=two_norm` of optimizers/flipout.py, LiyanTan111/GRZO-public 2eb8021; the
paper itself was not at hand). Here U is ones: E z_i z_i^T = I as there, no noise has the size of a matrix,
and there is no second product. All examples go through the model at once, each with its own direction, so a
step takes the two forward passes of `spsa`.

Within a window all updates of example i's place in the batch have s_i in common: their sum is A_i s_i^T, with
A (B, m) in fp32. W itself stays as it was, and row x of example i gets

    y = x W^T + (x S^T) A +- eps (x s_i) r_i                            S (B, n) the rows s_i

one product with W for both sides of all examples, and two of rank B beside it, taken as one of twice the
rank: x S^T beside itself, in which only the column of the row's own example is left, with the sign of its
side. On the first visit of the next window A^T S is added to W (`LowRank.fold`).

Everything else (biases, norms, embeddings, the head) has one z of signs for all examples, and takes the mean
of their a_i: the formula above with z_i = z, the estimate of `spsa` but for its length. In the blocks such
updates stay in the log until the window ends.

On the GPU, beside what MeZO has there: A of all blocks, and for one of them S, A and eps r in the weights'
precision, and r in fp32.

Deviations from the paper and its code, beside those above:
- s_i is drawn anew every nu steps (`grzo_window`), as LOZO's V is; with 1 in every step, as published.
- An example's loss is B / N times the sum over its labelled tokens, N being those of its whole micro-batch
  and B the examples there, so that the mean is the loss that every other estimator lowers. The code takes the
  mean over the example's tokens, which is the same where all have as many.
- Nothing is added to the deviation that is divided by. Where it is 0 the step is 0.
- The code leaves biases as they are, and embeddings have a sign for each token of each example.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from ctypes import c_float
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Update
from engines.errors import UserError
from engines.model.flat_layout import ModelLayout
from engines.noise import weight_pass
from engines.noise.visits import Outputs, Visit
from engines.settings.zeroth_order import MezoSettings
from engines.zeroth_order.block_visit import Task, without_updates
from engines.zeroth_order.low_rank.low_rank_noise import LowRank
from engines.zeroth_order.low_rank.sides import PLAIN


class ExampleLosses:
    """Losses of each example of models that compute theirs themselves, from the logits they hand out.

    The first time the mean of what is found is compared with the model's own loss.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._checked = False

    def of(self, output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """(examples,) fp64 with the mean `output.loss`. Raises `UserError` where they cannot be told."""
        logits, labels = getattr(output, "logits", None), inputs.get("labels")
        if logits is None or labels is None or labels.is_floating_point():
            raise self._refusal()
        if labels.dim() == 2:
            logits, labels = logits[:, :-1], labels[:, 1:]
        kept = labels != -100
        classes = logits.shape[-1]
        each = nn.functional.cross_entropy(
            logits.reshape(-1, classes).float(), labels.reshape(-1), ignore_index=-100, reduction="none"
        )
        sums = each.double().view(labels.shape[0], -1).sum(1)
        found: Tensor = sums * (labels.shape[0] / kept.sum())
        if not self._checked:
            self._checked = True
            ours, own = float(found.mean()), float(output.loss)
            if not abs(ours - own) <= 1e-2 * abs(own) + 1e-4 and math.isfinite(own):
                raise self._refusal()
        return found

    def _refusal(self) -> UserError:
        return UserError(
            self._model,
            "has no loss that is the mean cross-entropy of its labels: examples cannot be told apart",
            "use estimator=spsa",
        )


class ExampleNoise(LowRank):
    """A direction for each example of a step on `examples`."""

    suffix = "grzo"
    noise_together = True
    num_sides = 1

    def __init__(
        self,
        model: nn.Module,
        layout: ModelLayout,
        settings: MezoSettings,
        dtype: torch.dtype,
        device: torch.device,
        examples: int,
    ) -> None:
        super().__init__(model, layout, settings, dtype, device, examples, 1.0)
        most = max(block.places.u.size for block in self._blocks)
        self._nothing, self._r = (torch.zeros(most, dtype=torch.float32, device=device) for _ in range(2))
        self._own: dict[tuple[int, int, int], Tensor] = {}
        self._masks: dict[int, Tensor] = {}
        """By the number of sequences, both sides together: (sequences, examples) of the weights' dtype. 1 or
        -1 in the column of the sequence's own example, by its side; else 0.

        HAZARD: graphs of the blocks know them by address, so they are filled and never replaced."""
        self._held: tuple[int, int, int] | None = None
        self._sequences = 0

    def hold(self, examples: range, sequences: int) -> None:
        """What blocks run next are so many sequences, both sides together, of those examples of the step. An
        example's sequences lie one after the other."""
        if examples.stop > self._rank or sequences % (2 * len(examples)):
            raise ValueError(f"{sequences} sequences of examples {examples} in a step of {self._rank}")
        self._sequences = sequences
        wanted = (examples.start, examples.stop, sequences)
        if self._held == wanted:
            return
        if wanted not in self._own:
            each = torch.arange(self._rank, device="cpu")
            side = sequences // 2
            of = torch.arange(side) // (side // len(examples)) + examples.start
            own = (of.unsqueeze(1) == each).to(self._v.dtype)
            self._own[wanted] = torch.cat((own, -own)).to(self._v.device)
        if sequences not in self._masks:
            self._masks[sequences] = torch.zeros_like(self._own[wanted])
        self._masks[sequences].copy_(self._own[wanted])
        self._held = wanted

    def add(self, module: nn.Module, x: Tensor, out: Tensor) -> None:
        matrix = self._by_module[module]
        inner = x @ matrix.v.t()
        if self._now == PLAIN:
            out.addmm_(inner, matrix.sides[0][: self._rank])
            return
        mask = self._masks[self._sequences]
        if self._now is not None:  # one side by itself
            mask = mask.chunk(2)[self._now - 1]
        own = (inner.view(mask.shape[0], -1, self._rank) * mask.unsqueeze(1)).view(inner.shape)
        out.addmm_(torch.cat((inner, own), 1), matrix.sides[0])

    def begin(self, block: int, task: Task) -> None:
        self.take_side(task)
        here = self._blocks[block]
        if not here.matrices:
            return
        how = without_updates(task.how)
        self._v.zero_()
        self._make_v(block, self._window_of(task), how)
        place = here.places.both
        rows = self._sides[0][: place.size].view(place.rows, place.width)
        rows[: self._rank].copy_(self._accumulators(block))
        if task.perturb:
            rows[self._rank :].zero_()
            weight_pass.visit(self._sides[0], here.u_noise, how, Outputs(plus=self._sides[0]))

    def update(self, how: Visit, of_examples: Sequence[Update] = ()) -> None:
        """A_i -= lr g_i / B r_i, for the updates of all examples of a step, or of none."""
        if not of_examples:
            return
        rates = [c_float(c_float(each.coefficient).value * each.learning_rate).value for each in of_examples]
        lengths = torch.tensor(rates, dtype=torch.float32).unsqueeze(1).to(self._flat.device)
        drawn = replace(without_updates(how), step=of_examples[0].step, eps=1.0)
        for block in self.blocks:
            segment = self._blocks[block].places.u.segment(
                [self._blocks[block].matrices[0].u_number], self._rank
            )
            weight_pass.visit(self._nothing, segment, drawn, Outputs(plus=self._r))
            accumulators = self._accumulators(block)
            signs = self._r[: accumulators.numel()].view(accumulators.shape)
            accumulators.sub_(signs.mul_(lengths))

    def _accumulators(self, block: int) -> Tensor:
        """(examples, outputs of all matrices) fp32, contiguous."""
        place, start = self._blocks[block].places.u, self._blocks[block].start
        return self._flat[start : start + place.size].view(place.rows, place.width)
