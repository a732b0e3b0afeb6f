"""Every engine learns the built-in task: the demo's numbers have to mean something.

First-order methods get a few dozen steps, zeroth-order ones one or two hundred: each within its own budget.
What counts is the held-out loss, which no engine has seen in training.
"""

from __future__ import annotations

from typing import Any

import pytest

from engines import load_engine
from engines.base import Context, Evaluation
from engines.settings.parse import parse_settings
from harness.data.batches import make_data
from harness.models.blueprint import make_blueprint
from harness.records.job import make_job
from harness.resolve import resolve_shape

ADAM = {"learning_rate": 1e-3}
LSP = {**ADAM, "d": 32, "r": 4, "learn_steps": 20}


def learn(engine: str, settings: dict[str, Any], steps: int, **fields: Any) -> tuple[Evaluation, Evaluation]:
    """The held-out evaluation before and after."""
    values = {"batch_size": 8, "seq_len": 64, "dtype": "fp32", "steps": steps, "eval_batches": 4, **fields}
    values["model"] = {"name": fields["model"], "random_weights": True}
    job = make_job(values, "test job")
    shape = resolve_shape(job)
    data = make_data(job, shape)
    context = Context(device="cpu", workload=job.workload, seed=job.seed, total_steps=steps)
    made = load_engine(engine)(parse_settings(engine, settings), context)
    try:
        made.setup(make_blueprint(job, shape))
        before = made.evaluate(data.evaluation)
        for step in range(steps):
            made.step(data.step_batches(step))
        return before, made.evaluate(data.evaluation)
    finally:
        made.close()


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-opt", "tiny-roberta"])
@pytest.mark.parametrize(("engine", "settings"), [("native", ADAM), ("lsp", LSP)])
def test_first_order_methods_learn_in_a_few_dozen_steps(
    engine: str, settings: dict[str, Any], model: str
) -> None:
    before, after = learn(engine, settings, steps=40, model=model)
    assert after.loss < 0.9 * before.loss


@pytest.mark.parametrize(
    ("engine", "model", "learning_rate", "steps", "share"),
    [
        ("mezo", "tiny-llama", 3e-4, 80, 0.8),
        ("zo2", "tiny-opt", 3e-4, 80, 0.8),
        ("zo2", "tiny-roberta", 2e-3, 200, 0.99),
    ],
)
def test_zeroth_order_methods_learn_in_one_or_two_hundred(
    engine: str, model: str, learning_rate: float, steps: int, share: float
) -> None:
    """To tell two classes apart takes them far longer than to learn which two words the answers are."""
    settings = {"learning_rate": learning_rate, "eps": 1e-3}
    before, after = learn(engine, settings, steps, model=model, seq_len=48, eval_batches=8)
    assert after.loss < share * before.loss
