"""Going on from an update log, and exporting at any time: the weights are those of a run left alone."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from train_runs import (
    Killed,
    assert_same_weights,
    die_at,
    finish,
    log_of,
    run,
    start_program,
    stop_after,
    tiny_job,
)

from engines import load_engine
from engines.errors import UserError
from engines.files.checksums import SUMS
from harness.progress import Progress
from harness.training import restore
from harness.training.train import export_run
from harness.training.update_log import HEADER_BYTES, RECORD_BYTES, read_update_log

ZEROTH_ORDER = ("mezo", "zo2")
OTHER = {"mezo": "zo2", "zo2": "mezo"}


def export(out: Path, to: Path | None = None) -> Path:
    return export_run(out, to, Progress(quiet=True))


def killed(
    monkeypatch: pytest.MonkeyPatch, out: Path, engine: str, steps: int, job: Any = None, **more: Any
) -> None:
    """A run that came to its end after so many steps, in this process."""
    with monkeypatch.context() as patch:
        die_at(patch, engine, steps)
        with pytest.raises(Killed):
            run(out, engine, job, **more)


def count_steps(monkeypatch: pytest.MonkeyPatch, engine: str) -> list[int]:
    cls = load_engine(engine)
    original, count = cls.step, [0]

    def counted(self: Any, batches: Any) -> Any:
        count[0] += 1
        return original(self, batches)

    monkeypatch.setattr(cls, "step", counted)
    return count


def updates_log(out: Path) -> Path:
    return out / "updates.log"


# --- resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ZEROTH_ORDER)
@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({}, {}),
        ({"dtype": "bf16"}, {"learning_rate": 1e-3, "weight_decay": 0.01, "schedule": "cosine"}),
        ({"model": {"name": "tiny-roberta", "random_weights": True}}, {}),
    ],
)
def test_a_killed_run_goes_on_from_its_log_alone(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    engine: str,
    fields: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    job = tiny_job(eval_batches=1, **fields)
    whole = run(tmp_path / "whole", engine, job, **settings)
    out = tmp_path / "parts"
    killed(monkeypatch, out, engine, 4, job, **settings)
    assert not (out / "checkpoints").exists()
    assert updates_log(out).stat().st_size == HEADER_BYTES + 4 * RECORD_BYTES
    steps = count_steps(monkeypatch, engine)
    assert_same_weights(whole, run(out, engine, job, resume=True, **settings))
    assert steps == [2]
    assert log_of(out) == log_of(tmp_path / "whole")
    assert updates_log(out).read_bytes() == updates_log(tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("engine", ZEROTH_ORDER)
def test_each_goes_on_from_the_others_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str
) -> None:
    """The knobs of the first start stay those of the whole run, also through a second change."""
    whole = run(tmp_path / "whole", engine, learning_rate=2e-5)
    out = tmp_path / "parts"
    killed(monkeypatch, out, engine, 2, learning_rate=2e-5)
    killed(monkeypatch, out, OTHER[engine], 2, resume=True)
    assert json.loads((out / "engine.json").read_text())["engine"] == OTHER[engine]
    assert_same_weights(whole, run(out, engine, resume=True))
    assert updates_log(out).read_bytes() == updates_log(tmp_path / "whole").read_bytes()


def test_a_run_of_an_earlier_version_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its record names a setting that is gone, with the value of today's method."""
    whole = run(tmp_path / "whole", "zo2")
    out = tmp_path / "parts"
    killed(monkeypatch, out, "zo2", 2)
    record = json.loads((out / "engine.json").read_text())
    record["settings"]["layer_share"] = 1.0
    (out / "engine.json").write_text(json.dumps(record))
    assert_same_weights(whole, run(out, "zo2", resume=True))


@pytest.mark.parametrize("engine", ZEROTH_ORDER)
def test_a_checkpoint_and_the_records_after_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str
) -> None:
    whole = run(tmp_path / "whole", engine)
    out = tmp_path / "parts"
    killed(monkeypatch, out, engine, 5, save_every=2)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004"]
    steps = count_steps(monkeypatch, engine)
    assert_same_weights(whole, run(out, engine, save_every=2, resume=True))
    assert steps == [1]


def test_a_torn_record_and_a_line_too_many_are_taken_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed between the line of a step and its record, or inside of either, a run loses that step."""
    job = tiny_job(eval_batches=1)
    whole = run(tmp_path / "whole", "zo2", job)
    out = tmp_path / "parts"
    killed(monkeypatch, out, "zo2", 4, job)
    content = updates_log(out).read_bytes()
    updates_log(out).write_bytes(content[:-5])
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "loss": 1.0}\n{"st')
    steps = count_steps(monkeypatch, "zo2")
    assert_same_weights(whole, run(out, "zo2", job, resume=True))
    assert steps == [3]
    assert log_of(out) == log_of(tmp_path / "whole")


def test_a_finished_run_can_be_resumed_and_changes_nothing(tmp_path: Path) -> None:
    first = run(tmp_path / "out", "mezo")
    content = updates_log(tmp_path / "out").read_bytes()
    shutil.copytree(first, tmp_path / "first")
    assert_same_weights(tmp_path / "first", run(tmp_path / "out", "mezo", resume=True))
    assert updates_log(tmp_path / "out").read_bytes() == content


def test_a_run_whose_log_was_lost_goes_on_from_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its new log begins there, and says so once that checkpoint is gone too."""
    whole = run(tmp_path / "whole", "mezo")
    out = tmp_path / "parts"
    killed(monkeypatch, out, "mezo", 3, save_every=2)
    updates_log(out).unlink()
    killed(monkeypatch, out, "mezo", 2, resume=True)
    contents = read_update_log(updates_log(out))
    assert (contents.origin.start_step, contents.end_step) == (2, 4)
    assert_same_weights(whole, run(out, "mezo", resume=True))
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "model")
    with pytest.raises(UserError, match="goes on from a checkpoint of step 2, which is not there"):
        export(out)
    with pytest.raises(UserError, match="goes on from a checkpoint of step 2, which is not there"):
        run(out, "mezo", resume=True)


def test_a_log_shorter_than_the_checkpoint_is_begun_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = run(tmp_path / "whole", "zo2")
    out = tmp_path / "parts"
    killed(monkeypatch, out, "zo2", 5, save_every=4)
    updates_log(out).write_bytes(updates_log(out).read_bytes()[: HEADER_BYTES + 2 * RECORD_BYTES])
    assert_same_weights(whole, run(out, "zo2", resume=True))
    assert read_update_log(updates_log(out)).origin.start_step == 4


def test_a_log_of_another_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    killed(monkeypatch, tmp_path / "other", "mezo", 3, tiny_job(seed=1))
    out = tmp_path / "out"
    killed(monkeypatch, out, "mezo", 3)
    shutil.copy(updates_log(tmp_path / "other"), updates_log(out))
    for call in (lambda: run(out, "mezo", resume=True), lambda: export(out)):
        with pytest.raises(UserError, match="belongs to another job or to other settings") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert updates_log(out).read_bytes() == updates_log(tmp_path / "other").read_bytes()


def test_a_model_that_has_changed_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The updates would lead elsewhere from other weights, even of one tensor of the same shape."""
    base = run(tmp_path / "base", "native", tiny_job(steps=1))
    (base / SUMS).unlink()  # they would tell it first
    job = tiny_job(model={"name": str(base)})
    out = tmp_path / "out"
    killed(monkeypatch, out, "mezo", 3, job)
    weights = load_file(base / "model.safetensors")
    name = max(weights)
    save_file(weights | {name: weights[name] * 1.01}, base / "model.safetensors", metadata={"format": "pt"})
    before = updates_log(out).read_bytes(), log_of(out)
    for call in (lambda: run(out, "mezo", job, resume=True), lambda: export(out)):
        with pytest.raises(UserError, match="starts from other weights"):
            call()
    assert (updates_log(out).read_bytes(), log_of(out)) == before
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    run(out, "mezo", job, resume=True)


def test_a_folder_that_is_trained_into_is_not_resumed_by_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cls = load_engine("mezo")
    original = cls.step
    refused: list[str] = []

    def step(self: Any, batches: Any) -> Any:
        if not refused:
            refused.append("")
            with pytest.raises(UserError) as caught:
                run(out, "mezo", resume=True)
            refused[0] = str(caught.value)
        return original(self, batches)

    monkeypatch.setattr(cls, "step", step)
    run(out, "mezo")
    assert "another process writes into this folder" in refused[0]
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("save_every", "checkpoints"), [(0, []), (4, ["step-00000003"])])
def test_ctrl_c_writes_a_full_checkpoint_only_where_some_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, save_every: int, checkpoints: list[str]
) -> None:
    whole = run(tmp_path / "whole", "zo2")
    out = tmp_path / "out"
    cls = load_engine("zo2")
    original, calls = cls.step, [0]

    def step(self: Any, batches: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            signal.raise_signal(signal.SIGINT)
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run(out, "zo2", save_every=save_every)
    assert read_update_log(updates_log(out)).end_step == 3
    assert [path.name for path in out.glob("checkpoints/*")] == checkpoints
    assert_same_weights(whole, run(out, "zo2", save_every=save_every, resume=True))


def test_a_full_disk_is_one_line_and_costs_the_step_in_progress(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The limit on file sizes takes the part of a full disk: it lets half of a record through."""
    whole = run(tmp_path / "whole", "mezo")
    out = tmp_path / "out"
    cls = load_engine("mezo")
    original, calls = cls.step, [0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def step(self: Any, batches: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            full = HEADER_BYTES + 2 * RECORD_BYTES + 10
            (out / "log.jsonl").write_text("")  # far from the limit itself
            resource.setrlimit(resource.RLIMIT_FSIZE, (full, limits[1]))
        return original(self, batches)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(cls, "step", step)
            with pytest.raises(UserError, match=r"updates.log: cannot be written .*--resume"):
                run(out, "mezo")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert updates_log(out).stat().st_size == HEADER_BYTES + 2 * RECORD_BYTES + 10
    assert_same_weights(whole, run(out, "mezo", resume=True))


def test_replaying_shows_progress(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(monkeypatch, tmp_path / "out", "zo2", 3)
    export_run(tmp_path / "out", None, Progress(quiet=False))
    said = capsys.readouterr().err
    assert "replaying updates" in said
    assert "exported the weights after 3 of 6 steps" in said


def test_methods_with_gradients_write_no_log(tmp_path: Path) -> None:
    run(tmp_path / "out", "native", tiny_job(steps=1))
    assert not updates_log(tmp_path / "out").exists()


# --- exporting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ZEROTH_ORDER)
@pytest.mark.parametrize("save_every", [0, 2])
def test_the_export_of_a_killed_run_is_a_shorter_runs_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str, save_every: int
) -> None:
    shorter = run(tmp_path / "shorter", engine, tiny_job(steps=3))
    out = tmp_path / "out"
    killed(monkeypatch, out, engine, 3, save_every=save_every)
    before = updates_log(out).read_bytes(), log_of(out)
    folder = export(out)
    assert folder == out / "export-step-00000003"
    assert_same_weights(shorter, folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in shorter.iterdir()}
    assert_same_weights(shorter, export(out, tmp_path / "elsewhere"))
    assert (updates_log(out).read_bytes(), log_of(out)) == before
    run(out, engine, resume=True, save_every=save_every)
    assert_same_weights(out / "model", export(out))


@pytest.mark.parametrize("engine", ZEROTH_ORDER)
def test_a_run_that_goes_on_can_be_exported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str
) -> None:
    """Between two of its steps, and with half of a record at the end of its log."""
    out = tmp_path / "out"
    cls = load_engine(engine)
    original, calls = cls.step, [0]

    def step(self: Any, batches: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            shutil.copytree(out, tmp_path / "snapshot")
            with updates_log(tmp_path / "snapshot").open("ab") as log:
                log.write(b"half")
            export(out, tmp_path / "between")
            export(tmp_path / "snapshot", tmp_path / "torn")
        return original(self, batches)

    whole = run(tmp_path / "whole", engine)
    with monkeypatch.context() as patch:
        patch.setattr(cls, "step", step)
        model = run(out, engine)
    assert_same_weights(whole, model)
    four = run(tmp_path / "four", engine, tiny_job(steps=4))
    assert_same_weights(four, tmp_path / "between")
    assert_same_weights(four, tmp_path / "torn")


class Noting:
    """An engine whose checkpoint is one line."""

    def __init__(self, line: str = "") -> None:
        self.line = line

    def save(self, folder: Path) -> None:
        (folder / "line").write_text(self.line)

    def load(self, folder: Path) -> None:
        self.line = (folder / "line").read_text()


@pytest.mark.parametrize("at", range(6))
def test_a_kill_while_a_step_is_saved_again_leaves_a_whole_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: int
) -> None:
    """Killed before each change of the folder in turn: renames and removals of the second save."""
    first: Any = Noting("first")
    restore.write_checkpoint(first, tmp_path, 3)
    calls = [0]

    def dying(change: Any) -> Any:
        def one(*arguments: Any, **named: Any) -> Any:
            if calls[0] == at:
                raise Killed
            calls[0] += 1
            return change(*arguments, **named)

        return one

    second: Any = Noting("second")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying(Path.rename))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        with pytest.raises(Killed) if at < 5 else nullcontext():
            restore.write_checkpoint(second, tmp_path, 3)
    read: Any = Noting()
    assert restore.step_of(restore.load_newest(read, tmp_path)) == 3
    assert read.line == ("first" if at < 4 else "second")

    third: Any = Noting("third")
    restore.write_checkpoint(third, tmp_path, 3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    restore.load_newest(read, tmp_path)
    assert read.line == "third"


def test_a_checkpoint_that_a_running_run_replaces_is_not_missed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The older one goes while it is being read: the newer one is read instead."""
    out = tmp_path / "out"
    model = run(out, "mezo", save_every=3)
    newest = out / "checkpoints" / "step-00000006"
    old = out / "checkpoints" / "step-00000003"
    newest.rename(tmp_path / "newest")
    old.mkdir()
    cls = load_engine("mezo")
    original = cls.load

    def load(self: Any, folder: Path) -> None:
        if folder == old:
            (tmp_path / "newest").rename(newest)
            shutil.rmtree(old)
        original(self, folder)

    monkeypatch.setattr(cls, "load", load)
    assert_same_weights(model, export(out))


@pytest.mark.parametrize("engine", ["native", "lsp"])
def test_without_a_log_the_newest_checkpoint_is_exported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str
) -> None:
    shorter = run(tmp_path / "shorter", engine, tiny_job(steps=4))
    killed(monkeypatch, tmp_path / "out", engine, 5, save_every=2)
    folder = export(tmp_path / "out")
    assert folder.name == "export-step-00000004"
    assert_same_weights(shorter, folder)


def test_what_cannot_be_exported_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        export(tmp_path)
    killed(monkeypatch, tmp_path / "killed", "native", 2)
    with pytest.raises(UserError, match="holds no checkpoint; train with --save-every"):
        export(tmp_path / "killed")
    (tmp_path / "killed" / "checkpoints" / "writing").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no whole checkpoint: the first is being written, or the run"):
        export(tmp_path / "killed")
    model = run(tmp_path / "whole", "native", tiny_job(steps=1))
    with pytest.raises(UserError, match="holds no checkpoint; its finished model is") as caught:
        export(tmp_path / "whole")
    assert str(model) in str(caught.value)
    run(tmp_path / "mezo", "mezo", tiny_job(steps=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")

    def setup(self: Any, blueprint: Any) -> None:
        raise AssertionError("it was set up before it was refused")

    monkeypatch.setattr(load_engine("mezo"), "setup", setup)
    with pytest.raises(UserError, match="is not an empty folder; name another place with --to"):
        export(tmp_path / "mezo", tmp_path / "mine")
    with pytest.raises(UserError, match=r"cannot be written \(File exists\); name another place with --to"):
        export(tmp_path / "mezo", tmp_path / "mine" / "notes.txt" / "here")


# --- signals, in processes of their own ---------------------------------------------------------------


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def begin(forked_programs: None) -> Iterator[Start]:
    """Starts a run in a process that does not outlive the test, not even if it was stopped."""
    started = []

    def start(engine: str, out: Path, *more: str) -> subprocess.Popen[str]:
        process = start_program(
            "run", "--engine", engine, "--model", "tiny-llama", "--random-weights", "--dtype", "fp32",
            "--batch-size", "4", "--seq-len", "32", "--steps", "60", "--set", "learning_rate=1e-5",
            "--eval-batches", "1", "--out", str(out), *more,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_left_alone(begin: Start, tmp_path: Path) -> None:
    """By signal 9 at some moment of a step, by signal 9 again under the other engine, then by Ctrl-C; no
    full checkpoint is ever written. While it goes on, another process exports it. Engines take turns."""
    out, between = tmp_path / "out", tmp_path / "between"
    process = begin("mezo", out)
    stop_after(process, out, 12, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    first = read_update_log(updates_log(out)).end_step
    assert first >= 10

    process = begin("zo2", out, "--resume")
    stop_after(process, out, first + 10, signal.SIGSTOP)
    export(out, between)
    process.send_signal(signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    assert finish(process)[0] == -signal.SIGKILL
    second = read_update_log(updates_log(out)).end_step
    assert second > first
    assert_same_weights(run(tmp_path / "shorter", "zo2", tiny_job(steps=second)), between)

    process = begin("mezo", out, "--resume")
    stop_after(process, out, second + 10, signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    assert "Traceback" not in err
    assert f"resuming after step {second}" in err
    assert "go on with --resume" in err
    done = read_update_log(updates_log(out)).end_step
    assert log_of(out)[-1]["step"] == done < 60

    code, said, err = finish(begin("zo2", out, "--resume"))
    assert code == 0, err
    assert said.splitlines()[-1] == str(out / "model")
    alone = tmp_path / "alone"
    model = run(alone, "mezo", tiny_job(steps=60, eval_batches=1, padding="longest"))
    assert_same_weights(model, out / "model")
    assert log_of(out) == log_of(alone)
    assert updates_log(out).read_bytes() == updates_log(alone).read_bytes()
    assert not (out / "checkpoints").exists()
