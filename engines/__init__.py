"""How a model is fine-tuned: one method, one file.

The table below is all there is to registration: a row answers every question that the other rooms ask about a
method, and no name of a method stands anywhere but here and in the method's own files. What a row names as
`module:Name` is imported when it is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from engines.errors import UserError
from engines.registry_row import EngineEntry, Library, Role

_ADAPTERS = "adapters, and a head that is new"
_FP32_ADAPTERS = "adapters and their moments in fp32; the weights are not trained"
_NO_LOSS_SCALING = "cannot train in fp16, where gradients underflow without loss scaling"

_DEEPSPEED = Library(module="deepspeed", install="pip install --no-build-isolation 'lspzo-bench[deepspeed]'")

ENGINES: dict[str, EngineEntry] = {
    "native": EngineEntry(
        target="engines.methods.native:Native",
        settings="engines.settings.first_order:NativeSettings",
        costs="engines.costs.native:traffic",
        planner="profiles.planning.methods.native:choose",
        elsewhere="full",
        summary="AdamW, nothing offloaded",
        source="torch.optim.AdamW",
        order="first",
        several_gpus=True,
        role="reference",
        refuses={"fp16": _NO_LOSS_SCALING},
        asked_first=True,
    ),
    "torchao-offload": EngineEntry(
        target="engines.methods.torchao_offload:TorchaoOffload",
        settings="engines.settings.first_order:TorchaoOffloadSettings",
        costs="engines.costs.torchao_offload:traffic",
        planner="profiles.planning.methods.torchao_offload:choose",
        elsewhere="cpu_adamw",
        summary="AdamW on the CPU, gradients down and weights up each step (baseline offloading)",
        source="torchao CPUOffloadOptimizer",
        order="first",
        role="baseline",
        copies="library",
        on_gpu="weights and gradients; with offload_gradients=true weights alone",
        on_host="weights, gradients and moments",
        needs_gpu=True,
        library=Library(module="torchao", install="pip install 'lspzo-bench[torchao]'"),
        refuses={"fp16": _NO_LOSS_SCALING},
    ),
    "lsp": EngineEntry(
        target="engines.methods.lsp:Lsp",
        settings="engines.settings.lsp:LspSettings",
        costs="engines.costs.lsp:traffic",
        planner="profiles.planning.methods.lsp:choose",
        ways_out="profiles.planning.methods.lsp:WAYS_OUT",
        summary="gradients compressed by sparse projectors, Adam on the CPU in the subspace",
        source="LSP-Offload, arXiv 2406.10181",
        order="first",
        several_gpus=True,
        several_machines=True,
        walk="watched",
        role="offload",
        trains="the blocks' matrices in subspaces, all else whole",
        masters="none: weights in the job's precision, moments of the subspaces in fp32",
        on_gpu="weights and projectors; gradients are never all there",
        on_host="moments of the subspaces",
        copies="own",
        refuses={"fp16": _NO_LOSS_SCALING},
        presets="engines.settings.lsp:LSP_PRESETS",
    ),
    "mezo": EngineEntry(
        target="engines.methods.mezo:Mezo",
        settings="engines.settings.zeroth_order:MezoSettings",
        costs="engines.costs.mezo:traffic",
        planner="profiles.planning.methods.mezo:choose",
        ways_out="profiles.planning.methods.mezo:WAYS_OUT",
        summary="zeroth-order, two forward passes, nothing offloaded",
        source="MeZO, arXiv 2305.17333",
        order="zeroth",
        several_gpus=True,
        several_machines=True,
        trains="all weights, or adapters with train=lora",
        trains_by={"all": "all weights", "lora": "adapters"},
        masters="none: there are no states",
        on_gpu="weights",
        walk="driven",
        role="reference",
        generates=True,
    ),
    "zo2": EngineEntry(
        target="engines.methods.zo2:Zo2",
        settings="engines.settings.zeroth_order:Zo2Settings",
        costs="engines.costs.zo2:traffic",
        planner="profiles.planning.methods.zo2:choose",
        ways_out="profiles.planning.methods.mezo:WAYS_OUT",
        summary="zeroth-order, blocks streamed from host memory",
        source="ZO2, arXiv 2503.12668",
        order="zeroth",
        several_gpus=True,
        several_machines=True,
        trains="all weights, or adapters with train=lora",
        trains_by={"all": "all weights", "lora": "adapters"},
        masters="none: there are no states",
        on_gpu="embedding, head and the blocks at work",
        on_host="the blocks, or with disk_blocks some of them on disk",
        walk="driven",
        role="offload",
        reference="mezo",
        copies="own",
        generates=True,
    ),
    "exact-offload": EngineEntry(
        target="engines.methods.exact_offload:ExactOffload",
        settings="engines.settings.exact_offload:ExactOffloadSettings",
        costs="engines.costs.exact_offload:traffic",
        planner="profiles.planning.methods.exact_offload:choose",
        ways_out="profiles.planning.methods.exact_offload:WAYS_OUT",
        elsewhere="cpu_adamw",
        summary="AdamW with fp32 masters on the CPU, block by block behind the backward pass",
        source="ZeRO-Offload, arXiv 2101.06840; block by block as SlideFormer, 2603.16428",
        order="first",
        walk="block_major",
        role="offload",
        several_gpus=True,
        masters="fp32 weights, with fp32 moments",
        on_gpu="weights; gradients are never all there",
        on_host="fp32 weights and moments, gradients",
        copies="own",
        refuses={"fp16": _NO_LOSS_SCALING},
    ),
    "lora": EngineEntry(
        target="engines.methods.lora:Lora",
        settings="engines.settings.libraries:LoraSettings",
        costs="engines.costs.adapters:lora",
        planner="profiles.planning.recomputation:fewest_recomputed",
        ways_out="profiles.planning.methods.lora:WAYS_OUT",
        elsewhere="adapters",
        summary="AdamW on adapters of low rank beside the blocks' matrices, nothing offloaded",
        source="LoRA, arXiv 2106.09685, by PEFT",
        order="first",
        several_gpus=True,
        role="baseline",
        library=Library(module="peft", install="pip install 'lspzo-bench[lora]'"),
        refuses={"fp16": _NO_LOSS_SCALING},
        asked_first=True,
        trains=_ADAPTERS,
        masters=_FP32_ADAPTERS,
    ),
    "qlora": EngineEntry(
        target="engines.methods.qlora:Qlora",
        settings="engines.settings.libraries:QloraSettings",
        costs="engines.costs.adapters:qlora",
        planner="profiles.planning.recomputation:fewest_recomputed",
        ways_out="profiles.planning.methods.lora:WAYS_OUT",
        elsewhere="quantized_adapters",
        summary="adapters of low rank beside matrices of four bits (NF4), nothing offloaded",
        source="QLoRA, arXiv 2305.14314, by PEFT and bitsandbytes",
        order="first",
        several_gpus=True,
        role="baseline",
        library=Library(
            module="peft", also=("bitsandbytes",), install="pip install 'lspzo-bench[lora,bitsandbytes]'"
        ),
        refuses={"fp16": _NO_LOSS_SCALING},
        trains=_ADAPTERS,
        masters=_FP32_ADAPTERS,
        on_gpu="everything, the blocks' matrices in 4 bits",
    ),
    "adamw-8bit": EngineEntry(
        target="engines.methods.adamw_8bit:AdamW8bit",
        settings="engines.settings.libraries:AdamW8bitSettings",
        costs="engines.costs.trained_on_gpu:adamw_8bit",
        planner="profiles.planning.methods.adamw_8bit:choose",
        elsewhere="adamw_8bit",
        summary="AdamW with moments of 8 bits, nothing offloaded",
        source="arXiv 2110.02861, by bitsandbytes",
        order="first",
        role="baseline",
        library=Library(module="bitsandbytes", install="pip install 'lspzo-bench[bitsandbytes]'"),
        refuses={"fp16": _NO_LOSS_SCALING},
        by_default=False,
        masters="none: weights in the job's precision, moments in 8 bits",
        on_host="nothing; with paged=true moments that do not fit",
    ),
    "backward-optimizer": EngineEntry(
        target="engines.methods.backward_optimizer:BackwardOptimizer",
        settings="engines.settings.libraries:BackwardOptimizerSettings",
        costs="engines.costs.trained_on_gpu:backward_optimizer",
        planner="profiles.planning.recomputation:fewest_recomputed",
        elsewhere="optimizer_in_backward",
        summary="AdamW inside the backward pass, gradients freed one by one, nothing offloaded",
        source="as LOMO, arXiv 2306.09782, and torchtune do",
        order="first",
        role="baseline",
        refuses={"fp16": _NO_LOSS_SCALING},
        by_default=False,
        on_gpu="weights and moments; gradients are never all there",
    ),
    "galore": EngineEntry(
        target="engines.methods.galore:Galore",
        settings="engines.settings.libraries:GaloreSettings",
        costs="engines.costs.trained_on_gpu:galore",
        planner="profiles.planning.recomputation:fewest_recomputed",
        elsewhere="projected_gradients",
        summary="AdamW on gradients of the blocks' matrices projected to a low rank, nothing offloaded",
        source="GaLore, arXiv 2403.03507, by galore-torch",
        order="first",
        role="baseline",
        library=Library(
            module="galore_torch", also=("bitsandbytes",), install="pip install 'lspzo-bench[galore]'"
        ),
        refuses={"fp16": _NO_LOSS_SCALING},
        by_default=False,
    ),
    "fsdp2-offload": EngineEntry(
        target="engines.methods.fsdp2_offload:Fsdp2Offload",
        settings="engines.settings.libraries:Fsdp2OffloadSettings",
        costs="engines.costs.fsdp2_offload:traffic",
        elsewhere="streamed_cpu_adamw",
        summary="FSDP2 on one GPU: blocks streamed up, gradients down, AdamW on the CPU",
        source="torch.distributed.fsdp.fully_shard with CPUOffloadPolicy",
        order="first",
        role="baseline",
        copies="library",
        refuses={"fp16": _NO_LOSS_SCALING},
        by_default=False,
        on_gpu="two or three blocks, embedding and head",
        on_host="weights, gradients and moments",
    ),
    "zero2-offload": EngineEntry(
        target="engines.methods.deepspeed_offload:Zero2Offload",
        settings="engines.settings.libraries:DeepspeedSettings",
        costs="engines.costs.deepspeed_offload:zero2",
        summary="ZeRO-2 with offload: AdamW with fp32 masters on the CPU after the backward pass",
        source="ZeRO-Offload, arXiv 2101.06840, by DeepSpeed",
        order="first",
        role="baseline",
        copies="library",
        library=_DEEPSPEED,
        refuses={"fp16": _NO_LOSS_SCALING},
        by_default=False,
        masters="fp32 weights, with fp32 moments",
        on_gpu="weights; gradients in buckets",
        on_host="fp32 weights, gradients and moments",
    ),
    "zero3-offload": EngineEntry(
        target="engines.methods.deepspeed_offload:Zero3Offload",
        settings="engines.settings.libraries:DeepspeedSettings",
        costs="engines.costs.deepspeed_offload:zero3",
        summary="ZeRO-3 with offload: weights streamed up for each pass of each module, AdamW on the CPU",
        source="ZeRO-Infinity, arXiv 2104.07857, by DeepSpeed",
        order="first",
        role="baseline",
        copies="library",
        library=_DEEPSPEED,
        refuses={"fp16": _NO_LOSS_SCALING},
        by_default=False,
        masters="fp32 weights, with fp32 moments",
        on_gpu="the modules at work",
        on_host="weights, fp32 weights, gradients and moments",
    ),
    "zenflow": EngineEntry(
        target="engines.methods.deepspeed_offload:Zenflow",
        settings="engines.settings.libraries:ZenflowSettings",
        costs="engines.costs.deepspeed_offload:zenflow",
        summary="ZenFlow: important columns updated in each step, the rest late on the CPU; another training",
        source="ZenFlow, arXiv 2505.12242, by DeepSpeed",
        order="first",
        role="baseline",
        copies="library",
        library=_DEEPSPEED,
        refuses={"fp16": _NO_LOSS_SCALING},
        by_default=False,
        masters="fp32 weights, with fp32 moments",
        on_gpu="weights, states of the columns chosen; gradients in buckets",
        on_host="fp32 weights, gradients and moments",
    ),
    "scripted": EngineEntry(
        target="engines.methods.scripted:Scripted",
        settings="engines.settings.scripted:ScriptedSettings",
        costs="engines.costs.scripted:traffic",
        summary="scripted times and bytes, no torch: the harness's own test double",
        source="this project",
        order="first",
        role="test_double",
        several_gpus=True,
        several_machines=True,
        needs_torch=False,
    ),
}

EXTERNAL_PREFIX = "external:"
"""Of the names of trainers that are not ours; what follows is the user's."""

_EXTERNAL = EngineEntry(
    target="harness.runs.external.trainer:ExternalTrainer",
    settings="engines.settings.external:ExternalSettings",
    costs="engines.costs.external:traffic",
    summary="another trainer, started as a command",
    source="the user",
    order="first",
    role="external",
    copies="library",
    needs_torch=False,
    by_default=False,
    trains="what its command says",
    masters="not known",
    on_gpu="not known",
    on_host="not known",
)
"""The row of every external trainer; they differ in their settings alone."""

YARDSTICK = "native"
"""The engine that step times and memory of the others are told beside."""


def is_external(name: str) -> bool:
    """Whether `name` is that of a trainer that is not ours."""
    return name.startswith(EXTERNAL_PREFIX)


def engine_of(method: str) -> str:
    """`lsp` of `lsp:half`, which is that engine with settings of its own beside others of it."""
    return method if is_external(method) else method.partition(":")[0]


def entry(name: str) -> EngineEntry:
    """The row of engine `name`. Raises `UserError` for a name that has none."""
    if is_external(name):
        return _EXTERNAL
    if name not in ENGINES:
        public = ", ".join(public_engines())
        raise UserError(f"engine '{name}'", "there is no such engine", f"choose from: {public}")
    return ENGINES[name]


def public_engines() -> tuple[str, ...]:
    """Those for users, in the order of the table."""
    return tuple(name for name, row in ENGINES.items() if row.role != "test_double")


def default_engines() -> tuple[str, ...]:
    """Those that take part where none are named, in the order of the table."""
    return tuple(name for name in public_engines() if ENGINES[name].by_default)


def what_trains(name: str, settings: Mapping[str, object]) -> str:
    """What learns in a run of engine `name` with `settings`, of which those at their defaults may be left
    out."""
    row = entry(name)
    if not row.trains_by:
        return row.trains
    train = str(settings.get("train", next(iter(row.trains_by))))
    return row.trains_by.get(train, f"train={train}")


def trains_everything(name: str) -> bool:
    """Whether engine `name` updates every weight along its gradient: no subspace of it, no adapters."""
    row = entry(name)
    return row.order == "first" and row.trains == EngineEntry.__dataclass_fields__["trains"].default


def engines_of_role(role: Role) -> tuple[str, ...]:
    """Engines with that `EngineEntry.role`, in the order of the table."""
    return tuple(name for name, row in ENGINES.items() if row.role == role)


def generating_engines() -> tuple[str, ...]:
    """Engines that continue prompts, those that offload first."""
    names = [name for name, row in ENGINES.items() if row.generates]
    return tuple(sorted(names, key=lambda name: ENGINES[name].role != "offload"))


def load_engine(name: str) -> Any:
    """The class of engine `name`; imports its module. Raises `UserError` for an unknown name."""
    return load_target(entry(name).target)


def load_target(target: str) -> Any:
    """What a row names as `module:Name`; imports the module."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def why_not_installed(name: str) -> str | None:
    """That the library of engine `name` is missing, and what installs it; `None`: nothing is missing."""
    library = entry(name).library
    if library is None:
        return None
    for module in (library.module, *library.also):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed ({library.install})"
    return None
