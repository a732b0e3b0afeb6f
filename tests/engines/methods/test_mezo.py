from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_loop import PlainLoop
from zeroth_order_runs import in_groups

from engines.base import Batch, Context, StepStats
from engines.errors import NonFiniteLoss, UserError
from engines.methods.mezo import Mezo
from engines.settings.zeroth_order import MezoSettings
from engines.shapes import Dtype, Workload
from engines.zeroth_order import checkpoint
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

SETTINGS = MezoSettings(learning_rate=1e-3, weight_decay=0.1, eps=1e-3)


def context(steps: int = 100, dtype: Dtype = "fp32", seed: int = 7) -> Context:
    return Context(
        device="cpu", workload=Workload(batch_size=2, seq_len=16, dtype=dtype), seed=seed, total_steps=steps
    )


def engine(blueprint: TinyBlueprint, settings: MezoSettings = SETTINGS, where: Context | None = None) -> Mezo:
    made = Mezo(settings, where or context())
    made.setup(blueprint)
    return made


def snapshot(made: Mezo) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in made.weights()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


PAPERS = {
    "mezo": SETTINGS,
    "signs": replace(SETTINGS, noise="rademacher"),
    "binomial": replace(SETTINGS, noise="binomial"),
    "n-spsa": replace(SETTINGS, queries=3),
    "1.5-spsa": replace(SETTINGS, estimator="1.5-spsa", queries=2, eps=0.03, noise="rademacher"),
    "fzoo": replace(SETTINGS, estimator="fzoo", queries=4, noise="rademacher", learning_rate=1e-6),
    "lozo": replace(SETTINGS, estimator="lozo", queries=2, lozo_rank=2, lozo_window=2, weight_decay=0.0),
    "grzo": replace(
        SETTINGS, estimator="grzo", noise="rademacher", grzo_window=2, weight_decay=0.0, learning_rate=1e-6
    ),
}
REFUSED = (("lozo", "lora"), ("grzo", "lora"))
ALIKE = (("binomial", "last:2"), ("binomial", "lora"), ("1.5-spsa", "last:2"))
"""Which part is trained makes no difference that `signs` and `fzoo` would not show."""


MODELS = [("opt", True), ("opt", False), ("gpt2", True), ("llama", False), ("roberta", False)]


WAYS = [*((*model, 1) for model in MODELS), ("opt", True, 2), ("roberta", False, 2)]
"""Models, and micro-batches of a step."""


def by_pairs() -> list[tuple[str, str, str, bool, int]]:
    """Every paper in every way, training a part of the model that changes from one to the next: each paper
    trains each part that it may, and each part is trained in each way."""
    cases = []
    for number, paper in enumerate(PAPERS):
        parts = [part for part in ("all", "last:2", "lora") if (paper, part) not in REFUSED + ALIKE]
        cases += [(paper, parts[(number + place) % len(parts)], *way) for place, way in enumerate(WAYS)]
    return cases


@pytest.mark.parametrize(("paper", "train", "family", "tied", "accumulation"), by_pairs())
def test_equals_a_plain_loop_over_the_paper(
    paper: str, family: str, tied: bool, train: str, accumulation: int
) -> None:
    """The model's own loss sums in another order, so losses agree to rounding; given the engine's projected
    gradient, weights agree bit for bit. How micro-batches add up does not hang on the decoder."""
    settings = replace(PAPERS[paper], train=train, lora_rank=3)
    blueprint = tiny_blueprint(family, tied)
    loop = PlainLoop(settings, blueprint)
    size = 4 if paper == "grzo" else 2  # the deviation of two may be next to nothing
    where = context()
    workload = replace(where.workload, batch_size=size, accumulation=accumulation)
    made = engine(blueprint, settings, replace(where, workload=workload))
    steps = 5 if paper in ("lozo", "grzo") else 3  # the windows of two
    groups = in_groups(tiny_batches(steps * accumulation, family, batch_size=size), accumulation)
    start = snapshot(made)
    loop.steps_beside(made, groups)
    loop.assert_same_weights(made)
    assert not equal(snapshot(made), start)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_perturbing_never_changes_the_weights(dtype: Dtype) -> None:
    made = engine(
        tiny_blueprint("llama", tied=True), MezoSettings(learning_rate=0.0, eps=1e-2), context(dtype=dtype)
    )
    before = snapshot(made)
    for batch in tiny_batches(3, "llama"):
        assert made.step([batch]).projected_gradient != 0.0
    assert equal(snapshot(made), before)


def test_the_learning_rate_of_each_step_acts_on_every_parameter() -> None:
    made = engine(
        tiny_blueprint("opt"), MezoSettings(learning_rate=1e-3, schedule="linear"), context(steps=3)
    )
    batches = tiny_batches(5, "opt")
    before = snapshot(made)
    for batch in batches[:3]:
        made.step([batch])
    trained = snapshot(made)
    assert all(not torch.equal(trained[name], before[name]) for name in before)
    for batch in batches[3:]:
        made.step([batch])
    assert equal(snapshot(made), trained)


def test_a_projected_gradient_of_zero_still_decays_matrices() -> None:
    """One class makes the loss zero whatever the weights."""
    blueprint = tiny_blueprint("roberta")
    for model in (blueprint.model, blueprint.reference):
        model.config.num_labels = model.num_labels = 1
        model.config.problem_type = "single_label_classification"
        model.classifier.out_proj = torch.nn.Linear(16, 1, device=model.classifier.out_proj.weight.device)
    made = engine(blueprint, MezoSettings(learning_rate=0.5, weight_decay=0.1))
    before = snapshot(made)
    (batch,) = tiny_batches(1, "roberta")
    stats = made.step([Batch(inputs={**batch.inputs, "labels": torch.zeros(2, dtype=torch.long)})])
    assert stats.loss == 0.0
    assert stats.projected_gradient == 0.0
    for name, weight in snapshot(made).items():
        expected = before[name] - 0.5 * (0.1 * before[name]) if weight.dim() >= 2 else before[name]
        assert torch.equal(weight, expected)


def run(seed: int, count: int = 2) -> tuple[list[StepStats], dict[str, torch.Tensor]]:
    made = engine(tiny_blueprint("gpt2"), where=context(seed=seed))
    return [made.step([batch]) for batch in tiny_batches(count, "gpt2")], snapshot(made)


def test_a_seed_of_zero_is_a_seed() -> None:
    first, weights = run(0)
    again, same = run(0)
    other, others = run(1)
    assert [stats.loss for stats in first] == [stats.loss for stats in again]
    assert equal(weights, same)
    assert first[0].projected_gradient != other[0].projected_gradient
    assert not equal(weights, others)


def test_dropout_is_off() -> None:
    blueprint = tiny_blueprint("gpt2")
    for module in blueprint.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    blueprint.model.train()
    (batch,) = tiny_batches(1, "gpt2")
    without = engine(tiny_blueprint("gpt2")).step([batch])
    assert engine(blueprint).step([batch]).loss == without.loss


def easy_batch(family: str) -> Batch:
    """The answer is always the same token."""
    (batch,) = tiny_batches(1, family, batch_size=4)
    return Batch(inputs={**batch.inputs, "labels": torch.full_like(batch.inputs["labels"], 9)})


def test_lowers_the_loss_within_its_budget() -> None:
    made = engine(tiny_blueprint("opt"), MezoSettings(learning_rate=1e-2, eps=1e-3), context(steps=60))
    batch = easy_batch("opt")
    before = made.evaluate([batch])
    for _ in range(60):
        made.step([batch])
    after = made.evaluate([batch])
    assert after.loss < before.loss - 1.0


def test_an_infinite_loss_ends_the_run() -> None:
    made = engine(tiny_blueprint("opt"), MezoSettings(learning_rate=1e30))
    first, second = tiny_batches(2, "opt")
    made.step([first])
    with pytest.raises(NonFiniteLoss, match="losses of step 1") as caught:
        made.step([second])
    assert caught.value.losses is not None
    assert not all(math.isfinite(loss) for loss in caught.value.losses)


def test_evaluation_changes_nothing() -> None:
    batches = tiny_batches(4, "llama")
    plain, watched = engine(tiny_blueprint("llama")), engine(tiny_blueprint("llama"))
    for batch in batches:
        watched.evaluate(batches[:2])
        assert plain.step([batch]).loss == watched.step([batch]).loss
    assert equal(snapshot(plain), snapshot(watched))


def test_saves_in_shards_and_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 2000)
    batches = tiny_batches(6, "opt")
    straight = engine(tiny_blueprint("opt", tied=True))
    expected = [straight.step([batch]) for batch in batches]
    first = engine(tiny_blueprint("opt", tied=True))
    for batch in batches[:3]:
        first.step([batch])
    first.save(tmp_path)
    assert len(list(tmp_path.glob("weights-*.safetensors"))) > 2

    second = engine(tiny_blueprint("opt", tied=True, seed=99), where=context(seed=1234))
    second.load(tmp_path)
    resumed = [second.step([batch]) for batch in batches[3:]]
    assert [stats.loss for stats in resumed] == [stats.loss for stats in expected[3:]]
    assert equal(snapshot(second), snapshot(straight))


def test_a_folder_that_is_no_checkpoint_of_this_model_is_refused(tmp_path: Path) -> None:
    made = engine(tiny_blueprint("opt"))
    with pytest.raises(UserError, match="not a checkpoint"):
        made.load(tmp_path)
    made.save(tmp_path)
    with pytest.raises(UserError, match="differs from the model in tensor"):
        engine(tiny_blueprint("llama")).load(tmp_path)
    with pytest.raises(UserError, match=r"F32, not .* BF16"):
        engine(tiny_blueprint("opt"), where=context(dtype="bf16")).load(tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**state, "schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        made.load(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match="not a checkpoint"):
        made.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layer_norm_of_two_halves(dtype: torch.dtype) -> None:
    kernels = pytest.importorskip("engines.kernels.paired_layer_norm")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((4, 3, 80), generator=generator).to(device, dtype) * 3 + 1
    weights = [torch.randn(80, generator=generator).to(device, dtype) for _ in range(4)]
    out = kernels.layer_norm(x, (weights[0], weights[1]), (weights[2], weights[3]), 1e-5)
    halves = [
        torch.nn.functional.layer_norm(half.double(), (80,), weight.double(), bias.double(), 1e-5)
        for half, weight, bias in zip(x.chunk(2), weights[::2], weights[1::2], strict=True)
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert torch.allclose(out.double(), torch.cat(halves), atol=tolerance, rtol=tolerance)
