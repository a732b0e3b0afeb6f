"""Zeroth-order fine-tuning as a plain loop over torch tensors, written from the papers: the oracle of `mezo`.

Of the engine it takes the noise by counter and the settings, nothing else. All noise of a step is there at
once, and every forward pass is the model's own on parameters of its own.
"""

from __future__ import annotations

import copy
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from engines.base import Batch
from engines.methods.mezo import Mezo
from engines.noise.philox import NoiseKey, binomials, normal, signs
from engines.settings.zeroth_order import MezoSettings
from tiny_models import TinyBlueprint

SEED = 7
LAST_STEP = 2**32 - 1
"""Step of the noise that an adapter's A begins as."""


@dataclass(frozen=True)
class Linear:
    """A matrix of a linear layer in the blocks."""

    path: str
    rows: int
    columns: int
    """Outputs and inputs."""
    turned: bool
    """Inputs x outputs in memory, as GPT-2 has it."""

    def as_stored(self, product: Tensor) -> Tensor:
        """(outputs, inputs) as the model's tensor has it."""
        return product.t() if self.turned else product


@lru_cache(maxsize=16384)
def drawn(kind: str, draw: int, tensor: int, count: int) -> Tensor:
    """(count,) fp32 of one key, for all tests that ask for it; nobody may change it."""
    of_kind = {"gaussian": normal, "binomial": binomials, "rademacher": signs}[kind]
    return of_kind(NoiseKey(seed=SEED, step=draw, tensor=tensor), count)


def block_of(name: str) -> int | None:
    """Number of the block that a parameter belongs to."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


class PlainLoop:
    """Weights that are trained by the formulas of the papers, and the steps that train them."""

    def __init__(self, settings: MezoSettings, blueprint: TinyBlueprint) -> None:
        self.settings = settings
        self.model = copy.deepcopy(blueprint.reference).eval()
        self.theta = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.numbers = {name: number for number, name in enumerate(self.theta)}
        self.trained = self._trained(blueprint.shape.num_blocks)
        self.linears: dict[str, Linear] = {}
        for path, module in self.model.named_modules():
            name, turned = f"{path}.weight", type(module).__name__ == "Conv1D"
            if (type(module) is nn.Linear or turned) and block_of(name) is not None:
                rows, columns = reversed(module.weight.shape) if turned else module.weight.shape
                self.linears[name] = Linear(path, rows, columns, turned)
        self.per_example = settings.estimator == "grzo"
        self.low_rank = (
            [name for name in self.linears if name in self.trained] if settings.noise_window else []
        )
        self.adapters: dict[str, Tensor] = {}
        if settings.train == "lora":
            self._add_adapters()

    def _trained(self, num_blocks: int) -> set[str]:
        """`last:N`: the last N blocks, and what is outside the blocks but for embeddings."""
        if self.settings.train == "all":
            return set(self.theta)
        if self.settings.train == "lora":
            return set()
        first = num_blocks - int(self.settings.train.removeprefix("last:"))
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        return {
            name
            for name, weight in self.model.named_parameters()
            if (first <= block if (block := block_of(name)) is not None else id(weight) not in embeddings)
        }

    def _add_adapters(self) -> None:
        """A ~ N(0, 1 / inputs), B = 0. Their numbers follow the model's, by name."""
        rank = self.settings.lora_rank
        for linear in self.linears.values():
            self.adapters[f"{linear.path}.lora_A"] = torch.zeros(rank, linear.columns)
            self.adapters[f"{linear.path}.lora_B"] = torch.zeros(linear.rows, rank)
        self.numbers |= {name: len(self.theta) + i for i, name in enumerate(sorted(self.adapters))}
        for name, tensor in self.adapters.items():
            if name.endswith("lora_A"):
                self.adapters[name] = self._normal(name, LAST_STEP, tensor) * tensor.shape[1] ** -0.5

    def _normal(self, name: str, draw: int, like: Tensor) -> Tensor:
        kind = "gaussian" if draw == LAST_STEP else self.settings.noise
        return drawn(kind, draw, self.numbers[name], like.numel()).view(like.shape)

    def _low_rank_noise(self, name: str, draw: int) -> Tensor:
        """z = U_t V_w^T: U anew for every query, V for a window of steps."""
        rank, linear = self.settings.lozo_rank, self.linears[name]
        number = len(self.theta) + 2 * self.low_rank.index(name)
        window = draw // self.settings.queries // self.settings.lozo_window
        u = drawn("gaussian", draw, number, rank * linear.rows)
        v = drawn("gaussian", window, number + 1, rank * linear.columns)
        return linear.as_stored(u.view(rank, -1).t() @ v.view(rank, -1))

    def _example_noise(self, name: str, step: int, examples: int) -> list[Tensor]:
        """z_i = r_i s_i^T of every example: r anew in each step, s for a window of steps. The matrices of a
        block are drawn together, each row with room for all of them, of whole 16 bytes each."""
        beside = [each for each in self.low_rank if block_of(each) == block_of(name)]
        blocks = list(dict.fromkeys(block_of(each) for each in self.low_rank))
        number = len(self.theta) + 2 * blocks.index(block_of(name))

        def factor(side: str, draw: int, number: int) -> Tensor:
            widths = [-(-getattr(self.linears[each], side) // 4) * 4 for each in beside]
            start = sum(widths[: beside.index(name)])
            found = drawn("rademacher", draw, number, examples * sum(widths)).view(examples, -1)
            return found[:, start : start + getattr(self.linears[name], side)]

        r = factor("rows", step, number)
        window = step // self.settings.grzo_window
        s = factor("columns", window, number + 1)
        return [self.linears[name].as_stored(torch.outer(*each)) for each in zip(r, s, strict=True)]

    def noises(self, step: int, examples: int) -> list[dict[str, Tensor]]:
        """z of each query, or of each example."""
        if not self.per_example:
            q = self.settings.queries
            return [self.noise(step * q + query) for query in range(q)]
        own = {name: self._example_noise(name, step, examples) for name in self.low_rank}
        one = {name: self._normal(name, step, self.theta[name]) for name in self.trained - own.keys()}
        return [one | {name: of[i] for name, of in own.items()} for i in range(examples)]

    def noise(self, draw: int) -> dict[str, Tensor]:
        """z of one query, of everything that is trained."""
        trained = self.adapters or {name: self.theta[name] for name in self.theta if name in self.trained}
        return {
            name: self._low_rank_noise(name, draw) if name in self.low_rank else self._normal(name, draw, of)
            for name, of in trained.items()
        }

    def weights(self, moved: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The model's own parameters, adapters merged into them; `moved` in the place of what is trained."""
        moved = moved or {}
        if not self.adapters:
            return {**self.theta, **moved}
        adapters, scale = {**self.adapters, **moved}, self.settings.lora_alpha / self.settings.lora_rank
        merged = dict(self.theta)
        for name, linear in self.linears.items():
            change = (adapters[f"{linear.path}.lora_B"] @ adapters[f"{linear.path}.lora_A"]) * scale
            merged[name] = merged[name] + linear.as_stored(change)
        return merged

    def loss(self, z: dict[str, Tensor], by: float, group: Sequence[Batch]) -> float:
        """Mean over the micro-batches of `group`, at theta + by z."""
        of = self.adapters or self.theta
        weights = self.weights({name: of[name] + by * each for name, each in z.items()})
        with torch.no_grad():
            losses = [functional_call(self.model, weights, kwargs=dict(b.inputs)).loss.item() for b in group]
        return sum(losses) / len(losses)

    def example_losses(
        self, noises: Sequence[dict[str, Tensor]], by: float, group: Sequence[Batch]
    ) -> list[float]:
        """Of each example of all micro-batches, at theta + by its z: what it adds to the mean over its
        micro-batch's labels, times the examples there."""
        losses: list[float] = []
        for batch in group:
            labels = batch.inputs["labels"]
            count = (labels[:, 1:] != -100).sum(1) if labels.dim() == 2 else torch.ones(len(labels))
            for row in range(len(labels)):
                z = noises[len(losses)]
                weights = self.weights({name: self.theta[name] + by * each for name, each in z.items()})
                alone = {name: each[row : row + 1] for name, each in batch.inputs.items()}
                with torch.no_grad():
                    found = functional_call(self.model, weights, kwargs=alone).loss.item()
                losses.append(found * float(count[row] / count.sum()) * len(labels))
        return losses

    def slopes(
        self, noises: Sequence[dict[str, Tensor]], group: Sequence[Batch]
    ) -> tuple[list[float], float]:
        """The projected gradient of each query, and the mean of all losses."""
        eps = self.settings.eps
        if self.per_example:
            plus, minus = (self.example_losses(noises, by, group) for by in (eps, -eps))
            delta = [(p - m) / 2 for p, m in zip(plus, minus, strict=True)]
            sigma = statistics.stdev(delta)
            return [each / sigma / (2 * eps) for each in delta], statistics.fmean(plus + minus)
        plus = [self.loss(z, eps, group) for z in noises]
        if self.settings.estimator == "fzoo":
            middle = self.loss({}, 0.0, group)
            sigma = statistics.stdev(plus)
            return [(each - middle) / (eps * sigma) for each in plus], statistics.fmean([middle, *plus])
        minus = [self.loss(z, -eps, group) for z in noises]
        if self.settings.estimator == "1.5-spsa":
            middle = self.loss({}, 0.0, group)
            power, floor = self.settings.curvature_alpha, self.settings.curvature_floor
            bends = [abs(p - 2 * middle + m) / eps**2 for p, m in zip(plus, minus, strict=True)]
            slopes = [
                (p - m) / (2 * eps * max(bend**power, floor))
                for p, m, bend in zip(plus, minus, bends, strict=True)
            ]
            return slopes, statistics.fmean([middle, *plus, *minus])
        return [(p - m) / (2 * eps) for p, m in zip(plus, minus, strict=True)], statistics.fmean(plus + minus)

    def update(self, z: dict[str, Tensor], gradient: float, count: int, *, decays: bool) -> None:
        """theta <- theta - lr (g z / count + wd theta); decay once a step, on matrices. fp32 throughout."""
        of = self.adapters or self.theta
        coefficient = torch.tensor(gradient / count, dtype=torch.float32)
        for name, each in z.items():
            change = each * coefficient
            if name in self.low_rank and not self.per_example:
                change = change / self.settings.lozo_rank
            if decays and each.dim() >= 2:
                change = change + of[name] * self.settings.weight_decay
            of[name] = of[name] - self.settings.learning_rate * change

    def steps_beside(self, made: Mezo, groups: Sequence[Sequence[Batch]]) -> None:
        """The steps of `made` and ours, which takes the engine's projected gradients: those are small
        differences of losses, which agree to rounding, and are told apart by `eps`."""
        fzoo, product = self.settings.estimator == "fzoo", bool(self.low_rank or self.adapters)
        tolerance = 0.02 / self.settings.eps if fzoo else 3e-3 if product else 1e-3
        if self.per_example:  # a slope over twice the deviation of the differences
            tolerance = 5e-3 / self.settings.eps
        for step, group in enumerate(groups):
            noises = self.noises(step, sum(len(batch.inputs["labels"]) for batch in group))
            slopes, mean = self.slopes(noises, group)
            stats = made.step(group)
            assert stats.loss == pytest.approx(mean, rel=1e-5 if product else 1e-6)
            assert len(stats.updates) == len(noises)
            for query, (update, slope) in enumerate(zip(stats.updates, slopes, strict=True)):
                assert update.projected_gradient == pytest.approx(slope, abs=tolerance)
                self.update(noises[query], update.projected_gradient, len(noises), decays=query == 0)

    def assert_same_weights(self, made: Mezo) -> None:
        """Bit for bit; with low-rank noise to rounding, since the engine adds up a window's updates before
        it adds them to a matrix, and those of all examples before it adds them to anything else."""
        expected = self.weights()
        for name, weight in made.weights():
            if name in self.low_rank or self.per_example:
                assert torch.allclose(weight, expected[name], atol=5e-7, rtol=1e-6), name
            else:
                assert torch.equal(weight, expected[name]), name
