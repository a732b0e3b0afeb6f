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
    """
    usual = {form: ALL_MASK_ATTENTION_FUNCTIONS[form] for form in _FORMS}
    is_capturing = import_utils.is_cuda_stream_capturing
    for form, build in usual.items():
        ALL_MASK_ATTENTION_FUNCTIONS[form] = _told(build, padded)
    import_utils.is_cuda_stream_capturing = lambda: False
    try:
        yield
    finally:
        import_utils.is_cuda_stream_capturing = is_capturing
        for form, build in usual.items():
            ALL_MASK_ATTENTION_FUNCTIONS[form] = build


def _told(build: Callable[..., Any], padded: bool) -> Callable[..., Any]:
    def build_mask(**arguments: Any) -> Any:
        if not padded:
            return build(**{**arguments, "attention_mask": None})
        # A mask that leaves something out can never be skipped, so there is nothing to look for.
        return build(**{**arguments, **_NEVER_SKIP})

    return build_mask
