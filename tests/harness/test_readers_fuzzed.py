"""Every reader of a file from elsewhere: what it makes of anything is a value or a `UserError`.

Each hypothesis example is a seed of `fuzzed_readers.CASES` files. `LSPZO_FUZZ=N` multiplies their number; the
ordinary run makes about twenty thousand. To see one again: the seed and the bytes are in the failure. An hour
of it apart: `python tests/support/fuzzed_readers.py 60`.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from fuzzed_readers import CASES, own_folder, readers, try_seed
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import as_json, change_value

from engines.errors import UserError
from harness.records.run import encode_run
from reports.load import load_folder
from reports.render import render_html, render_markdown, written
from run_records import make_sweep, save_run

FUZZ = int(os.environ.get("LSPZO_FUZZ", "1"))

NAMES = ("record", "plans", "machine", "profile", "manifest", "result", "job", "flags", "criteria",
         "configuration", "update log", "checksums", "rows", "records", "table", "text", "family", "model",
         "weights", "index", "tokenizer", "about the tokenizer")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_a_value_or_one_line(name: str) -> None:
    reader = readers()[name]
    with own_folder() as folder:

        @settings(
            max_examples=reader.seeds * FUZZ, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.integers(0, 2**63))
        def check(seed: int) -> None:
            for content, error in try_seed(reader, seed, Path(folder)):
                error.add_note(f"seed {seed}, content {content[:2000]!r}")
                raise error

        check()


def test_the_names_are_those_of_all_readers() -> None:
    assert set(NAMES) == set(readers())
    assert sum(reader.seeds for reader in readers().values()) * CASES >= 20_000


@settings(
    max_examples=25 * FUZZ, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(seed=st.integers(0, 2**63))
def test_a_report_with_a_record_that_was_tampered_with(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whole reports: what the readers let through has to be told, too."""
    folder = tmp_path_factory.getbasetemp() / "fuzzed-report"
    runs = make_sweep()
    for run in runs:
        save_run(run, folder / "runs" / f"{run.id}.json")
    bad = folder / "runs" / f"{runs[-1].id}.json"
    draw = random.Random(seed)
    for _ in range(5):
        bad.write_bytes(as_json(change_value(json.loads(encode_run(runs[-1])), draw)))
        content = bad.read_bytes()
        try:
            loaded = load_folder(folder)
            told = written(loaded, None)
            render_markdown(told)
            render_html(told)
        except UserError as error:
            if "unlike" not in str(error):  # of another machine or job: refused, by rule
                raise
        except Exception as error:
            error.add_note(f"seed {seed}, content {content[:2000]!r}")
            raise
