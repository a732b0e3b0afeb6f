"""What it costs this CPU to start operations: those of a transformer one by one, with and without autograd,
the kernels of a CUDA graph, and one of Triton's; and what a product of middling size takes the GPU beside its
operations.

The transformer is real and tiny, so that a GPU is done with each operation before the next one is started and
the time is the CPU's: Python of the model library, of torch, and of the driver. A block counts as many
operations as the cost model counts for it.

Cores may run at two speeds (`profiles.probe.core_speed`), so operations are started in short windows, each
after another measurement and on another core, beside a plain Python loop; a window's quickest pass is one
sample of its figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engines.costs.transformer import GATED_LAUNCHES
from profiles.machine import NOT_PROBED, Figure, absent
from profiles.probe.core_speed import on_core, python_turn_s
from profiles.probe.timing import Action, Meter, figure, host_samples, one_line

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
NUM_MEASUREMENTS = 3
"""The first window, kernels of a graph, products."""
WINDOW_SHARE = {"forward_s": 0.08, "training_s": 0.12, "triton_s": 0.03}
"""Of the time for one measurement: ten windows together take what three measurements would."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launches:
    """Seconds of the CPU's for each operation, and for a turn of a Python loop; of a graph, those of the GPU
    for each of its kernels, and for each product beside its operations."""

    python_turn_s: Figure = NOT_PROBED
    forward_s: Figure = NOT_PROBED
    training_s: Figure = NOT_PROBED
    graph_s: Figure = NOT_PROBED
    triton_s: Figure = NOT_PROBED
    product_s: Figure = NOT_PROBED


class Windows:
    """Short windows in which operations are started, on another core each."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._timed: dict[str, Callable[[float], Figure]] = {}
        self._samples: dict[str, list[float]] = {}
        self._methods: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self._visits = 0

    def begin(self, seconds: float) -> Figure:
        """Makes what is started, and takes the first window; `seconds` is the time for one measurement. The
        turns of the loop in it."""
        self._seconds = seconds
        for name, make in _TIMED.items():
            try:
                self._timed[name] = make(DEVICE)
                # First calls import and allocate, and autograd's thread is not to stay on a window's core.
                self._timed[name](0.0)
            except Exception as error:
                self._reasons[name] = one_line(error)
        self.take()
        return self._figure("python_turn_s")

    def take(self) -> None:
        """One window."""
        with on_core(self._visits):
            self._keep("python_turn_s", python_turn_s(), "a turn of a loop of plain Python")
            for name, timed in self._timed.items():
                try:
                    found = timed(WINDOW_SHARE[name] * self._seconds)
                    self._keep(name, found.low or 0.0, found.method)
                except Exception as error:
                    self._reasons.setdefault(name, one_line(error))
        self._visits += 1

    def launches(self, **others: Figure) -> Launches:
        """What all windows found, beside `others`."""
        names = ("python_turn_s", *_TIMED)
        return Launches(**{name: self._figure(name) for name in names}, **others)

    def _keep(self, name: str, sample_s: float, method: str) -> None:
        self._samples.setdefault(name, []).append(sample_s)
        self._methods[name] = method

    def _figure(self, name: str) -> Figure:
        samples = self._samples.get(name)
        if not samples:
            return absent(self._reasons.get(name, "no window was taken"))
        return figure(
            samples, f"{self._methods[name]}, the quickest of each window, on one core after another"
        )


def probe_graphs(meter: Meter, product_flops: Figure) -> dict[str, Figure]:
    """Of `Launches`, what does not depend on the CPU. `product_flops` is the rate of a large bf16 product in
    bursts, which these are too."""
    return {
        "graph_s": meter.measure(
            "starting kernels of a CUDA graph", lambda seconds: graph_s(seconds, DEVICE), absent
        ),
        "product_s": meter.measure(
            "products of middling size",
            lambda seconds: product_s(seconds, DEVICE, product_flops.value),
            absent,
        ),
    }


def forward_s(seconds: float, device: str) -> Figure:
    """Seconds for each operation of a forward pass without autograd."""
    return _forward(device)(seconds)


def training_s(seconds: float, device: str) -> Figure:
    """The same of forward and backward passes; a backward pass counts as two forward."""
    return _training(device)(seconds)


def _forward(device: str) -> Callable[[float], Figure]:
    import torch

    model, tokens = _model(device)

    def action() -> None:
        with torch.no_grad():
            model(tokens, use_cache=False)

    what = "forward passes, no autograd"
    return lambda seconds: _per_operation(action, seconds, device, GATED_LAUNCHES * BLOCKS, what)


def _training(device: str) -> Callable[[float], Figure]:
    import torch

    model, tokens = _model(device)
    gradient = torch.ones(1, TOKENS, HIDDEN, dtype=torch.float32, device=device)

    def action() -> None:
        model.zero_grad(set_to_none=True)
        found = model(tokens, use_cache=False).last_hidden_state
        found.backward(gradient)

    count = 3 * GATED_LAUNCHES * BLOCKS
    return lambda seconds: _per_operation(action, seconds, device, count, "forward and backward passes")


def _triton(device: str) -> Callable[[float], Figure]:
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

    def timed(seconds: float) -> Figure:
        samples = host_samples(action, seconds)
        return figure([each / TRITON_LAUNCHES for each in samples], "kernel[grid](...) of a Triton kernel")

    return timed


_TIMED: dict[str, Callable[[str], Callable[[float], Figure]]] = {
    "forward_s": _forward, "training_s": _training, "triton_s": _triton,
}  # fmt: skip
"""Field of `Launches` -> what makes the measurement of a window on a device."""


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
