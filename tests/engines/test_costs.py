"""Costs against totals worked out by hand, from the papers and from runs on one H200.

Peaks seen (torch, GB) over predicted: native 11.3 / 11.2 (1.3B) and 54.5 / 54.7 (6.7B); torchao 5.8 / 5.8 and
27.5 / 27.8, with offloaded gradients 4.9 / 4.9 and 16.3 / 16.4; torchao's host memory 14.0 / 14.1 and
64.0 / 64.1.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_shapes import DEEPSEEK_1B, DEEPSEEK_7B, OPT_1B, OPT_13B, TINY

from engines import ENGINES
from engines.base import BYTES_PER_ELEMENT, ModelShape, Traffic, UserError, Workload
from engines.costs import COSTS, forward, traffic
from engines.costs.lsp import core_elements
from engines.costs.overlap import STEP_TIME, LayerTimes, busy_s, serial_s
from engines.costs.torchao_offload import power_of_two
from engines.costs.zo2 import resident_indices
from engines.settings import parse_settings

TRAINING = Workload(batch_size=4, seq_len=1024, dtype="bf16")
FORWARD_ONLY = Workload(batch_size=1, seq_len=2048, dtype="fp16")


def cost(engine: str, shape: ModelShape, workload: Workload, **values: object) -> Traffic:
    return traffic(engine, shape, workload, parse_settings(engine, values))


def test_every_engine_has_a_cost() -> None:
    assert set(COSTS) == set(ENGINES)


def test_unknown_engine_is_the_users_error() -> None:
    with pytest.raises(UserError, match="there is no such engine"):
        traffic("nativ", TINY, TRAINING, None)


# --- forward and backward -----------------------------------------------------------------------------


def test_both_forwards_of_opt_13b_are_112_tflop() -> None:
    flops = cost("mezo", OPT_13B, FORWARD_ONLY).gpu_flops
    assert flops == pytest.approx(112e12, rel=0.01)


def test_training_flops_are_6nt_and_8nt_with_checkpointing() -> None:
    matrices = 2.0 * DEEPSEEK_7B.matrix_parameters * 4096
    assert 3 * matrices == pytest.approx(159e12, rel=0.005)  # the facts' 6 N T
    attention = 32 * 4 * (4 * 1024 * 1024) * 4096
    head = 2 * 32256 * 4096 * 4096
    for checkpointing, passes in ((False, 3), (True, 4)):
        counted = cost("native", DEEPSEEK_7B, replace(TRAINING, checkpointing=checkpointing)).gpu_flops
        assert counted == pytest.approx(passes * (matrices + attention) + 3 * head, rel=1e-12)


def test_a_classification_head_sees_one_position_per_sequence() -> None:
    shape = replace(TINY, head="classification", num_labels=2, head_parameters=64 * 64 + 2 * 64)
    workload = Workload(batch_size=8, seq_len=32, dtype="fp32")
    assert forward.head_forward_flops(shape, workload) == 2 * (64 * 64 + 2 * 64) * 8
    assert forward.logits_bytes(shape, workload, training=True) == 8 * 2 * 16


def test_activations_follow_the_published_formulas() -> None:
    sbh = 4 * 1024 * 2048
    plain = forward.block_activation_bytes(OPT_1B, TRAINING)
    assert plain == 34 * sbh + 4 * 32 * 4 * 1024
    gated = forward.block_activation_bytes(DEEPSEEK_1B, TRAINING)
    norms = 8 * sbh
    assert gated == 4 * 1024 * (12 * 2048 + 4 * 2048 + 8 * 5504) + norms + 4 * 16 * 4 * 1024
    assert forward.saved_activation_bytes(OPT_1B, TRAINING) == 24 * 2 * sbh
    kept = forward.saved_activation_bytes(OPT_1B, replace(TRAINING, checkpointing=False))
    assert kept == 24 * plain


def test_accumulation_multiplies_work_not_memory() -> None:
    once, four = (cost("native", TINY, replace(TRAINING, accumulation=n)) for n in (1, 4))
    assert four.gpu_flops == 4 * once.gpu_flops
    assert four.gpu_memory_bytes["activations"] <= once.peak_gpu_bytes
    # Between micro-batches gradients stay, so they and the logits are there together.
    assert four.gpu_memory_bytes["gradients"] == 2 * TINY.parameters


# --- memory and transfers by method -------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "per_parameter"), [("bf16", 8), ("fp32", 16)])
def test_native_holds_8p_in_bf16_and_16p_in_fp32(dtype: str, per_parameter: int) -> None:
    kinds = cost("native", DEEPSEEK_7B, replace(TRAINING, dtype=dtype)).gpu_memory_bytes
    assert (
        kinds["weights"] + kinds["gradients"] + kinds["optimizer"] == per_parameter * DEEPSEEK_7B.parameters
    )


@pytest.mark.parametrize(
    ("engine", "shape", "values", "gpu_gb", "host_gb"),
    [
        ("native", DEEPSEEK_1B, {}, 11.3, 1.7),
        ("native", DEEPSEEK_7B, {}, 54.5, 1.7),
        ("torchao-offload", DEEPSEEK_1B, {}, 5.8, 14.0),
        ("torchao-offload", DEEPSEEK_7B, {}, 27.5, 64.0),
        ("torchao-offload", DEEPSEEK_1B, {"offload_gradients": True}, 4.9, 14.0),
        ("torchao-offload", DEEPSEEK_7B, {"offload_gradients": True}, 16.3, 64.0),
    ],
)
def test_peaks_against_those_measured(
    engine: str, shape: ModelShape, values: dict[str, object], gpu_gb: float, host_gb: float
) -> None:
    counted = cost(engine, shape, TRAINING, **values)
    assert counted.peak_gpu_bytes / 1e9 == pytest.approx(gpu_gb, rel=0.03)
    assert counted.peak_host_bytes / 1e9 == pytest.approx(host_gb, rel=0.03)


def test_torchao_moves_every_weight_and_gradient_once() -> None:
    counted = cost("torchao-offload", DEEPSEEK_1B, TRAINING)
    assert counted.h2d_bytes == counted.d2h_bytes == 2 * DEEPSEEK_1B.parameters
    assert counted.cpu_adam_elements == DEEPSEEK_1B.parameters
    twice = cost("torchao-offload", DEEPSEEK_1B, replace(TRAINING, accumulation=2))
    assert (twice.h2d_bytes, twice.d2h_bytes) == (counted.h2d_bytes, 2 * counted.d2h_bytes)


def test_blocks_of_opt_13b() -> None:
    assert OPT_13B.block_parameters == pytest.approx(314.6e6, rel=0.001)
    counted = cost("zo2", OPT_13B, FORWARD_ONLY)
    assert counted.h2d_bytes == counted.d2h_bytes == counted.pinned_bytes
    assert counted.h2d_bytes == 40 * 2 * OPT_13B.block_parameters
    assert counted.h2d_bytes == pytest.approx(25.2e9, rel=0.002)
    assert counted.layers[0].h2d_bytes == counted.layers[-1].h2d_bytes == 0


def test_lsp_cores_of_the_paper() -> None:
    for shape, d, elements, wire in ((DEEPSEEK_7B, 2048, 939e6, 3.76e9), (DEEPSEEK_1B, 1280, 275e6, 1.10e9)):
        assert shape.num_blocks * core_elements(shape, d) == pytest.approx(elements, rel=0.001)
        counted = cost("lsp", shape, TRAINING, d=d)
        assert counted.h2d_bytes == counted.d2h_bytes == pytest.approx(wire, rel=0.003)
        # Host: the core and two moments, fp32.
        assert counted.peak_host_bytes - forward.PROCESS_HOST_BYTES == 12 * counted.cpu_adam_elements


def test_lsp_uses_the_smaller_side_of_a_small_matrix() -> None:
    assert core_elements(TINY, 1000) == 7 * 64 * 64


def test_lsp_adam_is_the_fused_kernel_with_one_stream_less_each_way() -> None:
    counted = cost("lsp", TINY, TRAINING)
    elements = counted.cpu_adam_elements
    assert elements == TINY.num_blocks * core_elements(TINY, 512)
    # The wire twice, and core, moment and variance read and written.
    assert counted.host_bytes == (2 * 4 + 6 * 4) * elements
    assert counted.pinned_bytes == counted.host_memory_bytes["cores, pinned"] == 4 * elements
    # The probe's AdamW reads a weight and a gradient besides both moments, and writes all but the gradient.
    assert counted.cpu_adam_factor == 6 / 7


def test_lsp_twin_does_the_same_work_with_nothing_pinned_or_overlapped() -> None:
    twin, offloaded = cost("lsp", TINY, TRAINING, offload=False), cost("lsp", TINY, TRAINING)
    assert twin.layers == offloaded.layers
    assert twin.gpu_memory_bytes == offloaded.gpu_memory_bytes
    assert (twin.pinned_bytes, twin.overlap) == (0, "serial")
    assert offloaded.peak_host_bytes - twin.peak_host_bytes == offloaded.pinned_bytes


def test_lsp_without_outer_parameters_holds_no_adam_states_on_the_gpu() -> None:
    assert cost("lsp", DEEPSEEK_1B, TRAINING, train_outer=False).gpu_memory_bytes["optimizer"] == 0
    outer = DEEPSEEK_1B.parameters - DEEPSEEK_1B.matrix_parameters
    assert cost("lsp", DEEPSEEK_1B, TRAINING).gpu_memory_bytes["optimizer"] == 2 * 2 * outer


def test_mezo_holds_the_weights_twice() -> None:
    kinds = cost("mezo", OPT_1B, FORWARD_ONLY).gpu_memory_bytes
    assert kinds["weights"] == kinds["scratch"] == 2 * OPT_1B.parameters


def test_scripted_costs_its_script() -> None:
    counted = cost("scripted", TINY, TRAINING, h2d_bytes=7, d2h_bytes=5, host_allocation_bytes=11)
    assert (counted.h2d_bytes, counted.d2h_bytes, counted.gpu_flops) == (7, 5, 0)
    assert counted.host_memory_bytes["script"] == 11


def test_memory_of_zo2_with_everything_resident_is_that_of_mezo_but_for_the_scratch_copy() -> None:
    counted = cost("zo2", OPT_1B, FORWARD_ONLY, resident_blocks=24)
    assert counted.gpu_memory_bytes["weights"] == 2 * OPT_1B.parameters
    assert counted.gpu_memory_bytes["buffers"] == counted.h2d_bytes == counted.pinned_bytes == 0


@given(blocks=st.integers(1, 100), resident=st.integers(0, 120))
def test_resident_blocks_are_as_many_as_asked_for(blocks: int, resident: int) -> None:
    indices = resident_indices(blocks, resident)
    assert len(indices) == min(blocks, resident)
    assert indices <= set(range(blocks))


@given(resident=st.integers(0, 39), dtype=st.sampled_from(sorted(BYTES_PER_ELEMENT)))
@settings(max_examples=20, deadline=None)
def test_a_resident_block_takes_its_bytes_off_the_link(resident: int, dtype: str) -> None:
    workload = replace(FORWARD_ONLY, dtype=dtype)
    fewer = cost("zo2", OPT_13B, workload, resident_blocks=resident)
    more = cost("zo2", OPT_13B, workload, resident_blocks=resident + 1)
    block = BYTES_PER_ELEMENT[workload.dtype] * OPT_13B.block_parameters
    assert fewer.h2d_bytes - more.h2d_bytes == fewer.d2h_bytes - more.d2h_bytes == block
    assert fewer.gpu_flops == more.gpu_flops


@given(size=st.integers(1, 2**40))
def test_power_of_two(size: int) -> None:
    rounded = power_of_two(size)
    assert size <= rounded < 2 * size
    assert math.log2(rounded).is_integer()


# --- how resources overlap ----------------------------------------------------------------------------

SECONDS = st.floats(0, 10, allow_nan=False)
LAYERS = st.lists(
    st.builds(
        LayerTimes,
        gpu_s=SECONDS,
        backward_s=st.just(0.0),
        h2d_s=SECONDS,
        d2h_s=SECONDS,
        cpu_s=SECONDS,
        host_s=st.just(0.0),
    ),
    min_size=1,
    max_size=6,
)


@given(layers=LAYERS, micro_batches=st.integers(1, 4), overlap=st.sampled_from(sorted(STEP_TIME)))
def test_a_step_is_between_its_busiest_resource_and_the_sum_of_all(
    layers: list[LayerTimes], micro_batches: int, overlap: str
) -> None:
    step_s = STEP_TIME[overlap](layers, micro_batches)  # type: ignore[index]
    assert step_s >= max(busy_s(layers).values()) * (1 - 1e-12)
    assert step_s <= serial_s(layers) * (1 + 1e-12)


def test_layerwise_shows_one_layers_tail() -> None:
    layer = LayerTimes(gpu_s=4.0, backward_s=3.0, h2d_s=1.0, d2h_s=1.0, cpu_s=2.0, host_s=0.0)
    layers = [layer] * 10
    assert STEP_TIME["layerwise"](layers, 1) == 40 + 1 + 2 + 1
    assert STEP_TIME["optimizer_after_backward"](layers, 1) == 40 + 20 + 10
    assert STEP_TIME["serial"](layers, 1) == 80
    slow_cpu = [replace(layer, cpu_s=8.0)] * 10
    assert STEP_TIME["layerwise"](slow_cpu, 1) == 80 + 4 + 1 + 1
    # Three of four micro-batches have nothing to send.
    assert STEP_TIME["layerwise"](slow_cpu, 4) == 80 + 1 + 1 + 1 + 30


def test_streamed_fills_and_drains_once() -> None:
    layer = LayerTimes(gpu_s=2.0, backward_s=0.0, h2d_s=5.0, d2h_s=5.0, cpu_s=0.0, host_s=0.0)
    assert STEP_TIME["streamed"]([layer] * 10, 1) == 50 + 2 + 5
    resident = replace(layer, h2d_s=0.0, d2h_s=0.0)
    assert STEP_TIME["streamed"]([resident] * 10, 1) == 20


def test_host_memory_limits_what_overlaps() -> None:
    layer = LayerTimes(gpu_s=1.0, backward_s=0.0, h2d_s=1.0, d2h_s=1.0, cpu_s=0.0, host_s=3.0)
    assert STEP_TIME["streamed"]([layer] * 10, 1) == 30
