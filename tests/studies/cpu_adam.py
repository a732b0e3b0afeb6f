"""Adam on the CPU: how much of memory's rate it reaches by itself, and what it costs a step on a GPU.

    python tests/studies/cpu_adam.py alone --threads 1,2
    python tests/studies/cpu_adam.py steps --model deepseek-coder-1.3b --set d=1280 r=4 --variants all

`alone` runs each kind of update on `--elements`, in pages of 4 KiB and in huge ones, beside torch's addition
in place, which reads and writes all that it touches: the most that any update in place can reach.

`steps` takes steps of one engine in one process, one variant after the other, each with another setting or
another way of scheduling; what a variant changes is in `VARIANTS`. Milliseconds: median of the steps, tenth
and ninetieth percentile, then medians of the busy times of GPU and CPU, and of the CPU while the GPU idled.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from engines.cpu_updates import cpu_adam as kernel  # noqa: E402
from engines.cpu_updates import cpu_threads, pipeline  # noqa: E402
from engines.transfer import pinned  # noqa: E402
from engines.transfer.clock import now_s  # noqa: E402


@contextmanager
def small_pages() -> Iterator[None]:
    """Memory that is made meanwhile is in pages of 4 KiB."""
    with mock.patch.object(mmap, "MADV_HUGEPAGE", mmap.MADV_NOHUGEPAGE):
        yield


@contextmanager
def seldom_switching() -> Iterator[None]:
    """Threads ask for the interpreter's lock after 5 ms, as Python has it, in place of 0.1."""
    with mock.patch.object(pipeline, "SWITCH_INTERVAL_S", sys.getswitchinterval()):
        yield


@contextmanager
def urgent_applying() -> Iterator[None]:
    """The stream that applies updates goes before the one that computes."""
    with mock.patch.object(pipeline, "APPLY_PRIORITY", -1):
        yield


class FixedThreads(cpu_threads.AdamThreads):
    """They are not chosen."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def step_ended(self, cpu_s: float, hiding_s: float | None) -> None:
        """Nothing is learned from steps."""


@contextmanager
def share_of_threads(share: float) -> Iterator[None]:
    """Adam has that share of the threads, and keeps it."""
    count = max(1, round(share * torch.get_num_threads()))
    with mock.patch.object(pipeline, "AdamThreads", partial(FixedThreads, count)):
        yield


@contextmanager
def all_threads() -> Iterator[None]:
    """All but those that it always leaves."""
    with mock.patch.object(pipeline, "AdamThreads", partial(FixedThreads, cpu_threads.most_adam_threads())):
        yield


@contextmanager
def parts_of(elements: int) -> Iterator[None]:
    """A thread takes so many elements at a time."""
    with mock.patch.object(kernel, "FLAGS", (*kernel.FLAGS, f"-DPART={elements}")):
        kernel.compiled.cache_clear()
        try:
            yield
        finally:
            kernel.compiled.cache_clear()


@contextmanager
def chunks_of(elements: int) -> Iterator[None]:
    from engines.settings import lsp_layout

    with mock.patch.object(lsp_layout, "CHUNK_ELEMENTS", elements):
        yield


Variant = tuple[dict[str, Any], list[Callable[[], Any]]]

BF16 = {"moments": "bf16"}


def half() -> Any:
    return share_of_threads(0.5)


VARIANTS: dict[str, Variant] = {
    "fp32": ({}, []),
    "bf16": (BF16, []),
    "fp32, all threads": ({}, [all_threads]),
    "bf16, all threads": (BF16, [all_threads]),
    "fp32, all threads, seldom switching": ({}, [all_threads, seldom_switching]),
    "bf16, all threads, seldom switching": (BF16, [all_threads, seldom_switching]),
    "fp32, half the threads": ({}, [half]),
    "bf16, half the threads": (BF16, [half]),
    "bf16, half, seldom switching": (BF16, [half, seldom_switching]),
    "bf16, a quarter of the threads": (BF16, [lambda: share_of_threads(0.25)]),
    "bf16, half, parts of 8 K": (BF16, [half, lambda: parts_of(8192)]),
    "bf16, half, urgent": (BF16, [half, urgent_applying]),
    "bf16, half, chunks of 4 M": (BF16, [half, lambda: chunks_of(4 << 20)]),
    "fp32, pages of 4 KiB": ({}, [small_pages]),
}
"""Settings, and what is otherwise while the engine lives."""


def best_of(repeats: int, act: Callable[[], None]) -> float:
    taken = []
    for _ in range(repeats):
        began_s = now_s()
        act()
        taken.append(now_s() - began_s)
    return min(taken)


def rates(elements: int, threads: int, repeats: int) -> dict[str, tuple[float, float]]:
    """GB/s and 10^9 elements/s of each kind of update."""
    from engines.costs.exact_offload import adam_bytes
    from engines.costs.lsp import core_adam_bytes
    from engines.cpu_updates.adamw import AdamWMemory, adamw, state_tensors
    from engines.cpu_updates.cpu_adam import core_adam
    from engines.settings.lsp import LspSettings

    torch.set_num_threads(threads)

    def memory(dtype: torch.dtype, count: int) -> torch.Tensor:
        slab = pinned.HostSlab(count * dtype.itemsize, torch.device("cpu"))
        return slab.view(0, (count,), dtype).zero_()

    whole = memory(torch.float32, elements)
    found = {"addition in place": (8.0, best_of(repeats, lambda: whole.add_(1.0)))}
    betas = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    core = memory(torch.bfloat16, elements)
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        m, v = memory(dtype, elements), memory(dtype, elements)
        core.fill_(0.01)
        taken = best_of(repeats, partial(core_adam, core, m, v, 5, **betas))
        moved = core_adam_bytes(2, LspSettings(moments=kind))
        found[f"core, {kind}"] = (moved, taken)
    for kind in ("fp32", "bf16", "int8"):
        wanted = state_tensors(elements, torch.bfloat16, kind)
        state = {name: memory(dtype, shape[0]) for name, (dtype, shape) in wanted.items()}
        weight, gradient = memory(torch.bfloat16, elements), memory(torch.bfloat16, elements)
        gradient.fill_(0.01)
        names = ("rest", "moment", "variance", "moment_scales", "variance_scales")
        held: Any = {name: state.get(name) for name in names}
        kept = AdamWMemory(weight=weight, kind=kind, **held)
        update = partial(adamw, gradient, kept, 5, key=7, learning_rate=1e-3, weight_decay=0.1, scale=1.0)
        taken = best_of(repeats, partial(update, **betas))
        found[f"weights, {kind}"] = (adam_bytes(2, kind), taken)
    return {
        name: (size * elements / taken / 1e9, elements / taken / 1e9) for name, (size, taken) in found.items()
    }


def alone(arguments: argparse.Namespace) -> None:
    for pages in arguments.pages.split(","):
        with small_pages() if pages == "small" else ExitStack():
            for threads in map(int, arguments.threads.split(",")):
                found = rates(arguments.elements, threads, arguments.repeats)
                most = found["addition in place"][0]
                for name, (gb, elements) in found.items():
                    print(
                        f"{pages} pages, {threads} threads, {name}: {gb:.1f} GB/s ({gb / most:.0%}), "
                        f"{elements:.2f} G elements/s",
                        flush=True,
                    )


def made_engine(arguments: argparse.Namespace, changed: dict[str, Any], steps: int) -> tuple[Any, Any]:
    """An engine with random weights that is set up for so many steps, and what gives its batches."""
    from engines import load_engine
    from engines.base import Context
    from engines.settings.parse import parse_settings
    from harness.data.batches import make_data
    from harness.models.blueprint import make_blueprint
    from harness.records.job import DataSource, Job, ModelSource
    from harness.resolve import resolve_shape

    job = Job(
        model=ModelSource(name=arguments.model, random_weights=True),
        data=DataSource(train="random"),
        batch_size=arguments.batch_size,
        seq_len=arguments.seq_len,
        accumulation=arguments.accumulation,
        dtype="bf16",
        steps=steps,
        warmup_steps=0,
    )
    given = dict(each.split("=", 1) for each in arguments.set)
    settings = parse_settings(arguments.engine, {"learning_rate": "1e-6", **given, **changed})
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    context = Context(device=device, workload=job.workload, seed=0, total_steps=steps)
    engine = load_engine(arguments.engine)(settings, context)
    data = make_data(job, resolve_shape(job))
    blueprint = make_blueprint(job, resolve_shape(job), data.step_batches(0)[0])
    engine.setup(blueprint)
    blueprint.release()
    return engine, data


def take_steps(arguments: argparse.Namespace, changed: dict[str, Any]) -> list[list[float | None]]:
    """Of each step but the first ones: its seconds, and those of GPU, CPU, and CPU exposed."""
    engine, data = made_engine(arguments, changed, arguments.steps)
    told = []
    try:
        for step in range(arguments.steps):
            batches = data.step_batches(step)
            began_s = now_s()
            stats = engine.step(batches)
            told.append([now_s() - began_s, stats.gpu_s, stats.cpu_s, stats.cpu_exposed_s])
        engine.synchronize()
    finally:
        engine.close()
    return told[arguments.skip :]


def steps(arguments: argparse.Namespace) -> None:
    wanted = list(VARIANTS) if arguments.variants == "all" else arguments.variants.split(";")
    for name in wanted:
        changed, ways = VARIANTS[name]
        with ExitStack() as stack:
            for way in ways:
                stack.enter_context(way())
            began_s = now_s()
            told = take_steps(arguments, changed)
        columns = [[1e3 * value for value in each if value is not None] for each in zip(*told, strict=True)]
        tenths = statistics.quantiles(columns[0], n=10) if len(columns[0]) > 1 else columns[0] * 9
        busy = [f"{statistics.median(each):.1f}" if each else "not measured" for each in columns[1:]]
        print(
            f"{arguments.engine}, {name}: {statistics.median(columns[0]):.1f} ms "
            f"({tenths[0]:.1f} to {tenths[-1]:.1f}); gpu, cpu, cpu exposed: {', '.join(busy)}; "
            f"{now_s() - began_s:.0f} s in all",
            flush=True,
        )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parts = parser.add_subparsers(required=True)
    one = parts.add_parser("alone")
    one.add_argument("--threads", default="1,2")
    one.add_argument("--pages", default="small,huge")
    one.add_argument("--elements", type=int, default=64 << 20)
    one.add_argument("--repeats", type=int, default=7)
    one.set_defaults(act=alone)
    other = parts.add_parser("steps")
    other.add_argument("--engine", default="lsp")
    other.add_argument("--model", default="deepseek-coder-1.3b")
    other.add_argument("--batch-size", type=int, default=4)
    other.add_argument("--seq-len", type=int, default=1024)
    other.add_argument("--accumulation", type=int, default=1)
    other.add_argument("--steps", type=int, default=40)
    other.add_argument("--skip", type=int, default=8, help="steps at the beginning that do not count")
    other.add_argument("--set", nargs="*", default=["d=1280", "r=4", "checkpointed_blocks=0"])
    other.add_argument("--variants", default="all", help=f"of {'; '.join(VARIANTS)}")
    other.set_defaults(act=steps)
    arguments = parser.parse_args(argv)
    arguments.act(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
