from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import UserError
from engines.model.blocks import materialize
from engines.model.evaluation import evaluate_on_device
from harness.data.batches import Data, batches_of, make_data
from harness.data.builtin import builtin_reviews
from harness.data.examples import held_out_count
from harness.data.reading.layouts import instruction_prompt
from harness.data.token_tables import UNLABELLED, _class_answers, prompt_table
from harness.data.tokenized import load_tokenized, save_tokenized
from harness.data.tokenizing import tokenize
from harness.models.blueprint import make_blueprint
from harness.models.configs import NAMED_SHAPES
from harness.models.tokenizers import ByteTokenizer
from harness.records.job import DataSource, Job, ModelSource
from harness.resolve import resolve_shape

TOKENIZER = ByteTokenizer(NAMED_SHAPES["tiny-opt"].config, 320)
BYTE_OF = {index: value for value, index in enumerate(TOKENIZER.byte_ids)}
REAL = Path(os.environ.get("LSPZO_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
needs_real_data = pytest.mark.skipif(not REAL.exists(), reason=f"no data sets at {REAL}")


def data_of(train: str, *, model: str = "tiny-opt", evaluate: str | None = None, **fields: Any) -> Data:
    job = Job(
        model=ModelSource(name=model, random_weights=True, head=fields.pop("head", "auto")),
        data=DataSource(train=train, evaluate=evaluate),
        **{"batch_size": 2, "seq_len": 32, "eval_batches": 3, **fields},
    )
    return make_data(job, resolve_shape(job))


def text_of(ids: torch.Tensor) -> str:
    """What a row of byte tokens says, special tokens left out."""
    return bytes(BYTE_OF[int(index)] for index in ids if int(index) in BYTE_OF).decode()


def rows_of(data: Data, steps: int) -> list[tuple[int, ...]]:
    return [
        tuple(row.tolist())
        for step in range(steps)
        for batch in data.step_batches(step)
        for row in batch.inputs["input_ids"]
    ]


def same(left: Data, right: Data, step: int) -> bool:
    pairs = zip(left.step_batches(step), right.step_batches(step), strict=True)
    return all(torch.equal(a.inputs[key], b.inputs[key]) for a, b in pairs for key in a.inputs)


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    """Twenty labelled lines, each of its own text."""
    path = tmp_path / "numbered.tsv"
    path.write_text("".join(f"text {index:02d}\t{index % 2}\n" for index in range(20)))
    return str(path)


@pytest.mark.parametrize("train", ["random", "builtin"])
def test_batches_are_a_function_of_seed_and_step(train: str) -> None:
    data = data_of(train, accumulation=2)
    data.step_batches(5)  # what was asked before makes no difference
    assert same(data, data_of(train, accumulation=2), 3)
    assert not same(data, data_of(train, accumulation=2, seed=1), 3)
    assert len(data.step_batches(0)) == 2
    assert rows_of(data, 1) != rows_of(data, 2)[4:]
    one_by_one = data_of(train, accumulation=1)
    assert rows_of(data, 2) == rows_of(one_by_one, 4)


def test_an_epoch_shows_every_example_once_and_the_next_is_shuffled_anew(numbered: str) -> None:
    rows = rows_of(data_of(numbered), 18)  # 18 training examples, two per step
    assert len(set(rows[:18])) == 18
    assert set(rows[:18]) == set(rows[18:])
    assert rows[:18] != rows[18:]


def test_training_never_sees_what_is_held_out(numbered: str) -> None:
    for seed in range(3):
        data = data_of(numbered, seed=seed, batch_size=3)
        seen = set(rows_of(data, 20))
        assert len(data.evaluation) == 1  # two examples make one batch, smaller than the others
        held_out = {tuple(row.tolist()) for batch in data.evaluation for row in batch.inputs["input_ids"]}
        assert len(held_out) == 2
        assert not seen & held_out
        assert len(seen | held_out) == 20
    assert data_of(numbered, eval_batches=0).evaluation == []


def test_the_held_out_part_is_the_same_for_every_seed(numbered: str) -> None:
    first, second = (data_of(numbered, seed=seed).evaluation[0].inputs["input_ids"] for seed in (0, 1))
    assert torch.equal(first, second)


def test_an_evaluation_file_leaves_the_training_set_whole(numbered: str, tmp_path: Path) -> None:
    other = tmp_path / "other.tsv"
    other.write_text("unseen\t1\nagain\t0\n")
    data = data_of(numbered, evaluate=str(other))
    assert len(set(rows_of(data, 20))) == 20
    assert "unseen" in text_of(data.evaluation[0].inputs["input_ids"][0])


@given(st.integers(0, 10**6))
def test_held_out_count_leaves_most_for_training(num_examples: int) -> None:
    count = held_out_count(num_examples)
    assert 0 <= count <= 1000
    assert num_examples < 2 or 1 <= count <= num_examples / 2


def test_random_tokens_span_the_vocabulary_and_are_labelled() -> None:
    batch = data_of("random", batch_size=64).step_batches(0)[0]
    ids = batch.inputs["input_ids"]
    assert ids.shape == (64, 32)
    assert ids.dtype == torch.int64
    assert torch.equal(batch.inputs["labels"], ids)
    assert 0 <= int(ids.min()) < 10
    assert 310 <= int(ids.max()) < 320
    encoder = data_of("random", model="tiny-roberta", batch_size=64).step_batches(0)[0]
    assert encoder.inputs["labels"].shape == (64,)
    assert set(encoder.inputs["labels"].tolist()) == {0, 1}


def test_builtin_reviews_are_balanced_distinct_and_held_out() -> None:
    train, held_out = builtin_reviews()
    texts = [example.text for example in (*train, *held_out)]
    assert len(set(texts)) == len(texts)
    assert (len(train), len(held_out)) == (1024, 256)
    for rows in (train, held_out):
        assert sum(example.label for example in rows) * 2 == len(rows)
    assert max(len(text) for text in texts) < 40
    assert builtin_reviews() == (train, held_out)


def test_decoder_answers_with_one_labelled_word() -> None:
    batch = data_of("builtin", seq_len=64).step_batches(0)[0]
    for ids, labels, mask in zip(
        batch.inputs["input_ids"], batch.inputs["labels"], batch.inputs["attention_mask"], strict=True
    ):
        labelled = (labels != UNLABELLED).nonzero().flatten()
        assert labelled.tolist() == [int(mask.sum()) - 1]
        assert text_of(labels[labelled]) in ("b", "g")
        assert text_of(ids[mask.bool()]).endswith(("This is b", "This is g"))
        assert (ids[~mask.bool()] == TOKENIZER.pad_id).all()


def test_class_words_are_cut_to_the_token_that_tells_them_apart() -> None:
    shared, answers = _class_answers(2, (), TOKENIZER)
    assert text_of(torch.tensor(shared)) == " "
    assert [text_of(torch.tensor(answer)) for answer in answers] == ["b", "g"]
    # With more than ten classes the first digit does not tell: all digits are labelled.
    _, many = _class_answers(12, (), TOKENIZER)
    assert [text_of(torch.tensor(answer)) for answer in many] == [str(label) for label in range(12)]


def test_classes_are_called_what_the_data_calls_them() -> None:
    """Two of any name were bad and good, and are where the first token does not tell them apart."""

    def said(*names: str) -> list[str]:
        return [text_of(torch.tensor(each)) for each in _class_answers(len(names), names, TOKENIZER)[1]]

    assert said("ham", "spam") == ["h", "s"]
    assert said("sports", "politics", "weather") == ["s", "p", "w"]
    assert said("1", "2") == said("no", "not really") == ["b", "g"]
    assert said("-1", "0", "1") == ["0", "1", "2"]


def test_encoder_input_has_its_frame_and_pads_on_the_right() -> None:
    data = data_of("builtin", model="tiny-roberta", seq_len=48)
    batch = data.step_batches(0)[0]
    for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (48 - length)
        assert (int(ids[0]), int(ids[length - 1])) == (0, 2)
        assert (ids[length:] == 1).all()
    assert batch.inputs["labels"].shape == (2,)


def test_text_is_packed_and_all_labelled(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    text = "".join(f"line {index}\n" for index in range(100))
    path.write_text(text)
    data = data_of(str(path), eval_batches=100)
    blocks = set(rows_of(data, 40))
    held_out = [tuple(row.tolist()) for batch in data.evaluation for row in batch.inputs["input_ids"]]
    assert not blocks & set(held_out)
    assert len(blocks) + len(held_out) == len(text) // 32
    assert text_of(torch.tensor(held_out[-1])) == text[len(text) // 32 * 32 - 32 :][:32]
    inputs = data.step_batches(0)[0].inputs
    assert "attention_mask" not in inputs
    assert torch.equal(inputs["labels"], inputs["input_ids"])
    path.write_text("short")
    with pytest.raises(UserError, match="fewer than one sequence of 32"):
        data_of(str(path))


def test_instructions_are_learnt_on_the_answer_and_its_end(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    path.write_text(
        json.dumps(
            [
                {"instruction": "Add.", "input": "1 2", "output": "Three."},
                {"instruction": "Greet.", "input": "", "output": "Hello."},
            ]
        )
    )
    data = data_of(str(path), seq_len=200, batch_size=1, eval_batches=1)
    both = [data.step_batches(0)[0].inputs, data.evaluation[0].inputs]
    for inputs in both:
        ids, labels = inputs["input_ids"][0], inputs["labels"][0]
        kept = labels != UNLABELLED
        assert text_of(labels[kept]) in ("Three.", "Hello.")
        assert int(labels[kept][-1]) == TOKENIZER.end_id
        assert text_of(ids[~kept & inputs["attention_mask"][0].bool()]).endswith("### Response:\n")
    assert "### Input:\n1 2\n" in instruction_prompt("Add.", "1 2")
    assert "Input" not in instruction_prompt("Greet.", "")


PROMPTS = st.lists(st.integers(10, 20), min_size=1, max_size=30)


@given(rows=st.lists(st.tuples(PROMPTS, PROMPTS), min_size=1, max_size=5), seq_len=st.integers(2, 40))
@settings(max_examples=200)
def test_long_examples_keep_a_labelled_answer(rows: list[tuple[list[int], list[int]]], seq_len: int) -> None:
    table = prompt_table([prompt for prompt, _ in rows], [answer for _, answer in rows], TOKENIZER, seq_len)
    batch = table.batch(range(len(rows)), seq_len, TOKENIZER.pad_id).inputs
    cut = 0
    for index, (prompt, answer) in enumerate(rows):
        length = int(batch["attention_mask"][index].sum())
        ids = batch["input_ids"][index, :length].tolist()
        labelled = batch["labels"][index]
        first = int((labelled != UNLABELLED).nonzero()[0])
        assert first >= 1  # something to predict it from
        assert ids[0] == TOKENIZER.prefix[0]
        shown, kept = ids[1:first], ids[first:]
        assert labelled[first:length].tolist() == kept
        assert (labelled[length:] == UNLABELLED).all()
        assert kept == answer[: len(kept)]
        assert shown == prompt[len(prompt) - len(shown) :]
        if 1 + len(prompt) + len(answer) <= seq_len:
            assert (shown, kept) == (prompt, answer)
        else:
            assert length == seq_len
            cut += 1
    assert table.cut == cut


def test_description_counts_what_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "long.tsv"
    path.write_text("".join(f"{'word ' * 20}{index}\t{index % 2}\n" for index in range(10)))
    assert data_of(str(path)).describe() == (
        "labelled long.tsv: 9 training and 1 held-out examples, 288 training tokens (bytes), "
        "10 cut to 32 tokens"
    )
    encoder = data_of(str(path), model="tiny-roberta").describe()
    assert encoder.endswith("10 cut to 32 tokens")
    assert "cut" not in data_of("builtin", seq_len=64).describe()
    assert data_of("random").describe().startswith("random tokens below 320")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.tsv", "fine film\t1\n\ndull film\t0\r\n"),
        ("glue.tsv", "sentence\tlabel\nfine film\t1\ndull film\t0"),
        ("text.jsonl", '{"text": "fine film", "label": 1}\n{"text": "dull film", "label": 0}\n'),
        (
            "sentence.jsonl",
            '{"sentence": "fine film", "label": "1"}\n\n{"sentence": "dull film", "label": 0}',
        ),
        ("list.json", '[{"text": "fine film", "label": 1}, {"text": "dull film", "label": 0}]'),
    ],
)
def test_labelled_files_in_every_layout(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    data = data_of(str(path), model="tiny-roberta", batch_size=1, evaluate=str(path))
    found = {}
    for batch in data.evaluation:
        # The byte layout of RoBERTa's special ids is that of our decoders' too: 0, 1 and 2.
        tokenizer = ByteTokenizer(NAMED_SHAPES["tiny-roberta"].config, 320)
        value_of = {index: value for value, index in enumerate(tokenizer.byte_ids)}
        ids = batch.inputs["input_ids"][0].tolist()
        text = bytes(value_of[index] for index in ids if index in value_of).decode()
        found[text] = int(batch.inputs["labels"][0])
    assert found == {"fine film": 1, "dull film": 0}


FAULTS = {
    "suffix": ("x.xlsx", "a,b", r"suffix '\.xlsx' is not known.*\.txt"),
    "empty": ("x.tsv", " \n", "is empty"),
    "header only": ("x.tsv", "sentence\tlabel\n", "a header and nothing else"),
    "no tab": ("x.tsv", "good\t1\nbad 0\n", "line 2: has no tab"),
    "word label": ("x.tsv", "good\t1\n\nbad\tno\n", "numbers and words for labels, such as 1 and 'no'"),
    "truth": ("x.jsonl", '{"text": "a", "label": true}', "every label is 'true'"),
    "list": ("x.jsonl", '{"text": "a", "label": [1, 2]}', "line 1: its label is a list"),
    "one class": ("x.tsv", "a\t0\nb\t0\n", "every label is 0"),
    "no text": ("x.tsv", "a\t0\n \t1\n", "line 2: its text is missing"),
    "keys": (
        "x.jsonl",
        '{"text": "a", "label": 0}\n{"txt": "b", "label": 1}',
        "has text, label, txt: what txt means is not known",
    ),
    "no output": (
        "x.json",
        '[{"instruction": "a", "output": "b"}, {"instruction": "c"}]',
        'record 2: "output"',
    ),
    "torn line": ("x.jsonl", '{"text": "a", "label": 0}\n{"text"', "line 2: is not valid JSON"),
    "torn": ("x.json", "[1, ", "is not valid JSON"),
    "no list": ("x.json", '{"instruction": "a"}', "not a JSON list"),
    "no records": ("x.json", "[]", "holds no record"),
    "numbers": ("x.json", "[1, 2]", "record 1: is not a JSON object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_files_are_named_with_their_line(fault: str, tmp_path: Path) -> None:
    name, content, message = FAULTS[fault]
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        data_of(str(path))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_faults_beyond_one_file(numbered: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        data_of(str(tmp_path / "none.tsv"))
    with pytest.raises(UserError, match="is a folder"):
        data_of(str(tmp_path))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(UserError, match=r"is not UTF-8.* iconv -f LATIN1"):
        data_of(str(latin))
    for encoding, name in (("cp932", "CP932"), ("euc_jp", "EUC-JP")):
        latin.write_bytes("これは良い本です\t1\n".encode(encoding))
        with pytest.raises(UserError, match=f"is not UTF-8.* iconv -f {name} -t UTF-8"):
            data_of(str(latin))
    other = tmp_path / "other.tsv"
    other.write_text("good\t1\nodd\t2\n")
    with pytest.raises(UserError, match=r"other.tsv: line 2: label 2 is not among .* 0 to 1"):
        data_of(numbered, evaluate=str(other))
    text = tmp_path / "text.txt"
    text.write_text("words " * 20)
    with pytest.raises(UserError, match="holds text data, the training set holds labelled data"):
        data_of(numbered, evaluate=str(text))
    with pytest.raises(UserError, match="has its own held-out part"):
        data_of("builtin", evaluate=numbered)
    with pytest.raises(UserError, match="too small to hold a part out"):
        data_of(str(text), seq_len=100)
    with pytest.raises(UserError, match=r"--seq-len 1: leaves no room.*use --seq-len 2"):
        data_of(numbered, seq_len=1)
    with pytest.raises(UserError, match=r"--seq-len 2: leaves no room.*use --seq-len 3"):
        data_of(numbered, model="tiny-roberta", seq_len=2)


@pytest.mark.parametrize("model", ["tiny-opt", "tiny-roberta"])
def test_a_tiny_model_learns_the_builtin_task(model: str) -> None:
    job = Job(
        model=ModelSource(name=model, random_weights=True), batch_size=16, seq_len=48, eval_batches=8,
        dtype="fp32",
    )  # fmt: skip
    shape = resolve_shape(job)
    data = make_data(job, shape)
    network = materialize(make_blueprint(job, shape), "cpu", torch.float32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for step in range(60):
        for batch in data.step_batches(step):
            network(**batch.inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert evaluate_on_device(network, data.evaluation, "cpu").accuracy > 0.9


@needs_real_data
def test_real_sst2() -> None:
    folder = REAL / "sst2"
    data = data_of(
        str(folder / "train.tsv"), evaluate=str(folder / "dev.tsv"), model="tiny-roberta", seq_len=128
    )
    assert data.describe().startswith("labelled train.tsv: 6,920 training and 872 held-out examples")
    labels = [batch.inputs["labels"] for step in range(20) for batch in data.step_batches(step)]
    assert set(torch.cat(labels).tolist()) == {0, 1}


@needs_real_data
def test_real_wikitext() -> None:
    path = REAL / "wikitext2" / "valid.txt"
    data = data_of(str(path), seq_len=128)
    blocks = path.stat().st_size // 128
    held_out = held_out_count(blocks)
    assert f"{blocks - held_out:,} training and {held_out} held-out blocks" in data.describe()


@needs_real_data
def test_real_alpaca() -> None:
    data = data_of(str(REAL / "alpaca_demo" / "alpaca_en_demo.json"), seq_len=256)
    assert "900 training and 99 held-out examples" in data.describe()
    for batch in [*data.evaluation, *data.step_batches(0)]:
        assert ((batch.inputs["labels"] != UNLABELLED).sum(1) >= 1).all()


@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        ({}, "bg"),  # bad and good differ in their first byte
        ({"template": "{text} It was ", "labels": ("b", "d")}, "bd"),
        # Of several bytes each: the words are scored whole, and labels are classes.
        ({"template": "{text} It was", "labels": ("bad", "dog")}, None),
    ],
)
def test_words_of_classes_go_with_the_batches_of_rows(
    more: dict[str, Any], tokens: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("".join(f"text number {i}\t{i % 2}\n" for i in range(40)))
    job = Job(
        model=ModelSource(name="tiny-opt", random_weights=True), batch_size=2, seq_len=32, eval_batches=2,
        data=DataSource(train=str(path), **more),
    )  # fmt: skip
    tokenized = tokenize(job, resolve_shape(job))
    assert tokenized is not None
    table = tokenized.held_out
    halves = tokenized.with_tables(tokenized.train, table.select([0]), table.select([1]))
    save_tokenized(halves, tmp_path / "data.safetensors")
    data = batches_of(load_tokenized(tmp_path / "data.safetensors"), job)
    for batch in (*data.step_batches(0), *data.evaluation, *data.test):
        labels = batch.inputs["labels"]
        if tokens is None:
            assert batch.class_tokens is None
            assert labels.dim() == 1
            continue
        assert batch.class_tokens is not None
        assert text_of(batch.class_tokens) == tokens
        assert set(labels[labels != UNLABELLED].tolist()) <= set(batch.class_tokens.tolist())
        assert next(iter(batch.in_parts(1))).class_tokens is batch.class_tokens


def test_built_in_reviews_stand_end_to_end_in_a_long_sequence() -> None:
    data = data_of("builtin", seq_len=256)
    known = {row.text for rows in builtin_reviews() for row in rows}
    for batch in (*data.step_batches(0), *data.evaluation):
        assert "attention_mask" not in batch.inputs
        for ids, labels in zip(batch.inputs["input_ids"], batch.inputs["labels"], strict=True):
            places = (labels != UNLABELLED).nonzero().flatten().tolist()
            assert places
            for place in places:
                assert labels[place] == ids[place]
                said = text_of(ids[:place])
                assert said.endswith("\nThis is ")
                assert said.removesuffix("\nThis is ").endswith(tuple(known))


def test_built_in_reviews_stay_apart_in_a_short_sequence() -> None:
    assert "attention_mask" in data_of("builtin", seq_len=64).step_batches(0)[0].inputs


@pytest.mark.parametrize(
    ("model", "head"),
    [("tiny-llama", "auto"), ("tiny-roberta", "auto"), ("tiny-llama", "question_answering")],
)
def test_data_in_a_file_gives_the_batches_of_the_job(tmp_path: Path, model: str, head: Any) -> None:
    source = ModelSource(name=model, random_weights=True, head=head)
    job = Job(model=source, batch_size=2, seq_len=64, dtype="fp32", eval_batches=2)
    shape = resolve_shape(job)
    tokenized = tokenize(job, shape)
    assert tokenized is not None
    save_tokenized(tokenized, tmp_path / "data.safetensors")
    kept, made = batches_of(load_tokenized(tmp_path / "data.safetensors"), job), make_data(job, shape)
    assert kept.describe() == made.describe()
    pairs = [*zip(kept.evaluation, made.evaluation, strict=True)]
    pairs += [(kept.step_batches(step)[0], made.step_batches(step)[0]) for step in range(3)]
    for ours, theirs in pairs:
        assert ours.inputs.keys() == theirs.inputs.keys()
        assert all(torch.equal(ours.inputs[name], theirs.inputs[name]) for name in ours.inputs)
