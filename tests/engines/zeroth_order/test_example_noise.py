"""One direction per example against its formulae: unbiased, zo2 as mezo, resumed by checkpoint and by log."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from zeroth_order_runs import (
    Engine,
    assert_all_same_steps,
    assert_replays,
    assert_same_steps,
    assert_same_weights,
    context,
    in_groups,
    make_mezo,
    make_zo2,
)

from engines.base import Batch, Context, Update
from engines.errors import UserError
from engines.model.label_words import WORDS, classify_by_words
from engines.noise.philox import NoiseKey, signs
from engines.settings.parse import parse_settings
from engines.settings.zeroth_order import MezoSettings
from engines.shapes import Dtype
from engines.zeroth_order.chunked_loss import Targets, of_sequences
from engines.zeroth_order.estimators import next_updates, of_all_examples
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

GRZO = MezoSettings(learning_rate=1e-6, estimator="grzo", noise="rademacher", grzo_window=3)


def of_four(dtype: Dtype = "fp32", accumulation: int = 1, device: str = "cpu", seed: int = 7) -> Context:
    """Steps on four examples, in so many micro-batches."""
    where = context(device=device, dtype=dtype, accumulation=accumulation, seed=seed)
    return replace(where, workload=replace(where.workload, batch_size=4 // accumulation))


# --- the estimate ---------------------------------------------------------------------------------------

HEIGHT, WIDTH, EXAMPLES, DRAWS = 3, 5, 6, 1200


class Bowls:
    """A quadratic of a matrix for each example; their mean is what is to be lowered."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        size = HEIGHT * WIDTH
        roots = torch.randn((EXAMPLES, size, size), generator=generator, dtype=torch.float64)
        self._a = roots @ roots.transpose(1, 2) / size
        self._b = torch.randn((EXAMPLES, size), generator=generator, dtype=torch.float64)
        self.start = torch.randn((HEIGHT, WIDTH), generator=generator, dtype=torch.float64)

    def of(self, example: int, w: Tensor) -> float:
        flat = w.flatten()
        return float(flat @ self._a[example] @ flat / 2 + self._b[example] @ flat)

    @property
    def gradient(self) -> Tensor:
        flat = self.start.flatten()
        return ((self._a @ flat) + self._b).mean(0).view(HEIGHT, WIDTH)


@cache
def estimates(window: int) -> Tensor:
    """(draws, height, width): what steps from one start would do over -lr, times twice their deviation sigma:
    before it is normalised the estimate is half the slope along z."""
    bowls, found = Bowls(), []
    made = replace(GRZO, learning_rate=1.0)
    for step in range(DRAWS):
        r = signs(NoiseKey(seed=3, step=step, tensor=8), EXAMPLES * HEIGHT).view(EXAMPLES, HEIGHT).double()
        key = NoiseKey(seed=3, step=step // window, tensor=9)
        s = signs(key, EXAMPLES * WIDTH).view(EXAMPLES, WIDTH).double()
        z = torch.einsum("em,en->emn", r, s)
        losses = [
            bowls.of(i, bowls.start + side * made.eps * z[i]) for i in range(EXAMPLES) for side in (1, -1)
        ]
        delta = [(plus - minus) / 2 for plus, minus in zip(losses[::2], losses[1::2], strict=True)]
        updates = next_updates(step, made, 10, losses)
        assert [update.query for update in updates] == list(range(EXAMPLES))
        direction = sum(
            (update.coefficient * z[update.query] for update in updates), torch.zeros(HEIGHT, WIDTH)
        )
        found.append(direction * 2 * statistics.stdev(delta))
    return torch.stack(found)


@pytest.mark.parametrize("window", [1, 3])
def test_the_mean_of_the_estimates_is_the_gradient(window: int) -> None:
    """Of quadratics two-sided slopes are exact: every element lies within 4.5 standard errors (of windows,
    which are independent)."""
    found = estimates(window).view(-1, window, HEIGHT, WIDTH).mean(1)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - Bowls().gradient).abs() < 4.5 * error + 2e-3).all()


def test_a_step_has_one_length_whatever_the_loss() -> None:
    losses = [2.0, 1.0, 1.5, 1.25, 3.0, 2.5]
    ours, scaled = (next_updates(0, GRZO, 10, [by * loss for loss in losses]) for by in (1.0, 1000.0))
    for one, other in zip(ours, scaled, strict=True):
        assert other.projected_gradient == pytest.approx(one.projected_gradient, rel=1e-9)
    spread = statistics.stdev(update.projected_gradient for update in ours)
    assert spread == pytest.approx(1 / (2 * GRZO.eps))
    assert of_all_examples(ours).projected_gradient == pytest.approx(
        statistics.fmean(update.projected_gradient for update in ours)
    )
    assert (of_all_examples(ours).draw, [update.draw for update in ours]) == (0, [0, 1, 2])


def test_does_not_move_where_all_differences_are_one_number() -> None:
    updates = next_updates(3, GRZO, 10, [2.0, 1.5, 1.0, 0.5])
    assert [update.projected_gradient for update in updates] == [0.0, 0.0]


def test_losses_of_examples_have_the_mean_of_their_micro_batch() -> None:
    """Whatever number of labels each has, none included."""
    positions = torch.tensor([0, 1, 2, 9, 14])
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    found = of_sequences(losses, Targets(positions, positions), batch=4, length=4)
    assert found.tolist() == pytest.approx([5.6, 0.0, 6.4, 12.8])
    assert float(found.mean()) == pytest.approx(float(losses.mean()))


# --- the engines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("family", "knobs"),
    [
        ("opt", {"resident_blocks": 1}),
        ("gpt2", {"grzo_window": 1}),
        ("llama", {"train": "last:2"}),
        ("roberta", {"base": "int8"}),
        ("opt", {"base": "lossless"}),
    ],
)
def test_zo2_equals_mezo(family: str, knobs: dict[str, Any], accumulation: int) -> None:
    where = of_four("bf16", accumulation)
    mezo = make_mezo(
        tiny_blueprint(family), where, like=GRZO, **{k: v for k, v in knobs.items() if k != "resident_blocks"}
    )
    streamed = make_zo2(tiny_blueprint(family), where, like=GRZO, **knobs)
    batches = tiny_batches(7 * accumulation, family, batch_size=4 // accumulation)
    told = assert_same_steps(mezo, streamed, batches, accumulation)
    assert {len(stats.updates) for stats in told} == {4}
    assert {stats.forwards for stats in told} == {2.0}
    held_out = tiny_batches(2, family, seed=5)
    assert streamed.evaluate(held_out) == mezo.evaluate(held_out)
    again = tiny_batches(4 * accumulation, family, seed=9, batch_size=4 // accumulation)
    assert_same_steps(mezo, streamed, again, accumulation)
    assert_same_weights(mezo, streamed)


def of_two_words(seed: int) -> Batch:
    """Four examples, each one sequence for each of two words at its end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (4, 12), generator=generator).repeat_interleave(2, 0)
    ids[0::2, -1], ids[1::2, -1] = 5, 6
    words = torch.full_like(ids, -100)
    words[:, -1] = ids[:, -1]
    labels = torch.randint(0, 2, (4,), generator=generator)
    mask = torch.ones_like(ids)
    return Batch(inputs={"input_ids": ids, "attention_mask": mask, WORDS: words, "labels": labels})


def test_sequences_of_one_example_share_its_direction() -> None:
    """Of a model that classifies by words. Examples whose two sequences were alike would have no slope."""

    def blueprint() -> TinyBlueprint:
        made = tiny_blueprint("opt")
        made.sample = of_two_words(0)
        for model in (made.model, made.reference):
            classify_by_words(model, 2)
        return made

    mezo, streamed = (make(blueprint(), of_four(), like=GRZO) for make in (make_mezo, make_zo2))
    told = assert_same_steps(mezo, streamed, [of_two_words(number) for number in range(3)])
    assert_same_weights(mezo, streamed)
    own = blueprint().reference(**of_two_words(0).inputs).loss.item()
    assert told[0].loss == pytest.approx(own, abs=1e-3)
    assert {len(stats.updates) for stats in told} == {4}


def test_what_one_example_sees_is_its_own() -> None:
    """The slopes of two examples, but for the deviation that all are divided by, are the same beside two
    other ones, and not in another place of the batch, where directions differ."""
    (batch,) = tiny_batches(1, "opt", batch_size=4)
    others = batch.inputs["input_ids"].clone()
    others[2:] = (others[2:] + 5) % 40 + 3
    changed = Batch(inputs={**batch.inputs, "input_ids": others})
    swapped = Batch(inputs={name: each[[1, 0, 2, 3]] for name, each in batch.inputs.items()})
    ratios = []
    for each, first in ((batch, 0), (changed, 0), (swapped, 1)):
        made = make_mezo(tiny_blueprint("opt"), of_four(), like=GRZO)
        gradients = [update.projected_gradient for update in made.step([each]).updates]
        ratios.append(gradients[first] / gradients[1 - first])
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-2)
    assert ratios[2] != pytest.approx(ratios[0], rel=0.1)


def test_layers_that_see_no_rows_of_examples_are_refused() -> None:
    """DeBERTa's keys and values of relative positions are the same for all."""
    with pytest.raises(UserError, match="do not see the rows of an example together"):
        make_mezo(tiny_blueprint("deberta-v2"), of_four(), like=GRZO)


def test_a_layer_that_sees_the_rows_of_examples_in_another_order_is_refused() -> None:
    blueprint = tiny_blueprint("opt")
    layer = blueprint.model.get_submodule("model.decoder.layers.1.fc1")
    layer.register_forward_pre_hook(lambda module, args: (args[0].flip(0),))
    with pytest.raises(UserError, match="do not see the rows of an example together"):
        make_mezo(blueprint, of_four(), like=GRZO)


@pytest.mark.parametrize(("make", "saved_at"), [(make_mezo, 1), (make_zo2, 2), (make_zo2, 3)])
def test_resumes_bit_for_bit_within_a_window_and_at_its_end(
    make: Callable[..., Engine], saved_at: int, tmp_path: Path
) -> None:
    straight, first = (make(tiny_blueprint("opt"), of_four("bf16"), like=GRZO) for _ in range(2))
    batches = tiny_batches(5, "opt", batch_size=4)
    assert_same_steps(straight, first, batches[:saved_at])
    first.save(tmp_path)
    second = make(tiny_blueprint("opt", seed=99), of_four("bf16", seed=1), like=GRZO)
    second.load(tmp_path)
    assert_same_steps(straight, second, batches[saved_at:])
    assert_same_weights(straight, second)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_log_is_as_good_as_a_checkpoint(count: int) -> None:
    mezo = make_mezo(tiny_blueprint("gpt2", tied=True), of_four("fp16"), like=GRZO)
    updates: list[Update] = []
    for batch in tiny_batches(count, "gpt2", batch_size=4):
        updates += mezo.step([batch]).updates
    others = [
        make(tiny_blueprint("gpt2", tied=True), of_four("fp16"), like=GRZO) for make in (make_mezo, make_zo2)
    ]
    assert_replays(mezo, updates, others)
    assert_all_same_steps(mezo, others, tiny_batches(4, "gpt2", seed=5, batch_size=4))


def test_lowers_the_loss_and_no_matrix_is_written_within_a_window() -> None:
    """The answer is always the same token."""
    settings = replace(GRZO, grzo_window=50, learning_rate=3e-6)
    made = make_mezo(tiny_blueprint("opt"), of_four(), like=settings)
    (batch,) = tiny_batches(1, "opt", batch_size=4)
    batch = Batch(inputs={**batch.inputs, "labels": torch.full_like(batch.inputs["labels"], 9)})
    stored = made.blocks.tensors(0)
    name = next(name for name in stored if name.endswith("fc1.weight"))
    before, start = stored[name].clone(), made.evaluate([batch]).loss
    for step in range(100):
        made.step([batch])
        assert torch.equal(stored[name], before) == (step < 50)
    assert made.evaluate([batch]).loss < start - 1.0


def test_a_loss_that_is_no_mean_over_labels_is_refused() -> None:
    blueprint = tiny_blueprint("roberta")
    model = blueprint.model
    plain = model.forward

    def smoothed(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        if labels is not None:
            output.loss = 2 * cross_entropy(output.logits.float(), labels, label_smoothing=0.5)
        return output

    vars(model)["forward"] = smoothed
    made = make_mezo(blueprint, of_four(), like=GRZO)
    with pytest.raises(UserError, match="examples cannot be told apart"):
        made.step(tiny_batches(1, "roberta", batch_size=4))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"noise": "gaussian"}, "noise must be rademacher"),
        ({"train": "lora"}, "train must be all or last:N"),
        ({"weight_decay": 0.1}, "weight_decay must be 0"),
        ({"queries": 2}, "queries must be 1"),
        ({"grzo_window": 0}, "grzo_window must be positive"),
        ({"grzo_window": 65}, "must be 64 at most"),
        ({"fold_every": 2}, "fold_every must be 1"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        parse_settings("zo2", {"estimator": "grzo", "noise": "rademacher", **values})


@pytest.mark.parametrize(("size", "why"), [(1, "there is 1"), (65, "64 examples at most")])
def test_a_step_on_too_few_or_too_many_examples_is_refused(size: int, why: str) -> None:
    where = context()
    with pytest.raises(UserError, match=why):
        make_mezo(
            tiny_blueprint("opt"),
            replace(where, workload=replace(where.workload, batch_size=size)),
            like=GRZO,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("graphs", [True, False])
def test_zo2_equals_mezo_on_the_gpu(
    dtype: Dtype, accumulation: int, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = of_four(dtype, accumulation, device="cuda:0")
    if not graphs:
        monkeypatch.setattr("engines.zeroth_order.perturbed_model.GRAPH_SCRATCH_BYTES", 0)
    mezo = make_mezo(tiny_blueprint("opt", num_blocks=5), where, like=GRZO)
    streamed = make_zo2(tiny_blueprint("opt", num_blocks=5), where, like=GRZO, resident_blocks=1)
    batches = tiny_batches(11 * accumulation, "opt", batch_size=4 // accumulation)
    told = assert_same_steps(mezo, streamed, batches, accumulation)
    assert_same_weights(mezo, streamed)
    on_cpu = make_mezo(tiny_blueprint("opt", num_blocks=5), of_four(dtype, accumulation), like=GRZO)
    for group, stats in zip(in_groups(batches, accumulation)[:3], told, strict=False):
        assert on_cpu.step(group).loss == pytest.approx(stats.loss, rel=2e-2)
    streamed.close()
