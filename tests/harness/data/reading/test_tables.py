"""Tables of text are read as they were written: by pandas, by GLUE, by spreadsheets, by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import UserError
from harness.data.examples import read_examples
from harness.data.reading.delimited import read_delimited
from harness.data.reading.files import Records
from harness.data.records import Examples
from harness.records.job import DataSource

CHARACTERS = st.sampled_from("abc\"\t\n\r,; é\u2028日😀\\'|")
"""No digit: a cell that holds a whole line of the same table, label and all, could be lines as well."""
CELL = st.text(CHARACTERS, max_size=12)
ROWS = st.lists(st.tuples(CELL, CELL, st.sampled_from(["0", "1"])), min_size=1, max_size=8)


def read(text: str, suffix: str) -> Records:
    return read_delimited("x", text, suffix, lambda cells: "text" in cells)


@given(rows=ROWS, suffix=st.sampled_from([".csv", ".tsv"]), quoting=st.sampled_from([0, 1]))
@settings(max_examples=400, deadline=None)
def test_what_pandas_writes_is_read_back_exactly(
    rows: list[tuple[str, str, str]], suffix: str, quoting: int
) -> None:
    frame = pd.DataFrame(rows, columns=["text", "text2", "label"]).replace({"": None})
    # A carriage return at a line's end without quotes is the line's end: pandas can write both, nobody tell.
    separator = "\t" if suffix == ".tsv" else ","
    written = frame.to_csv(index=False, sep=separator, quoting=quoting)
    found = read(written, suffix)
    assert not found.bad
    assert [tuple(record.values.values()) for record in found.records] == rows


@given(texts=st.lists(st.text(st.sampled_from("ab\"' ,;.é"), min_size=1, max_size=9), min_size=2, max_size=8))
@settings(max_examples=300, deadline=None)
def test_a_table_without_quoting_keeps_its_quotes(texts: list[str]) -> None:
    """As GLUE's are; one cell has a quote in its midst, as one of a real file has."""
    lines = [f"{text}\t{index % 2}" for index, text in enumerate([*texts, 'he said "no" again'])]
    found = read("\n".join(lines) + "\n", ".tsv")
    assert [record.values["1"] for record in found.records] == [*texts, 'he said "no" again']
    assert [record.place for record in found.records] == [f"line {n}" for n in range(1, len(lines) + 1)]


def examples_in(folder: Path, name: str, content: str | bytes, **said: object) -> Examples:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_examples(DataSource(train=str(path), **said))  # type: ignore[arg-type]


def rows_of(examples: Examples) -> set[tuple[str, int]]:
    return {(row.text, row.label) for row in (*examples.labelled, *examples.labelled_held_out)}


TABLES = {
    "index column": ("x.tsv", "\ttext\tlabel\n0\ta\t0\n1\tb\t1\n", {("a", 0), ("b", 1)}),
    "quoted": (
        "x.tsv",
        'text\tlabel\n"say ""wow"""\t0\n"tab\there"\t1\n',
        {('say "wow"', 0), ("tab\there", 1)},
    ),
    "a mark and CRLF": ("x.csv", b"\xef\xbb\xbftext,label\r\na,0\r\nb,1\r\n", {("a", 0), ("b", 1)}),
    "UTF-16": ("x.tsv", "text\tlabel\né\t0\nb\t1\n".encode("utf-16"), {("é", 0), ("b", 1)}),
    "semicolons": ("x.csv", "review;stars\ngut, ja;1\nna, ja;5\n", {("gut, ja", 0), ("na, ja", 1)}),
    "quotes that open and close in other lines": (
        "x.tsv",
        '"it is fun\t1\na\t0\nb\t1\nthey said so"\t0\nc\t1\nd\t0\ne\t1\nf\t0\n',
        {('"it is fun', 1), ("a", 0), ("b", 1), ('they said so"', 0), ("c", 1), ("d", 0), ("e", 1), ("f", 0)},
    ),
    "one cell in quotes": ("x.tsv", '"a"\t1\nb\t0\nc\t1\n', {('"a"', 1), ("b", 0), ("c", 1)}),
    "a header in .txt": ("x.txt", "sentence\tlabel\na\t0\nb\t1\n", {("a", 0), ("b", 1)}),
    "numbers that are words": ("x.tsv", "a\t1.0\nb\t3.0\n", {("a", 0), ("b", 1)}),
    "minus one": ("x.csv", "text,label\na,-1\nb,1\n", {("a", 0), ("b", 1)}),
}


@pytest.mark.parametrize("table", TABLES)
def test_tables_as_people_have_them(table: str, tmp_path: Path) -> None:
    name, content, rows = TABLES[table]
    assert rows_of(examples_in(tmp_path, name, content)) == rows


def test_columns_are_said_by_name_and_by_number(tmp_path: Path) -> None:
    cola = "gj04\t1\t\tour friends wo n't buy\ngj04\t0\t*\tthey drank the pub\n"
    assert rows_of(examples_in(tmp_path, "c.tsv", cola, columns={"text": "4", "label": "2"})) == {
        ("our friends wo n't buy", 1),
        ("they drank the pub", 0),
    }
    named = "id,when,body,verdict\n1,2,a,yes\n2,3,b,no\n"
    found = examples_in(tmp_path, "n.csv", named, columns={"text": "body", "label": "verdict"})
    assert rows_of(found) == {("a", 1), ("b", 0)}
    assert found.label_names == ("no", "yes")
    assert "passed over: id, when" in str(found.readings[0])


def test_mrpc_as_it_is_published(tmp_path: Path) -> None:
    rows = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    rows += '1\t7\t8\t"A , " he said\tB\r\n0\t9\t10\tC\tD " e\r\n'
    found = examples_in(tmp_path, "msr_paraphrase_train.txt", rows)
    pairs = {(row.text, row.second, row.label) for row in (*found.labelled, *found.labelled_held_out)}
    assert pairs == {('"A , " he said', "B", 1), ("C", 'D " e', 0)}
    assert found.is_paired


def test_scores_with_fractions_are_to_be_predicted(tmp_path: Path) -> None:
    found = examples_in(tmp_path, "s.csv", "sentence1,sentence2,score\na,b,4.5\nc,d,1\n")
    assert found.is_regression
    assert found.num_labels == 1
    assert {row.target for row in (*found.labelled, *found.labelled_held_out)} == {4.5, 1.0}
    stars = examples_in(
        tmp_path, "t.csv", "text,stars\na,1\nb,5\n", columns={"text": "text", "target": "stars"}
    )
    assert stars.is_regression


def test_words_are_numbered_as_the_model_does(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\na,Positive\nb,negative\n")
    found = read_examples(DataSource(train=str(path)), {"positive": 0, "neutral": 1, "negative": 2})
    assert rows_of(found) == {("a", 0), ("b", 2)}
    assert found.label_names == ("positive", "neutral", "negative")


def test_words_are_numbered_by_their_letters_whatever_their_capitals(tmp_path: Path) -> None:
    found = examples_in(tmp_path, "x.csv", "text,label\na,True\nb,false\n")
    assert found.label_names == ("false", "True")
    assert rows_of(found) == {("a", 1), ("b", 0)}


REFUSED = {
    "unknown column": ("x.csv", "text,label,foo\na,0,1\n", "label, foo: what foo means is not known"),
    "no names": ("x.csv", "a,b,c\nd,e,f\n", r"has 3 columns without names: 1 'a', 2 'b', 3 'c'.*--columns"),
    "a header of unknown names": ("x.tsv", "body\tis_toxic\na\t0\nb\t1\nc\t0\n", "'is_toxic' is there once"),
    "columns swapped": ("x.tsv", "".join(f"{n % 2}\ttext {n}\n" for n in range(12)), "numbers alone"),
    "open quote": ("x.csv", 'text,label\n"a,0\nb,1\n', "line 2: a quote is never closed"),
    "quote goes on": ("x.csv", 'text,label\n"a"b,0\nb,1\n', "line 2: a quoted cell goes on"),
    "broken quotes": ("x.tsv", 'text\tlabel\n"a ""b"""\t0\n"c" d\t1\n"e ""f"""\t1\n', "line 3: a quoted"),
    "more cells": ("x.csv", "text,label\na,0,1\nb,1\n", "line 2: has 3 cells, the header 2"),
    "R's row names": ("x.tsv", "text\tlabel\n1\ta\t0\n2\tb\t1\n", "line 2: has 3 cells, the header 2"),
    "zero byte": ("x.csv", "text,label\na\0,0\n", "zero byte in line 2"),
    "blank": ("x.tsv", '"\n"\n', "holds no row"),
    "a row in quotes": ("x.tsv", 'text\tlabel\n"text\tlabel\n"\n', "line 2"),
    "mixed": ("x.csv", "text,label\na,0\nb,no\n", "numbers and words for labels"),
    "capitals": (
        "x.csv", "text,label\na,true\nb,false\nc,TRUE\n", "in capitals alone, such as 'TRUE' and 'true'"
    ),
    "every row another": (
        "x.csv", "text,label\n" + "".join(f"a {i},{i}\n" for i in range(30)),
        "30 different labels in 30 records, such as 29; say which column is the label",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_understood_is_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    name, content, message = REFUSED[fault]
    with pytest.raises(UserError, match=message) as caught:
        examples_in(tmp_path, name, content)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 200


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--columns text=body: .*has no such column in its first line a, b"):
        examples_in(tmp_path, "x.csv", "a,b\nc,0\n", columns={"text": "body", "label": "b"})


def test_a_bad_row_is_left_out_and_named(tmp_path: Path) -> None:
    rows = "".join(f"text {n}\t{n % 2}\n" for n in range(20))
    table = rows + "without a tab\n" + "empty\t\n"
    found = examples_in(tmp_path, "x.tsv", table)
    assert len(rows_of(found)) == 20
    assert str(found.readings[0]).endswith("22 records; 2 left out, the first in line 21: has no tab")
    with pytest.raises(UserError, match="line 21: has no tab; fix it, or leave out --strict"):
        examples_in(tmp_path, "x.tsv", table, strict=True)
    with pytest.raises(UserError, match=r"line 21: has no tab; 3 of 23 .*--skip-bad"):
        examples_in(tmp_path, "x.tsv", table + "again\n")
    assert len(rows_of(examples_in(tmp_path, "x.tsv", table + "again\n", skip_bad=True))) == 20
