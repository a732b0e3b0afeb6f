"""Run records, plans and folders made in code, for tests of what comes after measuring."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from settings_given import given_settings

from engines.base import LinkRates
from harness.records.job import Job, make_job, save_job
from harness.records.run import (
    CriteriaStamp,
    Emulation,
    EndState,
    Environment,
    Predicted,
    Run,
    RunModel,
    Sample,
    Summary,
    encode_run,
)
from harness.records.stats import step_statistics
from profiles.documents import write_whole
from profiles.machine import Cpu, Figure, Gpu, HostMemory, LinkFigures, Machine, absent, save_machine
from profiles.planning.plan import Plan, Prediction

GPU_BYTES = 24 * 10**9
HOST_BYTES = 128 * 10**9


@functools.cache
def _job_adapter() -> TypeAdapter[Job]:
    return TypeAdapter(Job)


@functools.cache
def _plain_job() -> Job:
    return make_test_job(steps=8)


def make_test_job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "model": {"name": "opt-1.3b", "random_weights": True},
        "batch_size": 2,
        "seq_len": 512,
        "steps": 8,
        "warmup_steps": 2,
        "limits": {"vram_bytes": GPU_BYTES},
    }
    return make_job(values | changes, "test job")


def make_environment(**changes: Any) -> Environment:
    environment = Environment(
        gpu_name="NVIDIA RTX 4090",
        gpu_driver="580.65.06",
        gpu_total_bytes=25_757_220_864,
        link="PCIe 4 x16",
        cpu="AMD Ryzen 9 7950X",
        cores_usable=16,
        host_memory_bytes=HOST_BYTES,
        platform="Linux 6.8",
        python="3.12.3",
        torch="2.13.0",
        transformers="5.23.0",
        commit="c0ffee0123456789abcdef0123456789abcdef01",
        dirty=False,
        program="0.1.0",
        packages={"safetensors": "0.5.3", "triton": "3.9.0"},
    )
    return replace(environment, **changes)


def make_plan(engine: str, *, fits: bool = True, step_s: float | None = 1.0, **changes: Any) -> Plan:
    settings: dict[str, dict[str, Any]] = {"lsp": {"d": 512, "r": 4}, "zo2": {"resident_blocks": 0}}
    plan = Plan(
        engine=engine,
        settings=given_settings(engine, changes.pop("settings", settings.get(engine, {}))),
        fits=fits,
        why_not=None if fits else "12.5 GB of GPU memory are missing",
        prediction=Prediction(
            step_s_low=None if step_s is None else step_s * 0.8,
            step_s=step_s,
            step_s_high=None if step_s is None else step_s * 1.3,
            peak_gpu_bytes=6 * 10**9,
            peak_host_bytes=30 * 10**9,
            pinned_bytes=3 * 10**9,
            h2d_bytes=2 * 10**9,
            d2h_bytes=10**9,
            bottleneck="h2d",
            basis="closed form on the rates of the machine profile",
        ),
        reasons=("fits with 10 GB to spare",),
        verify_command=f"lspzo-bench compare --model opt-1.3b --random-weights --engines {engine}",
    )
    return replace(plan, **changes)


def make_samples(
    step_s: Sequence[float], losses: Sequence[float | None], warmup: int = 2
) -> tuple[Sample, ...]:
    """`step_s` are the counted steps; warm-ups of five times the first come before them."""
    times = [step_s[0] * 5] * warmup + list(step_s)
    return tuple(
        Sample(step=i, warmup=i < warmup, step_s=time, loss=losses[min(i, len(losses) - 1)])
        for i, time in enumerate(times)
    )


def make_run(
    engine: str = "zo2",
    *,
    round: int = 1,
    end_state: EndState = "ok",
    end_reason: str | None = None,
    step_s: Sequence[float] = (1.0, 1.1, 0.9, 1.0, 1.0, 1.05, 0.95, 1.0),
    losses: Sequence[float | None] = (3.0, 2.9, 2.8, 2.8, 2.7, 2.6, 2.6, 2.5, 2.5, 2.4),
    job: Job | None = None,
    plan: Plan | None = None,
    environment: Environment | None = None,
    stamp: str | None = None,
    time: str | None = None,
    **summary: Any,
) -> Run:
    """A run that measured something if `end_state` lets it, with the peaks of a 1.3 B model."""
    job = job or _plain_job()
    plan = plan or make_plan(engine, fits=end_state != "skipped_infeasible")
    time = time or f"2026-11-21T10:{10 + round:02d}:00+00:00"
    measured = end_state in ("ok", "nan_loss", "timeout", "interrupted")
    samples = make_samples(step_s, losses) if measured else ()
    values: dict[str, Any] = {}
    if measured:
        values = asdict(step_statistics(samples, job.workload.tokens_per_step)) | {
            "setup_s": 4.0,
            "peak_gpu_allocated_bytes": 5_500_000_000,
            "peak_gpu_reserved_bytes": 6_000_000_000,
            "peak_gpu_nvml_bytes": 6_700_000_000,
            "peak_host_bytes": 31_000_000_000,
            "pinned_bytes": 3_000_000_000,
            "energy_j": 310.0,
            "h2d_bytes": 2_000_000_000,
            "d2h_bytes": 1_000_000_000,
        }
    return Run(
        id=f"{engine}-r{round}",
        end_state=end_state,
        end_reason=end_reason if end_reason or end_state == "ok" else f"scripted {end_state}",
        engine=engine,
        round=round,
        time=time,
        model=RunModel(
            name=job.model.name, random_weights=job.model.random_weights, parameters=1_315_758_080
        ),
        job=_job_adapter().dump_python(job, mode="json"),
        plan=plan,
        samples=samples,
        summary=Summary(**(values | summary)),
        predicted=Predicted.of(plan.prediction),
        environment=environment or make_environment(),
        criteria=None if stamp is None else CriteriaStamp(sha256=stamp, time=time),
        notes=(),
    )


def emulated_run(
    engine: str = "zo2", *, vram_bytes: int = GPU_BYTES, vram_bytes_held: int | None = None, **run: Any
) -> Run:
    """A run that was held to another machine, called `rtx-4090`, of eight CPU threads."""
    rates = LinkRates(h2d_bytes_per_s=24e9, d2h_bytes_per_s=24e9)
    emulation = Emulation(
        vram_bytes=vram_bytes, threads=8, rates=rates, link="emulated", threads_held=8,
        vram_bytes_held=vram_bytes_held, rates_held=rates,
    )  # fmt: skip
    made = make_run(engine, environment=make_environment(emulated="rtx-4090"), **run)
    return replace(made, emulation=emulation)


def scaled(factor: float) -> tuple[float, ...]:
    """Eight counted step times around `factor` seconds."""
    return tuple(factor * x for x in (1.0, 1.1, 0.9, 1.0, 1.0, 1.05, 0.95, 1.0))


def make_sweep(stamp: str | None = None) -> list[Run]:
    """One run or two of every end state that a report must show."""
    runs = []
    for round in (1, 2):
        drift = 1 + 0.01 * round
        runs += [
            make_run(
                "native", round=round, step_s=scaled(0.5 * drift), plan=make_plan("native", step_s=0.45),
                losses=(3.0, 2.6, 2.3, 2.1, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4), stamp=stamp,
                peak_gpu_allocated_bytes=20_000_000_000, peak_gpu_reserved_bytes=21_500_000_000,
                peak_gpu_nvml_bytes=22_300_000_000, peak_host_bytes=5_000_000_000, pinned_bytes=0,
                h2d_bytes=None, d2h_bytes=None,
            ),
            make_run(
                "lsp", round=round, step_s=scaled(0.9 * drift), plan=make_plan("lsp", step_s=1.1),
                losses=(3.0, 2.7, 2.5, 2.3, 2.2, 2.1, 2.0, 1.9, 1.9, 1.8), stamp=stamp,
                peak_gpu_reserved_bytes=9_000_000_000, peak_gpu_allocated_bytes=8_400_000_000,
                peak_gpu_nvml_bytes=9_800_000_000, peak_host_bytes=22_000_000_000,
                pinned_bytes=1_500_000_000,
            ),
            make_run(
                "zo2", round=round, step_s=scaled(1.6 * drift), plan=make_plan("zo2", step_s=1.5), stamp=stamp
            ),
        ]  # fmt: skip
    out_of_memory = "CUDA out of memory: tried to allocate 2.5 GB"
    infeasible = "12.5 GB of GPU memory are missing"
    runs += [
        make_run("mezo", end_state="oom_gpu", end_reason=out_of_memory, stamp=stamp),
        make_run("mezo", round=2, end_state="skipped_infeasible", end_reason=infeasible, stamp=stamp),
        make_run(
            "torchao-offload", end_state="not_available", end_reason="torchao is not installed", stamp=stamp
        ),
    ]
    return runs


def cpu_runs() -> list[Run]:
    """Two rounds of two methods on a machine without a GPU."""
    no_gpu = dict.fromkeys(("gpu_name", "gpu_driver", "gpu_total_bytes", "link"))
    environment = make_environment(**no_gpu, dirty=True, platform="Linux WSL2")
    nothing = dict.fromkeys(
        (
            "peak_gpu_allocated_bytes",
            "peak_gpu_reserved_bytes",
            "peak_gpu_nvml_bytes",
            "energy_j",
            "pinned_bytes",
        )
    )
    evaluated = {
        "eval_loss_first": 0.7, "eval_loss_last": 0.4, "eval_accuracy_first": 0.5,
        "eval_accuracy_last": 0.8125, "cpu_s": 0.2, "h2d_s": 0.01,
    }  # fmt: skip
    job = make_test_job(limits={}, eval_batches=2)
    return [
        make_run(engine, round=i, environment=environment, job=job, **nothing, **evaluated)
        for engine in ("native", "lsp")
        for i in (1, 2)
    ]


def make_breakdown() -> list[Run]:
    """Runs that say where their time goes, each method as far as engines of its kind measure it."""
    floors = {"native": 0.4, "mezo": 0.3, "zo2": 0.6}

    def one(engine: str, step_s: float, **summary: Any) -> Run:
        plan = make_plan(engine, step_s=step_s)
        floor_s = floors.get(engine)
        plan = replace(plan, prediction=replace(plan.prediction, floor_s=floor_s))
        share = None if floor_s is None else floor_s / step_s
        return make_run(engine, step_s=scaled(step_s), plan=plan, floor_share=share, **summary)

    return [
        one("native", 0.5, gpu_s=0.45, idle_s=0.05),
        one("torchao-offload", 1.2),
        one("lsp", 0.9, h2d_s=0.3, d2h_s=0.1, cpu_s=0.45),
        one("mezo", 0.4, gpu_s=0.38, idle_s=0.02, landed_share=0.004),
        one(
            "zo2", 0.8, h2d_s=0.6, d2h_s=0.5, gpu_s=0.5, perturb_s=0.125, idle_s=0.3, landed_share=0.93
        ),
    ]  # fmt: skip


def make_failures() -> list[Run]:
    """The other ends: a folder where nothing went well but one run."""
    return [
        make_run("native", end_state="oom_gpu", end_reason="CUDA out of memory: tried to allocate 2.5 GB"),
        make_run("lsp", end_state="crash", end_reason="the child ended with code 1: RuntimeError: bad slab"),
        make_run("lsp", round=2, end_state="timeout", end_reason="not done within 1800 s"),
        make_run("mezo", end_state="nan_loss", end_reason="the loss of step 6 is not finite",
                 losses=(3.0, 3.5, 9.0, 80.0, 900.0, None)),
        make_run("zo2", energy_j=None, peak_gpu_nvml_bytes=None, pinned_bytes=None),
    ]  # fmt: skip


def make_machine() -> Machine:
    def measured(value: float) -> Figure:
        return Figure(
            value=value, origin="measured", method="median of 7", time="2026-11-21T10:00:00+00:00",
            low=value * 0.98, high=value * 1.01, count=7,
        )  # fmt: skip

    return Machine(
        name="RTX 4090, Ryzen 9 7950X",
        time="2026-11-21T10:00:00+00:00",
        gpu=Gpu(
            name="NVIDIA RTX 4090", total_bytes=25_757_220_864, free_bytes=25_000_000_000, driver="580.65.06",
            compute_capability="8.9", num_gpus=1, copy_bytes_per_s=measured(9.2e11),
            matmul_bf16_flops=measured(1.6e14), matmul_fp16_flops=measured(1.6e14),
            matmul_fp32_flops=measured(5.2e13),
        ),
        gpu_absent_reason=None,
        link=LinkFigures(
            generation_max=4, generation_loaded=4, width_max=16, width_loaded=16,
            h2d_pinned_bytes_per_s=measured(2.53e10), d2h_pinned_bytes_per_s=measured(2.61e10),
            h2d_pageable_bytes_per_s=measured(9.0e9), d2h_pageable_bytes_per_s=measured(8.0e9),
            h2d_duplex_bytes_per_s=measured(2.0e10),
            d2h_duplex_bytes_per_s=absent("the copy engine was busy"),
        ),
        cpu=Cpu(
            name="AMD Ryzen 9 7950X", cores_usable=16, cores_basis="physical cores", cores_total=32,
            threads=16,
            matmul_fp32_flops=measured(1.5e12), matmul_bf16_flops=absent("no bf16 instructions"),
            adam_elements_per_s=measured(1.4e9),
        ),
        memory=HostMemory(
            total_bytes=HOST_BYTES, available_bytes=120 * 10**9, total_basis="the machine's memory",
            swap_bytes=0,
            copy_bytes_per_s=measured(6.1e10),
        ),
        platform="Linux 6.8",
        versions={"python": "3.12.3", "torch": "2.13.0", "cuda": "13.0"},
    )  # fmt: skip


def write_folder(
    folder: Path,
    runs: Sequence[Run],
    *,
    machine: Machine | None = None,
    plans: Sequence[Plan] = (),
    criteria: str | None = None,
    job: Job | None = None,
) -> Path:
    """What `compare` leaves behind."""
    folder.mkdir(parents=True, exist_ok=True)
    save_job(job or make_test_job(), folder / "job.toml")
    for run in runs:
        save_run(run, folder / "runs" / f"{run.id}.json")
    if machine is not None:
        save_machine(machine, folder / "machine.json")
    if plans:
        dumped = TypeAdapter(list[Plan]).dump_python(list(plans), mode="json")
        document = {"plans": dumped, "schema_version": 1}
        (folder / "plans.json").write_text(json.dumps(document), encoding="utf-8")
    if criteria is not None:
        (folder / "criteria.toml").write_text(criteria, encoding="utf-8")
    return folder


def save_run(run: Run, path: Path) -> None:
    write_whole(path, encode_run(run))


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
