"""Records of every layout, as examples and as tokens with the loss where it belongs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import write_tokenizer
from transformers import PreTrainedTokenizerFast

from engines.errors import UserError
from harness.data.batches import Data, make_data
from harness.data.chat_tokens import chat_tokens
from harness.data.examples import read_examples
from harness.data.records import ChatExample, Examples, Turn
from harness.data.token_tables import UNLABELLED
from harness.models.configs import NAMED_SHAPES
from harness.models.tokenizers import ByteTokenizer, HubTokenizer
from harness.records.job import DataSource, Job, ModelSource
from harness.resolve import resolve_shape

BYTES = ByteTokenizer(NAMED_SHAPES["tiny-llama"].config, 320)
CHATML = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def written(folder: Path, records: list[Any], name: str = "x.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def read(folder: Path, *records: Any, **said: Any) -> Examples:
    return read_examples(DataSource(train=written(folder, [*records]), **said))


def data_of(path: str, **fields: Any) -> Data:
    values = {"batch_size": 1, "seq_len": 128, "dtype": "fp32", **fields}
    source = ModelSource(name=values.pop("model", "tiny-llama"), random_weights=True)
    job = Job(model=source, data=DataSource(train=path), **values)
    return make_data(job, resolve_shape(job))


def learnt(batch: Any) -> str:
    labels = batch.inputs["labels"][0]
    return BYTES.decode(labels[labels != UNLABELLED].tolist())


ANSWERED = {
    "prompt and completion": {"prompt": "2 + 2 =", "completion": " 4"},
    "Dolly": {"instruction": "q", "context": "c", "response": " 4", "category": "open_qa"},
    "Alpaca": {"instruction": "q", "input": "", "output": "4", "history": [["a", "b"]], "system": "be short"},
    "question and answer": {"question": "q", "answer": "4"},
    "numbers": {"prompt": "q", "completion": 4},
}


@pytest.mark.parametrize("layout", ANSWERED)
def test_the_answer_is_learnt(layout: str, tmp_path: Path) -> None:
    data = data_of(written(tmp_path, [ANSWERED[layout]] * 4))
    assert learnt(data.step_batches(0)[0]).strip() == "4"


def test_earlier_turns_and_the_system_are_in_the_prompt(tmp_path: Path) -> None:
    prompt = read(tmp_path, ANSWERED["Alpaca"]).instructions[0].prompt
    assert prompt.startswith("be short\n\nDo the task below.")
    assert prompt.index("a\n\n### Response:\nb") < prompt.index("q\n\n### Response:\n")


MESSAGES = {
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                 {"role": "assistant", "content": "a1"}, {"role": "user", "content": "r"},
                 {"role": "assistant", "content": [{"type": "text", "text": "a2"}]}],
}  # fmt: skip
SHAREGPT = {
    "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a1"},
                      {"from": "human", "value": "r"}, {"from": "gpt", "value": "a2"}],
    "system": "s", "id": 1,
}  # fmt: skip


@pytest.mark.parametrize("record", [MESSAGES, SHAREGPT], ids=["OpenAI", "ShareGPT"])
def test_both_forms_of_chats_are_one(record: dict[str, Any], tmp_path: Path) -> None:
    (chat,) = read(tmp_path, record).chats
    assert [turn.role for turn in chat.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn.content for turn in chat.turns] == ["s", "q", "a1", "r", "a2"]
    assert [turn.is_learnt for turn in chat.turns] == [False, False, True, False, True]
    data = data_of(written(tmp_path, [record] * 4))
    assert learnt(data.step_batches(0)[0]) == "a1a2"
    labels = data.step_batches(0)[0].inputs["labels"][0]
    assert (labels == BYTES.end_id).sum() == 2  # an answer ends with the mark of its end


def hub_tokenizer(folder: Path, template: str) -> HubTokenizer:
    write_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = template
    return HubTokenizer(tokenizer, {}, 320)


def turns(*contents: str) -> tuple[Turn, ...]:
    roles = ("user", "assistant")
    return tuple(
        Turn(role=roles[n % 2], content=each, is_learnt=n % 2 == 1) for n, each in enumerate(contents)
    )


def test_the_loss_is_on_what_the_template_adds_for_the_assistant(tmp_path: Path) -> None:
    tokenizer = hub_tokenizer(tmp_path, CHATML)
    rendered = tokenizer.render_chat([{"role": "user", "content": "film"}], opens_answer=True)
    assert rendered == "<user> film <end>\n<assistant> "
    seen: list[str] = []
    tokenizer.encode_places = lambda texts: (seen.extend(texts), ByteTokenizer.encode_places(BYTES, texts))[1]  # type: ignore[method-assign, func-returns-value]
    ids, marks = chat_tokens(ChatExample(turns=turns("q", "a", "r", "b")), tokenizer)
    assert seen == ["<user> q <end>\n<assistant> a <end>\n<user> r <end>\n<assistant> b <end>\n"]
    assert BYTES.decode([index for index, mark in zip(ids, marks, strict=True) if mark]) == "a <end>b <end>"


def test_a_template_without_a_place_for_the_system_puts_it_before_the_question(tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    tokenizer = hub_tokenizer(tmp_path, refusing)
    tokenizer.encode_places = BYTES.encode_places  # type: ignore[method-assign]
    system = Turn(role="system", content="s", is_learnt=False)
    ids, _ = chat_tokens(ChatExample(turns=(system, *turns("q", "a"))), tokenizer)
    assert BYTES.decode(ids).startswith("<user> s\n\nq <end>")


def test_a_chat_whose_answer_is_out_of_reach_is_left_out_and_counted(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "q" * 99}, {"role": "assistant", "content": "a"}]}
    short = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(UserError, match=r"begins beyond 48 tokens; .*--skip-bad"):
        data_of(written(tmp_path, [*[long] * 9, *[short] * 20]), seq_len=48)
    path = written(tmp_path, [*[short] * 30, long])
    assert "1 left out, the first in line 31" in " ".join(data_of(path, seq_len=48).readings)


def test_documents_are_packed_between_marks(tmp_path: Path) -> None:
    batch = data_of(written(tmp_path, [{"text": "ab"}] * 40), seq_len=16).step_batches(0)[0]
    assert BYTES.decode(batch.inputs["input_ids"][0].tolist()) == "ab" * 4
    assert "attention_mask" not in batch.inputs


def test_multirc_as_it_is_published_is_a_row_for_each_answer(tmp_path: Path) -> None:
    def asked(question: str, *answers: tuple[str, int]) -> dict[str, Any]:
        return {"question": question, "answers": [{"text": text, "label": label} for text, label in answers]}

    passages = [
        {"idx": i, "passage": {"text": f"Passage {i}.", "questions": [
            asked("Who?", ("Ann", 1), ("Bob", 0)), asked("When?", ("Now", 0)),
        ]}}
        for i in range(4)
    ]  # fmt: skip
    said = {"text": "passage", "text2": "question", "label": "label"}
    form = "{text}\nQuestion: {text2}\nIs it {answer}?"
    found = read(tmp_path, *passages, columns=said, template=form, labels=("No", "Yes"))
    rows = sorted((*found.labelled, *found.labelled_held_out), key=lambda each: each.place)
    assert len(rows) == 12
    one, other, last = rows[:3]
    assert (one.text, one.second, one.fields, one.label) == ("Passage 0.", "Who?", {"answer": "Ann"}, 1)
    assert (other.fields, other.label) == ({"answer": "Bob"}, 0)
    assert (last.second, last.fields) == ("When?", {"answer": "Now"})
    assert one.place == "line 1, question 1, answer 1"
    assert found.readings[0].form == "MultiRC's JSON lines"
    broken = [
        *passages,
        {"passage": {"text": "x", "questions": [3, {"question": "Why?"}, asked("So?", ("", 1))]}},
    ]
    left = read(tmp_path, *broken, columns=said, template=form, labels=("No", "Yes"), skip_bad=True)
    assert left.readings[0].left_out.count == 3


def test_squad_as_it_is_published(tmp_path: Path) -> None:
    asked = [
        {"question": "which?", "id": "7", "answers": [{"text": "blue", "answer_start": 11}]},
        {"question": "why?", "id": "8", "is_impossible": True, "answers": []},
    ]
    paragraph = {"context": "the sky is blue", "qas": asked}
    path = tmp_path / "dev-v2.0.json"
    path.write_text(json.dumps({"version": "2.0", "data": [{"title": "t", "paragraphs": [paragraph]}]}))
    found = read_examples(DataSource(train=str(path)))
    answers = {row.question: row.answer for row in (*found.questions, *found.questions_held_out)}
    assert answers == {"which?": (11, 15), "why?": None}


def test_pairs_have_a_second_segment(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = {**NAMED_SHAPES["tiny-roberta"].config, "model_type": "bert", "type_vocab_size": 2}
    (model / "config.json").write_text(json.dumps(config))
    write_tokenizer(model, marks_second=True)
    rows = [{"premise": "a film", "hypothesis": "b", "label": label} for label in ("no", "yes")] * 2
    batch = data_of(written(tmp_path, rows), model=str(model), seq_len=8).step_batches(0)[0].inputs
    assert batch["input_ids"].tolist() == [[2, 4, 6, 3, 5, 3, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0]]
    # Of two texts that are too long, the longer one is cut first.
    rows = [{"premise": "a " * 9, "hypothesis": "b b", "label": label} for label in ("no", "yes")] * 2
    batch = data_of(written(tmp_path, rows), model=str(model), seq_len=8).step_batches(0)[0].inputs
    assert batch["input_ids"].tolist() == [[2, 4, 4, 4, 3, 5, 5, 3]]


def test_label_names_reach_the_shape_and_the_configuration(tmp_path: Path) -> None:
    from harness.models.blueprint import make_blueprint

    rows = [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}] * 3
    job = Job(
        model=ModelSource(name="tiny-roberta", random_weights=True),
        data=DataSource(train=written(tmp_path, rows)),
        seq_len=64,
    )
    shape = resolve_shape(job)
    assert shape.label_names == ("bad", "good")
    assert make_blueprint(job, shape).config.label2id == {"bad": 0, "good": 1}


def test_half_characters_are_replaced_and_counted(tmp_path: Path) -> None:
    found = read(tmp_path, *[{"prompt": "a \ud83d", "completion": "b"}] * 2)
    assert found.instructions[0].prompt == "a \ufffd"
    assert "2 broken characters replaced" in str(found.readings[0])


@pytest.mark.parametrize("lines", [True, False])
def test_a_key_that_is_there_twice_is_not_read_as_its_last_value(tmp_path: Path, lines: bool) -> None:
    record = '{"instruction": "a", "output": "the first", "output": "the second"}'
    path = tmp_path / ("x.jsonl" if lines else "x.json")
    path.write_text(record if lines else f"[{record}]")
    with pytest.raises(UserError, match="the key 'output' is there twice in one object"):
        read_examples(DataSource(train=str(path)))


REFUSED: dict[str, tuple[list[Any], str]] = {
    "preferences": ([{"prompt": "p", "chosen": "a", "rejected": "b"}], "preferences .*no method here learns"),
    "KTO": ([{"prompt": "p", "completion": "a", "label": True}], "marked good or bad"),
    "tools": ([{"messages": MESSAGES["messages"], "tools": [{"name": "f"}]}], "calls of tools"),
    "tool turn": ([{"messages": [{"role": "tool", "content": "x"}]}], "line 1: it holds calls of tools"),
    "reasoning": (
        [{"messages": [{"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}]}],
        r"reasoning beside its content \(\"reasoning_content\"\)",
    ),
    "pictures of a turn": (
        [{"messages": [{"role": "assistant", "content": "a dog", "images": ["x.png"]}]}],
        '"images" beside its content, and only text',
    ),
    "no assistant": ([{"messages": [{"role": "user", "content": "x"}]}], "no turn of the assistant"),
    "picture": ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "only text is read"),
    "object": ([{"instruction": "a", "output": {"a": 1}}], '"output" is an object, not text'),
    "several labels": ([{"text": "a", "labels": [0, 1]}], "its label is a list"),
    "no layout": ([{"foo": "a", "bar": 1}], "has foo, bar, which make no example"),
    "strange key": ([{"text": "a", "label": 0, "note": "x"}], "what note means is not known"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_learnt_from_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    records, message = REFUSED[fault]
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, *records * 2)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 200


def test_columns_of_pandas_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"text": {"0": "a"}, "label": {"0": 1}}))
    with pytest.raises(UserError, match="orient='records'"):
        read_examples(DataSource(train=str(path)))


@pytest.mark.parametrize("source", ["stanfordnlp/sst2", "x.parquet"])
def test_a_missing_package_is_named_with_its_command(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    for package in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=r"not installed; install it: pip install 'lspzo-bench\[datasets\]'"):
        read_examples(DataSource(train=source))
