"""What it costs this CPU to start operations: those of a transformer one by one, with and without autograd,
the kernels of a CUDA graph, and one of Triton's; and what a product of middling size takes the GPU beside its
operations.

The transformer is real and tiny, so that a GPU is done with each operation before the next one is started and
the time is the CPU's: Python of the model library, of torch, and of the driver. A block counts as many
operations as the cost model counts for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engines.costs.transformer import GATED_LAUNCHES
from profiles.machine import NOT_PROBED, Figure, absent
from profiles.probe.timing import Action, Meter, figure, host_samples

DEVICE = "cuda"

BLOCKS = 8
"""Of the tiny model; what it computes beside them counts for less than a twentieth."""
HIDDEN = 64
TOKENS = 16
KERNELS = 400
"""Of the captured graph, each waiting for the one before."""
TRITON_LAUNCHES = 50
"""Started in a row, as one sample."""
PRODUCTS = 40
"""Of each size, as a graph: starting them takes no time then."""
PRODUCT_SHAPES = ((1024, 1024, 1024), (2048, 1024, 1024), (2048, 2048, 2048))
"""Rows, columns and inner dimension, as in blocks of 0.3 to 1.3 billion parameters."""
NUM_MEASUREMENTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Launches:
    """Seconds of the CPU's for each operation; of a graph, those of the GPU for each of its kernels, and for
    each product beside its operations."""

    forward_s: Figure = NOT_PROBED
    training_s: Figure = NOT_PROBED
    graph_s: Figure = NOT_PROBED
    triton_s: Figure = NOT_PROBED
    product_s: Figure = NOT_PROBED


def probe_launches(meter: Meter, product_flops: Figure) -> Launches:
    """`product_flops` is the rate of a large bf16 product in bursts, which these are too."""
    return Launches(
        forward_s=_measured(meter, "operations without autograd", forward_s),
        training_s=_measured(meter, "operations with autograd", training_s),
        graph_s=_measured(meter, "kernels of a CUDA graph", graph_s),
        triton_s=_measured(meter, "Triton kernels", triton_s),
        product_s=meter.measure(
            "products of middling size",
            lambda seconds: product_s(seconds, DEVICE, product_flops.value),
            absent,
        ),
    )


def _measured(meter: Meter, what: str, take: Callable[[float, str], Figure]) -> Figure:
    return meter.measure(f"starting {what}", lambda seconds: take(seconds, DEVICE), absent)


def forward_s(seconds: float, device: str) -> Figure:
    """Seconds for each operation of a forward pass without autograd."""
    import torch

    model, tokens = _model(device)

    def action() -> None:
        with torch.no_grad():
            model(tokens, use_cache=False)

    return _per_operation(action, seconds, device, GATED_LAUNCHES * BLOCKS, "forward passes, no autograd")


def training_s(seconds: float, device: str) -> Figure:
    """Seconds for each operation of forward and backward passes; a backward pass counts as two forward."""
    import torch

    model, tokens = _model(device)
    gradient = torch.ones(1, TOKENS, HIDDEN, dtype=torch.float32, device=device)

    def action() -> None:
        model.zero_grad(set_to_none=True)
        found = model(tokens, use_cache=False).last_hidden_state
        found.backward(gradient)

    count = 3 * GATED_LAUNCHES * BLOCKS
    return _per_operation(action, seconds, device, count, "forward and backward passes")


def graph_s(seconds: float, device: str) -> Figure:
    """Seconds for each kernel that one CUDA graph starts, the start of the graph included."""
    import torch

    _need_cuda(device)
    cuda: Any = torch.cuda
    values = torch.ones(HIDDEN, device=device)
    values.add_(1.0)  # what is captured has run once
    cuda.synchronize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        for _ in range(KERNELS):
            values.add_(1.0)
    samples = host_samples(lambda: (graph.replay(), cuda.synchronize()), seconds)
    return figure([each / KERNELS for each in samples], f"a CUDA graph of {KERNELS} kernels")


def product_s(seconds: float, device: str, flops: float | None) -> Figure:
    """Seconds that a bf16 product takes longer than its operations at `flops`: filling and draining the GPU,
    and tiles that leave a part of it idle. The mean over `PRODUCT_SHAPES`."""
    import torch

    _need_cuda(device)
    if flops is None:
        raise ValueError("the rate of a large product was not measured")
    cuda: Any = torch.cuda
    longer = []
    for rows, columns, inner in PRODUCT_SHAPES:
        left = torch.randn(rows, inner, device=device).bfloat16()
        right = torch.randn(inner, columns, device=device).bfloat16()
        out = torch.empty(rows, columns, device=device, dtype=torch.bfloat16)
        torch.mm(left, right, out=out)  # what is captured has run once
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            for _ in range(PRODUCTS):
                torch.mm(left, right, out=out)

        def action(graph: Any = graph) -> None:
            graph.replay()
            cuda.synchronize()

        samples = host_samples(action, seconds / len(PRODUCT_SHAPES))
        least_s = 2.0 * rows * columns * inner / flops
        longer.append([max(0.0, each / PRODUCTS - least_s) for each in samples])
        del graph
    means = [sum(each) / len(each) for each in zip(*longer, strict=False)]
    return figure(means, f"torch.mm of {len(PRODUCT_SHAPES)} sizes up to 2048 in graphs of {PRODUCTS}")


def triton_s(seconds: float, device: str) -> Figure:
    """Seconds that one launch of a compiled Triton kernel by Triton's own Python takes."""
    import torch

    _need_cuda(device)
    from profiles.probe.triton_kernel import add_one

    cuda: Any = torch.cuda
    values = torch.ones(HIDDEN, device=device)

    def action() -> None:
        for _ in range(TRITON_LAUNCHES):
            add_one[(1,)](values, HIDDEN)
        cuda.synchronize()

    samples = host_samples(action, seconds)
    return figure([each / TRITON_LAUNCHES for each in samples], "kernel[grid](...) of a Triton kernel")


def _need_cuda(device: str) -> None:
    if not device.startswith("cuda"):
        raise ValueError(f"there is no such thing on device '{device}'")


def _per_operation(action: Action, seconds: float, device: str, count: int, what: str) -> Figure:
    import torch

    if device.startswith("cuda"):

        def waited() -> None:
            action()
            torch.cuda.synchronize()

        samples = host_samples(waited, seconds)
    else:
        samples = host_samples(action, seconds)
    # The longer half are those in which Python cleaned up, or another process had the core: on a shared host
    # they are up to three times as long.
    shortest = sorted(samples)[: -(-len(samples) // 2)]
    method = f"{what} of a {BLOCKS}-block Llama of {HIDDEN} features, {GATED_LAUNCHES} operations a block"
    return figure([each / count for each in shortest], method)


def _model(device: str) -> tuple[Any, Any]:
    """A tiny Llama on the device with random weights, and tokens for it."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=HIDDEN,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    tokens = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    return LlamaModel(config).to(device), tokens
