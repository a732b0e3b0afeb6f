"""What a draw of each kind of noise costs: one block of OPT-13B, 314.6 M weights, on a GPU.

    python tests/studies/noise_cost.py --out FILE.json

Both perturbed copies of fp16 weights and of int8 ones, with no update and with four to replay: the difference
is what four draws take. The bits of the first tiles are compared with those that torch makes on the CPU, ends
with 2 where they differ. About 5 seconds of GPU time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from lossless_base import MATRICES, REPEATS, median_ms  # noqa: E402
from torch import Tensor  # noqa: E402

from engines.base import Update  # noqa: E402
from engines.costs.quantized import TILE_ELEMENTS, matrix_bytes  # noqa: E402
from engines.noise import weight_pass  # noqa: E402
from engines.noise.tiles import one  # noqa: E402
from engines.noise.visits import DeviceUpdateLog, Outputs, Visit  # noqa: E402
from engines.quantized import quantized_pass  # noqa: E402
from engines.quantized.codec import pack  # noqa: E402
from engines.settings.zeroth_order import Noise  # noqa: E402

UPDATES = (0, 4)
NOISES: tuple[Noise, ...] = ("gaussian", "binomial", "rademacher")
COMPARED = 8 * TILE_ELEMENTS


@dataclass(frozen=True)
class Row:
    base: str
    noise: Noise
    decays: bool
    ms: tuple[float, ...]
    """Of a block, for each of `UPDATES`."""
    equal: bool

    @property
    def draw_ms(self) -> float:
        """Of one draw for every weight, and what is done with it."""
        return (self.ms[1] - self.ms[0]) / (UPDATES[1] - UPDATES[0])


def a_visit(device: torch.device, updates: int, noise: Noise, *, decays: bool) -> Visit:
    log = DeviceUpdateLog(device)
    for step in range(updates):
        decay = 0.1 if decays else 0.0
        log.append(
            Update(step=step, learning_rate=1e-3, projected_gradient=0.3 * (step - 1.4), weight_decay=decay)
        )
    return Visit(seed=7, log=log, first=0, last=updates, step=9, eps=1e-3, noise=noise)


def perturb(base: str, memory: Tensor, count: int, how: Visit, sides: Sequence[Tensor]) -> None:
    of = one(3, count, decays=True)
    if base == "int8":
        quantized_pass.visit_tiles(memory, of, how, "int8", store=False, sides=sides, perturb=True)
    else:
        weight_pass.visit(memory, of, how, Outputs(plus=sides[0], minus=sides[1]))


def study(
    counts: Sequence[int], device: torch.device, clock: Callable[[Callable[[], object]], float]
) -> list[Row]:
    weights = torch.randn(max(counts), device=device).half().mul_(0.02)
    packed = torch.empty(matrix_bytes(max(counts), "int8"), dtype=torch.uint8, device=device)
    pack(weights.float(), "int8", packed)
    sides = [torch.empty_like(weights) for _ in range(2)]
    rows: list[Row] = []
    for base, memory in (("full", weights), ("int8", packed)):
        for noise in NOISES:
            for decays in (False, True):
                times: list[float] = []
                for updates in UPDATES:
                    how = a_visit(device, updates, noise, decays=decays)

                    def block(base: str = base, memory: Tensor = memory, how: Visit = how) -> None:
                        for count in counts:
                            mine = memory[:count] if base == "full" else memory[: matrix_bytes(count, "int8")]
                            perturb(base, mine, count, how, [side[:count] for side in sides])

                    times.append(clock(block))
                size = COMPARED if base == "full" else matrix_bytes(COMPARED, "int8")
                ours = [torch.empty(COMPARED, dtype=torch.float16) for _ in range(2)]
                with_cpu = a_visit(torch.device("cpu"), UPDATES[-1], noise, decays=decays)
                perturb(base, memory[:size].cpu(), COMPARED, with_cpu, ours)
                equal = all(torch.equal(a, b[:COMPARED].cpu()) for a, b in zip(ours, sides, strict=True))
                rows.append(Row(base, noise, decays, tuple(times), equal))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    options = parser.parse_args()
    rows = study(MATRICES, torch.device("cuda"), partial(median_ms, repeats=options.repeats))
    for row in rows:
        told = f"{row.base:5}{row.noise:11}{'with decay' if row.decays else '':11}"
        print(
            f"{told} no update {row.ms[0]:6.3f} ms, four {row.ms[1]:6.3f}, a draw {row.draw_ms:6.3f}   "
            f"{'same bits' if row.equal else 'BITS DIFFER'}"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"gpu": torch.cuda.get_device_name(), "rows": [asdict(row) for row in rows]}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row.equal for row in rows) else 2


if __name__ == "__main__":
    sys.exit(main())
