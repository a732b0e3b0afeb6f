"""Where, with what and under which conditions the runs were made, as plain text. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engines.errors import UserError
from engines.settings.given import Value
from harness.records.columns import Column
from harness.records.job import ModelSource
from harness.records.memory_limits import imposed_gpu_bytes, imposed_host_bytes
from harness.records.run import Environment, Run
from profiles.language import enumerated, large_count, quantity, translated
from profiles.units import NOT_MEASURED, format_bytes
from reports.decide import Verdict
from reports.format import Table, counted, digits, method_flags, minute, model_title, span
from reports.load import Loaded, engine_order
from reports.measured.measurements import Measurements, typical
from reports.messages import say, several_items


def told_of(loaded: Loaded) -> str:
    """What a verdict is of: the model, the machine and what it was held to, and the days of the runs."""
    run, limits = best_known(loaded.runs), loaded.job.limits
    machines = dict.fromkeys(machine_in_short(run.environment, limits.ranks) for run in loaded.runs)
    machine = enumerated(machines)
    if held := _held_memory(run):
        machine = say("verdict.held", machine=machine, what=enumerated(held))
    return named(loaded.job.model, machine, [run.time for run in loaded.runs])


def named(model: ModelSource, machine: str, times: Sequence[str]) -> str:
    """Model, machine and days in one sentence. `times` are ISO 8601."""
    days = sorted(each[:10] for each in times)
    return say("verdict.told_of", model=model_title(model), machine=machine, days=span(days[0], days[-1]))


def machine_in_short(environment: Environment, gpus: int = 1) -> str:
    """Its GPUs, or its processor where it has none; if it was another that stood in for it, both."""
    machine = environment.gpu_name or environment.cpu
    if environment.gpu_name is not None and gpus > 1:
        machine = say("setting.gpus", count=gpus, gpu=machine)
    if environment.emulated is None:
        return machine
    return say("index.emulated", emulated=environment.emulated, machine=machine)


def setting(loaded: Loaded) -> tuple[tuple[str, str], ...]:
    """The question and where it was asked, by name and text."""
    job, run = loaded.job, best_known(loaded.runs)
    environment = run.environment
    gpu = say("setting.no_gpu")
    if environment.gpu_name is not None:
        parts = [environment.gpu_name, format_bytes(environment.gpu_total_bytes), environment.link]
        gpu = enumerated(part for part in parts if part and part != NOT_MEASURED)
        if job.limits.gpus > 1:
            gpu = say("setting.gpus", count=job.limits.gpus, gpu=gpu)
    held = _held(run)
    weights = "random_weights" if job.model.random_weights else "checkpoint"
    accumulation = say("setting.accumulation", count=job.accumulation) if job.accumulation > 1 else ""
    return (
        (
            say("setting.question_label"),
            say(
                "setting.question", model=model_title(job.model),
                held=say("setting.question_held", what=held) if held else "",
            ),
        ),
        (
            say("setting.model_label"),
            say(
                "setting.model", model=model_title(job.model), parameters=_parameters(loaded.runs),
                weights=say(f"setting.{weights}"),
            ),
        ),
        (
            say("setting.workload_label"),
            say(
                "setting.workload", batch_size=job.batch_size, seq_len=job.seq_len, accumulation=accumulation,
                dtype=job.dtype, steps=job.steps, warmup_steps=job.warmup_steps,
                data=data_name(job.data.train),
                checkpointing=_recomputed(loaded),
            ),
        ),
        (
            say("setting.machine_label"),
            say(
                "setting.machine", gpu=gpu, cpu=environment.cpu, cores=environment.cores_usable,
                memory=format_bytes(environment.host_memory_bytes),
                held=say("setting.machine_held", what=held) if held else "",
            ),
        ),
        (say("setting.date_label"), period([run.time for run in loaded.runs])),
        (say("setting.validity_label"), say("setting.validity")),
    )  # fmt: skip


def _recomputed(loaded: Loaded) -> str:
    """Whether blocks may be run again in the backward pass, and how many of them each method ran again."""
    if not loaded.job.checkpointing:
        return say("setting.checkpointing_off")
    done = {run.engine: count for run in loaded.runs if (count := _checkpointed_blocks(run)) is not None}
    told = [say("setting.recomputed", engine=each, blocks=_blocks(count)) for each, count in done.items()]
    methods = say("setting.recomputed_by", methods=several_items(told)) if told else ""
    return say("setting.checkpointing_on", methods=methods)


def _checkpointed_blocks(run: Run) -> Value | None:
    """`None`: it did not end well, or its method has no such setting."""
    settings = run.plan.settings
    if run.end_state != "ok":
        return None
    try:
        found: Value | None = getattr(settings.typed, "checkpointed_blocks", None)
    except UserError:  # of a version with other settings
        return settings.get("checkpointed_blocks")
    return found


def _blocks(count: Value) -> str:
    if count in ("all", 0):
        return say("setting.blocks_all" if count else "setting.blocks_none")
    return say("setting.blocks", count=count)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A run, file or plan that gave no result."""

    what: str
    """The run's id, the file's name, or the mark for none."""
    engine: str = ""
    end: str
    """Key of its meaning in the texts; of a run its end state."""
    is_run: bool = False
    reason: str


FAILURES: tuple[Column[Failure], ...] = (
    Column("run", lambda one: one.what),
    Column("method", lambda one: one.engine),
    Column("end", lambda one: one.end if one.is_run else ""),
    Column("meaning", lambda one: say(f"end.{one.end}")),
    Column("reason", lambda one: translated(one.reason)),
)


def failures_table(loaded: Loaded) -> Table | None:
    """Every run that did not end ok, every file that could not be read, every plan that was not run."""
    rows = [
        Failure(
            what=run.id,
            engine=run.engine,
            end=run.end_state,
            is_run=True,
            reason=run.end_reason or "",
        )
        for run in loaded.runs
        if run.end_state != "ok"
    ]
    rows += [Failure(what=broken.file, end="unreadable", reason=broken.reason) for broken in loaded.broken]
    ran = {run.engine for run in loaded.runs}
    rows += [
        Failure(what=say("tile.none"), engine=plan.engine, end="not_run", reason=plan.why_not or "")
        for plan in loaded.plans
        if plan.engine not in ran
    ]
    return Table.of(FAILURES, rows) if rows else None


def provenance(loaded: Loaded, verdict: Verdict) -> tuple[tuple[str, str], ...]:
    """What made these numbers, by name and text."""
    runs = loaded.runs
    environment = best_known(runs).environment
    missing = say("reproduce.not_known")
    versions = {
        "python": environment.python,
        "torch": environment.torch,
        "transformers": environment.transformers,
    }
    versions |= environment.packages
    samples = [sample for run in runs for sample in run.samples]
    dirty = {run.environment.dirty for run in runs}
    state = "dirty" if True in dirty else "clean" if dirty == {False} else "unknown"
    facts = {
        "program": f"lspzo-bench {_several(run.environment.program for run in runs)}",
        "commit": say(
            "reproduce.commit_state",
            commit=_several(run.environment.commit for run in runs),
            state=say(f"reproduce.{state}"),
        ),
        "versions": enumerated(f"{name} {version or missing}" for name, version in versions.items()),
        "driver": _several(run.environment.gpu_driver for run in runs),
        "platform": _several(run.environment.platform for run in runs),
        "seeds": _several(str(run.job.get("seed", 0)) for run in runs),
        "criteria": verdict.criteria_sha256 or say("tile.none"),
        "stamped": _several((run.criteria.sha256 if run.criteria else None for run in runs), "tile.none"),
        "runs": period([run.time for run in runs]),
        "samples": say(
            "reproduce.counted",
            kept=counted("step", len(samples)),
            warmup=sum(sample.warmup for sample in samples),
            runs=counted("run", len(runs)),
        ),
    }
    shown = tuple((say(f"reproduce.{key}"), text) for key, text in facts.items())
    return (*shown, (say("integrity.label"), _about_manifest(loaded)))


def _about_manifest(loaded: Loaded) -> str:
    """What the manifest shows, and what no manifest can."""
    if any(one.kind == "no_manifest" for one in loaded.findings):
        return say("integrity.absent")
    count = len(loaded.findings)
    found = say("integrity.not_sound", count=count) if count else say("integrity.sound")
    return say("show.sentences").join((found, say("integrity.means")))


def commands(loaded: Loaded) -> tuple[str, ...]:
    """What to type, beside this report's folder, to make it again."""
    methods = method_flags(sorted({run.engine for run in loaded.runs}, key=engine_order))
    rounds = max(run.round for run in loaded.runs)
    profile = " --profile machine.json" if loaded.machine is not None else ""  # the same plans
    criteria = " --criteria criteria.toml" if loaded.criteria is not None else ""
    sweep = f"--job job.toml {methods} --rounds {rounds}"
    return (
        f"lspzo-bench compare {sweep}{profile}{criteria} --out again",
        "lspzo-bench report again",
    )


def not_measured(all_: Measurements) -> tuple[str, ...]:
    """What these runs leave open: fields without a value, methods without a run, and what no run shows."""
    fields = {
        "gpu_memory": lambda run: run.summary.peak_gpu_allocated_bytes,
        "nvml": lambda run: run.summary.peak_gpu_nvml_bytes,
        "host_memory": lambda run: run.summary.peak_host_bytes,
        "energy": lambda run: run.summary.energy_j,
        "held_out": lambda run: run.summary.eval_loss_last,
    }
    lines = []
    for key, value in fields.items():
        without = [e for e in all_.engines if all_.of(e).ok and typical(all_.of(e), value) is None]
        if without:
            lines.append(say("open.field", what=say(f"open.{key}"), engines=enumerated(without)))
    nothing = [engine for engine in all_.engines if not all_.of(engine).ok]
    if nothing:
        lines.append(say("open.methods", engines=enumerated(nothing)))
    return (*lines, *(say(f"open.{key}") for key in ("quality", "clocks", "cost", "scale")))


def _held(run: Run) -> str:
    """To what less than its machine has `run` was held; empty where to nothing."""
    parts = _held_memory(run)
    if run.emulation is not None:
        threads = run.emulation.threads_held or run.emulation.threads
        parts.append(say("setting.held_emulated", threads=threads, machine=run.environment.emulated))
    return enumerated(parts)


def _held_memory(run: Run) -> list[str]:
    """Limits of GPU and host memory that were imposed on it."""
    caps = {"held_gpu": imposed_gpu_bytes(run) if run.environment.gpu_name is not None else None,
            "held_host": imposed_host_bytes(run)}  # fmt: skip
    return [say(f"setting.{key}", memory=format_bytes(cap)) for key, cap in caps.items() if cap is not None]


_TOLD = {"random": "setting.random_data", "builtin": "setting.builtin_data"}


def data_name(name: str) -> str:
    """Of the training data, as a reader is told it."""
    return say(_TOLD[name]) if name in _TOLD else name


def _parameters(runs: Sequence[Run]) -> str:
    counts = [run.model.parameters for run in runs if run.model.parameters > 0]
    if not counts:
        return say("setting.parameters_unknown")
    return say("setting.parameters", count=large_count(max(counts), digits))


def period(times: Sequence[str]) -> str:
    """From the first to the last of times in ISO 8601."""
    first, last = minute(min(times)), minute(max(times))
    return span(first, last) if first != last else quantity(first)


def _several(values: Iterable[str | None], missing: str = "reproduce.not_known") -> str:
    return enumerated(sorted({value if value is not None else say(missing) for value in values}))


def best_known(runs: Sequence[Run]) -> Run:
    """A run whose environment is known best: one that ended ok, else the first."""
    return next((run for run in runs if run.end_state == "ok"), runs[0])
