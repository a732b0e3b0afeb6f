"""What no subspace holds, as `lsp` trains it: that gradients and moments are there before the first step
changes where they lie, and no bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trained_engines import assert_same_weights, weights

from engines.base import Context
from engines.first_order.adamw import make_adamw, set_learning_rate
from engines.first_order.checkpoint import parameter_names
from engines.methods import lsp
from engines.methods.lsp import Lsp
from engines.settings.lsp import LspSettings
from engines.shapes import Workload
from engines.subspace.dense_parameters import DenseParameters
from engines.world import World
from tiny_models import tiny_batches, tiny_blueprint

SETTINGS = LspSettings(
    learning_rate=3e-3, weight_decay=0.1, schedule="constant", warmup_steps=0, max_grad_norm=0.5,
    d=6, r=2, check_every=8, learn_steps=3, learn_timeout_s=1e9,
)  # fmt: skip
STEPS = 6
USED_IN = (2, 4)
FORMS: list[dict[str, Any]] = [{}, {"weights": "streamed"}, {"checkpointed_blocks": 2}]
BATCHES = tiny_batches(STEPS, "opt")
OUTSIDE, INSIDE = "model.decoder.embed_tokens", "model.decoder.layers.1.self_attn_layer_norm"


class Running(Lsp):
    """Of an OPT with two tables of its own, outside and inside of blocks, which most steps do not use."""

    def __init__(self, **changes: Any) -> None:
        workload = Workload(batch_size=2, seq_len=16, dtype="fp32", checkpointing=True)
        context = Context(device="cpu", workload=workload, seed=7, total_steps=STEPS)
        super().__init__(replace(SETTINGS, **changes), context)
        blueprint = tiny_blueprint("opt", tied=True, num_blocks=2)
        for number, name in enumerate((OUTSIDE, INSIDE)):
            blueprint.model.get_submodule(name).table = nn.Parameter(torch.empty(4, 16, device="meta"))
            table = torch.randn(4, 16, generator=torch.Generator().manual_seed(number))
            blueprint.reference.get_submodule(name).table = nn.Parameter(table)
            blueprint.model.get_submodule(name).register_forward_hook(self._use)
        self.setup(blueprint)

    def _use(self, module: nn.Module, _: Any, out: Tensor) -> Tensor:
        return out + 0.1 * module.get_parameter("table").sum(0) if self.steps_done in USED_IN else out

    def train(self, *steps: int) -> list[float]:
        return [self.step([BATCHES[number]]).loss for number in steps]

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: each for name, each in self.model.named_parameters() if each.requires_grad}

    def state(self) -> dict[str, Tensor]:
        return self.dense.state(parameter_names(self.model))

    def table(self, where: str) -> nn.Parameter:
        return self.model.get_submodule(where).get_parameter("table")


@contextmanager
def running(**changes: Any) -> Iterator[Running]:
    engine = Running(**changes)
    try:
        yield engine
    finally:
        engine.close()


class AsTorchDoes:
    """`DenseParameters` by torch alone, without clipping and checkpoints."""

    def __init__(self, model: nn.Module, subspaces: Any, settings: LspSettings, device: Any) -> None:
        own = {each.weight for members in subspaces for each in members}
        self.parameters = [parameter for parameter in model.parameters() if parameter not in own]
        self.adam = make_adamw(self.parameters, settings)

    def finish_backward(self, world: World) -> None: ...

    def step(self, rate: float, squared_total: Tensor) -> None:
        set_learning_rate(self.adam.param_groups, rate)
        self.adam.step()
        self.adam.zero_grad(set_to_none=False)


@pytest.mark.parametrize("form", FORMS)
def test_they_lie_where_they_lay_before_the_first_step(form: dict[str, Any]) -> None:
    with running(**form) as engine:

        def places() -> dict[str, int]:
            gradients = {f"grad.{name}": each.grad for name, each in engine.trained().items()}
            return {
                name: each.data_ptr()
                for name, each in (gradients | engine.state()).items()
                if each is not None and not name.endswith("table")
            }

        before = places()
        assert len(before) == 4 * (len(engine.trained()) - 2)
        engine.train(0, 1)
        assert places() == before


@pytest.mark.parametrize("form", FORMS)
def test_no_bit_is_another_than_with_gradients_and_moments_of_the_first_step(
    form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is torch's own way: a parameter without a gradient is left out. Here its first one comes late."""
    with running(**form, max_grad_norm=0.0) as engine:
        losses, found = engine.train(*range(STEPS)), weights(engine)
    monkeypatch.setattr(lsp, "DenseParameters", AsTorchDoes)
    with running(**form, max_grad_norm=0.0) as engine:
        assert losses == engine.train(*range(STEPS))
        assert_same_weights(found, weights(engine))


@pytest.mark.parametrize("where", [OUTSIDE, INSIDE])
def test_what_no_gradient_has_reached_is_neither_decayed_nor_held(where: str) -> None:
    with running() as engine:
        table, before = engine.table(where), engine.table(where).detach().clone()
        engine.train(0, 1)
        assert table.grad is None
        assert f"step.{where}.table" not in engine.state()
        assert torch.equal(table, before)
        engine.train(2)
        assert int(engine.state()[f"step.{where}.table"]) == 1
        once = table.detach().clone()
        assert not torch.equal(once, before)
        engine.train(3)  # moments and decay go on, as torch's do with a gradient of zero
        assert not torch.equal(table, once)


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_after_any_step_goes_on_with_the_same_bits(form: dict[str, Any], tmp_path: Path) -> None:
    """Also where a table's next gradient comes steps after the one that the checkpoint has moments of."""
    with running(**form) as straight:
        losses, expected = straight.train(*range(STEPS)), weights(straight)
    with running(**form) as saving:
        for step in range(STEPS):
            (tmp_path / str(step)).mkdir()
            saving.save(tmp_path / str(step))
            saving.train(step)
    for after in range(STEPS):
        with running(**form) as resumed:
            resumed.load(tmp_path / str(after))
            assert resumed.train(*range(after, STEPS)) == losses[after:]
            assert_same_weights(weights(resumed), expected)


def test_frozen_parameters_have_neither() -> None:
    with running(train_outer=False) as engine:
        assert engine.trained() == {} == engine.state()
        before = {name: each.detach().clone() for name, each in engine.model.named_parameters()}
        engine.train(0, 1)
        assert all(each.grad is None for each in engine.model.parameters())
        assert torch.equal(before[f"{OUTSIDE}.weight"], engine.model.get_parameter(f"{OUTSIDE}.weight"))


def test_what_the_model_itself_holds_fixed_has_neither() -> None:
    model = nn.ModuleDict({"fixed": nn.Embedding(3, 2), "head": nn.Linear(2, 3)})
    model["fixed"].requires_grad_(False)
    found = DenseParameters(model, [], SETTINGS, torch.device("cpu"))
    state = found.state(parameter_names(model))
    assert {name.partition(".")[2] for name in state} == {"head.weight", "head.bias"}
    assert model["fixed"].weight.grad is None
