"""A recommendation as configurations: of the user's own program where it has the method, and as our job.

Imports no torch.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from engines import entry
from engines.errors import UserError
from engines.files.reading import exists
from harness.data.examples import examples_of
from harness.models.configs import NAMED_SHAPES, load_config
from harness.recipes.axolotl import axolotl_recipe
from harness.recipes.chosen import ChosenMethod, Recipe, accumulation_of_each, reads
from harness.recipes.deepspeed import deepspeed_recipe
from harness.recipes.llamafactory import llamafactory_recipe
from harness.recipes.trl import trl_recipe
from harness.recommendation import Recommendation
from harness.records.job import JOB_FILE, DataKind, Job, save_job
from profiles.documents import write_whole
from profiles.planning.plan import Plan

Stack = Literal["trl", "axolotl", "llamafactory", "deepspeed"]

STACKS: dict[Stack, Callable[[ChosenMethod], Recipe | None]] = {
    "trl": trl_recipe,
    "axolotl": axolotl_recipe,
    "llamafactory": llamafactory_recipe,
    "deepspeed": deepspeed_recipe,
}


class Written(NamedTuple):
    folder: Path
    lines: tuple[str, ...]
    """How to run what was written, and why something was not."""


def write_recipe(answer: Recommendation, stack: Stack, folder: Path) -> Written:
    """Of the recommended method. Raises `UserError` where none fits, or a file cannot be written."""
    best = answer.verdict.best
    if best is None:
        raise UserError(
            "--recipe", "no method fits, so there is nothing to write", "see what it says to change"
        )
    plan = next(plan for plan in answer.plans if plan.engine == best)
    job = _job(answer, plan)
    save_job(job, folder / JOB_FILE)
    lines = [f"here: lspzo-bench run --engine {best} --job {shlex.quote(str(folder / JOB_FILE))}"]
    lines += _stand_ins(job)
    recipe = recipe_of(answer, plan, stack, folder)
    if recipe is None:
        lines.append(_why_none(answer, plan, stack))
    else:
        for name, text in recipe.files.items():
            write_whole(folder / name, text)
        lines.append(f"{stack}, in {folder}: {recipe.command}")
        lines += _of_processes(job, stack)
        lines += _of_data(job, stack)
    return Written(folder, tuple(lines))


def _of_processes(job: Job, stack: Stack) -> list[str]:
    """Where there are several: how their programs count micro-batches."""
    processes, each = job.limits.ranks, accumulation_of_each(job)
    if processes == 1:
        return []
    where = f", {job.limits.gpus} on each of {job.limits.nodes} machines" if job.limits.nodes > 1 else ""
    together = "" if each * processes == job.accumulation else f", {each * processes} together"
    return [
        f"note: the files for {stack} are of {processes} processes{where}, one for each GPU: {each} of "
        f"--accumulation {job.accumulation} for each{together}"
    ]


def _of_data(job: Job, stack: Stack) -> list[str]:
    """Where the program does not read rows as they are."""
    if stack == "deepspeed" or reads(_kind(job)):
        return []
    keys = "prompt, completion" if stack == "trl" else "instruction, output"
    return [
        f"note: {stack} has no rows like those of {Path(job.data.train).name}: write each of them anew "
        f"({keys}), and put that file for YOUR_DATA"
    ]


def _stand_ins(job: Job) -> list[str]:
    """What our job has in place of a model's weights and of data, where nobody named any."""
    found = []
    if job.model.random_weights:
        found.append(f"random weights ({job.model.name} has none here: --model FOLDER or a hub id has)")
    if job.data.train in ("random", "builtin"):
        found.append(f"{job.data.train} data (--data FILE for yours)")
    return [f"note: {JOB_FILE} trains on " + " and ".join(found)] if found else []


def recipe_of(answer: Recommendation, plan: Plan, stack: Stack, folder: Path | None = None) -> Recipe | None:
    """For the program as it is started in `folder`. `None`: that program does not have the method, or not for
    such a model."""
    method = entry(plan.engine).elsewhere
    if method is None or (answer.model.head != "causal_lm" and stack != "deepspeed"):
        return None
    named = NAMED_SHAPES.get(answer.job.model.name)
    kind = _kind(answer.job)
    job = _seen_from(answer.job, folder)
    return STACKS[stack](
        ChosenMethod(
            engine=plan.engine,
            method=method,
            job=job,
            settings=plan.settings.typed,
            checkpoint=job.model.name if named is None else named.hub_id or job.model.name,
            data_kind=kind,
            steps=None if answer.amount is None else answer.amount.steps,
        )
    )


def _seen_from(job: Job, folder: Path | None) -> Job:
    """With paths of data and model that begin here told from `folder`, where the program runs."""

    def told(name: str) -> str:
        path = Path(name)
        if folder is None or path.is_absolute() or not exists(path):
            return name
        return os.path.relpath(path, folder)

    data = replace(job.data, train=told(job.data.train))
    return replace(job, data=data, model=replace(job.model, name=told(job.model.name)))


def _job(answer: Recommendation, plan: Plan) -> Job:
    job = replace(answer.job, settings={plan.engine: plan.settings})
    return job if answer.amount is None else replace(job, steps=answer.amount.steps)


def _kind(job: Job) -> DataKind:
    if job.data.train in ("random", "builtin"):
        return "instructions"
    return examples_of(job, load_config(job.model)).kind


def _why_none(answer: Recommendation, plan: Plan, stack: Stack) -> str:
    if answer.model.head != "causal_lm" and stack != "deepspeed":
        return f"{stack}: no files for it, they are for decoders and this is an encoder"
    others = [
        each.engine
        for each in answer.plans
        if each.fits and each.engine != plan.engine and recipe_of(answer, each, stack) is not None
    ]
    alternatives = f"; of those that fit it has {', '.join(others)} (--engine NAME)" if others else ""
    return f"{stack}: no files for it, it has no {plan.engine}{alternatives}"
