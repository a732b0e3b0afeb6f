"""What is known of how much a zeroth-order step learns, from our own studies by name, size and unit.

A study says something of models of about its own size. For others the answer is 'not known'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from profiles.planning.study_size import speaks_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    name: str
    parameters: float
    unit: Literal["per byte", "per token", "accuracy", "Matthews correlation"]
    finding: str
    source: str
    """File below the repository's root."""


ZEROTH_ORDER: tuple[Study, ...] = (
    Study(
        name="a decoder of 2 layers x 96 on WikiText-2",
        parameters=0.3e6,
        unit="per byte",
        finding=(
            "after 300 steps of AdamW had brought the held-out loss per byte to 2.022, 1,000 steps of two "
            "forward passes brought it to 2.009, and more probes a step came to the same for the same passes"
        ),
        source="tests/studies/estimators/estimators.json",
    ),
    Study(
        name="SmolLM2-135M on SST-2 by a template",
        parameters=134.5e6,
        unit="accuracy",
        finding=(
            "244 steps of 16 rows brought accuracy on test data from 51.9 % to 69.8 % (68.1 to 70.2 %, three "
            "seeds), 81 steps of eight queries to 69.4 % (69.2 to 70.2 %), and AdamW in 244 to 89.9 % (89.7 "
            "to 90.2 %)"
        ),
        source="tests/studies/smollm2/README.md",
    ),
    Study(
        name="SmolLM2-135M on MRPC by a template",
        parameters=134.5e6,
        unit="accuracy",
        finding=(
            "244 steps of 16 rows brought accuracy on test data from 47.5 % to 66.6 % (66.4 to 66.6 %, three "
            "seeds), as good as the majority class (66.5 %), and AdamW in 244 to 75.7 % (73.4 to 76.0 %)"
        ),
        source="tests/studies/smollm2/README.md",
    ),
    Study(
        name="SmolLM2-135M on CoLA by a template",
        parameters=134.5e6,
        unit="Matthews correlation",
        finding=(
            "260 steps of 16 rows left it at 0.01 (0.01 to 0.01, three seeds) on test data, and AdamW in 260 "
            "brought it to 0.23 (0.23 to 0.25)"
        ),
        source="tests/studies/smollm2/README.md",
    ),
)


def format_size(parameters: float) -> str:
    """As people say it: 0.3 M, 125 M, 12.9 B."""
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def known_of_zeroth_order(parameters: int) -> str:
    """One sentence on what a step of these methods is worth for a model of so many parameters."""
    near = [each for each in ZEROTH_ORDER if speaks_of(each.parameters, parameters)]
    if near:
        findings = "; ".join(f"{each.name}, {each.unit}: {each.finding} [{each.source}]" for each in near)
        return f"What a step learns at this size: {findings}."
    studied = "; ".join(
        f"{each.name}, {format_size(each.parameters)} parameters, {each.unit}: {each.finding}"
        for each in ZEROTH_ORDER
    )
    return (
        f"How many zeroth-order steps equal one with gradients is not known at {format_size(parameters)} "
        f"parameters. Studied: {studied}."
    )
