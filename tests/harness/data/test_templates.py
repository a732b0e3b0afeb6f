"""Labelled rows behind a template, with a loss over the words of the classes alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from settings_given import given_settings
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from engines import load_engine
from engines.base import Context
from engines.errors import UserError
from harness.data.batches import make_data
from harness.data.records import LabelledExample
from harness.data.templates import check_template, rendered
from harness.models.blueprint import make_blueprint
from harness.models.candidates import candidates_of
from harness.models.configs import load_config
from harness.models.meta import configuration
from harness.models.tokenizers import load_tokenizer
from harness.records.job import Job, make_job
from harness.resolve import resolve_shape

SETTINGS: dict[str, dict[str, Any]] = {
    "native": {},
    "lsp": {"d": 16, "learn_steps": 5},
    "mezo": {},
    "zo2": {},
}
FORMS: dict[str, tuple[str, str, list[str]]] = {
    "words of one token": ("tiny-llama", "{text} It was ", ["t", "g"]),
    "words of several tokens": ("tiny-llama", "{text} It was", ["terrible", "great"]),
    "masked": ("tiny-roberta", "{text} It was:{mask}.", ["t", "g"]),
}


def job_of(folder: Path, form: str = "words of several tokens", **data: Any) -> Job:
    path = folder / "reviews.tsv"
    path.write_text("".join(f"film {i} was {'good' if i % 2 else 'dull'}\t{i % 2}\n" for i in range(24)))
    model, template, labels = FORMS[form]
    given = {"train": str(path), "template": template, "labels": labels}
    return make_job(
        {
            "model": {"name": model, "random_weights": True},
            "data": given | data, "batch_size": 3, "seq_len": 48, "dtype": "fp32", "eval_batches": 1,
            "warmup_steps": 0, "steps": 2,
        },
        "test job",
    )  # fmt: skip


def engine_on(job: Job, name: str) -> Any:
    context = Context(device="cpu", workload=job.workload, seed=0, total_steps=2)
    engine = load_engine(name)(given_settings(name, SETTINGS[name]).typed, context)
    shape = resolve_shape(job)
    engine.setup(make_blueprint(job, shape, make_data(job, shape).step_batches(0)[0]))
    return engine


def own_loss(job: Job) -> float:
    """Mean cross-entropy over the words of the classes, from the logits of transformers' own forward."""
    shape = resolve_shape(job)
    (batch,) = make_data(job, shape).evaluation
    model = AutoModelForCausalLM if shape.head == "causal_lm" else AutoModelForMaskedLM
    plain = model.from_config(configuration(load_config(job.model), job.model, shape.head, 0, False)).eval()
    blueprint = make_blueprint(job, shape)
    for name, parameter in plain.named_parameters():
        blueprint.fill(name, parameter.data)
    tokenizer = load_tokenizer(job.model, shape.vocabulary)
    words = candidates_of(job.data.template, job.data.labels, tokenizer, shape.head).words
    mask = batch.inputs["attention_mask"]
    with torch.no_grad():
        logits = plain(input_ids=batch.inputs["input_ids"], attention_mask=mask).logits
    scores, classes = [], batch.inputs["labels"].tolist()
    if shape.head == "masked_lm":
        places = [int((row == tokenizer.mask_id).nonzero()) for row in batch.inputs["input_ids"]]
        scores = [logits[row, place, [w for (w,) in words]] for row, place in enumerate(places)]
    elif len(words[0]) == 1:
        ends = (mask.sum(1) - 1).tolist()
        classes = [words.index((int(batch.inputs["input_ids"][row, end]),)) for row, end in enumerate(ends)]
        scores = [logits[row, end - 1, [w for (w,) in words]] for row, end in enumerate(ends)]
    else:
        for example in range(len(classes)):
            each = []
            for number, word in enumerate(words):
                row = example * len(words) + number
                end = int(mask[row].sum())
                ids = batch.inputs["input_ids"][row]
                assert tuple(ids[end - len(word) : end].tolist()) == word
                likelihoods = logits[row].log_softmax(-1)
                each.append(
                    torch.stack(
                        [likelihoods[end - i - 1, ids[end - i]] for i in range(1, len(word) + 1)]
                    ).mean()
                )
            scores.append(torch.stack(each))
    return float(torch.nn.functional.cross_entropy(torch.stack(scores), torch.tensor(classes)))


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("engine", list(SETTINGS))
def test_the_loss_is_over_the_words_in_every_engine(tmp_path: Path, engine: str, form: str) -> None:
    job = job_of(tmp_path, form)
    made = engine_on(job, engine)
    try:
        data = make_data(job, resolve_shape(job))
        evaluation = made.evaluate(data.evaluation)
        assert evaluation.loss == pytest.approx(own_loss(job), rel=1e-5)
        assert len(evaluation.predicted) == evaluation.num_labels == 2
        assert all(torch.isfinite(torch.tensor(made.step(data.step_batches(step)).loss)) for step in (0, 1))
        assert all(bool(tensor.isfinite().all()) for _, tensor in made.weights())
    finally:
        made.close()


@pytest.mark.parametrize("form", list(FORMS))
def test_streamed_blocks_learn_from_words_what_resident_ones_do(tmp_path: Path, form: str) -> None:
    job = job_of(tmp_path, form)
    data = make_data(job, resolve_shape(job))
    engines = [engine_on(job, name) for name in ("mezo", "zo2")]
    try:
        for step in range(3):
            one, other = (engine.step(data.step_batches(step)).loss for engine in engines)
            assert one == other
        for (name, one), (_, other) in zip(*(engine.weights() for engine in engines), strict=True):
            assert torch.equal(one, other), name
    finally:
        for engine in engines:
            engine.close()


def test_the_head_of_a_masked_model_learns(tmp_path: Path) -> None:
    """Its transform, before the words, is trained with the rest."""
    job = job_of(tmp_path, "masked")
    engine = engine_on(job, "native")
    try:
        before = {name: tensor.clone() for name, tensor in engine.weights()}
        engine.step(make_data(job, resolve_shape(job)).step_batches(0))
        moved = {name for name, tensor in engine.weights() if not torch.equal(tensor, before[name])}
    finally:
        engine.close()
    assert {"lm_head.dense.weight", "lm_head.layer_norm.weight", "lm_head.bias"} <= moved


def test_long_prompts_are_cut_where_the_word_is_not(tmp_path: Path) -> None:
    long = tmp_path / "long.tsv"
    long.write_text("".join(f"{'x' * 90} end {i}\t{i % 2}\n" for i in range(12)))
    for form in FORMS:
        job = job_of(tmp_path, form, train=str(long))
        shape = resolve_shape(job)
        tokenizer = load_tokenizer(job.model, shape.vocabulary)
        for batch in make_data(job, shape).evaluation:
            for row in batch.inputs["input_ids"]:
                text = tokenizer.decode(row.tolist())
                assert text.startswith("xxx")
                assert " end " in text
                assert " It was" in text


WIC = [
    {"word": "bank", "sentence1": "The bank pays.", "sentence2": f"River {i} has a bank.", "idx": i,
     "label": i % 3 == 0, "start1": 4, "end1": 8}
    for i in range(12)
]  # fmt: skip
COPA = [
    {"premise": f"Row {i} fell.", "choice1": "It was pushed.", "choice2": f"The floor {'x' * i} broke.",
     "question": "cause" if i % 2 else "effect", "idx": i, "label": i % 2}
    for i in range(12)
]  # fmt: skip


def json_job(folder: Path, records: list[dict[str, Any]], **data: Any) -> Job:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    job = job_of(folder, train=str(path), **data)
    return replace(job, seq_len=96)


def texts_of(job: Job) -> list[str]:
    shape = resolve_shape(job)
    tokenizer = load_tokenizer(job.model, shape.vocabulary)
    batches = [make_data(job, shape).step_batches(step)[0] for step in range(2)]
    return [
        tokenizer.decode(ids[: int(mask.sum())].tolist())
        for batch in batches
        for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
    ]


def test_a_template_names_columns_beside_the_texts(tmp_path: Path) -> None:
    said = {"text": "sentence1", "text2": "sentence2", "label": "label"}
    job = json_job(tmp_path, WIC, columns=said, template="{text}|{text2} {word}?\\n", labels=["N", "Y"])
    found = texts_of(job)
    assert all("The bank pays.|River " in each and " has a bank. bank?\n" in each for each in found)
    assert {each[-1] for each in found} <= {"N", "Y"}
    readings = make_data(job, resolve_shape(job)).readings
    assert "text2 = sentence2, word, label (false 0, true 1)" in readings[0]
    assert "start1" in readings[0].partition("passed over")[2]


def test_a_column_that_no_layout_knows_is_understood_where_the_template_names_it(tmp_path: Path) -> None:
    rows = [{"text": f"film {i}", "tone": "low", "label": i % 2} for i in range(8)]
    with pytest.raises(UserError, match="what tone means is not known"):
        texts_of(json_job(tmp_path, rows, labels=["N", "Y"], template="{text} It was"))
    assert " low " in texts_of(json_job(tmp_path, rows, labels=["N", "Y"], template="{text} {tone} "))[0]


@pytest.mark.parametrize("engine", ["native", "mezo"])
def test_each_row_has_words_of_its_own(tmp_path: Path, engine: str) -> None:
    said = {"text": "premise", "label": "label"}
    labels = ["{choice1}", "{choice2}"]
    job = json_job(tmp_path, COPA, columns=said, template="{text} What was the {question}?", labels=labels)
    shape = resolve_shape(job)
    tokenizer = load_tokenizer(job.model, shape.vocabulary)
    (batch, *_) = make_data(job, shape).evaluation
    rows = [tokenizer.decode(row[row != 0].tolist()) for row in batch.inputs["input_ids"]]
    assert all("? It was pushed." in each for each in rows[::2])
    assert all("? The floor " in each for each in rows[1::2])
    for row, words in zip(batch.inputs["input_ids"], batch.inputs["word_tokens"], strict=True):
        counted = words != -100
        assert torch.equal(words[counted], row[counted])
        assert tokenizer.decode(words[counted].tolist()).strip().startswith(("It was pushed.", "The floor "))
    made = engine_on(job, engine)
    try:
        evaluation = made.evaluate([batch])
        assert evaluation.num_labels == len(batch.inputs["labels"])
        assert evaluation.loss == pytest.approx(loss_of_words(job, batch), rel=1e-5)
    finally:
        made.close()


def loss_of_words(job: Job, batch: Any) -> float:
    """Cross-entropy over the mean log-likelihoods of each example's two words, by transformers' forward."""
    shape = resolve_shape(job)
    plain = AutoModelForCausalLM.from_config(
        configuration(load_config(job.model), job.model, shape.head, 0, False)
    ).eval()
    blueprint = make_blueprint(job, shape)
    for name, parameter in plain.named_parameters():
        blueprint.fill(name, parameter.data)
    ids, words = batch.inputs["input_ids"], batch.inputs["word_tokens"]
    with torch.no_grad():
        logs = plain(input_ids=ids, attention_mask=batch.inputs["attention_mask"]).logits.log_softmax(-1)
    scores = []
    for row in range(len(ids)):
        places = (words[row] != -100).nonzero().flatten().tolist()
        scores.append(torch.stack([logs[row, place - 1, ids[row, place]] for place in places]).mean())
    by_example = torch.stack(scores).view(-1, 2)
    return float(torch.nn.functional.cross_entropy(by_example, batch.inputs["labels"]))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"template": "{text} {wird}"}, "wird"),
        ({"template": "{text} {label}"}, "would tell the model the answer"),
        ({"template": "{text} {question.upper}"}, "is no name of a column"),
        ({"template": "{text} {0}"}, "is no name of a column"),
        ({"labels": ["{choice1}", "{choice3}"]}, "choice3"),
        ({"labels": ["{choice1}", "{choice1}"]}, "two words are the same to the model"),
    ],
)
def test_columns_that_cannot_be_are_refused_in_one_line(
    tmp_path: Path, data: dict[str, Any], why: str
) -> None:
    said = {"columns": {"text": "premise", "label": "label"}, "labels": ["{choice1}", "{choice2}"]}
    with pytest.raises(UserError, match=why) as refused:
        texts_of(json_job(tmp_path, COPA, **{"template": "{text}", **said, **data}))
    assert "\n" not in str(refused.value)


def test_a_mask_stands_for_no_words_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in COPA))
    labels = ["{choice1}", "{choice2}"]
    job = job_of(
        tmp_path, "masked", train=str(path), columns={"text": "premise", "label": "label"}, labels=labels
    )
    with pytest.raises(UserError, match="a mask stands for one token"):
        make_data(job, resolve_shape(job))


def test_a_prompt_is_the_template_with_the_texts_in_it() -> None:
    row = LabelledExample(text="A {man}.", second="He sleeps.", label=0, place="line 1")
    assert rendered("{text} So {text2}?\\n", row) == "A {man}. So He sleeps.?\n"


@pytest.mark.parametrize(
    ("template", "is_paired", "why"),
    [
        ("It was", False, "does not say where the text belongs"),
        ("{text} {label}", False, r"\{label\} is no text of a row"),
        ("{text}", True, "leaves out the second text"),
        ("{text} {text2}", False, "rows have one"),
        ("{text} {", False, "brace"),
        ("{text} {mask}", False, "a decoder has no mask"),
    ],
)
def test_a_template_that_does_not_suit_is_refused(template: str, is_paired: bool, why: str) -> None:
    with pytest.raises(UserError, match=why) as refused:
        check_template(template, "causal_lm", is_paired=is_paired)
    assert len(str(refused.value)) < 200


def test_words_that_cannot_be_told_apart_or_counted_are_refused(tmp_path: Path) -> None:
    shape = resolve_shape(job_of(tmp_path))
    with pytest.raises(UserError, match="are 3 words, the data has 2 classes"):
        make_data(job_of(tmp_path, labels=["a", "b", "c"]), shape)
    with pytest.raises(UserError, match="two words are the same to the model"):
        make_data(job_of(tmp_path, labels=["great", "great"]), shape)
    masked = job_of(tmp_path, "masked", labels=["bad", "good"])
    with pytest.raises(UserError, match="'bad' is 3 tokens, and a mask stands for one"):
        make_data(masked, resolve_shape(masked))
    nowhere = job_of(tmp_path, "masked", template="{text} It was")
    with pytest.raises(UserError, match="needs one place for the word"):
        make_data(nowhere, resolve_shape(nowhere))


@pytest.mark.parametrize(
    ("model", "data", "why"),
    [
        ("tiny-llama", {}, "is a decoder, which has no masked"),
        ("tiny-roberta", {"template": "", "labels": []}, "no template says where"),
        ("tiny-roberta", {"train": "random"}, "has no classes for words"),
    ],
)
def test_a_masked_head_is_refused_in_one_line(
    tmp_path: Path, model: str, data: dict[str, Any], why: str
) -> None:
    job = job_of(tmp_path, "masked", **data)
    with pytest.raises(UserError, match=why) as refused:
        resolve_shape(replace(job, model=replace(job.model, name=model, head="masked_lm")))
    assert len(str(refused.value)) < 200
