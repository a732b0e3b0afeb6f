"""Labelled rows behind a template, with a loss over the words of the classes alone."""

from __future__ import annotations

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
