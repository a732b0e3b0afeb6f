"""torchao's offloading optimizer behind our protocol; most of it needs a GPU and torchao."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.base import Context
from engines.errors import NotAvailable, UserError
from engines.methods import torchao_offload
from engines.methods.native import Native
from engines.methods.torchao_offload import TorchaoOffload, clip_gradients, flat_state, put_state
from engines.settings.first_order import NativeSettings, TorchaoOffloadSettings
from engines.shapes import Dtype, Workload
from tiny_families import blueprint_of
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

SETTINGS = TorchaoOffloadSettings(learning_rate=1e-3, weight_decay=0.1, schedule="cosine", warmup_steps=2)
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)


def context(device: str, dtype: Dtype = "fp32", accumulation: int = 1) -> Context:
    workload = Workload(batch_size=2, seq_len=16, dtype=dtype, checkpointing=False, accumulation=accumulation)
    return Context(device=device, workload=workload, seed=7, total_steps=6)


def wide_blueprint() -> TinyBlueprint:
    """With an embedding of 4096 elements, so that torchao offloads one tensor and keeps the others."""
    blueprint = tiny_blueprint("opt", tied=True)
    for model in (blueprint.reference, blueprint.model):
        model.resize_token_embeddings(256, mean_resizing=False)
    return blueprint


def test_says_why_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'lspzo-bench[torchao]'" in (TorchaoOffload.why_not_available() or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for is_there, reason in ((False, "needs a CUDA or XPU device"), (True, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=is_there: is_there)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
        found = TorchaoOffload.why_not_available()
        assert (found is None) if reason is None else (found is not None and reason in found)


def test_is_not_available_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchao_offload, "why_not_available", lambda: None)
    with pytest.raises(NotAvailable, match="the run is on the CPU"):
        TorchaoOffload(SETTINGS, context("cpu")).setup(tiny_blueprint("opt"))
    monkeypatch.setattr(torchao_offload, "why_not_available", lambda: "there is no torchao")
    with pytest.raises(NotAvailable, match="there is no torchao"):
        TorchaoOffload(SETTINGS, context("cuda:0")).setup(tiny_blueprint("opt"))


def test_offloaded_gradients_do_not_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchao_offload, "why_not_available", lambda: None)
    engine = TorchaoOffload(replace(SETTINGS, offload_gradients=True), context("cuda:0", accumulation=2))
    with pytest.raises(UserError, match="would not add up"):
        engine.setup(tiny_blueprint("opt"))


def test_checkpointing_that_a_model_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchao_offload, "why_not_available", lambda: None)
    given = context("cuda:0")
    engine = TorchaoOffload(SETTINGS, replace(given, workload=replace(given.workload, checkpointing=True)))
    with pytest.raises(UserError, match=r"MPNetForSequenceClassification.*; use --no-checkpointing"):
        engine.setup(blueprint_of("mpnet"))


def test_state_survives_flattening() -> None:
    def optimizer(steps: int) -> torch.optim.AdamW:
        parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
        made = torch.optim.AdamW(parameters, fused=True)
        for step in range(steps):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
            made.step()
        return made

    # The layout of CPUOffloadOptimizer.state_dict: a list, and one more for the small tensors.
    trained = {
        "offloaded": [optimizer(1).state_dict(), optimizer(2).state_dict()],
        "on-device": optimizer(3).state_dict(),
    }
    fresh = {
        "offloaded": [optimizer(0).state_dict(), optimizer(0).state_dict()],
        "on-device": optimizer(0).state_dict(),
    }
    flat = flat_state(trained)
    assert len(flat) == 3 * 2 * 3
    put_state(fresh, flat)
    again = flat_state(fresh)
    assert again.keys() == flat.keys()
    assert all(torch.equal(again[name], flat[name]) for name in flat)
    restored = optimizer(0)
    restored.load_state_dict(fresh["offloaded"][1])
    assert [float(state["step"]) for state in restored.state.values()] == [2.0, 2.0]


def test_clipping_scales_what_the_optimizers_read() -> None:
    """Of both kinds of tensors together, wherever their optimizers have them."""
    large, small = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(2))
    inside = SimpleNamespace(
        optim_dict={torch.zeros(4): torch.optim.SGD([large])}, d_opt=torch.optim.SGD([small])
    )
    large.grad, small.grad = torch.full((4,), 2.0), torch.full((2,), 1.0)
    before = torch.cat((large.grad, small.grad))
    clip_gradients(inside, 100.0)
    assert torch.equal(torch.cat((large.grad, small.grad)), before)
    clip_gradients(inside, 1.0)
    after = torch.cat((large.grad, small.grad))
    torch.testing.assert_close(after, before / before.norm())


class StandIn:
    """What `CPUOffloadOptimizer` of torchao 0.18 shows of itself, with everything on the CPU.

    Its flaw is here too: `param_groups` lists the groups that the small tensors' optimizer was made with,
    and that optimizer has others once it has loaded a state.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        optimizer_class: type[torch.optim.AdamW],
        *,
        offload_gradients: bool,
        **options: Any,
    ) -> None:
        self.param_d2h_map: dict[Tensor, Tensor] = {}
        self.optim_dict: dict[Tensor, torch.optim.Optimizer] = {}
        self.made_with: list[dict[str, Any]] = []
        for group in params:
            others = {key: value for key, value in group.items() if key != "params"}
            small = [parameter for parameter in group["params"] if parameter.numel() < 4096]
            for parameter in group["params"]:
                if parameter.numel() >= 4096:
                    on_host = self.param_d2h_map[parameter] = parameter.detach().clone()
                    self.optim_dict[parameter] = optimizer_class([{"params": [on_host], **others}], **options)
            if small:
                self.made_with.append({"params": small, **others})
        self.d_opt = optimizer_class(self.made_with, **options) if self.made_with else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        offloaded = [group for each in self.optim_dict.values() for group in each.param_groups]
        return self.made_with + offloaded

    @torch.no_grad()
    def step(self) -> None:
        if self.d_opt is not None:
            self.d_opt.step()
        for parameter, on_host in self.param_d2h_map.items():
            on_host.grad = parameter.grad
            self.optim_dict[parameter].step()
            parameter.copy_(on_host)

    def zero_grad(self) -> None:
        for parameter in [*self.param_d2h_map, *(p for group in self.made_with for p in group["params"])]:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"offloaded": [each.state_dict() for each in self.optim_dict.values()]}
        return state if self.d_opt is None else {**state, "on-device": self.d_opt.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for each, entry in zip(self.optim_dict.values(), state["offloaded"], strict=True):
            each.load_state_dict(entry)
        if self.d_opt is not None:
            self.d_opt.load_state_dict(state["on-device"])


def stand_in_engine(monkeypatch: pytest.MonkeyPatch, dtype: Dtype = "fp32") -> TorchaoOffload:
    """On the CPU, which `setup` would refuse."""
    package, module = ModuleType("torchao"), ModuleType("torchao.optim")
    module.CPUOffloadOptimizer = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.optim", module)
    made = TorchaoOffload(SETTINGS, context("cpu", dtype))
    made._build(wide_blueprint())
    return made


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_with_a_stand_in_equals_the_uninterrupted_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: Dtype
) -> None:
    batches = tiny_batches(6, "opt")
    straight, first, second = (stand_in_engine(monkeypatch, dtype) for _ in range(3))
    losses = [straight.step([batch]).loss for batch in batches]
    for batch in batches[:3]:
        first.step([batch])
    first.save(tmp_path)
    second.load(tmp_path)
    assert [second.step([batch]).loss for batch in batches[3:]] == losses[3:]
    expected = dict(straight.weights())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.weights())


def test_learning_rates_reach_every_tensor_also_after_loading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = stand_in_engine(monkeypatch)
    batches = tiny_batches(2, "opt")
    engine.step(batches[:1])
    engine.save(tmp_path)
    engine.load(tmp_path)
    stale = [group["lr"] for group in engine.optimizer.param_groups]
    engine.step(batches[1:])
    groups = torchao_offload.inner_groups(engine.optimizer)
    members = {id(tensor) for group in groups for tensor in group["params"]}
    small = [p for p in engine.model.parameters() if p not in engine.optimizer.param_d2h_map]
    assert members == {id(p) for p in [*small, *engine.optimizer.param_d2h_map.values()]}
    assert {group["lr"] for group in groups} == {SETTINGS.learning_rate}  # the second step of the warm-up
    assert stale[0] != SETTINGS.learning_rate


@pytest.mark.gpu
@needs_torchao
@pytest.mark.parametrize("offload_gradients", [False, True])
def test_trains_as_native_does(offload_gradients: bool) -> None:
    accumulation = 1 if offload_gradients else 2
    ctx, batches = context("cuda:0", accumulation=accumulation), tiny_batches(12, "opt")
    native = Native(
        NativeSettings(learning_rate=1e-3, weight_decay=0.1, schedule="cosine", warmup_steps=2), ctx
    )
    native.setup(wide_blueprint())
    engine = TorchaoOffload(replace(SETTINGS, offload_gradients=offload_gradients), ctx)
    engine.setup(wide_blueprint())
    for start in range(0, 6 * accumulation, accumulation):
        step = batches[start : start + accumulation]
        stats = engine.step(step)
        assert stats.loss == pytest.approx(native.step(step).loss, rel=1e-4)
        assert stats.h2d_bytes == 4 * 256 * 16
    expected = dict(native.weights())
    for name, tensor in engine.weights():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    engine.close()


@pytest.mark.gpu
@needs_torchao
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_equals_the_uninterrupted_run(tmp_path: Path, dtype: Dtype) -> None:
    def engine() -> TorchaoOffload:
        made = TorchaoOffload(SETTINGS, context("cuda:0", dtype))
        made.setup(wide_blueprint())
        return made

    batches = tiny_batches(6, "opt")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        straight, first, second = engine(), engine(), engine()
        losses = [straight.step([batch]).loss for batch in batches]
        for batch in batches[:3]:
            first.step([batch])
        first.save(tmp_path)
        second.load(tmp_path)
        assert [second.step([batch]).loss for batch in batches[3:]] == losses[3:]
