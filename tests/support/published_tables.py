"""What papers and projects published, beside what is predicted for this program's own engines on a datasheet
of their machine: `python tests/support/published_tables.py` prints the page profiles/published.md.

None of these numbers went into a constant. Theirs are of their own code, so a ratio away from 1 is no error
by itself; the last column says what differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[2]))

from engines.settings.given import GivenSettings, Value
from engines.settings.parse import parse_settings
from engines.shapes import Workload
from harness.models.configs import named_shape
from profiles.catalog import find_profile
from profiles.planning.budget import budget_of, gpu_bytes_needed
from profiles.planning.context import PlanningContext
from profiles.planning.predict import predict
from profiles.planning.recommend import plan_engine

PAGE = Path(__file__).parents[2] / "profiles" / "published.md"

Quantity = Literal["GPU memory, GB", "s/step", "tokens/s"]


@dataclass(frozen=True, kw_only=True)
class Row:
    model: str
    engine: str
    machine: str
    quantity: Quantity
    published: float
    workload: Workload
    settings: Mapping[str, Value] = field(default_factory=dict)
    differs: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    source: str
    said: str
    rows: tuple[Row, ...]


ZO2_JOB = Workload(batch_size=1, seq_len=2048, dtype="fp16")
NOTHING_RESIDENT = {"resident_blocks": 0, "fold_every": 1}
TORCHTUNE_JOB = Workload(batch_size=2, seq_len=2048, dtype="bf16")
RANK_8: dict[str, Value] = {"r": 8, "checkpointed_blocks": "all", "loss_tokens": 512}
"""Their loss is computed in eight chunks."""
ON_THE_LAPTOP = Workload(batch_size=1, seq_len=384, accumulation=128, dtype="bf16")
ON_THE_4090 = Workload(batch_size=4, seq_len=1024, accumulation=16, dtype="bf16")


def _zo2(quantity: Quantity, machine: str, published: Mapping[str, float], differs: str) -> tuple[Row, ...]:
    return tuple(
        Row(
            model=model, engine="zo2", machine=machine, quantity=quantity, published=value, workload=ZO2_JOB,
            settings=NOTHING_RESIDENT, differs=differs,
        )
        for model, value in published.items()
    )  # fmt: skip


TABLES = (
    Table(
        source="ZO2, README of liangyuwang/zo2 (097d568): GPU memory by size of OPT",
        said="In fp16, 1 x 2048, nothing resident; CUDA and the allocator's share are in both",
        rows=_zo2(
            "GPU memory, GB",
            "a100-80gb",
            {
                "opt-1.3b": 3.75, "opt-2.7b": 4.14, "opt-6.7b": 4.99, "opt-13b": 6.18, "opt-30b": 8.86,
                "opt-66b": 12.07, "opt-175b": 18.04,
            },
            "theirs has whole perturbed blocks and whole logits",
        ),
    ),
    Table(
        source="ZO2 on an RTX 3090, an unsigned document on GitHub (a weak source)",
        said="In fp16; 1 x 2048 is taken, which the document does not say",
        rows=_zo2(
            "s/step",
            "rtx-3090",
            {"opt-125m": 1 / 8.87, "opt-350m": 1 / 5.20, "opt-1.3b": 1 / 2.28, "opt-2.7b": 1 / 1.14},
            "the authors' code, eager",
        ),
    ),
    Table(
        source="LSP-Offload, arXiv 2406.10181, and the times in its plotting scripts",
        said="A1000 laptop with 32 GB; RTX 4090 with a Threadripper 3970X and 252 GB",
        rows=(
            Row(
                model="deepseek-coder-1.3b", engine="lsp", machine="rtx-a1000-laptop", quantity="s/step",
                published=273.0, workload=ON_THE_LAPTOP, settings={"d": 1280, "r": 4, "projector": "paper"},
                differs="128 sequences of the 384 tokens of their README; the script may have longer ones",
            ),
            Row(
                model="deepseek-coder-6.7b", engine="lsp", machine="rtx-4090", quantity="s/step",
                published=31.36, workload=ON_THE_4090, settings={"d": 2048, "r": 8, "projector": "paper"},
                differs="16 micro-batches of 4; 1024 tokens taken",
            ),
            Row(
                model="deepseek-coder-6.7b", engine="lsp", machine="rtx-4090", quantity="GPU memory, GB",
                published=17.0, workload=ON_THE_4090, settings={"d": 2048, "r": 8, "projector": "paper"},
                differs="theirs is what they print",
            ),
            Row(
                model="deepseek-coder-6.7b", engine="torchao-offload", machine="rtx-4090", quantity="s/step",
                published=65.6, workload=ON_THE_4090,
                differs="theirs is their own Zero-Offload, fp32 on the wire",
            ),
        ),
    ),
    Table(
        source="torchtune, README (0031bfb): memory and training speed of Llama 3.1 8B",
        said="In bf16, 2 x 2048, packed, torch.compile; GiB as published",
        rows=(
            Row(
                model="llama-3.1-8b", engine="adamw-8bit", machine="rtx-4090", quantity="GPU memory, GB",
                published=18.9 * 1.0737, workload=TORCHTUNE_JOB, settings={"paged": True, "loss_tokens": 512},
                differs="gradients are freed one by one there, kept here",
            ),
            Row(
                model="llama-3.1-8b", engine="adamw-8bit", machine="rtx-4090", quantity="tokens/s",
                published=1650, workload=TORCHTUNE_JOB, settings={"paged": True, "loss_tokens": 512},
                differs="here all moments are paged in every step, there hardly any",
            ),
            Row(
                model="llama-3.1-8b", engine="lora", machine="rtx-4090", quantity="GPU memory, GB",
                published=16.2 * 1.0737, workload=TORCHTUNE_JOB, settings=RANK_8,
                differs="adapters and their moments are fp32 here",
            ),
            Row(
                model="llama-3.1-8b", engine="lora", machine="rtx-4090", quantity="tokens/s",
                published=3083, workload=TORCHTUNE_JOB, settings=RANK_8,
                differs="both recompute every block, and take the loss in chunks",
            ),
            Row(
                model="llama-3.1-8b", engine="qlora", machine="rtx-4090", quantity="GPU memory, GB",
                published=7.4 * 1.0737, workload=TORCHTUNE_JOB, settings=RANK_8,
                differs="adapters are fp32 here, and two matrices are wide at a time",
            ),
            Row(
                model="llama-3.1-8b", engine="qlora", machine="rtx-4090", quantity="tokens/s",
                published=2413, workload=TORCHTUNE_JOB, settings=RANK_8,
                differs="NF4 by torchao there, by bitsandbytes here",
            ),
        ),
    ),
    Table(
        source="torchao, torchao/optim/README.md: Llama-2 7B on an A100",
        said="In bf16, Alpaca by torchtune; the batch is not given, 2 x 512 is taken",
        rows=(
            Row(
                model="llama-2-7b", engine="native", machine="a100-80gb", quantity="GPU memory, GB",
                published=51.6, workload=Workload(batch_size=2, seq_len=512),
                settings={"checkpointed_blocks": "all"}, differs="tensors alone there",
            ),
            Row(
                model="llama-2-7b", engine="adamw-8bit", machine="a100-80gb", quantity="GPU memory, GB",
                published=39.3, workload=Workload(batch_size=2, seq_len=512), differs="tensors alone there",
            ),
        ),
    ),
)  # fmt: skip


def predicted(row: Row) -> float:
    """Of the row's quantity, for the settings of the row and those that a plan chooses beside them."""
    machine, shape = find_profile(Path(row.machine)), named_shape(row.model)
    context = PlanningContext(
        engine=row.engine, machine=machine, shape=shape, workload=row.workload,
        budget=budget_of(machine, None, None, None, expandable=False),  # as others' programs have it
    )  # fmt: skip
    given = GivenSettings(dict(row.settings), parse_settings(row.engine, row.settings))
    cost = context.cost(plan_engine(context, given).settings.typed)
    if row.quantity == "GPU memory, GB":
        return gpu_bytes_needed(cost, context.budget) / 1e9
    step_s = predict(cost, machine, row.workload).step_s
    assert step_s is not None
    return step_s if row.quantity == "s/step" else row.workload.tokens_per_step / step_s


def page() -> str:
    """Markdown."""
    head = [
        "# Published numbers beside predictions",
        "",
        "Made by `python tests/support/published_tables.py`; `tests/test_golden.py` holds it to the code.",
        "What is predicted is this program's own engine on the datasheet of the machine; its memory is with",
        "CUDA's context and what the allocator cannot use. Theirs are of their own code: a ratio away from 1",
        "is no error by itself. None went into a constant. ZO2's throughput by model stands in its paper,",
        "whose tables were not to be had here.",
    ]
    return "\n".join([*head, *(line for table in TABLES for line in _lines(table))]) + "\n"


def _told(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _lines(table: Table) -> Iterator[str]:
    yield from ("", f"## {table.source}", "", f"{table.said}.", "")
    yield "| model | method | machine | | published | predicted | predicted / published | what differs |"
    yield "| --- | --- | --- | --- | ---: | ---: | ---: | --- |"
    for row in table.rows:
        value = predicted(row)
        yield (
            f"| {row.model} | `{row.engine}` | {row.machine} | {row.quantity} | {_told(row.published)} | "
            f"{_told(value)} | {value / row.published:.2f} | {row.differs} |"
        )


if __name__ == "__main__":
    sys.stdout.write(page())
