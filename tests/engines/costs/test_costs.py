"""Costs against totals worked out by hand, from the papers and from runs on one H200.

Peaks seen (torch, GB) over predicted: native 11.3 / 11.2 (1.3B) and 54.5 / 54.7 (6.7B); torchao 5.8 / 5.8 and
27.5 / 27.8, with offloaded gradients 4.9 / 4.9 and 16.3 / 16.4; torchao's host memory 14.0 / 14.1 and
64.0 / 64.1.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_shapes import DEEPSEEK_1B, DEEPSEEK_7B, OPT_1B, OPT_13B, TINY, llama, opt

from engines.costs import loss, mezo, transformer
from engines.costs.lsp import projection_bytes
from engines.costs.memory import activations
from engines.costs.resources.overlap import CHUNK_SHARE, STEP_TIME, LayerTimes, busy_s, held_back_s, serial_s
from engines.costs.resources.traffic import LayerTraffic, Traffic
from engines.costs.table import traffic
from engines.costs.torchao_offload import power_of_two
from engines.costs.zo2 import RING_BYTES, disk_indices, folds, resident_indices, ring_bytes
from engines.errors import UserError
from engines.settings.lsp import LspSettings
from engines.settings.lsp_layout import core_elements, core_size
from engines.settings.parse import parse_settings
from engines.shapes import BYTES_PER_ELEMENT, Dtype, ModelShape, Workload
from harness.models.configs import named_shape

TRAINING = Workload(batch_size=4, seq_len=1024, dtype="bf16")
FORWARD_ONLY = Workload(batch_size=1, seq_len=2048, dtype="fp16")
BF16_FORWARD = Workload(batch_size=1, seq_len=2048, dtype="bf16")


def cost(engine: str, shape: ModelShape, workload: Workload, **values: object) -> Traffic:
    return traffic(engine, shape, workload, parse_settings(engine, values))


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
        workload = replace(TRAINING, checkpointing=checkpointing)
        counted = cost("native", DEEPSEEK_7B, workload, compile=False).gpu_flops
        assert counted == pytest.approx(passes * (matrices + attention) + 3 * head, rel=1e-12)


def test_a_compiled_second_run_lacks_its_last_product() -> None:
    eager, compiled = (
        cost("native", DEEPSEEK_7B, TRAINING, compile=each).gpu_flops for each in (False, True)
    )
    assert eager - compiled == pytest.approx(32 * 2.0 * 4096 * 11008 * 4096)


@pytest.mark.parametrize("recomputed", [0, 5, 32])
def test_blocks_that_are_recomputed_keep_their_input_alone(recomputed: int) -> None:
    found = cost("native", DEEPSEEK_7B, TRAINING, checkpointed_blocks=recomputed)
    for index in (0, 4, 5, 31):
        layer = found.layers[1 + index]
        assert layer.name == f"block.{index}"
        passes = layer.gpu_backward_flops / layer.gpu_forward_flops
        assert passes == pytest.approx(2.0) if index >= recomputed else passes > 2.7
    kept = activations.block_activation_bytes(DEEPSEEK_7B, TRAINING, compiled=True)
    at_loss = recomputed * 4096 * 4096 * 2 + (32 - recomputed) * kept
    passes_of_blocks = transformer.BlockPasses(recomputed=recomputed, compiled=True)
    assert activations.saved_activation_bytes(DEEPSEEK_7B, TRAINING, passes_of_blocks) == at_loss


def test_a_loss_in_chunks_has_the_logits_of_one() -> None:
    """All recomputed, so that the loss is where memory is at its most."""
    shape = llama("narrow", 1024, 1024, 32, 16, vocabulary=128256)
    whole = cost("lora", shape, TRAINING).gpu_memory_bytes
    found = cost("lora", shape, TRAINING, loss_tokens=512).gpu_memory_bytes
    assert whole["logits"] == 4096 * 128256 * 4, "fused by the compiler"
    # Logits, their gradient, and that of the chunk before.
    assert found["logits"] == 512 * 128256 * 6 + 4096 * 1024 * 2
    eager = cost("lora", shape, TRAINING, loss_tokens=512, compile=False).gpu_memory_bytes
    # Logits, their fp32 copy, three more in fp32, what was compared, and the gradient of the chunk before.
    assert eager["logits"] == 512 * 128256 * (2 + 4 + 3 * 4 + 1 + 2) + 4096 * 1024 * 2
    assert found["weights"] == whole["weights"]
    assert cost("lora", shape, TRAINING, loss_tokens=4096).gpu_memory_bytes["logits"] == whole["logits"]


@pytest.mark.parametrize(
    ("engine", "model", "batch", "tokens", "settings", "peak_mb"),
    [
        ("lora", "opt-350m", 4, 1024, {"loss_tokens": 256, "compile": False, "graphs": False}, 1431),
        ("lora", "gpt2-large", 2, 1024, {"loss_tokens": 256, "graphs": False}, 2224),
        ("lora", "opt-1.3b", 4, 512, {"loss_tokens": 256, "graphs": False}, 3355),
        ("lora", "roberta-base", 32, 256, {"graphs": False}, 1057),
    ],
)
def test_adapters_take_what_the_allocator_was_seen_to_hold(
    engine: str, model: str, batch: int, tokens: int, settings: dict[str, Any], peak_mb: int
) -> None:
    """Tensors at the peak of four jobs on an H200, by torch's own record of its allocations, workspaces left
    out. The model was changed after a look at them."""
    shape = named_shape(model)
    workload = Workload(batch_size=batch, seq_len=tokens, dtype="bf16", checkpointing=True)
    recomputed = shape.num_blocks - (model == "roberta-base")
    found = cost(engine, shape, workload, checkpointed_blocks=recomputed, **settings)
    assert found.peak_gpu_bytes == pytest.approx(peak_mb * 1e6, rel=0.03)


@pytest.mark.parametrize(
    ("model", "batch", "tokens", "recomputed", "settings", "peak_mb"),
    [
        ("qwen2.5-0.5b", 8, 1024, 24, {"loss_tokens": 256}, 2516),
        ("roberta-base", 32, 256, 10, {}, 1179),
    ],
)
def test_adapters_take_no_less_than_ran_out(
    model: str, batch: int, tokens: int, recomputed: int, settings: dict[str, Any], peak_mb: int
) -> None:
    """What two jobs on an H200 had and asked for when memory ended, workspaces left out: in a gated block
    that the compiler runs again, and in the last of blocks that keep their activations."""
    workload = Workload(batch_size=batch, seq_len=tokens, dtype="bf16", checkpointing=True)
    given = {"graphs": False, "checkpointed_blocks": recomputed, **settings}
    found = cost("lora", named_shape(model), workload, **given).peak_gpu_bytes / 1e6
    assert 0.98 * peak_mb < found < 1.1 * peak_mb


@pytest.mark.parametrize(
    ("model", "batch", "tokens", "d", "peak_mb"),
    [
        ("opt-350m", 8, 512, 128, 1363),
        ("opt-1.3b", 4, 512, 256, 1825),
        ("qwen2.5-1.5b", 2, 1024, 384, 3639),
    ],
)
def test_streamed_lsp_has_logits_and_their_gradient(
    model: str, batch: int, tokens: int, d: int, peak_mb: int
) -> None:
    """What torch had allocated at most in three jobs on an H200, workspaces left out."""
    workload = Workload(batch_size=batch, seq_len=tokens, dtype="bf16", checkpointing=True)
    found = cost("lsp", named_shape(model), workload, d=d, r=4, weights="streamed")
    assert found.peak_gpu_bytes == pytest.approx(peak_mb * 1e6, rel=0.02)


def test_a_classification_head_sees_one_position_per_sequence() -> None:
    shape = replace(TINY, head="classification", num_labels=2, head_parameters=64 * 64 + 2 * 64)
    workload = Workload(batch_size=8, seq_len=32, dtype="fp32")
    assert transformer.head_forward_flops(shape, workload) == 2 * (64 * 64 + 2 * 64) * 8
    assert loss.logits_bytes(shape, workload) == 8 * 2 * 16


def test_a_question_answering_head_sees_every_position() -> None:
    shape = replace(TINY, head="question_answering", num_labels=2, head_parameters=2 * 64)
    workload = Workload(batch_size=8, seq_len=32, dtype="fp32")
    assert transformer.head_forward_flops(shape, workload) == 2 * (2 * 64) * 8 * 32
    assert loss.logits_bytes(shape, workload) == 8 * 32 * 2 * 16
    assert loss.head_chunks(shape, workload) == (1, 1)
    assert loss.chunked_logits_bytes(shape, workload, has_triton=True) == 8 * 32 * 2 * 8
    assert loss.head_scratch_bytes(shape, workload) == 2 * 4 * 2 * 64


def test_activations_follow_the_published_formulas() -> None:
    sbh = 4 * 1024 * 2048
    plain = activations.block_activation_bytes(OPT_1B, TRAINING)
    # 34 of the paper, less the input of the activation, which OPT's ReLU does not keep.
    assert plain == (34 - 8) * sbh + 4 * 32 * 4 * 1024
    gated = activations.block_activation_bytes(DEEPSEEK_1B, TRAINING)
    norms = 8 * sbh
    assert gated == 4 * 1024 * (12 * 2048 + 4 * 2048 + 8 * 5504) + norms + 4 * 16 * 4 * 1024
    assert activations.saved_activation_bytes(OPT_1B, TRAINING) == 24 * 2 * sbh
    kept = activations.saved_activation_bytes(OPT_1B, replace(TRAINING, checkpointing=False))
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


EAGER = {"compile": False, "graphs": False}


@pytest.mark.parametrize(
    ("engine", "shape", "values", "gpu_gb", "host_gb"),
    [
        ("native", DEEPSEEK_1B, {}, 11.3, 1.7),
        ("native", DEEPSEEK_7B, {}, 54.5, 1.7),
        ("torchao-offload", DEEPSEEK_1B, {}, 5.8, 14.0),
        ("torchao-offload", DEEPSEEK_7B, {}, 27.5, 64.0),
        ("torchao-offload", DEEPSEEK_1B, {"offload_gradients": True}, 4.9, 14.0),
        ("torchao-offload", DEEPSEEK_7B, {"offload_gradients": True}, 16.3, 64.0),
        ("lora", DEEPSEEK_1B, EAGER, 5.0, 1.7),
        ("lora", DEEPSEEK_7B, EAGER, 16.8, 1.7),
        ("backward-optimizer", DEEPSEEK_1B, {"compile": False}, 10.3, 1.7),
        ("backward-optimizer", DEEPSEEK_7B, {"compile": False}, 43.3, 1.7),
        ("fsdp2-offload", DEEPSEEK_1B, {}, 2.39, 14.0),
    ],
)
def test_peaks_against_those_measured(
    engine: str, shape: ModelShape, values: dict[str, object], gpu_gb: float, host_gb: float
) -> None:
    counted = cost(engine, shape, TRAINING, **values)
    assert counted.peak_gpu_bytes / 1e9 == pytest.approx(gpu_gb, rel=0.03)
    assert without_compiler(counted) / 1e9 == pytest.approx(host_gb, rel=0.03)


def without_compiler(counted: Traffic) -> int:
    """Host memory but for what torch's compiler takes."""
    return counted.peak_host_bytes - counted.host_memory_bytes.get("compiler", 0)


def test_a_compiler_counts_where_blocks_are_compiled() -> None:
    eager, compiled = (cost("native", DEEPSEEK_1B, TRAINING, compile=each) for each in (False, True))
    assert compiled.peak_host_bytes == eager.peak_host_bytes + transformer.COMPILER_HOST_BYTES
    assert "compiler" not in cost("mezo", DEEPSEEK_1B, FORWARD_ONLY).host_memory_bytes


def test_torchao_moves_every_weight_and_gradient_once() -> None:
    counted = cost("torchao-offload", DEEPSEEK_1B, TRAINING)
    assert counted.h2d_bytes == counted.d2h_bytes == 2 * DEEPSEEK_1B.parameters
    assert counted.cpu_adam_elements == DEEPSEEK_1B.parameters
    twice = cost("torchao-offload", DEEPSEEK_1B, replace(TRAINING, accumulation=2))
    assert (twice.h2d_bytes, twice.d2h_bytes) == (counted.h2d_bytes, 2 * counted.d2h_bytes)


def test_queries_share_the_link_and_nothing_else() -> None:
    """Six forward passes for two, three times the noise, the same bytes over the link."""
    once, three = (cost("zo2", OPT_13B, FORWARD_ONLY, queries=n) for n in (1, 3))
    assert (once.forwards, three.forwards) == (2.0, 6.0)
    assert three.gpu_flops == 3 * once.gpu_flops
    assert (three.h2d_bytes, three.d2h_bytes) == (once.h2d_bytes, once.d2h_bytes)
    drawn = [sum(layer.gaussians for layer in each.layers) for each in (once, three)]
    assert drawn[1] == pytest.approx(3 * drawn[0], rel=1e-6)
    assert three.gpu_memory_bytes["scratch"] == once.gpu_memory_bytes["scratch"]
    assert three.gpu_memory_bytes["activations"] > once.gpu_memory_bytes["activations"]


def test_low_rank_noise_takes_no_downloads_and_hardly_any_noise() -> None:
    """Within a window of 50 a block goes down once; the factors of OPT-13B are 0.3 % of its matrices."""
    spsa, lozo = (cost("zo2", OPT_13B, FORWARD_ONLY, estimator=name) for name in ("spsa", "lozo"))
    assert lozo.h2d_bytes == spsa.h2d_bytes
    assert lozo.d2h_bytes == pytest.approx(spsa.d2h_bytes / 50, rel=1e-6)
    noises = [sum(layer.gaussians for layer in each.layers[1:-1]) for each in (spsa, lozo)]
    assert noises[1] < 0.02 * noises[0]
    assert lozo.gpu_flops < 1.02 * spsa.gpu_flops
    assert lozo.gpu_bytes < spsa.gpu_bytes
    rows = 4 * 5120 + 20480 + 5120
    assert lozo.gpu_memory_bytes["optimizer"] == 4 * 4 * 40 * rows


def test_fzoo_takes_a_pass_for_each_query_and_one_more() -> None:
    once = cost("mezo", OPT_13B, FORWARD_ONLY)
    fzoo = cost("mezo", OPT_13B, FORWARD_ONLY, estimator="fzoo", noise="rademacher", queries=8)
    assert fzoo.forwards == 9.0
    assert fzoo.gpu_flops == pytest.approx(9 / 2 * once.gpu_flops)
    assert sum(layer.gaussians for layer in fzoo.layers) == 0
    assert 2 * fzoo.gpu_memory_bytes["scratch"] < 2.2 * once.gpu_memory_bytes["scratch"]


def test_blocks_of_opt_13b() -> None:
    assert OPT_13B.block_parameters == pytest.approx(314.6e6, rel=0.001)
    counted = cost("zo2", OPT_13B, FORWARD_ONLY)
    assert counted.h2d_bytes == counted.d2h_bytes == counted.pinned_bytes
    assert counted.h2d_bytes == 40 * 2 * OPT_13B.block_parameters
    assert counted.h2d_bytes == pytest.approx(25.2e9, rel=0.002)
    assert counted.layers[0].h2d_bytes == counted.layers[-1].h2d_bytes == 0


def test_lsp_cores_of_the_paper() -> None:
    for shape, d, elements, wire in ((DEEPSEEK_7B, 2048, 939e6, 1.88e9), (DEEPSEEK_1B, 1280, 275e6, 0.55e9)):
        assert shape.num_blocks * core_elements(shape, LspSettings(d=d)) == pytest.approx(elements, rel=0.001)
        counted = cost("lsp", shape, TRAINING, d=d)
        assert counted.h2d_bytes == 2 * counted.cpu_adam_elements == pytest.approx(wire, rel=0.003)
        # A squared norm of each block goes down too.
        assert counted.d2h_bytes == counted.h2d_bytes + 4 * shape.num_blocks
        # Host: the core in bf16 and two moments in fp32.
        held = without_compiler(counted) - transformer.PROCESS_HOST_BYTES
        assert held == pytest.approx(10 * counted.cpu_adam_elements, rel=1e-6)


def test_lsp_uses_the_smaller_side_of_a_small_matrix() -> None:
    assert core_elements(TINY, LspSettings(d=1000)) == 7 * 64 * 64
    assert core_elements(TINY, LspSettings(d=1000, r=5)) == 7 * 60 * 60  # whole blocks of r columns
    assert core_elements(TINY, LspSettings(d=1000, r=5, projector="one_hot")) == 7 * 64 * 64


@pytest.mark.parametrize(("dtype", "element"), [("fp32", 4), ("bf16", 2)])
def test_lsp_adam_moves_the_core_and_its_moments_both_ways(dtype: Dtype, element: int) -> None:
    counted = cost("lsp", TINY, replace(TRAINING, dtype=dtype))
    elements = counted.cpu_adam_elements
    assert elements == TINY.num_blocks * core_elements(TINY, LspSettings())
    # The wire twice, and core, moment and variance read and written.
    assert counted.host_bytes == (2 * element + 2 * element + 4 * 4) * elements
    assert counted.pinned_bytes == counted.host_memory_bytes["cores, pinned"]
    assert 0 <= counted.pinned_bytes - element * elements - 4 * TINY.num_blocks < 64
    compact = cost("lsp", TINY, replace(TRAINING, dtype=dtype), moments="bf16")
    assert compact.host_bytes == (2 * element + 2 * element + 4 * 2) * elements
    assert compact.host_memory_bytes["optimizer"] == 4 * elements
    # The probe's AdamW reads a weight and a gradient besides both moments, and writes all but the gradient.
    if dtype == "fp32":
        assert counted.cpu_adam_factor == 6 / 7


def test_lsp_saves_the_products_of_weight_gradients() -> None:
    native, lsp = cost("native", DEEPSEEK_7B, TRAINING), cost("lsp", DEEPSEEK_7B, TRAINING, d=2048, r=8)
    tokens = TRAINING.tokens_per_step
    formed = 2 * tokens * DEEPSEEK_7B.matrix_parameters
    cores = 2 * tokens * lsp.cpu_adam_elements
    assert native.gpu_flops - lsp.gpu_flops == pytest.approx(formed - cores)
    # With d = n/1 there is nothing to save: the gradient is formed, and compressed.
    whole = cost("lsp", DEEPSEEK_7B, TRAINING, d=4096, r=8)
    assert whole.gpu_flops > lsp.gpu_flops


def test_lsp_starts_once_a_step_what_micro_batches_do_not_start_by_themselves() -> None:
    """Cores go to the CPU and back once; inputs are projected, or graphs replayed, for each micro-batch."""

    def started(accumulation: int, **values: object) -> tuple[float, float]:
        workload = replace(TRAINING, accumulation=accumulation)
        block = cost("lsp", TINY, workload, **values).layers[1]
        return block.launches, block.python_launches

    captured = [started(count)[1] for count in (1, 2, 3)]
    applied = 11 * len(TINY.matrices)  # where that is no graph
    assert captured[0] == 45 + 15
    for kept in ({"projector": "paper"}, {"residual": 0.1}):
        assert started(1, **kept)[1] == 45 + applied + 15
    assert captured[2] - captured[1] == captured[1] - captured[0] == 15
    own = transformer.COMPILED_LAUNCHES * 3
    streamed = 18 * len(TINY.matrices)
    for values, once, in_python in (
        ({"graphs": False}, 0, 45 + applied),
        ({"weights": "streamed"}, streamed, 0),
    ):
        for count in (1, 4):
            launches, python = started(count, checkpointed_blocks=0, **values)
            assert (launches, python) == (count * (own + 9 * len(TINY.matrices)) + once, in_python)
    eager = started(4, checkpointed_blocks=0, compile=False, graphs=False)
    plain_or_gated = transformer.block_launches(TINY) * 3
    assert eager == (4 * (plain_or_gated + 2 * len(TINY.matrices)), 45 + applied)


def test_fsdp2_starts_its_own_beside_eager_passes() -> None:
    """Around a block in each micro-batch, and for each of its tensors in a step."""

    def block(accumulation: int) -> int:
        workload = replace(TRAINING, accumulation=accumulation, checkpointing=False)
        return cost("fsdp2-offload", TINY, workload).layers[1].launches

    of_tensors = 7 * transformer.num_tensors(TINY)
    assert block(1) == 3 * transformer.block_launches(TINY) + 100 + of_tensors
    assert block(4) == 4 * (3 * transformer.block_launches(TINY) + 100) + of_tensors


@pytest.mark.parametrize("engine", ["native", "lsp", "exact-offload", "backward-optimizer"])
def test_a_gated_model_starts_more_outside_of_its_blocks(engine: str) -> None:
    """Its rotary embedding, in every micro-batch; a captured pass has it in its graph."""

    def outside(shape: ModelShape, accumulation: int) -> int:
        return (
            cost(engine, shape, replace(TRAINING, accumulation=accumulation), graphs=False)
            .layers[-1]
            .launches
        )

    gated = replace(TINY, gated_mlp=True)
    for count in (1, 3):
        assert outside(gated, count) - outside(replace(TINY, gated_mlp=False), count) == 50 * count
    assert cost("native", gated, TRAINING).layers[-1].launches == 0


def test_a_captured_optimizer_in_the_backward_pass_starts_nothing_and_has_its_updates_as_kernels() -> None:
    """Where the graph can hold the learning rate."""

    def block(**values: object) -> LayerTraffic:
        return cost("backward-optimizer", TINY, TRAINING, **values).layers[1]

    captured, compiled = block(), block(graphs=False)
    assert (captured.launches, captured.python_launches) == (0, 0)
    assert captured.kernels - compiled.kernels == 2 * transformer.num_tensors(TINY)
    assert compiled.python_launches == 5 * transformer.num_tensors(TINY)
    update = 7 * 2 * TINY.block_parameters
    assert captured.gpu_bytes - compiled.gpu_bytes == pytest.approx(0.5 * update)  # at native's rate
    for changes in ({"schedule": "linear"}, {"dropout": 0.1}):
        assert block(**changes) == compiled


def test_exact_offload_starts_two_graphs_a_block_for_all_micro_batches() -> None:
    def block(accumulation: int, **values: object) -> tuple[float, float]:
        workload = replace(TRAINING, accumulation=accumulation)
        its = cost("exact-offload", TINY, workload, checkpointed_blocks=0, **values).layers[1]
        return its.launches, its.python_launches

    of_a_micro_batch = transformer.COMPILED_LAUNCHES * 3
    for count in (1, 4):
        assert block(count) == (0, 32)
        for none in ({"graphs": False}, {"weights": "streamed"}, {"hidden_states": "host"}):
            assert block(count, **none) == (count * of_a_micro_batch, 95)
        assert block(count, offload=False) == (count * of_a_micro_batch, 0)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("recomputed", [0, 24])
def test_the_pool_of_exact_offload_has_no_room_for_logits(accumulation: int, recomputed: int) -> None:
    """What is there when logits are, and at most the block and the hidden states that are there later."""
    workload = replace(TRAINING, accumulation=accumulation, checkpointing=True)
    captured, plain = (
        cost("exact-offload", DEEPSEEK_1B, workload, checkpointed_blocks=recomputed, graphs=graphs)
        for graphs in (True, False)
    )
    assert captured.gpu_memory_bytes == plain.gpu_memory_bytes
    more = captured.gpu_apart_bytes - captured.gpu_returned_bytes
    more -= plain.gpu_apart_bytes - plain.gpu_returned_bytes
    passing = 2 * accumulation * workload.hidden_bytes(DEEPSEEK_1B) + 80_000_000
    of_block = activations.block_activation_bytes(DEEPSEEK_1B, workload, compiled=True) * (recomputed > 0)
    of_block += 2 * DEEPSEEK_1B.block_parameters + workload.hidden_bytes(DEEPSEEK_1B)
    assert passing < more <= passing + of_block
    assert (captured.gpu_held_bytes, plain.gpu_held_bytes) == (24 * 4_000_000, 0)
    assert captured.workspaces == plain.workspaces + 2


def test_adamw_of_eight_bits_takes_a_time_of_its_own_for_each_element() -> None:
    layers = cost("adamw-8bit", OPT_1B, TRAINING).layers
    assert sum(layer.unrated_s for layer in layers) == pytest.approx(2e-11 * OPT_1B.parameters)
    assert all(layer.unrated_s == 0 for layer in cost("native", OPT_1B, TRAINING).layers)


@pytest.mark.parametrize(
    ("dtype", "recomputed", "kernels"), [("bf16", 0, 6 + 4), ("bf16", 24, 8 + 6), ("fp32", 0, 6)]
)
def test_adapters_in_compiled_blocks_are_products_and_casts(
    dtype: Dtype, recomputed: int, kernels: int
) -> None:
    """Of each adapted layer two products a forward pass and four of the backward pass; of 16-bit jobs both
    fp32 adapters are cast in each forward pass, and their gradients once. By the compiler's code: in a block
    that runs again 14 casts each time of 7 layers, and 14 of gradients."""
    workload = replace(TRAINING, dtype=dtype, checkpointing=True)
    own, with_adapters = (
        cost(engine, DEEPSEEK_1B, workload, checkpointed_blocks=recomputed).layers[1].kernels
        for engine in ("native", "lora")
    )
    assert with_adapters - own == 7 * kernels


@pytest.mark.parametrize(("engine", "copies"), [("native", 0), ("lora", 0), ("lsp", 7), ("exact-offload", 0)])
def test_kernels_take_as_long_whether_the_cpu_starts_them_or_a_graph_does(engine: str, copies: int) -> None:
    """Only compiled ones: a graph is never slower for what it does on the GPU, but for copies of hidden
    states where each block has graphs of its own."""
    captured, plain = (cost(engine, DEEPSEEK_1B, TRAINING, graphs=graphs) for graphs in (True, False))
    for with_graph, without in zip(captured.layers, plain.layers, strict=True):
        of_block = copies * with_graph.name.startswith("block.")
        assert with_graph.kernels - without.kernels == of_block
        of_copies = 2 * of_block * TRAINING.hidden_bytes(DEEPSEEK_1B)
        assert with_graph.gpu_bytes - without.gpu_bytes == pytest.approx(of_copies)
        assert with_graph.launches <= without.launches


def test_lsp_adds_up_the_cores_of_several_micro_batches_in_fp32() -> None:
    """2.7 K x 2.7 K on an H200: 24 us, of a product of 73 with 3.6 K tokens."""

    def moved(accumulation: int) -> float:
        each = replace(TRAINING, batch_size=TRAINING.batch_size // accumulation, accumulation=accumulation)
        return sum(projection_bytes(matrix, settings, each) for matrix in DEEPSEEK_1B.matrices)

    settings = LspSettings(d=512, r=4)
    cores = sum(core_size(matrix.rows, matrix.columns, settings) ** 2 for matrix in DEEPSEEK_1B.matrices)
    assert moved(2) - moved(1) == (4 + 2 * 12 + 6) * cores
    assert moved(4) - moved(2) == 2 * 12 * cores


def test_lsp_twin_does_the_same_work_with_nothing_pinned_or_overlapped() -> None:
    twin, offloaded = cost("lsp", TINY, TRAINING, offload=False), cost("lsp", TINY, TRAINING)
    without_graphs = cost("lsp", TINY, TRAINING, graphs=False)
    for mine, its in zip(twin.layers, without_graphs.layers, strict=True):
        assert mine == its._replace(python_launches=0, cpu_chunks=0)
    assert (twin.pinned_bytes, twin.overlap) == (0, "serial")
    assert offloaded.peak_host_bytes == twin.peak_host_bytes
    assert twin.gpu_memory_bytes["cores"] == 2 * twin.cpu_adam_elements  # all blocks' at once


def test_lsp_without_parameters_outside_the_blocks_holds_no_adam_states_on_the_gpu() -> None:
    assert cost("lsp", DEEPSEEK_1B, TRAINING, train_outer=False).gpu_memory_bytes["optimizer"] == 0
    non_block = DEEPSEEK_1B.parameters - DEEPSEEK_1B.matrix_parameters
    assert cost("lsp", DEEPSEEK_1B, TRAINING).gpu_memory_bytes["optimizer"] == 2 * 2 * non_block


@pytest.mark.parametrize(
    ("moments", "held", "moved"), [("fp32", 12, 26), ("bf16", 8, 18), ("int8", 6 + 1 / 16, 14 + 1 / 8)]
)
def test_exact_offload_by_its_states(moments: str, held: float, moved: float) -> None:
    """Bytes per parameter of the blocks: on the host, and through its memory in a step, copies apart."""
    counted = cost("exact-offload", DEEPSEEK_7B, TRAINING, moments=moments, gradient_blocks=4)
    blocks = DEEPSEEK_7B.num_blocks * DEEPSEEK_7B.block_parameters
    gradients = 4 * 2 * DEEPSEEK_7B.block_parameters
    assert counted.host_memory_bytes["gradients, pinned"] == gradients
    assert counted.pinned_bytes == 2 * blocks + gradients
    on_host = without_compiler(counted) - transformer.PROCESS_HOST_BYTES - gradients
    assert on_host == pytest.approx(held * blocks, rel=1e-9)
    assert counted.host_bytes == pytest.approx((moved + 4) * blocks, rel=1e-9)
    assert counted.h2d_bytes == counted.d2h_bytes - 4 * 32 == 2 * blocks
    assert counted.cpu_adam_elements == blocks


def test_exact_offload_holds_two_bytes_a_parameter_and_three_blocks_of_gradients() -> None:
    kinds = cost("exact-offload", DEEPSEEK_7B, TRAINING).gpu_memory_bytes
    assert kinds["weights"] == 2 * DEEPSEEK_7B.parameters
    assert kinds["optimizer"] == 12 * DEEPSEEK_7B.non_block_parameters
    made = 4 * 2 * DEEPSEEK_7B.block_parameters + 2 * DEEPSEEK_7B.non_block_parameters
    assert kinds["gradients"] in (made, made - 2 * DEEPSEEK_7B.block_parameters)
    four = cost("exact-offload", DEEPSEEK_7B, replace(TRAINING, accumulation=4))
    assert four.h2d_bytes == cost("exact-offload", DEEPSEEK_7B, TRAINING).h2d_bytes
    kept = cost("exact-offload", DEEPSEEK_7B, TRAINING, checkpointed_blocks=30).gpu_memory_bytes
    activation = activations.block_activation_bytes(DEEPSEEK_7B, TRAINING, compiled=True)
    hidden = TRAINING.hidden_bytes(DEEPSEEK_7B)
    assert kept["activations"] - kinds["activations"] == pytest.approx(2 * (activation - hidden), abs=1)


def test_exact_offload_streamed_holds_three_blocks_and_sends_the_others_up_twice() -> None:
    resident = cost("exact-offload", DEEPSEEK_7B, TRAINING)
    streamed = cost("exact-offload", DEEPSEEK_7B, TRAINING, weights="streamed")
    block = 2 * DEEPSEEK_7B.block_parameters
    assert resident.gpu_memory_bytes["weights"] - streamed.gpu_memory_bytes["weights"] == (32 - 3) * block
    assert streamed.h2d_bytes - resident.h2d_bytes == (32 - 3) * block
    assert streamed.d2h_bytes == resident.d2h_bytes
    assert streamed.host_memory_bytes == resident.host_memory_bytes
    twin = cost("exact-offload", DEEPSEEK_7B, TRAINING, weights="streamed", offload=False)
    assert twin.h2d_bytes == resident.h2d_bytes
    more = cost("exact-offload", DEEPSEEK_7B, TRAINING, weights="streamed", weight_slots=12)
    assert streamed.h2d_bytes - more.h2d_bytes == 9 * block
    assert more.gpu_memory_bytes["weights"] - streamed.gpu_memory_bytes["weights"] == 9 * block
    assert more.host_bytes < streamed.host_bytes


def test_exact_offload_keeps_activations_for_fewer_operations() -> None:
    kept, again = (cost("exact-offload", TINY, TRAINING, checkpointed_blocks=n) for n in (0, "all"))
    assert kept.gpu_flops == cost("native", TINY, replace(TRAINING, checkpointing=False)).gpu_flops
    assert again.gpu_flops == cost("native", TINY, TRAINING).gpu_flops


@pytest.mark.parametrize("shape", [DEEPSEEK_7B, OPT_13B])
def test_products_take_less_than_all_activations_and_memory_traffic_alone(shape: ModelShape) -> None:
    all_kept, products, again = (
        cost("exact-offload", shape, TRAINING, checkpointed_blocks=count, kept_activations=kept)
        for count, kept in ((0, "all"), (0, "products"), ("all", "all"))
    )
    bytes_of = [each.gpu_memory_bytes["activations"] for each in (all_kept, products, again)]
    assert bytes_of[0] > bytes_of[1] > bytes_of[2]
    assert products.gpu_flops == all_kept.gpu_flops < again.gpu_flops
    elementwise = transformer.elementwise_bytes(shape, TRAINING, compiled=True)
    assert products.gpu_bytes - all_kept.gpu_bytes == pytest.approx(shape.num_blocks * elementwise)
    unused = replace(TRAINING, checkpointing=False)
    assert cost("exact-offload", shape, unused, kept_activations="products") == cost(
        "exact-offload", shape, unused
    )


def test_mezo_holds_the_weights_once() -> None:
    kinds = cost("mezo", OPT_13B, FORWARD_ONLY).gpu_memory_bytes
    assert kinds["weights"] == 2 * OPT_13B.parameters
    # Both copies of the largest matrix, and of the biases and norms of a block.
    assert kinds["scratch"] == 2 * 2 * (5120 * 20480 + 13 * 5120)


def test_several_micro_batches_share_perturbed_copies_of_a_whole_block() -> None:
    for engine in ("mezo", "zo2"):
        once, four = (
            cost(engine, OPT_13B, replace(FORWARD_ONLY, accumulation=n)).gpu_memory_bytes for n in (1, 4)
        )
        assert four["scratch"] == 2 * 2 * OPT_13B.block_parameters > once["scratch"]
        hidden = FORWARD_ONLY.hidden_bytes(OPT_13B)
        assert four["activations"] - once["activations"] == 3 * 2 * hidden


def test_small_blocks_run_as_graphs_where_the_engine_runs_them_so() -> None:
    """The engine's limit is its own; torch stays out of the cost model."""
    perturbed = pytest.importorskip("engines.zeroth_order.perturbed_model")
    assert transformer.GRAPH_SCRATCH_BYTES == perturbed.GRAPH_SCRATCH_BYTES
    assert transformer.runs_as_graphs(OPT_1B, FORWARD_ONLY)
    assert not transformer.runs_as_graphs(OPT_13B, FORWARD_ONLY)
    whole = 2 * 2 * OPT_1B.block_parameters
    assert cost("mezo", OPT_1B, FORWARD_ONLY).gpu_memory_bytes["scratch"] >= whole


@pytest.mark.parametrize(
    ("shape", "limit_gb"),
    [
        (opt("opt-1.3b", 2048, 24, 32, tied=False), 1.50),
        (opt("opt-6.7b", 4096, 32, 32, tied=False), 2.56),
        (opt("opt-13b", 5120, 40, 40, tied=False), 3.19),
        (opt("opt-30b", 7168, 48, 56, tied=False), 4.56),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_zo2_holds_no_more_than_the_papers_code(shape: ModelShape, limit_gb: float) -> None:
    """Its torch peaks on an H200, batch 1 x 2048, fp16, untied embeddings, nothing resident."""
    assert cost("zo2", shape, FORWARD_ONLY).peak_gpu_bytes <= limit_gb * 1e9


@pytest.mark.parametrize(("base", "host_gib", "uploaded_gb"), [("int8", 256, 176.7), ("int4", 128, 89.8)])
def test_175b_on_a_low_bit_base_needs_18_gb_and_an_ordinary_host(
    base: str, host_gib: int, uploaded_gb: float
) -> None:
    """173.9 G matrix elements at 2080 or 1056 bytes for 2048, and 0.02 G others at 2; the paper's code asks
    for 600 GB of host memory."""
    shape = opt("opt-175b", 12288, 96, 96)
    counted = cost("zo2", shape, FORWARD_ONLY, base=base, fold_every=4)
    assert counted.h2d_bytes == pytest.approx(uploaded_gb * 1e9, rel=1e-3)
    assert counted.pinned_bytes == counted.h2d_bytes
    assert counted.d2h_bytes == pytest.approx(counted.h2d_bytes / 4, rel=1e-6)
    assert counted.peak_gpu_bytes < 12e9
    assert counted.peak_host_bytes < 0.75 * host_gib * 2**30


def test_a_lossless_base_takes_three_quarters_and_draws_no_more() -> None:
    """12.58e9 matrix elements at 3104 bytes for 2048, and 26 M others at 2."""
    full, lossless = (
        cost("zo2", OPT_13B, BF16_FORWARD, fold_every=8, base=base) for base in ("full", "lossless")
    )
    assert lossless.h2d_bytes == pytest.approx(19.07e9, rel=1e-3)
    assert lossless.pinned_bytes == lossless.h2d_bytes
    assert lossless.d2h_bytes == pytest.approx(full.d2h_bytes * lossless.h2d_bytes / full.h2d_bytes, rel=1e-3)
    assert gaussians(lossless) == gaussians(full)
    often = cost("zo2", OPT_13B, BF16_FORWARD, base="lossless")
    assert often.gpu_bytes > lossless.gpu_bytes
    frozen = [
        cost("zo2", OPT_13B, BF16_FORWARD, train="lora", base=base).gpu_bytes for base in ("full", "lossless")
    ]
    assert frozen[0] - frozen[1] == pytest.approx(25.17e9 - 19.07e9, rel=1e-2)


@pytest.mark.parametrize("base", ["int8", "fp8", "int4"])
def test_a_low_bit_base_takes_fewer_bytes_and_no_fewer_draws(base: str) -> None:
    full, low = (cost("mezo", OPT_13B, FORWARD_ONLY, base=each) for each in ("full", base))
    share = (1056 if base == "int4" else 2080) / 4096
    assert low.gpu_memory_bytes["weights"] == pytest.approx(
        2 * OPT_13B.non_block_parameters + share * 40 * 2 * OPT_13B.block_parameters, rel=1e-3
    )
    assert gaussians(low) == gaussians(full)
    assert low.gpu_bytes < full.gpu_bytes
    assert low.gpu_memory_bytes["scratch"] == full.gpu_memory_bytes["scratch"]


def test_signs_cost_nothing_beside_full_weights_and_a_share_of_normals_beside_low_bit_ones() -> None:
    for base, share in (("full", 0.0), ("int8", mezo.SIGN_COST)):
        signs, normals = (
            cost("mezo", OPT_13B, FORWARD_ONLY, base=base, noise=each) for each in ("rademacher", "gaussian")
        )
        for mine, other in zip(signs.layers[1:-1], normals.layers[1:-1], strict=True):
            assert mine.gaussians == pytest.approx(share * other.gaussians, rel=1e-6)
        assert signs.layers[0].gaussians == signs.layers[-1].gaussians == 0


def test_each_probe_of_fzoo_replays_what_pends_on_a_low_bit_base() -> None:
    """Of q = 3: theta itself and three sides, four visits; 7 of 8 steps leave updates to all of them."""
    knobs = {"estimator": "fzoo", "noise": "rademacher", "queries": 3, "base": "int8"}
    counted = cost("mezo", OPT_13B, FORWARD_ONLY, fold_every=8, **knobs)
    deferred = [3 * steps for steps in range(1, 9)]
    drawn = (sum(deferred) + 3 * sum(deferred[:-1])) / 8 + 3
    assert counted.layers[1].gaussians == round(mezo.SIGN_COST * drawn * OPT_13B.block_parameters)


def test_resident_low_bit_blocks_keep_the_turns_of_the_others() -> None:
    counted = cost("zo2", OPT_1B, FORWARD_ONLY, resident_blocks=24, fold_every=8, base="int8")
    assert gaussians(counted) == gaussians(cost("mezo", OPT_1B, FORWARD_ONLY, fold_every=8, base="int8"))


def test_logits_are_there_in_chunks() -> None:
    rows = loss.HEAD_CHUNK_BYTES // (2 * 5120)
    assert loss.head_scratch_bytes(OPT_13B, FORWARD_ONLY) == 2 * rows * 2 * 5120
    assert loss.chunked_logits_bytes(OPT_13B, FORWARD_ONLY, has_triton=False) == 2048 * rows * 10
    assert loss.chunked_logits_bytes(OPT_13B, FORWARD_ONLY, has_triton=True) == 2048 * rows * 2
    assert loss.head_chunks(OPT_13B, FORWARD_ONLY) == (math.ceil(50272 / rows), 1)
    long = replace(FORWARD_ONLY, batch_size=8)
    assert loss.chunked_logits_bytes(OPT_13B, long, has_triton=False) == 4096 * rows * 10
    assert loss.head_chunks(OPT_13B, long) == (math.ceil(50272 / rows), 4)
    # A small vocabulary is one chunk.
    assert loss.head_scratch_bytes(TINY, TRAINING) == 2 * 2 * TINY.head_parameters


def test_scripted_costs_its_script() -> None:
    counted = cost("scripted", TINY, TRAINING, h2d_bytes=7, d2h_bytes=5, host_allocation_bytes=11)
    assert (counted.h2d_bytes, counted.d2h_bytes, counted.gpu_flops) == (7, 5, 0)
    assert counted.host_memory_bytes["script"] == 11


@pytest.mark.parametrize("fold_every", [1, 8])
def test_zo2_with_everything_resident_holds_and_draws_what_mezo_does(fold_every: int) -> None:
    counted = cost("zo2", OPT_1B, FORWARD_ONLY, resident_blocks=24, fold_every=fold_every)
    mezo = cost("mezo", OPT_1B, FORWARD_ONLY)
    assert counted.gpu_memory_bytes == {**mezo.gpu_memory_bytes, "buffers": 0}
    assert counted.h2d_bytes == counted.d2h_bytes == counted.pinned_bytes == 0
    assert gaussians(counted) == gaussians(mezo)
    # Both update and perturb a block in one pass, which reads its weights once.
    assert mezo.gpu_bytes == counted.gpu_bytes


def gaussians(counted: Traffic) -> dict[str, int]:
    return {layer.name: layer.gaussians for layer in counted.layers}


@pytest.mark.parametrize(("fold_every", "draws"), [(1, 2), (2, 2.5), (4, 3.5), (8, 5.5), (16, 9.5)])
def test_deferred_updates_are_drawn_again_at_every_visit(fold_every: int, draws: float) -> None:
    counted = cost("zo2", OPT_13B, FORWARD_ONLY, fold_every=fold_every, resident_blocks=1)
    by_layer = gaussians(counted)
    assert by_layer["block.0"] == pytest.approx(draws * OPT_13B.block_parameters, abs=1)
    assert by_layer["block.20"] == 2 * OPT_13B.block_parameters  # resident
    # One visit in `fold_every` writes theta, all write both copies.
    without = transformer.stacked_layers(OPT_13B, FORWARD_ONLY)[1].gpu_bytes
    moved = counted.layers[1].gpu_bytes - without
    assert moved == pytest.approx(2 * (3 + 1 / fold_every) * OPT_13B.block_parameters)
    block = 2 * OPT_13B.block_parameters
    assert (counted.h2d_bytes, counted.d2h_bytes) == (39 * block, 39 * (block // fold_every))


@given(index=st.integers(0, 100), first=st.integers(0, 1000), fold_every=st.integers(1, 64))
def test_a_block_folds_once_in_so_many_steps(index: int, first: int, fold_every: int) -> None:
    steps = [step for step in range(first, first + fold_every) if folds(index, step, fold_every)]
    assert len(steps) == 1


@given(blocks=st.integers(1, 64), step=st.integers(0, 1000), fold_every=st.integers(1, 64))
def test_every_step_folds_as_many_blocks_as_any(blocks: int, step: int, fold_every: int) -> None:
    folded = sum(folds(index, step, fold_every) for index in range(blocks))
    assert blocks // fold_every <= folded <= math.ceil(blocks / fold_every)


@given(sizes=st.lists(st.integers(1, 2 * 10**9), min_size=1, max_size=8))
def test_the_ring_holds_a_block_and_a_fifth_and_no_more_than_five(sizes: list[int]) -> None:
    ring = ring_bytes(sizes)
    assert ring % 512 == 0
    assert 1.2 * max(sizes) <= ring < 5 * max(sizes) + 512
    assert ring < max(RING_BYTES, 1.2 * max(sizes)) + 512
    assert ring_bytes([*sizes, max(sizes)]) == ring


def test_there_is_no_ring_for_nothing() -> None:
    assert ring_bytes([]) == 0


# --- what is trained ----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["mezo", "zo2"])
def test_frozen_blocks_have_no_noise_and_do_not_go_down(engine: str) -> None:
    every, some = (cost(engine, DEEPSEEK_7B, FORWARD_ONLY, train=train) for train in ("all", "last:4"))
    assert some.gpu_flops == every.gpu_flops
    drawn, all_drawn = gaussians(some), gaussians(every)
    assert drawn["embedding"] == drawn["block.0"] == drawn["block.27"] == 0
    assert drawn["block.28"] == all_drawn["block.28"] > 0
    # The head and the final norm are updated, the head is perturbed; embeddings stay.
    assert drawn["head"] == 2 * DEEPSEEK_7B.head_parameters + DEEPSEEK_7B.hidden
    assert some.h2d_bytes == every.h2d_bytes
    if engine == "zo2":
        assert some.d2h_bytes == 4 * 2 * DEEPSEEK_7B.block_parameters
    assert some.gpu_bytes < every.gpu_bytes


def test_a_head_that_is_the_embedding_is_frozen_with_it() -> None:
    assert gaussians(cost("mezo", OPT_1B, FORWARD_ONLY, train="last:1"))["head"] == 2 * OPT_1B.hidden


def test_more_blocks_than_there_are_means_all() -> None:
    every, some = (gaussians(cost("zo2", OPT_1B, FORWARD_ONLY, train=train)) for train in ("all", "last:99"))
    assert {name: count for name, count in some.items() if name.startswith("block.")} == {
        name: count for name, count in every.items() if name.startswith("block.")
    }


@pytest.mark.parametrize("engine", ["mezo", "zo2"])
def test_adapters_alone_are_trained_with_lora(engine: str) -> None:
    counted = cost(engine, OPT_13B, FORWARD_ONLY, train="lora", lora_rank=8)
    adapters = 8 * (4 * 2 * 5120 + 2 * 5 * 5120)  # four square matrices, two of 1 x 4
    assert counted.gpu_memory_bytes["adapters"] == 40 * 2 * adapters
    assert gaussians(counted) == {
        name: 2 * adapters if name.startswith("block.") else 0 for name in gaussians(counted)
    }
    assert counted.d2h_bytes == 0
    assert counted.h2d_bytes == cost(engine, OPT_13B, FORWARD_ONLY).h2d_bytes
    base = cost(engine, OPT_13B, FORWARD_ONLY).gpu_flops
    assert counted.gpu_flops - base == 40 * 2 * 2 * adapters * 2048


@pytest.mark.parametrize("train", ["all", "last:3", "lora"])
@pytest.mark.parametrize("engine", ["mezo", "zo2"])
def test_accumulation_draws_noise_of_the_blocks_once(engine: str, train: str) -> None:
    once, four = (cost(engine, OPT_13B, replace(FORWARD_ONLY, accumulation=n), train=train) for n in (1, 4))
    assert four.gpu_flops == 4 * once.gpu_flops
    assert gaussians(four)["block.39"] == gaussians(once)["block.39"]
    assert (four.h2d_bytes, four.d2h_bytes) == (once.h2d_bytes, once.d2h_bytes)


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


@given(
    resident=st.tuples(st.integers(0, 45), st.integers(0, 45)),
    fold_every=st.integers(1, 64),
    train=st.sampled_from(["all", "last:7", "lora"]),
)
@settings(max_examples=30, deadline=None)
def test_more_residents_never_move_more(resident: tuple[int, int], fold_every: int, train: str) -> None:
    fewer, more = (
        cost("zo2", OPT_13B, FORWARD_ONLY, resident_blocks=count, fold_every=fold_every, train=train)
        for count in sorted(resident)
    )
    assert more.h2d_bytes <= fewer.h2d_bytes
    assert more.pinned_bytes == more.h2d_bytes
    assert more.d2h_bytes <= more.h2d_bytes


def test_opt_30b_on_a_host_of_32_gib() -> None:
    """Of 59 GB some 20 are in memory, and the rest is read from disk in every step."""
    shape = opt("opt-30b", 7168, 48, 56)
    block_bytes = 2 * shape.block_parameters
    everything = cost("zo2", shape, FORWARD_ONLY)
    counted = cost("zo2", shape, FORWARD_ONLY, disk_blocks=25)
    assert counted.disk_bytes == 25 * block_bytes
    assert counted.h2d_bytes == everything.h2d_bytes == 48 * block_bytes
    assert counted.d2h_bytes == 23 * block_bytes
    assert counted.pinned_bytes == 23 * block_bytes + 2**30
    assert counted.peak_host_bytes < 32 * 2**30 < everything.peak_host_bytes
    assert counted.gpu_memory_bytes == everything.gpu_memory_bytes
    # Each of their bytes is written to host memory and read from it again.
    assert counted.host_bytes == (23 * 2 + 25 * 2) * block_bytes


@pytest.mark.parametrize(("base", "on_disk", "disk_gb"), [("int4", 31, 29.0), ("int8", 63, 116.0)])
def test_175b_on_a_host_of_64_gib(base: str, on_disk: int, disk_gb: float) -> None:
    """Of which 60 are free. Each block is 0.935 GB with 4 bits and 1.84 GB with 8."""
    shape = opt("opt-175b", 12288, 96, 96)
    counted, fewer = (
        cost("zo2", shape, FORWARD_ONLY, base=base, fold_every=8, disk_blocks=count)
        for count in (on_disk, on_disk - 1)
    )
    assert counted.disk_bytes == pytest.approx(disk_gb * 1e9, rel=1e-3)
    assert counted.peak_host_bytes < 60 * 2**30 <= fewer.peak_host_bytes
    assert counted.peak_gpu_bytes < 12e9


def test_a_visit_of_a_low_bit_block_on_disk_replays_rounding_by_rounding() -> None:
    full, *low = (
        cost("zo2", OPT_13B, FORWARD_ONLY, disk_blocks=40, **knobs)
        for knobs in ({}, {"base": "int8"}, {"base": "int8", "fold_every": 8})
    )
    often, rarely = low
    assert gaussians(often) == gaussians(rarely) == gaussians(full)
    # 32.5 updates on average, each rounded to the records, or every eighth: 7/8 of their reads and writes.
    records = often.disk_bytes
    assert often.gpu_bytes - rarely.gpu_bytes == pytest.approx(7 / 8 * 32.5 * 2 * records, rel=1e-2)
    memory, disk = (
        cost("zo2", OPT_13B, FORWARD_ONLY, disk_blocks=count, estimator="lozo", base="int8")
        for count in (0, 40)
    )
    assert gaussians(memory) == gaussians(disk)


def test_blocks_on_disk_are_among_the_streamed_ones() -> None:
    resident = resident_indices(48, 10)
    on_disk = disk_indices(48, resident, 20)
    assert len(on_disk) == 20
    assert not on_disk & resident
    counted = cost("zo2", OPT_13B, FORWARD_ONLY, resident_blocks=10, disk_blocks=99)
    assert counted.disk_bytes == counted.h2d_bytes
    assert counted.d2h_bytes == 0
    assert cost("zo2", OPT_13B, FORWARD_ONLY, disk_blocks="auto") == cost("zo2", OPT_13B, FORWARD_ONLY)


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
        disk_s=SECONDS,
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
    assert STEP_TIME["uploaded_when_called"](layers, 1) == 40 + 5 + 20 + 1
    assert STEP_TIME["serial"](layers, 1) == 80
    slow_cpu = [replace(layer, cpu_s=8.0)] * 10
    assert STEP_TIME["layerwise"](slow_cpu, 1) == 80 + 4 + 1 + 1
    # Three of four micro-batches have nothing to send.
    assert STEP_TIME["layerwise"](slow_cpu, 4) == 80 + 1 + 1 + 1 + 30
    # However many micro-batches there are, all of them pass the last block before its next gradient is whole.
    assert STEP_TIME["blockwise"](slow_cpu, 4) == STEP_TIME["blockwise"](slow_cpu, 1) == 80 + 4 + 0.25 + 0.25
    # So they do the head, one of them where updates begin with the last.
    head = LayerTimes(gpu_s=2.0, backward_s=1.0, h2d_s=0.0, d2h_s=0.0, cpu_s=0.0, host_s=0.0)
    assert STEP_TIME["blockwise"]([*slow_cpu, head], 4) == 80 + 4 + 2 + 0.25 + 0.25
    assert STEP_TIME["layerwise"]([*slow_cpu, head], 4) == 80 + 1 + 0.5 + 1 + 1 + 31.5
    # Updates take longer than the CPU does beside copies in the same memory, and between chunks.
    in_memory = [replace(each, host_s=8.5, update_host_s=8.5) for each in slow_cpu]
    assert STEP_TIME["layerwise"](in_memory, 1) == pytest.approx(85 + 4 + 1 + 1)
    in_chunks = [replace(each, between_updates_s=0.5) for each in in_memory]
    assert STEP_TIME["layerwise"](in_chunks, 1) == pytest.approx(90 + 4 + 1 + 1)
    # Copies of other things go on while the CPU stands still, for 4.5 s; of their 20 s, 0.8 then.
    beside = [replace(each, host_s=each.host_s + 2.0) for each in in_memory]
    assert STEP_TIME["blockwise"](beside, 1) == pytest.approx(
        85 + 20 + 4.5 - 20 * 4.5 / (104.2 + 4.5), abs=0.01
    )
    # The first block's update is waited for, and what the GPU has to do meanwhile hides it.
    assert STEP_TIME["blockwise"](layers, 1) == 40 + 2 + 0.25 + 0.25
    on_gpu = replace(layer, h2d_s=0.0, d2h_s=0.0, cpu_s=0.0)
    assert STEP_TIME["blockwise"]([on_gpu, *layers], 1) == 44
    of_short_blocks = [replace(on_gpu, gpu_s=2.0), *layers]
    assert STEP_TIME["blockwise"](of_short_blocks, 1) == 42 + 2 + 0.25 + 0.25 - 2


@given(layers=LAYERS, room=st.floats(0, 1), backward_share=st.floats(0, 1))
def test_less_room_for_gradients_makes_no_step_faster(
    layers: list[LayerTimes], room: float, backward_share: float
) -> None:
    layers = [replace(each, backward_s=backward_share * each.gpu_s) for each in layers]
    step_s, all_s = held_back_s(layers, room), STEP_TIME["blockwise"](layers, 1)
    assert held_back_s(layers, 1.0) == pytest.approx(all_s)
    assert all_s <= step_s * (1 + 1e-12)
    assert step_s <= min(serial_s(layers), held_back_s(layers, room / 2)) * (1 + 1e-12)


def test_backward_waits_for_room_where_the_cpu_decides() -> None:
    layer = LayerTimes(gpu_s=4.0, backward_s=3.0, h2d_s=0.0, d2h_s=0.0, cpu_s=4.0, host_s=0.0)
    # With room for a third, what the CPU is behind when backward ends has it, up to a half more than that.
    assert held_back_s([layer] * 9, 1 / 3) == STEP_TIME["blockwise"]([layer] * 9, 1)
    slow_cpu = [replace(layer, cpu_s=10.0)] * 9
    # The CPU stands in the whole forward pass, or for as long as it held backward back.
    # And in the last block's passes anyway.
    assert held_back_s(slow_cpu, 1 / 3) == 90 + 4 + 8
    assert held_back_s(slow_cpu, 2 / 3) == pytest.approx(90 + 4 + 3)


def test_streamed_fills_and_drains_once() -> None:
    layer = LayerTimes(gpu_s=2.0, backward_s=0.0, h2d_s=5.0, d2h_s=5.0, cpu_s=0.0, host_s=0.0)
    assert STEP_TIME["streamed"]([layer] * 10, 1) == 50 + CHUNK_SHARE * (2 + 5)
    resident = replace(layer, h2d_s=0.0, d2h_s=0.0)
    assert STEP_TIME["streamed"]([resident] * 10, 1) == 20


def test_a_disk_that_is_slower_than_all_is_the_step() -> None:
    layer = LayerTimes(gpu_s=2.0, backward_s=0.0, h2d_s=5.0, d2h_s=0.0, cpu_s=0.0, host_s=0.0, disk_s=9.0)
    assert STEP_TIME["streamed"]([layer] * 10, 1) == 90
    assert STEP_TIME["serial"]([layer] * 10, 1) == 160
    assert busy_s([layer] * 10)["disk"] == 90


def test_host_memory_limits_what_overlaps() -> None:
    layer = LayerTimes(gpu_s=1.0, backward_s=0.0, h2d_s=1.0, d2h_s=1.0, cpu_s=0.0, host_s=3.0)
    assert STEP_TIME["streamed"]([layer] * 10, 1) == 30


def test_log_softmax_reads_long_rows_again() -> None:
    """In fp32, three times; short ones and those of a compiled loss once, and those of a chunk otherwise."""
    short = replace(OPT_1B, vocabulary=8000)
    for shape, again in ((OPT_1B, 12), (short, 0)):
        logits = TRAINING.batch_size * TRAINING.seq_len * shape.vocabulary
        assert loss.moved_bytes(shape, TRAINING, compiled=False) == (42 + again) * logits
        assert loss.moved_bytes(shape, TRAINING, compiled=True) == 12 * logits
        assert loss.moved_bytes(shape, TRAINING, 512, compiled=False) == 88 * logits
