"""What starting a block of each method takes the CPU, in launches, beside what the cost model counts.

    python tests/studies/launch_counts.py --out FILE.json [--device cuda:0] [--seconds 1] [--cases REGEX]
        [--threads 1] [--limit 90]
    python tests/studies/launch_counts.py --table FILE.json [FILE.json ...]

A launch is what the probe measures (`profiles.probe.launches`): what one operation of a tiny Llama's block
takes, with autograd, or without it for methods that have forward passes only. Blocks here are tiny too, so
that a step is Python, torch and the driver, and nothing waits for the device. A step of 12 blocks less one of
4, over 8, is what a block takes. Cores may run at two speeds and change within a second, so both models
and the launch take turns, and the quickest of each count. On a CPU its arithmetic is in it;
on a GPU kernels one after the other are, where the blocks are a graph.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from engines import ENGINES, load_engine  # noqa: E402
from engines.base import Context  # noqa: E402
from engines.costs.table import traffic  # noqa: E402
from engines.settings.parse import parse_settings  # noqa: E402
from engines.shapes import ModelShape  # noqa: E402
from harness.records.job import DataSource, Job, ModelSource  # noqa: E402
from harness.resolve import resolve_shape  # noqa: E402
from profiles.probe.launches import forward_s, training_s  # noqa: E402

SHALLOW, DEEP = 4, 12
"""Blocks of the two models."""
WARMUP_S = 0.3
TURNS = 10
"""Of both models and the launch, one after the other."""
QUICKEST = 0.1
"""Share of the samples below which the one lies that counts."""
HIDDEN, TOKENS = 64, 16

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 256,
        "max_position_embeddings": 64,
    },
    "opt": {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": 4 * HIDDEN,
        "num_attention_heads": 4,
        "vocab_size": 256,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 64,
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A method with its settings, on blocks of one family."""

    engine: str
    family: str
    settings: dict[str, str] = field(default_factory=dict)
    checkpointing: bool = False
    accumulation: int = 1

    @property
    def name(self) -> str:
        told = [self.engine, self.family, *(f"{key}={value}" for key, value in self.settings.items())]
        if self.accumulation > 1:
            told.append(f"x{self.accumulation}")
        return " ".join([*told, *(["recomputed"] if self.checkpointing else [])])


EAGER, COMPILED = {"compile": "false", "graphs": "false"}, {"graphs": "false"}
CASES = (
    Case(engine="backward-optimizer", family="llama", settings=COMPILED),
    Case(engine="backward-optimizer", family="opt", settings=COMPILED),
    Case(engine="adamw-8bit", family="llama", settings=COMPILED),
    Case(engine="adamw-8bit", family="opt", settings=COMPILED),
    Case(engine="native", family="llama", settings=COMPILED),
    Case(engine="native", family="opt", settings=COMPILED),
    Case(engine="native", family="llama", settings=COMPILED, checkpointing=True),
    Case(engine="native", family="llama", settings={"compile": "true", "graphs": "false"}),
    Case(engine="native", family="opt", settings={"compile": "true", "graphs": "false"}),
    Case(engine="backward-optimizer", family="llama", settings={"compile": "true", "graphs": "false"}),
    Case(engine="mezo", family="llama"),
    Case(engine="mezo", family="opt"),
    Case(engine="zo2", family="llama", settings={"resident_blocks": "0"}),
    Case(engine="zo2", family="opt", settings={"resident_blocks": "0"}),
    Case(engine="lsp", family="llama", settings={"d": "16"}),
    Case(engine="lsp", family="opt", settings={"d": "16"}),
    Case(engine="exact-offload", family="llama"),
    Case(engine="exact-offload", family="opt"),
    Case(engine="galore", family="llama", settings={**COMPILED, "rank": "8"}),
    Case(engine="native", family="llama", settings=EAGER),
    Case(engine="native", family="opt", settings=EAGER),
    Case(engine="native", family="qwen2", settings=EAGER),
    Case(engine="native", family="llama", settings=EAGER, checkpointing=True),
    Case(engine="native", family="opt", settings=EAGER, checkpointing=True),
    Case(engine="lora", family="llama", settings=EAGER),
    Case(engine="lora", family="opt", settings=EAGER),
    Case(engine="lsp", family="llama", settings={"d": "16", "compile": "false"}),
    *(
        Case(engine=engine, family="llama", settings=settings, accumulation=accumulation)
        for engine, settings in (
            ("native", EAGER),
            ("lsp", {"d": "16", "compile": "false"}),
            ("lsp", {"d": "16", "compile": "false", "weights": "streamed"}),
            ("exact-offload", EAGER),
        )
        for accumulation in (2, 4)
    ),
    Case(engine="lsp", family="llama", settings={"d": "16", "compile": "false", "weights": "streamed"}),
    *(
        Case(engine=engine, family="llama", settings=settings, accumulation=accumulation)
        for engine, settings in (
            ("lsp", {"d": "16", "weights": "streamed"}),
            ("exact-offload", COMPILED),
        )
        for accumulation in (1, 4)
    ),
    Case(engine="exact-offload", family="llama", settings=EAGER),
    Case(engine="exact-offload", family="llama", settings={**EAGER, "gpu_blocks": "11"}),
    Case(engine="torchao-offload", family="llama"),
    *(Case(engine="fsdp2-offload", family=family) for family in ("llama", "opt")),
    Case(engine="fsdp2-offload", family="llama", checkpointing=True),
    *(
        Case(engine="exact-offload", family=family, settings={"gpu_blocks": "11", **settings})
        for family, settings in (("llama", {}), ("opt", {}), ("llama", COMPILED))
    ),
    *(Case(engine=engine, family="llama") for engine in ("native", "lora", "qlora")),
    Case(engine="backward-optimizer", family="llama", settings=EAGER),
    Case(engine="backward-optimizer", family="opt", settings=EAGER),
    Case(engine="adamw-8bit", family="llama", settings=EAGER),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What one case took."""

    name: str
    block_s: float | None
    """Of the CPU's, for a block."""
    launch_s: float
    """What the probe's operation took beside it."""
    counted: float
    """Launches of a block by the cost model, of those that wait too."""
    outside_s: float | None = None
    """What is not in blocks."""
    why_not: str | None = None

    @property
    def taken(self) -> float | None:
        """In launches."""
        return None if self.block_s is None else self.block_s / self.launch_s


def config_folder(family: str, blocks: int, folder: Path) -> Path:
    """One with a configuration of so many blocks, as a job names it."""
    made = folder / f"{family}-{blocks}"
    made.mkdir(exist_ok=True)
    content = {**FAMILIES[family], "num_hidden_layers": blocks, "torch_dtype": "float32"}
    (made / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return made


def job_of(case: Case, folder: Path, device: str) -> Job:
    """In bf16 on a GPU; a CPU's arithmetic takes longer in it."""
    return Job(
        model=ModelSource(name=str(folder), random_weights=True),
        data=DataSource(train="random"),
        batch_size=1,
        seq_len=TOKENS,
        dtype="bf16" if device.startswith("cuda") else "fp32",
        checkpointing=case.checkpointing,
        accumulation=case.accumulation,
        steps=1000,
        warmup_steps=0,
    )


def counted_launches(case: Case, job: Job, shape: ModelShape) -> float:
    """Of a block; a Triton kernel counts as none, since the model counts it by another figure."""
    layers = traffic(case.engine, shape, job.workload, parse_settings(case.engine, case.settings)).layers
    blocks = [each for each in layers if each.name.startswith("block.")]
    return sum(each.launches + each.python_launches + each.waited_launches for each in blocks) / len(blocks)


@contextmanager
def stepping(
    case: Case, job: Job, shape: ModelShape, device: str
) -> Iterator[Callable[[float], list[float]]]:
    """What takes steps for so many seconds and gives those of each, which is waited for."""
    from harness.data.batches import make_data
    from harness.models.blueprint import make_blueprint

    context = Context(device=device, workload=job.workload, seed=0, total_steps=job.steps)
    engine = load_engine(case.engine)(parse_settings(case.engine, case.settings), context)
    data = make_data(job, shape)
    batches = data.step_batches(0)
    engine.setup(make_blueprint(job, shape, batches[0]))

    def steps(seconds: float) -> list[float]:
        samples: list[float] = []
        start = time.perf_counter()
        while not samples or time.perf_counter() - start < seconds:
            before = time.perf_counter()
            engine.step(batches)
            engine.synchronize()
            samples.append(time.perf_counter() - before)
        return samples

    try:
        for _ in range(3):  # compiled and captured in them
            engine.step(batches)
        steps(WARMUP_S)
        yield steps
    finally:
        engine.close()


def quick(samples: list[float]) -> float:
    return sorted(samples)[int(QUICKEST * len(samples))]


def measure(case: Case, device: str, seconds: float, folder: Path) -> Found:
    """Raises what the engine raises."""
    forward_only = ENGINES[case.engine].order == "zeroth"
    probe: Callable[[float, str], Any] = forward_s if forward_only else training_s
    took: dict[int, list[float]] = {SHALLOW: [], DEEP: []}
    launches: list[float] = []
    counted = 0.0
    with ExitStack() as engines:
        steps: dict[int, Callable[[float], list[float]]] = {}
        for blocks in took:
            job = job_of(case, config_folder(case.family, blocks, folder), device)
            shape = resolve_shape(job)
            counted = counted_launches(case, job, shape)
            steps[blocks] = engines.enter_context(stepping(case, job, shape, device))
        for _ in range(TURNS):
            for blocks, samples in took.items():
                samples += steps[blocks](seconds / TURNS)
            launches.append(probe(seconds / TURNS, device).low)
    shallow_s, deep_s = quick(took[SHALLOW]), quick(took[DEEP])
    block_s = (deep_s - shallow_s) / (DEEP - SHALLOW)
    return Found(
        name=case.name,
        block_s=block_s,
        launch_s=min(launches),
        counted=counted,
        outside_s=shallow_s - SHALLOW * block_s,
    )


def found_of(case: Case, device: str, seconds: float) -> Found:
    """What it took, or why it does not run here."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            return measure(case, device, seconds, Path(temporary))
        except Exception as error:  # the next case is measured all the same
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return Found(name=case.name, block_s=None, launch_s=0.0, counted=0.0, why_not=why)


def line_of(found: Found) -> str:
    if found.taken is None:
        return f"| {found.name} | - | - | - | - | {found.why_not} |"
    assert found.block_s is not None
    outside = "-" if found.outside_s is None else f"{found.outside_s / found.launch_s:.0f}"
    return (
        f"| {found.name} | {found.taken:.0f} | {found.counted:.0f} | {outside} | {1e6 * found.block_s:.0f} "
        f"| {1e6 * found.launch_s:.1f} |"
    )


HEADER = (
    "| case | launches of a block | counted | outside of blocks | block, us | launch, us |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: |"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    parser.add_argument("--device", default=None, help="cuda:0 where there is a GPU")
    parser.add_argument("--seconds", type=float, default=1.0, help="of steps of each model")
    parser.add_argument("--cases", default="", help="those whose name has it, a regular expression")
    parser.add_argument("--threads", type=int, help="of torch's on the CPU; one where there is no GPU")
    parser.add_argument("--limit", type=float, help="begin no case after so many seconds")
    arguments = parser.parse_args()
    if arguments.table:
        for path in arguments.table:
            told = json.loads(path.read_text(encoding="utf-8"))
            print(f"{told['device']}\n\n{HEADER}")
            for each in told["cases"]:
                print(line_of(Found(**each)))
        return 0
    import torch

    device = arguments.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    threads = arguments.threads or (None if device.startswith("cuda") else 1)
    if threads is not None:
        torch.set_num_threads(threads)
    named = torch.cuda.get_device_name() if device.startswith("cuda") else "a CPU"
    cases = tuple(each for each in CASES if re.search(arguments.cases, each.name))
    print(HEADER, flush=True)
    done: list[Found] = []
    start = time.perf_counter()
    for case in cases:
        if arguments.limit is not None and time.perf_counter() - start > arguments.limit:
            print(f"{arguments.limit:g} s are used up: {case.name} and what follows is left out")
            break
        found = found_of(case, device, arguments.seconds)
        print(line_of(found), flush=True)
        done.append(found)
        if arguments.out:
            content = {
                "device": named,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "cases": [asdict(each) for each in done],
            }
            with suppress(FileNotFoundError):
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
