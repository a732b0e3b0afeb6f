"""Questions about texts: files, windows, and the batches that are made of them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import write_tokenizer

from engines.errors import UserError
from engines.model.blocks import materialize
from engines.model.evaluation import evaluate_on_device
from harness.data.batches import Data, make_data
from harness.data.builtin import builtin_questions, builtin_reviews
from harness.data.records import QuestionExample
from harness.data.squad_windows import _windows, windows
from harness.models.blueprint import make_blueprint
from harness.models.configs import NAMED_SHAPES
from harness.models.tokenizers import ByteTokenizer
from harness.records.job import DataSource, Job, ModelSource
from harness.resolve import resolve_shape

TOKENIZERS = {
    name: ByteTokenizer(NAMED_SHAPES[name].config, 320) for name in ("tiny-opt", "tiny-roberta", "tiny-llama")
}


def job_of(train: str, model: str = "tiny-roberta", **fields: Any) -> Job:
    return Job(
        model=ModelSource(name=model, random_weights=True, head="question_answering"),
        data=DataSource(train=train),
        **{"batch_size": 2, "seq_len": 64, "eval_batches": 3, "dtype": "fp32", **fields},
    )


def data_of(train: str, **fields: Any) -> Data:
    job = job_of(train, **fields)
    return make_data(job, resolve_shape(job))


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(path)


def text_of(tokenizer: ByteTokenizer, ids: list[int]) -> str:
    value_of = {index: value for value, index in enumerate(tokenizer.byte_ids)}
    return bytes(value_of[index] for index in ids if index in value_of).decode()


@st.composite
def questions(draw: st.DrawFn) -> QuestionExample:
    words = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=60)
    # No character twice, so that a piece is found where it stands.
    letters = st.sampled_from([chr(code) for code in range(ord("!"), ord("~") + 1)])
    context = "".join(draw(st.lists(letters, unique=True, min_size=1, max_size=90)))
    start = draw(st.integers(0, len(context) - 1))
    answer = draw(st.none() | st.just((start, draw(st.integers(start + 1, len(context))))))
    return QuestionExample(question=draw(words), context=context, answer=answer)


@given(
    examples=st.lists(questions(), min_size=1, max_size=3),
    seq_len=st.integers(5, 80),
    name=st.sampled_from(sorted(TOKENIZERS)),
)
def test_windows_cover_the_text_and_know_the_answer(
    examples: list[QuestionExample], seq_len: int, name: str
) -> None:
    tokenizer = TOKENIZERS[name]
    found, cut = windows(examples, tokenizer, seq_len)
    several = 0
    for example in examples:
        context = example.context.encode()
        question = tokenizer.encode([example.question])[0]
        own, covered, whole = [], 0, False
        start, end = (None, None) if example.answer is None else example.answer
        while covered < len(context):
            window = found.pop(0)
            own.append(window)
            assert len(window.tokens) <= seq_len
            piece = window.tokens[window.second : len(window.tokens) - len(tokenizer.suffix)]
            place = context.index(tokenizer_bytes(tokenizer, piece))
            assert place <= covered < place + len(piece)
            covered = place + len(piece)
            asked = window.tokens[len(tokenizer.prefix) : window.second - len(tokenizer.between)]
            assert list(asked) == question[: len(asked)]
            if window.end:
                whole = True
                assert start is not None
                answer = tokenizer_bytes(tokenizer, window.tokens[window.start : window.end + 1])
                assert answer == example.context[start:end].encode()
        asked_all = len(own[0].tokens) - len(own[0].tokens[own[0].second :]) == (
            len(tokenizer.prefix) + len(question) + len(tokenizer.between)
        )
        several += len(own) > 1 or not asked_all
        if example.answer is None:
            assert not whole
        elif len(own) == 1:
            assert whole
    assert not found
    assert cut == several


def tokenizer_bytes(tokenizer: ByteTokenizer, ids: tuple[int, ...]) -> bytes:
    return bytes(tokenizer.byte_ids.index(index) for index in ids)


@given(length=st.integers(1, 5000), room=st.integers(1, 700))
def test_pieces_overlap_and_leave_nothing_out(length: int, room: int) -> None:
    pieces = _windows(length, room)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == length
    assert all(last - first == room for first, last in pieces[:-1])
    assert 0 < pieces[-1][1] - pieces[-1][0] <= room
    for (_, end), (begin, _) in pairwise(pieces):
        assert end - begin == min(128, room // 2)


def test_answers_are_counted_in_characters() -> None:
    example = QuestionExample(question="où?", context="là-bas, à côté", answer=(8, 14))
    (window,), _ = windows([example], TOKENIZERS["tiny-opt"], 64)
    answer = tokenizer_bytes(TOKENIZERS["tiny-opt"], window.tokens[window.start : window.end + 1])
    assert answer.decode() == "à côté"


def test_an_answer_shorter_than_the_overlap_is_whole_in_a_window() -> None:
    tokenizer = TOKENIZERS["tiny-roberta"]
    context = "".join(chr(ord("a") + i % 26) for i in range(600))
    for start in range(590):
        example = QuestionExample(question="q", context=context, answer=(start, start + 10))
        found, cut = windows([example], tokenizer, 44)  # 40 tokens of text, every second 20
        assert cut == 1
        assert any(window.end - window.start == 9 for window in found)


def test_too_short_a_sequence_is_named() -> None:
    example = QuestionExample(question="q", context="c", answer=(0, 1))
    with pytest.raises(UserError, match=r"--seq-len 4: .*use --seq-len 5"):
        windows([example], TOKENIZERS["tiny-roberta"], 4)
    found, _ = windows([example], TOKENIZERS["tiny-roberta"], 5)
    assert (len(found[0].tokens), found[0].start, found[0].end) == (5, 3, 3)


SQUAD = {"text": ["blue", "sky"], "answer_start": [11, 4]}
LAYOUTS = {
    "hub": {"id": "7", "title": "t", "question": "Which?", "context": "the sky is blue", "answers": SQUAD},
    "ends": {"question": "Which?", "context": "the sky is blue", "answer_start": 11, "answer_end": 15},
}
UNANSWERED = {
    "hub": {**LAYOUTS["hub"], "answers": {"text": [], "answer_start": []}},
    "ends": {**LAYOUTS["ends"], "answer_start": None, "answer_end": None},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_in_either_layout(layout: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *(LAYOUTS[layout] for _ in range(4)))
    inputs = data_of(path).step_batches(0)[0].inputs
    tokenizer = TOKENIZERS["tiny-roberta"]
    assert set(inputs) == {"input_ids", "attention_mask", "start_positions", "end_positions"}
    for row in range(2):
        start, end = int(inputs["start_positions"][row]), int(inputs["end_positions"][row])
        ids = inputs["input_ids"][row].tolist()
        assert text_of(tokenizer, ids) == "Which?the sky is blue"
        assert text_of(tokenizer, ids[start : end + 1]) == "blue"
        assert ids[: int(inputs["attention_mask"][row].sum())][-1] == tokenizer.end_id
    without = write(tmp_path / "y.jsonl", *(UNANSWERED[layout] for _ in range(4)))
    inputs = data_of(without).step_batches(0)[0].inputs
    assert not inputs["start_positions"].any()
    assert not inputs["end_positions"].any()


def test_a_long_text_is_several_examples(tmp_path: Path) -> None:
    record = {"question": "where?", "context": "word " * 20 + "here", "answer_start": 100, "answer_end": 104}
    data = data_of(write(tmp_path / "x.jsonl", *(record for _ in range(10))), seq_len=32)
    assert "9 examples" not in data.describe()
    assert data.describe().endswith("10 examples beyond 32 tokens")
    assert "windows" in data.describe()


def test_the_model_is_told_which_text_is_the_second(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = {**NAMED_SHAPES["tiny-roberta"].config, "model_type": "bert", "type_vocab_size": 2}
    (model / "config.json").write_text(json.dumps(config))
    write_tokenizer(model, marks_second=True)
    record = {"question": "a", "context": "film b", "answer_start": 5, "answer_end": 6}
    path = write(tmp_path / "x.jsonl", *(record for _ in range(4)))
    inputs = data_of(path, model=str(model), seq_len=8, batch_size=1).step_batches(0)[0].inputs
    assert inputs["input_ids"].tolist() == [[2, 4, 3, 6, 5, 3, 0, 0]]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0]]
    assert (inputs["start_positions"].tolist(), inputs["end_positions"].tolist()) == ([4], [4])


def test_random_answers_lie_in_the_sequence_and_end_after_they_begin() -> None:
    inputs = data_of("random", batch_size=64).step_batches(0)[0].inputs
    starts, ends = inputs["start_positions"], inputs["end_positions"]
    assert starts.shape == ends.shape == (64,)
    assert ((starts >= 0) & (starts <= ends) & (ends < 64)).all()
    assert len(set(starts.tolist())) > 10
    assert len(data_of("random", batch_size=5).evaluation) == 3


GOOD = LAYOUTS["ends"]
FAULTS = {
    "no context": ({"question": "Which?", "answers": SQUAD}, '"context" is missing'),
    "empty question": ({**GOOD, "question": " "}, '"question" is missing'),
    "no answer": ({"question": "q", "context": "c"}, "its answer is missing or malformed"),
    "half an answer": ({**GOOD, "answer_end": None}, "its answer is missing or malformed"),
    "truth": ({**GOOD, "answer_start": True}, "its answer is missing or malformed"),
    "beyond": ({**GOOD, "answer_end": 16}, "characters 11 to 16, is not in its context of 15"),
    "backwards": ({**GOOD, "answer_start": 15}, "characters 15 to 15"),
    "blank": ({**GOOD, "answer_start": 3, "answer_end": 4}, "characters 3 to 4"),
    "elsewhere": (
        {**LAYOUTS["hub"], "answers": {"text": ["blue"], "answer_start": [10]}},
        "'blue' does not stand at character 10",
    ),
    "list": ({**LAYOUTS["hub"], "answers": ["blue"]}, "malformed"),
    "uneven": ({**LAYOUTS["hub"], "answers": {"text": ["blue"], "answer_start": []}}, "malformed"),
    "number": ({**LAYOUTS["hub"], "answers": {"text": [1], "answer_start": [0]}}, "malformed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_records_are_named_with_their_line(fault: str, tmp_path: Path) -> None:
    record, message = FAULTS[fault]
    path = write(tmp_path / "x.jsonl", GOOD, record)
    with pytest.raises(UserError, match=rf"x.jsonl: line 2: .*{message}") as caught:
        data_of(path)
    assert "\n" not in str(caught.value)


def test_built_in_questions_ask_for_the_word_that_judges() -> None:
    for rows in builtin_reviews():
        found = builtin_questions(rows)
        assert len(found) == len(rows)
        for example, review in zip(found, rows, strict=True):
            assert example.answer is not None
            word = example.context[slice(*example.answer)]
            assert word in review.text.split()
            assert ("v" in word) == (review.label == 1)  # the words of praise hold a v


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-roberta"])
def test_a_tiny_model_learns_to_find_the_word(model: str) -> None:
    job = job_of("builtin", model, batch_size=16, eval_batches=8)
    shape = resolve_shape(job)
    data = make_data(job, shape)
    network = materialize(make_blueprint(job, shape), "cpu", torch.float32)
    before = evaluate_on_device(network, data.evaluation, "cpu").accuracy
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for step in range(150):
        for batch in data.step_batches(step):
            network(**batch.inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = evaluate_on_device(network, data.evaluation, "cpu").accuracy
    assert before < 0.2
    assert after > 0.6
