"""`lspzo-bench generate`: what stands on stdout is what the plain model makes of the same tokens."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_machine import make_machine
from tiny_tokenizer import write_tokenizer
from train_runs import Killed, die_at, run, tiny_job
from transformers import AutoModelForCausalLM

from engines.errors import UserError
from engines.files.checksums import SUMS
from harness.cli import app
from harness.models.configs import NAMED_SHAPES
from harness.models.tokenizers import ByteTokenizer, load_tokenizer
from harness.records.job import ModelSource
from harness.records.run import load_run
from harness.records.stats import outer_deciles
from harness.training.generate import end_ids
from profiles.documents import to_json

PROMPTS = ("the film was", "a", "what a long prompt this is")
LR = 1e-3


@dataclass
class Done:
    code: int
    out: str
    err: str


Call = Callable[..., Done]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """`lspzo-bench generate` with these arguments, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run_it(*arguments: str | Path, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["lspzo-bench", "generate", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            app.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run_it


def one_line(done: Done) -> str:
    assert done.code == 2, done
    assert done.out == ""
    (line,) = done.err.strip().splitlines()
    return line


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of zo2 with the folder that it exported."""
    out = tmp_path_factory.mktemp("runs") / "run"
    run(out, "zo2", learning_rate=LR, fold_every=4)
    return out


@pytest.fixture(scope="module")
def model(trained: Path) -> Path:
    return trained / "model"


def bytes_of(folder: Path) -> Any:
    return load_tokenizer(ModelSource(name=str(folder)), 320)


def plainly(folder: Path, prompts: Sequence[str] = PROMPTS, count: int = 8) -> list[list[int]]:
    """New tokens of each prompt alone, by transformers' own `generate`, without the one that ends them."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = bytes_of(folder)
    found = []
    for prompt in prompts:
        ids = torch.tensor([[*tokenizer.prefix, *tokenizer.encode([prompt])[0]]])
        made = plain.generate(ids, do_sample=False, max_new_tokens=count, pad_token_id=0, eos_token_id=2)
        new = made[0, ids.shape[1] :].tolist()
        found.append(new[: new.index(2)] if 2 in new else new)
    return found


def tokens_in(done: Done) -> list[list[int]]:
    assert done.code == 0, done
    return [each["tokens"] for each in json.loads(done.out)["continuations"]]


FP32 = ("--dtype", "fp32", "--max-new-tokens", "8")


@pytest.mark.parametrize("engine", ["zo2", "mezo"])
def test_a_folder_is_continued_as_the_plain_model_would(call: Call, model: Path, engine: str) -> None:
    done = call(*PROMPTS, "--model", model, *FP32, "--engine", engine, "--json")
    assert tokens_in(done) == plainly(model)
    said = json.loads(done.out)
    assert (said["step"], said["engine"], said["max_new_tokens"]) == (None, engine, 8)
    assert [each["prompt"] for each in said["continuations"]] == list(PROMPTS)
    assert "generating" in done.err


def test_text_on_stdout_is_each_prompt_and_what_comes_after_it(call: Call, model: Path) -> None:
    done = call(*PROMPTS, "--model", model, *FP32, "--quiet")
    tokenizer = bytes_of(model)
    expected = [prompt + tokenizer.decode(new) for prompt, new in zip(PROMPTS, plainly(model), strict=True)]
    assert done.out == "\n\n".join(expected) + "\n"
    assert done.err == ""


@pytest.mark.parametrize("engine", [(), ("--engine", "mezo"), ("--set", "resident_blocks=1")])
def test_a_run_is_continued_with_its_latest_weights(
    call: Call, trained: Path, model: Path, engine: tuple[str, ...]
) -> None:
    done = call(*PROMPTS, "--run", trained, "--max-new-tokens", "8", "--json", *engine)
    assert tokens_in(done) == plainly(model)
    assert json.loads(done.out)["step"] == 6


@pytest.mark.parametrize("save_every", [0, 2])
def test_a_run_that_was_killed_is_continued_from_its_log(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int
) -> None:
    with monkeypatch.context() as patch:
        die_at(patch, "mezo", 3)
        with pytest.raises(Killed):
            run(tmp_path / "run", "mezo", save_every=save_every, learning_rate=LR)
    run(tmp_path / "shorter", "mezo", job=tiny_job(steps=3), learning_rate=LR)
    done = call(*PROMPTS, "--run", tmp_path / "run", "--max-new-tokens", "8", "--json")
    assert json.loads(done.out)["step"] == 3
    assert tokens_in(done) == plainly(tmp_path / "shorter" / "model")


def test_prompts_come_from_arguments_a_file_or_stdin(call: Call, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(["", *PROMPTS, "  ", ""]))
    flags = ("--model", model, *FP32, "--quiet")
    given = call(*PROMPTS, *flags)
    assert call("--prompts", path, *flags) == given
    assert call("--prompts", "-", *flags, stdin=path.read_text()) == given


def test_a_seed_draws_the_same_again_and_another_something_else(call: Call, model: Path) -> None:
    flags = (*PROMPTS, "--model", model, *FP32, "--json", "--temperature", "1.5", "--top-k", "50")
    first = tokens_in(call(*flags, "--seed", "3"))
    assert tokens_in(call(*flags, "--seed", "3", "--engine", "mezo")) == first
    assert tokens_in(call(*flags, "--seed", "4")) != first


def test_a_text_ends_where_the_model_ends_it(call: Call, model: Path, tmp_path: Path) -> None:
    (whole,) = plainly(model, PROMPTS[:1])
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / SUMS).unlink()
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, whole[3]]}))
    done = call(PROMPTS[0], "--model", folder, *FP32, "--json")
    (told,) = json.loads(done.out)["continuations"]
    assert told["tokens"] == whole[: whole.index(whole[3])]
    assert told["ended"]


def test_end_tokens_are_those_of_tokenizer_and_configuration(tmp_path: Path) -> None:
    config = {**NAMED_SHAPES["tiny-llama"].config, "eos_token_id": [7, 8]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = ModelSource(name=str(tmp_path), random_weights=True)
    assert end_ids(source, ByteTokenizer(config, 320)) == (7, 8)
    bare = {key: value for key, value in config.items() if key != "eos_token_id"}
    (tmp_path / "config.json").write_text(json.dumps(bare))
    tokenizer = ByteTokenizer(bare, 320)
    assert end_ids(source, tokenizer) == (tokenizer.end_id,)


def test_a_tokenizer_of_the_models_own_makes_the_text(call: Call, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).symlink_to(path)
    write_tokenizer(folder)
    done = call("a film", "--model", folder, *FP32, "--json")
    (told,) = json.loads(done.out)["continuations"]
    words = {4: "a", 5: "b", 6: "film"}
    assert told["text"].split() == [words[token] for token in told["tokens"] if token in words]


RANDOM = ("--random-weights", "--dtype", "fp32")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("x",), "give either --model or --run"),
        (("x", "--model", "tiny-opt", "--run", "there"), "give either --model or --run"),
        (("--model", "tiny-opt", *RANDOM), "there is no prompt"),
        (("x", "--prompts", "file", "--model", "tiny-opt"), "there are prompts as arguments too"),
        (("--prompts", "none.txt", "--model", "tiny-opt"), "none.txt: there is no such file of prompts"),
        (("--prompts", "-", "--model", "tiny-opt"), "-: holds no prompt; write one in each line"),
        (("x", "--model", "tiny-roberta", *RANDOM), "has a head for classification, and generates no text"),
        (("x", "--model", "tiny-opt", *RANDOM, "--engine", "native"), "does not generate; use zo2 or mezo"),
        (("x", "--model", "tiny-opt", *RANDOM, "--temperature", "-1"), "--temperature: must not be negative"),
        (("x", "--model", "tiny-opt", *RANDOM, "--top-p", "0"), "--top-p: must be in (0, 1]"),
        (("x", "--model", "tiny-opt", *RANDOM, "--top-k", "-3"), "--top-k: must not be negative"),
        (
            ("x", "--model", "tiny-opt", *RANDOM, "--max-new-tokens", "255"),
            "tiny-opt takes at most 256 tokens",
        ),
        (("x", "--model", "tiny-opt", *RANDOM, "--batch-size", "2"), "--batch-size: is for --measure"),
        (("x", "--model", "tiny-opt", *RANDOM, "--out", "there"), "--out: is for --measure"),
        (("x", "--model", "tiny-opt", *RANDOM, "--set", "zo2.residents=1"), "residents"),
        (("x", "--model", "tiny-opt", *RANDOM, "--host-memory", "1MB"), "of host memory, 977 KiB are usable"),
        (("x", "--run", "nowhere"), "nowhere: holds no run"),
        (("x", "--run", "nowhere", "--dtype", "fp32"), "--dtype: is settled by the run"),
        (("x", "--measure", "--model", "tiny-opt", *RANDOM), "--measure: continues random prompts"),
        (("--measure", "--model", "tiny-roberta", *RANDOM), "generates no text; use a decoder"),
        (("--measure", "--model", "tiny-opt", *RANDOM, "--max-new-tokens", "4"), "give 5 or more"),
        (("--measure", "--model", "tiny-opt", *RANDOM, "--seq-len", "200"), "leaves no room for 65 more of"),
    ],
)
def test_mistakes_are_one_line(call: Call, arguments: tuple[str, ...], expected: str) -> None:
    assert expected in one_line(call(*arguments, "--quiet"))


@pytest.mark.parametrize("name", ["native", "exact-offload"])
def test_a_run_of_another_method_is_continued_with_what_it_trained(
    call: Call, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "run"
    run(out, name, save_every=3, learning_rate=LR)
    before = sorted(path.name for path in out.iterdir())
    done = call(*PROMPTS, "--run", out, "--max-new-tokens", "8", "--json")
    assert tokens_in(done) == plainly(out / "model")
    said = json.loads(done.out)
    assert (said["step"], said["engine"], said["model"]) == (6, "zo2", "tiny-llama")
    assert sorted(path.name for path in out.iterdir()) == before


def test_what_the_run_settled_is_not_set_again(call: Call, trained: Path) -> None:
    done = call("x", "--run", trained, "--engine", "foo", "--set", "resident_blocks=1", "--quiet")
    assert "there is no such engine" in one_line(done)
    done = call("x", "--run", trained, "--set", "learning_rate=1", "--quiet")
    assert "--set learning_rate: is settled by the run" in one_line(done)


def test_a_prompt_without_a_token_is_refused(model: Path, tmp_path: Path) -> None:
    from engines.decoding import Sampling
    from harness.progress import Progress
    from harness.records.job import make_job
    from harness.training.generate import Wanted, generate_from_model

    config = json.loads((model / "config.json").read_text())
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    job = make_job(
        {"model": {"name": str(folder), "random_weights": True}, "seq_len": 1, "data": {"train": "random"}},
        "test",
    )
    wanted = Wanted(prompts=("a", " "), max_new_tokens=2, sampling=Sampling())
    with pytest.raises(UserError, match="prompt 2: is empty; begin it with a word"):
        generate_from_model(job, "zo2", wanted, Progress(quiet=True))


# --- measured -----------------------------------------------------------------------------------------


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "machine.json"
    path.write_text(to_json(make_machine()))
    return path


MEASURED = (
    "--measure", "--model", "tiny-llama", "--random-weights", "--dtype", "bf16", "--batch-size", "3",
    "--seq-len", "8", "--max-new-tokens", "9", "--warmup-steps", "2",
)  # fmt: skip


@pytest.mark.usefixtures("forked_programs")
def test_a_measurement_is_a_record_of_every_round(call: Call, profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = (*MEASURED, "--profile", profile, "--out", out, "--set", "resident_blocks=1")
    done = call(*flags, "--rounds", "2", "--json", "--quiet")
    assert done.code == 0, done
    records = sorted((out / "generations").glob("*.json"))
    assert len(records) == 2
    assert [each["id"] for each in json.loads(done.out)] == [path.stem for path in records]
    told = load_run(records[0], "decode")
    assert (told.end_state, told.round, told.engine) == ("ok", 1, "zo2")
    assert [sample.warmup for sample in told.samples] == [True] * 3 + [False] * 6
    assert all(sample.step_s > 0 and sample.loss is None for sample in told.samples)
    counted = sorted(sample.step_s for sample in told.samples if not sample.warmup)
    assert told.summary.step_s_median == pytest.approx((counted[2] + counted[3]) / 2)
    assert (told.summary.step_s_low, told.summary.step_s_high) == (counted[0], counted[-1])
    assert told.summary.tokens_per_s == pytest.approx(3 / told.summary.step_s_median)  # type: ignore[operator]
    assert told.first_token_s == told.samples[0].step_s
    assert (told.summary.step_s_p10, told.summary.step_s_p90) == outer_deciles(counted)
    assert told.tokens == 3 * 6
    assert told.summary.h2d_bytes == told.plan.prediction.h2d_bytes > 0
    floor_s = told.predicted.floor_s
    assert floor_s == told.plan.prediction.floor_s
    assert floor_s is not None
    assert told.summary.floor_share == floor_s / told.summary.step_s_median  # type: ignore[operator]
    assert (out / "machine.json").exists()
    assert not (out / ".work").exists()

    again = call(*flags, "--quiet")
    assert again.code == 0, again
    assert again.out.splitlines()[-1] == str(out)
    assert "Measured over 18 tokens; the floor is predicted" in again.out
    assert "10 %" in again.out
    records = sorted((out / "generations").glob("*.json"))
    assert [load_run(path, "decode").round for path in records] == [1, 2, 3]


def test_what_does_not_fit_is_a_record_too(call: Call, profile: Path, tmp_path: Path) -> None:
    done = call(*MEASURED, "--profile", profile, "--out", tmp_path / "out", "--vram", "300MB", "--quiet")
    assert done.code == 0, done
    assert "skipped_infeasible" in done.out
    (path,) = (tmp_path / "out" / "generations").glob("*.json")
    told = load_run(path, "decode")
    assert (told.end_state, told.samples) == ("skipped_infeasible", ())
    assert "of GPU memory" in str(told.end_reason)


def test_a_run_that_fails_is_a_record_and_exit_code_8(call: Call, profile: Path, tmp_path: Path) -> None:
    done = call(*MEASURED, "--profile", profile, "--out", tmp_path / "out", "--timeout", "0.2", "--quiet")
    assert done.code == 8, done
    (path,) = (tmp_path / "out" / "generations").glob("*.json")
    assert load_run(path, "decode").end_state == "timeout"
