"""MeZO: fine-tuning by forward passes only (Malladi et al., arXiv 2305.17333), everything on the GPU.

One step t, on all trainable tensors at once (algorithm 1):

    z ~ N(0, I), made of (seed, t, tensor, element) each time it is needed     engines.noise
    g = (loss(theta + eps z) - loss(theta - eps z)) / (2 eps)
    theta <- theta - lr_t (g z + wd theta)

On the GPU: the weights, and one scratch copy of them that the model computes with. On the host: nothing.

Deviations from the paper and its code:
- theta + eps z and theta - eps z are written to the scratch copy, one after the other. The paper perturbs
  in place, by +eps, -2 eps and +eps, which in floating point does not lead back to theta.
- Update and perturbation are computed in fp32 and rounded once, whatever the weights' dtype.
- Weight decay acts on tensors of two and more dimensions (the code names biases and norms instead).
- With several micro-batches a loss is the mean of theirs, under one z.
- Dropout is off, as in the paper's code: the two losses must be of one function, or g would be the
  difference of two masks divided by 2 eps.

This is the oracle of `engines.zo2`, which gives the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engines import noise
from engines.base import (
    Batch,
    Blueprint,
    Context,
    Evaluation,
    NonFiniteLoss,
    StepStats,
    Update,
    UserError,
)
from engines.blocks import (
    TORCH_DTYPE,
    bind,
    evaluate_on_device,
    first_names,
    materialize,
    to_device,
    without_cache,
)
from engines.noise import NoiseKey
from engines.schedule import learning_rate_at
from engines.settings import MezoSettings
from engines.transfer import ComputeClock

CHECKPOINT_VERSION = 1
_SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SHARD_BYTES = 2**30
"""Weights are saved in files of about this size, so that saving takes no second copy of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorGroup:
    """Tensors that are perturbed and updated together. Lists run in parallel."""

    names: Sequence[str]
    ids: Sequence[int]
    """Each tensor's number in the model, which is its part of the noise key."""
    decays: Sequence[bool]
    weights: Sequence[Tensor]
    scratch: Sequence[Tensor]
    """What the model computes with."""

    def perturb(self, seed: int, step: int, scale: float) -> None:
        """scratch = weights + scale z of `step`."""
        noise.perturb_all(self.weights, self.scratch, self._keys(seed, step), scale)

    def update(self, seed: int, update: Update) -> None:
        """weights = weights - lr (g z + wd weights), in place."""
        decays = [update.weight_decay if decays else 0.0 for decays in self.decays]
        keys = self._keys(seed, update.step)
        noise.update_all(self.weights, keys, update.learning_rate, update.projected_gradient, decays)

    def show_weights(self) -> None:
        """scratch = weights, for the model to compute with them as they are."""
        for weight, scratch in zip(self.weights, self.scratch, strict=True):
            scratch.copy_(weight)

    def _keys(self, seed: int, step: int) -> list[NoiseKey]:
        return [NoiseKey(seed=seed, step=step, tensor=number) for number in self.ids]


def group_of(model: nn.Module, weights: Mapping[str, Tensor], scratch: Mapping[str, Tensor]) -> TensorGroup:
    """The group of the tensors in `weights` (by first name), numbered by their order in the model.

    A tied tensor has one number and so one perturbation.
    """
    numbered = [item for item in enumerate(model.named_parameters()) if item[1][0] in weights]
    return TensorGroup(
        names=[name for _, (name, _) in numbered],
        ids=[number for number, _ in numbered],
        decays=[parameter.dim() >= 2 for _, (_, parameter) in numbered],
        weights=[weights[name] for _, (name, _) in numbered],
        scratch=[scratch[name] for _, (name, _) in numbered],
    )


class LossPair:
    """Sums of the two losses over micro-batches, on the device until they are read.

    In fp64: g is a small difference of them, divided by a small number.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = {sign: torch.zeros((), dtype=torch.float64, device=device) for sign in (1, -1)}

    def add(self, sign: int, loss: Tensor) -> None:
        self._sums[sign] = self._sums[sign] + loss

    def read(self, count: int, step: int) -> tuple[float, float]:
        """Mean losses (plus, minus) of `count` micro-batches. Waits for the compute stream.

        Raises `NonFiniteLoss`.
        """
        plus, minus = (value / count for value in torch.stack((self._sums[1], self._sums[-1])).tolist())
        if not (math.isfinite(plus) and math.isfinite(minus)):
            raise NonFiniteLoss(f"the losses of step {step} are {plus} and {minus}")
        return plus, minus


class Mezo:
    """MeZO in memory."""

    name = "mezo"

    def __init__(self, settings: MezoSettings, context: Context) -> None:
        self.settings = settings
        self.context = context
        self.device = torch.device(context.device)
        self.pinned_bytes = 0
        self._seed = context.seed
        self._step = 0
        self._clock = ComputeClock(self.device)

    @staticmethod
    def why_not_available() -> str | None:
        """`None`: it runs on any device."""
        return None

    def setup(self, blueprint: Blueprint) -> None:
        places = first_names(blueprint.model)
        self._model = materialize(blueprint, self.device, TORCH_DTYPE[self.context.workload.dtype])
        self._model.eval()
        self._arguments = without_cache(self._model)
        weights = {name: parameter.data for name, parameter in self._model.named_parameters()}
        scratch = {name: torch.empty_like(weight) for name, weight in weights.items()}
        self._group = group_of(self._model, weights, scratch)
        bind(self._model, places, scratch)

    @torch.no_grad()
    def step(self, batches: Sequence[Batch]) -> StepStats:
        self._clock.start()
        inputs = [to_device(batch, self.device) for batch in batches]
        losses = LossPair(self.device)
        for sign in (1, -1):
            self._group.perturb(self._seed, self._step, sign * self.settings.eps)
            for each in inputs:
                losses.add(sign, self._model(**each, **self._arguments).loss)
        self._clock.stop()
        plus, minus = losses.read(len(inputs), self._step)
        update = next_update(self._step, self.settings, self.context, plus, minus)
        gpu_s = self._clock.take_s()
        # Runs on while the caller fetches the next batch; its time counts with the next step's.
        self._clock.start()
        self._group.update(self._seed, update)
        self._clock.stop()
        self._step += 1
        return StepStats(loss=(plus + minus) / 2, gpu_s=gpu_s, update=update)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        self._group.show_weights()
        return evaluate_on_device(self._model, batches, self.device)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in zip(self._group.names, self._group.weights, strict=True):
            yield name, weight.cpu()

    @torch.no_grad()
    def replay(self, updates: Iterable[Update]) -> None:
        """Apply updates of an earlier run, in its order, and go on after the last."""
        for update in updates:
            self._group.update(self._seed, update)
            self._step = update.step + 1

    def save(self, folder: Path) -> None:
        save_checkpoint(folder, self.weights(), step=self._step, seed=self._seed)

    def load(self, folder: Path) -> None:
        weights = dict(zip(self._group.names, self._group.weights, strict=True))
        checkpoint = open_checkpoint(folder, weights)
        for name, weight in weights.items():
            weight.copy_(checkpoint.tensor(name))
        self._step, self._seed = checkpoint.step, checkpoint.seed

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        self.synchronize()


def next_update(step: int, settings: MezoSettings, context: Context, plus: float, minus: float) -> Update:
    """The update that the losses of `step` call for."""
    return Update(
        step=step,
        learning_rate=learning_rate_at(step, settings, context.total_steps),
        projected_gradient=(plus - minus) / (2 * settings.eps),
        weight_decay=settings.weight_decay,
    )


def save_checkpoint(folder: Path, weights: Iterable[tuple[str, Tensor]], *, step: int, seed: int) -> None:
    """Weights in safetensors files, and what else determines the next step: its number and the seed.

    Every update so far is in the weights, so none is pending; `mezo` and `zo2` read each other's.
    """
    shard: dict[str, Tensor] = {}
    count = shard_bytes = 0
    for name, weight in weights:
        shard[name] = weight.clone()
        shard_bytes += weight.nbytes
        if shard_bytes >= SHARD_BYTES:
            safetensors.torch.save_file(shard, folder / f"weights-{count:05}.safetensors")
            shard, shard_bytes, count = {}, 0, count + 1
    if shard:
        safetensors.torch.save_file(shard, folder / f"weights-{count:05}.safetensors")
    state = {"schema_version": CHECKPOINT_VERSION, "method": "mezo", "step": step, "seed": seed}
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What `save_checkpoint` wrote; tensors are read when they are asked for."""

    step: int
    seed: int
    _shards: Mapping[str, Any]

    def tensor(self, name: str) -> Tensor:
        result: Tensor = self._shards[name].get_tensor(name)
        return result


def open_checkpoint(folder: Path, expected: Mapping[str, Tensor]) -> Checkpoint:
    """Raises `UserError` unless the folder holds tensors of the names, shapes and dtypes of `expected`."""
    remedy = "give a folder that mezo or zo2 saved for the same model and precision"
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["schema_version"] != CHECKPOINT_VERSION:
            raise ValueError(f"schema version {state['schema_version']}, not {CHECKPOINT_VERSION}")
        step, seed = int(state["step"]), int(state["seed"])
        files: list[Any] = [
            safe_open(path, framework="pt") for path in sorted(folder.glob("weights-*.safetensors"))
        ]
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(str(folder), f"is not a checkpoint of mezo or zo2 ({reason})", remedy) from None
    shards = {name: file for file in files for name in file.keys()}  # noqa: SIM118  not a dict
    if shards.keys() != expected.keys():
        odd = min(shards.keys() ^ expected.keys())
        raise UserError(str(folder), f"differs from the model in tensor '{odd}'", remedy)
    for name, like in expected.items():
        saved = shards[name].get_slice(name)
        here = _SAFETENSORS_DTYPE[like.dtype]
        if tuple(saved.get_shape()) != tuple(like.shape) or saved.get_dtype() != here:
            raise UserError(
                str(folder),
                f"'{name}' is {saved.get_shape()} {saved.get_dtype()}, not {list(like.shape)} {here}",
                remedy,
            )
    return Checkpoint(step=step, seed=seed, _shards=shards)
