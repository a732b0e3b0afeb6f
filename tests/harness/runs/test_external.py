"""Trainers of others: a toy one through the whole line, and what is said of one that cannot be used."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_runs import SHAPE, scripted_job, scripted_plan

from engines.errors import UserError
from harness.pipeline import Sweep, prepare
from harness.records.job import Job
from harness.records.run import Run
from harness.runs.external.description import external_plans
from harness.runs.external.trainer import ExternalTrainer
from harness.runs.sweep import SweepOptions, run_sweep
from profiles.planning.plan import Plan

TOY = """
import sys, time
print("loading")
for step in range(1, int(sys.argv[1]) + 1):
    time.sleep(0.02)
    end = sys.argv[2] if sys.argv[2:] else "\\n"
    print(f"{{'loss': {4 - step / 10}, 'step': {step}, 'took': 0.5}}", end=end)
"""
REGEX = r"'loss': (?P<loss>[-+.\w]+), 'step': (?P<step>\d+), 'took': (?P<step_s>[.\d]+)"


def describe(folder: Path, script: str = TOY, **changes: Any) -> Path:
    """A description beside its script; `None` as a value leaves a key out."""
    folder.mkdir(exist_ok=True)
    (folder / "toy.py").write_text(script)
    values = {
        "name": "toy", "command": [sys.executable, "toy.py", "${steps}"], "read": {"regex": REGEX},
        **changes,
    }  # fmt: skip
    path = folder / "toy.toml"
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
    lines = [line for line in lines if line.partition(" ")[0] not in tables]
    for key, table in tables.items():
        lines += [
            f"[{key}]",
            *(f"{k} = {json.dumps(v)}" for k, v in table.items() if not isinstance(v, dict)),
        ]
        for inner, values_ in table.items():
            if isinstance(values_, dict):
                lines += [f"[{key}.{inner}]", *(f"{k} = {json.dumps(v)}" for k, v in values_.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def planned(path: Path, job: Job | None = None) -> Plan:
    (plan,) = external_plans([path], job or scripted_job())
    return plan


def run(path: Path, out: Path, job: Job | None = None, **options: Any) -> Run:
    job = job or scripted_job()
    (found,) = run_sweep(job, SHAPE, [planned(path, job)], out, SweepOptions(**options))
    return found


def test_a_toy_trainer_is_a_row_beside_the_others(tmp_path: Path) -> None:
    job = scripted_job()
    plans = [scripted_plan(), planned(describe(tmp_path / "toy"))]
    runs = run_sweep(job, SHAPE, plans, tmp_path / "out", SweepOptions(rounds=2))
    assert [one.engine for one in runs] == ["scripted", "external:toy", "external:toy", "scripted"]
    toy = runs[1]
    assert (toy.end_state, toy.end_reason) == ("ok", None)
    assert [(one.step, one.warmup) for one in toy.samples] == [(i, i < 2) for i in range(6)]
    assert [one.loss for one in toy.samples] == [3.9, 3.8, 3.7, 3.6, 3.5, 3.4]
    assert all(0 < one.step_s < 5 for one in toy.samples)
    assert sum(one.step_s for one in toy.samples) > 6 * 0.02
    assert toy.summary.tokens_per_s is not None
    assert toy.predicted is not None
    assert toy.predicted.step_s is None
    assert toy.notes is not None
    assert toy.notes[0].startswith("external: ")
    assert ":" not in toy.id


def test_times_may_be_told_and_lines_be_json(tmp_path: Path) -> None:
    told = describe(tmp_path / "told", clock="told")
    found = run(told, tmp_path / "a")
    assert [one.step_s for one in found.samples] == pytest.approx([0.5] * 6)
    script = TOY.replace("print(f\"{{'loss': {4 - step / 10}, 'step': {step}, 'took': 0.5}}\"",
                         "print('{\"train\": {\"loss\": 1.5}, \"s\": 0.25}'")  # fmt: skip
    keys = {"json": {"loss": "train.loss", "step_s": "s"}}
    found = run(describe(tmp_path / "json", script, read=keys, clock="told"), tmp_path / "b")
    assert [(one.loss, one.step_s) for one in found.samples] == [(1.5, pytest.approx(0.25))] * 6


def test_a_progress_bar_shows_steps_too(tmp_path: Path) -> None:
    bar = describe(tmp_path / "toy", command=[sys.executable, "toy.py", "${steps}", "\r"])
    assert run(bar, tmp_path / "out").end_state == "ok"


def test_more_steps_than_asked_for_are_not_waited_for(tmp_path: Path) -> None:
    endless = describe(tmp_path / "toy", command=[sys.executable, "toy.py", "100000"])
    assert run(endless, tmp_path / "out").end_state == "ok"


@pytest.mark.parametrize(
    ("changes", "end", "said"),
    [
        ({"command": ["no-such-trainer"]}, "not_available", "there is no command 'no-such-trainer' here"),
        (
            {"needs": {"modules": ["json", "no_such_module"], "install": "pip install it"}},
            "not_available", "no_such_module cannot be imported by",
        ),
        ({"needs": {"commands": ["no-such-tool"]}}, "not_available", "there is no command 'no-such-tool'"),
        ({"tokens_per_step": 4096}, "not_available", "takes 4,096 tokens a step, and the job's steps have 8"),
        ({"command": [sys.executable, "other.py"]}, "crash", "the command ended with exit code 2; its last"),
        ({"command": [sys.executable, "-c", "import nothing"]}, "crash", "No module named 'nothing'"),
        (
            {"read": {"regex": "score=(?P<loss>.*)"}},
            "crash", "no line of its output showed a step as 'read' says; its last line: {'loss'",
        ),
        ({"command": [sys.executable, "toy.py", "3"]}, "crash", "it ended after 3 of 6 steps"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_clear_line(
    changes: dict[str, Any], end: str, said: str, tmp_path: Path
) -> None:
    found = run(describe(tmp_path / "toy", **changes), tmp_path / "out")
    assert (found.end_state, said in str(found.end_reason)) == (end, True), found.end_reason
    assert "\n" not in str(found.end_reason)
    if end == "crash":
        assert (tmp_path / "out" / "logs" / f"{found.id}.log").exists()


@pytest.mark.parametrize(
    ("line", "end"),
    [
        ("print(\"{'loss': nan, 'step': 1, 'took': 1}\"); import time; time.sleep(60)", "nan_loss"),
        ("sys.exit('torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB')", "oom_gpu"),
        ("import time; time.sleep(60)", "timeout"),
        ("print(\"{'loss': 1, 'step': 1, 'took': 1}\\n{'loss': 1, 'step': 11, 'took': 1}\")", "crash"),
    ],
)
def test_its_ends_are_those_of_every_run(line: str, end: str, tmp_path: Path) -> None:
    job = scripted_job(timeout_s=3.0 if end == "timeout" else 60.0)
    found = run(describe(tmp_path / "toy", f"import sys\n{line}\n"), tmp_path / "out", job)
    assert found.end_state == end
    if end == "crash":
        assert "showed step 11 after 1; have it log every step" in str(found.end_reason)


def test_an_output_that_waits_in_a_buffer_has_no_times_to_read(tmp_path: Path) -> None:
    steps = "".join(f"{{'loss': 1, 'step': {step}, 'took': 1}}\n" for step in range(1, 6)).encode()
    found = run(describe(tmp_path / "toy", f"import os; os.write(1, {steps!r})\n"), tmp_path / "out")
    assert found.end_state == "crash"
    assert "showed 5 steps at once: its output is buffered" in str(found.end_reason)


def test_a_changed_description_is_refused_on_resume(tmp_path: Path) -> None:
    path = describe(tmp_path / "toy")
    run(path, tmp_path / "out")
    again = run(path, tmp_path / "out", resume=True, rounds=1)
    assert again.end_state == "ok"
    changed = describe(tmp_path / "toy", command=[sys.executable, "toy.py", "7"])
    with pytest.raises(UserError, match=r"external:toy differs in 'command' from the file"):
        run(changed, tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"comand": ["x"]}, "comand: there is no such key"),
        ({"command": None}, "command: is missing"),
        ({"command": "python toy.py"}, "command: must be a list of words"),
        ({"read": {}}, "read: says how a step is read, by either"),
        ({"read": {"regex": "loss"}}, r"regex has no group \(\?P<loss>"),
        ({"read": {"regex": "("}}, "regex is no regular expression"),
        ({"read": {"regex": "(?P<loss>.)"}, "clock": "told"}, r"regex has no group \(\?P<step_s>"),
        ({"clock": "guessed"}, "clock: must be 'arrival' or 'told'"),
        ({"name": "a b"}, "name: must be letters, digits"),
        ({"needs": 3}, "needs: must be a table"),
        ({"needs": {"command": ["x"]}}, "needs, command: there is no such key"),
        ({"needs": {"commands": "axolotl"}}, "needs.commands: must be a list of names"),
        ({"needs": {"modules": [3]}}, "needs.modules: must be a list of names"),
    ],
)
def test_a_file_that_is_no_description_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        planned(describe(tmp_path / "toy", **changes))
    assert len(str(caught.value).replace(str(tmp_path), "")) < 200


def test_it_needs_a_warm_up_and_a_name_of_its_own_and_no_emulation(tmp_path: Path) -> None:
    path = describe(tmp_path / "toy")
    cold = planned(path, scripted_job(warmup_steps=0))
    assert not cold.available
    assert "needs a warm-up step" in str(cold.why_not)
    with pytest.raises(UserError, match="its name, external:toy, is that of another file"):
        external_plans([path, path], scripted_job())
    sweep = Sweep(
        engines=["native"], out=tmp_path / "out", emulate=Path("laptop"), check_criteria=str, external=[path]
    )
    with pytest.raises(UserError, match="--external: what another trainer takes of the machine"):
        prepare(replace(scripted_job(), model=replace(scripted_job().model, name="opt-125m")), sweep)


def test_paths_in_its_command_are_names_in_the_record(tmp_path: Path) -> None:
    path = describe(tmp_path / "toy", command=[sys.executable, str(tmp_path / "toy" / "toy.py"), "${steps}"])
    found = run(path, tmp_path / "out")
    assert json.loads(str(found.plan.settings["command"]))[1:] == ["toy.py", "6"]
    assert str(tmp_path) not in (tmp_path / "out" / "runs" / f"{found.id}.json").read_text()


def test_a_study_of_quality_cannot_have_an_external_trainer() -> None:
    trainer = ExternalTrainer.__new__(ExternalTrainer)  # nothing of it is looked at
    with pytest.raises(UserError, match="nothing held out can be evaluated; compare it without --target"):
        trainer.evaluate([])
