"""What the logits of each token say, gathered by chunks of the vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from engines.kernels import token_scores
from engines.kernels.token_scores import RunningScores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("chunk", [5000, 1700, 2048])
def test_the_kernel_gathers_what_torch_does(dtype: torch.dtype, chunk: int) -> None:
    kernels = pytest.importorskip("engines.kernels.token_scores_kernels")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn((6, 5000), generator=generator) * 4).to(dtype).to(device)
    logits[2, 4000] = logits[2, 100] = logits[2].max() + 1  # of equals the first
    labels = torch.tensor([0, 4999, 7, 2500, 3000, 1699], device=device)
    ours, running = (RunningScores(6, device) for _ in range(2))
    for first in range(0, 5000, chunk):
        piece = logits[:, first : first + chunk].contiguous()
        # Lanes that have seen nothing hold -inf; numpy warns of their difference, which is not used.
        with np.errstate(invalid="ignore"):
            kernels.gather(piece, labels, first, running.largest, running.where, running.sums, running.target)
        ours.add(slice(0, 6), piece.cpu() if device.type == "cpu" else piece, labels, first)
    expected = logits.float()
    assert torch.equal(running.largest, expected.max(1).values)
    assert torch.equal(running.where, expected.argmax(1))
    assert running.where[2] == 100
    assert torch.equal(running.target, expected.gather(1, labels.unsqueeze(1)).squeeze(1))
    losses = nn.functional.cross_entropy(expected.double(), labels, reduction="sum")
    assert float(running.scores().loss_sum) == pytest.approx(float(losses), rel=1e-6)
    assert float(ours.scores().loss_sum) == pytest.approx(float(losses), rel=1e-6)


def test_few_logits_are_in_fp32_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is gathered does not depend on how many; a position without a label has no finite loss."""
    logits = torch.randn((7, 40), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, -100, 0, 39, 7, 8, 9])
    whole = RunningScores(7, logits.device)
    whole.add(slice(0, 7), logits, labels, 0)
    monkeypatch.setattr(token_scores, "WIDE_LOGITS", 80)
    parts = RunningScores(7, logits.device)
    parts.add(slice(0, 7), logits, labels, 0)
    assert torch.equal(parts.scores().losses, whole.scores().losses)
    assert torch.equal(parts.scores().predicted, whole.scores().predicted)
    expected = nn.functional.cross_entropy(logits, labels, reduction="none")
    kept = labels >= 0
    assert torch.allclose(whole.scores().losses[kept], expected[kept], rtol=1e-6)
    assert whole.scores().losses[~kept].isinf().all()
