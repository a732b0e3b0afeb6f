"""Settings of MeZO in memory: all that is chosen is how rarely a low-bit base is rounded. No torch."""

from __future__ import annotations

from engines.settings.given import GivenSettings
from profiles.planning.context import Choice, PlanningContext, SettingChange
from profiles.planning.fold_every import fold_for_loss, warning_on_given

WAYS_OUT = (
    SettingChange(
        values={"base": "lossless"},
        quality="the same weights and losses: bf16 matrices of the blocks in three quarters of their bytes",
    ),
    SettingChange(
        values={"base": "int8"},
        quality=(
            "the blocks' matrices in 8 bits: at 0.3 M parameters no loss that could be measured "
            "(engines/EXPERIMENTS.md, 'A low-bit base'), at other sizes not known"
        ),
    ),
    SettingChange(
        values={"base": "int8", "train": "lora"},
        quality="adapters alone are trained, beside matrices in 8 bits",
    ),
    SettingChange(
        values={"base": "int4", "train": "lora"},
        quality="adapters alone are trained, beside matrices in 4 bits",
    ),
)


def choose(context: PlanningContext, given: GivenSettings) -> Choice:
    """`fold_every`, for the loss's sake; of one that is given, what it may cost the loss."""
    if "fold_every" in given:
        warning = warning_on_given(given.typed)
        return Choice(given, () if warning is None else (warning,))
    best = fold_for_loss(given.typed)
    return Choice(given) if best is None else Choice(given.completed(fold_every=best[0]), (best[1],))
