"""Records: one type for both scenarios, earlier files, and statistics that are derived and kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engines.decoding import Sampling
from engines.errors import UserError
from harness.records.run import Predicted, Run, ScenarioName, Summary, load_run
from harness.records.stats import step_statistics
from run_records import make_plan, make_run, make_test_job, save_run

RESULTS = Path(__file__).parents[3] / "reports" / "results"


def decoding_run() -> Run:
    run = make_run("zo2", job=make_test_job(batch_size=3, accumulation=2))
    return replace(run, scenario="decode", sampling=Sampling(top_k=4), first_token_s=0.7, tokens=24)


@pytest.mark.parametrize("run", [make_run(), decoding_run()], ids=["train", "decode"])
def test_a_record_is_read_back_as_it_was_saved(run: Run, tmp_path: Path) -> None:
    save_run(run, tmp_path / "run.json")
    assert load_run(tmp_path / "run.json", run.scenario) == run


def test_a_decoding_record_of_before_the_scenario_was_named_is_one(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save_run(decoding_run(), path)
    document = json.loads(path.read_text())
    for key in ("scenario", "tokens", "criteria", "traced", "trace_file", "emulation"):
        del document[key]
    path.write_text(json.dumps(document))
    assert load_run(path, "decode") == replace(decoding_run(), tokens=None)


@pytest.mark.parametrize(("run", "wanted"), [(make_run(), "decode"), (decoding_run(), "train")])
def test_a_run_of_the_other_scenario_is_refused(run: Run, wanted: ScenarioName, tmp_path: Path) -> None:
    save_run(run, tmp_path / "run.json")
    with pytest.raises(UserError, match=r"run\.json: is a \w+ record, not a \w+ record"):
        load_run(tmp_path / "run.json", wanted)


def test_a_record_whose_job_lacks_its_batch_is_refused(tmp_path: Path) -> None:
    run = make_run()
    path = tmp_path / "run.json"
    save_run(replace(run, job={name: value for name, value in run.job.items() if name != "batch_size"}), path)
    with pytest.raises(UserError, match="says no batch_size"):
        load_run(path)


def test_tokens_of_a_step() -> None:
    """All micro-batches of an optimizer step; one of each sequence when decoding."""
    assert make_run(job=make_test_job(batch_size=3, seq_len=8, accumulation=2)).tokens_per_step == 48
    assert decoding_run().tokens_per_step == 3


def test_what_was_predicted_is_taken_from_the_plan() -> None:
    prediction = replace(make_plan("zo2").prediction, floor_s=0.5)
    kept = Predicted.of(prediction)
    for name in kept.__slots__:
        assert getattr(kept, name) == getattr(prediction, name)


def published() -> list[tuple[Path, ScenarioName]]:
    kinds: dict[ScenarioName, str] = {"train": "runs", "decode": "generations"}
    return [(path, kind) for kind, name in kinds.items() for path in sorted(RESULTS.glob(f"*/{name}/*.json"))]


def test_statistics_that_records_keep_are_those_of_their_samples() -> None:
    """The samples are the source. What a record of its time did not keep yet is `None` there."""
    checked = 0
    for path, scenario in published():
        run = load_run(path, scenario)
        derived = step_statistics(run.samples, run.tokens_per_step)
        for name in derived.__slots__:
            found, stored = getattr(derived, name), getattr(run.summary, name)
            if found != getattr(Summary(), name) and stored is not None:
                assert stored == found, (path, name)
                checked += 1
    assert checked > 500
