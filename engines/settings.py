"""Every knob of every engine, with its unit and its default. Imports no torch.

`--set key=value` changes them, `lspzo-bench engines` lists them, a `Plan` holds the ones it chose.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from engines.base import UserError

Schedule = Literal["constant", "linear", "cosine"]
Base = Literal["full", "int8", "fp8", "int4"]


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """AdamW as in Loshchilov & Hutter (1711.05101), with decoupled weight decay."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    learning_rate: float = 1e-4
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    """Applied to matrices only; biases and norms are never decayed."""
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-8

    def __post_init__(self) -> None:
        _require_finite(self)
        _require(self.learning_rate >= 0, "learning_rate", "must not be negative")
        _require(self.warmup_steps >= 0, "warmup_steps", "must not be negative")
        _require(self.weight_decay >= 0, "weight_decay", "must not be negative")
        _require(0 <= self.beta1 < 1, "beta1", "must be in [0, 1)")
        _require(0 <= self.beta2 < 1, "beta2", "must be in [0, 1)")
        _require(self.adam_eps > 0, "adam_eps", "must be positive")


@dataclass(frozen=True, kw_only=True)
class NativeSettings(AdamWSettings):
    """Everything on the GPU: the line that all methods are measured against."""


@dataclass(frozen=True, kw_only=True)
class TorchaoOffloadSettings(AdamWSettings):
    """torchao's CPUOffloadOptimizer around AdamW."""

    offload_gradients: bool = False
    """Free each gradient on the GPU as soon as it is on the host."""


@dataclass(frozen=True, kw_only=True)
class LspSettings(AdamWSettings):
    """LSP-Offload (2406.10181). Symbols d, r and alpha are the paper's."""

    d: int | Literal["auto"] = 512
    """Size of the subspace; a matrix smaller than d x d uses its own smaller side, to a multiple of r.
    `auto`: one for each shape of weights, as `recommend` chooses them for the machine."""
    d_by_shape: str = ""
    """For d=auto: such as `2048x2048:1024,5504x2048:1664`, the larger side of a weight first."""
    r: int = 4
    """Nonzeros per projector row."""
    projector: Literal["block", "one_hot", "paper", "identity"] = "block"
    """Form of the projectors (`engines.projector`): `block` is block-diagonal, orthonormal, in closed form;
    `one_hot` a random count sketch with r = 1; `paper` has random places and learned values. `identity` needs
    d = m = n and is for checks against AdamW."""
    alpha: float = 0.3
    """Relative bias above which a matrix gets a new subspace."""
    check_every: int = 1000
    """Steps between bias checks; the first is before the first update."""
    learn_steps: int = 100
    """Most Adam steps spent on learning one pair of projectors; for `paper`."""
    learn_rate: float = 0.1
    """Adam's learning rate for projector values."""
    learn_beta: float = 1e-3
    """Weight of the regulariser ||P||_F + ||Q||_F."""
    learn_timeout_s: float = 60.0
    """Most time spent on finding projectors in one round of checks, all matrices together."""
    max_grad_norm: float = 0.0
    """Clip the gradient to this norm; 0: not at all. It is that of all compressed gradients and those outside
    the subspaces together. The CPU's updates then begin when backward has ended."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How updates reach bf16 weights; `nearest` loses those below half a unit in the last place."""
    graphs: bool = True
    """Run blocks as CUDA graphs where they can be: with checkpointing, without dropout."""
    offload: bool = True
    """False: the twin, the same updates on the CPU in the main thread, nothing overlapped."""
    train_outer: bool = True
    """Train embeddings, head, norms and biases with AdamW on the GPU, as native does."""
    schedule_order: Literal["layerwise", "sequential"] = "layerwise"
    """`sequential`: all downloads, then all CPU updates, then all uploads, as ZeRO-Offload does."""

    def __post_init__(self) -> None:
        AdamWSettings.__post_init__(self)
        _require(self.d == "auto" or self.d > 0, "d", "must be positive, or auto")
        form = r"(?:(?:[1-9]\d*x[1-9]\d*:[1-9]\d*)(?:,(?!$)|$))*"
        _require(re.fullmatch(form, self.d_by_shape) is not None, "d_by_shape", "is of ROWSxCOLUMNS:D,...")
        _require(self.r > 0, "r", "must be positive")
        _require(self.alpha > 0, "alpha", "must be positive")
        _require(self.check_every > 0, "check_every", "must be positive")
        _require(self.learn_steps >= 0, "learn_steps", "must not be negative")
        _require(self.learn_rate > 0, "learn_rate", "must be positive")
        _require(self.learn_beta >= 0, "learn_beta", "must not be negative")
        _require(self.learn_timeout_s >= 0, "learn_timeout_s", "must not be negative")
        _require(self.max_grad_norm >= 0, "max_grad_norm", "must not be negative")

    def size_for(self, rows: int, columns: int) -> int:
        """The d that is wanted for weights of this shape, also given the other way round.

        Raises `UserError` for `auto` without one for it.
        """
        if self.d != "auto":
            return self.d
        sides = max(rows, columns), min(rows, columns)
        found = sizes_by_shape(self.d_by_shape).get(sides)
        if found is None:
            raise UserError(
                "--set lsp.d=auto",
                f"nothing says which d suits weights of {sides[0]} x {sides[1]} on this machine",
                "add --profile, use 'compare', which plans for this machine, or give a number",
            )
        return found


@cache
def sizes_by_shape(text: str) -> dict[tuple[int, int], int]:
    """`LspSettings.d_by_shape` by the weight's sides, the larger first."""
    found = {}
    for part in text.split(",") if text else ():
        sides, _, d = part.partition(":")
        one, other = (int(side) for side in sides.split("x"))
        found[max(one, other), min(one, other)] = int(d)
    return found


_LONG_CHECKS: dict[str, str | int | float] = {
    "projector": "paper",
    "check_every": 1000,
    "learn_steps": 100,
    "learn_rate": 0.1,
}
_DEEPSEEK: dict[str, str | int | float] = {
    "projector": "paper",
    "alpha": 0.2,
    "check_every": 100,
    "learn_steps": 100,
    "learning_rate": 1e-4,
}

LSP_PRESETS: dict[str, dict[str, str | int | float]] = {
    "roberta-base": {**_LONG_CHECKS, "d": 512, "r": 16, "alpha": 0.3, "learning_rate": 5e-5},
    "gpt2-large": {**_LONG_CHECKS, "d": 512, "r": 16, "alpha": 0.8, "learning_rate": 1e-4},
    "open-llama-3b": {**_LONG_CHECKS, "d": 512, "r": 16, "alpha": 0.8, "learning_rate": 1e-4},
    "deepseek-coder-1.3b": {
        **_DEEPSEEK, "d": 1280, "r": 4, "learn_rate": 0.06, "schedule": "cosine", "warmup_steps": 100,
    },
    "deepseek-coder-6.7b": {**_DEEPSEEK, "d": 2048, "r": 8, "learn_rate": 0.05},
}  # fmt: skip
"""What LSP-Offload's authors ran each model with, from the scripts, README and class defaults of
gulang2019/LSP-Offload; for `--set lsp.preset=NAME`. Where several values were tried (r for GPT2-large, d for
OpenLLaMA), the middle one. Their batches: 16 x 128 (RoBERTa on GLUE), 4 x 512 and 16 x 512 (Alpaca), 128 and
64 sequences of 1024 by accumulation (DeepSeek-Coder)."""


MOST_QUERIES = 32
MOST_RANK = 64
MOST_PENDING = 64
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
    estimator: Literal["spsa", "fzoo", "lozo"] = "spsa"
    """How a step finds its direction (`engines.estimators`): `spsa` takes the slope along z from both sides,
    as MeZO does (Spall, 1992); `fzoo` (2506.09034) from one side, and divides by the standard deviation of
    the losses: its learning rates are in units of their own. `lozo` (2410.07698) is `spsa` with low-rank
    noise on the matrices of the blocks, which are only read until its window ends (`engines.lozo`)."""
    lozo_rank: int = 4
    lozo_window: int = 50
    """Steps for which one factor of the noise is kept. Then what they add up to is added to the weights."""
    queries: int = 1
    """Independent z in each step, all in one visit of each block; the update is their mean. `spsa` takes two
    forward passes for each, `fzoo` one, and one more."""
    layer_share: float = 1.0
    """Share of the trained blocks that a step trains, drawn anew in each (LeZO, 2410.09823). The others are
    neither perturbed nor updated nor downloaded."""
    noise: Literal["gaussian", "rademacher"] = "gaussian"
    """Of what the perturbation z is drawn: normals as in MeZO, or signs as in SPSA (Spall, 1992)."""
    eps: float = 1e-3
    """Size of the perturbation."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How updates reach bf16 and fp16 weights; `nearest` loses those below half a unit in the last place."""
    train: str = "all"
    """What is trained: `all`, `last:N` (the last N blocks), or `lora` (adapters beside every linear layer of
    the blocks, merged into the weights on export). What is not trained is neither perturbed nor
    downloaded."""
    lora_rank: int = 8
    lora_alpha: float = 16.0
    """An adapter's product is scaled by `lora_alpha` / `lora_rank`."""
    base: Base = "full"
    """How the matrices of the blocks are kept: as they are, or, approximately, as 8-bit or 4-bit values with
    a scale per 128 (`fp8` is e4m3). Vectors stay as they are. Passes compute in the full precision."""
    fold_every: int = 1
    """With a low-bit base, steps between two roundings of a block to its grid; until then its updates are in
    the log and replayed exactly at every visit. Rare roundings lose less. Blocks take turns."""

    def __post_init__(self) -> None:
        _require_finite(self)
        _require(self.learning_rate >= 0, "learning_rate", "must not be negative")
        _require(self.warmup_steps >= 0, "warmup_steps", "must not be negative")
        _require(self.weight_decay >= 0, "weight_decay", "must not be negative")
        _require(self.eps > 0, "eps", "must be positive")
        _require(1 <= self.queries <= MOST_QUERIES, "queries", f"must be between 1 and {MOST_QUERIES}")
        _require(0 < self.layer_share <= 1, "layer_share", "must be in (0, 1]")
        _require(
            self.layer_share == 1 or self.train != "lora",
            "layer_share",
            "must be 1 with train=lora: a step trains all adapters",
            "leave layer_share out, or take train=all",
        )
        if self.estimator == "fzoo":
            _require(
                self.queries >= 2,
                "queries",
                "must be 2 or more with estimator=fzoo, which divides by the deviation of their losses",
                "set queries=8, say",
            )
            _require(
                self.noise == "rademacher",
                "noise",
                "must be rademacher with estimator=fzoo, as it was published",
                "set noise=rademacher",
            )
        if self.estimator == "lozo":
            self._check_lozo()
        _require(self.lora_rank > 0, "lora_rank", "must be positive")
        _require(
            self.train in ("all", "lora") or re.fullmatch(r"last:[1-9][0-9]*", self.train) is not None,
            "train",
            "is one of all, lora, last:N",
        )
        _require(1 <= self.fold_every <= 64, "fold_every", "must be between 1 and 64")
        _require(
            self.fold_every == 1 or self.base != "full" or isinstance(self, Zo2Settings),
            "fold_every",
            "is of use to mezo with a low-bit base only: nothing goes down",
            "leave fold_every out, or set base=int8",
        )
        _require(
            self.fold_every == 1 or self.estimator != "lozo",
            "fold_every",
            "must be 1 with estimator=lozo: lozo_window says when matrices are written",
            "leave fold_every out",
        )
        _require(
            self.fold_every * self.queries <= MOST_PENDING,
            "fold_every",
            f"times queries must be {MOST_PENDING} at most: the log of pending updates holds no more",
            f"with queries={self.queries} set fold_every={MOST_PENDING // self.queries} or less",
        )

    def _check_lozo(self) -> None:
        _require(
            self.noise == "gaussian",
            "noise",
            "must be gaussian with estimator=lozo: its noise is a product of normals",
            "leave noise out, or take estimator=spsa",
        )
        _require(
            self.layer_share == 1,
            "layer_share",
            "must be 1 with estimator=lozo: a step adds to the sums of all blocks",
            "leave layer_share out, or take estimator=spsa",
        )
        _require(
            self.train != "lora",
            "train",
            "must be all or last:N with estimator=lozo: adapters are of low rank already",
            "leave train out, or take estimator=spsa",
        )
        _require(
            self.weight_decay == 0,
            "weight_decay",
            "must be 0 with estimator=lozo: matrices are only read until its window ends",
            "leave weight_decay out, or take estimator=spsa",
        )
        _require(1 <= self.lozo_rank <= MOST_RANK, "lozo_rank", f"must be between 1 and {MOST_RANK}")
        _require(self.lozo_window >= 1, "lozo_window", "must be positive")
        _require(
            self.lozo_window * self.queries <= MOST_PENDING,
            "lozo_window",
            f"times queries must be {MOST_PENDING} at most: the log of pending updates holds no more",
            f"with queries={self.queries} set lozo_window={MOST_PENDING // self.queries} or less",
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
    disk_blocks: int | Literal["auto"] = 0
    """Blocks that are on disk, not in host memory, spread evenly among the streamed ones; `auto`: as many as
    host memory has no room for."""
    disk_folder: str = ""
    """Where, on a local disk; the files have no name and are gone when the run ends, however it does. By
    default lspzo-bench/spill below $XDG_CACHE_HOME or ~/.cache."""

    def __post_init__(self) -> None:
        MezoSettings.__post_init__(self)
        _require(self.resident_blocks >= 0, "resident_blocks", "must not be negative")
        _require(self.disk_blocks == "auto" or self.disk_blocks >= 0, "disk_blocks", "must not be negative")

    @property
    def named_disk_blocks(self) -> int:
        """`disk_blocks`, of which `auto` counts as none."""
        return 0 if self.disk_blocks == "auto" else self.disk_blocks


def _as_sequence(value: object) -> object:
    """`0.1,0.2` and `0.1` as they come from the command line and from a plan."""
    if isinstance(value, str):
        return value.split(",")
    return (value,) if isinstance(value, int | float) else value


Script = Annotated[tuple[float, ...], BeforeValidator(_as_sequence)]
"""One value per call, in order; the last repeats. As text: separated by commas."""


@dataclass(frozen=True, kw_only=True)
class ScriptedSettings:
    """The harness's own test double: scripted losses, times and bytes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    setup_s: float = 0.0
    """Time of the set-up."""
    step_s: Script = (0.01,)
    """Time of each step, told to the engine's own clock; spent only with `sleep`."""
    drain_s: float = 0.0
    """Time for which the work of a step goes on after its loss is known, until `synchronize`."""
    loss: Script = (1.0,)
    """Loss of each step; NaN ends the run in `nan_loss`."""
    eval_loss: Script = (1.0,)
    """Loss of each evaluation."""
    eval_accuracy: Script = (0.5,)
    """Accuracy of each evaluation."""
    eval_s: Script = (0.0,)
    """Time of each evaluation."""
    gpu_s: Script | None = None
    """Time that the GPU is busy in each step."""
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    pinned_bytes: int = 0
    host_allocation_bytes: int = 0
    """Host memory touched at set-up."""
    num_children: int = 0
    """Processes forked at set-up, as data loaders are; they wait, and end with the engine."""
    sleep: bool = False
    """Spend the scripted times for real."""
    fail_at_step: int | None = None
    """Step, from 0, in which `failure` happens; -1: in the set-up."""
    failure: Literal[
        "crash",
        "oom_gpu",
        "oom_host",
        "pinned_limit",
        "not_available",
        "infeasible",
        "user_error",
        "interrupt",
        "kill",
        "hang",
    ] = "crash"

    def __post_init__(self) -> None:
        _require_finite(self)
        for name in ("step_s", "loss", "eval_loss", "eval_accuracy", "eval_s", "gpu_s"):
            _require(getattr(self, name) != (), name, "must not be empty")
        for name in ("setup_s", "drain_s", "h2d_bytes", "host_allocation_bytes", "num_children"):
            _require(getattr(self, name) >= 0, name, "must not be negative")


Settings = AdamWSettings | MezoSettings | ScriptedSettings

SETTINGS: dict[str, type[Any]] = {
    "native": NativeSettings,
    "torchao-offload": TorchaoOffloadSettings,
    "lsp": LspSettings,
    "mezo": MezoSettings,
    "zo2": Zo2Settings,
    "scripted": ScriptedSettings,
}


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Made once for each engine, since making one takes milliseconds."""
    return TypeAdapter(kind)


def parse_settings(engine: str, values: Mapping[str, object]) -> Any:
    """Typed settings of `engine` from plain values (strings are converted).

    Raises `UserError` that names the key and the engine's keys.
    """
    kind: Any = SETTINGS[engine]
    try:
        return _adapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        why = first["msg"].removeprefix("Value error, ")
        known = ", ".join(field.name for field in fields(kind))
        refused = first.get("ctx", {}).get("error")
        raise UserError(
            f"--set {key}={values.get(key, '')}" if key else f"engine {engine}",
            why,
            (refused.remedy if isinstance(refused, _Refused) else "") or f"settings of {engine} are: {known}",
        ) from None


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


def approximation(settings: Mapping[str, object]) -> str | None:
    """What is approximate about a method with these settings (as a `Plan` holds them); `None`: nothing."""
    base = settings.get("base", "full")
    if base == "full":
        return None
    return f"approximate: {'4' if base == 'int4' else '8'}-bit base ({base})"


class _Refused(ValueError):
    def __init__(self, told: str, remedy: str) -> None:
        super().__init__(told)
        self.remedy = remedy


def _require(holds: bool, key: str, why: str, remedy: str = "") -> None:
    """`remedy` is what to do where it takes more than another value of the setting."""
    if not holds:
        raise _Refused(f"{key} {why}", remedy)


def _require_finite(settings: Any) -> None:
    for field in fields(settings):
        value = getattr(settings, field.name)
        _require(not isinstance(value, float) or math.isfinite(value), field.name, "must be a finite number")
