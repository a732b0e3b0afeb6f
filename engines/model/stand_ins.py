"""Weights that stand in for a model's, so that its blocks can be run before there are any.

Every tensor is a stretch of one random memory of the size of the largest of them: all blocks of a 175B model
run in the memory of its embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engines.base import Batch, Blueprint, Context
from engines.costs.memory.trial import MOST_TOKENS, SEQUENCES
from engines.model.attention_masks import has_padding, known_padding, with_mask
from engines.model.blocks import TORCH_DTYPE, move_buffers, to_device
from engines.model.label_words import MASK_AT, WORDS

_PERIOD = 1_000_003
_STEP = 8
"""Elements between the beginnings of two stand-ins: 16 bytes in the shortest precision."""


@contextmanager
def on_stand_ins(
    blueprint: Blueprint, context: Context, dtype: torch.dtype | None = None
) -> Iterator[dict[str, Tensor]]:
    """The model computes with stand-ins within, of the job's precision unless `dtype` names another; gives
    inputs. Afterwards it has the parameters it had."""
    model, device = blueprint.model, torch.device(context.device)
    dtype = dtype or TORCH_DTYPE[context.workload.dtype]
    was_training = model.training
    before = [
        (module, leaf, parameter)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    ]
    move_buffers(model, device)
    stand_ins = _stand_ins(
        [parameter for _, _, parameter in before], dtype, device, std=blueprint.shape.hidden**-0.5
    )
    for module, leaf, parameter in before:
        module._parameters[leaf] = stand_ins[id(parameter)]
    try:
        batch = tried_batch(blueprint)
        with known_padding(has_padding(batch.inputs)):
            yield with_mask(to_device(batch, device))
    finally:
        for module, leaf, parameter in before:
            module._parameters[leaf] = parameter
        model.train(was_training)


def give_back(device: torch.device | str) -> None:
    """What trials took goes back to the driver. What is allocated next would be cut from its memory, which is
    as large as the largest tensor in fp32, and leave gaps that nothing fits into."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def _stand_ins(
    parameters: list[nn.Parameter], dtype: torch.dtype, device: torch.device, *, std: float
) -> dict[int, nn.Parameter]:
    """By identity of the parameter that it stands for. Vectors are about one half, all else normal with
    deviation `std`: large enough that what a block adds to the hidden state counts beside it."""
    distinct = list({id(each): each for each in parameters}.values())
    slack = _STEP * len(distinct)
    largest = {False: 0, True: 0}
    for each in distinct:
        is_vector = each.dim() < 2
        largest[is_vector] = max(largest[is_vector], each.numel())
    period = min(_PERIOD, max(largest.values()) + slack)
    pattern = torch.randn(period, generator=torch.Generator().manual_seed(0)).to(device)

    def memory(numel: int, values: Tensor) -> Tensor:
        return values.to(dtype).repeat(-(-(numel + slack) // period))

    normal = memory(largest[False], std * pattern)
    vectors = memory(largest[True], 0.5 + 0.1 * pattern)
    found: dict[int, nn.Parameter] = {}
    for number, each in enumerate(distinct):
        source = vectors if each.dim() < 2 else normal
        start = _STEP * number
        view = source[start : start + each.numel()].view(each.shape)
        found[id(each)] = nn.Parameter(view, requires_grad=each.dim() < 2)
    return found


def tried_batch(blueprint: Blueprint) -> Batch:
    """A few sequences on the host."""
    return _cut(blueprint.sample or _made_up(blueprint))


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
    """The first sequence and the most padded one, to `MOST_TOKENS`, with padding and a label among them."""
    if WORDS in batch.inputs:
        return _first_example(batch)
    ids = batch.inputs["input_ids"]
    rows = [0]
    mask = batch.inputs.get("attention_mask")
    if ids.shape[0] > 1:
        rows.append(1 if mask is None else max(1, int(mask.sum(1).argmin())))
    cut = {name: each[rows] for name, each in batch.inputs.items()}
    length = ids.shape[1]
    if length > MOST_TOKENS:
        begin = 0 if mask is None else _beginning(mask[rows[-1]])
        stretch = slice(begin, begin + MOST_TOKENS)
        cut = {
            # Contiguous, as the job's own batches are: a model may view them in another shape (CPM-Ant).
            name: each[:, stretch].contiguous() if each.dim() == 2 and each.shape[1] == length else each
            for name, each in cut.items()
        }
        for name in ("start_positions", "end_positions", MASK_AT):
            if name in cut:
                cut[name] = (cut[name] - begin).clamp(0, MOST_TOKENS - 1)
    labels = cut.get("labels")
    if labels is not None and labels.dim() == 2 and not bool((labels[:, 1:] != -100).any()):
        cut["labels"] = cut["input_ids"]
    return Batch(inputs=cut)


def _beginning(mask: Tensor) -> int:
    """Of the stretch of `MOST_TOKENS` that is tried of a longer `mask` (tokens,): with both sides of where
    padding begins or ends, else the first."""
    edges = mask.diff().nonzero()
    if not len(edges):
        return 0
    return min(max(0, int(edges[0]) + 1 - MOST_TOKENS // 2), len(mask) - MOST_TOKENS)


def _first_example(batch: Batch) -> Batch:
    """All of its sequences, one for each class, whole: their words are at their ends."""
    classes = batch.inputs["input_ids"].shape[0] // batch.inputs["labels"].shape[0]
    return Batch(
        inputs={name: each[: 1 if name == "labels" else classes] for name, each in batch.inputs.items()}
    )
