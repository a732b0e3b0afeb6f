"""How much of real gradients each kind of projector keeps: Markdown tables and JSON.

    python tests/studies/projector_quality.py --sst2 DIR --minilm DIR --wikitext2 DIR --out DIR

Without sources it prints the tables of what lies in the folder `--out`.

A projector is made from gradients of calibration batches and judged on them and on what training sees later:
gradients of other batches at the same weights, their mean, and after 50 and 200 steps. *bias* is
||P P^T G Q Q^T - G|| / ||G||, *cosine* that of P P^T G Q Q^T with G: the fairer one, as Adam hides the scale.
Both are means over the matrices of the blocks. d is a share of a matrix's smaller dimension.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from projector_gradients import (
    Gradients,
    Source,
    Training,
    decoder_on_wikitext,
    encoder_on_sst2,
    total,
)
from projector_tables import BATCHES, SHARES, Found, Row, tables
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from engines.settings.lsp import LspSettings
from engines.subspace.projector import Projector, one_hot_projector, random_block_projector, random_projector
from engines.subspace.projector_search import block_pair, learn
from engines.transfer.clock import now_s

WIDTHS = (1, 2, 4, 8, 16, 32)
AFTER = (50, 200)
ADAM_STEPS = 50
TOKENS = 1024

Pair = tuple[Tensor, Tensor]
"""P (m, d) and Q (n, d), dense fp32."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    kind: str
    calibration: str
    """Batches whose gradients are summed for it; '-' where it needs none."""
    d_share: float
    r: int | None
    """None is one block: r = d."""


def choices(learned: bool) -> Iterator[Choice]:
    """All that the table compares. Learning takes minutes; without it the other kinds take one or two."""
    both = ("1", str(BATCHES))
    for d_share in SHARES:
        for calibration in both:
            yield Choice(kind="svd", calibration=calibration, d_share=d_share, r=None)
            for r in WIDTHS:
                yield Choice(kind="block", calibration=calibration, d_share=d_share, r=r)
        for r in WIDTHS:
            yield Choice(kind="block, random", calibration="-", d_share=d_share, r=r)
        yield Choice(kind="one_hot", calibration="-", d_share=d_share, r=1)
        for r in WIDTHS:
            yield Choice(kind="paper, unlearned", calibration="-", d_share=d_share, r=r)
        for calibration in both if learned else ():
            for r in (4, 16) if d_share == 0.5 else (4,):
                yield Choice(kind="paper, learned", calibration=calibration, d_share=d_share, r=r)


def make(choice: Choice, gradient: Tensor, seed: int) -> tuple[Projector, Projector]:
    """The pair for one matrix, on the gradient's device. Raises `ValueError` where d and r do not fit."""
    (m, n), d = gradient.shape, round(choice.d_share * min(gradient.shape))
    r = d if choice.r is None else choice.r
    if choice.kind in ("svd", "block"):
        return block_pair(gradient, d, r)
    if choice.kind == "block, random":
        pair = random_block_projector(m, d, r, seed), random_block_projector(n, d, r, seed + 1)
    elif choice.kind == "one_hot":
        pair = one_hot_projector(m, d, seed), one_hot_projector(n, d, seed + 1)
    else:
        pair = random_projector(m, d, r, seed), random_projector(n, d, r, seed + 1)
    left, right = (side.cast(torch.float32, gradient.device) for side in pair)
    if choice.kind == "paper, learned":
        given = LspSettings()
        found = learn(
            gradient, left, right, alpha=1e-9, beta=given.learn_beta, steps=given.learn_steps,
            rate=given.learn_rate, time_limit_s=math.inf, clock=now_s,
        )  # fmt: skip
        left, right = found.left, found.right
    return left, right


def kept(gradient: Tensor, pair: Pair) -> tuple[float, float]:
    """Relative bias and cosine of P P^T G Q Q^T against G.

    With S = P^T G Q: the inner product of the two is ||S||^2, and ||P S Q^T||^2 = <S, (P^T P) S (Q^T Q)>.
    """
    p, q = pair
    core = p.T @ gradient @ q
    inner = float(core.square().sum())
    found = float((core * (p.T @ p @ core @ (q.T @ q))).sum())
    given = float(gradient.square().sum())
    return math.sqrt(max(0.0, 1 - 2 * inner / given + found / given)), inner / math.sqrt(given * found)


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)))


def optimum(gradient: Tensor, d: int) -> tuple[float, float]:
    """Bias and cosine of the rank-d truncated SVD of the judged gradient itself: no pair does better."""
    squares = torch.linalg.svdvals(gradient).square()
    share = float(squares[:d].sum() / squares.sum())
    return math.sqrt(1 - min(share, 1.0)), math.sqrt(share)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A state of training: gradients to make projectors from, and sets of gradients to judge them on."""

    source: str
    step: int
    loss: float
    calibration: list[Gradients]
    recent: list[Gradients]
    """Of the last training steps; empty at the start."""
    judged: dict[str, list[Gradients]]


def judge(stage: Stage, pairs: dict[str, Pair]) -> dict[str, float]:
    """Means over matrices and gradients of each set of the stage."""
    found = {}
    for name, batches in stage.judged.items():
        each = [kept(batch[matrix], pair) for matrix, pair in pairs.items() for batch in batches]
        found[f"bias_{name}"], found[f"cosine_{name}"] = (fmean(column) for column in zip(*each, strict=True))
    return found


def measure(stage: Stage, choice: Choice) -> Row:
    """One row of the table."""
    calibration = total(stage.calibration[: BATCHES if choice.calibration == str(BATCHES) else 1])
    start_s = now_s()
    pairs = {
        name: make(choice, each, seed=2 * index) for index, (name, each) in enumerate(calibration.items())
    }
    made_s = now_s() - start_s
    held = [side.cast(torch.bfloat16).tensors().values() for pair in pairs.values() for side in pair]
    return {
        "source": stage.source,
        "step": stage.step,
        **asdict(choice),
        **judge(stage, {name: (left.dense(), right.dense()) for name, (left, right) in pairs.items()}),
        "make_s": made_s,
        "project_s": sum(project_s(side) for pair in pairs.values() for side in pair),
        "storage_bytes": sum(each.numel() * each.element_size() for tensors in held for each in tensors),
    }


def project_s(projector: Projector) -> float:
    """Median time of projecting `TOKENS` rows in fp32."""
    device = next(iter(projector.tensors().values())).device
    x = torch.randn(TOKENS, projector.rows, device=device)
    times = []
    for _ in range(3):
        start_s = now_s()
        projector.project(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(now_s() - start_s)
    return median(times)


def measure_optimum(stage: Stage, d_share: float) -> Row:
    row: Row = {"source": stage.source, "step": stage.step}
    row |= asdict(Choice(kind="optimum of the judged", calibration="-", d_share=d_share, r=None))
    for name, batches in stage.judged.items():
        each = [
            optimum(grad, round(d_share * min(grad.shape))) for batch in batches for grad in batch.values()
        ]
        row[f"bias_{name}"], row[f"cosine_{name}"] = (fmean(column) for column in zip(*each, strict=True))
    return row


def order(name: str, gradient: Tensor, blocks: int) -> Tensor:
    """A permutation of the rows of `gradient`; consecutive ones will share a block."""
    rows = torch.arange(gradient.shape[0], device=gradient.device)
    if name == "random":
        return torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(gradient.device)
    if name == "strided":
        return (rows % blocks).argsort(stable=True)
    if name == "by norm":
        return gradient.norm(dim=1).argsort()
    if name == "by norm, dealt out":
        return gradient.norm(dim=1).argsort()[(rows % blocks).argsort(stable=True)]
    if name == "by first singular vector":
        return torch.linalg.svd(gradient, full_matrices=False).U[:, 0].argsort()
    return rows


def ordered_pair(name: str, gradient: Tensor, d: int, r: int) -> Pair:
    """Block projectors of the permuted matrix, brought back to the order of the matrix."""
    rows, columns = order(name, gradient, d // r), order(name, gradient.T, d // r)
    left, right = block_pair(gradient[rows][:, columns].contiguous(), d, r)
    return left.dense()[rows.argsort()], right.dense()[columns.argsort()]


def stacked_pair(gradients: list[Tensor], d: int, r: int) -> Pair:
    """P from [G_1 G_2 ...], Q from their rows: what keeps most of the mean energy of single batches."""
    left, _ = block_pair(torch.cat(gradients, 1), d, r)
    right, _ = block_pair(torch.cat([left.project(each.T.contiguous()) for each in gradients], 1), d, r)
    return left.dense(), right.dense()


def alternated_pair(gradient: Tensor, d: int, r: int, rounds: int = 3) -> Pair:
    """P for G Q and Q for P^T G in turn."""
    left, right = block_pair(gradient, d, r)
    for _ in range(rounds):
        left, _ = block_pair(right.project(gradient), d, r)
        right, _ = block_pair(left.project(gradient.T), d, r)
    return left.dense(), right.dense()


def variants(stage: Stage, d_share: float, r: int) -> Iterator[tuple[str, dict[str, Pair]]]:
    """Other ways to make block projectors, by name, for every matrix of the stage."""
    summed = total(stage.calibration)

    def size(gradient: Tensor) -> int:
        return round(d_share * min(gradient.shape))

    for name in (
        "neighbours",
        "random",
        "strided",
        "by norm",
        "by norm, dealt out",
        "by first singular vector",
    ):
        yield name, {key: ordered_pair(name, each, size(each), r) for key, each in summed.items()}
    yield "alternated", {key: alternated_pair(each, size(each), r) for key, each in summed.items()}
    yield (
        "8 batches stacked",
        {
            key: stacked_pair([batch[key] for batch in stage.calibration], size(each), r)
            for key, each in summed.items()
        },
    )
    if stage.recent:
        for name, given in (
            ("last step", stage.recent[-1]),
            ("sum of the last 8 steps", total(stage.recent)),
        ):
            yield name, {key: ordered_pair("", each, size(each), r) for key, each in given.items()}
        yield (
            "last 8 steps stacked",
            {
                key: stacked_pair([step[key] for step in stage.recent], size(each), r)
                for key, each in summed.items()
            },
        )
    # d^2 elements on the wire, but all of them spent on one side.
    for name, scale in (("one side, same d", 1.0), ("one side, same bytes", d_share)):
        yield (
            name,
            {
                key: one_sided(each, max(r, round(scale * size(each) / r) * r), r)
                for key, each in summed.items()
            },
        )


def one_sided(gradient: Tensor, d: int, r: int) -> Pair:
    """Only the smaller dimension is projected."""
    m, n = gradient.shape
    if m > n:
        return one_sided(gradient.T.contiguous(), d, r)[::-1]
    return block_pair(gradient, d, r)[0].dense(), torch.eye(n, device=gradient.device)


class Adam:
    """Adam's direction from a row of gradients, first and second moment corrected."""

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-12) -> None:
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.steps = 0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def direction(self, gradient: Tensor) -> Tensor:
        self.steps += 1
        self.first = self.beta1 * self.first + (1 - self.beta1) * gradient
        self.second = self.beta2 * self.second + (1 - self.beta2) * gradient.square()
        root = (self.second / (1 - self.beta2**self.steps)).sqrt()
        return self.first / (1 - self.beta1**self.steps) / (root + self.epsilon)


class AdamComparison:
    """Adam on cores, expanded, beside Adam on whole gradients: cosines, means over matrices, by step.

    With `both` a direction's cosine with full Adam's, and with full Adam's first moment: the way down.
    """

    def __init__(self, pairs: dict[str, dict[str, Pair]]) -> None:
        self.pairs = pairs
        self.full: dict[str, Adam] = {}
        self.cores: dict[tuple[str, str], Adam] = {}
        self.found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("full Adam", *pairs)}

    def feed(self, gradients: Gradients) -> None:
        wanted = {key: self.full.setdefault(key, Adam()).direction(each) for key, each in gradients.items()}
        self._note("full Adam", wanted, wanted)
        for name, pairs in self.pairs.items():
            ours = {}
            for key, each in gradients.items():
                p, q = pairs[key]
                core = self.cores.setdefault((name, key), Adam()).direction(p.T @ each @ q)
                ours[key] = p @ core @ q.T
            self._note(name, ours, wanted)

    def _note(self, name: str, ours: Gradients, wanted: Gradients) -> None:
        self.found[name].append(
            (
                fmean(cosine(each, wanted[key]) for key, each in ours.items()),
                fmean(cosine(each, torch.as_tensor(self.full[key].first)) for key, each in ours.items()),
            )
        )

    def rows(self) -> Iterator[dict[str, float | str]]:
        for name, steps in self.found.items():
            row: dict[str, float | str] = {"name": name}
            for label, chosen in (("first", steps[:1]), ("tenth", steps[9:10]), ("last", steps[-1:])):
                if chosen:
                    row[f"{label}_with_adam"], row[f"{label}_with_moment"] = chosen[0]
            yield row


def rotated(choice: Choice, gradient: Tensor) -> Pair:
    """The blocks' subspaces with a random basis of each."""
    sides = make(choice, gradient, seed=0)
    generator = torch.Generator().manual_seed(0)
    turned = []
    for side in sides:
        blocks = side.d // side.r
        turns = torch.linalg.qr(torch.randn(blocks, side.r, side.r, generator=generator)).Q
        turned.append(side.dense() @ torch.block_diag(*turns).to(gradient.device))
    return turned[0], turned[1]


def adam_comparison(stage: Stage) -> AdamComparison:
    """For a few choices, made from the stage's first or all calibration batches."""
    compared: dict[str, dict[str, Pair]] = {}
    for d_share in SHARES:
        for kind, calibration, r in (
            ("svd", "8", None), ("block", "8", 32), ("block", "8", 4), ("block, random", "-", 4),
            ("one_hot", "-", 1), ("paper, unlearned", "-", 4),
        ):  # fmt: skip
            choice = Choice(kind=kind, calibration=calibration, d_share=d_share, r=r)
            given = total(stage.calibration)
            label = f"{kind}, r = {'d' if r is None else r}, d = {d_share:g} n"
            compared[label] = {}
            for index, (key, each) in enumerate(given.items()):
                left, right = make(choice, each, seed=2 * index)
                compared[label][key] = left.dense(), right.dense()
            if kind == "block":
                compared[f"{label}, basis turned"] = {
                    key: rotated(choice, each) for key, each in given.items()
                }
    return AdamComparison(compared)


def stages(source: Source, progress: Progress) -> Iterator[tuple[Stage, AdamComparison]]:
    training = Training(source)
    task = progress.add_task(f"training, {source.name}", total=source.stages[-1] + AFTER[-1])
    for start in source.stages:
        while training.steps < start:
            training.step()
            progress.advance(task)
        others, loss = training.others(2 * BATCHES)
        calibration, rest = others[:BATCHES], others[BATCHES:]
        stage = Stage(
            source=source.name, step=start, loss=loss,
            calibration=calibration, recent=list(training.recent),
            judged={"calibration": calibration[:1], "sum": [total(calibration)], "other": rest[:2],
                    "other_mean": [total(rest)]},
        )  # fmt: skip
        compared = adam_comparison(stage)
        for taken in range(1, AFTER[-1] + 1):
            gradients = training.step()
            progress.advance(task)
            if taken <= ADAM_STEPS:
                compared.feed(gradients)
            if taken in AFTER:
                stage.judged[f"after_{taken}"], _ = training.others(2)
        yield stage, compared


def study(source: Source, learned: bool, progress: Progress) -> Iterator[Found]:
    """All measurements on one source, as far as they are after each stage."""
    found: Found = {"stages": [], "rows": [], "variants": [], "adam": []}
    all_choices = list(choices(learned))
    for stage, compared in stages(source, progress):
        where = {"source": stage.source, "step": stage.step}
        found["stages"].append({**where, "loss": stage.loss, "matrices": len(stage.calibration[0])})
        found["rows"] += [measure_optimum(stage, d_share) for d_share in SHARES]
        task = progress.add_task(f"{stage.source}, step {stage.step}", total=len(all_choices))
        for choice in all_choices:
            found["rows"].append(measure(stage, choice))
            progress.advance(task)
        for r in (4, 16):
            for name, pairs in variants(stage, 0.5, r):
                found["variants"].append({**where, "name": name, "r": r, **judge(stage, pairs)})
        found["adam"] += [{**where, **row} for row in compared.rows()]
        yield found


def write(found: Found, path: Path, device: str) -> None:
    """A row a line, four digits."""
    lines = []
    for name, rows in found.items():
        shown = [
            {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
            for row in rows
        ]
        lines.append(f'"{name}": [\n' + ",\n".join(json.dumps(row, allow_nan=False) for row in shown) + "\n]")
    header = f'{{"device": "{device}", "torch": "{torch.__version__}", "cores": {os.cpu_count()},\n'
    path.write_text(header + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="How much of real gradients each kind of projector keeps.")
    parser.add_argument("--minilm", type=Path, help="folder of MiniLM-L6; needs --sst2")
    parser.add_argument("--sst2", type=Path, help="folder of train.tsv")
    parser.add_argument("--wikitext2", type=Path, help="folder of test.txt and valid.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder of encoder.json and decoder.json")
    parser.add_argument("--no-learning", action="store_true", help="leave out the learned projectors")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sources = {}
    if given.wikitext2:
        sources["decoder"] = decoder_on_wikitext(given.wikitext2, device)
    if given.minilm and given.sst2:
        sources["encoder"] = encoder_on_sst2(given.minilm, given.sst2, device)
    with Progress(console=Console(stderr=True)) as progress, torch.no_grad():
        for name, source in sources.items():
            for found in study(source, not given.no_learning, progress):
                write(found, given.out / f"{name}.json", device)
    for path in sorted(given.out.glob("*.json")):
        print(tables(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
