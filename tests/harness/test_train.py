"""`lspzo-bench run`: training for real, checkpoints that survive a kill, and the exported folder."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_machine import make_machine
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from engines import load_engine
from engines.base import UserError
from harness import train as module
from harness import worker
from harness.job import Job, make_job
from harness.line import training_settings
from harness.show import Progress
from harness.train import train
from profiles.limits import UsableCores
from profiles.machine import save_machine

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, dict[str, Any]] = {
    "native": {"learning_rate": 3e-3},
    "lsp": {"learning_rate": 3e-3, "d": 16, "learn_steps": 5},
    "mezo": {"learning_rate": 1e-5},
    "zo2": {"learning_rate": 1e-5},
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two would wait for each other where other tests run beside these, and be slower than one."""
    monkeypatch.setattr(worker, "usable_cores", lambda: UsableCores(count=1, basis="test", total=1))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tiny_job(name: str = "tiny-llama", **fields: Any) -> Job:
    values: dict[str, Any] = {
        "model": {"name": name, "random_weights": True},
        "batch_size": 4,
        "seq_len": 32,
        "dtype": "fp32",
        "steps": 6,
        "warmup_steps": 0,
    }
    return make_job(values | fields, "test job")


def run(
    out: Path,
    engine: str = "native",
    job: Job | None = None,
    save_every: int = 0,
    resume: bool = False,
    **more: Any,
) -> Path:
    settings = SETTINGS[engine] | more
    progress = Progress(quiet=True)
    return train(
        job or tiny_job(), engine, settings, out, save_every=save_every, resume=resume, progress=progress
    )


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


class Killed(BaseException):
    """Ends training as abruptly as an exception can."""


def die_at(monkeypatch: pytest.MonkeyPatch, engine: str, step: int) -> None:
    """The engine's step number `step`, counted from 0 in this process, does not come back."""
    cls = load_engine(engine)
    original, calls = cls.step, [0]

    def dying(self: Any, batches: Any) -> Any:
        if calls[0] == step:
            raise Killed
        calls[0] += 1
        return original(self, batches)

    monkeypatch.setattr(cls, "step", dying)


# --- learning and exporting ---------------------------------------------------------------------------


@pytest.mark.parametrize("engine", list(SETTINGS))
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-roberta"])
def test_the_export_is_what_was_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str, name: str
) -> None:
    trained: dict[str, Tensor] = {}
    original = module.export_model

    def export(blueprint: Any, weights: Any, dtype: torch.dtype, folder: Path) -> None:
        def copied() -> Iterator[tuple[str, Tensor]]:
            for parameter, tensor in weights:
                trained[parameter] = tensor.clone()
                yield parameter, tensor

        original(blueprint, copied(), dtype, folder)

    monkeypatch.setattr(module, "export_model", export)
    folder = run(tmp_path / "out", engine, tiny_job(name, eval_batches=2))
    auto = AutoModelForSequenceClassification if name == "tiny-roberta" else AutoModelForCausalLM
    loaded = dict(auto.from_pretrained(folder).named_parameters())
    assert loaded.keys() == trained.keys()
    for parameter, tensor in trained.items():
        assert torch.equal(loaded[parameter], tensor), parameter


@pytest.mark.parametrize("engine", ["native", "lsp"])
def test_the_loss_goes_down(tmp_path: Path, engine: str) -> None:
    run(tmp_path / "out", engine, tiny_job(steps=25, eval_batches=2))
    lines = log_of(tmp_path / "out")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    first, last = (line for line in lines if "eval_loss" in line)
    assert last["eval_loss"] < 0.9 * first["eval_loss"]


def test_the_log_says_how_many_steps_were_done(tmp_path: Path) -> None:
    run(tmp_path / "out", job=tiny_job(steps=3, eval_batches=1))
    lines = [(line["step"], "eval_loss" in line) for line in log_of(tmp_path / "out")]
    assert lines == [(0, True), (1, False), (2, False), (3, False), (3, True)]


# --- checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", list(SETTINGS))
def test_a_resumed_run_ends_as_one_that_was_never_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str
) -> None:
    job = tiny_job(eval_batches=1)
    whole = run(tmp_path / "whole", engine, job)
    with monkeypatch.context() as patch:
        die_at(patch, engine, 5)
        with pytest.raises(Killed):
            run(tmp_path / "parts", engine, job, save_every=2)
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-00000004"]
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')  # torn, as a killed process leaves it
    resumed = run(tmp_path / "parts", engine, job, save_every=2, resume=True)
    assert_same_weights(whole, resumed)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    job = tiny_job(eval_batches=1, steps=4)
    run(tmp_path / "out", job=job, save_every=2)
    before, log = weights_of(tmp_path / "out" / "model"), log_of(tmp_path / "out")
    run(tmp_path / "out", job=job, save_every=2, resume=True)
    after = weights_of(tmp_path / "out" / "model")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert log_of(tmp_path / "out") == log


def test_resuming_without_a_checkpoint_starts_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", job=tiny_job(eval_batches=1))
    with monkeypatch.context() as patch:
        die_at(patch, "native", 2)
        with pytest.raises(Killed):
            run(tmp_path / "parts", job=tiny_job(eval_batches=1))
    resumed = run(tmp_path / "parts", job=tiny_job(eval_batches=1), resume=True)
    assert_same_weights(whole, resumed)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_a_checkpoint_that_was_not_finished_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed while it is saving, a run has its earlier checkpoint, and the remains are cleared away."""
    whole = run(tmp_path / "whole")
    cls = load_engine("native")
    original, saved = cls.save, [0]

    def dying(self: Any, folder: Path) -> None:
        original(self, folder)
        saved[0] += 1
        if saved[0] == 2:
            (folder / "state.safetensors").write_bytes(b"half")
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(cls, "save", dying)
        with pytest.raises(Killed):
            run(tmp_path / "parts", save_every=2)
    checkpoints = tmp_path / "parts" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000002", "writing"}
    assert_same_weights(whole, run(tmp_path / "parts", save_every=2, resume=True))
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000006"]


def test_a_full_disk_is_one_line_and_keeps_the_old_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The limit on file sizes takes the part of a full disk: the system refuses a write halfway."""
    cls = load_engine("native")
    original, saved = cls.save, [0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def cramped(self: Any, folder: Path) -> None:
        saved[0] += 1
        if saved[0] == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            original(self, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(cls, "save", cramped)
        with pytest.raises(UserError, match=r"step-00000004: cannot be written \(.*--resume") as caught:
            run(out, save_every=2)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
    assert_same_weights(run(tmp_path / "whole"), run(out, save_every=2, resume=True))


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"seq_len": 16}, "seq_len"), ({"seed": 1, "steps": 7}, "steps, seed"), ({"dtype": "bf16"}, "dtype")],
)
def test_another_job_is_refused_on_resume(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    run(tmp_path / "out", job=tiny_job(steps=1), save_every=1)
    with pytest.raises(UserError, match=f"the job differs from the earlier one in {named}"):
        run(tmp_path / "out", job=tiny_job(**{"steps": 1, **fields}), resume=True)


def test_another_engine_is_refused_on_resume(tmp_path: Path) -> None:
    run(tmp_path / "out", "mezo", tiny_job(steps=1), save_every=1)
    with pytest.raises(UserError, match="the earlier engine was mezo, not zo2"):
        run(tmp_path / "out", "zo2", tiny_job(steps=1), resume=True)


def test_other_limits_may_be_given_on_resume(tmp_path: Path) -> None:
    run(tmp_path / "out", job=tiny_job(steps=1), save_every=1)
    run(tmp_path / "out", job=tiny_job(steps=1, limits={"timeout_s": 5.0}), resume=True)


def test_the_knobs_of_the_first_start_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They may come from a machine profile, which need not say the same tomorrow."""
    whole = run(tmp_path / "whole", learning_rate=1e-3)
    with monkeypatch.context() as patch:
        die_at(patch, "native", 3)
        with pytest.raises(Killed):
            run(tmp_path / "parts", save_every=2, learning_rate=1e-3)
    assert_same_weights(whole, run(tmp_path / "parts", resume=True, learning_rate=1.0))


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        run(tmp_path)
    with pytest.raises(UserError, match="holds no run to resume"):
        run(tmp_path, resume=True)
    with pytest.raises(UserError, match="is not an empty folder"):
        run(tmp_path / "notes.txt")


@pytest.mark.parametrize("engine", ["native", "lsp"])
def test_a_loss_that_is_not_finite_is_the_users_error(tmp_path: Path, engine: str) -> None:
    with pytest.raises(UserError, match=r"lower learning_rate with --set$") as caught:
        run(tmp_path / "out", engine, save_every=1, learning_rate=1e30)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out" / "checkpoints").glob("step-*"))


def test_lack_of_memory_is_the_users_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def greedy(self: Any, batches: Any) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr(load_engine("native"), "step", greedy)
    with pytest.raises(UserError, match="ran out of host memory"):
        run(tmp_path / "out")


def test_a_defect_is_not_blamed_on_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(self: Any, batches: Any) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(load_engine("native"), "step", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(tmp_path / "out")


# --- settings -----------------------------------------------------------------------------------------


def test_knobs_come_from_the_profile_and_then_from_set(tmp_path: Path) -> None:
    save_machine(make_machine(gpu=False), tmp_path / "machine.json")
    job = tiny_job(settings={"lsp": {"r": 2}})
    assert training_settings(job, "lsp", None) == {"r": 2}
    planned = training_settings(job, "lsp", tmp_path / "machine.json")
    assert planned["r"] == 2
    assert planned["d"] == 32  # half of 64
    crowded = tiny_job(limits={"host_bytes": 1_000_000})
    with pytest.raises(UserError, match="does not fit the machine"):
        training_settings(crowded, "lsp", tmp_path / "machine.json")


def test_a_subspace_as_large_as_the_matrices_is_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for d, noted in ((512, True), (16, False)):
        settings = SETTINGS["lsp"] | {"d": d}
        out = tmp_path / str(d)
        train(tiny_job(steps=1), "lsp", settings, out, save_every=0, resume=False, progress=Progress(False))
        assert ("hardly compresses" in capsys.readouterr().err) == noted


# --- signals, in processes of their own ---------------------------------------------------------------

LONG = (
    "run", "--engine", "lsp", "--model", "tiny-llama", "--random-weights", "--dtype", "fp32",
    "--batch-size", "4", "--seq-len", "32", "--steps", "24", "--save-every", "4", "--set", "lsp.d=16",
    "--set", "learning_rate=1e-3", "--set", "learn_steps=5", "--eval-batches", "1",
)  # fmt: skip


ON_ONE_CORE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from harness.cli import main
main()
"""


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ON_ONE_CORE, *LONG, "--out", str(out), *more],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def stop_after(process: subprocess.Popen[str], out: Path, lines: int, number: int) -> None:
    """Send the signal once the log has that many lines."""
    log = out / "log.jsonl"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count("\n") >= lines:
            process.send_signal(number)
            return
        time.sleep(0.005)
    raise AssertionError(process.communicate())


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.slow
def test_kill_and_ctrl_c_cost_at_most_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    """One run is killed by signal 9, resumed, stopped by Ctrl-C, resumed: the weights are those of a run
    that was left alone."""
    alone = start(tmp_path / "alone")
    out = tmp_path / "out"
    process = start(out)
    stop_after(process, out, 8, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    kept = [path.name for path in (out / "checkpoints").glob("step-*")]
    assert kept

    process = start(out, "--resume")
    stop_after(process, out, 13, signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    assert "Traceback" not in err
    assert "go on with --resume" in err
    (checkpoint,) = (out / "checkpoints").iterdir()
    done = int(checkpoint.name.removeprefix("step-"))
    assert log_of(out)[-1]["step"] == done < 24

    code, said, err = finish(start(out, "--resume"))
    assert code == 0, err
    assert said.splitlines()[-1] == str(out / "model")
    assert f"resuming after step {done}" in err
    assert finish(alone)[0] == 0
    assert_same_weights(tmp_path / "alone" / "model", out / "model")
    assert log_of(out) == log_of(tmp_path / "alone")


def test_ctrl_c_is_left_alone_outside_the_main_thread(tmp_path: Path) -> None:
    done: list[Path] = []
    thread = threading.Thread(target=lambda: done.append(run(tmp_path / "out", job=tiny_job(steps=1))))
    thread.start()
    thread.join()
    assert done == [tmp_path / "out" / "model"]
