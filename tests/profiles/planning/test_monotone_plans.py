"""Plans beside each other: more memory, a smaller model or a faster link never make one worse.

On laptops: cards of 4 to 16 GB in machines of 8 to 64 GB, and models of 0.5 to 8 B parameters.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from known_shapes import measured

from engines.shapes import Workload
from harness.models.configs import named_shape
from profiles.catalog import find_profile
from profiles.machine import Machine
from profiles.planning.plan import Plan
from profiles.planning.recommend import recommend

GIB = 2**30
LAPTOP = find_profile(Path("rtx-a1000-laptop"))
METHODS = ["native", "lora", "qlora", "exact-offload", "lsp", "mezo", "zo2", "torchao-offload"]
MODELS = [
    "qwen2.5-0.5b",
    "deepseek-coder-1.3b",
    "opt-2.7b",
    "qwen2.5-3b",
    "opt-6.7b",
    "qwen2.5-7b",
    "llama-3.1-8b",
]
WORKS = [
    Workload(batch_size=1, seq_len=512),
    Workload(batch_size=4, seq_len=512),
    Workload(batch_size=1, seq_len=2048, checkpointing=False),
    Workload(batch_size=2, seq_len=1024, accumulation=4),
    Workload(batch_size=8, seq_len=256, dtype="fp32"),
]
LEARNS = ("d", "d_by_shape", "r", "residual", "moments", "fold_every", "disk_blocks")
"""Settings that buy what is learned, or a drive's life, with time."""

SAME = 1.03
"""Of two times of a step: choosers take settings within a few hundredths of the fastest for as fast."""


def laptop(link: float) -> Machine:
    """With so many times the link, and more memory of both kinds than any limit here."""
    assert LAPTOP.gpu is not None
    assert LAPTOP.link is not None
    names = [f"{way}_{kind}_bytes_per_s" for way in ("h2d", "d2h") for kind in ("pinned", "duplex")]
    rates = {name: measured(link * getattr(LAPTOP.link, name).value) for name in names}
    return replace(
        LAPTOP,
        gpu=replace(LAPTOP.gpu, total_bytes=24 * GIB, free_bytes=24 * GIB),
        memory=replace(LAPTOP.memory, total_bytes=128 * GIB, available_bytes=128 * GIB),
        link=replace(LAPTOP.link, **rates),
    )


@cache
def plan(method: str, model: str, layers: int, work: Workload, gpu: float, host: float, link: float) -> Plan:
    whole = named_shape(model)
    shape = replace(whole, num_blocks=whole.num_blocks - layers)
    limits = {"vram_bytes": int(gpu * GIB), "host_bytes": int(host * GIB)}
    (only,) = recommend(laptop(link), shape, work, [method], {}, **limits)
    return only


GPU = st.sampled_from([3.8, 5.5, 7.3, 7.7, 11.5, 11.8, 15.7])
HOST = st.sampled_from([7.0, 14.0, 28.0, 30.0, 60.0])


@given(
    method=st.sampled_from(METHODS), model=st.sampled_from(MODELS), work=st.sampled_from(WORKS),
    gpu=st.tuples(GPU, GPU), host=st.tuples(HOST, HOST), link=st.sampled_from([(1.0, 1.0), (1.0, 2.0)]),
    fewer=st.sampled_from([0, 0, 1, 8]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_more_is_never_worse(
    method: str,
    model: str,
    work: Workload,
    gpu: tuple[float, float],
    host: tuple[float, float],
    link: tuple[float, float],
    fewer: int,
) -> None:
    """What fits stays so, and a step takes no longer, unless it buys with its time what is learned."""
    little = plan(method, model, 0, work, min(gpu), min(host), min(link))
    much = plan(method, model, fewer, work, max(gpu), max(host), max(link))
    if not little.fits:
        return
    assert much.fits, much.why_not
    before, after = little.prediction.step_s, much.prediction.step_s
    if (
        before is None
        or after is None
        or any(little.settings.get(key) != much.settings.get(key) for key in LEARNS)
    ):
        return
    assert after <= SAME * before, (little.settings, much.settings)
