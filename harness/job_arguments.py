"""A job as the flags that give it, for commands that a person can paste. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping

from engines.settings.given import GivenSettings
from harness.records.job import DataSource, Job, Limits, ModelSource
from profiles.units import typed_bytes

_OF_STEPS = (
    "batch_size", "seq_len", "padding", "dtype", "accumulation", "steps", "warmup_steps", "eval_batches",
)  # fmt: skip
_ALWAYS = frozenset({"batch_size", "seq_len", "dtype", "steps", "warmup_steps"})
"""Told even where they are the defaults: what a reader wants to see."""


def job_arguments(job: Job, *, has_gpu: bool = True) -> str:
    """The flags of `job`. Where no GPU is, a limit of its memory is left out: it limits nothing, and the
    run's record would have it."""
    return shlex.join(
        [
            *_of_model(job.model),
            *_of_data(job.data),
            *_of_steps(job),
            *_of_limits(job.limits, has_gpu=has_gpu),
            *_of_settings(job.settings),
        ]
    )


def _of_model(model: ModelSource) -> Iterator[str]:
    yield from ("--model", model.name)
    if model.random_weights:
        yield "--random-weights"
    if model.untied:
        yield "--untied"
    if model.layers is not None:
        yield from ("--layers", str(model.layers))
    if model.head != "auto":
        yield from ("--head", model.head)


def _of_data(data: DataSource) -> Iterator[str]:
    yield from ("--data", data.train)
    if data.evaluate is not None:
        yield from ("--eval-data", data.evaluate)
    if data.columns:
        yield from ("--columns", ",".join(f"{role}={column}" for role, column in data.columns.items()))
    if data.template:
        yield from ("--template", data.template)
    if data.labels:
        yield from ("--labels", ",".join(data.labels))
    if data.strict:
        yield "--strict"
    if data.skip_bad:
        yield "--skip-bad"


def _of_steps(job: Job) -> Iterator[str]:
    default = Job(model=job.model)
    for name in _OF_STEPS:
        value = getattr(job, name)
        if name in _ALWAYS or value != getattr(default, name):
            yield from (f"--{name.replace('_', '-')}", str(value))
    yield "--checkpointing" if job.checkpointing else "--no-checkpointing"
    yield from ("--seed", str(job.seed))


def _of_limits(limits: Limits, *, has_gpu: bool) -> Iterator[str]:
    if limits.vram_bytes is not None and has_gpu:
        yield from ("--vram", typed_bytes(limits.vram_bytes))
    if limits.host_bytes is not None:
        yield from ("--host-memory", typed_bytes(limits.host_bytes))
    for name in ("gpus", "nodes"):
        if (count := getattr(limits, name)) != 1:
            yield from (f"--{name}", str(count))
    if limits.timeout_s != Limits().timeout_s:
        yield from ("--timeout", f"{limits.timeout_s:g}")


def _of_settings(settings: Mapping[str, GivenSettings]) -> Iterator[str]:
    for engine, given in settings.items():
        for key, value in given.items():
            yield from ("--set", f"{engine}.{key}={value}")
