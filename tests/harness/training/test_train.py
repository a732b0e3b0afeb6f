"""`lspzo-bench run`: training for real, checkpoints that survive a kill, and the exported folder."""

from __future__ import annotations

import re
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from settings_given import given_settings
from tiny_machine import make_machine
from torch import Tensor
from train_runs import (
    SETTINGS,
    Killed,
    assert_same_weights,
    die_at,
    finish,
    log_of,
    run,
    start,
    stop_after,
    tiny_job,
    weights_of,
)

from engines import load_engine
from engines.errors import NonFiniteLoss, UserError
from engines.settings.parse import parse_settings
from harness.models.auto_classes import auto_class
from harness.pipeline import training_settings
from harness.progress import Progress
from harness.training import train as module
from harness.training.run_folder import carried_over
from harness.training.train import train
from profiles.machine import save_machine

# --- learning and exporting ---------------------------------------------------------------------------


@pytest.mark.parametrize("engine", list(SETTINGS))
@pytest.mark.parametrize(
    ("name", "head"),
    [("tiny-llama", "auto"), ("tiny-roberta", "auto"), ("tiny-llama", "question_answering")],
)
def test_the_export_is_what_was_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str, name: str, head: str
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
    model = {"name": name, "random_weights": True, "head": head}
    folder = run(tmp_path / "out", engine, tiny_job(model=model, eval_batches=2))
    family_head = "classification" if name == "tiny-roberta" else "causal_lm"
    auto = auto_class(family_head if head == "auto" else "question_answering")
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


@pytest.mark.parametrize(("earlier", "engine"), [("mezo", "native"), ("native", "lsp"), ("lsp", "zo2")])
def test_another_engine_is_refused_on_resume(tmp_path: Path, earlier: str, engine: str) -> None:
    """But mezo and zo2 go on from each other: see test_restore.py."""
    run(tmp_path / "out", earlier, tiny_job(steps=1), save_every=1)
    with pytest.raises(UserError, match=f"the earlier engine was {earlier}, not {engine}"):
        run(tmp_path / "out", engine, tiny_job(steps=1), resume=True)


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


@pytest.mark.parametrize("engine", ["mezo", "zo2"])
def test_zeroth_order_losses_that_are_not_finite_have_a_cause(tmp_path: Path, engine: str) -> None:
    """At once, from perturbations beyond all bounds, and later, from updates beyond all bounds."""
    with pytest.raises(UserError, match=r"no update was made yet, .* or eps is far too large; check"):
        run(tmp_path / "eps", engine, eps=1e38)
    with pytest.raises(UserError, match=r"learning rate is likely too large|step was likely far too large"):
        run(tmp_path / "rate", engine, learning_rate=1e39)


def test_a_perturbed_loss_on_one_side_only_is_put_down_to_eps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def step(self: Any, batches: Any) -> None:
        raise NonFiniteLoss("one loss is not finite", losses=(2.5, float("inf")))

    monkeypatch.setattr(load_engine("mezo"), "step", step)
    with pytest.raises(UserError, match=r"eps is likely too large; lower it with --set mezo.eps="):
        run(tmp_path / "out", "mezo")


def test_a_flat_loss_is_noted_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(name: str, **fields: Any) -> str:
        settings = given_settings("mezo", learning_rate=1e-12)
        train(
            tiny_job(steps=12, **fields), "mezo", settings, tmp_path / name, save_every=0, resume=False,
            progress=Progress(False),
        )  # fmt: skip
        return capsys.readouterr().err

    assert re.search(r"note: the loss stayed flat over 12 steps .* at most, so the learning rate", said("a"))
    assert "note:" not in said("random", data={"train": "random"})


def test_the_note_is_about_the_whole_run_also_after_it_was_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, out = tiny_job(steps=12), tmp_path / "out"
    with monkeypatch.context() as patch:
        die_at(patch, "mezo", 9)
        with pytest.raises(Killed):
            run(out, "mezo", job, learning_rate=1e-12)
    train(job, "mezo", given_settings("mezo"), out, save_every=0, resume=True, progress=Progress(False))
    assert "the loss stayed flat over 12 steps" in capsys.readouterr().err


def test_a_folder_with_settings_as_text_is_resumed(tmp_path: Path) -> None:
    """As earlier versions wrote those of `--set`."""
    run(tmp_path, "mezo", tiny_job(settings={"mezo": {"eps": "0.01"}}), eps="0.01")
    run(tmp_path, "mezo", tiny_job(settings={"mezo": {"eps": 0.01}}), eps=0.01, resume=True)


def test_lack_of_memory_is_the_users_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def greedy(self: Any, batches: Any) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr(load_engine("native"), "step", greedy)
    with pytest.raises(UserError, match="ran out of host memory"):
        run(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []  # nothing was logged: a smaller batch may go there


def test_a_defect_is_not_blamed_on_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(self: Any, batches: Any) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(load_engine("native"), "step", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(tmp_path / "out")


# --- settings -----------------------------------------------------------------------------------------


def test_a_low_bit_base_is_rounded_as_rarely_as_the_loss_asks() -> None:
    low_bit = tiny_job(settings={"zo2": {"base": "int8"}})
    assert training_settings(low_bit, "zo2", None) == {"base": "int8", "fold_every": 8}
    assert training_settings(low_bit, "mezo", None) == {}
    as_set = tiny_job(settings={"zo2": {"base": "int8", "fold_every": 2}})
    assert training_settings(as_set, "zo2", None)["fold_every"] == 2


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
        settings = given_settings("lsp", SETTINGS["lsp"], d=d)
        out = tmp_path / str(d)
        train(tiny_job(steps=1), "lsp", settings, out, save_every=0, resume=False, progress=Progress(False))
        assert ("hardly compresses" in capsys.readouterr().err) == noted


# --- signals, in processes of their own ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("forked_programs")
def test_kill_and_ctrl_c_cost_at_most_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    """One run is killed by signal 9, resumed, stopped by Ctrl-C, resumed: the weights are those of a run
    that was left alone."""
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
    alone = tmp_path / "alone"
    job = tiny_job(steps=24, eval_batches=1, padding="longest")
    assert_same_weights(run(alone, "lsp", job, save_every=4, learning_rate=1e-3), out / "model")
    assert log_of(out) == log_of(alone)


def test_ctrl_c_is_left_alone_outside_the_main_thread(tmp_path: Path) -> None:
    done: list[Path] = []
    thread = threading.Thread(target=lambda: done.append(run(tmp_path / "out", job=tiny_job(steps=1))))
    thread.start()
    thread.join()
    assert done == [tmp_path / "out" / "model"]


def test_a_run_goes_on_with_its_own_steps_and_the_new_engines_places() -> None:
    earlier = parse_settings("zo2", {"fold_every": 3, "resident_blocks": 2, "eps": 0.01})
    on_gpu = carried_over(earlier, parse_settings("mezo", {}))
    assert (on_gpu.eps, on_gpu.fold_every) == (0.01, 1)
    streamed = carried_over(earlier, parse_settings("zo2", {"fold_every": 5}))
    assert (streamed.eps, streamed.fold_every, streamed.resident_blocks) == (0.01, 5, 0)
    # Where it says when weights are rounded, it is part of the steps.
    low_bit = parse_settings("zo2", {"fold_every": 3, "base": "int8"})
    assert carried_over(low_bit, parse_settings("mezo", {})).fold_every == 3
    adapters = parse_settings("zo2", {"fold_every": 3, "base": "int8", "train": "lora"})
    assert carried_over(adapters, parse_settings("mezo", {})).fold_every == 1
    full, lossless = (parse_settings("zo2", {"base": base}) for base in ("full", "lossless"))
    assert carried_over(full, lossless).base == "lossless"
    assert carried_over(lossless, full).base == "full"
    assert carried_over(low_bit, lossless).base == low_bit.base
    assert carried_over(parse_settings("lsp", {}), parse_settings("mezo", {})) is None
