"""What people bring that is no model to fine-tune: one line that says what it is and what to take instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_configs import config_of
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from engines.errors import UserError
from harness.cli.app import app
from harness.models.blueprint import export_model, make_blueprint
from harness.models.configs import load_config
from harness.records.job import DataSource, Job, ModelSource
from harness.resolve import resolve_shape

LLAMA = config_of("llama")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


def quantised(**told: Any) -> dict[str, Any]:
    return {**LLAMA, "quantization_config": told}


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": (quantised(**GPTQ), r"quantised \(gptq, 4 bits\); take the model that it was made from"),
    "awq": (quantised(quant_method="awq", w_bit=4), r"quantised \(awq, 4 bits\)"),
    "bitsandbytes": (quantised(quant_method="bitsandbytes", load_in_8bit=True), r"\(bitsandbytes, 8 bits\)"),
    "fp8": (quantised(quant_method="fp8"), r"quantised \(fp8, 8 bits\)"),
    "compressed tensors": (
        quantised(quant_method="compressed-tensors", config_groups={"a": {"weights": {"num_bits": 4}}}),
        r"quantised \(compressed-tensors, 4 bits\)",
    ),
    "blocks without end": (
        {"model_type": "distilbert", "n_layers": 10**9},
        r"n_layers = 1000000000, above 10000; correct",
    ),
    "mlx": ({**LLAMA, "quantization": {"group_size": 64, "bits": 4}}, r"quantised \(low-bit, 4 bits\)"),
    "t5": (
        {"model_type": "t5", "is_encoder_decoder": True},
        "t5 is an encoder-decoder; use a decoder or an encoder",
    ),
    "t5 that does not say so": ({"model_type": "t5", "d_model": 32}, "t5 is an encoder-decoder"),
    "bart": ({"model_type": "bart", "d_model": 32}, "bart is an encoder-decoder"),
    "text and images": (
        {"model_type": "llava", "text_config": LLAMA, "vision_config": {"hidden_size": 8}},
        "llava is of text and images; use a model of text alone",
    ),
    "images": ({"model_type": "vit", "patch_size": 16, "num_channels": 3}, "vit is a model of images"),
    "images by type": ({"model_type": "vit"}, "'vit' is no language model"),
    "a field of another type": ({**config_of("mixtral"), "hidden_size": "wide"}, 'hidden_size = "wide"'),
    "another field of another type": (
        {**config_of("mixtral"), "intermediate_size": "wide"},
        "'intermediate_size'",
    ),
    "heads that do not divide": (
        {**LLAMA, "hidden_size": 33},
        "makes no model \\(the hidden size is no multiple of the number of heads\\)",
    ),
    "keys' heads that do not divide": (
        {**LLAMA, "num_key_value_heads": 3},
        "num_key_value_heads = 3, which does not divide num_attention_heads = 4",
    ),
    "an activation that there is not": ({**LLAMA, "hidden_act": "swiglu"}, "makes no model \\('swiglu'"),
    "positions of no kind": (
        {**LLAMA, "rope_scaling": {"rope_type": "foo", "factor": 2.0}},
        "makes no model \\('foo'",
    ),
    "sizes that do not fit": ({**config_of("gemma"), "intermediate_size": -1}, "makes no model"),
}


def folder_with(folder: Path, config: dict[str, Any] | None, **files: str) -> str:
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return str(folder)


def job(name: str, *, random_weights: bool = True) -> Job:
    return Job(
        model=ModelSource(name=name, random_weights=random_weights),
        data=DataSource(train="random"),
        batch_size=2,
        seq_len=16,
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_it_is_and_what_to_take_instead(kind: str, tmp_path: Path) -> None:
    config, message = CONFIGS[kind]
    with pytest.raises(UserError, match=message) as caught:
        resolve_shape(job(folder_with(tmp_path / "m", config)))
    said = str(caught.value).replace(str(tmp_path), "")
    assert len(said) < 200
    assert "\n" not in said


def test_quantised_weights_are_known_by_the_file_of_older_tools(tmp_path: Path) -> None:
    name = folder_with(tmp_path / "m", LLAMA, quantize_config__json=json.dumps({"bits": 3}))
    with pytest.raises(UserError, match=r"quantised \(gptq, 3 bits\)"):
        resolve_shape(job(name))


COMMANDS = {
    "recommend": ["recommend", "--profile", "rtx-3090", "--seq-len", "64"],
    "run": ["run", "--engine", "mezo", "--steps", "1", "--seq-len", "64", "--out", "OUT"],
    "compare": ["compare", "--engines", "native,mezo", "--steps", "1", "--seq-len", "64", "--out", "OUT"],
    "generate": ["generate", "hi"],
    "poc": ["poc", "--out", "OUT"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_the_same_of_quantised_weights(command: str, tmp_path: Path) -> None:
    name = folder_with(tmp_path / "m", CONFIGS["gptq"][0])
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "m" / "model.safetensors")
    arguments = [each.replace("OUT", str(tmp_path / "out")) for each in COMMANDS[command]]
    result = CliRunner().invoke(app, [*arguments, "--model", name])
    assert isinstance(result.exception, UserError)
    assert "its weights are quantised (gptq, 4 bits)" in str(result.exception)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {
                "adapter_config__json": json.dumps(
                    {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
                )
            },
            r"holds an adapter alone \(LORA for org/base\); merge it into that model first",
        ),
        ({"model_index__json": "{}"}, "is a pipeline that makes images"),
        ({"weights__gguf": "GGUF"}, "holds GGUF files"),
        ({}, r"holds no config\.json"),
    ],
)
def test_a_folder_without_a_configuration(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_config(ModelSource(name=folder_with(tmp_path / "m", None, **files), random_weights=True))


def test_infinity_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    config = {**config_of("mamba2"), "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    its_job = job(folder_with(tmp_path / "m", config))
    assert load_config(its_job.model)["time_step_limit"] == [0.0, float("inf")]
    make_blueprint(its_job, resolve_shape(its_job))


def test_a_vocabulary_that_is_not_the_files_is_told_with_both_shapes(tmp_path: Path) -> None:
    its_job = job("tiny-llama")
    blueprint = make_blueprint(its_job, resolve_shape(its_job))
    values = ((name, torch.zeros(shape)) for name, shape in blueprint.parameter_shapes.items())
    export_model(blueprint, values, torch.float32, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    (tmp_path / "m" / "SHA256SUMS").unlink()
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 512}))
    other = job(str(tmp_path / "m"), random_weights=False)
    told = r"(lm_head|embed_tokens)\.weight is 320 x 64 in its file and 512 x 64 by config\.json"
    with pytest.raises(UserError, match=told):
        make_blueprint(other, resolve_shape(other))
    assert load_file(tmp_path / "m" / "model.safetensors")["lm_head.weight"].shape == (320, 64)
