"""Forward and backward pass of a micro-batch as one CUDA graph: one launch in place of thousands.

Each launch costs the CPU 5 to 50 microseconds; where a step is short, its launches decide how long it takes.
A graph computes what the same kernels compute one by one, with the same bits, on inputs and gradients at
fixed places. A form of batch (shapes, padded or not) is captured in the step after the one in which it was
first seen: by then kernels are chosen, compiled and loaded, which no capture may do.

Passes may update the parameters as they go, so that no gradient is left
(`engines.methods.backward_optimizer`): a capture computes nothing, and the replay after it makes the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Batch
from engines.model.attention_masks import has_padding
from engines.model.blocks import sent
from engines.model.cuda_graphs import MOST_FORMS
from engines.model.graph_capture import capturing

_cuda: Any = torch.cuda  # most of it is without annotations

Pass = Callable[[Mapping[str, Tensor], bool], Tensor]
"""Inputs on the device, whether some position is padded -> the micro-batch's share of the loss, () fp32.
Gradients are added to those of the parameters, or used up."""


@dataclass(slots=True)
class _Form:
    since: int
    """The step in which it was first seen."""
    inputs: dict[str, Tensor]
    first: tuple[Any, Tensor] | None = None
    """Graph of a step's first micro-batch, which writes gradients, and its loss."""
    later: tuple[Any, Tensor] | None = None
    """Graph of the others, which add to them."""


class CapturedPasses:
    """Of `parameters` gradients are left by `run`: none where it uses them up.

    HAZARD: weights, gradients that are left, and what else `run` changes must lie at the same places in every
    step; who captures must not free gradients between steps.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], run: Pass, device: torch.device) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._run = run
        self._device = device
        self._forms: dict[Any, _Form] = {}
        self._gradients: list[Tensor | None] | None = None
        """Where the graphs have them."""
        self._step = 0
        self.has_too_many_forms = False
        """A batch had a form that is not captured any more."""
        self._pool = _cuda.graph_pool_handle()
        self._stream = _cuda.Stream(device)

    def step(self, batches: Sequence[Batch]) -> list[Tensor] | None:
        """Losses of the micro-batches, each () fp32 and valid until the next step, with their gradients where
        parameters have them. `None`: run it without graphs, from no gradients on; a form is new."""
        self._step += 1
        forms = [self._form(batch) for batch in batches]
        if any(form is None for form in forms):
            return None
        losses = []
        for index, (batch, form) in enumerate(zip(batches, forms, strict=True)):
            assert form is not None
            for name, place in form.inputs.items():
                place.copy_(sent(batch.inputs[name], self._device))
            losses.append(self._replay(form, has_padding(batch.inputs), is_first=index == 0).clone())
        return losses

    @property
    def holds_memory(self) -> bool:
        """There are graphs, whose memory nothing else may use."""
        return any(form.first is not None or form.later is not None for form in self._forms.values())

    def forget(self) -> None:
        """Let go of all graphs and of the gradients that they make; forms that were seen are captured anew.
        The caller lets go of the parameters' gradients."""
        for form in self._forms.values():
            form.first = form.later = None
        self._gradients = None
        self._pool = _cuda.graph_pool_handle()

    def _form(self, batch: Batch) -> _Form | None:
        """`None`: too early, or a form too many."""
        padded = has_padding(batch.inputs)
        key = (padded, tuple((name, tuple(each.shape)) for name, each in batch.inputs.items()))
        if key not in self._forms:
            if len(self._forms) == MOST_FORMS:
                self.has_too_many_forms = True
                return None
            places = {name: torch.empty_like(t, device=self._device) for name, t in batch.inputs.items()}
            self._forms[key] = _Form(self._step, places)
        form = self._forms[key]
        return form if form.since < self._step else None

    def _replay(self, form: _Form, padded: bool, *, is_first: bool) -> Tensor:
        captured = form.first if is_first else form.later
        if captured is None:
            captured = self._capture(form, padded, is_first=is_first)
            if is_first:
                form.first = captured
            else:
                form.later = captured
        self._put_gradients()
        graph, loss = captured
        graph.replay()
        return loss

    def _put_gradients(self) -> None:
        places = self._gradients or [None] * len(self._parameters)
        for parameter, gradient in zip(self._parameters, places, strict=True):
            parameter.grad = gradient

    def _capture(self, form: _Form, padded: bool, *, is_first: bool) -> tuple[Any, Tensor]:
        """The first graph of all makes the gradients, in its own pool; one of another form clears them."""
        cleared = [each for each in self._gradients or () if each is not None] if is_first else []
        if self._gradients is None:
            _cuda.empty_cache()  # what earlier steps left in the ordinary pool is room for the graph's
        self._put_gradients()
        with capturing(self._stream, self._pool) as graph:
            if cleared:
                torch._foreach_zero_(cleared)
            loss = self._run(form.inputs, padded)
        if self._gradients is None:
            self._gradients = [parameter.grad for parameter in self._parameters]
        return graph, loss
