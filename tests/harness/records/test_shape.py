from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.errors import UserError
from harness.models.configs import NAMED_SHAPES, named_shape
from harness.records.shape import load_shape, save_shape


def test_sizes_come_back_without_paths_and_names_of_classes(tmp_path: Path) -> None:
    for name in NAMED_SHAPES:
        shape = named_shape(name)
        own = replace(shape, name=f"/home/someone/{name}", label_names=("ill", "well"))
        save_shape(own, tmp_path / "model.json")
        assert load_shape(tmp_path / "model.json") == shape
        text = (tmp_path / "model.json").read_text()
        assert "someone" not in text
        assert "ill" not in text.replace("llama", "")


def test_sizes_written_before_a_field_was_renamed_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    save_shape(named_shape("opt-125m"), path)
    path.write_text(path.read_text().replace("non_block_parameters", "outer_parameters"))
    assert load_shape(path) == named_shape("opt-125m")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_blocks", 0),
        ("num_blocks", 10**9),
        ("hidden", -1),
        ("vocabulary", 0),
        ("largest_tensor", 10**18),
        ("matrices", []),
        ("block_sizes", [1, 2]),
        ("head", "other"),
    ],
)
def test_sizes_that_no_model_has_are_refused(field: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    save_shape(named_shape("opt-125m"), path)
    document = json.loads(path.read_text())
    document["shape"][field] = value
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="restore or delete this"):
        load_shape(path)
