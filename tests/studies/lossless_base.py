"""What reading weights from lossless tiles costs a visit: one block of OPT-13B, 314.6 M weights, on a GPU.

    python tests/studies/lossless_base.py --out FILE.json

Each pass over weights in bf16 beside the same pass over tiles (`engines.lossless`), matrix by matrix as the
engines make it, its bits compared. Ends with 0 and the word `go` where no visit takes 5 % longer than over
plain weights (1 and 5 Gaussians, and signs), else with 1 and `no`; with 2 where bits differ. About 10 seconds
of GPU time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from engines.base import Update  # noqa: E402
from engines.costs.quantized import lossless_bytes  # noqa: E402
from engines.lossless import lossless_pass  # noqa: E402
from engines.noise import weight_pass  # noqa: E402
from engines.noise.tiles import one  # noqa: E402
from engines.noise.visits import DeviceUpdateLog, Outputs, Visit  # noqa: E402
from engines.settings.zeroth_order import Noise  # noqa: E402

MATRICES = (5120 * 5120,) * 4 + (5120 * 20480,) * 2
MOST_MORE = 0.05
"""Of a visit's time over plain weights, that one over tiles may take in addition."""
REPEATS = 20


Pass = Callable[[int, list[Tensor]], object]
"""Over the matrix of that number, to memory for each side."""


@dataclass(frozen=True)
class Row:
    name: str
    plain_ms: float
    tiled_ms: float
    plain_gb_s: float
    """Bytes read and written, in GB a second."""
    tiled_gb_s: float
    equal: bool
    decides: bool

    @property
    def ratio(self) -> float:
        return self.tiled_ms / self.plain_ms


def median_ms(work: Callable[[], object], repeats: int) -> float:
    work()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    each = sorted(a.elapsed_time(b) for a, b in pairwise(marks))
    return each[len(each) // 2]


def study(
    counts: tuple[int, ...], device: torch.device, clock: Callable[[Callable[[], object]], float]
) -> list[Row]:
    made = torch.Generator(device).manual_seed(0)
    weights = [(torch.randn(n, generator=made, device=device) * 0.02).bfloat16() for n in counts]
    kept = [torch.empty(lossless_bytes(n), dtype=torch.uint8, device=device) for n in counts]
    log = DeviceUpdateLog(device)
    for step in range(4):
        log.append(
            Update(step=step, learning_rate=1e-3, projected_gradient=0.3 * (step - 1.4), weight_decay=0.1)
        )
    segments = [one(number, n, decays=True) for number, n in enumerate(counts)]
    room = max(counts)
    outs = [[torch.empty(room, dtype=torch.bfloat16, device=device) for _ in range(2)] for _ in range(2)]
    total, kept_total = 2 * sum(counts), sum(each.numel() for each in kept)
    rows: list[Row] = []
    damaged = torch.zeros(1, dtype=torch.int32, device=device)

    def add(
        name: str, plain: Pass, tiled: Pass, moved: tuple[int, int], *, sides: int = 2, decides: bool = True
    ) -> None:
        equal = True
        for index, n in enumerate(counts):
            plain(index, [out[:n] for out in outs[0]])
            tiled(index, [out[:n] for out in outs[1]])
            equal &= all(
                torch.equal(a[:n].view(torch.int16), b[:n].view(torch.int16))
                for a, b in zip(outs[0][:sides], outs[1][:sides], strict=True)
            )

        def all_of(work: Pass) -> Callable[[], None]:
            def run() -> None:
                for index, n in enumerate(counts):
                    work(index, [out[:n] for out in outs[0]])

            return run

        plain_ms, tiled_ms = clock(all_of(plain)), clock(all_of(tiled))
        rates = [size / ms / 1e6 for size, ms in zip(moved, (plain_ms, tiled_ms), strict=True)]
        rows.append(Row(name, plain_ms, tiled_ms, *rates, equal, decides))

    has_room = [
        bool(lossless_pass.encode_lossless(*each)) for each in zip(weights, segments, kept, strict=True)
    ]
    assert all(has_room), "weights that tiles have no room for"
    add(
        "frozen: a copy, and decoding",
        lambda i, out: out[0].copy_(weights[i]),
        lambda i, out: lossless_pass.decode_lossless(kept[i], segments[i], out[0], damaged),
        (2 * total, kept_total + total), sides=1,
    )  # fmt: skip
    kinds: dict[str, Noise] = {"normals": "gaussian", "signs": "rademacher"}
    for name, noise in kinds.items():
        for updates in (0, 4):

            def plain(i: int, out: list[Tensor], how: Visit = a_visit(log, updates, noise)) -> None:  # noqa: B008
                weight_pass.visit(weights[i], segments[i], how, Outputs(plus=out[0], minus=out[1]))

            def tiled(i: int, out: list[Tensor], how: Visit = a_visit(log, updates, noise)) -> None:  # noqa: B008
                lossless_pass.visit_lossless(kept[i], segments[i], how, Outputs(plus=out[0], minus=out[1]))

            moved = (3 * total, kept_total + 2 * total)
            add(f"{name}, {updates} updates, both sides", plain, tiled, moved)
    # Storing: over tiles the updated weights are made in one side's buffer, encoded, and then perturbed.
    spare = [each.clone() for each in kept]
    theta = torch.empty(room, dtype=torch.bfloat16, device=device)

    def store(i: int, out: list[Tensor]) -> None:
        lossless_pass.visit_lossless(kept[i], segments[i], with_one, Outputs(theta=out[0]))
        lossless_pass.encode_lossless(out[0], segments[i], spare[i])
        weight_pass.visit(
            out[0], segments[i], a_visit(log, 0, "gaussian"), Outputs(plus=out[0], minus=out[1])
        )

    with_one = a_visit(log, 1, "gaussian")
    add(
        "normals, 1 update, stored, both sides",
        lambda i, out: weight_pass.visit(
            weights[i], segments[i], with_one, Outputs(theta=theta[: counts[i]], plus=out[0], minus=out[1])
        ),
        store,
        (4 * total, 2 * kept_total + 5 * total), decides=False,
    )  # fmt: skip
    last = len(counts) - 1
    lossless_pass.decode_lossless(spare[last], segments[last], outs[0][0][: counts[last]], damaged)
    assert not damaged
    assert torch.equal(outs[0][0][: counts[last]], theta[: counts[last]])
    return rows


def a_visit(log: DeviceUpdateLog, updates: int, noise: Noise) -> Visit:
    return Visit(seed=7, log=log, first=0, last=updates, step=9, eps=1e-3, noise=noise)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    options = parser.parse_args()
    rows = study(MATRICES, torch.device("cuda"), lambda work: median_ms(work, options.repeats))
    size = sum(lossless_bytes(n) for n in MATRICES) / (2 * sum(MATRICES))
    print(f"{torch.cuda.get_device_name()}: {sum(MATRICES):,} weights, tiles take {size:.4f} of their bytes")
    for row in rows:
        print(
            f"{row.name:44} plain {row.plain_ms:7.3f} ms {row.plain_gb_s:6.0f} GB/s   tiles "
            f"{row.tiled_ms:7.3f} ms {row.tiled_gb_s:6.0f} GB/s   x {row.ratio:.3f}   "
            f"{'same bits' if row.equal else 'BITS DIFFER'}"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"gpu": torch.cuda.get_device_name(), "size": size, "rows": [asdict(row) for row in rows]}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not all(row.equal for row in rows):
        print("wrong: bits differ")
        return 2
    slower = [row.name for row in rows if row.decides and row.ratio >= 1 + MOST_MORE]
    print(f"no: {', '.join(slower)}" if slower else "go")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
