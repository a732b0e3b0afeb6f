from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_configs import config_of
from family_models import family_model
from huggingface_hub.errors import LocalEntryNotFoundError
from settings_given import given_for_each
from transformers import AutoConfig

from engines.errors import UserError
from engines.model.blocks import find_blocks
from engines.shapes import Head
from harness.models.auto_classes import auto_class
from harness.models.blueprint import make_blueprint
from harness.models.closed_forms import CLOSED_FORMS, is_counted_in_closed_form
from harness.models.configs import NAMED_SHAPES, load_config, named_shape, shape_of_config
from harness.models.counted_shape import shape_from_meta
from harness.records.job import DataSource, Job, ModelSource
from harness.resolve import resolve_shape

ROOT = Path(__file__).parents[3]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama with biases and wide heads": {
        "model_type": "llama", **SMALL, "num_key_value_heads": 1, "head_dim": 12, "attention_bias": True,
        "mlp_bias": True, "vocab_size": 50, "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", **SMALL, "num_key_value_heads": 1, "vocab_size": 50},
    "bert": {"model_type": "bert", **SMALL, "vocab_size": 50, "max_position_embeddings": 32},
    "opt without biases": {
        "model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "ffn_dim": 40, "vocab_size": 50, "enable_bias": False,
        "layer_norm_elementwise_affine": False, "max_position_embeddings": 32,
    },
    "gpt2 with its own inner width": {
        "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 40, "vocab_size": 50,
    },
}  # fmt: skip
DEFAULTS = {f"{family} by default": {"model_type": family} for family in CLOSED_FORMS}
CONFIGS = {name: dict(shape.config) for name, shape in NAMED_SHAPES.items()} | VARIANTS | DEFAULTS


ODD: tuple[dict[str, Any], ...] = (
    {"num_attention_heads": 5, "n_head": 5},
    {"hidden_size": 65, "n_embd": 65},
    {"hidden_act": "swiglu", "activation_function": "swiglu"},
    {"hidden_act": 7, "activation_function": 7},
    {"hidden_act": "quick_gelu", "activation_function": "quick_gelu"},
    {"head_dim": 15},
    {"rope_scaling": {"rope_type": "foo", "factor": 2.0}},
    {"rope_scaling": {"type": "linear"}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    {"rope_scaling": 7},
    {"rope_theta": "a"},
    {"layer_types": ["full_attention"]},
    {"tie_word_embeddings": "yes"},
    {"pad_token_id": 1000},
    {"eos_token_id": [1, 2]},
    {"dtype": "float7"},
    {"initializer_range": -1},
    {"add_cross_attention": True},
    {"is_encoder_decoder": True},
)
"""What `recommend` planned for and `run` refused, or built otherwise; and some that both take."""


@pytest.mark.parametrize("family", CLOSED_FORMS)
def test_what_transformers_refuses_has_no_closed_form(family: str) -> None:
    """And what the closed form counts is what is built."""
    names = {
        "opt": {"ffn_dim": 40, "word_embed_proj_dim": 16},
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    }
    plain = {
        "model_type": family,
        "vocab_size": 50,
        "max_position_embeddings": 32,
        **SMALL,
        **names.get(family, {}),
    }
    if family == "gpt2":
        assert not is_counted_in_closed_form(plain)  # by names that are not its own
        plain = {key: plain[key] for key in ("model_type", "vocab_size", "n_embd", "n_layer", "n_head")}
    assert is_counted_in_closed_form(plain)
    head = heads_of(plain)[0]
    counted = 0
    for odd in ODD:
        if any(key.startswith("rope") for key in odd) and family not in ("llama", "mistral", "qwen2"):
            continue
        config = {**plain, **{key: value for key, value in odd.items() if key in plain or len(odd) == 1}}
        if not is_counted_in_closed_form(config):
            continue
        counted += 1
        closed = shape_of_config(config, name=family, head=head, num_labels=0)
        assert closed == shape_from_meta(config, name=family, head=head, num_labels=0), odd
    assert counted >= 3
    refused = [{**plain, **odd} for odd in ODD[:5] if odd.keys() & plain.keys()]
    assert not any(is_counted_in_closed_form(config) for config in refused)


def heads_of(config: dict[str, Any]) -> tuple[Head, ...]:
    others: tuple[Head, ...] = ("classification", "question_answering")
    return (("masked_lm" if config["model_type"] in ("bert", "roberta") else "causal_lm"), *others)


LABELS: dict[Head, int] = {"causal_lm": 0, "masked_lm": 0, "classification": 3, "question_answering": 2}


def build(config: dict[str, Any], head: Head, num_labels: int, untied: bool) -> Any:
    typed = AutoConfig.for_model(**config)
    if untied:
        typed.tie_word_embeddings = False
    if head not in ("causal_lm", "masked_lm"):
        typed.num_labels = num_labels
    with torch.device("meta"):
        return auto_class(head).from_config(typed)


@pytest.mark.parametrize("name", CONFIGS)
def test_closed_form_counts_what_transformers_builds(name: str) -> None:
    config = CONFIGS[name]
    for head in heads_of(config):
        num_labels = LABELS[head]
        model = build(config, head, num_labels, untied=False)
        shape = shape_of_config(config, name=name, head=head, num_labels=num_labels)
        sizes = [parameter.numel() for parameter in model.parameters()]
        assert shape.parameters == sum(sizes)
        assert shape.largest_tensor == max(sizes)
        _, blocks = find_blocks(model)
        assert shape.num_blocks == len(blocks)
        assert shape.block_parameters == sum(parameter.numel() for parameter in blocks[-1].parameters())
        stored = {path: tuple(p.shape) for path, p in blocks[0].named_parameters() if p.dim() == 2}
        if shape.family == "gpt2":  # inputs x outputs
            stored = {path: (columns, rows) for path, (rows, columns) in stored.items()}
        assert {matrix.name: (matrix.rows, matrix.columns) for matrix in shape.matrices} == stored
        assert shape.num_labels == num_labels


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-qwen2", "tiny-gpt2", "opt-350m"])
def test_untied_head_is_counted_on_its_own(name: str) -> None:
    config = CONFIGS[name]
    tied = shape_of_config(config, name=name, head="causal_lm", num_labels=0)
    untied = shape_of_config(config, name=name, head="causal_lm", num_labels=0, untied=True)
    assert tied.tied
    assert not untied.tied
    assert untied.parameters == tied.parameters + tied.head_parameters
    assert untied.parameters == sum(
        p.numel() for p in build(config, "causal_lm", 0, untied=True).parameters()
    )


@pytest.mark.parametrize("name", VARIANTS | {name: None for name in NAMED_SHAPES if name.startswith("tiny")})
def test_fallback_for_unknown_families_agrees_with_the_closed_form(name: str) -> None:
    config = CONFIGS[name]
    for head in heads_of(config):
        num_labels = LABELS[head]
        closed = shape_of_config(config, name=name, head=head, num_labels=num_labels)
        counted = shape_from_meta(config, name=name, head=head, num_labels=num_labels)
        order = {matrix.name: matrix for matrix in counted.matrices}
        assert {matrix.name: matrix for matrix in closed.matrices} == order
        for field in closed.__slots__:
            if field != "matrices":
                assert getattr(closed, field) == getattr(counted, field), field


def test_known_families_need_no_torch(tmp_path: Path) -> None:
    """From the table of named shapes and from a folder, each family with every head it has."""
    for family in CLOSED_FORMS:
        (tmp_path / family).mkdir()
        (tmp_path / family / "config.json").write_text(json.dumps({"model_type": family}))
    code = """
import sys
from harness.records.job import DataSource, Job, ModelSource
from harness.resolve import resolve_shape
for name in sys.argv[1:]:
    for head in ("auto", "classification", "question_answering"):
        source = ModelSource(name=name, head=head, random_weights=True)
        resolve_shape(Job(model=source, data=DataSource(train="random"), seq_len=16))
sys.exit(", ".join({"torch", "transformers"} & sys.modules.keys()) or None)
"""
    names = ["opt-13b", "roberta-base", *(str(tmp_path / family) for family in CLOSED_FORMS)]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("opt-125m", 125_239_296), ("opt-350m", 331_196_416), ("opt-1.3b", 1_315_758_080),
        ("opt-13b", 12_853_473_280), ("llama-2-7b", 6_738_415_616), ("llama-3.1-8b", 8_030_261_248),
        ("qwen2.5-0.5b", 494_032_768), ("qwen2.5-7b", 7_615_616_512), ("deepseek-coder-1.3b", 1_346_471_936),
        ("deepseek-coder-6.7b", 6_740_512_768), ("gpt2", 124_439_808), ("gpt2-large", 774_030_080),
    ],
)  # fmt: skip
def test_totals_are_the_published_ones(name: str, published: int) -> None:
    assert named_shape(name).parameters == published


def test_every_tiny_shape_holds_bytes_and_is_small() -> None:
    tiny = [named_shape(name) for name in NAMED_SHAPES if name.startswith("tiny")]
    assert {shape.family for shape in tiny} == {"opt", "llama", "qwen2", "gpt2", "roberta"}
    for shape in tiny:
        assert (shape.hidden, shape.vocabulary, shape.max_seq_len) == (64, 320, 256)


def job(name: str, data: str = "random", evaluate: str | None = None, **fields: Any) -> Job:
    model = {key: fields.pop(key) for key in ("head", "untied", "random_weights", "layers") if key in fields}
    return Job(
        model=ModelSource(name=name, **{"random_weights": True, **model}),
        data=DataSource(train=data, evaluate=evaluate),
        **{"seq_len": 16, **fields},
    )


def test_data_decides_head_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "three.tsv"
    path.write_text("".join(f"text {label}\t{label}\n" for label in (0, 2, 1)))
    encoder = resolve_shape(job("tiny-roberta", str(path)))
    assert (encoder.head, encoder.num_labels) == ("classification", 3)
    decoder = resolve_shape(job("tiny-opt", str(path)))
    assert (decoder.head, decoder.num_labels) == ("causal_lm", 0)
    classifier = resolve_shape(job("tiny-opt", str(path), head="classification"))
    assert (classifier.head, classifier.num_labels) == ("classification", 3)
    assert resolve_shape(job("tiny-roberta", "builtin")).num_labels == 2
    assert resolve_shape(job("tiny-roberta", "random")).num_labels == 2


def test_questions_ask_for_their_head(tmp_path: Path) -> None:
    path = tmp_path / "squad.jsonl"
    record = {"question": "who?", "context": "it was she", "answer_start": 7, "answer_end": 10}
    path.write_text(f"{json.dumps(record)}\n" * 3)
    for name in ("tiny-opt", "tiny-roberta"):
        shape = resolve_shape(job(name, str(path)))
        assert (shape.head, shape.num_labels) == ("question_answering", 2)
        for data in ("random", "builtin"):
            assert resolve_shape(job(name, data, head="question_answering")) == shape
    for head in ("classification", "causal_lm"):
        with pytest.raises(UserError, match="use --head question_answering"):
            resolve_shape(job("tiny-opt", str(path), head=head))


def test_a_family_without_a_question_answering_head_is_named(tmp_path: Path) -> None:
    config = {"model_type": "gemma", "vocab_size": 300, "head_dim": 8, "num_key_value_heads": 1, **SMALL}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no question-answering head for its type 'gemma'") as caught:
        resolve_shape(job(str(tmp_path), head="question_answering"))
    assert "\n" not in str(caught.value)


def test_untied_reaches_the_shape() -> None:
    assert resolve_shape(job("tiny-opt")).tied
    assert not resolve_shape(job("tiny-opt", untied=True)).tied


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-llama", "tiny-qwen2", "tiny-gpt2", "tiny-roberta"])
def test_the_first_blocks_alone(name: str) -> None:
    whole, cut = resolve_shape(job(name)), resolve_shape(job(name, layers=2))
    assert (whole.num_blocks, cut.num_blocks) == (3, 2)
    assert cut.parameters == whole.parameters - whole.block_parameters
    model = make_blueprint(job(name, layers=2), cut).model
    assert cut.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_blocks_that_are_of_several_kinds_are_cut_too(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = NAMED_SHAPES["tiny-qwen2"].config | {"layer_types": kinds}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = ModelSource(name=str(tmp_path), random_weights=True, layers=2)
    assert load_config(source)["layer_types"] == kinds[:2]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"layers": 4}, "--layers 4: tiny-llama has 3 blocks; use --layers 3 or less"),
        ({"layers": 2, "random_weights": False, "name": "."}, "leaves blocks of a checkpoint out"),
    ],
)
def test_blocks_that_cannot_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], why: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NAMED_SHAPES["tiny-llama"].config))
    (tmp_path / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=why):
        load_config(ModelSource(**{"name": "tiny-llama", "random_weights": True, **fields}))


def test_local_folder_and_family_without_closed_form(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt_neox", "vocab_size": 300, "max_position_embeddings": 64, **SMALL,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = resolve_shape(job(str(tmp_path)))
    assert shape.family == "gpt_neox"
    assert shape.num_blocks == 2
    assert shape.parameters == sum(p.numel() for p in build(config, "causal_lm", 0, False).parameters())


def test_masked_language_models_without_closed_form_classify(tmp_path: Path) -> None:
    config = {"model_type": "electra", "vocab_size": 300, "embedding_size": 16, **SMALL}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert resolve_shape(job(str(tmp_path))).head == "classification"


def faults(tmp_path: Path) -> dict[str, tuple[Job, str]]:
    def folder(name: str, text: str | None) -> str:
        made = tmp_path / name
        made.mkdir()
        if text is not None:
            (made / "config.json").write_text(text)
        return str(made)

    text = tmp_path / "plain.txt"
    text.write_text("words " * 100)
    return {
        "close match": (job("opt-1.3"), r"did you mean opt-1\.3b.*lspzo-bench models"),
        "far match": (job("zzzzz"), "no named shape.*see 'lspzo-bench models'"),
        "no weights": (job("opt-1.3b", random_weights=False), "add --random-weights or .* facebook/opt-1.3b"),
        "not cached": (job("nobody/nothing"), "nobody/nothing.*cannot be reached.*named shape"),
        "is a file": (job(str(text)), "is a file"),
        "not a model": (job(folder("empty", None)), "not a model.*no config.json"),
        "not JSON": (job(folder("torn", "{")), "not valid JSON"),
        "no type": (job(folder("typeless", "{}")), "names no model_type"),
        "malformed": (job(folder("bad", '{"model_type": "opt", "ffn_dim": "wide"}')), "'ffn_dim' is wrong"),
        "unknown type": (
            job(folder("odd", '{"model_type": "no_such_type"}')),
            "code from outside is not run",
        ),
        "pickled": (
            job(folder("bin", '{"model_type": "opt"}'), random_weights=False),
            "no safetensors weights",
        ),
        "too long": (job("tiny-opt", seq_len=257), "--seq-len 257: .* at most 256 tokens"),
        "encoder generates": (job("tiny-roberta", head="causal_lm"), "is an encoder"),
        "encoder on text": (job("tiny-roberta", str(text)), "without class labels"),
        "text answers nothing": (
            job("tiny-opt", str(text), head="question_answering"),
            "holds text data without answers in a text",
        ),
        "missing data": (job("tiny-opt", str(tmp_path / "none.txt")), "none.txt'.*no such file"),
    }


FAULTS = (
    "close match", "far match", "no weights", "not cached", "is a file", "not a model", "not JSON", "no type",
    "malformed", "unknown type", "pickled", "too long", "encoder generates", "encoder on text",
    "text answers nothing", "missing data",
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_mistakes_are_named(fault: str, tmp_path: Path) -> None:
    faulty, message = faults(tmp_path)[fault]
    with pytest.raises(UserError, match=message) as caught:
        resolve_shape(faulty)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 32.5, "32", True])
@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "num_key_value_heads"])
def test_a_size_that_no_model_has_is_no_plan(tmp_path: Path, key: str, value: Any) -> None:
    """The closed forms would count with it."""
    config = {"model_type": "llama", **SMALL, "vocab_size": 50, key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    job = Job(model=ModelSource(name=str(tmp_path), random_weights=True))
    with pytest.raises(UserError, match=f"config.json has {key} = .*, which is no whole number above 0"):
        resolve_shape(job)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"zo2": {"disk_blocks": 99}},
            "--set zo2.disk_blocks=99: tiny-opt has 3 blocks; use disk_blocks=3 or",
        ),
        ({"zo2": {"resident_blocks": "4"}}, "--set zo2.resident_blocks=4: tiny-opt has 3 blocks"),
        (
            {"zo2": {"train": "last:99"}},
            "--set zo2.train=last:99: tiny-opt has 3 blocks; use train=last:3 or",
        ),
        ({"mezo": {"train": "last:4"}}, "--set mezo.train=last:4: tiny-opt has 3 blocks"),
        (
            {"zo2": {"resident_blocks": 2, "disk_blocks": 2}},
            "resident_blocks=2 and --set zo2.disk_blocks=2: ",
        ),
        ({"zo3": {}}, "engine 'zo3': there is no such engine"),
        ({"lsp": {"dd": 1}}, r"did you mean d\? 'lspzo-bench engines' lists the settings of lsp"),
    ],
)
def test_settings_name_no_more_blocks_than_there_are(
    settings: dict[str, dict[str, str | int | float | bool]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve_shape(replace(job("tiny-opt"), settings=given_for_each(settings)))
    resolve_shape(
        replace(job("tiny-opt"), settings=given_for_each({"zo2": {"resident_blocks": 1, "disk_blocks": 2}}))
    )
    resolve_shape(
        replace(job("tiny-opt"), settings=given_for_each({"zo2": {"disk_blocks": "auto", "train": "last:3"}}))
    )


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    """Offline, as tests are, the download itself is refused."""
    downloads: list[str] = []

    def ask(url: str) -> None:
        if not answers:
            raise type("ConnectError", (Exception,), {})("[Errno -2] Name or service not known")

    def download(hub_id: str, name: str) -> str:
        downloads.append(hub_id)
        raise LocalEntryNotFoundError("none")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", ask)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match=r"nobody/nothing.*cannot be reached"):
        resolve_shape(job("nobody/nothing"))
    assert downloads == (["nobody/nothing"] if answers else [])


def test_a_named_shape_goes_before_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert load_config(ModelSource(name="gpt2", random_weights=True))["n_embd"] == 768


def test_blocks_of_unlike_size_are_counted_one_by_one() -> None:
    """The first block of DeepSeek-V3 has no experts; costs take every block for the largest."""
    shape = shape_from_meta(config_of("deepseek_v3"), name="tiny", head="causal_lm", num_labels=0)
    first, second = shape.block_sizes
    assert first != second
    assert shape.block_parameters == max(first, second)
    model = family_model("deepseek_v3").blueprint().model
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape_from_meta(config_of("llama"), name="t", head="causal_lm", num_labels=0).block_sizes == ()


@pytest.mark.parametrize(
    ("family", "is_recurrent"),
    [("mamba2", True), ("jamba", True), ("recurrent_gemma", True), ("rwkv", True), ("qwen3_next", True),
     ("zamba2", True), ("gemma2", False), ("mixtral", False), ("lfm2", False)],
)  # fmt: skip
def test_states_that_go_from_token_to_token_are_known(family: str, is_recurrent: bool) -> None:
    shape = shape_from_meta(config_of(family), name="tiny", head="causal_lm", num_labels=0)
    assert shape.is_recurrent is is_recurrent


@pytest.mark.parametrize("family", ["bloom", "mamba", "gptj", "zamba2", "distilbert", "xlm"])
def test_sizes_come_from_the_model_where_the_configuration_does_not_tell(family: str) -> None:
    shape = family_model(family).shape
    assert shape.vocabulary == 320
    assert shape.hidden == 32
    assert shape.max_seq_len >= 64
    assert shape.num_blocks in (2, 4)
