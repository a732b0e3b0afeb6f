"""Suites in TOML: those that come along, and a toy of a user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engines import public_engines
from engines.errors import UserError
from harness.cli.app import app
from harness.quality.suites import job_of_task, load_suite, suite_names
from harness.records.job import make_job
from profiles.catalog import find_profile
from profiles.machine import save_machine
from run_records import make_machine

TOY = """
about = "a toy"
engines = ["mezo", "mezo:many"]
budget = "100ktokens"

[job]
model = { name = "tiny-llama", random_weights = true }
batch_size = 2
seq_len = 32
dtype = "fp32"
settings."mezo:many" = { queries = 2 }

[sizes]
development = 8

[[tasks]]
name = "reviews"
data = "reviews.tsv"
target = "accuracy>=0.9"
job.data = { template = "{text} It was", labels = ["bad", "good"] }

[[tasks]]
name = "elsewhere"
data = "nothing.tsv"
target = "accuracy>=0.9"

[[tasks]]
name = "later"
missing = "nobody has written it"
"""


@pytest.mark.parametrize("name", suite_names())
def test_suites_that_come_along_are_whole(name: str, tmp_path: Path) -> None:
    suite = load_suite(name)
    assert set(suite.engines) <= set(public_engines())
    if suite.emulate is not None:
        assert find_profile(Path(suite.emulate)).gpu is not None
    for task in suite.tasks:
        if task.missing:
            continue
        for file in (task.data, task.eval_data, task.test_data):
            if file is not None and file != "builtin":
                (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / file).touch()
        values = job_of_task(suite, task, tmp_path)
        job = make_job({"model": {"name": "tiny-llama"}, **values}, "suite")
        assert bool(job.data.template) == bool(job.data.labels)


def test_the_recipe_of_mezo_names_its_nine_tasks() -> None:
    suite = load_suite("mezo-tasks")
    assert len(suite.tasks) == 9
    assert [task.name for task in suite.tasks if task.missing] == ["squad", "drop"]
    assert (suite.sizes.train, suite.sizes.development, suite.sizes.test) == (1000, 500, 1000)
    assert suite.job["batch_size"] == 16


def toy(folder: Path, text: str = TOY) -> Path:
    (folder / "toy.toml").write_text(text)
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data/reviews.tsv").write_text("".join(f"film {i}\t{i % 2}\n" for i in range(80)))
    save_machine(make_machine(), folder / "machine.json")
    return folder / "toy.toml"


def test_a_toy_suite_says_what_it_would_run(tmp_path: Path) -> None:
    path = toy(tmp_path)
    arguments = ["--suite", str(path), "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    profile = ["--profile", str(tmp_path / "machine.json")]
    done = CliRunner().invoke(
        app, ["compare", *arguments, *profile, "--dry-run"], env={"COLUMNS": "200"}, catch_exceptions=False
    )
    assert done.exit_code == 0
    told = " ".join(done.stdout.split())
    assert "a toy" in told
    assert "reviews │ accuracy>=0.9 │ mezo, mezo:many │ │ 18" in told
    assert "left out: needs nothing.tsv" in told
    assert "left out: nobody has written it" in told
    assert "of steps; on top of them come 18 set-ups and 198 evaluations, whose times are not" in told
    assert not (tmp_path / "out").exists()


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["compare", "--suite", *arguments, "--dry-run"])
    assert isinstance(done.exception, UserError)
    return str(done.exception)


def test_what_is_wrong_with_a_suite_is_said_before_the_machine_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data lie beside it, so that nothing but its name is needed."""
    path = toy(tmp_path)
    (tmp_path / "data/reviews.tsv").rename(tmp_path / "reviews.tsv")
    monkeypatch.setattr("harness.quality.study.find_machine", lambda *_, **__: pytest.fail("measured"))
    text = path.read_text()
    path.write_text(text.replace("{text}", "{txt}"))
    said = refused(str(path))
    assert said.startswith("{txt} of a template or a label: is no column of ")
    assert said.endswith("reviews.tsv, which has 1 (text), 2 (label); name one of them")
    path.write_text(text.replace("100ktokens", "100tokens"))
    assert refused(str(path)).startswith("--budget 100 tokens: is too short")


def test_a_suite_that_was_stopped_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the suite's folder, in which each task has its own."""

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.cli.quality.run_study", stopped)
    path, out = toy(tmp_path), tmp_path / "out"
    arguments = ["--suite", str(path), "--data-dir", str(tmp_path / "data"), "--out", str(out)]
    done = CliRunner().invoke(app, ["compare", *arguments, "--profile", str(tmp_path / "machine.json")])
    assert done.stderr.endswith(f"go on with the same flags, --resume and --out {out}\n")


def test_a_suite_without_its_files_says_what_to_name(tmp_path: Path) -> None:
    what = "--suite lm: no task of it can be studied: "
    remedy = "; name the folder of its files with --data-dir"
    assert (
        refused("lm") == f"{what}--data-dir is missing, and task wikitext2 needs wikitext2/valid.txt{remedy}"
    )
    elsewhere = refused("lm", "--data-dir", str(tmp_path))
    assert elsewhere.startswith(f"{what}needs wikitext2/valid.txt, which is not in ")
    assert elsewhere.endswith(remedy)


@pytest.mark.parametrize("words", [(), ("--template", "{text} It was", "--labels", "bad,good")])
def test_classes_without_words_of_their_own_are_told(words: tuple[str, ...], tmp_path: Path) -> None:
    toy(tmp_path)
    done = CliRunner().invoke(
        app,
        [
            "compare", "--target", "accuracy>=0.6", "--budget", "100ktokens", "--model", "tiny-llama",
            "--random-weights", "--data", str(tmp_path / "data/reviews.tsv"), "--engines", "mezo", "--dtype",
            "fp32", "--seq-len", "32", "--profile", str(tmp_path / "machine.json"), "--dry-run", *words,
        ],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0
    assert ("words that fit the task" in done.stderr) == (not words)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (TOY.replace('"accuracy>=0.9"', '"speed>=1"'), "there is no metric 'speed'"),
        (TOY.replace("later", "reviews"), "names task 'reviews' twice"),
        (TOY.replace("budget", "bugdet"), "bugdet"),
        (TOY.replace("100ktokens", "long"), "is no time"),
        ('about = "x"\ntasks = []\n', "names no task"),
        ("about =", "is not valid TOML"),
    ],
)
def test_a_suite_that_is_wrong_is_refused_in_one_line(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(UserError, match=why) as refused:
        load_suite(str(toy(tmp_path, text)))
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="choose from: consumer-24gb, glue"):
        load_suite("nowhere")


@pytest.mark.slow
@pytest.mark.usefixtures("forked_programs")
def test_a_toy_suite_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own, as every study is, with fewer and shorter ones than usual; a second call has
    nothing left to do."""
    for name, value in (("FACTORS", (1 / 3, 1.0)), ("KEPT", (2, 1, 1)), ("EVALUATIONS", (1, 1, 4))):
        monkeypatch.setattr(f"harness.quality.documents.{name}", value)
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    path = toy(tmp_path, TOY.replace("100ktokens", "2ktokens"))
    arguments = ["--suite", str(path), "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    arguments += ["--engines", "mezo", "--profile", str(tmp_path / "machine.json"), "--seeds", "1", "--json"]
    done = CliRunner().invoke(app, ["compare", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    assert "note: the processor is busy with other work: 99 processes" in done.stderr
    result = json.loads(done.stdout)
    (method,) = result["methods"]
    assert method["engine"] == "mezo"
    assert len(method["test_values"]) == 1
    assert 0 <= result["zero_shot"] <= 1
    records = sorted((tmp_path / "out/reviews/trials").glob("*.json"))
    assert len(records) == 2 + 1 + 1
    learned = json.loads(records[-1].read_text())["learned"]
    assert len(learned["evaluations"]) == 1 + 4
    again = CliRunner().invoke(app, ["compare", *arguments, "--resume"], catch_exceptions=False)
    assert json.loads(again.stdout) == result
