"""Predictions against steps measured on one H200, and the properties that hold on every machine.

Seen, s/step, batch 4 x 1024, bf16, checkpointing: predicted / measured

    native           1.3B  0.155 / 0.178  0.87      6.7B  0.494 / 0.495  1.00
    torchao-offload  1.3B  0.360 / 0.391  0.92      6.7B  1.498 / 1.515  0.99

The constants of `profiles.predict` were fitted to these and to the forward passes of OPT below, so agreement
here says that one set of constants suits them all, not that it suits another machine.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_shapes import DEEPSEEK_1B, DEEPSEEK_7B, H200, LAPTOP_CPU, OPT_1B, OPT_13B, TINY, measured

from engines.base import LayerTraffic, ModelShape, Traffic, Workload
from engines.costs import forward, traffic
from engines.costs.overlap import serial_s
from engines.settings import parse_settings
from profiles.machine import Gpu, Link, Machine, absent
from profiles.plan import Prediction
from profiles.predict import GPU_MODEL_ERROR, _layer_times, predict, resource_s

TRAINING = Workload(batch_size=4, seq_len=1024, dtype="bf16")
SMALL = Workload(batch_size=2, seq_len=64, dtype="bf16")
ENGINES = ("native", "torchao-offload", "lsp", "mezo", "zo2")


def of(engine: str, shape: ModelShape, machine: Machine, workload: Workload, **values: object) -> Prediction:
    return predict(traffic(engine, shape, workload, parse_settings(engine, values)), machine, workload)


@pytest.mark.parametrize(
    ("engine", "shape", "seen_s"),
    [
        ("native", DEEPSEEK_1B, 0.178),
        ("native", DEEPSEEK_7B, 0.495),
        ("torchao-offload", DEEPSEEK_1B, 0.391),
        ("torchao-offload", DEEPSEEK_7B, 1.515),
    ],
)
def test_steps_against_those_measured(engine: str, shape: ModelShape, seen_s: float) -> None:
    prediction = of(engine, shape, H200, TRAINING)
    assert prediction.step_s == pytest.approx(seen_s, rel=0.3)
    assert prediction.step_s_low is not None
    assert prediction.step_s_high is not None
    assert prediction.step_s_low < seen_s < prediction.step_s_high


@pytest.mark.parametrize(
    ("shape", "batch_size", "seen_s"), [(OPT_1B, 1, 0.0236), (OPT_13B, 1, 0.1841), (OPT_13B, 8, 1.443)]
)
def test_both_forwards_against_those_measured(shape: ModelShape, batch_size: int, seen_s: float) -> None:
    workload = Workload(batch_size=batch_size, seq_len=2048, dtype="fp16")
    layers = tuple(forward.forward_layers(shape, workload, passes=2))
    cost = Traffic(layers=layers, gpu_memory_bytes={}, host_memory_bytes={})
    assert predict(cost, H200, workload).step_s == pytest.approx(seen_s, rel=0.2)


def test_zo2_is_bound_by_the_link_at_the_measured_rate() -> None:
    prediction = of("zo2", OPT_13B, H200, Workload(batch_size=1, seq_len=2048, dtype="fp16"))
    assert prediction.bottleneck in ("h2d", "d2h")
    # Upload of the blocks with simultaneous download: 0.5137 s.
    assert prediction.step_s == pytest.approx(0.5137, rel=0.05)


def test_torchao_is_bound_by_the_cpu() -> None:
    prediction = of("torchao-offload", DEEPSEEK_7B, H200, TRAINING)
    assert prediction.bottleneck == "cpu"
    assert "CPU Adam 4.30 G/s (measured)" in prediction.basis
    assert "factor of 1.3" in prediction.basis


def test_slow_host_memory_is_named() -> None:
    slow = replace(H200, memory=replace(H200.memory, copy_bytes_per_s=measured(5e9)))
    workload = Workload(batch_size=1, seq_len=2048, dtype="fp16")
    assert of("zo2", OPT_13B, slow, workload).bottleneck == "host memory"
    assert of("zo2", OPT_13B, H200, workload).bottleneck != "host memory"


# --- without a GPU, and without figures ---------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_gpu_everything_is_host_memory_and_serial(engine: str) -> None:
    workload = replace(SMALL, dtype="fp32")
    cost = traffic(engine, TINY, workload, parse_settings(engine, {}))
    prediction = predict(cost, LAPTOP_CPU, workload)
    assert prediction.peak_gpu_bytes == prediction.pinned_bytes == 0
    assert prediction.peak_host_bytes == cost.peak_gpu_bytes + cost.peak_host_bytes
    busy = resource_s(cost, LAPTOP_CPU, workload)
    assert busy is not None
    assert prediction.step_s == pytest.approx(sum(busy.values()) - busy["host memory"])
    assert "CPU matrix product in fp32" in prediction.basis


def test_a_precision_that_the_cpu_was_not_probed_in_has_no_time() -> None:
    for dtype, named in (("bf16", "no bf16 instructions"), ("fp16", "not probed")):
        prediction = of("native", TINY, LAPTOP_CPU, Workload(batch_size=1, seq_len=8, dtype=dtype))  # type: ignore[arg-type]
        assert prediction.step_s is prediction.step_s_low is prediction.step_s_high is None
        assert prediction.bottleneck is None
        assert named in prediction.basis
        assert prediction.peak_host_bytes > 0


def without_gpu_figure(name: str) -> Machine:
    assert H200.gpu is not None
    return replace(H200, gpu=replace(H200.gpu, **{name: absent("the probe ran out of time")}))


def without_link_figure(name: str) -> Machine:
    assert H200.link is not None
    return replace(H200, link=replace(H200.link, **{name: absent("the probe ran out of time")}))


@pytest.mark.parametrize(
    ("machine", "needing"),
    [
        (without_gpu_figure("matmul_bf16_flops"), set(ENGINES)),
        (without_gpu_figure("matmul_fp32_flops"), set()),
        (without_gpu_figure("copy_bytes_per_s"), set(ENGINES)),
        (without_link_figure("h2d_pinned_bytes_per_s"), {"torchao-offload"}),
        (without_link_figure("d2h_pinned_bytes_per_s"), {"torchao-offload"}),
        (without_link_figure("h2d_duplex_bytes_per_s"), {"lsp", "zo2"}),
        (without_link_figure("d2h_duplex_bytes_per_s"), {"lsp", "zo2"}),
        (without_link_figure("h2d_pageable_bytes_per_s"), set()),
        (replace(H200, link=None), {"torchao-offload", "lsp", "zo2"}),
        (
            replace(H200, cpu=replace(H200.cpu, adam_elements_per_s=absent("the probe ran out of time"))),
            {"torchao-offload", "lsp"},
        ),
        (
            replace(H200, memory=replace(H200.memory, copy_bytes_per_s=absent("the probe ran out of time"))),
            {"torchao-offload", "lsp", "zo2"},
        ),
    ],
)
def test_only_what_rests_on_an_absent_figure_has_no_time(machine: Machine, needing: set[str]) -> None:
    for engine in ENGINES:
        prediction = of(engine, TINY, machine, SMALL)
        assert (prediction.step_s is None) == (engine in needing), engine
        if engine in needing:
            assert prediction.basis.startswith("No step time: ")
            assert "machine profile" in prediction.basis
            assert resource_s(_cost(engine), machine, SMALL) is None


def _cost(engine: str) -> Traffic:
    return traffic(engine, TINY, SMALL, parse_settings(engine, {}))


def test_what_uses_nothing_takes_no_time_on_any_machine() -> None:
    for machine in (H200, LAPTOP_CPU):
        prediction = of("scripted", TINY, machine, SMALL)
        assert (prediction.step_s, prediction.bottleneck) == (0.0, None)


def test_the_spread_of_the_figures_widens_the_range() -> None:
    assert H200.gpu is not None
    narrow, wide = (
        of("native", DEEPSEEK_7B, replace(H200, gpu=_with_spread(H200.gpu, spread)), TRAINING)
        for spread in (0.0, 0.5)
    )
    assert narrow.step_s == wide.step_s
    assert narrow.step_s is not None
    assert narrow.step_s_low == pytest.approx(narrow.step_s / GPU_MODEL_ERROR)
    assert narrow.step_s_high == pytest.approx(narrow.step_s * GPU_MODEL_ERROR)
    assert wide.step_s_high == pytest.approx(2 * narrow.step_s * GPU_MODEL_ERROR)
    assert wide.step_s_low is not None
    assert wide.step_s_low < narrow.step_s_low


def _with_spread(gpu: Gpu, spread: float) -> Gpu:
    rates = {name: measured(getattr(gpu, name).value, spread) for name in _figures(gpu)}
    return replace(gpu, **rates)


def _figures(part: Gpu | Link) -> list[str]:
    return [field.name for field in fields(part) if field.name.endswith(("_per_s", "_flops"))]


# --- properties ---------------------------------------------------------------------------------------

RATE = st.floats(1e8, 1e15, allow_nan=False, allow_infinity=False)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """The H200 with any rates."""
    assert H200.gpu is not None
    assert H200.link is not None
    gpu = replace(H200.gpu, **{name: measured(draw(RATE)) for name in _figures(H200.gpu)})
    link = replace(H200.link, **{name: measured(draw(RATE)) for name in _figures(H200.link)})
    memory = replace(H200.memory, copy_bytes_per_s=measured(draw(RATE)))
    cpu = replace(H200.cpu, adam_elements_per_s=measured(draw(RATE)))
    return replace(H200, gpu=gpu, link=link, memory=memory, cpu=cpu)


@given(machine=machines(), engine=st.sampled_from(ENGINES), accumulation=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_time_is_between_the_busiest_resource_and_the_sum(
    machine: Machine, engine: str, accumulation: int
) -> None:
    workload = replace(SMALL, accumulation=accumulation)
    cost = traffic(engine, TINY, workload, parse_settings(engine, {}))
    prediction = predict(cost, machine, workload)
    busy = resource_s(cost, machine, workload)
    assert busy is not None
    assert prediction.step_s_low is not None
    assert prediction.step_s is not None
    assert prediction.step_s_high is not None
    assert prediction.step_s_low <= prediction.step_s <= prediction.step_s_high
    assert prediction.step_s >= max(busy.values()) * (1 - 1e-9)
    assert prediction.step_s <= serial_s(_layer_times(cost, machine, workload, "value")) * (1 + 1e-9)
    assert prediction.bottleneck in busy


@given(machine=machines(), engine=st.sampled_from(ENGINES), data=st.data())
@settings(max_examples=60, deadline=None)
def test_more_tokens_never_take_less_time(machine: Machine, engine: str, data: st.DataObject) -> None:
    fewer, more = (
        replace(
            SMALL,
            batch_size=data.draw(st.integers(low, high)),
            accumulation=data.draw(st.integers(low, high)),
        )
        for low, high in ((1, 4), (4, 8))
    )
    first, second = (of(engine, TINY, machine, workload).step_s for workload in (fewer, more))
    assert first is not None
    assert second is not None
    assert first <= second * (1 + 1e-9)


@given(
    machine=machines(),
    engine=st.sampled_from(ENGINES),
    factor=st.floats(1, 100),
    slowed=st.sampled_from(["gpu", "link", "cpu", "memory"]),
)
@settings(max_examples=60, deadline=None)
def test_a_slower_part_never_saves_time(machine: Machine, engine: str, factor: float, slowed: str) -> None:
    part = getattr(machine, slowed)
    names = [field.name for field in fields(part) if field.name.endswith(("_per_s", "_flops"))]
    slower = {
        name: measured(getattr(part, name).value / factor) for name in names if getattr(part, name).value
    }
    first = of(engine, TINY, machine, SMALL).step_s
    second = of(engine, TINY, replace(machine, **{slowed: replace(part, **slower)}), SMALL).step_s
    assert first is not None
    assert second is not None
    assert first <= second * (1 + 1e-9)


def test_adding_work_to_one_resource_moves_the_bottleneck() -> None:
    base = LayerTraffic(name="block.0", gpu_forward_flops=1e12)
    seen = {}
    for resource, amount in (("h2d_bytes", 10**12), ("d2h_bytes", 10**12), ("cpu_adam_elements", 10**12)):
        cost = Traffic(
            layers=(replace(base, **{resource: amount}),),
            gpu_memory_bytes={},
            host_memory_bytes={},
            overlap="layerwise",
        )
        seen[resource] = predict(cost, H200, SMALL).bottleneck
    assert seen == {"h2d_bytes": "h2d", "d2h_bytes": "d2h", "cpu_adam_elements": "cpu"}
