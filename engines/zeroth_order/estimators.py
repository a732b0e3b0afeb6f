"""What a zeroth-order step asks of the model, and the update that the answers call for. Imports no torch.

All estimate a gradient from losses at perturbed weights, and all updates are sums of g_i z_i over the
queries of a step, so the engines differ in nothing but this file:

    spsa   g_i = (loss(theta + eps z_i) - loss(theta - eps z_i)) / (2 eps),   i = 1 .. q
           Spall, IEEE Trans. Automatic Control 37(3), 1992; with q = 1 and normals it is MeZO (arXiv
           2305.17333, algorithm 1), with q > 1 its n-SPSA (definition 1 there). 2 q forward passes.
    1.5-spsa   g_i = (loss(theta + eps z_i) - loss(theta - eps z_i)) / (2 eps c_i),   i = 1 .. q,
           c_i = max(|loss(theta + eps z_i) - 2 loss(theta) + loss(theta - eps z_i)|^alpha / eps^(2 alpha),
           lambda), the curvature along z_i, which shortens steps where the loss bends: 1.5-SPSA, arXiv
           2609.38095, which takes signs, some 40 queries, alpha 0.1, lambda 1 and eps = lr. 2 q + 1 forward
           passes.
    fzoo   g_i = (loss(theta + eps z_i) - loss(theta)) / (eps sigma), z_i of signs, sigma being the standard
           deviation of the q perturbed losses (with q - 1): FZOO, arXiv 2506.09034. q + 1 forward passes.
           A normalised step: its length hardly depends on the gradient's. Learning rates are therefore in
           units of their own, about eps times those of normalised SGD.

    lozo   as spsa, z_i being of rank r on the matrices of the blocks
           (`engines.zeroth_order.low_rank.lozo`): LOZO, arXiv 2410.07698.

    grzo   g_i = delta_i / (2 eps sigma), delta_i = (loss_i(theta + eps z_i) - loss_i(theta - eps z_i)) / 2
           of example i with a direction of its own (`engines.zeroth_order.low_rank.example_noise`), sigma
           being the standard deviation of the delta_i (with B - 1): GRZO, arXiv 2606.02857. 2 forward passes
           for B directions. Normalised as FZOO's step is.

    theta <- theta - lr (mean of the g_i z_i + wd theta)

The noise z_i of step t has the number t q + i where that of a single query has the number t.

Deviations from the papers: where sigma is 0, since what is compared is one number, the step is 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from engines.base import Update
from engines.first_order.lr_schedule import learning_rate_at
from engines.settings.zeroth_order import MezoSettings


class Side(Enum):
    """Which weights a forward pass computes with."""

    PLUS = 1
    MINUS = -1
    PLAIN = 0


@dataclass(frozen=True, slots=True)
class Probe:
    """Forward passes that go through the blocks in one batch, one after the other or both at once."""

    draw: int
    """Number of the noise."""
    sides: tuple[Side, ...]
    """(PLUS, MINUS), (PLUS,) or (PLAIN,)."""


def probes(settings: MezoSettings, step: int) -> tuple[Probe, ...]:
    """What is asked in `step`, in the order in which losses are handed to `next_updates`."""
    draws = range(step * settings.queries, (step + 1) * settings.queries)
    sides = (Side.PLUS,) if settings.is_one_sided else (Side.PLUS, Side.MINUS)
    clean = (Probe(draws[0], (Side.PLAIN,)),) if settings.has_clean_pass else ()
    return (*clean, *(Probe(draw, sides) for draw in draws))


def next_updates(
    step: int, settings: MezoSettings, total_steps: int, losses: Sequence[float]
) -> tuple[Update, ...]:
    """The update of `step`, one entry for each query, or for each example of `grzo`.

    `losses`: one for each side of each probe, or for each side of each example. Weight decay acts once, with
    the first entry.
    """
    if settings.estimator == "fzoo":
        plain, *moved = losses
        sigma = statistics.stdev(moved)
        gradients = [(loss - plain) / (settings.eps * sigma) if sigma else 0.0 for loss in moved]
    else:
        first = int(settings.has_clean_pass)
        pairs = list(zip(losses[first::2], losses[first + 1 :: 2], strict=True))
        gradients = [(plus - minus) / (2 * settings.eps) for plus, minus in pairs]
        if settings.has_clean_pass:
            bends = [abs(plus - 2 * losses[0] + minus) / settings.eps**2 for plus, minus in pairs]
            gradients = [
                gradient / max(bend**settings.curvature_alpha, settings.curvature_floor)
                for gradient, bend in zip(gradients, bends, strict=True)
            ]
    if settings.estimator == "grzo":
        # delta_i is eps times the slope, and so is their deviation.
        sigma = settings.eps * statistics.stdev(gradients)
        gradients = [slope / (2 * sigma) if sigma else 0.0 for slope in gradients]
    rate = learning_rate_at(step, settings, total_steps)
    return tuple(
        Update(
            step=step,
            learning_rate=rate,
            projected_gradient=gradient,
            weight_decay=settings.weight_decay if query == 0 else 0.0,
            query=query,
            queries=len(gradients),
        )
        for query, gradient in enumerate(gradients)
    )


def of_all_examples(updates: Sequence[Update]) -> Update:
    """What the updates of a step's examples are to weights that have one direction for all of them."""
    first = updates[0]
    mean = sum(update.projected_gradient for update in updates) / len(updates)
    return replace(first, projected_gradient=mean, query=0, queries=1)
