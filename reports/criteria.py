"""What a proof of concept must show, written down before it is measured. TOML in, typed values out.

The list of metrics is closed: each has one meaning, given in `METRICS`, and one way to be computed, in
`reports.decide`. A criterion names a metric, an engine or any offload method, and a threshold.
"""

from __future__ import annotations

import hashlib
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from engines import ENGINES, default_engines, engines_of_role, is_external, public_engines
from engines.errors import UserError
from engines.files.reading import MOST_SETTINGS_BYTES, exists, parse_toml, read_bytes

SCHEMA_VERSION = 1
"""1: first version (0.1.0)."""

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
        "peak GPU memory taken, as a share of what the job may use (its limit, else the whole GPU)"
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
    "prediction_factor": (
        "how far the predicted step time was off, as a factor: 2 is twice or half the measured time"
    ),
}

Comparator = Literal["at most", "less than", "at least", "more than"]
Level = Literal["must", "want"]

ANY_OFFLOAD = "any offload method"


@dataclass(frozen=True, kw_only=True)
class Criterion:
    __pydantic_config__ = ConfigDict(extra="forbid")

    id: str
    metric: Metric
    engine: str
    """An engine, or `ANY_OFFLOAD`. All criteria with the latter must be met by one and the same method."""
    comparison: Comparator
    threshold: float
    level: Level
    why: str

    def __post_init__(self) -> None:
        if not self.id.strip():
            raise ValueError("id must not be empty")
        if not math.isfinite(self.threshold):
            raise ValueError("threshold must be a finite number")
        if self.engine != ANY_OFFLOAD and self.engine not in ENGINES and not is_external(self.engine):
            known = ", ".join(public_engines())
            raise ValueError(f"engine must be '{ANY_OFFLOAD}' or one of {known}")

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


@dataclass(frozen=True, kw_only=True)
class _Document:
    __pydantic_config__ = ConfigDict(extra="forbid")

    schema_version: int
    criterion: tuple[Criterion, ...] = ()


_HEAD = """\
# What this proof of concept must show. Agree on it BEFORE the first run and then leave it alone: every run
# carries the SHA-256 of this file, and the report says so if the file was changed after measuring.
#
# Each [[criterion]] below is one line of the table in the report:
#   id          a short name of your own
#   metric      what is compared; the list is below
#   engine      "any offload method" ({offload};
#               all such criteria must be met by the same method), or one of
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

_DEFAULTS = """
schema_version = 1

[[criterion]]
id = "runs"
metric = "runs_ok"
engine = "any offload method"
comparison = "at least"
threshold = 1.0
level = "must"
why = "The job has to run to its end, every time, with a finite loss; a run that dies decides against it."

[[criterion]]
id = "gpu memory"
metric = "gpu_memory_share"
engine = "any offload method"
comparison = "at most"
threshold = 1.0
level = "must"
why = "Fitting into this GPU is what offloading is for."

[[criterion]]
id = "host memory"
metric = "host_memory_share"
engine = "any offload method"
comparison = "at most"
threshold = 0.9
level = "must"
why = "What leaves the GPU lands in the machine's memory, and a tenth of that belongs to everything else."

[[criterion]]
id = "speed"
metric = "step_time_ratio"
engine = "any offload method"
comparison = "at most"
threshold = 5.0
level = "want"
why = "Where the job also fits without offloading, a step more than five times as long is hard to justify."

[[criterion]]
id = "learning"
metric = "loss_change"
engine = "any offload method"
comparison = "less than"
threshold = 0.0
level = "want"
why = "The loss has to go down. Make this a must where the job has steps enough to tell."
"""


def _wrapped(name: str, meaning: str, width: int = 110) -> str:
    lines, line = [], f"#   {name:<19}"
    for word in meaning.split():
        if len(line) + 1 + len(word) > width:
            lines.append(line)
            line = "#" + " " * 22
        line += ("" if line.endswith(" ") else " ") + word
    return "\n".join([*lines, line]) + "\n"


def init_text() -> str:
    """The default criteria as a TOML file that explains itself."""
    quoted = ", ".join(f'"{name}"' for name in default_engines())
    engines = "\n#               ".join(textwrap.wrap(quoted, 95))
    offload = " or ".join(engines_of_role("offload"))
    return (
        _HEAD.format(engines=engines, offload=offload)
        + "".join(_wrapped(name, METRICS[name]) for name in METRICS)
        + _DEFAULTS
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
        why = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{origin}: {_where(first['loc'], values)}", why, _remedy()) from None
    _refuse_repeated([criterion.id for criterion in document.criterion], origin)
    return Criteria(criteria=document.criterion, sha256=hashlib.sha256(content).hexdigest())


def _where(location: tuple[int | str, ...], values: dict[str, object]) -> str:
    """`criterion 2 ('speed'): threshold`, counted as a person counts."""
    if len(location) < 2 or location[0] != "criterion" or not isinstance(location[1], int):
        return ".".join(str(part) for part in location) or "file"
    tables = values.get("criterion")
    table = tables[location[1]] if isinstance(tables, list) else None
    name = f" ('{table['id']}')" if isinstance(table, dict) and "id" in table else ""
    field = "".join(f": {part}" for part in location[2:])
    return f"criterion {location[1] + 1}{name}{field}"


def _remedy() -> str:
    return f"metrics are {', '.join(get_args(Metric))}; 'lspzo-bench criteria init' shows every field"


def _refuse_repeated(ids: list[str], origin: str) -> None:
    for id_ in ids:
        if ids.count(id_) > 1:
            raise UserError(origin, f"two criteria have the id '{id_}'", "give each its own id")
