from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path

import pytest

from engines.errors import UserError
from reports.criteria import METRICS, default_criteria, init_text, load_criteria, parse_criteria

GOOD = """
schema_version = 1
[[criterion]]
id = "speed"
metric = "step_s"
engine = "zo2"
comparison = "at most"
threshold = 2
level = "must"
why = "a night is enough"
"""


def test_the_file_that_init_writes_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "criteria.toml"
    path.write_text(init_text(), encoding="utf-8")
    criteria = load_criteria(path)
    assert criteria.criteria == default_criteria().criteria
    assert criteria.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert criteria.written_down
    assert not default_criteria().written_down
    assert {c.level for c in criteria.criteria} == {"must", "want"}


def test_the_file_explains_every_metric_within_its_width() -> None:
    text = init_text()
    tomllib.loads(text)
    comments = [line for line in text.splitlines() if line.startswith("#")]
    for metric in METRICS:
        assert any(line.startswith(f"#   {metric} ") for line in comments)
    assert max(len(line) for line in text.splitlines()) <= 112
    assert text.isascii()


@pytest.mark.parametrize(
    ("comparison", "below", "equal", "above"),
    [
        ("at most", True, True, False),
        ("less than", True, False, False),
        ("at least", False, True, True),
        ("more than", False, False, True),
    ],
)
def test_comparisons(comparison: str, below: bool, equal: bool, above: bool) -> None:
    criterion = parse_criteria(GOOD.replace("at most", comparison).encode(), "x").criteria[0]
    assert [criterion.holds(value) for value in (1.9, 2.0, 2.1)] == [below, equal, above]
    assert not criterion.holds(float("nan"))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("schema_version = 1", "", "no schema_version"),
        ("schema_version = 1", "schema_version = 99", "update lspzo-bench"),
        ("schema_version = 1", "schema_version = 'one'", "no schema_version"),
        ('"step_s"', '"speed"', "criterion 1 ('speed'): metric"),
        ('"zo2"', '"zo3"', "engine must be"),
        ('"at most"', '"<="', "comparison"),
        ("threshold = 2", "threshold = nan", "finite"),
        ("threshold = 2", "", "threshold"),
        ('"must"', '"should"', "level"),
        ('why = "a night is enough"', 'why = "x"\nweight = 2', "weight"),
        ('id = "speed"', 'id = " "', "id must not be empty"),
        ("[[criterion]]", "[criterion", "not valid TOML"),
    ],
)
def test_mistakes_are_one_clear_line(old: str, new: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_criteria(GOOD.replace(old, new).encode(), "criteria.toml")
    message = str(caught.value)
    assert message.startswith("criteria.toml")
    assert expected in message
    assert "\n" not in message


def test_repeated_ids_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two criteria have the id 'speed'"):
        parse_criteria((GOOD + GOOD.replace("schema_version = 1", "")).encode(), "x")
    with pytest.raises(UserError, match="criteria init"):
        load_criteria(tmp_path / "none.toml")
    with pytest.raises(UserError, match="is a folder"):
        load_criteria(tmp_path)
    with pytest.raises(UserError, match="not valid TOML"):
        parse_criteria(b"\xff\xfe", "x")
