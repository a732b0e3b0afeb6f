"""What to fine-tune: typed, frozen, validated, TOML in and out. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import ConfigDict, Field, ValidationError, ValidationInfo

from engines import engine_of
from engines.errors import UserError, plainly
from engines.files.reading import read_toml
from engines.settings.given import Documented, GivenSettings, Value
from engines.settings.parse import defaults, parse_settings, settings_of_document
from engines.shapes import Dtype, Workload
from harness.records.seeds import MOST_SEED
from profiles.documents import adapter, write_whole

DataKind = Literal["random", "builtin", "text", "labelled", "instructions", "questions", "chats"]
# In a job file `true` is no number, and neither is text.
Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Switch = Annotated[bool, Field(strict=True)]

NotWhereEmpty = Field(exclude_if=lambda value: not value)
"""Of a field that joined later: left out of what is written where it says nothing, so that a job keeps the
bytes, and with them the id and the digest, that it had before."""

NotWhereOne = Field(exclude_if=lambda value: value == 1)
"""Likewise."""

JOB_FILE = "job.toml"
"""The file that says what is trained in a folder of results, of a training run, or beside a recipe."""

MOST_SEQUENCES = 1_000_000
"""Sequences of a step. More are a slip of the finger, and plans list every micro-batch."""

Padding = Literal["seq_len", "longest"]

HeadChoice = Literal["auto", "causal_lm", "masked_lm", "classification", "question_answering"]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    """A hub id, a local folder, or a named shape (`lspzo-bench models`)."""
    random_weights: Switch = False
    """Seeded random weights instead of a checkpoint; needs only the configuration."""
    head: HeadChoice = "auto"
    """`auto`: question_answering for data of that kind, else causal_lm for decoders, for encoders masked_lm
    with a template and classification without."""
    untied: Switch = False
    """Give the output head its own tensor where the model ties it to the embedding."""
    layers: Annotated[Whole, Field(ge=1)] | None = None
    """Only the first so many blocks, of random weights; `None`: all."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    __pydantic_config__ = ConfigDict(extra="forbid")

    train: str = "builtin"
    """`random`, `builtin`, a path (.txt, .tsv, .csv, .jsonl, .json, .parquet), or a data set of the hub,
    `organisation/name:configuration@split`."""
    evaluate: str | None = None
    """A held-out set of the same kind; `None`: a part of the training data is held out."""
    columns: Annotated[dict[str, str], NotWhereEmpty] = field(default_factory=dict)
    """Role, such as `text` or `label` -> the column that is it; empty: the names of the columns tell."""
    strict: Annotated[Switch, NotWhereEmpty] = False
    """A record that cannot be used ends the job; else it is left out, and the first one is named."""
    skip_bad: Annotated[Switch, NotWhereEmpty] = False
    """Go on also where more than a tenth of the records cannot be used."""
    template: Annotated[str, NotWhereEmpty] = ""
    """The prompt of a labelled row, such as `{text} It was` for a decoder and `{text} It was {mask}.` for an
    encoder, `{text2}` being the second of a pair and other names in braces columns of the file; empty: for
    decoders the built-in one, with a loss over the whole vocabulary."""
    labels: Annotated[tuple[str, ...], NotWhereEmpty] = ()
    """With `template`: the word for each class, in the order of the classes. `{choice1}` is each row's own,
    out of this column."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    __pydantic_config__ = ConfigDict(extra="forbid")

    vram_bytes: Whole | None = None
    """GPU memory a run may use; `None`: all that is free."""
    host_bytes: Whole | None = None
    """Host memory a run may use; a run above it ends as `oom_host`."""
    timeout_s: Number = 1800.0
    """Wall time of one run, set-up included."""
    gpus: Annotated[Whole, Field(ge=1), NotWhereOne] = 1
    """Of one machine, which a run may use: it has so many processes there, one for each, which share out the
    micro-batches of every step."""
    nodes: Annotated[Whole, Field(ge=1), NotWhereOne] = 1
    """Machines on which the same command is started."""

    @property
    def ranks(self) -> int:
        """Processes of a run on all machines together."""
        return self.gpus * self.nodes


def _read_settings(values: dict[str, dict[str, Value]], _: ValidationInfo) -> dict[str, GivenSettings]:
    return {method: settings_of_document(engine_of(method), each) for method, each in values.items()}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One fine-tuning job, the same for every engine that is compared on it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    model: ModelSource
    data: DataSource = field(default_factory=DataSource)
    batch_size: Whole = 1
    seq_len: Whole = 512
    padding: Annotated[Padding, Field(exclude_if=lambda value: value == "seq_len")] = "seq_len"
    """`seq_len`: every batch of a file is as long as that, as predictions take it. `longest`: sequences of
    like length come together, padded to one of a few lengths (`harness.data.padding`)."""
    accumulation: Whole = 1
    dtype: Dtype = "bf16"
    checkpointing: Switch = True
    steps: Whole = 10
    """Steps after the warm-up."""
    warmup_steps: Whole = 3
    """Steps at the start whose times are kept and flagged, not counted."""
    eval_batches: Whole = 0
    """Batches of held-out data evaluated before and after; 0: no evaluation."""
    seed: Whole = 0
    eval_every: Annotated[Whole, NotWhereEmpty] = 0
    """Steps between evaluations while training, by which the best model is kept; 0: none."""
    best_by: Annotated[str, NotWhereEmpty] = ""
    """The metric that says which is the best; empty: the task's own."""
    patience: Annotated[Whole, NotWhereEmpty] = 0
    """Evaluations without a better one after which training ends; 0: it does not end early."""
    limits: Limits = field(default_factory=Limits)
    settings: Annotated[dict[str, GivenSettings], Documented(dict[str, dict[str, Value]], _read_settings)] = (
        field(default_factory=dict)
    )
    """Engine name -> settings that override its plan. `lsp:half` -> those of that method of a study alone."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "seq_len", "accumulation", "steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")
        if self.batch_size > MOST_SEQUENCES:
            raise ValueError(f"batch_size must be {MOST_SEQUENCES:,} at most")
        if self.batch_size * self.accumulation > MOST_SEQUENCES:
            most = MOST_SEQUENCES // self.batch_size
            raise ValueError(f"accumulation must be {most:,} at most where batch_size is {self.batch_size:,}")
        for name in ("warmup_steps", "eval_batches", "eval_every", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if not 0 <= self.seed <= MOST_SEED:
            raise ValueError("seed must be between 0 and 2^63 - 1")
        if not 0 < self.limits.timeout_s < math.inf:
            raise ValueError("limits.timeout_s must be positive and finite")
        for name in ("vram_bytes", "host_bytes"):
            limit = getattr(self.limits, name)
            if limit is not None and limit <= 0:
                raise ValueError(f"limits.{name} must be positive")

    def settings_of(self, engine: str) -> GivenSettings:
        """What is set for `engine`; for `lsp:half` what is set for `lsp` and, before that, for it. Raises
        `UserError` for an unknown engine, and for settings that do not go together."""
        of_all, own = self.settings.get(engine_of(engine)), self.settings.get(engine)
        if of_all is None or own is None or own is of_all:
            return own or of_all or defaults(engine_of(engine))
        both = {**of_all, **own}
        return GivenSettings(both, parse_settings(engine_of(engine), both))

    @property
    def workload(self) -> Workload:
        return Workload(
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            accumulation=self.accumulation,
            dtype=self.dtype,
            checkpointing=self.checkpointing,
            words_alone=bool(self.data.template),
        )


def make_job(values: dict[str, Any], origin: str) -> Job:
    """A validated job. `origin` names where `values` come from, for the error.

    Raises `UserError` that names the field.
    """
    try:
        job: Job = adapter(Job).validate_python(values)
        return job
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        # What a field's own check says names the field already.
        why = plainly(first["msg"])
        raise UserError(
            f"{origin}, {where}" if where else origin, why, "see 'lspzo-bench compare --help'"
        ) from None


def job_values(path: Path) -> dict[str, Any]:
    """The fields of a job file, not yet validated. Raises `UserError` if it cannot be read or is not TOML."""
    return read_toml(path, "job file")


def load_job(path: Path) -> Job:
    """Raises `UserError` if `path` is not a job in TOML."""
    return make_job(job_values(path), str(path))


def save_job(job: Job, path: Path) -> None:
    """Raises `UserError` if `path` cannot be written."""
    values = adapter(Job).dump_python(job, mode="json", exclude_none=True)
    write_whole(path, tomli_w.dumps(values))
