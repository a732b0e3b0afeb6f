"""Predictions against steps measured on one H200, and the properties that hold on every machine.

Seen, s/step, batch 4 x 1024, bf16, checkpointing: predicted / measured

    native           1.3B  0.155 / 0.178  0.87      6.7B  0.494 / 0.495  1.00
    torchao-offload  1.3B  0.360 / 0.391  0.92      6.7B  1.498 / 1.515  0.99

The constants of `profiles.planning.layer_times` were fitted to these and to the forward passes of OPT below,
so agreement here says that one set of constants suits them all, not that it suits another machine.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_shapes import DEEPSEEK_1B, DEEPSEEK_7B, H200, LAPTOP_CPU, OPT_1B, OPT_13B, TINY, measured
from tiny_machine import figure

from engines.costs import transformer
from engines.costs.resources.overlap import serial_s
from engines.costs.resources.traffic import (
    ADAMW_KERNEL_BYTES,
    SWITCH_INTERVAL_S,
    LayerTraffic,
    Overlap,
    Traffic,
)
from engines.costs.table import traffic
from engines.costs.transformer import STEP_LAUNCHES
from engines.settings.parse import parse_settings
from engines.shapes import Dtype, ModelShape, Workload
from harness.models.configs import named_shape
from profiles.machine import Figure, Gpu, LinkFigures, Machine, absent
from profiles.planning.budget import (
    beside_torch_bytes,
    budget_of,
    gpu_bytes_needed,
    reserved_bytes,
    taken_bytes,
)
from profiles.planning.layer_times import (
    GRAPH_KERNEL_S,
    KERNEL_WORKS_S,
    LAUNCH_S,
    OWN_LAUNCH_SHARE,
    PRODUCT_S,
    TRITON_LAUNCH_S,
    _layer_times,
    _with_pause,
    gpu_parts,
    resource_s,
)
from profiles.planning.plan import Prediction
from profiles.planning.predict import GPU_ERROR, GPU_MODEL_ERROR, LAUNCH_ERROR, predict
from profiles.rates import FORWARD_LAUNCH_S, THREAD_BYTES_PER_S, half_threads_times, matmul, with_launches_of

TRAINING = Workload(batch_size=4, seq_len=1024, dtype="bf16")
FORWARD_ONLY = Workload(batch_size=1, seq_len=2048, dtype="fp16")
SMALL = Workload(batch_size=2, seq_len=64, dtype="bf16")
EAGER: dict[str, object] = {"compile": False, "graphs": False}
ENGINES = ("native", "torchao-offload", "lsp", "mezo", "zo2")


def of(engine: str, shape: ModelShape, machine: Machine, workload: Workload, **values: object) -> Prediction:
    return predict(traffic(engine, shape, workload, parse_settings(engine, values)), machine, workload)


@pytest.mark.parametrize(
    ("engine", "shape", "seen_s"),
    [
        (("native", EAGER), DEEPSEEK_1B, 0.178),
        (("native", EAGER), DEEPSEEK_7B, 0.495),
        # Of the engine's own loop, no records yet: the last section of engines/EXPERIMENTS.md.
        (("native", {}), DEEPSEEK_1B, 0.081),
        (("native", {}), DEEPSEEK_7B, 0.381),
        (("native", {"checkpointed_blocks": 0}), DEEPSEEK_1B, 0.066),
        (("native", {"checkpointed_blocks": 0}), DEEPSEEK_7B, 0.315),
        (("torchao-offload", {}), DEEPSEEK_1B, 0.391),
        (("torchao-offload", {}), DEEPSEEK_7B, 1.515),
    ],
)
def test_steps_against_those_measured(
    engine: tuple[str, dict[str, object]], shape: ModelShape, seen_s: float
) -> None:
    prediction = of(engine[0], shape, H200, TRAINING, **engine[1])
    assert prediction.step_s == pytest.approx(seen_s, rel=0.3)
    assert prediction.step_s_low is not None
    assert prediction.step_s_high is not None
    assert prediction.step_s_low < seen_s < prediction.step_s_high


@pytest.mark.parametrize(
    ("shape", "batch_size", "seen_s"), [(OPT_1B, 1, 0.0236), (OPT_13B, 1, 0.1841), (OPT_13B, 8, 1.443)]
)
def test_both_forwards_against_those_measured(shape: ModelShape, batch_size: int, seen_s: float) -> None:
    workload = Workload(batch_size=batch_size, seq_len=2048, dtype="fp16")
    layers = tuple(transformer.stacked_layers(shape, workload))
    cost = Traffic(layers=layers, gpu_memory_bytes={}, host_memory_bytes={})
    assert predict(cost, H200, workload).step_s == pytest.approx(seen_s, rel=0.2)


def test_zo2_is_bound_by_the_link_at_the_measured_rate() -> None:
    prediction = of("zo2", OPT_13B, H200, Workload(batch_size=1, seq_len=2048, dtype="fp16"))
    assert prediction.bottleneck in ("h2d", "d2h")
    # Upload of the blocks with simultaneous download: 0.5137 s.
    assert prediction.step_s == pytest.approx(0.5137, rel=0.05)


def link_s(h2d_bytes: int, d2h_bytes: int, overlap: Overlap = "streamed") -> tuple[float, float]:
    """Up and down, with the rates of the H200 machine."""
    layers = (LayerTraffic(name="block.0", h2d_bytes=h2d_bytes, d2h_bytes=d2h_bytes),)
    cost = Traffic(layers=layers, gpu_memory_bytes={}, host_memory_bytes={}, overlap=overlap)
    busy = resource_s(cost, H200, SMALL)
    assert busy is not None
    return busy["h2d"], busy["d2h"]


def test_only_copies_that_run_beside_others_are_slowed_down() -> None:
    size = 10**9
    assert link_s(size, size) == (size / 50.4e9, size / 50.4e9)
    assert link_s(size, 0) == (size / 55.4e9, 0.0)
    assert link_s(0, size) == (0.0, size / 55.2e9)
    up_s, down_s = link_s(4 * size, size)
    assert up_s == pytest.approx(3 * size / 55.4e9 + size / 50.4e9)
    assert down_s == size / 50.4e9
    # Where one direction follows the other, each has the link to itself.
    assert link_s(size, size, "serial") == (size / 55.4e9, size / 55.2e9)


@given(sizes=st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)))
def test_a_link_is_between_its_two_rates(sizes: tuple[int, int]) -> None:
    for (moved, time_s), alone in zip(zip(sizes, link_s(*sizes), strict=True), (55.4e9, 55.2e9), strict=True):
        assert moved / alone * (1 - 1e-12) <= time_s <= moved / 50.4e9 * (1 + 1e-12)


@pytest.mark.parametrize("fold_every", [4, 8, 16])
def test_zo2_comes_near_its_upload_where_it_seldom_downloads(fold_every: int) -> None:
    prediction = of("zo2", OPT_13B, H200, FORWARD_ONLY, fold_every=fold_every)
    assert prediction.floor_s == pytest.approx(0.454, rel=0.002)
    assert prediction.step_s is not None
    assert 0.454 < prediction.step_s < 0.454 * 1.04
    assert prediction.bottleneck == "h2d"
    assert "h2d pinned bandwidth 55.4 GB/s" in prediction.basis
    assert "h2d bandwidth with both directions busy 50.4 GB/s" in prediction.basis


def test_without_autograd_operations_start_faster() -> None:
    small = LayerTraffic(name="block.0", gpu_forward_flops=1.0, launches=1000)
    seen = []
    for layer in (small, small._replace(gpu_backward_flops=1.0)):
        cost = Traffic(layers=(layer,), gpu_memory_bytes={}, host_memory_bytes={})
        seen.append(predict(cost, H200, SMALL).step_s)
    pause_s = STEP_LAUNCHES * FORWARD_LAUNCH_S
    assert seen == pytest.approx([1000 * FORWARD_LAUNCH_S + pause_s, 1000 * LAUNCH_S + pause_s])


# --- the floor ----------------------------------------------------------------------------------------


def test_the_floor_is_the_largest_of_three_resources_alone() -> None:
    matmul = 755e12
    native = traffic("native", DEEPSEEK_7B, TRAINING, parse_settings("native", {}))
    assert predict(native, H200, TRAINING).floor_s == pytest.approx(native.gpu_flops / matmul)
    torchao = of("torchao-offload", DEEPSEEK_7B, H200, TRAINING)
    assert torchao.floor_s == pytest.approx(DEEPSEEK_7B.parameters / 2 / 4.3e9)  # bf16 states
    long = replace(FORWARD_ONLY, batch_size=8)
    zo2 = traffic("zo2", OPT_13B, long, parse_settings("zo2", {}))
    assert predict(zo2, H200, long).floor_s == pytest.approx(zo2.gpu_flops / matmul)


def test_what_an_engine_might_do_without_is_not_in_the_floor() -> None:
    floors = {of("zo2", OPT_13B, H200, FORWARD_ONLY, fold_every=k).floor_s for k in (1, 2, 16)}
    assert len(floors) == 1
    floors = {of("mezo", OPT_13B, H200, FORWARD_ONLY, train=train).floor_s for train in ("all", "last:1")}
    assert len(floors) == 1


@pytest.mark.parametrize("machine", [H200, LAPTOP_CPU])
@pytest.mark.parametrize("engine", ENGINES)
def test_no_step_is_below_its_floor(engine: str, machine: Machine) -> None:
    for shape in (TINY, DEEPSEEK_1B, DEEPSEEK_7B):
        prediction = of(engine, shape, machine, replace(SMALL, dtype="fp32"))
        assert prediction.floor_s is not None
        assert prediction.step_s is not None
        assert 0 < prediction.floor_s <= prediction.step_s


def test_a_floor_needs_its_own_figures_only() -> None:
    one_way = of("zo2", TINY, without_link_figure("h2d_duplex_bytes_per_s"), SMALL)
    assert one_way.step_s is None
    assert one_way.floor_s is not None
    without = of("zo2", TINY, without_link_figure("h2d_pinned_bytes_per_s"), SMALL)
    assert without.step_s is not None
    assert without.floor_s is None


def test_torchao_is_bound_by_the_cpu() -> None:
    prediction = of("torchao-offload", DEEPSEEK_7B, H200, TRAINING)
    assert prediction.bottleneck == "cpu"
    assert "CPU Adam 4.30 G/s (measured)" in prediction.basis
    assert "factor of 1.5" in prediction.basis


def test_slow_host_memory_is_named() -> None:
    slow = replace(
        H200,
        memory=replace(H200.memory, copy_bytes_per_s=measured(5e9)),
        cpu=replace(H200.cpu, adam_elements_per_s=measured(1e8)),  # which shows what memory moves, too
    )
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
    without_cuda = (
        cost.peak_host_bytes
        - cost.host_memory_bytes.get("compiler", 0)
        - transformer.PROCESS_HOST_BYTES
        + transformer.PROCESS_HOST_BYTES_WITHOUT_GPU
    )
    assert prediction.peak_host_bytes == cost.peak_gpu_bytes + without_cuda
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
        (without_link_figure("d2h_pinned_bytes_per_s"), {"torchao-offload", "lsp"}),
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


def test_exact_offload_is_predicted_by_the_adamw_that_it_runs() -> None:
    def cpu_s(**figures: Figure) -> tuple[float, str]:
        machine = replace(H200, cpu=replace(H200.cpu, **figures))
        spent = resource_s(_cost("exact-offload"), machine, SMALL)
        assert spent is not None
        return spent["cpu"], of("exact-offload", TINY, machine, SMALL).basis

    torchs, basis = cpu_s()
    assert "CPU Adam" in basis
    rate = H200.cpu.adam_elements_per_s.value
    assert rate is not None
    half_the_rate = measured(rate / 2)
    # The kernel was probed on 26 bytes an element, which fp32 moments of bf16 weights take; torch's takes 28.
    own, basis = cpu_s(adamw_kernel_elements_per_s=half_the_rate)
    assert "AdamW kernel on the CPU" in basis
    assert own == pytest.approx(torchs * 2 * 28 / 26)
    # Without it: where many cores share memory, by what memory moves, half as much again as copies count.
    slow_torch = replace(H200.cpu, adam_elements_per_s=measured(1e8))
    by_memory, basis = cpu_s(adam_elements_per_s=slow_torch.adam_elements_per_s)
    assert "host copy bandwidth" in basis
    copy = H200.memory.copy_bytes_per_s.value
    assert copy is not None
    assert by_memory == pytest.approx(torchs * rate * 28 / 1.5 / copy)
    slow = replace(H200, cpu=replace(H200.cpu, adamw_kernel_elements_per_s=measured(1.0)))
    assert of("torchao-offload", TINY, slow, SMALL) == of("torchao-offload", TINY, H200, SMALL)  # other code


def test_lsp_is_predicted_by_the_compiled_adamw_where_that_was_measured() -> None:
    """A pass over cores is compiled as it is, and moves 20 bytes for its 26; torch's moves 28."""

    def cpu_s(machine: Machine) -> float:
        spent = resource_s(_cost("lsp"), machine, SMALL)
        assert spent is not None
        return spent["cpu"]

    rate, elements = 1e9, _cost("lsp").cpu_adam_elements
    compiled = replace(H200, cpu=replace(H200.cpu, adamw_kernel_elements_per_s=measured(rate)))
    assert cpu_s(compiled) == pytest.approx(elements / rate * 20 / 26)
    assert H200.cpu.adam_elements_per_s.value is not None
    assert cpu_s(H200) == pytest.approx(elements / H200.cpu.adam_elements_per_s.value * 20 / 28)


@pytest.mark.parametrize(
    ("gpu_s", "adam_s", "taken_s"),
    [
        (1.0, 0.3, 1.0),  # hidden by half of the threads
        (1.0, 0.65, 1.083),  # half of them, which take 5 / 3 as long
        (1.0, 0.9, 1.2),  # all, in the way of those that start the GPU's work
        (0.1, 2.0, 2.0),
    ],
)
def test_updates_run_on_half_of_the_threads_unless_all_are_faster(
    gpu_s: float, adam_s: float, taken_s: float
) -> None:
    rate = 5 / 3 * 9 * THREAD_BYTES_PER_S / ADAMW_KERNEL_BYTES
    cpu = replace(H200.cpu, cores_usable=20, adamw_kernel_elements_per_s=measured(rate))
    machine = replace(H200, cpu=cpu)
    copied = H200.gpu.copy_bytes_per_s.value if H200.gpu is not None else None
    assert copied is not None
    blocks = 1000
    each = LayerTraffic(
        name="block", gpu_bytes=gpu_s * copied / blocks, cpu_adam_elements=int(adam_s * rate / blocks)
    )
    cost = Traffic(
        layers=(each,) * blocks,
        gpu_memory_bytes={},
        host_memory_bytes={},
        overlap="blockwise",
        cpu_adamw_kernel_factor=1.0,
    )
    assert predict(cost, machine, SMALL).step_s == pytest.approx(taken_s, rel=0.01)
    others = replace(cost, cpu_adamw_kernel_factor=None, cpu_adam_factor=1.0)
    assert half_threads_times(machine, others) == 1.0


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
    assert narrow.step_s_low == pytest.approx(narrow.step_s / GPU_ERROR)
    assert narrow.step_s_high == pytest.approx(narrow.step_s * GPU_ERROR)
    pause_s = STEP_LAUNCHES * FORWARD_LAUNCH_S  # which the GPU's figures do not decide
    assert wide.step_s_high == pytest.approx((2 * narrow.step_s - pause_s) * GPU_ERROR, rel=0.01)
    assert wide.step_s_low is not None
    assert wide.step_s_low < narrow.step_s_low


def _with_spread(gpu: Gpu, spread: float) -> Gpu:
    rates = {name: measured(getattr(gpu, name).value, spread) for name in _figures(gpu)}
    return replace(gpu, **rates)


def _figures(part: Gpu | LinkFigures) -> list[str]:
    """The names of its figures that are there."""
    found = {field.name: getattr(part, field.name) for field in fields(part)}
    return [name for name, value in found.items() if isinstance(value, Figure) and value.value is not None]


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


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_product_counts_at_the_rate_under_lasting_load(dtype: Dtype) -> None:
    assert H200.gpu is not None
    workload = replace(SMALL, dtype=dtype)
    cost = traffic("native", TINY, workload, parse_settings("native", {}))

    def gpu_s(burst: float, fp16: float, sustained: Figure) -> float:
        assert H200.gpu is not None
        gpu = replace(
            H200.gpu, matmul_bf16_flops=measured(burst), matmul_fp16_flops=measured(fp16),
            matmul_sustained_flops=sustained,
        )  # fmt: skip
        busy = resource_s(cost, replace(H200, gpu=gpu), workload)
        assert busy is not None
        return busy["gpu"]

    unknown = absent("not probed")
    assert gpu_s(800e12, 800e12, measured(600e12)) == pytest.approx(gpu_s(600e12, 600e12, unknown))
    # A long run that was faster than the burst is noise, and no reason to promise more.
    assert gpu_s(800e12, 800e12, measured(900e12)) == gpu_s(800e12, 800e12, unknown)


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
    times = _with_pause(_layer_times(cost, machine, workload, "value"), cost, machine, "value")
    assert prediction.step_s <= serial_s(times) * (1 + 1e-9)
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
            layers=(base._replace(**{resource: amount}),),
            gpu_memory_bytes={},
            host_memory_bytes={},
            overlap="layerwise",
        )
        seen[resource] = predict(cost, H200, SMALL).bottleneck
    assert seen == {"h2d_bytes": "h2d", "d2h_bytes": "d2h", "cpu_adam_elements": "cpu"}


def test_updates_of_lsp_hide_behind_one_micro_batch() -> None:
    """With three threads, 2.15 G elements/s of cores, a step of four at 6.7B took 1.14 s on an H200, of which
    the GPU was busy for 0.89 (one process, not published)."""
    workload = replace(TRAINING, accumulation=4)
    cost = traffic("lsp", DEEPSEEK_7B, workload, parse_settings("lsp", {"d": 2048, "r": 8}))
    found = []
    for rate in (2.15e9, 6e9):
        cpu = replace(H200.cpu, adam_elements_per_s=measured(rate * cost.cpu_adam_factor))
        machine = replace(H200, cpu=cpu)
        prediction, busy = predict(cost, machine, workload), resource_s(cost, machine, workload)
        assert prediction.step_s is not None
        assert busy is not None
        found.append((prediction.step_s, busy["gpu"], busy["cpu"], prediction.bottleneck))
    (slow_s, gpu_s, cpu_s, slow), (fast_s, _, _, fast) = found
    assert cpu_s < 0.6 * gpu_s
    between_s = SWITCH_INTERVAL_S * sum(layer.cpu_chunks for layer in cost.layers)
    assert slow_s == pytest.approx(0.75 * gpu_s + cpu_s + between_s, rel=0.02)
    assert fast_s == pytest.approx(gpu_s, rel=0.02)
    assert (slow, fast) == ("cpu", "gpu")


# --- what it takes to start work --------------------------------------------------------------------


def test_what_the_probe_measured_of_starting_work_counts() -> None:
    starts = LayerTraffic(name="block.0", gpu_forward_flops=1.0, launches=1000, triton_launches=1000)
    cost = Traffic(layers=(starts,), gpu_memory_bytes={}, host_memory_bytes={})

    def step_s(**figures: float) -> float | None:
        known = {name: replace(figure(value), low=None) for name, value in figures.items()}
        return predict(cost, replace(H200, cpu=replace(H200.cpu, **known)), SMALL).step_s

    otherwise = (1000 + STEP_LAUNCHES) * FORWARD_LAUNCH_S + 1000 * OWN_LAUNCH_SHARE * TRITON_LAUNCH_S
    assert step_s() == pytest.approx(otherwise)
    measured = step_s(forward_launch_s=5e-6, triton_launch_s=10e-6)
    assert measured == pytest.approx((1000 + STEP_LAUNCHES) * 5e-6 + 1000 * OWN_LAUNCH_SHARE * 10e-6)
    assert step_s(training_launch_s=1.0) == pytest.approx(otherwise), "there is no backward pass"


def test_products_and_kernels_of_graphs_take_the_gpu_time_beside_their_work() -> None:
    many = LayerTraffic(name="block.0", gpu_forward_flops=1e12, products=100, kernels=1000)
    few = many._replace(products=0, kernels=0)
    assert H200.gpu is not None

    def step_s(layer: LayerTraffic, machine: Machine) -> float:
        cost = Traffic(layers=(layer,), gpu_memory_bytes={}, host_memory_bytes={"process": 0})
        found = predict(cost, machine, SMALL).step_s
        assert found is not None
        return found

    otherwise = 100 * PRODUCT_S + 1000 * (GRAPH_KERNEL_S + KERNEL_WORKS_S)
    assert step_s(many, H200) - step_s(few, H200) == pytest.approx(otherwise)
    probed = replace(
        H200,
        gpu=replace(H200.gpu, product_s=figure(2e-6)),
        cpu=replace(H200.cpu, graph_launch_s=figure(1e-6)),
    )
    assert step_s(many, probed) - step_s(few, probed) == pytest.approx(
        100 * 2e-6 + 1000 * (1e-6 + KERNEL_WORKS_S)
    )


def test_a_time_is_that_of_the_quickest_sample_and_the_middle_one_is_the_slower_side() -> None:
    cost = Traffic(
        layers=(LayerTraffic(name="block.0", gpu_forward_flops=1.0, launches=1000),),
        gpu_memory_bytes={},
        host_memory_bytes={},
    )
    known = replace(figure(10e-6), low=8e-6, high=15e-6)
    told = predict(cost, replace(H200, cpu=replace(H200.cpu, forward_launch_s=known)), SMALL)
    assert told.step_s_low == pytest.approx((1000 + STEP_LAUNCHES) * 8e-6 / LAUNCH_ERROR)
    assert told.step_s_high == pytest.approx((1000 + STEP_LAUNCHES) * 10e-6 * LAUNCH_ERROR)


def test_windows_at_two_speeds_are_both_inside_the_range() -> None:
    """Of one speed the range is narrower than without windows."""
    cost = Traffic(
        layers=(LayerTraffic(name="block.0", gpu_forward_flops=1.0, launches=1000),),
        gpu_memory_bytes={},
        host_memory_bytes={},
    )

    def told(low: float, value: float, high: float, slow_turn_s: float = 33e-9) -> Prediction:
        starts = replace(figure(value), low=low, high=high)
        turn = replace(figure(33e-9), low=33e-9, high=slow_turn_s)
        cpu = replace(H200.cpu, forward_launch_s=starts, python_turn_s=turn)
        return predict(cost, replace(H200, cpu=cpu), SMALL)

    count = 1000 + STEP_LAUNCHES
    two = told(15e-6, 20e-6, 25e-6)
    assert two.step_s == pytest.approx(count * 20e-6)
    assert two.step_s_low == pytest.approx(count * 15e-6 / GPU_MODEL_ERROR)
    assert two.step_s_high == pytest.approx(count * 25e-6 * GPU_MODEL_ERROR)
    quiet = told(15e-6, 15.1e-6, 15.3e-6)
    assert quiet.step_s_high is not None
    assert quiet.step_s_low is not None
    assert quiet.step_s_high / quiet.step_s_low < 1.03 * GPU_MODEL_ERROR**2 < LAUNCH_ERROR**2
    # The loop was at a speed that no window's quickest operation had.
    seen = told(15e-6, 15.1e-6, 15.3e-6, slow_turn_s=66e-9)
    assert seen.step_s == quiet.step_s
    assert seen.step_s_low == quiet.step_s_low
    assert seen.step_s_high == pytest.approx(count * 2 * 15.1e-6 * GPU_MODEL_ERROR)


def test_a_machine_at_the_speed_of_a_run_starts_everything_as_much_slower() -> None:
    cpu = replace(
        H200.cpu,
        forward_launch_s=replace(figure(16e-6), low=15e-6),
        training_launch_s=replace(figure(18e-6), low=17e-6),
        triton_launch_s=replace(figure(12e-6), low=10e-6),
    )
    windows = replace(cpu, python_turn_s=figure(33e-9))
    for known, times in ((cpu, (15e-6, 17e-6, 10e-6)), (windows, (16e-6, 18e-6, 12e-6))):
        found = with_launches_of(replace(H200, cpu=known), 30e-6).cpu
        starts = (found.forward_launch_s, found.training_launch_s, found.triton_launch_s)
        assert [each.value for each in starts] == pytest.approx([each * 30e-6 / times[0] for each in times])
        assert found.forward_launch_s.low is None
    unknown = with_launches_of(H200, 30e-6).cpu
    assert unknown.forward_launch_s.value == 30e-6
    assert unknown.training_launch_s.value is None


def test_a_vocabulary_off_the_grid_slows_the_head_down() -> None:
    """As on a Hopper GPU; an older card loses less, and fp32 nothing."""
    gpt2 = named_shape("gpt2")
    work = Workload(batch_size=16, seq_len=512, dtype="bf16")
    rate = matmul(H200, work)[1].value
    assert rate is not None
    head_s = transformer.head_forward_flops(gpt2, work) * 3 / rate
    padded = replace(gpt2, vocabulary=50304)

    def more_s(machine: Machine, workload: Workload) -> float:
        off, on = (of("native", shape, machine, workload).step_s or 0.0 for shape in (gpt2, padded))
        return off - on

    assert more_s(H200, work) == pytest.approx(5 * head_s, rel=0.1)
    assert H200.gpu is not None
    older = replace(H200, gpu=replace(H200.gpu, compute_capability="8.0"))
    assert more_s(older, work) == pytest.approx(head_s, rel=0.15)
    assert abs(more_s(H200, replace(work, dtype="fp32"))) < 0.1 * head_s


@pytest.mark.parametrize(("training_s", "taken_s"), [(19e-6, 19e-6), (46e-6, 1.3 * 15e-6)])
def test_a_disturbed_time_with_autograd_is_held_to_that_without(training_s: float, taken_s: float) -> None:
    def figure(value: float) -> Figure:
        return Figure(value=value, origin="measured", method="a probe")

    cpu = replace(H200.cpu, forward_launch_s=figure(15e-6), training_launch_s=figure(training_s))
    starts = LayerTraffic(name="block.0", gpu_backward_flops=1.0, launches=1000)
    work = Traffic(layers=(starts,), gpu_memory_bytes={}, host_memory_bytes={"process": 0})
    told = predict(work, replace(H200, cpu=cpu), TRAINING)
    pause_s = STEP_LAUNCHES * 15e-6
    assert told.step_s == pytest.approx(1000 * taken_s + pause_s, rel=1e-3)


def test_an_optimizer_at_the_end_is_not_hidden_behind_what_starts_the_passes() -> None:
    """It is started last, and its end is waited for."""
    blocks = LayerTraffic(name="block.0", gpu_backward_flops=1.0, gpu_bytes=1e9, launches=1000)
    update_s = 4e9 / (H200.gpu.copy_bytes_per_s.value if H200.gpu else 0.0)  # type: ignore[operator]

    def step_s(layer: LayerTraffic) -> float:
        work = Traffic(layers=(layer,), gpu_memory_bytes={}, host_memory_bytes={"process": 0})
        return predict(work, H200, TRAINING).step_s or 0.0

    plain, longer = step_s(blocks), step_s(blocks._replace(gpu_bytes=5e9))
    updated = step_s(blocks._replace(gpu_bytes=5e9, update_gpu_bytes=4e9))
    assert plain == pytest.approx(longer)  # what is between the operations hides
    assert updated == pytest.approx(plain + update_s)


def test_what_torch_gives_back_is_not_needed() -> None:
    """Places that are free again at another moment count in what it reserves, not in what a plan needs, where
    segments are not expandable."""
    budget = budget_of(H200, None, None, None, expandable=False)
    cost = traffic("exact-offload", DEEPSEEK_1B, TRAINING, parse_settings("exact-offload", {}))
    assert cost.gpu_returned_bytes > 0
    without = replace(
        cost, gpu_apart_bytes=cost.gpu_apart_bytes - cost.gpu_returned_bytes, gpu_returned_bytes=0
    )
    assert gpu_bytes_needed(cost, budget) == pytest.approx(gpu_bytes_needed(without, budget), abs=2)
    assert reserved_bytes(cost, budget) > reserved_bytes(without, budget)


@pytest.mark.parametrize(("engine", "is_apart"), [("native", False), ("zo2", True)])
def test_with_expandable_segments_pools_of_graphs_alone_lie_apart(engine: str, is_apart: bool) -> None:
    cost = traffic(engine, DEEPSEEK_1B, TRAINING, parse_settings(engine, {}))
    more = replace(cost, gpu_apart_bytes=cost.gpu_apart_bytes + 10**9, gpu_margin=0.2)
    expandable, plain = (budget_of(H200, None, None, None, expandable=each) for each in (True, False))
    for needed in (gpu_bytes_needed, reserved_bytes):
        assert needed(more, expandable) == needed(cost, expandable)
        assert needed(more, plain) > needed(cost, plain)
    assert (cost.gpu_pool_bytes > 0) is is_apart
    assert cost.gpu_pool_bytes <= cost.gpu_apart_bytes


def test_torch_reserves_no_more_than_the_gpu_has_for_it() -> None:
    """Of a plan that fits; what another lacks is told."""
    cost = traffic(
        "exact-offload", DEEPSEEK_1B, TRAINING, parse_settings("exact-offload", {"graphs": "false"})
    )
    needed = gpu_bytes_needed(cost, budget_of(H200, None, None, None, expandable=False))
    at_edge, below = (budget_of(H200, vram, None, None, expandable=False) for vram in (needed, needed - 1))
    for_torch = needed - beside_torch_bytes(cost, at_edge)
    assert taken_bytes(cost, at_edge) == for_torch < reserved_bytes(cost, at_edge)
    assert taken_bytes(cost, below) == reserved_bytes(cost, below)


@pytest.mark.parametrize(("tokens", "waits"), [(64, True), (4096, False)])
@pytest.mark.parametrize("engine", ["exact-offload", "lsp", "native"])
def test_parts_of_the_gpus_time_add_up_to_it(engine: str, tokens: int, waits: bool) -> None:
    workload = Workload(batch_size=1, seq_len=tokens, dtype="bf16")
    values = {"graphs": "false"} if engine == "exact-offload" else {}
    cost = traffic(engine, DEEPSEEK_7B, workload, parse_settings(engine, values))
    parts, times = gpu_parts(cost, H200, workload), resource_s(cost, H200, workload)
    assert parts is not None
    assert times is not None
    assert parts.products_s + parts.between_s + parts.starting_s == pytest.approx(times["gpu"])
    assert min(parts.products_s, parts.between_s, parts.starting_s) >= 0
    if engine == "exact-offload":
        assert (parts.starting_s > parts.products_s) is waits
    assert gpu_parts(cost, replace(H200, memory=LAPTOP_CPU.memory, link=None), workload) is None or (
        engine == "native"
    )


def test_gradients_of_all_weights_leave_pieces_between_them() -> None:
    """In expandable segments, whole at the edge of memory; of others the segments are counted."""
    cost = traffic("native", DEEPSEEK_1B, TRAINING, parse_settings("native", {}))
    between = cost.gpu_between_gradients_bytes
    assert 0 < between < 2 * DEEPSEEK_1B.parameters
    without = replace(cost, gpu_between_gradients_bytes=0)
    expandable, plain = (budget_of(H200, None, None, None, expandable=each) for each in (True, False))
    assert gpu_bytes_needed(cost, expandable) - gpu_bytes_needed(without, expandable) == between
    assert 0 < reserved_bytes(cost, expandable) - reserved_bytes(without, expandable) < between
    for needed in (gpu_bytes_needed, reserved_bytes):
        assert needed(cost, plain) == needed(without, plain)


def test_what_lasts_is_known_better_than_what_passes() -> None:
    budget = budget_of(H200, None, None, None, expandable=True)
    asked = {
        kind: gpu_bytes_needed(
            Traffic(layers=(), gpu_memory_bytes={kind: 10**10}, host_memory_bytes={}), budget
        )
        for kind in ("weights", "activations")
    }
    assert asked["activations"] - asked["weights"] == pytest.approx(0.035 * 10**10, rel=1e-6)


def test_small_activations_have_a_range_of_their_own() -> None:
    """Those of a graph stay in its pool; others go back before memory runs out."""
    short = replace(TRAINING, batch_size=1, seq_len=128, checkpointing=False)
    budget = budget_of(H200, None, None, None, expandable=True)
    captured, plain, long = (
        traffic("native", DEEPSEEK_1B, workload, parse_settings("native", {"graphs": graphs}))
        for workload, graphs in ((short, "true"), (short, "false"), (TRAINING, "true"))
    )
    assert captured.gpu_pool_bytes == plain.gpu_small_bytes > 0
    assert captured.gpu_small_bytes == plain.gpu_pool_bytes == long.gpu_pool_bytes == 0
    much = replace(plain, gpu_small_bytes=10**9)
    assert gpu_bytes_needed(much, budget) == gpu_bytes_needed(plain, budget)
    assert reserved_bytes(much, budget) > reserved_bytes(plain, budget)
