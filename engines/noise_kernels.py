# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# The compiler of Triton takes annotations of kernels for code, so kernels have none.
"""Triton kernels of `engines.noise`, bit for bit the same arithmetic. Imported only where Triton is there.

Launched without contraction of multiply and add, which would round once where torch rounds twice.
Compute capability 7.0 and up. With TRITON_INTERPRET=1 they run on CPU tensors.

`normals` knows nothing of the memory it is used on: a kernel over several tensors in one flat buffer
needs only a table from tile to (tensor, first element).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines import noise
from engines.noise import NoiseKey

_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (tl.constexpr(value) for value in noise.LOG_Q)
_S0, _S1, _S2, _S3 = (tl.constexpr(value) for value in noise.SIN_S)
_C0, _C1, _C2, _C3, _C4 = (tl.constexpr(value) for value in noise.COS_C)
_PI = tl.constexpr(noise.PI)
_LN_2 = tl.constexpr(noise.LN_2)
_SQRT_HALF_BITS = tl.constexpr(noise.SQRT_HALF_BITS)
_INV_2_24 = tl.constexpr(2.0**-24)

TILE_QUADS = 512
"""Philox calls, of four elements each, per program."""


@triton.jit
def _pair(radius_word, angle_word):
    """Two normals of two words (uint32): as `noise._box_muller`, line by line."""
    bits = ((radius_word >> 8) + 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    bits = bits - _SQRT_HALF_BITS
    exponent = ((bits >> 23) - 24).to(tl.float32)
    f = ((bits & 0x7FFFFF) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    q = ((f * _L7 + _L6) * f + _L5) * f + _L4
    q = (((q * f + _L3) * f + _L2) * f + _L1) * f + _L0
    log = (q * f * f + f) + exponent * _LN_2
    radius = tl.sqrt_rn(log * -2.0)
    angle = angle_word.to(tl.int32, bitcast=True)
    radius = tl.where(angle < 0, -radius, radius)
    w = ((angle << 1) >> 8).to(tl.float32) * _INV_2_24
    square = w * w
    s = ((square * _S3 + _S2) * square + _S1) * square + _S0
    sine = (s * square + _PI) * w
    c = (((square * _C4 + _C3) * square + _C2) * square + _C1) * square + _C0
    cosine = c * square + 1.0
    return radius * cosine, radius * sine


@triton.jit
def words(quad, tensor, step, seed):
    """The four Philox words of int64 counters `quad`."""
    low = (quad & 0xFFFFFFFF).to(tl.uint32)
    high = (quad >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, zero + tensor.to(tl.uint32), zero + step.to(tl.uint32), high)


@triton.jit
def normals(quad, tensor, step, seed):
    """Normals of elements 4 quad .. 4 quad + 3, for (n,) int64 quads: (4 n,) fp32."""
    x0, x1, x2, x3 = words(quad, tensor, step, seed)
    z0, z1 = _pair(x0, x1)
    z2, z3 = _pair(x2, x3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit(do_not_specialize=["first_quad", "tensor", "step", "seed"])
def _words_kernel(out, first_quad, tensor, step, seed, QUADS: tl.constexpr):
    lane = tl.arange(0, QUADS)
    x0, x1, x2, x3 = words(first_quad.to(tl.int64) + lane, tensor, step, seed)
    tl.store(out + lane, x0.to(tl.int64))
    tl.store(out + QUADS + lane, x1.to(tl.int64))
    tl.store(out + 2 * QUADS + lane, x2.to(tl.int64))
    tl.store(out + 3 * QUADS + lane, x3.to(tl.int64))


@triton.jit(do_not_specialize=["tensor", "step", "seed", "start", "scale"])
def _perturb_kernel(
    weight, out, count, tensor, step, seed, start, scale,
    QUADS: tl.constexpr,
):  # fmt: skip
    first_quad = (start.to(tl.int64) >> 2) + tl.program_id(0).to(tl.int64) * QUADS
    z = normals(first_quad + tl.arange(0, QUADS), tensor, step, seed)
    # The place in this piece of the tensor of each of the tile's elements.
    place = first_quad * 4 - start + tl.arange(0, 4 * QUADS)
    inside = (place >= 0) & (place < count)
    value = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (z * scale + value).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tensor", "step", "seed", "start", "lr", "gradient", "decay"])
def _update_kernel(
    weight, count, tensor, step, seed, start,
    lr, gradient, decay, QUADS: tl.constexpr,
):  # fmt: skip
    first_quad = (start.to(tl.int64) >> 2) + tl.program_id(0).to(tl.int64) * QUADS
    z = normals(first_quad + tl.arange(0, QUADS), tensor, step, seed)
    place = first_quad * 4 - start + tl.arange(0, 4 * QUADS)
    inside = (place >= 0) & (place < count)
    value = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    value = value - (z * gradient + value * decay) * lr
    tl.store(weight + place, value.to(weight.dtype.element_ty), mask=inside)


def perturb(weight: Tensor, out: Tensor, key: NoiseKey, scale: float, start: int) -> None:
    """As `noise.perturb`."""
    count = weight.numel()
    _launch(_perturb_kernel, count, start, weight.view(-1), out.view(-1), count, *_counter(key), start, scale)


def update(
    weight: Tensor, key: NoiseKey, lr: float, projected_gradient: float, weight_decay: float, start: int
) -> None:
    """As `noise.update`."""
    count, scalars = weight.numel(), (lr, projected_gradient, weight_decay)
    _launch(_update_kernel, count, start, weight.view(-1), count, *_counter(key), start, *scalars)


def philox_words(key: NoiseKey, first_quad: int, num_quads: int, device: torch.device) -> Tensor:
    """The integer stream of a power of two of quads, for tests: (4, num_quads) int64."""
    out = torch.empty((4, num_quads), dtype=torch.int64, device=device)
    _words_kernel[(1,)](out, first_quad, *_counter(key), QUADS=num_quads)
    return out


def _counter(key: NoiseKey) -> tuple[int, int, int]:
    low, high = key.seed_words
    return key.tensor, key.step, low | high << 32


def _launch(kernel: Any, count: int, start: int, weight: Tensor, *arguments: Any) -> None:
    if count == 0:
        return
    num_quads = (start % 4 + count + 3) // 4
    grid = (triton.cdiv(num_quads, TILE_QUADS),)
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        kernel[grid](weight, *arguments, QUADS=TILE_QUADS, enable_fp_fusion=False)
