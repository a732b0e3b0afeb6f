"""Predictions against measurement over a grid of jobs: time, reserved GPU memory, host memory, fits or not.

    python tests/studies/prediction_grid.py run --out DIR [--cells 1-20] [--seconds 400] [--machine FILE]
        [--edges-at-once 4] [--skip FOLDER]
    python tests/studies/prediction_grid.py table DIR [DIR ...]

`prediction_grid.toml` lists the cells. Those with a record in a folder beside it were looked at when
constants of the cost model were changed (the README of `prediction_grid_h200` says which), and are no test of
them; none of the others was. `run` measures the machine
(`DIR/machine.json`), plans every cell for it as `compare` does, and measures each in a process of its own: a
copy (fork) of one that has loaded the libraries and has no CUDA context, which spares ten seconds of loading
them. Records are those of `compare`, in `DIR/runs`; a cell that has one is passed over. Pages of libraries
that a copy does not touch are not among its resident pages, some 0.3 GB; since 1 December they are added, as
a process that loads them itself has them. Host memory is compared where it is several GB. `table` predicts
every record anew, with the settings that it ran with, and prints the errors; of a step also with what
starting an operation took the run itself (`harness.host_speed.started_s`), which leaves the error of the
model alone.

With `--edges-at-once 4` the edges come first, four at a time, each held to its own --vram: what they are
asked is whether memory is enough, and their times say nothing then (they are left out of the table). Each run
of an edge compiles anew, into an empty folder: one that found its kernels timed by another would need less.
`--skip` passes over cells that are not edges and have a record in FOLDER.

Left out too are times of engines that have become faster since (`lsp` and `exact-offload` of before 02:10 of
30 November), and of cells that ran while other work kept the host's other cores busy (`HOST_BUSY`). Where the
card's clock was held low while a cell ran, the table says so and leaves its time out.

A cell with `edge = 1.0` runs with the smallest --vram that the planner calls enough; one with `edge = 0.95`
runs, against the plan, with that much of it, and the same settings.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from hidden_libraries import START_CUDA, hidden  # noqa: E402

from engines.base import LinkRates  # noqa: E402
from engines.costs.exact_offload import few_gradient_blocks  # noqa: E402
from engines.costs.lsp import BLOCK_LAUNCHES  # noqa: E402
from engines.costs.memory.trial import MOST_TOKENS, trial_moment  # noqa: E402
from engines.costs.resources.traffic import Traffic  # noqa: E402
from engines.costs.table import traffic  # noqa: E402
from engines.costs.transformer import runs_as_graphs  # noqa: E402
from engines.settings.parse import parse_settings  # noqa: E402
from harness.host_speed import started_s  # noqa: E402
from harness.pipeline import find_machine, plan_job  # noqa: E402
from harness.records.environment import read_environment  # noqa: E402
from harness.records.job import DataSource, Job, Limits, ModelSource, make_job  # noqa: E402
from harness.records.run import Run, Summary, encode_run, load_run  # noqa: E402
from harness.resolve import resolve_shape  # noqa: E402
from harness.runs.attempt import record_of  # noqa: E402
from harness.runs.emulate import AppliedLimits, Emulated  # noqa: E402
from harness.runs.launch import Outcome, read_result  # noqa: E402
from harness.runs.memory_sampler import MemorySampler  # noqa: E402
from harness.runs.processes import child_environment  # noqa: E402
from harness.runs.worker import Request  # noqa: E402
from profiles.documents import adapter, to_json, write_whole  # noqa: E402
from profiles.machine import Figure, Machine, load_machine, save_machine  # noqa: E402
from profiles.planning.budget import Budget, budget_of, taken_bytes  # noqa: E402
from profiles.planning.plan import Plan  # noqa: E402
from profiles.planning.predict import predict  # noqa: E402
from profiles.rates import with_launches_of  # noqa: E402
from profiles.system.gpu_allocator import is_expandable  # noqa: E402
from profiles.system.nvml import open_device  # noqa: E402
from profiles.units import parse_bytes  # noqa: E402

CELLS = Path(__file__).with_suffix(".toml")
STEPS, WARMUP = 6, 3
WARMUP_BESIDE_THE_CPU = 13
"""Of `lsp` and `exact-offload`, which try how many threads to use in their first steps."""
SAMPLE_S = 0.03
UNTOUCHED_S, UNTOUCHED_BELOW_BYTES = 2.0, 8_000_000_000
"""How often a copy is asked which pages it has not touched, and above what it is left alone: the kernel goes
through all that it has, and they are a twentieth of it at the most."""
CELL_S = 120.0
"""The longest that a cell may take."""
LEAST_HOST_BYTES = 4_000_000_000
COUNTED_ONCE_FROM = "2026-11-29T16:00"
"""Records of before count pages of host memory that helpers share once for each."""
FREED_FROM = "2026-11-29T22:00"
"""Before it forward-only methods kept what the first step's blocks had beside the pool of their graphs."""
ALL_GRADIENTS_FROM = "2026-11-30T02:30"
"""Before it `gradient_blocks=auto` of `exact-offload` was a part of the blocks; now it is all of them."""
CAPTURED_FROM = "2026-11-30T18:40"
"""Before it no block of `exact-offload` ran as a CUDA graph."""
UPDATES_CAPTURED_FROM = "2026-12-01T02:25"
"""Before it no step of `backward-optimizer` was a CUDA graph."""
UNLOCKED_FROM = "2026-11-30T02:10"
"""Before it steps of `lsp` and `exact-offload` stood still at their end while clocks were read, 11 to 18 ms
with 24 blocks: their times are not those of the engines of today."""
APPLIED_AS_GRAPHS_FROM = "2026-12-01T02:20"
"""Before it `lsp` started the kernels that apply a block's updates one by one (`STARTED_BEFORE`)."""
STARTED_BEFORE = 18
"""Operations that this and the rest of a block whose weights stay took, for each matrix of it and once a
step: 19 as `engines.costs.lsp.BLOCK_LAUNCHES` was counted until then, with what counts outside of the blocks
since."""
LOSS_COMPILED_FROM = "2026-11-30T06:15"
"""Before it compiled blocks of `qlora` that run again kept what their products gave."""
MADE_FIRST_FROM = "2026-11-30T12:00"
"""Before it `lsp` made gradients and moments of what is no matrix of a block in its first step, in the places
of the logits, and streamed steps had these cut; and the trial of a model took `TRIED_BEFORE` tokens of a
sequence."""
TRIED_BEFORE = 128
HOST_BUSY = ("2026-11-30T05:23", "2026-11-30T05:34")
"""Between these tests ran on the host's other cores and its other GPU: times are no test."""
BESIDE_OTHERS = "other runs had the same GPU"
EDGE_STEP = 10_000_000
"""Edges are found to this many bytes."""
COMPILED = "compiled"
"""In the folder of a run that compiles apart: what torch's compiler makes and what it times."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GridCell:
    """One job and the method that runs it."""

    name: str
    engine: str
    model: str
    batch: int
    tokens: int
    dtype: str = "bf16"
    accumulation: int = 1
    checkpointing: bool = True
    vram: str | None = None
    link: str | None = None
    """Rate of each direction of the emulated link, such as `24GB` a second."""
    edge: float | None = None
    settings: dict[str, Any]

    def job(self, vram_bytes: int | None = None, chosen: Mapping[str, Any] | None = None) -> Job:
        """With `chosen` for settings, in place of the cell's."""
        settings = self.settings if chosen is None else {**chosen}
        limit = vram_bytes if self.vram is None else parse_bytes(self.vram, "vram")
        tries_threads = self.engine in ("lsp", "exact-offload") and self.edge is None
        return Job(
            model=ModelSource(name=self.model, random_weights=True),
            data=DataSource(train="random"),
            batch_size=self.batch,
            seq_len=self.tokens,
            accumulation=self.accumulation,
            dtype=self.dtype,  # type: ignore[arg-type]
            checkpointing=self.checkpointing,
            steps=STEPS,
            warmup_steps=WARMUP_BESIDE_THE_CPU if tries_threads else WARMUP,
            limits=Limits(vram_bytes=limit, timeout_s=CELL_S),
            settings=make_job(
                {"model": {"name": self.model}, "settings": {self.engine: settings}}, self.name
            ).settings
            if settings
            else {},
        )


def grid_cells(path: Path = CELLS) -> list[GridCell]:
    """Each cell of the list, with its defaults."""
    told = tomllib.loads(path.read_text(encoding="utf-8"))["cells"]
    return [GridCell(**{"settings": {}, **each}) for each in told]


def planned(cell: GridCell, machine: Machine) -> tuple[Job, Plan, Machine]:
    """The cell's job and plan, and the machine that it is planned for."""
    if cell.link is not None:
        machine = with_link(machine, parse_bytes(cell.link, "link"))
    job = cell.job()
    shape = resolve_shape(job)

    def plan_with(job: Job) -> Plan:
        (plan,) = plan_job(job, shape, machine, [cell.engine])
        return plan

    if cell.edge is None:
        return job, plan_with(job), machine
    low, high = 0, 160_000_000_000 // EDGE_STEP  # in steps; the high one fits if anything does
    while high - low > 1:
        middle = (low + high) // 2
        if plan_with(cell.job(middle * EDGE_STEP)).fits:
            high = middle
        else:
            low = middle
    job = cell.job(high * EDGE_STEP)
    plan = plan_with(job)
    if cell.edge < 1.0:
        job = cell.job(int(cell.edge * high * EDGE_STEP), {**cell.settings, **plan.settings})
        plan = plan_with(job)
    return job, plan, machine


def with_link(machine: Machine, bytes_per_s: float) -> Machine:
    """`machine` with a link of that rate in each direction, and nine tenths of it with both busy."""

    def told(rate: float) -> Figure:
        return Figure(value=rate, origin="datasheet", method="the rate of the emulated link")

    assert machine.link is not None
    link = replace(
        machine.link,
        h2d_pinned_bytes_per_s=told(bytes_per_s),
        d2h_pinned_bytes_per_s=told(bytes_per_s),
        h2d_duplex_bytes_per_s=told(0.9 * bytes_per_s),
        d2h_duplex_bytes_per_s=told(0.9 * bytes_per_s),
    )
    return replace(machine, name=f"{machine.name}, link of {bytes_per_s / 1e9:g} GB/s", link=link)


def emulated_link(machine: Machine, cell: GridCell) -> Emulated | None:
    """What holds the run to the cell's link; memory is the card's, or what the job says."""
    if cell.link is None or machine.gpu is None or machine.link is None:
        return None
    rates = [
        float(getattr(machine.link, name).value or 0.0)
        for name in (
            "h2d_pinned_bytes_per_s", "d2h_pinned_bytes_per_s",
            "h2d_duplex_bytes_per_s", "d2h_duplex_bytes_per_s",
        )
    ]  # fmt: skip
    return Emulated(
        machine=machine.name,
        vram_bytes=machine.gpu.total_bytes,
        threads=machine.cpu.cores_usable,
        rates=LinkRates(
            h2d_bytes_per_s=rates[0], d2h_bytes_per_s=rates[1],
            h2d_duplex_bytes_per_s=rates[2], d2h_duplex_bytes_per_s=rates[3],
        ),
    )  # fmt: skip


# --- running ------------------------------------------------------------------------------------------


def serve() -> None:
    """Loads the libraries, then runs each folder that stdin names in a copy of this process, one at a time.
    Says on stdout `ready`, and for each folder the copy's process id and how it ended."""
    with hidden(START_CUDA):
        import torch
        import transformers

        import harness.data.batches
        import harness.models.blueprint
        import harness.runs.worker as worker
        from engines import ENGINES, load_engine

    loaded = (torch, transformers, harness.data.batches, harness.models.blueprint)
    assert all(loaded)
    with hidden(START_CUDA):
        for name, row in ENGINES.items():
            with contextlib.suppress(Exception):
                if row.needs_torch:
                    load_engine(name)
    assert not torch.cuda.is_initialized(), "a copy could not have a context of its own"
    print("ready", flush=True)
    for line in sys.stdin:
        folder = Path(line.strip())
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                compile_apart(folder)
                log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT, 0o644)
                os.dup2(log, 1)
                os.dup2(log, 2)
                events = os.open(folder / "events", os.O_WRONLY | os.O_CREAT, 0o644)
                code = worker.main([str(folder), str(events), str(os.getppid())])
            finally:
                os._exit(code)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def make_folder(folder: Path, request: Request, *, apart: bool) -> None:
    """Of a run; one that compiles `apart` finds nothing that an earlier attempt has compiled or timed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "request.json").write_text(to_json(request), encoding="utf-8")
    if apart:
        shutil.rmtree(folder / COMPILED, ignore_errors=True)
        (folder / COMPILED).mkdir()


def compile_apart(folder: Path) -> None:
    """Lets torch's compiler keep what it makes in the run's folder, if the run is to compile apart.

    Kernels of Triton that engines start themselves may come from Triton's own cache: nothing times them, so
    that a run needs the same memory either way, and compiling them one by one would cost each run seconds.
    """
    if (folder / COMPILED).is_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / COMPILED)
        os.environ.pop("TRITON_CACHE_DIR", None)  # torch has its kernels of Triton in its own folder then


def untouched_bytes(server: int, copy: int) -> int:
    """Pages of files that the process `server` has in memory and its copy does not, so far; 0 where the
    kernel does not say."""
    of_server, of_copy = (_file_bytes(pid) for pid in (server, copy))
    if not of_copy:
        return 0
    return sum(max(0, size - of_copy.get(place, 0)) for place, size in of_server.items())


def _file_bytes(pid: int) -> dict[str, int]:
    """Resident bytes of each mapping of a file, by its line in `smaps`."""
    found: dict[str, int] = {}
    place = ""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
            if "-" in line.partition(" ")[0]:
                place = line
            elif line.startswith("Rss:") and "/" in place:
                found[place] = int(line.split()[1]) * 1024
    return found


class Server:
    """The loaded process, started anew where it was lost."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def outcome(self, folder: Path, *, alone: bool = True) -> Outcome:
        """Of the run in `folder`, in a copy of the loaded process; not `alone`: others have the GPU too."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{folder.resolve()}\n")
        process.stdin.flush()
        pid = int(process.stdout.readline())
        device = open_device()
        sampler = MemorySampler([pid], [] if device is None else [device])
        untouched, asked_s = 0, time.monotonic()
        ended: list[str] = []
        deadline_s = time.monotonic() + CELL_S
        os.set_blocking(process.stdout.fileno(), False)
        late = False
        while not ended:
            host_bytes = sampler.take()
            sampler.clocks.take()
            if time.monotonic() > asked_s + UNTOUCHED_S and host_bytes < UNTOUCHED_BELOW_BYTES:
                untouched, asked_s = untouched_bytes(process.pid, pid) or untouched, time.monotonic()
            if not late and time.monotonic() > deadline_s:
                late = True
                os.kill(pid, 9)
            ended = [line for line in [process.stdout.readline()] if line]
            time.sleep(SAMPLE_S)
        os.set_blocking(process.stdout.fileno(), True)
        result = read_result(folder / "result.json")
        if result is None:
            reason = f"took longer than {CELL_S:g} s" if late else f"ended with code {ended[0].strip()}"
            return Outcome(
                end_state="timeout" if late else "crash", end_reason=reason, samples=(), summary=Summary(),
                by_user=False,
            )  # fmt: skip
        return Outcome(
            end_state=result.end_state,
            end_reason=result.end_reason,
            samples=result.samples,
            summary=replace(
                result.summary,
                peak_host_bytes=max(sampler.peak_host_bytes, result.summary.peak_host_bytes or 0) + untouched
                or None,
                peak_gpu_nvml_bytes=sampler.peak_gpu_bytes if alone else None,
            ),
            by_user=False,
            limits=_applied(folder / "events"),
            notes=result.notes,
            disturbance=sampler.clocks.disturbance,
        )

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=child_environment(),
            )
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            if line != "ready\n":
                raise SystemExit("the process that loads the libraries has ended")
        return self._process

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()


def _applied(events: Path) -> AppliedLimits | None:
    """What the run was held to of another machine, if it said so."""
    with contextlib.suppress(OSError):
        for line in events.read_text(encoding="utf-8").splitlines():
            told = json.loads(line)
            if "limits" in told:
                found: AppliedLimits = adapter(AppliedLimits).validate_python(told["limits"])
                return found
    return None


def chosen(cells: Sequence[GridCell], told: str | None) -> Iterator[GridCell]:
    """Those that `1-20,31` names, counted from 1."""
    if told is None:
        yield from cells
        return
    for part in told.split(","):
        first, _, last = part.partition("-")
        yield from cells[int(first) - 1 : int(last or first)]


class Running:
    """What all cells of a call have in common."""

    def __init__(self, arguments: argparse.Namespace, machine: Machine) -> None:
        self.out: Path = arguments.out
        self.machine = machine
        self.environment = read_environment()
        self.deadline_s = None if arguments.seconds is None else time.monotonic() + arguments.seconds
        self.planning = threading.Lock()

    @property
    def is_over(self) -> bool:
        return self.deadline_s is not None and time.monotonic() > self.deadline_s

    def measure(self, cell: GridCell, server: Server, *, alone: bool) -> None:
        """Leaves the cell's record, and says a line."""
        path = self.out / "runs" / f"{cell.name}.json"
        if path.exists() or self.is_over:
            return
        start_s = time.monotonic()
        with self.planning:
            job, plan, planned_for = planned(cell, self.machine)
        if not plan.available or (not plan.fits and cell.edge in (None, 1.0)):
            print(f"{cell.name}: no plan ({plan.why_not})", flush=True)
            return
        began = datetime.now(UTC).isoformat(timespec="seconds")
        request = Request(
            id=cell.name, job=job, shape=resolve_shape(job), plan=plan,
            emulated=emulated_link(planned_for, cell),
        )  # fmt: skip
        folder = self.out / ".work" / cell.name
        make_folder(folder, request, apart=cell.edge is not None)
        outcome = server.outcome(folder, alone=alone)
        told = replace(
            self.environment,
            emulated=None if request.emulated is None else request.emulated.machine,
            notes=self.environment.notes if alone else (*self.environment.notes, BESIDE_OTHERS),
        )
        record = record_of(request, 1, began, told, outcome)
        write_whole(path, encode_run(record))
        print(f"{line_of(record)}  ({time.monotonic() - start_s:.0f} s)", flush=True)


def run(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    (out / "runs").mkdir(parents=True, exist_ok=True)
    known = out / "machine.json"
    running_since = time.monotonic()
    machine = find_machine(arguments.machine, quiet=True, known=known)
    save_machine(machine, known)
    if arguments.seconds is not None:
        arguments.seconds -= time.monotonic() - running_since
    running = Running(arguments, machine)
    cells = list(chosen(grid_cells(arguments.list), arguments.cells))
    if arguments.skip is not None:
        records = [load_run(path) for folder in arguments.skip for path in (folder / "runs").glob("*.json")]
        known_names = {record.id for record in records if record.end_state == "ok"}
        cells = [cell for cell in cells if cell.edge is not None or cell.name not in known_names]
    if arguments.edges_at_once > 1:
        run_edges([cell for cell in cells if cell.edge is not None], running, arguments.edges_at_once)
        cells = [cell for cell in cells if cell.edge is None]
    server = Server()
    for cell in cells:
        running.measure(cell, server, alone=True)
    if running.is_over:
        print(f"{arguments.seconds:g} s are used up; the same command goes on", flush=True)
    server.close()
    print(text_of(rows_of(out)))
    return 0


def run_edges(cells: Sequence[GridCell], running: Running, at_once: int) -> None:
    """In threads with a server each; the two cells of an edge one after the other, as they may need most of
    the GPU."""
    jobs: dict[str, list[GridCell]] = {}
    for cell in cells:
        jobs.setdefault(cell.name.rpartition("-")[0], []).append(cell)
    own = threading.local()
    servers: list[Server] = []

    def measure(pair: list[GridCell]) -> None:
        if not hasattr(own, "server"):
            own.server = Server()
            servers.append(own.server)
        for cell in pair:
            try:
                running.measure(cell, own.server, alone=False)
            except Exception as error:
                print(f"{cell.name}: {error!r}", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(measure, jobs.values()))
    for server in servers:
        server.close()


# --- the table ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A record beside what is predicted for it today. Ratios are predicted over measured."""

    name: str
    engine: str
    end_state: str
    disturbance: str | None
    """What held the GPU back: its time says nothing then, and is left out."""
    fits: bool
    """As the plan of its time called it."""
    step: float | None
    step_at_its_speed: float | None
    """With what starting an operation took the run itself in place of what the probe says, so without what
    the host's other tenants did to either; `None`: it was not measured."""
    inside: bool | None
    """The step took what today's range says."""
    reserved: float | None
    host: float | None


def rows_of(folder: Path) -> list[Row]:
    """Of all records in `folder`, each predicted anew with the settings that it ran with."""
    machine = load_machine(folder / "machine.json")
    return [row_of(load_run(path), machine) for path in sorted((folder / "runs").glob("*.json"))]


def row_of(record: Run, machine: Machine) -> Row:
    job = make_job(record.job, record.id)
    if record.emulation is not None:
        machine = with_link(machine, record.emulation.rates.h2d_bytes_per_s)
    cost = cost_of(record, job)
    budget = budget_as_run(record, machine, job.limits.vram_bytes)
    now, measured = predict(cost, machine, job.workload), record.summary
    took_s, its_s = measured.step_s_median, started_s(record, machine)
    at_its_speed_s = None
    if its_s is not None:
        at_its_speed_s = predict(cost, with_launches_of(machine, its_s), job.workload).step_s

    def over(predicted: float | None, taken: float | None) -> float | None:
        return predicted / taken if predicted and taken and record.end_state == "ok" else None

    of_today = BESIDE_OTHERS not in record.environment.notes and record.disturbance is None
    of_today = of_today and not HOST_BUSY[0] <= record.time < HOST_BUSY[1]
    of_today = of_today and (record.engine not in ("lsp", "exact-offload") or record.time >= UNLOCKED_FROM)
    inside = None
    if of_today and took_s and now.step_s_low is not None and now.step_s_high is not None:
        inside = now.step_s_low <= took_s <= now.step_s_high
    return Row(
        name=record.id,
        engine=record.engine,
        end_state=record.end_state,
        disturbance=record.disturbance,
        fits=record.plan.fits,
        step=over(now.step_s, took_s if of_today else None),
        step_at_its_speed=over(at_its_speed_s, took_s if of_today else None),
        inside=inside,
        reserved=over(taken_bytes(cost, budget), measured.peak_gpu_reserved_bytes)
        if needs_as_today(record)
        else None,
        host=over(now.peak_host_bytes, measured.peak_host_bytes)
        if now.peak_host_bytes > LEAST_HOST_BYTES and record.time >= COUNTED_ONCE_FROM
        else None,
    )


def budget_as_run(record: Run, machine: Machine, vram_bytes: int | None) -> Budget:
    """With torch's allocator as the run had it."""
    told = is_expandable(record.environment.gpu_allocator)
    return budget_of(machine, vram_bytes, None, None, expandable=told)


def needs_as_today(record: Run) -> bool:
    """Whether the GPU memory that it took is what the engine of today would take."""
    if record.engine == "qlora":
        return record.time >= LOSS_COMPILED_FROM
    if record.engine == "lsp" and record.plan.settings.get("weights"):
        return record.time >= MADE_FIRST_FROM
    job = make_job(record.job, record.id)
    if record.engine == "exact-offload" and record.time < MADE_FIRST_FROM:
        return not _trial_decided(record, job)
    if record.engine not in ("mezo", "zo2") or record.time >= FREED_FROM:
        return True
    return not runs_as_graphs(resolve_shape(job), job.workload)


def _trial_decided(record: Run, job: Job) -> bool:
    """Whether the trial with as many tokens as it had before today took more than steps do."""
    trial = trial_moment(resolve_shape(job), job.workload)
    of_tokens = trial["activations"] + trial["logits"]
    longer = min(job.workload.seq_len, TRIED_BEFORE) / min(job.workload.seq_len, MOST_TOKENS)
    return trial["weights"] + longer * of_tokens > cost_of(record, job).peak_gpu_bytes


def cost_of(record: Run, job: Job) -> Traffic:
    """Of a step with the settings that it ran with, as they cost today."""
    given = {name: str(value) for name, value in record.plan.settings.items()}
    shape = resolve_shape(job)
    if record.engine == "exact-offload" and record.time < ALL_GRADIENTS_FROM:
        given.setdefault("gradient_blocks", str(few_gradient_blocks(shape.num_blocks)))
    if record.engine == "exact-offload" and record.time < CAPTURED_FROM:
        given.setdefault("graphs", "false")
    if record.engine == "backward-optimizer" and record.time < UPDATES_CAPTURED_FROM:
        given.setdefault("graphs", "false")
    cost = traffic(record.engine, shape, job.workload, parse_settings(record.engine, given))
    if record.engine == "lsp" and record.time < APPLIED_AS_GRAPHS_FROM:
        return _started_one_by_one(cost, len(shape.matrices))
    return cost


def _started_one_by_one(cost: Traffic, matrices: int) -> Traffic:
    """Of a step of `lsp` that has what is today a graph started kernel by kernel."""
    more = STARTED_BEFORE * matrices - BLOCK_LAUNCHES
    layers = [
        each._replace(python_launches=each.python_launches + more)
        if each.name.startswith("block.") and each.python_launches and not each.launches
        else each
        for each in cost.layers
    ]
    return replace(cost, layers=tuple(layers))


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Of one quantity over all records that have it."""

    count: int
    median: float
    """Of |predicted / measured - 1|."""
    nine_in_ten: float
    """Within which nine in ten are."""


def errors_of(rows: Sequence[Row], ratio: Callable[[Row], float | None]) -> Errors | None:
    off = sorted(abs(found - 1) for row in rows if (found := ratio(row)) is not None)
    if not off:
        return None
    last = min(len(off) - 1, -(-9 * len(off) // 10) - 1)
    return Errors(count=len(off), median=statistics.median(off), nine_in_ten=off[last])


QUANTITIES: dict[str, Callable[[Row], float | None]] = {
    "step": lambda row: row.step,
    "step, of those that timed their launches": lambda row: (
        row.step if row.step_at_its_speed is not None else None
    ),
    "step, with these launches": lambda row: row.step_at_its_speed,
    "reserved GPU memory": lambda row: row.reserved,
    "host memory": lambda row: row.host,
}


def text_of(rows: Sequence[Row]) -> str:
    """The table, for people and as Markdown."""

    def told(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    lines = ["| cell | end | called | step | at the run's own launches | reserved | host |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {row.name} | {row.end_state} | {'fits' if row.fits else 'does not fit'} | {told(row.step)} "
        f"| {told(row.step_at_its_speed)} | {told(row.reserved)} | {told(row.host)} |"
        for row in rows
    ]
    lines += ["", "| predicted over measured | cells | median error | nine in ten within |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for name, ratio in QUANTITIES.items():
        found = errors_of(rows, ratio)
        if found is not None:
            lines.append(f"| {name} | {found.count} | {found.median:.1%} | {found.nine_in_ten:.1%} |")
    ran_out = [row.name for row in rows if row.fits and row.end_state == "oom_gpu"]
    unfit = [row for row in rows if not row.fits]
    ran = [row.name for row in unfit if row.end_state == "ok"]
    inside = [row.inside for row in rows if row.inside is not None]
    lines += [
        "",
        f"Called fitting and out of memory: {len(ran_out)} {', '.join(ran_out)}".rstrip(),
        f"Called unfit and ran: {len(ran)} of {len(unfit)} {', '.join(ran)}".rstrip(),
        f"Steps inside the predicted range: {sum(inside)} of {len(inside)}",
    ]
    lines += [f"Disturbed: {row.name}: {row.disturbance}" for row in rows if row.disturbance is not None]
    return "\n".join(lines)


def line_of(record: Run) -> str:
    """A record beside its plan, while it runs."""
    told, seen = record.plan.prediction, record.summary

    def against(predicted: float | None, taken: float | None, scale: float, unit: str) -> str:
        first, second = ("-" if each is None else f"{each / scale:.3g}" for each in (predicted, taken))
        return f"{first} / {second} {unit}"

    why = record.end_reason or record.disturbance or ""
    return (
        f"{record.id}: {record.end_state} {why} predicted / measured: "
        f"step {against(told.step_s, seen.step_s_median, 1e-3, 'ms')}, "
        f"reserved {against(told.reserved_gpu_bytes, seen.peak_gpu_reserved_bytes, 1e9, 'GB')}, "
        f"allocated {against(told.peak_gpu_bytes, seen.peak_gpu_allocated_bytes, 1e9, 'GB')}, "
        f"host {against(told.peak_host_bytes, seen.peak_host_bytes, 1e9, 'GB')}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    running = commands.add_parser("run", help="measure the cells that have no record yet")
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--list", type=Path, default=CELLS, help="another list of cells")
    running.add_argument("--cells", help="such as 1-20,31; all of the list by default")
    running.add_argument("--seconds", type=float, help="begin no cell after so many")
    running.add_argument("--edges-at-once", type=int, default=1, help="run so many edges side by side, first")
    running.add_argument("--skip", type=Path, nargs="+", help="pass over what these have, edges apart")
    running.add_argument("--machine", type=Path, help="its profile, in place of measuring it")
    table = commands.add_parser("table", help="the errors of what was measured")
    table.add_argument("folders", type=Path, nargs="+")
    commands.add_parser("serve")
    arguments = parser.parse_args()
    if arguments.command == "serve":
        serve()
        return 0
    if arguments.command == "run":
        return run(arguments)
    print(text_of([row for folder in arguments.folders for row in rows_of(folder)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
