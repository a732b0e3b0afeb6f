"""What a proof of concept must show, written down before it is measured. TOML in, typed values out.

The list of metrics is closed: each has one meaning, given in `METRICS`, and one way to be computed, in
`reports.measured.metrics`. A criterion names a metric, an engine or any method, and a threshold.
"""

from __future__ import annotations

import hashlib
import math
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from engines import ENGINES, is_external, public_engines
from engines.errors import UserError, plainly
from engines.files.reading import MOST_SETTINGS_BYTES, exists, parse_toml, read_bytes
from reports.criteria_templates import Purpose, template
from reports.question import JobSize, Prices, Question

SCHEMA_VERSION = 1
"""1: first version (0.1.0)."""

_REMEDY = "'lspzo-bench criteria init' shows every field and metric"

Metric = Literal[
    "runs_ok",
    "step_s",
    "step_time_ratio",
    "tokens_per_s",
    "gpu_memory_share",
    "gpu_memory_gib",
    "host_memory_share",
    "host_memory_gib",
    "loss_change",
    "accuracy",
    "heldout_change",
    "heldout_ratio",
    "job_hours",
    "job_cost",
    "prediction_factor",
]

METRICS: dict[Metric, str] = {
    "runs_ok": (
        "share of the runs that ended well, 0 to 1; out of memory, a crash, a timeout or a loss that is not "
        "finite all count as not well"
    ),
    "step_s": "time of one optimizer step in seconds, median",
    "step_time_ratio": (
        "step time as a multiple of native's; not applicable where native was tried and does not fit"
    ),
    "tokens_per_s": "tokens per second, from the median step",
    "gpu_memory_share": (
        "peak GPU memory taken, as a share of what the job may use (its limit, else the whole GPU); not "
        "applicable without a GPU"
    ),
    "gpu_memory_gib": "peak GPU memory taken, in GiB (1 GiB = 2^30 bytes)",
    "host_memory_share": (
        "peak host memory, as a share of what the job may use (its limit, else all that a process gets here)"
    ),
    "host_memory_gib": "peak host memory in GiB (1 GiB = 2^30 bytes)",
    "loss_change": (
        "mean training loss of the last quarter of the steps minus that of the first; below 0 is learning"
    ),
    "accuracy": "accuracy on held-out data after the last step, 0 to 1; needs a job with evaluation",
    "heldout_change": (
        "loss on held-out data after the last step minus that before the first; below 0 is better than before"
    ),
    "heldout_ratio": (
        "loss on held-out data after the last step as a multiple of native's; not applicable where native "
        "was tried and does not fit"
    ),
    "job_hours": "hours of the whole job, whose size stands in [job], at the median step",
    "job_cost": "what the whole job costs on this machine, in the currency of [prices]",
    "prediction_factor": (
        "how far the predicted step time was off, as a factor: 2 is twice or half the measured time"
    ),
}

Comparator = Literal["at most", "less than", "at least", "more than"]
Level = Literal["must", "want"]

ANY_METHOD = "any method"
_ANY_OFFLOAD = "any offload method"
"""Of earlier files: read as any method, since any may be the answer."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    __pydantic_config__ = ConfigDict(extra="forbid")

    id: str
    metric: Metric
    engine: str
    """An engine, or `ANY_METHOD`. All criteria with the latter must be met by one and the same method."""
    comparison: Comparator
    threshold: float
    level: Level
    why: str

    def __post_init__(self) -> None:
        if not self.id.strip():
            raise ValueError("id must not be empty")
        if not math.isfinite(self.threshold):
            raise ValueError("threshold must be a finite number")
        if not self.is_of_any and self.engine not in ENGINES and not is_external(self.engine):
            known = ", ".join(public_engines())
            raise ValueError(f"engine must be '{ANY_METHOD}' or one of {known}")

    @property
    def is_of_any(self) -> bool:
        """It is asked of any method, and names none."""
        return self.engine in (ANY_METHOD, _ANY_OFFLOAD)

    def holds(self, value: float) -> bool:
        """Whether `value` meets the threshold. NaN never does."""
        match self.comparison:
            case "at most":
                return value <= self.threshold
            case "less than":
                return value < self.threshold
            case "at least":
                return value >= self.threshold
            case "more than":
                return value > self.threshold


@dataclass(frozen=True, kw_only=True)
class Criteria:
    criteria: tuple[Criterion, ...]
    sha256: str
    """Of the bytes of the file."""
    written_down: bool = True
    """False: the built-in defaults, because nobody wrote any."""
    question: Question = field(default_factory=Question)
    size: JobSize | None = None
    """`None`: nobody said how much is to be trained."""
    prices: Prices | None = None
    """`None`: nobody typed any."""

    @property
    def spoke_of_offload(self) -> bool:
        """Some criterion asks it of any offload method, as earlier files did."""
        return any(one.engine == _ANY_OFFLOAD for one in self.criteria)


@dataclass(frozen=True, kw_only=True)
class _Document:
    __pydantic_config__ = ConfigDict(extra="forbid")

    schema_version: int
    criterion: tuple[Criterion, ...] = ()
    question: Question = field(default_factory=Question)
    job: JobSize | None = None
    prices: Prices | None = None


_HEAD = """\
# What this proof of concept must show. Agree on it BEFORE the first run and then leave it alone: every run
# carries the SHA-256 of this file, and the report says so if the file was changed after measuring.
#
# Each [[criterion]] below is one line of the table in the report:
#   id          a short name of your own
#   metric      what is compared; the list is below
#   engine      "any method" (all such criteria must be met by the same one), or one of
#               {engines}
#   comparison  "at most", "less than", "at least" or "more than"
#   threshold   a number, in the unit of the metric
#   level       "must": one failure is NO-GO, and one that could not be measured is INCONCLUSIVE
#               "want": a failure, or one that could not be measured, makes it a CONDITIONAL GO
#   why         one sentence for those who decide
#
# Where the runs of a method disagree on whether the threshold is met, the answer is 'unknown'.
#
# Metrics:
"""


def _wrapped(name: str, meaning: str, width: int = 110) -> str:
    lines, line = [], f"#   {name:<19}"
    for word in meaning.split():
        if len(line) + 1 + len(word) > width:
            lines.append(line)
            line = "#" + " " * 22
        line += ("" if line.endswith(" ") else " ") + word
    return "\n".join([*lines, line]) + "\n"


def init_text(purpose: Purpose = "any") -> str:
    """Criteria to begin with as a TOML file that explains itself."""
    quoted = ", ".join(f'"{name}"' for name in public_engines())
    engines = "\n#               ".join(textwrap.wrap(quoted, 95))
    return (
        _HEAD.format(engines=engines)
        + "".join(_wrapped(name, METRICS[name]) for name in METRICS)
        + template(purpose)
    )


def default_criteria() -> Criteria:
    """What is judged by where nobody wrote criteria."""
    text = init_text()
    found = parse_criteria(text.encode("utf-8"), "default criteria")
    return Criteria(criteria=found.criteria, sha256=found.sha256, written_down=False)


def load_criteria(path: Path) -> Criteria:
    """Raises `UserError`, one line, if `path` is not a criteria file."""
    if not exists(path):
        raise UserError(
            str(path), "there is no such criteria file", "write one with 'lspzo-bench criteria init'"
        )
    return parse_criteria(read_bytes(path, "criteria file", MOST_SETTINGS_BYTES), str(path))


def parse_criteria(content: bytes, origin: str) -> Criteria:
    """Criteria from the bytes of a file; `origin` names it in errors. Raises `UserError`."""
    values = parse_toml(content, origin)
    version = values.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UserError(
            origin,
            "has no schema_version, so it is not a criteria file",
            "compare it with what 'lspzo-bench criteria init' writes",
        )
    if version > SCHEMA_VERSION:
        raise UserError(
            origin,
            f"has schema version {version}, this program knows up to {SCHEMA_VERSION}",
            "update lspzo-bench",
        )
    try:
        document = TypeAdapter(_Document).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        why = plainly(first["msg"])
        raise UserError(f"{origin}: {_where(first['loc'], values)}", why, _REMEDY) from None
    _refuse_repeated([criterion.id for criterion in document.criterion], origin)
    _refuse_unpriced(document, origin)
    return Criteria(
        criteria=document.criterion,
        sha256=hashlib.sha256(content).hexdigest(),
        question=document.question,
        size=document.job,
        prices=document.prices,
    )


def _where(location: tuple[int | str, ...], values: dict[str, object]) -> str:
    """`criterion 2 ('speed'): threshold`, counted as a person counts."""
    if len(location) < 2 or location[0] != "criterion" or not isinstance(location[1], int):
        return ".".join(str(part) for part in location) or "file"
    tables = values.get("criterion")
    table = tables[location[1]] if isinstance(tables, list) else None
    name = f" ('{table['id']}')" if isinstance(table, dict) and "id" in table else ""
    field = "".join(f": {part}" for part in location[2:])
    return f"criterion {location[1] + 1}{name}{field}"


def _refuse_unpriced(document: _Document, origin: str) -> None:
    """Criteria of hours and cost need the size of the job, and the latter prices."""
    needs = {"job_hours": ("job",), "job_cost": ("job", "prices")}
    for criterion in document.criterion:
        for section in needs.get(criterion.metric, ()):
            shown = "cost" if section == "prices" else "deadline"
            if getattr(document, section) is None:
                raise UserError(
                    f"{origin}: criterion '{criterion.id}'",
                    f"{criterion.metric} needs a section [{section}]",
                    f"'lspzo-bench criteria init --for {shown}' shows one",
                )


def _refuse_repeated(ids: list[str], origin: str) -> None:
    for id_ in ids:
        if ids.count(id_) > 1:
            raise UserError(origin, f"two criteria have the id '{id_}'", "give each its own id")
