"""How much of a small update reaches weights of 16 bits, by four ways of rounding, and low-bit matrices, by
how often they are rounded to their grid: prints two Markdown tables.

    python tests/studies/landed_updates.py

Weights N(0, 0.02), 16 updates of one size |lr g| with fresh noise each. *landed*: projection of the change of
the stored weights onto the wanted change, 1 being all of it. *error*: rms distance of the stored weights from
where exact arithmetic would have them, in units of the rms of the whole wanted change.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from engines.base import Update
from engines.costs.quantized import matrix_bytes
from engines.noise.philox import NoiseKey, normal
from engines.noise.tiles import one
from engines.noise.visits import DeviceUpdateLog, Outputs, Visit
from engines.noise.weight_pass import visit
from engines.quantized import quantized_pass
from engines.quantized.codec import pack, unpack
from engines.settings.checks import Rounding
from engines.settings.zeroth_order import Base

COUNT = 1 << 22
UPDATES = 16
FOLD_EVERY = 8
SIZES = (1e-7, 1e-6, 1e-5, 1e-4)
GRID_COUNT = 1 << 20
GRID_FOLDS = (1, 4, 16)
BASES: tuple[Base, ...] = ("int8", "fp8", "int4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def replayed(start: Tensor, size: float, rounding: Rounding) -> Tensor:
    """As the engines do it: each update rounded by itself."""
    log = DeviceUpdateLog(start.device)
    for step in range(UPDATES):
        log.append(Update(step=step, learning_rate=size, projected_gradient=1.0, weight_decay=0.0))
    out = torch.empty_like(start)
    how = Visit(seed=0, log=log, first=0, last=UPDATES, rounding=rounding)
    visit(start, one(0, COUNT), how, Outputs(theta=out))
    return out


@cache
def noise_of(step: int) -> Tensor:
    return normal(NoiseKey(seed=0, step=step, tensor=0), COUNT)


def summed(start: Tensor, size: float) -> Tensor:
    """A log whose updates are summed in fp32 and rounded to nearest every `FOLD_EVERY` steps."""
    stored, deferred = start, torch.zeros(COUNT)
    for step in range(UPDATES):
        deferred -= size * noise_of(step)
        if (step + 1) % FOLD_EVERY == 0:
            stored = (stored.float() + deferred).to(start.dtype)
            deferred.zero_()
    return stored


def compensated(start: Tensor, size: float) -> Tensor:
    """Kahan's sum: what rounding took is kept in a second tensor of the same dtype, and given back."""
    stored, lost = start, torch.zeros_like(start)
    for step in range(UPDATES):
        wanted = stored.float() + (lost.float() - size * noise_of(step))
        stored = wanted.to(start.dtype)
        lost = (wanted - stored.float()).to(start.dtype)
    return stored


def on_grid(start: Tensor, base: Base, size: float, fold_every: int) -> Tensor:
    """Packed, and folded every so many updates: the change of the values that the codes stand for."""
    log = DeviceUpdateLog(start.device)
    for step in range(UPDATES):
        log.append(Update(step=step, learning_rate=size, projected_gradient=1.0, weight_decay=0.0))
    records = torch.empty(matrix_bytes(start.numel(), base), dtype=torch.uint8)
    pack(start, base, records)
    before = unpack(records, base, start.numel())
    for first in range(0, UPDATES, fold_every):
        how = Visit(seed=0, log=log, first=first, last=first + fold_every)
        quantized_pass.visit_tiles(records, one(0, start.numel()), how, base, store=True, sides=())
    return unpack(records, base, start.numel()) - before


def low_bit_table() -> None:
    print("| base | lr x g | " + " | ".join(f"rounded every {k}" for k in GRID_FOLDS) + " |")
    print("| --- | ---: |" + " ---: |" * len(GRID_FOLDS))
    start = torch.randn(GRID_COUNT, generator=torch.Generator().manual_seed(0)) * 0.02
    for base in BASES:
        for size in SIZES:
            wanted = -size * sum(noise_of(step)[:GRID_COUNT].double() for step in range(UPDATES))
            norm = float((wanted * wanted).sum())
            cells = []
            for fold_every in GRID_FOLDS:
                change = on_grid(start, base, size, fold_every).double()
                share = float((change * wanted).sum()) / norm
                error = (float((change - wanted).square().sum()) / norm) ** 0.5
                cells.append(f"{share:.1%} ({error:.2g})")
            print(f"| {base} | {size:.0e} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    low_bit_table()
    print()
    print("| weights | lr x g | nearest | stochastic | log, nearest every 8 | compensated |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for dtype in DTYPES:
        start = (torch.randn(COUNT, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
        for size in SIZES:
            wanted = -size * sum(noise_of(step).double() for step in range(UPDATES))
            norm = float((wanted * wanted).sum())
            cells = []
            for out in (
                replayed(start, size, "nearest"),
                replayed(start, size, "stochastic"),
                summed(start, size),
                compensated(start, size),
            ):
                change = out.double() - start.double()
                share = float((change * wanted).sum()) / norm
                error = (float((change - wanted).square().sum()) / norm) ** 0.5
                cells.append(f"{share:.1%} ({error:.2g})")
            print(f"| {str(dtype).removeprefix('torch.')} | {size:.0e} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
