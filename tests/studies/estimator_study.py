"""Loss against forward passes and against time, of every estimator on one task: a Markdown table and JSON.

    python tests/studies/estimator_study.py --wikitext2 DIR --out FILE.json
    python tests/studies/estimator_study.py --sst2 DIR --minilm DIR --out FILE.json --device cuda:0

Without a source it prints the table of what lies in `--out`.

A model is trained with AdamW to the last stage of `projector_gradients`, then fine-tuned by `mezo` on further
batches. Each estimator has the same budget of forward passes, or with --uploads of steps, as often as blocks
are brought up where they are streamed; it starts from the same weights and sees the same batches, and is run
with each learning rate of one grid, and with the best of them for the other seeds. Rates of estimators whose
steps are normalised are the grid's times `SCALES` (`engines.zeroth_order.estimators`). What is told is the
held-out loss, without perturbation, when a quarter, a half and all of the budget are spent: of the rate that
was best for the first seed at the end. A rate at the edge of the grid is marked: the best may lie beyond. The
time is that of the steps.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from projector_gradients import Source, decoder_on_wikitext, encoder_on_sst2
from rich.console import Console
from rich.progress import Progress
from trained_models import Trained, batches, held_out, train

from engines.base import Context
from engines.errors import NonFiniteLoss
from engines.methods.mezo import Mezo
from engines.settings.parse import parse_settings
from engines.settings.zeroth_order import MezoSettings
from engines.shapes import Dtype, Workload
from engines.transfer.clock import now_s

ESTIMATORS: dict[str, dict[str, Any]] = {
    "mezo": {},
    "spsa, signs": {"noise": "rademacher"},
    "n-spsa, 4": {"queries": 4},
    "fzoo, 8": {"estimator": "fzoo", "noise": "rademacher", "queries": 8},
    "lozo, rank 4": {"estimator": "lozo"},
    "spsa, binomial": {"noise": "binomial"},
    "n-spsa, 16, signs": {"queries": 16, "noise": "rademacher"},
    "1.5-spsa, 16, signs": {"estimator": "1.5-spsa", "queries": 16, "noise": "rademacher"},
    "grzo": {"estimator": "grzo", "noise": "rademacher"},
    "grzo, window 1": {"estimator": "grzo", "noise": "rademacher", "grzo_window": 1},
}
SCALES = {"fzoo": MezoSettings.eps, "grzo": 4 * MezoSettings.eps}
"""Of the rates of estimators whose steps are normalised, in the grid's."""
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


def trial(
    source: Source,
    name: str,
    settings: MezoSettings,
    seed: int,
    budget: int,
    device: str,
    dtype: Dtype,
    uploads: int | None = None,
) -> Trial:
    """Of `budget` forward passes, or of so many steps: each visits every block once, and so brings it up
    once where blocks are streamed."""
    passes = settings.forward_passes
    steps = uploads or budget // passes
    stops = {max(1, round(part * steps)): i for i, part in enumerate(PARTS)}
    losses: list[float | None] = [None] * len(PARTS)
    accuracies: list[float | None] = [None] * len(PARTS)
    workload = Workload(batch_size=8, seq_len=128, dtype=dtype)
    engine = Mezo(settings, Context(device=device, workload=workload, seed=seed, total_steps=steps))
    engine.setup(Trained.of(source.model))
    judged = held_out(source)
    seconds = 0.0
    start_loss = engine.evaluate(judged).loss
    try:
        for step in range(steps):
            # After those that AdamW has seen, other ones for each seed.
            given = batches(source, source.stages[-1] + seed * (uploads or budget) + step, 1)
            began_s = now_s()
            engine.step(given)
            if step + 1 in stops:
                engine.synchronize()
            seconds += now_s() - began_s
            if step + 1 in stops:
                found = engine.evaluate(judged)
                if math.isfinite(found.loss):
                    losses[stops[step + 1]] = found.loss
                    accuracies[stops[step + 1]] = found.accuracy
    except NonFiniteLoss:
        pass
    engine.close()
    return Trial(
        estimator=name,
        learning_rate=settings.learning_rate,
        seed=seed,
        forwards_per_step=passes,
        steps=steps,
        losses=tuple(losses),
        accuracies=tuple(accuracies),
        seconds=seconds,
        start_loss=start_loss,
    )


def settings_of(name: str, rate: float, train: str) -> MezoSettings:
    values = {"train": train, "learning_rate": rate, **ESTIMATORS[name]}
    settings = parse_settings("mezo", values)
    assert isinstance(settings, MezoSettings)
    return replace(settings, learning_rate=rate * SCALES.get(settings.estimator, 1.0))


def best_rate(trials: Sequence[Trial]) -> float | None:
    """Of one estimator: that of the lowest final loss with the first seed."""
    finals = {
        each.learning_rate: each.losses[-1]
        for each in trials
        if each.seed == 0 and each.losses[-1] is not None
    }
    return min(finals, key=finals.__getitem__, default=None)


def table(trials: list[Trial]) -> str:
    lines = [
        "| estimator | forwards a step | steps | rate | loss at 1/4 | 1/2 | all (spread of seeds) | accuracy "
        "| s a forward |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(each.estimator for each in trials):
        mine = [each for each in trials if each.estimator == name]
        rate = best_rate(mine)
        start = f"| {name} | {mine[0].forwards_per_step} | {mine[0].steps}"
        if rate is None:
            lines.append(f"{start} | none was finite | | | | | |")
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
            f"{start} | {rate:g}{edge} | {at[0]:.4f} | {at[1]:.4f} | "
            f"{at[2]:.4f} ({spread:.4f}) | {accuracy:.3f} | {seconds:.3f} |"
        )
    return "\n".join(lines)


def load_trials(path: Path) -> list[Trial]:
    """Those of a file that the study wrote."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return [
        Trial(**{**each, "losses": tuple(each["losses"]), "accuracies": tuple(each["accuracies"])})
        for each in document["trials"]
    ]


def trials_of(source: Source, given: argparse.Namespace) -> Iterator[Trial]:
    """Every rate with the first seed, then the best one with the others."""
    for name in given.only:
        begun: list[Trial] = []
        for rate in given.rates:
            settings = settings_of(name, rate, given.train)
            begun.append(
                trial(source, name, settings, 0, given.budget, given.device, given.dtype, given.uploads)
            )
            yield begun[-1]
        if (best := best_rate(begun)) is None:
            continue
        (rate,) = [rate for rate in given.rates if settings_of(name, rate, given.train).learning_rate == best]
        for seed in range(1, given.seeds):
            settings = settings_of(name, rate, given.train)
            yield trial(source, name, settings, seed, given.budget, given.device, given.dtype, given.uploads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--wikitext2", type=Path, help="folder of test.txt and valid.txt")
    parser.add_argument("--sst2", type=Path, help="folder of train.tsv")
    parser.add_argument("--minilm", type=Path, help="folder of MiniLM-L6")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--train", default="all")
    parser.add_argument("--budget", type=int, default=2000, help="forward passes of each trial")
    parser.add_argument("--uploads", type=int, help="steps of each trial, in the place of --budget")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--adamw-steps", type=int, help="instead of the source's own")
    parser.add_argument("--layers", type=int, default=2, help="of the decoder")
    parser.add_argument("--hidden", type=int, default=96, help="of the decoder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--only", nargs="*", default=list(ESTIMATORS), choices=list(ESTIMATORS))
    given = parser.parse_args()
    if given.wikitext2 is not None:
        source = decoder_on_wikitext(given.wikitext2, given.device, given.layers, given.hidden)
    elif given.sst2 is not None and given.minilm is not None:
        source = encoder_on_sst2(given.minilm, given.sst2, given.device)
    elif given.out.exists():
        print(table(load_trials(given.out)))
        return
    else:
        parser.error("nothing to train on; name --wikitext2, or --sst2 and --minilm")
    trials: list[Trial] = []
    with Progress(console=Console(stderr=True)) as progress:
        train(source, given.adamw_steps or source.stages[-1], progress)
        total = len(given.only) * (len(given.rates) + given.seeds - 1)
        task = progress.add_task(f"{source.name}: estimators", total=total)
        for each in trials_of(source, given):
            trials.append(each)
            progress.update(task, advance=1, description=f"{source.name}: {each.estimator}")
            document = {
                "source": source.name,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                # Not the folders: they say nothing, and may be private.
                "arguments": {
                    key: value for key, value in vars(given).items() if not isinstance(value, Path)
                },
                "parts": PARTS,
                "trials": [asdict(each) for each in trials],
            }
            given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(trials))


if __name__ == "__main__":
    main()
