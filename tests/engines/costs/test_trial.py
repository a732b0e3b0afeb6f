"""Memory of the trial on stand-in weights, held against what torch takes for it on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engines.base import Batch, Context
from engines.costs.memory import trial
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


def test_it_takes_what_torch_had_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of GPT-2 large 1.533 GB with workspaces of 67 MB were there on an H200, when it had 128 tokens."""
    monkeypatch.setattr(trial, "MOST_TOKENS", 128)
    found = trial_moment(named_shape("gpt2-large"), WORKLOAD)
    assert sum(found.values()) == pytest.approx(1.466e9, rel=0.02)


@pytest.mark.parametrize("name", ["gpt2-large", "opt-13b", "llama-2-7b", "qwen2.5-1.5b"])
@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        ("lsp", {"d": "256", "r": "4", "weights": "streamed"}),
        ("exact-offload", {"weights": "streamed", "outer": "host", "hidden_states": "host"}),
    ],
)
def test_streamed_steps_take_more_than_the_trial(engine: str, settings: dict[str, str], name: str) -> None:
    shape = named_shape(name)
    found = traffic(engine, shape, WORKLOAD, parse_settings(engine, settings))
    assert found.peak_gpu_bytes > sum(trial_moment(shape, WORKLOAD).values())


def test_the_trial_decides_what_short_steps_with_a_frozen_embedding_need() -> None:
    shape, workload = named_shape("gpt2-large"), replace(WORKLOAD, batch_size=1, seq_len=32)
    given = {"d": "256", "r": "4", "weights": "streamed", "train_outer": "false"}
    found = traffic("lsp", shape, workload, parse_settings("lsp", given))
    assert found.gpu_memory_bytes == trial_moment(shape, workload)
