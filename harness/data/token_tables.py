"""Examples as token sequences of differing length, one table for each kind of data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from engines.base import Batch
from engines.errors import UserError
from engines.model.label_words import MASK_AT, WORDS
from harness.data.builtin import builtin_questions
from harness.data.records import Examples, InstructionExample, LabelledExample, QuestionExample
from harness.data.squad_windows import windows
from harness.models.tokenizers import Tokenizer

UNLABELLED = -100
"""Label of a position that takes no part in the loss."""


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """Token sequences of differing length, end to end in one tensor."""

    tokens: Tensor
    """int32, all sequences one after the other."""
    starts: Tensor
    """int64, (rows + 1,): where each begins, and the end of the last."""
    first_labelled: Tensor | None
    """int64, (rows,): causal language model, the position in the row where labels begin."""
    unlabelled: Tensor | None = None
    """bool, as `tokens`: positions after `first_labelled` that have no label all the same."""
    classes: Tensor | None
    """int64, (rows,): classification, the label of each row; float32 where a number is to be predicted."""
    answers: Tensor | None = None
    """int64, (rows, 2): question answering, positions of the answer's first and last token."""
    second: Tensor | None = None
    """int64, (rows,): position where the second of two texts begins, if the model is told."""
    masks: Tensor | None = None
    """int64, (rows,): position of the mask that stands for the word of a class."""
    choices: int = 1
    """Sequences of each row, one for each class, one after the other: its word is what is labelled in it."""
    class_tokens: Tensor | None = None
    """(classes,) int64, where each label is one token that says a class: those."""
    packed: bool = False
    """All rows fill the sequence length: no padding, no mask."""
    cut: int = 0
    """Examples that were longer than the sequence length."""

    def __len__(self) -> int:
        return (int(self.starts.numel()) - 1) // self.choices

    @property
    def lengths(self) -> Tensor:
        """(rows,) int64: tokens of each, of its longest sequence."""
        return self.starts.diff().view(-1, self.choices).amax(1)

    def select(self, rows: Sequence[int]) -> TokenTable:
        """Those rows, in this order; what was cut is not told again."""
        chosen = torch.tensor(rows, dtype=torch.int64)
        sequences = (chosen.unsqueeze(1) * self.choices + torch.arange(self.choices)).flatten()
        lengths = self.starts.diff()[sequences]
        places = [torch.arange(int(self.starts[each]), int(self.starts[each + 1])) for each in sequences]
        tokens = torch.cat(places) if places else sequences

        def of_rows(field: Tensor | None, index: Tensor) -> Tensor | None:
            return None if field is None else field[index]

        return replace(
            self,
            tokens=self.tokens[tokens],
            starts=torch.cat((lengths.new_zeros(1), lengths.cumsum(0))),
            first_labelled=of_rows(self.first_labelled, sequences),
            unlabelled=of_rows(self.unlabelled, tokens),
            classes=of_rows(self.classes, chosen),
            answers=of_rows(self.answers, chosen),
            second=of_rows(self.second, chosen),
            masks=of_rows(self.masks, chosen),
            # Parts that are saved to one file must not share memory.
            class_tokens=None if self.class_tokens is None else self.class_tokens.clone(),
            cut=0,
        )

    def batch(self, rows: Sequence[int], seq_len: int, pad_id: int) -> Batch:
        """Rows padded on the right to `seq_len`."""
        if self.choices > 1:
            return self._batch_of_choices(rows, seq_len, pad_id)
        input_ids = torch.full((len(rows), seq_len), pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), seq_len), dtype=torch.int64)
        labels = torch.full((len(rows), seq_len), UNLABELLED, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids = self.tokens[int(self.starts[row]) : int(self.starts[row + 1])].to(torch.int64)
            input_ids[place, : len(ids)] = ids
            mask[place, : len(ids)] = 1
            if self.first_labelled is not None:
                first = int(self.first_labelled[row])
                labels[place, first : len(ids)] = ids[first:]
            if self.unlabelled is not None:
                apart = self.unlabelled[int(self.starts[row]) : int(self.starts[row + 1])]
                labels[place, : len(ids)][apart] = UNLABELLED
        chosen = torch.tensor(rows)
        if self.answers is not None:
            starts, ends = self.answers[chosen].unbind(1)
            inputs = {"input_ids": input_ids, "start_positions": starts, "end_positions": ends}
        else:
            labels = labels if self.classes is None else self.classes[chosen]
            inputs = {"input_ids": input_ids, "labels": labels}
        if self.second is not None:
            places = torch.arange(seq_len).expand(len(rows), seq_len)
            inputs["token_type_ids"] = (places >= self.second[chosen].unsqueeze(1)).long() * mask
        if self.masks is not None:
            inputs[MASK_AT] = self.masks[chosen]
        inputs = inputs if self.packed else {**inputs, "attention_mask": mask}
        return Batch(inputs=inputs, class_tokens=self.class_tokens)

    def _batch_of_choices(self, rows: Sequence[int], seq_len: int, pad_id: int) -> Batch:
        assert self.classes is not None
        each = replace(self, classes=None, choices=1)
        sequences = [row * self.choices + choice for row in rows for choice in range(self.choices)]
        inputs = dict(each.batch(sequences, seq_len, pad_id).inputs)
        words = inputs.pop("labels")
        return Batch(inputs={**inputs, WORDS: words, "labels": self.classes[torch.tensor(rows)]})


def row_keys(table: TokenTable) -> list[bytes]:
    """What tells the rows of a table apart: their tokens."""
    values = table.tokens.numpy()
    return [values[first:last].tobytes() for first, last in pairwise(table.starts[:: table.choices].tolist())]


def rows_in(table: TokenTable, other: TokenTable) -> list[int]:
    """Rows of `table` whose tokens are those of some row of `other`."""
    there = set(row_keys(other))
    return [row for row, key in enumerate(row_keys(table)) if key in there]


def table_of(
    sequences: Sequence[Sequence[int]],
    *,
    first_labelled: Sequence[int] | None = None,
    classes: Sequence[int] | Sequence[float] | None = None,
    unlabelled: Sequence[bool] | None = None,
    cut: int,
) -> TokenTable:
    lengths = torch.tensor([0, *(len(ids) for ids in sequences)], dtype=torch.int64)
    return TokenTable(
        tokens=torch.tensor([index for ids in sequences for index in ids], dtype=torch.int32),
        starts=lengths.cumsum(0),
        first_labelled=None if first_labelled is None else torch.tensor(first_labelled, dtype=torch.int64),
        unlabelled=None if unlabelled is None else torch.tensor(unlabelled, dtype=torch.bool),
        classes=None if classes is None else torch.tensor(classes),
        cut=cut,
    )


def class_table(rows: Sequence[LabelledExample], tokenizer: Tokenizer, seq_len: int) -> TokenTable:
    """One or two texts between the model's special tokens, cut at their ends where they are too long: of two
    the longer one first. Raises `UserError` where `seq_len` leaves no room for text."""
    paired = any(row.second is not None for row in rows)
    between = tokenizer.between if paired else ()
    special = len(tokenizer.prefix) + len(between) + len(tokenizer.suffix)
    max_tokens = seq_len - special
    least = 2 if paired else 1
    if max_tokens < least:
        raise UserError(
            f"--seq-len {seq_len}",
            "leaves no room for text beside the special tokens",
            f"use --seq-len {special + least} or more",
        )
    firsts = tokenizer.encode([row.text for row in rows])
    seconds = tokenizer.encode([row.second or "" for row in rows]) if paired else [[] for _ in rows]
    sequences, places, cut = [], [], 0
    for first, second in zip(firsts, seconds, strict=True):
        kept_first, kept_second = shares(len(first), len(second), max_tokens)
        head = [*tokenizer.prefix, *first[:kept_first], *between]
        sequences.append([*head, *second[:kept_second], *tokenizer.suffix])
        places.append(len(head))
        cut += kept_first < len(first) or kept_second < len(second)
    targets = [row.target for row in rows if row.target is not None]
    table = table_of(sequences, classes=targets or [row.label for row in rows], cut=cut)
    marked = paired and tokenizer.marks_second
    return replace(table, second=torch.tensor(places, dtype=torch.int64) if marked else None)


def shares(first: int, second: int, max_tokens: int) -> tuple[int, int]:
    """How much of two lengths to keep so that both fit into `max_tokens`, taken from the longer one first."""
    half = max_tokens // 2
    if first + second <= max_tokens:
        return first, second
    if first <= half:
        return first, max_tokens - first
    if second <= max_tokens - half:
        return max_tokens - second, second
    return half, max_tokens - half


def questions_of(examples: Examples) -> tuple[Sequence[QuestionExample], Sequence[QuestionExample]]:
    if examples.kind == "builtin":
        return builtin_questions(examples.labelled), builtin_questions(examples.labelled_held_out)
    return examples.questions, examples.questions_held_out


def question_table(rows: Sequence[QuestionExample], tokenizer: Tokenizer, seq_len: int) -> TokenTable:
    """Windows of question and text of at most `seq_len` tokens, with the answer's first and last token."""
    found, cut = windows(rows, tokenizer, seq_len)
    table = table_of([window.tokens for window in found], cut=cut)
    return replace(
        table,
        answers=torch.tensor([(window.start, window.end) for window in found], dtype=torch.int64),
        second=torch.tensor([window.second for window in found]) if tokenizer.marks_second else None,
    )


def answer_table(
    rows: Sequence[LabelledExample], num_labels: int, names: Sequence[str], tokenizer: Tokenizer, seq_len: int
) -> TokenTable:
    """Classification as a causal language model does it: the text, then a word for its class. `names` are
    those that the data has for classes, if it has any."""
    shared, answers = _class_answers(num_labels, names, tokenizer)
    texts = [row.text if row.second is None else f"{row.text}\n{row.second}" for row in rows]
    encoded = tokenizer.encode([f"{text}\nThis is" for text in texts])
    table = prompt_table(
        [[*ids, *shared] for ids in encoded], [answers[row.label] for row in rows], tokenizer, seq_len
    )
    of_one_token = all(len(ids) == 1 for ids in answers)
    return replace(table, class_tokens=torch.tensor(answers).flatten()) if of_one_token else table


def _class_answers(
    num_labels: int, names: Sequence[str], tokenizer: Tokenizer
) -> tuple[list[int], list[list[int]]]:
    """(tokens that all class words begin with, the tokens of each that follow and are labelled).

    Classes are called what the data calls them, where these are words and the first differing token tells
    them apart; else two are called bad and good, and more go by their number. Where the first differing token
    tells the classes apart it is the only labelled one, so that accuracy is that of the classification.
    """
    own = [f" {name}" for name in names if any(letter.isalpha() for letter in name)]
    usual = [" bad", " good"] if num_labels == 2 else [f" {label}" for label in range(num_labels)]
    for words in (own, usual):
        if len(words) != num_labels:
            continue
        encoded = tokenizer.encode(words)
        same = 0
        while all(len(ids) > same + 1 and ids[same] == encoded[0][same] for ids in encoded):
            same += 1
        if len({ids[same] for ids in encoded}) == num_labels:
            return encoded[0][:same], [[ids[same]] for ids in encoded]
    return encoded[0][:same], [ids[same:] for ids in encoded]


def instruction_table(rows: Sequence[InstructionExample], tokenizer: Tokenizer, seq_len: int) -> TokenTable:
    """Prompt without loss, then the answer and the end token with it."""
    end = [] if tokenizer.end_id is None else [tokenizer.end_id]
    prompts = tokenizer.encode([row.prompt for row in rows])
    answers = tokenizer.encode([row.answer for row in rows])
    return prompt_table(prompts, [[*ids, *end] for ids in answers], tokenizer, seq_len)


def prompt_table(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], tokenizer: Tokenizer, seq_len: int
) -> TokenTable:
    """Rows of begin token, prompt and answer, labelled on the answer.

    What is too long loses the beginning of its prompt first, down to a quarter of the room, then the
    end of its answer: the tokens next to the answer's beginning say most about it. Raises `UserError` where
    `seq_len` leaves no room for a token of each.
    """
    prefix = list(tokenizer.prefix)
    max_tokens = seq_len - len(prefix)
    # The model predicts a label from the tokens before it, so at least one must stand there.
    least = 0 if prefix else 1
    if max_tokens < least + 1:
        raise UserError(
            f"--seq-len {seq_len}",
            "leaves no room for a prompt and an answer",
            f"use --seq-len {len(prefix) + least + 1} or more",
        )
    sequences, first_labelled, cut = [], [], 0
    for prompt, answer in zip(prompts, answers, strict=True):
        kept = min(len(prompt), max(max_tokens - len(answer), max_tokens // 4, least))
        shown = prompt[len(prompt) - kept :]
        labelled = answer[: max_tokens - kept]
        cut += len(shown) < len(prompt) or len(labelled) < len(answer)
        sequences.append([*prefix, *shown, *labelled])
        first_labelled.append(len(prefix) + kept)
    return table_of(sequences, first_labelled=first_labelled, cut=cut)
