"""Settings of the zeroth-order methods. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import ConfigDict

from engines.errors import UserError
from engines.settings.checks import Rounding, Schedule, require, require_finite
from engines.shapes import Workload

Noise = Literal["gaussian", "binomial", "rademacher"]
Base = Literal["full", "lossless", "int8", "fp8", "int4"]
EXACT_BASES: tuple[Base, ...] = ("full", "lossless")
"""Weights are kept to the bit."""


MOST_QUERIES = 64
"""As many as the log of deferred updates holds: those of one step."""


MOST_RANK = 64


MOST_FOLD_EVERY = 64


MOST_DEFERRED = 64
"""Entries of updates that a block can be behind."""


@dataclass(frozen=True, kw_only=True)
class MezoSettings:
    """MeZO (2305.17333): SGD along one random direction, two forward passes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    learning_rate: float = 1e-6
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    """Applied to matrices only; biases and norms are never decayed."""
    estimator: Literal["spsa", "1.5-spsa", "fzoo", "lozo", "grzo"] = "spsa"
    """How a step finds its direction (`engines.zeroth_order.estimators`): `spsa` takes the slope along z from
    both sides, as MeZO does (Spall, 1992); `1.5-spsa` (2609.38095) divides each slope by a power of the
    curvature along z, for which the loss is taken once without a perturbation; `fzoo` (2506.09034) takes it
    from one side, and divides by the standard deviation of the losses: its learning rates are in units of
    their own. `lozo` (2410.07698) is `spsa` with low-rank noise on the matrices of the blocks, which are only
    read until its window ends (`engines.zeroth_order.low_rank.lozo`). `grzo` (2606.02857) has a direction
    for each example, of rank one there, in the two forward passes that `spsa` takes for one: from both sides,
    divided by the standard deviation of the differences (`engines.zeroth_order.low_rank.example_noise`)."""
    lozo_rank: int = 4
    lozo_window: int = 50
    """Steps for which one factor of the noise is kept. Then what they add up to is added to the weights."""
    grzo_window: int = 50
    """Likewise of `grzo`: with 1 both factors of every direction are drawn anew in each step, as published,
    and the blocks' matrices are written in each."""
    curvature_alpha: float = 0.1
    """Of `1.5-spsa`: slopes are divided by the curvature to this power, as its authors' saturating alpha."""
    curvature_floor: float = 1.0
    """Of `1.5-spsa`: but by no less than this, as its authors' lambda."""
    queries: int = 1
    """Independent z in each step, all in one visit of each block; the update is their mean. `spsa` takes two
    forward passes for each, `1.5-spsa` one more in all, `fzoo` one for each, and one more."""
    noise: Noise = "gaussian"
    """Of what the perturbation z is drawn: normals as in MeZO, or signs as in SPSA (Spall, 1992). `binomial`,
    the sum of 32 signs over sqrt(32), is near a normal and takes half its instructions
    (`engines.noise.philox`)."""
    eps: float = 1e-3
    """Size of the perturbation."""
    rounding: Rounding = "stochastic"
    """How updates reach bf16 and fp16 weights; `nearest` loses those below half a unit in the last place."""
    train: str = "all"
    """What is trained: `all`, `last:N` (the last N blocks), or `lora` (adapters beside every linear layer of
    the blocks, merged into the weights on export). What is not trained is neither perturbed nor
    downloaded."""
    lora_rank: int = 8
    lora_alpha: float = 16.0
    """An adapter's product is scaled by `lora_alpha` / `lora_rank`."""
    base: Base = "full"
    """How the matrices of the blocks are kept: as they are; with the same bits in three quarters of the bytes
    (`lossless`, of bf16 alone); or, approximately, as 8-bit or 4-bit values with a scale per 128 (`fp8` is
    e4m3). Vectors stay as they are. Passes compute in the full precision."""
    fold_every: int = 1
    """With a low-bit base, steps between two roundings of a block to its grid; until then its updates are in
    the log and replayed exactly at every visit. Rare roundings lose less. Blocks take turns."""

    @property
    def is_one_sided(self) -> bool:
        """Whether a step compares the loss at each perturbation with that of the weights themselves; else it
        is with the loss at the opposite perturbation. Passes and costs follow from it."""
        return self.estimator == "fzoo"

    @property
    def has_clean_pass(self) -> bool:
        """Whether a step takes the loss of the weights themselves, too."""
        return self.is_one_sided or self.estimator == "1.5-spsa"

    @property
    def forward_passes(self) -> int:
        """That each micro-batch of a step takes."""
        return (1 if self.is_one_sided else 2) * self.queries + self.has_clean_pass

    @property
    def noise_window(self) -> int | None:
        """Steps that low-rank noise of the blocks' matrices has a factor in common, while those are only
        read; `None`: their noise is of full rank."""
        return {"lozo": self.lozo_window, "grzo": self.grzo_window}.get(self.estimator)

    def rank(self, examples: int) -> int:
        """Of low-rank noise, in a step on so many examples: `grzo` has a direction for each."""
        return examples if self.estimator == "grzo" else self.lozo_rank

    def updates_per_step(self, examples: int) -> int:
        """Entries in the log of a step on so many examples."""
        return examples if self.estimator == "grzo" else self.queries

    @property
    def is_quantized(self) -> bool:
        """Whether matrices are kept approximately, as low-bit values."""
        return self.base not in EXACT_BASES

    @property
    def trains_quantized(self) -> bool:
        """Whether trained matrices are kept as low-bit values, so that a block takes its updates at the times
        that `fold_every` sets, and at no other. With adapters, or with low-rank noise, such matrices are
        only read until a window ends."""
        return self.is_quantized and self.train != "lora" and self.noise_window is None

    @property
    def decides_updates(self) -> dict[str, Any]:
        """The settings, by name, that decide the bits of a run: all of MeZO's, but `fold_every` only where it
        says when trained matrices are rounded, and what only `1.5-spsa` or `grzo` has only with it: logs
        from before name none of that. Those of `Zo2Settings` alone say where things lie, and so does
        a lossless base: it counts as a full one."""
        values = {field.name: getattr(self, field.name) for field in fields(MezoSettings)}
        values["base"] = self.base if self.is_quantized else "full"
        if not self.trains_quantized:
            del values["fold_every"]
        if self.estimator != "grzo":
            del values["grzo_window"]
        if self.estimator != "1.5-spsa":
            del values["curvature_alpha"], values["curvature_floor"]
        return values

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.learning_rate >= 0, "learning_rate", "must not be negative")
        require(self.warmup_steps >= 0, "warmup_steps", "must not be negative")
        require(self.weight_decay >= 0, "weight_decay", "must not be negative")
        require(self.eps > 0, "eps", "must be positive")
        require(1 <= self.queries <= MOST_QUERIES, "queries", f"must be between 1 and {MOST_QUERIES}")
        require(0 <= self.curvature_alpha <= 1, "curvature_alpha", "must be between 0 and 1")
        require(self.curvature_floor > 0, "curvature_floor", "must be positive")
        if self.estimator == "fzoo":
            require(
                self.queries >= 2,
                "queries",
                "must be 2 or more with estimator=fzoo, which divides by the deviation of their losses",
                "set queries=8, say",
            )
            require(
                self.noise == "rademacher",
                "noise",
                "must be rademacher with estimator=fzoo, as it was published",
                "set noise=rademacher",
            )
        self._check_low_rank()
        require(self.lora_rank > 0, "lora_rank", "must be positive")
        require(
            self.train in ("all", "lora") or re.fullmatch(r"last:[1-9][0-9]*", self.train) is not None,
            "train",
            "is one of all, lora, last:N",
        )
        require(
            1 <= self.fold_every <= MOST_FOLD_EVERY, "fold_every", f"must be between 1 and {MOST_FOLD_EVERY}"
        )
        require(
            self.fold_every == 1 or self.is_quantized or isinstance(self, Zo2Settings),
            "fold_every",
            "is of use to mezo with a low-bit base only: nothing goes down",
            "leave fold_every out, or set base=int8",
        )
        require(
            self.fold_every == 1 or self.noise_window is None,
            "fold_every",
            f"must be 1 with estimator={self.estimator}: "
            f"{self.estimator}_window says when matrices are written",
            "leave fold_every out",
        )
        require(
            self.fold_every * self.queries <= MOST_DEFERRED,
            "fold_every",
            f"times queries must be {MOST_DEFERRED} at most: the log of deferred updates holds no more",
            f"with queries={self.queries} set fold_every={MOST_DEFERRED // self.queries} or less",
        )

    def _check_low_rank(self) -> None:
        window, name = self.noise_window, self.estimator
        if window is None:
            return
        if name == "lozo":
            require(
                self.noise == "gaussian",
                "noise",
                "must be gaussian with estimator=lozo: its noise is a product of normals",
                "leave noise out, or take estimator=spsa",
            )
            require(1 <= self.lozo_rank <= MOST_RANK, "lozo_rank", f"must be between 1 and {MOST_RANK}")
        else:
            require(
                self.noise == "rademacher",
                "noise",
                "must be rademacher with estimator=grzo: its directions are products of signs",
                "set noise=rademacher",
            )
            require(
                self.queries == 1,
                "queries",
                "must be 1 with estimator=grzo, which has a direction for each example already",
                "leave queries out, or take estimator=spsa",
            )
        require(
            self.train != "lora",
            "train",
            f"must be all or last:N with estimator={name}: adapters are of low rank already",
            "leave train out, or take estimator=spsa",
        )
        require(
            self.weight_decay == 0,
            "weight_decay",
            f"must be 0 with estimator={name}: matrices are only read until its window ends",
            "leave weight_decay out, or take estimator=spsa",
        )
        require(window >= 1, f"{name}_window", "must be positive")
        require(
            window * self.queries <= MOST_DEFERRED,
            f"{name}_window",
            f"times queries must be {MOST_DEFERRED} at most: the log of deferred updates holds no more",
            f"with queries={self.queries} set {name}_window={MOST_DEFERRED // self.queries} or less",
        )


@dataclass(frozen=True, kw_only=True)
class Zo2Settings(MezoSettings):
    """ZO2 (2503.12668): MeZO with the blocks in host memory."""

    resident_blocks: int = 0
    """Blocks that stay on the GPU, spread evenly among the streamed ones."""
    fold_every: int = 1
    """Steps between two downloads of a block. Until then its updates are in the log and replayed at every
    visit; blocks take turns. 1: every block goes down in every step. With a low-bit base also the steps
    between two roundings to its grid, of which rare ones lose less."""
    hidden_states: Literal["gpu", "host"] = "gpu"
    """Where the hidden states of a step's passes wait for the next block: on the GPU, or all but the first
    256 MB in pinned memory of the host, from where each comes up in time. For many queries, or many
    micro-batches."""
    sharded_upload: bool = False
    """With several GPUs on a machine: each brings up its share of every block over its own link, and they
    exchange the shares (an all-gather over NVLink), so that all links feed every step, as ZeRO-Infinity
    partitions parameters (2104.07857). Takes NCCL, and blocks that the ranks have once in host memory."""
    disk_blocks: int | Literal["auto"] = 0
    """Blocks that are on disk, not in host memory, spread evenly among the streamed ones; `auto`: as many as
    host memory has no room for."""
    disk_folder: str = ""
    """Where, on a local disk; the files have no name and are gone when the run ends, however it does. By
    default lspzo-bench/spill below $XDG_CACHE_HOME or ~/.cache."""

    def __post_init__(self) -> None:
        MezoSettings.__post_init__(self)
        require(self.resident_blocks >= 0, "resident_blocks", "must not be negative")
        require(self.disk_blocks == "auto" or self.disk_blocks >= 0, "disk_blocks", "must not be negative")
        require(
            not self.sharded_upload or self.may_shard_upload,
            "sharded_upload",
            "needs blocks that ranks have once in host memory",
            f"leave out disk_blocks, estimator={self.estimator} and a trained low-bit base"
            if self.noise_window
            else "leave out disk_blocks and a trained low-bit base",
        )

    @property
    def shares_blocks(self) -> bool:
        """Whether ranks of one machine have the blocks on its host once. Of what they share one writes a
        block when it is its turn; roundings and windows have other times."""
        return not (self.trains_quantized or self.noise_window is not None)

    @property
    def may_shard_upload(self) -> bool:
        """Whether `sharded_upload` is to be had: of blocks that all come up from such memory."""
        return self.shares_blocks and self.disk_blocks == 0

    @property
    def named_disk_blocks(self) -> int:
        """`disk_blocks`, of which `auto` counts as none."""
        return 0 if self.disk_blocks == "auto" else self.disk_blocks


def check_blocks(engine: str, settings: Any, model: str, num_blocks: int) -> None:
    """Raises `UserError` if the typed `settings` name more blocks than the model has."""
    if not isinstance(settings, MezoSettings):
        return
    placed: dict[str, int] = {}
    if isinstance(settings, Zo2Settings):
        placed = {"resident_blocks=": settings.resident_blocks, "disk_blocks=": settings.named_disk_blocks}
    trained = (
        {"train=last:": int(settings.train.removeprefix("last:"))}
        if settings.train.startswith("last:")
        else {}
    )
    for key, count in {**trained, **placed}.items():
        if count > num_blocks:
            raise UserError(
                f"--set {engine}.{key}{count}",
                f"{model} has {num_blocks} blocks",
                f"use {key}{num_blocks} or less",
            )
    if sum(placed.values()) > num_blocks:
        raise UserError(
            " and ".join(f"--set {engine}.{key}{count}" for key, count in placed.items()),
            f"a block is on the GPU or on disk, and {model} has {num_blocks}",
            f"let them add up to {num_blocks} or less",
        )


def why_no_base(settings: Any, dtype: str) -> str | None:
    """Why weights in `dtype` cannot have the base of these typed settings; `None`: they can."""
    if isinstance(settings, MezoSettings) and settings.base == "lossless" and dtype != "bf16":
        return f"keeps bf16 in fewer bytes, and the job is in {dtype}, of which little is saved"
    return None


def check_examples(engine: str, settings: Any, workload: Workload) -> None:
    """Raises `UserError` if the typed `settings` cannot have steps on so many examples."""
    examples = workload.examples_per_step
    if isinstance(settings, MezoSettings) and settings.estimator == "grzo":
        where = f"--set {engine}.estimator=grzo"
        if examples < 2:
            raise UserError(where, "compares a step's examples, and there is 1", "use --batch-size 2 or more")
        if examples > MOST_RANK:
            raise UserError(
                where,
                f"has directions for {MOST_RANK} examples at most, and a step has {examples}",
                f"let --batch-size times --accumulation be {MOST_RANK} or less",
            )


def check_base(engine: str, settings: Any, dtype: str) -> None:
    """Raises `UserError` if the typed `settings` want a base that weights in `dtype` cannot have."""
    if (why := why_no_base(settings, dtype)) is not None:
        raise UserError(f"--set {engine}.base=lossless", why, "use --dtype bf16, or leave base out")


def approximation(settings: Mapping[str, object]) -> str | None:
    """What is approximate about a method with these settings (as a `Plan` holds them); `None`: nothing."""
    base = settings.get("base", "full")
    if base in EXACT_BASES:
        return None
    return f"approximate: {'4' if base == 'int4' else '8'}-bit base ({base})"
