"""How a model is fine-tuned: one method, one file.

The table below is all there is to registration; an engine's module is imported when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from engines.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineEntry:
    target: str
    """`module:Class`."""
    summary: str
    source: str
    """Paper or library."""
    copies: Literal["own", "library", "none"] = "none"
    """Who copies between host and GPU in a step: `engines.transfer.link`, a library out of our hands,
    nobody."""


ENGINES: dict[str, EngineEntry] = {
    "native": EngineEntry(
        target="engines.methods.native:Native",
        summary="AdamW, everything on the GPU",
        source="torch.optim.AdamW",
    ),
    "torchao-offload": EngineEntry(
        target="engines.methods.torchao_offload:TorchaoOffload",
        summary="AdamW on the CPU, gradients down and weights up each step (baseline offloading)",
        source="torchao CPUOffloadOptimizer",
        copies="library",
    ),
    "lsp": EngineEntry(
        target="engines.methods.lsp:Lsp",
        summary="gradients compressed by sparse projectors, Adam on the CPU in the subspace",
        source="LSP-Offload, arXiv 2406.10181",
        copies="own",
    ),
    "mezo": EngineEntry(
        target="engines.methods.mezo:Mezo",
        summary="zeroth-order, two forward passes, everything on the GPU",
        source="MeZO, arXiv 2305.17333",
    ),
    "zo2": EngineEntry(
        target="engines.methods.zo2:Zo2",
        summary="zeroth-order, blocks streamed from host memory",
        source="ZO2, arXiv 2503.12668",
        copies="own",
    ),
    "scripted": EngineEntry(
        target="engines.methods.scripted:Scripted",
        summary="scripted times and bytes, no torch: the harness's own test double",
        source="this project",
    ),
}


def entry(name: str) -> EngineEntry:
    """The table's line for engine `name`. Raises `UserError` for a name that is not in it."""
    if name not in ENGINES:
        public = ", ".join(key for key in ENGINES if key != "scripted")
        raise UserError(f"engine '{name}'", "there is no such engine", f"choose from: {public}")
    return ENGINES[name]


def load_engine(name: str) -> Any:
    """The class of engine `name`; imports its module. Raises `UserError` for an unknown name."""
    module, _, cls = entry(name).target.partition(":")
    return getattr(import_module(module), cls)
