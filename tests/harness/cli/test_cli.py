"""The command line: a user's mistake is one line with the remedy and the exit code of the design."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tiny_machine import make_machine

from engines import ENGINES, default_engines, public_engines
from harness.cli import app
from harness.pipeline import PreparedJob, Sweep
from harness.progress import told
from harness.records.job import Job
from harness.records.run import Run, load_run
from profiles.documents import to_json
from profiles.language import speaking
from profiles.machine import Machine, load_machine
from run_records import make_sweep, write_folder

TINY = (
    "--model",
    "tiny-llama",
    "--random-weights",
    "--dtype",
    "fp32",
    "--batch-size",
    "2",
    "--seq-len",
    "32",
)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "machine.json"
    path.write_text(to_json(make_machine(gpu=False)))
    return path


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Call `lspzo-bench` with these arguments in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["lspzo-bench", *map(str, arguments)])
        code = 0
        try:
            app.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


def one_line(done: Done) -> str:
    assert done.code == 2, done
    lines = done.err.strip().splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "opt-1.3c", "--random-weights"), ("opt-1.3c", "opt-1.3b")),
        ((*TINY, "--engines", "natif"), ("natif", "did you mean native?")),
        ((*TINY, "--engines", "xyz"), ("xyz", "choose from")),
        ((*TINY, "--data", "missing.tsv"), ("missing.tsv",)),
        ((*TINY, "--data", "table.xlsx"), ("table.xlsx",)),
        ((*TINY, "--seq-len", "100000"), ("100000", "256")),
        ((*TINY, "--batch-size", "0"), ("--batch-size 0", "positive")),
        ((*TINY, "--seq-len", "-4"), ("--seq-len -4", "positive")),
        ((*TINY, "--vram", "24 apples"), ("24 apples",)),
        ((*TINY, "--set", "lsp.dd=3"), ("dd", "settings of lsp")),
        ((*TINY, "--set", "lsp.d=-3"), ("d", "positive")),
        ((*TINY, "--set", "d"), ("KEY=VALUE",)),
        ((*TINY, "--set", "nothing=3"), ("nothing",)),
        (("--random-weights",), ("--model",)),
        (("--job", "missing.toml"), ("missing.toml",)),
    ],
)
def test_a_wrong_flag_is_one_line(
    call, profile: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    said = one_line(call("recommend", *arguments, "--profile", profile, "--quiet"))
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "--engine", "native,lsp", *TINY), ("native,lsp", "one method")),
        (("run", "--engine", "native", *TINY, "--resume"), ("--resume", "--out")),
        (("run", "--engine", "mezo", *TINY, "--find-lr", "--resume"), ("--find-lr", "--resume")),
        (("run", "--engine", "mezo", *TINY, "--find-lr", "--save-every", "2"), ("trains nothing",)),
        (("run", "--engine", "mezo", *TINY, "--find-lr", "--trace"), ("trains nothing", "--trace")),
        (("run", "--engine", "mezo", *TINY, "--json"), ("--json", "--find-lr")),
        (("run", "--engine", "mezo", *TINY, "--epochs", "0"), ("--epochs 0", "positive")),
        (("run", "--engine", "mezo", *TINY, "--epochs", "1e308"), ("--epochs 1e+308", "more than anybody")),
        (("run", "--engine", "mezo", *TINY, "--epochs", "1", "--examples", "2"), ("given twice",)),
        (("run", "--engine", "mezo", *TINY, "--find-lr", "--set", "mezo.learning_rate=0"), ("is 0",)),
        (("export", "nowhere"), ("nowhere", "holds no run")),
        (("compare", *TINY, "--resume"), ("--resume", "--out")),
        (("poc", "--resume"), ("--resume", "--out")),
        (("run", "--engine", "native", *TINY, "--profile", "missing.json"), ("missing.json",)),
        (("run", "--engine", "native", *TINY, "--vram", "24"), ("--vram '24'", "24GB")),
        (("recommend", "--model", "roberta-base", "--random-weights", "--head", "causal_lm"), ("encoder",)),
        (("recommend", *TINY, "--engines", "fsdp2"), ("did you mean fsdp2-offload?", "lspzo-bench engines")),
        (("recommend", *TINY, "--engines", "zo"), ("did you mean zo2 or mezo?",)),
    ],
)
def test_a_command_that_cannot_be_meant_is_one_line(
    call, profile: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    more = ("--profile", profile) if arguments[0] == "recommend" else ()
    said = one_line(call(*arguments, *more))
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("arguments", "command", "words"),
    [
        (("probe", "--fast"), " probe", "--fast"),
        (("prob",), "", "no such command 'prob' (did you mean 'probe'?);"),
        (("run",), " run", "'--engine'"),
        (("run", "--engine", "lsp", "--batch-size", "x"), " run", "'--batch-size'"),
        (("compare", "--rounds", "0"), " compare", "'--rounds'"),
        (("compare", "--layers", "0"), " compare", "'--layers'"),
        (("compare", "--dtype", "fp8"), " compare", "'fp8' is not one of"),
        (("report",), " report", "argument"),
        (("profiles", "show"), " profiles show", "argument"),
    ],
)
def test_a_usage_error_is_one_line(call, arguments: tuple[str, ...], command: str, words: str) -> None:
    done = call(*arguments)
    said = one_line(done)
    assert done.out == ""
    assert said.startswith(f"error: lspzo-bench{command}: ")
    assert said.endswith(f"; see 'lspzo-bench{command} --help'")
    assert words in said


def test_without_a_command_there_is_the_help(call) -> None:
    done = call()
    assert done.code == 2
    assert "Usage: lspzo-bench" in done.out
    assert done.err == ""


def test_a_job_file_takes_the_place_of_the_presets_model_as_a_whole(call, tmp_path: Path) -> None:
    """Or the preset's random weights would go into the model that the file names."""
    path = tmp_path / "job.toml"
    path.write_text('[model]\nname = "tiny-llama"\n')
    assert "shape without weights" in one_line(call("poc", "--job", path, "--out", tmp_path / "out"))


def test_what_is_in_the_way_is_found_before_the_probe(
    call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def probe(**_: object) -> Machine:
        raise AssertionError("it probed")

    monkeypatch.setattr("harness.pipeline.launch_probe", probe)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for command in (("poc",), ("compare", *TINY)):
        assert "is not empty" in one_line(call(*command, "--out", tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_recommend_plans_for_this_machine_as_it_was_measured_and_says_so(
    call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(**_: object) -> Machine:
        raise AssertionError("it probed")

    monkeypatch.setattr("harness.pipeline.launch_probe", probe)
    monkeypatch.setattr("harness.cli.recommend.kept_machine", make_machine)
    result = call("recommend", "--model", "opt-1.3b", "--engines", "mezo", "--json")
    assert result.code == 0
    assert json.loads(result.out)["machine"]["name"] == make_machine().name
    assert "plans are for this machine as it was measured on 20" in result.err
    assert "'lspzo-bench probe' measures it anew" in result.err


def test_output_into_a_closed_pipe_is_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", "models", "--json"],
        cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert err == ""


@pytest.mark.parametrize("program", ["python -m harness", "lspzo-bench"])
def test_folders_named_like_ours_do_not_shadow_them(tmp_path: Path, program: str) -> None:
    """Where the user stands, and on PYTHONPATH."""
    for name in ("engines", "profiles", "reports"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('shadowed')\n")
    root = Path(__file__).parents[3]
    start = "from harness.cli.app import main; main()"
    module = ["-m", "harness"] if program.startswith("python") else ["-c", start]
    listed = subprocess.run(
        [sys.executable, *module, "profiles", "--json"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}, check=False,
    )  # fmt: skip
    assert (listed.returncode, listed.stderr) == (0, "")
    assert len(json.loads(listed.stdout)) > 5


def test_libraries_that_are_imported_say_nothing(tmp_path: Path) -> None:
    """torchao warns of its own kernels beside a torch without GPU, and torch of torchao."""
    pytest.importorskip("torchao")
    (tmp_path / "x.tsv").write_text("".join(f"text {i}\t{i % 2}\n" for i in range(20)))
    done = subprocess.run(
        [sys.executable, "-m", "harness", "run", "--engine", "native", "--model", "tiny-llama", "--quiet",
         "--random-weights", "--data", str(tmp_path / "x.tsv"), "--steps", "1", "--batch-size", "1",
         "--seq-len", "16", "--dtype", "fp32", "--out", str(tmp_path / "out")],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [("models",), ("models", "--json"), ("--help",)])
def test_output_that_cannot_be_written_is_one_line(arguments: tuple[str, ...], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "harness", *arguments],
            cwd=Path(__file__).parents[3], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    said = one_line(Done(done.returncode, "", done.stderr))
    assert said.startswith("error: standard output: cannot be written (No space left on device); ")


@pytest.mark.parametrize("flags", [("--brief", "--full"), ("--json", "--markdown"), ("--brief", "--disk")])
def test_flags_of_the_probe_that_exclude_each_other(call, flags: tuple[str, str]) -> None:
    said = one_line(call("probe", *flags, *(["."] if "--disk" in flags else [])))
    assert flags[0] in said
    assert flags[1] in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--out", "/dev/null/x.json"),
            "/dev/null/x.json: cannot be written (File exists); free space or",
        ),
        (("--out", "."), ".: cannot be written (Is a directory)"),
        (("--disk", "/proc"), "--disk /proc: no file can be made there (No such file or directory); name a"),
        (("--disk", "/nope"), "--disk /nope: no file can be made there (No such file or directory); name a"),
    ],
)
def test_what_the_probe_is_asked_is_checked_before_it_measures(
    call, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, str], words: str
) -> None:
    monkeypatch.setattr("harness.cli.machine.probe_machine", None)
    assert words in one_line(call("probe", *flags))


def test_a_gpu_that_is_required_is_looked_for_before_the_probe(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.cli.machine.probe_machine", None)
    monkeypatch.setattr("harness.cli.machine.why_no_gpu", lambda: "the driver is not loaded")
    done = call("probe", "--require-gpu")
    told = "error: no GPU: the driver is not loaded; see 'nvidia-smi', or leave out --require-gpu\n"
    assert (done.code, done.err) == (7, told)


def test_what_was_measured_is_told_though_it_can_no_longer_be_saved(
    call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def probe_machine(*_: object, **__: object) -> Machine:
        (tmp_path / "saved").rmdir()
        (tmp_path / "saved").touch()
        return make_machine()

    (tmp_path / "saved").mkdir()
    monkeypatch.setattr("harness.cli.machine.probe_machine", probe_machine)
    done = call("probe", "--json", "--out", tmp_path / "saved" / "machine.json")
    assert "machine.json: cannot be written" in one_line(done)
    assert json.loads(done.out)["name"] == "Fake GPU, Fake CPU"


def test_the_probe_as_a_page(call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, object]] = []

    def probe_machine(progress: object, **arguments: object) -> Machine:
        asked.append(arguments)
        return make_machine()

    monkeypatch.setattr("harness.cli.machine.probe_machine", probe_machine)
    done = call("probe", "--markdown", "--full", "--disk", tmp_path, "--out", tmp_path / "machine.json")
    assert done.code == 0
    assert done.out.startswith("# Fake GPU, Fake CPU\n\n|  | value |")
    assert asked == [{"depth": "full", "folder": tmp_path}]
    assert load_machine(tmp_path / "machine.json") == make_machine()


@pytest.mark.parametrize("steps", ["0", "-1"])
def test_steps_must_be_positive(call, profile: Path, steps: str) -> None:
    assert "steps" in one_line(call("compare", *TINY, "--steps", steps, "--profile", profile))


@pytest.mark.parametrize("seed", [str(2**63), "-1", "99999999999999999999999"])
@pytest.mark.parametrize(
    "command",
    [
        ("compare", *TINY),
        ("run", "--engine", "native", *TINY),
        ("generate", "--model", "tiny-llama", "--random-weights", "once"),
        ("generate", "--run", "nowhere", "once"),
    ],
)
def test_a_seed_is_one_that_all_generators_take(call, command: tuple[str, ...], seed: str) -> None:
    assert "seed" in (said := one_line(call(*command, "--seed", seed)))
    assert "must be between 0 and 2^63 - 1" in said


@pytest.mark.parametrize("engine", ["native", "lsp", "mezo", "zo2"])
def test_the_largest_seed_trains(call, engine: str, tmp_path: Path) -> None:
    seed = str(2**63 - 1)
    out = tmp_path / "out"
    done = call("run", "--engine", engine, *TINY, "--steps", "2", "--seed", seed, "--quiet", "--out", out)
    assert done.code == 0, done.err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_time_limit_is_a_number_of_seconds(call, profile: Path, seconds: str) -> None:
    assert "--timeout" in one_line(call("compare", *TINY, "--timeout", seconds, "--profile", profile))


@pytest.mark.parametrize("limit", ["vram_bytes", "host_bytes"])
def test_a_memory_limit_of_a_job_file_is_positive(call, profile: Path, tmp_path: Path, limit: str) -> None:
    path = tmp_path / "job.toml"
    path.write_text(f'[model]\nname = "tiny-llama"\nrandom_weights = true\n[limits]\n{limit} = 0\n')
    assert limit in one_line(call("recommend", "--job", path, "--profile", profile))


def test_criteria_that_are_none_are_found_before_the_probe_and_the_runs(
    call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def probe(**_: object) -> Machine:
        raise AssertionError("it probed")

    monkeypatch.setattr("harness.pipeline.launch_probe", probe)
    criteria = tmp_path / "criteria.toml"
    criteria.write_text("schema_version = 1\n[[criterion]]\nid = 'speed'\n")
    for command in (("poc",), ("compare", *TINY)):
        said = one_line(call(*command, "--criteria", criteria, "--out", tmp_path / "out"))
        assert "criterion 1 ('speed')" in said
    assert "no such criteria file" in one_line(call("poc", "--criteria", tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("data", "flags", "words"),
    [
        ("text.txt", (), "holds 6 tokens, fewer than one sequence of 64"),
        ("block.txt", ("--eval-batches", "1"), "too small to hold a part out"),
        ("builtin", ("--seq-len", "1"), "leaves no room for a prompt and an answer"),
    ],
)
@pytest.mark.parametrize("command", ["poc", "compare"])
def test_data_that_no_run_takes_is_found_before_the_probe_and_the_runs(
    call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, data: str, flags: tuple[str, ...],
    words: str,
) -> None:  # fmt: skip
    def probe(**_: object) -> Machine:
        raise AssertionError("it probed")

    monkeypatch.setattr("harness.pipeline.launch_probe", probe)
    Path("text.txt").write_text("short\n")
    Path("block.txt").write_text("x" * 64)
    tiny = ("--model", "tiny-llama", "--random-weights", "--seq-len", "64")
    done = call(command, *tiny, "--data", data, *flags, "--out", tmp_path / "out")
    # Said where it takes longer than a moment, as with the first import of transformers.
    said = one_line(replace(done, err=done.err.removeprefix(f"reading {data} ...\n")))
    assert words in said
    assert not (tmp_path / "out").exists()


def test_data_of_a_named_shape_needs_no_word_about_weights(call) -> None:
    done = call("data", "builtin", "--model", "tiny-llama", "--seq-len", "64", "--examples", "1")
    assert done.code == 0
    assert "example 1" in done.out
    assert done.err.removeprefix("reading builtin ...\n") == ""  # said where it takes longer than a moment


def test_sequences_are_no_longer_than_the_model_takes_unless_a_flag_says_so(call, profile: Path) -> None:
    arguments = ("--model", "tiny-llama", "--profile", str(profile), "--engines", "native")
    done = call("recommend", *arguments)
    assert done.code == 0
    assert "note: sequences of 256 tokens (--seq-len): tiny-llama takes no longer ones" in done.err
    assert "batch 1 x 256 tokens" in done.out
    done = call("recommend", *arguments, "--seq-len", "512")
    assert done.code == 2
    assert "--seq-len 512: tiny-llama takes at most 256 tokens; use --seq-len 256 or less" in done.err
    japanese = call("recommend", *arguments, "--lang", "ja")
    assert "系列長は 256 トークン" in japanese.err


def test_what_takes_longer_than_a_moment_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with told("reading a.csv", quiet=False):
        pass
    monkeypatch.setattr("harness.progress.A_MOMENT_S", 0.01)
    with speaking("ja"), told("reading much", quiet=False):
        time.sleep(0.3)
    assert capsys.readouterr().err.split() == ["much", "を読み込んでいます"]


def test_a_gpu_that_torch_cannot_use_is_neither_planned_for_nor_recorded(
    call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """NVML sees it, the probe does not: the small preset runs, and runs are not said to be the GPU's."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("reports.poc.open_device", lambda: object())
    monkeypatch.setattr("harness.pipeline.launch_probe", lambda **_: make_machine(gpu=False))
    jobs: list[Job] = []

    def measure(ready: PreparedJob, sweep: Sweep) -> list[Run]:
        jobs.append(ready.job)
        assert sweep.trace is True
        raise KeyboardInterrupt

    monkeypatch.setattr("reports.poc.measure_seen", measure)
    done = call("poc", "--steps", "7", "--trace", "--out", tmp_path / "out")
    assert done.code == 130
    assert f"the GPU cannot be used ({make_machine(gpu=False).gpu_absent_reason})" in done.err
    assert [(job.model.name, job.dtype, job.steps) for job in jobs] == [("tiny-llama", "fp32", 7)]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_unknown_preset(call) -> None:
    assert "quick" in one_line(call("poc", "--preset", "slow"))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "JSON"),
        ("{}", "schema_version"),
        ('{"schema_version": 999}', "999"),
        ('{"schema_version": 1}', "name"),
    ],
)
def test_a_bad_machine_profile_is_one_line(call, tmp_path: Path, content: str, word: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert word in one_line(call("recommend", *TINY, "--profile", path))


def test_a_folder_that_is_not_a_model(call, profile: Path, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    assert "config.json" in one_line(call("recommend", "--model", folder, "--profile", profile))


def test_a_label_that_is_no_class(call, profile: Path, tmp_path: Path) -> None:
    data = tmp_path / "labels.jsonl"
    rows = [{"text": "good", "label": 1}, {"text": "bad", "label": {"is": 0}}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = one_line(
        call("recommend", "--model", "tiny-roberta", "--random-weights", "--data", data, "--seq-len", "64",
             "--profile", profile)
    )  # fmt: skip
    assert "line 2" in said


def test_a_malformed_job_file(call, profile: Path, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("batch_size = = 3")
    assert "TOML" in one_line(call("recommend", "--job", path, "--profile", profile))


def test_a_job_file_with_an_unknown_field(call, profile: Path, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('batchsize = 3\n[model]\nname = "tiny-llama"\nrandom_weights = true\n')
    assert "batchsize" in one_line(call("recommend", "--job", path, "--profile", profile))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("batch_size = true", "batch_size: must be a whole number"),
        ('steps = "3"', "steps: must be a whole number"),
        ("checkpointing = 1", "checkpointing: must be true or false"),
        ("limits.timeout_s = true", "limits.timeout_s: must be a number"),
        ("settings.foo.d = 1", "settings.foo: there is no engine 'foo'"),
        ("settings.lsp.d = -1", "settings.lsp: d must be positive"),
        ("settings.lsp.r = true", "settings.lsp.r: must be a number, not true or false"),
        ("settings.zo2.eps = -1", "settings.zo2: eps must be positive"),
        ("settings = 1", "settings: "),
        ("settings.lsp = 1", "settings.lsp: "),
    ],
)
def test_a_job_file_with_a_senseless_value(
    call, profile: Path, tmp_path: Path, lines: str, words: str
) -> None:
    path = tmp_path / "job.toml"
    path.write_text(f'{lines}\n[model]\nname = "tiny-llama"\nrandom_weights = true\n')
    assert words in one_line(call("recommend", "--job", path, "--engine", "lsp", "--profile", profile))


def test_a_knob_of_an_engine_that_does_not_run_is_left_out_and_told(call, profile: Path) -> None:
    done = call("recommend", *TINY, "--engine", "native", "--set", "lsp.d=3", "--profile", profile, "--json")
    assert done.code == 0
    assert done.err == "note: --set lsp.d=3: that engine does not run, so it changes nothing\n"
    (plan,) = json.loads(done.out)["plans"]
    assert plan["settings"] == {"compile": False, "graphs": False}  # chosen, as there is no GPU
    said = one_line(call("recommend", *TINY, "--engine", "native", "--set", "lsp.d=-3", "--profile", profile))
    assert "d must be positive" in said


def test_a_job_file_may_be_of_more_engines_than_run(call, profile: Path, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(
        'seq_len = 64\nsettings.zo2.eps = 1\n[model]\nname = "tiny-llama"\nrandom_weights = true\n'
    )
    done = call("recommend", "--job", path, "--engine", "lsp", "--profile", profile)
    assert (done.code, done.err) == (0, "")


def test_plans_have_typed_settings_and_commands_that_can_be_run(call, profile: Path) -> None:
    knobs = ("--set", "lsp.d=16", "--set", "learning_rate=1e-3")
    done = call("recommend", *TINY, "--engines", "lsp,native", *knobs, "--profile", profile, "--json")
    plans = {plan["engine"]: plan for plan in json.loads(done.out)["plans"]}
    assert (plans["lsp"]["settings"]["d"], plans["lsp"]["settings"]["learning_rate"]) == (16, 0.001)
    assert "lsp.d" not in plans["native"]["verify_command"]
    for plan in plans.values():
        words = plan["verify_command"].split()[1:]
        assert call(*words, "--profile", profile, "--dry-run", "--out", "new").code == 0


@pytest.mark.parametrize("command", ["recommend", "compare", "run", "generate"])
def test_the_test_double_is_no_engine_for_users(call, command: str) -> None:
    prompt = ("once",) if command == "generate" else ()
    said = one_line(
        call(command, "--model", "tiny-llama", "--random-weights", "--engine", "scripted", *prompt)
    )
    assert said.endswith(f"no such engine; choose from: {', '.join(public_engines())}")


def test_results_cannot_be_written(call, profile: Path) -> None:
    said = one_line(
        call(
            "compare",
            *TINY,
            "--engines",
            "native",
            "--steps",
            "1",
            "--profile",
            profile,
            "--out",
            "/dev/null/x",
        )
    )
    assert "/dev/null: is a file, and a folder is needed; name another --out" in said


def test_report_of_a_folder_without_runs(call, tmp_path: Path) -> None:
    assert str(tmp_path) in one_line(call("report", tmp_path))


def test_report_says_what_it_leaves_out(call, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "results" / "one", make_sweep())
    assert "note:" not in call("report", folder).err
    (folder / "runs" / "native-r1.json").write_text('{"id": ')
    (folder / "plans.json").write_text("{")
    for shown, arguments in (("", (folder,)), ("one/", ("--index", folder.parent))):
        notes = call("report", *arguments).err.splitlines()
        assert len(notes) == 2
        assert notes[0].startswith(f"note: {shown}runs/native-r1.json is left out: is not valid JSON (")
        assert notes[1].startswith(f"note: {shown}plans.json is left out: is not valid JSON (")


def test_criteria_init_never_overwrites(call) -> None:
    assert call("criteria", "init", "mine.toml").code == 0
    assert "exists" in one_line(call("criteria", "init", "mine.toml"))


def test_criteria_init_makes_no_folders(call) -> None:
    assert "there is no folder nope; make it, or" in one_line(call("criteria", "init", "nope/mine.toml"))
    assert not Path("nope").exists()


def test_flags_override_the_job_file(call, profile: Path, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(
        'batch_size = 2\nseq_len = 32\ndtype = "fp32"\n[model]\nname = "tiny-llama"\nrandom_weights = true\n'
    )
    done = call(
        "recommend", "--job", path, "--batch-size", "3", "--profile", profile, "--json", "--engine", "native"
    )
    (plan,) = json.loads(done.out)["plans"]
    assert "--batch-size 3" in plan["verify_command"]
    assert "--seq-len 32" in plan["verify_command"]


def test_recommend_says_who_comes_first_and_names_no_gpu_where_there_is_none(call, profile: Path) -> None:
    said = call("recommend", *TINY, "--profile", profile).out
    assert "comes first with" in said
    assert "compute" in said
    assert "GPU memory" not in said


def test_run_prints_the_folder_alone_on_stdout(call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("run", "--engine", "native", *TINY, "--steps", "2", "--eval-batches", "1", "--out", out)
    assert done.code == 0, done.err
    assert done.out == f"{out / 'model'}\n"
    assert "training 2/2: loss" in done.err
    assert "after 2 steps: held-out loss" in done.err
    again = call("run", "--engine", "native", *TINY, "--steps", "2", "--out", tmp_path / "two", "--quiet")
    assert again.err == ""


@pytest.mark.parametrize(
    ("engine", "flags"),
    [
        ("lsp", ("--dtype", "fp16", "--trace")),
        ("lsp", ("--data", "short.txt")),
        ("zo2", ("--host-memory", "1MB")),
        ("native", ("--model", "tiny-lama")),
    ],
)
def test_a_run_that_is_refused_leaves_its_folder_to_the_corrected_command(
    call, tmp_path: Path, engine: str, flags: tuple[str, ...]
) -> None:
    Path("short.txt").write_text("short")
    out = tmp_path / "out"
    command = ("run", "--engine", engine, *TINY, "--steps", "2", "--out", out, "--quiet")
    one_line(call(*command, *flags))
    assert not out.exists() or list(out.iterdir()) == []
    assert call(*command).code == 0


def test_export_prints_the_folder_alone_on_stdout(call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("run", "--engine", "zo2", *TINY, "--steps", "2", "--out", out).code == 0
    done = call("export", out)
    assert (done.code, done.out) == (0, f"{out / 'export-step-00000002'}\n"), done.err
    assert "is not an empty folder" in one_line(call("export", out, "--quiet"))
    done = call("export", out, "--to", tmp_path / "there", "--quiet")
    assert (done.code, done.out, done.err) == (0, f"{tmp_path / 'there'}\n", "")


@pytest.fixture
def two_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.training.find_lr.FACTORS", (1, 3))


@pytest.mark.usefixtures("two_rates")
def test_find_lr_prints_the_flag_to_use_and_trains_nothing(call, tmp_path: Path) -> None:
    done = call("run", "--engine", "native", *TINY, "--steps", "4", "--find-lr")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].startswith("--set native.learning_rate=")
    assert "recommended" in done.out
    assert list((tmp_path / "here").iterdir()) == []
    assert done.out == call("run", "--engine", "native", *TINY, "--steps", "4", "--find-lr", "--quiet").out


@pytest.mark.usefixtures("two_rates")
def test_find_lr_prints_json_for_programs(call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("run", "--engine", "native", *TINY, "--steps", "4", "--find-lr", "--json", "--out", out)
    assert done.code == 0, done.err
    assert done.out == (out / "find_lr.json").read_text()
    finding = json.loads(done.out)
    assert finding["recommended"] in [trial["learning_rate"] for trial in finding["trials"]]


@pytest.mark.parametrize("engine", ["zo2", "mezo", "native"])
def test_run_traces_what_it_is_asked_to(call, engine: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call("run", "--engine", engine, *TINY, "--steps", "2", "--trace", "--out", out)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == str(out / "model")
    if engine == "native":
        assert "native keeps no trace" in done.err
        assert not (out / "trace.json").exists()
    else:
        events = json.loads((out / "trace.json").read_text())["traceEvents"]
        assert {"before the blocks", "block 0", "update"} <= {event["name"] for event in events}


@pytest.mark.usefixtures("two_rates")
def test_find_lr_says_so_where_nothing_helps(call) -> None:
    done = call(
        "run", "--engine", "native", *TINY, "--steps", "2", "--find-lr", "--quiet", "--set",
        "learning_rate=1e30",
    )  # fmt: skip
    assert "no learning rate lowered the loss" in one_line(done)
    assert "nan_loss" in done.out


def test_a_flat_loss_is_a_note_and_no_error(call, tmp_path: Path) -> None:
    done = call(
        "run", "--engine", "mezo", *TINY, "--steps", "12", "--set", "eps=1e-30", "--out", tmp_path / "o"
    )
    assert done.code == 0
    assert "note: the projected gradient was exactly 0 in 12 steps in a row" in done.err
    assert done.out == f"{tmp_path / 'o' / 'model'}\n"


def test_recommend_prints_json_for_programs(call, profile: Path) -> None:
    done = call("recommend", *TINY, "--profile", profile, "--json")
    answer = json.loads(done.out)
    plans = {plan["engine"]: plan for plan in answer["plans"]}
    assert set(plans) == set(default_engines())
    assert {"machine", "job", "plans", "forecasts", "ways_out", "verdict", "schema_version"} <= set(answer)
    assert set(answer) <= set(json.loads(call("recommend", "--schema").out)["properties"])
    assert plans["native"]["prediction"]["step_s"] > 0
    assert not plans["torchao-offload"]["fits"]


def test_lists_for_people_and_programs(call) -> None:
    assert "zo2" in call("engines").out
    assert {row["name"] for row in json.loads(call("engines", "--json").out)} >= {"native", "zo2", "lsp"}
    assert "deepseek-coder-1.3b" in call("models").out
    assert {row["name"] for row in json.loads(call("models", "--json").out)} >= {"opt-175b", "roberta-base"}


def test_version_and_help(call) -> None:
    assert call("--version").out.strip() == app.__version__
    assert "criteria" in call("--help").out


def test_require_gpu_exits_seven(call, profile: Path, tmp_path: Path) -> None:
    done = call("poc", "--require-gpu", "--profile", profile, "--out", tmp_path / "out", "--quiet")
    assert done.code == 7
    assert "no GPU" in done.err


def compare_scripted(call, profile: Path, out: Path, *more: str | Path) -> Done:
    """As if the test double were an engine for users."""
    sweep = (
        "--engines", "scripted", "--steps", "3", "--rounds", "2", "--profile", profile, "--out", out,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINES, "scripted", replace(ENGINES["scripted"], role="baseline"))
        return call("compare", *TINY, *sweep, *more)


SCRIPTED_PROGRAM = """
from dataclasses import replace
from engines import ENGINES
from harness.cli.app import main
ENGINES["scripted"] = replace(ENGINES["scripted"], role="baseline")
main()
"""


def test_a_failed_run_exits_eight_and_is_kept(call, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = compare_scripted(
        call, profile, out, "--set", "fail_at_step=1", "--set", "failure=kill", "--rounds", "1"
    )
    assert done.code == 8
    (record,) = (out / "runs").glob("*.json")
    assert load_run(record).end_state in ("crash", "oom_host")


def test_compare_keeps_the_machine_and_resumes(call, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert compare_scripted(call, profile, out).code == 0
    assert (out / "machine.json").exists()
    records = sorted((out / "runs").glob("*.json"))
    assert len(records) == 2
    records[0].unlink()
    again = compare_scripted(call, profile, out, "--resume")
    assert again.code == 0
    assert f"missing  {records[0].stem}" in again.err
    assert f"kept     {records[1].stem}" in again.err
    assert records[0].exists()


def test_compare_traces_what_it_is_asked_to(call, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = compare_scripted(call, profile, out, "--trace", "--rounds", "1")
    assert done.code == 0
    (record,) = (out / "runs").glob("*.json")
    run = load_run(record)
    assert run.traced
    assert json.loads((out / "traces" / record.name).read_text())["traceEvents"]
    assert f"traced, which costs time: {run.trace_file}" in done.out


def test_a_used_folder_is_refused(call, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert compare_scripted(call, profile, out).code == 0
    assert "--resume" in one_line(compare_scripted(call, profile, out, "--quiet"))


def test_dry_run_runs_nothing(call, profile: Path, tmp_path: Path) -> None:
    done = compare_scripted(call, profile, tmp_path / "out", "--dry-run")
    assert done.code == 0
    assert "scripted" in done.out
    assert not (tmp_path / "out" / "runs").exists()


def test_dry_run_prints_json_for_programs(call, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = compare_scripted(call, profile, out, "--dry-run", "--json")
    assert done.code == 0
    cells = json.loads(done.out)
    assert [(cell["engine"], cell["round"]) for cell in cells] == [("scripted", 1), ("scripted", 2)]
    assert compare_scripted(call, profile, out).code == 0
    assert {cell["id"] for cell in cells} == {path.stem for path in (out / "runs").glob("*.json")}


def test_dry_run_of_a_resumed_sweep_names_what_is_missing(call, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert compare_scripted(call, profile, out).code == 0
    first, second = sorted((out / "runs").glob("*.json"))
    first.unlink()
    done = compare_scripted(call, profile, out, "--resume", "--dry-run")
    assert done.code == 0
    assert first.stem in done.out
    assert second.stem not in done.out
    assert not first.exists()
    assert "is not empty" in one_line(compare_scripted(call, profile, out, "--dry-run"))


def test_interrupt_keeps_finished_runs_and_exits_130(profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hang = ("--set", "fail_at_step=2", "--set", "failure=hang", "--timeout", "60")
    sweep = ("--engines", "scripted", "--steps", "3", "--profile", str(profile), "--out", str(out))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPTED_PROGRAM, "compare", *TINY, *sweep, *hang],
        cwd=Path(__file__).parents[3],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not list((out / ".work").rglob("log")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].endswith(f"--resume and --out {out}")
    assert "Traceback" not in err
    (record,) = (out / "runs").glob("*.json")
    assert load_run(record).end_state == "interrupted"


# --- what a newcomer types ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--set", "lsp.d=abc"], "--set lsp.d=abc: must be a whole number or 'auto'; "),
        (["--gpus", "0"], "invalid value for '--gpus': must be at least 1; "),
        (["--batch-size", "0"], "--batch-size 0: must be positive; see 'lspzo-bench recommend --help'"),
        (["--seq-len", "-1"], "--seq-len -1: must be positive; see 'lspzo-bench recommend --help'"),
        (["--batch-size", "9" * 20], f"--batch-size {'9' * 20}: must be 1,000,000 at most; "),
        (
            ["--accumulation", "9" * 20],
            f"--accumulation {'9' * 20}: must be 500,000 at most where batch_size is 2",
        ),
    ],
)
def test_a_wrong_value_is_told_in_our_words_and_by_its_flag(
    call, profile: Path, flags: list[str], told: str
) -> None:
    said = one_line(call("recommend", *TINY, "--profile", profile, *flags))
    assert told in said
    assert len(said) < 200


def test_a_profile_that_is_none_is_not_to_be_deleted(call, tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_text("hello")
    said = one_line(call("recommend", *TINY, "--profile", path))
    assert "is not valid JSON" in said
    assert "delete" not in said
    assert "probe --out FILE" in said


def test_a_file_in_place_of_a_folder_is_told_before_anything_is_planned(
    call, profile: Path, tmp_path: Path
) -> None:
    path = tmp_path / "notes"
    path.write_text("hello")
    done = call("recommend", *TINY, "--profile", profile, "--recipe", "trl", "--out", path)
    assert "is a file, and a folder is needed" in one_line(done)
    assert done.out == ""


def test_a_recipe_says_what_stands_in_for_weights_and_data(call, profile: Path, tmp_path: Path) -> None:
    done = call("recommend", *TINY, "--profile", profile, "--recipe", "trl", "--out", tmp_path / "recipe")
    assert done.code == 0
    assert "note: job.toml trains on random weights" in done.err
    assert "builtin data (--data FILE for yours)" in done.err


def test_help_cuts_no_word_on_a_narrow_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "harness", "recommend", "--help"],
        env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "\N{HORIZONTAL ELLIPSIS}" not in done.stdout
    assert "<auto|causal_lm|masked_lm|classification|question_answering>" in done.stdout
    assert 100 < len(done.stdout.splitlines()) < 200
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
