"""What generation costs: one decoding step over the whole batch, and the memory that holds it.

A block that is not resident comes up once per step, from host memory or from disk, and never goes down. What
a step computes on is one token per sequence, so the weights and the cache are moved through the GPU's memory
for little arithmetic. The cache has its final size from the start, and attention reads all of it in every
step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engines.costs import transformer
from engines.costs.memory import activations
from engines.costs.mezo import adapter_parameters
from engines.costs.quantized import block_bytes
from engines.costs.resources import disk
from engines.costs.resources.traffic import LayerTraffic, Traffic
from engines.costs.zo2 import disk_indices, resident_indices, ring_bytes
from engines.settings.zeroth_order import Base, MezoSettings, Zo2Settings
from engines.shapes import BYTES_PER_ELEMENT, Dtype, ModelShape, Workload

GREEDY_LOGIT_BYTES = 4
"""GPU bytes per logit in fp32 or less where the largest is taken."""

SAMPLED_LOGIT_BYTES = 40
"""The same where tokens are drawn: logits in fp32 as they come and warped, sorted with their places (8
bytes), their probabilities and running sums, masks, and one exponential number each."""

MOVES = 3
"""Times that a block's weights are read or written in a step: copied to scratch (once as they are kept), and
read there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """The part of a generation that costs follow from."""

    batch_size: int
    prompt_tokens: int
    """Of the longest prompt."""
    new_tokens: int
    dtype: Dtype
    sampled: bool = False
    """Tokens are drawn, not the likeliest taken."""
    padded: bool = False
    """Prompts differ in length."""

    @property
    def cache_tokens(self) -> int:
        """Positions of each sequence whose keys and values are kept: all but that of the last token."""
        return self.prompt_tokens + self.new_tokens - 1

    @property
    def prefill(self) -> Workload:
        return Workload(batch_size=self.batch_size, seq_len=self.prompt_tokens, dtype=self.dtype)

    @property
    def step(self) -> Workload:
        """One decoding step."""
        return Workload(batch_size=self.batch_size, seq_len=1, dtype=self.dtype)


def cache_bytes(shape: ModelShape, decoding: Decoding) -> int:
    """Keys and values of all blocks: all heads' where each has its own, else those of the groups.

    A model whose blocks look back over a window only keeps less than this.
    """
    widths = [matrix.rows for matrix in shape.matrices if matrix.name.endswith("k_proj.weight")]
    width = widths[0] if widths else shape.hidden * shape.num_kv_heads // shape.num_heads
    element = BYTES_PER_ELEMENT[decoding.dtype]
    return 2 * shape.num_blocks * width * element * decoding.batch_size * decoding.cache_tokens


def traffic(shape: ModelShape, decoding: Decoding, settings: MezoSettings) -> Traffic:
    """Of one decoding step of `zo2` or, with its settings, of `mezo`."""
    element = BYTES_PER_ELEMENT[decoding.dtype]
    block = block_bytes(shape, decoding.dtype, settings.base)
    every = frozenset(range(shape.num_blocks))
    streams = isinstance(settings, Zo2Settings)
    resident, on_disk = (
        _places(shape, settings) if isinstance(settings, Zo2Settings) else (every, frozenset())
    )
    held = {"weights": element * shape.non_block_parameters + len(resident) * block}
    host = {"process": transformer.PROCESS_HOST_BYTES}
    host_bytes = (shape.num_blocks - len(resident) - len(on_disk)) * block
    ring_on_host = disk.host_ring_bytes(len(on_disk) * block)
    if streams:
        held["buffers"] = ring_bytes([block] * (shape.num_blocks - len(resident)))
        host["blocks, pinned"] = host_bytes
    if on_disk:
        host["disk ring, pinned"] = ring_on_host
    layers = [LayerTraffic(name="embedding")]
    for index in range(shape.num_blocks):
        up = 0 if index in resident else block
        read = block if index in on_disk else 0
        layers.append(
            _block(shape, decoding, block)._replace(
                name=f"block.{index}",
                h2d_bytes=up,
                host_bytes=float(up + read),
                disk_bytes=read,
            )
        )
    return Traffic(
        layers=(*layers, _head(shape, decoding)),
        gpu_memory_bytes=_gpu_memory_bytes(shape, decoding, settings, held),
        host_memory_bytes=host,
        pinned_bytes=host_bytes + ring_on_host,
        overlap="streamed" if streams else "serial",
    )


def _places(shape: ModelShape, settings: Zo2Settings) -> tuple[frozenset[int], frozenset[int]]:
    """Blocks on the GPU, and on disk: none with `auto`, as in `engines.costs.zo2`."""
    resident = resident_indices(shape.num_blocks, settings.resident_blocks)
    return resident, disk_indices(shape.num_blocks, resident, settings.named_disk_blocks)


def least_gpu_bytes(shape: ModelShape, decoding: Decoding, base: Base = "full") -> int:
    """What no decoding step can do without: every multiplied weight, as it is kept, and the cache are read
    once."""
    head = BYTES_PER_ELEMENT[decoding.dtype] * shape.head_parameters
    blocks = shape.num_blocks * block_bytes(shape, decoding.dtype, base)
    return blocks + head + cache_bytes(shape, decoding)


def _block(shape: ModelShape, decoding: Decoding, kept_bytes: int) -> LayerTraffic:
    step = decoding.step
    cache = cache_bytes(shape, decoding) // shape.num_blocks
    attention = 4.0 * decoding.batch_size * decoding.cache_tokens * shape.hidden
    multiplied = sum(matrix.parameters for matrix in shape.matrices) + shape.active_expert_parameters
    matrices = 2.0 * decoding.batch_size * multiplied
    scratch = BYTES_PER_ELEMENT[decoding.dtype] * shape.block_parameters
    weights = kept_bytes + (MOVES - 1) * scratch
    return LayerTraffic(
        name="block",
        gpu_forward_flops=matrices + attention,
        gpu_bytes=weights + cache + transformer.elementwise_bytes(shape, step),
        launches=transformer.block_launches(shape) + len(shape.matrices) + 1,
    )


def _head(shape: ModelShape, decoding: Decoding) -> LayerTraffic:
    weights = BYTES_PER_ELEMENT[decoding.dtype] * shape.head_parameters
    return LayerTraffic(
        name="head",
        gpu_forward_flops=transformer.head_forward_flops(shape, decoding.step),
        gpu_bytes=float(weights + _logits_bytes(shape, decoding)),
        launches=transformer.HEAD_LAUNCHES,
    )


def _logits_bytes(shape: ModelShape, decoding: Decoding) -> int:
    """Of one position per sequence."""
    per_logit = SAMPLED_LOGIT_BYTES if decoding.sampled else GREEDY_LOGIT_BYTES
    return decoding.batch_size * shape.vocabulary * per_logit


def _gpu_memory_bytes(
    shape: ModelShape, decoding: Decoding, settings: MezoSettings, held: Mapping[str, int]
) -> dict[str, int]:
    """At the worst of three moments: inside a block and at the head in the prefill, and attention in a step.

    In a block there are its input and its result and what its feed-forward part makes. At the head the
    model's forward begins anew with an embedding of the whole prompt's size. Attention with a mask, which
    every step has and the prefill of padded prompts, may repeat keys and values for every head of a group.
    """
    element = BYTES_PER_ELEMENT[decoding.dtype]
    prefill = decoding.prefill
    if transformer.runs_as_graphs(shape, prefill):
        scratch = 2 * shape.block_parameters
    else:
        scratch = transformer.largest_matrix_parameters(shape) + transformer.vector_parameters(shape)
    adapters = adapter_parameters(shape, settings)
    hidden = prefill.hidden_bytes(shape)
    places = decoding.batch_size * decoding.cache_tokens
    grouped = shape.num_kv_heads < shape.num_heads
    repeated = 2 * places * shape.hidden * element if grouped else 0
    masked = decoding.prompt_tokens * places * (1 + element) + repeated if decoding.padded else 0
    kept = {
        **held,
        "cache": cache_bytes(shape, decoding),
        "scratch": element * (scratch + shape.num_blocks * adapters),
    }
    in_block = {
        **kept,
        "activations": 2 * hidden + activations.forward_activation_bytes(shape, prefill) + masked,
        "logits": 0,
    }
    at_head = {**kept, "activations": 3 * hidden, "logits": _logits_bytes(shape, decoding)}
    decoding_step = {**kept, "activations": repeated, "logits": 0}
    return activations.peak_moment([in_block, at_head, decoding_step])
