"""What the table of methods says of one: a row of `engines.ENGINES`. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Walk = Literal["own", "watched", "block_major", "driven"]
"""How a method goes through a model's blocks: as the model's own forward does; the same, with the blocks
watched; all micro-batches through a block at a time; or block by block, by itself
(`engines.model.model_check`)."""

Role = Literal["reference", "baseline", "offload", "external", "test_double"]

Elsewhere = Literal[
    "full", "cpu_adamw", "streamed_cpu_adamw", "adapters", "quantized_adapters", "adamw_8bit",
    "projected_gradients", "optimizer_in_backward",
]  # fmt: skip
"""Methods that common training programs have too: AdamW over all weights, the same with the optimizer on the
CPU, and with the weights there as well, and so on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """A package that a method needs, and that not everybody has installed."""

    module: str
    """What is imported."""
    also: tuple[str, ...] = ()
    """What else is imported, of other packages."""
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
    ways_out: str | None = None
    """Settings that let it fit where it does not and that no planner chooses, since they cost quality: a
    tuple of `profiles.planning.context.SettingChange`; imports no torch."""
    elsewhere: Elsewhere | None = None
    """What it is in other people's programs, for configurations of theirs; `None`: they do not have it."""
    summary: str
    source: str
    """Paper or library."""
    order: Literal["first", "zeroth"]
    """What a step learns from: gradients, or losses alone. A step of one is not worth one of the other."""
    role: Role
    """`reference`: an algorithm with everything on the GPU. `baseline`: what others stand beside. `offload`:
    a method that this project is about. `external`: another trainer, started as a command. `test_double`: for
    the harness's own tests, not for users."""
    reference: str | None = None
    """The engine, of another row, that takes the same steps with nothing offloaded: losses are compared bit
    for bit."""
    copies: Literal["own", "library", "none"] = "none"
    """Who copies between host and GPU in a step: `engines.transfer.link`, a library out of our hands,
    nobody."""
    several_gpus: bool = False
    """Its steps can be divided among several processes with a GPU each (`engines.world`)."""
    several_machines: bool = False
    """These may be on several machines."""
    generates: bool = False
    """It continues prompts too."""
    walk: Walk = "own"
    """What it asks of a model's blocks: `engines.shapes.ModelShape.why_not_walked` says which models refuse
    it. Settings may ask for more (`block_major`)."""
    needs_torch: bool = True
    needs_gpu: bool = False
    """It does not run on a CPU."""
    library: Library | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Precisions that it does not train in, each with the reason."""
    by_default: bool = True
    """It takes part where no methods are named."""
    asked_first: bool = False
    """What most people would use: where nothing tells against it, it is the answer before other methods."""
    trains: str = "all weights"
    """What learns."""
    trains_by: Mapping[str, str] = field(default_factory=dict)
    """Where a setting `train` decides: what learns, by its values, its default first."""
    masters: str = "none: states in the weights' precision"
    """Master copies of what is trained, and the precision of the optimizer's states."""
    on_gpu: str = "everything"
    """What is held there between steps."""
    on_host: str = "nothing"
    """What is held in host memory between steps."""
    presets: str | None = None
    """Settings that its authors published, by model: a mapping of mappings."""
