"""Quality of `lsp` beside native AdamW: loss and accuracy against steps and against the clock.

    PYTHONPATH=. python tests/studies/lsp_quality.py --device cuda --data ../shared/data --minilm DIR
    --out DIR

Two sources: MiniLM-L6 on SST-2, and a small decoder on WikiText-2 text, begun by AdamW on one text and tuned
on another. Every method gets the same steps, batches and grid of learning rates. Each rate is tried with the
first seed; the one that ends best on held-out data is run with the other seeds too. Weights are in fp32, so
that no method loses updates to rounding.

Rows go to DIR/quality.json as they come; the same command goes on where it stopped. `--timed` then repeats
the chosen runs of the first seed one at a time: their times are those to quote, since the others share the
GPU with `--processes` of their kind. Without `--data` the tables of what is there are printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from lsp_quality_runs import METHODS, Budget, Method, Source, begun, decoder_on_wikitext, encoder_on_sst2, run
from lsp_quality_tables import Row, best_rate, tables
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load, save

SEEDS = (0, 1, 2)
BUDGETS = {
    "encoder": Budget(
        batch_size=32, steps=648, eval_every=108, check_every=324,
        learning_rates=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    ),
    "decoder": Budget(
        batch_size=16, steps=600, start_steps=400, eval_every=100, check_every=300,
        learning_rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    ),
}  # fmt: skip
"""Encoder: three passes over the data."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a process needs to make the sources."""

    device: str
    data: Path
    minilm: Path | None
    budgets: Mapping[str, Budget]
    threads: int
    start: bytes | None = None
    """Weights that the decoder starts from, as safetensors: tensors would go through shared memory."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    source: str
    """Key of the budgets."""
    method: Method
    learning_rate: float
    seed: int
    timed: bool = False


def make_sources(setting: Setting) -> dict[str, Source]:
    """Those whose data and model are there."""
    start = None if setting.start is None else load(setting.start)
    found = {"decoder": decoder_on_wikitext(setting.data / "wikitext2", setting.budgets["decoder"], start)}
    if setting.minilm is not None:
        found["encoder"] = encoder_on_sst2(setting.minilm, setting.data / "sst2", setting.budgets["encoder"])
    return found


_here: dict[str, Any] = {}
"""Of a worker process: its setting and sources."""


def _begin(setting: Setting) -> None:
    torch.set_num_threads(setting.threads)
    _here.update(setting=setting, sources=make_sources(setting))


def _work(cell: Cell, deadline: float) -> Row | None:
    if time.time() > deadline:
        return None
    source = _here["sources"][cell.source]
    row = run(cell.method, source, cell.learning_rate, cell.seed, _here["setting"].device, deadline)
    return None if row is None else {**row, "timed": cell.timed}


class Study:
    """Rows, on disk as they come, and what is still to do."""

    def __init__(self, path: Path, budgets: Mapping[str, Budget], about: Mapping[str, Any]) -> None:
        """Raises `SystemExit` for rows of another budget."""
        self._path = path
        self._about = {**about, "budgets": {name: asdict(budget) for name, budget in budgets.items()}}
        self._about = json.loads(json.dumps(self._about))
        self.rows: list[Row] = []
        if path.exists():
            before = json.loads(path.read_text())
            if _without_rates(before["budgets"]) != _without_rates(self._about["budgets"]):
                raise SystemExit(f"{path} holds runs of another budget; name another --out")
            self.rows = before["rows"]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        lines = ",\n".join(json.dumps(rounded(each), allow_nan=False) for each in self.rows)
        head = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in self._about.items())
        part = self._path.with_suffix(".part")
        part.write_text(f'{{{head},\n"rows": [\n{lines}\n]}}\n')
        part.replace(self._path)

    def has(self, source: str, cell: Cell) -> bool:
        wanted = (source, cell.method.name, cell.learning_rate, cell.seed, cell.timed)
        keys = ("source", "method", "learning_rate", "seed", "timed")
        return any(tuple(row[key] for key in keys) == wanted for row in self.rows)

    def missing(self, names: Mapping[str, str], budgets: Mapping[str, Budget], timed: bool) -> list[Cell]:
        """What can be run now. `names` are the sources' by key."""
        cells = []
        for key, source in names.items():
            for method in METHODS:
                rates = budgets[key].learning_rates
                first = [Cell(source=key, method=method, learning_rate=rate, seed=SEEDS[0]) for rate in rates]
                if any(not self.has(source, cell) for cell in first):
                    cells += [] if timed else first
                    continue
                best = best_rate(self.rows, source, method.name)
                if best is None:
                    continue  # every rate diverged
                chosen = replace(first[0], learning_rate=best)
                if timed:
                    cells.append(replace(chosen, timed=True))
                else:
                    cells += [replace(chosen, seed=seed) for seed in SEEDS[1:]]
        return [cell for cell in cells if not self.has(names[cell.source], cell)]


def _without_rates(budgets: Mapping[str, Any]) -> dict[str, Any]:
    """A grid may grow: what is there of it counts."""
    return {
        source: {name: value for name, value in budget.items() if name != "learning_rates"}
        for source, budget in budgets.items()
    }


def rounded(value: Any) -> Any:
    """Numbers to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def work_through(
    study: Study,
    setting: Setting,
    names: Mapping[str, str],
    *,
    processes: int,
    timed: bool,
    deadline: float,
    progress: Progress,
) -> None:
    """Run what is missing, several processes at a time, until all is there or the deadline comes."""
    task = progress.add_task("timed runs" if timed else "runs", total=None)
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(setting,)
    ) as pool:
        under_way: dict[Future[Row | None], Cell] = {}
        while True:
            for cell in study.missing(names, setting.budgets, timed):
                if cell not in under_way.values() and time.time() < deadline:
                    under_way[pool.submit(_work, cell, deadline)] = cell
            if not under_way:
                return
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for each in done:
                cell, row = under_way.pop(each), each.result()
                if row is not None:
                    study.add({**row, "processes": processes})
                    progress.update(task, advance=1, description=f"{cell.source}, {cell.method.name}")


def pack(minilm: Path, out: Path) -> None:
    """A copy of MiniLM in half precision, 45 MB instead of 91: to be carried to another machine."""
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(minilm, dtype=torch.float16).save_pretrained(out)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(out)


def main(arguments: Iterable[str] | None = None, budgets: Mapping[str, Budget] = BUDGETS) -> None:
    parser = argparse.ArgumentParser(description="Quality of lsp beside native AdamW.")
    parser.add_argument("--data", type=Path, help="folder of sst2/ and wikitext2/")
    parser.add_argument("--minilm", type=Path, help="folder of MiniLM-L6; without it the decoder only")
    parser.add_argument("--out", type=Path, required=True, help="folder of quality.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=8, help="runs at a time")
    parser.add_argument("--limit-s", type=float, default=86400.0, help="stop then, keeping what is done")
    parser.add_argument("--timed", action="store_true", help="then the chosen runs again, one at a time")
    parser.add_argument("--pack", type=Path, help="only write --minilm in half precision to this folder")
    given = parser.parse_args(None if arguments is None else list(arguments))
    if given.pack is not None:
        pack(given.minilm, given.pack)
        return
    path = given.out / "quality.json"
    if given.data is not None:
        measure(given, path, budgets)
    print(tables(json.loads(path.read_text())))


def measure(given: argparse.Namespace, path: Path, budgets: Mapping[str, Budget]) -> None:
    deadline = time.time() + given.limit_s
    device = given.device if given.device == "cpu" else "cuda:0"
    given.out.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    setting = Setting(
        device=device, data=given.data, minilm=given.minilm, budgets=budgets,
        threads=max(1, cores // given.processes),
    )  # fmt: skip
    gpu = torch.cuda.get_device_name(0) if device != "cpu" else None
    study = Study(path, budgets, {"gpu": gpu, "torch": torch.__version__, "cores": cores})
    # The decoder's start is made anew each time: the same bits on the same kind of device.
    sources = make_sources(setting)
    names = {key: source.name for key, source in sources.items()}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("beginning the decoder", total=1)
        setting = replace(setting, start=save(begun(sources["decoder"], device)))
        progress.update(task, completed=1)
        phases: list[tuple[bool, int]] = [(False, given.processes)]
        phases += [(True, 1)] if given.timed else []
        for timed, processes in phases:
            work_through(
                study, replace(setting, threads=max(1, cores // processes)), names,
                processes=processes, timed=timed, deadline=deadline, progress=progress,
            )  # fmt: skip


if __name__ == "__main__":
    main()
