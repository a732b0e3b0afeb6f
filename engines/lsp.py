"""LSP-Offload: gradients compressed by learned sparse projectors, Adam on the CPU in the subspace.

Paper: LSP-Offload, arXiv 2406.10181, Algorithm 1. One step, for every weight matrix W (m x n) inside the
model's blocks, with its pair of (d, r)-sparse projectors P and Q (`engines.projector`):

    1. GPU   S = P^T G Q as soon as backward has completed G; G is freed          (line 12)
    2. link  S to the host, on its own stream                                     (line 13)
    3. CPU   dS = Adam(S), with moments M and V, in a worker thread               (line 14)
    4. link  dS to the GPU, on its own stream                                     (line 15)
    5. GPU   W <- W (1 - lr wd) - lr P dS Q^T                                     (lines 16 and 17)

Every `check_every` steps, the first before the first update, each matrix's relative bias is tested on its
gradient of that step; above alpha the matrix gets a fresh pair, learned on that gradient, and its moments
move to the new subspace (lines 18 to 21 and 6 to 9).

Where things live. GPU: weights, projectors, one d x d fp32 core per matrix, the gradients that backward is
at, and weights, gradients and moments of all that is not a matrix of a block. Host: per matrix the d x d
core (pinned) and both moments, all fp32: 12 d^2 bytes.

Never stale: an update of step t is applied before its block's next forward pass, and `evaluate`, `weights`
and `save` apply what is left. A step with a loss or core that is not finite raises before any weight has
changed by it; its moments on the CPU are spoilt, so the run cannot go on from there.

Schedules. `layerwise`: a matrix goes through 2 to 4 on its own while backward runs on, and of the cores
that have arrived the CPU takes the one whose block is needed first (`engines.core_worker`). `sequential`:
downloads during backward, then all CPU updates, then all uploads, as ZeRO-Offload does.

The oracle is the twin, `offload=False`: the same cores through the same CPU routine, but in the main thread,
one after the other, with copies that wait: no streams, no events, no worker, no pinned memory. Nothing
overlaps, so a hazard in the order of streams and threads shows as a difference. Weights and losses are
bit-equal on the same device and number of CPU threads (as long as the model's own kernels are deterministic,
and no learning ends by the clock). On a GPU too the twin updates the core on the CPU, because kernels of CPU
and GPU round differently; so it is no check of Adam's arithmetic, which a test holds against float64.

Deviations from the paper, and choices where it is silent:

- The calibration gradient is the current step's, of its first micro-batch, not an extra pass over a sample.
- A check whose round of learning runs out of time keeps the old pair, unless the new one is better already.
- What is not a matrix of a block (embeddings, head, norms, biases) is trained by AdamW on the device as in
  native, or frozen with `train_outer=False`. So is a block's matrix that has a second place in the model.
- Micro-batches accumulate in the subspace: the core of the sum is the sum of the cores.
- Decay, bias correction and learning-rate schedules are AdamW's. Both wires carry fp32 for every dtype.
- The update is computed in fp32 and rounded once into the weight's dtype. bf16 weights have no fp32 master
  copy; factors of P dS Q^T are rounded to bf16 there, the sums are fp32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from engines.base import Batch, Blueprint, Context, Evaluation, NonFiniteLoss, StepStats, UserError
from engines.blocks import evaluate_on_device, find_blocks, materialize
from engines.core_worker import CoreState, CoreUpdate, CoreWorker, update_cores
from engines.optim import (
    accumulate_gradients,
    adamw_state,
    load_adamw_state,
    load_checkpoint,
    load_rng_state,
    make_adamw,
    model_weights,
    parameter_names,
    prepare_training,
    rng_state,
    save_checkpoint,
    set_learning_rate,
    weights_dtype,
)
from engines.projector import (
    Projector,
    StopReason,
    compress,
    decompress,
    identity_projector,
    learn,
    random_projector,
    relative_bias,
    transport_moments,
)
from engines.schedule import learning_rate_at
from engines.settings import LspSettings
from engines.transfer import HostSlab, Link, now_s


class Treatment(NamedTuple):
    """How one parameter is trained."""

    name: str
    how: Literal["subspace", "adamw", "frozen"]
    d: int | None
    """Size of its subspace and nonzeros per projector row; `None` outside a subspace."""
    r: int | None


@dataclass(frozen=True, kw_only=True)
class Check:
    """One bias check of one matrix."""

    step: int
    bias: float
    """Relative bias of the pair in use, on this step's gradient."""
    learned_bias: float | None = None
    """That of the new pair; `None` if the pair was kept."""
    learn_steps: int = 0
    stop: StopReason | None = None
    """Why learning ended; `None` if the pair passed. `timeout` without a learned bias: too little time."""


@dataclass(kw_only=True, eq=False)
class _Matrix:
    """A weight matrix in its subspace. Rows and columns are the stored ones (Conv1D stores W^T)."""

    name: str
    block: int
    parameter: nn.Parameter
    left: Projector
    right: Projector
    core: Tensor
    """d x d fp32 on the device: the step's compressed gradient, then its update."""
    state: CoreState
    """Adam's moments, and the core's place on the host."""
    generation: int = 0
    """How many pairs have been drawn since its first; seeds the next."""
    has_gradient: bool = False
    """The core holds gradient of the current step."""
    pending: CoreUpdate | None = None
    checks: list[Check] = field(default_factory=list)


class Lsp:
    """LSP-Offload. Implements `engines.base.Engine`."""

    name = "lsp"

    def __init__(self, settings: LspSettings, context: Context) -> None:
        self.settings = settings
        self.context = context
        self.device = torch.device(context.device)
        self.link = Link(self.device, rates=context.link_rates)
        self.steps_done = 0
        self._clock = now_s
        self._learning_left_s = 0.0
        self._is_last_micro_batch = False
        self._learning_rate = 0.0
        self._step_h2d_bytes = 0
        self._step_d2h_bytes = 0
        self._matrices: list[_Matrix] = []
        self._handles: list[RemovableHandle] = []
        self._slab: HostSlab | None = None
        self._worker: CoreWorker | None = None

    @staticmethod
    def why_not_available() -> str | None:
        """`None`: it runs on any device."""
        return None

    # --- set-up ---------------------------------------------------------------------------------------

    def setup(self, blueprint: Blueprint) -> None:
        """Fill the model, draw projectors, pin the cores' memory, start the CPU worker.

        Raises `UserError` for fp16, for a model without matrices in blocks, and for identity projectors
        on a matrix that is not d x d.
        """
        dtype = weights_dtype(self.context, self.name)
        self.model: nn.Module = materialize(blueprint, self.device, dtype)
        self._names = parameter_names(self.model)
        self._make_matrices()
        self._make_outer_optimizer()
        self._finite = torch.ones((), dtype=torch.bool, device=self.device)
        if self.settings.offload:
            self._worker = CoreWorker(self.link, self.settings)
        self._hook()
        prepare_training(self.model, self.context)

    def _make_matrices(self) -> None:
        chosen = block_matrices(self.model)
        if not chosen:
            raise UserError(type(self.model).__name__, "has no matrices in its blocks", "use another model")
        sizes = [min(self.settings.d, *parameter.shape) for _, _, parameter in chosen]
        if self.settings.offload:
            self._slab = HostSlab(4 * sum(d * d for d in sizes), self.device, self.context.progress)
        offset_bytes = 0
        for done, ((block, name, parameter), d) in enumerate(zip(chosen, sizes, strict=True)):
            left, right = self._draw(name, parameter, d, generation=0)
            wire = None if self._slab is None else self._slab.view(offset_bytes, (d, d), torch.float32)
            state = CoreState(moment=torch.zeros(d, d), variance=torch.zeros(d, d), wire=wire)
            core = torch.zeros(d, d, device=self.device)
            self._matrices.append(
                _Matrix(
                    name=name,
                    block=block,
                    parameter=parameter,
                    left=left,
                    right=right,
                    core=core,
                    state=state,
                )
            )
            offset_bytes += 4 * d * d
            self.context.progress("drawing projectors", done + 1, len(chosen))

    def _draw(
        self, name: str, parameter: nn.Parameter, d: int, generation: int
    ) -> tuple[Projector, Projector]:
        """A fresh pair on the device, the same for the same seed, matrix and generation."""
        rows, columns = parameter.shape
        if self.settings.projector == "identity":
            if not rows == columns == d:
                raise UserError(
                    "--set projector=identity",
                    f"'{name}' is {rows} x {columns} with d = {d}, and identity needs d = m = n",
                    "use projector=learned, or a model of square matrices with d at least their size",
                )
            pair = identity_projector(rows), identity_projector(columns)
        else:
            r = min(self.settings.r, d)
            left_seed, right_seed = (
                derived_seed(self.context.seed, name, side, generation) for side in ("left", "right")
            )
            pair = random_projector(rows, d, r, left_seed), random_projector(columns, d, r, right_seed)
        return pair[0].to(self.device), pair[1].to(self.device)

    def _make_outer_optimizer(self) -> None:
        own = {matrix.parameter for matrix in self._matrices}
        outer = [parameter for parameter in self.model.parameters() if parameter not in own]
        self._outer: torch.optim.AdamW | None = None
        if not self.settings.train_outer:
            for parameter in outer:
                parameter.requires_grad_(False)
        elif outer:
            self._outer = make_adamw(outer, self.settings)

    def _hook(self) -> None:
        _, blocks = find_blocks(self.model)
        by_block: dict[int, list[_Matrix]] = {}
        for matrix in self._matrices:
            by_block.setdefault(matrix.block, []).append(matrix)
            hook = partial(self._on_gradient, matrix)
            parameter: Any = matrix.parameter  # the method is without annotations
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
        for block, members in by_block.items():
            settle = partial(self._before_forward, members)
            self._handles.append(blocks[block].register_forward_pre_hook(settle))

    def treatment(self) -> list[Treatment]:
        """How each parameter is trained, in the model's order, each once."""
        own = {matrix.name: matrix for matrix in self._matrices}
        other: Literal["adamw", "frozen"] = "adamw" if self.settings.train_outer else "frozen"
        return [
            Treatment(name, "subspace", own[name].left.d, own[name].left.r)
            if name in own
            else Treatment(name, other, None, None)
            for name in self._names.values()
        ]

    def checks(self) -> dict[str, list[Check]]:
        """Every bias check so far, by matrix."""
        return {matrix.name: list(matrix.checks) for matrix in self._matrices}

    @property
    def pinned_bytes(self) -> int:
        """Host memory pinned for the cores; 0 on a CPU device and for the twin."""
        return self._slab.num_bytes if self._slab is not None and self._slab.pinned else 0

    # --- one step -------------------------------------------------------------------------------------

    def step(self, batches: Sequence[Batch]) -> StepStats:
        """One step. Updates of the matrices may still be on their way when it returns.

        Raises `NonFiniteLoss` before any weight has changed by this step, and `RuntimeError` with its
        cause if the CPU worker failed. Bytes are those of this step's cores, both ways, and of moments moved
        to a new subspace; busy times are of what ended since the last step.
        """
        self._learning_rate = learning_rate_at(self.steps_done, self.settings, self.context.total_steps)
        self._step_h2d_bytes = self._step_d2h_bytes = 0
        self._learning_left_s = self.settings.learn_timeout_s
        self._finite.fill_(True)
        total = torch.zeros((), device=self.device)
        for index, loss in accumulate_gradients(self.model, batches, self.device):
            self._is_last_micro_batch = index == len(batches) - 1
            total += loss
        self._submit_rest()
        value, is_finite = torch.stack((total, self._finite.float())).tolist()  # the step's wait for the GPU
        if not (math.isfinite(value) and is_finite):
            self._discard()
            raise NonFiniteLoss(f"step {self.steps_done}: the loss is {value}, or a gradient is not finite")
        if self._outer is not None:
            set_learning_rate(self._outer.param_groups, self._learning_rate)
            self._outer.step()
            self._outer.zero_grad(set_to_none=True)
        self.steps_done += 1
        h2d_s, d2h_s = self.link.take_busy_s()
        return StepStats(
            loss=value,
            h2d_bytes=self._step_h2d_bytes,
            d2h_bytes=self._step_d2h_bytes,
            h2d_s=h2d_s,
            d2h_s=d2h_s,
            cpu_s=None if self._worker is None else self._worker.take_busy_s(),
        )

    @torch.no_grad()
    def _on_gradient(self, matrix: _Matrix, parameter: Tensor) -> None:
        """Backward has this matrix's gradient of one micro-batch: compress it and let it go."""
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        if not matrix.has_gradient:
            if self.steps_done % self.settings.check_every == 0:
                self._check(matrix, gradient)
            matrix.core.copy_(compress(gradient, matrix.left, matrix.right))
            matrix.has_gradient = True
        else:
            matrix.core.add_(compress(gradient, matrix.left, matrix.right))
        if self._is_last_micro_batch:
            self._update_core(matrix)

    def _update_core(self, matrix: _Matrix) -> None:
        """The core is complete: download it and hand it to the worker, or do all of it here (the twin)."""
        matrix.has_gradient = False
        # Before the download is enqueued: the upload that follows it overwrites the core.
        self._finite.logical_and_(matrix.core.isfinite().all())
        state = matrix.state
        state.updates += 1
        matrix.pending = CoreUpdate(
            core=matrix.core, state=state, deadline=matrix.block, learning_rate=self._learning_rate
        )
        self._step_d2h_bytes += matrix.core.nbytes
        self._step_h2d_bytes += matrix.core.nbytes
        if self._worker is None:
            on_host = matrix.core.cpu()  # on a CPU device the core itself
            update_cores([on_host], [state], self.settings)
            matrix.core.copy_(on_host)
            return
        assert state.wire is not None
        matrix.pending.downloaded = self.link.download(matrix.core, state.wire, after=self.link.record())
        if self.settings.schedule_order == "layerwise":
            self._worker.submit([matrix.pending])

    def _submit_rest(self) -> None:
        """After backward: matrices without gradient in the last micro-batch; and all, if sequential."""
        for matrix in self._matrices:
            if matrix.has_gradient:
                self._update_core(matrix)
        if self._worker is not None and self.settings.schedule_order == "sequential":
            # Only this step's: a block that was skipped still holds an older one, which is done.
            updates = [m.pending for m in self._matrices if m.pending is not None and not m.pending.submitted]
            self._worker.submit(updates)

    def _before_forward(self, matrices: Sequence[_Matrix], block: nn.Module, arguments: object) -> None:
        """A block is about to use its weights: apply what the last step left for it."""
        self._settle(matrices)

    @torch.no_grad()
    def _settle(self, matrices: Iterable[_Matrix]) -> None:
        """Apply pending updates: W <- W (1 - lr wd) - lr P dS Q^T in fp32, rounded once."""
        for matrix in matrices:
            update, weight = matrix.pending, matrix.parameter
            if update is None:
                continue
            if self._worker is not None:
                self.link.wait(self._worker.wait(update))
            matrix.pending = None
            delta = decompress(matrix.core, matrix.left, matrix.right, weight.dtype)
            decay = 1.0 - update.learning_rate * self.settings.weight_decay
            weight.copy_(weight.float().mul(decay).sub_(delta.mul_(update.learning_rate)))

    def _discard(self) -> None:
        """Wait for pending updates and apply none of them."""
        for matrix in self._matrices:
            if matrix.pending is not None and self._worker is not None:
                self.link.wait(self._worker.wait(matrix.pending))
            matrix.pending = None

    # --- subspaces ------------------------------------------------------------------------------------

    def _check(self, matrix: _Matrix, gradient: Tensor) -> None:
        """Test the relative bias on this gradient; above alpha, learn a fresh pair and move the moments."""
        found = relative_bias(gradient, matrix.left, matrix.right)
        if not found > self.settings.alpha:  # also where the gradient is not finite; the step will say so
            matrix.checks.append(Check(step=self.steps_done, bias=found))
            return
        if self._learning_left_s <= 0:
            matrix.checks.append(Check(step=self.steps_done, bias=found, stop="timeout"))
            return
        matrix.generation += 1
        left, right = self._draw(matrix.name, matrix.parameter, matrix.left.d, matrix.generation)
        begin_s = self._clock()
        learned = learn(
            gradient,
            left,
            right,
            alpha=self.settings.alpha,
            beta=self.settings.learn_beta,
            steps=self.settings.learn_steps,
            rate=self.settings.learn_rate,
            time_limit_s=self._learning_left_s,
            clock=self._clock,
        )
        self._learning_left_s -= self._clock() - begin_s
        if learned.stop == "timeout" and learned.bias_after >= found:
            matrix.checks.append(
                Check(step=self.steps_done, bias=found, learn_steps=learned.steps, stop="timeout")
            )
            return
        if matrix.state.updates > 0:
            self._transport(matrix, learned.left, learned.right)
        matrix.left, matrix.right = learned.left, learned.right
        matrix.checks.append(
            Check(
                step=self.steps_done,
                bias=found,
                learned_bias=learned.bias_after,
                learn_steps=learned.steps,
                stop=learned.stop,
            )
        )

    def _transport(self, matrix: _Matrix, left: Projector, right: Projector) -> None:
        """Move Adam's moments to the new subspace, on the device.

        HAZARD: goes through the core's buffers on both sides. They are free: the step's first gradient has
        not been compressed yet, and the bias, which the host has just read, was computed after the compute
        stream had waited for the last update's upload.
        """
        state, core = matrix.state, matrix.core
        moments = (state.moment, state.variance)
        on_device = []
        for tensor in moments:
            self._step_h2d_bytes += core.nbytes
            if state.wire is None:
                on_device.append(tensor.to(self.device))
                continue
            state.wire.copy_(tensor)
            self.link.host_wait(self.link.upload(state.wire, core, after=self.link.record()))
            on_device.append(core.clone())
        moved = transport_moments(on_device[0], on_device[1], matrix.left, left, matrix.right, right)
        for tensor, result in zip(moments, moved, strict=True):
            self._step_d2h_bytes += core.nbytes
            if state.wire is None:
                tensor.copy_(result)
                continue
            core.copy_(result)
            self.link.host_wait(self.link.download(core, state.wire, after=self.link.record()))
            tensor.copy_(state.wire)

    # --- the rest of an engine's life -----------------------------------------------------------------

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """Loss and accuracy in evaluation mode, every update applied."""
        self._settle(self._matrices)
        return evaluate_on_device(self.model, batches, self.device)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter once, on the host, every update applied."""
        self._settle(self._matrices)
        return model_weights(self.model)

    def save(self, folder: Path) -> None:
        """Weights, both kinds of moments, projectors, checks, step and random state."""
        self._settle(self._matrices)
        state = rng_state(self.device)
        if self._outer is not None:
            state |= adamw_state(self._outer, self._names)
        about: dict[str, Any] = {"engine": self.name, "steps_done": self.steps_done, "matrices": {}}
        for matrix in self._matrices:
            for key, tensor in _matrix_tensors(matrix).items():
                state[f"{key}.{matrix.name}"] = tensor
            about["matrices"][matrix.name] = {
                "updates": matrix.state.updates,
                "generation": matrix.generation,
                "checks": [asdict(check) for check in matrix.checks],
            }
        save_checkpoint(folder, self.model, state, about)

    def load(self, folder: Path) -> None:
        """Continue from `save`. Raises `UserError` for a checkpoint of another model, d or r."""
        tensors, about = load_checkpoint(folder, self.model, self.name)
        for matrix in self._matrices:
            own = _matrix_tensors(matrix)
            for key, tensor in own.items():
                found = tensors.get(f"{key}.{matrix.name}")
                if found is None or found.shape != tensor.shape:
                    raise UserError(
                        str(folder),
                        f"has no {key} of shape {tuple(tensor.shape)} for '{matrix.name}'",
                        "resume with the same d, r and projector",
                    )
                tensor.copy_(found)
            entry = about["matrices"][matrix.name]
            matrix.state.updates = int(entry["updates"])
            matrix.generation = int(entry["generation"])
            matrix.checks = [Check(**check) for check in entry["checks"]]
        if self._outer is not None:
            load_adamw_state(self._outer, self._names, tensors)
        load_rng_state(self.device, tensors)
        self.steps_done = int(about["steps_done"])

    def synchronize(self) -> None:
        """Wait until no core is in flight and the device is idle."""
        for matrix in self._matrices:
            if matrix.pending is not None and self._worker is not None:
                self.link.wait(self._worker.wait(matrix.pending))
        self.link.synchronize()

    def close(self) -> None:
        """Stop the worker, take the hooks off, unpin."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        self.link.synchronize()
        self._matrices.clear()
        if self._slab is not None:
            self._slab.close()
            self._slab = None


def block_matrices(model: nn.Module) -> list[tuple[int, str, nn.Parameter]]:
    """(block, parameter name, weight) of every `nn.Linear` and GPT-2 `Conv1D` inside the model's blocks.

    A tensor with a second place in the model is left out: its gradient is not its block's alone.
    """
    path, blocks = find_blocks(model)
    places: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)] = places.get(id(parameter), 0) + 1
    found: list[tuple[int, str, nn.Parameter]] = []
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D) and places[id(module.weight)] == 1:
                weight: Any = module.weight
                found.append((index, f"{path}.{index}.{name}.weight", weight))
    return found


def derived_seed(seed: int, *parts: object) -> int:
    """A seed of 63 bits that depends on all of its arguments."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _matrix_tensors(matrix: _Matrix) -> dict[str, Tensor]:
    return {
        "moment": matrix.state.moment,
        "variance": matrix.state.variance,
        "left.indices": matrix.left.indices,
        "left.values": matrix.left.values,
        "right.indices": matrix.right.indices,
        "right.values": matrix.right.values,
    }
