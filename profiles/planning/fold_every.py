"""How rarely updates are rounded to the grid of a low-bit base: the loss decides, not the speed. No torch.

What is known of losses is in engines/EXPERIMENTS.md, 'A low-bit base'. The choice is one for each base, so
that an engine and its twin compute the same on every machine.
"""

from __future__ import annotations

from engines.settings.zeroth_order import MOST_DEFERRED, Base, MezoSettings

WANTED: dict[Base, int] = {"int8": 8, "fp8": 16, "int4": 16}
"""Steps between two roundings. 8 with int8 cost no loss that could be measured, and 1 a quarter of what was
learned; fp8 is the coarser grid. No number is enough for int4."""


def fold_for_loss(settings: MezoSettings) -> tuple[int, str] | None:
    """`fold_every` and why, or `None` where no trained matrix is rounded to a grid."""
    if not settings.trains_quantized:
        return None
    wanted, most = WANTED[settings.base], MOST_DEFERRED // settings.queries
    if settings.base == "int4":
        why = (
            "rare roundings lose less, but with int4 even they undo what is learned; "
            "train=lora only reads the base"
        )
    else:
        why = f"each rounding to the {settings.base} grid adds noise, so it is rare for the loss's sake"
    if most < wanted:
        why += f"; more than {most} steps of {settings.queries} queries the log does not hold"
    return min(wanted, most), f"fold_every={min(wanted, most)}: {why}"


def warning_on_given(settings: MezoSettings) -> str | None:
    """What a `fold_every` that the user has set costs the loss; `None`: nothing that is known."""
    best = fold_for_loss(settings)
    if best is None or (settings.fold_every >= best[0] and settings.base != "int4"):
        return None
    return f"as set, it may lose what is learned: {best[1]}"
