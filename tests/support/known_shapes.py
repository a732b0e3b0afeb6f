"""Shapes of known models and the H200 machine of the facts, by hand: no torch, no harness."""

from __future__ import annotations

from dataclasses import replace

from engines.shapes import MatrixShape, ModelShape
from profiles.machine import Cpu, Figure, Gpu, HostMemory, LinkFigures, Machine, absent


def opt(name: str, hidden: int, blocks: int, heads: int, *, tied: bool = True) -> ModelShape:
    """OPT: q, k, v and output of hidden x hidden, a feed-forward part of four times that, all with biases."""
    vocabulary, positions = 50272, 2050
    square = tuple(
        MatrixShape(name=f"self_attn.{part}.weight", rows=hidden, columns=hidden)
        for part in ("k_proj", "v_proj", "q_proj", "out_proj")
    )
    matrices = (
        *square,
        MatrixShape(name="fc1.weight", rows=4 * hidden, columns=hidden),
        MatrixShape(name="fc2.weight", rows=hidden, columns=4 * hidden),
    )
    biases_and_norms = 4 * hidden + 4 * hidden + hidden + 4 * hidden
    return ModelShape(
        name=name,
        family="opt",
        head="causal_lm",
        num_blocks=blocks,
        hidden=hidden,
        intermediate=4 * hidden,
        num_heads=heads,
        num_kv_heads=heads,
        vocabulary=vocabulary,
        max_seq_len=2048,
        gated_mlp=False,
        tied=tied,
        num_labels=0,
        block_parameters=12 * hidden * hidden + biases_and_norms,
        non_block_parameters=(1 if tied else 2) * vocabulary * hidden + positions * hidden + 2 * hidden,
        head_parameters=vocabulary * hidden,
        matrices=matrices,
        largest_tensor=vocabulary * hidden,
    )


def llama(
    name: str, hidden: int, intermediate: int, blocks: int, heads: int, vocabulary: int = 32256
) -> ModelShape:
    """LLaMA without grouped keys, embedding and head apart."""
    matrices = (
        *(
            MatrixShape(name=f"self_attn.{part}.weight", rows=hidden, columns=hidden)
            for part in ("q_proj", "k_proj", "v_proj", "o_proj")
        ),
        MatrixShape(name="mlp.gate_proj.weight", rows=intermediate, columns=hidden),
        MatrixShape(name="mlp.up_proj.weight", rows=intermediate, columns=hidden),
        MatrixShape(name="mlp.down_proj.weight", rows=hidden, columns=intermediate),
    )
    return ModelShape(
        name=name,
        family="llama",
        head="causal_lm",
        num_blocks=blocks,
        hidden=hidden,
        intermediate=intermediate,
        num_heads=heads,
        num_kv_heads=heads,
        vocabulary=vocabulary,
        max_seq_len=16384,
        gated_mlp=True,
        tied=False,
        num_labels=0,
        block_parameters=4 * hidden * hidden + 3 * hidden * intermediate + 2 * hidden,
        non_block_parameters=2 * vocabulary * hidden + hidden,
        head_parameters=vocabulary * hidden,
        matrices=matrices,
        largest_tensor=vocabulary * hidden,
    )


OPT_1B = opt("opt-1.3b", 2048, 24, 32)
OPT_13B = opt("opt-13b", 5120, 40, 40)
DEEPSEEK_1B = llama("deepseek-coder-1.3b", 2048, 5504, 24, 16)
DEEPSEEK_7B = llama("deepseek-coder-6.7b", 4096, 11008, 32, 32)
TINY = llama("tiny-llama", 64, 176, 4, 4, vocabulary=256)


def measured(value: float, spread: float = 0.02) -> Figure:
    return Figure(
        value=value,
        origin="measured",
        method="median of 10",
        time="2025-01-01T00:00:00Z",
        low=value * (1 - spread),
        high=value * (1 + spread),
        count=10,
    )


H200 = Machine(
    name="H200 SXM, 16 cores",
    time="2025-01-01T00:00:00Z",
    gpu=Gpu(
        name="NVIDIA H200",
        total_bytes=141_000_000_000,
        free_bytes=140_000_000_000,
        driver="570.0",
        compute_capability="9.0",
        num_gpus=1,
        copy_bytes_per_s=measured(4.1e12),
        matmul_bf16_flops=measured(755e12),
        matmul_fp16_flops=measured(755e12),
        matmul_fp32_flops=measured(50e12),
    ),
    gpu_absent_reason=None,
    link=LinkFigures(
        generation_max=5,
        generation_loaded=5,
        width_max=16,
        width_loaded=16,
        h2d_pinned_bytes_per_s=measured(55.4e9),
        d2h_pinned_bytes_per_s=measured(55.2e9),
        h2d_pageable_bytes_per_s=measured(12e9),
        d2h_pageable_bytes_per_s=measured(12e9),
        h2d_duplex_bytes_per_s=measured(50.4e9),
        d2h_duplex_bytes_per_s=measured(50.4e9),
    ),
    cpu=Cpu(
        name="16 cores with AVX-512",
        cores_usable=16,
        cores_basis="cgroup quota 16.0 of 16 cores",
        cores_total=16,
        threads=16,
        matmul_fp32_flops=measured(1.15e12),
        matmul_bf16_flops=measured(3.9e12),
        adam_elements_per_s=measured(4.3e9),
    ),
    memory=HostMemory(
        total_bytes=128 * 2**30,
        available_bytes=125 * 2**30,
        total_basis="cgroup limit",
        swap_bytes=0,
        copy_bytes_per_s=measured(74e9),
    ),
    platform="Linux",
    versions={"torch": "2.11.0"},
)

LAPTOP_CPU = Machine(
    name="2 cores, no GPU",
    time="2025-01-01T00:00:00Z",
    gpu=None,
    gpu_absent_reason="no NVIDIA driver",
    link=None,
    cpu=Cpu(
        name="2 cores",
        cores_usable=2,
        cores_basis="affinity",
        cores_total=2,
        threads=2,
        matmul_fp32_flops=measured(1e11),
        matmul_bf16_flops=absent("no bf16 instructions"),
        adam_elements_per_s=measured(3e8),
    ),
    memory=HostMemory(
        total_bytes=8 * 10**9,
        available_bytes=6 * 10**9,
        total_basis="machine",
        swap_bytes=0,
        copy_bytes_per_s=measured(10e9),
    ),
    platform="Linux",
    versions={},
)


def with_vram(machine: Machine, free_bytes: int) -> Machine:
    """The machine with so much GPU memory, all of it free."""
    assert machine.gpu is not None
    return replace(machine, gpu=replace(machine.gpu, total_bytes=free_bytes, free_bytes=free_bytes))
