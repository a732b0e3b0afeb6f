"""Memory of the trial on stand-in weights, held against what torch takes for it on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engines.base import Batch, Context
from engines.costs.memory.trial import MOST_TOKENS, SEQUENCES, trial_moment
from engines.costs.table import traffic
from engines.model.model_check import check_block_major
from engines.settings.parse import parse_settings
from engines.shapes import ModelShape, Workload
from harness.models.blueprint import make_blueprint
from harness.models.configs import NAMED_SHAPES, named_shape
from harness.records.job import make_job

TOKENS = SEQUENCES * MOST_TOKENS
WORKLOAD = Workload(batch_size=4, seq_len=512, dtype="bf16", checkpointing=True)


def peak_bytes(name: str, num_blocks: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ModelShape]:
    """Of a trial of the named shape with so many blocks."""
    config: dict[str, Any] = {**NAMED_SHAPES[name].config}
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] = num_blocks
    monkeypatch.setitem(NAMED_SHAPES, name, replace(NAMED_SHAPES[name], config=config))
    shape = named_shape(name)
    job = make_job({"model": {"name": name, "random_weights": True}}, name)
    ids = torch.arange(TOKENS).view(SEQUENCES, MOST_TOKENS) % shape.vocabulary
    blueprint = make_blueprint(job, shape, Batch(inputs={"input_ids": ids, "labels": ids}))
    context = Context(device="cpu", workload=WORKLOAD, seed=0, total_steps=1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        check_block_major(blueprint, context)
    now = most = 0
    assert found.profiler is not None
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most, shape


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-gpt2", "tiny-qwen2"])
def test_a_block_keeps_what_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (few, shape), (many, larger) = (peak_bytes(name, blocks, monkeypatch) for blocks in (2, 6))
    counted = [trial_moment(each, WORKLOAD)["activations"] for each in (shape, larger)]
    assert many - few == pytest.approx(counted[1] - counted[0], rel=0.05)


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        ("lsp", {"d": "256", "r": "4", "weights": "streamed"}),
        ("exact-offload", {"weights": "streamed", "outer": "host", "hidden_states": "host"}),
    ],
)
def test_the_trial_decides_what_a_streamed_gpt2_needs(engine: str, settings: dict[str, str]) -> None:
    """1.533 GB with workspaces of 67 MB were there on an H200; six runs of `exact-offload` that had up to
    1.04 GB ran out."""
    shape = named_shape("gpt2-large")
    workload = replace(WORKLOAD, batch_size=2) if engine == "exact-offload" else WORKLOAD
    found = traffic(engine, shape, workload, parse_settings(engine, settings))
    assert found.peak_gpu_bytes == pytest.approx(1.466e9, rel=0.02)
    assert found.gpu_memory_bytes == trial_moment(shape, workload)
