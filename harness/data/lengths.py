"""Sequences of like length in one batch, and the few lengths that batches are padded to.

Everything is padded to the sequence length where lengths differ within a batch, and most of what the GPU
computes on may then be padding. `harness.data.padding` has the lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from harness.data.padding import padded_lengths

BATCHES_TOGETHER = 64
"""So many batches of a shuffled epoch are sorted by length among themselves: enough that lengths come
together, few enough that an epoch stays a mixture."""


def epoch_order(
    lengths: np.ndarray[tuple[int], np.dtype[np.int64]],
    seq_len: int,
    batch_size: int,
    begins_within: int,
    generator: torch.Generator,
) -> list[int]:
    """Rows of one epoch, shuffled, those that are padded to one length in the same batch as far as they go.

    `lengths` are those of all rows in tokens. `begins_within` rows of the epoch complete the last batch of
    the epoch before. The order of batches is random too.
    """
    shuffled = torch.randperm(len(lengths), generator=generator).numpy()
    first, rest = shuffled[:begins_within], shuffled[begins_within:]
    bounds = np.asarray(padded_lengths(seq_len))
    batches: list[Sequence[int]] = []
    together = BATCHES_TOGETHER * batch_size
    for start in range(0, len(rest), together):
        rows = rest[start : start + together]
        ordered = rows[np.argsort(np.searchsorted(bounds, lengths[rows]), kind="stable")]
        batches += [ordered[place : place + batch_size].tolist() for place in range(0, len(rows), batch_size)]
    whole = [batch for batch in batches if len(batch) == batch_size]
    others = [row for batch in batches if len(batch) < batch_size for row in batch]
    mixed = [whole[place] for place in torch.randperm(len(whole), generator=generator).tolist()]
    return [*first.tolist(), *(row for batch in mixed for row in batch), *others]
