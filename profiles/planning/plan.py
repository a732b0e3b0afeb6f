"""A plan: how one engine would run a job on a machine, and what that is predicted to take. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo

from engines.settings.given import Documented, GivenSettings, Value
from engines.settings.parse import settings_of_document
from profiles.documents import read_document, to_json, write_whole

PLANS_VERSION = 1
"""Schema version of plans.json. 1: first version (0.1.0)."""


def _read_settings(values: dict[str, Value], info: ValidationInfo) -> GivenSettings:
    return settings_of_document(info.data.get("engine", ""), values)


EngineSettings = Annotated[GivenSettings, Documented(dict[str, Value], _read_settings)]
"""A field of a document, after one that names the `engine`: its settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Never mixed with measured numbers. `None`: the machine profile lacks what it would rest on."""

    step_s_low: float | None
    step_s: float | None
    step_s_high: float | None
    peak_gpu_bytes: int
    """Tensors, as torch counts them; CUDA's own context comes on top. 0 without a GPU."""
    peak_host_bytes: int
    pinned_bytes: int
    h2d_bytes: int
    d2h_bytes: int
    bottleneck: str | None
    """`gpu`, `h2d`, `d2h`, `cpu`, `disk`, `host memory`, `gpu to gpu` or `network`; `compute` and `copies`
    where there is no GPU."""
    basis: str
    """One sentence: what the numbers rest on."""
    disk_read_bytes: int = 0
    forwards: float | None = None
    """Forward passes that each micro-batch takes."""
    compile_s: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None
    """What compiling takes once, in the first steps, beside them; `None`: nothing is compiled, or a plan of
    before. A job of few steps pays much of it in each."""
    rare_s: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None
    """What one step in `rare_every` takes beside, the first step among them; `None`: all steps are alike, or
    nobody can tell, or a plan of before."""
    rare_every: Annotated[int | None, Field(exclude_if=lambda value: value is None)] = None
    reserved_gpu_bytes: Annotated[int | None, Field(exclude_if=lambda value: value is None)] = None
    """What torch reserves for those tensors, as it counts it; `None`: without a GPU, or a plan of before."""
    gpu_bytes_beside: Annotated[int | None, Field(exclude_if=lambda value: value is None)] = None
    """What the process takes of the GPU beside that: CUDA's context, its graphs, tables of pinned pages."""
    needed_gpu_bytes: Annotated[int | None, Field(exclude_if=lambda value: value is None)] = None
    """GPU memory by which it is decided whether the plan fits: what torch cannot do without, with what may be
    missing of it, and what is beside; `None`: without a GPU, or a plan of before."""
    floor_s: float | None = None
    """What no engine of this method can undercut with these settings on this machine: the largest of four
    times, each with its resource alone. Reading from disk; uploads at the rate of a link that does nothing
    else; matrix products and attention of the forward and backward passes at the rate of one large product;
    Adam on the CPU. Nothing waits, and noise, optimizers on the GPU, elementwise work, launches and downloads
    take no time."""

    def rare_job_s(self, steps: int) -> float:
        """What is done now and then takes so much in a job of `steps`."""
        return rare_work_s(self.rare_s, self.rare_every, steps)


def rare_work_s(rare_s: float | None, every: int | None, steps: float) -> float:
    """Seconds in a job of `steps` of which the first, and one in `every` after it, takes `rare_s` more."""
    return 0.0 if rare_s is None or every is None else math.ceil(steps / every) * rare_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    engine: str
    settings: EngineSettings
    """What this plan sets; the rest are the engine's defaults."""
    fits: bool
    why_not: str | None
    """Why it does not fit, with the bytes that are missing."""
    available: bool = True
    """False: the engine cannot do this job on such a machine at all; `why_not` says why."""
    prediction: Prediction
    reasons: tuple[str, ...] = field(default=())
    """Why these settings."""
    verify_command: str = ""
    """The command that measures what is predicted here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plans:
    plans: tuple[Plan, ...]
    schema_version: int = PLANS_VERSION


def load_plans(path: Path) -> tuple[Plan, ...]:
    """Raises `UserError` if `path` is not a list of plans that this version reads."""
    return read_document(path, _Plans, PLANS_VERSION, "list of plans").plans


def save_plans(plans: Sequence[Plan], path: Path) -> None:
    """Whole or not at all. Raises `UserError` if `path` cannot be written."""
    write_whole(path, to_json(_Plans(plans=tuple(plans))))
