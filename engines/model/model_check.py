"""Before anything is filled: does the model do what is taken for granted of it?

A model is run by its own forward pass, and as an engine is going to run it, on a few sequences of the job's
own data, with the job's precision on the job's device. Neither pass may differ by a bit. The weights are
stand-ins: every tensor is a stretch of one random memory of the size of the largest of them, so all of a 175B
model's blocks are run in the memory of its embedding, in a second, before a single weight is read. What is
checked does not depend on the values of weights: which modules are called, in which order, with what.

Where the model's own forward does not repeat itself by the bit (kernels that add up in any order), the two
may differ by `TOLERANCE`.

Three checks:
- `check_driven`, for engines that run embedding, blocks and head by themselves;
- `check_watched`, for engines that run the model's own forward with its blocks watched: the same loss, and
  the same gradients of all vectors (norms and biases; those of matrices would take the model's memory);
- `check_repeats`, for all that train by gradients: two forward passes in training mode are equal, so that
  nothing is dropped or shaken at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Batch, Blueprint, Context
from engines.errors import UserError
from engines.model.activation_checkpointing import TrainedBlocks
from engines.model.attention_masks import has_padding, known_padding, with_mask
from engines.model.blocks import (
    TORCH_DTYPE,
    BlockDriver,
    find_blocks,
    move_buffers,
    no_cache,
    to_device,
    without_cache,
)
from engines.model.randomness import turn_off_randomness

SEQUENCES = 2
MOST_TOKENS = 128
"""Of each sequence that is tried."""

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Of a difference's norm, relative to the norm: of gradients, and where a forward differs from itself."""

ANY_MODEL = "use native, which trains any model"

_PERIOD = 1_000_003
_STEP = 8
"""Elements between the beginnings of two stand-ins: 16 bytes in the shortest precision."""

FAILURES = (
    TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError, NotImplementedError,
    RuntimeError,
)  # fmt: skip
"""What a model raises that is run in another way than it expects."""


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
            raise _refusal(model, "changes its own weights in a forward pass")
        with _refused(model, "its blocks cannot be run one by one"):
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
    _, blocks = find_blocks(model)
    turn_off_randomness(model)
    with on_stand_ins(blueprint, context) as inputs:
        model.train()
        _outputs_with_each_block_once(model, inputs)
        _check_repeats(model, inputs)
        vectors = {name: p for name, p in model.named_parameters() if p.dim() < 2 and p.is_floating_point()}
        if not vectors:  # the gradient of the first block's goes through all others
            first = min(find_blocks(model)[1][0].parameters(), key=lambda each: each.numel())
            first.requires_grad_()
            vectors = {"the smallest of the first block": first}
        own = _gradients(model, inputs, vectors)
        with _refused(model, "its blocks cannot be watched"), no_cache(model):
            watched = TrainedBlocks(model, _Nobody(), recomputed=len(blocks), graphs=False)
            try:
                found = _gradients(model, inputs, vectors)
            finally:
                watched.close()
        tolerance = TOLERANCE[TORCH_DTYPE[context.workload.dtype]]
        if any(not _close(own[name], found[name], tolerance) for name in own):
            raise _refusal(model, "recomputing its blocks one by one gives other gradients than the model's")


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


@contextmanager
def on_stand_ins(blueprint: Blueprint, context: Context) -> Iterator[dict[str, Tensor]]:
    """The model computes with stand-ins within; gives inputs. Afterwards it has the parameters it had."""
    model, device = blueprint.model, torch.device(context.device)
    dtype = TORCH_DTYPE[context.workload.dtype]
    was_training = model.training
    before = [
        (module, leaf, parameter)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    ]
    move_buffers(model, device)
    stand_ins = _stand_ins([parameter for _, _, parameter in before], dtype, device)
    for module, leaf, parameter in before:
        module._parameters[leaf] = stand_ins[id(parameter)]
    try:
        sample = blueprint.sample or _made_up(blueprint)
        inputs = with_mask(to_device(_cut(sample), device))
        with known_padding(has_padding(sample.inputs)):
            yield inputs
    finally:
        for module, leaf, parameter in before:
            module._parameters[leaf] = parameter
        model.train(was_training)


def _stand_ins(
    parameters: list[nn.Parameter], dtype: torch.dtype, device: torch.device
) -> dict[int, nn.Parameter]:
    """By identity of the parameter that it stands for. Vectors are about one half, all else normal."""
    distinct = list({id(each): each for each in parameters}.values())
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(_PERIOD, generator=generator).to(device)
    room = _STEP * len(distinct)
    largest = {False: 0, True: 0}
    for each in distinct:
        is_vector = each.dim() < 2
        largest[is_vector] = max(largest[is_vector], each.numel())

    def memory(numel: int, values: Tensor) -> Tensor:
        return values.to(dtype).repeat(-(-(numel + room) // _PERIOD))

    normal = memory(largest[False], 0.02 * pattern)
    vectors = memory(largest[True], 0.5 + 0.1 * pattern)
    found: dict[int, nn.Parameter] = {}
    for number, each in enumerate(distinct):
        source = vectors if each.dim() < 2 else normal
        start = _STEP * number
        view = source[start : start + each.numel()].view(each.shape)
        found[id(each)] = nn.Parameter(view, requires_grad=each.dim() < 2)
    return found


def _made_up(blueprint: Blueprint) -> Batch:
    """A batch for a model that comes without data."""
    shape = blueprint.shape
    length = min(16, shape.max_seq_len)
    ids = (torch.arange(SEQUENCES * length) * 7 + 3).view(SEQUENCES, length) % shape.vocabulary
    if shape.head == "question_answering":
        ends = torch.arange(SEQUENCES)
        return Batch(inputs={"input_ids": ids, "start_positions": ends, "end_positions": ends + 1})
    labels = ids if shape.head == "causal_lm" else torch.zeros(SEQUENCES, dtype=torch.int64)
    return Batch(inputs={"input_ids": ids, "labels": labels})


def _cut(batch: Batch) -> Batch:
    """The first sequence and the most padded one, to `MOST_TOKENS`, with a label among them."""
    ids = batch.inputs["input_ids"]
    rows = [0]
    mask = batch.inputs.get("attention_mask")
    if ids.shape[0] > 1:
        rows.append(1 if mask is None else max(1, int(mask.sum(1).argmin())))
    cut = {name: each[rows] for name, each in batch.inputs.items()}
    length = ids.shape[1]
    if length > MOST_TOKENS:
        cut = {
            name: each[:, :MOST_TOKENS] if each.dim() == 2 and each.shape[1] == length else each
            for name, each in cut.items()
        }
        for name in ("start_positions", "end_positions"):
            if name in cut:
                cut[name] = cut[name].clamp(max=MOST_TOKENS - 1)
    labels = cut.get("labels")
    if labels is not None and labels.dim() == 2 and not bool((labels[:, 1:] != -100).any()):
        cut["labels"] = cut["input_ids"]
    return Batch(inputs=cut)


def _run(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _tensors(model(**inputs, **without_cache(model)))


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
        raise _refusal(model, f"its layers share weights: {len(called)} calls of {len(blocks)}")
    raise _refusal(model, "does not call its blocks one after the other")


def _gradients(
    model: nn.Module, inputs: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor | None]:
    """The loss, and the gradients of `parameters`."""
    loss = model(**inputs, **without_cache(model)).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return {"the loss": loss.detach(), **found}


@contextmanager
def _refused(model: nn.Module, why: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise _refusal(model, why) from error


def _refusal(model: nn.Module, why: str) -> UserError:
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


def _close(one: Tensor | None, other: Tensor | None, tolerance: float) -> bool:
    if one is None or other is None:
        known = one if other is None else other
        return known is None or not bool(known.any())
    size = max(float(one.float().norm()), 1e-30)
    return float((one.float() - other.float()).norm()) <= tolerance * size or _both_nan(one, other)
