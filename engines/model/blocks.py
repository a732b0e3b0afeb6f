"""A Hugging Face model seen as an embedding, a row of blocks, and a head.

No model code is copied: blocks are found on the model, and its own forward does the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Batch, Blueprint
from engines.errors import UserError
from engines.shapes import SEVERAL_STATES

TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and module of the model's row of blocks: of its `ModuleList`s the one that holds most parameters.

    Lists inside another, such as the experts of a mixture, do not count, however large they are. Blocks may
    differ in class and size (attention and state-space layers taking turns).

    Raises `UserError` for a model without one, and for an encoder-decoder, which has two.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(
            type(model).__name__,
            "is an encoder-decoder, which has two rows of blocks",
            "use a decoder or an encoder",
        )
    rows: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer, _ in rows):
            rows.append((path, module))
    best = max(rows, key=lambda row: sum(each.numel() for each in row[1].parameters()), default=None)
    if best is None or next(best[1].parameters(), None) is None:
        raise UserError(type(model).__name__, "has no row of blocks", "use a transformer decoder or encoder")
    return best


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace the parameter of that dotted name, in this place only."""
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path).register_parameter(leaf, parameter)


def first_names(model: nn.Module) -> dict[str, str]:
    """Every place of a parameter -> the first name of the tensor that is there (its own, unless tied)."""
    names: dict[int, str] = {}
    return {
        place: names.setdefault(id(parameter), place)
        for place, parameter in model.named_parameters(remove_duplicate=False)
    }


def bind(model: nn.Module, places: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Let the model compute with `tensors`, by first name; `places` as `first_names` gave them.

    Nothing is copied: what is written to a tensor later is what the model sees. A tied tensor stays one
    parameter. No gradients.
    """
    parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    for place, name in places.items():
        if name in parameters:
            set_parameter(model, place, parameters[name])


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that keep a decoder from building a key-value cache, of no use to training."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


@contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    """No key-value cache, also in a model whose forward has no word for it: a block that is run again would
    add to it a second time."""
    config: Any = model.config
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before


def materialize(
    blueprint: Blueprint,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    placed: Collection[str] = (),
) -> nn.Module:
    """The blueprint's model with every weight on `device`; a tied tensor stays one tensor. Those of `placed`,
    by name, the caller has put there, and they stay.

    HAZARD: a parameter that is not on the meta device is no sign of that: some families make theirs there
    whatever they are built on, with values of no meaning.
    """
    model = blueprint.model
    made: dict[int, nn.Parameter] = {}
    places = list(model.named_parameters(remove_duplicate=False))
    for name, old in places:
        if name in placed:
            continue
        if id(old) not in made:
            out = torch.empty(old.shape, device=device, dtype=dtype)
            blueprint.fill(name, out)
            made[id(old)] = nn.Parameter(out)
        set_parameter(model, name, made[id(old)])
    move_buffers(model, device)
    return model


def move_buffers(model: nn.Module, device: torch.device | str) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A small tensor of the host on the device, without waiting: through pinned memory of torch's, which it
    keeps until the copy has ended. From pageable memory the driver would copy while the host stands by."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def to_device(batch: Batch, device: torch.device | str) -> dict[str, Tensor]:
    return {name: sent(tensor, device) for name, tensor in batch.inputs.items()}


@dataclass(frozen=True, slots=True)
class BlockCall:
    """What the model hands one block beside the hidden state: masks, positions, ..."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Recording:
    """One forward pass up to the first block."""

    hidden: Tensor
    """What enters the first block: (batch, seq, hidden)."""
    calls: Sequence[BlockCall]


class _AtTheHead(Exception):
    """Ends a forward pass after the last block."""


class _StandIn(nn.Module):
    """In the place of a block: answers for its attributes, and does `act` when it is called."""

    def __init__(self, block: nn.Module, act: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        # Past nn.Module's bookkeeping: as a submodule the block would show up in the model a second time.
        self.__dict__["_block"] = block
        self.__dict__["_act"] = act

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_act"](args, kwargs)


class BlockDriver:
    """Runs a model in three parts: up to its blocks, one block at a time, and from the last one on.

    The parts together compute what the model's own forward computes, with the same operations on the
    same values. A block's weights are needed only while it runs.

    Taken for granted: a block gets the hidden state first, or as `hidden_states`, and returns it alone or
    first in a tuple, and nothing else travels from block to block.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        path, self.blocks = find_blocks(model)
        parent, _, self._leaf = path.rpartition(".")
        self._parent = model.get_submodule(parent)
        self._arguments = without_cache(model)
        self.takes = frozenset(inspect.signature(model.forward).parameters)
        self._forms: dict[type[nn.Module], tuple[Any, ...] | None] = {}
        """What a block of each class returns beside the hidden state, if it returns several values."""

    def record(self, inputs: Mapping[str, Any], cache: Any = None) -> Recording:
        """Run the model up to its first block, and take down what each block would be called with.

        With a key-value `cache` (transformers') they go on from what is in it, and add to it when they run.
        Raises `UserError` for a hidden state of more than three dimensions, whose rows are no sequences.
        """
        self.learn_forms(inputs)
        hidden: list[Tensor] = []
        calls: list[BlockCall] = []

        def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            entering, call = split_call(args, kwargs)
            hidden.append(entering)
            calls.append(call)
            if len(calls) == len(self.blocks):
                raise _AtTheHead
            return self._in_form(len(calls) - 1, entering)

        self._forward(inputs, [_StandIn(block, note) for block in self.blocks], cache)
        if hidden[0].dim() > 3:  # such as Gemma 3n's: several streams, and the batch second
            raise UserError(
                type(self._model).__name__,
                SEVERAL_STATES,
                "use native",
            )
        return Recording(hidden=hidden[0], calls=calls)

    def run(self, index: int, call: BlockCall, hidden: Tensor) -> Tensor:
        """The hidden state after block `index`."""
        output = self.blocks[index](hidden, *call.args, **call.kwargs)
        return hidden_state_of(output)

    def finish(self, inputs: Mapping[str, Any], hidden: Tensor) -> Any:
        """The model's own output, its blocks replaced by one that returns `hidden`."""
        stub = _StandIn(self.blocks[-1], lambda args, kwargs: self._in_form(-1, hidden))
        return self._forward(inputs, [stub])

    def learn_forms(self, inputs: Mapping[str, Any]) -> None:
        """What blocks return, by running the first one of each class, if that is not known. Weights may be
        anything."""
        if self._forms:
            return
        kinds = {type(block) for block in self.blocks}
        blocks = iter(self.blocks)

        def run_once(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            block = next(blocks)
            if type(block) not in self._forms:
                output = block(*args, **kwargs)
                several = isinstance(output, tuple | list)
                others = (
                    (None if isinstance(each, Tensor) else each for each in output[1:]) if several else ()
                )
                self._forms[type(block)] = tuple(others) if several else None
            if kinds == self._forms.keys():
                raise _AtTheHead
            return self._in_form(list(self.blocks).index(block), split_call(args, kwargs)[0])

        self._forward(inputs, [_StandIn(block, run_once) for block in self.blocks])

    def _in_form(self, index: int, hidden: Tensor) -> Any:
        """As the model expects what block `index` returns. Tensors but the hidden state are left out."""
        others = self._forms[type(self.blocks[index])]
        return hidden if others is None else (hidden, *others)

    def _forward(self, inputs: Mapping[str, Any], row: Sequence[nn.Module], cache: Any = None) -> Any:
        arguments = self._arguments
        if cache is not None:
            arguments = {"past_key_values": cache, "use_cache": True}
            inputs = {name: value for name, value in inputs.items() if name in self.takes}
        setattr(self._parent, self._leaf, nn.ModuleList(row))
        try:
            return self._model(**inputs, **arguments)
        except _AtTheHead:
            return None
        finally:
            setattr(self._parent, self._leaf, self.blocks)


def hidden_state_of(output: Any) -> Tensor:
    """What a block passes on: all that it returns, or the first of several values."""
    result = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(result, Tensor)
    return result


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], BlockCall((), others)
