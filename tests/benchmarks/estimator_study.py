"""Loss against forward passes and against time, of every estimator on one task: a Markdown table and JSON.

    python tests/benchmarks/estimator_study.py --sst2 DIR --minilm DIR --out FILE.json [--train last:2]

Without folders the task is the built-in one and the model `tiny-llama` with random weights.

Each estimator has the same budget of forward passes, starts from the same weights and sees the same batches;
it is run with each learning rate of one grid and with several seeds. FZOO's rates are the grid's times eps,
in which its steps are (`engines.estimators`). What is told is the held-out loss, without perturbation, when a
quarter, a half and all of the budget are spent: of the rate whose mean over the seeds is the lowest at the
end. A rate at the edge of the grid is marked: the best may lie beyond. The time is that of the steps.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from engines.base import NonFiniteLoss
from engines.estimators import forwards
from engines.settings import MezoSettings, parse_settings
from engines.transfer import now_s
from harness.data import make_data
from harness.job import Job, make_job
from harness.shapes import resolve_shape
from harness.show import Progress
from harness.train import set_up

ESTIMATORS: dict[str, dict[str, Any]] = {
    "mezo": {},
    "spsa, signs": {"noise": "rademacher"},
    "n-spsa, 4": {"queries": 4},
    "fzoo, 8": {"estimator": "fzoo", "noise": "rademacher", "queries": 8},
    "lezo, half": {"layer_share": 0.5},
    "lozo, rank 4": {"estimator": "lozo"},
}
TINY = "tiny-llama"
PARTS = (0.25, 0.5, 1.0)
"""Of the budget, at which the loss is told."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    estimator: str
    learning_rate: float
    seed: int
    forwards_per_step: int
    steps: int
    losses: tuple[float | None, ...]
    """Held-out loss at each of `PARTS`; `None` where it was not finite."""
    accuracies: tuple[float | None, ...]
    seconds: float | None
    """Of all steps."""
    start_loss: float


def trial(job: Job, shape: Any, name: str, settings: MezoSettings, budget: int, progress: Progress) -> Trial:
    passes = forwards(settings)
    steps = budget // passes
    stops = {max(1, round(part * steps)): i for i, part in enumerate(PARTS)}
    losses: list[float | None] = [None] * len(PARTS)
    accuracies: list[float | None] = [None] * len(PARTS)
    data = make_data(job, shape)
    seconds = 0.0
    with set_up(job, shape, "mezo", settings, progress) as (engine, _):
        start_loss = engine.evaluate(data.evaluation).loss
        try:
            for step in range(steps):
                batches = data.step_batches(step)
                began_s = now_s()
                engine.step(batches)
                if step + 1 in stops:
                    engine.synchronize()
                seconds += now_s() - began_s
                if step + 1 in stops:
                    found = engine.evaluate(data.evaluation)
                    if math.isfinite(found.loss):
                        losses[stops[step + 1]] = found.loss
                        accuracies[stops[step + 1]] = found.accuracy
        except NonFiniteLoss:
            pass
    return Trial(
        estimator=name,
        learning_rate=settings.learning_rate,
        seed=job.seed,
        forwards_per_step=passes,
        steps=steps,
        losses=tuple(losses),
        accuracies=tuple(accuracies),
        seconds=seconds,
        start_loss=start_loss,
    )


def best_rate(trials: list[Trial]) -> float | None:
    """Of one estimator: that of the lowest mean final loss over the seeds, all of them finite."""
    means = {}
    for rate in {each.learning_rate for each in trials}:
        last = [each.losses[-1] for each in trials if each.learning_rate == rate]
        finite = [loss for loss in last if loss is not None]
        if len(finite) == len(last):
            means[rate] = fmean(finite)
    return min(means, key=means.__getitem__, default=None)


def table(trials: list[Trial]) -> str:
    lines = [
        "| estimator | forwards a step | rate | loss at 1/4 | 1/2 | all (spread of seeds) | accuracy "
        "| s a forward |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(each.estimator for each in trials):
        mine = [each for each in trials if each.estimator == name]
        rate = best_rate(mine)
        if rate is None:
            lines.append(f"| {name} | {mine[0].forwards_per_step} | none was finite | | | | | |")
            continue
        rates = sorted({each.learning_rate for each in mine})
        edge = " (edge)" if rate in (rates[0], rates[-1]) else ""
        chosen = [each for each in mine if each.learning_rate == rate]
        at = [fmean(each.losses[i] or math.nan for each in chosen) for i in range(len(PARTS))]
        last = [each.losses[-1] or math.nan for each in chosen]
        spread = stdev(last) if len(last) > 1 else math.nan
        accuracy = fmean(each.accuracies[-1] or 0.0 for each in chosen)
        seconds = fmean((each.seconds or math.nan) / (each.steps * each.forwards_per_step) for each in chosen)
        lines.append(
            f"| {name} | {mine[0].forwards_per_step} | {rate:g}{edge} | {at[0]:.4f} | {at[1]:.4f} | "
            f"{at[2]:.4f} ({spread:.4f}) | {accuracy:.3f} | {seconds:.3f} |"
        )
    return "\n".join(lines)


def source(model: Path | None, data: Path | None) -> dict[str, Any]:
    """The job's fields of both."""
    if model is None or data is None:
        return {"model": {"name": TINY, "random_weights": True}, "data": {"train": "builtin"}}
    return {
        "model": {"name": str(model), "head": "classification"},
        "data": {"train": str(data / "train.tsv"), "evaluate": str(data / "dev.tsv")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sst2", type=Path, help="folder of train.tsv and dev.tsv")
    parser.add_argument("--minilm", type=Path, help="folder of the model")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--train", default="all")
    parser.add_argument("--budget", type=int, default=4000, help="forward passes of each trial")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4, 3e-4, 1e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--eval-batches", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=list(ESTIMATORS), choices=list(ESTIMATORS))
    given = parser.parse_args()
    trials: list[Trial] = []
    progress = Progress(quiet=True)
    for name in given.only:
        for rate in given.rates:
            for seed in range(given.seeds):
                values = {"train": given.train, "learning_rate": rate, **ESTIMATORS[name]}
                settings = parse_settings("mezo", values)
                if settings.estimator == "fzoo":
                    settings = parse_settings("mezo", {**values, "learning_rate": rate * settings.eps})
                job = make_job(
                    {
                        **source(given.minilm, given.sst2),
                        "batch_size": given.batch_size,
                        "seq_len": given.seq_len,
                        "dtype": "fp32",
                        "steps": given.budget,
                        "warmup_steps": 0,
                        "eval_batches": given.eval_batches,
                        "seed": seed,
                    },
                    "study",
                )
                trials.append(trial(job, resolve_shape(job), name, settings, given.budget, progress))
                print(trials[-1], file=sys.stderr, flush=True)
                document = {
                    "torch": torch.__version__,
                    "device": "cuda" if torch.cuda.is_available() else "cpu",
                    "threads": torch.get_num_threads(),
                    "arguments": {key: str(value) for key, value in vars(given).items()},
                    "parts": PARTS,
                    "trials": [asdict(each) for each in trials],
                }
                given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(trials))


if __name__ == "__main__":
    main()
