"""GaLore (2403.03507) by galore-torch: AdamW on gradients projected to a low rank, all weights trained.

    R = P^T G   (r x n)      P: left singular vectors of G, anew every `update_proj_gap` steps (eq. 12)
    W <- W - eta scale P adam(R)                                                    (algorithm 2)

P is on the left for a matrix with fewer rows than columns, else on the right. Only the blocks' matrices are
projected; embeddings, head, norms and biases get plain AdamW (galore-torch's own).

On the GPU: weights and gradients in the workload's precision, moments of r x n and the projections, in the
gradients' precision; a singular value decomposition in fp32 while projections are made. No fp32 master copy.
On the host: the batches.

Deviations from the paper's best case: no 8-bit moments and no update layer by layer, so gradients are whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines import why_not_installed
from engines.base import Blueprint
from engines.errors import NotAvailable
from engines.first_order.adamw import parameter_groups, weights_dtype
from engines.first_order.looped_engine import LoopedEngine
from engines.model.blocks import find_blocks, materialize
from engines.model.model_check import check_repeats
from engines.settings.libraries import GaloreSettings

_PROJECTION = "projection"


class Galore(LoopedEngine[GaloreSettings]):
    """galore-torch's GaLoreAdamW. Implements `engines.base.Engine`."""

    name = "galore"

    def setup(self, blueprint: Blueprint) -> None:
        """Fill the model on the device. Raises `NotAvailable` without galore-torch; `UserError` for fp16."""
        if (missing := why_not_installed(self.name)) is not None:
            raise NotAvailable(missing)
        dtype = weights_dtype(self.context, self.name)
        check_repeats(blueprint, self.context)
        from galore_torch import GaLoreAdamW

        model = materialize(blueprint, self.loop.device, dtype)
        _, blocks = find_blocks(model)
        projected = [each for each in blocks.parameters() if each.dim() == 2]
        taken = {id(each) for each in projected}
        rest = [each for each in model.parameters() if id(each) not in taken]
        settings = self.settings
        group = {
            "params": projected, "weight_decay": settings.weight_decay, "rank": settings.rank,
            "update_proj_gap": settings.update_proj_gap, "scale": settings.scale, "proj_type": "std",
        }  # fmt: skip
        self._optimizer: Any = GaLoreAdamW(
            [group, *parameter_groups(rest, settings.weight_decay)],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.adam_eps,
            no_deprecation_warning=True,
        )
        self.loop.begin(model, self._optimizer)

    def save(self, folder: Path) -> None:
        """Weights, moments, projections, step and random state."""
        projectors = {}
        for parameter, state in self._optimizer.state.items():
            if "projector" in state:
                projectors[parameter] = state.pop("projector")
                state[_PROJECTION] = projectors[parameter].ortho_matrix
        try:
            self.loop.save(folder)
        finally:
            for parameter, projector in projectors.items():
                del self._optimizer.state[parameter][_PROJECTION]
                self._optimizer.state[parameter]["projector"] = projector

    def load(self, folder: Path) -> None:
        """Continue from `save`. Raises `UserError` if `folder` is not a checkpoint of this model."""
        from galore_torch.galore_projector import GaLoreProjector

        self.loop.load(folder)
        for state in self._optimizer.state.values():
            if _PROJECTION in state:
                projector = GaLoreProjector(
                    self.settings.rank, update_proj_gap=self.settings.update_proj_gap,
                    scale=self.settings.scale, proj_type="std",
                )  # fmt: skip
                projector.ortho_matrix = state.pop(_PROJECTION)
                state["projector"] = projector
