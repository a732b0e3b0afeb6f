"""The READMEs say what is true: commands parse, files are there, results are made from the runs."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from engines.errors import UserError
from engines.settings.parse import parse_settings
from harness.cli.app import app
from reports.index import ABOUT, write_index
from reports.sharing.published import published_folders

ROOT = Path(__file__).parent.parent
ROOMS = ("engines", "harness", "profiles", "reports", "tests")
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        *(ROOT / room / "README.md" for room in ROOMS),
        ROOT / "reports" / "FINDINGS.md",
        ROOT / "CONTRIBUTING.md",
    )
}
README = "\n".join(PAGES.values())
FENCED = re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"^```\w*\n.*?^```", "", README, flags=re.MULTILINE | re.DOTALL))
LINES = [line.partition("#")[0].strip() for block in FENCED for line in block.splitlines()]
COMMANDS = sorted({text for text in (*LINES, *INLINE) if re.match(r"(\.venv/bin/)?lspzo-bench\b", text)})
TARGETS = sorted({text.split()[1] for text in (*LINES, *INLINE) if re.match(r"make \w", text)})
TREES = [block for block in FENCED if re.match(r"\w+/\n", block)]
MOST_LINES = 150


def usage_error(arguments: list[str]) -> str | None:
    """What the program would say of unknown commands and flags; with --help it does nothing else."""
    result = CliRunner().invoke(app, [*arguments, "--help"])
    return None if result.exit_code == 0 else result.output


def test_there_is_something_to_check() -> None:
    assert len(COMMANDS) > 8
    assert {"demo", "test"} <= set(TARGETS)


@pytest.mark.parametrize("text", COMMANDS)
def test_a_command_of_a_readme_parses(text: str) -> None:
    _, *arguments = shlex.split(text.split(",")[0].replace("DIR", "out"))
    assert usage_error(arguments) is None


def test_a_wrong_flag_would_be_found() -> None:
    assert "--modell" in str(usage_error(["poc", "--modell", "opt-1.3b"]))
    assert "probes" in str(usage_error(["probes"]))


def test_every_flag_that_a_readme_names_exists() -> None:
    command: Any = typer.main.get_command(app)
    commands = [command, *(each.real for each in command.commands.values())]
    commands += [sub for each in commands[1:] for sub in getattr(each, "commands", {}).values()]
    parameters = [parameter for one in commands for parameter in one.params]
    known = {flag for each in parameters for flag in (*each.opts, *each.secondary_opts)}
    known.add("--help")
    named = {flag for text in INLINE for flag in re.findall(r"(?<!\S)--[a-z-]+", text) if "pip" not in text}
    assert named
    assert named <= known, named - known


PLACES = sorted({text for text in INLINE if "::" in text})


def names_in(source: str) -> set[str]:
    """What a module defines at its top, and `Class.name` of its classes."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return found


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_a_readme_names_exists(place: str) -> None:
    path, _, name = place.partition("::")
    assert name in names_in((ROOT / path).read_text(encoding="utf-8"))


def test_the_ways_through_are_the_ways_of_the_code() -> None:
    """Where the page says that something happens, it does."""
    ring, measure, engine = (
        (ROOT / path).read_text(encoding="utf-8")
        for path in ("engines/offload/ring.py", "harness/runs/measure.py", "harness/runs/worker.py")
    )
    assert len(PLACES) > 12
    assert ".upload(" in function_of(ring, "_upload_next")
    assert "self.prefetch()" in function_of(ring, "done")
    assert "self._upload_next()" in function_of(ring, "prefetch")
    assert "record(step, now_s - last_s" in function_of(measure, "_take_steps")
    assert "load_engine" in function_of(engine, "_run")


def function_of(source: str, name: str) -> str:
    """The source of a function."""
    (node,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    return ast.unparse(node)


def _goes_together() -> list[tuple[str, str, str]]:
    """Setting, setting, and what the table says of both."""
    rows = [line.strip("| ").split(" | ") for line in README.splitlines() if line.startswith("| ")]
    table = [row for row in rows if "=" in row[0] or row[0] == "with"]
    header, *others = table[table.index(next(row for row in table if row[0] == "with")) :]
    return [
        (row[0].strip("`"), column.strip("`"), cell)
        for row in others
        for column, cell in zip(header[1:], row[1:], strict=True)
        if cell != "-"
    ]


@pytest.mark.parametrize(("one", "other", "told"), _goes_together())
def test_the_table_of_what_goes_together_is_true(one: str, other: str, told: str) -> None:
    needed = dict(o.split("=") for w, o, cell in _goes_together() if (w, cell) == (one, "needed"))
    key, value = other.split("=")
    values = {**needed, **dict([one.split("=")]), key: value}
    if along := re.fullmatch(r"with `(\w+)=(\w+)`", told):
        with pytest.raises(UserError, match=f"set {along[1]}={along[2]} or less"):
            parse_settings("zo2", values)
        values, told = {**values, along[1]: along[2]}, "yes"
    if told == "no":
        with pytest.raises(UserError, match=f"{key} must be .*; (leave {key} out|take)"):
            parse_settings("zo2", values)
        return
    assert told in ("yes", "needed")
    parse_settings("zo2", values)
    if told == "needed":
        with pytest.raises(UserError, match=f"{key} must be .*; set {key}="):
            parse_settings("zo2", {name: each for name, each in values.items() if name != key})


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_a_make_target_of_a_readme_exists(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def files_of_tree(tree: str) -> list[str]:
    """Paths in an annotated tree: its first line is the folder, the others begin with what lies in it."""
    folder, *lines = tree.splitlines()
    named = [re.split(r"\s{2,}", line.strip())[0] for line in lines if re.match(r"  \S", line)]
    return [folder + name for names in named for name in names.split()]


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.partition("/")[0])
def test_a_tree_names_only_what_is_there(tree: str) -> None:
    found = files_of_tree(tree)
    assert len(found) > 4
    assert [path for path in found if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.partition("/")[0])
def test_a_tree_names_every_folder(tree: str) -> None:
    folder = tree.partition("/")[0]
    code = {path.parent for path in (ROOT / folder).rglob("*.py") if path.parent.parent == ROOT / folder}
    assert {path.name for path in code} <= {Path(each).name for each in files_of_tree(tree)}


def test_every_room_has_its_tree() -> None:
    assert sorted(tree.partition("/")[0] for tree in TREES) == sorted(ROOMS)


def test_the_front_door_is_short() -> None:
    assert len(PAGES[ROOT / "README.md"].splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[page]):
        assert (page.parent / target).exists(), target


def test_the_page_and_the_picture_of_results_are_made_from_the_published_runs(tmp_path: Path) -> None:
    results = ROOT / "reports" / "results"
    shutil.copytree(results, tmp_path / "results", ignore=shutil.ignore_patterns("report.*", "traces"))
    for path in write_index(tmp_path / "results"):
        assert path.read_text(encoding="utf-8") == (results / path.name).read_text(encoding="utf-8")


def test_every_published_folder_says_what_it_is_for() -> None:
    folders = published_folders(ROOT / "reports" / "results")
    assert [folder.name for folder in folders if not (folder / ABOUT).exists()] == []
