"""Before anything is filled: does the model do what is taken for granted of it?

A model is run by its own forward pass, and as an engine is going to run it, on a few sequences of the job's
own data, with the job's precision on the job's device. Neither pass may differ by a bit. The weights are
stand-ins: every tensor is a stretch of one random memory of the size of the largest of them, so all of a 175B
model's blocks are run in the memory of its embedding, in a second, before a single weight is read. What is
checked does not depend on the values of weights: which modules are called, in which order, with what.

Gradients are compared in fp32, where what is wrong is told from what is rounded.

Where the model's own forward does not repeat itself by the bit (kernels that add up in any order), the two
may differ by `TOLERANCE`, and a gradient by `NOISE` times what it differs from itself.

Four checks:
- `check_driven`, for engines that run embedding, blocks and head by themselves;
- `check_watched`, for engines that run the model's own forward with its blocks watched: the same loss, and
  the same gradients of all vectors (norms and biases; those of matrices would take the model's memory);
- `check_block_major`, for engines that run all micro-batches through a block at a time: likewise;
- `check_repeats`, for all that train by gradients: two forward passes in training mode are equal, so that
  nothing is dropped or shaken at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Blueprint, Context
from engines.errors import UserError
from engines.model.activation_checkpointing import TrainedBlocks
from engines.model.block_major import BlockMajor
from engines.model.blocks import (
    BlockDriver,
    find_blocks,
    no_cache,
    without_cache,
)
from engines.model.randomness import turn_off_randomness
from engines.model.stand_ins import on_stand_ins, tried_batch
from engines.shapes import (
    NOT_IN_ORDER,
    NOT_ONE_BY_ONE,
    NOT_WATCHED,
    OTHER_GRADIENTS,
    OWN_CHANGES,
    ROUTER_LOSS,
    shared_layers,
)

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Of a difference's norm, relative to the norm: of gradients, and where a forward differs from itself."""

NOISE = 4.0
"""By how much more than from itself a gradient may differ that does not repeat itself."""

ANY_MODEL = "use native, which trains any model"

FAILURES = (
    TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError, NotImplementedError,
    RuntimeError,
)  # fmt: skip
"""What a model raises that is run in another way than it expects."""

Gradients = Mapping[str, Tensor | None]
"""By parameter, in fp32, and the loss, () fp32; `None`: nothing reached it."""


def check_driven(blueprint: Blueprint, context: Context) -> None:
    """Embedding, blocks and head, run one after the other, compute what the model's own forward does.

    Raises `UserError` if not.
    """
    model = blueprint.model
    find_blocks(model)  # or it is refused, without being run
    with on_stand_ins(blueprint, context) as inputs, torch.no_grad():
        model.eval()
        versions = [parameter._version for parameter in model.parameters()]
        own = _outputs_with_each_block_once(model, inputs)
        if versions != [parameter._version for parameter in model.parameters()]:
            raise _refusal(model, OWN_CHANGES)
        with _refused(model, NOT_ONE_BY_ONE):
            driver = BlockDriver(model)
            recording = driver.record(inputs)
            hidden = recording.hidden
            for index, call in enumerate(recording.calls):
                hidden = driver.run(index, call, hidden)
            driven = _tensors(driver.finish(inputs, hidden))
        if not _same(own, driven, lambda: _run(model, inputs)):
            raise _refusal(model, "its blocks, one after the other, do not compute what the model does")


def check_watched(blueprint: Blueprint, context: Context) -> None:
    """The model computes the same loss and the same gradients with its blocks watched and recomputed.

    Raises `UserError` if not. Calls `check_repeats` too.
    """
    model = blueprint.model
    recomputed = len(find_blocks(model)[1])

    def found(inputs: Mapping[str, Tensor], known: Mapping[str, nn.Parameter]) -> Gradients:
        with _refused(model, NOT_WATCHED), no_cache(model):
            watched = TrainedBlocks(model, _Nobody(), recomputed=recomputed, graphs=False)
            try:
                return _gradients(model, inputs, known)
            finally:
                watched.close()

    _check_gradients(blueprint, context, found)


def check_block_major(blueprint: Blueprint, context: Context) -> None:
    """Raises `UserError` for a model whose loss or gradients are others where its passes are those of
    `engines.model.block_major`, in fp32 on stand-in weights."""
    model = blueprint.model
    _, blocks = find_blocks(model)

    def found(inputs: Mapping[str, Tensor], known: Mapping[str, nn.Parameter]) -> Gradients:
        with _refused(model, NOT_ONE_BY_ONE), no_cache(model):
            of_blocks = [[p for p in block.parameters() if p.requires_grad] for block in blocks]
            losses: list[Tensor] = []
            passes = BlockMajor(model, of_blocks, _Adds(of_blocks), draws=False)
            passes.run([tried_batch(blueprint)], inputs["input_ids"].device, losses.append)
            return {"the loss": losses[0], **_taken(known)}

    _check_gradients(blueprint, context, found)


def _check_gradients(
    blueprint: Blueprint,
    context: Context,
    found: Callable[[Mapping[str, Tensor], Mapping[str, nn.Parameter]], Gradients],
) -> None:
    """Raises `UserError` where what `found` gives for inputs, and for parameters by name, is not the loss and
    gradients of the model's own passes, and for a model that does not repeat itself."""
    model = blueprint.model
    turn_off_randomness(model)
    with on_stand_ins(blueprint, context, torch.float32) as inputs:
        model.train()
        _outputs_with_each_block_once(model, inputs)
        _check_repeats(model, inputs)
        known = _known_gradients(model)
        own = _gradients(model, inputs, known)
        _compare(model, own, found(inputs, known), lambda: _gradients(model, inputs, known))


def _known_gradients(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters whose gradients are compared: all vectors."""
    vectors = {name: p for name, p in model.named_parameters() if p.dim() < 2 and p.is_floating_point()}
    if vectors:
        return vectors
    # The gradient of the first block's goes through all others.
    first = min(find_blocks(model)[1][0].parameters(), key=lambda each: each.numel())
    first.requires_grad_()
    return {"the smallest of the first block": first}


def _compare(
    model: nn.Module,
    own: Gradients,
    found: Gradients,
    again: Callable[[], Gradients],
) -> None:
    unlike = [name for name in own if not _close(own[name], found[name], TOLERANCE[torch.float32])]
    if not unlike:
        return
    # The gradient of a key's bias is nothing but rounding: where kernels add up in any order, the model's own
    # does not repeat itself either.
    repeated = again()
    usual = max(_per_element(each) for each in own.values())
    if any(not _is_rounding(own[name], found[name], repeated[name], usual) for name in unlike):
        raise _refusal(model, OTHER_GRADIENTS)


class _Adds:
    """Adds a block's gradients up where its parameters have them."""

    def __init__(self, parameters: Sequence[Sequence[nn.Parameter]]) -> None:
        self._parameters = parameters

    def before_forward(self, index: int) -> None: ...

    def after_forward(self, index: int) -> None: ...

    def before_backward(self, index: int) -> None: ...

    def gradients(self, index: int, found: Sequence[Tensor | None], *, first: bool) -> None:
        for parameter, its in zip(self._parameters[index], found, strict=True):
            if its is not None:
                parameter.grad = its if parameter.grad is None else parameter.grad + its

    def after_backward(self, index: int) -> None: ...


def check_repeats(blueprint: Blueprint, context: Context) -> None:
    """Two forward passes in training mode are equal, once dropout is off. Raises `UserError` if not."""
    turn_off_randomness(blueprint.model)
    with on_stand_ins(blueprint, context) as inputs:
        blueprint.model.train()
        _check_repeats(blueprint.model, inputs)


def _check_repeats(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    device = inputs["input_ids"].device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        first, second = _run(model, inputs), _run(model, inputs)
        if all(
            torch.equal(first[name], second[name]) or _both_nan(first[name], second[name]) for name in first
        ):
            return
        # Kernels that add up in any order differ by the last bits, a dropped element by itself.
        tolerance = TOLERANCE[first["logits"].dtype] if "logits" in first else TOLERANCE[torch.float32]
        if all(_close(first[name], second[name], tolerance / 10) for name in first):
            return
    raise UserError(
        type(model).__name__,
        "draws random numbers in training which no number in its configuration turns off",
        "use another model",
    )


class _Nobody:
    """A watcher who does nothing."""

    def before_forward(self, index: int) -> None: ...

    def before_backward(self, index: int) -> None: ...

    def finish(self, index: int) -> None: ...

    def after_backward(self, index: int) -> None: ...


def _run(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return _tensors(model(**inputs, **without_cache(model)))
    except RuntimeError as error:
        if "dtype" not in str(error).lower():
            raise
        raise UserError(
            type(model).__name__, "cannot be run in the precision that is asked for", "use --dtype fp32"
        ) from error


def _tensors(output: Any) -> dict[str, Tensor]:
    """What the model says: the loss and the logits of any head."""
    named = {name: getattr(output, name, None) for name in ("loss", "logits", "start_logits", "end_logits")}
    return {name: each for name, each in named.items() if isinstance(each, Tensor)}


def _outputs_with_each_block_once(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model's own forward gives. Raises `UserError` if it does not call each block once."""
    _, blocks = find_blocks(model)
    called: list[int] = []

    def note(index: int) -> Callable[..., None]:
        return lambda module, args: called.append(index)

    hooks = [block.register_forward_pre_hook(note(index)) for index, block in enumerate(blocks)]
    try:
        with torch.no_grad():
            found = _run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if called == list(range(len(blocks))):
        return found
    if len(called) > len(set(called)):
        raise _refusal(model, shared_layers(len(called), len(blocks)))
    raise _refusal(model, NOT_IN_ORDER)


def _gradients(
    model: nn.Module, inputs: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor | None]:
    """The loss, and the gradients of `parameters`."""
    loss = model(**inputs, **without_cache(model)).loss
    loss.backward()
    return {"the loss": loss.detach(), **_taken(parameters)}


def _taken(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor | None]:
    """Their gradients, which they have no more."""
    found = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return found


@contextmanager
def _refused(model: nn.Module, why: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise _refusal(model, why) from error


def _refusal(model: nn.Module, why: str) -> UserError:
    config: Any = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        return UserError(
            type(model).__name__,
            ROUTER_LOSS,
            "use native, or set output_router_logits to false in config.json",
        )
    return UserError(type(model).__name__, why, ANY_MODEL)


def _same(
    own: Mapping[str, Tensor], other: Mapping[str, Tensor], again: Callable[[], Mapping[str, Tensor]]
) -> bool:
    if own.keys() != other.keys():
        return False
    unlike = [name for name in own if not _equal(own[name], other[name])]
    if not unlike:
        return True
    repeated = again()
    return all(
        not _equal(own[name], repeated[name]) and _close(own[name], other[name], TOLERANCE[torch.bfloat16])
        for name in unlike
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (torch.equal(one, other) or _both_nan(one, other))


def _both_nan(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def close_to(known: Tensor, other: Tensor) -> bool:
    """Equal but for kernels that differ by shape."""
    return _close(known, other, TOLERANCE[known.dtype])


def _is_rounding(own: Tensor | None, found: Tensor | None, repeated: Tensor | None, usual: float) -> bool:
    """`found` differs from `own` by next to nothing beside gradients of `usual` size, and no more than
    `NOISE` times as much as `own` from itself."""
    if own is None or found is None or repeated is None:
        return False
    off, noise = (_per_element(own.float() - other.float()) for other in (found, repeated))
    return off <= TOLERANCE[torch.float32] * usual and off <= NOISE * noise


def _per_element(tensor: Tensor | None) -> float:
    """Root of the mean square."""
    return 0.0 if tensor is None else float(tensor.float().norm()) / max(1, tensor.numel()) ** 0.5


def _close(one: Tensor | None, other: Tensor | None, tolerance: float) -> bool:
    if one is None or other is None:
        known = one if other is None else other
        return known is None or not bool(known.any())
    size = max(float(one.float().norm()), 1e-30)
    return float((one.float() - other.float()).norm()) <= tolerance * size or _both_nan(one, other)
