"""Projectors learned on one task, used on another and on a later checkpoint: how much they keep of gradients.

    PYTHONPATH=. python tests/studies/carried_projectors.py --model MINILM --out DIR \\
        --task cola=FILE.tsv:3:1 --task sst2=FILE.tsv:0:1 --task mrpc=FILE.txt:3,4:0

A task is NAME=FILE:TEXTS:LABEL, columns counted from 0 in a tab-separated file; rows whose label is no number
are left out. For each task: a new head, AdamW for some steps, and before and after them the relative bias, on
batches that were neither trained on nor calibrated with, of pairs (`block`, r = 4) found on this task now, on
this task before training, on each other task, and of random pairs. Means over the matrices of all blocks.
Without `--task` the table of what is there is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

from engines.subspace.projector import Projector, random_block_projector
from engines.subspace.projector_search import block_pair, relative_bias
from engines.subspace.subspaces import subspace_seed

SHARES = (0.25, 0.5)
"""d over a matrix's smaller dimension."""
R, BATCH_SIZE, WORDS, STEPS, JUDGED, RATE = 4, 8, 32, 30, 3, 5e-5
SEEDS = (0, 1, 2)

Gradients = dict[str, Tensor]
Pairs = dict[str, tuple[Projector, Projector]]


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    texts: Sequence[Sequence[str]]
    """Of each row, one text or two."""
    labels: Sequence[int]


def read_task(told: str) -> Task:
    name, _, rest = told.partition("=")
    path, columns, label = rest.rsplit(":", 2)
    texts, labels = [], []
    for line in Path(path).read_text(encoding="utf-8-sig").splitlines():
        fields = line.split("\t")
        places = [int(each) for each in columns.split(",")]
        if len(fields) > max(*places, int(label)) and fields[int(label)].isdigit():
            texts.append([fields[place] for place in places])
            labels.append(int(fields[int(label)]))
    return Task(name=name, texts=texts, labels=labels)


class Learner:
    """A model with a new head on one task."""

    def __init__(self, folder: Path, task: Task, seed: int) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.manual_seed(seed)
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            dtype=torch.float32,
        )  # fmt: skip
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.task, self.seed = task, seed
        self.matrices: dict[str, nn.Parameter] = {
            name: weight
            for name, weight in self.model.named_parameters()
            if ".layer." in name and weight.dim() == 2
        }

    def gradients(self, number: int) -> Gradients:
        """Of the batch of that number."""
        generator = torch.Generator().manual_seed(subspace_seed(self.seed, self.task.name, number))
        rows = torch.randint(len(self.task.labels), (BATCH_SIZE,), generator=generator).tolist()
        texts = [[self.task.texts[row][part] for row in rows] for part in range(len(self.task.texts[0]))]
        tokens = self.tokenizer(
            *texts, padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt"
        )
        self.model.zero_grad()
        self.model(**tokens, labels=torch.tensor([self.task.labels[row] for row in rows])).loss.backward()
        return {
            name: weight.grad.clone() for name, weight in self.matrices.items() if weight.grad is not None
        }

    def train(self, steps: int) -> None:
        adam = torch.optim.AdamW(self.model.parameters(), lr=RATE)
        for number in range(steps):
            self.gradients(1000 + number)
            adam.step()


def pairs_of(gradients: Gradients, share: float) -> Pairs:
    return {name: block_pair(each, _d(each, share), R) for name, each in gradients.items()}


def random_pairs(gradients: Gradients, share: float, seed: int) -> Pairs:
    def drawn(name: str, rows: int, d: int, side: str) -> Projector:
        return random_block_projector(rows, d, R, subspace_seed(seed, name, side))

    return {
        name: (
            drawn(name, each.shape[0], _d(each, share), "left"),
            drawn(name, each.shape[1], _d(each, share), "right"),
        )
        for name, each in gradients.items()
    }


def _d(gradient: Tensor, share: float) -> int:
    return round(share * min(gradient.shape)) // R * R


def bias_of(pairs: Pairs, judged: Sequence[Gradients]) -> float:
    return fmean(relative_bias(each[name], *pair) for each in judged for name, pair in pairs.items())


def study(folder: Path, tasks: Sequence[Task], seeds: Iterable[int] = SEEDS) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        learners = {task.name: Learner(folder, task, seed) for task in tasks}
        before = {name: each.gradients(0) for name, each in learners.items()}
        for name, learner in learners.items():
            for steps in (0, STEPS):
                learner.train(steps)
                now = learner.gradients(1)
                judged = [learner.gradients(10 + number) for number in range(JUDGED)]
                for share in SHARES:
                    found = {
                        "this task, now": pairs_of(now, share),
                        "this task, before training": pairs_of(before[name], share),
                        "random": random_pairs(now, share, seed),
                    }
                    found |= {
                        f"{other}, before training": pairs_of(each, share)
                        for other, each in before.items()
                        if other != name
                    }
                    rows += [
                        {"task": name, "steps": steps, "share": share, "seed": seed, "pairs": told,
                         "bias": round(bias_of(pairs, judged), 5)}
                        for told, pairs in found.items()
                    ]  # fmt: skip
    return rows


def table(document: Mapping[str, Any]) -> str:
    rows = document["rows"]
    lines = ["| task, steps trained | d | pairs found on | relative bias |", "| --- | --- | --- | --- |"]
    keys = dict.fromkeys((row["task"], row["steps"], row["share"], row["pairs"]) for row in rows)
    for task, steps, share, pairs in keys:
        found = [
            row["bias"]
            for row in rows
            if (row["task"], row["steps"], row["share"], row["pairs"]) == (task, steps, share, pairs)
        ]
        spread = f"{fmean(found):.3f} ({min(found):.3f} to {max(found):.3f})"
        lines.append(f"| {task}, {steps} | {share:g} n | {pairs} | {spread} |")
    return "\n".join(lines)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Projectors carried over.")
    parser.add_argument("--model", type=Path, help="folder of an encoder, such as MiniLM-L6")
    parser.add_argument("--task", action="append", default=[], help="NAME=FILE:TEXTS:LABEL")
    parser.add_argument("--out", type=Path, required=True, help="folder of carried.json")
    given = parser.parse_args(None if arguments is None else list(arguments))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "carried.json"
    if given.task:
        rows = study(given.model, [read_task(each) for each in given.task])
        lines = ",\n".join(json.dumps(row) for row in rows)
        path.write_text(f'{{"batch": "{BATCH_SIZE} x {WORDS}", "r": {R}, "rows": [\n{lines}\n]}}\n')
    print(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
