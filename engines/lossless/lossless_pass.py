"""What a zeroth-order step does in one pass to matrices that `engines.lossless.lossless_codec` has stored.

The weights in tiles are weights in bf16, so this is `engines.noise.weight_pass.visit` with another way of
reading them, and gives its bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engines.kernels import triton_launch
from engines.lossless import lossless_codec
from engines.noise import weight_pass
from engines.noise.tiles import Segment, one
from engines.noise.visits import Outputs, Visit


def visit_lossless(kept: Tensor, segment: Segment, how: Visit, out: Outputs) -> None:
    """One pass over the matrices of `segment`, all with weight decay: see `weight_pass.visit`.

    `kept` (bytes) are the tiles of one matrix after those of the other. They stay as they are; outputs are
    flat memories in bf16, laid out as `segment` says.
    """
    if kept.is_cuda and triton_launch.has_triton():
        from engines.lossless import lossless_pass_kernels

        lossless_pass_kernels.visit_lossless(kept, segment, how, out)
        return
    for mine, number, here in lossless_codec.matrices(kept, segment):
        count = here.stop - here.start
        weight = torch.empty(count, dtype=torch.bfloat16, device=kept.device)
        lossless_codec.read_tiles(mine, count, weight)
        outs = (None if each is None else each[here] for each in (out.theta, out.plus, out.minus))
        theta, plus, minus = outs
        weight_pass.visit(
            weight, one(number, count, decays=True), how, Outputs(theta=theta, plus=plus, minus=minus)
        )


def decode_lossless(kept: Tensor, segment: Segment, out: Tensor, damaged: Tensor) -> None:
    """The weights themselves, bit for bit, to `out`, flat memory in bf16 that is laid out as `segment` says.

    `damaged`, (1,) int32 on the same device, becomes 1 if the tiles are not what was written to them; what
    `out` holds is then of no use.
    """
    if kept.is_cuda and triton_launch.has_triton():
        from engines.lossless import lossless_pass_kernels

        lossless_pass_kernels.decode_lossless(kept, segment, out, damaged)
        return
    for mine, _, here in lossless_codec.matrices(kept, segment):
        if not lossless_codec.read_tiles(mine, here.stop - here.start, out[here]):
            damaged.fill_(1)


def encode_lossless(weights: Tensor, segment: Segment, kept: Tensor) -> Tensor:
    """Write the matrices in `weights`, flat memory in bf16 that is laid out as `segment` says, to tiles
    (bytes). Whether each found room, (matrices,) bool on the same device; the tiles of one that did not are
    what they were."""
    if kept.is_cuda and triton_launch.has_triton():
        from engines.lossless import lossless_pass_kernels

        return lossless_pass_kernels.encode_lossless(weights, segment, kept)
    found = [
        lossless_codec.write_tiles(weights[here], mine)
        for mine, _, here in lossless_codec.matrices(kept, segment)
    ]
    return torch.stack(found)
