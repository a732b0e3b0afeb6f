"""What happened: one record per run, raw samples kept. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from engines.base import LinkRates
from engines.decoding import Sampling
from engines.errors import UserError
from harness.records.governance import Governance
from profiles.documents import read_document, to_json
from profiles.planning.plan import Plan, Prediction, rare_work_s

SCHEMA_VERSION = 1
"""1: first version (0.1.0).

A field that has a default may join without a new version: records without it load, and older programs pass
over what they do not know."""

EndState = Literal[
    "ok",
    "oom_gpu",
    "oom_host",
    "pinned_limit",
    "timeout",
    "crash",
    "nan_loss",
    "skipped_infeasible",
    "not_available",
    "interrupted",
]

ScenarioName = Literal["train", "decode"]
"""What a step of a run is. `train`: one optimizer step on the job's data. `decode`: one token of every
sequence that the job's batch holds, the first one the prefill; nothing is learned and there is no loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One step as it was measured."""

    step: int
    warmup: bool
    step_s: float
    loss: float | None
    """`None` where it was not finite, or where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Functions of the samples (warm-ups left out) and peaks of the whole run. `None`: not measured."""

    step_s_median: float | None = None
    step_s_low: float | None = None
    step_s_high: float | None = None
    """Smallest and largest step."""
    step_s_p10: float | None = None
    step_s_p90: float | None = None
    """10 % and 90 % quantile of the steps."""
    tokens_per_s: float | None = None
    """Tokens of one step, all sequences included, over the median step: without padding where
    `real_tokens_per_step` is known, else with it."""
    real_tokens_per_step: float | None = None
    """Mean over the counted steps, without padding."""
    padded_share: float | None = None
    """Of the tokens that those steps computed on, the share that was padding."""
    loss_first: float | None = None
    """Of the first step of all, warm-up included."""
    loss_last: float | None = None
    eval_loss_first: float | None = None
    eval_loss_last: float | None = None
    eval_accuracy_first: float | None = None
    eval_accuracy_last: float | None = None
    """Where each label is a class, of the task's own classes or words; in records without `eval_examples`,
    out of the whole vocabulary, unless the job had a template."""
    eval_examples: Annotated[int | None, Field(exclude_if=lambda value: value is None)] = None
    """That each of the two rests on. `None`: labels are the tokens of a text, nothing was evaluated, or the
    record is of before this was kept."""
    eval_in_training: Annotated[int | None, Field(exclude_if=lambda value: not value)] = None
    """How many of the held-out sequences that were evaluated are in the training data too."""
    eval_majority_class: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None
    """Share of those that are of the most frequent class; `None` also where there are no classes."""
    eval_sequence_labels: Annotated[tuple[int, ...], Field(exclude_if=lambda value: not value)] = ()
    eval_sequence_losses_first: Annotated[tuple[float, ...], Field(exclude_if=lambda value: not value)] = ()
    eval_sequence_losses_last: Annotated[tuple[float, ...], Field(exclude_if=lambda value: not value)] = ()
    """Of each held-out sequence, in the same order in every run of a job: how many labels it has, and the sum
    of their losses, in 7 digits. Empty: nothing was evaluated, the engine does not tell, or the record is of
    before this was kept."""
    eval_s: float | None = None
    """Time of the last evaluation, all its batches."""
    setup_s: float | None = None
    setup_parts_s: Annotated[Mapping[str, float], Field(exclude_if=lambda value: not value)] = field(
        default_factory=dict
    )
    """What of it each part took that the engine tells of while it is at it, by name, and the rest. Empty: it
    told of none, or the record is of before this was kept."""
    compile_s: float | None = None
    """What torch's compiler took in this process, in the first steps: a part of the set-up and of no median
    where there are warm-up steps. 0: nothing was compiled."""
    forward_launch_s: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None
    """What starting an operation without autograd took this process's CPU after the run, by the probe's own
    measure. `None`: there is no GPU, or the record is of before this was measured."""
    python_turn_before_s: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None
    python_turn_after_s: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None
    """What a turn of a plain Python loop took this process just before the steps that count and just after
    them: how fast its core ran (`profiles.probe.core_speed`). `None`: likewise."""
    peak_gpu_allocated_bytes: int | None = None
    peak_gpu_reserved_bytes: int | None = None
    peak_gpu_nvml_bytes: int | None = None
    """The whole device, other processes and CUDA's context included."""
    peak_host_bytes: int | None = None
    """Resident memory of the child and its own children."""
    pinned_bytes: int | None = None
    energy_j: float | None = None
    """GPU board only, per step."""
    gpu_s: float | None = None
    h2d_s: float | None = None
    d2h_s: float | None = None
    cpu_s: float | None = None
    idle_s: float | None = None
    """Medians per step of the time that each resource was busy; idle is the GPU's."""
    cpu_threads: Annotated[int | None, Field(exclude_if=lambda value: value is None)] = None
    """Threads that the last step's updates on the CPU ran on, which the method chooses in its first steps.
    `None`: it does not choose, or the record is of before this was kept."""
    gpu_exposed_s: float | None = None
    h2d_exposed_s: float | None = None
    d2h_exposed_s: float | None = None
    cpu_exposed_s: float | None = None
    """Medians per step of the time that each copy direction and the CPU were busy while the GPU was not, and
    the GPU while nothing else was. The rest of a resource's busy time was overlapped."""
    perturb_s: float | None = None
    """Median per step of the part of `gpu_s` that made noise: perturbing weights and replaying updates."""
    h2d_bytes: int | None = None
    d2h_bytes: int | None = None
    """Medians per step."""
    forwards: float | None = None
    """Median per step of the forward passes that each micro-batch took."""
    disk_read_bytes: int | None = None
    disk_s: float | None = None
    """Medians per step: what of the disk a step computed with, of several ranks what each of them has read of
    it, and how long something was being read."""
    disk_direct: bool | None = None
    """Whether the disk was read past the page cache; else its rates may be memory's. `None`: no disk."""
    disk_floor_s: float | None = None
    """What those bytes take at the rate that reading reached alone, measured in the run's set-up."""
    disk_floor_share: float | None = None
    """That over the median step. 1: the step took no longer than reading alone."""
    landed_share: float | None = None
    """Share of the wanted update that reached the stored weights, as the engine measured it after the last
    step. 1: all of it."""
    floor_share: float | None = None
    """Predicted floor over the measured median step, the one figure here that is not measured alone. 1: the
    hardware's limit; above 1: the prediction of the floor is wrong."""
    model_flops: float | None = None
    """Of the model's matrix products and attention in a step, counted and not measured, over tokens without
    padding: one forward pass and, where gradients are taken, twice as much for the backward pass;
    zeroth-order methods as many forward passes as they take. Nothing that is computed twice counts twice."""
    mfu: float | None = None
    """Model FLOPs utilization: `model_flops` over the median step, as a share of the rate of matrix products
    that the machine file holds as measured. A method that computes less than all gradients can pass 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """The plan's prediction, kept beside the measurement and never mixed with it."""

    step_s_low: float | None
    step_s: float | None
    step_s_high: float | None
    peak_gpu_bytes: int | None
    peak_host_bytes: int | None
    bottleneck: str | None
    basis: str
    floor_s: float | None = None
    """What the step's least work needs of the resource that needs most; no engine of the method could be
    faster. Of a decoding step it also counts one read of weights and cache from GPU memory."""
    rare_s: Annotated[float | None, Field(exclude_if=lambda value: value is None)] = None
    rare_every: Annotated[int | None, Field(exclude_if=lambda value: value is None)] = None
    """One step in so many takes `rare_s` beside, the first among them; `None`: all steps are alike."""

    @property
    def lasting_step_s(self) -> float | None:
        """On average in a long job, with its part of that."""
        if self.step_s is None or self.rare_s is None or self.rare_every is None:
            return self.step_s
        return self.step_s + self.rare_s / self.rare_every

    def rare_job_s(self, steps: float) -> float:
        """What is done now and then takes so much in a job of `steps`."""
        return rare_work_s(self.rare_s, self.rare_every, steps)

    @classmethod
    def of(cls, prediction: Prediction) -> Self:
        """What a record keeps of a plan's prediction."""
        return cls(
            step_s_low=prediction.step_s_low,
            step_s=prediction.step_s,
            step_s_high=prediction.step_s_high,
            peak_gpu_bytes=prediction.peak_gpu_bytes,
            peak_host_bytes=prediction.peak_host_bytes,
            bottleneck=prediction.bottleneck,
            basis=prediction.basis,
            floor_s=prediction.floor_s,
            rare_s=prediction.rare_s,
            rare_every=prediction.rare_every,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunModel:
    name: str
    random_weights: bool
    parameters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Where a run ran. `None`: could not be read."""

    gpu_name: str | None
    gpu_driver: str | None
    gpu_total_bytes: int | None
    link: str | None
    """Such as `PCIe 5 x16`."""
    cpu: str
    cores_usable: int
    host_memory_bytes: int
    platform: str
    python: str
    torch: str | None
    transformers: str | None
    commit: str | None
    dirty: bool | None
    """Whether tracked files differed from the commit."""
    program: str
    """Version of lspzo-bench."""
    emulated: str | None = None
    """Name of the emulated machine."""
    packages: dict[str, str] = field(default_factory=dict)
    compute_capability: str | None = None
    """Of the GPU, such as `9.0`."""
    notes: tuple[str, ...] = ()
    """What is not as on usual hardware, a sentence each."""
    gpu_allocator: Annotated[str | None, Field(exclude_if=lambda value: value is None)] = None
    """What torch's allocator of GPU memory was told, such as `expandable_segments:True`; `None`: nothing, or
    there is no GPU, or a record of before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Emulation:
    """What of another machine a run was to be held to, and what it was held to. `None`: not measured."""

    vram_bytes: int
    """For tensors, without CUDA's context."""
    threads: int
    rates: LinkRates
    link: Literal["emulated", "not emulated", "unused"]
    """`not emulated`: the engine's copies are made by a library, at full speed. `unused`: it makes none."""
    threads_held: int | None = None
    vram_bytes_held: int | None = None
    """The smaller of what was asked for, the job's own limit and what the GPU has."""
    rates_held: LinkRates | None = None
    """Of calibration copies in the run's process, before its set-up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CriteriaStamp:
    sha256: str
    time: str
    """When the run that carries it began, ISO 8601 in UTC."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of one method in a process of its own: what was asked, what was planned, what was measured."""

    id: str
    end_state: EndState
    end_reason: str | None
    """One line; `None` for `ok`."""
    engine: str
    round: int
    """Which repetition in its folder, from 1."""
    time: str
    """When the run began, ISO 8601 in UTC."""
    model: RunModel
    job: dict[str, Any]
    """The job as `harness.records.job.Job` dumps it. Of a decoding run: `batch_size` prompts of `seq_len`
    tokens, `warmup_steps` of which the first is the prefill, and then `steps` decoding steps that count."""
    plan: Plan
    samples: tuple[Sample, ...]
    summary: Summary
    predicted: Predicted | None
    environment: Environment
    criteria: CriteriaStamp | None = None
    traced: bool = False
    """The engine kept a trace: times and host memory hold what that cost, and are not to be quoted."""
    trace_file: str | None = None
    """Where the trace lies, relative to the folder of results; `None`: there is none."""
    emulation: Emulation | None = None
    """`None`: the machine was used as it is."""
    scenario: ScenarioName = "train"
    sampling: Sampling | None = None
    """How a decoding run chose its tokens; `None`: the run trained."""
    first_token_s: float | None = None
    """Of a decoding run, the prefill, in which the next step is already begun; `None`: not measured. In
    records without `tokens` it was the first of its process, start-up included."""
    tokens: int | None = None
    """Of a decoding run, of all sequences in the steps that count. `None`: the run trained, or its record is
    of before this was kept."""
    notes: tuple[str, ...] | None = None
    """What of the settings the engine could not have, such as compiled blocks, and why, a sentence each;
    `None`: the record is of before they were kept, or its run never began."""
    disturbance: Annotated[str | None, Field(exclude_if=lambda value: value is None)] = None
    """What held the GPU back while it ran, in a sentence; `None`: nothing that NVML knows of, or the record
    is of before it was asked."""
    governance: Governance | None = None
    """Where its files lay and what could leave the machine; `None`: its record is of before this was kept."""
    ranks: Annotated[tuple[Summary, ...], Field(exclude_if=lambda value: not value)] = ()
    """Of each process of this machine, in their order, where a run had several: one for each GPU. `samples`
    and `summary` are then those of the first; its peak of GPU memory is that of the GPU with the largest, its
    host memory, pinned memory and energy are those of all."""
    schema_version: int = SCHEMA_VERSION

    @property
    def tokens_per_step(self) -> float:
        """Tokens of one step: those of all micro-batches, or one of each sequence. Without padding where the
        run counted it; records of before did not."""
        if self.summary.real_tokens_per_step is not None:
            return self.summary.real_tokens_per_step
        sequences = int(self.job["batch_size"])
        if self.scenario == "decode":
            return sequences
        return sequences * int(self.job["seq_len"]) * int(self.job.get("accumulation", 1))


_RECORDS: dict[ScenarioName, str] = {"train": "run record", "decode": "generation record"}


def load_run(path: Path, scenario: ScenarioName = "train") -> Run:
    """The record at `path`. Raises `UserError` if it is none of `scenario` that this version reads.

    The first records of decoding runs do not name their scenario; that they sampled tells it.
    """
    run = read_document(path, Run, SCHEMA_VERSION, _RECORDS[scenario])
    if run.sampling is not None:
        run = replace(run, scenario="decode")
    if run.scenario != scenario:
        why = f"is a {_RECORDS[run.scenario]}, not a {_RECORDS[scenario]}"
        raise UserError(str(path), why, "move it to the folder of its kind")
    for name in ("batch_size", "seq_len"):
        if not isinstance(run.job.get(name), int):
            raise UserError(str(path), f"its job says no {name}", "take the record as it was written")
    return run


def encode_run(run: Run) -> bytes:
    """The bytes of its record."""
    return to_json(run).encode("utf-8")


RECORD_BYTES, SAMPLE_BYTES = 2**16, 200
"""Of a record without its samples, and of a sample in it, generously."""


def most_record_bytes(steps: int) -> int:
    """About what the record of a run of so many steps, warm-up included, takes at most."""
    return RECORD_BYTES + SAMPLE_BYTES * steps
