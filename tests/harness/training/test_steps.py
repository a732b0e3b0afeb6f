"""Evaluations on the way, the best model, ending early, and how long a run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from settings_given import given_settings
from train_runs import SETTINGS, Killed, assert_same_weights, die_at, log_of, run, tiny_job

from engines import load_engine
from engines.base import Batch, Evaluation
from engines.errors import UserError
from harness.progress import Progress
from harness.training.repeats import spread_over
from harness.training.steps import SUMMARY, real_tokens
from harness.training.train import Length, train


def summary_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / SUMMARY).read_text())
    return found


def evaluations(out: Path) -> list[tuple[float, float]]:
    return [(line["step"], line["eval_loss"]) for line in log_of(out) if "eval_loss" in line]


def scripted_losses(monkeypatch: pytest.MonkeyPatch, engine: str, by_step: dict[int, float]) -> None:
    """What the engine says of held-out data after so many steps; how it trains stays as it is."""
    cls = load_engine(engine)
    original = cls.evaluate

    def evaluate(self: Any, batches: Any) -> Evaluation:
        original(self, batches)
        done = self.loop.steps_done if hasattr(self, "loop") else self._updates.step
        return Evaluation(loss=by_step[done], accuracy=0.5, num_labels=1)

    monkeypatch.setattr(cls, "evaluate", evaluate)


def test_evaluates_on_the_way_and_keeps_the_best_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripted_losses(monkeypatch, "native", {0: 0.1, 2: 3.0, 4: 1.0, 6: 2.0, 7: 2.5})
    job = tiny_job(steps=7, eval_batches=1, eval_every=2, best_by="loss")
    run(tmp_path / "out", job=job)
    assert evaluations(tmp_path / "out") == [(0, 0.1), (2, 3.0), (4, 1.0), (6, 2.0), (7, 2.5)]
    assert [path.name for path in (tmp_path / "out" / "best").iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    after_four = run(tmp_path / "four", job=tiny_job(steps=4))
    assert_same_weights(tmp_path / "out" / "best" / "step-00000004", after_four)
    found = summary_of(tmp_path / "out")
    assert found["best"] == {"step": 4, "metric": "loss", "value": 1.0}
    assert (found["steps"], found["ended_early"], found["metrics"]["loss"]) == (7, False, 2.5)


@pytest.mark.parametrize("engine", ["native", "mezo"])
def test_a_killed_run_finds_the_same_best_model_and_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str
) -> None:
    """The best is found before the kill, and patience ends the run after it."""
    job = tiny_job(steps=12, eval_batches=1, eval_every=2, best_by="loss", patience=3)
    losses = {0: 9.0, 2: 2.0, 4: 1.0, 6: 3.0, 8: 2.0, 10: 1.5}
    scripted_losses(monkeypatch, engine, losses)
    whole = run(tmp_path / "whole", engine, job)
    with monkeypatch.context() as patch:
        die_at(patch, engine, 7)
        with pytest.raises(Killed):
            run(tmp_path / "parts", engine, job, save_every=3)
    parts = run(tmp_path / "parts", engine, job, save_every=3, resume=True)
    assert_same_weights(whole, parts)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    one, other = tmp_path / "whole" / "best", tmp_path / "parts" / "best"
    assert [path.name for path in other.iterdir()] == ["step-00000004"]
    assert_same_weights(one / "step-00000004", other / "step-00000004")
    found = summary_of(tmp_path / "parts")
    assert (found["steps"], found["ended_early"]) == (10, True)


def test_a_metric_that_the_task_has_not_is_refused(tmp_path: Path) -> None:
    job = tiny_job(steps=2, eval_batches=1, eval_every=1, best_by="pearson")
    with pytest.raises(UserError, match="no such metric; choose from: loss, accuracy"):
        run(tmp_path / "out", job=job)


def test_epochs_and_examples_become_steps(tmp_path: Path) -> None:
    job = tiny_job(batch_size=4, accumulation=2)
    assert Length(epochs=2).steps(job, 20) == 5
    assert Length(epochs=0.5).steps(job, 17) == 2
    assert Length(examples=9).steps(job, None) == 2
    with pytest.raises(UserError, match="have no end"):
        Length(epochs=1).steps(job, None)
    out = tmp_path / "out"
    settings = given_settings("native", SETTINGS["native"])
    quiet = Progress(quiet=True)
    length = Length(examples=11)
    train(tiny_job(), "native", settings, out, save_every=0, resume=False, progress=quiet, length=length)
    assert summary_of(out)["steps"] == 3


def test_padding_is_not_counted() -> None:
    ids = torch.zeros((2, 3), dtype=torch.int64)
    padded = Batch(inputs={"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])})
    assert real_tokens([padded, Batch(inputs={"input_ids": ids})]) == 3 + 6


def test_tensorboard_gets_losses_and_metrics(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = given_settings("native", SETTINGS["native"])
    out = tmp_path / "out"
    job = tiny_job(steps=3, eval_batches=1)
    quiet = Progress(quiet=True)
    train(job, "native", settings, out, save_every=0, resume=False, progress=quiet, board=True)
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert "train/loss" in events.Tags()["tensors"]
    assert len(events.Tensors("train/loss")) == 3
    assert len(events.Tensors("held-out/loss")) == 2


def test_runs_of_several_seeds_are_told_together(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        run(tmp_path / f"seed-{seed}", job=tiny_job(seed=seed, steps=2, eval_batches=1))
    lines = list(spread_over([tmp_path / f"seed-{seed}" for seed in (0, 1, 2)]))
    losses = sorted(summary_of(tmp_path / f"seed-{seed}")["metrics"]["loss"] for seed in (0, 1, 2))
    told = [f"{value:.4g}" for value in (losses[1], losses[0], losses[2])]
    assert lines[0] == f"3 seeds: loss {told[0]} (median; {told[1]} to {told[2]})"
