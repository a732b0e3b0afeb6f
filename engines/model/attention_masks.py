"""Attention masks without a look at the GPU.

Before a model's forward builds its masks, transformers asks whether any position is padded, or whether
several sequences lie in one row, by reading a tensor: the host waits for the GPU. Both answers are known on
the host, where batches come from. A mask of ones is given where a batch has none, since without one
transformers looks for sequences by their positions; and the question about padding is answered beforehand,
through the registry in which transformers has its mask functions.

The masks are those that transformers builds by itself: none where nothing is padded and the attention kernel
knows the causal form, else a boolean one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils import import_utils

_FORMS = ("sdpa", "eager")
"""Names of the attention that models here run with; `eager` where a family knows no other."""

_NEVER_SKIP = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}


def with_mask(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` of a model, with an attention mask of ones (batch, seq) int64 if there is none."""
    if "attention_mask" in inputs:
        return dict(inputs)
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


def has_padding(inputs: Mapping[str, Tensor]) -> bool:
    """Whether the attention mask of `inputs`, on the host, leaves a position out."""
    mask = inputs.get("attention_mask")
    return mask is not None and not bool(mask.all())


@contextmanager
def known_padding(padded: bool) -> Iterator[None]:
    """Within it models build their masks for a batch of which it is known whether any position is padded.

    While a CUDA graph is captured too: transformers would build a mask then that it leaves out otherwise, and
    the graph would run other attention kernels than the steps before it.
    Several threads may be within, each with a batch of its own.
    """
    _KNOWN.enter(padded)
    try:
        yield
    finally:
        _KNOWN.leave()


class _Known:
    """What is known of padding, by thread. While any thread is within, transformers' functions are replaced;
    the last one to leave puts them back, in whatever order they came."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_thread = threading.local()
        self._within = 0
        self._latest = False
        self._usual: dict[str, Callable[..., Any]] = {}
        self._is_capturing: Callable[[], bool] = import_utils.is_cuda_stream_capturing

    def enter(self, padded: bool) -> None:
        with self._lock:
            if self._within == 0:
                self._usual = {form: ALL_MASK_ATTENTION_FUNCTIONS[form] for form in _FORMS}
                self._is_capturing = import_utils.is_cuda_stream_capturing
                for form, build in self._usual.items():
                    ALL_MASK_ATTENTION_FUNCTIONS[form] = self._told(build)
                import_utils.is_cuda_stream_capturing = lambda: False
            self._within += 1
            self._latest = padded
        self._known().append(padded)

    def leave(self) -> None:
        self._known().pop()
        with self._lock:
            self._within -= 1
            if self._within == 0:
                import_utils.is_cuda_stream_capturing = self._is_capturing
                for form, build in self._usual.items():
                    ALL_MASK_ATTENTION_FUNCTIONS[form] = build

    def _known(self) -> list[bool]:
        if not hasattr(self._of_thread, "known"):
            self._of_thread.known = []
        known: list[bool] = self._of_thread.known
        return known

    def _told(self, build: Callable[..., Any]) -> Callable[..., Any]:
        def build_mask(**arguments: Any) -> Any:
            # Autograd's own threads run blocks again for the one that entered last.
            known = self._known()
            if not (known[-1] if known else self._latest):
                return build(**{**arguments, "attention_mask": None})
            # A mask that leaves something out can never be skipped, so there is nothing to look for.
            return build(**{**arguments, **_NEVER_SKIP})

        return build_mask


_KNOWN = _Known()
