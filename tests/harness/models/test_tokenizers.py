from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import write_tokenizer

from engines.errors import UserError
from harness.models.configs import NAMED_SHAPES
from harness.models.tokenizers import (
    ByteTokenizer,
    HubTokenizer,
    check_knows_tokens,
    load_tokenizer,
    tokenizer_files,
)
from harness.records.job import ModelSource

IDS = st.none() | st.integers(-1, 400)


@given(text=st.text(), pad=IDS, begin=IDS, end=IDS, vocabulary=st.integers(259, 320))
def test_bytes_are_told_apart_and_never_special(
    text: str, pad: int | None, begin: int | None, end: int | None, vocabulary: int
) -> None:
    config = {"pad_token_id": pad, "bos_token_id": begin, "eos_token_id": end}
    tokenizer = ByteTokenizer(config, vocabulary)
    special = {tokenizer.pad_id, *tokenizer.prefix, tokenizer.end_id}
    assert len(set(tokenizer.byte_ids)) == 256
    assert not special & set(tokenizer.byte_ids)
    assert max(*special, *tokenizer.byte_ids) < vocabulary  # type: ignore[type-var]
    assert tokenizer.pad_id != tokenizer.end_id
    value_of = {index: value for value, index in enumerate(tokenizer.byte_ids)}
    assert bytes(value_of[index] for index in tokenizer.encode([text])[0]) == text.encode("utf-8")


def test_ids_of_the_configuration_are_kept() -> None:
    tokenizer = ByteTokenizer(NAMED_SHAPES["roberta-base"].config, 50265)
    assert (tokenizer.pad_id, tokenizer.prefix, tokenizer.suffix) == (1, (0,), (2,))
    several = ByteTokenizer({"eos_token_id": [7, 8]}, 259)
    assert several.end_id == 7


def test_small_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=r"258 is below the 259.*--data random"):
        ByteTokenizer({}, 258)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(dict(NAMED_SHAPES["tiny-roberta"].config)))
    return tmp_path


def test_a_folder_with_a_tokenizer_uses_it(folder: Path) -> None:
    write_tokenizer(folder)
    source = ModelSource(name=str(folder), random_weights=True)
    tokenizer = load_tokenizer(source, 320)
    assert isinstance(tokenizer, HubTokenizer)
    assert tokenizer.encode(["a film b", "b"]) == [[4, 6, 5], [5]]
    assert (tokenizer.prefix, tokenizer.suffix, tokenizer.pad_id) == ((2,), (3,), 0)
    assert [path.name for path in tokenizer_files(source)] == ["tokenizer.json", "tokenizer_config.json"]
    assert (tokenizer.between, tokenizer.marks_second) == ((3,), False)  # RoBERTa has one kind of token
    encoded = tokenizer.encode_places(["a  film b"])
    assert [(each.ids, each.places) for each in encoded] == [([4, 6, 5], [(0, 1), (3, 7), (8, 9)])]
    with pytest.raises(UserError, match="has 7 tokens, the model's vocabulary has 5"):
        load_tokenizer(source, 5)


def test_a_model_that_tells_two_texts_apart_is_told(folder: Path) -> None:
    write_tokenizer(folder, marks_second=True)
    assert not load_tokenizer(ModelSource(name=str(folder), random_weights=True), 320).marks_second
    config = {**NAMED_SHAPES["tiny-roberta"].config, "model_type": "bert", "type_vocab_size": 2}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(ModelSource(name=str(folder), random_weights=True), 320).marks_second


@given(text=st.text(max_size=20))
def test_bytes_know_their_characters(text: str) -> None:
    tokenizer = ByteTokenizer({}, 259)
    (encoded,) = tokenizer.encode_places([text])
    assert [encoded.ids] == tokenizer.encode([text])
    for index, character in enumerate(text):
        own = [i for i, place in zip(encoded.ids, encoded.places, strict=True) if place == (index, index + 1)]
        assert [own] == tokenizer.encode([character])


def test_a_folder_without_one_uses_bytes(folder: Path) -> None:
    source = ModelSource(name=str(folder), random_weights=True)
    assert isinstance(load_tokenizer(source, 320), ByteTokenizer)
    assert tokenizer_files(source) == []


def test_a_tokenizer_that_panics_when_it_is_used_is_one_line(folder: Path) -> None:
    """Rust's panics are no `Exception`."""
    write_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="tokenizer cannot be used"):
        load_tokenizer(ModelSource(name=str(folder), random_weights=True), 320)


def test_a_broken_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="tokenizer cannot be used"):
        load_tokenizer(ModelSource(name=str(folder), random_weights=True), 320)


@pytest.mark.parametrize(
    ("vocabulary", "files", "random_weights", "refused"),
    [
        (32_000, (), False, True),
        (32_000, (), True, False),
        (32_000, ("tokenizer.json",), False, False),
        (259, (), False, False),
    ],
)
def test_trained_weights_without_a_tokenizer_learn_no_bytes(
    vocabulary: int, files: tuple[str, ...], random_weights: bool, refused: bool, tmp_path: Path
) -> None:
    for name in ("config.json", *files):
        (tmp_path / name).write_text("{}")
    source = ModelSource(name=str(tmp_path), random_weights=random_weights)
    with pytest.raises(UserError, match="has no tokenizer") if refused else nullcontext():
        check_knows_tokens(source, vocabulary)
