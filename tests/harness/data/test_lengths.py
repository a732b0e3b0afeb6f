"""Batches of like lengths: few shapes, nothing twice in an epoch, a function of seed and step."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import UserError
from harness.cli.app import app
from harness.data.batches import Data, make_data
from harness.data.lengths import epoch_order
from harness.data.padding import padded_length, padded_lengths
from harness.data.token_tables import rows_in
from harness.data.tokenized import load_tokenized, save_tokenized
from harness.quality.documents import StudySizes
from harness.quality.splits import split
from harness.records.job import DataSource, Job, ModelSource
from harness.resolve import resolve_shape


@given(seq_len=st.integers(1, 8192))
def test_there_are_few_lengths_and_none_is_far_from_the_next(seq_len: int) -> None:
    lengths = padded_lengths(seq_len)
    assert len(lengths) <= 7
    assert lengths[-1] == seq_len
    assert list(lengths) == sorted(set(lengths))
    assert all(length % 8 == 0 for length in lengths[:-1])
    assert all(after <= 2 * before for before, after in pairwise(lengths))
    assert padded_length(seq_len, seq_len) == seq_len


@given(rows=st.integers(1, 60), batch_size=st.integers(1, 7), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_has_every_row_once(rows: int, batch_size: int, seed: int, epoch: int) -> None:
    lengths = np.arange(rows, dtype=np.int64) % 60 + 1
    begins = -epoch * rows % batch_size
    order = epoch_order(lengths, 64, batch_size, begins, torch.Generator().manual_seed(seed))
    assert sorted(order) == list(range(rows))


def data_of(path: Path, **fields: Any) -> Data:
    values = {"batch_size": 4, "seq_len": 128, "eval_batches": 3, "padding": "longest", **fields}
    job = Job(
        model=ModelSource(name="tiny-roberta", random_weights=True),
        data=DataSource(train=str(path)),
        **values,
    )
    return make_data(job, resolve_shape(job))


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Two hundred texts, most of them short, in the order of their classes."""
    path = tmp_path / "uneven.tsv"
    lines = [f"{n:03d} {'x' * (5 if n % 5 else 90)}\t{int(n >= 100)}\n" for n in range(200)]
    path.write_text("".join(lines))
    return path


def test_like_lengths_come_together(uneven: Path) -> None:
    data, whole = data_of(uneven), data_of(uneven, padding="seq_len")
    assert data.padded_share(45) < 0.5 < whole.padded_share(45)
    shapes = {data.step_batches(step)[0].inputs["input_ids"].shape[1] for step in range(45)}
    assert len(shapes) > 1
    assert shapes <= set(padded_lengths(128))
    seen = [
        tuple(row.tolist()[:5])
        for step in range(45)
        for row in data.step_batches(step)[0].inputs["input_ids"]
    ]
    assert len(set(seen)) == 180  # one epoch
    again = data_of(uneven)
    again.step_batches(7)
    assert torch.equal(
        again.step_batches(50)[0].inputs["input_ids"], data.step_batches(50)[0].inputs["input_ids"]
    )


@pytest.mark.parametrize("padding", ["longest", "seq_len"])
def test_an_evaluation_is_drawn_by_the_seed(uneven: Path, tmp_path: Path, padding: str) -> None:
    other = tmp_path / "held_out.tsv"
    other.write_text("".join(f"t{n:03d}\t{int(n >= 100)}\n" for n in range(200)))

    def evaluated(**fields: Any) -> tuple[list[int], list[list[int]]]:
        job = Job(
            model=ModelSource(name="tiny-roberta", random_weights=True),
            data=DataSource(train=str(uneven), evaluate=str(other)),
            batch_size=4, seq_len=64, padding=padding, **{"eval_batches": 8, **fields},
        )  # fmt: skip
        batches = make_data(job, resolve_shape(job)).evaluation
        labels = [label for batch in batches for label in batch.inputs["labels"].tolist()]
        return labels, [row for batch in batches for row in batch.inputs["input_ids"].tolist()]

    labels, rows = evaluated()
    assert set(labels) == {0, 1}
    assert evaluated() == (labels, rows)
    assert evaluated(seed=1)[1] != rows
    everything, rows = evaluated(eval_batches=50)
    assert sum(everything) == 100
    assert len({tuple(row[:6]) for row in rows}) == 200


def test_held_out_data_that_is_trained_on_is_counted(uneven: Path, tmp_path: Path) -> None:
    """With the training file given for `--eval-data`, all; of another file, its first half."""
    half = tmp_path / "half.tsv"
    lines = uneven.read_text().splitlines(keepends=True)
    half.write_text("".join(lines[:20]) + "".join(f"other {n}\t{n % 2}\n" for n in range(20)))

    def counted(path: Path | None, **fields: Any) -> int:
        job = Job(
            model=ModelSource(name="tiny-roberta", random_weights=True),
            data=DataSource(train=str(uneven), evaluate=None if path is None else str(path)),
            batch_size=4, seq_len=128, **{"eval_batches": 10, **fields},
        )  # fmt: skip
        data = make_data(job, resolve_shape(job))
        told = any("held-out examples are in the training data too" in line for line in data.readings)
        assert told is (data.evaluated_in_training > 0)
        return data.evaluated_in_training

    assert counted(uneven, eval_batches=3) == 12
    assert counted(half) == 20
    assert counted(None) == 0


def test_test_data_that_is_trained_on_is_told_and_rows_are_those_of_the_parts(
    uneven: Path, tmp_path: Path
) -> None:
    """Of a study, which has rows of its own in each part, and reads a third file."""
    half = tmp_path / "half.tsv"
    lines = uneven.read_text().splitlines(keepends=True)
    half.write_text("".join(lines[:20]) + "".join(f"other {n}\t{n % 2}\n" for n in range(20)))
    job = Job(
        model=ModelSource(name="tiny-roberta", random_weights=True),
        data=DataSource(train=str(uneven), evaluate=str(half)),
        batch_size=4, seq_len=128,
    )  # fmt: skip
    found = split(job, resolve_shape(job), str(uneven), StudySizes(development=10, test=20))
    (told,) = [each for each in found.readings if " test examples are in the training data too" in each]
    assert told.startswith("20 of 20 ")
    assert found.held_out_in_training == tuple(rows_in(found.held_out, found.train))
    assert 0 < len(found.held_out_in_training) < 10
    save_tokenized(found, tmp_path / "data.safetensors")
    assert load_tokenized(tmp_path / "data.safetensors").held_out_in_training == found.held_out_in_training


def test_data_shows_what_the_model_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.csv"
    path.write_text("review,stars\n" + "".join(f"text {n % 10},{1 + n % 2}\n" for n in range(60)))
    arguments = ["data", str(path), "--model", "tiny-llama", "--random-weights", "--seq-len", "64"]
    app([*arguments, "--examples", "1", "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["readings"] == [
        "x.csv: CSV, with a header; text = review, label = stars (1 0, 2 1); 60 records",
        "6 of 6 held-out examples are in the training data too, so that what is measured on them says "
        "nothing of others",
    ]
    assert sum(found["label_counts"].values()) == found["training"] == 54
    assert found["duplicates"] == 54 - 10
    assert found["held_out_in_training"] == 6
    (example,) = found["examples"]
    assert "".join(example["tokens"]).removeprefix("<1>").startswith("text ")
    assert sum(example["learnt"]) == 1
    app([*arguments, "--examples", "1"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "labels: 1 " in shown
    assert ">>" in shown
    with pytest.raises(UserError, match="drawn"):
        app(["data", "random", "--model", "tiny-llama", "--random-weights"], standalone_mode=False)
