"""`engines.costs.decoding` against the engines' counters, the cache's tensors and totals by hand."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_shapes import OPT_13B

from engines.base import Context
from engines.costs.decoding import Decoding, cache_bytes, least_gpu_bytes, traffic
from engines.decoding import GenerationRequest, Sampling
from engines.methods.mezo import Mezo
from engines.methods.zo2 import Zo2
from engines.settings.zeroth_order import MezoSettings, Zo2Settings
from engines.shapes import Dtype, Workload
from engines.zeroth_order.generation import make_cache
from harness.models.blueprint import make_blueprint
from harness.models.configs import named_shape
from harness.records.job import make_job
from harness.resolve import resolve_shape

NAMES = ["tiny-opt", "tiny-llama", "tiny-qwen2", "tiny-gpt2"]
DECODING = Decoding(batch_size=3, prompt_tokens=5, new_tokens=6, dtype="fp32")


def engine_of(
    name: str, kind: type[Mezo] | type[Zo2], dtype: Dtype = "fp32", device: str = "cpu", **knobs: Any
) -> Any:
    job = make_job({"model": {"name": name, "random_weights": True}, "seq_len": 16}, "test")
    workload = Workload(batch_size=1, seq_len=16, dtype=dtype)
    context = Context(device=device, workload=workload, seed=0, total_steps=1)
    settings = Zo2Settings(**knobs) if kind is Zo2 else MezoSettings(**knobs)
    made: Any = kind(settings, context)  # type: ignore[arg-type]
    made.setup(make_blueprint(job, resolve_shape(job)))
    return made


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_takes_what_is_predicted(name: str) -> None:
    cache = make_cache(engine_of(name, Mezo)._model, 3, DECODING.cache_tokens, None)
    held = sum(each.nbytes for layer in cache.layers for each in (layer.keys, layer.values))
    assert held == cache_bytes(named_shape(name), DECODING)


@pytest.mark.parametrize(
    "knobs",
    [
        {"resident_blocks": resident, "disk_blocks": on_disk}
        for resident, on_disk in ((0, 0), (1, 0), (3, 0), (0, 2), (1, 1), (0, 9))
    ]
    + [{"resident_blocks": resident, "base": base} for resident in (0, 1) for base in ("int8", "int4")],
)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_a_step_are_those_counted(name: str, knobs: dict[str, Any]) -> None:
    streamed = engine_of(name, Zo2, **knobs)
    request = GenerationRequest(prompts=[[3, 4, 5, 6, 7]] * 3, max_new_tokens=6)
    counted = [decoded.stats for decoded in streamed.generate(request)][1:-1]
    streamed.close()
    told = traffic(named_shape(name), DECODING, streamed.settings)
    assert {stats.h2d_bytes for stats in counted} == {told.h2d_bytes}
    assert {stats.disk_read_bytes for stats in counted} == {told.disk_bytes}
    assert told.d2h_bytes == 0


def test_opt_13b_by_hand() -> None:
    """40 blocks of 629 MB in fp16; 819 200 bytes of cache per token."""
    decoding = Decoding(batch_size=256, prompt_tokens=128, new_tokens=129, dtype="fp16")
    assert cache_bytes(OPT_13B, decoding) == 819_200 * 256 * 256
    streamed = traffic(OPT_13B, decoding, Zo2Settings())
    assert streamed.h2d_bytes == 2 * 40 * OPT_13B.block_parameters == pytest.approx(25.2e9, rel=0.01)
    assert traffic(OPT_13B, decoding, Zo2Settings(resident_blocks=30)).h2d_bytes == streamed.h2d_bytes // 4
    assert traffic(OPT_13B, decoding, MezoSettings()).h2d_bytes == 0
    two_per_weight = 2 * 256 * (OPT_13B.matrix_parameters + OPT_13B.head_parameters)
    attention = 40 * 4 * 256 * 256 * 5120
    assert streamed.gpu_flops == pytest.approx(two_per_weight + attention)
    assert least_gpu_bytes(OPT_13B, decoding) == pytest.approx(25.7e9 + 53.7e9, rel=0.01)


@given(
    batch_size=st.integers(1, 300),
    prompt_tokens=st.integers(1, 2000),
    new_tokens=st.integers(1, 2000),
    padded=st.booleans(),
    sampled=st.booleans(),
    resident_blocks=st.integers(0, 40),
)
@settings(max_examples=50, deadline=None)
def test_nothing_shrinks_as_the_generation_grows(
    batch_size: int, prompt_tokens: int, new_tokens: int, padded: bool, sampled: bool, resident_blocks: int
) -> None:
    decoding = Decoding(
        batch_size=batch_size, prompt_tokens=prompt_tokens, new_tokens=new_tokens, dtype="fp16",
        padded=padded, sampled=sampled,
    )  # fmt: skip
    knobs = Zo2Settings(resident_blocks=resident_blocks)
    before = traffic(OPT_13B, decoding, knobs)
    for field in ("batch_size", "prompt_tokens", "new_tokens"):
        grown = traffic(OPT_13B, replace(decoding, **{field: getattr(decoding, field) + 1}), knobs)
        assert grown.peak_gpu_bytes > before.peak_gpu_bytes
        assert grown.gpu_flops > before.gpu_flops
        assert grown.h2d_bytes == before.h2d_bytes
    more = traffic(OPT_13B, decoding, Zo2Settings(resident_blocks=resident_blocks + 1))
    assert more.h2d_bytes <= before.h2d_bytes
    assert more.peak_host_bytes <= before.peak_host_bytes
    both = before.peak_gpu_bytes + before.peak_host_bytes
    assert both >= traffic(OPT_13B, decoding, MezoSettings()).gpu_memory_bytes["weights"]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "knobs"), [(Mezo, {}), (Zo2, {}), (Zo2, {"resident_blocks": 6})])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=50, top_p=0.9)])
def test_peak_memory_is_the_predicted_one(kind: Any, knobs: Any, sampling: Sampling) -> None:
    """A cache of 1.8 GB beside 0.25 GB of weights; workspaces of cuBLAS, some 70 MB, are not counted."""
    gc.collect()  # engines of other tests go with their cycles
    before = torch.cuda.memory_allocated()
    engine = engine_of("opt-125m", kind, "fp16", "cuda:0", **knobs)
    decoding = Decoding(
        batch_size=64, prompt_tokens=600, new_tokens=200, dtype="fp16", sampled=sampling.temperature > 0
    )
    prompts = torch.randint(3, 5000, (64, 600)).tolist()
    request = GenerationRequest(prompts=prompts, max_new_tokens=200, sampling=sampling)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    steps = engine.generate(request)
    for _ in range(4):
        next(steps)
    steps.close()
    told = traffic(named_shape("opt-125m"), decoding, engine.settings)
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(told.peak_gpu_bytes, rel=0.15)
    engine.close()
