"""How a model is fine-tuned: one method, one file.

The table below is all there is to registration: a row answers every question that the other rooms ask about a
method, and no name of a method stands anywhere but here and in the method's own files. What a row names as
`module:Name` is imported when it is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from engines.errors import UserError

_NO_LOSS_SCALING = "cannot train in fp16, where gradients underflow without loss scaling; use bf16 or fp32"


Role = Literal["reference", "baseline", "offload", "test_double"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """A package that a method needs, and that not everybody has installed."""

    module: str
    """What is imported."""
    install: str
    """The command that installs it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineEntry:
    """One method. Names of classes and functions are `module:Name`."""

    target: str
    """The engine: a class with the methods of `engines.base.Engine`."""
    settings: str
    """Its settings: a frozen dataclass in which every field has a default; imports no torch."""
    costs: str
    """What a step asks of a machine: `(ModelShape, Workload, settings) -> Traffic`; imports no torch."""
    planner: str | None = None
    """Chooses settings for a machine: `(PlanningContext, GivenSettings) -> Choice`, imports no torch; `None`:
    there is nothing to choose."""
    summary: str
    source: str
    """Paper or library."""
    order: Literal["first", "zeroth"]
    """What a step learns from: gradients, or losses alone. A step of one is not worth one of the other."""
    role: Role
    """`reference`: an algorithm with everything on the GPU. `baseline`: what others stand beside. `offload`:
    a method that this project is about. `test_double`: for the harness's own tests, not for users."""
    reference: str | None = None
    """The engine, of another row, that takes the same steps with nothing offloaded: losses are compared bit
    for bit."""
    copies: Literal["own", "library", "none"] = "none"
    """Who copies between host and GPU in a step: `engines.transfer.link`, a library out of our hands,
    nobody."""
    generates: bool = False
    """It continues prompts too."""
    needs_torch: bool = True
    needs_gpu: bool = False
    """It does not run on a CPU."""
    library: Library | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Precisions that it does not train in, each with the reason."""
    presets: str | None = None
    """Settings that its authors published, by model: a mapping of mappings."""


ENGINES: dict[str, EngineEntry] = {
    "native": EngineEntry(
        target="engines.methods.native:Native",
        settings="engines.settings.first_order:NativeSettings",
        costs="engines.costs.native:traffic",
        planner="profiles.planning.native:choose",
        summary="AdamW, everything on the GPU",
        source="torch.optim.AdamW",
        order="first",
        role="reference",
        refuses={"fp16": _NO_LOSS_SCALING},
    ),
    "torchao-offload": EngineEntry(
        target="engines.methods.torchao_offload:TorchaoOffload",
        settings="engines.settings.first_order:TorchaoOffloadSettings",
        costs="engines.costs.torchao_offload:traffic",
        planner="profiles.planning.torchao_offload:choose",
        summary="AdamW on the CPU, gradients down and weights up each step (baseline offloading)",
        source="torchao CPUOffloadOptimizer",
        order="first",
        role="baseline",
        copies="library",
        needs_gpu=True,
        library=Library(module="torchao", install="pip install 'lspzo-bench[torchao]'"),
        refuses={"fp16": _NO_LOSS_SCALING},
    ),
    "lsp": EngineEntry(
        target="engines.methods.lsp:Lsp",
        settings="engines.settings.lsp:LspSettings",
        costs="engines.costs.lsp:traffic",
        planner="profiles.planning.lsp:choose",
        summary="gradients compressed by sparse projectors, Adam on the CPU in the subspace",
        source="LSP-Offload, arXiv 2406.10181",
        order="first",
        role="offload",
        copies="own",
        refuses={"fp16": _NO_LOSS_SCALING},
        presets="engines.settings.lsp:LSP_PRESETS",
    ),
    "mezo": EngineEntry(
        target="engines.methods.mezo:Mezo",
        settings="engines.settings.zeroth_order:MezoSettings",
        costs="engines.costs.mezo:traffic",
        planner="profiles.planning.mezo:choose",
        summary="zeroth-order, two forward passes, everything on the GPU",
        source="MeZO, arXiv 2305.17333",
        order="zeroth",
        role="reference",
        generates=True,
    ),
    "zo2": EngineEntry(
        target="engines.methods.zo2:Zo2",
        settings="engines.settings.zeroth_order:Zo2Settings",
        costs="engines.costs.zo2:traffic",
        planner="profiles.planning.zo2:choose",
        summary="zeroth-order, blocks streamed from host memory",
        source="ZO2, arXiv 2503.12668",
        order="zeroth",
        role="offload",
        reference="mezo",
        copies="own",
        generates=True,
    ),
    "exact-offload": EngineEntry(
        target="engines.methods.exact_offload:ExactOffload",
        settings="engines.settings.exact_offload:ExactOffloadSettings",
        costs="engines.costs.exact_offload:traffic",
        planner="profiles.planning.exact_offload:choose",
        summary="AdamW with fp32 masters on the CPU, block by block behind the backward pass",
        source="ZeRO-Offload, arXiv 2101.06840; block by block as SlideFormer, 2603.16428",
        order="first",
        role="offload",
        copies="own",
        refuses={"fp16": _NO_LOSS_SCALING},
    ),
    "scripted": EngineEntry(
        target="engines.methods.scripted:Scripted",
        settings="engines.settings.scripted:ScriptedSettings",
        costs="engines.costs.scripted:traffic",
        summary="scripted times and bytes, no torch: the harness's own test double",
        source="this project",
        order="first",
        role="test_double",
        needs_torch=False,
    ),
}

YARDSTICK = "native"
"""The engine that step times and memory of the others are told beside."""


def entry(name: str) -> EngineEntry:
    """The row of engine `name`. Raises `UserError` for a name that has none."""
    if name not in ENGINES:
        public = ", ".join(public_engines())
        raise UserError(f"engine '{name}'", "there is no such engine", f"choose from: {public}")
    return ENGINES[name]


def public_engines() -> tuple[str, ...]:
    """Those for users, in the order of the table."""
    return tuple(name for name, row in ENGINES.items() if row.role != "test_double")


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
    if library is None or importlib.util.find_spec(library.module) is not None:
        return None
    return f"{library.module} is not installed ({library.install})"
