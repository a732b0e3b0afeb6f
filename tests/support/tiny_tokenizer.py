"""A tokenizer of three words for tests that need a real one."""

from __future__ import annotations

import json
from pathlib import Path


def write_tokenizer(folder: Path, *, marks_second: bool = False) -> None:
    """A whitespace tokenizer with BERT's frame, as a model folder would hold it; maybe it numbers texts."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "film"]
    special = [
        {"id": index, "content": word, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for index, word in enumerate(words[:4])
    ]  # fmt: skip
    text = {"Sequence": {"id": "A", "type_id": 0}}
    frame = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ("[CLS]", "[SEP]")]
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "decoder": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [frame[0], text, frame[1]],
            "pair": [frame[0], text, frame[1], {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                token: {"id": token, "ids": [words.index(token)], "tokens": [token]}
                for token in ("[CLS]", "[SEP]")
            },
        },
        "model": {
            "type": "WordLevel", "unk_token": "[UNK]",
            "vocab": {word: index for index, word in enumerate(words)},
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    about: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]",
    }  # fmt: skip
    if marks_second:
        about["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
