"""From a job to the shape of its model, with the head that its data asks for. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from engines import engine_of
from engines.errors import UserError
from engines.files.reading import exists, expanded, is_folder
from engines.settings.zeroth_order import check_base, check_blocks, check_examples
from engines.shapes import Head, ModelShape
from harness.data.examples import examples_of
from harness.data.reading.squad import QUESTION_KEYS
from harness.data.records import Examples
from harness.models.closed_forms import CLOSED_FORMS, is_counted_in_closed_form, shape_of_config
from harness.models.configs import DEFAULT_LABELS, ENCODERS, NAMED_SHAPES, load_config
from harness.records.job import Job, ModelSource

ENDS_OF_AN_ANSWER = 2
"""Outputs of a question-answering head for each token: is the answer's first, is its last."""


def resolve_shape(job: Job) -> ModelShape:
    """The shape of a job's model, with the head and the number of labels that its data asks for.

    Raises `UserError` for an unknown model, one whose weights are not there, data that does not suit it
    or is faulty, a sequence longer than the model allows, and settings that make no sense or name
    more blocks than it has.
    """
    config = load_config(job.model)
    family = str(config["model_type"])
    examples = examples_of(job, config)
    head, num_labels = _resolve_head(job, family, examples)
    try:
        if is_counted_in_closed_form(config):
            shape = shape_of_config(
                config, name=job.model.name, head=head, num_labels=num_labels, untied=job.model.untied
            )
        else:
            from harness.models.counted_shape import shape_from_meta

            shape = shape_from_meta(
                config, name=job.model.name, head=head, num_labels=num_labels, untied=job.model.untied
            )
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        raise UserError(
            f"model '{job.model.name}'",
            "its configuration is malformed: a size is no number, or sizes do not fit together",
            "correct config.json",
        ) from None
    if job.seq_len > shape.max_seq_len:
        raise UserError(
            f"--seq-len {job.seq_len}",
            f"{job.model.name} takes at most {shape.max_seq_len} tokens",
            f"use --seq-len {shape.max_seq_len} or less",
        )
    for method in job.settings:
        engine, given = engine_of(method), job.settings_of(method)
        check_blocks(engine, given.typed, job.model.name, shape.num_blocks)
        check_base(engine, given.typed, job.dtype)
        check_examples(engine, given.typed, job.workload)
    return replace(shape, label_names=examples.label_names) if head == "classification" else shape


def longest_sequence(source: ModelSource) -> int | None:
    """Tokens that a named shape or a model in a folder takes at most; `None`: it is neither, its family has
    no closed form, or it is malformed, of which `resolve_shape` tells.

    Raises `UserError` as `load_config` does.
    """
    if source.name not in NAMED_SHAPES:
        path = expanded(source.name)
        if not is_folder(path) or not exists(path / "config.json"):
            return None
    config = load_config(replace(source, random_weights=True))  # of its weights others ask
    if config["model_type"] not in CLOSED_FORMS:
        return None
    try:
        shape = shape_of_config(
            config, name=source.name, head="classification", num_labels=DEFAULT_LABELS, untied=False
        )
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return None
    return shape.max_seq_len if shape.max_seq_len > 0 else None


def _resolve_head(job: Job, family: str, examples: Examples) -> tuple[Head, int]:
    """Head, and its outputs (0 for a causal language model)."""
    encoder = _is_encoder(family)
    if job.model.head != "auto":
        head: Head = job.model.head
    elif examples.kind == "questions":
        head = "question_answering"
    elif encoder:
        head = "masked_lm" if job.data.template else "classification"
    else:
        head = "causal_lm"
    if head == "question_answering":
        if examples.kind not in ("questions", "builtin", "random"):
            raise UserError(
                f"data '{job.data.train}'",
                f"holds {examples.kind} data without answers in a text, and {job.model.name} is to find them",
                f"give records {QUESTION_KEYS}, or another --head",
            )
        return head, ENDS_OF_AN_ANSWER
    if examples.kind == "questions":
        raise UserError(
            f"data '{job.data.train}'",
            f"holds questions with answers in a text, which --head {head} does not learn",
            "use --head question_answering",
        )
    if head == "causal_lm":
        if encoder:
            raise UserError(
                f"model '{job.model.name}'",
                "is an encoder, which has no causal language model head",
                "use --head classification or a decoder",
            )
        if examples.is_regression:
            raise UserError(
                f"data '{job.data.train}'",
                "has numbers to be predicted, which a causal language model has no head for",
                "use --head classification, or classes for labels",
            )
        return head, 0
    if head == "masked_lm":
        _check_masked(job, encoder, examples)
        return head, 0
    if examples.kind in ("text", "instructions", "chats"):
        raise UserError(
            f"data '{job.data.train}'",
            f"holds {examples.kind} without class labels, and {job.model.name} is to classify",
            "give labelled data, or a decoder with a causal language model head",
        )
    return head, examples.num_labels or DEFAULT_LABELS


def _check_masked(job: Job, encoder: bool, examples: Examples) -> None:
    """Raises `UserError` for what no word at a mask can stand for."""
    if not encoder:
        raise UserError(
            f"model '{job.model.name}'",
            "is a decoder, which has no masked language model head",
            "leave out --head: a decoder takes a template without {mask}",
        )
    if not job.data.template:
        raise UserError(
            "--head masked_lm",
            "fills in words that stand for classes, and no template says where",
            "such as --template '{text} It was {mask}.' --labels terrible,great",
        )
    if not examples.labelled or examples.is_regression:
        raise UserError(
            f"data '{job.data.train}'", "has no classes for words to stand for", "give labelled data"
        )


def _is_encoder(family: str) -> bool:
    if family in CLOSED_FORMS:
        return family in ENCODERS
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return family in MODEL_FOR_MASKED_LM_MAPPING_NAMES
