"""The rooms do not blur: which package may import which, and what stays free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("harness", "engines", "profiles", "reports")

ALLOWED = {
    "engines": (),
    "profiles": (
        "engines.base",
        "engines.costs",
        "engines.settings.parse",
        "engines.ENGINES",
        "engines.entry",
    ),
    "harness": ("engines", "profiles"),
    "reports": ("engines", "profiles", "harness"),
}
# The command line and the line it draws are where the four rooms meet.
TOP = {"harness/cli/app.py", "harness/pipeline.py"}

TORCH_FREE = (
    "engines.base", "engines.settings.parse", "engines.first_order.lr_schedule", "engines.methods.scripted", "engines.costs.native",
    "engines.costs.zo2", "engines.costs.lsp", "engines.costs.mezo", "engines.costs.torchao_offload",
    "profiles.machine", "profiles.planning.plan", "profiles.planning.predict", "profiles.planning.recommend", "profiles.probe.run.run",
    "profiles.system.unprobed.nvml", "profiles.system.unprobed.cgroup", "harness.records.job", "harness.records.run", "harness.models.meta.configs", "harness.runs.sweep",
    "harness.runs.launch", "harness.runs.end_states", "harness.records.stats", "harness.cli.app.app", "harness.pipeline", "harness.training.update_log",
    "harness.runs.divergence", "reports.load", "reports.decide", "reports.charts", "reports.render",
    "reports.criteria", "engines.decoding", "engines.costs.decoding", "profiles.planning.decoding",
    "harness.cli.app.generate", "harness.runs.decoding_runs",
)  # fmt: skip


def project_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.split(".")[0] in PACKAGES}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        if str(path.relative_to(ROOT)) in TOP:
            continue
        for name in project_imports(path):
            own = name.split(".")[0] == package
            allowed = any(name == prefix or name.startswith(prefix + ".") for prefix in ALLOWED[package])
            assert own or allowed, f"{path.relative_to(ROOT)} imports {name}"


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


def test_modules_import_no_torch() -> None:
    """Each as the first of ours."""
    command = [sys.executable, "-c", IMPORT_EACH, ",".join(PACKAGES), *TORCH_FREE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_top_level_holds_the_agreed_packages() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == set(PACKAGES)


def test_every_package_folder_is_a_package() -> None:
    for package in PACKAGES:
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            assert (folder / "__init__.py").exists(), folder


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
        ("perf_counter", {"harness/runs/measure.py", "profiles/probe/timing.py", "engines/transfer/link.py"}),
        ("trust_remote_code=True", set()),
        ("pickle", set()),
    ],
)
def test_one_place_for_each_hazard(call: str, homes: set[str]) -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if call in code_of(path):
                assert str(path.relative_to(ROOT)) in homes, f"{path.relative_to(ROOT)} uses {call}"
