"""What a method asks of a machine: by layer for one step, and in memory by kind. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple, TypedDict

Overlap = Literal[
    "serial", "gathered", "uploaded_when_called", "optimizer_after_backward", "streamed", "layerwise",
    "blockwise", "blockwise_after_norm",
]  # fmt: skip
"""How a method's use of the resources overlaps in a step; `overlap` beside this module has their times."""

FUSED_ADAM_BYTES = 28
"""Host memory traffic per element of torch's fused AdamW in fp32, by which machines are probed. Ours counts
at the same bytes per second, beside copies and threads that start kernels: 0.84 of that time in the record of
deepseek-coder of 29 November (reports/results), where nothing else used the host's memory."""


ADAMW_KERNEL_BYTES = 26
"""The same of this program's AdamW on 16-bit weights with fp32 moments, by which machines are probed too: the
gradient read, weight, low half of its master and moments read and written."""

SPARE_THREADS = 2
"""CPU threads that Adam leaves to those that start kernels. One starts them, one runs backward."""

SWITCH_INTERVAL_S = 1e-4
"""After which a thread that waits for the interpreter's lock gets it from one that runs, where chunks are
updated beside threads that start kernels. The CPU's wants it back after each chunk: with Python's 5 ms an
update of `lsp` at 1.3B, bf16 moments, took 42 ms on an H200's host, with this 32. So long it stands still
between two chunks, by the prediction: 0.06 to 0.13 ms were left of each in eight runs of two H200s' hosts."""


class LayerTraffic(NamedTuple):
    """What one layer asks of each resource in one step. `embedding` and `head` count as layers.

    A named tuple: a plan makes tens of thousands of layers, most with `_replace`, and a frozen dataclass
    takes six times as long for each.
    """

    name: str
    gpu_forward_flops: float = 0.0
    gpu_backward_flops: float = 0.0
    """Backward pass including the recomputation under checkpointing."""
    off_grid_flops: float = 0.0
    """Of both passes, those of 16-bit products whose rows begin where 16 bytes cannot be read at once."""
    attention_longer_flops: float = 0.0
    """What attention's kernels take longer on a Hopper GPU than what is counted for them, as operations at
    the rate of a product."""
    gpu_bytes: float = 0.0
    """GPU memory traffic beside the matrix products: perturbation, optimizer, projection."""
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    cpu_adam_elements: int = 0
    """Elements that the fused Adam on the CPU updates."""
    cpu_chunks: int = 0
    """Chunks that it updates them in, one after the other, beside threads that start kernels."""
    host_bytes: float = 0.0
    """Host memory traffic of the copies and of the CPU update."""
    update_bytes: float = 0.0
    """Of that, what the CPU's updates move, and copies of what they read and write."""
    disk_bytes: int = 0
    """Read from disk, by all ranks of a machine together."""
    disk_write_bytes: int = 0
    launches: int = 0
    """Operations that eager PyTorch starts one by one from the CPU."""
    python_launches: int = 0
    """What an engine's own Python takes beside, which autograd has no part in, in operations without it."""
    gathering_s: float = 0.0
    """What the CPU does beside that where GPUs divide weights, on an H200's host."""
    waited_launches: int = 0
    """Such Python where the CPU waits for the GPU after each, which then waits for the CPU."""
    products: int = 0
    """Matrix products, one after the other on the GPU."""
    kernels: int = 0
    """Kernels of CUDA graphs and of compiled blocks, products apart."""
    unrated_s: float = 0.0
    """Of the GPU's kernels that neither memory nor products decide, on an H200."""
    triton_launches: int = 0
    """Triton kernels that engines start from the CPU."""
    gaussians: int = 0
    """Normally distributed numbers drawn on the GPU, for perturbations."""
    from_gpu_bytes: int = 0
    """What comes from the memory of the machine's other GPUs."""
    gathered_bytes: int = 0
    """Where several GPUs divide the weights: of these and of their gradients, what each has to have whole."""
    update_gpu_bytes: float = 0.0
    """Of `gpu_bytes`, those of an optimizer that begins when both passes have been started and ends before
    the next step is; where GPUs divide the weights they divide them too."""

    def named(self, name: str) -> LayerTraffic:
        """The same of another layer, in a third of the time of `_replace`, which goes through all fields."""
        return LayerTraffic._make((name, *self[1:]))


def by_kind(
    layers: Iterable[LayerTraffic], change: Callable[..., LayerTraffic], *parts: Iterable[Hashable]
) -> list[LayerTraffic]:
    """`change` of each layer and its item of each of `parts`, as `map` has it, but made once of layers that
    differ in their names alone, as most blocks of a model do."""
    made: dict[Hashable, LayerTraffic] = {}
    found = []
    for layer, *its in zip(layers, *parts, strict=True):
        kind = (layer[1:], *its)
        if kind not in made:
            made[kind] = change(layer, *its)
        found.append(made[kind].named(layer.name))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class DividedWeights:
    """How several GPUs of a machine divide what one has: each holds a part of every weight."""

    kinds: tuple[str, ...]
    """Of `gpu_memory_bytes`."""
    whole_bytes: int
    """Weights and gradients that each has whole for a time."""
    cpu_s: float
    """What it takes the CPU to bring a layer's parts together and to divide its gradients, in a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RareWork:
    """What one step in so many does beside what every step does, the first step among them."""

    every_steps: int
    gpu_s: float
    """Time of it on an H200; half or twice of that elsewhere is no surprise."""


class GpuMemory(TypedDict):
    """The fields of `Traffic` that say what of the GPU's memory torch reserves."""

    gpu_memory_bytes: Mapping[str, int]
    gpu_apart_bytes: int
    gpu_pool_bytes: int
    gpu_returned_bytes: int
    gpu_without_triton_bytes: int
    gpu_margin: float
    workspaces: int


class TrainingMemory(GpuMemory):
    """The same of methods whose gradients lie among activations."""

    gpu_between_gradients_bytes: int
    gpu_small_bytes: int


FREE_SHARE = 0.10
"""Of the GPU, what plans leave free of their own accord where nothing says how far a method's memory is from
its prediction."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a method asks of the machine: per step by layer, and in memory by kind (bytes). Without slots, so
    that sums over the layers are made once: a plan asks for them thousands of times."""

    layers: tuple[LayerTraffic, ...]
    gpu_memory_bytes: Mapping[str, int]
    """By kind: weights, gradients, optimizer, activations, logits, buffers, ..."""
    host_memory_bytes: Mapping[str, int]
    """By kind; what is pinned is also counted in `pinned_bytes`."""
    pinned_bytes: int = 0
    shared_host_bytes: Mapping[str, int] = field(default_factory=dict)
    """Of `host_memory_bytes` what ranks of one machine have once, and what that takes then."""
    divided: Literal["write-back", "updates", "reads"] = "write-back"
    """What of their work on the host they divide: what is written there and read from disk; Adam's updates,
    for which each brings down all that one process does; or only what is read from disk."""
    gpu_apart_bytes: int = 0
    """What torch's allocator takes beside the tensors' peak, since what is there at other moments has other
    sizes, or lies in the pool of a CUDA graph, and cannot use the same places."""
    gpu_pool_bytes: int = 0
    """The same with expandable segments, which have no sizes: what lies in the pool of a CUDA graph while the
    peak is elsewhere, or of another stream."""
    gpu_between_gradients_bytes: int = 0
    """With expandable segments, what lies free between gradients at the most, in pieces that are smaller than
    a page."""
    gpu_small_bytes: int = 0
    """With expandable segments, what lies free at the peak in the range of small tensors: activations of
    before. It is given back before memory runs out."""
    gpu_returned_bytes: int = 0
    """Of `gpu_apart_bytes`, what torch gives back before memory runs out: places that nothing uses any more,
    outside of graphs. A run that has less memory does without them."""
    gpu_margin: float = 0.06
    """Share by which what is needed may be more than is predicted; a plan that fits has it left."""
    gpu_spare: float = FREE_SHARE
    """Share of the GPU that plans leave free of their own accord, beyond what is needed: by as much more than
    its prediction jobs of the method that nobody had looked at have needed."""
    gpu_without_triton_bytes: int = 0
    """By how much the peak is larger where there is no Triton."""
    divided_weights: DividedWeights | None = None
    """`None`: every GPU has all of its own."""
    workspaces: int = 1
    """Workspaces of products: one for each stream of each thread that starts them. A backward pass has a
    thread of its own, a captured pass a stream."""
    reduced_bytes: int = 0
    """Of a step's compressed gradients, and of others, what one machine sends to each other one that it takes
    the step with."""
    shards_uploads: bool = False
    """Each of them brings up its share of what goes up, and has the others' from their GPUs."""
    gpu_held_bytes: int = 0
    """What the method takes of the GPU beside what torch reserves and CUDA's context: CUDA graphs."""
    overlap: Overlap = "serial"
    gradient_room: float = 1.0
    """Where updates overlap block by block: the share of the blocks whose gradients may wait for the CPU on
    the host at once."""
    cpu_adam_factor: float = 1.0
    """Time per element of the CPU's Adam over that of torch's fused AdamW in fp32."""
    cpu_adam_slowdown: float = 1.0
    """What of that is no memory traffic: arithmetic, and waiting for threads that need the same memory. A
    factor."""
    cpu_adamw_kernel_factor: float | None = None
    """The same over this program's compiled AdamW on bf16 weights, fp32 moments; `None`: code of others
    runs."""
    is_adamw_kernel: bool = False
    """It is that AdamW itself, and no other compiled pass."""
    forwards: float = 1.0
    """Forward passes that each micro-batch takes, a part of the blocks being a part of a pass."""
    rare: RareWork | None = None
    """`None`: all steps do the same."""

    def of_a_rank(self, local_ranks: int) -> Traffic:
        """What one of several ranks of a machine asks for: its part of the memory that they share, and of
        what they do there together."""
        if local_ranks > 1 and self.divided_weights is not None:
            return self._with_a_part(self.divided_weights, local_ranks)
        if local_ranks == 1 or not self.shared_host_bytes:
            return self
        parts = {name: -(-each // local_ranks) for name, each in self.shared_host_bytes.items()}
        less = sum(self.host_memory_bytes[name] - part for name, part in parts.items() if _is_pinned(name))
        layers = by_kind(self.layers, lambda layer: self._layer_of_a_rank(layer, local_ranks))
        return replace(
            self,
            layers=tuple(layers),
            host_memory_bytes={**self.host_memory_bytes, **parts},
            pinned_bytes=self.pinned_bytes - less,
        )

    def _with_a_part(self, weights: DividedWeights, local_ranks: int) -> Traffic:
        layers = [
            layer._replace(
                gpu_bytes=layer.gpu_bytes - layer.update_gpu_bytes * (1 - 1 / local_ranks),
                update_gpu_bytes=layer.update_gpu_bytes / local_ranks,
                from_gpu_bytes=layer.gathered_bytes * (local_ranks - 1) // local_ranks,
                gathering_s=weights.cpu_s if layer.gathered_bytes else 0.0,
            )
            for layer in self.layers
        ]
        memory = {
            kind: -(-size // local_ranks) if kind in weights.kinds else size
            for kind, size in self.gpu_memory_bytes.items()
        }
        memory["whole for a time"] = weights.whole_bytes
        return replace(
            self, layers=tuple(layers), gpu_memory_bytes=memory, gpu_spare=FREE_SHARE, overlap="gathered"
        )

    def _layer_of_a_rank(self, layer: LayerTraffic, local_ranks: int) -> LayerTraffic:
        if self.divided == "updates":
            copies = layer.h2d_bytes + layer.d2h_bytes
            # Of a chunk its owner reads the gradients of all.
            more = layer.d2h_bytes * (1 - 1 / local_ranks) if layer.cpu_adam_elements else 0.0
            return layer._replace(
                cpu_adam_elements=-(-layer.cpu_adam_elements // local_ranks),
                cpu_chunks=-(-layer.cpu_chunks // local_ranks),
                host_bytes=copies + (layer.host_bytes - copies) / local_ranks + more,
                update_bytes=layer.update_bytes / local_ranks + more,
            )
        up, down = layer.h2d_bytes, layer.d2h_bytes
        if self.divided == "write-back":
            down //= local_ranks
        # What is read from disk stays the machine's, as the disk's rate does; each rank reads its part.
        read_by_others = layer.disk_bytes * (1 - 1 / local_ranks)
        if self.shards_uploads:
            up //= local_ranks
        return layer._replace(
            h2d_bytes=up,
            d2h_bytes=down,
            host_bytes=layer.host_bytes - layer.h2d_bytes - layer.d2h_bytes + up + down - read_by_others,
            from_gpu_bytes=layer.h2d_bytes - up,
        )

    @cached_property
    def gpu_flops(self) -> float:
        return sum(layer.gpu_forward_flops + layer.gpu_backward_flops for layer in self.layers)

    @cached_property
    def gpu_bytes(self) -> float:
        return sum(layer.gpu_bytes for layer in self.layers)

    @cached_property
    def h2d_bytes(self) -> int:
        return sum(layer.h2d_bytes for layer in self.layers)

    @cached_property
    def d2h_bytes(self) -> int:
        return sum(layer.d2h_bytes for layer in self.layers)

    @cached_property
    def from_gpu_bytes(self) -> int:
        return sum(layer.from_gpu_bytes for layer in self.layers)

    @cached_property
    def disk_bytes(self) -> int:
        return sum(layer.disk_bytes for layer in self.layers)

    @cached_property
    def disk_write_bytes(self) -> int:
        return sum(layer.disk_write_bytes for layer in self.layers)

    @cached_property
    def cpu_adam_elements(self) -> int:
        return sum(layer.cpu_adam_elements for layer in self.layers)

    @cached_property
    def host_bytes(self) -> float:
        return sum(layer.host_bytes for layer in self.layers)

    @cached_property
    def peak_gpu_bytes(self) -> int:
        return sum(self.gpu_memory_bytes.values())

    @cached_property
    def peak_host_bytes(self) -> int:
        return sum(self.host_memory_bytes.values())


def _is_pinned(kind: str) -> bool:
    return kind.endswith(", pinned")
