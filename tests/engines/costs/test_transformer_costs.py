"""What a block of a transformer is counted as, held against transformers' own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from family_configs import config_of
from known_shapes import DEEPSEEK_1B, H200, OPT_1B
from torch.utils.flop_counter import FlopCounterMode

from engines.costs.memory.activations import saved_activation_bytes
from engines.costs.memory.segments import lost_between_matrices
from engines.costs.table import traffic
from engines.costs.transformer import (
    BlockPasses,
    attention_longer_flops,
    block_forward_flops,
    expert_read_bytes,
    num_biases,
    num_tensors,
)
from engines.model.blocks import find_blocks
from engines.settings.parse import parse_settings
from engines.shapes import ModelShape, Workload
from harness.models.auto_classes import auto_class
from harness.models.configs import NAMED_SHAPES, named_shape
from harness.models.counted_shape import shape_from_meta
from harness.models.meta import build_on_meta, configuration
from harness.records.job import ModelSource
from profiles.planning.predict import predict

WORKLOAD = Workload(batch_size=2, seq_len=1024, dtype="bf16")
SCORES = 4.0 * 1024 * 2048 * 2 * 1024
"""Operations of attention in one pass through a block of either shape: two sequences, hidden 2,048."""


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-llama", "tiny-qwen2", "tiny-gpt2", "tiny-roberta"])
def test_the_tensors_of_a_block_are_those_of_the_model(name: str) -> None:
    shape = named_shape(name)
    source = ModelSource(name=name, random_weights=True)
    config = configuration(NAMED_SHAPES[name].config, source, shape.head, shape.num_labels, False)
    _, blocks = find_blocks(build_on_meta(config, shape.head))
    named = dict(blocks[0].named_parameters())
    matrices = [path for path, tensor in named.items() if tensor.dim() == 2]
    assert num_tensors(shape) == len(named)
    assert num_biases(shape) == sum(path.replace("weight", "bias") in named for path in matrices)


@pytest.mark.parametrize(
    ("name", "share"), [("opt-1.3b", 8 / 96), ("gpt2-large", 0.102), ("opt-350m", 0.007), ("opt-6.7b", 0.0)]
)
def test_segments_of_the_allocator_lose_what_their_last_tensor_leaves(name: str, share: float) -> None:
    """In bf16 two of OPT-1.3B's matrices of 8 MiB fill 16 of 20 MiB, its wide ones of 32 MiB all of it."""
    shape = named_shape(name)
    matrices = 2 * shape.num_blocks * sum(each.parameters for each in shape.matrices)
    assert lost_between_matrices(shape, "bf16") / matrices == pytest.approx(share, abs=6e-4)


@pytest.mark.parametrize(("chunk", "lost_mib"), [("all", 0), ("256", 0), ("384", 3 * 36), ("1024", 3 * 70)])
def test_places_of_logits_lose_what_wide_states_leave(chunk: str, lost_mib: int) -> None:
    """Wide states of 76 MiB in places of 76, 112 and 298 MiB. A replay by the allocator's rules needs 0, 113
    and 228 MB more than with chunks of 64, whose places hold none."""
    shape = named_shape("qwen2.5-0.5b")
    job = Workload(batch_size=8, seq_len=1024, dtype="bf16", checkpointing=True)
    least = {"graphs": "false", "loss_tokens": "64"}
    without = traffic("lora", shape, job, parse_settings("lora", least))
    cost = traffic("lora", shape, job, parse_settings("lora", least | {"loss_tokens": chunk}))
    assert cost.gpu_apart_bytes - without.gpu_apart_bytes == lost_mib << 20


@pytest.mark.parametrize(
    ("model", "tokens", "recomputed", "share"),
    [
        ("deepseek-coder-1.3b", 4096, 0, 1.0),
        ("deepseek-coder-1.3b", 4096, 6, 0.75),
        ("deepseek-coder-1.3b", 1024, 0, 0.0),  # hidden states of 4 MiB share segments
        ("opt-13b", 1280, 0, 0.0),  # a block keeps less than its gradients take
    ],
)
def test_gradients_lie_where_kept_activations_were(
    model: str, tokens: int, recomputed: int, share: float
) -> None:
    shape = named_shape(model)
    job = Workload(batch_size=1, seq_len=tokens, dtype="bf16", checkpointing=True)
    given = {"graphs": "false", "checkpointed_blocks": str(recomputed)}
    lost = lost_between_matrices(shape, "bf16")
    apart = traffic("native", shape, job, parse_settings("native", given)).gpu_apart_bytes
    assert apart == pytest.approx((4 - share) * lost, abs=2 * shape.num_blocks)


@pytest.mark.parametrize(("batch", "stays"), [(8, True), (2, False)])
def test_hidden_states_with_segments_of_their_own_keep_what_lies_apart_of_logits(
    batch: int, stays: bool
) -> None:
    shape = named_shape("opt-350m")
    job = Workload(batch_size=batch, seq_len=2048, dtype="bf16", checkpointing=True)
    cost = traffic("lsp", shape, job, parse_settings("lsp", {"weights": "streamed", "d": "128"}))
    assert cost.gpu_apart_bytes > 0
    assert cost.gpu_returned_bytes == (0 if stays else cost.gpu_apart_bytes)


@pytest.mark.parametrize(("tokens", "lost"), [(512, 151_936 * 2 * 384), (128, 151_936 * 2 * 128), (1024, 0)])
def test_a_head_gradient_on_its_way_to_the_host_loses_what_logits_leave_of_its_place(
    tokens: int, lost: int
) -> None:
    shape = named_shape("qwen2.5-0.5b")
    job = Workload(batch_size=1, seq_len=tokens, dtype="bf16", checkpointing=True)
    given = {"weights": "streamed", "hidden_states": "host"}
    there = traffic("exact-offload", shape, job, parse_settings("exact-offload", given | {"outer": "host"}))
    assert there.gpu_apart_bytes - there.gpu_returned_bytes == lost
    here = traffic("exact-offload", shape, job, parse_settings("exact-offload", given | {"outer": "gpu"}))
    assert here.gpu_apart_bytes == here.gpu_returned_bytes


def test_an_optimizer_in_the_backward_pass_has_three_gradients_of_a_tied_embedding() -> None:
    shape = named_shape("qwen2.5-0.5b")
    job = Workload(batch_size=8, seq_len=512, dtype="bf16", checkpointing=True)
    given = {"loss_tokens": "256", "checkpointed_blocks": "24"}
    settings = parse_settings("backward-optimizer", given)
    kinds = traffic("backward-optimizer", shape, job, settings).gpu_memory_bytes
    assert kinds["gradients"] + kinds["scratch"] == 3 * 2 * 151_936 * 896


def test_captured_and_eager_steps_have_no_places_of_logits_to_share() -> None:
    shape = named_shape("qwen2.5-0.5b")
    job = Workload(batch_size=8, seq_len=1024, dtype="bf16", checkpointing=True)
    for how in ({"graphs": "true"}, {"graphs": "false", "compile": "false"}):
        chunks = [
            traffic("lora", shape, job, parse_settings("lora", how | {"loss_tokens": chunk})).gpu_apart_bytes
            for chunk in ("64", "384")
        ]
        assert chunks[0] == chunks[1]


def test_a_loss_in_chunks_leaves_the_first_block_that_runs_again_as_the_peak() -> None:
    """The inputs of all blocks are there, and what one block keeps, with gradients of its wide states."""
    shape = named_shape("qwen2.5-0.5b")
    job = Workload(batch_size=8, seq_len=1024, dtype="bf16", checkpointing=True)
    given = {"graphs": "false", "loss_tokens": "256"}
    kinds = traffic("lora", shape, job, parse_settings("lora", given)).gpu_memory_bytes
    inputs = 24 * 8192 * 896 * 2
    assert kinds["logits"] == 0
    assert kinds["activations"] > inputs + 2 * 8192 * 4864 * 2
    assert traffic("lora", shape, job, parse_settings("lora", {})).gpu_memory_bytes["logits"] > 0


def causal_share(shape: ModelShape, forwards: float, backwards: float) -> float:
    return attention_longer_flops(shape, WORKLOAD, forwards, backwards) / SCORES


def test_attention_takes_longer_than_products_where_heads_are_narrow() -> None:
    """By hand: half of the scores of a causal model at 0.4 (with heads of 128, 0.5) of a product's rate, and
    2.5 times that backward where 2 are counted."""
    assert causal_share(OPT_1B, 1, 0) == pytest.approx(0.5 / 0.4 - 1)
    assert causal_share(OPT_1B, 0, 1) == pytest.approx(2.5 * 0.5 / 0.4 - 2)
    assert causal_share(DEEPSEEK_1B, 1, 0) == pytest.approx(0)
    assert causal_share(DEEPSEEK_1B, 0, 1) == pytest.approx(0.5)


def test_an_encoder_leaves_no_score_out() -> None:
    encoder = replace(OPT_1B, family="roberta", head="classification")
    assert causal_share(encoder, 1, 0) == pytest.approx(1 / 0.4 - 1)
    assert causal_share(encoder, 1, 1) > 4 * causal_share(OPT_1B, 1, 1)


def test_that_is_said_of_hopper_gpus_alone() -> None:
    cost = traffic("native", OPT_1B, WORKLOAD, parse_settings("native", {"checkpointed_blocks": "0"}))
    plain = replace(cost, layers=tuple(each._replace(attention_longer_flops=0.0) for each in cost.layers))
    assert H200.gpu is not None
    hopper = replace(H200, gpu=replace(H200.gpu, compute_capability="9.0"))
    ampere = replace(H200, gpu=replace(H200.gpu, compute_capability="8.0"))
    longer, same = ([predict(each, m, WORKLOAD).step_s for each in (cost, plain)] for m in (hopper, ampere))
    assert longer[0] is not None
    assert longer[1] is not None
    assert longer[0] > longer[1]
    assert same[0] == same[1]


MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3")


@pytest.mark.parametrize("family", MIXTURES)
def test_of_a_mixture_the_experts_that_a_token_goes_through_are_counted(family: str) -> None:
    """Against torch's count of the block's products; it leaves out the scores, which depend on the kernel."""
    values, workload = config_of(family), Workload(batch_size=2, seq_len=32, dtype="fp32")
    shape = shape_from_meta(values, name="tiny", head="causal_lm", num_labels=0)
    source = ModelSource(name="tiny", random_weights=True)
    config = configuration(values, source, "causal_lm", 0, False)
    model = auto_class("causal_lm").from_config(config, dtype=torch.float32)
    model.set_experts_implementation("eager")
    _, blocks = find_blocks(model)
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, shape.vocabulary, (2, 32)))
    products = [torch.ops.aten.mm, torch.ops.aten.addmm]
    counted = counter.get_flop_counts()[f"{type(model).__name__}.model.layers.{len(blocks) - 1}"]
    scores = 4.0 * workload.seq_len * shape.hidden * workload.tokens_per_step
    assert shape.num_experts > shape.experts_per_token > 0
    assert block_forward_flops(shape, workload) - scores == pytest.approx(
        sum(counted.get(each, 0) for each in products), rel=0.02
    )


def test_adapters_of_a_mixture_do_not_outrun_the_reading_of_its_experts() -> None:
    """Mixtral's size: 87 GiB of experts, of which 512 tokens reach all, once forward and once back."""
    values = {"model_type": "mixtral", "vocab_size": 32000}
    shape = shape_from_meta(values, name="mixtral", head="causal_lm", num_labels=0)
    workload = Workload(batch_size=1, seq_len=512, dtype="bf16")
    experts = 2 * shape.num_blocks * expert_read_bytes(shape, workload)
    assert experts == pytest.approx(2 * 2 * shape.num_blocks * shape.expert_parameters)
    assert H200.gpu is not None
    assert H200.gpu.copy_bytes_per_s.value is not None
    plan = predict(traffic("lora", shape, workload, parse_settings("lora", {})), H200, workload)
    assert plan.step_s is not None
    assert plan.step_s > experts / H200.gpu.copy_bytes_per_s.value


def test_layers_that_share_their_weights_are_counted_as_often_as_they_are_called() -> None:
    values = {**config_of("albert"), "num_hidden_layers": 6, "num_hidden_groups": 1}
    shape = shape_from_meta(values, name="tiny", head="classification", num_labels=2)
    workload = Workload(batch_size=2, seq_len=32, dtype="fp32")
    config = configuration(values, ModelSource(name="tiny", random_weights=True), "classification", 2, False)
    model = auto_class("classification").from_config(config, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, shape.vocabulary, (2, 32)))
    counted = counter.get_flop_counts()[f"{type(model).__name__}.albert.encoder.albert_layer_groups.0"]
    scores = 6 * 4.0 * workload.seq_len * shape.hidden * workload.tokens_per_step
    assert (shape.num_blocks, shape.calls_of_a_block) == (1, 6)
    assert block_forward_flops(shape, workload) - scores == counted[torch.ops.aten.addmm]
    eager = BlockPasses.eager(shape, workload)
    assert saved_activation_bytes(shape, workload, eager) == 6 * saved_activation_bytes(
        replace(shape, calls_of_a_block=1), workload, eager
    )
