"""`recommend` as a person types it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from harness.cli.app import app
from harness.models.configs import NAMED_SHAPES
from profiles.planning.plan import load_plans

WITHOUT_TORCH = """
import sys
from harness.cli.app import main
sys.argv = ["lspzo-bench", *sys.argv[1:]]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
sys.exit(1 if {"torch", "transformers"} & sys.modules.keys() else 0)
"""


def said(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["recommend", *arguments, "--quiet"])
    assert done.exception is None, done.exception
    return done.stdout


def refused(*arguments: str) -> str:
    """The one line of a user's mistake."""
    done = CliRunner().invoke(app, ["recommend", *arguments, "--quiet"])
    assert done.exception is not None
    line = str(done.exception)
    assert "\n" not in line
    assert len(line) < 200
    return line


ON_A_CARD = ("--model", "opt-1.3b", "--profile", "rtx-4090", "--engines", "native,zo2")


@pytest.mark.parametrize("more", [(), ("--examples", "1000", "--explain"), ("--recipe", "trl")])
def test_a_named_shape_is_answered_without_torch(tmp_path: Path, more: tuple[str, ...]) -> None:
    out = ("--out", str(tmp_path)) if "--recipe" in more else ()
    command = [sys.executable, "-c", WITHOUT_TORCH, "recommend", *ON_A_CARD, *more, *out, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr


def test_a_config_json_alone_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(NAMED_SHAPES["llama-2-7b"].config))
    for name in (path, tmp_path):
        answer = json.loads(said("--model", str(name), "--profile", "rtx-4090", "--engine", "zo2", "--json"))
        assert answer["model"]["parameters"] == 6738415616
        assert "--random-weights" in answer["plans"][0]["verify_command"]


def test_the_document_is_what_its_schema_says_and_holds_plans(tmp_path: Path) -> None:
    text = said(*ON_A_CARD, "--json", "--examples", "100")
    answer = json.loads(text)
    schema = json.loads(said("--schema"))
    assert list(answer) == list(schema["properties"])
    assert answer["verdict"]["sentences"]
    assert answer["forecasts"][0]["steps"] == 100
    path = tmp_path / "plans.json"
    path.write_text(text)
    assert {plan.engine for plan in load_plans(path)} == {"native", "zo2"}


def test_the_lengths_of_a_file_make_hours(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"instruction": "say it", "output": "x" * (20 + 9 * n)} for n in range(50)]
    data.write_text("\n".join(map(json.dumps, rows)))
    job = ("--model", "opt-1.3b", "--profile", "rtx-4090", "--engine", "native", "--json")
    found = json.loads(said(*job, "--data", str(data), "--epochs", "2", "--seq-len", "512"))
    amount = found["amount"]
    assert amount["sequences"] == 90  # a tenth is held out
    assert amount["tokens"] < 90 * 512
    assert len(amount["shares"]) > 2
    assert sum(share for _, share in amount["shares"]) == pytest.approx(1)
    noted = CliRunner().invoke(app, ["recommend", *job, "--data", str(data), "--seq-len", "512", "--quiet"])
    assert "counted in bytes" in noted.stderr
    padded = json.loads(said(*job, "--data", str(data), "--seq-len", "512", "--padding", "seq_len"))
    assert padded["amount"]["shares"] == [[512, 1.0]]
    assert found["forecasts"][0]["seconds"] < 2 * padded["forecasts"][0]["seconds"]


def test_explanations_have_the_numbers_filled_in() -> None:
    told = " ".join(said(*ON_A_CARD, "--explain", "--examples", "1000").split())
    assert "GPU memory = weights " in told
    assert "TFLOP products / " in told
    assert "job = 1,000 steps" in told
    assert "rests on: Closed form" in told


def test_a_target_is_answered_backwards() -> None:
    on_a_card = ("--model", "opt-1.3b", "--profile", "rtx-4090", "--engines", "native")
    told = said(*on_a_card, "--target", "model=70b")
    assert "Machines of the catalogue for 70b, the least first" in told
    zeroth = said(*on_a_card[:4], "--engines", "zo2", "--target", "model=70b")
    on_disk = r"by zo2, with [\d.]+ GiB of it on disk, in a time that is not predicted\."
    assert re.search(rf"the least machine that does it is [\w-]+, {on_disk}", " ".join(zeroth.split()))
    limited = CliRunner().invoke(
        app, ["recommend", *on_a_card, "--target", "model=70b", "--host-memory", "64GB"]
    )
    assert "others of the catalogue have all of theirs" in limited.stderr
    unnamed = said("--profile", "rtx-3090", "--engines", "lora", "--target", "model=70b")
    assert "Predicted: opt-66b (65.72 B parameters)" in unnamed  # the nearest named shape
    hours = said(*on_a_card, "--target", "hours=8", "--examples", "100000")
    assert "the least machine that does it is" in hours


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--examples", "0"), "--examples 0"),
        (("--examples", "5", "--tokens", "5"), "--examples and --tokens"),
        (("--epochs", "3"), "does not say of how much"),
        (("--price", "2.5USD/h"), "has no date"),
        (("--price", "cheap"), "no amount, currency and unit"),
        (("--power", "450"), "--power '450'"),
        (("--target", "hours=0"), "no number of hours"),
        (("--target", "hours=8"), "does not say of how much"),
        (("--target", "model=5000b"), "no named shape is of about that size"),
        (("--target", "model=nothing-like-it"), "is no named shape"),
        (("--vram", "0GB"), "not positive"),
        (("--vram", "24Gb"), "would be bits"),
        (("--host-memory", "64"), "has no unit"),
        (("--host-memory", "3 parsecs"), "unit 'parsecs' is not known"),
        (("--calibrate", "nowhere"), "holds no runs"),
        (("--set", "zo2.resident_blocks=20", "--set", "zo2.disk_blocks=20"), "add up to 24 or less"),
        (("--profile", "rtx-4091"), "rtx-409"),
    ],
)
def test_what_cannot_be_meant_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(*ON_A_CARD, *arguments)


def test_a_limit_beyond_the_machine_limits_nothing_and_is_told() -> None:
    done = CliRunner().invoke(
        app, ["recommend", *ON_A_CARD, "--vram", "100GB", "--host-memory", "2TB", "--quiet"]
    )
    assert done.exception is None
    assert "--vram 93.1 GiB is more than the 24.0 GiB of NVIDIA GeForce RTX 4090" in done.stderr
    assert "--host-memory 1.82 TiB is more than" in done.stderr


@pytest.mark.parametrize(("size", "told"), [("8GB", True), ("8GiB", False), ("7.5GB", False)])
def test_a_limit_in_decimal_gigabytes_is_told_beside_what_cards_hold(size: str, told: bool) -> None:
    done = CliRunner().invoke(app, ["recommend", *ON_A_CARD, "--vram", size, "--quiet"])
    assert done.exception is None
    said = "--vram 8GB is 7.45 GiB; a card sold as 8 GB holds 8 GiB (--vram 8GiB)"
    assert (said in done.stderr) == told


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "two.safetensors is damaged or not whole"),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
            "two.safetensors is damaged",
        ),
        (Path.unlink, "two.safetensors is missing"),
        (
            lambda path: path.with_name("model.safetensors.index.json").write_text("{"),
            "index.json cannot be read",
        ),
        (Path.exists, None),
    ],
    ids=["cut short", "pointer", "missing", "list", "whole"],
)
def test_a_checkpoint_that_no_run_could_load_is_told(
    broken: Callable[[Path], object], why: str | None, tmp_path: Path
) -> None:
    """By names and headers: a plan itself needs config.json alone."""
    (tmp_path / "config.json").write_text(json.dumps(NAMED_SHAPES["tiny-llama"].config))
    for name in ("one", "two"):
        save_file({name: torch.zeros(8, dtype=torch.bfloat16)}, tmp_path / f"{name}.safetensors")
    places = {name: f"{name}.safetensors" for name in ("one", "two")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    broken(tmp_path / "two.safetensors")
    asked = ["--model", str(tmp_path), "--profile", "rtx-4090", "--engine", "native", "--quiet"]
    done = CliRunner().invoke(app, ["recommend", *asked])
    assert done.exception is None
    assert ("no run can load the weights" in done.stderr) == (why is not None)
    assert (why or "") in done.stderr
    japanese = CliRunner().invoke(app, ["recommend", *asked, "--lang", "ja"]).stderr
    assert ("ダウンロードし直して" in japanese) == (why is not None)


def test_settings_that_no_reason_names_are_written_as_reasons_write_them() -> None:
    """`graphs=false`, and the settings that reasons name are not told twice."""
    told = said(
        "--model", "qwen2.5-7b", "--profile", "rtx-4060-ti-16gb", "--vram", "8GiB", "--host-memory", "14GiB"
    )
    assert "in its nearest setting" in told
    assert "=false" in told
    assert "=False" not in told
    assert "=True" not in told


def test_one_hour_is_one_hour() -> None:
    asked = (*ON_A_CARD, "--examples", "1000", "--target", "hours=1")
    assert "Machines of the catalogue for 1 hour, the least first" in said(*asked)
    assert "一覧のマシンで 1 時間以内に終わるか" in said(*asked, "--lang", "ja")


def test_gpus_that_are_assumed_and_have_nothing_to_do_are_told() -> None:
    asked = ["recommend", *ON_A_CARD, "--gpus", "2", "--quiet"]
    done = CliRunner().invoke(app, asked)
    assert done.exception is None
    assert "--gpus 2 is more than this machine has" in done.stderr
    assert "has 1 micro-batch a step for 2 processes; use --accumulation 2" in " ".join(done.stdout.split())
    assert "--accumulation 2 gives each one" in done.stderr
    assert "gives each one" not in CliRunner().invoke(app, [*asked, "--accumulation", "2"]).stderr


def test_a_limit_on_a_card_that_is_not_there_limits_nothing_and_is_told(tmp_path: Path) -> None:
    profile = json.loads((Path(__file__).parents[3] / "profiles/machines/rtx-3090.json").read_text())
    profile |= {"gpu": None, "link": None, "gpu_absent_reason": "none"}
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(profile))
    asked = ["--model", "opt-125m", "--profile", str(path), "--vram", "24GB", "--quiet", "--json"]
    done = CliRunner().invoke(app, ["recommend", *asked])
    assert done.exception is None
    assert "--vram 22.4 GiB limits nothing: no GPU is found here" in done.stderr
    proposed = [plan["verify_command"] for plan in json.loads(done.stdout)["plans"] if plan["fits"]]
    assert proposed
    assert not [command for command in proposed if "--vram" in command]


@pytest.mark.parametrize("platform", ["Linux 6.6", "Linux 6.6, WSL2"])
def test_a_limit_that_was_not_measured_is_told_where_it_is_known_to_be_low(
    tmp_path: Path, platform: str
) -> None:
    profile = json.loads((Path(__file__).parents[3] / "profiles/machines/rtx-3090.json").read_text())
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(profile | {"platform": platform}))
    job = ("--model", "opt-13b", "--dtype", "fp16", "--engine", "zo2", "--profile", str(path), "--quiet")
    done = CliRunner().invoke(app, ["recommend", *job])
    assert done.exception is None
    assert ("WSL2 allows a few GB" in done.stderr) == ("WSL2" in platform)


def test_a_profile_with_missing_numbers_predicts_what_it_can_and_names_the_rest(tmp_path: Path) -> None:
    profile = json.loads((Path(__file__).parents[3] / "profiles/machines/rtx-4090.json").read_text())
    nothing = {"value": None, "origin": "absent", "method": "left out"}
    profile["link"] = None
    profile["cpu"]["adam_elements_per_s"] = nothing
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(profile))
    engines = ("--engines", "native,mezo,exact-offload,torchao-offload")
    told = said("--model", "opt-1.3b", "--profile", str(path), *engines, "--examples", "1000", "--json")
    answer = json.loads(told)
    times = {plan["engine"]: plan["prediction"]["step_s"] for plan in answer["plans"]}
    assert times["native"] is not None
    assert times["mezo"] is not None
    assert times["exact-offload"] is None
    basis = {plan["engine"]: plan["prediction"]["basis"] for plan in answer["plans"]}
    assert "is not in the machine profile" in basis["exact-offload"]
    table = said("--model", "opt-1.3b", "--profile", str(path), *engines)
    assert "not predicted" in table
