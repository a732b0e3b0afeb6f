from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zeroth_order_runs import assert_same_steps, save

from engines.base import Batch, Context
from engines.costs import mezo as mezo_costs
from engines.costs.mezo import gpu_memory
from engines.costs.zo2 import resident_indices
from engines.errors import UserError
from engines.methods.mezo import Mezo
from engines.methods.zo2 import Zo2
from engines.noise.philox import NoiseKey, normal
from engines.settings.zeroth_order import MezoSettings, Zo2Settings
from engines.shapes import Dtype, Workload
from engines.zeroth_order.low_rank.linear_matrices import columns_first
from engines.zeroth_order.step import EVALUATION_GROUP
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

KNOBS = {"train": "lora", "lora_rank": 3, "learning_rate": 1e-2, "weight_decay": 0.1}
FAMILIES = ["opt", "llama", "gpt2", "roberta"]


def context(device: str = "cpu", dtype: Dtype = "fp32", seed: int = 7) -> Context:
    workload = Workload(batch_size=2, seq_len=16, dtype=dtype)
    return Context(device=device, workload=workload, seed=seed, total_steps=100)


def make_mezo(blueprint: TinyBlueprint, where: Context | None = None, **knobs: object) -> Mezo:
    made = Mezo(MezoSettings(**{**KNOBS, **knobs}), where or context())  # type: ignore[arg-type]
    made.setup(blueprint)
    return made


def make_zo2(blueprint: TinyBlueprint, where: Context | None = None, **knobs: object) -> Zo2:
    made = Zo2(Zo2Settings(**{**KNOBS, **knobs}), where or context())  # type: ignore[arg-type]
    made.setup(blueprint)
    return made


def adapters(made: Mezo | Zo2) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in made._model.adapters.tensors.items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_same(left: Mezo | Zo2, right: Mezo | Zo2) -> None:
    assert_equal(adapters(left), adapters(right))
    assert_equal(dict(left.weights()), dict(right.weights()))


def stored(made: Mezo | Zo2) -> dict[str, Tensor]:
    made.synchronize()
    return {
        name: tensor.cpu().clone()
        for name, tensor in made.blocks.tensors(made._updates.step - 1).items()
        if "lora_" not in name
    }


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Those of the blocks, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or columns_first(module)) and any(c.isdigit() for c in path)
    }


def with_adapters(model: nn.Module, values: dict[str, Tensor], scale: float) -> nn.Module:
    """A copy of a model with adapters applied by hooks."""
    model = copy.deepcopy(model).eval()
    for path, module in linears(model).items():
        a, b = values[f"{path}.lora_A"], values[f"{path}.lora_B"]

        def add(_: nn.Module, x: tuple[Tensor], y: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return y + scale * ((x[0] @ a.t()) @ b.t())

        module.register_forward_hook(add)
    return model


def loss_of(model: nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        return model(**batch.inputs).loss.item()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_plain_loop(family: str) -> None:
    """Losses to rounding; given the engine's projected gradient, adapters bit for bit."""
    blueprint = tiny_blueprint(family)
    reference = blueprint.reference
    made = make_mezo(blueprint, lora_alpha=12.0)
    shapes = {}
    for path, module in linears(reference).items():
        outputs, inputs = module.weight.shape[::-1] if columns_first(module) else module.weight.shape
        shapes |= {f"{path}.lora_A": (3, inputs), f"{path}.lora_B": (outputs, 3)}
    numbers = {name: len(list(reference.parameters())) + i for i, name in enumerate(sorted(shapes))}
    theta = adapters(made)
    assert {name: tuple(tensor.shape) for name, tensor in theta.items()} == shapes
    for name, tensor in theta.items():
        if name.endswith(".lora_B"):
            assert not tensor.any()
        else:
            assert tensor.std().item() == pytest.approx(tensor.shape[1] ** -0.5, rel=0.5)
    for step, batch in enumerate(tiny_batches(5, family)):
        z = {
            name: normal(NoiseKey(seed=7, step=step, tensor=numbers[name]), tensor.numel()).view(tensor.shape)
            for name, tensor in theta.items()
        }
        plus, minus = (
            loss_of(
                with_adapters(reference, {name: theta[name] + s * 1e-3 * z[name] for name in theta}, 4.0),
                batch,
            )
            for s in (1, -1)
        )
        stats = made.step([batch])
        assert stats.loss == pytest.approx((plus + minus) / 2, abs=1e-5)
        g = stats.projected_gradient
        assert g is not None
        assert g == pytest.approx((plus - minus) / 2e-3, abs=2e-3)
        theta = {name: t - 1e-2 * (g * z[name] + 0.1 * t) for name, t in theta.items()}
        assert_equal(adapters(made), theta)
    held_out = tiny_batches(1, family, seed=3)
    model = with_adapters(reference, theta, 4.0)
    assert made.evaluate(held_out).loss == pytest.approx(loss_of(model, held_out[0]), abs=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zo2_equals_mezo_with_an_evaluation_and_a_resume(family: str, dtype: Dtype, tmp_path: Path) -> None:
    where = context(dtype=dtype)
    mezo, streamed = make_mezo(tiny_blueprint(family), where), make_zo2(tiny_blueprint(family), where)
    batches = tiny_batches(9, family)
    held_out = tiny_batches(EVALUATION_GROUP + 1, family, seed=1)
    assert_same_steps(mezo, streamed, batches[:3])
    assert streamed.evaluate(held_out) == mezo.evaluate(held_out)
    assert_same_steps(mezo, streamed, batches[3:6])
    other = replace(where, seed=1)
    from_zo2 = make_mezo(tiny_blueprint(family, seed=9), other)
    from_mezo = make_zo2(tiny_blueprint(family, seed=9), other)
    from_zo2.load(save(streamed, tmp_path / "zo2"))
    from_mezo.load(save(mezo, tmp_path / "mezo"))
    assert_same(from_zo2, from_mezo)
    for batch in batches[6:]:
        expected = mezo.step([batch])
        for made in (streamed, from_zo2, from_mezo):
            stats = made.step([batch])
            assert (stats.loss, stats.projected_gradient) == (expected.loss, expected.projected_gradient)
    for made in (streamed, from_zo2, from_mezo):
        assert_same(mezo, made)


@pytest.mark.parametrize("fold_every", [1, 3])
@pytest.mark.parametrize("resident_blocks", [0, 2, 9])
def test_base_weights_stay_and_never_come_down(fold_every: int, resident_blocks: int) -> None:
    mezo = make_mezo(tiny_blueprint("llama"))
    streamed = make_zo2(tiny_blueprint("llama"), fold_every=fold_every, resident_blocks=resident_blocks)
    before = stored(streamed)
    mezo_before = stored(mezo)
    batches = tiny_batches(5, "llama")
    stats = assert_same_steps(mezo, streamed, batches)
    assert streamed.evaluate(batches) == mezo.evaluate(batches)
    assert_same(mezo, streamed)
    assert_equal(stored(streamed), before)
    assert_equal(stored(mezo), mezo_before)
    block_bytes = 4 * tiny_blueprint("llama").shape.block_parameters
    count = 3 - len(resident_indices(3, resident_blocks))
    assert {(each.h2d_bytes, each.d2h_bytes) for each in stats} == {(count * block_bytes, 0)}
    assert streamed.blocks.link.d2h_bytes == 0
    assert all(each.projected_gradient for each in stats)


def test_micro_batches_share_the_noise() -> None:
    mezo, streamed = make_mezo(tiny_blueprint("opt")), make_zo2(tiny_blueprint("opt"))
    batches = tiny_batches(6, "opt")
    for micro in (batches[:3], batches[3:]):
        assert mezo.step(micro).projected_gradient == streamed.step(micro).projected_gradient
    assert_same(mezo, streamed)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["mezo", "zo2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_added_at_first(family: str, engine: str, dtype: Dtype) -> None:
    make = make_mezo if engine == "mezo" else make_zo2
    made = make(tiny_blueprint(family), context(dtype=dtype))
    base = make(tiny_blueprint(family), context(dtype=dtype), train="all")
    batches = tiny_batches(2, family)
    assert made.evaluate(batches) == base.evaluate(batches)
    assert_equal(dict(made.weights()), dict(base.weights()))


def test_a_negative_zero_stays_one() -> None:
    blueprint = tiny_blueprint("opt")
    name = "model.decoder.layers.0.fc1.weight"
    with torch.no_grad():
        blueprint.reference.get_parameter(name).fill_(-0.0)
    assert dict(make_mezo(blueprint).weights())[name].signbit().all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_merges(family: str, dtype: Dtype) -> None:
    blueprint = tiny_blueprint(family)
    made = make_zo2(blueprint, context(dtype=dtype))
    torch.manual_seed(2)
    for tensor in made._model.adapters.tensors.values():
        tensor.normal_(std=0.1)
    values, base = adapters(made), stored(made)
    merged = dict(made.weights())
    assert list(merged) == [name for name, _ in blueprint.reference.named_parameters()]
    paths = linears(blueprint.reference)
    for name, weight in merged.items():
        expected, path = base[name], name.removesuffix(".weight")
        if path in paths:
            change = 16 / 3 * (values[f"{path}.lora_B"].float() @ values[f"{path}.lora_A"].float())
            change = change.t() if columns_first(paths[path]) else change
            expected = (expected.float() + change).to(expected.dtype)
            assert not torch.equal(weight, base[name])
        assert torch.equal(weight, expected), name
    if dtype == "fp32":
        model = copy.deepcopy(blueprint.reference).eval()
        model.load_state_dict(merged, strict=False)
        (batch,) = tiny_batches(1, family, seed=5)
        assert made.evaluate([batch]).loss == pytest.approx(loss_of(model, batch), abs=1e-5)


@pytest.mark.parametrize("engine", ["mezo", "zo2"])
def test_a_log_is_as_good_as_a_checkpoint(engine: str) -> None:
    """Through more updates than a log holds, and without a pass over the blocks."""
    where = context(dtype="bf16")
    mezo = make_mezo(tiny_blueprint("gpt2"), where)
    updates = [update for batch in tiny_batches(70, "gpt2") for update in mezo.step([batch]).updates]
    replayed = (make_mezo if engine == "mezo" else make_zo2)(tiny_blueprint("gpt2"), where)
    replayed.replay(updates)
    assert_same(mezo, replayed)
    assert_same_steps(mezo, replayed, tiny_batches(3, "gpt2", seed=5))
    assert_same(mezo, replayed)


@pytest.mark.parametrize("engine", ["mezo", "zo2"])
def test_lowers_the_loss(engine: str) -> None:
    """By as much as the hidden state can turn to one row of a small, frozen head."""
    (batch,) = tiny_batches(1, "opt", batch_size=4)
    batch = Batch(inputs={**batch.inputs, "labels": torch.full_like(batch.inputs["labels"], 9)})
    knobs = {"learning_rate": 1e-2, "weight_decay": 0.0, "lora_rank": 8}
    made = (make_mezo if engine == "mezo" else make_zo2)(tiny_blueprint("opt"), **knobs)
    before = made.evaluate([batch]).loss
    for _ in range(150):
        made.step([batch])
    assert made.evaluate([batch]).loss < before - 0.2


def test_the_landed_share_is_that_of_an_adapter() -> None:
    made = make_mezo(tiny_blueprint("opt"))
    assert made.realized_update_fraction() is None
    made.step(tiny_batches(1, "opt"))
    share = made.realized_update_fraction()
    assert share is not None
    assert share == pytest.approx(1.0, abs=1e-2)


def test_the_number_of_parameters_keeps_noise_apart() -> None:
    made = make_zo2(tiny_blueprint("llama", tied=True))
    numbers = made._model.adapters.numbers
    assert list(numbers) == sorted(numbers)
    first = len(made._layout.numbers)
    assert list(numbers.values()) == list(range(first, first + len(numbers)))


def test_a_matrix_that_two_layers_share() -> None:
    """In one block it has one adapter; in two blocks none."""

    def shared(*places: str) -> TinyBlueprint:
        blueprint = tiny_blueprint("opt")
        for model in (blueprint.model, blueprint.reference):
            layers = model.model.decoder.layers
            first = layers.get_submodule(places[0])
            layers.get_submodule(places[1]).weight = first.weight
        return blueprint

    for places, gone in (
        (("0.self_attn.q_proj", "0.self_attn.v_proj"), 1),
        (("0.fc1", "1.fc1"), 2),
    ):
        mezo, streamed = make_mezo(shared(*places)), make_zo2(shared(*places))
        assert len(adapters(mezo)) == 2 * (18 - gone)
        assert_same_steps(mezo, streamed, tiny_batches(3, "opt"))
        assert_same(mezo, streamed)


class _Taking(nn.Module):
    """Its list makes the block one unit; its layers see one sequence at a time, so halves are no sides."""

    def __init__(self, inner: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.inner = inner
        self.experts = nn.ModuleList(nn.Linear(16, 16, device=device) for _ in range(2))

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> object:
        output = self.inner(hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        rows = [self.experts[i % 2](row) for i, row in enumerate(hidden)]
        hidden = hidden + torch.stack(rows)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def test_a_block_with_a_mixture_runs_each_side_by_itself() -> None:
    def mixture() -> TinyBlueprint:
        blueprint = tiny_blueprint("opt")
        for model in (blueprint.reference, blueprint.model):
            torch.manual_seed(4)
            layers = model.model.decoder.layers
            device = layers[0].fc1.weight.device
            model.model.decoder.layers = nn.ModuleList(_Taking(layer, device) for layer in layers)
        return blueprint

    blueprint = mixture()
    mezo, streamed = make_mezo(blueprint), make_zo2(mixture())
    batches = tiny_batches(3, "opt")
    for batch in batches:
        before, step = adapters(mezo), mezo._updates.step
        numbers = mezo._model.adapters.numbers
        (stats,) = assert_same_steps(mezo, streamed, [batch])
        losses = []
        for s in (1, -1):
            values = {
                name: t
                + s
                * 1e-3
                * normal(NoiseKey(seed=7, step=step, tensor=numbers[name]), t.numel()).view(t.shape)
                for name, t in before.items()
            }
            losses.append(loss_of(with_adapters(blueprint.reference, values, 16 / 3), batch))
        assert stats.projected_gradient == pytest.approx((losses[0] - losses[1]) / 2e-3, abs=2e-3)
    assert_same(mezo, streamed)


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = save(make_mezo(tiny_blueprint("opt")), tmp_path / "lora")
    alpha = "lora_rank=3 and lora_alpha=16, these lora_rank=3 and lora_alpha=8; resume with .*lora_alpha=16"
    for knobs, message in (
        ({"train": "all"}, "lora_A"),
        ({"lora_rank": 4}, "lora_rank=3 and lora_alpha=16, these lora_rank=4"),
        ({"lora_alpha": 8.0}, alpha),
    ):
        for make in (make_mezo, make_zo2):
            with pytest.raises(UserError, match=message) as caught:
                make(tiny_blueprint("opt"), **knobs).load(folder)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [make_mezo, make_zo2])
def test_checkpoints_from_before_adapters_were_described_are_read(
    make: Callable[..., Mezo | Zo2], tmp_path: Path
) -> None:
    saved = make(tiny_blueprint("opt"))
    folder = save(saved, tmp_path / "lora")
    state = json.loads((folder / "state.json").read_text())
    assert state.pop("lora") == {"rank": 3, "alpha": 16.0}
    (folder / "state.json").write_text(json.dumps(state))
    resumed = make(tiny_blueprint("opt", seed=1))
    resumed.load(folder)
    assert_same(saved, resumed)


@pytest.mark.parametrize("train", ["lora", "last:1", "all"])
@pytest.mark.parametrize("family", ["opt", "llama", "roberta"])
def test_scratch_is_what_the_cost_model_counts(
    family: str, train: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen blocks have one copy for both sides. Beyond it, gaps between tensors."""
    blueprint = tiny_blueprint(family)
    # The trial before anything is filled is the peak of models as small as these.
    monkeypatch.setattr(mezo_costs, "TRIAL_BYTES", -4 * blueprint.shape.largest_tensor)
    made = make_mezo(blueprint, train=train)
    made.step(tiny_batches(2, family))  # which share a visit, so a whole block is made
    memories = made._model.scratch._memory
    assert len(memories) == (1 if train == "lora" else 2)
    held = sum(each.nbytes for each in (*memories, *made._model.adapters._sides))
    workload = replace(made.context.workload, accumulation=2)
    settings = replace(made.settings, train=train)
    shape = blueprint.shape
    # The head's own scratch is left out.
    headless = replace(shape, head="classification", num_labels=2, head_parameters=0)
    counted = gpu_memory(headless, workload, settings, {})["gpu_memory_bytes"]["scratch"]
    matrices = len(shape.matrices)
    slack = sum(each.numel() > 0 for each in memories) * 512 + 4 * 16 * (3 * matrices + 16)
    assert counted <= held <= counted + slack


@pytest.mark.parametrize("train", ["lora", "last:1"])
def test_a_frozen_product_is_the_layers_own(train: str) -> None:
    """Without bias it takes another way to the matrix kernel."""
    made = make_mezo(tiny_blueprint("llama"), train=train)
    reference = tiny_blueprint("llama").reference
    batch = tiny_batches(1, "llama")[0]
    with torch.no_grad():
        assert made.evaluate([batch]).loss == pytest.approx(reference(**batch.inputs).loss.item(), rel=1e-6)


def test_blocks_without_linear_layers_are_refused() -> None:
    class Own(nn.Linear):
        """Not known to compute a plain product."""

    blueprint = tiny_blueprint("opt")
    for module in blueprint.model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Own
    with pytest.raises(UserError, match="no linear layer"):
        make_mezo(blueprint)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_mezo_on_the_gpu(
    family: str, dtype: Dtype, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs in zo2 only, or nowhere; a graph that reads stale adapters would show."""
    where = context("cuda:0", dtype)
    if not graphs:
        monkeypatch.setattr("engines.zeroth_order.perturbed_model.GRAPH_SCRATCH_BYTES", 0)
    streamed = make_zo2(tiny_blueprint(family, num_blocks=5), where, resident_blocks=1)
    monkeypatch.setattr("engines.zeroth_order.perturbed_model.GRAPH_SCRATCH_BYTES", 0)
    mezo = make_mezo(tiny_blueprint(family, num_blocks=5), where)
    batches = tiny_batches(10, family)
    stats = assert_same_steps(mezo, streamed, batches[:5])
    assert streamed.evaluate(batches) == mezo.evaluate(batches)
    stats += assert_same_steps(mezo, streamed, batches[5:])
    assert {each.d2h_bytes for each in stats} == {0}
    assert_same(mezo, streamed)
    streamed.close()
