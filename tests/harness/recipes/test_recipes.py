"""Configurations for other programs: every method that they have, and ours always."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from known_shapes import H200, OPT_1B

from engines import ENGINES, public_engines
from engines.errors import UserError
from harness.models.configs import named_shape
from harness.pipeline import job_to_plan
from harness.recipes.write import STACKS, Stack, recipe_of, write_recipe
from harness.recommendation import Recommendation, recommended
from harness.records.job import load_job, make_job
from profiles.advice.amount import Asked, amount_of
from profiles.advice.job_time import Rates


def answer(engines: tuple[str, ...], model: str = "qwen2.5-0.5b", **fields: Any) -> Recommendation:
    values: dict[str, Any] = {"model": {"name": model, "random_weights": True}, "batch_size": 2}
    job = make_job(values | fields, "a test")
    amount = amount_of(job.workload, Asked(examples=1000), None)
    shape = named_shape(model)
    return recommended(job, job_to_plan(job, shape, engines, amount), H200, rates=Rates())


def keys(text: str) -> dict[str, Any]:
    """Of the YAML that is written: a key a line, each value JSON."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {key: json.loads(value) for key, _, value in (line.partition(": ") for line in lines)}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("engine", public_engines())
def test_each_method_is_written_where_the_program_has_it(stack: Stack, engine: str) -> None:
    found = answer((engine,))
    (plan,) = found.plans
    recipe = recipe_of(found, plan, stack)
    has_none = ENGINES[engine].elsewhere in (None, "optimizer_in_backward")
    of_deepspeed = ENGINES[engine].elsewhere in ("full", "cpu_adamw", "streamed_cpu_adamw")
    assert (recipe is None) == (has_none or (stack == "deepspeed" and not of_deepspeed))
    if recipe is None:
        return
    main = next(iter(recipe.files))
    assert main in recipe.command
    told = json.loads(recipe.files[main]) if main.endswith(".json") else keys(recipe.files[main])
    assert 2 in told.values()  # the micro-batch
    if main.endswith(".yaml"):
        assert "Qwen/Qwen2.5-0.5B" in told.values()
        assert told["max_steps"] == 500
        assert told["learning_rate"] == 1e-4
    if "deepspeed" in told and main.endswith(".yaml"):
        assert json.loads(recipe.files[told["deepspeed"]])["zero_optimization"]["stage"] in (2, 3)


def test_settings_of_the_plan_are_in_the_file() -> None:
    found = answer(("lora",), settings={"lora": {"r": 8, "target_modules": "q_proj,v_proj"}})
    (plan,) = found.plans
    trl = recipe_of(found, plan, "trl")
    assert trl is not None
    told = keys(trl.files["trl.yaml"])
    assert (told["lora_r"], told["lora_target_modules"]) == (8, ["q_proj", "v_proj"])


@pytest.mark.parametrize("stack", ["trl", "axolotl", "llamafactory"])
def test_adam_and_its_rate_are_ours_and_not_the_programs_defaults(stack: Stack) -> None:
    own = {"beta2": 0.95, "adam_eps": 1e-6, "schedule": "constant", "warmup_steps": 10}
    found = answer(("lora",), settings={"lora": own})
    (plan,) = found.plans
    recipe = recipe_of(found, plan, stack)
    assert recipe is not None
    told = keys(next(iter(recipe.files.values())))
    assert (told["adam_beta1"], told["adam_beta2"], told["adam_epsilon"]) == (0.9, 0.95, 1e-6)
    assert "constant_with_warmup" in told.values()
    assert told["warmup_steps"] == 10
    assert told["max_grad_norm"] == 0.0  # the Trainer's own is 1


@pytest.mark.parametrize("stack", ["trl", "axolotl", "llamafactory"])
def test_rows_of_a_text_and_its_class_are_to_be_written_anew(stack: Stack, tmp_path: Path) -> None:
    """These programs would learn the text alone, or find no columns of theirs."""
    data = tmp_path / "reviews.csv"
    data.write_text("text,label\n" + 20 * "good film,1\nbad film,0\n", encoding="utf-8")
    written = write_recipe(answer(("lora",), data={"train": str(data)}), stack, tmp_path / "out")
    files = [path.read_text(encoding="utf-8") for path in written.folder.glob(f"{stack}.yaml")]
    files += [path.read_text(encoding="utf-8") for path in written.folder.glob("dataset_info.json")]
    assert "YOUR_DATA" in "".join(files)
    assert "reviews.csv" not in "".join(files)
    assert f"{stack} has no rows like those of reviews.csv" in written.lines[-1]
    assert load_job(written.folder / "job.toml").data.train == str(data)


def test_data_files_are_told_in_each_programs_way(tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    data.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(20)))
    found = answer(("lora",), data={"train": str(data)})
    (plan,) = found.plans
    recipes = {stack: recipe_of(found, plan, stack) for stack in ("trl", "axolotl", "llamafactory")}  # type: ignore[arg-type]
    files = {stack: dict(recipe.files) for stack, recipe in recipes.items() if recipe is not None}
    assert keys(files["trl"]["trl.yaml"])["datasets"] == [{"path": "json", "data_files": str(data)}]
    (one,) = keys(files["axolotl"]["axolotl.yaml"])["datasets"]
    assert (one["path"], one["ds_type"], one["type"]) == (str(data), "json", "chat_template")
    listed = json.loads(files["llamafactory"]["dataset_info.json"])["mine"]
    assert (listed["file_name"], listed["formatting"]) == (str(data), "sharegpt")


def test_a_path_from_here_is_told_from_where_the_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lines.jsonl").write_text(20 * (json.dumps({"text": "some words"}) + "\n"), encoding="utf-8")
    Path("out").mkdir()
    write_recipe(answer(("lora",), data={"train": "lines.jsonl"}), "trl", Path("out"))
    (told,) = keys(Path("out", "trl.yaml").read_text(encoding="utf-8"))["datasets"]
    assert Path("out", told["data_files"]).resolve() == tmp_path / "lines.jsonl"
    assert load_job(Path("out", "job.toml")).data.train == "lines.jsonl"


@pytest.mark.parametrize("stack", ["trl", "axolotl", "llamafactory", "deepspeed"])
def test_of_several_gpus_each_has_its_part_of_the_micro_batches(stack: Stack, tmp_path: Path) -> None:
    """As other programs count them: of each process. Ours are those of all."""
    for accumulation, each, more in ((8, 4, ""), (3, 2, ", 4 together")):
        found = answer(("native",), accumulation=accumulation, limits={"gpus": 2})
        written = write_recipe(found, stack, tmp_path / str(accumulation))
        (name,) = [name for name in (f"{stack}.yaml", f"{stack}.json") if (written.folder / name).exists()]
        text = (written.folder / name).read_text(encoding="utf-8")
        told = json.loads(text) if name.endswith("json") else keys(text)
        assert told["gradient_accumulation_steps"] == each
        assert written.lines[-1].endswith(f"{each} of --accumulation {accumulation} for each{more}")
        assert load_job(written.folder / "job.toml").accumulation == accumulation
    if stack in ("trl", "deepspeed"):
        (command,) = [line for line in written.lines if line.startswith(f"{stack}, in ")]
        assert ("--num_processes 2" if stack == "trl" else "--num_gpus 2") in command


def test_ours_is_always_written_and_what_the_program_lacks_is_said(tmp_path: Path) -> None:
    written = write_recipe(answer(("zo2", "lora")), "axolotl", tmp_path / "one")
    assert (written.folder / "axolotl.yaml").exists()
    job = load_job(tmp_path / "one" / "job.toml")
    assert job.steps == 500
    assert "lora" in job.settings
    lacking = write_recipe(answer(("zo2",)), "trl", tmp_path / "two")
    assert [path.name for path in lacking.folder.iterdir()] == ["job.toml"]
    assert "it has no zo2" in lacking.lines[-1]
    other = write_recipe(answer(("lsp", "torchao-offload")), "trl", tmp_path / "three")
    assert "it has torchao-offload (--engine NAME)" in other.lines[-1]
    encoder = write_recipe(answer(("native",), "roberta-base"), "trl", tmp_path / "four")
    assert "this is an encoder" in encoder.lines[-1]


def test_nothing_is_written_where_nothing_fits(tmp_path: Path) -> None:
    job = make_job(
        {"model": {"name": "opt-1.3b", "random_weights": True}, "limits": {"vram_bytes": 10**8}}, "a test"
    )
    found = recommended(job, job_to_plan(job, OPT_1B, ("native",), None), H200, rates=Rates())
    with pytest.raises(UserError, match="no method fits"):
        write_recipe(found, "trl", tmp_path)
    assert not list(tmp_path.iterdir())
