from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_runs import run, tiny_job
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from engines.errors import UserError
from engines.files.checksums import SUMS
from engines.model.blocks import find_blocks, materialize
from engines.subspace.core_matrix import IdleMatrixWarning
from harness.data.batches import make_data
from harness.models import export, weights
from harness.models.auto_classes import auto_class
from harness.models.blueprint import ModelBlueprint, export_model, make_blueprint
from harness.models.configs import NAMED_SHAPES
from harness.models.meta import build_on_meta
from harness.models.safetensors_files import stored_tensors
from harness.models.weights import fill_normal
from harness.records.job import DataSource, Job, ModelSource
from harness.resolve import resolve_shape

DECODERS = ("tiny-opt", "tiny-llama", "tiny-qwen2", "tiny-gpt2")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}


def job(name: str, *, seed: int = 0, data: str = "builtin", **model: Any) -> Job:
    source = ModelSource(name=name, **{"random_weights": True, **model})
    return Job(model=source, data=DataSource(train=data), batch_size=2, seq_len=48, dtype="fp32", seed=seed)


def blueprint_of(name: str, **options: Any) -> ModelBlueprint:
    its_job = job(name, **options)
    return make_blueprint(its_job, resolve_shape(its_job))


def filled(blueprint: ModelBlueprint, names: list[str] | None = None) -> dict[str, Tensor]:
    out = {}
    for name in names or list(blueprint.parameter_shapes):
        out[name] = torch.empty(blueprint.parameter_shapes[name])
        blueprint.fill(name, out[name])
    return out


def config_folder(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / SUMS).unlink(missing_ok=True)
    return str(folder)


@pytest.mark.parametrize("name", [*DECODERS, "tiny-roberta", "bert", "mistral", "llama3"])
@pytest.mark.parametrize("head", ["auto", "classification", "question_answering"])
def test_meta_model_computes_what_a_really_built_one_does(name: str, head: str, tmp_path: Path) -> None:
    """Buffers (rotary frequencies, position ids) are right: same weights, same loss, bit for bit."""
    common = {**SMALL, "vocab_size": 300, "max_position_embeddings": 64}
    if name in ("bert", "mistral"):
        name = config_folder(tmp_path, {"model_type": name, **common, "num_key_value_heads": 1})
    elif name == "llama3":
        rope = NAMED_SHAPES["llama-3.1-8b"].config["rope_parameters"]
        name = config_folder(tmp_path, {"model_type": "llama", **common, "rope_parameters": rope})
    assert_computes_as_built(job(name, head=head))


def assert_computes_as_built(its_job: Job) -> None:
    shape = resolve_shape(its_job)
    blueprint = make_blueprint(its_job, shape)
    assert all(parameter.is_meta for parameter in blueprint.model.parameters())
    assert all(buffer.device.type == "cpu" for buffer in blueprint.model.buffers())
    built = auto_class(shape.head).from_config(blueprint.config)
    buffers = dict(built.named_buffers())
    assert dict(blueprint.model.named_buffers()).keys() == buffers.keys()
    for path, buffer in blueprint.model.named_buffers():
        assert torch.equal(buffer, buffers[path])
        assert buffer.dtype == buffers[path].dtype
    for path, parameter in built.named_parameters():
        blueprint.fill(path, parameter.data)
    model = materialize(blueprint, "cpu", torch.float32)
    batch = make_data(its_job, shape).step_batches(0)[0]
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).loss, built(**batch.inputs).loss)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.use_cache is False
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters


GEMMA3N = {
    **SMALL, "model_type": "gemma3n_text", "vocab_size": 300, "vocab_size_per_layer_input": 300,
    "max_position_embeddings": 64, "num_hidden_layers": 2, "num_key_value_heads": 1,
    "num_kv_shared_layers": 0, "laurel_rank": 4, "hidden_size_per_layer_input": 8, "altup_num_inputs": 3,
    "layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 2,
}  # fmt: skip


def test_a_model_inside_another_fills_buffers_by_its_own_configuration(tmp_path: Path) -> None:
    """Gemma 3n, whose blocks tell their inner sizes each."""
    its_job = job(config_folder(tmp_path, GEMMA3N))
    assert_computes_as_built(its_job)
    assert resolve_shape(its_job).intermediate == SMALL["intermediate_size"]


@pytest.mark.parametrize("engine", ["native", "lsp"])
def test_a_model_with_several_hidden_states_of_a_token_trains(tmp_path: Path, engine: str) -> None:
    its_job = tiny_job(config_folder(tmp_path / "model", GEMMA3N), steps=1)
    # Those 4 x 4 weights the model uses without calling their layers.
    idle = pytest.warns(IdleMatrixWarning, match=r"altup\.correction_coefs\.weight and 1 more: ")
    with idle if engine == "lsp" else nullcontext():
        folder = run(tmp_path / "out", engine, its_job)
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize("engine", ["mezo", "zo2"])
def test_several_hidden_states_of_a_token_are_not_stacked(tmp_path: Path, engine: str) -> None:
    with pytest.raises(UserError, match=r"Gemma3nForCausalLM: .* cannot stack; use native$"):
        run(tmp_path / "out", engine, tiny_job(config_folder(tmp_path / "model", GEMMA3N), steps=1))


def test_a_model_of_more_than_text_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"its type 'gemma3n' is of several models.*; use a model of text"):
        resolve_shape(job(config_folder(tmp_path, {"model_type": "gemma3n"})))


def test_fill_depends_on_seed_and_name_alone() -> None:
    names = list(blueprint_of("tiny-llama").parameter_shapes)
    forward = filled(blueprint_of("tiny-llama"), names)
    backward = filled(blueprint_of("tiny-llama"), names[::-1])
    other = filled(blueprint_of("tiny-llama", seed=1))
    again = blueprint_of("tiny-llama")
    filled(again)
    repeated = filled(again)
    for name in names:
        assert torch.equal(forward[name], backward[name])
        assert torch.equal(forward[name], repeated[name])
        if forward[name].dim() == 2:
            assert not torch.equal(forward[name], other[name])
    q, k = (f"model.layers.{index}.self_attn.q_proj.weight" for index in (0, 1))
    assert not torch.equal(forward[q], forward[k])


def test_random_weights_are_normal_norms_one_biases_zero() -> None:
    values = filled(blueprint_of("tiny-opt"))
    for name, value in values.items():
        if name.endswith("bias"):
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()
        else:
            assert value.std().item() == pytest.approx(0.1, rel=0.1)
            assert abs(value.mean().item()) < 0.01
    embedding = values["model.decoder.embed_tokens.weight"]
    assert embedding[1].std().item() == pytest.approx(0.1, rel=0.4)  # the padding row is like the others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normal_values_do_not_depend_on_threads_or_strides(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CHUNK_ELEMENTS", 1000)
    made = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out = torch.empty(70, 50, dtype=dtype)
        fill_normal(out, 0.5, seed=7)
        made.append(out)
    strided = torch.zeros(50, 70, dtype=dtype).t()
    fill_normal(strided, 0.5, seed=7)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], strided)
    assert made[0].float().std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fill_on_a_gpu_needs_the_tensor_and_little_more(dtype: torch.dtype) -> None:
    out = torch.empty(1 << 27, device="cuda", dtype=dtype)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fill_normal(out, 0.02, seed=3)
    assert torch.cuda.max_memory_allocated() - before < out.nbytes // 10
    again = torch.empty_like(out)
    fill_normal(again, 0.02, seed=3)
    assert torch.equal(out, again)
    assert out.float().std().item() == pytest.approx(0.02, rel=0.01)


def test_tied_parameter_is_filled_under_any_of_its_names() -> None:
    blueprint = blueprint_of("tiny-opt")
    values = filled(blueprint)
    assert "lm_head.weight" not in values
    out = torch.empty(320, 64)
    blueprint.fill("lm_head.weight", out)
    assert torch.equal(out, values["model.decoder.embed_tokens.weight"])
    untied = filled(blueprint_of("tiny-opt", untied=True))
    assert not torch.equal(untied["lm_head.weight"], untied["model.decoder.embed_tokens.weight"])


def test_fill_refuses_wrong_names_and_shapes() -> None:
    blueprint = blueprint_of("tiny-opt")
    with pytest.raises(KeyError):
        blueprint.fill("nothing", torch.empty(1))
    with pytest.raises(ValueError, match="is \\(320, 64\\), not"):
        blueprint.fill("lm_head.weight", torch.empty(64, 320))


def test_dropout_is_off_and_comes_back_in_the_export(tmp_path: Path) -> None:
    config = {"model_type": "bert", **SMALL, "vocab_size": 300, "max_position_embeddings": 64,
              "hidden_dropout_prob": 0.2}  # fmt: skip
    blueprint = blueprint_of(config_folder(tmp_path / "source", config))
    dropouts = [module.p for module in blueprint.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    assert not any(dropouts)
    export_model(blueprint, iter(filled(blueprint).items()), torch.float32, tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").hidden_dropout_prob == 0.2


def test_a_huge_shape_is_built_without_memory() -> None:
    blueprint = blueprint_of("opt-175b", data="random")
    assert sum(parameter.numel() for parameter in blueprint.model.parameters()) > 174e9
    assert len(find_blocks(blueprint.model)[1]) == 96


def test_buffers_that_no_initialisation_sets_come_from_a_second_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = AutoConfig.for_model(**NAMED_SHAPES["tiny-llama"].config)
    usual = build_on_meta(config, "causal_lm")
    monkeypatch.setattr(type(usual.base_model), "_init_weights", lambda self, module: None)
    made = build_on_meta(config, "causal_lm")
    assert all(parameter.is_meta for parameter in made.parameters())
    assert dict(usual.named_buffers()).keys() == dict(made.named_buffers()).keys()
    for (name, one), (_, other) in zip(usual.named_buffers(), made.named_buffers(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("name", [*DECODERS, "tiny-roberta"])
def test_export_loads_and_computes_the_same(name: str, untied: bool, tmp_path: Path) -> None:
    its_job = job(name, untied=untied)
    shape = resolve_shape(its_job)
    blueprint = make_blueprint(its_job, shape)
    values = filled(blueprint)
    batch = make_data(its_job, shape).step_batches(0)[0]
    model = materialize(blueprint, "cpu", torch.float32)
    folder = tmp_path / "exported"

    def reused() -> Iterator[tuple[str, Tensor]]:
        for name, value in values.items():
            buffer = value.clone()
            yield name, buffer
            buffer.fill_(float("nan"))  # a yielded tensor is valid until the next is asked for

    export_model(blueprint, reused(), torch.float32, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    auto = AutoModelForSequenceClassification if name == "tiny-roberta" else AutoModelForCausalLM
    loaded, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.architectures == [type(loaded).__name__]
    with torch.no_grad():
        loss = model.eval()(**batch.inputs).loss
        assert torch.equal(loaded(**batch.inputs).loss, loss)
        AutoModel.from_pretrained(folder)
    # And back in: the same weights from the folder as from the seed.
    back = blueprint_of(str(folder), random_weights=False)
    for path, value in filled(back).items():
        assert torch.equal(value, values[path]), path
    assert back.shape.tied == shape.tied
    assert back.shape.parameters == shape.parameters


def test_export_in_shards(tmp_path: Path) -> None:
    blueprint = blueprint_of("tiny-opt")
    values = filled(blueprint)
    export.write_model(
        tmp_path / "out",
        config=blueprint.config,
        expected=blueprint.parameter_shapes,
        weights=iter(values.items()),
        buffers={},
        dtype=torch.bfloat16,
        extra_files=[],
        shard_bytes=50_000,
    )
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[-1] == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, values[name].to(torch.bfloat16))


def test_export_refuses_a_folder_in_use_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    blueprint = blueprint_of("tiny-opt")
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        export_model(blueprint, iter(()), torch.float32, used)

    def torn() -> Iterator[tuple[str, Tensor]]:
        yield next(iter(filled(blueprint).items()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(blueprint, torn(), torch.float32, tmp_path / "new")
    with pytest.raises(RuntimeError, match="weights are missing"):
        export_model(blueprint, iter(list(filled(blueprint).items())[1:]), torch.float32, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    (tmp_path / "empty").mkdir()
    export_model(blueprint, iter(filled(blueprint).items()), torch.float32, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_export_to_where_no_folder_can_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    blueprint = blueprint_of("tiny-opt")
    with pytest.raises(UserError, match="the model cannot be written") as caught:
        export_model(blueprint, iter(filled(blueprint).items()), torch.float32, tmp_path / "file" / "out")
    assert "\n" not in str(caught.value)


def exported(folder: Path, name: str, **options: Any) -> str:
    blueprint = blueprint_of(name, **options)
    export_model(blueprint, iter(filled(blueprint).items()), torch.float32, folder)
    return str(folder)


def test_new_classification_head_is_seeded_and_the_body_is_loaded(tmp_path: Path) -> None:
    source = exported(tmp_path / "lm", "tiny-opt")
    values = filled(blueprint_of(source, random_weights=False))
    first = filled(blueprint_of(source, random_weights=False, head="classification"))
    second = filled(blueprint_of(source, random_weights=False, head="classification"))
    other = filled(blueprint_of(source, random_weights=False, head="classification", seed=1))
    assert torch.equal(first["score.weight"], second["score.weight"])
    assert not torch.equal(first["score.weight"], other["score.weight"])
    body = "model.decoder.layers.0.fc1.weight"
    assert torch.equal(first[body], values[body])


@pytest.mark.parametrize("name", [*DECODERS, "tiny-roberta"])
def test_new_question_answering_head_is_seeded_and_the_body_is_loaded(name: str, tmp_path: Path) -> None:
    """Also LLaMA's and its kin, whose body has another name in that model; and back in from its export."""
    source = exported(tmp_path / "lm", name)
    values = filled(blueprint_of(source, random_weights=False))
    its = {"random_weights": False, "head": "question_answering"}
    first, second = (filled(blueprint_of(source, **its)) for _ in range(2))
    other = filled(blueprint_of(source, **its, seed=1))
    assert torch.equal(first["qa_outputs.weight"], second["qa_outputs.weight"])
    assert not torch.equal(first["qa_outputs.weight"], other["qa_outputs.weight"])

    def body(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        outside = ("qa_outputs.", "lm_head.", "classifier.")
        return {key.partition(".")[2]: value for key, value in tensors.items() if not key.startswith(outside)}

    assert body(first).keys() == body(values).keys()
    for path, value in body(first).items():
        assert torch.equal(value, body(values)[path]), path
    again = filled(blueprint_of(exported(tmp_path / "qa", source, **its), **its))
    assert again.keys() == first.keys()
    for path, value in again.items():
        assert torch.equal(value, first[path]), path


def test_head_of_another_size_is_replaced(tmp_path: Path) -> None:
    data = tmp_path / "three.tsv"
    data.write_text("".join(f"text {index}\t{index % 3}\n" for index in range(30)))
    source = exported(tmp_path / "two", "tiny-roberta")
    values = filled(blueprint_of(source, random_weights=False, data=str(data)))
    assert values["classifier.out_proj.weight"].shape == (3, 64)
    assert 0 < values["classifier.out_proj.weight"].std().item() < 0.2


def test_untying_a_tied_checkpoint_begins_with_the_embedding(tmp_path: Path) -> None:
    source = exported(tmp_path / "tied", "tiny-opt")
    values = filled(blueprint_of(source, random_weights=False, untied=True))
    assert torch.equal(values["lm_head.weight"], values["model.decoder.embed_tokens.weight"])


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = Path(exported(tmp_path / "two", "tiny-roberta"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(UserError, match=r"config.json: is damaged.*delete SHA256SUMS"):
        blueprint_of(str(source), random_weights=False)
    (source / SUMS).unlink()
    with pytest.raises(UserError, match=r"lacks \d+ weights, roberta.encoder.layer.3"):
        blueprint_of(str(source), random_weights=False)
    (source / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="weights cannot be loaded"):
        blueprint_of(str(source), random_weights=False)


@pytest.mark.parametrize("lost", ["hidden_size", "num_hidden_layers"])
def test_a_configuration_that_lost_a_size_is_refused_before_its_model_is_made(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be the family's default: a model of 7B here, made and initialised in memory."""
    source = Path(exported(tmp_path / "source", "tiny-llama"))
    (source / "SHA256SUMS").unlink()
    config = json.loads((source / "config.json").read_text())
    del config[lost]
    (source / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("harness.models.weights.auto_class", None)
    with pytest.raises(UserError, match=r"config\.json"):
        blueprint_of(str(source), random_weights=False)


@pytest.mark.parametrize("index", [{}, [], {"weight_map": "x"}, {"weight_map": {"a": ["b"]}}])
def test_a_list_of_weights_that_names_no_files_is_one_line(index: Any, tmp_path: Path) -> None:
    source = Path(exported(tmp_path / "source", "tiny-llama"))
    (source / "SHA256SUMS").unlink()
    (source / "model.safetensors").rename(source / "model-1.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        blueprint_of(str(source), random_weights=False)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", [*DECODERS, "tiny-roberta"])
def test_a_checkpoint_that_is_the_models_own_is_read_where_it_lies(
    name: str, shards: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor by tensor; `locate` says where the bytes are that `fill` writes. transformers reads nothing."""
    random = blueprint_of(name)
    values = filled(random)
    export.write_model(
        tmp_path / "model",
        config=random.config,
        expected=random.parameter_shapes,
        weights=iter(values.items()),
        buffers=random.persistent_buffers,
        dtype=torch.bfloat16,
        extra_files=[],
        shard_bytes=50_000 if shards else 10**9,
    )
    monkeypatch.setattr("harness.models.blueprint.checkpoint_weights", None)
    source = config_folder(tmp_path / "model", {**random.config.to_dict()})
    stored = blueprint_of(source, random_weights=False)
    for path, value in filled(stored).items():
        expected = values[path].to(torch.bfloat16)
        assert torch.equal(value, expected.float()), path
        place = stored.locate(path)
        assert place is not None
        assert place.dtype == "bf16"
        raw = place.path.read_bytes()[place.offset_bytes :][: place.num_bytes]
        assert raw == expected.contiguous().view(torch.uint8).numpy().tobytes()
    assert random.locate(path) is None


@pytest.mark.parametrize("change", ["cut", "dtype", "missing", "prefix"])
def test_other_checkpoints_go_the_way_of_transformers(change: str, tmp_path: Path) -> None:
    source = Path(exported(tmp_path / "model", "tiny-opt"))
    file = source / "model.safetensors"
    tensors = load_file(file)
    its_job = job(str(source), random_weights=False)
    model = build_on_meta(AutoConfig.from_pretrained(source), "causal_lm")

    def stored() -> Any:
        return stored_tensors(its_job.model, model, "model")

    assert stored() is not None
    first = next(iter(tensors))
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif change == "dtype":
        save_file({**tensors, first: tensors[first].to(torch.float16)}, file, {"format": "pt"})
    elif change == "missing":
        save_file({key: value for key, value in tensors.items() if key != first}, file, {"format": "pt"})
    else:  # as the body alone is published: this is understood
        body = {key.removeprefix("model."): value for key, value in tensors.items()}
        save_file(body, file, {"format": "pt"})
        (source / SUMS).unlink()  # it says what the export was
        assert stored() is not None
        for path, value in filled(blueprint_of(str(source), random_weights=False)).items():
            assert torch.equal(value, tensors[path])
        return
    assert stored() is None


@pytest.mark.parametrize("dtypes", ["one", "two"])
@pytest.mark.parametrize("name", ["tiny-opt", "tiny-llama", "tiny-roberta"])
def test_blocks_that_the_configuration_leaves_out_are_refused(name: str, dtypes: str, tmp_path: Path) -> None:
    """Read by us, and by transformers (a file of two precisions); other heads and old buffers are let be."""
    source = Path(exported(tmp_path / "model", name))
    (source / SUMS).unlink()
    file, config = source / "model.safetensors", json.loads((source / "config.json").read_text())
    tensors = load_file(file)
    if dtypes == "two":
        first = next(iter(tensors))
        tensors[first] = tensors[first].to(torch.float16)
    block = next(key for key in tensors if ".0." in key).split(".0.")[0] + ".0."
    harmless = {
        f"{block}attn.inv_freq": torch.zeros(4),
        f"{block}attn.masked_bias": torch.zeros(1),
        "score.weight": torch.zeros(2, 4),
    }
    save_file({**tensors, **harmless}, file, {"format": "pt"})
    blueprint_of(str(source), random_weights=False)
    save_file({**tensors, **harmless, f"{block}mlp.extra.weight": torch.zeros(3)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"that config.json does not make \(1, .*extra"):
        blueprint_of(str(source), random_weights=False)
    save_file(tensors, file, {"format": "pt"})
    blocks = len({re.search(r"\.(\d+)\.", key)[1] for key in tensors if re.search(r"\.(\d+)\.", key)})  # type: ignore[index]
    config["num_hidden_layers"] = blocks - 1
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"tensors of blocks .*\.{blocks - 1}\.") as caught:
        blueprint_of(str(source), random_weights=False)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(source), "")) < 200


def test_a_checkpoint_that_shrinks_under_the_run_is_one_line(tmp_path: Path) -> None:
    source = Path(exported(tmp_path / "model", "tiny-opt"))
    blueprint = blueprint_of(str(source), random_weights=False)
    (source / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="the file has become shorter") as caught:
        filled(blueprint)
    assert "\n" not in str(caught.value)
