"""The tables of reports/FINDINGS.md on steps of 384 to 32 thousand tokens, out of the published records.

    python tests/studies/methods_by_tokens.py

A cell has the median of a step, tokens per second as a share of native's in the same column, and GPU memory
that torch reserved. An asterisk: three processes or more, else one. The share counts what one step in so many
has to do beside (`lsp` tests its projectors), as the page of published records does; native's own record may
be of another sitting.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from harness.records.memory_limits import gpu_taken_bytes  # noqa: E402
from harness.records.stats import ENOUGH_RUNS, Rounds, aggregate  # noqa: E402
from harness.resolve import resolve_shape  # noqa: E402
from reports.format import GIB  # noqa: E402
from reports.load import load_folder  # noqa: E402
from reports.measured.measurements import largest  # noqa: E402

RESULTS = ROOT / "reports" / "results"
TOKENS = {"384": 384, "4k": 4096, "16k": 16384, "32k": 32768}
"""Per step, by what folders call them."""


def _each(name: str, end: str, *left_out: str) -> dict[str, str]:
    """Folders of the day's rows."""
    taken = [tokens for tokens in TOKENS if tokens not in left_out]
    return {tokens: f"deepseek-coder-{name}-{tokens}-tokens{end}_h200_20261130" for tokens in taken}


RECORDS: dict[str, dict[str, dict[str, str]]] = {
    "1.3b": {
        "native": _each("1.3b", "") | {"4k": "deepseek-coder-1.3b-rows_h200_20261129"},
        "lora": _each("1.3b", "") | {"4k": "deepseek-coder-1.3b-rows_h200_20261129"},
        "exact-offload, all updates on the CPU": (
            _each("1.3b", "-exact-offload-three", "4k")
            | {
                "384": "deepseek-coder-1.3b-384-tokens-exact-offload_h200_20261130",
                "4k": "deepseek-coder-1.3b-exact-offload-again_h200_20261130",
            }
        ),
        "lsp, n/4": (
            _each("1.3b", "-lsp-quarter")
            | {"384": "deepseek-coder-1.3b-384-tokens-lsp-quarter_h200_20261201"}
        ),
        "lsp, n/2": (
            _each("1.3b", "-lsp")
            | {
                "384": "deepseek-coder-1.3b-384-tokens-lsp_h200_20261201",
                "4k": "deepseek-coder-1.3b-lsp_h200_20261130",
                "16k": "deepseek-coder-1.3b-16k-tokens-lsp-three_h200_20261130",
            }
        ),
        "lsp, 3n/4": (
            _each("1.3b", "-lsp-three-quarters")
            | {"4k": "deepseek-coder-1.3b-three-quarters-bf16_h200_20261130"}
        ),
        "torchao-offload": _each("1.3b", "-torchao") | {"4k": "deepseek-coder-1.3b-rows_h200_20261129"},
    },
    "6.7b": {
        "native": {
            "384": "deepseek-coder-6.7b-384-tokens-native_h200_20261130",
            "4k": "deepseek-coder-6.7b-lsp_h200_20261130",
            "16k": "deepseek-coder-6.7b-16k-tokens_h200_20261130",
            "32k": "deepseek-coder-6.7b-32k-tokens_h200_20261130",
        },
        "lora": {
            "384": "deepseek-coder-6.7b-384-tokens_h200_20261130",
            "4k": "deepseek-coder-6.7b-rows_h200_20261129",
            "16k": "deepseek-coder-6.7b-16k-tokens-lora_h200_20261130",
            "32k": "deepseek-coder-6.7b-32k-tokens-lora_h200_20261130",
        },
        "exact-offload, all updates on the CPU": (
            _each("6.7b", "-exact-offload")
            | {
                "16k": "deepseek-coder-6.7b-16k-tokens-exact-offload-three_h200_20261130",
                "32k": "deepseek-coder-6.7b-32k-tokens_h200_20261130",
            }
        ),
        "exact-offload, blocks left to the GPU": {
            "4k": "deepseek-coder-6.7b-exact-offload_h200_20261130",
            "16k": "deepseek-coder-6.7b-16k-tokens-gpu-blocks_h200_20261130",
            "32k": "deepseek-coder-6.7b-32k-tokens-gpu-blocks_h200_20261130",
        },
        "lsp, n/4": _each("6.7b", "-lsp-quarter"),
        "lsp, n/2": _each("6.7b", "-lsp") | {"4k": "deepseek-coder-6.7b-lsp_h200_20261130"},
        "lsp, 3n/4": (
            _each("6.7b", "-lsp-three-quarters")
            | {"4k": "deepseek-coder-6.7b-three-quarters-bf16_h200_20261130"}
        ),
        "torchao-offload": _each("6.7b", "-torchao"),
    },
}
"""By model and method: the folder of each number of tokens that was measured, one of three processes where
there is one."""

SHARES = {"n/4": 0.25, "n/2": 0.5, "3n/4": 0.75}
"""Of the hidden size, what `d` is, by what a row says of it."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method with so many tokens a step."""

    folder: str
    rounds: Rounds
    tokens: int
    """Per step, by its job."""
    note: str
    """What it had otherwise than its row says."""

    @property
    def lasting_step_s(self) -> float:
        found = self.rounds.lasting_step_s
        assert found is not None, self.folder
        return found


def cell_of(label: str, folder: str) -> Cell:
    """Raises `UserError` as `load_folder` does."""
    engine, _, share = label.partition(", ")
    loaded = load_folder(RESULTS / folder)
    rounds = aggregate(engine, [run for run in loaded.runs if run.engine == engine])
    settings = rounds.ok[0].plan.settings
    notes = []
    if share in SHARES:
        d = SHARES[share] * resolve_shape(loaded.job).hidden
        notes += [f"d = {settings['d']}"] if settings["d"] != d else []
    notes += [f"{settings['moments']} moments"] if "moments" in settings else []
    notes += [f"blocks: {settings['gpu_blocks']}"] if settings.get("gpu_blocks") else []
    notes += ["weights streamed"] if settings.get("weights") == "streamed" else []
    return Cell(
        folder=folder, rounds=rounds, tokens=loaded.job.workload.tokens_per_step, note=", ".join(notes)
    )


def cells_of(model: str) -> dict[str, dict[str, Cell]]:
    """By method and tokens."""
    return {
        label: {tokens: cell_of(label, folder) for tokens, folder in folders.items()}
        for label, folders in RECORDS[model].items()
    }


def share_of_native(cell: Cell, native: Cell) -> float:
    """Of its tokens per second, in a long job."""
    return native.lasting_step_s / cell.lasting_step_s


def table(model: str) -> Iterator[str]:
    """Lines of Markdown."""
    lengths = " | ".join(f"{count:,} tokens" for count in TOKENS.values())
    yield f"| DeepSeek-Coder {model.upper()} | {lengths} |"
    yield f"| --- | {' | '.join('---' for _ in TOKENS)} |"
    found = cells_of(model)
    for label, cells in found.items():
        told = [
            _told(cells[each], found["native"][each]) if each in cells else "not measured" for each in TOKENS
        ]
        engine, comma, rest = label.partition(",")
        yield f"| `{engine}`{comma}{rest} | {' | '.join(told)} |"


def _told(cell: Cell, native: Cell) -> str:
    step_s, gpu = cell.rounds.step_s, largest(cell.rounds, gpu_taken_bytes)
    assert step_s is not None, cell.folder
    assert gpu is not None, cell.folder
    several = "\\*" if step_s.count >= ENOUGH_RUNS else ""
    note = f" ({cell.note})" if cell.note else ""
    step = f"[{step_s.median:#.3g}](results/{cell.folder}/report.md){several}{note}"
    return f"{step} / {share_of_native(cell, native):.2f} / {gpu / GIB:.1f}"


def beside_exact() -> str:
    """What `lsp` at half takes of `exact-offload`'s time, as the pages say it."""
    of = {}
    for model in RECORDS:
        cells = cells_of(model)
        lsp, exact = cells["lsp, n/2"], cells["exact-offload, all updates on the CPU"]
        of[model] = [f"{lsp[each].lasting_step_s / exact[each].lasting_step_s:.2f}" for each in TOKENS]
    few, *more = of["6.7b"]
    rest = "{} with 4 thousand, {} with 16 and {} with 32".format(*more)
    others = "{}, {}, {} and {}".format(*of["1.3b"])
    return f"{few} of `exact-offload`'s time at 6.7B with 384 tokens a step, {rest} (1.3B: {others})"


def beside_native() -> str:
    """What it takes of native's, as the pages say it."""
    quarter, half, three = (_range("6.7b", f"lsp, {each}", "4k", "16k", "32k") for each in SHARES)
    small = _range("1.3b", "lsp, n/2", "16k", "32k")
    large = f"{half} of its time at 6.7B from 4 thousand tokens on (n/4: {quarter}; 3n/4: {three})"
    return f"{large} and {small} at 1.3B from 16 thousand on"


def _range(model: str, label: str, *lengths: str) -> str:
    """Of its time over native's."""
    cells = cells_of(model)
    times = [1 / share_of_native(cells[label][each], cells["native"][each]) for each in lengths]
    low, high = (f"{each:.2f}" for each in (min(times), max(times)))
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    for name in RECORDS:
        print("\n".join(table(name)), end="\n\n")
    print(beside_exact(), beside_native(), sep="\n")
