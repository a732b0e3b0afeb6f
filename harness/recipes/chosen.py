"""What a configuration for another training program is made of. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.registry_row import Elsewhere
from harness.records.job import DataKind, Job

FILE_KINDS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".txt": "text",
}  # fmt: skip

CONTEXT_LINES = (
    "Predictions are for this program's own engine: what fits there may need more memory in yours.",
    "Nothing here has been run. Look at how your program reads the data before you trust a result.",
)


def reads(kind: DataKind) -> bool:
    """Whether other programs train on such a file as it is: of a text and its class they have no rows."""
    return kind not in ("labelled", "questions")


def accumulation_of_each(job: Job) -> int:
    """Micro-batches of each process in a step, as other programs count them; ours are those of all."""
    return -(-job.accumulation // job.limits.ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenMethod:
    """A method with its settings, as other programs need to be told of it."""

    engine: str
    """By its name here."""
    method: Elsewhere
    job: Job
    settings: Any
    """Typed, of the engine."""
    checkpoint: str
    """Folder or hub id of the weights."""
    data_kind: DataKind
    steps: int | None
    """Of the whole job; `None`: not said."""

    @property
    def data(self) -> str | None:
        """The file, or the data set of the hub; `None`: the job has none, or none that they read as it is."""
        name = self.job.data.train
        return None if name in ("random", "builtin") or not reads(self.data_kind) else name

    @property
    def file_kind(self) -> str | None:
        """What `datasets` calls it; `None` for a data set of the hub."""
        name = (self.data or "").lower()
        return next((kind for ending, kind in FILE_KINDS.items() if name.endswith(ending)), None)

    @property
    def processes(self) -> int:
        return self.job.limits.ranks

    @property
    def accumulation(self) -> int:
        return accumulation_of_each(self.job)

    @property
    def recomputes(self) -> bool:
        """Some blocks run again in the backward pass; other programs recompute all or none."""
        return self.job.checkpointing and getattr(self.settings, "checkpointed_blocks", "all") != 0

    @property
    def schedule(self) -> str:
        """The learning rate's, by its name in transformers, whose `constant` leaves the warm-up out."""
        warms_up = self.settings.schedule == "constant" and self.settings.warmup_steps > 0
        return "constant_with_warmup" if warms_up else str(self.settings.schedule)

    @property
    def adam(self) -> dict[str, float]:
        """AdamW's constants, by the keys of the Trainer of transformers."""
        settings = self.settings
        return {
            "adam_beta1": settings.beta1, "adam_beta2": settings.beta2, "adam_epsilon": settings.adam_eps,
        }  # fmt: skip

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """How it learns and where it stops, by the keys of transformers' TrainingArguments, which other
        programs take as they are."""
        return {
            "learning_rate": self.settings.learning_rate,
            "lr_scheduler_type": self.schedule,
            "warmup_steps": self.settings.warmup_steps,
            "weight_decay": self.settings.weight_decay,
            **self.adam,
            "max_grad_norm": self.settings.max_grad_norm,
            **({} if self.steps is None else {"max_steps": self.steps}),
            "bf16": self.job.dtype == "bf16",
            "seed": self.job.seed,
        }

    @property
    def streams_weights(self) -> bool:
        """The weights are in host memory too."""
        return self.method == "streamed_cpu_adamw" or getattr(self.settings, "weights", "") == "streamed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Files by name, and how to run them."""

    files: Mapping[str, str]
    command: str


def as_yaml(values: Mapping[str, Any], source: str, chosen: ChosenMethod) -> str:
    """One key a line, each value as JSON, which YAML holds. `source`: where the keys were looked up."""
    head = [f"{chosen.engine}, as recommended by lspzo-bench. Keys as in {source}.", *CONTEXT_LINES]
    if chosen.processes > 1:
        head.append(
            f"For {chosen.processes} processes, one for each GPU: batches and accumulation are of each."
        )
    lines = [f"# {line}" for line in head]
    lines += [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"
