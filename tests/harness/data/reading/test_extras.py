"""Parquet files and data sets of the hub, read by the libraries; skipped where they are missing."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hub_server import hub_with

from engines.errors import UserError
from harness.data.examples import read_examples
from harness.data.reading.extras import is_hub_id
from harness.data.records import Examples
from harness.records.job import DataSource

ROOT = Path(__file__).parents[4]
pytest.importorskip("pyarrow")

READ = """
import json, sys
from engines.errors import UserError
from harness.data.examples import read_examples
from harness.records.job import DataSource
for source in sys.argv[1:]:
    try:
        found = read_examples(DataSource(train=source))
        rows = [(row.text, row.label) for row in (*found.labelled, *found.labelled_held_out)]
        told = {"rows": rows, "names": found.label_names, "reading": str(found.readings[0])}
    except UserError as error:
        told = {"error": str(error)}
    print(json.dumps(told))
"""


def parquet(frame: pd.DataFrame) -> bytes:
    memory = io.BytesIO()
    frame.to_parquet(memory, index=False)
    return memory.getvalue()


def examples_in(path: Path, content: bytes) -> Examples:
    path.write_bytes(content)
    return read_examples(DataSource(train=str(path)))


def test_a_parquet_file_is_read(tmp_path: Path) -> None:
    frame = pd.DataFrame({"review": [f"film {i},\n'ok'" for i in range(20)], "stars": [1, 5] * 10})
    found = examples_in(tmp_path / "x.parquet", parquet(frame))
    assert {row.text for row in (*found.labelled, *found.labelled_held_out)} == set(frame["review"])
    assert found.label_names == ("1", "5")
    assert "Parquet; text = review, label = stars" in str(found.readings[0])


def test_chats_in_a_parquet_file_are_read(tmp_path: Path) -> None:
    """Lists of objects, and a cell that is missing."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    found = examples_in(tmp_path / "x.parquet", parquet(pd.DataFrame({"messages": [*[turns] * 11, None]})))
    assert len(found.chats) + len(found.chats_held_out) == 11
    assert found.readings[0].left_out.count == 1


def test_what_is_no_parquet_file_is_refused(tmp_path: Path) -> None:
    whole = parquet(pd.DataFrame({"text": ["a", "b"], "label": [0, 1]}))
    for content in (b"text\tlabel\n", whole[:-9]):
        with pytest.raises(UserError, match="is no Parquet file"):
            examples_in(tmp_path / "x.parquet", content)


def test_data_sets_of_the_hub_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    frame = pd.DataFrame({"text": [f"film {i}" for i in range(20)], "label": [i % 2 for i in range(20)]})
    about = {
        "features": [
            {"name": "text", "dtype": "string"},
            {"name": "label", "dtype": {"class_label": {"names": {"0": "neg", "1": "pos"}}}},
        ]
    }
    card = f"---\n{json.dumps({'dataset_info': about})}\n---\n"
    files = {"README.md": card.encode(), "data/train-00000-of-00001.parquet": parquet(frame)}
    sources = ("org/films", "org/films@test", "org/films:old", "org/none")
    with hub_with("org/films", files) as address:
        given = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", READ, *sources], cwd=ROOT, env=os.environ | given, check=True,
            capture_output=True, text=True, timeout=250,
        )  # fmt: skip
    read, *refused = (json.loads(line) for line in done.stdout.splitlines())
    assert sorted(map(tuple, read["rows"])) == sorted(zip(frame["text"], frame["label"], strict=True))
    assert read["names"] == ["neg", "pos"]
    assert "text = text, label = label" in read["reading"] or "label (neg 0, pos 1)" in read["reading"]
    for told, why in zip(refused, ("no split 'test'; choose with @ from: train",
                                   "no configuration 'old'; choose with : from: default",
                                   "the hub has none of that name"), strict=True):  # fmt: skip
        assert why in told["error"]
        assert len(told["error"]) < 200


def test_a_hub_that_is_not_asked_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="not in the cache, and the hub cannot be reached; connect") as told:
        read_examples(DataSource(train="stanfordnlp/sst2"))
    assert len(str(told.value)) < 200


def test_a_path_is_no_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert is_hub_id("stanfordnlp/sst2")
    assert is_hub_id("nyu-mll/glue:cola@validation")
    assert not any(is_hub_id(each) for each in ("data/cola", "./a/b", "~/a", "org/x.tsv", "plain", "a/b/c"))
