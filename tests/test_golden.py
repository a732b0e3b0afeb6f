"""What a new layout of the code must not change: steps of every engine, plans, help and reports, as recorded.

`LSPZO_WRITE_GOLDEN=1 pytest -p no:xdist tests/test_golden.py` writes the files in tests/golden/ anew (with
`-k plan`, say, one part of them); then read their diff.

- engines.json: losses, projected gradients, counted bytes and forward passes of each step, the loss of an
  evaluation and a hash of the weights after the last. Its header names torch, transformers and the CPU. Where
  all of these are the same, every bit is compared. Elsewhere sums come in another order: there losses are
  compared within a relative 1e-4 (fp32) or 2e-2 (bf16, fp16), counted bytes and forward passes exactly, and
  projected gradients, accuracies and the hash of the weights not at all.
- plans.json: what `recommend --json` plans; numbers within a relative 1e-12, all else exactly.
- ../../profiles/published.md: what papers published beside what is predicted today; questions.md: what
  `recommend` answers to the questions of the field.
- help.txt: `--help` of every command, 100 columns wide. Compared where typer and rich are those of its first
  line: other versions lay it out in another way.
- reports.json: hashes of what `report` and `report --index` write from the published records. Folders that
  were published later are left out until the file is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import field_questions
import published_tables
import pytest
import rich.columns
import torch
import typer
import typer.rich_utils
from typer.testing import CliRunner

from tiny_models import tiny_batches, tiny_blueprint

# All that these tests know of the inner layout; what moves is told here.
from engines import load_engine  # isort: skip
from engines.base import Context  # isort: skip
from engines.settings.parse import parse_settings  # isort: skip
from engines.shapes import Dtype, Workload  # isort: skip
from harness.cli.app import app, fold_help  # isort: skip
from harness.records.run import load_run  # isort: skip
from profiles.documents import to_json  # isort: skip
from reports.load import load_folder  # isort: skip
from reports.studies.read import load_study  # isort: skip


def make_engine(name: str, settings: Mapping[str, object], where: Context) -> Any:
    return load_engine(name)(parse_settings(name, settings), where)


def load_records(folder: Path) -> tuple[int, int]:
    """How many runs and generations a published folder holds. Fails where a file of it cannot be read."""
    runs = 0
    if (folder / "runs").is_dir():
        loaded = load_folder(folder)
        assert loaded.broken == ()
        runs = len(loaded.runs)
    return runs, len([load_run(path, "decode") for path in sorted(folder.glob("generations/*.json"))])


WRITE = os.environ.get("LSPZO_WRITE_GOLDEN") == "1"
ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
RESULTS = ROOT / "reports" / "results"
TO_WRITE = "; if that is meant, LSPZO_WRITE_GOLDEN=1 writes the file anew"


class Golden:
    """The parts of a JSON file by their keys: read, or gathered and written at the end."""

    def __init__(self, name: str, header: Mapping[str, object], keys: Sequence[str]) -> None:
        self.path = GOLDEN / name
        self.header = dict(header)
        self._keys = keys
        self._new: dict[str, Any] = {}
        self._old: dict[str, Any] = {}
        if self.path.exists():
            self._old = json.loads(self.path.read_text(encoding="utf-8"))
        self.is_same_place = self._old.get("header") == self.header

    def expected(self, key: str, found: Any) -> Any:
        """What was recorded under `key`; `found` itself where the file is being written."""
        if WRITE:
            self._new[key] = found
            return found
        assert key in self._old["cases"], f"{self.path.name} has no '{key}'{TO_WRITE}"
        return self._old["cases"][key]

    def finish(self, indent: int | None) -> None:
        """Write what was gathered. What was not asked for stays, if it is of the same place."""
        if not self._new:
            return
        kept = self._old.get("cases", {}) if self.is_same_place else {}
        cases = {key: {**kept, **self._new}[key] for key in self._keys if key in {**kept, **self._new}}
        parts = [f'"header": {json.dumps(self.header)}', '"cases": {']
        lines = [f"{json.dumps(key)}: {json.dumps(case, indent=indent)}" for key, case in cases.items()]
        self.path.write_text("{" + ",\n".join(parts) + "\n" + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


def program(*arguments: str) -> str:
    """What `lspzo-bench` with these arguments prints on stdout, 100 columns wide."""
    result = CliRunner().invoke(app, list(arguments), prog_name="lspzo-bench", env={"COLUMNS": "100"})
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


# Engines


@dataclass(frozen=True)
class Case:
    engine: str
    variant: str
    family: str
    dtype: Dtype = "fp32"
    accumulation: int = 1
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.engine} {self.variant} {self.family} {self.dtype}"


STEPS = 6
NATIVE: dict[str, object] = {
    "learning_rate": 1e-3, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 2,
}  # fmt: skip
LSP: dict[str, object] = {
    "learning_rate": 3e-3, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 2, "d": 6, "r": 2,
    "check_every": 3, "alpha": 0.3, "learn_steps": 3, "learn_timeout_s": 1e9,
}  # fmt: skip
ZO: dict[str, object] = {"learning_rate": 1e-3}

NATIVE_VARIANTS: dict[str, dict[str, object]] = {"usual": {}, "accumulation": {}}
LSP_VARIANTS: dict[str, dict[str, object]] = {
    "usual": {},
    "in memory": {"offload": False},
    "sequential": {"schedule_order": "sequential"},
    "one_hot": {"projector": "one_hot"},
    "paper": {"projector": "paper"},
    "paper in memory": {"projector": "paper", "offload": False},
    "clipped": {"max_grad_norm": 0.5},
    "clipped sequential": {"max_grad_norm": 0.5, "schedule_order": "sequential"},
    "sizes by shape": {"d": "auto", "d_by_shape": "16x16:6,32x16:8,16x8:4"},
    "blocks alone": {"train_outer": False},
    "nearest": {"rounding": "nearest"},
    "accumulation": {},
}
ZO_VARIANTS: dict[str, dict[str, object]] = {
    "usual": {},
    "cosine": {"schedule": "cosine", "warmup_steps": 2},
    "weight decay": {"weight_decay": 0.1},
    "signs": {"noise": "rademacher"},
    "nearest": {"rounding": "nearest"},
    "queries": {"queries": 4},
    "fzoo": {"estimator": "fzoo", "noise": "rademacher", "queries": 4, "learning_rate": 1e-6},
    "lozo": {"estimator": "lozo", "lozo_rank": 2, "lozo_window": 4, "learning_rate": 1e-4},
    "grzo": {"estimator": "grzo", "noise": "rademacher", "grzo_window": 4, "learning_rate": 1e-6},
    "last block": {"train": "last:1"},
    "lora": {"train": "lora", "lora_rank": 4},
    "int8": {"base": "int8"},
    "int8 folded": {"base": "int8", "fold_every": 4},
    "int8 lora": {"base": "int8", "train": "lora", "lora_rank": 4},
    "accumulation": {},
}
ZO2_VARIANTS: dict[str, dict[str, object]] = {
    **ZO_VARIANTS,
    "resident": {"resident_blocks": 1},
    "folded": {"fold_every": 3},
    "folded queries": {"fold_every": 3, "queries": 2, "resident_blocks": 1, "weight_decay": 0.1},
    "disk": {"disk_blocks": 1},
    "disk folded": {"disk_blocks": 1, "fold_every": 3},
}


def engine_cases() -> Iterator[Case]:
    """Every variant in fp32 on two decoders and in bf16 on one; a few in fp16 and on an encoder."""
    table = (
        ("native", NATIVE, NATIVE_VARIANTS),
        ("lsp", LSP, LSP_VARIANTS),
        ("mezo", ZO, ZO_VARIANTS),
        ("zo2", ZO, ZO2_VARIANTS),
    )
    for engine, usual, variants in table:
        for variant, more in variants.items():
            settings, accumulation = {**usual, **more}, 2 if variant == "accumulation" else 1
            places: list[tuple[str, Dtype]] = [("opt", "fp32"), ("llama", "fp32"), ("llama", "bf16")]
            if variant == "nearest":  # of no effect in fp32
                places = [("llama", "bf16")]
            if engine in ("mezo", "zo2") and variant in ("usual", "int8", "lora"):
                places.append(("opt", "fp16"))
            if variant == "usual":
                places.append(("roberta", "fp32"))
            for family, dtype in places:
                yield Case(engine, variant, family, dtype, accumulation, settings)


ENGINE_CASES = {case.key: case for case in engine_cases()}


def this_place() -> dict[str, str]:
    """What the bits of a step depend on."""
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": cpu_model(),
    }


def cpu_model() -> str:
    """With family and model where Linux tells: virtual machines share a name."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    told = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    return ", ".join(told.get(key, "unknown") for key in ("model name", "cpu family", "model"))


def stepped(case: Case, folder: Path) -> dict[str, Any]:
    """What `case` gives on a tiny model of three blocks."""
    workload = Workload(
        batch_size=2, seq_len=16, dtype=case.dtype, checkpointing=case.engine == "lsp",
        accumulation=case.accumulation,
    )  # fmt: skip
    where = Context(device="cpu", workload=workload, seed=7, total_steps=STEPS)
    settings = {**case.settings, **({"disk_folder": str(folder)} if "disk_blocks" in case.settings else {})}
    batches = tiny_batches(STEPS * case.accumulation, case.family)
    groups = [batches[i : i + case.accumulation] for i in range(0, len(batches), case.accumulation)]
    engine = make_engine(case.engine, settings, where)
    try:
        with warnings.catch_warnings():
            if "disk_blocks" in settings:  # of a folder that cannot be read past the page cache
                warnings.simplefilter("ignore")
            engine.setup(tiny_blueprint(case.family, tied=case.family == "opt"))
            stats = [engine.step(group) for group in groups]
            evaluation = engine.evaluate(tiny_batches(2, case.family, seed=1))
            weights = hashed_weights(engine)
    finally:
        engine.close()
    found: dict[str, Any] = {"losses": [each.loss.hex() for each in stats]}
    if any(each.updates for each in stats):
        found["gradients"] = [[update.projected_gradient.hex() for update in each.updates] for each in stats]
    for name in ("h2d_bytes", "d2h_bytes", "disk_read_bytes", "forwards"):
        found[name] = in_short([getattr(each, name) for each in stats])
    found["evaluation"] = [evaluation.loss.hex(), evaluation.accuracy, evaluation.num_labels]
    return found | {"weights": weights}


def in_short(values: Sequence[Any]) -> Any:
    """One value where all are the same."""
    return values[0] if all(value == values[0] for value in values) else list(values)


def hashed_weights(engine: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in engine.weights():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def engines_golden() -> Iterator[Golden]:
    golden = Golden("engines.json", this_place(), list(ENGINE_CASES))
    yield golden
    golden.finish(indent=None)


@pytest.mark.parametrize("key", list(ENGINE_CASES))
def test_an_engine_steps_as_recorded(key: str, engines_golden: Golden, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    case = ENGINE_CASES[key]
    found = stepped(case, tmp_path)
    expected = engines_golden.expected(key, found)
    if WRITE or engines_golden.is_same_place:
        assert found == expected
        return
    rtol = 1e-4 if case.dtype == "fp32" else 2e-2
    for ours, recorded in zip(
        [*found["losses"], found["evaluation"][0]],
        [*expected["losses"], expected["evaluation"][0]],
        strict=True,
    ):
        assert float.fromhex(ours) == pytest.approx(float.fromhex(recorded), rel=rtol)
    for name in ("h2d_bytes", "d2h_bytes", "disk_read_bytes", "forwards"):
        assert found[name] == expected[name], name


# Plans

PLANNED = (
    "--model opt-13b --profile rtx-4090",
    "--model opt-13b --profile rtx-4090 --set zo2.base=int8",
    "--model opt-13b --profile h200 --vram 24GB --batch-size 4 --seq-len 1024",
    "--model opt-1.3b --profile h200 --vram 4GiB --dtype fp16",
    "--model opt-1.3b --profile rtx-a1000-laptop --host-memory 6GiB",
    "--model opt-30b --profile rtx-4090 --host-memory 32GB --set zo2.disk_blocks=auto",
    "--model deepseek-coder-1.3b --profile rtx-3060-12gb --set lsp.d=auto --accumulation 4",
    "--model deepseek-coder-6.7b --profile h200 --set lsp.d=auto",
    "--model llama-2-7b --profile t4 --dtype fp16 --set train=lora",
    "--model llama-3.1-8b --profile rtx-5090 --no-checkpointing --set zo2.estimator=lozo",
    "--model roberta-base --profile l4 --dtype fp32 --batch-size 16 --seq-len 128 --set queries=4",
)


@pytest.fixture(scope="module")
def plans_golden() -> Iterator[Golden]:
    golden = Golden("plans.json", {}, PLANNED)
    yield golden
    golden.finish(indent=1)


@pytest.mark.parametrize("arguments", PLANNED)
def test_a_job_is_planned_as_recorded(arguments: str, plans_golden: Golden) -> None:
    said = program("recommend", *arguments.split(), "--random-weights", "--json", "--quiet")
    found = json.loads(said)["plans"]
    assert_close(found, plans_golden.expected(arguments, found))


@pytest.mark.parametrize("made", [published_tables, field_questions], ids=lambda made: made.PAGE.name)
def test_a_page_of_predictions_is_what_is_predicted_today(made: Any) -> None:
    text = made.page()
    if WRITE:
        made.PAGE.write_text(text, encoding="utf-8")
    assert made.PAGE.read_text(encoding="utf-8") == text, TO_WRITE


def assert_close(found: Any, expected: Any, where: str = "plans") -> None:
    if isinstance(expected, dict):
        assert isinstance(found, dict)
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(found, list)
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_close(found[index], value, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-12, abs=0), where
    else:
        assert (type(found), found) == (type(expected), expected), where


# Help


def all_commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, each in getattr(command, "commands", {}).items():
        yield from all_commands(getattr(each, "real", each), (*path, name))


def test_help_is_as_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (typer.rich_utils, rich.columns):  # as the program does where it prints help
        monkeypatch.setattr(module, "Table", module.Table)
    fold_help()
    golden, first = GOLDEN / "help.txt", f"typer {version('typer')}, rich {version('rich')}"
    parts = [first]
    for path in all_commands(typer.main.get_command(app)):
        text = re.sub(r"\x1b\[[0-9;]*m", "", program(*path, "--help"))
        parts.append(f"$ {' '.join(('lspzo-bench', *path))} --help")
        parts.extend(line.rstrip() for line in text.splitlines() if line.strip())
    found = "\n".join(parts) + "\n"
    if WRITE:
        golden.write_text(found, encoding="utf-8")
    expected = golden.read_text(encoding="utf-8")
    if expected.partition("\n")[0] != first:
        pytest.skip(f"recorded with {expected.partition(chr(10))[0]}, here is {first}")
    (tmp_path / "help.txt").write_text(found, encoding="utf-8")
    assert found == expected, f"see: diff -u {golden} {tmp_path / 'help.txt'}{TO_WRITE}"


# Records and reports

INDEX = "index"


def published(pattern: str) -> list[str]:
    """The folders of results that hold such files."""
    return sorted({path.relative_to(RESULTS).parts[0] for path in RESULTS.glob(pattern)})


def recorded() -> tuple[list[str], list[str]]:
    """Folders with a report in reports.json, and those that only the index tells; all that are published
    where the file is written anew."""
    path = GOLDEN / "reports.json"
    if WRITE or not path.exists():
        reported = published("*/runs/*.json")
        return reported, sorted({*published("*/generations/*.json")} - {*reported})
    found = json.loads(path.read_text(encoding="utf-8"))
    return [name for name in found["cases"] if name != INDEX], found["header"]["only_indexed"]


REPORTED, ONLY_INDEXED = recorded()


def assert_same_files(folder: Path, names: Sequence[str], key: str, golden: Golden) -> None:
    """Of files that a command wrote into `folder`, the hashes are those recorded; 64 bits are enough."""
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in names}
    expected = golden.expected(key, found)
    as_published = RESULTS / key if key != INDEX else RESULTS
    for name in names:
        hint = f"see: diff -u {as_published / name} {folder / name}{TO_WRITE}"
        assert found[name] == expected[name], f"{key}: {name} is another text; {hint}"


@pytest.fixture(scope="module")
def reports_golden() -> Iterator[Golden]:
    golden = Golden("reports.json", {"only_indexed": ONLY_INDEXED}, [*REPORTED, INDEX])
    yield golden
    golden.finish(indent=1)


@pytest.mark.parametrize("name", published("*/study.json"))
def test_every_published_study_loads_and_is_judged_as_it_was(name: str) -> None:
    study = load_study(RESULTS / name)
    assert not study.broken
    assert len(study.trials) == len(list((RESULTS / name).glob("trials/*.json"))) > 0
    assert to_json(study.result) == (RESULTS / name / "quality.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted({*published("*/about.txt")} - {*published("*/study.json")}))
def test_every_published_record_loads(name: str) -> None:
    folder = RESULTS / name
    files = tuple(len(list(folder.glob(f"{kind}/*.json"))) for kind in ("runs", "generations"))
    assert load_records(folder) == files
    assert sum(files) > 0


@pytest.mark.parametrize("name", REPORTED)
def test_a_report_is_written_as_recorded(name: str, reports_golden: Golden, tmp_path: Path) -> None:
    shutil.copytree(
        RESULTS / name, tmp_path / name, ignore=shutil.ignore_patterns("report.*", "verdict.json")
    )
    program("report", str(tmp_path / name))
    assert_same_files(tmp_path / name, ("report.md", "report.html", "verdict.json"), name, reports_golden)


def test_the_index_is_written_as_recorded(reports_golden: Golden, tmp_path: Path) -> None:
    for name in (*REPORTED, *ONLY_INDEXED):
        shutil.copytree(RESULTS / name, tmp_path / name)
    program("report", "--index", str(tmp_path))
    assert_same_files(tmp_path, ("README.md", "overview.svg"), INDEX, reports_golden)


def test_a_changed_text_says_how_to_see_it(tmp_path: Path) -> None:
    golden = Golden("reports.json", {}, [])
    name = REPORTED[0]
    (tmp_path / name).mkdir()
    (tmp_path / name / "report.md").write_text("another")
    if not WRITE:
        with pytest.raises(
            AssertionError, match=r"report\.md is another text; see: diff -u \S+ \S+report\.md;"
        ):
            assert_same_files(tmp_path / name, ("report.md",), name, golden)


def test_golden_files_stay_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 400_000
