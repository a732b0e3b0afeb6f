"""LOZO: zeroth-order fine-tuning with low-rank noise (arXiv 2410.07698), on weights that are only read.

For each matrix W (m, n) of a linear layer in the blocks, in step t with its window w = t div nu:

    z = U_t V_w^T      U_t (m, r) ~ N(0, 1) anew in each step, V_w (n, r) ~ N(0, 1) for nu steps
    g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps)
    W <- W - lr g z / r                                    the estimate of the paper: E z z^T = r I

Within a window all updates of W have V_w in common, so their sum is A V_w^T / r with A = - sum lr g U_t, an
(m, r) accumulator in fp32. W itself stays as it was:

    y = x W^T + (x V_w) (A / r +- eps U_t)^T

one product with W for both sides, and rank-r products beside it. There is no perturbed copy of a matrix, no
noise of a matrix's size and nothing to send down. On the first visit of the next window A V_w^T / r is added
to W, rounded stochastically as all updates are, and W then goes down once.

Everything else (biases, norms, embeddings, the head, experts) takes Gaussian noise as in MeZO. In the blocks
its updates stay in the log until the window ends.

On the GPU, beside what MeZO has there: A of all blocks, and V, U and A in the weights' precision of one.

Deviations from the paper:
- The embeddings and the head have Gaussian noise of full rank, since they are on the GPU anyway.
- There is no momentum.
- A is rounded to the weights' precision where it is multiplied with (as V and eps U are), and not where it is
  added up.

A low-bit base (`engines.quantized.codec`) is written likewise when a window ends: the sum is rounded to its
grid, once in so many steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engines.base import Update
from engines.model.flat_layout import ModelLayout
from engines.noise import weight_pass
from engines.noise.tiles import Segment
from engines.noise.visits import Outputs, Visit
from engines.settings.zeroth_order import MezoSettings
from engines.zeroth_order.block_visit import Task, without_updates
from engines.zeroth_order.low_rank.low_rank_noise import LowRank
from engines.zeroth_order.low_rank.sides import MINUS, PLAIN


class Lozo(LowRank):
    """LOZO: all of a step's noise of a matrix is one U_t V_w^T."""

    suffix = "lozo"
    noise_together = False
    num_sides = 2

    def __init__(
        self,
        model: nn.Module,
        layout: ModelLayout,
        settings: MezoSettings,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        rank = settings.lozo_rank
        super().__init__(model, layout, settings, dtype, device, rank, 1 / rank)
        self.numbers = {f"{name}.lozo": matrix.u_number for name, matrix in self._by_name.items()}
        of_blocks = [
            block.places.u.segment([matrix.u_number for matrix in block.matrices], rank, block.start)
            for block in self._blocks
        ]
        self._segment = Segment(
            [number for each in of_blocks for number in each.numbers],
            [offset for each in of_blocks for offset in each.offsets],
            [count for each in of_blocks for count in each.counts],
            [False for each in of_blocks for _ in each.counts],
        )

    def add(self, module: nn.Module, x: Tensor, out: Tensor) -> None:
        matrix = self._by_module[module]
        inner = x @ matrix.v.t()
        inner = torch.cat((inner, inner), 1)
        for side, rows in self.spans(x.shape[0]):
            out[rows].addmm_(inner[rows], matrix.sides[side == MINUS])

    def begin(self, block: int, task: Task) -> None:
        self.take_side(task)
        here = self._blocks[block]
        if not here.matrices:
            return
        how = without_updates(task.how)
        for memory in (self._v, *self._sides):
            memory.zero_()
        self._make_v(block, self._window_of(task), how)
        for matrix in here.matrices:
            for side in matrix.sides[: 1 if self._now == PLAIN else 2]:
                torch.mul(matrix.accumulator, self._scale, out=side[: self._rank])
        if task.perturb:
            plus, minus = self._sides
            weight_pass.visit(plus, here.u_noise, how, Outputs(plus=plus, minus=minus))

    def update(self, how: Visit, of_examples: Sequence[Update] = ()) -> None:
        weight_pass.visit(self._flat, self._segment, how, Outputs(theta=self._flat))
