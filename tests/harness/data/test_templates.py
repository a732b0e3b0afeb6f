"""Labelled rows behind a template, with a loss over the words of the classes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from settings_given import given_settings

from engines import load_engine
from engines.base import Context
from engines.errors import UserError
from harness.data.batches import make_data
from harness.data.records import LabelledExample
from harness.data.templates import check_template, rendered
from harness.models.blueprint import make_blueprint
from harness.models.candidates import candidates_of
from harness.models.tokenizers import load_tokenizer
from harness.records.job import Job, make_job
from harness.resolve import resolve_shape

SETTINGS: dict[str, dict[str, Any]] = {
    "native": {},
    "lsp": {"d": 16, "learn_steps": 5},
    "mezo": {},
    "zo2": {},
}


def job_of(folder: Path, **data: Any) -> Job:
    path = folder / "reviews.tsv"
    path.write_text("".join(f"film {i} was {'good' if i % 2 else 'dull'}\t{i % 2}\n" for i in range(24)))
    given = {"train": str(path), "template": "{text} It was", "labels": ["terrible", "great"]}
    return make_job(
        {
            "model": {"name": "tiny-llama", "random_weights": True},
            "data": given | data, "batch_size": 3, "seq_len": 48, "dtype": "fp32", "eval_batches": 1,
            "warmup_steps": 0, "steps": 2,
        },
        "test job",
    )  # fmt: skip


def engine_on(job: Job, name: str) -> Any:
    context = Context(device="cpu", workload=job.workload, seed=0, total_steps=2)
    engine = load_engine(name)(given_settings(name, SETTINGS[name]).typed, context)
    engine.setup(make_blueprint(job, resolve_shape(job)))
    return engine


def plain_losses(job: Job) -> torch.Tensor:
    """Mean cross-entropy over the two words at each row's last prompt token, by the model's own logits."""
    shape = resolve_shape(job)
    plain = make_job({"model": {"name": "tiny-llama", "random_weights": True}}, "plain job")
    blueprint = make_blueprint(plain, shape)
    model = blueprint.model.to_empty(device="cpu").float()
    for name, parameter in model.named_parameters():
        blueprint.fill(name, parameter.data)
    for name, buffer in make_blueprint(plain, shape).model.named_buffers():
        model.get_buffer(name).copy_(buffer)
    tokenizer = load_tokenizer(job.model, shape.vocabulary)
    tokens = candidates_of(job.data.template, job.data.labels, tokenizer).tokens
    losses = []
    for batch in make_data(job, shape).evaluation:
        inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = model(**inputs).logits
        for row, labels in enumerate(batch.inputs["labels"]):
            (place,) = (labels != -100).nonzero().flatten().tolist()
            scores = logits[row, place - 1, list(tokens)]
            losses.append(
                torch.nn.functional.cross_entropy(scores, torch.tensor(tokens.index(labels[place])))
            )
    return torch.stack(losses)


@pytest.mark.parametrize("engine", list(SETTINGS))
def test_the_loss_is_over_the_candidates_in_every_engine(tmp_path: Path, engine: str) -> None:
    job = job_of(tmp_path)
    made = engine_on(job, engine)
    try:
        data = make_data(job, resolve_shape(job))
        evaluation = made.evaluate(data.evaluation)
        assert evaluation.loss == pytest.approx(float(plain_losses(job).mean()), rel=1e-5)
        assert len(evaluation.predicted) == evaluation.num_labels == 2
        assert all(torch.isfinite(torch.tensor(made.step(data.step_batches(step)).loss)) for step in (0, 1))
        assert all(bool(tensor.isfinite().all()) for _, tensor in made.weights())
    finally:
        made.close()


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
    ],
)
def test_a_template_that_does_not_suit_is_refused(template: str, is_paired: bool, why: str) -> None:
    with pytest.raises(UserError, match=why) as refused:
        check_template(template, is_paired=is_paired)
    assert len(str(refused.value)) < 200


def test_words_that_cannot_be_told_apart_or_counted_are_refused(tmp_path: Path) -> None:
    shape = resolve_shape(job_of(tmp_path))
    with pytest.raises(UserError, match="are 3 words, the data has 2 classes"):
        make_data(job_of(tmp_path, labels=["a", "b", "c"]), shape)
    with pytest.raises(UserError, match="not every word begins with a token of its own"):
        make_data(job_of(tmp_path, labels=["great", "great"]), shape)
