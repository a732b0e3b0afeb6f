"""The rooms do not blur: what may import what, what stays free of torch, and one home for each hazard.

Everything is read from the source by its syntax; imports inside functions and for type checkers count too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from engines import ENGINES

ROOT = Path(__file__).parent.parent
PACKAGES = ("engines", "harness", "profiles", "reports")

TIERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "engines": (
        ("errors", "shapes", "kernels"),
        ("__init__",),
        ("settings", "base"),
        ("costs", "transfer", "noise", "decoding"),
        ("model",),
        ("quantized", "first_order"),
        ("offload", "subspace"),
        ("zeroth_order",),
        ("methods",),
    ),
    "harness": (
        ("__init__",),
        ("progress", "records"),
        ("models",),
        ("data",),
        ("resolve", "runs"),
        ("training", "pipeline"),
        ("cli",),
        ("__main__",),
    ),
    "profiles": (
        ("__init__",),
        ("documents", "units"),
        ("machine",),
        ("catalog", "figures", "system"),
        ("planning", "display", "probe"),
        ("doctor",),
    ),
    "reports": (
        ("__init__", "messages", "charts"),
        ("criteria",),
        ("format", "load"),
        ("metrics",),
        ("exactness", "breakdown"),
        ("warnings",),
        ("decide",),
        ("tables",),
        ("provenance",),
        ("render",),
        ("index",),
        ("commands",),
        ("poc",),
    ),
}
"""From the lowest: a file may import its own folder's, and what lies in a lower tier."""

MAY_TAKE = {
    "engines": (),
    "profiles": (
        "engines", "engines.errors", "engines.shapes", "engines.settings", "engines.costs",
        "engines.decoding",
    ),
    "harness": ("engines.*", "profiles.*"),
    "reports": ("engines.*", "profiles.*", "harness.*"),
}  # fmt: skip
"""Of other packages: a module, a folder, or with a star all of it."""

TORCH_FREE = (
    "engines", "engines.errors", "engines.shapes", "engines.base", "engines.settings", "engines.costs",
    "engines.decoding", "engines.methods.scripted", "engines.zeroth_order.estimators",
    "profiles",
    "harness", "harness.progress", "harness.records", "harness.models.configs", "harness.resolve",
    "harness.data.records", "harness.data.builtin", "harness.data.examples", "harness.data.reading",
    "harness.runs", "harness.pipeline", "harness.training.update_log", "harness.cli",
    "reports",
)  # fmt: skip
"""Modules and whole folders that import no torch when they are imported, nor transformers."""

_TRITON = "Triton is not there on every machine"
_TRAINS = "imports torch; what is wrong with the arguments is said without it"
_CHILD = "imports torch; engines without it (the test double) do not wait for it"
INSIDE_FUNCTIONS = {
    "engines.noise.weight_pass -> engines.noise.weight_pass_kernels": _TRITON,
    "engines.quantized.quantized_pass -> engines.quantized.quantized_pass_kernels": _TRITON,
    "engines.subspace.apply -> engines.subspace.projector_kernels": _TRITON,
    "engines.subspace.projector -> engines.subspace.projector_kernels": _TRITON,
    "engines.transfer.throttle -> engines.transfer.throttle_kernels": _TRITON,
    "engines.zeroth_order.chunked_loss -> engines.zeroth_order.chunked_loss_kernels": _TRITON,
    "engines.zeroth_order.low_rank_noise -> engines.noise.low_rank_kernels": _TRITON,
    "engines.zeroth_order.perturbed_model -> engines.kernels.paired_layer_norm": _TRITON,
    "harness.cli.generate -> harness.training.generate": _TRAINS,
    "harness.cli.generate -> harness.training.train": _TRAINS,
    "harness.cli.train -> harness.training.find_lr": _TRAINS,
    "harness.cli.train -> harness.training.train": _TRAINS,
    "harness.pipeline -> harness.data.batches": "imports torch, which only data of files needs here",
    "harness.pipeline -> harness.data.tokenized": "imports torch, which only data of files needs here",
    "harness.resolve -> harness.models.meta": "imports torch, only for families without a closed form",
    "harness.runs.worker -> harness.data.batches": _CHILD,
    "harness.runs.worker -> harness.data.tokenized": _CHILD,
    "harness.runs.worker -> harness.models.blueprint": _CHILD,
    "harness.runs.worker -> engines.transfer.calibrate": _CHILD,
}
"""`importing module -> imported module` inside a function, and why."""


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules of ours that a file imports, and whether it does so inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [
                sub if (sub := f"{node.module}.{alias.name}") in modules() else node.module
                for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] in PACKAGES:
                yield name, id(node) in inside


def room(module: str) -> str:
    """The folder below the package that a module is in, or the module itself."""
    parts = module.split(".")
    return "__init__" if len(parts) == 1 else parts[1]


def tier(module: str) -> int:
    package = module.split(".")[0]
    return next(i for i, rooms in enumerate(TIERS[package]) if room(module) in rooms)


def test_every_room_has_its_tier() -> None:
    for module in modules():
        package = module.split(".")[0]
        assert any(room(module) in rooms for rooms in TIERS[package]), module


def _goes_up(module: str, taken: str) -> bool:
    package, other = module.split(".")[0], taken.split(".")[0]
    if package == other:
        return room(module) != room(taken) and tier(taken) >= tier(module)
    allowed = MAY_TAKE[package]
    return not any(
        taken.startswith(f"{name[:-2]}.") or taken == name[:-2]
        if name.endswith(".*")
        else taken == name or (name.count(".") == 1 and taken.startswith(f"{name}."))
        for name in allowed
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    up = [
        f"{module} -> {taken}"
        for module, path in modules().items()
        if module.split(".")[0] == package
        for taken, _ in imports(path)
        if _goes_up(module, taken)
    ]
    assert up == []


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan, 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in arrows.get(node, ()):
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            own = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(own) > 1:
                found.append(sorted(own))

    for node in arrows:
        if node not in order:
            visit(node)
    return found


def test_there_is_no_circle_of_files() -> None:
    arrows: dict[str, set[str]] = defaultdict(set)
    for module, path in modules().items():
        arrows[module] |= {taken for taken, _ in imports(path) if taken != module}
    assert circles(arrows) == []


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_folders_have_no_code_of_their_own() -> None:
    for module, path in modules().items():
        if path.name == "__init__.py" and "." in module:
            assert path.read_text(encoding="utf-8").strip() == "", path


def test_imports_inside_functions_are_on_the_list() -> None:
    found = {
        f"{module} -> {taken}"
        for module, path in modules().items()
        for taken, inside in imports(path)
        if inside
    }
    assert found == set(INSIDE_FUNCTIONS)


IMPORT_EACH = """
import importlib, sys
packages, *modules = sys.argv[1:]
for module in modules:
    for known in [name for name in sys.modules if name.split(".")[0] in packages.split(",")]:
        del sys.modules[known]
    importlib.import_module(module)
    if {"torch", "transformers"} & sys.modules.keys():
        sys.exit(f"{module} imports torch")
"""


def _is_of(module: str, name: str) -> bool:
    """Whether `module` is `name` or lies in its folder; of a package with several kinds, only its face."""
    whole = "." in name or name in ("profiles", "reports")
    return module == name or (whole and module.startswith(f"{name}."))


def _below(names: Iterable[str]) -> list[str]:
    chosen = tuple(names)
    return [module for module in modules() if any(_is_of(module, name) for name in chosen)]


def test_modules_import_no_torch() -> None:
    """Each as the first of ours."""
    command = [sys.executable, "-c", IMPORT_EACH, ",".join(PACKAGES), *_below(TORCH_FREE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_top_level_holds_the_agreed_packages() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == set(PACKAGES)


def test_every_package_folder_is_a_package() -> None:
    for package in PACKAGES:
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            assert (folder / "__init__.py").exists(), folder


MOST_MODULES = 16
MOST_LINES = 400
LONGER = re.compile(r"Longer than \d+ lines: ")


def test_no_folder_is_a_heap() -> None:
    for package in PACKAGES:
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            found = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
            assert len(found) <= MOST_MODULES, folder


def test_long_modules_say_why() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {lines}"
        for path in modules().values()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
        and not LONGER.search(path.read_text(encoding="utf-8"))
    ]
    assert long == []


@cache
def code_of(path: Path) -> str:
    """Without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize(
    ("call", "homes"),
    [
        ("pynvml", {"profiles/system/nvml.py"}),
        ("subprocess.Popen", {"harness/runs/launch.py"}),
        (
            "perf_counter",
            {"harness/runs/measure.py", "profiles/probe/timing.py", "engines/transfer/clock.py"},
        ),
        ("trust_remote_code=True", set()),
        ("pickle", set()),
    ],
)
def test_one_place_for_each_hazard(call: str, homes: set[str]) -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if call in code_of(path):
                assert str(path.relative_to(ROOT)) in homes, f"{path.relative_to(ROOT)} uses {call}"


def test_settings_are_parsed_where_they_come_in() -> None:
    """From the command line, a job file and a plan or record; from there on they are typed."""
    boundaries = {"harness.records.settings", "harness.records.job", "profiles.planning.plan"}
    found = {
        module
        for module, path in modules().items()
        if re.search(r"\b(parse_settings|settings_of_document)\b", code_of(path))
    }
    assert found == {"engines.settings.parse", *boundaries}


OWN_FILES = {"engines.methods", "engines.settings", "engines.costs", "profiles.planning"}
"""Rooms where a module of its own may name its method."""
NAMED = {
    "engines.zeroth_order.checkpoint -> mezo": "the algorithm, in the format of checkpoints",
}
"""`module -> engine` that is none of the above, and why."""


def _names_of_engines(path: Path) -> set[str]:
    """Engines whose name a file holds as a whole string."""
    return {
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in ENGINES
    }


def test_a_name_of_an_engine_stands_in_the_table_and_its_own_files() -> None:
    found = {
        f"{module} -> {engine}"
        for module, path in modules().items()
        for engine in _names_of_engines(path)
        if module != "engines"
        and not (
            module.rpartition(".")[0] in OWN_FILES and module.rpartition(".")[2] == engine.replace("-", "_")
        )
    }
    assert found == set(NAMED)


def test_the_table_of_engines_imports_errors_alone() -> None:
    assert {taken for taken, _ in imports(modules()["engines"])} == {"engines.errors"}
