from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from engines.base import Batch
from engines.errors import UserError
from engines.model.blocks import BlockDriver, bind, find_blocks, first_names, materialize, without_cache
from engines.model.evaluation import EvaluationSum, evaluate_on_device
from tiny_models import tiny_batches, tiny_blueprint

FAMILIES = ["opt", "llama", "qwen2", "gpt2", "roberta", "bert"]


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("opt", "model.decoder.layers"),
        ("llama", "model.layers"),
        ("qwen2", "model.layers"),
        ("gpt2", "transformer.h"),
        ("roberta", "roberta.encoder.layer"),
        ("bert", "bert.encoder.layer"),
    ],
)
def test_the_row_of_blocks_is_found(family: str, path: str) -> None:
    found, blocks = find_blocks(tiny_blueprint(family, num_blocks=2).reference)
    assert found == path
    assert len(blocks) == 2


def test_models_without_one_row_of_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="no row of blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))
    config = AutoConfig.for_model(
        "t5", vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, tie_word_embeddings=True
    )
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(UserError, match="encoder-decoder"):
        find_blocks(model)


def test_a_longer_list_inside_a_block_is_not_the_row() -> None:
    def mixture() -> nn.Module:
        block = nn.Module()
        block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
        return block

    model = nn.Module()
    model.layers = nn.ModuleList(mixture() for _ in range(3))
    assert find_blocks(model) == ("layers", model.layers)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_tensor_has_one_first_name_and_stays_one(tied: bool) -> None:
    blueprint = tiny_blueprint("opt", tied)
    places = first_names(blueprint.model)
    head = places["lm_head.weight"]
    assert head == ("model.decoder.embed_tokens.weight" if tied else "lm_head.weight")
    model = materialize(blueprint, "cpu", torch.float32)
    assert first_names(model) == places
    tensors = {name: torch.full_like(tensor, 2.0) for name, tensor in model.named_parameters()}
    bind(model, places, tensors)
    assert first_names(model) == places
    assert model.get_parameter("lm_head.weight").data_ptr() == tensors[head].data_ptr()
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_run_in_parts_gives_the_bits_of_its_own_forward(family: str) -> None:
    model = tiny_blueprint(family, num_blocks=3).reference.eval()
    driver = BlockDriver(model)
    with torch.no_grad():
        for batch in tiny_batches(2, family):
            inputs = dict(batch.inputs)
            if family not in ("roberta", "bert"):
                inputs["attention_mask"][0, -5:] = 0
            expected = model(**inputs)
            recording = driver.record(inputs)
            hidden = recording.hidden
            for index in range(3):
                hidden = driver.run(index, recording.calls[index], hidden)
            output = driver.finish(inputs, hidden)
            assert torch.equal(output.loss, expected.loss)
            assert torch.equal(output.logits, expected.logits)
    assert find_blocks(model)[1] is driver.blocks


def test_the_recording_needs_no_weights_of_the_blocks() -> None:
    model = tiny_blueprint("llama").reference.eval()
    driver = BlockDriver(model)
    (batch,) = tiny_batches(1, "llama")
    with torch.no_grad():
        before = driver.record(batch.inputs)
        for parameter in driver.blocks.parameters():
            parameter.fill_(float("nan"))
        assert torch.equal(driver.record(batch.inputs).hidden, before.hidden)


def test_the_model_is_whole_again_after_a_failure() -> None:
    model = tiny_blueprint("gpt2").reference.eval()
    driver = BlockDriver(model)
    ids = torch.full((1, 4), 10_000)
    with pytest.raises(IndexError), torch.no_grad():
        driver.record({"input_ids": ids})
    assert find_blocks(model)[1] is driver.blocks


def test_only_models_with_a_cache_are_told_to_do_without() -> None:
    assert without_cache(tiny_blueprint("opt").reference) == {"use_cache": False}
    assert without_cache(nn.Linear(2, 2)) == {}


def test_correct_positions_are_counted_where_labels_are() -> None:
    logits = torch.zeros(1, 4, 3)
    for position, token in enumerate((2, 1, 0, 2)):
        logits[0, position, token] = 1.0
    labels = torch.tensor([[0, 2, -100, 1]])  # predicted from positions 0, 1 and 2: 2, 1, 0

    def counted(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int, int | None]:
        total = EvaluationSum()
        total.add(SimpleNamespace(loss=torch.tensor(1.0), logits=logits), {"labels": labels})
        found = total.result()
        return found.accuracy * found.num_labels, found.num_labels, found.num_examples

    assert counted(logits, labels) == (1, 2, None)  # of a text
    assert counted(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])) == (1, 2, 2)


def test_what_a_model_says_of_a_class_is_one_of_the_classes_words() -> None:
    """Token 4 is likelier than the words of both classes, 1 and 3, wherever a class is to be said."""
    logits = torch.zeros(2, 3, 5)
    logits[:, 1, 4] = 9.0
    logits[0, 1, 3], logits[1, 1, 1] = 1.0, 1.0
    labels = torch.tensor([[-100, -100, 3], [-100, -100, 3]])
    output = SimpleNamespace(loss=torch.tensor(1.0), logits=logits)
    words, vocabulary = EvaluationSum(), EvaluationSum()
    words.add(output, {"labels": labels}, torch.tensor([1, 3]))
    vocabulary.add(output, {"labels": labels})
    found = words.result()
    assert (found.accuracy, found.num_examples) == (0.5, 2)
    assert (found.expected, found.predicted) == ((3, 3), (3, 1))
    assert (vocabulary.result().accuracy, vocabulary.result().num_examples) == (0.0, None)


def test_an_answer_is_right_where_both_its_ends_are() -> None:
    start_logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 9.0, 0.0]])
    end_logits = torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 9.0], [0.0, 9.0, 0.0]])
    inputs = {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([2, 1, 1])}
    total = EvaluationSum()
    output = SimpleNamespace(loss=torch.tensor(2.5), start_logits=start_logits, end_logits=end_logits)
    total.add(output, inputs)
    found = total.result()
    assert (found.loss, found.accuracy, found.num_labels, found.num_examples) == (2.5, 1 / 3, 3, 3)
    assert (found.expected, found.predicted) == ((0, 2, 1, 1, 2, 1), (0, 2, 1, 2, 1, 1))


def add(total: EvaluationSum, loss: float, logits: torch.Tensor, labels: list[int]) -> None:
    output = SimpleNamespace(loss=torch.tensor(loss), logits=logits)
    total.add(output, {"labels": torch.tensor(labels)})


def test_batches_weigh_as_many_labels_as_they_have() -> None:
    total = EvaluationSum()
    logits = torch.tensor([[0.0, 1.0]])
    add(total, 1.0, logits, [1])
    add(total, 4.0, logits.expand(3, 2), [1, 0, -100])
    result = total.result()
    assert result.num_labels == 3
    assert result.loss == pytest.approx((1.0 * 1 + 4.0 * 2) / 3)
    assert result.accuracy == pytest.approx(2 / 3)


def test_a_batch_without_labels_spoils_no_evaluation() -> None:
    total = EvaluationSum()
    logits = torch.tensor([[0.0, 1.0]])
    add(total, float("nan"), logits, [-100])
    add(total, 2.0, logits, [1])
    assert (total.result().loss, total.result().num_labels) == (2.0, 1)


def test_an_evaluation_without_labels_is_refused() -> None:
    with pytest.raises(UserError, match="no labelled position"):
        EvaluationSum().result()


def test_evaluation_builds_no_cache() -> None:
    model = tiny_blueprint("llama").reference
    caches = []
    model.register_forward_hook(lambda module, inputs, output: caches.append(output.past_key_values))
    evaluate_on_device(model, tiny_batches(1, "llama"), "cpu")
    assert caches == [None]


def test_evaluation_restores_the_training_mode() -> None:
    model = tiny_blueprint("opt").reference
    batches = tiny_batches(2, "opt")
    model.train()
    evaluation = evaluate_on_device(model, batches, "cpu")
    assert model.training
    with torch.no_grad():
        losses = [float(model.eval()(**batch.inputs).loss) for batch in batches]
    assert evaluation.loss == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert evaluation.num_labels == sum(
        int((batch.inputs["labels"][:, 1:] != -100).sum()) for batch in batches
    )
    assert isinstance(batches[0], Batch)


def test_a_parameter_that_a_family_makes_off_the_meta_device_is_filled_too() -> None:
    """DiffLlama and XLNet make some there whatever they are built on: those kept what memory held."""
    blueprint = tiny_blueprint("llama")
    name = "model.norm.weight"
    wrong = torch.full_like(blueprint.reference.get_parameter(name), 7.0)
    blueprint.model.model.norm.weight = torch.nn.Parameter(wrong)
    model = materialize(blueprint, "cpu", torch.float32)
    assert torch.equal(model.get_parameter(name), blueprint.reference.get_parameter(name))


def test_what_the_caller_has_placed_stays() -> None:
    blueprint = tiny_blueprint("llama")
    own = torch.nn.Parameter(torch.full_like(blueprint.reference.get_parameter("model.norm.weight"), 7.0))
    blueprint.model.model.norm.weight = own
    model = materialize(blueprint, "cpu", torch.float32, placed={"model.norm.weight"})
    assert model.get_parameter("model.norm.weight") is own
