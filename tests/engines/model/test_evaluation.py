"""What an evaluation tells of each held-out sequence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from engines.base import Batch
from engines.model.evaluation import IGNORED, EvaluationSum, evaluate_on_device, scores_of_tokens
from tiny_models import tiny_blueprint


def test_losses_of_each_sequence_are_kept() -> None:
    """Of a sequence with a class, a number or an answer its own, and none where it has no label."""
    logits = torch.tensor([[0.3, 1.0], [2.0, -1.0], [0.0, 5.0], [1.0, 1.5]])
    labels = torch.tensor([1, 0, IGNORED, 0])
    total = EvaluationSum()
    expected = functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    total.add(SimpleNamespace(loss=expected.sum() / 3, logits=logits), {"labels": labels})
    found = total.result()
    assert found.sequence_labels == (1, 1, 1)
    assert found.sequence_losses == pytest.approx(expected[[0, 1, 3]].tolist())

    numbers = EvaluationSum()
    output = SimpleNamespace(loss=torch.tensor((0.5**2 + 3.0**2) / 2), logits=torch.tensor([[1.5], [-1.0]]))
    numbers.add(output, {"labels": torch.tensor([1.0, 2.0])})
    assert numbers.result().sequence_losses == pytest.approx((0.25, 9.0))

    answers = EvaluationSum()
    ends = {"start_positions": torch.tensor([0, 1, 9]), "end_positions": torch.tensor([2, 1, 1])}
    start, end = torch.randn((2, 3, 3), generator=torch.Generator().manual_seed(0))
    first, last = (
        functional.cross_entropy(
            each, ends[f"{name}_positions"].clamp(0, 3), reduction="none", ignore_index=3
        )
        for each, name in ((start, "start"), (end, "end"))
    )
    own = ((first + last) / 2).mean()
    answers.add(SimpleNamespace(loss=own, start_logits=start, end_logits=end), ends)
    assert answers.result().sequence_losses == pytest.approx(((first + last) / 2).tolist())


def test_a_loss_that_is_no_mean_over_labels_has_no_sequences() -> None:
    """Such as one with a penalty of the model's own in it."""
    total = EvaluationSum()
    logits = torch.tensor([[0.0, 1.0]])
    own = functional.cross_entropy(logits, torch.tensor([1])) + 0.5
    total.add(SimpleNamespace(loss=own, logits=logits), {"labels": torch.tensor([1])})
    assert total.result().sequence_losses == total.result().sequence_labels == ()


@given(
    together=st.integers(1, 6),
    labelled=st.lists(st.integers(0, 11), min_size=6, max_size=6).filter(any),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
@settings(max_examples=25, deadline=None)
def test_losses_of_sequences_do_not_depend_on_the_batch_size(
    together: int, labelled: list[int], dtype: torch.dtype
) -> None:
    """And are those that transformers gives each sequence alone."""
    model = tiny_blueprint("llama").reference.to(dtype).eval()
    ids = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for row, count in enumerate(labelled):
        labels[row, 1 : 12 - count] = IGNORED
    batches = [
        Batch(inputs={"input_ids": ids[first : first + together], "labels": labels[first : first + together]})
        for first in range(0, 6, together)
    ]
    found = evaluate_on_device(model, batches, "cpu")
    assert found.sequence_labels == tuple(count for count in labelled if count)
    with torch.no_grad():
        expected = [
            float(model(input_ids=ids[row : row + 1], labels=labels[row : row + 1]).loss) * count
            for row, count in enumerate(labelled)
            if count
        ]
    assert found.sequence_losses == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-2)
    assert sum(found.sequence_losses) / found.num_labels == pytest.approx(found.loss, rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_losses_of_sequences_take_no_memory(dtype: torch.dtype) -> None:
    """Logits are read once, by a kernel, and no other of their size are made."""
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (torch.randn((4, 129, 32_003), generator=generator, device="cuda") * 4).to(dtype)
    labels = torch.randint(0, 32_003, (4, 129), generator=generator, device="cuda")
    labels[0, :100] = labels[3] = IGNORED
    scores_of_tokens(logits[:, :2], labels[:, :2])  # the kernel is compiled
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = scores_of_tokens(logits, labels)
    assert torch.cuda.max_memory_allocated() - before < logits.numel() * logits.element_size() / 50
    kept = labels[:, 1:] != IGNORED
    expected = functional.cross_entropy(logits[:, :-1][kept].float(), labels[:, 1:][kept], reduction="none")
    assert torch.allclose(found.losses, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.predicted, logits[:, :-1][kept].argmax(-1))
