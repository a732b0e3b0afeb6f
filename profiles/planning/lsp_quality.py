"""What is known of how good models get in subspaces, from our own studies by name, size, unit and range.

A study says something of models of about its own size, and of no smaller subspace than it tried. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from profiles.planning.study_size import speaks_of


@dataclass(frozen=True, kw_only=True, slots=True)
class SubspaceStudy:
    """Training of all weights beside that in subspaces of several sizes."""

    name: str
    parameters: float
    unit: Literal["per byte", "per token", "accuracy", "Matthews correlation", "gain per byte"]
    found: Mapping[float, tuple[float, float, float]]
    """By d over a weight's smaller dimension: percent of perplexity above the other's mean, points of
    accuracy or correlation below it, or percent of its gain in loss. Mean, lowest and highest of three
    seeds."""
    source: str
    """File below the repository's root."""
    whose: str = "native's"
    """The result that stands beside it, as a sentence says it."""


PLAIN = (
    SubspaceStudy(
        name="Llama 4 x 256, WikiText-2",
        parameters=3.3e6,
        unit="per byte",
        found={0.25: (10.7, 10.3, 11.3), 0.5: (5.0, 4.3, 5.8), 0.75: (2.6, 2.5, 2.7), 1.0: (2.2, 2.1, 2.4)},
        source="tests/studies/quality/quality.json",
    ),
    SubspaceStudy(
        name="MiniLM-L6, SST-2",
        parameters=22.7e6,
        unit="accuracy",
        found={0.25: (1.3, 1.3, 1.3), 0.5: (0.4, -1.1, 1.1), 0.75: (0.3, 0.0, 0.6), 1.0: (0.2, -0.3, 0.5)},
        source="tests/studies/quality/quality.json",
    ),
    SubspaceStudy(
        name="SmolLM2-135M, SST-2 (template, bf16)",
        parameters=134.5e6,
        unit="accuracy",
        found={0.25: (0.3, -0.9, 2.2), 0.5: (-0.4, -0.7, 0.1), 0.75: (-0.4, -0.8, -0.1)},
        source="tests/studies/smollm2/README.md",
    ),
    SubspaceStudy(
        name="SmolLM2-135M, SST-2 (template, fp32, chosen by the loss)",
        parameters=134.5e6,
        unit="accuracy",
        found={0.5: (-0.1, -0.4, 0.2)},
        source="tests/studies/smollm2/README.md",
    ),
    SubspaceStudy(
        name="SmolLM2-135M, WikiText-2 (bf16)",
        parameters=134.5e6,
        unit="per token",
        found={0.5: (0.1, -0.2, 0.4)},
        source="tests/studies/smollm2/README.md",
    ),
    # Beside fp32 masters: on these native in bf16 lost small updates, or ended at the edge of its rates.
    SubspaceStudy(
        name="SmolLM2-135M, instruction records (bf16)",
        parameters=134.5e6,
        unit="per token",
        found={0.5: (-0.1, -0.9, 0.4)},
        source="tests/studies/smollm2/README.md",
        whose="exact-offload's",
    ),
    SubspaceStudy(
        name="SmolLM2-135M, MRPC (template, bf16)",
        parameters=134.5e6,
        unit="accuracy",
        found={0.5: (2.8, 1.7, 3.6)},
        source="tests/studies/smollm2/README.md",
        whose="exact-offload's",
    ),
    SubspaceStudy(
        name="SmolLM2-135M, CoLA (template, bf16)",
        parameters=134.5e6,
        unit="Matthews correlation",
        found={0.5: (6.2, 1.8, 13.3)},
        source="tests/studies/smollm2/README.md",
        whose="exact-offload's",
    ),
)
RESIDUAL = (
    SubspaceStudy(
        name="a decoder of 2 x 128, WikiText-2 and then instruction records",
        parameters=0.46e6,
        unit="gain per byte",
        found={0.25: (98.6, 98.4, 98.8), 0.5: (99.2, 98.6, 99.9)},
        source="tests/studies/subspaces/subspace.json",
    ),
    SubspaceStudy(
        name="SmolLM2-135M, SST-2 (template, bf16, residual=1)",
        parameters=134.5e6,
        unit="accuracy",
        found={0.25: (-0.6, -0.9, -0.3)},
        source="tests/studies/smollm2/README.md",
    ),
)


def quality_reasons(share: float, parameters: int, *, residual: bool) -> tuple[str, ...]:
    """Sentences; `share` is the smallest d over a weight's smaller dimension."""
    studies: tuple[SubspaceStudy, ...] = RESIDUAL if residual else PLAIN
    sizes = [each for each in studies[0].found if each <= share + 1e-9]
    if not sizes:
        least = min(studies[0].found)
        return (f"quality: d is {share:.2f} of n; below {least:g} n nothing was studied: not known",)
    known = max(sizes)
    told = [f"quality: d is {share:.2f} of n, and d = {known:g} n was studied, over three seeds"]
    studies = tuple(each for each in studies if known in each.found)
    for study in studies:
        numbers = study.found[known]
        is_turned = study.unit != "gain per byte" and numbers[0] < 0
        if is_turned:
            numbers = (-numbers[0], -numbers[2], -numbers[1])
        middle, low, high = (f"{each:g}" for each in numbers)
        on = f"quality: on {study.name} ({_millions(study.parameters)} parameters)"
        if study.unit in ("per byte", "per token"):
            side = f"{'below' if is_turned else 'above'} {study.whose} perplexity {study.unit}"
            told.append(f"{on} it ended {middle} % ({low} to {high}) {side}")
        elif study.unit in ("accuracy", "Matthews correlation"):
            side = f"{'above' if is_turned else 'below'} {study.whose} {study.unit}"
            told.append(f"{on} it ended {middle} points ({low} to {high}) {side}")
        else:
            told.append(
                f"{on} with a residual it kept {middle} % ({low} to {high}) of native's gain per byte"
            )
    if not any(speaks_of(each.parameters, parameters) for each in studies):
        told.append(f"quality: of {_millions(parameters)} parameters it is not known")
    return tuple(told)


def _millions(parameters: float) -> str:
    return f"{parameters / 1e6:,.3g} M" if parameters < 1e9 else f"{parameters / 1e9:.3g} B"
