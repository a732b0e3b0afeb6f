"""Gaussian noise by counter: z[e] is a function of (seed, step, tensor, element e) and of nothing else.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns the counter
(e // 4 low, tensor, step, e // 4 high) under the key (seed low, seed high) into four 32-bit words, and
Box-Muller turns those into the four normals of elements 4 (e // 4) .. 4 (e // 4) + 3. Therefore noise is
never stored, does not depend on the order of calls, and a tensor may be processed in pieces.

Two implementations: torch operations for any device, and Triton kernels (`engines.noise_kernels`) for
CUDA. Beyond the integer stream, logarithm, sine and cosine are short polynomials in single precision,
written here as separate multiplications and additions in one fixed order, and the square root is correctly
rounded. IEEE 754 leaves no freedom in those, so both give the same bits on every device, whatever the
vector width; library functions would differ in the last place, on the CPU even with the position of an
element in the vector register.

The uniforms have 24 bits, so |z| is at most 5.77; a normal exceeds that once in 1.2e8 draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

# Least-squares fits on Chebyshev nodes, rounded to single precision, from the lowest power up:
# ln(1 + f) = f + f^2 Q(f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], relative error 6.4e-8;
LOG_Q = (
    -0.4999999403953552, 0.33333659172058105, -0.25001609325408936, 0.19973105192184448,
    -0.16575047373771667, 0.14806459844112396, -0.14257794618606567, 0.09004202485084534,
)  # fmt: skip
# sin(pi w) = w (pi + w^2 S(w^2)) for |w| <= 1/2, error 2.7e-8;
SIN_S = (-5.167712688446045, 2.550136089324951, -0.598705530166626, 0.07854148000478745)
PI = 3.1415927410125732
# cos(pi w) = 1 + w^2 C(w^2) for |w| <= 1/2, error 8.8e-10.
COS_C = (
    -4.934802055358887, 4.058711528778076, -1.3352400064468384, 0.23507460951805115, -0.024627575650811195,
)  # fmt: skip
LN_2 = 0.6931471824645996
SQRT_HALF_BITS = 0x3F3504F3
"""sqrt(1/2) as a float's bits: mantissas are taken from [sqrt(1/2), sqrt(2)), where ln is smallest."""

_CPU_CHUNK = 1 << 18
"""Elements at a time on a CPU: few enough that the temporaries stay in cache, many enough to hide what
some hundred torch calls cost. Small tensors share a chunk."""
_GPU_CHUNK = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseKey:
    """Names one tensor's noise at one step."""

    seed: int
    """Any 64-bit number; a negative one counts by its two's complement. Zero is as good as any."""
    step: int
    tensor: int

    def __post_init__(self) -> None:
        if not (0 <= self.step <= _WORD and 0 <= self.tensor <= _WORD):
            raise ValueError("step and tensor of a noise key are 32-bit numbers")

    @property
    def seed_words(self) -> tuple[int, int]:
        """(low, high)."""
        return self.seed & _WORD, (self.seed >> 32) & _WORD


def normal(key: NoiseKey, count: int, device: torch.device | str = "cpu", start: int = 0) -> Tensor:
    """Elements `start` to `start + count` of the noise named by `key`: (count,) fp32, by torch operations."""
    out = torch.empty(count, dtype=torch.float32, device=device)
    for target, z in _noise_for([out], [key], start):
        target.piece(out).copy_(z)
    return out


def perturb(weight: Tensor, out: Tensor, key: NoiseKey, scale: float, start: int = 0) -> None:
    """out = weight + scale z, computed in fp32 and rounded once to the dtype of `out`.

    `weight` is only read: a perturbation leaves nothing to restore. Both are contiguous, of the same
    shape; `start` is the index of their first element in the whole tensor.
    """
    perturb_all([weight], [out], [key], scale, start)


def update(
    weight: Tensor, key: NoiseKey, lr: float, projected_gradient: float, weight_decay: float, start: int = 0
) -> None:
    """weight = weight - lr (g z + weight_decay weight) in place, in fp32 and rounded once.

    MeZO (2305.17333), algorithm 1, with decoupled weight decay. A projected gradient g of zero still
    decays. `weight` is contiguous; `start` as in `perturb`.
    """
    update_all([weight], [key], lr, projected_gradient, [weight_decay], start)


def perturb_all(
    weights: Sequence[Tensor], outs: Sequence[Tensor], keys: Sequence[NoiseKey], scale: float, start: int = 0
) -> None:
    """`perturb` for several tensors of one device, such as those of a block. The same bits as one by one."""
    if _by_kernel(weights):
        from engines import noise_kernels

        for weight, out, key in zip(weights, outs, keys, strict=True):
            noise_kernels.perturb(weight, out, key, scale, start)
        return
    for target, z in _noise_for(weights, keys, start):
        # Not torch.add(..., alpha=scale): it may fuse the two roundings into one, or not.
        z.mul_(scale).add_(target.piece(weights[target.index]))
        target.piece(outs[target.index]).copy_(z)


def update_all(
    weights: Sequence[Tensor],
    keys: Sequence[NoiseKey],
    lr: float,
    projected_gradient: float,
    weight_decays: Sequence[float],
    start: int = 0,
) -> None:
    """`update` for several tensors of one device, each with its own weight decay."""
    if _by_kernel(weights):
        from engines import noise_kernels

        for weight, key, decay in zip(weights, keys, weight_decays, strict=True):
            noise_kernels.update(weight, key, lr, projected_gradient, decay, start)
        return
    for target, z in _noise_for(weights, keys, start):
        piece = target.piece(weights[target.index])
        value = piece.float()
        z.mul_(projected_gradient)
        if weight_decays[target.index] != 0.0:
            z.add_(value * weight_decays[target.index])
        z.mul_(lr)
        piece.copy_(value - z)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _by_kernel(weights: Sequence[Tensor]) -> bool:
    return len(weights) > 0 and weights[0].is_cuda and _has_triton()


@dataclass(frozen=True, slots=True)
class _Target:
    """Elements `offset` to `offset + count` of the tensor at place `index` of a list."""

    index: int
    offset: int
    count: int
    first_quad: int
    skip: int
    """Elements of the first quad that lie before the target."""

    @property
    def num_quads(self) -> int:
        return (self.skip + self.count + 3) // 4

    def piece(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1)[self.offset : self.offset + self.count]


def _noise_for(
    tensors: Sequence[Tensor], keys: Sequence[NoiseKey], start: int
) -> Iterator[tuple[_Target, Tensor]]:
    """Every piece of every tensor with its noise: (count,) fp32, free to be overwritten."""
    for targets in _chunks([tensor.numel() for tensor in tensors], start, _chunk_of(tensors)):
        device = tensors[targets[0].index].device
        z = _box_muller(_words([(keys[t.index], t.first_quad, t.num_quads) for t in targets], device))
        first = 0
        for target in targets:
            yield target, z[first + target.skip : first + target.skip + target.count]
            first += 4 * target.num_quads


def _chunk_of(tensors: Sequence[Tensor]) -> int:
    return _GPU_CHUNK if len(tensors) > 0 and tensors[0].is_cuda else _CPU_CHUNK


def _chunks(counts: Sequence[int], start: int, chunk: int) -> Iterator[list[_Target]]:
    """Pieces of the tensors in order, as many at a time as make up about `chunk` elements.

    A piece ends at a multiple of four elements or with its tensor, so that no Philox call is made twice.
    """
    targets: list[_Target] = []
    room = chunk
    for index, count in enumerate(counts):
        done = 0
        while done < count:
            skip = (start + done) % 4
            take = min(count - done, room - skip)
            target = _Target(index, done, take, (start + done) // 4, skip)
            targets.append(target)
            done += take
            room -= 4 * target.num_quads
            if room < 4:
                yield targets
                targets, room = [], chunk
    if targets:
        yield targets


def philox_words(key: NoiseKey, first_quad: int, num_quads: int, device: torch.device) -> Tensor:
    """The integer stream: (4, num_quads) int64 of 32-bit words; element 4 q + i comes of word [i, q]."""
    even, odd = _words([(key, first_quad, num_quads)], device)
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def _words(pieces: Sequence[tuple[NoiseKey, int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Words 0 and 2, and words 1 and 3, of pieces (key, first quad, number of quads) of one seed and step."""
    total = sum(num_quads for _, _, num_quads in pieces)
    even = torch.empty((2, total), dtype=torch.int64, device=device)
    odd = torch.empty_like(even)
    first = 0
    for key, first_quad, num_quads in pieces:
        here = slice(first, first + num_quads)
        torch.arange(first_quad, first_quad + num_quads, out=even[0, here])
        odd[0, here].fill_(key.tensor)
        first += num_quads
    torch.bitwise_right_shift(even[0], 32, out=odd[1])
    even[0].bitwise_and_(_WORD)
    even[1].fill_(pieces[0][0].step)
    return philox(even, odd, pieces[0][0].seed_words)


def philox(even: Tensor, odd: Tensor, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Philox 4x32-10 on counters (even[0], odd[0], even[1], odd[1]); the words in the same order.

    (2, n) int64 tensors of 32-bit words, overwritten. A 64-bit product may wrap to a negative number; its
    upper and lower words are right all the same. A product is kept whole as the words that a round only
    passes on, until the mask of the next round takes its upper half off.
    """
    k0, k1 = key
    keys = torch.tensor(
        [[(k + i * w) & _WORD for k, w in zip((k0, k1), WEYL, strict=True)] for i in range(ROUNDS)],
        device=even.device,
    )
    product = torch.empty_like(even)
    for i in range(ROUNDS):
        torch.mul(even[1], MULTIPLIERS[1], out=product[0])
        torch.mul(even[0], MULTIPLIERS[0], out=product[1])
        torch.bitwise_right_shift(product, 32, out=even)
        even.bitwise_xor_(odd).bitwise_xor_(keys[i].unsqueeze(1)).bitwise_and_(_WORD)
        odd, product = product, odd
    return even, odd.bitwise_and_(_WORD)


def _box_muller(words: tuple[Tensor, Tensor]) -> Tensor:
    """Normals of (2, n) words each, which are overwritten: (4 n,) fp32.

    Of a pair of words the first gives the radius sqrt(-2 ln u), u = (upper 24 bits + 1) / 2^24; the
    second gives the angle pi w, w in [-1/2, 1/2) from its bits 7 to 30, and a sign from bit 31.
    """
    even, odd = words
    # u = 2^exponent (1 + f) by the bits of the float that holds u 2^24, which is exact.
    bits = even.bitwise_right_shift_(8).add_(1).to(torch.float32).view(torch.int32).sub_(SQRT_HALF_BITS)
    exponent = (bits >> 23).sub_(24).to(torch.float32)
    f = bits.bitwise_and_(0x7FFFFF).add_(SQRT_HALF_BITS).view(torch.float32).sub_(1.0)
    log = _horner(LOG_Q, f).mul_(f).mul_(f).add_(f).add_(exponent.mul_(LN_2))
    # In double precision: torch's single-precision root on the CPU is not always the nearest number.
    radius = log.mul_(-2.0).to(torch.float64).sqrt_().to(torch.float32)

    angle = odd.to(torch.int32)
    radius.view(torch.int32).bitwise_xor_(angle & -0x80000000)
    w = angle.bitwise_left_shift_(1).bitwise_right_shift_(8).to(torch.float32).mul_(2.0**-24)
    square = w * w
    sine = _horner(SIN_S, square).mul_(square).add_(PI).mul_(w)
    cosine = _horner(COS_C, square).mul_(square).add_(1.0)
    z = torch.empty((even.shape[1], 2, 2), dtype=torch.float32, device=even.device)
    torch.mul(radius.t(), cosine.t(), out=z[:, :, 0])
    torch.mul(radius.t(), sine.t(), out=z[:, :, 1])
    return z.view(-1)


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[0])
