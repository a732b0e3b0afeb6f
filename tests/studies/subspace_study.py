"""What makes `lsp` lose, and what would mend it: a plain loop over variants of Algorithm 1, at equal steps.

    PYTHONPATH=. python tests/studies/subspace_study.py --data ../shared/data --out DIR

A decoder of 2 layers, hidden 128, on bytes, begun by AdamW on WikiText-2 and tuned on instruction records.
Every variant gets the same batches, steps, grid of learning rates (with the first seed) and then three seeds
of the best rate. All gradients are formed, in fp32, so that what a variant could do is seen before it is
built: the engine's own steps are held by tests elsewhere. Rows go to DIR/subspace.json as they come; the same
command goes on where it stopped. Without `--data` the table of what is there is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

from engines.subspace.projector_search import block_pair

SEEDS = (0, 1, 2)
SEQ_LEN, BATCH_SIZE, HIDDEN = 64, 8, 128
START_STEPS, STEPS = 1500, 300
RATES = (3e-3, 1e-2, 3e-2)
NATIVE_RATES = (1e-3, 3e-3, 1e-2)
JUDGED = 256
"""Sequences of the held-out text."""

Pair = tuple[Tensor, Tensor]
"""P (m, d) and Q (n, d), dense."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    name: str
    share: float | None = None
    """d over the smaller side of a matrix of attention; `None`: AdamW over everything."""
    exact: bool = False
    """Singular vectors of the whole gradient, in place of those of blocks of rows."""
    renew_every: int = 100
    """Steps between new pairs."""
    moments: str = "carried"
    """When the pair changes: `carried` by A M B, `reset`, or `kept` as they are."""
    feedback: float = 0.0
    """Share of what was projected away so far that is added to the next gradient."""
    residual: float = 0.0
    """What is projected away takes a plain step at once, of the length that Adam gave to what was not, times
    this: Fira (2410.01623) for two sides."""
    late: bool = False
    """That length is the last step's, which the GPU knows when the gradient is there."""
    evened: bool = False
    """Rows and columns of what is projected away are brought to like lengths first."""
    by_spectrum: bool = False
    """The d of each matrix by the singular values of its first gradient, as many elements together."""
    pairs: str = ""
    """Pairs that are kept for all steps: found on the `own` text or the `other` one, with the weights before
    the first step, or `random`; empty: found in the first step, and renewed."""
    one_sided: bool = False
    """P alone, with as many elements: d' = d d / n columns."""


HALF, QUARTER = 0.5, 0.25
VARIANTS = (
    Variant(name="native"),
    *(
        variant
        for part, share in (("n/4", QUARTER), ("n/2", HALF))
        for variant in (
            Variant(name=f"block d={part}", share=share),
            Variant(name=f"block d={part}, residual", share=share, residual=1.0, late=True),
            Variant(
                name=f"block d={part}, residual, evened", share=share, residual=1.0, late=True, evened=True
            ),
        )
    ),
    Variant(name="block d=n/4, residual of this step's scale", share=QUARTER, residual=1.0),
    Variant(name="block d=n/4, residual x 2", share=QUARTER, residual=2.0, late=True),
    Variant(name="block d=n/4, residual x 4", share=QUARTER, residual=4.0, late=True),
    Variant(name="block d=n/2, residual x 2", share=HALF, residual=2.0, late=True),
    Variant(name="block d=n/32, residual x 2", share=1 / 32, residual=2.0, late=True),
    Variant(name="block d=n/32", share=1 / 32),
    *(
        Variant(name=f"block d=n/4, {pairs} pairs, kept", share=QUARTER, pairs=pairs)
        for pairs in ("own", "other", "random")
    ),
    Variant(name="exact d=n/4", share=QUARTER, exact=True),
    Variant(name="exact d=n/4, residual", share=QUARTER, exact=True, residual=1.0, late=True),
    Variant(name="exact one-sided, elements of d=n/4", share=QUARTER, exact=True, one_sided=True),
    Variant(name="block d=n/4, by spectrum", share=QUARTER, by_spectrum=True),
    Variant(name="block d=n/4, every 20 steps", share=QUARTER, renew_every=20),
    Variant(
        name="block d=n/4, every 20 steps, moments reset", share=QUARTER, renew_every=20, moments="reset"
    ),
    Variant(name="block d=n/4, every 20 steps, error feedback", share=QUARTER, renew_every=20, feedback=1.0),
)


def pair_of(gradient: Tensor, d: int, variant: Variant) -> Pair:
    rows, columns = gradient.shape
    if variant.one_sided:
        smaller = min(rows, columns)
        rank = max(1, round(d * d / max(rows, columns)))
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        eye = torch.eye(smaller)
        return (u[:, :rank], eye) if rows >= columns else (eye, v[:rank].T)
    if variant.exact:
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        return u[:, :d].contiguous(), v[:d].T.contiguous()
    left, right = block_pair(gradient, d, min(4, d))
    return left.dense(), right.dense()


class Matrix:
    """One weight and its subspace."""

    def __init__(self, weight: nn.Parameter, d: int, variant: Variant) -> None:
        self.weight, self.d, self.variant = weight, d, variant
        self.pair: Pair | None = None
        self.moment = self.second = torch.zeros(())
        self.updates = 0
        self.away = torch.zeros_like(weight) if variant.feedback else None
        self.scale = 0.0

    def renew(self, gradient: Tensor) -> None:
        new = pair_of(gradient, self.d, self.variant)
        if self.pair is None or self.variant.moments == "reset":
            shape = (new[0].shape[1], new[1].shape[1])
            self.moment, self.second, self.updates = torch.zeros(shape), torch.zeros(shape), 0
        elif self.variant.moments == "carried":
            a, b = new[0].T @ self.pair[0], self.pair[1].T @ new[1]
            self.moment = a @ self.moment @ b
            self.second = a.square() @ self.second @ b.square()
        self.pair = new

    @torch.no_grad()
    def step(self, number: int, rate: float) -> None:
        gradient, variant = self.weight.grad, self.variant
        assert gradient is not None
        if self.away is not None:
            gradient = gradient + variant.feedback * self.away
        if self.pair is None or (number % variant.renew_every == 0 and not variant.pairs):
            self.renew(gradient)
        assert self.pair is not None
        p, q = self.pair
        core = p.T @ gradient @ q
        self.updates += 1
        self.moment = self.moment.lerp(core, 0.1)
        self.second = self.second.lerp(core.square(), 0.001)
        corrected = self.moment / (1 - 0.9**self.updates)
        direction = corrected / ((self.second / (1 - 0.999**self.updates)).sqrt() + 1e-8)
        delta = p @ direction @ q.T
        if self.away is not None or variant.residual:
            away = gradient - p @ core @ q.T
            if self.away is not None:
                self.away = away
            scale = float(direction.norm() / core.norm().clamp_min(1e-30))
            used = self.scale if variant.late else scale
            self.scale = scale
            if variant.residual:
                delta = delta + variant.residual * used * (evened(away) if variant.evened else away)
        self.weight.sub_(rate * delta)


def evened(matrix: Tensor) -> Tensor:
    """Of the same length, its columns, then its rows, of like lengths among themselves."""
    tiny = 1e-30
    found = matrix / matrix.norm(dim=0, keepdim=True).clamp_min(tiny)
    found = found / found.norm(dim=1, keepdim=True).clamp_min(tiny)
    return found * (matrix.norm() / found.norm().clamp_min(tiny))


def decoder() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=HIDDEN, intermediate_size=344, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=SEQ_LEN, use_cache=False,
        )
    )  # fmt: skip


class Text:
    """Bytes to train on and to judge by."""

    def __init__(self, folder: Path) -> None:
        def of(text: str) -> Tensor:
            return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

        records = json.loads((folder / "alpaca_demo/alpaca_en_demo.json").read_text())
        told = of("\n\n".join(f"{each['instruction']}\n{each['output']}" for each in records))
        cut = int(0.9 * len(told))
        self.begun_on, self.tuned_on = of((folder / "wikitext2/test.txt").read_text()), told[:cut]
        held_out = told[cut:]
        rows = held_out[: len(held_out) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN).long()
        self.judged = rows[:: max(1, len(rows) // JUDGED)][:JUDGED]

    def batch(self, text: Tensor, seed: int, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_000 * seed + number)
        first = torch.randint(len(text) - SEQ_LEN, (BATCH_SIZE,), generator=generator)
        return text[first[:, None] + torch.arange(SEQ_LEN)].long()


def rate_at(number: int, steps: int, rate: float) -> float:
    """Linear, after a warm-up of a twentieth."""
    warm = max(1, steps // 20)
    return rate * min((number + 1) / warm, (steps - number) / (steps - warm))


def judged(model: nn.Module, text: Text) -> float:
    with torch.no_grad():
        return float(model(input_ids=text.judged, labels=text.judged).loss)


def sizes(
    matrices: Mapping[str, nn.Parameter], variant: Variant, model: nn.Module, ids: Tensor
) -> dict[str, int]:
    """The d of each matrix."""
    assert variant.share is not None
    d = round(variant.share * HIDDEN)
    if not variant.by_spectrum:
        return dict.fromkeys(matrices, d)
    # The same elements together, given where singular values are largest beside their matrix's.
    model(input_ids=ids, labels=ids).loss.backward()
    shares = {}
    for name, weight in matrices.items():
        assert weight.grad is not None
        values = torch.linalg.svdvals(weight.grad).square()
        shares[name] = 1 - values.cumsum(0) / values.sum()
    model.zero_grad()
    found = dict.fromkeys(matrices, 4)
    budget = len(matrices) * d * d - sum(each * each for each in found.values())
    while True:
        gains = {
            name: float(shares[name][each - 1] - shares[name][each + 3]) / ((each + 4) ** 2 - each**2)
            for name, each in found.items()
            if each + 4 <= HIDDEN and (each + 4) ** 2 - each**2 <= budget
        }
        if not gains:
            return found
        best = max(gains, key=lambda name: gains[name])
        budget -= (found[best] + 4) ** 2 - found[best] ** 2
        found[best] += 4


def run(variant: Variant, text: Text, start: Mapping[str, Tensor], rate: float, seed: int) -> dict[str, Any]:
    model = decoder()
    model.load_state_dict(start)
    named = {
        name: weight for name, weight in model.named_parameters() if ".layers." in name and weight.dim() == 2
    }
    inside: list[Matrix] = []
    if variant.share is not None:
        found = sizes(named, variant, model, text.batch(text.tuned_on, seed + 1, 0))
        inside = [Matrix(weight, found[name], variant) for name, weight in named.items()]
        if variant.pairs:
            ids = text.batch(text.begun_on if variant.pairs == "other" else text.tuned_on, seed + 1, STEPS)
            model(input_ids=ids, labels=ids).loss.backward()
            generator = torch.Generator().manual_seed(seed)
            for matrix in inside:
                gradient = matrix.weight.grad
                assert gradient is not None
                if variant.pairs == "random":
                    gradient = torch.randn(gradient.shape, generator=generator)
                matrix.renew(gradient)
            model.zero_grad()
    taken = {id(each.weight) for each in inside}
    others = [each for each in model.parameters() if id(each) not in taken]
    optimizer = torch.optim.AdamW(others, lr=rate, weight_decay=0.0)
    # What is outside the subspaces keeps native's rate: the grid is of what differs.
    outer = 1.0 if variant.share is None else OUTER_RATE / rate
    began_s = time.process_time()
    for number in range(STEPS):
        ids = text.batch(text.tuned_on, seed + 1, number)
        model(input_ids=ids, labels=ids).loss.backward()
        now = rate_at(number, STEPS, rate)
        for group in optimizer.param_groups:
            group["lr"] = now * outer
        optimizer.step()
        for matrix in inside:
            matrix.step(number, now)
        model.zero_grad()
    loss = round(judged(model, text), 6)
    return {
        "variant": variant.name, "rate": rate, "seed": seed, "loss": loss if math.isfinite(loss) else None,
        "cpu_s": round(time.process_time() - began_s, 2),
    }  # fmt: skip


OUTER_RATE = 3e-3
"""Of what is outside the subspaces: the best of native's."""


def begun(text: Text, path: Path) -> dict[str, Tensor]:
    """Weights after AdamW on the text that no run sees; kept in `path`."""
    if path.exists():
        return torch.load(path, weights_only=True)
    model = decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for number in range(START_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(number, START_STEPS, 2e-3)
        ids = text.batch(text.begun_on, 0, number)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), path)
    return dict(model.state_dict())


def study(given: argparse.Namespace, path: Path) -> None:
    text = Text(given.data)
    start = begun(text, given.out / "begun.pt")
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    model = decoder()
    model.load_state_dict(start)
    about = {"start_loss": judged(model, text), "steps": STEPS, "tokens": STEPS * BATCH_SIZE * SEQ_LEN}

    def do(variant: Variant, rate: float, seed: int) -> None:
        if any((row["variant"], row["rate"], row["seed"]) == (variant.name, rate, seed) for row in rows):
            return
        rows.append(run(variant, text, start, rate, seed))
        print(rows[-1], file=sys.stderr, flush=True)
        lines = ",\n".join(json.dumps(row) for row in rows)
        head = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in about.items())
        path.write_text(f'{{{head}, "rows": [\n{lines}\n]}}\n')

    chosen = [each for each in VARIANTS if not given.only or any(part in each.name for part in given.only)]
    for variant in chosen:
        for rate in NATIVE_RATES if variant.share is None else RATES:
            do(variant, rate, SEEDS[0])
        best = best_rate(rows, variant.name)
        for seed in SEEDS[1:] if best is not None else ():
            do(variant, best, seed)


def best_rate(rows: Iterable[Mapping[str, Any]], name: str) -> float | None:
    found = [
        (row["loss"], row["rate"])
        for row in rows
        if row["variant"] == name and row["seed"] == SEEDS[0] and row["loss"] is not None
    ]
    return min(found)[1] if found else None


def table(document: Mapping[str, Any]) -> str:
    """Loss of held-out text over seeds; the share of native's gain that is lost."""
    rows = document["rows"]

    def losses(name: str) -> list[float]:
        best = best_rate(rows, name)
        return [row["loss"] for row in rows if row["variant"] == name and row["rate"] == best]

    native = statistics.median(losses("native"))
    gain = document["start_loss"] - native
    lines = ["| variant | rate | loss | of native's gain | CPU s |", "| --- | --- | --- | --- | --- |"]
    for variant in VARIANTS:
        found = losses(variant.name)
        if not found:
            continue
        middle = statistics.median(found)
        spread = f"{middle:.4f} ({min(found):.4f} to {max(found):.4f})"
        share = (document["start_loss"] - middle) / gain
        took = statistics.median(row["cpu_s"] for row in rows if row["variant"] == variant.name)
        rate = best_rate(rows, variant.name)
        lines.append(f"| {variant.name} | {rate:g} | {spread} | {share:.1%} | {took:.1f} |")
    return "\n".join(lines)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What makes lsp lose.")
    parser.add_argument("--data", type=Path, help="folder of wikitext2/ and alpaca_demo/")
    parser.add_argument("--out", type=Path, required=True, help="folder of subspace.json")
    parser.add_argument("--only", action="append", default=[], help="part of a variant's name")
    given = parser.parse_args(None if arguments is None else list(arguments))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "subspace.json"
    if given.data is not None:
        study(given, path)
    print(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
