"""Conversations in tokens, as the model's chat template writes them, the loss on what is learnt of them."""

from __future__ import annotations

from collections.abc import Sequence

from harness.data.reading.files import BadRecord, UnusableError, shortened
from harness.data.records import ChatExample, Turn
from harness.data.token_tables import TokenTable, table_of
from harness.models.tokenizers import Tokenizer

TokenRange = tuple[int, int]
"""From first to before last."""


def chat_table(
    rows: Sequence[ChatExample], tokenizer: Tokenizer, seq_len: int
) -> tuple[TokenTable, list[BadRecord]]:
    """Conversations cut at their end, and those that cannot be used: the template refuses them, or what is to
    be learnt begins beyond `seq_len` tokens."""
    sequences, first_labelled, unlabelled, bad, cut = [], [], [], [], 0
    for position, row in enumerate(rows):
        try:
            ids, learnt = chat_tokens(row, tokenizer)
            if True not in learnt[1:seq_len]:
                raise UnusableError(f"what is to be learnt begins beyond {seq_len} tokens")
        except UnusableError as error:
            bad.append(BadRecord(position=position, place=row.place, why=str(error)))
            continue
        cut += len(ids) > seq_len
        ids, learnt = ids[:seq_len], learnt[:seq_len]
        sequences.append(ids)
        # From a token before it each label is predicted: the first token has none.
        first_labelled.append(max(1, learnt.index(True)))
        unlabelled += [not each for each in learnt]
    table = table_of(sequences, first_labelled=first_labelled, unlabelled=unlabelled, cut=cut)
    return table, bad


def chat_tokens(row: ChatExample, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of a whole conversation, and which of them are learnt: an answer and the mark of its end.

    Raises `UnusableError` if the model's chat template refuses it.
    """
    turns = list(row.turns)
    try:
        written = _written(turns, tokenizer)
    except ValueError:
        # Some templates have no place for a system's turn; what it says then opens the user's first.
        turns = _system_to_user(turns)
        try:
            written = _written(turns, tokenizer)
        except ValueError as error:
            raise UnusableError(f"the chat template refuses it ({shortened(str(error), 80)})") from None
    if written is None:
        return _plain(turns, tokenizer)
    text, spans = written
    (encoded,) = tokenizer.encode_places([text])
    learnt = [any(first <= place[0] < last for first, last in spans) for place in encoded.places]
    return encoded.ids, learnt


def _written(turns: Sequence[Turn], tokenizer: Tokenizer) -> tuple[str, list[TokenRange]] | None:
    """The text of a conversation and the characters of it that are learnt; `None` without a template.

    An answer is what the template adds to the turns before it and its own opening. Raises `ValueError`.
    """
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    text = tokenizer.render_chat(messages, opens_answer=False)
    if text is None:
        return None
    spans = []
    for place, turn in enumerate(turns):
        if not turn.is_learnt:
            continue
        upto = tokenizer.render_chat(messages[: place + 1], opens_answer=False) or ""
        if not text.startswith(upto.rstrip()):
            continue  # the template writes earlier answers otherwise, as without their reasoning
        before = tokenizer.render_chat(messages[:place], opens_answer=True) or ""
        first = len(before) if upto.startswith(before) else upto.rfind(turn.content.strip())
        if first < 0:
            raise ValueError("it does not write the answer as it is")
        # What follows the mark of the end, mostly a line's end, opens the next turn.
        spans.append((first, len(upto.rstrip())))
    if not spans:
        raise ValueError("it writes no answer as it is")
    return text, spans


def _system_to_user(turns: Sequence[Turn]) -> list[Turn]:
    system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
    others = [turn for turn in turns if turn.role != "system"]
    if not system or others[0].role != "user":
        return others
    first = Turn(role="user", content=f"{system}\n\n{others[0].content}", is_learnt=False)
    return [first, *others[1:]]


def _plain(turns: Sequence[Turn], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """For a model without a chat template: headings as in instruction records."""
    end = [] if tokenizer.end_id is None else [tokenizer.end_id]
    ids, learnt = list(tokenizer.prefix), [False] * len(tokenizer.prefix)
    for place, turn in enumerate(turns):
        after = "\n\n" if place + 1 < len(turns) else ""
        if turn.role == "assistant":
            pieces = [(f"### {turn.role.title()}:\n", False), (turn.content, turn.is_learnt), (after, False)]
        else:
            pieces = [(f"### {turn.role.title()}:\n{turn.content}{after}", False)]
        for piece, is_learnt in pieces:
            new = tokenizer.encode([piece])[0] if piece else []
            new = [*new, *end] if piece is turn.content else new
            ids += new
            learnt += [is_learnt] * len(new)
    return ids, learnt
