"""The loss in chunks is transformers' own, and only heads that allow it are taken apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engines.base import Batch, Context
from engines.methods.mezo import Mezo
from engines.model.evaluation import EvaluationSum
from engines.settings.zeroth_order import MezoSettings
from engines.shapes import Workload
from engines.zeroth_order import chunked_loss
from tiny_families import blueprint_of
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint


def engine(blueprint: TinyBlueprint) -> Mezo:
    workload = Workload(batch_size=2, seq_len=16, dtype="fp32")
    made = Mezo(MezoSettings(), Context(device="cpu", workload=workload, seed=0, total_steps=1))
    made.setup(blueprint)
    return made


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
@pytest.mark.parametrize("padding", [None, slice(-4, None)], ids=["unpadded", "padded"])
def test_loss_and_accuracy_are_those_of_transformers(
    family: str, tied: bool, padding: slice | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "HEAD_TOKENS", 8)
    monkeypatch.setattr(chunked_loss, "chunk_rows", lambda vocabulary, width, element_bytes: 24)
    blueprint = tiny_blueprint(family, tied)
    made = engine(blueprint)
    for batch in tiny_batches(3, family):
        if padding is not None:
            batch.inputs["attention_mask"][0, padding] = 0
            batch.inputs["labels"][0, padding] = chunked_loss.IGNORED
        with torch.no_grad():
            output = blueprint.reference.eval()(**batch.inputs)
        expected = EvaluationSum()
        expected.add(output, batch.inputs)
        found = made.evaluate([batch])
        assert found.loss == pytest.approx(expected.result().loss, rel=1e-6)
        assert found.accuracy == expected.result().accuracy
        assert found.num_labels == expected.result().num_labels
        assert found.sequence_labels == expected.result().sequence_labels
        assert found.sequence_losses == pytest.approx(expected.result().sequence_losses, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_said_of_a_class_is_the_likeliest_of_its_words(family: str) -> None:
    blueprint = tiny_blueprint(family)
    made = engine(blueprint)
    words = torch.tensor([7, 11, 30])
    (batch,) = tiny_batches(1, family)
    labels = torch.full_like(batch.inputs["input_ids"], chunked_loss.IGNORED)
    labels[:, 9] = words[:2]
    batch = Batch(inputs={**batch.inputs, "labels": labels}, class_tokens=words)
    with torch.no_grad():
        output = blueprint.reference.eval()(**batch.inputs)
    expected = EvaluationSum()
    expected.add(output, batch.inputs, words)
    assert made._model._head is not None
    found, wanted = made.evaluate([batch]), expected.result()
    assert (found.predicted, found.expected, found.num_examples) == (wanted.predicted, (7, 11), 2)
    assert set(found.predicted) <= {7, 11, 30}
    assert found.accuracy == wanted.accuracy


def test_a_head_with_a_bias() -> None:
    def blueprint() -> TinyBlueprint:
        made = tiny_blueprint("llama")
        for model, device in ((made.reference, "cpu"), (made.model, "meta")):
            bias = torch.randn(64, generator=torch.Generator().manual_seed(1))
            model.lm_head.bias = nn.Parameter(bias.to(device))
        return made

    made = engine(blueprint())
    (batch,) = tiny_batches(1, "llama")
    with torch.no_grad():
        output = blueprint().reference.eval()(**batch.inputs)
    assert made._model._head is not None
    assert made.evaluate([batch]).loss == pytest.approx(output.loss.item(), rel=1e-6)
    assert made.step([batch]).loss == pytest.approx(output.loss.item(), rel=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_capped_and_scaled_logits_are_left_to_the_model(family: str) -> None:
    assert engine(blueprint_of(family))._model._head is None


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_so_is_classification(family: str) -> None:
    assert engine(tiny_blueprint(family))._model._head is None


def test_positions_without_a_label_are_found_on_the_host() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 3]])
    batch = Batch(inputs={"input_ids": torch.zeros((2, 4), dtype=torch.int64), "labels": labels})
    targets = chunked_loss.targets_of(batch, torch.device("cpu"))
    assert targets.positions.tolist() == [1, 2, 6]
    assert targets.labels.tolist() == [7, 8, 3]


@pytest.mark.parametrize("width", [1, 64, 768, 2048, 5120, 7168])
def test_chunks_are_whole_tiles_of_noise_on_the_grid_of_fast_kernels(width: int) -> None:
    rows = chunked_loss.chunk_rows(50272, width, 2)
    assert 0 < rows <= 50272
    assert rows == 50272 or (rows * width % chunked_loss.TILE == 0 and rows % chunked_loss.ROW_GRID == 0)
