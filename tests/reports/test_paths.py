"""What is written to be given away tells no place on the machine it was written on."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from tiny_machine import make_machine
from tiny_tokenizer import write_tokenizer
from transformers import LlamaForCausalLM

from harness.cli import app
from profiles.machine import save_machine
from tiny_models import tiny_config

RESULTS = Path(__file__).parents[2] / "reports" / "results"

NEEDED_TO_RESUME = {"job.toml", "plans.json"}
"""Hold paths as they were given: the model's and the data's, and a method's folder in its settings."""


def files_with(place: Path, below: Path) -> set[str]:
    """Files below `below` that hold the path `place`."""
    told = str(place).encode()
    return {
        path.relative_to(below).as_posix()
        for path in below.rglob("*")
        if path.is_file() and told in path.read_bytes()
    }


def program(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["lspzo-bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert stop.value.code in (None, 0, 1, 4, 5)


@pytest.fixture
def job(tmp_path: Path) -> list[object]:
    """Flags with absolute paths wherever one can be given."""
    model = tmp_path / "my models" / "tiny"
    LlamaForCausalLM(tiny_config("llama", tied=False)).save_pretrained(model)
    write_tokenizer(model)
    data = tmp_path / "private" / "notes.txt"
    data.parent.mkdir()
    data.write_text("a sentence of one person about another\n" * 60)
    return [
        "--model", model, "--data", data, "--eval-data", data, "--seq-len", 16, "--dtype", "fp32",
        "--steps", 2, "--warmup-steps", 1, "--eval-batches", 1, "--quiet",
    ]  # fmt: skip


@pytest.mark.usefixtures("forked_programs")
def test_a_sweep_and_its_report_tell_names_and_not_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: list[object]
) -> None:
    save_machine(make_machine(gpu=False), tmp_path / "machine.json")
    out = tmp_path / "out"
    sweep = [
        "poc", *job, "--rounds", 1, "--profile", tmp_path / "machine.json", "--out", out,
        "--engines", "native,zo2", "--set", f"zo2.disk_folder={tmp_path}/spill", "--set", "zo2.disk_blocks=1",
    ]  # fmt: skip
    program(monkeypatch, *sweep)
    assert files_with(tmp_path, out) == NEEDED_TO_RESUME
    records = [json.loads(path.read_text()) for path in (out / "runs").iterdir()]
    assert {record["model"]["name"] for record in records} == {"tiny"}
    assert {record["job"]["data"]["train"] for record in records} == {"notes.txt"}
    assert {record["end_state"] for record in records} == {"ok"}
    for record in records:
        facts = record["governance"]
        places = {each["what"]: (each["where"], each["name"]) for each in facts["places"]}
        assert places["weights"] == ("user", "tiny")
        assert places["data"] == ("user", "notes.txt")
        assert places.get("spill") == (("user", "spill") if record["engine"] == "zo2" else None)
        assert (facts["hub"], facts["sent"]) == ("not needed", "nothing")
    assert len(json.loads((out / "verdict.json").read_text())["governance"]) == 13
    program(monkeypatch, *sweep, "--resume")  # with the paths that only job.toml has
    assert files_with(tmp_path, out) == NEEDED_TO_RESUME


@pytest.mark.usefixtures("forked_programs")
def test_a_run_that_failed_keeps_a_log_without_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: list[object]
) -> None:
    save_machine(make_machine(gpu=False), tmp_path / "machine.json")
    out = tmp_path / "out"
    program(
        monkeypatch, "compare", *job, "--rounds", 1, "--profile", tmp_path / "machine.json", "--out", out,
        "--engines", "zo2", "--set", "zo2.disk_blocks=1",
        "--set", f"zo2.disk_folder={tmp_path}/there is/none",
    )  # fmt: skip
    assert files_with(tmp_path, out) == NEEDED_TO_RESUME
    assert list((out / "logs").iterdir())


def test_a_trained_model_tells_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: list[object]
) -> None:
    out = tmp_path / "run"
    flags = [each for each in job if each not in ("--warmup-steps", 1)]
    program(monkeypatch, "run", "--engine", "native", *flags, "--eval-batches", 1, "--out", out)
    assert files_with(tmp_path, out) == {"job.toml"}


ROOTS = rb"home|root|Users|tmp|var|mnt|media|opt|srv|work|workspace|data|scratch|usr"
"""Where people have their files on a machine, and programs."""


def test_published_results_tell_no_place() -> None:
    told = re.compile(rb"(?<![\w./-])(?:/(?:" + ROOTS + rb")/[\w.-]|~/[\w.-])|[A-Z]:\\\\Users")
    found = {
        path.relative_to(RESULTS).as_posix(): told.findall(path.read_bytes())
        for path in RESULTS.rglob("*")
        if path.is_file()
    }
    assert len(found) > 400
    assert {name: each for name, each in found.items() if each} == {}
    assert told.search(b'"folder": "/home/ada"')
    assert told.search(b"--data ~/notes.txt")
