"""Every engine learns the built-in task: the demo's numbers have to mean something.

First-order methods get a few dozen steps, zeroth-order ones a few hundred: each within its own budget.
What counts is the held-out loss, which no engine has seen in training.
"""

from __future__ import annotations

from typing import Any

import pytest

from engines import load_engine
from engines.base import Context, Evaluation
from engines.settings import parse_settings
from harness.data import make_data
from harness.job import make_job
from harness.models import make_blueprint
from harness.shapes import resolve_shape

ADAM = {"learning_rate": 3e-3}
LSP = {**ADAM, "d": 32, "r": 4, "learn_steps": 20}
SGD = {"learning_rate": 2e-4, "eps": 1e-3}


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
    print(engine, model, before, after)
    assert after.loss < 0.9 * before.loss


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-opt", "tiny-roberta"])
@pytest.mark.parametrize("engine", ["mezo", "zo2"])
def test_zeroth_order_methods_learn_in_a_few_hundred(engine: str, model: str) -> None:
    before, after = learn(engine, SGD, steps=300, model=model, batch_size=8, seq_len=48)
    print(engine, model, before, after)
    assert after.loss < 0.95 * before.loss
