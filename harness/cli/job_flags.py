"""The flags of a job as one argument of a command: declared once, nested as the job has them, checked.

Preset, job file and flags come together here. Imports no torch."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args

import typer

from engines.errors import UserError
from harness.cli.options import (
    Accumulation,
    BatchSize,
    BestBy,
    Checkpointing,
    Columns,
    DataFlag,
    DtypeFlag,
    EvalBatches,
    EvalData,
    EvalEvery,
    Gpus,
    HeadFlag,
    HostMemoryFlag,
    JobFile,
    Labels,
    Layers,
    Model,
    Nodes,
    PaddingFlag,
    Patience,
    RandomWeights,
    Seed,
    SeqLen,
    Set,
    SkipBad,
    Steps,
    Strict,
    Template,
    Timeout,
    Untied,
    Vram,
    WarmupSteps,
)
from harness.data.reading.columns import parse_columns
from harness.records.job import DataSource, Job, Limits, job_values, make_job
from harness.records.settings import check_settings, left_out, parse_assignments
from harness.resolve import longest_sequence
from profiles.documents import merged
from profiles.language import translated, word
from profiles.units import parse_bytes


def _flags(
    *,
    model: Model = None,
    random_weights: RandomWeights = None,
    untied: Untied = None,
    layers: Layers = None,
    head: HeadFlag = None,
    data: DataFlag = None,
    eval_data: EvalData = None,
    columns: Columns = None,
    template: Template = None,
    labels: Labels = None,
    strict: Strict = None,
    skip_bad: SkipBad = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    padding: PaddingFlag = None,
    accumulation: Accumulation = None,
    steps: Steps = None,
    warmup_steps: WarmupSteps = None,
    eval_batches: EvalBatches = None,
    eval_every: EvalEvery = None,
    best_by: BestBy = None,
    patience: Patience = None,
    dtype: DtypeFlag = None,
    checkpointing: Checkpointing = None,
    seed: Seed = None,
    vram: Vram = None,
    host_memory: HostMemoryFlag = None,
    timeout: Timeout = None,
    gpus: Gpus = None,
    nodes: Nodes = None,
    set_: Set = None,
    job_file: JobFile = None,
) -> dict[str, Any]:
    """All job flags in their order in `--help`, and those that were given."""
    return {name: value for name, value in locals().items() if value is not None}


class JobFlags:
    """What the user said of the job."""

    def __init__(self, flags: Mapping[str, Any], command: str = "compare") -> None:
        self._command = command
        given = _flags(**flags)
        self._assignments: Sequence[str] = given.pop("set_", [])
        self._file: Path | None = given.pop("job_file", None)
        self._given = _nested(given)

    def suppose_model(self, name: str) -> None:
        """Take that model where the user has named none."""
        if self._file is None and "name" not in self._given.get("model", {}):
            self._given["model"] = {**self._given.get("model", {}), "name": name}

    def gives(self, name: str) -> bool:
        """Whether the field of that name was given as a flag."""
        return name in self._given

    def job(self, engines: Sequence[str], preset: Mapping[str, Any] | None = None) -> Job:
        """Preset, then job file, then flags; the later wins field by field, but a preset's model as a whole.

        Raises `UserError` for whatever is wrong with them.
        """
        values: dict[str, Any] = dict(preset or {})
        layers = [*([] if self._file is None else [_file_values(self._file, engines)]), self._given]
        if any(isinstance(layer.get("model"), dict) and "name" in layer["model"] for layer in layers):
            values.pop("model", None)
        for layer in layers:
            values = merged(values, layer)
        if self._assignments:
            assigned = parse_assignments(self._assignments, engines)
            values = merged(values, {"settings": {name: dict(given) for name, given in assigned.items()}})
            for each in left_out(self._assignments, engines):
                note = translated(f"--set {each}: that engine does not run, so it changes nothing")
                typer.echo(f"{word('note')}: {note}", err=True)
        model = values.setdefault("model", {})
        if isinstance(model, dict) and "name" not in model:
            raise UserError(
                "--model", "no model was named", "see 'lspzo-bench models', or name a folder or hub id"
            )
        try:
            job = make_job(values, "job")
        except UserError as error:
            raise self._of_a_flag(error) from None
        return job if "seq_len" in values else _no_longer_than_the_model(job)

    def _of_a_flag(self, error: UserError) -> UserError:
        """`error` of the flag that its field was given by, if it was."""
        remedy = f"see 'lspzo-bench {self._command} --help'"
        flat = {**self._given, **self._given.get("limits", {})}
        field, _, why = error.why.removeprefix("limits.").partition(" ")
        if field not in flat:
            field, why = error.what.removeprefix("job, ").removeprefix("limits."), error.why
        if field not in flat or isinstance(flat[field], dict):
            return UserError(error.what, error.why, remedy if "--help" in error.remedy else error.remedy)
        flag = _OTHER_FLAGS.get(field, field).replace("_", "-")
        return UserError(f"--{flag} {flat[field]}", why, remedy)


def _no_longer_than_the_model(job: Job) -> Job:
    """With sequences as long as the model takes, where that is less than a job's default."""
    longest = longest_sequence(job.model)
    if longest is None or longest >= job.seq_len:
        return job
    note = translated(f"sequences of {longest} tokens (--seq-len): {job.model.name} takes no longer ones")
    typer.echo(f"{word('note')}: {note}", err=True)
    return replace(job, seq_len=longest)


_OTHER_FLAGS = {"timeout_s": "timeout", "vram_bytes": "vram", "host_bytes": "host-memory"}
"""Flags that are not called as their field."""


def _file_values(path: Path, engines: Sequence[str]) -> dict[str, Any]:
    """The fields of a job file. Raises `UserError` for its settings; the other fields are not yet checked."""
    values = job_values(path)
    settings = values.get("settings")
    if isinstance(settings, dict) and all(isinstance(each, dict) for each in settings.values()):
        checked = check_settings(settings, engines, str(path))
        values["settings"] = {name: dict(given) for name, given in checked.items()}
    return values


def _told_defaults() -> dict[str, str]:
    """What a job has where neither a flag nor --job says it, by flag, as `--help` tells it."""
    of_job = {each.name: each.default for each in fields(Job)}
    told = {name: str(of_job[name]) for name in _FLAT if name in of_job and of_job[name] is not None}
    told |= {
        "data": DataSource().train,
        "timeout": f"{Limits().timeout_s:g}",
        "gpus": str(Limits().gpus),
        "nodes": str(Limits().nodes),
        "vram": "all that is free",
        "host_memory": "all that is free",
        "model": "that of --job",
        "columns": "by their names",
        "template": "none",
        "labels": "none",
        "set_": "as planned",
        "job_file": "none",
        "eval_data": "a part of --data",
        "checkpointing": "--checkpointing" if of_job["checkpointing"] else "--no-checkpointing",
        "random_weights": "--pretrained",
        "untied": "--as-published",
        "strict": "--lenient",
        "skip_bad": "--mostly-good",
    }
    return told


_FLAT = (
    "batch_size", "seq_len", "accumulation", "steps", "warmup_steps", "eval_batches", "eval_every",
    "patience", "dtype", "seed",
)  # fmt: skip
"""Flags that are fields of the job by the same name."""


def _with_default(parameter: inspect.Parameter, told: Mapping[str, str]) -> inspect.Parameter:
    """`parameter`, whose help says its default too."""
    kind, option = get_args(parameter.annotation)
    if parameter.name not in told or "[default:" in (option.help or ""):
        return parameter
    option = copy.copy(option)
    option.help = f"{option.help} [default: {told[parameter.name]}]"
    return parameter.replace(annotation=Annotated[kind, option])


OF_TRAINING = ("eval_every", "best_by", "patience")
"""Job flags that only training in earnest has."""


def takes_job(
    *, without: Collection[str] = (), defaults: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command all job flags but `without`; it gets them as its first argument, a `JobFlags`.

    `defaults` are what its help says of flags whose default there is not the job's own."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        told = {**_told_defaults(), **defaults}
        shared = [_with_default(p, told) for p in _parameters(_flags) if p.name not in without]
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in _parameters(command)[1:]]

        @functools.wraps(command)
        def called(**values: Any) -> None:
            flags = JobFlags({p.name: values.pop(p.name) for p in shared}, command.__name__)
            command(flags, **values)

        # What typer reads: the flags of both, in place of the wrapper's own.
        called.__dict__["__signature__"] = inspect.Signature([*shared, *own])
        called.__annotations__ = {p.name: p.annotation for p in (*shared, *own)}
        return called

    return wrap


def tells_defaults(told: Mapping[str, str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives the help of a command that declares job flags itself the defaults that they have there."""

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        shown = [_with_default(each, told) for each in _parameters(command)]

        @functools.wraps(command)
        def called(**values: Any) -> None:
            command(**values)

        called.__dict__["__signature__"] = inspect.Signature(shown)
        called.__annotations__ = {each.name: each.annotation for each in shown}
        return called

    return wrap


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function, eval_str=True).parameters.values())


_PLACES: dict[str, tuple[str, str]] = {
    "model": ("model", "name"),
    **{name: ("model", name) for name in ("random_weights", "untied", "layers", "head")},
    "data": ("data", "train"),
    "eval_data": ("data", "evaluate"),
    **{name: ("data", name) for name in ("columns", "template", "labels", "strict", "skip_bad")},
    "vram": ("limits", "vram_bytes"),
    "host_memory": ("limits", "host_bytes"),
    "timeout": ("limits", "timeout_s"),
    **{name: ("limits", name) for name in ("gpus", "nodes")},
}
"""Flag -> part of a job and field there, of flags that are no field of the job itself."""

_READ: dict[str, Callable[[str], Any]] = {
    "columns": parse_columns,
    "labels": lambda text: [word.strip() for word in text.split(",")],
    "vram": lambda text: parse_bytes(text, "--vram"),
    "host_memory": lambda text: parse_bytes(text, "--host-memory"),
}
"""Of flags whose text stands for something else."""


def _nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as fields of `harness.records.job.Job`."""
    fields: dict[str, Any] = {}
    for flag, value in given.items():
        if flag in _READ:
            value = _READ[flag](value)
        if flag in _PLACES:
            part, field = _PLACES[flag]
            fields.setdefault(part, {})[field] = value
        else:
            fields[flag] = value
    return fields
