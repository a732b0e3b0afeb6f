"""From a folder of runs to what one small file to share holds."""

from __future__ import annotations

import re

from engines import public_engines
from engines.errors import UserError
from harness.models.configs import NAMED_SHAPES
from harness.records.memory_limits import gpu_taken_bytes
from harness.records.run import Run
from harness.records.stats import Rounds, over_runs
from harness.sharing.shared_result import OWN_MODEL, TEXT, SharedMachine, SharedMethod, Submission
from reports.load import Loaded
from reports.measured.measurements import group, largest, predicted, typical


def submission_of(loaded: Loaded) -> Submission:
    """Of a folder of runs. Raises `UserError` for what says nothing of its machine: emulated or traced runs,
    or none that ended well."""
    runs = loaded.runs
    best = next((run for run in runs if run.end_state == "ok"), None)
    if best is None:
        raise UserError(loaded.name, "no run ended well, so there is nothing to share", "name another folder")
    if any(run.emulation is not None for run in runs):
        raise UserError(
            loaded.name, "was measured on an emulated machine, whose times are nobody's", "share real runs"
        )
    if any(run.traced for run in runs):
        raise UserError(loaded.name, "was traced, which costs time", "run it again without --trace")
    where, job = best.environment, loaded.job
    all_ = group(runs, loaded.machine)
    named = job.model.name in NAMED_SHAPES
    return Submission(
        day=min(run.time for run in runs)[:10],
        machine=SharedMachine(
            gpu=None if where.gpu_name is None else _plain(where.gpu_name),
            gpu_memory_bytes=where.gpu_total_bytes,
            link=None if where.link is None else _plain(where.link),
            cpu=_plain(where.cpu),
            cores=where.cores_usable,
            host_memory_bytes=where.host_memory_bytes,
        ),
        model=job.model.name if named else OWN_MODEL,
        parameters=best.model.parameters,
        layers=job.model.layers,
        random_weights=job.model.random_weights,
        batch_size=job.batch_size,
        seq_len=job.seq_len,
        accumulation=job.accumulation,
        dtype=job.dtype,
        checkpointing=job.checkpointing,
        data=job.data.train if job.data.train in ("random", "builtin") else "own",
        program=_plain(where.program),
        commit=where.commit,
        torch=None if where.torch is None else _plain(where.torch),
        gpus=job.limits.gpus,
        methods=tuple(_method(all_.of(engine)) for engine in all_.engines if engine in public_engines()),
    )


def _method(rounds: Rounds) -> SharedMethod:
    expected = predicted(rounds)
    energy = typical(rounds, lambda run: run.summary.energy_j)

    def peak_host(run: Run) -> float | None:
        return run.summary.peak_host_bytes

    medians = [found.median for run in rounds.ok if (found := over_runs([run], _median)) is not None]
    return SharedMethod(
        engine=rounds.engine,
        settings={key: value for key, value in rounds.runs[0].plan.settings.items() if _is_plain(value)},
        runs=len(rounds.runs),
        step_s=tuple(medians),
        tokens_per_s=rounds.tokens_per_s.median if rounds.tokens_per_s else None,
        gpu_bytes=_whole(largest(rounds, gpu_taken_bytes)),
        host_bytes=_whole(largest(rounds, peak_host)),
        predicted_step_s=expected.step_s if expected else None,
        energy_j=energy,
    )


def _median(run: Run) -> float | None:
    return run.summary.step_s_median


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _is_plain(value: object) -> bool:
    """A number, a switch or a word; a path is none."""
    return isinstance(value, bool | int | float) or (
        isinstance(value, str) and TEXT.fullmatch(value) is not None
    )


def _plain(text: str) -> str:
    """Letters that a name of hardware has."""
    return re.sub(r"[^\w .,()@+:=%'-]", " ", text, flags=re.ASCII)[:100].strip() or "unnamed"
