"""transformers' class for each head."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from engines.shapes import Head

_CLASSES: dict[Head, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
    "question_answering": AutoModelForQuestionAnswering,
}


def auto_class(head: Head) -> Any:
    """The class whose `from_config` and `from_pretrained` make a model with this head."""
    return _CLASSES[head]
