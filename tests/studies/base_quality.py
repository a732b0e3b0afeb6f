"""What a low-bit base does to the loss: Markdown tables and JSON.

    python tests/studies/base_quality.py --wikitext2 DIR --out DIR
    python tests/studies/base_quality.py --sst2 DIR --minilm DIR --out DIR --device cuda:0 --dtype fp16

Without sources it prints the tables of what lies in the folder `--out`.

A model is trained with AdamW to the last stage of `projector_gradients`, then fine-tuned by `mezo` on further
batches, with the same seeds and steps on each base. *before* is the loss of held-out batches before the first
step: what quantising alone does. *after* is that after the last. *moved* is the rms distance of the blocks'
matrices from where they began, over that of the full base, and *landed* the engine's own landed share.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from projector_gradients import Source, decoder_on_wikitext, encoder_on_sst2
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from trained_models import Trained, batches, held_out, train

from engines.base import Context
from engines.methods.mezo import Mezo
from engines.settings.zeroth_order import MezoSettings
from engines.shapes import Dtype, Workload

Row = dict[str, Any]

VARIANTS: tuple[dict[str, Any], ...] = (
    {"base": "full"},
    {"base": "int8", "fold_every": 1},
    {"base": "int8", "fold_every": 8},
    {"base": "fp8", "fold_every": 8},
    {"base": "int4", "fold_every": 8},
    {"base": "full", "train": "lora"},
    {"base": "int8", "train": "lora"},
    {"base": "int4", "train": "lora"},
)
LORA_RATE = 10.0
"""Learning rate of adapters over that of the weights: they are few."""


def fine_tune(
    source: Source, variant: dict[str, Any], seed: int, steps: int, rate: float, device: str, dtype: Dtype
) -> Row:
    """One run of `mezo`: a row of the table."""
    lora = variant.get("train") == "lora"
    settings = MezoSettings(learning_rate=rate * (LORA_RATE if lora else 1.0), **variant)
    workload = Workload(batch_size=8, seq_len=128, dtype=dtype)
    engine = Mezo(settings, Context(device=device, workload=workload, seed=seed, total_steps=steps))
    engine.setup(Trained.of(source.model))
    judged, first = held_out(source), matrices(engine)
    before = engine.evaluate(judged)
    for step in range(steps):
        # After those that AdamW has seen, other ones for each seed.
        (batch,) = batches(source, source.stages[-1] + seed * steps + step, 1)
        engine.step([batch])
    after, landed, last = engine.evaluate(judged), engine.realized_update_fraction(), matrices(engine)
    engine.close()
    return {
        "source": source.name, "seed": seed, "steps": steps, "learning_rate": settings.learning_rate,
        "dtype": dtype, "device": device, "fold_every": 1, "train": "all", **variant,
        "loss_before": before.loss, "loss_after": after.loss,
        "accuracy_before": before.accuracy, "accuracy_after": after.accuracy,
        "landed_share": landed, "moved": float((last - first).square().mean().sqrt()),
    }  # fmt: skip


def matrices(engine: Mezo) -> Tensor:
    """All matrices of the blocks as they are computed with, end to end."""
    inside = {name for block in engine._layout.blocks for part in block.own_parts for name in part.names}
    found = [weight.reshape(-1).float() for name, weight in engine.weights() if name in inside]
    return torch.cat([each for each in found if each.numel() > 1024])


def table(rows: list[Row]) -> Iterable[str]:
    """Means over seeds, and the spread of seeds as a standard deviation."""
    for source in dict.fromkeys(row["source"] for row in rows):
        mine = [row for row in rows if row["source"] == source]
        seeds = len({row["seed"] for row in mine})
        yield f"\n### {source}, {mine[0]['steps']} steps, {mine[0]['dtype']}, seeds: {seeds}\n"
        yield "| base | trained | fold every | before | after | spread of seeds | accuracy | moved | landed |"
        yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
        full = {row["seed"]: row["moved"] for row in mine if row["base"] == "full" and row["train"] == "all"}
        for key in dict.fromkeys((row["base"], row["train"], row["fold_every"]) for row in mine):
            here = [row for row in mine if (row["base"], row["train"], row["fold_every"]) == key]
            after = [row["loss_after"] for row in here]
            moved = [row["moved"] / full[row["seed"]] for row in here if row["seed"] in full]
            landed = [row["landed_share"] for row in here if row["landed_share"] is not None]
            cells = [
                f"{fmean(row['loss_before'] for row in here):.4f}", f"{fmean(after):.4f}",
                f"{stdev(after):.4f}" if len(after) > 1 else "-",
                f"{fmean(row['accuracy_after'] for row in here):.3f}",
                f"{fmean(moved):.2f}" if moved else "-", f"{fmean(landed):.0%}" if landed else "-",
            ]  # fmt: skip
            yield f"| {key[0]} | {key[1]} | {key[2]} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sst2", type=Path, help="folder with train.tsv")
    parser.add_argument("--minilm", type=Path, help="folder of MiniLM-L6")
    parser.add_argument("--wikitext2", type=Path, help="folder with test.txt and valid.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--adamw-steps", type=int, help="instead of the sources' own")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder")
    parser.add_argument("--hidden", type=int, default=256, help="of the decoder")
    parser.add_argument("--only", default="", help="bases, separated by commas; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"])
    given = parser.parse_args()
    sources = []
    if given.wikitext2 is not None:
        sources.append(decoder_on_wikitext(given.wikitext2, given.device, given.layers, given.hidden))
    if given.sst2 is not None and given.minilm is not None:
        sources.append(encoder_on_sst2(given.minilm, given.sst2, given.device))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "base_quality.json"
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    variants = [each for each in VARIANTS if not given.only or each["base"] in given.only.split(",")]
    with Progress(console=Console(stderr=True)) as progress:
        for source in sources:
            adamw_steps = given.adamw_steps or source.stages[-1]
            train(source, adamw_steps, progress)
            task = progress.add_task(f"{source.name}: mezo", total=len(variants) * given.seeds)
            for seed in range(given.seeds):
                for variant in variants:
                    rows.append(
                        fine_tune(
                            source, variant, seed, given.steps, given.learning_rate, given.device, given.dtype
                        )
                        | {"adamw_steps": adamw_steps}
                    )
                    path.write_text(json.dumps(rows, indent=1) + "\n")  # nothing measured is lost
                    progress.advance(task)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
