"""Rules that set the rate of `mezo` from the slopes it sees, in the place of a grid: a table and JSON.

    python tests/studies/rate_rules.py --wikitext2 DIR --out FILE.json

Without a source it prints the table of what lies in `--out`.

The decoder and the batches are those of `estimator_study`. Each rule has one constant, which is 1 where
nobody tunes it; of `constant` it is the rate, in units of the best that `estimator_study` found. With the
first seed each rule is run with that constant times each of `FACTORS`: a rule without need of a grid is best
near 1 and forgives the others. Then the other seeds are run at 1 and at the best factor.

Slopes are g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps); d is the number of weights, so that g z,
which estimates the gradient, has the norm |g| sqrt(d), and a step of rate lr is lr |g| sqrt(d) long.
Steps are all but orthogonal to one another: the distance from the start is the root of the sum of the
squares of their lengths. It is stored beside the true one. With c the factor, the rate of step t is

    constant     c 1e-4, at every step
    normalised   c eps / rms(g), over all steps so far: a step is as long as the probe
    dog          c r / sqrt(sum of d g^2), with r the greatest distance so far, at first 1e-6 (1 + |theta_0|):
                 DoG, arXiv 2302.12022, with the default of its authors' code, without its mean of weights
    dog, probe   r / sqrt(sum of d g^2), r being at first c eps sqrt(d), the length of the probe
    curvature    c / mean(h), h = (loss(theta + eps z) - 2 loss(theta) + loss(theta - eps z)) / eps^2, whose
                 mean is the trace of the Hessian: the best rate on a quadratic whose batches are alike. A
                 step in ten takes a third pass for it; until the mean is positive nothing moves
    signal       c s / mean(h), with s = mean(g g') / mean((g^2 + g'^2) / 2), where g' is the slope along z of
                 another batch: the share of g^2 that batches have in common, so the best rate on a quadratic
                 whose batches differ. The first ten steps and a step in ten after take three more passes
    fzoo         the estimator with 8 queries, at the rate c eps^2: each query's step is as long as the probe.
                 As many passes, not steps
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from projector_gradients import OTHERS_FROM, Source, decoder_on_wikitext
from rich.console import Console
from rich.progress import Progress
from trained_models import HELD_OUT, Trained, batches, held_out, train

from engines.base import Context, Update
from engines.errors import NonFiniteLoss
from engines.methods.mezo import Mezo
from engines.settings.zeroth_order import MezoSettings
from engines.shapes import Workload
from engines.zeroth_order import step as zeroth_order_step
from engines.zeroth_order.estimators import next_updates

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
BEST_RATE = 1e-4
"""Of `mezo` in the grid of `estimator_study`."""
EPS = MezoSettings.eps
DOG_START = 1e-6
"""Of DoG: r before the first step, in units of 1 + |theta_0|."""
LOOK_EVERY = 10
FZOO_QUERIES = 8


class Rule:
    """Sets the rate of each step from the slopes up to its own."""

    def __init__(self, name: str, factor: float, weights: int, start_norm: float) -> None:
        self.name, self.factor, self.weights = name, factor, weights
        self.squares = 0.0
        """Sum of the squares of all slopes."""
        self.steps = 0
        self.curvatures: list[float] = []
        self.pairs: list[tuple[float, float]] = []
        """Slopes of two batches along one direction."""
        self.last_rate = self.last_slope = 0.0
        self.only_looks = False
        """Whether steps leave the weights as they are."""
        self.distance = 0.0
        """From the start, were all directions orthogonal and of length sqrt(weights)."""
        self.start = {
            "dog": DOG_START * (1 + start_norm), "dog, probe": factor * EPS * math.sqrt(weights)
        }.get(name, 0.0)  # fmt: skip

    def rate(self, slope: float) -> float:
        """Of the step that found this slope; called once for each."""
        self.steps += 1
        self.squares += slope**2
        rate = self.last_rate = self._rate()
        # It only grows, as long as directions count as orthogonal, so that it is the greatest so far.
        self.distance = math.hypot(self.distance, rate * slope * math.sqrt(self.weights))
        return rate

    def _rate(self) -> float:
        if self.name == "constant":
            return self.factor * BEST_RATE
        if self.name == "curvature":
            mean = fmean(self.curvatures) if self.curvatures else 0.0
            return self.factor / mean if mean > 0 else 0.0
        if self.name == "signal":
            mean = fmean(self.curvatures) if self.curvatures else 0.0
            return self.factor * self._share() / mean if mean > 0 else 0.0
        if not self.squares:
            return 0.0
        if self.name == "normalised":
            return self.factor * EPS / math.sqrt(self.squares / self.steps)
        rate = max(self.start, self.distance) / math.sqrt(self.weights * self.squares)
        return rate * self.factor if self.name == "dog" else rate

    def _share(self) -> float:
        """Of the squares of slopes, what batches have in common: between 0 and 1."""
        common = sum(one * other for one, other in self.pairs)
        return max(0.0, common) / sum((one**2 + other**2) / 2 for one, other in self.pairs)


RULES = ("constant", "normalised", "dog", "dog, probe", "curvature", "signal", "fzoo")


def setting_rates(rule: Rule) -> AbstractContextManager[object]:
    """While it is entered, steps have the rates of `rule`. Those that only look append no update, so that the
    next step has their direction again."""

    def updates_by_rule(
        step: int, settings: MezoSettings, total_steps: int, losses: Sequence[float]
    ) -> tuple[Update, ...]:
        (update,) = next_updates(step, settings, total_steps, losses)
        rule.last_slope = update.projected_gradient
        return () if rule.only_looks else (replace(update, learning_rate=rule.rate(rule.last_slope)),)

    return patch.object(zeroth_order_step, "next_updates", updates_by_rule)


@dataclass(frozen=True, kw_only=True)
class RuleTrial:
    rule: str
    factor: float
    seed: int
    steps: int
    forward_passes: int
    start_loss: float
    half_loss: float | None
    """Held-out, after half of the steps; `None`: not finite."""
    loss: float | None
    half_rate: float | None
    """Of the step in the middle; `None` of `fzoo`."""
    last_rate: float | None
    distance: float | None
    """From the start at the end."""
    distance_by_slopes: float | None
    """The same, as `Rule` counts it; `None` of `fzoo`."""


def trial(source: Source, name: str, factor: float, seed: int, steps: int) -> RuleTrial:
    """Of so many steps of two passes each, or of as many passes with `fzoo`."""
    settings = MezoSettings()
    given = steps
    if name == "fzoo":
        settings = MezoSettings(
            estimator="fzoo", noise="rademacher", queries=FZOO_QUERIES, learning_rate=factor * EPS**2
        )
        steps = max(1, 2 * given // settings.forward_passes)
    context = Context(
        device="cpu", workload=Workload(batch_size=8, seq_len=128, dtype="fp32"), seed=seed, total_steps=steps
    )
    engine = Mezo(settings, context)
    engine.setup(Trained.of(source.model))
    started = {key: value.clone() for key, value in engine.weights()}
    norm = math.sqrt(sum(float(each.double().square().sum()) for each in started.values()))
    rule = Rule(name, factor, sum(each.numel() for each in started.values()), norm)
    by_rule = nullcontext() if name == "fzoo" else setting_rates(rule)
    judged = held_out(source)
    start_loss = engine.evaluate(judged).loss
    half_loss = loss = half_rate = last_rate = distance = None
    forward_passes = 0
    try:
        for step in range(steps):
            # After those that AdamW has seen, other ones for each seed.
            batch = batches(source, source.stages[-1] + seed * given + step, 1)
            pairs = name == "signal" and (step < LOOK_EVERY or step % LOOK_EVERY == 0)
            looks = pairs or (name == "curvature" and step % LOOK_EVERY == 0)
            plain = engine.evaluate(batch).loss if looks else math.nan
            other = math.nan
            if pairs:
                rule.only_looks = True
                with by_rule:
                    engine.step(batches(source, OTHERS_FROM + HELD_OUT + seed * given + step, 1))
                rule.only_looks = False
                other = rule.last_slope
            with by_rule:
                stats = engine.step(batch)
            forward_passes += settings.forward_passes * (1 + pairs) + looks
            if looks:
                rule.curvatures.append(2 * (stats.loss - plain) / EPS**2)
            if pairs:
                rule.pairs.append((rule.last_slope, other))
            if name != "fzoo":
                last_rate = rule.last_rate
            if step + 1 == max(1, steps // 2):
                half_loss, half_rate = finite(engine.evaluate(judged).loss), last_rate
        loss = finite(engine.evaluate(judged).loss)
        distance = math.sqrt(
            sum(float((each - started[key]).double().square().sum()) for key, each in engine.weights())
        )
    except NonFiniteLoss:
        pass
    engine.close()
    return RuleTrial(
        rule=name, factor=factor, seed=seed, steps=steps, forward_passes=forward_passes,
        start_loss=start_loss, half_loss=half_loss, loss=loss, half_rate=half_rate, last_rate=last_rate,
        distance=distance, distance_by_slopes=None if name == "fzoo" else rule.distance,
    )  # fmt: skip


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def best_factor(trials: Sequence[RuleTrial]) -> float:
    """Of one rule: that of the lowest final loss with the first seed; 1 if none was finite."""
    finals = {each.factor: each.loss for each in trials if each.seed == 0 and each.loss is not None}
    return min(finals, key=finals.__getitem__, default=1.0)


def mean_and_spread(trials: Sequence[RuleTrial], factor: float) -> str:
    losses = [each.loss for each in trials if each.factor == factor]
    known = [loss for loss in losses if loss is not None]
    if not known or len(known) < len(losses):
        return "not finite"
    return f"{fmean(known):.4f} ({stdev(known):.4f})" if len(known) > 1 else f"{known[0]:.4f}"


def table(trials: Sequence[RuleTrial]) -> str:
    heads = " | ".join(f"x {factor:g}" for factor in FACTORS)
    lines = [
        f"| rule | steps | {heads} | at 1, all seeds (spread) | best factor | there, all seeds "
        "| last rate at 1 |",
        "|---|---:|" + "---:|" * len(FACTORS) + "---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(each.rule for each in trials):
        mine = [each for each in trials if each.rule == name]
        first = {each.factor: each for each in mine if each.seed == 0}
        cells = [mean_and_spread([first[factor]], factor) for factor in FACTORS]
        best = best_factor(mine)
        rates = [each.last_rate for each in mine if each.factor == 1.0 and each.last_rate is not None]
        lines.append(
            f"| {name} | {mine[0].steps} | {' | '.join(cells)} | {mean_and_spread(mine, 1.0)} | {best:g} "
            f"| {mean_and_spread(mine, best)} | {f'{fmean(rates):.2g}' if rates else ''} |"
        )
    return "\n".join(lines)


def load_trials(path: Path) -> list[RuleTrial]:
    """Those of a file that the study wrote."""
    return [RuleTrial(**each) for each in json.loads(path.read_text(encoding="utf-8"))["trials"]]


def trials_of(source: Source, name: str, seeds: int, steps: int) -> Iterator[RuleTrial]:
    """Every factor with the first seed, then 1 and the best one with the others."""
    begun = []
    for factor in FACTORS:
        begun.append(trial(source, name, factor, 0, steps))
        yield begun[-1]
    for factor in dict.fromkeys((1.0, best_factor(begun))):
        for seed in range(1, seeds):
            yield trial(source, name, factor, seed, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--wikitext2", type=Path, help="folder of test.txt and valid.txt")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=300, help="of two forward passes, of each trial")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--adamw-steps", type=int, default=300)
    parser.add_argument("--only", nargs="*", default=list(RULES), choices=RULES)
    given = parser.parse_args()
    if given.wikitext2 is None:
        print(table(load_trials(given.out)))
        return
    torch.set_num_threads(1)
    source = decoder_on_wikitext(given.wikitext2, "cpu", layers=2, hidden=96)
    trials: list[RuleTrial] = []
    with Progress(console=Console(stderr=True)) as progress:
        train(source, given.adamw_steps, progress)
        task = progress.add_task("rules", total=len(given.only) * (len(FACTORS) + 2 * (given.seeds - 1)))
        for name in given.only:
            for each in trials_of(source, name, given.seeds, given.steps):
                trials.append(each)
                progress.update(task, advance=1, description=each.rule)
                document = {
                    "source": source.name, "torch": torch.__version__, "adamw_steps": given.adamw_steps,
                    "trials": [asdict(each) for each in trials],
                }  # fmt: skip
                given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(trials))


if __name__ == "__main__":
    main()
