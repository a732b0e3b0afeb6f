"""`run --find-lr`: which learning rate to train with, by trying a few for a few steps each.

Every candidate starts from the same weights and takes the same batches and, for zeroth-order methods, the
same perturbations, at a constant rate. What is compared is the loss on one fixed set of batches, evaluated
before and after without perturbation: held-out ones, or with `--eval-batches 0` those of the first training
steps. The losses of the steps themselves are no measure: a zeroth-order step's is that of a perturbed model
on a batch of its own, and differs more between batches than 40 steps change it.

The rule: of the candidates that stayed finite and lowered the loss, the smallest rate that reaches
`PLATEAU` of the greatest fall. While steps are small the fall grows with the rate, so the smallest on the
plateau is within a factor of two or so of the greatest useful one; the largest may be one that would
diverge in a longer run.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from engines.base import Batch
from engines.errors import NonFiniteLoss, UserError
from engines.files.reading import exists, is_folder
from engines.settings.given import GivenSettings
from engines.shapes import ModelShape
from harness.data.batches import Data
from harness.progress import Progress
from harness.records.job import Job
from harness.records.presets import LR_SEARCH, LR_SEARCH_STEPS
from harness.resolve import resolve_shape
from harness.training.run_folder import LR_FILE
from harness.training.train import data_told, set_up, user_errors
from profiles.documents import to_json, write_whole

FACTORS = (1 / 30, 1 / 10, 1 / 3, 1, 3, 10, 30)
"""Candidates over the rate in the middle."""
PLATEAU = 0.75
SCHEMA_VERSION = 1
"""Of find_lr.json. 1: first version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What one learning rate did."""

    learning_rate: float
    loss_before: float
    loss_after: float | None
    """`None` where the loss was no longer finite."""
    end_state: Literal["ok", "nan_loss"]
    steps: int
    """Steps that were taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LrSearchResult:
    """What `find_lr.json` holds."""

    engine: str
    measured_on: Literal["held-out", "training"]
    trials: tuple[Trial, ...]
    """Fewer than the grid has rates where the search did not come to its end."""
    recommended: float | None
    """`None` if no candidate lowered the loss, or not all were tried."""
    schema_version: int = SCHEMA_VERSION

    @property
    def flag(self) -> str | None:
        """What to add to the command line."""
        if self.recommended is None:
            return None
        return f"--set {self.engine}.learning_rate={self.recommended:g}"

    @property
    def at_the_edge(self) -> bool:
        """The best rate may lie outside of the grid."""
        rates = [trial.learning_rate for trial in self.trials]
        return self.recommended in (min(rates), max(rates))


def rates_around(middle: float) -> tuple[float, ...]:
    """The rates to try, ascending, as short decimals: what is printed is what was tried."""
    return tuple(float(f"{middle * factor:.2g}") for factor in FACTORS)


def recommended_rate(trials: Sequence[Trial]) -> float | None:
    """The rule of the module's docstring; `None` if no trial lowered the loss."""
    falls = {
        trial.learning_rate: trial.loss_before - trial.loss_after
        for trial in trials
        if trial.end_state == "ok" and trial.loss_after is not None
    }
    greatest = max(falls.values(), default=0.0)
    if greatest <= 0.0:
        return None
    return min(rate for rate, fall in falls.items() if fall >= PLATEAU * greatest)


def find_lr(
    job: Job, engine: str, settings: GivenSettings, out: Path | None, progress: Progress
) -> LrSearchResult:
    """Try the rates around the one in `settings`, or the engine's default. Writes `find_lr.json` into `out`,
    after each rate anew: what was tried is kept if a later one fails.

    Raises `UserError` if the loss is not finite before the first step, and for what keeps the engine from
    running at all.
    """
    typed = settings.typed
    if typed.learning_rate <= 0:
        raise UserError(
            "--find-lr", "the learning rate in the middle of the grid is 0", "leave it out of --set"
        )
    if out is not None and exists(out) and not is_folder(out):
        raise UserError(str(out), "is not a folder", "name another --out")
    shape = resolve_shape(job)
    data = data_told(job, shape, progress)
    evaluated = data.evaluation or _first_batches(data, job)
    trials: list[Trial] = []
    rates = rates_around(typed.learning_rate)
    for number, rate in enumerate(rates):
        progress.update("learning rates", number, len(rates), note=f"{rate:g}")
        # Warm-up and decay belong to the whole run; a few dozen steps would see little but the warm-up.
        candidate = replace(typed, learning_rate=rate, schedule="constant", warmup_steps=0)
        trials.append(_try(job, shape, engine, candidate, data, evaluated, progress))
        # Engines may be in reference cycles: without this the next would be set up beside the last.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        finding = LrSearchResult(
            engine=engine,
            measured_on="held-out" if data.evaluation else "training",
            trials=tuple(trials),
            recommended=recommended_rate(trials) if len(trials) == len(rates) else None,
        )
        if out is not None:
            write_whole(out / LR_FILE, to_json(finding))
    progress.update("learning rates", len(rates), len(rates), note="done")
    return finding


def _first_batches(data: Data, job: Job) -> list[Batch]:
    steps = range(-(-LR_SEARCH["eval_batches"] // job.accumulation))
    return [batch for step in steps for batch in data.step_batches(step)]


def _try(
    job: Job,
    shape: ModelShape,
    engine_name: str,
    settings: Any,
    data: Data,
    evaluated: Sequence[Batch],
    progress: Progress,
) -> Trial:
    """Holds on to nothing of the engine. Raises `UserError` as `find_lr` does."""
    steps, rate = min(job.steps, LR_SEARCH_STEPS), settings.learning_rate
    with (
        user_errors(engine_name, job, None),
        set_up(job, shape, engine_name, settings, progress, sample=data.step_batches(0)[0]) as (engine, _),
    ):
        before = engine.evaluate(evaluated).loss
        if not math.isfinite(before):
            raise NonFiniteLoss(f"the loss before training is {before}")
        after: float | None = None
        done = 0
        try:
            while done < steps and math.isfinite(engine.step(data.step_batches(done)).loss):
                done += 1
                progress.update(f"steps at {rate:g}", done, steps)
            if done == steps:
                after = engine.evaluate(evaluated).loss
        except NonFiniteLoss:
            pass  # of this rate; the others may do
    if after is not None and not math.isfinite(after):
        after = None
    return Trial(
        learning_rate=rate,
        loss_before=before,
        loss_after=after,
        end_state="nan_loss" if after is None else "ok",
        steps=done,
    )
