"""The rooms do not blur: what may import what, what stays free of torch, and one home for each hazard.

Everything is read from the source by its syntax; imports inside functions and for type checkers count too.
Each rule is a function of the modules, so that the second half of this file can show it one that breaks it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path

import pytest

from engines import ENGINES

ROOT = Path(__file__).parent.parent
PACKAGES = ("engines", "harness", "profiles", "reports")

TIERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "engines": (
        ("errors", "registry_row", "kernels"),
        ("shapes",),
        ("__init__", "files", "world"),
        ("settings", "base"),
        ("costs", "transfer", "noise", "decoding"),
        ("model", "lossless"),
        ("quantized", "first_order", "cpu_updates"),
        ("offload",),
        ("subspace",),
        ("zeroth_order",),
        ("methods",),
    ),
    "harness": (
        ("__init__",),
        ("contacts", "kept_machine", "progress", "records", "signals"),
        ("models",),
        ("sharing", "job_arguments"),
        ("data",),
        ("resolve", "runs"),
        ("training", "pipeline"),
        ("recommendation", "calibrate", "host_speed", "quality"),
        ("recipes",),
        ("cli",),
        ("__main__",),
    ),
    "profiles": (
        ("__init__",),
        ("documents", "language", "units"),
        ("machine",),
        ("catalog", "figures", "rates", "system"),
        ("planning", "display", "probe"),
        ("advice", "doctor"),
    ),
    "reports": (
        ("__init__", "messages", "charts", "criteria_templates", "question"),
        ("criteria",),
        ("format", "load"),
        ("measured",),
        ("findings",),
        ("judging",),
        ("warnings",),
        ("decide",),
        ("tables",),
        ("provenance",),
        ("pages",),
        ("studies",),
        ("render",),
        ("diff",),
        ("sharing",),
        ("index",),
        ("commands",),
        ("poc",),
    ),
}
"""From the lowest: a file may import its own folder's, and what lies in a lower tier."""

MAY_TAKE = {
    "engines": (),
    "profiles": (
        "engines", "engines.errors", "engines.files", "engines.shapes", "engines.settings", "engines.costs",
        "engines.decoding", "engines.cpu_updates",
    ),
    "harness": ("engines.*", "profiles.*"),
    "reports": ("engines.*", "profiles.*", "harness.*"),
}  # fmt: skip
"""Of other packages: a module, a folder, or with a star all of it."""

TORCH_FREE = (
    "engines", "engines.errors", "engines.registry_row", "engines.files", "engines.shapes", "engines.world",
    "engines.base", "engines.settings",
    "engines.costs", "engines.decoding", "engines.methods.scripted", "engines.zeroth_order.estimators",
    "profiles",
    "harness", "harness.progress", "harness.signals", "harness.records", "harness.models.configs",
    "harness.resolve",
    "harness.data.padding", "harness.data.records", "harness.data.builtin", "harness.data.examples",
    "harness.data.reading", "harness.runs", "harness.job_arguments", "harness.pipeline",
    "harness.recommendation",
    "harness.calibrate", "harness.host_speed", "harness.recipes", "harness.sharing",
    "harness.training.update_log", "harness.cli",
    "reports",
)  # fmt: skip
"""Modules and whole folders that import no torch when they are imported, nor transformers."""

_PROBED = "torch; the probe times the very code that trains"
_TRITON = "Triton is not there on every machine"
_TRAINS = "imports torch; what is wrong with the arguments is said without it"
_CHILD = "imports torch; engines without it (the test double) do not wait for it"
INSIDE_FUNCTIONS = {
    "engines.kernels.token_scores -> engines.kernels.token_scores_kernels": _TRITON,
    "engines.lossless.lossless_pass -> engines.lossless.lossless_pass_kernels": _TRITON,
    "engines.noise.weight_pass -> engines.noise.weight_pass_kernels": _TRITON,
    "engines.quantized.quantized_pass -> engines.quantized.quantized_pass_kernels": _TRITON,
    "engines.subspace.apply -> engines.subspace.projector_kernels": _TRITON,
    "engines.subspace.projector -> engines.subspace.projector_kernels": _TRITON,
    "engines.transfer.throttle -> engines.transfer.throttle_kernels": _TRITON,
    "engines.zeroth_order.low_rank.low_rank_noise -> engines.noise.low_rank_kernels": _TRITON,
    "engines.zeroth_order.unit_forward -> engines.kernels.paired_layer_norm": _TRITON,
    "profiles.probe.adam -> engines.cpu_updates.adamw": _PROBED,
    "profiles.probe.adam -> engines.cpu_updates.cpu_adam": _PROBED,
    "profiles.probe.adam -> engines.cpu_updates.cpu_threads": _PROBED,
    "profiles.probe.launches -> profiles.probe.triton_kernel": _TRITON,
    "harness.cli.data -> harness.data.preview": _TRAINS,
    "harness.cli.generate -> harness.training.generate": _TRAINS,
    "harness.cli.generate -> harness.training.run_folder": _TRAINS,
    "harness.cli.train -> harness.training.find_lr": _TRAINS,
    "harness.cli.train -> harness.training.follower": _TRAINS,
    "harness.cli.train -> harness.training.repeats": _TRAINS,
    "harness.cli.train -> harness.training.train": _TRAINS,
    "harness.quality.study -> harness.data.tokenized": _TRAINS,
    "harness.quality.study -> harness.quality.splits": _TRAINS,
    "harness.pipeline -> harness.data.tokenizing": "imports torch, which only data of files needs here",
    "harness.pipeline -> harness.data.tokenized": "imports torch, which only data of files needs here",
    "harness.resolve -> harness.models.counted_shape": "imports torch; only families without a closed form",
    "harness.runs.worker -> harness.data.batches": _CHILD,
    "harness.runs.worker -> harness.data.tokenized": _CHILD,
    "harness.runs.worker -> harness.models.blueprint": _CHILD,
    "harness.runs.limits -> engines.transfer.calibrate": _CHILD,
    "harness.runs.worker -> engines.transfer.process_group": _CHILD,
}
"""`importing module -> imported module` inside a function, and why."""


Sources = Mapping[str, Path]
"""Modules by name, and the file of each."""


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree_of(path)))


@cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    """Modules of ours that a file imports, and whether it does so inside a function."""
    inside = {
        id(node)
        for function in nodes_of(path)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found: list[tuple[str, bool]] = []
    for node in nodes_of(path):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [
                sub if (sub := f"{node.module}.{alias.name}") in modules() else node.module
                for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [(name, id(node) in inside) for name in names if name.split(".")[0] in PACKAGES]
    return tuple(found)


def room(module: str) -> str:
    """The folder below the package that a module is in, or the module itself."""
    parts = module.split(".")
    return "__init__" if len(parts) == 1 else parts[1]


def tier(module: str) -> int:
    package = module.split(".")[0]
    return next(i for i, rooms in enumerate(TIERS[package]) if room(module) in rooms)


def without_tier(sources: Sources) -> list[str]:
    return [
        module
        for module in sources
        if not any(room(module) in rooms for rooms in TIERS[module.split(".")[0]])
    ]


def test_every_room_has_its_tier() -> None:
    assert without_tier(modules()) == []


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


def upward(sources: Sources) -> list[str]:
    return [
        f"{module} -> {taken}"
        for module, path in sources.items()
        for taken, _ in imports(path)
        if _goes_up(module, taken)
    ]


def test_imports_point_one_way() -> None:
    assert upward(modules()) == []


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


def circles_of_files(sources: Sources) -> list[list[str]]:
    return circles(
        {module: {taken for taken, _ in imports(path) if taken != module} for module, path in sources.items()}
    )


def test_there_is_no_circle_of_files() -> None:
    assert circles_of_files(modules()) == []


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def private_imports(sources: Sources) -> list[str]:
    return [
        f"{module} -> {alias.name}"
        for module, path in sources.items()
        for node in nodes_of(path)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES
        for alias in node.names
        if re.match("_[^_]", alias.name)
    ]


def test_private_names_stay_in_their_module() -> None:
    assert private_imports(modules()) == []


def folders_with_code(sources: Sources) -> list[str]:
    return [
        module
        for module, path in sources.items()
        if path.name == "__init__.py" and "." in module and path.read_text(encoding="utf-8").strip()
    ]


def test_folders_have_no_code_of_their_own() -> None:
    assert folders_with_code(modules()) == []


def inside_functions(sources: Sources) -> set[str]:
    return {
        f"{module} -> {taken}"
        for module, path in sources.items()
        for taken, inside in imports(path)
        if inside
    }


def test_imports_inside_functions_are_on_the_list() -> None:
    assert inside_functions(modules()) == set(INSIDE_FUNCTIONS)


IMPORT_ALL = """
import importlib, sys
for module in sys.argv[1:]:
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


def importing_torch(root: Path, names: Iterable[str]) -> str:
    """What is said of the first of the modules `names` below `root` that imports torch; empty: none does."""
    command = [sys.executable, "-c", IMPORT_ALL, *names]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stderr


def test_modules_import_no_torch() -> None:
    assert importing_torch(ROOT, _below(TORCH_FREE)) == ""


def packages_at_top(root: Path) -> set[str]:
    return {path.parent.name for path in root.glob("*/__init__.py")}


def test_top_level_holds_the_agreed_packages() -> None:
    assert packages_at_top(ROOT) == set(PACKAGES)


def folders_that_are_no_package(root: Path) -> list[Path]:
    folders = {path.parent for package in PACKAGES for path in (root / package).rglob("*.py")}
    return [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_every_package_folder_is_a_package() -> None:
    assert folders_that_are_no_package(ROOT) == []


MOST_MODULES = 17
BY_METHOD = {"engines.methods": 20, "engines.costs": 20, "profiles.planning.methods": 20}
"""Folders in which each method has a module: at most."""
MOST_LINES = 400
LONGER = re.compile(r"Longer than \d+ lines: ")


def heaps(sources: Sources) -> list[str]:
    sizes = Counter(
        module.rpartition(".")[0] for module, path in sources.items() if path.name != "__init__.py"
    )
    return [folder for folder, size in sizes.items() if size > BY_METHOD.get(folder, MOST_MODULES)]


def test_no_folder_is_a_heap() -> None:
    assert heaps(modules()) == []


def long_without_reason(sources: Sources) -> list[str]:
    return [
        module
        for module, path in sources.items()
        if len((text := path.read_text(encoding="utf-8")).splitlines()) > MOST_LINES
        and not LONGER.search(text)
    ]


def test_long_modules_say_why() -> None:
    assert long_without_reason(modules()) == []


@cache
def code_of(path: Path) -> str:
    """Without comments and docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return ast.unparse(tree)


HAZARDS: dict[str, set[str]] = {
    "pynvml": {"profiles.system.nvml"},
    "subprocess.Popen": {"harness.runs.processes", "harness.runs.external.trainer"},
    "perf_counter": {
        "harness.runs.measure",
        "harness.runs.external.trainer",
        "profiles.probe.timing",
        "engines.transfer.clock",
    },
    "trust_remote_code=True": set(),
    "pickle": set(),
}
"""What only these modules may use."""


def uses_elsewhere(sources: Sources, call: str) -> list[str]:
    return [
        module for module, path in sources.items() if module not in HAZARDS[call] and call in code_of(path)
    ]


@pytest.mark.parametrize("call", HAZARDS)
def test_one_place_for_each_hazard(call: str) -> None:
    assert uses_elsewhere(modules(), call) == []


PARSES = {
    "engines.settings.parse", "harness.records.settings", "harness.records.job", "profiles.planning.plan",
    "harness.runs.external.description",
}  # fmt: skip
"""From the command line, a job file, a file on an external trainer, a plan or record; from there on settings
are typed."""


def parsing(sources: Sources) -> set[str]:
    return {
        module
        for module, path in sources.items()
        if re.search(r"\b(parse_settings|settings_of_document)\b", code_of(path))
    }


def test_settings_are_parsed_where_they_come_in() -> None:
    assert parsing(modules()) == PARSES


OWN_FILES = {"engines.methods", "engines.settings", "engines.costs", "profiles.planning.methods"}
"""Rooms where a module of its own may name its method."""
NAMED = {
    "engines.zeroth_order.checkpoint -> mezo": "the algorithm, in the format of checkpoints",
    **dict.fromkeys(
        (
            f"{module} -> lora"
            for module in (
                "engines.costs.mezo",
                "engines.model.flat_layout",
                "engines.settings.zeroth_order",
                "engines.zeroth_order.checkpoint",
                "engines.zeroth_order.low_rank.lora",
                "profiles.planning.methods.mezo",
            )
        ),
        "a value of `train`: the same adapters, learnt without gradients",
    ),
    **dict.fromkeys(
        (
            "harness.recipes.axolotl -> lora",
            "harness.recipes.axolotl -> qlora",
            "harness.recipes.llamafactory -> lora",
        ),
        "another program's own word",
    ),
    "engines.methods.deepspeed_offload -> zero2-offload": "three rows of one library, one file",
    "engines.methods.deepspeed_offload -> zero3-offload": "three rows of one library, one file",
    "engines.methods.deepspeed_offload -> zenflow": "three rows of one library; a key of its settings too",
}
"""`module -> engine` that is none of the above, and why."""


@cache
def _names_of_engines(path: Path) -> set[str]:
    """Engines whose name a file holds as a whole string."""
    return {
        node.value
        for node in nodes_of(path)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in ENGINES
    }


def engines_named(sources: Sources) -> set[str]:
    return {
        f"{module} -> {engine}"
        for module, path in sources.items()
        for engine in _names_of_engines(path)
        if module != "engines"
        and not (
            module.rpartition(".")[0] in OWN_FILES and module.rpartition(".")[2] == engine.replace("-", "_")
        )
    }


def test_a_name_of_an_engine_stands_in_the_table_and_its_own_files() -> None:
    assert engines_named(modules()) == set(NAMED)


def table_imports(sources: Sources) -> set[str]:
    return {taken for taken, _ in imports(sources["engines"])}


def test_the_table_of_engines_imports_errors_and_its_rows_alone() -> None:
    assert table_imports(modules()) == {"engines.errors", "engines.registry_row"}


TWICE = {
    "choose": "one planner per method, called through its row",
    "traffic": "one per method, called through its row",
    "philox_words": "the integers that the tests compare: by torch and by the kernel",
    "main": "entry points, of the program and of its child",
    "recommend": "the command and what it calls",
    "add_low_rank": "on the host and as a kernel",
    "copy_bytes_per_s": "the same figure of the GPU and of the host's memory",
    "matmul_flops": "the same figure of the GPU and of the CPU",
}
"""Public names that are right in more than one module, and why."""


def _public(tree: ast.Module) -> Iterator[str]:
    """Classes, functions and aliases of types that a module defines at its top."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            name = node.name
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if not name[0].isupper() or name.isupper():
                continue
        else:
            continue
        if not name.startswith("_"):
            yield name


def defined_twice(sources: Sources) -> dict[str, list[str]]:
    """Public names of more than one module. A module and its kernels (`x`, `x_kernels`) count as one."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, path in sources.items():
        for name in _public(tree_of(path)):
            found[name].add(module.removesuffix("_kernels"))
    return {name: sorted(where) for name, where in found.items() if len(where) > 1}


def test_a_public_name_means_one_thing() -> None:
    assert set(defined_twice(modules())) == set(TWICE)


def references_only(sources: Sources) -> list[str]:
    """Functions and classes whose docstring begins with another one, to be opened first."""
    return [
        f"{module}.{node.name}"
        for module, path in sources.items()
        for node in nodes_of(path)
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        and re.match(r"(See|As|Like) `[^`]+`", ast.get_docstring(node) or "")
    ]


def test_docstrings_stand_on_their_own() -> None:
    assert references_only(modules()) == []


DOCUMENTED = {"_replace", "_record_memory_history", "_snapshot"}
"""With their underscores: of named tuples, and what torch tells of its allocations. `os._exit` is another."""


def private_uses(folder: Path) -> dict[str, set[str]]:
    """`_name`s of other objects that the files below `folder` use, by file."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(folder.rglob("*.py")):
        for node in nodes_of(path):
            if not isinstance(node, ast.Attribute) or not re.match("_[^_]", node.attr):
                continue
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os")
            if not own and node.attr not in DOCUMENTED:
                found[str(path.relative_to(folder))].add(node.attr)
    return found


PRIVATE_IN_TESTS: dict[str, set[str]] = {
    "engines/costs/test_decoding_costs.py": {"_model"},
    "engines/methods/test_lsp.py": {
        "_blocks",
        "_buffers",
        "_clock",
        "_compiled",
        "_compute",
        "_forwards",
        "_laid_out",
        "_matrices",
        "_pipeline",
        "_trained",
    },
    "engines/methods/test_torchao_offload.py": {"_build"},
    "engines/model/test_attention_masks.py": {"_local_scalar_dense", "_unique2"},
    "engines/noise/test_weight_pass.py": {"_sleep"},
    "engines/quantized/test_quantized_pass.py": {"_CHUNK_TILES", "_updates"},
    "engines/transfer/test_exposure.py": {"_asked", "_host", "_marks", "_placed", "_sleep"},
    "engines/transfer/test_link.py": {"_clear_cuda_error", "_register", "_sleep"},
    "engines/transfer/test_throttle.py": {"_sleep"},
    "engines/transfer/test_trace.py": {"_sleep"},
    "engines/zeroth_order/test_chunked_loss.py": {"_head", "_model"},
    "engines/zeroth_order/test_disk_combinations.py": {"_forms"},
    "engines/zeroth_order/test_estimators.py": {"_model"},
    "engines/zeroth_order/test_generation.py": {"_model"},
    "engines/zeroth_order/test_lora.py": {"_layout", "_memory", "_model", "_sides", "_updates"},
    "engines/zeroth_order/test_quantized_estimators.py": {"_forms"},
    "harness/models/test_models.py": {"_attn_implementation"},
    "profiles/probe/test_probe.py": {"_duplex"},
    "studies/base_quality.py": {"_layout"},
    "studies/lsp_quality_runs.py": {"_buffers"},
    "studies/trained_models.py": {"_buffers"},
    "support/tiny_families.py": {"_buffers"},
    "support/tiny_models.py": {"_buffers"},
}
"""What tests look at inside of objects. Take out of it what is no longer used; put nothing in."""


def test_tests_use_no_more_private_names() -> None:
    found = private_uses(ROOT / "tests")
    more = {file: names - PRIVATE_IN_TESTS.get(file, set()) for file, names in found.items()}
    assert not any(more.values()), {file: names for file, names in more.items() if names}
    gone = {file: names - found.get(file, set()) for file, names in PRIVATE_IN_TESTS.items()}
    assert not any(gone.values()), f"take out of the list: {gone}"


# Each rule, broken once: the modules as they are, and one more.


@pytest.mark.parametrize(
    ("module", "source", "rule", "found"),
    [
        ("engines.attic.box", "", without_tier, "engines.attic.box"),
        (
            "engines.transfer.box",
            "import engines.zeroth_order.step",
            upward,
            "engines.transfer.box -> engines.zeroth_order.step",
        ),
        (
            "engines.transfer.box",
            "from harness.records import job",
            upward,
            "engines.transfer.box -> harness.records.job",
        ),
        (
            "profiles.planning.box",
            "from engines.zeroth_order.step import x",
            upward,
            "profiles.planning.box -> engines.zeroth_order.step",
        ),
        (
            "harness.runs.box",
            "def f():\n    from reports import decide",
            upward,
            "harness.runs.box -> reports.decide",
        ),
        ("engines.costs.__init__", "BOX = 1", folders_with_code, "engines.costs"),
        (
            "harness.runs.box",
            "def f():\n    import engines.shapes",
            inside_functions,
            "harness.runs.box -> engines.shapes",
        ),
        ("engines.costs.box", "\n" * 401, long_without_reason, "engines.costs.box"),
        (
            "harness.runs.box",
            "import subprocess\nsubprocess.Popen([])",
            partial(uses_elsewhere, call="subprocess.Popen"),
            "harness.runs.box",
        ),
        (
            "harness.runs.box",
            "from time import perf_counter",
            partial(uses_elsewhere, call="perf_counter"),
            "harness.runs.box",
        ),
        (
            "reports.box",
            "load(trust_remote_code=True)",
            partial(uses_elsewhere, call="trust_remote_code=True"),
            "reports.box",
        ),
        (
            "harness.runs.box",
            "from engines.settings.parse import parse_settings",
            parsing,
            "harness.runs.box",
        ),
        ("reports.box", "YARDSTICK = 'native'", engines_named, "reports.box -> native"),
        (
            "engines.__init__",
            "import engines.costs.resources.disk",
            table_imports,
            "engines.costs.resources.disk",
        ),
        (
            "engines.costs.box",
            "from engines.costs.lsp import _gpu_memory",
            private_imports,
            "engines.costs.box -> _gpu_memory",
        ),
        ("engines.costs.box", "class Run: ...", defined_twice, "Run"),
        ("engines.costs.box", "def f():\n    'See `g`.'", references_only, "engines.costs.box.f"),
        ("engines.costs.box", "Machine = dict[str, int]", defined_twice, "Machine"),
    ],
)
def test_a_module_that_breaks_a_rule_is_found(
    tmp_path: Path, module: str, source: str, rule: Callable[[Sources], Iterable[str]], found: str
) -> None:
    path = tmp_path / f"{module.rpartition('.')[2]}.py"
    path.write_text(source)
    with_it = {**modules(), module.removesuffix(".__init__"): path}
    assert set(rule(with_it)) - set(rule(modules())) == {found}


def test_two_files_that_import_each_other_are_found(tmp_path: Path) -> None:
    path = tmp_path / "shapes.py"
    path.write_text("if TYPE_CHECKING:\n    from engines.base import Batch")
    (found,) = circles_of_files({**modules(), "engines.shapes": path})
    assert {"engines.base", "engines.shapes"} <= set(found)


def test_a_module_too_many_in_a_folder_is_found(tmp_path: Path) -> None:
    more = {f"reports.box{number}": tmp_path / "box.py" for number in range(MOST_MODULES)}
    assert heaps({**modules(), **more}) == ["reports"]


def test_a_module_that_imports_torch_is_found(tmp_path: Path) -> None:
    (tmp_path / "box.py").write_text("import transformers")
    assert importing_torch(tmp_path, ["box"]).strip() == "box imports torch"


def test_folders_that_are_more_or_less_than_packages_are_found(tmp_path: Path) -> None:
    for name in ("engines/methods/zo2.py", "attic/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert packages_at_top(tmp_path) == {"attic"}
    assert folders_that_are_no_package(tmp_path) == [tmp_path / "engines" / "methods"]


def test_a_private_name_in_a_test_is_found(tmp_path: Path) -> None:
    (tmp_path / "test_box.py").write_text("box._lid.open()\nself._own\nbox.__dict__")
    assert private_uses(tmp_path) == {"test_box.py": {"_lid"}}
