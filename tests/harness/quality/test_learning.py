"""A run that is watched while it learns, and the parts of the data that it is judged by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.base import Batch, Evaluation, StepStats
from engines.errors import UserError
from harness.data.batches import batches_of
from harness.data.token_tables import TokenTable
from harness.data.tokenized import load_tokenized, save_tokenized
from harness.data.tokenizing import tokenize
from harness.quality.documents import StudySizes
from harness.quality.splits import split
from harness.records.job import Job, make_job
from harness.records.learning import Learning, LearningLength, LearningOutcome
from harness.resolve import resolve_shape
from harness.runs.measure import RunRecording, measure
from harness.runs.scenarios import Learn


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Engine:
    """A step takes two seconds, an evaluation five; accuracy on development data plays a script."""

    pinned_bytes = 0

    def __init__(self, clock: Clock, script: Sequence[float]) -> None:
        self._clock, self._script = clock, iter(script)
        self.tested_after: list[int] = []
        self.steps = 0

    def setup(self, blueprint: object) -> None: ...

    def synchronize(self) -> None: ...

    def step(self, batches: object) -> StepStats:
        self._clock.now_s += 2.0
        self.steps += 1
        return StepStats(loss=1.0)

    def evaluate(self, batches: Sequence[str]) -> Evaluation:
        self._clock.now_s += 5.0
        if batches == TEST:
            self.tested_after.append(self.steps)
            return Evaluation(loss=1.0, accuracy=0.01 * self.steps, num_labels=1)
        return Evaluation(loss=1.0, accuracy=next(self._script), num_labels=1)


TEST = ["test"]


class Data:
    evaluation: Any = ("development",)
    test: Any = TEST
    evaluated_in_training = 0

    def step_batches(self, step: int) -> Sequence[Batch]:
        return ()


def learned(
    length: LearningLength, script: Sequence[float], *, tests: bool = True
) -> tuple[LearningOutcome, Engine]:
    clock, found = Clock(), [LearningOutcome()]
    engine = Engine(clock, script)
    learning = Learning(length=length, metric="accuracy", tests=tests)
    scenario = Learn(learning, Data(), lambda each: {"accuracy": each.accuracy}, found.append)
    made: Any = engine
    measure(made, None, scenario, RunRecording(tokens_per_step=1), clock=clock)
    return found[-1], engine


def test_time_is_that_of_steps_and_the_best_evaluation_alone_is_tested() -> None:
    length = LearningLength(evaluations=4, seconds=16.0)
    outcome, engine = learned(length, [0.5, 0.6, 0.8, 0.7, 0.75])
    assert [(each.step, each.train_s) for each in outcome.evaluations] == [
        (0, 0.0), (2, 4.0), (4, 8.0), (6, 12.0), (8, 16.0),
    ]  # fmt: skip
    assert (outcome.steps, outcome.train_s) == (8, 16.0)
    assert outcome.test_before == {"accuracy": 0.0}
    assert outcome.test == {"accuracy": pytest.approx(0.04)}
    assert engine.tested_after == [0, 2, 4]
    best = outcome.best("accuracy")
    assert best is not None
    assert best.step == 4


def test_a_step_of_a_trial_is_timed_without_the_evaluation_after_it() -> None:
    """Where every step is followed by one, the median would else be that of both."""
    clock, recording = Clock(), RunRecording(tokens_per_step=1)
    length = LearningLength(evaluations=4, steps=4)
    scenario = Learn(
        Learning(length=length, metric="accuracy"), Data(), lambda each: {"accuracy": each.accuracy},
        lambda outcome: None,
    )  # fmt: skip
    made: Any = Engine(clock, [0.5, 0.6, 0.7, 0.8, 0.9])
    measure(made, None, scenario, recording, clock=clock)
    assert [sample.step_s for sample in recording.samples] == [2.0] * 4
    assert recording.summary().step_s_median == 2.0


def test_a_step_longer_than_the_time_between_evaluations_is_still_evaluated() -> None:
    outcome, _ = learned(LearningLength(evaluations=4, seconds=3.0), [0.5, 0.6, 0.7])
    assert [each.step for each in outcome.evaluations] == [0, 1, 2]


def test_steps_in_place_of_time() -> None:
    outcome, _ = learned(LearningLength(evaluations=2, steps=5), [0.5, 0.6, 0.7])
    assert [each.step for each in outcome.evaluations] == [0, 3, 5]


def test_a_search_reads_no_test_data() -> None:
    outcome, engine = learned(LearningLength(evaluations=2, steps=2), [0.5, 0.6, 0.7], tests=False)
    assert (outcome.test, outcome.test_before, engine.tested_after) == (None, None, [])


def job(path: Path, **values: Any) -> Job:
    given: dict[str, Any] = {
        "model": {"name": "tiny-llama", "random_weights": True}, "seq_len": 48, "batch_size": 4,
        "data": {"train": str(path), "template": "{text} It was", "labels": ["bad", "great"]},
        "padding": "longest", "dtype": "fp32",
    }  # fmt: skip
    return make_job(given | values, "test job")


def reviews(folder: Path, count: int) -> Path:
    path = folder / f"reviews{count}.tsv"
    path.write_text("".join(f"film {'so ' * (i % 7)}{i}\t{i % 2}\n" for i in range(count)))
    return path


def texts(table: TokenTable) -> list[list[int]]:
    return [table.batch([row], 48, 0).inputs["input_ids"][0].tolist() for row in range(len(table))]


def test_development_and_test_data_are_apart_and_the_same_for_every_seed(tmp_path: Path) -> None:
    one = job(reviews(tmp_path, 400))
    shape = resolve_shape(one)
    whole = tokenize(one, shape)
    assert whole is not None
    parts = split(one, shape, None, StudySizes(train=100, development=15, test=None))
    assert parts.test is not None
    assert (len(parts.train), len(parts.held_out), len(parts.test)) == (100, 15, 20)
    other = split(job(reviews(tmp_path, 400), seed=7), shape, None, StudySizes(train=100, development=15))
    assert torch.equal(parts.held_out.tokens, other.held_out.tokens)
    assert torch.equal(parts.train.tokens, other.train.tokens)
    everything = split(one, shape, None, StudySizes())
    assert everything.test is not None
    halves = texts(everything.held_out), texts(everything.test)
    assert sorted(halves[0] + halves[1]) == sorted(texts(whole.held_out))
    assert not any(text in halves[1] for text in halves[0])
    assert all(text in halves[0] for text in texts(parts.held_out))
    save_tokenized(parts, tmp_path / "data.safetensors")
    again = load_tokenized(tmp_path / "data.safetensors")
    batches, others = (batches_of(each, one).test for each in (parts, again))
    assert sum(len(batch.inputs["labels"]) for batch in batches) == 20
    for mine, its in zip(batches, others, strict=True):
        assert all(torch.equal(mine.inputs[name], its.inputs[name]) for name in mine.inputs)


@pytest.mark.parametrize("order", ["in turn", "one after the other"])
def test_both_halves_have_as_much_of_each_class(order: str, tmp_path: Path) -> None:
    """In whatever order a file has them; of one that has a single class nothing can be told."""
    classes = [i % 2 if order == "in turn" else i // 20 for i in range(40)]
    held_out = tmp_path / "held_out.tsv"
    held_out.write_text("".join(f"film {i}\t{label}\n" for i, label in enumerate(classes)))
    one = job(reviews(tmp_path, 40))
    one = replace(one, data=replace(one.data, evaluate=str(held_out)))
    parts = split(one, resolve_shape(one), None, StudySizes())
    assert parts.test is not None
    for part in (parts.held_out, parts.test):
        assert part.classes is not None
        assert Counter(part.classes.tolist()) == {0: 10, 1: 10}
    held_out.write_text("".join(f"film {i}\t1\n" for i in range(40)))
    with pytest.raises(UserError, match="20 rows of development data, all of one class"):
        split(one, resolve_shape(one), None, StudySizes())


def test_evaluations_in_larger_batches_than_training(tmp_path: Path) -> None:
    one = job(reviews(tmp_path, 400), eval_batches=10)
    parts = split(one, resolve_shape(one), None, StudySizes(train=100, development=15, test=None))
    few, many = batches_of(parts, one), batches_of(parts, one, evaluated_together=12)
    for each, sizes in ((many.evaluation, [12, 3]), (many.test, [12, 8])):
        assert [len(batch.inputs["labels"]) for batch in each] == sizes
    assert [len(batch.inputs["labels"]) for batch in few.evaluation] == [4, 4, 4, 3]

    def labels(batches: Sequence[Batch]) -> list[int]:
        found = [batch.inputs["labels"] for batch in batches]
        return [int(each) for batch in found for each in batch[batch != -100]]

    assert labels(many.evaluation) == labels(few.evaluation)
    assert labels(many.test) == labels(few.test)
    assert torch.equal(
        many.step_batches(3)[0].inputs["input_ids"], few.step_batches(3)[0].inputs["input_ids"]
    )


def test_test_data_of_its_own(tmp_path: Path) -> None:
    one = job(reviews(tmp_path, 80))
    parts = split(one, resolve_shape(one), str(reviews(tmp_path, 30)), StudySizes())
    assert parts.test is not None
    assert (len(parts.held_out), len(parts.test)) == (8, 30)
    few = job(reviews(tmp_path, 4))
    with pytest.raises(UserError, match="leaves nothing to choose by"):
        split(few, resolve_shape(few), None, StudySizes())
