"""From text to token ids: the model's own tokenizer where it has one, else bytes. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engines.errors import UserError
from engines.files.reading import exists
from harness.models.configs import NAMED_SHAPES, load_config, local_folder
from harness.records.job import ModelSource

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja",
)  # fmt: skip
_VOCABULARY_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip

NUM_BYTES = 256


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text in tokens."""

    ids: list[int]
    places: list[tuple[int, int]]
    """Of each token, its characters in the text, from first to before last."""


class Tokenizer(Protocol):
    """What data needs of a tokenizer."""

    name: str
    pad_id: int
    end_id: int | None
    """Ends an answer."""
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    """Special tokens that the model expects around a whole sequence."""
    between: tuple[int, ...]
    """What stands between two texts: special tokens, or a line break where the model has none for it."""
    marks_second: bool
    """The model takes which tokens are of the second text (`token_type_ids`)."""

    mask_id: int | None
    """Stands for a word that is left out."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""

    def show(self, ids: Sequence[int]) -> list[str]:
        """Each token by itself as a person would read it, special ones by their name."""

    def encode_places(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids of each text, without special tokens, with the characters that each token stands for. Raises
        `UserError` if the tokenizer does not know these."""

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, opens_answer: bool) -> str | None:
        """Messages with `role` and `content` as the model's chat template writes them, special tokens
        included, at the end maybe the opening of an answer; `None` where there is no template. Raises
        `ValueError` if the template refuses them."""


BYTES_VOCABULARY = 1024
"""A model of bytes has 256 tokens, some of its own, and what pads them to a round number."""


class ByteTokenizer:
    """UTF-8 bytes, one token each, for models that come without a tokenizer.

    Padding, begin and end keep the ids that the model's configuration gives them (RoBERTa's positions
    depend on its padding id); bytes take the lowest ids left, so a vocabulary of 259 is enough.
    """

    name = "bytes"

    def __init__(self, config: Mapping[str, Any], vocabulary: int) -> None:
        """Raises `UserError` for a vocabulary that does not hold 256 bytes and 3 special tokens."""
        if vocabulary < NUM_BYTES + 3:
            raise UserError(
                "byte tokenizer",
                f"the model's vocabulary of {vocabulary} is below the {NUM_BYTES + 3} that bytes need",
                "use a model with a tokenizer or a larger vocabulary, or --data random",
            )
        given = {key: _special(config, key, vocabulary) for key in ("pad", "bos", "eos")}
        used = {index for index in given.values() if index is not None}
        free = iter(index for index in range(vocabulary) if index not in used)
        # Padding is never the end token: a classifying decoder finds its last token by it.
        pad, begin = given["pad"], given["bos"]
        self.pad_id = next(free) if pad is None or pad == given["eos"] else pad
        begin = next(free) if begin is None else begin
        self.end_id: int | None = next(free) if given["eos"] is None else given["eos"]
        self.byte_ids = tuple(next(free) for _ in range(NUM_BYTES))
        """Id of each byte value."""
        self.mask_id: int | None = next(free, None)
        self.prefix: tuple[int, ...] = (begin,)
        encoder = config.get("model_type") in ("bert", "roberta")
        self.suffix: tuple[int, ...] = (self.end_id,) if encoder and self.end_id is not None else ()
        self.between: tuple[int, ...] = self.suffix or (self.byte_ids[ord("\n")],)
        self.marks_second = False

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self.byte_ids[byte] for byte in text.encode("utf-8")] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        values = {index: value for value, index in enumerate(self.byte_ids)}
        return bytes(values[index] for index in ids if index in values).decode("utf-8", errors="replace")

    def show(self, ids: Sequence[int]) -> list[str]:
        values = {index: value for value, index in enumerate(self.byte_ids)}
        return [
            f"<{index}>" if index not in values
            else chr(values[index]) if values[index] < 128 else f"\\x{values[index]:02x}"
            for index in ids
        ]  # fmt: skip

    def encode_places(self, texts: Sequence[str]) -> list[Encoded]:
        sizes = [[len(character.encode("utf-8")) for character in text] for text in texts]
        places = [[(i, i + 1) for i, size in enumerate(each) for _ in range(size)] for each in sizes]
        return [Encoded(ids, each) for ids, each in zip(self.encode(texts), places, strict=True)]

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, opens_answer: bool) -> str | None:
        return None


class HubTokenizer:
    """A transformers tokenizer, told apart from its special tokens."""

    def __init__(self, tokenizer: Any, config: Mapping[str, Any], vocabulary: int) -> None:
        """Raises `UserError` if the tokenizer has more tokens than the model, or no token fit for padding."""
        self._tokenizer = tokenizer
        self.name = type(tokenizer).__name__
        if len(tokenizer) > vocabulary:
            raise UserError(
                f"tokenizer {self.name}",
                f"has {len(tokenizer)} tokens, the model's vocabulary has {vocabulary}",
                "use the tokenizer that belongs to the model",
            )
        end = tokenizer.eos_token_id
        self.end_id: int | None = _special(config, "eos", vocabulary) if end is None else int(end)
        candidates = (tokenizer.pad_token_id, _special(config, "pad", vocabulary), self.end_id)
        pad = next((index for index in candidates if index is not None), None)
        if pad is None:
            raise UserError(
                f"tokenizer {self.name}",
                "has neither a padding nor an end token",
                "set pad_token in tokenizer_config.json",
            )
        self.pad_id = int(pad)
        mask = tokenizer.mask_token_id
        self.mask_id: int | None = None if mask is None else int(mask)
        probe = "a"
        bare = self.encode([probe])[0]
        full = [int(index) for index in tokenizer(probe, verbose=False)["input_ids"]]
        start = _place(bare, full)
        self.prefix = tuple(full[:start])
        self.suffix = tuple(full[start + len(bare) :])
        pair = tokenizer(probe, probe, verbose=False)
        rest = [int(index) for index in pair["input_ids"]][start + len(bare) :]
        self.between = tuple(rest[: _place(bare, rest)] or self.encode(["\n"])[0])
        # The tokenizer may number the texts for a model that does not take the numbers.
        self.marks_second = config.get("type_vocab_size", 1) > 1 and 1 in pair.get("token_type_ids", ())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        with _one_line(f"tokenizer {self.name}"):
            encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [list(ids) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        with _one_line(f"tokenizer {self.name}"):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def show(self, ids: Sequence[int]) -> list[str]:
        with _one_line(f"tokenizer {self.name}"):
            return [str(self._tokenizer.decode([index], skip_special_tokens=False)) for index in ids]

    def encode_places(self, texts: Sequence[str]) -> list[Encoded]:
        if not texts:
            return []
        if not self._tokenizer.is_fast:
            raise UserError(
                f"tokenizer {self.name}",
                "does not say which characters a token stands for, as answers in a text need",
                "use a model with a tokenizer.json",
            )
        with _one_line(f"tokenizer {self.name}"):
            encoded = self._tokenizer(
                list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [Encoded(list(ids), [(first, last) for first, last in places]) for ids, places in pairs]

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, opens_answer: bool) -> str | None:
        if not self._tokenizer.chat_template:
            return None
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=opens_answer
            )
        except Exception as error:  # a template is a program, which may raise anything
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
        return str(rendered)


def _place(ids: Sequence[int], within: Sequence[int]) -> int:
    """Where `ids` begin in `within`, which holds them."""
    return next(i for i in range(len(within)) if within[i : i + len(ids)] == ids)


def _special(config: Mapping[str, Any], which: str, vocabulary: int) -> int | None:
    """An id from the configuration if it lies in the vocabulary; the first of several."""
    index = config.get(f"{which}_token_id")
    if isinstance(index, list):
        index = index[0] if index else None
    return int(index) if isinstance(index, int) and 0 <= index < vocabulary else None


def load_tokenizer(source: ModelSource, vocabulary: int) -> Tokenizer:
    """The tokenizer of a local folder or hub model; bytes where there is none.

    A hub model with its published weights must have one: bytes would make no sense to it.
    Raises `UserError` if it cannot be loaded.
    """
    config = load_config(source)
    folder = local_folder(source)
    if source.name in NAMED_SHAPES or _has_none(source):
        return ByteTokenizer(config, vocabulary)
    from transformers import AutoTokenizer

    try:
        with _one_line(f"model '{source.name}'"):
            tokenizer = AutoTokenizer.from_pretrained(str(folder or source.name), trust_remote_code=False)
    except UserError:
        if folder is None and source.random_weights:
            return ByteTokenizer(config, vocabulary)
        raise
    with _one_line(f"model '{source.name}'"):
        return HubTokenizer(tokenizer, config, vocabulary)


def _has_none(source: ModelSource) -> bool:
    folder = local_folder(source)
    return folder is not None and not any(exists(folder / name) for name in _VOCABULARY_FILES)


def check_knows_tokens(source: ModelSource, vocabulary: int) -> None:
    """Raises `UserError` for a folder of trained weights without a tokenizer, unless `vocabulary` is one of
    bytes: the ids of its tokens would mean something else."""
    if source.random_weights or vocabulary <= BYTES_VOCABULARY or not _has_none(source):
        return
    raise UserError(
        f"model '{source.name}'",
        f"has no tokenizer, so text would be bytes to a vocabulary of {vocabulary:,} tokens",
        "put the tokenizer's files (tokenizer.json) into its folder",
    )


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Whatever a file makes of the libraries as a `UserError` about `what`, also panics of their Rust, which
    are no `Exception`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        package = re.search(r"\b(sentencepiece|tiktoken|protobuf)\b", str(error))
        raise UserError(
            what,
            f"its tokenizer cannot be used ({f'it needs {package[1]}' if package else 'broken files'})",
            f"pip install {package[1]}" if package else "restore its files, or download the model again",
        ) from None


def tokenizer_files(source: ModelSource) -> list[Path]:
    """The tokenizer's files of a local folder or of the hub cache; none for a named shape."""
    if source.name in NAMED_SHAPES:
        return []
    folder = local_folder(source)
    if folder is not None:
        return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    from huggingface_hub import try_to_load_from_cache

    cached = (try_to_load_from_cache(source.name, name) for name in TOKENIZER_FILES)
    return [Path(path) for path in cached if isinstance(path, str)]
