"""DeepSpeed's rows against a plain loop with fp32 masters, where DeepSpeed is installed; their costs always.

Its CPU Adam is compiled at first use, which takes minutes, so that what trains carries the marker `slow`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from known_shapes import DEEPSEEK_1B

from engines import load_engine, load_target
from engines.base import Context
from engines.costs.table import traffic
from engines.errors import NotAvailable, UserError
from engines.settings.parse import parse_settings
from engines.shapes import Dtype, Workload
from tiny_models import tiny_batches, tiny_blueprint

ROWS = ("zero2-offload", "zero3-offload", "zenflow")
trains = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of DeepSpeed and of what it builds with
]


def engine(name: str, dtype: Dtype = "bf16", accumulation: int = 1, **settings: Any) -> Any:
    workload = Workload(batch_size=2, seq_len=16, dtype=dtype, checkpointing=False, accumulation=accumulation)
    context = Context(device="cpu", workload=workload, seed=7, total_steps=6)
    if name == "zenflow":
        settings = {"overlap_step": False, **settings}
    # Adam's eps is above the rounding error of gradients, which its division would blow up.
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "adam_eps": 1e-3, **settings}
    return load_engine(name)(parse_settings(name, settings), context)


@pytest.fixture(autouse=True, scope="module")
def _one_process_group() -> Iterator[None]:
    """DeepSpeed keeps parts of it for as long as a process lives."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def plain_with_masters(batches: list[Any], share: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """bf16 weights, made of fp32 masters that AdamW updates."""
    model = tiny_blueprint("llama").reference.train()
    masters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    groups = [[p for p in masters.values() if (p.dim() >= 2) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        lr=1e-2,
        eps=1e-3,
    )
    losses = []
    for start in range(0, len(batches), share):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.data = masters[name].to(torch.bfloat16)
        total = 0.0
        for batch in batches[start : start + share]:
            loss = model(**batch.inputs).loss / share
            loss.backward()
            total += float(loss.detach())
            for name, parameter in model.named_parameters():  # gradients are added up in fp32
                assert parameter.grad is not None
                before = masters[name].grad
                masters[name].grad = parameter.grad.float() + (0.0 if before is None else before)
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, {name: master.detach().to(torch.bfloat16) for name, master in masters.items()}


class TestTraining:
    pytestmark = trains

    @pytest.mark.parametrize("accumulation", [1, 2])
    @pytest.mark.parametrize("name", ["zero2-offload", "zero3-offload"])
    def test_is_a_plain_loop_with_fp32_masters(self, name: str, accumulation: int) -> None:
        batches = tiny_batches(4 * accumulation, "llama")
        expected, weights = plain_with_masters(batches, accumulation)
        made = engine(name, accumulation=accumulation)
        made.setup(tiny_blueprint("llama"))
        steps = range(0, len(batches), accumulation)
        losses = [made.step(batches[start : start + accumulation]).loss for start in steps]
        assert losses == pytest.approx(expected, rel=5e-3)
        for key, tensor in made.weights():
            torch.testing.assert_close(tensor, weights[key], rtol=3e-2, atol=3e-3)
        assert made.evaluate(batches[:1]).num_labels > 0
        made.close()

    def test_zenflow_trains(self) -> None:
        made = engine("zenflow")
        made.setup(tiny_blueprint("llama"))
        batch = tiny_batches(1, "llama")
        losses = [made.step(batch).loss for _ in range(6)]
        assert losses[-1] < losses[0]
        made.close()


@pytest.mark.parametrize("name", ROWS)
def test_without_deepspeed_a_row_says_what_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(name)
    blueprint = tiny_blueprint("llama")
    # Only now: transformers asks the same function while it is imported.
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    told = r"deepspeed is not installed \(pip install .*'lspzo-bench\[deepspeed\]'\)"
    with pytest.raises(NotAvailable, match=told):
        made.setup(blueprint)


def test_checkpoints_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="DeepSpeed's checkpoints run code when they are read"):
        engine("zero2-offload").save(tmp_path)


def test_what_lies_where_is_what_deepspeed_says() -> None:
    """18 bytes a parameter on the host; weights on the GPU with ZeRO-2, and a few blocks of them with
    ZeRO-3."""
    workload = Workload(batch_size=4, seq_len=1024, dtype="bf16", checkpointing=True)
    found = {name: traffic(name, DEEPSEEK_1B, workload, parse_settings(name, {})) for name in ROWS}
    parameters = DEEPSEEK_1B.parameters
    for each in found.values():
        beside = sum(size for kind, size in each.host_memory_bytes.items() if kind != "process")
        assert beside == 18 * parameters
    assert found["zero2-offload"].gpu_memory_bytes["weights"] == 2 * parameters
    assert found["zero3-offload"].gpu_memory_bytes["weights"] < parameters
    assert found["zero2-offload"].h2d_bytes == 2 * parameters
    assert found["zero3-offload"].h2d_bytes == 4 * parameters
    assert found["zenflow"].h2d_bytes < 0.25 * found["zero2-offload"].h2d_bytes
    assert found["zenflow"].cpu_adam_elements < 0.25 * parameters
    assert load_target("engines.methods.deepspeed_offload:Zero2Offload").stage == 2
